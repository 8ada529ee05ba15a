"""What a run shows when it ends: a plot, a closing table, the lines that say what to do next; and published tables."""

from __future__ import annotations

import io
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientless.errors import UserError
from gradientless.language.surfaces.saved import class_of, rows_of
from gradientless.run.named import TRUST
from gradientless.run.runfolder import RunFolder
from gradientless.schema import read_sealed
from gradientless.writing import write_atomically

if TYPE_CHECKING:
    from gradientless.terminal import Console

SHARES = ("accuracy", "f1", "balanced_accuracy")  # shown in percent
MOST_CLASSES = 10  # that are shown one by one
SAMPLE = "a gripping, beautifully acted film"
FILMS = ("imdb", "rotten-tomatoes", "sst2", "sst5")  # tasks that it fits


def close(folder: RunFolder, summary: Mapping[str, Any], console: Console) -> None:
    """Draw plot.png, print the closing table and the last lines."""
    from rich.table import Table

    plotted = plot(folder)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in closing_rows(summary):
        table.add_row(name, value)
    console.print(table)
    for line in (*class_lines(summary), *answer_lines(summary)):
        console.print(line, highlight=False, soft_wrap=True)
    for line in (*chosen_lines(summary), *summary.get("remarks", ())):
        console.print(f"note     {line}", highlight=False, soft_wrap=True)
    for name, command in next_commands(folder).items():
        console.print(f"{name:<8} {command}", markup=False, highlight=False, soft_wrap=True)
    if plotted:
        console.print(f"{'plot':<8} {folder.plot}", markup=False, highlight=False, soft_wrap=True)


def closing_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what a summary holds, as people read it."""
    found = {**summary.get("metrics", {}), "majority": summary.get("majority")}
    rows = figure_rows(found, summary.get("before", {}))
    rows += [(f"test {name}", value) for name, value in figure_rows(summary.get("test", {})) if name != "texts cut"]
    for name, stage in summary.get("stages", {}).items():
        accuracy = stage["metrics"].get("accuracy")
        shown = "no accuracy" if accuracy is None else percent(accuracy)
        rows.append((name, f"{shown} after {stage['forward_passes']:,} passes"))
    for key, unit in (("forward_passes", ""), ("steps", ""), ("seconds", " s"), ("peak_memory_mib", " MiB")):
        value = summary.get(key)
        if key == "seconds" and value is not None:
            value += summary.get("features_seconds", 0.0)  # which people wait for, too
        if isinstance(value, (int, float)):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
            name = "peak memory above the model" if key == "peak_memory_mib" else key.replace("_", " ")
            rows.append((name, shown + unit))
    return rows


def figure_rows(found: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """(name, value) of figures, as people read them: beside those of before the first step, where there are any; and
    the accuracy beside the largest class's share of the rows."""
    rows = []
    for name, value in found.items():
        if not isinstance(value, (int, float)):
            continue
        shown = _figure(name, value)
        if before and isinstance(before.get(name), (int, float)):
            shown = f"{_figure(name, before[name])} -> {shown}"
        if name == "accuracy" and found.get("majority"):
            shown += f", largest class {percent(found['majority']['share'])}"
        rows.append((name.replace("_", " "), shown))
    return rows


def _figure(name: str, value: float) -> str:
    return percent(value) if name in SHARES else str(value) if isinstance(value, int) else f"{value:.4f}"


def answer_lines(summary: Mapping[str, Any]) -> list[str]:
    """How many answers are others than before the first step, and the first of them."""
    told = summary.get("answers")
    if not told:
        return []
    line = f"answers  {told['changed']:,} of the first {told['asked']:,} changed"
    if not told["changed"]:
        return [line]
    line += f": {told['right']:,} became right, {told['wrong']:,} became wrong; the first that changed:"
    head = ["before", "after", "right", "text"]
    body = [[*(_short(row[key]) for key in head[:3]), _short(row["text"], 70)] for row in told["first"]]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body))
    return [line, *(row.rstrip() for row in rows)]


def class_lines(found: Mapping[str, Any]) -> list[str]:
    """What `metrics.by_class` tells, as lines: the figures of each class, and where its rows went.

    Of many classes those that are worst in F1."""
    classes = found.get("classes", {})
    if not classes:
        return []
    names = list(classes)
    if len(classes) > MOST_CLASSES:
        names = sorted((name for name in names if classes[name]["rows"]), key=lambda name: classes[name]["f1"])
    head = ["class", "rows", "predicted", "precision", "recall", "f1"]
    body = [
        [_short(name), str(of["rows"]), str(of["predicted"]), *(percent(of[key]) for key in head[3:])]
        for name, of in ((name, classes[name]) for name in names[:MOST_CLASSES])
    ]
    lines = _aligned([head, *body])
    if len(names) > MOST_CLASSES:
        lines.append(
            f"and {len(names) - MOST_CLASSES} classes with a higher f1; all of them with --json and in summary.json"
        )
    elif "confusion" in found and len(classes) <= MOST_CLASSES:
        shown = [_short(name) for name in classes]
        counts = [[name, *map(str, row)] for name, row in zip(shown, found["confusion"], strict=False)]
        lines += _aligned([["class \\ predicted", *shown], *counts])
    return lines


def _short(text: str, most: int = 20) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def chosen_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line where the rows behind the figures also chose whose they are."""
    evaluations = summary.get("chosen_among", 1)
    if evaluations < 2:
        return []
    rest = "those of the test rows chose nothing" if "test" in summary else "--test FILE scores rows that chose nothing"
    return [
        f"these are figures of the validation rows, which also chose step {summary['model_step']:,} among "
        f"{evaluations} evaluations; {rest}"
    ]


def next_commands(folder: RunFolder) -> dict[str, str]:
    """What to type to predict, to view, and, where losses were logged, to replay."""
    run = shlex.quote(str(folder.path))
    events = folder.stages if folder.stages.is_dir() else folder.tensorboard
    logged = any(each.trajectory.exists() for each in (folder, *folder.stage_folders()))
    opened = f" {TRUST}" if folder.model.is_dir() and class_of(folder.model) else ""
    return {
        "predict": f"gradientless predict {run} {_asks(folder)}{opened}",
        "view": f"tensorboard --logdir {shlex.quote(str(events))}",
        **({"replay": f"gradientless replay {run}{folder.asks_for_trust}"} if logged else {}),
    }


def _asks(folder: RunFolder) -> str:
    """What a model of this run is asked with."""
    from gradientless.language.tasks import find_task

    task = folder.task if folder.holds_run() else FILMS[0]
    if task in FILMS:
        return shlex.quote(SAMPLE)
    if task is not None and find_task(task).kind != "classification":
        return "--file rows.jsonl"  # with the columns of the task
    pairs = folder.model.is_dir() and rows_of(folder.model).get("pairs")
    return "'a text' 'its second text'" if pairs else "'a text'"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"


def plot(folder: RunFolder) -> bool:
    """plot.png: validation accuracy and loss against forward passes, one stage behind the other. False when nothing
    was evaluated yet."""
    curves: list[tuple[str | None, int, list[dict[str, Any]]]] = []
    passes = 0
    for run in folder.stage_folders() or [folder]:
        records = [
            record
            for record in run.read_metrics()
            if record.get("split") == "validation" and "forward_passes" in record
        ]
        if records:
            curves.append((run.path.name if folder.stages.is_dir() else None, passes, records))
            passes += records[-1]["forward_passes"]
    if not curves:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")  # not pyplot: no display, no global state
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name, start, records in curves:
            points = [(start + r["forward_passes"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        if curves[0][0] is not None:
            axes.legend(fontsize="small")
        axes.set_xlabel("forward passes")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 150k, 1.2M
        axes.set_title(f"validation {key}")
        axes.grid(alpha=0.3)
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=120)
    write_atomically(folder.plot, drawn.getvalue())
    return True


# --- published tables ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a published table: the value at the dotted `key` of summary.json, times `scale`."""

    title: str
    key: str
    scale: float = 1.0
    digits: int = 0
    unit: str = ""
    spread: bool = False  # the standard deviation over the runs, beside the mean
    form: str = " ± {}"  # how the deviation is said


ACCURACY = Column("validation accuracy", "metrics.accuracy", 100, 2, "%", spread=True)
F1 = Column("F1", "metrics.f1", 100, 2, "%", spread=True)
MEMORY = Column("memory above the model", "peak_memory_mib", 1, 0, " MiB")
PASSES = Column("forward passes", "forward_passes")
STEPS = Column("steps", "steps")
SECONDS = Column("seconds", "seconds")


Summary = Mapping[str, Any]


def markdown_table(
    rows: Mapping[str, Sequence[Path | Summary]],
    columns: Sequence[Column] = (STEPS, PASSES, ACCURACY, MEMORY),
    first: str = "method",
) -> str:
    """A markdown table with a row for each name; see `table_cells`."""
    head, *body = table_cells(rows, columns, first)
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def table_cells(
    rows: Mapping[str, Sequence[Path | Summary]], columns: Sequence[Column], first: str = "method"
) -> list[list[str]]:
    """The lines of a table, titles first: for each name means over its summaries (runs with different seeds).

    rows: row name -> summaries, summary.json files, or run folders. The deviation is that of a sample (n - 1); with one
    run it is left out. Raises UserError for a missing file or key.
    """
    lines = [[first, *(column.title for column in columns), "runs"]]
    for name, files in rows.items():
        summaries = [file if isinstance(file, Mapping) else _summary(Path(file)) for file in files]
        if not summaries:
            raise UserError(f"table: row '{name}' must have at least one run, got none")
        lines.append([name, *(_cell(column, summaries, name) for column in columns), str(len(summaries))])
    return lines


def _cell(column: Column, summaries: Sequence[Mapping[str, Any]], name: str) -> str:
    values = []
    for summary in summaries:
        value: Any = summary
        for part in column.key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, (int, float)):
            raise UserError(f"table: the summaries of '{name}' must hold the number {column.key}, got {value!r}")
        values.append(value * column.scale)
    text = f"{statistics.fmean(values):,.{column.digits}f}{column.unit}"
    if column.spread and len(values) > 1:
        text += column.form.format(f"{statistics.stdev(values):.{column.digits}f}")
    return text


def _summary(path: Path) -> dict[str, Any]:
    return read_sealed(RunFolder(path).summary if path.is_dir() else path, "table")
