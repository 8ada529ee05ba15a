"""What a configuration names of the user's own code: "file.py:Name" or "module:name".

Code runs because the person at the keyboard, or a program of theirs, named it. A name that stands in a file (a recipe,
the configuration of a run folder, a log, a result) may be somebody else's: `only` keeps it from being run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gradientless.errors import UserError, unknown, with_kind
from gradientless.terminal import say_on_stderr

TRUST = "--trust-code"


def is_own(name: str) -> bool:
    """Whether `name` points at the user's own code rather than into a registry."""
    return ":" in name


def own(owner: str, name: str, kind: str = "class") -> Any:
    """The class ("class") or other callable ("function") that `name` points at. Raises UserError.

    The user's file is run, as it would be by `import`, unless `only` is open and keeps it from that.
    """
    if (reading := _reading.get()) is not None:
        reading.admit(owner, name)
    place, _, key = name.rpartition(":")
    module = _file(owner, place, key, kind) if place.endswith(".py") else _module(owner, place, key)
    if (source := file_of(place)) is not None:
        _ran[name] = _sha256(source)
    _modules.add(module.__name__)
    wanted = inspect.isclass if kind == "class" else callable
    found = {name: value for name, value in vars(module).items() if wanted(value)}
    if key not in found:
        theirs = [name for name, value in found.items() if getattr(value, "__module__", None) == module.__name__]
        raise unknown(owner, f"{kind} of {place}", key, theirs)
    return found[key]


# --- names that stand in a file ------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """The values of a file are being read. named: whose code may run, None for any. sums: what its files were."""

    named: frozenset[str] | None
    sums: Mapping[str, str]
    refused: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def admit(self, owner: str, name: str) -> None:
        if self.named is not None and name not in self.named:
            self.refused.append(name)
            raise UserError(f"{owner}: must not be run, got '{name}'")
        source = file_of(name.rpartition(":")[0]) if name in self.sums and name not in self.told else None
        if source is not None and _sha256(source) != self.sums[name]:
            say_on_stderr(f"other code  '{name}' is not what it was when the run began")
            self.told.add(name)


_reading: ContextVar[_Reading | None] = ContextVar("reading", default=None)
_ran: dict[str, str] = {}  # name -> sha256 of its file, as it was when it was run last


@contextlib.contextmanager
def only(named: Iterable[str] | None, place: str, sums: Mapping[str, str] | None = None) -> Iterator[None]:
    """While open, of the code that the file `place` names only that runs whose name is among `named`; None: all.

    sums: of `sums_of`, when the file was written; code that is another by now is told before it runs. Raises UserError
    at the end, in one line, for all that was not run."""
    reading = _Reading(None if named is None else frozenset(named), sums or {})
    before = _reading.set(reading)
    try:
        yield
    except ValueError:  # what was not run is the reason of whatever else was wrong
        if not reading.refused:
            raise
    finally:
        _reading.reset(before)
    if reading.refused:
        wanted = " and ".join(f"'{name}'" for name in dict.fromkeys(reading.refused))
        raise UserError(
            f"code: must be named on this command line, or allowed by {TRUST}, before it runs; got {wanted}, "
            f"which '{place}' wants to run"
        )


def texts_in(values: Any) -> set[str]:
    """All texts among nested values."""
    if isinstance(values, Mapping):
        return set().union(*map(texts_in, values.values()))
    if isinstance(values, (list, tuple)):
        return set().union(*map(texts_in, values))
    return {values} if isinstance(values, str) else set()


def sums_of(values: Any) -> dict[str, str]:
    """name -> sha256 of the file, of the code among these values that ran in this process."""
    return {name: _ran[name] for name in sorted(texts_in(values)) if name in _ran}


def file_of(place: str) -> Path | None:
    """The file of "file.py" or of a module; None where there is none, as for what was typed into an interpreter.

    To find a module within a package, the package is imported."""
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None or not Path(spec.origin).is_file() else Path(spec.origin)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- running it ----------------------------------------------------------------------------------------------------

_modules: set[str] = set()  # the names of those that hold the user's own code


@contextlib.contextmanager
def blamed() -> Iterator[None]:
    """While open, an error that passed through code of the user's own is told as that code's, in one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)):
            raise
        frames = traceback.walk_tb(error.__traceback__)
        own = [(frame, line) for frame, line in frames if frame.f_globals.get("__name__") in _modules]
        if not own:
            raise
        frame, line = own[-1]
        place = f"{frame.f_code.co_name}, line {line} of {frame.f_code.co_filename}"
        raise UserError(f"code: must not raise, got {with_kind(error)} in {place}") from error


def _file(owner: str, place: str, key: str, kind: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise UserError(f"{owner}: must name an existing file in 'file.py:{kind.capitalize()}', got '{place}:{key}'")
    name = f"gradientless_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look the module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a program that is no module ends the process itself
        raise UserError(f"{owner}: {place} could not be run ({with_kind(error)})") from error
    return module


def _module(owner: str, place: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        told = f"'{place}:{key}' ({with_kind(error)})"
        raise UserError(f"{owner}: must name a module that can be imported, got {told}") from error
