"""Learning rates as a log holds them: bit for bit, in a byte or two a step while a schedule moves them smoothly.

Each rate is predicted from those before it, and what is written is how far its bit pattern, read as an integer, lies
from the prediction's. Several predictions are made, and the one counts that would have been best of late: the reader,
who has the same rates before him, takes the same. Equal rates of several groups are written once.

A step's numbers, in base 128 with the lowest digits first and a high bit on all but the last:

    0                 every rate is as predicted
    1, n              a new beginning: n rates as doubles follow
    2 + d, d, …       the distances of the distinct rates; 2d for d >= 0, -2d - 1 below, so that small ones are short
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradientless.errors import UserError

_SAME, _ANEW = 0, 1
_FITS = (  # weights of the rates before, newest first, and what they are divided by
    ((1,), 1),  # the last rate again
    ((2, -1), 1),  # a line
    ((4, -6, 4, -1), 1),  # a cubic
    ((30, -10, -15, -5, 6, 10, 5, -5, -10, 6), 12),  # the quartic nearest to ten: it passes on less of their rounding
)
_REACH = 10  # rates that the longest of them needs
_FORGETS = 0.75  # how much of a prediction's cost so far still counts in the next step
_NEAR = 1 << 14  # distances below it are expected to come again


class Rates:
    """The rates of the groups so far, for writing the next and for reading it.

    state: what `state()` gave, to go on from there.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self._of: list[int] = list(state["of"]) if state else []  # of each group, which distinct rate it has
        self._columns = [_Column(**column) for column in state["columns"]] if state else []

    def state(self) -> dict[str, Any]:
        """JSON-able data; empty before the first step."""
        return {"of": list(self._of), "columns": [vars(column).copy() for column in self._columns]} if self._of else {}

    def write(self, rates: Sequence[float]) -> bytes:
        """The bytes of the next step, whose groups have `rates`."""
        distinct = list(dict.fromkeys(_bits(rate) for rate in rates))
        if [distinct.index(_bits(rate)) for rate in rates] != self._of:
            self._begin(rates)
            return _number(_ANEW) + _number(len(rates)) + struct.pack(f"<{len(rates)}d", *rates)
        written = bytearray()
        distances = [_zigzag(rate - column.expected()) for column, rate in zip(self._columns, distinct, strict=True)]
        same = not any(distances)
        for i, (column, distance, rate) in enumerate(zip(self._columns, distances, distinct, strict=True)):
            shift = 2 if i == 0 and not same else 0
            if i == 0 or not same:
                written += _number(distance + shift, column.near)
            column.advance(rate, distance)
        return bytes(written)

    def read(self, take: Callable[[int], bytes]) -> list[float]:
        """The rates of the next step. take: gives the next so many bytes."""
        first = _read_number(take)
        if first == _ANEW:
            count = _read_number(take)
            self._begin(struct.unpack(f"<{count}d", take(8 * count)))
        elif not self._of:
            raise UserError("replay: rates must be read from a log's first step on, or from a state saved with it")
        else:
            for i, column in enumerate(self._columns):
                distance = 0 if first == _SAME else first - 2 if i == 0 else _read_number(take)
                column.advance((column.expected() + _unzigzag(distance)) % (1 << 64), distance)
        rates = [_rate(column.bits[0]) for column in self._columns]
        return [rates[i] for i in self._of]

    def _begin(self, rates: Sequence[float]) -> None:
        distinct = list(dict.fromkeys(_bits(rate) for rate in rates))
        self._of = [distinct.index(_bits(rate)) for rate in rates]
        self._columns = [_Column([bits] * _REACH) for bits in distinct]


class _Column:
    """One distinct rate: the bit patterns of its last values, newest first, and how each prediction has done.

    near: a distance that was written lately, decaying: shorter ones are written as long as it, for a record of another
    length than the last is dearer than a few longer ones.
    """

    def __init__(self, bits: list[int], costs: list[float] | None = None, near: int = 0):
        self.bits, self.near = list(bits), near
        self.costs = [0.0] * (len(_FITS) + 1) if costs is None else list(costs)

    def _predictions(self) -> list[int]:
        past = [_rate(bits) for bits in self.bits]
        found = []
        for weights, divisor in _FITS:
            total = 0.0
            for weight, rate in zip(weights, past, strict=False):
                total += weight * rate  # one by one: how the built-in sum rounds depends on Python's version
            found.append(total / divisor)
        found.append(past[0] * (past[0] / past[1]) if past[1] else past[0])  # a constant factor
        return [_bits(value if 0 <= value < math.inf else past[0]) for value in found]

    def expected(self) -> int:
        return self._predictions()[min(range(len(self.costs)), key=self.costs.__getitem__)]

    def advance(self, bits: int, distance: int) -> None:
        """Take up the rate that came, `distance` (as written) from the expected one."""
        predictions = self._predictions()
        self.costs = [
            _FORGETS * cost + abs(bits - each).bit_length() for cost, each in zip(self.costs, predictions, strict=True)
        ]
        self.bits = [bits, *self.bits[:-1]]
        self.near = max(distance + 2 if distance < _NEAR else 0, self.near * 7 // 8)


def _bits(rate: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", rate))[0])


def _rate(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def _zigzag(distance: int) -> int:
    return 2 * distance if distance >= 0 else -2 * distance - 1


def _unzigzag(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number + 1) // 2


def _number(value: int, like: int = 0) -> bytes:
    """`value` in base 128, with as many digits as `like` has at the least."""
    digits = max(1, -(-max(value, like).bit_length() // 7))
    return bytes((value >> 7 * i & 0x7F) | 0x80 * (i < digits - 1) for i in range(digits))


def _read_number(take: Callable[[int], bytes]) -> int:
    value, shift = 0, 0
    while True:
        (digit,) = take(1)
        value |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return value
