"""From rows to token batches: a user's own files, splits, encoding, and which rows a step sees."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language.encodings import Ragged, encoded, require_known
from gradientless.language.tables import SUFFIXES, BadRows, Row, Table, read_table
from gradientless.language.tasks.base import Example, Splits

VALIDATION_SHARE = 0.1


def load_table(
    path: Path,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    validation: Path | None = None,
    seed: int = 0,
    labelled: bool = True,
    bad: BadRows | None = None,
) -> Splits:
    """A user's own data: one file, or a folder with train.*, dev.* (or validation.*) and perhaps test.*.

    Without validation rows a tenth of each class is set aside, drawn by `seed`. Labels may be strings (classes in
    alphabetical order) or whole numbers (in numerical order; the numbers are the names). A test file without the label
    column is left out. labelled: whether there must be a label; else rows without the column have no classes. bad:
    what is done about rows that cannot be used. Raises `UserError` for everything a user can mend.
    """
    path = Path(path)
    columns: Columns = (text_column, text_pair_column, label_column)
    names: tuple[str, ...] = ()
    test_file = None
    if path.is_dir():
        train_file = _find(path, ("train",))
        if train_file is None:
            raise UserError(f"{path}: the folder must hold train.csv, train.tsv or train.jsonl, got none")
        validation = Path(validation) if validation is not None else _find(path, ("dev", "validation"))
        test_file = _find(path, ("test",))
    else:
        train_file = path
        validation = Path(validation) if validation is not None else None
    table = read_table(train_file)
    if not labelled and label_column not in table.columns:
        columns = (text_column, text_pair_column, None)
    cells = _cells(_table(train_file, columns, table), columns, None, bad)
    if columns[2] is not None:
        names = _class_names(table.path, label_column, [label for *_, label in cells if label is not None])
    train = _examples(cells, names)
    test: list[Example] = []
    if test_file is not None and label_column in (test_table := read_table(test_file)).columns:
        test = _examples(_cells(_table(test_file, columns, test_table), columns, names, bad), names)
    if validation is not None:
        held_out = _examples(_cells(_table(validation, columns), columns, names, bad), names)
    else:
        train, held_out = _split(table.path, train, max(1, len(names)), seed)
    return Splits(train, held_out, test, names)


def load_rows(
    path: Path,
    text_column: str,
    text_pair_column: str | None,
    label_column: str,
    names: tuple[str, ...] | None = None,
    bad: BadRows | None = None,
) -> tuple[list[Example], tuple[str, ...]]:
    """All rows of one file, and the names of their labels: `names`, or those that it has. Raises `UserError`."""
    columns: Columns = (text_column, text_pair_column, label_column)
    cells = _cells(_table(path, columns), columns, names, bad)
    found = tuple(sorted({str(label) for *_, label in cells})) if names is None else names
    return _examples(cells, found), found


def _find(folder: Path, stems: Sequence[str]) -> Path | None:
    found = [folder / (stem + suffix) for stem in stems for suffix in SUFFIXES if (folder / (stem + suffix)).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: must hold one {stems[0]} file, got {', '.join(file.name for file in found)}")
    return found[0] if found else None


Columns = tuple[str, "str | None", "str | None"]


def _table(path: Path, columns: Columns, table: Table | None = None) -> Table:
    table = table if table is not None else read_table(path)
    text, pair, label = columns
    table.require(text, "text")
    if pair is not None:
        table.require(pair, "second text")
    if label is not None:
        table.require(label, "label")
    return table


def _label(table: Table, row: Row, column: str) -> str | int:
    value = row.values.get(column)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int):
        return value
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None or value == "" or isinstance(value, str) else f"{value!r:.40}"
        raise UserError(
            f"{table.path}: line {row.line}: column '{column}' must hold a word or a whole number, got {found}"
        )
    return value.strip()


def _class_names(path: Path, column: str, values: Sequence[str]) -> tuple[str, ...]:
    distinct = set(values)
    if len(distinct) < 2:
        raise UserError(f"{path}: column '{column}' must hold at least two classes, got one: '{distinct.pop()}'")
    if len(distinct) > max(20, len(values) // 2):
        raise UserError(
            f"{path}: column '{column}' must hold classes, got {len(distinct)} different values in {len(values)} rows"
        )
    numbers = all(_is_integer(name) for name in distinct)
    return tuple(sorted(distinct, key=int) if numbers else sorted(distinct))


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 400  # Python itself counts no further than some thousand


Cells = tuple[str, "str | None", "str | None"]
"""Of a row: text, second text, name of the label."""


def _cells(table: Table, columns: Columns, names: tuple[str, ...] | None, bad: BadRows | None) -> list[Cells]:
    """names: that labels must be of; None where the file says which there are."""
    text, pair, label = columns
    known = None if names is None else set(names)

    def one(row: Row) -> Cells:
        second = None if pair is None else table.text(row, pair)
        name = None if label is None else str(_label(table, row, label))
        if name is not None and known is not None and name not in known:
            have = ", ".join(names or ())
            raise UserError(
                f"{table.path}: line {row.line}: label must be one of the training data's, got '{name}' "
                f"(known: {have:.200})"
            )
        return table.text(row, text), second, name

    return table.made(one, bad)


def _examples(cells: Sequence[Cells], names: tuple[str, ...]) -> list[Example]:
    index = {name: i for i, name in enumerate(names)}
    return [Example(text, 0 if name is None else index[name], second) for text, second, name in cells]


def _split(path: Path, rows: list[Example], classes: int, seed: int) -> tuple[list[Example], list[Example]]:
    """A tenth of each class (at least one row of a class that has two) drawn by `seed`; file order is kept."""
    labels = np.array([row.label for row in rows])
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(rows), dtype=bool)
    for label in range(classes):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held_out[members[: max(1, round(VALIDATION_SHARE * len(members)))]] = True
    if not held_out.any():
        raise UserError(
            f"{path}: some class must have two rows or more to split off validation rows, got one each; "
            "give a validation file"
        )
    parts = ([], [])  # type: tuple[list[Example], list[Example]]
    for row, out in zip(rows, held_out, strict=True):
        parts[int(out)].append(row)
    return parts


def class_balance(examples: Sequence[Example], labels: Sequence[str]) -> str:
    """For people, such as "6824 rows: negative 49.8%, positive 50.2%" (the 10 largest classes)."""
    if not labels:
        return f"{len(examples)} rows"
    counts = Counter(example.label for example in examples)
    shown = counts.most_common(10) if len(labels) > 10 else [(i, counts[i]) for i in range(len(labels))]
    shares = ", ".join(f"{labels[i]} {100 * n / max(1, len(examples)):.1f}%" for i, n in shown)
    rest = f" and {len(labels) - len(shown)} more classes" if len(shown) < len(labels) else ""
    return f"{len(examples)} rows" + (f": {shares}{rest}" if labels else "")


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    order = generator.permutation(rows).astype(np.int64)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, rows: int, batch_size: int) -> np.ndarray:
    """Rows of step `step` (from 0): int64 [batch_size], a pure function of its arguments.

    The steps cut an endless chain of permutations of range(rows), one an epoch, into batches of equal size, so that a
    batch may cross from one epoch into the next.
    """
    if rows < 1 or batch_size < 1 or step < 0 or not 0 <= seed < 2**64:
        raise UserError(
            "data: rows and batch_size must be >= 1, step >= 0 and seed a non-negative 64-bit number, "
            f"got {rows}, {batch_size}, {step} and {seed}"
        )
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, offset = divmod(position, rows)
        part = _permutation(seed, epoch, rows)[offset : offset + end - position]
        parts.append(part)
        position += len(part)
    return np.concatenate(parts)


class EncodedRows(Protocol):
    """The rows of a split as token ids, made once: `Encoded`, `prompting.EncodedPrompts`.

    labels: int64 [N]. lengths: int64 [N], tokens of each row. fingerprint: sha256 of all that `batch` depends on.
    wholes: int64, tokens of each example before it was cut to max_length.
    """

    labels: Tensor
    lengths: np.ndarray
    fingerprint: str
    max_length: int
    wholes: np.ndarray

    def __len__(self) -> int: ...
    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]: ...


class Encoded:
    """The token ids of one split, made once.

    labels: int64 [N]. lengths: int64 [N], tokens of each row. max_length: the longest a row may be (texts are cut).
    known: the tokens that the model has rows for, where it counts them; another raises `UserError`. wholes: see
    `EncodedRows`. fingerprint: sha256 of ids, segment ids, labels and max_length, in hex.
    """

    def __init__(self, tokenizer: Any, examples: Sequence[Example], max_length: int, known: int | None = None) -> None:
        if not examples:
            raise UserError("data: a split must have at least one row, got none")
        pairs = [example.text_pair for example in examples]
        if any(pair is None for pair in pairs) and any(pair is not None for pair in pairs):
            raise UserError("data: every row or no row must have a second text, got both kinds")
        segmented = "token_type_ids" in tokenizer("a", "a" if pairs[0] is not None else None)

        def code(some: range) -> list[Sequence[Sequence[int]]]:
            texts = [examples[i].text for i in some]
            second = [pairs[i] for i in some] if pairs[0] is not None else None
            options = {"padding": False, "return_attention_mask": False}
            coded = tokenizer(texts, second, truncation=True, max_length=max_length, **options)
            # Of a row that fills max_length, how many tokens it had before it was cut.
            wholes = [len(ids) for ids in coded["input_ids"]]
            full = [i for i, length in enumerate(wholes) if length >= max_length]
            again = tokenizer([texts[i] for i in full], second and [second[i] for i in full], **options) if full else {}
            for i, ids in zip(full, again.get("input_ids", ()), strict=True):
                wholes[i] = len(ids)
            return [coded["input_ids"], [[n] for n in wholes], *([coded["token_type_ids"]] if segmented else [])]

        ids, wholes, *segments = encoded(examples, 2 + segmented, code, tokenizer, (max_length,))
        require_known(tokenizer, known, ids.values)
        self.max_length = max_length
        self.labels: Tensor = torch.tensor([example.label for example in examples], dtype=torch.int64)
        self._ids: Sequence[np.ndarray] = ids
        self._segments: Sequence[np.ndarray] | None = segments[0] if segments else None
        self._pad = int(tokenizer.pad_token_id or 0)
        self._segment_pad = int(getattr(tokenizer, "pad_token_type_id", 0) or 0)
        self.lengths = ids.lengths
        self.wholes = wholes.values.astype(np.int64)
        self.fingerprint = self._digest(ids, *segments)

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Rows `indices` ([B]) padded at the right to the longest of them: input_ids, attention_mask and, where the
        tokenizer makes them, token_type_ids; int64 [B, T] each."""
        rows = [int(i) for i in indices]
        batch = _read([self._ids[row] for row in rows], self._pad)
        if self._segments is not None:
            batch["token_type_ids"] = _padded([self._segments[row] for row in rows], self._segment_pad)
        return batch

    def _digest(self, *columns: Ragged) -> str:
        digest = hashlib.sha256(f"{self.max_length}\0{len(self)}\0{self._pad}\0".encode())
        digest.update(self.lengths.tobytes())
        for column in columns:
            digest.update(np.ascontiguousarray(column.values).data)
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def _padded(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    """Rows of numbers as int64 [B, T], filled at the right."""
    found = np.full((len(rows), max(1, max(map(len, rows)))), fill, dtype=np.int64)
    for at, row in enumerate(rows):
        found[at, : len(row)] = row
    return torch.from_numpy(found)


def _read(rows: Sequence[np.ndarray], pad: int) -> dict[str, Tensor]:
    """Rows of token ids as what a model reads."""
    mask = _padded([np.ones_like(row) for row in rows], 0)
    return {"input_ids": _padded(rows, pad), "attention_mask": mask}


MASKED_SHARE = 0.15
MASKINGS = 10  # of each text, as of BERT's own data (Devlin et al. 2019, as Liu et al. 2019 tell it)
SPAN = 3  # tokens of a dropped span, on average (Raffel et al. 2020, section 3.3.4)


class EncodedTexts(Encoded):
    """The texts of one split for language modelling: rows whose tokens are to be said, not their classes.

    mask: the mask token, for a masked model; each text then stands here `MASKINGS` times, with 15% of its tokens (at
    least one; a function of `seed`, text and time) masked and to be said. None: a causal model, which says every next
    token. texts: how many texts; rows range(texts) have each of them once. Texts without a token to be said are left
    out.

    Differs from BERT: the tokens to be said are all masked, none is kept or replaced by another.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        max_length: int,
        mask: int | None,
        seed: int,
        known: int | None = None,
    ) -> None:
        super().__init__(tokenizer, examples, max_length, known)
        require_known(tokenizer, known, [] if mask is None else [mask])
        self._mask, self._seed = mask, seed
        special = np.array(tokenizer.all_special_ids)
        said = [np.flatnonzero(~np.isin(row, special)) if mask is not None else np.arange(len(row) - 1)
                for row in self._ids]  # fmt: skip
        kept = [i for i, places in enumerate(said) if len(places)]
        if not kept:
            raise UserError("data: a text must have a token to be said, got none in any row")
        self._said = [said[i] for i in kept]
        self._ids = [self._ids[i] for i in kept]
        self._segments = None if self._segments is None else [self._segments[i] for i in kept]
        self.texts, times = len(kept), 1 if mask is None else MASKINGS
        self.labels = self.labels[kept].repeat(times)
        self.lengths = np.tile(self.lengths[kept], times)
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}\0{mask}\0{seed}\0{times}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """As `Encoded.batch`, tokens masked; and said: bool [B, T], where the model's scores are read."""
        batch = super().batch([int(i) % self.texts for i in indices])
        batch["said"] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for at, index in enumerate(indices):
            batch["said"][at, torch.from_numpy(self._places(int(index)))] = True
        if self._mask is not None:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["said"], self._mask)
        return batch

    def expected(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The tokens to be said of rows `indices`, one row after the other: int64 [M]."""
        ahead = 1 if self._mask is None else 0
        found = [self._ids[int(i) % self.texts][self._places(int(i)) + ahead] for i in indices]
        return torch.from_numpy(np.concatenate(found).astype(np.int64))

    def _places(self, index: int) -> np.ndarray:
        """Where the tokens stand that are to be said of row `index`, rising."""
        places = self._said[index % self.texts]
        return places if self._mask is None else places[self._drawn(index, len(places))]

    def _drawn(self, index: int, count: int) -> np.ndarray:
        """Which of a text's `count` tokens are masked."""
        return np.sort(self._generator(index).choice(count, _share(count), replace=False))

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self._seed, index], dtype=np.uint64)))


class EncodedSpans(EncodedTexts):
    """The texts of one split for a text-to-text model's language modelling, which says what was dropped from a text.

    Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", JMLR 2020,
    https://arxiv.org/abs/1910.10683, figure 2 and section 3.3.4: 15% of a text's tokens are dropped, in spans of 3 on
    average, and a sentinel stands in the place of each span. The decoder says the sentinels, each followed by its span,
    a last sentinel, and the end of the text.

    sentinels: ids of <extra_id_0>, <extra_id_1>, …, two or more. start: the decoder's first token. end: what a text
    ends with. Each text stands here `MASKINGS` times.

    Differs from the paper's code: a text may begin with a span, and it may end without one (there its last token is
    always dropped, which is always all that a sentence of one span loses).
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        max_length: int,
        sentinels: Sequence[int],
        start: int,
        end: int,
        seed: int,
        known: int | None = None,
    ) -> None:
        super().__init__(tokenizer, examples, max_length, sentinels[0], seed, known)
        self._said = [np.arange(places[0], places[-1] + 1) for places in self._said]  # unknown tokens among them too
        self._sentinels, self._start, self._end = np.asarray(sentinels, dtype=np.int64), start, end

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """input_ids, attention_mask: int64 [B, T], of the texts with sentinels in them. decoder_input_ids: int64
        [B, D]; said: bool [B, D], where the model's scores are read."""
        pieces = [self._pieces(int(i)) for i in indices]
        targets = [target for _, target in pieces]
        before = [np.array([self._start, *target[:-1]]) for target in targets]
        batch = _read([left for left, _ in pieces], self._pad)
        said = _padded([np.ones_like(target) for target in targets], 0).bool()
        return batch | {"decoder_input_ids": _padded(before, self._pad), "said": said}

    def expected(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate([self._pieces(int(i))[1] for i in indices]))

    def _pieces(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What is left of a text, with its sentinels, and what the decoder says."""
        ids, places = self._ids[index % self.texts], self._places(index)
        left: list[Any] = []
        target: list[Any] = []
        behind = 0
        spans = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        for sentinel, span in zip(self._sentinels, spans, strict=False):
            left += [ids[behind : span[0]], [sentinel]]
            target += [[sentinel], ids[span]]
            behind = span[-1] + 1
        left.append(ids[behind:])
        return np.concatenate(left), np.concatenate([*target, [self._sentinels[len(spans)], self._end]])

    def _drawn(self, index: int, count: int) -> np.ndarray:
        """Spans of random lengths at random distances: every way to cut both is as likely as any other."""
        generator, dropped = self._generator(index), _share(count)
        kept = count - dropped
        spans = min(max(1, round(dropped / SPAN)), kept + 1, len(self._sentinels) - 1)
        lengths = _parts(generator, dropped, spans)
        gaps = _parts(generator, kept + 2, spans + 1)  # one too many before the first span, and behind the last
        firsts = np.cumsum(gaps[:-1]) - 1 + np.cumsum(lengths) - lengths
        return np.concatenate([np.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)])


def _share(count: int) -> int:
    """How many of a text's `count` tokens are to be said."""
    return max(1, round(MASKED_SHARE * count))


def _parts(generator: np.random.Generator, total: int, count: int) -> np.ndarray:
    """`total` as a sum of `count` positive whole numbers, drawn among all such sums."""
    cuts = np.sort(generator.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
