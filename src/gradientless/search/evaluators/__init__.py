"""Evaluators: how the losses at a list of points are obtained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gradientless.errors import UserError
from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import SMALL
from gradientless.search.evaluators.session import Session
from gradientless.search.evaluators.snapshot import Snapshot
from gradientless.search.evaluators.walk import Walk, check_walkable
from gradientless.search.points import Point
from gradientless.search.space import Space

EVALUATORS: dict[str, type[Any]] = {"inject": Inject, "snapshot": Snapshot, "session": Session, "walk": Walk}


class Evaluator(Protocol):
    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        """The loss at each point. shared: terms with which all points (and others, measured before) begin."""


def resolve(kind: str, space: Space, closure: Any = None, model: Any = None) -> str:
    """The evaluator that `kind` ("auto" or a key of `EVALUATORS`) means for a closure (None: for a plain one)."""
    if kind != "auto":
        return kind
    if getattr(closure, "session", None) is not None:
        return "session"
    if space.rank is not None and getattr(closure, "model", model) is not None:
        return "inject"
    return "snapshot" if space.size <= SMALL or space.half else "walk"


def evaluator(
    space: Space, closure: Callable[[], Any], kind: str = "auto", model: Any = None, owner: str = "evaluator"
) -> Evaluator:
    """The evaluator `kind` around `closure`; see `resolve`."""
    kind = resolve(kind, space, closure, model)
    if kind == "session":
        session = getattr(closure, "session", None)
        if session is None:
            raise UserError(f"{owner}: evaluator session must have a closure with a method session(), got none")
        return Session(space, session)
    if kind == "walk":
        return Walk(space, closure, owner)
    if kind == "inject":
        inside = getattr(closure, "model", model)
        if inside is None:
            raise UserError(f"{owner}: evaluator inject must be given the model, got none; pass model=…")
        return Inject(space, closure, inside)
    return Snapshot(space, closure)


__all__ = ["EVALUATORS", "Evaluator", "Inject", "Session", "Snapshot", "Walk", "check_walkable", "evaluator", "resolve"]
