"""Session: a surface that computes many small changes at once is told only what differs.

Candidates of a direct search share a long beginning (what the step has accepted so far) and differ in their last
terms. The shared beginning is committed to the session once; each candidate is then the few changes beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gradientless.delta import Delta
from gradientless.search.points import ORIGIN, Point, common_prefix
from gradientless.search.space import Space


class BatchedSession(Protocol):
    """What `closure.session()` returns; it starts at the weights as they are."""

    def losses(self, candidates: Sequence[Sequence[Delta]]) -> Sequence[float]:
        """The loss under each candidate's changes, beyond what was committed."""

    def commit(self, changes: Sequence[Delta]) -> None:
        """Take `changes` as done for all later candidates of this session."""


class Session:
    """Losses at points by a batched session of the closure's surface."""

    def __init__(self, space: Space, closure: Callable[[], BatchedSession]):
        self.space, self._new = space, closure
        self._session: BatchedSession | None = None
        self._committed = ORIGIN

    def losses(self, points: Sequence[Point], shared: Point | None = None) -> list[float]:
        shared = common_prefix(points) if shared is None else shared
        done = len(self._committed)
        if self._session is None or shared[:done] != self._committed:
            self._session, self._committed, done = self._new(), ORIGIN, 0
        if len(shared) > done:
            self._session.commit(self.space.deltas([shared[done:]])[0])
            self._committed = shared
        rest = self.space.deltas([terms[len(shared) :] for terms in points])
        return [float(loss) for loss in self._session.losses(rest)]
