"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from gradientless.errors import UserError
from gradientless.inputs import halves

INSTALL = "gradientless: the package '{}' is missing; install it with: pip install 'gradientless[run]'"
EXTRA = {"click", "datasets", "huggingface_hub", "matplotlib", "pydantic", "rich", "safetensors"}
EXTRA |= {"tensorboard", "tokenizers", "tomli", "tomli_w", "transformers", "typer"}

try:
    from gradientless.cli.options import STOPPED, app
    from gradientless.run.named import blamed
    from gradientless.terminal import plain, say_on_stderr
except ModuleNotFoundError as error:
    raise SystemExit(INSTALL.format(error.name)) from None

# Each file adds its commands, in the order in which --help lists them.
from gradientless.cli import train, runs, measure, names  # noqa: E402, F401  isort:skip

__all__ = ["INSTALL", "STOPPED", "app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. A `UserError` is printed, one line each, and ends with exit code 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; a file would else take its number and what is printed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the process's life)
    kept, warnings.formatwarning = warnings.formatwarning, _one_line_warning
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        for argument in given:
            if halves(argument):  # how Python holds bytes that are no UTF-8
                raise UserError(f"arguments: must be text in UTF-8, got {os.fsencode(argument)!r}")
        with blamed():
            app(args=given)
    except UserError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        _end(INSTALL.format(error.name.partition(".")[0]))
    except Exception as error:
        if _is_of_memory(error):
            _end("memory: must hold what was asked for, got too little; take fewer rows at a time or a smaller model")
        if _is_of_a_full_disk(error):
            _end("disk: must have room, got none left; free some, then repeat the command (a run: --resume)")
        if not isinstance(error, OSError) or error.filename is None:
            raise
        _end(f"file: must be one that can be used, got '{error.filename!s:.200}' ({error.strerror})")
    finally:
        warnings.formatwarning = kept


def _end(line: str) -> NoReturn:
    say_on_stderr(line)
    raise SystemExit(2) from None


def _is_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from gradientless.run.memory import is_out_of_memory

    return is_out_of_memory(error)


def _is_of_a_full_disk(error: Exception) -> bool:
    """Also where a library that writes has an error of its own for it, and only its words tell."""
    of_the_system = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return of_the_system or os.strerror(errno.ENOSPC) in str(error)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as its reader needs it: without the place in the code."""
    return f"{plain(' '.join(str(message).split()))}\n"
