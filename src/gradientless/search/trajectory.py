"""The append-only log of what a run measured: with the configuration, all that is needed to make its weights again.

File: the line `gradientless trajectory 1`, a line of JSON (what the run was: configuration, base checksum; and "check",
a check sum of the rest of the line, which earlier logs have not), then one record a step:

    tag      1 byte: low 7 bits a check sum chained over all records; high bit set when the length is the one before
    length   3 bytes, little-endian, and 1 byte of its own check sum; only when the high bit is clear
    payload  the answers in the order in which they were given

A record is one write, so a killed process leaves whole records and at most one torn one, which reading drops with a
word. Damage anywhere else is an error, never a guess.
"""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gradientless.errors import UserError
from gradientless.schema import COUNT, POSITIVE, Maybe, fits
from gradientless.writing import open_alone, write_atomically

MAGIC = b"gradientless trajectory 1\n"
HEADER = {  # what of a header is read here and by the optimizers; early logs lack one thing or another
    "version": Maybe(POSITIVE),
    "first_step": Maybe(COUNT),
    "start": Maybe(str),
    "evaluator": Maybe(str),
    "fused": Maybe(bool),
    "undecayed": Maybe([str]),
}
_LENGTH = 4  # bytes of a length and its check sum


def _length_bytes(length: int) -> bytes:
    if length >= 1 << 24:
        raise UserError(f"trajectory: a record must be shorter than 16 MiB, got {length} bytes")
    stated = length.to_bytes(_LENGTH - 1, "little")
    return stated + bytes([zlib.crc32(stated) & 0xFF])


def _header_check(header: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"


class Trajectory:
    """Records of one run, appended to `path` and read from it.

    `Trajectory(path, header)` starts a new file (refuses an existing one); `Trajectory.open(path)` reads one and goes
    on after its last whole record.
    """

    _file: io.FileIO | None = None

    def __init__(self, path: str | Path, header: dict[str, Any]):
        self.path = Path(path)
        self._forget()
        try:
            if self.path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._begin(header)
        except OSError as error:
            raise UserError(f"trajectory: {self.path} must be a new file, got: {error.strerror}") from None

    def _forget(self) -> None:
        """Know no record. A run may have millions of them, each smaller than Python's integers."""
        self._ends = array("Q")  # file offset after each record
        self._checks = array("I")  # check sum of all records up to each
        self._check = self._length = 0

    def _begin(self, header: dict[str, Any]) -> None:
        head = MAGIC + json.dumps({**header, "check": _header_check(header)}, sort_keys=True).encode() + b"\n"
        write_atomically(self.path, head)  # a process killed here must not leave half a header
        self.header, self._start = header, len(head)

    @classmethod
    def open(cls, path: str | Path) -> Trajectory:
        """Go on with an existing log; a torn last record is cut off with a warning."""
        self = cls.read(path)
        self._writable()
        return self

    @classmethod
    def read(cls, path: str | Path) -> Trajectory:
        """Read an existing log and leave the file as it is; a torn last record is left out with a warning."""
        self = cls.__new__(cls)
        self.path = Path(path)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"trajectory: {path} must be readable, got: {error.strerror}") from None
        end = data.find(b"\n", len(MAGIC))
        if not data.startswith(MAGIC) or end < 0:
            raise UserError(f"trajectory: {path} must begin with '{MAGIC.decode().strip()}', got another file")
        try:
            self.header = dict(json.loads(data[len(MAGIC) : end]))
            if self.header.pop("check", None) not in (None, _header_check(self.header)):
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"trajectory: {path} must have a header of JSON, got a damaged line 2") from None
        fits(f"trajectory: the header of {path}", self.header, HEADER)
        self._start = end + 1
        self._forget()
        position = self._start
        while position < len(data):
            after = self._parse(data, position)
            if after is None:
                if self._is_whole_elsewhere(data, position):
                    raise UserError(f"trajectory: {path} is damaged at step {len(self._ends)}; its check sum differs")
                warnings.warn(
                    f"trajectory: {path}: the torn record of step {len(self._ends)} was cut off", stacklevel=2
                )
                break
            position = after
        return self

    def _writable(self) -> io.FileIO:
        """The file, behind its last whole record."""
        if self._file is None:
            try:
                self._file = open_alone(self.path)  # which lives as long as the run
            except OSError as error:
                raise UserError(f"trajectory: {self.path} must be writable, got: {error.strerror}") from None
            self._file.truncate(self._end)
            self._file.seek(self._end)
        return self._file

    @property
    def _end(self) -> int:
        """Where the last whole record ends."""
        return self._ends[-1] if self._ends else self._start

    def _frame(self, data: bytes, position: int) -> tuple[int, int, int] | None:
        """(tag, payload start, payload length) of the record at `position`; None when the file ends within it. A length
        of -1 is one whose own check sum is wrong."""
        tag = data[position]
        start = position + 1
        length = self._length
        if not tag & 0x80:
            stated = data[start : start + _LENGTH]
            start += _LENGTH
            if len(stated) < _LENGTH:
                return None
            length = int.from_bytes(stated[:-1], "little")
            if stated != _length_bytes(length):  # it is all there and wrong: damaged, not torn
                return (tag, start, -1)
        return (tag, start, length) if start + length <= len(data) else None

    def _parse(self, data: bytes, position: int) -> int | None:
        frame = self._frame(data, position)
        if frame is None:
            return None
        tag, start, length = frame
        if length < 0:
            return None
        check = zlib.crc32(data[start : start + length], self._check)
        if check & 0x7F != tag & 0x7F:
            return None
        self._check, self._length = check, length
        self._ends.append(start + length)
        self._checks.append(check)
        return start + length

    def _is_whole_elsewhere(self, data: bytes, position: int) -> bool:
        """Whether the record at `position` is not the file's last one: then it is damaged, not torn."""
        frame = self._frame(data, position)
        return frame is not None and (frame[2] < 0 or frame[1] + frame[2] < len(data))

    def __len__(self) -> int:
        """Whole records, that is, steps."""
        return len(self._ends)

    def check(self, steps: int) -> str:
        """A check sum over the records of the first `steps` steps."""
        whole = min(steps, len(self))
        return f"{self._checks[whole - 1] if whole else 0:08x}"

    def append(self, payload: bytes) -> None:
        """Add the record of the next step, in one write."""
        self._check = zlib.crc32(payload, self._check)
        tag = self._check & 0x7F
        if self._ends and len(payload) == self._length:
            frame = bytes([tag | 0x80]) + payload
        else:
            frame = bytes([tag]) + _length_bytes(len(payload)) + payload
        self._length = len(payload)
        self._writable().write(frame)
        self._ends.append(self._end + len(frame))
        self._checks.append(self._check)

    def __getitem__(self, step: int) -> bytes:
        """The payload of record `step`."""
        with open(self.path, "rb") as file:
            return self._payload(file, range(len(self))[step])

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            for step in range(len(self)):
                yield self._payload(file, step)

    def _payload(self, file: BinaryIO, step: int) -> bytes:
        begin = self._ends[step - 1] if step else self._start
        file.seek(begin)
        frame = file.read(self._ends[step] - begin)
        return frame[1:] if frame[0] & 0x80 else frame[1 + _LENGTH :]

    def truncate(self, steps: int) -> None:
        """Forget all records after the first `steps`."""
        if steps >= len(self._ends):
            return
        self._length = len(self[steps - 1]) if steps else 0
        del self._ends[steps:], self._checks[steps:]
        self._check = self._checks[-1] if steps else 0
        self._writable().truncate(self._end)
        self._writable().seek(self._end)

    def restate(self, header: dict[str, Any]) -> None:
        """Begin again with another header, while there is no record."""
        assert not self._ends
        self.close()
        self._begin(header)

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        os.fsync(self._writable().fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Record:
    """The numbers of a step, read from its payload in the order in which they were written.

    Raises UserError where it is shorter or longer than what is read."""

    def __init__(self, payload: bytes):
        self._payload, self._at = payload, 0

    def take(self, count: int) -> bytes:
        taken = self._payload[self._at : self._at + count]
        if len(taken) < count:
            raise UserError("replay: a record must hold what the optimizer asks for, got a shorter one; other options?")
        self._at += count
        return taken

    def bytes(self, count: int, below: int = 256) -> list[int]:
        return _chosen(list(self.take(count)), below)

    def floats(self, count: int) -> list[float]:
        return list(struct.unpack(f"<{count}f", self.take(4 * count)))

    def doubles(self, count: int) -> list[float]:
        return list(struct.unpack(f"<{count}d", self.take(8 * count)))

    def uint16(self, count: int, below: int = 1 << 16) -> list[int]:
        return _chosen(list(struct.unpack(f"<{count}H", self.take(2 * count))), below)

    def positions(self, count: int, size: int) -> Tensor:
        """So many of `size` entries: int64, sorted, none twice."""
        found = torch.frombuffer(bytearray(self.take(8 * count)), dtype=torch.int64).clone()
        if count and (int(found[0]) < 0 or int(found[-1]) >= size or bool((found.diff() < 1).any())):
            raise UserError(f"replay: a record must select entries below {size}, in their order, got others")
        return found

    def uint32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def left(self) -> bool:
        return self._at < len(self._payload)

    def end(self) -> None:
        if self._at != len(self._payload):
            raise UserError("replay: a record must hold what the optimizer asks for, got a longer one; other options?")


def _chosen(found: list[int], below: int) -> list[int]:
    """`found`, in which each is one of so many, and none stands twice."""
    if max(found, default=0) >= below:
        raise UserError(f"replay: a record must name candidates below {below}, got {max(found)}; other options?")
    if len(set(found)) < len(found):
        raise UserError("replay: a record must name each candidate once, got one twice; other options?")
    return found
