"""Labels for new texts, choices among a row's own, and texts that are written: with the model of a run folder, or of a
folder that a surface saved.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradientless.errors import UserError
from gradientless.inputs import read_file

if TYPE_CHECKING:
    from gradientless.language.tasks import Example
    from gradientless.run.evaluation import Say

FORMATS = ("csv", "jsonl")
TABLES = (".csv", ".tsv", ".jsonl")


def predict_texts(
    run_or_model: str | Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
) -> tuple[list[str], np.ndarray]:
    """(label names [N], probabilities float32 [N, C]) of `texts`, and of their second texts `pairs`, in their order.

    say: is told when texts are cut.
    """
    import torch

    from gradientless.language.metrics import highest
    from gradientless.language.tasks import Example
    from gradientless.run.evaluation import Cut, load_surface, logits_of, require_classes, say_cut

    _check(texts, pairs, batch_size)
    surface = load_surface(run_or_model, device)
    require_classes(surface)
    examples = [Example(text, 0, None if pairs is None else pairs[i]) for i, text in enumerate(texts)]
    if not examples:
        return [], np.zeros((0, len(surface.labels)), dtype=np.float32)
    encoded = surface.encode(examples)
    say_cut(Cut.among(encoded), say)
    logits = logits_of(surface, encoded, batch_size)
    return [surface.labels[i] for i in highest(logits).tolist()], torch.softmax(logits, dim=-1).numpy()


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
) -> tuple[list[str], np.ndarray | None]:
    """What the saved model chooses or writes for each of `rows` [N]; and the probability of the choice, float32 [N], of
    all that the row has (None where texts are written). say: is told when texts are cut. Raises UserError."""
    import torch

    from gradientless.run.evaluation import Cut, load_surface, logits_of, require_classes, say_cut, texts_of
    from gradientless.run.losses import chosen

    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be >= 1, got {batch_size}")
    surface = load_surface(run_or_model, device)
    require_classes(surface)
    if not rows[0].choices:
        asked = surface.encode_questions(rows)
        say_cut(Cut.among(asked), say)
        return texts_of(surface, asked, batch_size), None
    encoded = surface.encode(rows)
    say_cut(Cut.among(encoded), say)
    scores = logits_of(surface, encoded, batch_size)
    return chosen(scores, rows, ()), torch.softmax(scores, dim=-1).amax(dim=-1).numpy()


def read_rows(run_or_model: str | Path, file: str | Path, trust_code: bool = False) -> list[Example]:
    """Rows of a table as the run's task reads them; without a run, by the names of the columns. trust_code: whether
    code that the run's configuration names may be run. Raises UserError."""
    from gradientless.language.tables import read_table
    from gradientless.language.tasks import Example, find_task
    from gradientless.language.tasks.records import RecordTask
    from gradientless.run.runfolder import RunFolder

    folder, path = RunFolder(Path(run_or_model)), Path(file)
    name = folder.read_config(None if trust_code else ()).task if folder.holds_run() else None
    task = None if name is None else find_task(name)
    if isinstance(task, RecordTask):
        return task.rows(path)
    table = read_table(path)
    fields = [{column: table.text(row, column) for column in table.columns} for row in table.rows]
    return [Example(next(iter(each.values())), 0, None, each) for each in fields]


def render_answers(
    kind: str, rows: Sequence[Example], answers: Sequence[str], probabilities: np.ndarray | None
) -> Iterator[str]:
    """As `render`: text, perhaps text_pair, answer, and its probability where it was chosen."""
    pair = any(row.text_pair is not None for row in rows)
    names = ["text", *(["text_pair"] if pair else []), "answer"]
    names += ["probability"] if probabilities is not None else []
    values = [
        [row.text, *([row.text_pair] if pair else []), answer]
        + ([] if probabilities is None else [round(float(probabilities[i]), 6)])
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    return _lines(kind, names, values)


def _check(texts: Sequence[str], pairs: Sequence[str] | None, batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be >= 1, got {batch_size}")
    if pairs is not None and len(pairs) != len(texts):
        raise UserError(f"pairs: must be as many as texts ({len(texts)}), got {len(pairs)}")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"texts: must not be empty, got nothing in text {number}")


def read_texts(
    file: str | Path, text_column: str = "text", text_pair_column: str | None = None
) -> tuple[list[str], list[str] | None]:
    """(texts, second texts or None) of a file: a table by its columns, any other file one text a line."""
    path = Path(file)
    if path.suffix.lower() in TABLES:
        from gradientless.language.tables import read_table

        table = read_table(path)
        table.require(text_column, "text")
        texts = [table.text(row, text_column) for row in table.rows]
        if text_pair_column is None:
            return texts, None
        table.require(text_pair_column, "second text")
        return texts, [table.text(row, text_pair_column) for row in table.rows]
    return lines_of(read_file(path, "file"), str(file)), None


def lines_of(content: bytes, source: str) -> list[str]:
    """One text a line. Raises UserError for what is not text and for a line without any."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: must be text in UTF-8, got other bytes") from None
    if "\0" in text:
        raise UserError(f"{source}: must be text, got binary data")
    lines = text.rstrip("\r\n").replace("\r\n", "\n").split("\n") if text.strip() else []
    if not lines:
        raise UserError(f"{source}: must hold at least one text, got none")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{source}: must have a text in each line, got an empty line {number}")
    return lines


def render(
    kind: str, texts: Sequence[str], pairs: Sequence[str] | None, labels: Sequence[str], probabilities: np.ndarray
) -> Iterator[str]:
    """Lines (with their ends) of CSV or JSONL: text, perhaps text_pair, label, probability of that label."""
    names = ["text", *(["text_pair"] if pairs is not None else []), "label", "probability"]
    values = [
        [text, *([pairs[i]] if pairs is not None else []), labels[i], round(float(probabilities[i].max()), 6)]
        for i, text in enumerate(texts)
    ]
    return _lines(kind, names, values)


def _lines(kind: str, names: Sequence[str], values: Iterable[Sequence[object]]) -> Iterator[str]:
    if kind not in FORMATS:
        raise UserError(f"format: must be csv or jsonl, got '{kind}'")
    if kind == "csv":
        yield _csv_line(names)
    for each in values:
        yield (
            _csv_line(each)
            if kind == "csv"
            else json.dumps(dict(zip(names, each, strict=True)), ensure_ascii=False) + "\n"
        )


def _csv_line(values: Iterable[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
