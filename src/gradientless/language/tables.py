"""Rows of a CSV, TSV or JSONL file, with every fault told in one line that names the file and the line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gradientless.errors import UserError, unknown
from gradientless.inputs import halves, read_file

SUFFIXES = (".csv", ".tsv", ".jsonl")


MOST_TOLD = 5  # faulty rows of a file that are told one by one


@dataclass(frozen=True)
class Row:
    """One record: the `line` of the file where it starts (from 1) and its values by column.

    fault: why it is none, where the file does not hold one there; its values are then those that could be read.
    """

    line: int
    values: Mapping[str, Any]
    fault: str = ""


class BadRows:
    """What is done about rows that cannot be used: those of a file are refused together, or (skip) left out.

    count: of those that were left out. told: a line for people about each file that has some.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.told: list[str] = []

    def settle(self, path: Path, faults: Sequence[str], of: int) -> None:
        """Of `of` rows of `path` those with `faults` (a line each) are bad. Raises `UserError` unless they are to be
        left out and others are left."""
        if not faults:
            return
        if self.skip and len(faults) < of:
            self.count += len(faults)
            first = faults[0].removeprefix(f"{path}: ")
            self.told.append(f"left out    {len(faults):,} of {of:,} rows of {path.name}, such as {first}")
            return
        if len(faults) == of > 1:
            raise UserError(f"{faults[0]} (none of the {of:,} rows can be used)")
        way = "; --skip-bad-rows leaves them out" if len(faults) < of else ""
        if len(faults) == 1:
            raise UserError(f"{faults[0]}{way}")
        which = f", the first {MOST_TOLD} as above" if len(faults) > MOST_TOLD else ""
        told = f"{path}: rows must all be usable, got {len(faults):,} of {of:,} that are not{which}{way}"
        raise UserError("\n".join([*faults[:MOST_TOLD], told]))


T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A whole file: its columns in order and its rows. In CSV and TSV every value is a string.

    faulty: where the file holds no row, which `made` counts among the bad ones.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]
    faulty: tuple[Row, ...] = ()

    def made(self, make: Callable[[Row], T], bad: BadRows | None = None) -> list[T]:
        """What `make` makes of each row; what it refuses of a row (in a line that names it) is a bad row. Without
        `bad` these are refused."""
        found: list[T] = []
        faults = [(row.line, row.fault) for row in self.faulty]
        for row in self.rows:
            try:
                found.append(make(row))
            except UserError as error:
                if not self.is_of_row(error, row):
                    raise
                faults.append((row.line, str(error)))
        lines = [fault for _, fault in sorted(faults, key=lambda fault: fault[0])]
        (BadRows() if bad is None else bad).settle(self.path, lines, len(self.rows) + len(self.faulty))
        return found

    def is_of_row(self, error: UserError, row: Row) -> bool:
        """Whether an error is about this row, and not about the file or its columns."""
        return str(error).startswith(f"{self.path}: line {row.line}: ")

    def require(self, column: str, role: str) -> None:
        """Raise a `UserError` that lists the columns unless `column` is one of them."""
        if column not in self.columns:
            raise unknown(f"{self.path}", f"column for the {role}", column, self.columns)

    def text(self, row: Row, column: str) -> str:
        """The non-empty text at `column` of `row`."""
        value = row.values.get(column)
        if not isinstance(value, str):
            found = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
            raise UserError(f"{self.path}: line {row.line}: column '{column}' must hold text, got {found}")
        if not value.strip():
            raise UserError(f"{self.path}: line {row.line}: column '{column}' must hold text, got an empty one")
        return value


def read_table(path: Path) -> Table:
    """Read `path` whole, by its suffix (.csv, .tsv, .jsonl). UTF-8, with or without a byte order mark.

    CSV is quoted as spreadsheets write it. TSV is read as quoted only when that reading fits the file: GLUE's files
    are unquoted and hold stray quotation marks. Raises `UserError` for everything a user can mend.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a data file must end in {', '.join(SUFFIXES)}, got '{path.suffix or path.name}'")
    content = _read_text(path)
    if path.suffix.lower() == ".jsonl":
        return _from_json_lines(path, content)
    tsv = path.suffix.lower() == ".tsv"
    (_, header), *records = _from_tsv(content) if tsv else _from_csv(path, content)
    columns = tuple(name.strip() for name in header)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: column names must differ, got {', '.join(columns)}")
    if not records:
        raise UserError(f"{path}: the file must hold at least one row below its header, got none")
    advice = "fields are divided by one tab" if tsv else "a text with a comma needs quotation marks"
    rows, faulty = [], []
    for line, fields in records:
        values = dict(zip(columns, fields, strict=False))
        if len(fields) == len(columns):
            rows.append(Row(line, values))
            continue
        wanted = f"must have {len(columns)} fields as the header has, got {len(fields)} ({advice})"
        faulty.append(Row(line, values, f"{path}: line {line}: {wanted}"))
    return _with_rows(Table(path, columns, rows, tuple(faulty)))


def _with_rows(table: Table) -> Table:
    """The table. Raises `UserError` where nothing of it is a row."""
    if not table.rows:
        BadRows().settle(table.path, [row.fault for row in table.faulty], len(table.faulty))
    return table


def _read_text(path: Path) -> str:
    raw = read_file(path, "data")
    if not raw.strip():
        raise UserError(f"{path}: the file is empty")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: must be UTF-8 text, got UTF-16 (save it as UTF-8)")
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise UserError(f"{path}: must be UTF-8 text, got byte 0x{byte:02x} at position {error.start}") from None
    if "\0" in content:
        raise UserError(f"{path}: must be text, got binary data (a zero byte at position {content.index(chr(0))})")
    return content


Records = list[tuple[int, list[str]]]


def _records(content: str, **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each non-empty record, as the csv module reads `content`."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts above 128 KiB
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True, **dialect)
        start = 1
        for fields in reader:
            if fields and (len(fields) > 1 or fields[0].strip()):
                yield start, fields
            start = reader.line_num + 1
    finally:
        csv.field_size_limit(before)


def _even(records: Records) -> bool:
    """Whether every record is as wide as the header."""
    return len({len(fields) for _, fields in records}) == 1


def _from_csv(path: Path, content: str) -> Records:
    records: Records = []
    try:
        records.extend(_records(content))
    except csv.Error as error:
        where = f"after line {records[-1][0]}" if records else "at the start"
        raise UserError(f"{path}: {where}: not valid CSV ({error})") from None
    return records


def _from_tsv(content: str) -> Records:
    # str.splitlines would also split at characters that texts contain (U+0085, U+2028), the csv module does not.
    plain = list(_records(content, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        quoted = list(_records(content, delimiter="\t"))
    except csv.Error:
        quoted = []
    return quoted if _even(quoted) and (len(quoted) == len(plain) or not _even(plain)) else plain


def _from_json_lines(path: Path, content: str) -> Table:
    rows, faulty = [], []
    columns: dict[str, None] = {}
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
            fault = "" if isinstance(values, dict) else f"must be a JSON object, got {type(values).__name__}"
        except (ValueError, RecursionError) as error:
            values, fault = None, f"not valid JSON ({error})"
        if not fault and "\\ud" in text.lower() and halves(json.dumps(values, ensure_ascii=False)):
            fault = "must hold whole characters, got half of a surrogate pair (\\ud8…)"
        if fault:
            faulty.append(Row(line, {}, f"{path}: line {line}: {fault}"))
            continue
        columns.update(dict.fromkeys(values))
        rows.append(Row(line, values))
    return _with_rows(Table(path, tuple(columns), rows, tuple(faulty)))
