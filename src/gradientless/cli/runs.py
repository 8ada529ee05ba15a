"""`gradientless eval`, `predict`, `replay` and `export`: what is done with a run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradientless.cli.options import (
    Data,
    Device,
    LabelColumn,
    PairColumn,
    SkipBadRows,
    Task,
    TextColumn,
    TrustCode,
    Validation,
    app,
    data_flags,
)
from gradientless.errors import UserError, unknown
from gradientless.inputs import is_file
from gradientless.terminal import plain, say, say_on_stderr

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or a saved model's folder.", show_default=False)
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Texts at a time; without it as many as 1,024 tokens hold (on an accelerator 65,536)."),
]


@app.command("eval")
def evaluate(
    run: Run,
    split: Annotated[
        str | None,
        typer.Option(help="validation, test or train. All rows of a file of --data, and else validation, by default."),
    ] = None,
    task: Task = None,
    data: Data = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    validation: Validation = None,
    skip_bad_rows: SkipBadRows = False,
    batch_size: BatchSize = None,
    device: Device = None,
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Loss, accuracy, MCC and the figures of each class; on the run's validation rows, or on all rows of a file.

    \b
    gradientless eval runs/thesis
    gradientless eval runs/thesis --split train --json
    gradientless eval runs/thesis --data more.csv
    gradientless eval tuned/ --data more.csv --text-column review
    """
    import json

    from gradientless.language.metrics import alike
    from gradientless.language.surfaces.saved import rows_of
    from gradientless.language.tables import BadRows
    from gradientless.language.tasks import Splits
    from gradientless.run.config import RunConfig
    from gradientless.run.evaluation import evaluate_folder, load_splits, model_folder, reads, rows_of_file
    from gradientless.run.report import class_lines, figure_rows
    from gradientless.run.runfolder import RunFolder

    given = data_flags(task, data, text_column, text_pair_column, label_column, validation)
    model = model_folder(run)  # before the data, which may take a while
    folder, noted = RunFolder(run), rows_of(model)
    if folder.holds_run():
        own = folder.read_config(None if trust_code else ())  # refuses one that was changed
        noted = reads(own, pairs=False) | ({"task": own.task} if own.task else {})
    elif task is None and data is None:
        raise UserError(f"eval: --task or --data must be given with the folder of a model, got neither for '{run}'")
    if data is not None and task is None and not (text_column or text_pair_column or label_column):
        given["task"] = noted.get("task")  # whose columns the file has
    if not (task or given["task"]):
        for key in ("text_column", "text_pair_column", "label_column"):
            given[f"data.{key}"] = given[f"data.{key}"] or noted.get(key)
    given |= {"device": device, "data.skip_bad_rows": skip_bad_rows or None}
    code = None if trust_code else ()
    kept = folder.config if folder.holds_run() else None  # which was told of above
    config = RunConfig.load(kept, (), given, code, written=kept is not None)
    sums: dict[str, str] | None = {} if folder.holds_run() else None
    bad = BadRows(config.data.skip_bad_rows)
    if data is not None and is_file(data) and split is None and validation is None:
        splits = Splits([], [], *rows_of_file(config, data, None, bad))
        split, shown = "test", f"all of {Path(data).name}"
    else:
        splits, split = load_splits(config, bad), split or "validation"
        shown = split
    for line in bad.told:
        say_on_stderr(line)
    how = {"batch_size": batch_size, "device": config.device, "say": say_on_stderr, "code": code, "sums": sums}
    found = evaluate_folder(run, splits, split, **how)  # type: ignore[arg-type]
    found["split"] = shown
    if as_json:
        say(json.dumps(found))
        return
    del found["texts_cut"]  # of which a line was said, if there were any
    rows = [("split", found["split"]), *figure_rows(found)]
    width = max(10, *(len(name) for name, _ in rows))
    for line in [*(f"{name:<{width}} {value}" for name, value in rows), *class_lines(found)]:
        say(line)
    if label := alike(found):
        say(f"note: every row was predicted '{label}': no class is told from another")


@app.command()
def predict(
    run: Run,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; none: --file or standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Texts of a file: CSV, TSV, JSONL by column; any other, one a line.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text; as the model was tuned, by default.", show_default=False)
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text, of a model of two.", show_default=False)
    ] = None,
    form: Annotated[str, typer.Option("--format", help="csv or jsonl.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="A file to write; standard output by default.")] = None,
    batch_size: BatchSize = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Label and probabilities of texts; or the choice or answer for rows of a table, by the columns of the run's task.

    A model of two texts takes them two by two. A file's rows keep their order and their other columns; one without a
    text has an empty answer.

    \b
    gradientless predict runs/thesis "a gripping film" "a dull one"
    gradientless predict runs/squad --file questions.jsonl --format jsonl
    gradientless predict runs/thesis --file reviews.csv --text-column review --out labels.csv
    cat reviews.txt | gradientless predict runs/thesis --format jsonl
    """
    from gradientless.inputs import read_file
    from gradientless.run import predict as predictions
    from gradientless.run.predict import FORMATS, TABLES

    lines = []
    if form not in FORMATS:
        lines.append(str(unknown("--format", "format", form, FORMATS)))
    if texts and file is not None:
        lines.append("predict: texts must be given as arguments or as --file, got both")
    if text_pair_column is not None and file is None:
        lines.append("predict: --text-pair-column must come with --file, got no file")
    if out is not None and not out.parent.is_dir():
        lines.append(f"--out: must lie in an existing folder, got '{out}'")
    if lines:
        raise UserError("\n".join(lines))
    is_table = file is not None and file.suffix.lower() in TABLES
    content = read_file(file, "file") if file is not None and not is_table else b""
    read = predictions.how_rows_are_read(run)
    own, two = predictions.answers_rows(run), bool(read.get("pairs"))
    if text_pair_column is not None and "pairs" in read and not two:
        raise UserError(f"--text-pair-column: must stay away from a model of one text, got '{text_pair_column}'")
    if file is not None and is_table:
        if own:
            asked = predictions.ask_rows(read, file)
        else:
            second = text_pair_column or read.get("text_pair_column")
            if two and second is None:
                raise UserError("--text-pair-column: must be given for a model of two texts, got nothing")
            asked = predictions.ask_table(file, text_column or read.get("text_column", "text"), second)
    elif texts:
        asked = predictions.ask_arguments(texts, two and not own)
    elif two and not own:
        raise UserError("predict: a model of two texts must be given them as arguments or as a table, got one a line")
    elif file is not None:
        asked = predictions.ask_lines(content, str(file))
    else:
        if sys.stdin.isatty():
            say_on_stderr("One text a line; end with Ctrl-D (Ctrl-Z and Enter on Windows).")
        asked = predictions.ask_lines(sys.stdin.buffer.read(), "standard input")
    found = predictions.answer(run, asked, batch_size, device, say_on_stderr, None if trust_code else ())
    answer = "".join(predictions.render(form, asked, found))
    if out is None:
        # Whoever reads a pipe or a file wants the texts as they were.
        sys.stdout.write(plain(answer) if sys.stdout.isatty() else answer)
        return
    from gradientless.writing import write_where_asked

    try:
        write_where_asked(out, answer.encode())
    except OSError as error:
        raise UserError(f"--out: must be a file that can be written, got '{out}' ({error.strerror})") from None


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The model to start from, when it moved.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write the model to, new or empty; by default replayed/ in the run folder."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Make the tuned weights again from the base model and the log of losses, and compare them with the run's.

    \b
    gradientless replay runs/thesis
    gradientless replay runs/thesis --base models/distilbert --out audit/
    """
    from gradientless.run.replay_run import replay_run
    from gradientless.terminal import Console, Counter

    counters: list[Counter] = []
    with contextlib.ExitStack() as showing:

        def progress(done: int, total: int) -> None:
            if not counters:  # what is refused before the first step is one line alone
                counters.append(showing.enter_context(Counter(Console(stderr=True), "replaying", total)))
            counters[0].reach(done)

        found = replay_run(run, base, out, progress, keep=True, trust_code=trust_code)
    width = max(20, *map(len, found))
    for name, value in found.items():
        say(f"{name:<{width}} {value}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it was by default.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put an adapter into the model's own weights.")] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a tuned model for others, with a card that says how to open it; made again from the log when the run's
    folder no longer holds it.

    \b
    gradientless export runs/thesis --out tuned/
    gradientless export runs/mezo --out tuned/ --dtype float16
    """
    import shlex

    from gradientless.run.card import CARD
    from gradientless.run.replay_run import export_run

    found = export_run(run, out, dtype, trust_code, merge)
    say(f"model    {found.folder}")
    say(f"card     {found.folder / CARD}, for whom you give the folder to")
    say(f"opens    {found.opening.sentence}")
    if found.opening.code is not None:
        say(f"\n{found.opening.code}")
    say(f"predict  gradientless predict {shlex.quote(str(found.folder))} {found.asked}")
