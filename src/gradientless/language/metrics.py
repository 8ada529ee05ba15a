"""Metrics over predictions, as fractions in [0, 1]; Matthews' correlation goes down to -1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

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


def balanced_accuracy(predictions: ArrayLike, gold: ArrayLike, classes: int | None = None) -> float:
    """Mean over the classes that occur in `gold` of the share of their rows that was predicted rightly (their recall).

    predictions, gold: [N] class indices. `classes` does not matter here. As scikit-learn's balanced_accuracy_score.
    """
    predicted, expected = _pair(predictions, gold)
    rows = np.bincount(expected)
    hits = np.bincount(expected[predicted == expected], minlength=len(rows))
    return float(np.mean(hits[rows > 0] / rows[rows > 0]))


def mcc(predictions: ArrayLike, gold: ArrayLike, classes: int | None = None) -> float:
    """Matthews' correlation of predictions and gold, in [-1, 1], over any number of classes (Gorodkin 2004).

    It is 0 where either holds one class alone: a constant answer tells nothing, however often it is right.
    predictions, gold: [N] class indices. `classes` does not matter here. As scikit-learn's matthews_corrcoef.
    """
    predicted, expected = _pair(predictions, gold)
    size = 1 + int(max(predicted.max(), expected.max()))
    said, rows = (np.bincount(each, minlength=size).astype(float) for each in (predicted, expected))
    n, hits = float(len(expected)), float(np.sum(predicted == expected))
    spread = (n * n - said @ said) * (n * n - rows @ rows)
    return float((hits * n - said @ rows) / math.sqrt(spread)) if spread > 0 else 0.0


MOST_CONFUSED = 100  # classes of which a table of confusion is kept


def by_class(predictions: ArrayLike, gold: ArrayLike, labels: Sequence[str]) -> dict[str, Any]:
    """What stands behind one number, JSON-able: "majority", the label of the largest class and its share of the rows;
    "classes", by label: rows, predicted (counts), precision, recall, f1; and "confusion", counts of rows by their class
    (down) and the predicted one (across), both in the order of `labels`; not of more than `MOST_CONFUSED` classes.

    predictions, gold: [N] indices of `labels`. A share of nothing is 0, as scikit-learn has it.
    """
    predicted, expected = _pair(predictions, gold)
    size = len(labels)
    said, rows = np.bincount(predicted, minlength=size), np.bincount(expected, minlength=size)
    hits = np.bincount(expected[predicted == expected], minlength=size)
    classes = {
        label: {
            "rows": int(rows[i]),
            "predicted": int(said[i]),
            "precision": float(hits[i] / max(1, said[i])),
            "recall": float(hits[i] / max(1, rows[i])),
            "f1": float(2 * hits[i] / max(1, said[i] + rows[i])),
        }
        for i, label in enumerate(labels)
    }
    largest = int(rows.argmax())
    found: dict[str, Any] = {
        "majority": {"label": labels[largest], "share": float(rows[largest] / len(expected))},
        "classes": classes,
    }
    if size <= MOST_CONFUSED:
        table = np.bincount(expected * size + predicted, minlength=size * size).reshape(size, size)
        found["confusion"] = table.tolist()
    return found


def alike(found: Mapping[str, Any]) -> str | None:
    """The label that every row was given, where the rows themselves are of several classes; else None.

    found: of `by_class`.
    """
    classes = found.get("classes", {})
    said = [label for label, of in classes.items() if of["predicted"]]
    return said[0] if len(said) == 1 and sum(of["rows"] > 0 for of in classes.values()) > 1 else None


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


METRICS: dict[str, Callable[[ArrayLike, ArrayLike, int], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "balanced_accuracy": balanced_accuracy,
}

# Over predicted texts ([N]) and accepted ones ([N] of one or more).
TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "accuracy": chosen_right,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
