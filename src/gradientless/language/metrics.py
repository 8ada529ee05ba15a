"""Metrics over predictions, as fractions in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from gradientless.errors import NotFinite


def highest(scores: Tensor) -> Tensor:
    """Where the highest score of each row stands: int64 [N]; the first among equals. scores: [N, C].

    Raises `NotFinite` for a row with NaN or infinity, whose highest would be one by chance. -inf is a score, such as
    that of a choice that a row does not have; but one of a row must be finite.
    """
    top, best = scores.max(dim=-1)  # NaN is the highest of its row
    wrong = ~top.isfinite()
    if bool(wrong.any()):
        first, rows = top[wrong][0].item(), f"{int(wrong.sum())} of {len(top)} rows"
        raise NotFinite(f"model: scores must be finite, got {first} in {rows}")
    return best


def _pair(predictions: ArrayLike, gold: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, expected = np.asarray(predictions), np.asarray(gold)
    if predicted.shape != expected.shape or predicted.ndim != 1:
        raise ValueError(f"metrics: predictions and gold must be [N] each, got {predicted.shape} and {expected.shape}")
    if not len(predicted):
        raise ValueError("metrics: at least one prediction is needed, got none")
    return predicted, expected


def accuracy(predictions: ArrayLike, gold: ArrayLike, classes: int | None = None) -> float:
    """Share of predictions ([N] class indices) equal to gold ([N]). `classes` does not matter here."""
    predicted, expected = _pair(predictions, gold)
    return float(np.mean(predicted == expected))


def f1(predictions: ArrayLike, gold: ArrayLike, classes: int) -> float:
    """F1 of class 1 when there are two classes; else the mean of the F1 of every class that occurs (macro).

    A class that was never predicted correctly has F1 0. predictions, gold: [N] class indices.
    """
    predicted, expected = _pair(predictions, gold)
    scored = [1] if classes <= 2 else sorted(set(predicted.tolist()) | set(expected.tolist()))
    values = []
    for label in scored:
        hits = int(np.sum((predicted == label) & (expected == label)))
        total = int(np.sum(predicted == label)) + int(np.sum(expected == label))
        values.append(2 * hits / total if total else 0.0)
    return float(np.mean(values))


def accuracy_name(labels: Sequence[str], kind: str = "classification") -> str:
    """What `accuracy` means for tasks of a kind (`tasks.base.KINDS`), for people."""
    named = {"choice": "accuracy (any right choice)", "generation": "accuracy (exact match)"}
    return named.get(kind, "accuracy")


def f1_name(labels: Sequence[str], kind: str = "classification") -> str:
    """What `f1` means for these class names and tasks of this kind, for people."""
    if kind != "classification":
        return f"f1 (of tokens{', of the choice' if kind == 'choice' else ''}, best over the right answers)"
    return f"f1 (binary, of '{labels[1]}')" if len(labels) == 2 else f"f1 (macro, over {len(labels)} classes)"


def all_right(predictions: ArrayLike, gold: ArrayLike, questions: Sequence[Hashable]) -> float:
    """Share of questions whose rows are all predicted rightly: MultiRC's exact match.

    predictions, gold: [N] class indices. questions: [N], equal for the rows of one question.
    """
    predicted, expected = _pair(predictions, gold)
    if len(questions) != len(predicted):
        raise ValueError(f"metrics: questions must be [{len(predicted)}], got [{len(questions)}]")
    right: dict[Hashable, bool] = {}
    for question, hit in zip(questions, predicted == expected, strict=True):
        right[question] = right.get(question, True) and bool(hit)
    return sum(right.values()) / len(right)


# --- texts ----------------------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """`text` as SQuAD compares it: in lower case, without punctuation, articles and needless white space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal one of the row's accepted answers, all of them `normalised`."""
    return _mean_of_best(predictions, answers, lambda predicted, answer: float(predicted == answer))


def token_f1(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean of the best F1 with an accepted answer, over the tokens (with their counts) of `normalised` texts.

    A text without tokens agrees with such a text alone. An answer of several spans (DROP) is not paired span by span:
    each of `answers` is compared by itself, as MeZO does.
    """
    return _mean_of_best(predictions, answers, _f1_of_tokens)


def _f1_of_tokens(predicted: str, answer: str) -> float:
    found, wanted = predicted.split(), answer.split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * sum((Counter(found) & Counter(wanted)).values()) / (len(found) + len(wanted))


def _mean_of_best(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], score: Callable[[str, str], float]
) -> float:
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(
            f"metrics: predictions and answers must be [N] each, N >= 1, got {len(predictions)} and {len(answers)}"
        )
    if not all(answers):
        raise ValueError("metrics: every row must have an accepted answer, got none")
    values = [
        max(score(normalised(predicted), normalised(answer)) for answer in accepted)
        for predicted, accepted in zip(predictions, answers, strict=True)
    ]
    return float(np.mean(values))


def chosen_right(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of predicted choices that are among the row's right ones, letter by letter: accuracy of multiple choice."""
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(
            f"metrics: predictions and answers must be [N] each, N >= 1, got {len(predictions)} and {len(answers)}"
        )
    return float(np.mean([predicted in accepted for predicted, accepted in zip(predictions, answers, strict=True)]))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike, int], float]] = {"accuracy": accuracy, "f1": f1}

# Over predicted texts ([N]) and accepted ones ([N] of one or more).
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "accuracy": chosen_right,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
