"""The noise function: published vectors, equal bits on every backend, statistics, selections."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from cases import NOISES
from gradientless.errors import UserError
from gradientless.search import selection
from gradientless.search.noise import BACKENDS, Noise, cpu, reference
from gradientless.search.selection import largest, selected
from reference import noise as written

DISTRIBUTIONS = tuple(reference.STREAMS)  # of single entries; "sphere" is Gaussian ones, scaled by `Space`
VECTORS = [  # Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
FAR = {"gaussian": 2**34 + 3, "near_normal": 2**34 + 2, "rademacher": 2**39 + 77}  # counter words above 2^32
LARGEST = math.sqrt(48 * math.log(2))


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    c, k = words_of(counter), words_of(key)
    found = reference.philox((k[0], k[1]), tuple(torch.tensor([word]) for word in c))
    assert found.tolist() == [words_of(expected)]
    compiled = cpu._philox(*(np.uint32(word) for word in (*k, *c)))
    assert [int(word) for word in compiled] == words_of(expected)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 517), (1, 3), (126, 4), (3, 1000), (129, 255)])
def test_backends_agree_bit_for_bit_and_with_the_specification(kind, start, count):
    compiled, readable = Noise(9, kind, "numba"), Noise(9, kind, "torch")
    a, b = (n.fill("layer.weight", 12, 3, start, count) for n in (compiled, readable))
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, b)
    expected = written.NOISE[kind](start + count, 9, "layer.weight", 12, 3)[start:]
    if kind == "rademacher":
        assert a.tolist() == expected.tolist()
    else:
        np.testing.assert_allclose(a.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_gather_and_rows_are_fill(kind):
    index = torch.tensor([0, 3, 4, 5, 127, 128, 129, 640, 999])
    for backend in ("numba", "torch"):
        noise = Noise(1, kind, backend)
        whole = torch.stack([noise.fill("w", 7, draw, 0, 1000) for draw in (0, 2, 5)])
        assert torch.equal(noise.gather("w", 7, [0, 2, 5], index), whole[:, index])
        assert torch.equal(noise.gather("w", 7, [0], index.flip(0)), whole[:1, index.flip(0)])
        assert torch.equal(noise.rows("w", 7, [0, 2, 5], 1000), whole)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_runs_in_torch_are_the_values_one_by_one(kind, monkeypatch):
    monkeypatch.setattr("gradientless.search.noise._CHUNK", 300)
    monkeypatch.setattr("gradientless.search.noise._GATHERED", 70)
    for start, count in ((0, 1), (5, 2), (127, 700), (2**32 - 3, 1030)):
        index = torch.arange(start, start + count)
        expected = reference.values(kind, 3, "w", 2, 1, index)
        noise = Noise(3, kind, "torch")
        assert torch.equal(noise.fill("w", 2, 1, start, count), expected)
        assert torch.equal(noise.gather("w", 2, [1, 0], index)[0], expected)
        bits = noise.rounding("w", 2, 1, start, count, index.device)
        assert torch.equal(bits, reference.rounding(3, "w", 2, 1, index)) and bits.dtype == torch.int32


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_elements_beyond_32_bits(kind):
    start = FAR[kind]
    compiled, readable = Noise(3, kind, "numba"), Noise(3, kind, "torch")
    values = compiled.fill("w", 1, 0, start, 300)
    assert torch.equal(values, readable.fill("w", 1, 0, start, 300))
    index = torch.arange(start, start + 300)
    assert torch.equal(compiled.gather("w", 1, [0], index)[0], values)
    assert torch.equal(readable.gather("w", 1, [0], index)[0], values)
    assert not torch.equal(values, compiled.fill("w", 1, 0, start % 128, 300))
    # by hand: the counter has the high bits of the block in its second word, beside the stream
    group = 128 if kind == "rademacher" else 4
    block = start // group
    stream = {"rademacher": 0, "gaussian": 1, "near_normal": 2}[kind]
    assert block >> 32 == 1
    counter = np.array([block & 0xFFFFFFFF, (stream << 24) | 1, 1, 0], dtype=np.uint64)
    out = [int(word) for word in written.philox4x32_10(counter, written.key_of(3, "w"))]
    place = start % group
    if kind == "rademacher":
        expected = 1 - 2 * ((out[place // 32] >> (place % 32)) & 1)
    elif kind == "near_normal":
        expected = (bin(out[place]).count("1") - 16) / math.sqrt(8)
    else:
        radius = math.sqrt(-2 * math.log(((out[2] >> 8) + 1) * 2.0**-24))
        expected = radius * math.sin(2 * math.pi * (out[3] >> 8) * 2.0**-24)
    assert values[0].item() == pytest.approx(expected, abs=1e-6)


def test_steps_beyond_32_bits_agree():
    for step in (2**31 + 1, 2**32 - 1):
        a, b = (Noise(0, "gaussian", backend).fill("w", step, 1, 0, 9) for backend in ("numba", "torch"))
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_large_tensors_take_the_parallel_path_to_the_same_bits(kind, monkeypatch):
    """And torch keeps its number of threads, which numba's start would change."""
    ran = []
    inner = cpu._fill_parallel
    monkeypatch.setattr(cpu, "_fill_parallel", lambda *args: ran.append(1) or inner(*args))
    count, threads = cpu._PARALLEL_FROM + 133, numba.config.NUMBA_NUM_THREADS + 1
    noise = Noise(5, kind, "numba")
    serial = noise.fill("w", 4, 1, 3, count)
    assert not ran and torch.get_num_threads() == 1
    try:
        torch.set_num_threads(threads)
        whole, rows = noise.fill("w", 4, 1, 3, count), noise.rows("w", 4, [1, 6], count)
        assert len(ran) == 3 and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    noise.fill("w", 4, 1, 3, count)
    assert len(ran) == 3 and torch.get_num_threads() == 1
    pieces = [noise.fill("w", 4, 1, 3 + at, min(9_999, count - at)) for at in range(0, count, 9_999)]
    assert torch.equal(whole, serial) and torch.equal(whole, torch.cat(pieces))
    assert torch.equal(whole, Noise(5, kind, "torch").fill("w", 4, 1, 3, count))
    assert torch.equal(rows[0, 3:], whole[:-3])
    assert torch.equal(rows[1], noise.fill("w", 4, 6, 0, count))


@pytest.mark.parametrize("kind", ["gaussian", "near_normal"])
def test_whole_groups_are_filled_side_by_side(kind, monkeypatch):
    """Group by group, which no vector instruction does, only at the edges."""
    alone, inner = [], cpu._fill_group
    monkeypatch.setattr(cpu, "_fill_group", lambda *args: alone.append(args[-1]) or inner(*args))
    out = np.empty(2_101, np.float32)
    keys = map(np.uint32, reference.key_of(5, "w"))
    cpu._fill_serial.py_func(reference.STREAMS[kind], *keys, 4, 1, 3, out, 0, 526)
    assert alone == [0]
    assert torch.equal(torch.from_numpy(out), Noise(5, kind, "torch").fill("w", 4, 1, 3, 2_101))


def within_five_sigma(samples: np.ndarray, expected: float) -> bool:
    spread = samples.std() / math.sqrt(samples.size)
    return abs(samples.mean() - expected) <= 5 * max(spread, 1e-9)


N = 200_000


def sample(kind: str, seed: int = 0, name: str = "w", step: int = 0, draw: int = 0, count: int = N) -> np.ndarray:
    return Noise(seed, kind).fill(name, step, draw, 0, count).double().numpy()


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_moments(kind):
    z = sample(kind, seed=42, step=17, draw=2)
    fourth = {"gaussian": 3.0, "rademacher": 1.0, "near_normal": 3 - 2 / 32}[kind]
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, fourth)):
        assert within_five_sigma(z**power, expected), power
    if kind == "gaussian":
        assert np.abs(z).max() <= LARGEST + 1e-6
        for level, share in ((1.0, 0.682689492), (2.0, 0.954499736), (3.0, 0.997300204)):
            assert within_five_sigma((np.abs(z) < level).astype(float), share)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_neighbours_are_uncorrelated(kind):
    z = sample(kind)
    others = {f"step {t}": sample(kind, step=t) for t in (1, 2, 3, 2**16, 2**31)}
    others |= {f"draw {k}": sample(kind, draw=k) for k in (1, 2, 3, 4, 255)}
    others |= {f"name {name}": sample(kind, name=name) for name in ("v", "w0", "W", "layer.0.w", "layer.1.w")}
    others |= {f"seed {seed}": sample(kind, seed=seed) for seed in (1, 2, 2**32, 2**64 - 1)}
    others |= {f"stream {k}": sample(k) for k in DISTRIBUTIONS if k != kind}
    for label, other in others.items():
        assert within_five_sigma(z * other, 0.0), label
        assert within_five_sigma((z**2 - 1) * (other**2 - 1), 0.0), label
    for (a, x), (b, y) in itertools.combinations(list(others.items())[:9], 2):
        assert within_five_sigma(x * y, 0.0), (a, b)
    for lag in (1, 2, 3, 4, 5, 31, 32, 64, 127, 128, 129, 512):
        assert within_five_sigma(z[lag:] * z[:-lag], 0.0), lag
        assert within_five_sigma((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1), 0.0), lag


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 1023, 1025])
def test_selection_is_distinct_sorted_and_as_written(backend, size):
    noise = Noise(42, backend=backend)
    for count in sorted({1, size // 2, size - 1, size}):
        for step in (0, 7):
            found = noise.select("w", step, size, count)
            assert found.dtype == torch.int64
            assert found.tolist() == sorted(set(found.tolist()))
            assert len(found) == count
            assert found.tolist() == written.select(count, size, 42, "w", step).tolist()


def test_selection_of_a_large_tensor_agrees_and_takes_time_for_the_selected_alone():
    for size in (2**20 + 1, 2**40 + 12345):
        a, b = (Noise(1, backend=backend).select("w", 3, size, 500) for backend in ("numba", "torch"))
        assert torch.equal(a, b)
        assert a.min() >= 0 and a.max() < size and a.unique().numel() == 500
    assert a.max() > 2**39


@pytest.mark.parametrize(("size", "count"), [(50, 10), (64, 3), (65, 40), (300, 7)])
def test_every_entry_is_selected_alike_often(size, count):
    steps = 3000
    noise = Noise(11)
    chosen = torch.stack([noise.select("w", step, size, count) for step in range(steps)])
    counts = torch.bincount(chosen.view(-1), minlength=size).double()
    share = count / size
    statistic = float(((counts - steps * share) ** 2).sum()) / (steps * share * (1 - share)) * (size - 1) / size
    assert abs(statistic - (size - 1)) < 5 * math.sqrt(2 * (size - 1))  # chi-square with size - 1 degrees
    together = torch.zeros(size, size, dtype=torch.double)
    member = torch.zeros(steps, size, dtype=torch.double).scatter_(1, chosen, 1.0)
    together = (member.t() @ member)[~torch.eye(size, dtype=torch.bool)]
    pair = share * (count - 1) / (size - 1)
    assert float((together - steps * pair).abs().max()) < 6 * math.sqrt(steps * pair) + 1
    overlap = (member[1:] * member[:-1]).sum(1)
    assert within_five_sigma(overlap.numpy(), count * share)  # neighbouring steps select independently


def test_names_and_seeds_select_differently():
    found = {tuple(Noise(s).select(name, 0, 1000, 20).tolist()) for s in (0, 1) for name in ("v", "w", "@pool")}
    assert len(found) == 6


def test_largest_takes_lower_positions_among_equals():
    assert largest([torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])], 3).between(0, 6).tolist() == [1, 2, 3]
    assert largest([torch.tensor([[0.0, 0.0], [0.0, 0.0]])], 3).between(0, 4).tolist() == [0, 1, 2]
    assert largest([torch.tensor([5.0, 1.0, 4.0])], 1).between(0, 3).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_largest_are_those_of_a_sort(dtype, absolute, monkeypatch):
    """Of several tensors, a window at a time, with equals everywhere; many by their digits, few by sorting."""
    monkeypatch.setattr(selection, "WINDOW", 64)
    monkeypatch.setattr(selection, "_READ", 64)
    made = torch.Generator().manual_seed(0)
    for size in (5, 64, 1000):
        scores = (10 ** torch.randn(size, generator=made) * torch.randn(size, generator=made).sign()).to(dtype)
        scores[torch.randint(size, (size // 2,), generator=made)] = -0.0
        flat = (scores.abs() if absolute else scores).double()
        order = sorted(range(size), key=lambda i, flat=flat: (-flat[i].item(), i))
        for count in sorted({1, size // 3, size // 2, size - 1, size}):
            found = largest([scores[: size // 3], scores[size // 3 :]], count, absolute)
            assert found.between(0, size).tolist() == sorted(order[:count])


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("count", [1, 30, 32, 500, 1000])
def test_a_selection_is_read_in_any_pieces(count, backend, monkeypatch):
    monkeypatch.setattr(selection, "WINDOW", 64)
    monkeypatch.setattr(selection, "_READ", 64)
    noise, size = Noise(2, backend=backend), 1000
    found, positions = noise.selected("w", 1, size, count), written.select(count, size, 2, "w", 1).tolist()
    assert found.bytes == (125 if count > 31 else 4 * count)
    assert selected(torch.tensor(positions), size, torch.device("cpu")).data.equal(found.data)
    for start, stop in ((0, size), (3, 4), (7, 700), (64, 128), (501, 999)):
        inside = [i for i in positions if start <= i < stop]
        assert found.between(start, stop).tolist() == inside
        for step in (1, 10, 64, 5000):
            wanted = [inside[at : at + step] for at in range(0, len(inside), step)]
            assert [piece.tolist() for piece in found.pieces(start, stop, step)] == wanted
    assert found.has(torch.arange(size)).nonzero().view(-1).tolist() == positions


def test_large_shares_are_not_sorted(monkeypatch):
    expected = written.select(100, 1000, 1, "w", 3).tolist()
    monkeypatch.setattr(cpu, "select", None)
    assert Noise(1).select("w", 3, 1000, 100).tolist() == expected


def test_global_random_state_is_untouched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 - the global state is the point
    for kind in DISTRIBUTIONS:
        for backend in ("numba", "torch"):
            noise = Noise(0, kind, backend)
            noise.fill("w", 0, 0, 0, 10), noise.gather("w", 0, [0], torch.arange(3)), noise.select("w", 0, 10, 3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002


@pytest.mark.parametrize("kind", sorted(NOISES))
def test_named_distributions_work(kind):
    for good in NOISES[kind].good:
        assert Noise(**good).fill("w", 0, 0, 0, 3).shape == (3,)
    for bad, message in NOISES[kind].bad:
        with pytest.raises(UserError, match=message):
            Noise(**bad)


def test_backend_must_fit_the_device():
    assert set(BACKENDS) == {"auto", "torch", "numba"}
    with pytest.raises(UserError, match="noise: backend numba must be on device cpu, got meta"):
        Noise(0, backend="numba").fill("w", 0, 0, 0, 3, device="meta")


THREADS = """
import threading, torch
from gradientless.search.optim import GLD, MeZO, STP
torch.set_num_threads(2)
def job(kind, dtype):
    w = torch.nn.Parameter(torch.ones(1 << 17, dtype=dtype))
    optimizer = kind([("w", w)], check=False)
    for _ in range(12):
        optimizer.step(lambda: float(w.detach()[:9].float().sum()))
for kind, dtype in [(GLD, torch.float32), (MeZO, torch.float32), (STP, torch.bfloat16), (MeZO, torch.bfloat16)]:
    several = [threading.Thread(target=job, args=(kind, dtype)) for _ in range(3)]
    [thread.start() for thread in several]
    [thread.join() for thread in several]
print("fine")
"""


def test_several_threads_may_search_at_a_time():
    """Under numba's own layer, which two threads may not enter together: they were killed, or waited for ever."""
    threads = {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env={**os.environ, **threads}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "fine", done.stderr[-2000:]
