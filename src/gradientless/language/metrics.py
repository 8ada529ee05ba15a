"""Metrics over predictions, as fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike


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


def f1_name(labels: Sequence[str]) -> str:
    """What `f1` means for these class names, for people."""
    return f"f1 (binary, of '{labels[1]}')" if len(labels) == 2 else f"f1 (macro, over {len(labels)} classes)"


METRICS: dict[str, Callable[[ArrayLike, ArrayLike, int], float]] = {"accuracy": accuracy, "f1": f1}
