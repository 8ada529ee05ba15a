"""Token ids of many rows: made some thousand rows at a time, held in one array, kept on disk where there are many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradientless.errors import UserError
from gradientless.language.kept import kept
from gradientless.language.starter import cache_folder
from gradientless.language.tasks.base import Example
from gradientless.terminal import Console, Counter

VERSION = 1  # raise it when the same key would mean other ids
AT_A_TIME = 4096  # rows; the tokenizer's answer to all of them at once would take kilobytes a row
LARGE = 50_000  # rows from which the ids are kept on disk, and progress is shown: fewer take seconds


class Ragged(Sequence["np.ndarray[Any, Any]"]):
    """Rows of whole numbers of unequal lengths, as views into one array. lengths: int64 [N]."""

    def __init__(self, values: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        self.values, self.lengths = values, lengths.astype(np.int64)
        self._ends = np.cumsum(self.lengths)

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        values = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(lengths.sum()))
        return cls(values, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        end = self._ends[row]
        return self.values[end - self.lengths[row] : end]


def require_known(tokenizer: Any, known: int | None, ids: np.ndarray[Any, Any] | Sequence[int]) -> None:
    """Raises `UserError` for a token that the model has no row for. known: its rows; None where it counts none."""
    largest = int(max(ids, default=0)) if isinstance(ids, Sequence) else int(ids.max(initial=0))
    if known is not None and largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"model: must have a row for every token of its tokenizer that is used, got {known:,} rows and token "
            f"{largest:,} ({token!r})"
        )


Columns = Sequence[Sequence[Sequence[int]]]  # for each column, for each row, its numbers


def encoded(
    examples: Sequence[Example],
    columns: int,
    code: Callable[[range], Columns],
    tokenizer: Any,
    settings: Sequence[object],
) -> list[Ragged]:
    """So many columns of numbers for all examples; `code` makes those of the examples of a range.

    From `LARGE` rows they are kept in `cache_folder()/encoded`, under a key of all texts, the tokenizer and `settings`
    (whatever else they depend on); a tokenizer that does not tell all that it does (a slow one) keeps nothing.
    """
    console = Console(stderr=True)
    many = len(examples) >= LARGE

    def made() -> list[Ragged]:
        parts: list[list[Ragged]] = [[] for _ in range(columns)]
        with Counter(console, "token ids", len(examples), shown=many) as counter:
            for begin in range(0, len(examples), AT_A_TIME):
                some = range(begin, min(begin + AT_A_TIME, len(examples)))
                for part, rows in zip(parts, code(some), strict=True):
                    part.append(Ragged.of(rows))
                counter.advance(len(some))
        return [_joined(part) for part in parts]

    identity = _identity(tokenizer) if many else None
    if identity is None:
        return made()
    name = _key(examples, (identity, columns, *settings))
    path = cache_folder() / "encoded" / f"{name}.npy"
    array = kept(path, lambda file: _write(file, made()), lambda line: console.print(line, soft_wrap=True))
    lengths = array[: columns * len(examples)].reshape(columns, len(examples))
    values = np.split(array[columns * len(examples) :], np.cumsum(lengths.sum(axis=1, dtype=np.int64))[:-1])
    return [Ragged(*each) for each in zip(values, lengths, strict=True)]


def _joined(parts: Sequence[Ragged]) -> Ragged:
    return Ragged(np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts]))


def _write(file: Path, columns: Sequence[Ragged]) -> None:
    """One array: the lengths of all columns, then their values."""
    total = sum(len(column) + len(column.values) for column in columns)
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.int32, shape=(total,))
    np.concatenate([*(c.lengths for c in columns), *(c.values for c in columns)], out=array, casting="unsafe")
    array.flush()


def _identity(tokenizer: Any) -> str | None:
    """All that a fast tokenizer does, as text, but for how it pads and cuts, which every call says."""
    if not tokenizer.is_fast:
        return None
    import tokenizers

    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    stated.pop("padding", None), stated.pop("truncation", None)
    sides = (
        tokenizer.truncation_side,
        tokenizer.split_special_tokens,
        tokenizer.model_input_names,
        tokenizers.__version__,
    )
    return json.dumps([stated, type(tokenizer).__name__, *sides], sort_keys=True)


def _key(examples: Sequence[Example], settings: Sequence[object]) -> str:
    digest = hashlib.sha256("\0".join(map(str, (VERSION, len(examples), *settings))).encode())
    for row in examples:
        digest.update(repr((row.text, row.text_pair, sorted(row.fields.items()))).encode())
    return digest.hexdigest()
