"""The log: what is written is read, torn records are cut off, damage is refused."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings

import pytest

from gradientless.errors import UserError
from gradientless.search.trajectory import MAGIC, Trajectory

PAYLOADS = [b"first", b"", b"", b"ab", b"cd", b"ef", b"g" * 40, b"h" * 40, b"\x00" * 5, b"last!"]
HEADER = {"optimizer": "GLD", "seed": 3, "base": "ü"}


def written(path, payloads=PAYLOADS) -> list[int]:
    """A log of `payloads`; the file's size after the header and after each record."""
    log = Trajectory(path, HEADER)
    sizes = [path.stat().st_size]
    for payload in payloads:
        log.append(payload)
        sizes.append(path.stat().st_size)
    log.close()
    return sizes


def opened(path) -> Trajectory:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Trajectory.open(path)


def test_round_trip(tmp_path):
    path = tmp_path / "log"
    log = Trajectory(path, HEADER)
    for payload in PAYLOADS:
        log.append(payload)
    assert list(log) == PAYLOADS and len(log) == len(PAYLOADS)
    log.sync()
    log.close()
    again = opened(path)
    assert again.header == HEADER
    assert len(again) == len(PAYLOADS)
    assert list(again) == PAYLOADS
    assert [again[i] for i in range(len(PAYLOADS))] == PAYLOADS
    assert again[-1] == PAYLOADS[-1]
    again.close()


def test_goes_on_after_it_was_opened_to_the_same_bytes(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    written(straight)
    for stop in range(len(PAYLOADS) + 1):
        stopped.unlink(missing_ok=True)
        written(stopped, PAYLOADS[:stop])
        log = opened(stopped)
        for payload in PAYLOADS[stop:]:
            log.append(payload)
        log.close()
        assert stopped.read_bytes() == straight.read_bytes()


def test_a_record_of_the_length_before_costs_one_byte_more_than_its_payload(tmp_path):
    sizes = written(tmp_path / "log", [b"12345"] * 6 + [b"1"] + [b"2"] * 3)
    lengths = [b - a for a, b in itertools.pairwise(sizes)]
    assert lengths == [5 + 5] + [5 + 1] * 5 + [1 + 5] + [1 + 1] * 3


def test_a_file_cut_at_every_byte(tmp_path):
    path, cut = tmp_path / "log", tmp_path / "cut"
    sizes = written(path)
    data = path.read_bytes()
    assert len(data) == sizes[-1]
    for length in range(sizes[0], len(data) + 1):
        cut.write_bytes(data[:length])
        whole = sum(size <= length for size in sizes) - 1
        if length in sizes:
            log = opened(cut)
        else:
            with pytest.warns(UserWarning, match=f"the torn record of step {whole} was cut off"):
                log = Trajectory.open(cut)
        assert list(log) == PAYLOADS[:whole]
        for payload in PAYLOADS[whole:]:
            log.append(payload)
        log.close()
        assert cut.read_bytes() == data


def test_damage_in_the_middle_is_refused(tmp_path):
    path, damaged = tmp_path / "log", tmp_path / "damaged"
    payloads = [bytes([i] * 8) for i in range(6)]
    sizes = written(path, payloads)
    data = path.read_bytes()
    refused = 0
    for position in range(sizes[1] + 1, sizes[-2]):  # every byte but those of the first and the last record
        for flip in (0x01, 0x40):
            changed = bytearray(data)
            changed[position] ^= flip
            damaged.write_bytes(changed)
            with pytest.raises(UserError, match=r"trajectory: .*damaged is damaged at step \d; its check sum differs"):
                Trajectory.open(damaged)
            refused += 1
    assert refused > 60


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "log"
    for content in (b"", b"hello\nworld\n", MAGIC, MAGIC[:-3], b"\x89PNG" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"log must begin with 'gradientless trajectory 1', got another file"):
            Trajectory.open(path)
        assert path.read_bytes() == content
    path.write_bytes(MAGIC + b"{not json\n")
    with pytest.raises(UserError, match="must have a header of JSON, got a damaged line 2"):
        Trajectory.open(path)
    with pytest.raises(UserError, match=r"trajectory: .*absent must be readable, got: No such file"):
        Trajectory.open(tmp_path / "absent")


def test_a_new_log_overwrites_nothing(tmp_path):
    path = tmp_path / "log"
    written(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"trajectory: .*log must be a new file, got: File exists"):
        Trajectory(path, HEADER)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="must be a new file, got: No such file"):
        Trajectory(tmp_path / "no" / "log", HEADER)


@pytest.mark.parametrize("reopen", [False, True])
def test_truncate(tmp_path, reopen):
    straight = tmp_path / "straight"
    sizes = written(straight)
    for steps in range(len(PAYLOADS) + 2):
        path = tmp_path / f"log{steps}"
        log = Trajectory(path, HEADER)
        for payload in PAYLOADS:
            log.append(payload)
        if reopen:
            log.close()
            log = opened(path)
        log.truncate(steps)
        kept = min(steps, len(PAYLOADS))
        assert len(log) == kept and list(log) == PAYLOADS[:kept]
        assert path.stat().st_size == sizes[kept]
        for payload in PAYLOADS[kept:]:
            log.append(payload)
        log.close()
        assert path.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("torn", [b"", b"\x80", b"\x01\x05\x00"])
def test_reading_leaves_the_file_as_it_is(tmp_path, torn):
    path = tmp_path / "log"
    written(path)
    path.write_bytes(path.read_bytes() + torn)
    path.chmod(0o444)
    data, changed = path.read_bytes(), path.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = Trajectory.read(path)
    assert list(log) == PAYLOADS and log.header == HEADER and log[3] == PAYLOADS[3]
    assert path.read_bytes() == data and path.stat().st_mtime_ns == changed
    log.close()
    path.chmod(0o644)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trajectory.open(path).close()
    assert path.read_bytes() == data[: len(data) - len(torn)]


def test_an_open_log_takes_few_bytes_a_step(tmp_path):
    log = Trajectory(tmp_path / "log", {})
    steps = 20_000
    tracemalloc.start()
    try:
        for step in range(steps):
            log.append(step.to_bytes(7, "little"))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        log.close()
    assert held / steps < 16
    assert [int.from_bytes(each, "little") for each in Trajectory.read(log.path)] == list(range(steps))
