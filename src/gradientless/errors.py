"""Errors for people: one clear line each, which the command line prints before it exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import TracebackType


class UserError(ValueError):
    """Something the user can mend. The message is one line: *owner: requirement, got value*."""


class NotFinite(UserError):
    """A loss, a score or a weight is not finite, so that nothing can be learned or told from it."""


class Faults:
    """What several checks found: `with faults: …` around each of them, and `faults.tell()` at the end."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, UserError):
            self.lines += str(error).split("\n")
        return isinstance(error, UserError)

    def require(self, holds: bool, line: str) -> None:
        """Keep `line` unless what it says holds."""
        if not holds:
            self.lines.append(line)

    def tell(self) -> None:
        """Raise one `UserError` with a line for each that was found."""
        if self.lines:
            raise UserError("\n".join(self.lines))


def whole(owner: str, what: str, value: object) -> int:
    """`value`, which is a whole number; raises `UserError` for anything else, true and false included."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{owner}: {what} must be a whole number, got {brief(value)}")
    return value


def count(owner: str, what: str, value: object, where: str = "") -> None:
    """Raise `UserError` unless `value` is a whole number from 1 on. where: what is said of the place."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{owner}: {what} must be an integer >= 1{where}, got {brief(value)}")


def brief(value: object) -> str:
    """`value` as a message shows it: as Python writes it, in one line that is not too long to read."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a number of thousands of digits, or what cannot say what it is
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most so many characters; where it says nothing, its kind."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def with_kind(error: BaseException) -> str:
    """`one_line`, behind the error's kind: for those that Python or a library raised."""
    kind, said = type(error).__name__, one_line(error)
    return said if said == kind else f"{kind}: {said}"


def one_of(owner: str, kind: str, value: object, known: Iterable[str]) -> None:
    """Raise `UserError` unless `value` is one of the texts `known`."""
    if not isinstance(value, str) or value not in set(known):
        raise unknown(owner, kind, value, known)


def unknown(owner: str, kind: str, name: object, known: Iterable[str]) -> UserError:
    """A `UserError` for a name that is not registered, with the nearest name and all known ones."""
    names, given = sorted(known), name if isinstance(name, str) else brief(name)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    near.sort(key=lambda other: sorted(other) != sorted(given))  # swapped letters first
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return UserError(f"{owner}: unknown {kind} '{given}'{hint} Known: {', '.join(names)}")
