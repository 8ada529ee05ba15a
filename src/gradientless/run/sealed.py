"""Files that a run reads back: each holds a checksum of its own values, so that a change of one is noticed.

What each holds, and how JSON is read back, is `schema`'s.
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
from gradientless.schema import checksum, require_seal, sealed

_COMMENT = re.compile(r"^# sha256 of the values (?:above|below): (\S*)$", re.MULTILINE)


def sealed_toml(text: str) -> str:
    """TOML and the checksum of its values, in comments on both sides: what is cut off at one end leaves the other."""
    told = checksum(toml(text, "config"))
    return f"# sha256 of the values below: {told}\n{text}\n# sha256 of the values above: {told}\n"


def require_toml(path: Path) -> None:
    """Raises `UserError` for a file whose values are not those that `sealed_toml` was given, or that has none."""
    text = read_text(path, "run")
    values = toml(text, "run")
    if not values:
        raise UserError(f"run: {path.name} must hold what the run wrote, got an empty file in '{path.parent}'")
    for stated in _COMMENT.findall(text):
        require_seal("run", stated, values, path)


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
