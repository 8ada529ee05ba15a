"""The command line in forked processes, in which something happens to the n-th operation on files.

What is imported and compiled is the parent's, so that a process takes a fraction of a second. Files are opened for
writing by `_pyio`, which is Python's `io` in Python: so each write to a disk is a call of `os.write`, and stands for
two moments, before it and with half of it done. Writes within compiled libraries are not seen, save those of
safetensors, which are made here as the library makes them.
"""

from __future__ import annotations

import _pyio
import builtins
import contextlib
import errno
import io
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "chmod", "utime")
NAMES += ("truncate", "ftruncate", "fsync")
FREE = ("unlink", "remove", "rmdir", "rename", "replace", "truncate", "ftruncate", "chmod", "utime", "fsync")
"""What a full disk still does."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halt() -> None:
    """Until the parent says SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass
class Watch:
    """at: the moment, from 1 on, at which `happens` is called, or from which on `number` is what operations fail
    with; `once`: that one alone."""

    at: int = 0
    happens: Callable[[], object] | None = None
    number: int = 0
    once: bool = False
    count: int = 0

    def moment(self, name: str, path: Any) -> None:
        self.count += 1
        due = self.count == self.at if self.once or self.number == 0 else self.count >= self.at > 0
        if not due:
            return
        if self.happens is not None:
            self.happens()
        if self.number and not (self.number == errno.ENOSPC and name in FREE):
            told = (path,) if isinstance(path, (str, bytes, os.PathLike)) else ()
            raise OSError(self.number, os.strerror(self.number), *told)

    def install(self) -> None:
        """In this process, for good."""
        import safetensors
        import safetensors.torch

        own = {name: getattr(os, name) for name in (*NAMES, "open", "write", "sendfile")}
        put: dict[str, Callable[..., Any]] = {}

        def watched(name: str) -> Callable[..., Any]:
            def operation(path: Any, *arguments: Any, **options: Any) -> Any:
                self.moment(name, path)
                return own[name](path, *arguments, **options)

            return operation

        put.update({name: watched(name) for name in NAMES})

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith("/dev/"):
                self.moment("open", path)
            return int(own["open"](path, flags, *arguments, **options))

        def written(handle: int, data: Any) -> int:
            if handle in (1, 2):
                return int(own["write"](handle, data))
            self.moment("write", handle)
            done = own["write"](handle, bytes(data)[: len(data) // 2]) if len(data) > 1 else 0
            self.moment("write", handle)
            return int(done + own["write"](handle, bytes(data)[done:]))

        def sent(out: int, source: int, offset: int, count: int, *more: Any) -> int:
            data = os.pread(source, min(count, 1 << 20), offset)
            return written(out, data) if data else 0

        put.update(open=opened, write=written, sendfile=sent)
        for name, function in put.items():
            setattr(os, name, function)
        reading = io.open

        def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            asked = "r" if not isinstance(mode, str) else mode
            return (_pyio.open if set(asked) & set("wax+") else reading)(file, mode, *arguments, **options)

        builtins.open = io.open = open_file  # type: ignore[assignment]
        accessor = getattr(pathlib, "_NormalAccessor", None)  # of Python 3.10, which took them when it was imported
        for name, function in {**put, "open": open_file}.items():
            if accessor is not None and hasattr(accessor, name):
                setattr(accessor, name, staticmethod(function))

        def serialised(tensors: Any, filename: Any, metadata: Any = None) -> None:
            try:
                temporary = Path(filename).with_name(".tmp-safetensors")
                with open(temporary, "wb") as file:
                    file.write(safetensors.serialize(tensors, metadata))
                os.replace(temporary, filename)
            except OSError as error:
                told = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(told) from None

        safetensors.torch.serialize_file = serialised


@dataclass(frozen=True)
class Ended:
    """code: the exit code, or minus the signal that ended it. told: what it said."""

    code: int
    told: str

    @property
    def lines(self) -> list[str]:
        return self.told.rstrip("\n").split("\n")


@dataclass(frozen=True)
class Begun:
    """A process; what it says comes through a pipe, which no full disk and no limit of a file's size stops."""

    number: int
    pipe: int

    def halted(self) -> bool:
        """Whether it halts, rather than ends. Waits for either."""
        _, status = os.waitpid(self.number, os.WUNTRACED)
        return os.WIFSTOPPED(status)

    def end(self) -> Ended:
        with open(self.pipe, "rb") as said:
            told = said.read()
        _, status = os.waitpid(self.number, 0)
        return Ended(os.waitstatus_to_exitcode(status), told.decode("utf-8", "replace"))


def start(arguments: Sequence[str], watch: Watch | None = None, *then: Sequence[str]) -> Begun:
    """A process that runs the command line, and those after it while they end well; it ends with its exit code, or
    with 70 and a traceback. At the end of a good one that is watched stands how many moments there were."""
    sys.stdout.flush()
    sys.stderr.flush()
    reads, writes = os.pipe()
    process = os.fork()
    if process:
        os.close(writes)
        return Begun(process, reads)
    code = 70
    try:
        os.close(reads)
        os.dup2(writes, 1)
        os.dup2(writes, 2)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        if watch is not None:
            watch.install()
        code = _ran((arguments, *then))
        if watch is not None and not code:
            print(f"moments {watch.count}")
    except BaseException:  # noqa: BLE001 - whatever it is, this is no place to go on in
        code = 70
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ran(commands: Sequence[Sequence[str]]) -> int:
    from gradientless import cli

    for each in commands:
        try:
            cli.main(each)
        except SystemExit as ended:
            if ended.code:
                return ended.code if isinstance(ended.code, int) else 1
    return 0


def run(arguments: Sequence[str], watch: Watch | None = None, *then: Sequence[str]) -> Ended:
    return start(arguments, watch, *then).end()
