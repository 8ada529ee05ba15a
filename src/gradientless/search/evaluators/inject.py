"""Inject: losses at points with the changes applied inside the modules, weights untouched. For low-rank directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

from gradientless.delta import Delta
from gradientless.errors import UserError
from gradientless.search.evaluators.injection import Injection
from gradientless.search.evaluators.rows import Unbatchable
from gradientless.search.points import Point
from gradientless.search.space import Space


class Injected(Protocol):
    """What `closure.injected(injection)` returns: runs the model on as many copies of its batch as there are points, or
    on those of some points after the other."""

    def losses(self, changes: Sequence[Sequence[Delta]]) -> Sequence[float]:
        """The loss under each point's changes, measured under `injection.at(changes)`."""


class Inject:
    """Losses at points by an `Injection`.

    closure: called once per point; or, where it has `closure.injected(injection)` (see `Injected`), many points in one
        batch, once two were seen to have the losses there that they have alone. Where a module cannot tell the points
        of a batch apart, they are evaluated one at a time.
    model: the module that the closure runs; or an `Injection` made before, which spares looking for the tensors.
    """

    def __init__(self, space: Space, closure: Callable[[], object], model: nn.Module | Injection):
        self.space, self.closure = space, closure
        self.injection = model if isinstance(model, Injection) else Injection(model, space.tensors)

    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        changes = self.space.deltas(points)
        batched = getattr(self.closure, "injected", None)
        if batched is None:
            return [self._one(mine) for mine in changes]
        runner: Injected = batched(self.injection)
        alone: UserError | None = None
        if len(changes) > 1 and not self.injection.tried:
            alone = self.injection.try_together(runner.losses)
        if len(changes) == 1 or not self.injection.one_by_one:
            try:
                return [float(loss) for loss in runner.losses(changes)]
            except Unbatchable as error:  # this batch: the next is tried together again, in a resumed run too
                alone = error
        found = [float(runner.losses([mine])[0]) for mine in changes]
        if alone is not None:
            when = "from now on" if self.injection.one_by_one else "for this batch"
            warnings.warn(f"{alone}: done {when}, which takes a pass per point", stacklevel=2)
        return found

    def _one(self, changes: Sequence[Delta]) -> float:
        with self.injection.at([changes]):
            return float(self.closure())  # type: ignore[arg-type]
