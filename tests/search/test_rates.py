"""Learning rates in a log: bit for bit, and in how many bytes."""

from __future__ import annotations

import math
import struct

import pytest

from gradientless.errors import UserError
from gradientless.search.rates import Rates
from gradientless.search.trajectory import Trajectory

STEPS, WARMUP = 20_000, 500


def warmed(t: int, after: float) -> float:
    return t / WARMUP if t < WARMUP else after


def progress(t: int) -> float:
    return (t - WARMUP) / (STEPS - WARMUP)


SCHEDULES = {  # as `transformers` computes them
    "linear": lambda t: warmed(t, 1 - progress(t)),
    "cosine": lambda t: warmed(t, max(0.0, 0.5 * (1 + math.cos(math.pi * progress(t))))),
    "exponential": lambda t: 0.9995**t,
    "constant": lambda t: 1.0,
}


def bits(rates) -> bytes:
    return struct.pack(f"<{len(rates)}d", *rates)


class Bytes:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_20_000_steps_of_a_schedule_are_logged_in_200_kb(schedule, tmp_path):
    """Beside two losses a step, and a header of 500 bytes."""
    log, rates = Trajectory(tmp_path / "log", {"header": "x" * 500}), Rates()
    given = [2e-5 * SCHEDULES[schedule](t) for t in range(STEPS)]
    for rate in given:
        log.append(rates.write([rate]) + bytes(8))
    log.close()
    assert (tmp_path / "log").stat().st_size <= 200 * 1024
    reader = Rates()
    assert all(bits(reader.read(Bytes(record).take)) == bits([rate]) for record, rate in zip(log, given, strict=True))


def test_any_rates_come_back_to_the_bit():
    """Of groups that part and meet, with leaps, zeros and numbers that no schedule should give."""
    given = [
        [1e-3, 1e-3, 5e-4], [1e-3, 1e-3, 5e-4], [9e-4, 9e-4, 4.5e-4], [8e-4, 8e-4, 4e-4], [8e-4, 7e-4, 4e-4],
        [0.0, 0.0, 0.0], [-0.0, 0.0, 1e308], [1e-320, math.inf, 1e308], [1e-320, math.inf, 1e308],
        [math.nan, -1.0, 2.0], [math.nan, -1.0, 2.0], [1e-3, 2e-3, 3e-3], [1e-3, 2e-3, 3e-3], [1.1e-3, 2e-3, 3e-3],
        [1e-3], [1e-3, 2e-3],
    ]  # fmt: skip
    writer, reader = Rates(), Rates()
    for t, rates in enumerate(given):
        record = Bytes(writer.write(rates))
        assert bits(reader.read(record.take)) == bits(rates), t
        assert record.at == len(record.data)
        assert reader.state() == writer.state() or t in (9, 10)  # not a number: unequal to itself
        writer = Rates(writer.state())  # a run that is resumed after each step
    assert len(writer.write([1e-3, 2e-3])) == 1


def test_rates_are_not_read_from_the_middle():
    writer = Rates()
    writer.write([1e-3])
    with pytest.raises(UserError, match="replay: rates must be read from a log's first step on, or from a state saved"):
        Rates().read(Bytes(writer.write([1e-3])).take)
