"""Snapshot: move the entries that a point touches, measure, put the old bits back. For any closure and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from gradientless.search.points import Point
from gradientless.search.space import Space


class Snapshot:
    """Losses at points by calling `closure` with the weights moved. Memory: a copy of the entries that move.

    step: an attribute, None at first: half precision is rounded to the nearest. With a step it is rounded as an update
        of that step is, so that this update leads to the very bits that were measured.
    """

    def __init__(self, space: Space, closure: Callable[[], object]):
        self.space, self.closure = space, closure
        self.step: int | None = None

    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        found = []
        for terms in points:
            with self._at(terms):
                found.append(float(self.closure()))  # type: ignore[arg-type]
        return found

    def _at(self, terms: Point) -> AbstractContextManager[None]:
        if self.step is not None and self.space.half:
            return self.space.taken(terms, self.step)
        if self.space.large(terms):
            return self.space.taken(terms)
        return self.space.at(self.space.deltas([terms])[0])
