"""Files that a run reads back: each holds a checksum of its own values, so that a change of one is noticed.

The checksum is of the values, not of the bytes: a file that was only laid out anew is the same file. One without a
checksum, as earlier versions wrote them, is read as it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradientless.errors import UserError
from gradientless.inputs import read_text, toml

KEY = "sha256"
_COMMENT = re.compile(r"^# sha256 of the values above: (\S*)$", re.MULTILINE)


def checksum(values: Any) -> str:
    """sha256, in hex, of JSON-able values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` and their checksum."""
    return {**values, KEY: checksum(values)}


def unsealed(found: Any, path: Path) -> dict[str, Any]:
    """The values of what `sealed` gave. Raises `UserError` when they are others."""
    if not isinstance(found, dict):
        raise UserError(f"run: {path.name} must hold an object, got another value in '{path.parent}'")
    values = {key: value for key, value in found.items() if key != KEY}
    _require(found.get(KEY), values, path)
    return values


def sealed_toml(text: str) -> str:
    """TOML and, in a comment behind it, the checksum of its values."""
    return f"{text}\n# sha256 of the values above: {checksum(toml(text, 'config'))}\n"


def require_toml(path: Path) -> None:
    """Raises `UserError` for a file whose values are not those that `sealed_toml` was given."""
    text = read_text(path, "run")
    stated = _COMMENT.findall(text)
    _require(stated[-1] if stated else None, toml(text, "run"), path)


def _require(stated: Any, values: Any, path: Path) -> None:
    if stated is not None and stated != checksum(values):
        raise UserError(f"run: {path.name} must hold what the run wrote, got a changed file in '{path.parent}'")


# --- writing -------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, flushed to the disk, renamed into it."""
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file for people and programs: without a checksum."""
    write_atomically(path, (json.dumps(finite(content), indent=2, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is read back by `read_sealed`."""
    write_json(path, sealed(json.loads(json.dumps(finite(content)))))


def read_sealed(path: Path) -> dict[str, Any]:
    """Raises `UserError` for what is not JSON or was changed, and OSError for what cannot be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise UserError(f"run: {path.name} must be JSON, got a corrupted file in '{path.parent}'") from None
    return unsealed(found, path)


def finite(value: Any) -> Any:
    """JSON knows no nan: a loss that ran away is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk, where the system can (Windows cannot open folders)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap(new: Path, place: Path) -> None:
    """Put the folder `new` in `place`. A kill in between leaves the old folder as PLACE-superseded."""
    old = place.with_name(f"{place.name}-superseded")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(place, old)
    os.rename(new, place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
