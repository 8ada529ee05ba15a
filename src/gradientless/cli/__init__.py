"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from gradientless.errors import UserError, one_line
from gradientless.inputs import halves

INSTALL = "gradientless: the package '{}' is missing; install it with: pip install 'gradientless[run]'"
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NUMBER = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust say it
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
        line = _line_of_memory(error) or _line_of_the_system(error)
        if line is None:
            raise
        _end(line)
    finally:
        warnings.formatwarning = kept


def _end(line: str) -> NoReturn:
    say_on_stderr(line)
    raise SystemExit(2) from None


def _line_of_memory(error: Exception) -> str | None:
    """What is said where memory did not hold what was asked for; None for any other error."""
    if isinstance(error, MemoryError):
        full = True
    elif "torch" in sys.modules:
        from gradientless.run.memory import is_out_of_memory

        full = is_out_of_memory(error)
    else:
        full = False
    line = "memory: must hold what was asked for, got too little; take fewer rows at a time or a smaller model"
    return line if full else None


def _line_of_the_system(error: Exception) -> str | None:
    """What is said of an error of the operating system; None for any other.

    Also where a library that writes has an error of its own for it, and only its words tell."""
    stated = _NUMBER.search(str(error))
    number = int(stated[1]) if stated else error.errno if isinstance(error, OSError) else None
    if number in _NO_ROOM or os.strerror(errno.ENOSPC) in str(error):
        return "disk: must have room, got none left; free some, then repeat the command (a run: --resume)"
    if number is None:
        return None
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return f"file: must be one that can be used, got '{name:.200}' ({error.strerror})"
    return f"file: must be one that can be used, got one that cannot: {one_line(error)}"


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as its reader needs it: without the place in the code."""
    return f"{plain(' '.join(str(message).split()))}\n"
