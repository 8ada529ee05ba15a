"""Algorithm 2, and a pool with its penalty, beside transcriptions of the text by one who had not seen our code.

Decisions, options and weights of every step are compared, with directions drawn by the transcriptions' own noise.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradientless.errors import UserError
from gradientless.search.optim import GLD
from gradientless.search.points import Losses
from reference import noise, options, pooled

SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (2, 5)}
STEPS, SEED, RADIUS = 14, 11, 0.5


def start(names=tuple(SHAPES)) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(len(name)).normal(size=SHAPES[name]) for name in names}


def loss(params: dict[str, np.ndarray], t: int) -> float:
    """A bowl that moves from batch to batch, in which what is good for one tensor depends on the others."""
    away = [np.sum((params[name] - 0.4 * math.sin(2 * t + len(name))) ** 2) for name in sorted(params)]
    return float(sum(away) + 0.3 * math.sin(sum(p.sum() for p in params.values())) * away[0])


def direction(t: int, name: str, draw: int) -> np.ndarray:
    return noise.tensor_noise("rademacher", SHAPES[name], SEED, name, t, draw).reshape(-1)


def optimizer_over(values: dict[str, np.ndarray], **more) -> tuple[GLD, dict[str, nn.Parameter]]:
    params = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    made = GLD(params.items(), radius=RADIUS, seed=SEED, noise="rademacher", check=False, **more)
    return made, params


def closure(params: dict[str, nn.Parameter], t: int):
    return lambda: loss({name: p.detach().numpy() for name, p in params.items()}, t)


def chosen(optimizer: GLD, name: str, t: int) -> np.ndarray:
    """The entries that the step selected: the transcription asks for them, and does not say how they are drawn."""
    ((_, index),) = optimizer.space.entries(optimizer.space.block(name), t)
    size = optimizer.space.tensors[name].numel()
    return np.arange(size) if index is None else index.numpy()


def tree(found: list[options.Option], tries: int) -> list:
    """Options as their terms (radius aside: step and draw) and what stands under them."""
    return [
        ([(p.born[0], p.born[1] * tries + p.born[2] - 1)] if p.born[2] else [], tree(p.children, tries)) for p in found
    ]


def tree_of(option) -> list:
    return [([(d.step, d.draw) for _, d in child.change], tree_of(child)) for child in option.children]


@pytest.mark.parametrize("names", [("0.weight",), ("0.bias", "1.weight"), tuple(SHAPES)], ids=["one", "two", "three"])
@pytest.mark.parametrize(
    ("width", "levels", "tries", "more"),
    [
        (1, 1, 3, {}),
        (1, 3, 2, {"entries": 3}),
        (2, 1, 3, {}),
        (2, 2, 3, {"entries": 4, "reselect_every": 3}),
        (2, 3, 2, {"penalty": 0.4}),
        (3, 1, 2, {"entries": 3, "penalty": 0.3}),
        (3, 2, 4, {}),
        (4, 2, 3, {"penalty": 1.5}),
    ],
)
def test_algorithm_2_is_the_letters(names, width, levels, tries, more):
    optimizer, params = optimizer_over(start(names), options=(width, levels), candidates=tries, **more)
    states = options.trace(
        start(names),
        loss,
        STEPS,
        lambda t, name, leaf, k: direction(t, name, leaf * tries + k - 1)[chosen(optimizer, name, t)],
        width=width,
        depth=levels,
        tries=tries,
        radius=RADIUS,
        penalty=more.get("penalty", 0.0),
        select=lambda t, name, theta: chosen(optimizer, name, t),
        first=0,
        others_at_first=True,
        reorder=True,
    )
    drawn = set()
    for t, state in enumerate(states):
        optimizer.step(closure(params, t))
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), state.params[name], rtol=0, atol=1e-12, err_msg=f"{t}")
            assert tree_of(optimizer.trees.trees[name]) == tree(state.options[name], tries), (t, name)
            drawn |= {draw for _, draw in directions_of(optimizer.trees.trees[name])}
            assert len(state.decisions[name].losses) == width ** min(t, levels)  # leaves, each of which has K draws
    assert width == 1 or max(drawn) >= tries  # and what is kept was drawn under several
    assert any(decision.best > 0 for state in states for decision in state.decisions.values()) or width == 1


def directions_of(option) -> set:
    return {(d.step, d.draw) for d in option.directions()}


def test_every_leaf_has_perturbations_of_its_own():
    """m^l K of them in a step of a tensor; one of whole tensors, since the text counts so."""
    optimizer, params = optimizer_over(start(("0.weight",)), options=(3, 2), candidates=4)
    seen: list[set] = []
    measured = optimizer._losses

    def watching(points, *rest):
        seen.append({term for terms in points for term in terms if term[1].step == optimizer.t})
        return measured(points, *rest)

    optimizer._losses = watching
    for t in range(4):
        optimizer.step(closure(params, t))
    assert [len(terms) for terms in seen] == [4, 3 * 4, 9 * 4, 9 * 4]
    for terms in seen:
        radii = sorted(coefficient for coefficient, _ in terms)
        assert radii == sorted(RADIUS * 2.0**-k for k in range(4) for _ in range(len(terms) // 4))
        assert len({direction for _, direction in terms}) == len(terms)


@pytest.mark.parametrize("entries", [None, 6, 13])
@pytest.mark.parametrize("penalty", [0.0, 0.5, 3.0, 12.0])
def test_a_pool_is_one_block_with_one_norm(penalty, entries):
    optimizer, params = optimizer_over(start(), pool=True, candidates=4, penalty=penalty, entries=entries)

    def selected(t: int, block: np.ndarray) -> np.ndarray:
        (pool,) = optimizer.space.blocks.values()
        return np.arange(block.size) if pool.whole else optimizer.space.selected(pool, t).between(0, block.size).numpy()

    def drawn(t: int, k: int) -> np.ndarray:
        whole = np.concatenate([direction(t, name, k - 1) for name in SHAPES])
        return whole[selected(t, whole)]

    states = pooled.trace(
        start(), loss, 60, drawn, tries=4, radius=RADIUS, penalty=penalty, select=selected, first=0
    )  # fmt: skip
    for t, state in enumerate(states):
        optimizer.step(closure(params, t))
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), state.params[name], rtol=0, atol=1e-11, err_msg=f"{t}")
    assert {state.chosen for state in states} >= {0, 1}


@pytest.mark.parametrize(("squared", "expected"), [(False, 5 + 13 * 2.0), (True, 5 + 169 * 2.0)])
def test_the_norm_of_a_pool_by_hand(squared, expected):
    """Norms 3, 4 and 12: 13 together, not 19."""
    params = {name: nn.Parameter(torch.tensor([value])) for name, value in (("a", 3.0), ("b", -4.0), ("c", 12.0))}
    optimizer = GLD(params.items(), pool=True, penalty=2.0, squared=squared)
    (block,) = optimizer.space.blocks
    assert optimizer._penalised([5.0], [()], block) == [expected]
    assert Losses([()]).block not in optimizer.space.blocks  # a rule over all tensors takes the norm of each
    assert optimizer._penalised([5.0], [()], Losses([()]).block) == [5 + 2.0 * (169 if squared else 19)]


def test_a_log_of_shared_perturbations_is_refused(tmp_path):
    for version, shape, message in [(2, (2, 1), "got 2"), (1, (3, 2), "got 1"), (2, (1, 1), "got 2")]:
        optimizer, params = optimizer_over(start(), options=shape)
        path = tmp_path / f"log{version}{shape}"
        optimizer.record(path, {"version": version})
        for t in range(3):
            optimizer.step(closure(params, t))
        with pytest.raises(UserError, match=f"^GLD: a log of options must be of version 3 or later, {message}: its"):
            optimizer_over(start(), options=shape)[0].replay(path)
    plain, params = optimizer_over(start())
    plain.record(tmp_path / "plain", {"version": 2})
    plain.step(closure(params, 0))
    assert optimizer_over(start())[0].replay(tmp_path / "plain") == 1


@pytest.mark.parametrize("shape", [(2, 17), (1, 101), (256, 2), (10**30, 9), (66_000, 1)])
def test_trees_of_too_many_leaves_are_refused(shape):
    with pytest.raises(UserError, match=r"^GLD: options must have at most 100 levels and 65,535 leaves, m.levels, got"):
        optimizer_over(start(), options=shape)
