"""What is minimised: a number from what the model says of a batch. Most need not be differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradientless.errors import NotFinite, UserError, unknown, with_kind
from gradientless.language.metrics import accuracy, chosen_right, exact_match, f1, highest, token_f1
from gradientless.language.tasks import Example, Splits
from gradientless.language.tasks.base import KINDS
from gradientless.run.memory import is_out_of_memory
from gradientless.run.named import is_own, own

ROWS = "rows"
"""What `Loss.against` calls the rows themselves."""


@dataclass(frozen=True)
class Loss:
    """of: (what the model says of N rows, what is expected) -> a scalar, the lower the better.

    reads: what the model says: "scores" of classes or choices, float32 [N, C]; "answers", the log-likelihood of the
        right answers, [N, 1]; or "texts" that it writes, N of them.
    against: what is expected: "labels", int64 [N]; "tokens" of the right answers, int64 [N]; or the "rows", N Examples.
    weight: how much of `of` a part of the rows (what is expected of it) makes up; None: parts do not add up.
    differentiable: whether first-order methods can use it. kinds: of tasks.
    """

    of: Callable[[Any, Any], Tensor | float]
    reads: str = "scores"
    against: str = "labels"
    weight: Callable[[Any], float] | None = None
    differentiable: bool = False
    kinds: tuple[str, ...] = ("classification", "choice")


def _of_numbers(of: Callable[[Tensor, Any], float]) -> Callable[[Tensor, Any], float]:
    """`of`, and NaN where it needs the highest of scores that are not finite (see `highest`)."""

    def found(scores: Tensor, expected: Any) -> float:
        try:
            return of(scores, expected)
        except NotFinite:
            return math.nan

    return found


@_of_numbers
def _errors(logits: Tensor, labels: Tensor) -> float:
    return 1.0 - accuracy(highest(logits).cpu().numpy(), labels.cpu().numpy(), logits.shape[1])


@_of_numbers
def _lost_f1(logits: Tensor, labels: Tensor) -> float:
    return 1.0 - f1(highest(logits).cpu().numpy(), labels.cpu().numpy(), logits.shape[1])


def _answers_unlike(likelihoods: Tensor, tokens: Tensor) -> Tensor:
    return -likelihoods.sum() / tokens.sum()


def _tokens(counts: Tensor) -> float:
    return float(counts.sum())


LOSSES: dict[str, Loss] = {
    "cross-entropy": Loss(cross_entropy, weight=len, differentiable=True),
    "accuracy": Loss(_errors, weight=len),
    "f1": Loss(_lost_f1, kinds=("classification",)),
    "lm": Loss(_answers_unlike, "answers", "tokens", weight=_tokens, differentiable=True, kinds=KINDS),
}

Texts = Callable[[Sequence[str], Sequence[Example]], float]

TEXT_LOSSES: dict[str, Texts] = {
    "exact-match": lambda texts, rows: 1.0 - exact_match(texts, [row.answers for row in rows]),
    "token-f1": lambda texts, rows: 1.0 - token_f1(texts, [row.answers for row in rows]),
}
"""Of predicted texts, chosen or written, the lower the better."""

REWARD = "reward"
NAMES = (*LOSSES, *TEXT_LOSSES, REWARD)
DEFAULTS = {"classification": "cross-entropy", "choice": "lm", "generation": "lm"}  # as MeZO trains


def check_loss(name: str) -> None:
    """Raises UserError for a loss that does not exist."""
    if is_own(name):
        own("loss", name, "function")
    elif name not in NAMES:
        raise unknown("loss", "loss", name, NAMES)


def weights_of(wanted: str | Mapping[str, float] | None, splits: Splits) -> Tensor | None:
    """The weight of each class in the loss, float32 [C], as `RunConfig.class_weights` has it; None without.

    "balanced" is scikit-learn's: rows / (classes · rows of the class), over the training rows. Raises UserError.
    """
    if wanted is None:
        return None
    labels = splits.labels
    if isinstance(wanted, str):
        counts = np.bincount([row.label for row in splits.train], minlength=len(labels))
        return torch.tensor(len(splits.train) / (len(labels) * np.maximum(counts, 1)), dtype=torch.float32)
    for name in wanted:
        if name not in labels:
            raise unknown("class_weights", "label", name, labels)
    return torch.tensor([float(wanted.get(name, 1.0)) for name in labels], dtype=torch.float32)


def _weighted(weights: Tensor) -> Loss:
    """Cross-entropy whose rows count as their class does, as torch has it: the weighted mean."""

    def of(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, weight=weights.to(logits.device, logits.dtype))

    def weight(labels: Tensor) -> float:
        return float(weights[labels.cpu()].sum())

    return Loss(of, weight=weight, differentiable=True, kinds=("classification",))


def loss_of(
    name: str, reward: str | None, kind: str, labels: Sequence[str] = (), weights: Tensor | None = None
) -> Loss:
    """The loss `name` for tasks of `kind` with these `labels`. Raises UserError. weights: see `weights_of`.

    name: of `NAMES`, or the user's own function, "file.py:function" or "module:function": it is given scores (float32
    [N, C], -inf where a row has fewer choices) and labels (int64 [N]) and returns a number, the lower the better.
    reward: the user's function for the name "reward"; see `rewarded`.
    """
    if is_own(name):
        found = Loss(_checked(name, own("loss", name, "function")), differentiable=True)
    elif name == REWARD:
        if reward is None:
            raise UserError("reward: must name a 'module:function' for loss 'reward', got nothing")
        give = rewarded(reward)
        return _of_texts(lambda texts, rows: -give(texts, rows), kind, labels)
    elif name in TEXT_LOSSES:
        found = _of_texts(TEXT_LOSSES[name], kind, labels)
    elif name == "accuracy" and kind == "choice":  # several choices may be right
        found = _of_texts(lambda texts, rows: 1.0 - chosen_right(texts, [row.answers for row in rows]), kind, labels)
    elif name == "cross-entropy" and weights is not None:
        found = _weighted(weights)
    elif name in LOSSES:
        found = LOSSES[name]
    else:
        raise unknown("loss", "loss", name, NAMES)
    kinds = ("choice", "generation") if name in TEXT_LOSSES else found.kinds
    if kind not in kinds:
        known = [each for each in LOSSES if kind in LOSSES[each].kinds]
        known += [*TEXT_LOSSES] if kind != "classification" else []
        raise UserError(f"loss: must be {', '.join(known)} or {REWARD} for a task of kind {kind}, got '{name}'")
    return found


def _of_texts(of: Texts, kind: str, labels: Sequence[str]) -> Loss:
    if kind == "generation":
        return Loss(of, "texts", ROWS, kinds=KINDS)
    of_scores = _of_numbers(lambda scores, rows: of(chosen(scores, rows, labels), rows))
    return Loss(of_scores, "scores", ROWS, kinds=KINDS)


def chosen(scores: Tensor, rows: Sequence[Example], labels: Sequence[str]) -> list[str]:
    """The label, or the choice of each row, with the highest score. scores: [N, C]. Raises NotFinite."""
    best = highest(scores).tolist()
    return [labels[i] if labels else row.choices[i] for i, row in zip(best, rows, strict=True)]


def rewarded(name: str) -> Texts:
    """The user's reward "file.py:function" or "module:function": the mean over rows, the higher the better.

    It is called with the predicted texts (written answers, choices or label names: a list of N) and the N rows
    (`gradientless.language.tasks.Example`), and returns a number, or one for each row. Raises UserError for any other,
    for one that is not finite, and for whatever it raises itself.
    """
    function = own("reward", name, "function")

    def of(texts: Sequence[str], rows: Sequence[Example]) -> float:
        try:
            found = function(list(texts), list(rows))
        except Exception as error:
            if is_out_of_memory(error):  # which is answered with the batch that fits
                raise
            raise UserError(f"reward: '{name}' must return a number, got {with_kind(error)}") from error
        wanted = f"reward: '{name}' must return a number, or one for each of the {len(rows)} rows, got"
        try:
            values = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found)
        except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths, tensors with gradients
            raise UserError(f"{wanted} {type(found).__name__} ({with_kind(error)})") from error
        each = values.shape == (len(rows),) and values.dtype.kind in "biuf"
        if not each and not (values.shape == () and values.dtype.kind in "iuf"):
            shape = f" of shape {values.shape}" if values.ndim else ""
            raise UserError(f"{wanted} {type(found).__name__}{shape}")
        if not (finite := np.isfinite(values)).all():
            first = int(np.argmin(finite))  # of a single number, too
            where = f" for row {first + 1} of {len(rows)}" if each else ""
            raise UserError(f"reward: '{name}' must return finite numbers, got {values.reshape(-1)[first]}{where}")
        return float(values.mean())

    return of


def _checked(name: str, function: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor, Tensor], Tensor | float]:
    def of(logits: Tensor, labels: Tensor) -> Tensor | float:
        try:
            found = function(logits, labels)
        except Exception as error:
            if is_out_of_memory(error):  # which is answered with the batch that fits
                raise
            raise UserError(f"loss: '{name}' must return a number, got {with_kind(error)}") from error
        if isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex():
            return found.reshape(())
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise UserError(f"loss: '{name}' must return a number, got {type(found).__name__}{shape}")
        return float(found)

    return of


def as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
