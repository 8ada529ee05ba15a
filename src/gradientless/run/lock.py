"""One process at a time writes into a run folder.

The lock is the system's own, on the file `.lock`: it goes with the process that holds it, however that ends, so that
one of a process that was killed is none. The file tells who holds it and is removed at the end. Readers need no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from gradientless.errors import UserError

LOCK = ".lock"
_LOCKED_AT = 1 << 30  # of the byte that is locked: Windows keeps others from reading what is locked, so not the text
_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Busy(UserError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """While open, this process alone writes into `folder`, which is made where there is none, and removed at the end
    where it is empty. Raises `Busy` where another does, and `UserError` where nobody can.

    say: is told where the file system has no locks."""
    file = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquired(file, say)
    except Busy:
        raise Busy(f"run: must be written to by one process at a time, got '{folder}', {_holder(file)}") from None
    except OSError as error:
        raise UserError(f"out: must be a folder that can be written, got '{folder}' ({error.strerror})") from None
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is locked, or it might be another's by now
            file.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):
            if os.name == "nt":  # which removes no file that is open
                file.unlink()
            folder.rmdir()


def _acquired(file: Path, say: Callable[[str], object]) -> int:
    """The open and locked file. Raises `Busy`."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(f"no lock     the file system of '{file.parent}' has none: start no second process on this run")
                return handle
            os.close(handle)
            if error.errno in _HELD:
                raise Busy from None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)  # of a file that its holder has just removed


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(handle, _LOCKED_AT, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: Path) -> str:
    """Who writes there, in words."""
    try:
        number, host = file.read_text("utf-8").split()
        return f"which process {int(number)} on {host} writes to"
    except (OSError, ValueError):  # it has just begun, or has just ended
        return "which another process writes to"
