"""Algorithm 2 as transcribed: an example worked by hand, and what the thesis says of it in numbers."""

import itertools

import numpy as np
import pytest

from . import gld, noise, options
from .test_reference_self import START, assert_same, quadratic

TARGETS = [(2.0, -1.0), (0.5, -1.0), (0.5, -1.0)]
DIRECTIONS = {  # (step, tensor): of each leaf, v_1 and v_2 before the radii 1 and 1/2
    (0, "a"): [(1, -2)],
    (0, "b"): [(1, -1)],
    (1, "a"): [(1, -0.5), (0.5, -1)],
    (1, "b"): [(-0.5, 1), (1, -1)],
    (2, "a"): [(1, 1), (-1, -1)],
    (2, "b"): [(1, 1), (-1, -1)],
}


def by_hand(t, name, leaf, k):
    return [DIRECTIONS[t, name][leaf][k - 1]]


def distance(params, t):
    return abs(params["a"][0] - TARGETS[t][0]) + abs(params["b"][0] - TARGETS[t][1])


def drawn(t, name, leaf, k):
    return np.random.default_rng([t, len(name), ord(name[0]), leaf, k]).standard_normal(START[name].size)


def coupled(params, t):
    """What is good for one tensor depends on where the others stand."""
    return quadratic(params, t) + (params["w"].sum() - 2 * params.get("b", np.zeros(1)).sum()) ** 2


def test_algorithm_2_by_hand():
    """Two numbers a = b = 0, R = 2, K = 2, m = 2, l = 1; every loss below was worked out on paper."""
    start = {"a": np.zeros(1), "b": np.zeros(1)}
    states = options.trace(start, distance, 3, by_hand, width=2, depth=1, tries=2, radius=2.0)
    assert [state.losses for state in states] == [
        # theta stays where it is; a and b find their first two options
        [3.0, 2.0, 4.0, 3.0, 4.0, 2.5],
        # a: under +1, then under 0, which leads to the better point; b: under -1/2, then under 0
        [1.5, 2.5, 1.25, 1.5, 1.0, 2.0, 1.0, 0.5, 1.5, 1.5, 2.5, 1.0],
        # a takes +1/2, and b is searched there
        [0.5, 1.5, 1.0, 1.0, 2.0, 1.5, 0.0, 1.0, 0.5, 0.5, 0.5, 0.0],
    ]
    assert [(state.params["a"][0], state.params["b"][0]) for state in states] == [(0, 0), (0, -0.5), (0.5, -1)]
    decisions = [decision for state in states for decision in state.decisions.values()]
    assert [decision.best for decision in decisions] == [0, 0, 1, 0, 0, 0]  # the last one is a tie
    assert [decision.option_losses for decision in decisions] == [[2], [2.5], [1.25, 1], [0.5, 1], [0.5, 1], [0, 0]]
    assert [decision.kept for decision in decisions] == [
        [[1, 0]], [[2, 0]], [[2, 0], [1, 0]], [[1, 0], [2, 0]], [[0, 2], [0, 2]], [[0, 2], [2, 0]],
    ]  # fmt: skip
    left = [(option.born, option.values.tolist()) for option in states[1].options["a"] + states[1].options["b"]]
    assert left == [((1, 1, 1), [0.5]), ((1, 1, 0), [0.0]), ((1, 0, 1), [-0.5]), ((1, 0, 0), [0.0])]
    assert options.at_first(states[1].params["b"], states[1].options["b"]) == [-1.0]


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3)])
def test_directions_are_drawn_anew_under_every_leaf(width, depth):
    """m^l K perturbations a tensor and step, and sum m^i K of them up to the first update (pages 24 and 25)."""
    asked, tries = [], 4

    def direction(t, name, leaf, k):
        asked.append((t, name, leaf, k))
        return drawn(t, name, leaf, k)

    shape = {"width": width, "depth": depth, "tries": tries}
    states = options.trace(START, quadratic, depth + 3, direction, radius=0.5, **shape)
    assert len(set(asked)) == len(asked)
    for t, state in enumerate(states):
        leaves = width ** min(t, depth)
        assert sum(key[:2] == (t, "w") for key in asked) == leaves * tries
        assert len(state.losses) == len(START) * leaves * (tries + 1)
    until_first = sum(key[0] <= depth and key[1] == "w" for key in asked)
    assert until_first == sum(width**level * tries for level in range(depth + 1))
    moved = [not np.array_equal(state.params["w"], START["w"]) for state in states]
    assert not any(moved[:depth]) and moved[depth]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_option_is_algorithm_1_so_many_steps_later(depth):
    """Page 23; where the other tensors stand at their options, with more tensors than one."""

    def scheme(n, seed, name, step, draw):
        return drawn(step, name, 0, draw + 1)

    def algorithm_1(start):
        return gld.run(start, coupled, 8, radius=0.5, candidates=4, penalty=0.05, noise=scheme)

    def algorithm_2(start, **more):
        shape = {"width": 1, "depth": depth, "tries": 4, "first": 0}
        states = options.trace(start, coupled, 8, drawn, radius=0.5, penalty=0.05, **shape, **more)
        return [state.params for state in states]

    for start, more in [({"w": START["w"]}, {}), (START, {"others_at_first": True})]:
        for now, then in zip(algorithm_2(start, **more), [start] * depth + algorithm_1(start), strict=False):
            assert_same(now, then)
    assert any(
        not np.array_equal(a["w"], b["w"]) for a, b in zip(algorithm_2(START), algorithm_2(START, **more), strict=True)
    )


def test_an_option_keeps_the_indices_and_radius_of_its_birth():
    """s = 2 of six; R falls from step to step; each update is an option of l steps before."""
    depth, asked = 2, {}

    def select(t, name, theta):
        return noise.select(2, theta.size, 1, name, t)

    def direction(t, name, leaf, k):
        asked[t, leaf, k] = drawn(t, name, leaf, k)[:2]
        return asked[t, leaf, k]

    start = {"w": START["w"]}
    shape = {"width": 2, "depth": depth, "tries": 3}
    states = options.trace(start, quadratic, 9, direction, radius=lambda t, _: 1.0 / (t + 1), select=select, **shape)
    moves = 0
    for before, after in itertools.pairwise(states):
        t, leaf, k = before.options["w"][after.decisions["w"].best].born
        expected = before.params["w"].flatten()
        if k:
            expected[select(t, "w", expected)] += 2.0**-k / (t + 1) * asked[t, leaf, k]
            moves += 1
        assert_same({"w": after.params["w"].ravel()}, {"w": expected})
    assert moves > 2


def test_the_option_above_the_lowest_loss_is_taken():
    arguments = {"width": 3, "depth": 2, "tries": 2, "radius": 1.0, "penalty": {"w": 0.3, "b": 0.0}}
    best = set()
    for state in options.trace(START, quadratic, 9, drawn, **arguments)[2:]:
        for decision in state.decisions.values():
            lowest = [min(leaf) for leaf in decision.losses]
            assert decision.option_losses == [min(lowest[i : i + 3]) for i in (0, 3, 6)]
            assert decision.best == int(np.argmin(lowest)) // 3
            best.add(decision.best)
    assert len(best) > 1


def test_ranking_again_changes_the_order_alone():
    """Where all leaves are given the same directions, theta goes the same way whatever their order."""
    listing, again = (
        options.trace(
            START, coupled, 20, lambda t, name, leaf, k: drawn(t, name, 0, k),
            width=3, depth=2, tries=3, radius=1.0, reorder=reorder,
        )
        for reorder in (False, True)
    )  # fmt: skip
    orders = set()
    for one, other in zip(listing[2:], again[2:], strict=True):
        assert_same(one.params, other.params)
        for name, decision in one.decisions.items():
            leaves = decision.losses[3 * decision.best : 3 * decision.best + 3]
            order = np.argsort([min(leaf) for leaf in leaves]).tolist()
            left = [one.options[name][place].values.tolist() for place in order]
            assert [option.values.tolist() for option in other.options[name]] == left
            orders.add(tuple(order))
    assert orders & {(1, 2, 0), (2, 0, 1)}  # an order that is not its own inverse


def test_more_options_than_candidates():
    states = options.trace(START, quadratic, 3, drawn, width=5, depth=1, tries=1, radius=0.5)
    assert [len(state.options["w"]) for state in states] == [2, 2, 2]


def test_a_direction_of_the_wrong_size_is_refused():
    with pytest.raises(AssertionError, match="one entry for each of 6 indices, got 1"):
        options.trace(START, quadratic, 1, lambda *key: [1.0], width=1, depth=1, tries=1, radius=0.5)
