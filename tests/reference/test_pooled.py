"""GLD on one pool with its penalty as transcribed: examples worked by hand, and the listing's other transcription."""

import math

import numpy as np
import pytest

from . import gld, noise, options, pooled
from .test_reference_self import START, assert_same, quadratic


def test_the_norm_is_that_of_the_pool_by_hand():
    """(3, 4) and (12): ||(3, 4, 12)|| = 13, where the tensors' norms are 5 and 12. Then R = 8, K = 2: radii 4 and 2."""
    start = {"a": np.array([3.0, 4.0]), "b": np.array([12.0])}
    direction = {1: [0.0, -1.0, 0.0], 2: [0.0, 0.0, -6.0]}  # to (3, 0, 12), then to (3, 4, 0)
    states = pooled.trace(start, lambda p, t: 0.0, 1, lambda t, k: direction[k], tries=2, radius=8.0, penalty=0.5)
    np.testing.assert_allclose(states[0].losses, [6.5, 0.5 * math.sqrt(153), 2.5], rtol=1e-15)
    assert states[0].chosen == 2
    assert_same(states[0].params, {"a": np.array([3.0, 4.0]), "b": np.array([0.0])})


def test_the_sum_of_norms_would_decide_otherwise():
    """From (3, 4 | 0) to (0, 4 | 3.25) or (3, 0 | 3): the pool's norm goes from 5 to 5.15 or 4.24; the sum rises."""
    start = {"a": np.array([3.0, 4.0]), "b": np.array([0.0])}
    direction = {1: [-3.0, 0.0, 3.25], 2: [0.0, -8.0, 6.0]}
    states = pooled.trace(start, lambda p, t: 0.0, 1, lambda t, k: direction[k], tries=2, radius=2.0, penalty=1.0)
    np.testing.assert_allclose(states[0].losses, [5.0, math.hypot(4, 3.25), math.sqrt(18)], rtol=1e-15)
    assert states[0].chosen == 2
    sums = [sum(np.linalg.norm(value) for value in point) for point in ([[3, 4], [0]], [[0, 4], [3.25]], [[3, 0], [3]])]
    assert int(np.argmin(sums)) == 0


def test_loss_and_radii_by_hand():
    """a = b = 0; R = 4, K = 3 along (+1, -1): (0, 0), (2, -2), (1, -1), (1/2, -1/2), then away from there."""

    def loss(params, t):
        return abs(params["a"] - 1.25) + abs(params["b"][0, 0] + 1)

    start = {"a": np.zeros(()), "b": np.zeros((1, 1))}
    states = pooled.trace(start, loss, 2, lambda t, k: [1.0 - 2 * t, 2 * t - 1.0], tries=3, radius=4.0)
    assert [state.losses for state in states] == [[2.25, 1.75, 0.25, 1.25], [0.25, 4.25, 2.25, 1.25]]
    assert [state.chosen for state in states] == [2, 0]
    assert_same(states[1].params, {"a": np.array(1.0), "b": np.array([[-1.0]])})
    text = pooled.trace(start, loss, 1, lambda t, k: [1.0, -1.0], tries=3, radius=4.0, first=0)
    assert text[0].losses == [2.25, 5.75, 1.75, 0.25]


def test_the_norm_is_of_entries_that_are_not_selected_too():
    start = {"a": np.array([3.0, 4.0]), "b": np.array([12.0])}
    arguments = {"tries": 1, "radius": 24.0, "penalty": 1.0, "select": lambda t, block: [2]}
    states = pooled.trace(start, lambda p, t: 0.0, 1, lambda t, k: [-1.0], **arguments)
    assert states[0].losses == [13.0, 5.0]


@pytest.mark.parametrize("s", [None, 3])
def test_agrees_with_the_other_transcription(s):
    """The same noise; 8 entries in two tensors, and radii of the text."""

    def scheme(n, seed, name, step, draw):
        return np.random.default_rng([ord(name[0]), step, draw]).standard_normal(n)

    def select(t, block):
        return np.arange(block.size) if s is None else noise.select(s, block.size, 0, "@pool", t)

    def direction(t, k):
        return np.concatenate([scheme(v.size, 0, name, t, k - 1) for name, v in START.items()])[select(t, block)]

    block = pooled.join(START)
    alike = {"radius": 0.5, "penalty": 0.2}
    other = gld.trace(START, quadratic, 12, candidates=4, pool=True, entries=s, noise=scheme, **alike)
    arguments = {"tries": 4, "first": 0, **alike}
    states = pooled.trace(START, quadratic, 12, direction, select=select, **arguments)
    assert len({state.chosen for state in states}) > 2
    for state, expected in zip(states, other, strict=True):
        assert state.losses == expected.losses["@pool"] and state.chosen == expected.chosen["@pool"]
        assert_same(state.params, expected.params)
    one = options.trace(  # Algorithm 2 on the pool, one option
        {"@pool": block},
        lambda p, t: quadratic(pooled.split(p["@pool"], START), t),
        12,
        lambda t, name, leaf, k: direction(t, k),
        width=1,
        depth=1,
        select=lambda t, name, theta: select(t, theta),
        **arguments,
    )
    for before, after in zip(states, one[1:], strict=False):
        assert_same(before.params, pooled.split(after.params["@pool"], START))


def test_a_direction_of_the_wrong_size_is_refused():
    with pytest.raises(AssertionError, match="one entry for each of 8 indices, got 2"):
        pooled.trace(START, quadratic, 1, lambda t, k: [1.0, 1.0], tries=1, radius=0.5)
