"""Snapshot: move the entries that a point touches, measure, put the old bits back. For any closure and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradientless.search.points import Point
from gradientless.search.space import Space


class Snapshot:
    """Losses at points by calling `closure` with the weights moved. Memory: a copy of the entries that move."""

    def __init__(self, space: Space, closure: Callable[[], object]):
        self.space, self.closure = space, closure

    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        found = []
        for terms in points:
            with self.space.at(self.space.deltas([terms])[0]):
                found.append(float(self.closure()))  # type: ignore[arg-type]
        return found
