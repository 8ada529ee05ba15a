"""Evaluators: how the losses at a list of points are obtained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gradientless.search.evaluators.session import Session
from gradientless.search.evaluators.snapshot import Snapshot
from gradientless.search.points import Point
from gradientless.search.space import Space

EVALUATORS: dict[str, type[Snapshot] | type[Session]] = {"snapshot": Snapshot, "session": Session}


class Evaluator(Protocol):
    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        """The loss at each point. shared: terms with which all points (and others, measured before) begin."""


def evaluator(space: Space, closure: Callable[[], Any]) -> Evaluator:
    """The session of a closure that has one (`closure.session`), else snapshots around calls of the closure."""
    session = getattr(closure, "session", None)
    return Snapshot(space, closure) if session is None else Session(space, session)
