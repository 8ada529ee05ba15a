"""`gradientless compare`, `diagnose` and `profile`: what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradientless.cli.options import (
    MACHINE,
    METHOD,
    MODEL,
    STOPPED,
    Data,
    Device,
    LabelColumn,
    PairColumn,
    Task,
    TextColumn,
    TrustCode,
    Validation,
    app,
    data_flags,
    split_arguments,
)
from gradientless.errors import UserError, unknown
from gradientless.terminal import say, say_on_stderr


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
        str | None,
        typer.Option(
            help="zero-shot, calibrated, icl, linear-probe, any optimizer; NAME=METHOD for a row of another name. By "
            "default the first four, as far as the model can do them.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="starter:smollm2, a hub id or a folder; without it starter:smollm2 where a method asks for words.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Device = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="A folder for results; one that holds some is continued. By default a new one under runs/.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Ways to use a model and to tune it, over several seeds, in one table.

    \b
    gradientless compare --task sst2
    gradientless compare --task sst2 --model starter:smollm2 --methods zero-shot,icl,mezo,adamw \\
        --seeds 13,21,42 --forward-passes 3000 data.few_shot=16 icl:k=4 mezo:optimizer.lr=1e-6
    gradientless compare --task sst2 --model starter:minilm --methods linear-probe,head=adamw \\
        --forward-passes 3000 head:surface.name=head --out runs/probe
    """
    from gradientless.run.compare import compare as compare_all
    from gradientless.run.compare import configurations, read_methods, usual
    from gradientless.run.runfolder import free_name, short_name
    from gradientless.run.train import Stopped
    from gradientless.terminal import Console

    flags: dict[str, Any] = {
        **data_flags(task, data, text_column, text_pair_column, label_column, validation),
        "model": model,
        "forward_passes": forward_passes,
        "device": device,
    }
    recipe, settings = split_arguments(arguments or [])
    code, of_all = None if trust_code else (), [each for each in settings if ":" not in each.partition("=")[0]]
    names, flags, notes = usual(None if methods is None else _commas(methods), recipe, of_all, flags, code)
    chosen, shared = read_methods(names, settings)
    configs = configurations(chosen, _seeds(seeds), recipe, shared, flags, code)
    first = configs[chosen[0].label][0]
    stem = Path(first.task or first.data.path or "data").stem
    place = free_name(Path("runs") / short_name(f"compare-{stem}")) if out is None else Path(out)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: must be a folder that can be written, got '{place}' ({error.strerror})") from None
    for note in notes:
        say_on_stderr(note)
    try:
        found = compare_all(chosen, configs, place)
    except Stopped as stopped:
        say_on_stderr(f"stopped at step {stopped.step:,}; continue with the same command and --out {place}")
        raise typer.Exit(STOPPED) from None
    found.show(Console())
    say(f"saved       {place / 'compare.md'}, {place / 'compare.json'}")


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
    trust_code: TrustCode = False,
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

    from gradientless.run.config import RunConfig
    from gradientless.run.diagnose import diagnose_run
    from gradientless.terminal import Console

    forms = ("table", "markdown", "json")
    if form not in forms:
        raise unknown("--format", "format", form, forms)
    flags: dict[str, Any] = {
        **data_flags(task, data, text_column, text_pair_column, label_column),
        "model": model,
        "surface.name": surface,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
    }
    recipe, overrides = split_arguments(arguments or [])
    config = RunConfig.load(recipe, overrides, flags, None if trust_code else (), usual=True)
    found = diagnose_run(config, say_on_stderr, noise=noise, draws=draws, eps=eps)
    if form == "table":
        found.show(Console())
    else:
        say(found.markdown() if form == "markdown" else json.dumps(found.data()))


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
    from gradientless.run import profile as measuring
    from gradientless.terminal import Console

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
