"""Points are addresses: sums of coefficients times directions, relative to the weights at the start of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ALL = "*"  # the block of all tensors, every entry
POOL = "@pool"  # the block of all tensors, from which entries are drawn as from one vector


class Direction(NamedTuple):
    """An address of a direction: entry i of tensor `name` is noise(seed, step, draw, name, i).

    block: which tensors and which of their entries; the entries are those selected for `step`.
    buffer: if set, the direction is that named dense buffer on the same entries instead of noise.
    """

    step: int
    draw: int
    block: str
    buffer: str = ""


Term = tuple[float, Direction]
Point = tuple[Term, ...]
ORIGIN: Point = ()


def point(coefficient: float, direction: Direction) -> Point:
    """The point `coefficient` times `direction` away from the weights."""
    return ((coefficient, direction),)


def common_prefix(points: Sequence[Point]) -> Point:
    """The terms with which all `points` begin."""
    shared = min(points, key=len)
    for other in points:
        length = 0
        while length < len(shared) and shared[length] == other[length]:
            length += 1
        shared = shared[:length]
    return shared


def by_block(terms: Point) -> Point:
    """The same point with the terms of each block together, in their order: one name for it, however it was found."""
    return terms if len(terms) < 2 else tuple(sorted(terms, key=_block))


def _block(term: Term) -> str:
    return term[1][2]


def scaled(factor: float, terms: Point) -> Point:
    """`factor` times `terms`."""
    return tuple((factor * coefficient, direction) for coefficient, direction in terms)


def combined(*points: Point) -> Point:
    """The sum of `points` with one term for each direction, in order of first mention; without those that cancel."""
    total: dict[Direction, float] = {}
    for terms in points:
        for coefficient, direction in terms:
            total[direction] = total.get(direction, 0.0) + coefficient
    return tuple((coefficient, direction) for direction, coefficient in total.items() if coefficient)


class Losses(NamedTuple):
    """Asks for the loss at each point; the answer is a list of floats, rounded to single precision.

    blocks: the tensors being searched, whose norm penalty is added to the loss.
    """

    points: Sequence[Point]
    block: str = ALL


class Rank(NamedTuple):
    """Asks which points are best; the answer is a `Ranking`. Only the decision is logged, not the losses.

    groups: lists of candidates; the lowest index wins ties, so "no change" stands first.
    blocks: one per group, the block being searched there (for its norm penalty).
    keep: how many of the best of each group to name.
    improvement: whether the answer (and the log) holds by how much each group's best beats its first candidate.
    taken: whether a candidate is measured where an update to it would lead: half precision rounded stochastically.
    """

    groups: Sequence[Sequence[Point]]
    blocks: Sequence[str]
    keep: int = 1
    improvement: bool = False
    taken: bool = False


@dataclass(frozen=True)
class Ranking:
    """order[g]: the `keep` best candidates of group g, best first; groups: the groups by their best loss, best first.

    loss: the lowest loss of all (not a number when replayed). improvement[g]: see `Rank`.
    """

    order: list[list[int]]
    groups: list[int]
    loss: float
    improvement: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """The best candidate of the first group."""
        return self.order[0][0]


class Norms(NamedTuple):
    """Asks for the L2 norm of the weights θ_t over each block; the answer is a list of floats in single precision."""

    blocks: Sequence[str]


Request = Losses | Rank | Norms


class BufferUpdate(NamedTuple):
    """buffer ← decay · buffer + point, with the point's directions as they were during the step."""

    decay: float
    point: Point


class Update(NamedTuple):
    """What a step changes: the weights decay, then move to `point`; named dense buffers follow.

    loss: what the step reports. decay: tensor name -> the factor (1 - lr · weight decay) that multiplies it first.
    """

    point: Point
    loss: float
    buffers: Mapping[str, BufferUpdate] = {}
    decay: Mapping[str, float] = {}
