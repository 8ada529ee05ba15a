"""Objective: the loss of a surface on one batch, as the closure that optimizers are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradientless.delta import Delta
from gradientless.errors import UserError
from gradientless.language.surfaces.base import Prepared
from gradientless.run.evaluation import MORE_TOKENS, TOKENS
from gradientless.run.importance import fisher, fisher_by_gradients
from gradientless.run.losses import LOSSES, Loss, as_tensor
from gradientless.run.memory import is_out_of_memory
from gradientless.search.noise import Noise

if TYPE_CHECKING:
    from gradientless.language.surfaces.base import Surface
    from gradientless.language.surfaces.head_session import HeadSession
    from gradientless.search.evaluators.inject import Injection

BACKWARD = 2  # forward passes that a backward pass counts for


class Objective:
    """The loss of `surface` over one batch, which comes in one part or several (micro-batches).

    parts: (prepared, what the loss expects of it: see `Loss.against`) of each micro-batch; the loss is that of all
    their examples together.
    noise: where the perturbations of `importance` come from. generator: makes the dropout masks of a call, if any.
    say: where `importance` reports its check.
    """

    def __init__(
        self,
        surface: Surface,
        parts: Sequence[tuple[Any, Any]],
        noise: Noise,
        loss: Loss = LOSSES["cross-entropy"],
        generator: torch.Generator | None = None,
        say: Callable[[str], None] = print,
    ):
        self.surface, self.parts, self.loss = surface, parts, loss
        self._noise, self._generator, self._say = noise, generator, say
        self._expected = _joined([expected for _, expected in parts])
        self.session = self._session if Objective.outline(surface).session else None

    @staticmethod
    def outline(surface: Surface) -> SimpleNamespace:
        """What of an objective decides how it is measured, without its batch."""
        # Dropout draws anew in every call, so only calls one by one mean what they say then.
        together = surface.session is not None and not (surface.training and surface.dropout > 0)
        return SimpleNamespace(session=surface.session if together else None, model=surface)

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are tuned, for evaluators that work inside it."""
        return self.surface

    def __call__(self) -> Tensor:
        """The loss at the weights as they stand, a scalar."""
        said = [self.read(prepared) for prepared, _ in self.parts]
        return as_tensor(self.loss.of(_joined(said), self._expected))

    def read(self, prepared: Any) -> Any:
        """What the loss reads of a micro-batch: scores, float32 [b, C], or texts."""
        if self.loss.reads == "texts":
            return self.surface.texts(prepared)
        return self.surface.logits(prepared, self._generator).float()

    def backward(self) -> float:
        """Add the gradient of the loss to `.grad`, one micro-batch at a time where its losses add up; returns it.

        Raises UserError for a loss without one."""
        if self.loss.weight is None:
            whole = self()
            if not whole.requires_grad:
                raise UserError(
                    "loss: must be differentiable for first-order optimizers, got a number without a gradient; "
                    "use a forward optimizer"
                )
            whole.backward()  # type: ignore[no-untyped-call]
            return float(whole.detach())
        total, everything = 0.0, self.loss.weight(self._expected)
        for prepared, expected in self.parts:
            loss = as_tensor(self.loss.of(self.read(prepared), expected)) * (self.loss.weight(expected) / everything)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def touched(self) -> dict[str, Tensor]:
        """Tuned tensors of which the loss reads some rows alone, and which, for evaluators that move the weights."""
        if self.loss.reads == "texts":  # whatever the model writes, it reads
            return {}
        parts = [self.surface.touched(prepared) for prepared, _ in self.parts]
        shared = set.intersection(*map(set, parts))
        return {name: torch.cat([part[name] for part in parts]).unique() for name in shared}

    def injected(self, injection: Injection) -> Injected:
        """Losses under changes that are added inside the modules, many of them in one batch."""
        return Injected(self, injection)

    def _session(self) -> ObjectiveSession:
        new = self.surface.session
        assert new is not None
        return ObjectiveSession([new(prepared) for prepared, _ in self.parts], self.parts, self.loss)

    @torch.no_grad()
    def importance(
        self, name: str, step: int, *, scale: float = 1.0, draws: int = 1, rows: int = 32, check: bool = False
    ) -> Tensor:
        """Fisher importance of every entry of tensor `name` (see `run.importance.fisher`): float64 [numel].

        rows: examples of this batch whose outputs are compared. check: also rank by gradients (Eq. 2.39), and say how
        well the two rankings agree.
        """
        if self.surface.session is None:
            raise UserError("fisher: selection 'fisher' must be on surface head, got another; use 'magnitude'")
        prepared = self.surface.prepare(torch.cat([part.features for part, _ in self.parts])[:rows])
        session = self.surface.session(prepared)
        theta = self.surface.trainable()[name]
        found = fisher(session.logits, name, theta, self._noise, step, scale=scale, draws=draws)
        if check:
            by_gradients = fisher_by_gradients(self.surface, lambda: self.surface.logits(prepared), name)
            agreement = float(spearmanr(found.numpy(), by_gradients.numpy()).statistic)
            self._say(f"fisher: step {step}, {name}: rank correlation with the gradients' (Eq. 2.39) {agreement:.3f}")
        return found


class Injected:
    """Losses at points of which each has its own copy of the batch.

    A pass sees as many points as there is room for their tokens, or half of them where memory runs out, but two at the
    least: the limits of `evaluation.in_batches`, which hold here for the same reason.
    """

    def __init__(self, objective: Objective, injection: Injection):
        self._objective, self._injection = objective, injection

    @torch.no_grad()
    def losses(self, points: Sequence[Sequence[Delta]]) -> list[float]:
        parts = [self._read(prepared, points) for prepared, _ in self._objective.parts]
        loss, expected = self._objective.loss, self._objective._expected
        return [float(loss.of(_joined(mine), expected)) for mine in zip(*parts, strict=True)]

    def _read(self, prepared: Any, points: Sequence[Sequence[Delta]]) -> list[Any]:
        """What the loss reads of a micro-batch at each point."""
        objective, tokens = self._objective, _tokens(prepared)
        found: list[Any] = []
        while len(found) < len(points):
            room = self._injection.room or TOKENS.get(objective.surface.device.type, MORE_TOKENS)
            pairs = max(1, room // (2 * tokens))  # whole ones: ±ε follow each other, and share their products
            some = points[len(found) : len(found) + 2 * pairs]
            try:
                with self._injection.at(some):
                    said = objective.read(objective.surface.repeated(prepared, len(some)))
            except (MemoryError, RuntimeError) as error:
                if len(some) <= 2 or not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what did not fit
                self._injection.room = len(some) * tokens // 2
                continue
            size = len(said) // len(some)
            found += [said[p * size : (p + 1) * size] for p in range(len(some))]
        return found


class ObjectiveSession:
    """Losses under many small changes, over the sessions of the micro-batches."""

    def __init__(self, sessions: Sequence[HeadSession], parts: Sequence[tuple[Any, Any]], loss: Loss):
        self._sessions, self._loss = sessions, loss
        self._expected = [expected for _, expected in parts]

    def losses(self, candidates: Sequence[Sequence[Delta]]) -> list[float]:
        if self._loss is not LOSSES["cross-entropy"]:
            logits = torch.cat([session.logits(candidates) for session in self._sessions], dim=2)
            expected = _joined(self._expected)
            return [float(self._loss.of(each.T, expected)) for each in logits]
        total = np.zeros(len(candidates))
        for session, labels in zip(self._sessions, self._expected, strict=True):
            total += _cross_entropies(session.logits(candidates), labels)
        return (total / sum(map(len, self._expected))).tolist()

    def commit(self, changes: Sequence[Delta]) -> None:
        for session in self._sessions:
            session.commit(changes)


def _tokens(prepared: Any) -> int:
    """Tokens of a micro-batch that the model sees; rows, where it is given their features."""
    if isinstance(prepared, Prepared):
        return len(prepared.features)
    return sum(ids.numel() for name, ids in prepared.tensors.items() if name in ("input_ids", "decoder_input_ids"))


def _joined(parts: Sequence[Any]) -> Any:
    """Micro-batches as one batch: tensors, or lists."""
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [each for part in parts for each in part]


def _cross_entropies(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Cross-entropy of each candidate, summed over the batch. logits: [P, C, B]; labels: [B]; returns float64 [P]."""
    if logits.device.type != "cpu":
        each = cross_entropy(logits, labels.expand(len(logits), -1), reduction="none")
        return each.double().sum(1).cpu().numpy()
    out = np.empty(len(logits))
    _sum_cross_entropy(logits.numpy(), labels.numpy(), out)
    return out


@numba.njit(cache=True, nogil=True)
def _sum_cross_entropy(logits, labels, out):  # type: ignore[no-untyped-def]
    for p in range(logits.shape[0]):
        total, product = 0.0, 1.0  # one logarithm for many rows, before the product grows too large for a double
        for b in range(logits.shape[2]):
            best = 0
            for c in range(1, logits.shape[1]):
                if logits[p, c, b] > logits[p, best, b]:
                    best = c
            top = logits[p, best, b]
            mass = 1.0
            for c in range(logits.shape[1]):
                if c != best:
                    mass += math.exp(logits[p, c, b] - top)
            total += top - logits[p, labels[b], b]
            product *= mass
            if product > 1e200:
                total += math.log(product)
                product = 1.0
        out[p] = total + math.log(product)
