"""The program, and the options that several of its commands share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gradientless.errors import UserError
from gradientless.inputs import is_file
from gradientless.terminal import say

STOPPED = 130  # the exit code after a stop signal, so that `train && predict` does not go on


class _Commands(TyperGroup):
    """Commands whose options hold one value: of two, click takes the last without a word."""

    def resolve_command(self, context: Any, arguments: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(context, arguments)
        assert command is not None
        parser = command.make_parser(command.context_class(command, parent=context, resilient_parsing=True))
        *_, order = parser.parse_args(list(rest))
        once = Counter(each.opts[0] for each in order if not (each.multiple or getattr(each, "is_flag", True)))
        if lines := [f"{option}: must be given once, got {n} values" for option, n in once.items() if n > 1]:
            raise UserError("\n".join(lines))
        return name, command, rest


app = typer.Typer(
    name="gradientless",
    cls=_Commands,
    help="Fine-tune language models with forward passes: direct search, exactly replayable.",
    epilog="Start with: gradientless train",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA, MODEL, METHOD, MACHINE = "Data", "Model", "Method and length", "Machine and run folder"


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"gradientless {version('gradientless')}")
        raise typer.Exit


@app.callback()
def _gradientless(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


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
Test = Annotated[
    str | None,
    typer.Option("--test", help="A table to test the tuned model on, which chooses nothing.", rich_help_panel=DATA),
]
SkipBadRows = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave out rows that cannot be used, and say how many.", rich_help_panel=DATA),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=MACHINE)
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run what the configuration names as file.py:name or module:name, whoever wrote it; without, only what "
        "this command line names itself.",
        rich_help_panel=MACHINE,
    ),
]


def data_flags(
    task: str | None,
    data: str | None,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
    validation: str | None = None,
) -> dict[str, Any]:
    """The options about data, by their keys of a recipe."""
    return {
        "task": task,
        "data.path": data,
        "data.text_column": text_column,
        "data.text_pair_column": text_pair_column,
        "data.label_column": label_column,
        "data.validation": validation,
    }


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if any, and the key=value overrides. A recipe's path may hold an equals sign."""
    if arguments and ("=" not in arguments[0] or is_file(arguments[0])):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)
