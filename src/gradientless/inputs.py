"""What people hand in: files, and the TOML in them. Everything that is wrong with one is told in one line."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradientless.errors import UserError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name. A name that no system takes (too long, a zero byte) is that of none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def read_file(path: Path, owner: str) -> bytes:
    """The bytes of a file, or of a pipe that somebody writes to. Raises `UserError` for anything else.

    A pipe without a writer would be waited for without end, and a device may have none.
    """
    try:
        # Not blocking: a pipe opens at once, whether it has a writer or not.
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(opened, "rb", buffering=0) as file:
            mode = os.fstat(opened).st_mode
            if stat.S_ISREG(mode):
                return file.readall()
            if not stat.S_ISFIFO(mode):
                raise UserError(f"{owner}: must be a file, got '{path}', which is none")
            begun = file.read(1)  # nothing where there is no writer; None where there is one who has not written yet
            os.set_blocking(opened, True)
            if begun == b"":
                raise UserError(f"{owner}: must be a file, got '{path}', a pipe that nobody writes to")
            return (begun or b"") + file.readall()
    except FileNotFoundError:
        raise UserError(f"{owner}: file not found, got '{path}'") from None
    except OSError as error:
        raise UserError(f"{owner}: must be readable, got '{path}' ({error.strerror or error})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{owner}: must be the name of a file, got {str(path)!r} ({error})") from None


def read_text(path: Path, owner: str) -> str:
    """The text of a UTF-8 file, as `read_file`."""
    try:
        return read_file(path, owner).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise UserError(f"{owner}: must be text in UTF-8, got '{path}' with {found}") from None


def toml(text: str, owner: str) -> dict[str, Any]:
    """The values of a TOML text. Raises `UserError` for what is not valid TOML.

    So are whole numbers beyond 64 bits, as TOML has it; and text with a zero byte, which no name of a file may hold.
    """
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{owner}: must be valid TOML, got tables or lists that are nested too deeply") from None
    except ValueError as error:  # also Python's own, of numbers of thousands of digits
        raise UserError(f"{owner}: must be valid TOML, got: {one_line(error)}") from None
    for place, value in _leaves(values, ""):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{owner}: whole numbers must have at most 64 bits, got a larger one in '{place}'")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{owner}: texts must not hold a zero byte, got one in '{place}'")
    return values


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of all values that are no tables or lists, and the keys themselves."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield place or "a key", key
            yield from _leaves(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, place)
    else:
        yield place, value


def halves(text: str) -> bool:
    """Whether `text` holds half of a surrogate pair, which is no character and cannot be written as UTF-8."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
