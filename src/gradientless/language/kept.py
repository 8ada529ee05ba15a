"""Arrays that take long to make, kept on disk for the next time. Each file ends in its own sha256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradientless.errors import UserError


def kept(
    path: Path, write: Callable[[Path], None], damaged: Callable[[str], None], shape: tuple[int, ...] | None = None
) -> np.ndarray[Any, Any]:
    """The array in the file `path`, memory-mapped for reading; where there is none, `write` makes its .npy first.

    A file that is damaged or cut short is made again, which `damaged` is told. shape: which the array must have.
    Raises `UserError` for a folder that cannot be written.
    """
    if path.exists():
        if _sound(path) and (found := _open(path, shape)) is not None:
            return found
        damaged(f"the cached file {path.name} is damaged and is computed again")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".partial", dir=folder)
    except OSError as error:
        raise UserError(f"cache: the folder {folder} must be writable, got {error.strerror or error}") from None
    os.close(descriptor)
    partial = Path(name)
    try:
        write(partial)
        digest = _digest(partial, partial.stat().st_size)
        with partial.open("ab") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    made = _open(path, shape)
    assert made is not None
    return made


def _open(path: Path, shape: tuple[int, ...] | None) -> np.ndarray[Any, Any] | None:
    """The file's array; None when it is not one of this shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return array if shape is None or array.shape == shape else None


def _digest(path: Path, count: int) -> bytes:
    """sha256 of the first `count` bytes of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while count > 0 and (block := file.read(min(count, 1 << 20))):
            digest.update(block)
            count -= len(block)
    return digest.digest()


def _sound(path: Path) -> bool:
    """Whether the file ends in the sha256 of all that stands before."""
    size = path.stat().st_size - hashlib.sha256().digest_size
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        stated = file.read()
    return _digest(path, size) == stated
