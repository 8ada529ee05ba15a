"""Losses against libraries, by hand, and that what has no derivative goes down."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import f1_score

from gradientless.errors import UserError
from gradientless.language.tasks import Example
from gradientless.run.losses import loss_of


@pytest.mark.parametrize("classes", [2, 3])
def test_the_lack_of_f1_is_scikit_learns(classes):
    """Of the second class of two; else the mean over the classes."""
    generator = torch.Generator().manual_seed(classes)
    labels = tuple("abc"[:classes])
    loss = loss_of("f1", None, "classification", labels)
    for _ in range(5):
        scores = torch.randn(23, classes, generator=generator)
        gold = torch.randint(classes, (23,), generator=generator)
        options = {"average": "binary"} if classes == 2 else {"average": "macro"}
        wanted = 1 - f1_score(gold.numpy(), scores.argmax(dim=1).numpy(), **options)
        assert float(loss.of(scores, gold)) == pytest.approx(wanted)
    by_hand = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])  # one right, one wrong of each
    assert float(loss_of("f1", None, "classification", ("a", "b")).of(by_hand, torch.tensor([1, 0, 1, 0]))) == 0.5


@pytest.mark.parametrize(
    ("name", "kind"),
    [("accuracy", "classification"), ("f1", "classification"), ("accuracy", "choice"), ("exact-match", "choice")],
)
def test_scores_that_are_no_numbers_are_no_loss(name, kind):
    """The highest of a row of NaN would be its first, which may be right."""
    loss = loss_of(name, None, kind, ("a", "b") if kind == "classification" else ())
    row = Example("x", 0, choices=("a", "b"), answers=("a",))
    gold = torch.tensor([0, 0, 1]) if loss.against == "labels" else [row] * 3
    scores = torch.tensor([[1.0, 0.0], [1.0, -math.inf], [0.0, 1.0]])  # where a row has fewer choices
    assert math.isfinite(float(loss.of(scores, gold)))
    scores[1, 0] = math.nan
    assert math.isnan(float(loss.of(scores, gold)))


@pytest.mark.parametrize(("body", "told"), [("raise KeyError('no')", "KeyError: 'no'"), ("return []", "list")])
def test_a_loss_of_ones_own_that_fails_is_one_line(body, told, tmp_path):
    (tmp_path / "mine.py").write_text(f"def of(scores, labels):\n    {body}\n")
    loss = loss_of(f"{tmp_path / 'mine.py'}:of", None, "classification", ("a", "b"))
    with pytest.raises(UserError, match=f"mine.py:of' must return a number, got {told}$"):
        loss.of(torch.zeros(2, 2), torch.zeros(2))
