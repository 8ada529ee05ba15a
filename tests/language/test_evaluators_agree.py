"""All evaluators agree on the losses at the same points, or refuse them in a line: every surface, every rank of the
directions, every selection of entries.

The suite runs as many cells as it takes for any two values of different axes to meet, and all of the head's, which has
an evaluator of its own; `make product` runs all.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from families import LABELS
from test_product import folder, make, pairwise  # noqa: F401 - a fixture
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language.surfaces import SURFACES
from gradientless.run.objective import Objective
from gradientless.search.evaluators import EVALUATORS, evaluator
from gradientless.search.noise import Noise
from gradientless.search.points import ORIGIN, Direction, point
from gradientless.search.selection import SELECTIONS
from gradientless.search.space import Block, Space

ENTRIES, WIDE = 40, 384
BLOCKS = ("together", "turns")  # all tensors as one block, or each alone
AXES = (tuple(SURFACES), (None, 1, 2, WIDE), SELECTIONS, BLOCKS, tuple(EVALUATORS))


def refusal(name, rank, selection, blocks, kind) -> str | None:
    """Why an evaluator does not take such points; None where it does."""
    if kind == "session" and name not in ("head", "head, two layers"):
        return "evaluator session must have a closure with a method session"
    if kind == "inject" and (rank is None or selection != "all"):
        return "inject: directions must be low-rank, got a "
    return None


CELLS = list(itertools.product(*AXES))
OF_HEADS = list(itertools.product(("head", "head, two layers"), *AXES[1:]))
KEPT = [cell for cell in (*CELLS, *OF_HEADS[len(OF_HEADS) // 2 :]) if refusal(*cell) is None]
REFUSED = [cell for cell in CELLS if refusal(*cell) is not None]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        kept, whole = metafunc.function is test_agree, metafunc.config.getoption("--product")
        chosen = set((KEPT if kept else REFUSED) if whole else pairwise(KEPT if kept else REFUSED))
        if kept:
            chosen |= {cell for cell in KEPT if "session" in cell}
        metafunc.parametrize("cell", sorted(chosen, key=str), ids=lambda cell: "-".join(map(str, cell)))


def surface_of(name: str, folder):  # noqa: F811
    """With every tensor moved off its start, where branches that are shut would hide much."""
    if name == "head, two layers":
        surface = SURFACES["head"].create(folder("llama"), LABELS, max_length=16, hidden=9, activation="gelu")
    else:
        surface = make(name, "float32", folder)
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return surface.eval()


def points_of(name, rank, selection, blocks, folder):  # noqa: F811
    """(A space of the surface's tensors, an objective of two micro-batches, points along its blocks)."""
    surface = surface_of(name, folder)
    tensors = surface.trainable()
    groups = [tuple(tensors)] if blocks == "together" else [(tensor,) for tensor in tensors]
    made = []
    for number, names in enumerate(groups):
        size = sum(tensors[each].numel() for each in names)
        fixed = torch.arange(0, size, 1 + size // ENTRIES) if selection == "fixed" else None
        made.append(Block(f"block {number}", names, size, min(ENTRIES, -(-size // 2)), selection, 1, fixed))
    space = Space(tensors, Noise(3, "gaussian"), made, rank)
    for block in space.due(0):
        ranking = None
        if selection == "fisher":  # any ranking that is measured
            ranking = [torch.linspace(0, 1, tensors[each].numel()) for each in block.tensors]
        space.choose(block, 0, ranking)
    encoded = surface.encode(EXAMPLES)
    parts = [(surface.prepare(encoded.batch(rows)), encoded.labels[rows]) for rows in ([0, 1, 2], [3, 4])]
    points = [ORIGIN]
    for block in made[:: max(1, len(made) // 6)]:
        one, other = Direction(0, 0, block.name), Direction(0, 1, block.name)
        points += [point(0.1, one), point(-0.1, one), point(0.1, one) + point(-0.05, other)]
    if blocks == "turns":  # of one block in turn after the other, as direct search goes on
        points.append(point(0.1, Direction(0, 0, made[0].name)) + point(0.1, Direction(0, 2, made[-1].name)))
    return space, Objective(surface, parts, Noise(3)), points


@pytest.mark.filterwarnings("ignore:inject")  # where points are evaluated one at a time
@torch.no_grad()
def test_agree(cell, folder):  # noqa: F811
    *of, kind = cell
    space, objective, points = points_of(*of, folder)
    before = {name: tensor.clone() for name, tensor in space.tensors.items()}
    wanted = []
    for terms in points:  # the weights moved by hand, a dense change at a time
        for change in space.deltas([terms])[0]:
            tensor = space.tensors[change.name]
            tensor += change.dense(tensor)
        wanted.append(float(objective()))
        for name, tensor in space.tensors.items():
            tensor.copy_(before[name])
    assert len(set(wanted)) > len(points) // 2
    found = evaluator(space, objective, kind, objective.model).losses(points)
    assert found == pytest.approx(wanted, rel=2e-5)
    where = evaluator(space, objective, kind, objective.model)  # what all points begin with is told to it
    beginning = points[1]
    later = [terms for terms in points if terms[: len(beginning)] == beginning]
    expected = [loss for terms, loss in zip(points, wanted, strict=True) if terms[: len(beginning)] == beginning]
    space.move_to(ORIGIN)
    assert len(later) > 1 and where.losses(later, shared=beginning) == pytest.approx(expected, rel=2e-5)


@torch.no_grad()
def test_refused(cell, folder):  # noqa: F811
    *of, kind = cell
    space, objective, points = points_of(*of, folder)
    with pytest.raises(UserError, match=refusal(*cell)) as caught:
        evaluator(space, objective, kind, objective.model).losses(points)
    assert "\n" not in str(caught.value)
