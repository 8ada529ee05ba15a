"""Rows of a CSV, TSV or JSONL file, with every fault told in one line that names the file and the line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradientless.errors import UserError, unknown
from gradientless.inputs import halves, read_file

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """One record: the `line` of the file where it starts (from 1) and its values by column."""

    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A whole file: its columns in order and its rows. In CSV and TSV every value is a string."""

    path: Path
    columns: tuple[str, ...]
    rows: list[Row]

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
    header, records = _from_tsv(path, content) if path.suffix.lower() == ".tsv" else _from_csv(path, content)
    columns = tuple(name.strip() for name in header)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: column names must differ, got {', '.join(columns)}")
    if not records:
        raise UserError(f"{path}: the file must hold at least one row below its header, got none")
    return Table(path, columns, [Row(line, dict(zip(columns, fields, strict=True))) for line, fields in records])


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


def _uneven(records: Records) -> tuple[int, int] | None:
    """(line, fields) of the first record that is not as wide as the header."""
    width = len(records[0][1])
    return next(((line, len(fields)) for line, fields in records if len(fields) != width), None)


def _check_even(path: Path, records: Records, advice: str) -> tuple[list[str], Records]:
    header = records[0][1]
    if fault := _uneven(records):
        line, fields = fault
        raise UserError(f"{path}: line {line}: must have {len(header)} fields as the header has, got {fields}{advice}")
    return header, records[1:]


def _from_csv(path: Path, content: str) -> tuple[list[str], Records]:
    records: Records = []
    try:
        records.extend(_records(content))
    except csv.Error as error:
        where = f"after line {records[-1][0]}" if records else "at the start"
        raise UserError(f"{path}: {where}: not valid CSV ({error})") from None
    return _check_even(path, records, " (a text with a comma needs quotation marks)")


def _from_tsv(path: Path, content: str) -> tuple[list[str], Records]:
    # str.splitlines would also split at characters that texts contain (U+0085, U+2028), the csv module does not.
    plain = list(_records(content, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        quoted = list(_records(content, delimiter="\t"))
    except csv.Error:
        quoted = []
    fits = bool(quoted) and _uneven(quoted) is None
    if fits and (len(quoted) == len(plain) or _uneven(plain) is not None):
        return quoted[0][1], quoted[1:]
    return _check_even(path, plain, " (fields are divided by one tab)")


def _from_json_lines(path: Path, content: str) -> Table:
    rows = []
    columns: dict[str, None] = {}
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {line}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: line {line}: must be a JSON object, got {type(values).__name__}")
        if "\\ud" in text.lower() and halves(json.dumps(values, ensure_ascii=False)):
            raise UserError(f"{path}: line {line}: must hold whole characters, got half of a surrogate pair (\\ud8…)")
        columns.update(dict.fromkeys(values))
        rows.append(Row(line, values))
    return Table(path, tuple(columns), rows)
