"""Tasks whose rows are records: those of a hub data set, or those of local files with the same columns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from gradientless.errors import UserError, unknown
from gradientless.language import splits as drawing
from gradientless.language.tables import SUFFIXES, BadRows, Row, Table, read_table
from gradientless.language.tasks.base import Example, Splits, Task

NAMES: Mapping[str, tuple[str, ...]] = {"train": ("train",), "validation": ("dev", "validation"), "test": ("test",)}
NO_LABEL = (None, "", "-", "-1")


class RecordTask(Task):
    """One class a data set: it says which columns it needs and what a record becomes.

    config, revision: of the hub data set. hub_splits: our name of a split -> the hub's, where they differ.
    file: the task's name where a folder holds one file a task, as FewGLUE does. columns: what every record must have.
    label_columns: where the label stands, the first that there is. spellings: what else than its name and index a
    label may be written as. gaps: whether training rows without a label occur and are passed over. unanswered: what
    stands for the label or the answer of a row that has none and is only to be predicted.
    """

    config: ClassVar[str | None] = None
    revision: ClassVar[str | None] = None
    hub_splits: ClassVar[Mapping[str, str]] = {}
    file: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]]
    label_columns: ClassVar[tuple[str, ...]] = ("label",)
    spellings: ClassVar[Mapping[str, int]] = {}
    gaps: ClassVar[bool] = False
    unanswered: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def example(self, table: Table, row: Row) -> Example:
        """The row of data that a labelled record is."""

    def records(self, table: Table) -> Table:
        """`table` with flat records; where records hold several rows, or hold them nested, a subclass unfolds them."""
        return table

    def unlabelled(self, table: Table, row: Row) -> bool:
        """Whether nobody has said what is right for this record."""
        value = row.values.get(self._label_column(table) or "")
        return value in NO_LABEL if isinstance(value, str) or value is None else value == -1

    def label(self, table: Table, row: Row) -> int:
        """Index of the record's class."""
        column = self._label_column(table)
        if column is None:
            raise unknown(f"{table.path}", "column for the label", self.label_columns[0], table.columns)
        value = row.values[column]
        written = str(value).strip()
        known = {name: i for i, name in enumerate(self.labels)} | {str(i): i for i in range(len(self.labels))}
        known |= dict(self.spellings)
        if written not in known:
            names = [f"{i} ({name})" for i, name in enumerate(self.labels)]
            wanted = " or ".join((", ".join(names[:-1]), names[-1]))
            raise UserError(f"{table.path}: line {row.line}: label must be {wanted}, got '{written}'")
        return known[written]

    def load(self, path: Path | None = None, bad: BadRows | None = None) -> Splits:
        """Rows of the hub; or of `path`: a folder with train, dev (or validation) and test files, or one file.

        Files are CSV, TSV or JSONL. A split that is missing is drawn by seed 0: of a source with one split 80/10/10,
        else a tenth of the training rows for validation. Rows of one group stay together. Test rows without labels are
        left out. A source whose rows are all of one class cannot be learned from: all its rows are for validation.
        """
        if path is None:
            return self._split(self._hub_tables(), strict=False)
        return self._split(self._local_tables(path), True, bad)

    def load_rows(self, path: Path, bad: BadRows | None = None) -> list[Example]:
        return self._examples(read_table(path), True, bad)

    def asked(self, path: Path) -> Table:
        """The records of one file to be predicted, of which the labels and answers mean nothing. Raises `UserError`."""
        table = self.records(read_table(path))
        columns = tuple(dict.fromkeys((*table.columns, *self.unanswered)))
        filled = [
            Row(row.line, {**row.values, **self.unanswered}) if self.unlabelled(table, row) else row
            for row in table.rows
        ]
        found = replace(table, columns=columns, rows=filled)
        for column in self.columns:
            found.require(column, column)
        return found

    def _split(self, tables: Mapping[str, Table], strict: bool, bad: BadRows | None = None) -> Splits:
        rows = {name: self._examples(table, strict and name != "test", bad) for name, table in tables.items()}
        rows = {name: found for name, found in rows.items() if found}
        if not rows:
            have = ", ".join(str(table.path) for table in tables.values())
            raise UserError(f"{self.key}: some split must have labelled rows, got none in {have}")
        pool = next(name for name in NAMES if name in rows)
        if len(rows) == 1:
            if self.labels and len({row.label for row in rows[pool]}) < 2:
                return Splits([], rows[pool], [], self.labels)
            train, validation, test = drawing.grouped_parts(rows[pool], (80, 10, 10))
            return Splits(train, validation, test, self.labels)
        if "train" in rows and "validation" in rows:
            return Splits(rows["train"], rows["validation"], rows.get("test", []), self.labels)
        train, validation = drawing.grouped_parts(rows[pool], (90, 10))
        return Splits(train, validation, rows["test"], self.labels)

    def _examples(self, table: Table, strict: bool, bad: BadRows | None = None) -> list[Example]:
        table = self.records(table)
        for column in self.columns:
            table.require(column, column)
        wanted = [row for row in table.rows if (strict and not self.gaps) or not self.unlabelled(table, row)]
        table = replace(table, rows=wanted)
        return table.made(lambda row: self.example(table, row), bad)

    def _label_column(self, table: Table) -> str | None:
        return next((column for column in self.label_columns if column in table.columns), None)

    # --- local files ------------------------------------------------------------------------------------------------

    def _local_tables(self, path: Path) -> dict[str, Table]:
        if not path.is_dir():
            return {"train": read_table(path)}
        found = {}
        for name, stems in NAMES.items():
            files = list(_files(path, stems))
            if len(files) > 1:
                raise UserError(f"{path}: must hold one {name} file, got {', '.join(file.name for file in files)}")
            if files:
                found[name] = files[0]
        if not found and self.file is not None:
            found = dict(zip(("train",), _files(path, (self.file,)), strict=False))
        if not found:
            wanted = "train, dev (or validation) and test files" + (f", or {self.file}.jsonl" if self.file else "")
            raise UserError(
                f"{path}: {self.key} needs a folder with {wanted} ({', '.join(SUFFIXES)}), got none of them"
            )
        return {name: read_table(file) for name, file in found.items()}

    # --- the hub ----------------------------------------------------------------------------------------------------

    def _hub_tables(self) -> dict[str, Table]:
        hub = self._download()
        tables = {}
        for name in NAMES:
            theirs = self.hub_splits.get(name, name)
            if theirs in hub:
                part = hub[theirs]
                columns = tuple(getattr(part, "column_names", None) or part)
                lines = enumerate(zip(*(part[column] for column in columns), strict=True), start=1)
                rows = [Row(line, dict(zip(columns, values, strict=True))) for line, values in lines]
                tables[name] = Table(Path(self.source) / theirs, columns, rows)
        return tables

    def _download(self) -> Any:
        import datasets
        import huggingface_hub

        advice = "give a folder with its files as data.path"
        try:
            # One short question first: the library itself tries for half a minute before it says that it is offline.
            huggingface_hub.HfApi().dataset_info(self.source, timeout=10)
        except Exception as error:  # noqa: BLE001 (whatever the network raises: the hub did not answer)
            cached = Path(datasets.config.HF_DATASETS_CACHE) / self.source.replace("/", "___")
            if not cached.exists():
                raise UserError(
                    f"{self.key}: the hub must be reachable to get {self.source}, got {type(error).__name__}; {advice}"
                ) from None
        try:
            return datasets.load_dataset(self.source, self.config, revision=self.revision)
        except Exception as error:  # noqa: BLE001 (the library raises many kinds; each becomes one line)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self.key}: {self.source} could not be loaded ({reason[0]}); {advice}") from None


def _files(folder: Path, stems: tuple[str, ...]) -> Iterator[Path]:
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / (stem + suffix)).is_file():
                yield folder / (stem + suffix)


def texts(table: Table, row: Row, *columns: str) -> dict[str, str]:
    """The non-empty texts of a record at `columns`, without white space around them."""
    return {column: table.text(row, column).strip() for column in columns}


def accepted(table: Table, row: Row, column: str, required: bool = False) -> tuple[str, ...]:
    """The answers of a record, each once: a list of texts, or the hub's {"text": list} or {"spans": list}."""
    found = row.values.get(column)
    if isinstance(found, Mapping):
        found = found.get("text", found.get("spans"))
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, (list, tuple)) or not all(isinstance(answer, str) for answer in found):
        found = ()
    answers = tuple(dict.fromkeys(answer.strip() for answer in found if answer.strip()))
    if required and not answers:
        value = row.values.get(column)
        raise UserError(f"{table.path}: line {row.line}: column '{column}' must hold answers, got {value!r:.80}")
    return answers
