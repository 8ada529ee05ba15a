"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gradientless.errors import UserError

INSTALL = "gradientless: the package '{}' is missing; install it with: pip install 'gradientless[run]'"
EXTRA = {"click", "datasets", "huggingface_hub", "matplotlib", "pydantic", "rich", "safetensors"}
EXTRA |= {"tensorboard", "tokenizers", "tomli", "tomli_w", "transformers", "typer"}

try:
    from gradientless.cli.options import STOPPED, app
except ModuleNotFoundError as error:
    raise SystemExit(INSTALL.format(error.name)) from None

# Each file adds its commands, in the order in which --help lists them.
from gradientless.cli import train, runs, measure, names  # noqa: E402, F401  isort:skip

__all__ = ["INSTALL", "STOPPED", "app", "main"]


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
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        print(
            "disk: must have room, got none left; free some, then repeat the command (a run: --resume)", file=sys.stderr
        )
        raise SystemExit(2) from None
    finally:
        warnings.formatwarning = kept


def _is_of_a_full_disk(error: Exception) -> bool:
    """Also where a library that writes has an error of its own for it, and only its words tell."""
    of_the_system = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return of_the_system or os.strerror(errno.ENOSPC) in str(error)


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as its reader needs it: without the place in the code."""
    return f"{' '.join(str(message).split())}\n"
