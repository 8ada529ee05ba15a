"""Rows that are only read: which of them share a batch, and what happens when memory does not hold one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradientless.language.surfaces import FullSurface
from gradientless.language.tasks import Example
from gradientless.run.evaluation import TOKENS, in_batches, logits_of


class Encoded:
    def __init__(self, *lengths: int, lines: tuple[int, ...] | None = None) -> None:
        self.lengths = np.array(lengths)
        if lines is not None:
            self.lines = np.array(lines)

    def __len__(self) -> int:
        return len(self.lengths)


def batches(encoded: Encoded, size: int | None, count: int | None = None) -> list[list[int]]:
    return [rows.tolist() for rows, _ in in_batches(encoded, size, "cpu", len, count)]


def test_as_many_rows_as_hold_the_tokens_with_their_padding():
    limit = TOKENS["cpu"]
    assert batches(Encoded(limit // 2, 1, limit // 4, limit), None) == [[1, 2], [0], [3]]
    assert batches(Encoded(limit // 2, 1, limit // 2 + 1, limit * 9), None) == [[1, 0], [2], [3]]
    assert batches(Encoded(*[limit // 512] * 513), None) == [list(range(512)), [512]]


def test_a_row_with_choices_is_several():
    assert batches(Encoded(5, 3, 4, 9, lines=(2, 1, 2, 3)), 3) == [[1, 2], [0], [3]]
    limit = TOKENS["cpu"]
    assert batches(Encoded(limit // 4, limit // 4, limit // 4, lines=(2, 2, 2)), None) == [[0, 1], [2]]


def test_the_first_rows_alone():
    assert batches(Encoded(5, 3, 4, 1, 1), 2, count=3) == [[1, 2], [0]]


def test_an_accelerator_holds_more():
    encoded = Encoded(*[TOKENS["cpu"]] * 3)
    assert [len(rows) for rows, _ in in_batches(encoded, None, "cuda", len)] == [3]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("can't allocate memory")])
def test_what_memory_does_not_hold_is_read_in_halves(error):
    tried = []

    def read(rows: np.ndarray) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 2:
            raise error
        return rows.tolist()

    assert [made for _, made in in_batches(Encoded(*range(9)), 8, "cpu", read)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert tried == [8, 4, 2, 2, 2, 2, 1]


def test_one_row_must_fit_and_other_errors_are_not_memory():
    def read(rows: np.ndarray) -> None:
        raise torch.OutOfMemoryError("no") if len(rows) == 1 else RuntimeError("other")

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(Encoded(1, 1), 1, "cpu", read))
    with pytest.raises(RuntimeError, match="other"):
        list(in_batches(Encoded(1, 1), 2, "cpu", read))


def test_the_logits_do_not_depend_on_the_batches(tiny_model, monkeypatch):
    surface = FullSurface.create(tiny_model, ("negative", "positive"), max_length=16)
    texts = ["the plot was very very dull", "good", "a bad bad bad film the plot was dull", "a good film"]
    encoded = surface.encode([Example(text, 0) for text in texts])
    whole, reads = logits_of(surface, encoded), []
    ran = FullSurface.logits

    def held(own: FullSurface, prepared: object, *more: object) -> torch.Tensor:
        found = ran(own, prepared, *more)
        reads.append(len(found))
        if len(found) > 2:
            raise torch.OutOfMemoryError("no")
        return found

    monkeypatch.setattr(FullSurface, "logits", held)
    assert torch.allclose(logits_of(surface, encoded), whole, atol=1e-6)
    assert reads == [4, 2, 2]
