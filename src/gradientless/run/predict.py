"""Labels for new texts, choices among a row's own, and texts that are written: with the model of a run folder, or of a
folder that a surface saved.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradientless.errors import UserError

if TYPE_CHECKING:
    from gradientless.language.tables import Row, Table
    from gradientless.language.tasks import Example
    from gradientless.run.evaluation import Say

NO_TEXT = "predict: at least one text must be given, got none"
FORMATS = ("csv", "jsonl")
TABLES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Asked:
    """One row of what is asked, in its place: `values` by column, as it came and as it goes out again; and the row that
    a model reads, or why there is none (`fault`, in words), so that it gets no answer."""

    values: Mapping[str, Any]
    row: Example | None = None
    fault: str = ""


Answer = Mapping[str, Any]
"""Columns that are added to a row's own: label or answer, probability, and the probabilities of all classes."""


def answer(
    run_or_model: str | Path,
    asked: Sequence[Asked],
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
    code: Iterable[str] | None = (),
) -> list[Answer]:
    """What the model says of each of `asked`, in their order; of those without a row nothing, in the same columns.

    say: is told how many had none, and when texts are cut. code: see `load_surface`, as of all functions here. Raises
    UserError where no row is one.
    """
    rows = [each.row for each in asked if each.row is not None]
    faults = [each.fault for each in asked if each.row is None]
    if not rows:
        raise UserError(f"predict: some row must have a text, got none: {faults[0]}" if faults else NO_TEXT)
    if faults and say is not None:
        say(f"no answer   for {len(faults):,} of {len(asked):,} rows, such as {faults[0]}")
    if answers_rows(run_or_model):
        said, chosen_with = predict_rows(run_or_model, rows, batch_size, device, say, code)
        found: list[dict[str, Any]] = [{"answer": text} for text in said]
        if chosen_with is not None:
            found = [{**each, "probability": _rounded(p)} for each, p in zip(found, chosen_with, strict=True)]
    else:
        names, labels, shares = predict_labels(run_or_model, rows, batch_size, device, say, code)
        found = [
            {
                "label": label,
                "probability": _rounded(each.max()),
                "probabilities": dict(zip(names, map(_rounded, each), strict=True)),
            }
            for label, each in zip(labels, shares, strict=True)
        ]
    nothing = {key: dict.fromkeys(value) if isinstance(value, dict) else None for key, value in found[0].items()}
    answers = iter(found)
    return [nothing if each.row is None else next(answers) for each in asked]


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def predict_labels(
    run_or_model: str | Path,
    rows: Sequence[Example],
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
    code: Iterable[str] | None = (),
) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """The model's classes, and of each row its label and the probabilities of all classes, float32 [N, C].

    say: is told when texts are cut. Raises UserError.
    """
    import torch

    from gradientless.language.metrics import highest
    from gradientless.run.evaluation import Cut, load_surface, logits_of, require_classes, say_cut

    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be >= 1, got {batch_size}")
    surface = load_surface(run_or_model, device, code)
    require_classes(surface)
    if not rows:
        return surface.labels, [], np.zeros((0, len(surface.labels)), dtype=np.float32)
    encoded = surface.encode(rows)
    say_cut(Cut.among(encoded), say)
    logits = logits_of(surface, encoded, batch_size)
    labels = [surface.labels[i] for i in highest(logits).tolist()]
    return surface.labels, labels, torch.softmax(logits, dim=-1).numpy()


def predict_texts(
    run_or_model: str | Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
    code: Iterable[str] | None = (),
) -> tuple[list[str], np.ndarray]:
    """(label names [N], probabilities float32 [N, C]) of `texts`, and of their second texts `pairs`, in their order.

    say: is told when texts are cut.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise UserError(f"pairs: must be as many as texts ({len(texts)}), got {len(pairs)}")
    asked = ask_texts(texts, pairs, "text")
    if faults := [each.fault for each in asked if each.fault]:
        raise UserError(f"texts: must not be empty, got {faults[0]}")
    rows = [each.row for each in asked if each.row is not None]
    return predict_labels(run_or_model, rows, batch_size, device, say, code)[1:]


def answers_rows(run_or_model: str | Path) -> bool:
    """Whether the saved model chooses among a row's own choices or writes, and has no labels. Raises UserError."""
    from gradientless.language.surfaces.saved import read_note
    from gradientless.run.evaluation import model_folder

    return not read_note(model_folder(run_or_model)).get("labels")


def predict_rows(
    run_or_model: str | Path,
    rows: Sequence[Example],
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
    code: Iterable[str] | None = (),
) -> tuple[list[str], np.ndarray | None]:
    """What the saved model chooses or writes for each of `rows` [N]; and the probability of the choice, float32 [N], of
    all that the row has (None where texts are written). say: is told when texts are cut. Raises UserError."""
    import torch

    from gradientless.run.evaluation import Cut, load_surface, logits_of, require_classes, say_cut, texts_of
    from gradientless.run.losses import chosen

    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be >= 1, got {batch_size}")
    surface = load_surface(run_or_model, device, code)
    require_classes(surface)
    if not rows[0].choices:
        asked = surface.encode_questions(rows)
        say_cut(Cut.among(asked), say)
        return texts_of(surface, asked, batch_size), None
    encoded = surface.encode(rows)
    say_cut(Cut.among(encoded), say)
    scores = logits_of(surface, encoded, batch_size)
    return chosen(scores, rows, ()), torch.softmax(scores, dim=-1).amax(dim=-1).numpy()


def how_rows_are_read(run_or_model: str | Path) -> dict[str, Any]:
    """ "task", or the columns, of the rows that the model was tuned on; and "pairs", where that is known: whether they
    have two texts. Raises UserError."""
    from gradientless.language.surfaces.saved import rows_of
    from gradientless.run.evaluation import model_folder
    from gradientless.run.runfolder import RunFolder

    found, folder = rows_of(model_folder(run_or_model)), RunFolder(Path(run_or_model))
    if folder.holds_run() and (task := folder.task) is not None:
        found["task"] = task  # also a file of the user's own, which a saved model does not name
    return found


def ask_texts(texts: Sequence[str], pairs: Sequence[str] | None = None, called: str = "text") -> list[Asked]:
    """Texts, and perhaps their second ones. called: what one is called, where it is empty."""
    from gradientless.language.tasks import Example

    asked = []
    for number, text in enumerate(texts, 1):
        values = {"text": text} if pairs is None else {"text": text, "text_pair": pairs[number - 1]}
        if all(value.strip() for value in values.values()):
            asked.append(Asked(values, Example(text, 0, values.get("text_pair"))))
        else:
            asked.append(Asked(values, fault=f"nothing in {called} {number}"))
    return asked


def ask_arguments(texts: Sequence[str], pairs: bool) -> list[Asked]:
    """Texts as arguments: of a model of two texts the first and the second one, then again."""
    if not pairs:
        return ask_texts(texts)
    if len(texts) % 2:
        raise UserError(f"texts: must be two by two for a model of two texts, got {len(texts)}")
    return ask_texts(texts[::2], texts[1::2], "pair")


def ask_table(file: str | Path, text_column: str, text_pair_column: str | None) -> list[Asked]:
    """Rows of a table by its columns. Raises UserError for a file that is no table or lacks them."""
    from gradientless.language.tables import read_table
    from gradientless.language.tasks import Example

    table = read_table(Path(file))
    table.require(text_column, "text")
    if text_pair_column is not None:
        table.require(text_pair_column, "second text")

    def make(row: Row) -> Example:
        pair = None if text_pair_column is None else table.text(row, text_pair_column)
        # What a prompt may name beside the texts, which are those of these columns, whatever others are called.
        names = set(row.values) - {"text", "text_pair"}
        fields = {name: value for name in names if isinstance(value := row.values[name], str)}
        return Example(table.text(row, text_column), 0, pair, fields)

    return _asked(table, table, make)


def ask_rows(read: Mapping[str, Any], file: str | Path) -> list[Asked]:
    """Rows of a table with choices or answers of their own, as the task reads them; without one, by the names of the
    columns. read: of `how_rows_are_read`. Raises UserError."""
    from gradientless.language.tables import read_table
    from gradientless.language.tasks import Example, find_task
    from gradientless.language.tasks.records import RecordTask

    table = read_table(Path(file))
    task = None if read.get("task") is None else find_task(read["task"])
    if isinstance(task, RecordTask):
        flat = task.asked(Path(file))
        return _asked(table, flat, lambda row: task.example(flat, row))

    def make(row: Row) -> Example:
        fields = {column: table.text(row, column) for column in table.columns}
        return Example(next(iter(fields.values())), 0, None, fields)

    return _asked(table, table, make)


def _asked(table: Table, flat: Table, make: Callable[[Row], Example]) -> list[Asked]:
    """Every row of a file in its place. flat: the table as its task unfolds it; where that gives several rows for one
    of the file, they go out by their texts."""
    own = {row.line: row.values for row in table.rows} if len(flat.rows) == len(table.rows) else {}
    found: list[tuple[int, Asked]] = []
    for row in flat.rows:
        values: dict[str, Any] = {column: own[row.line].get(column) for column in table.columns} if own else {}
        try:
            made = make(row)
        except UserError as error:
            if not flat.is_of_row(error, row):
                raise
            found.append((row.line, Asked(values, fault=str(error))))
            continue
        if not own:
            values = {"text": made.text} | ({} if made.text_pair is None else {"text_pair": made.text_pair})
        found.append((row.line, Asked(values, made)))
    for row in table.faulty:
        values = {column: row.values.get(column) for column in table.columns} if own else {}
        found.append((row.line, Asked(values, fault=row.fault)))
    return [each for _, each in sorted(found, key=lambda each: each[0])]


def ask_lines(content: bytes, source: str) -> list[Asked]:
    """One text a line. Raises UserError for what is not text, and where no line has one."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: must be text in UTF-8, got other bytes") from None
    if "\0" in text:
        raise UserError(f"{source}: must be text, got binary data")
    if not text.strip():
        raise UserError(f"{source}: must hold at least one text, got none")
    return ask_texts(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), None, "line")


def render(kind: str, asked: Sequence[Asked], answers: Sequence[Answer]) -> Iterator[str]:
    """Lines (with their ends) of CSV or JSONL: the columns of each row as it came, then those of its answer, with
    "predicted_" before a name that the row has already. In CSV each class has a column, probability_CLASS."""
    if kind not in FORMATS:
        raise UserError(f"format: must be csv or jsonl, got '{kind}'")
    own = tuple(dict.fromkeys(column for each in asked for column in each.values))
    rows = []
    for each, found in zip(asked, answers, strict=True):
        flat = dict(found)
        if kind == "csv":
            flat |= {f"probability_{name}": share for name, share in flat.pop("probabilities", {}).items()}
        named = {f"predicted_{key}" if key in own else key: value for key, value in flat.items()}
        rows.append({column: each.values.get(column) for column in own} | named)
    if kind == "csv":
        yield _csv_line(rows[0])
    for row in rows:
        yield _csv_line(map(_cell, row.values())) if kind == "csv" else json.dumps(row, ensure_ascii=False) + "\n"


def _cell(value: object) -> object:
    """What stands in a CSV for a value of a JSONL file."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else value


def _csv_line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
