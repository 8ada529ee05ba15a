"""How files are written: whole or not at all, and nowhere but where they are meant to be.

A folder that somebody sent may hold links in the places that are written to. What is written is therefore made under a
temporary name that nothing has yet, without following a link, and renamed into its place, which takes a link's place
and leaves alone what it points at. Logs, which are written in place, are opened without following a link.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gradientless.errors import UserError

_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_new(path: Path) -> BinaryIO:
    """A file to write, which nothing stood in the place of. Raises FileExistsError."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o666), "wb")


def append(path: Path, content: bytes) -> None:
    """Add to a file, in one write. Raises OSError for a link, and for what is no file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0) | _SAFE, 0o666)
    with open(handle, "ab", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"'{path}' is no file")
        file.write(content)


def open_alone(path: Path) -> io.FileIO:
    """A file to read and change in place. Where it has another name elsewhere, a copy takes its place before."""
    if os.stat(path).st_nlink > 1:
        write_atomically(path, path.read_bytes())
    return open(path, "r+b", buffering=0)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, flushed to the disk, renamed into it."""
    temporary = temporary_name(path)
    remove(temporary)  # what a killed writer left
    _write(temporary, content)
    os.replace(temporary, path)
    sync(path.parent)


def write_where_asked(path: Path, content: bytes) -> None:
    """Write to what a person names, as `cat > path` has it: through a link, which stays one, and into a pipe or a
    device. A file is written whole or not at all, and keeps its mode."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # also at the end of a link, where the file then is made
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb", buffering=0) as opened:
            rest = memoryview(content)
            while rest:  # a pipe takes no more at a time than it holds
                rest = rest[opened.write(rest) :]
        return
    place = Path(os.path.realpath(path))
    if mode is not None and not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    temporary = place.with_name(f".{place.name[:100]}.{secrets.token_hex(4)}.partial")
    try:
        _write(temporary, content)
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, place)
    except BaseException:
        remove(temporary)
        raise
    sync(place.parent)


def _write(temporary: Path, content: bytes) -> None:
    with open_new(temporary) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of the folder `target` when the block ends well."""
    temporary = temporary_name(target)
    remove(temporary)
    temporary.mkdir()  # where the folder around it is gone, this fails, rather than begin another
    # While it is open, no other has its number. Windows opens no folders, and removes none that is in use.
    opened = None if os.name == "nt" else os.open(temporary, os.O_RDONLY)
    try:
        yield temporary
        if opened is not None and not os.path.samestat(os.fstat(opened), os.stat(temporary)):
            raise FileNotFoundError(errno.ENOENT, "it was removed while it was written", str(target))
    except BaseException:
        remove(temporary)
        raise
    finally:
        if opened is not None:
            os.close(opened)
    for file in temporary.rglob("*"):
        sync(file)
    sync(temporary)
    _swap(temporary, target)


def _swap(new: Path, place: Path) -> None:
    """Put the folder `new` in `place`. A kill in between leaves the old folder as PLACE-superseded."""
    old = place.with_name(f"{place.name}-superseded")
    if os.path.lexists(place):
        remove(old)
        os.rename(place, old)
    os.rename(new, place)
    sync(place.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, where there is one. What a link points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def require_no_links(folder: Path) -> None:
    """Raises `UserError` for a folder that holds anything but files and folders of its own, at any depth."""
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            inner = Path(place, name)
            try:
                mode = inner.lstat().st_mode
            except FileNotFoundError:  # a temporary one of a process that writes there
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "a pipe or a device"
                raise UserError(
                    f"run: must hold files and folders alone to be written to, got {what}, "
                    f"'{inner.relative_to(folder)}', in '{folder}'"
                )
