"""Figures that a constant answer cannot raise: against values by hand and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from gradientless.language.metrics import MOST_CONFUSED, alike, balanced_accuracy, by_class, mcc

# Of 6 rows of "no" 5 are found, of 2 of "yes" one.
GOLD, SAID = [0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0]


def test_by_hand():
    # (tp tn - fp fn) / sqrt((tp + fp) (tp + fn) (tn + fp) (tn + fn)), with yes as the positive class
    assert mcc(SAID, GOLD) == pytest.approx((1 * 5 - 1 * 1) / math.sqrt(2 * 2 * 6 * 6))
    assert balanced_accuracy(SAID, GOLD) == pytest.approx((5 / 6 + 1 / 2) / 2)
    found = by_class(SAID, GOLD, ("no", "yes"))
    assert found["majority"] == {"label": "no", "share": 0.75} and found["confusion"] == [[5, 1], [1, 1]]
    assert found["classes"]["no"] == {
        **{"rows": 6, "predicted": 6},
        **{"precision": pytest.approx(5 / 6), "recall": pytest.approx(5 / 6), "f1": pytest.approx(5 / 6)},
    }
    assert found["classes"]["yes"] == {"rows": 2, "predicted": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert alike(found) is None


def test_a_constant_answer_is_worth_nothing():
    gold = [1] * 20 + [0]
    assert mcc([1] * 21, gold) == 0.0 and balanced_accuracy([1] * 21, gold) == 0.5
    found = by_class([1] * 21, gold, ("no", "yes"))
    assert alike(found) == "yes" and found["majority"] == {"label": "yes", "share": pytest.approx(20 / 21)}
    assert found["classes"]["no"] == {"rows": 1, "predicted": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_one_class_alone_is_not_missed_by_being_said():
    assert alike(by_class([1, 1], [1, 1], ("no", "yes"))) is None
    assert mcc([1, 1], [1, 1]) == 0.0 and balanced_accuracy([1, 1], [1, 1]) == 1.0


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_as_scikit_learn_has_them(classes):
    draw = np.random.default_rng(classes)
    gold, said = draw.integers(0, classes, 80), draw.integers(0, classes, 80)
    assert mcc(said, gold) == pytest.approx(sklearn_metrics.matthews_corrcoef(gold, said))
    assert balanced_accuracy(said, gold) == pytest.approx(sklearn_metrics.balanced_accuracy_score(gold, said))
    found = by_class(said, gold, [str(i) for i in range(classes)])
    assert found["confusion"] == sklearn_metrics.confusion_matrix(gold, said).tolist()
    told = sklearn_metrics.precision_recall_fscore_support(gold, said, zero_division=0)
    for i, (precision, recall, f1, rows) in enumerate(zip(*told, strict=True)):
        of = found["classes"][str(i)]
        assert (of["precision"], of["recall"], of["f1"], of["rows"]) == pytest.approx((precision, recall, f1, rows))


def test_of_very_many_classes_there_is_no_table_of_pairs():
    names = [str(i) for i in range(MOST_CONFUSED + 1)]
    assert "confusion" not in by_class([0, 1], [0, 2], names) and "confusion" in by_class([0], [0], names[1:])
