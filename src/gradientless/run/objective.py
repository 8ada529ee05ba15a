"""Objective: the loss of a surface on one batch, as the closure that optimizers are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradientless.delta import Delta
from gradientless.language.surfaces import HeadSurface
from gradientless.language.surfaces.head import Prepared
from gradientless.language.surfaces.head_session import HeadSession
from gradientless.run.importance import fisher
from gradientless.search.noise import Noise

LOSSES = ("cross-entropy",)
BACKWARD = 2  # forward passes that a backward pass counts for


class Objective:
    """Mean cross-entropy of `surface` over one batch, which comes in one part or several (micro-batches).

    parts: (prepared, labels int64 [b]) of each micro-batch; losses are averaged by example over all of them.
    noise: where the perturbations of `importance` come from. generator: makes the dropout masks of a call, if any.
    """

    def __init__(
        self,
        surface: HeadSurface,
        parts: Sequence[tuple[Prepared, Tensor]],
        noise: Noise,
        generator: torch.Generator | None = None,
    ):
        self.surface, self.parts, self._noise, self._generator = surface, parts, noise, generator
        self._rows = sum(len(labels) for _, labels in parts)
        # Dropout draws anew in every call, so only calls one by one mean what they say then.
        self.session: Callable[[], ObjectiveSession] | None = None
        if not (surface.training and surface.dropout > 0):
            self.session = self._session

    def __call__(self) -> Tensor:
        """The loss at the weights as they stand, a scalar."""
        losses = [self._loss(*part) * len(part[1]) for part in self.parts]
        return torch.stack(losses).sum() / self._rows

    def _loss(self, prepared: Prepared, labels: Tensor) -> Tensor:
        return cross_entropy(self.surface.logits(prepared, self._generator), labels)

    def backward(self) -> float:
        """Add the gradient of the loss to `.grad`, one micro-batch at a time; returns the loss."""
        total = 0.0
        for prepared, labels in self.parts:
            loss = self._loss(prepared, labels) * (len(labels) / self._rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _session(self) -> ObjectiveSession:
        return ObjectiveSession([(self.surface.session(prepared), labels) for prepared, labels in self.parts])

    @torch.no_grad()
    def importance(self, name: str, step: int, *, scale: float = 1.0, draws: int = 1, rows: int = 32) -> Tensor:
        """Fisher importance of every entry of tensor `name` (see `run.importance.fisher`): float64 [numel]."""
        features = torch.cat([prepared.features for prepared, _ in self.parts])[:rows]
        session = self.surface.session(self.surface.prepare(features))
        theta = self.surface.trainable()[name]
        return fisher(session.logits, name, theta, self._noise, step, scale=scale, draws=draws)


class ObjectiveSession:
    """Losses under many small changes, summed over the sessions of the micro-batches."""

    def __init__(self, parts: Sequence[tuple[HeadSession, Tensor]]):
        self._parts = parts
        self._rows = sum(len(labels) for _, labels in parts)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Sequence[Delta]]) -> list[float]:
        total: Tensor | None = None
        for session, labels in self._parts:
            logits = session.logits(candidates)  # [P, C, b]
            every = labels.expand(len(candidates), -1)
            part = cross_entropy(logits, every, reduction="none").sum(1)
            total = part if total is None else total + part
        assert total is not None
        return (total / self._rows).tolist()

    def commit(self, changes: Sequence[Delta]) -> None:
        for session, _ in self._parts:
            session.commit(changes)
