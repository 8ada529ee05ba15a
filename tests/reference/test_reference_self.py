"""The transcriptions against published facts, examples worked by hand, and independent libraries."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform

from . import first_order, fisher, gld, gldsearch, noise, schedules, smtp, stp

TARGET = {"w": np.array([[0.5, -1.0, 0.25], [1.5, 0.0, -0.5]]), "b": np.array([0.75, -0.25])}
START = {name: np.zeros_like(value) for name, value in TARGET.items()}


def quadratic(params, t):
    """Moves a little with the step, as batches do, and couples the tensors."""
    parts = [np.sum((params[name] - TARGET[name] - 0.05 * math.sin(3 * t + 1)) ** 2) for name in params]
    return sum(parts) + 0.1 * parts[0] * parts[-1]


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance)


# noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's kat_vectors."""
    parse = lambda text: [int(word, 16) for word in text.split()]  # noqa: E731
    out = noise.philox4x32_10(np.array(parse(counter), dtype=np.uint64), tuple(parse(key)))
    assert out.tolist() == parse(expected)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "near-normal"])
def test_noise_moments_and_independence(kind):
    n = 20_000
    z = noise.NOISE[kind](n, 1, "w", 5, 2)
    others = [noise.NOISE[kind](n, *k) for k in [(2, "w", 5, 2), (1, "v", 5, 2), (1, "w", 6, 2), (1, "w", 5, 3)]]
    bound = 5 / math.sqrt(n)
    assert abs(z.mean()) < bound and abs(z.var() - 1) < 2 * bound
    assert abs(np.mean(z[1:] * z[:-1])) < bound
    for other in others:
        assert abs(np.mean(z * other)) < bound
    kurtosis = {"rademacher": 1.0, "gaussian": 3.0, "near-normal": 3 - 2 / 32}[kind]
    assert abs(np.mean(z**4) - kurtosis) < 0.2
    np.testing.assert_array_equal(noise.NOISE[kind](77, 1, "w", 5, 2), z[:77])


def test_bits_by_hand():
    """Element 128 q + 32 w + b is bit b of word w of block q."""
    key = noise.key_of(3, "w")
    values = noise.rademacher(300, 3, "w", 7, 1)
    for element, block, word, bit in [(0, 0, 0, 0), (31, 0, 0, 31), (127, 0, 3, 31), (130, 1, 0, 2), (229, 1, 3, 5)]:
        out = noise.philox4x32_10(np.array([block, 0, 7, 1], dtype=np.uint64), key)
        assert values[element] == 1 - 2 * int(f"{int(out[word]):032b}"[31 - bit])
    out = noise.philox4x32_10(np.array([0, noise.NEAR_NORMAL << 24, 7, 1], dtype=np.uint64), key)
    assert noise.near_normal(3, 3, "w", 7, 1)[2] == (bin(int(out[2])).count("1") - 16) / math.sqrt(8)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 1023, 1025])
def test_selection_is_a_prefix_of_a_permutation(n):
    permute = noise.permutation(n, 42, "w", 3)
    order = [permute(j) for j in range(n)]
    assert sorted(order) == list(range(n))
    for s in {1, n // 2, n} - {0}:
        assert noise.select(s, n, 42, "w", 3).tolist() == sorted(order[:s])
    assert noise.select(n + 5, n, 42, "w", 3).tolist() == list(range(n))
    if n > 16:
        assert noise.select(n // 2, n, 42, "w", 3).tolist() != noise.select(n // 2, n, 42, "w", 4).tolist()


def test_every_index_is_selected_alike_often():
    counts = np.zeros(50)
    for step in range(400):
        counts[noise.select(10, 50, 0, "w", step)] += 1
    assert abs(counts - 80).max() < 5 * math.sqrt(400 * 0.2 * 0.8)


# gradientless descent


def ones(n, seed, name, step, draw):
    """A direction that can be worked by hand: +1 in even steps, -1 in odd ones."""
    return np.full(n, 1.0 if step % 2 == 0 else -1.0)


def test_algorithm_1_by_hand():
    """theta = 0, R = 4, K = 3, f = |theta - 1.9|: candidates 0, 4, 2, 1; then 2, -2, 0, 1."""
    states = gld.trace({"w": np.zeros(1)}, lambda p, t: abs(p["w"][0] - 1.9), 2, radius=4.0, candidates=3, noise=ones)
    np.testing.assert_allclose(states[0].losses["w"], [1.9, 2.1, 0.1, 0.9])
    assert [state.params["w"][0] for state in states] == [2.0, 2.0]
    assert [state.chosen["w"] for state in states] == [2, 0]
    tie = gld.trace({"w": np.zeros(1)}, lambda p, t: 1.0, 1, noise=ones)
    assert tie[0].chosen["w"] == 0


def test_penalty_by_hand():
    def flat(p, t):
        return 0.0

    start = {"w": np.array([3.0, 4.0]), "b": np.array([100.0])}
    plain = gld.trace(start, flat, 1, radius=1.0, candidates=1, penalty=0.5, noise=ones)
    squared = gld.trace(
        start, flat, 1, radius=1.0, candidates=1, penalty={"w": 0.5, "b": 0.0}, squared=True, noise=ones
    )
    np.testing.assert_allclose(plain[0].losses["w"], [2.5, 0.5 * math.sqrt(41)])
    np.testing.assert_allclose(squared[0].losses["w"], [12.5, 20.5])
    assert squared[0].losses["b"] == [0.0, 0.0]
    pooled = gld.trace(start, flat, 1, radius=1.0, candidates=1, penalty=1.0, pool=True, noise=ones)
    np.testing.assert_allclose(pooled[0].losses["@pool"][0], math.sqrt(10025))


def test_options_by_hand():
    """m = 2, one level, K = 1, R = 1, directions +1, -1, +1 ...; f_t as a table of values."""
    tables = [
        {0: 5.0, 1: 4.0},  # under empty: 0 and +1; kept +1, 0
        {1: 6.0, 0: 5.0, -1: 1.0},  # under +1: 1, 0; under 0: 0, -1. Best under 0: commit 0, keep -1, 0
        {-1: 2.0, 0: 3.0, 1: 7.0},  # under -1: -1, 0; under 0: 0, 1. Best under -1: commit -1, keep 0, +1
    ]
    f = lambda p, t: tables[t][int(p["w"][0])]  # noqa: E731
    states = gld.trace({"w": np.zeros(1)}, f, 3, radius=1.0, candidates=1, options=(2, 1), noise=ones)
    assert [state.params["w"][0] for state in states] == [0.0, 0.0, -1.0, -1.0]  # the last is finish()
    assert [state.chosen["w"] for state in states[:3]] == [0, 1, 0]
    assert states[0].losses["w"] == [5.0, 4.0]
    assert states[1].losses["w"] == [6.0, 5.0, 5.0, 1.0]
    assert states[2].losses["w"] == [2.0, 3.0, 3.0, 7.0]
    assert gld.tree(states[0].options["w"]) == [(((1.0, 0, 0),), []), ((), [])]
    assert gld.tree(states[1].options["w"]) == [(((1.0, 1, 1),), []), ((), [])]  # drawn under the second leaf
    assert gld.tree(states[2].options["w"]) == [((), []), (((1.0, 2, 0),), [])]


def test_confirm_by_hand():
    """The pending +1 is not confirmed on the second batch: its children stay, on its base."""
    tables = [{0: 5.0, 1: 4.0}, {0: 1.0, 1: 6.0}, {0: 9.0, 1: 8.0, 2: 7.0}]
    f = lambda p, t: tables[t][int(p["w"][0])]  # noqa: E731
    states = gld.trace({"w": np.zeros(1)}, f, 3, radius=1.0, candidates=1, options=(1, 1), confirm=True, noise=ones)
    assert [state.chosen["w"] for state in states[:3]] == [0, -1, 0]
    assert states[1].losses["w"] == [1.0, 6.0, 1.0]  # theta, then +1 and +1 - 1
    assert [state.params["w"][0] for state in states] == [0.0, 0.0, 0.0, 1.0]
    assert gld.tree(states[1].options["w"]) == [(((1.0, 0, 0), (1.0, 1, 0)), [])]
    assert states[1].pending["w"][0] == 0.0 and states[2].pending["w"][0] == 1.0


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("extra", [{}, {"pool": True}, {"entries": 2, "selection": "random", "reselect_every": 2}])
def test_one_option_a_level_is_algorithm_1_later(levels, extra):
    settings = {"radius": 0.3, "candidates": 3, "entries": 4, "penalty": 0.05, **extra}
    plain = gld.run(START, quadratic, 10, **settings)
    shifted = gld.run(START, quadratic, 10, options=(1, levels), **settings)
    assert len(shifted) == 11
    for t in range(10):
        assert_same(shifted[t], plain[t - levels] if t >= levels else START, 1e-12)
    assert_same(shifted[10], plain[9], 1e-12)
    assert any(np.any(plain[t]["w"] != plain[t - 1]["w"]) for t in range(1, 10))


@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (3, 2)])
def test_the_tree_keeps_its_shape_and_its_order(shape):
    width, levels = shape
    states = gld.trace(START, quadratic, 6, radius=0.3, candidates=3, options=shape)

    def check(options, level, here, expected):
        assert len(options) == (width if level <= expected else 0)
        assert [p.loss for p in options] == sorted(p.loss for p in options)
        for p in options:
            check(p.children, level + 1, here + p.values, expected)

    for block in START:
        check(states[-2].options[block], 1, states[-2].params[block].reshape(-1), levels)
    assert len(states[-2].losses["w"]) == width**levels * 4
    assert_same(states[-1].params, states[-2].pending)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"entries": 2},
        {"entries": {"w": 5, "b": None}, "selection": {"w": "magnitude", "b": "all"}, "reselect_every": 7},
        {"entries": 3, "pool": True},
        {"sweep": "parallel", "radius": 0.1},
        {"options": (2, 2)},
        {"options": (2, 1), "confirm": True},
        {"options": (2, 1), "sweep": "parallel", "radius": 0.1},
        {"momentum": 0.5, "momentum_weighted": True},
        {"noise": "rademacher"},
        {"noise": "near-normal", "schedule": lambda t: schedules.linear(t, 80, 0.1)},
    ],
)
def test_gld_descends_a_quadratic(settings):
    still = lambda p, t: quadratic(p, 0)  # noqa: E731
    settings = {"radius": 0.3, "candidates": 4, **settings}
    path = gld.run(START, still, 80, **settings)
    losses = [still(START, 0)] + [still(point, 0) for point in path]
    assert losses[-1] < 0.2 * losses[0]
    if settings.get("sweep") != "parallel":
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses)) or "options" in settings


def test_selection_moves_only_what_it_says():
    states = gld.trace(START, quadratic, 12, radius=0.3, entries=2, reselect_every=4)
    before = START["w"]
    for t, state in enumerate(states):
        assert state.selected["w"].tolist() == noise.select(2, 6, 0, "w", t - t % 4).tolist()
        assert state.selected["b"].tolist() == [0, 1]
        moved = np.flatnonzero(state.params["w"] != before)
        assert set(moved) <= set(state.selected["w"].tolist())
        before = state.params["w"]


def test_magnitude_looks_at_the_weights_of_the_birth_step():
    start = {"w": np.array([0.1, -3.0, 2.0, -2.0, 0.0])}
    down = lambda p, t: float(np.sum(np.abs(p["w"])))  # noqa: E731
    states = gld.trace(start, down, 9, radius=2.0, entries=2, selection="magnitude", reselect_every=3)
    assert states[0].selected["w"].tolist() == [1, 2]  # ties: the lower index
    weights = [start, *[state.params for state in states]]
    for t, state in enumerate(states):
        scores = np.abs(weights[t - t % 3]["w"])
        assert sorted(scores[state.selected["w"]]) == sorted(scores)[-2:]
    fixed = gld.trace(start, down, 1, selection="fixed", indices={"w": [4, 0]})
    assert fixed[0].selected["w"].tolist() == [0, 4]
    ranked = gld.trace(start, down, 1, entries=1, selection="fisher", importance=lambda p, name, t: [0, 1, 5, 2, 5])
    assert ranked[0].selected["w"].tolist() == [2]


def test_a_pool_of_everything_uses_the_tensors_own_noise():
    states = gld.trace(START, quadratic, 1, radius=0.3, candidates=1, pool=True)
    z = {name: noise.gaussian(value.size, 0, name, 0, 0).reshape(value.shape) for name, value in START.items()}
    moved = {name: 0.3 * z[name] for name in z}
    np.testing.assert_allclose(states[0].losses["@pool"], [quadratic(START, 0), quadratic(moved, 0)])
    few = gld.trace(START, quadratic, 1, radius=0.3, entries=3, pool=True)
    assert few[0].selected["@pool"].tolist() == noise.select(3, 8, 0, "@pool", 0).tolist()


def test_parallel_sweep_adds_winners_found_at_one_point():
    states = gld.trace(START, quadratic, 1, radius=0.3, sweep="parallel")
    for name in START:
        alone = gld.trace(START, quadratic, 1, radius=0.3, sweep="parallel")[0].losses[name]
        points = [START[name]] + [
            START[name] + 0.3 * 2.0**-k * noise.gaussian(START[name].size, 0, name, 0, k).reshape(START[name].shape)
            for k in range(5)
        ]
        expected = [quadratic({**START, name: point}, 0) for point in points]
        np.testing.assert_allclose(alone, expected)
        np.testing.assert_array_equal(states[0].params[name], points[int(np.argmin(expected))])


def test_tensors_in_turn_see_the_moves_before_them():
    """f = |a + b - 1|, both can move by 1: in turn only a moves; side by side both do, and the sum overshoots."""
    start = {"a": np.zeros(1), "b": np.zeros(1)}
    f = lambda p, t: abs(p["a"][0] + p["b"][0] - 1)  # noqa: E731
    for options in (None, (1, 1)):
        settings = {"radius": 1.0, "candidates": 1, "noise": ones, "options": options}
        in_turn = gld.trace(start, f, 1, **settings)
        assert in_turn[0].losses["b"] == [0.0, 1.0]
        assert in_turn[-1].params == {"a": 1.0, "b": 0.0}
        parallel = gld.trace(start, f, 1, sweep="parallel", **settings)
        assert parallel[0].losses["b"] == [1.0, 0.0]
        assert parallel[-1].params == {"a": 1.0, "b": 1.0}


def test_momentum_by_hand():
    """mu = 0.5, R = 1, K = 1, f = -theta in even steps and 0 in odd ones.

    t=0: move 1, m = 0.5. t=1: all equal, no move, m = 0.25. t=2: move 1 + 0.25, m = 0.125 + 0.625.
    """
    f = lambda p, t: -p["w"][0] if t % 2 == 0 else 0.0  # noqa: E731
    states = gld.trace({"w": np.zeros(1)}, f, 3, radius=1.0, candidates=1, momentum=0.5, noise=ones)
    assert [state.params["w"][0] for state in states] == [1.0, 1.0, 2.25]
    assert [state.momentum["w"][0] for state in states] == [0.5, 0.25, 0.75]
    weighted = gld.trace(
        {"w": np.zeros(1)}, f, 3, radius=1.0, candidates=1, momentum=0.5, momentum_weighted=True, noise=ones
    )
    assert weighted[2].improvements["w"] == [1.0, 1.25]
    assert weighted[2].momentum["w"][0] == pytest.approx(0.125 + 0.5 * (1.25 / 1.125) * 1.25)
    with pytest.raises(ValueError, match="momentum"):
        gld.trace(START, quadratic, 1, momentum=0.5, options=(1, 1))


def test_parameters_given_are_left_alone():
    start = {name: value.copy() for name, value in START.items()}
    gld.run(start, quadratic, 3, radius=0.3)
    gld.run(start, quadratic, 3, radius=0.3, options=(2, 1))
    for module in (stp, smtp):
        module.run(start, quadratic, 3, radius=0.3)
    gldsearch.run(start, quadratic, 3, radius=0.3, min_radius=0.01)
    assert_same(start, START)


# whole-vector methods


@pytest.mark.parametrize(
    ("radius", "min_radius", "count"), [(1.0, 1.0, 1), (1.0, 0.5, 2), (0.8, 0.1, 4), (1.0, 0.3, 2)]
)
def test_gldsearch_stays_within_its_radii(radius, min_radius, count):
    states = gldsearch.trace(START, quadratic, 1, radius=radius, min_radius=min_radius)
    assert len(states[0].losses) == 1 + count
    assert radius * 2.0 ** -(count - 1) >= min_radius > radius * 2.0**-count


def test_gldsearch_is_algorithm_1_on_one_pool():
    whole = gldsearch.run(START, quadratic, 10, radius=0.4, min_radius=0.05)
    pooled = gld.run(START, quadratic, 10, radius=0.4, candidates=4, pool=True)
    for a, b in zip(whole, pooled, strict=True):
        assert_same(a, b, 1e-12)


def test_stp_by_hand():
    states = stp.trace({"w": np.zeros(1)}, lambda p, t: (p["w"][0] + 1) ** 2, 3, radius=0.75, noise=ones)
    assert states[0].losses == [1.0, 1.75**2, 0.25**2]
    assert [state.params["w"][0] for state in states] == [-0.75, -0.75, -0.75]
    assert [state.chosen for state in states] == [2, 0, 0]


def test_smtp_of_constant_step_is_stp_in_z():
    """z± = z -+ gamma / (1 - beta) s, which is Lemma-level algebra on Algorithm 1."""
    beta, gamma = 0.6, 0.08
    with_momentum = smtp.trace(START, quadratic, 40, radius=gamma, momentum=beta)
    plain = stp.run(START, quadratic, 40, radius=gamma / (1 - beta))
    for a, b in zip(with_momentum, plain, strict=True):
        assert_same(a.params, b, 1e-12)
    assert {state.chosen for state in with_momentum} == {0, 1, 2}


def test_smtp_x_can_be_had_from_z_and_the_last_accepted_step():
    schedule = lambda t: schedules.cosine(t, 40, 0.1)  # noqa: E731
    states = smtp.trace(START, quadratic, 40, radius=0.2, momentum=0.7, schedule=schedule)
    plain = stp.run(START, quadratic, 40, radius=0.2 / 0.3, schedule=schedule)
    for state in states:
        gamma = state.gamma or 0.0
        rebuilt = {n: state.params[n] + gamma * 0.7 / 0.3 * state.momentum[n] for n in START}
        assert_same(rebuilt, state.x, 1e-12)
    assert np.abs(states[-1].params["w"] - plain[-1]["w"]).max() > 1e-6  # the step varies: no longer STP
    assert quadratic(states[-1].params, 0) < 0.2 * quadratic(START, 0)


# importance


def test_spanning_tree_on_points_worked_by_hand():
    """Two groups: (0,0) (1,0) (0,2) and (10,0) (10,3). 1 + 2 within, 3 within, 9 across."""
    points = np.array([[0.0, 0.0], [10.0, 3.0], [1.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
    edges = {frozenset(edge) for edge in fisher.minimal_spanning_tree(points)}
    assert edges == {frozenset(edge) for edge in [(0, 2), (0, 3), (2, 4), (4, 1)]}


def test_friedman_rafsky_and_divergence_by_hand():
    line = lambda *x: np.array(x, dtype=float)[:, None]  # noqa: E731
    apart = line(0, 1, 2.1), line(10, 11, 12.1)
    assert fisher.friedman_rafsky(*apart) == 1
    assert fisher.divergence(*apart) == pytest.approx(1 - 6 / 18)
    woven = line(0, 2, 4.1), line(1, 3.05, 5.2)
    assert fisher.friedman_rafsky(*woven) == 5
    assert fisher.divergence(*woven) == pytest.approx(1 - 5 * 6 / 18)
    uneven = line(0, 1), line(2.5, 4.5, 7)
    assert fisher.divergence(*uneven) == pytest.approx(1 - 5 / 12)


def test_spanning_tree_weighs_what_scipys_does():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 3))
    distances = squareform(pdist(points))
    ours = sum(distances[i, j] for i, j in fisher.minimal_spanning_tree(points))
    assert ours == pytest.approx(minimum_spanning_tree(distances).sum())


def test_importance_finds_the_entry_that_matters():
    x = np.random.default_rng(1).normal(size=(24, 2))
    outputs = lambda theta: np.stack([x @ theta[:2] + 1e-4 * theta[2], x[:, 0]], axis=1)  # noqa: E731
    theta = np.array([1.0, 0.5, 0.25])
    z = fisher.perturbations(theta, 0, "w", 0, samples=3, scale=20.0)
    assert z.shape == (3, 3)
    scores = fisher.importance(outputs, theta, z)
    assert scores[0] > scores[2] and scores[1] > scores[2]
    one = fisher.importance(outputs, theta, z[0])
    moved = theta + np.array([z[0, 0], 0, 0])
    assert one[0] == fisher.divergence(outputs(theta), outputs(moved))
    np.testing.assert_allclose(fisher.perturbations(theta, 0, "w", 0)[0] * 20, z[0])  # default scale: max|theta|


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_fisher_diagonal_by_finite_differences(activation, with_labels):
    rng = np.random.default_rng(2)
    params = {"w1": rng.normal(size=(4, 3)), "b1": rng.normal(size=4), "w2": rng.normal(size=(3, 4)), "b2": np.zeros(3)}
    x, labels = rng.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0])
    log_p = lambda p: fisher.log_softmax(fisher.two_layer_logits(p, x, activation))  # noqa: E731
    weights = np.eye(3)[labels] if with_labels else np.exp(log_p(params))
    found = fisher.fisher_diagonal(params, x, activation, labels if with_labels else None)
    for name, value in params.items():
        for i in range(value.size):
            step = np.zeros(value.size)
            step[i] = 1e-6
            step = step.reshape(value.shape)
            slope = (log_p({**params, name: value + step}) - log_p({**params, name: value - step})) / 2e-6
            assert found[name].flat[i] == pytest.approx(np.mean(np.sum(weights * slope**2, axis=1)), abs=1e-7)


# schedules


def test_schedules_by_hand():
    assert [schedules.linear(t, 4, 0.2) for t in (0, 1, 2, 4)] == pytest.approx([1, 0.8, 0.6, 0.2])
    assert [schedules.cosine(t, 4, 0.2) for t in (0, 2, 4)] == pytest.approx([1, 0.6, 0.2])
    assert [schedules.cosine_restarts(t, 8, 0.2, 2) for t in range(9)] == pytest.approx(
        [schedules.cosine(t % 4, 4, 0.2) for t in range(8)] + [0.2]
    )
    warm = [schedules.warmup(schedules.linear, t, 10, 4, h=0.4) for t in range(10)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert schedules.constant(7, 9) == 1


def test_schedules_against_torch():
    def torch_path(make, steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer)
        path = []
        for _ in range(steps):
            path.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return path

    lr = torch.optim.lr_scheduler
    assert torch_path(lambda o: lr.LinearLR(o, 1.0, 0.1, 12), 12) == pytest.approx(
        [schedules.linear(t, 12, 0.1) for t in range(12)]
    )
    assert torch_path(lambda o: lr.CosineAnnealingLR(o, 12, 0.1), 12) == pytest.approx(
        [schedules.cosine(t, 12, 0.1) for t in range(12)]
    )
    assert torch_path(lambda o: lr.CosineAnnealingWarmRestarts(o, 4, 1, 0.1), 12) == pytest.approx(
        [schedules.cosine_restarts(t, 12, 0.1, 3) for t in range(12)]
    )


# first-order


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_first_order_against_torch(rule, decay):
    steps, lr = 12, 0.05
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr, weight_decay=decay),
        "momentum": lambda p: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=decay),
        "nesterov": lambda p: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=decay),
        "adam": lambda p: torch.optim.Adam(p, lr, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, lr, weight_decay=decay),
    }[rule]

    def gradient(params, t):
        return {name: (1 + 0.1 * t) * (params[name] - TARGET[name]) ** 3 for name in params}

    schedule = lambda t: schedules.linear(t, steps, 0.1)  # noqa: E731
    ours = first_order.trace(START, gradient, steps, rule=rule, lr=lr, weight_decay=decay, schedule=schedule)
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in START.items()}
    optimizer = make(list(tensors.values()))
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * schedule(t)
        gradients = gradient({name: value.detach().numpy() for name, value in tensors.items()}, t)
        for name, value in tensors.items():
            value.grad = torch.tensor(gradients[name])
        optimizer.step()
        for name, value in tensors.items():
            np.testing.assert_allclose(ours[t].params[name], value.detach().numpy(), rtol=0, atol=1e-13)
    for name, value in tensors.items():
        for kind, buffers in ours[-1].buffers.items():
            key = "momentum_buffer" if kind == "momentum" else kind
            np.testing.assert_allclose(buffers[name], optimizer.state[value][key].numpy(), rtol=0, atol=1e-13)
