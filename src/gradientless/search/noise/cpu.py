"""The noise function compiled for CPU with numba: the same bits as `reference`, much sooner.

The loops mirror `reference` operation by operation. numba emits no fused multiply-add unless asked for fast math,
which would change the last bit of Gaussian values; so fast math stays off here.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence

import numba
import numpy as np
import torch

from gradientless.search.noise import reference as ref

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32
_M0, _M1 = _u64(0xD2511F53), _u64(0xCD9E8D57)
_W0, _W1 = _u32(0x9E3779B9), _u32(0xBB67AE85)
_L = tuple(_f32(c) for c in ref.LOG)
_LN2_HIGH, _LN2_LOW, _SQRT_HALF = _f32(ref.LN2_HIGH), _f32(ref.LN2_LOW), _f32(ref.SQRT_HALF)
_S0, _S1, _S2 = (_f32(c) for c in ref.SIN)
_C0, _C1, _C2 = (_f32(c) for c in ref.COS)
_TURN, _HALF, _ONE, _TWO = _f32(ref.TURN), _f32(0.5), _f32(1.0), _f32(2.0)
_NEAR = _f32(0.35355338)
_RADEMACHER, _NEAR_NORMAL, _GAUSSIAN = ref.RADEMACHER, ref.NEAR_NORMAL, ref.GAUSSIAN

_COLUMN = 256  # groups of four entries that are made column by column
_WALKERS = 1 << 12  # values of a permutation that are held at a time
_PART = 1 << 12  # groups that one thread fills at a time

_compile = numba.njit(cache=True, nogil=True)


@numba.njit(inline="always")
def _philox(k0, k1, c0, c1, c2, c3):
    for _ in range(10):
        p0 = _M0 * _u64(c0)
        p1 = _M1 * _u64(c2)
        c0, c1, c2, c3 = (
            _u32(_u32(p1 >> _u64(32)) ^ c1 ^ k0),
            _u32(p1 & _u64(0xFFFFFFFF)),
            _u32(_u32(p0 >> _u64(32)) ^ c3 ^ k1),
            _u32(p0 & _u64(0xFFFFFFFF)),
        )
        k0 = _u32(k0 + _W0)
        k1 = _u32(k1 + _W1)
    return c0, c1, c2, c3


@numba.njit(inline="always")
def _log(word):
    bits = np.int64(_f32(np.int64(word >> _u32(8)) + 1).view(np.int32))
    e = (bits >> 23) - (126 + 24)  # frexp by the bits of a positive normal number
    f = np.int32((bits & 0x7FFFFF) | 0x3F000000).view(np.float32)
    if f < _SQRT_HALF:
        f = f + f
        e -= 1
    x = f - _ONE
    k = _f32(e)
    z = x * x
    p = _L[0]
    for i in range(1, 9):
        p = p * x + _L[i]
    y = x * z * p
    y = y + k * _LN2_LOW
    y = y - _HALF * z
    return x + y + k * _LN2_HIGH


@numba.njit(inline="always")
def _box_muller(a, b):
    radius = _f32(math.sqrt(-_TWO * _log(a)))
    angle = np.int64(b >> _u32(8))
    quadrant = (angle + (1 << 21)) >> 22
    t = _f32(angle - (quadrant << 22)) * _TURN
    z = t * t
    s = ((_S0 * z + _S1) * z + _S2) * z * t + t
    c = ((_C0 * z + _C1) * z + _C2) * z * z - _HALF * z + _ONE
    if quadrant & 1:
        c, s = s, c
    if (quadrant + 1) & 2:
        c = -c
    if quadrant & 2:
        s = -s
    return radius * c, radius * s


@numba.njit(inline="always")
def _popcount(word):
    word = word - ((word >> _u32(1)) & _u32(0x55555555))
    word = (word & _u32(0x33333333)) + ((word >> _u32(2)) & _u32(0x33333333))
    word = (word + (word >> _u32(4))) & _u32(0x0F0F0F0F)
    return _u32(word * _u32(0x01010101)) >> _u32(24)


@numba.njit(inline="always")
def _near(word):
    return _f32(np.int64(_popcount(word)) - 16) * _NEAR


@numba.njit(inline="always")
def _words(k0, k1, stream, step, draw, block):
    return _philox(k0, k1, _u32(block & 0xFFFFFFFF), _u32((stream << 24) | (block >> 32)), _u32(step), _u32(draw))


@_compile
def _fill_group(stream, k0, k1, step, draw, start, out, block):
    """Write the entries of counter `block` that lie in [start, start + len(out))."""
    w0, w1, w2, w3 = _words(k0, k1, stream, step, draw, block)
    if stream == _RADEMACHER:
        words = (w0, w1, w2, w3)
        for j in range(4):
            word = words[j]
            for bit in range(32):
                i = block * 128 + j * 32 + bit - start
                if 0 <= i < out.size:
                    out[i] = _f32(1 - 2 * np.int64((word >> _u32(bit)) & _u32(1)))
        return
    if stream == _NEAR_NORMAL:
        v0, v1, v2, v3 = _near(w0), _near(w1), _near(w2), _near(w3)
    else:
        v0, v1 = _box_muller(w0, w1)
        v2, v3 = _box_muller(w2, w3)
    values = (v0, v1, v2, v3)
    for j in range(4):
        i = block * 4 + j - start
        if 0 <= i < out.size:
            out[i] = values[j]


@_compile
def _fill_serial(stream, k0, k1, step, draw, start, out, first, last):
    low, high = first, first
    if stream != _RADEMACHER:
        # Whole groups, column by column: loops without branches or strided stores become vector instructions.
        low, high = max(first, -(-start // 4)), min(last, (start + out.size) // 4)
        columns = np.empty((4, max(0, min(_COLUMN, high - low))), np.float32)
        c0, c1, c2, c3 = columns[0], columns[1], columns[2], columns[3]
        for base in range(low, high, _COLUMN):
            count = min(_COLUMN, high - base)
            if stream == _GAUSSIAN:
                for g in range(count):
                    w0, w1, w2, w3 = _words(k0, k1, stream, step, draw, base + g)
                    c0[g], c1[g] = _box_muller(w0, w1)
                    c2[g], c3[g] = _box_muller(w2, w3)
            else:
                for g in range(count):
                    w0, w1, w2, w3 = _words(k0, k1, stream, step, draw, base + g)
                    c0[g], c1[g], c2[g], c3[g] = _near(w0), _near(w1), _near(w2), _near(w3)
            rows = out[base * 4 - start : (base + count) * 4 - start].reshape(-1, 4)
            for g in range(count):
                rows[g, 0], rows[g, 1], rows[g, 2], rows[g, 3] = c0[g], c1[g], c2[g], c3[g]
    for block in range(first, min(low, last)):
        _fill_group(stream, k0, k1, step, draw, start, out, block)
    for block in range(max(low, high), last):
        _fill_group(stream, k0, k1, step, draw, start, out, block)


@numba.njit(cache=True, nogil=True, parallel=True)
def _fill_parallel(stream, k0, k1, step, draw, start, out, first, last):
    for part in numba.prange(-(-(last - first) // _PART)):
        at = first + part * _PART
        _fill_serial(stream, k0, k1, step, draw, start, out, at, min(at + _PART, last))


@_compile
def _fill_rows(stream, k0, k1, step, draws, out, groups):
    for row in range(draws.size):
        _fill_serial(stream, k0, k1, step, draws[row], 0, out[row], 0, groups)


@_compile
def _gather(stream, k0, k1, step, draws, index, out):
    for row in range(draws.size):
        draw = draws[row]
        if stream == _GAUSSIAN:  # no branches: see `_fill_serial`
            for j in range(index.size):
                i = index[j]
                w0, w1, w2, w3 = _words(k0, k1, stream, step, draw, i >> 2)
                late = (i & 2) != 0
                c, s = _box_muller(w2 if late else w0, w3 if late else w1)
                out[row, j] = s if i & 1 else c
            continue
        for j in range(index.size):
            i = index[j]
            if stream == _RADEMACHER:
                words = _words(k0, k1, stream, step, draw, i >> 7)
                out[row, j] = _f32(1 - 2 * np.int64((words[(i >> 5) & 3] >> _u32(i & 31)) & _u32(1)))
            else:
                out[row, j] = _near(_words(k0, k1, stream, step, draw, i >> 2)[i & 3])


@_compile
def _permute(keys, half, x):
    """The keyed permutation of 2 * half bits at each of `x` (int64), in place."""
    mask = _u32((1 << half) - 1)
    for j in range(x.size):
        left, right = _u32(x[j] >> half), _u32(x[j]) & mask
        for r in range(8):
            h = right ^ keys[r]
            h ^= h >> _u32(16)
            h = _u32(h * _u32(0x85EBCA6B))
            h ^= h >> _u32(13)
            h = _u32(h * _u32(0xC2B2AE35))
            h ^= h >> _u32(16)
            left, right = right, left ^ (h & mask)
        x[j] = (np.int64(left) << half) | np.int64(right)


@_compile
def _select(keys, half, size, first, out):
    """Where the walked permutation takes first, first + 1, …, unsorted: values outside walk on together."""
    walkers = np.arange(first, first + out.size)
    found = 0
    while walkers.size:
        _permute(keys, half, walkers)
        outside = 0
        for j in range(walkers.size):
            x = walkers[j]
            if x < size:
                out[found] = x
                found += 1
            else:
                walkers[outside] = x
                outside += 1
        walkers = walkers[:outside]


@_compile
def _mark(keys, half, size, count, bits):
    """Set the bit of each of the `count` values."""
    values = np.empty(_WALKERS, np.int64)
    for first in range(0, count, _WALKERS):
        some = values[: min(_WALKERS, count - first)]
        _select(keys, half, size, first, some)
        for x in some:
            bits[x >> 3] |= np.uint8(1 << (x & 7))


_CORES: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_PARALLEL_FROM = 1 << 15  # entries below which starting threads costs more than they save


_POOL = threading.Lock()  # numba's threads may not be started from two of Python's at a time, whatever layer runs them


@contextlib.contextmanager
def threads(entries: int) -> Iterator[bool]:
    """Whether to share work on so many entries between threads, as many as torch has. Whoever shares, shares alone."""
    count = torch.get_num_threads()
    if entries < _PARALLEL_FROM or count == 1:
        yield False
        return
    with _POOL:
        numba.set_num_threads(min(count, _CORES))
        try:
            yield True
        finally:
            if torch.get_num_threads() != count:  # starting numba's threads changes the number that torch uses
                torch.set_num_threads(count)


def fill(distribution: str, seed: int, name: str, step: int, draw: int, start: int, out: np.ndarray) -> None:
    """Write entries [start, start + len(out)) of the noise of `name` into `out` (float32)."""
    k0, k1 = ref.key_of(seed, name)
    group = ref.GROUP[distribution]
    first, last = start // group, -(-(start + out.size) // group)
    with threads(out.size) as several:
        run = _fill_parallel if several else _fill_serial
        run(ref.STREAMS[distribution], _u32(k0), _u32(k1), step, draw, start, out, first, last)


def fill_rows(distribution: str, seed: int, name: str, step: int, draws: np.ndarray, out: np.ndarray) -> None:
    """Write the first entries of the noise for each of `draws` (int64 [n]) into `out` (float32 [n, count])."""
    if out.shape[1] >= _PARALLEL_FROM:
        for draw, row in zip(draws, out, strict=True):
            fill(distribution, seed, name, step, int(draw), 0, row)
        return
    k0, k1 = ref.key_of(seed, name)
    groups = -(-out.shape[1] // ref.GROUP[distribution])
    _fill_rows(ref.STREAMS[distribution], _u32(k0), _u32(k1), step, draws, out, groups)


def gather(
    distribution: str, seed: int, name: str, step: int, draws: np.ndarray, index: np.ndarray, out: np.ndarray
) -> None:
    """Write noise at flat positions `index` (int64 [s]) for each of `draws` (int64 [n]) into `out` (float32 [n, s])."""
    k0, k1 = ref.key_of(seed, name)
    _gather(ref.STREAMS[distribution], _u32(k0), _u32(k1), step, draws, index, out)


@_compile
def _rounding(k0, k1, stream, step, draw, start, out):
    end = start + out.size
    for block in range(start // 8, -(-end // 8)):
        words = _words(k0, k1, stream, step, draw, block)
        for j in range(8):
            i = block * 8 + j - start
            if 0 <= i < out.size:
                out[i] = (words[j // 2] >> _u32(16 * (j % 2))) & _u32(0xFFFF)


def rounding(seed: int, name: str, step: int, draw: int, start: int, out: np.ndarray) -> None:
    """As `reference.rounding` for entries [start, start + len(out)): int32."""
    k0, k1 = ref.key_of(seed, name)
    _rounding(_u32(k0), _u32(k1), ref.ROUND, step, draw, start, out)


@_compile
def _round_keys(k0, k1, stream, step):
    keys = np.empty(8, np.uint32)
    keys[0], keys[1], keys[2], keys[3] = _words(k0, k1, stream, step, 0, 0)
    keys[4], keys[5], keys[6], keys[7] = _words(k0, k1, stream, step, 0, 1)
    return keys


def select(seed: int, name: str, step: int, size: int, count: int) -> np.ndarray:
    """As `reference.select`: int64 [count], sorted."""
    out = np.empty(count, np.int64)
    _select(*_permutation(seed, name, step, size), size, 0, out)
    out.sort()  # by numpy's vector instructions
    return out


def mark(seed: int, name: str, step: int, size: int, count: int) -> np.ndarray:
    """The same as bits, uint8 [⌈size / 8⌉], lowest first: for large shares much sooner than to sort them."""
    bits = np.zeros(-(-size // 8), np.uint8)
    _mark(*_permutation(seed, name, step, size), size, count, bits)
    return bits


def _permutation(seed: int, name: str, step: int, size: int) -> tuple[np.ndarray, int]:
    """Its round keys, and half the bits of what it permutes."""
    k0, k1 = ref.key_of(seed, name)
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    return _round_keys(_u32(k0), _u32(k1), ref.SELECT, step), half


# A pass over memory ------------------------------------------------------------------------------------------------
#
# The same values as above, written so that LLVM runs them on vectors: counters in lanes, one plain loop for each stage
# over short arrays that stay in cache, no branches, no integers wider than needed.

_GROUPS = 1024  # counters of a chunk with 4 entries each; with 128 entries, a chunk is as long
_CHUNK = 4 * _GROUPS
_SPAN = 16 * _CHUNK  # entries that one thread takes at a time
_MASK64, _SHIFT = _u64(0xFFFFFFFF), _u64(32)
_W0_64, _W1_64 = _u64(_W0), _u64(_W1)
_i32 = np.int32


@numba.njit
def _as_float(bits):
    return _u32(bits).view(_f32)


@numba.njit
def _as_bits(value):
    return _f32(value).view(_u32)


@_compile
def _word_lanes(k0, k1, stream, step, draw, first, a, b, c, d):
    """The words of counters first, first + 1, …; the upper halves of the lanes may hold anything until masked."""
    high, second, third = _u64(stream) << _u64(24), _u64(step) & _MASK64, _u64(draw) & _MASK64
    for j in range(a.size):
        block = _u64(first + j)
        x0, x1, x2, x3 = block, high | (block >> _SHIFT), second, third
        q0, q1 = _u64(k0), _u64(k1)
        for _ in range(10):
            p0 = _M0 * (x0 & _MASK64)
            p1 = _M1 * (x2 & _MASK64)
            x0, x1, x2, x3 = (p1 >> _SHIFT) ^ x1 ^ q0, p1, (p0 >> _SHIFT) ^ x3 ^ q1, p0
            q0 = (q0 + _W0_64) & _MASK64
            q1 = (q1 + _W1_64) & _MASK64
        a[j], b[j], c[j], d[j] = _u32(x0), _u32(x1), _u32(x2), _u32(x3)


@_compile
def _gaussian_lanes(a, b, cosines, sines):
    for j in range(a.size):
        bits = _f32(_i32(_i32(a[j] >> _u32(8)) + _i32(1))).view(_i32)
        exponent = _i32(_i32(bits >> _i32(23)) - _i32(150))
        fraction = _as_float(_u32(_i32(_i32(bits & _i32(0x7FFFFF)) | _i32(0x3F000000))))
        small = fraction < _SQRT_HALF
        x = (fraction + fraction if small else fraction) - _ONE
        k = _f32(_i32(exponent - _i32(1)) if small else exponent)
        z = x * x
        p = _L[0] * x + _L[1]
        p = p * x + _L[2]
        p = p * x + _L[3]
        p = p * x + _L[4]
        p = p * x + _L[5]
        p = p * x + _L[6]
        p = p * x + _L[7]
        p = p * x + _L[8]
        y = x * z * p
        y = y + k * _LN2_LOW
        y = y - _HALF * z
        radius = _f32(math.sqrt(-_TWO * (x + y + k * _LN2_HIGH)))
        angle = _i32(b[j] >> _u32(8))
        quadrant = _i32(_i32(angle + _i32(1 << 21)) >> _i32(22))
        t = _f32(_i32(angle - _i32(quadrant << _i32(22)))) * _TURN
        u = t * t
        s = ((_S0 * u + _S1) * u + _S2) * u * t + t
        c = ((_C0 * u + _C1) * u + _C2) * u * u - _HALF * u + _ONE
        odd = (quadrant & _i32(1)) != 0
        turned_c = _u32(_u32(_u32(_i32(quadrant + _i32(1))) & _u32(2)) << _u32(30))
        turned_s = _u32(_u32(_u32(quadrant) & _u32(2)) << _u32(30))
        cosines[j] = radius * _as_float(_as_bits(s if odd else c) ^ turned_c)
        sines[j] = radius * _as_float(_as_bits(c if odd else s) ^ turned_s)


@_compile
def _near_lanes(words, out):
    for j in range(words.size):
        word = words[j]
        x = _u32(word - (_u32(word >> _u32(1)) & _u32(0x55555555)))
        y = _u32(_u32(x & _u32(0x33333333)) + _u32(_u32(x >> _u32(2)) & _u32(0x33333333)))
        z = _u32(_u32(y + _u32(y >> _u32(4))) & _u32(0x0F0F0F0F))
        out[j] = _f32(_i32(_i32(_u32(z * _u32(0x01010101)) >> _u32(24)) - _i32(16))) * _NEAR


@_compile
def _add_lanes(out, at, factor, z0, z1, z2, z3):
    for j in range(z0.size):
        out[at + 4 * j] += factor * z0[j]
        out[at + 4 * j + 1] += factor * z1[j]
        out[at + 4 * j + 2] += factor * z2[j]
        out[at + 4 * j + 3] += factor * z3[j]


@_compile
def _add_signs(out, at, factor, words, place, bits):
    """Add ±factor by the bits of each word; bits is 32 (as an argument it keeps the loop a loop, which vectorises)."""
    positive = _as_bits(factor)
    for j in range(words.size):
        word = words[j]
        base = at + 128 * j + place
        for i in range(bits):
            out[base + i] += _as_float(positive ^ _u32(_u32(word << _u32(31 - i)) & _u32(0x80000000)))


@_compile
def _add_groups(stream, k0, k1, step, draw, factor, first, groups, out, at, words, lanes):
    """Add factor times the entries of counters [first, first + groups) to out[at:]."""
    a, b, c, d = words[0, :groups], words[1, :groups], words[2, :groups], words[3, :groups]
    _word_lanes(k0, k1, stream, step, draw, first, a, b, c, d)
    if stream == _RADEMACHER:
        _add_signs(out, at, factor, a, 0, 32)
        _add_signs(out, at, factor, b, 32, 32)
        _add_signs(out, at, factor, c, 64, 32)
        _add_signs(out, at, factor, d, 96, 32)
        return
    z0, z1, z2, z3 = lanes[0, :groups], lanes[1, :groups], lanes[2, :groups], lanes[3, :groups]
    if stream == _GAUSSIAN:
        _gaussian_lanes(a, b, z0, z1)
        _gaussian_lanes(c, d, z2, z3)
    else:
        _near_lanes(a, z0)
        _near_lanes(b, z1)
        _near_lanes(c, z2)
        _near_lanes(d, z3)
    _add_lanes(out, at, factor, z0, z1, z2, z3)


@_compile
def _walk_span(stream, group, k0, k1, steps, draws, factors, decay, weights, offset, start, end):
    """weights ← decay · weights, then + factor · z, term by term, for the entries [start, end) of the tensor."""
    words, lanes, edge = np.empty((4, _GROUPS), _u32), np.empty((4, _GROUPS), _f32), np.empty(_CHUNK, _f32)
    at = start
    while at < end:
        stop = min(end, (at // _CHUNK + 1) * _CHUNK)
        if decay != _ONE:
            for i in range(at - offset, stop - offset):
                weights[i] *= decay
        first, last = at // group, -(-stop // group)
        whole = first * group == at and last * group == stop
        for term in range(factors.size):
            step, draw, factor = steps[term], draws[term], factors[term]
            if whole:
                _add_groups(stream, k0, k1, step, draw, factor, first, last - first, weights, at - offset, words, lanes)
            else:
                edge[:] = -_f32(0.0)  # which any product is added to without a change
                _add_groups(stream, k0, k1, step, draw, factor, first, last - first, edge, 0, words, lanes)
                skip = at - first * group
                for i in range(stop - at):
                    weights[at - offset + i] += edge[skip + i]
        at = stop


@_compile
def _walk_serial(stream, group, k0, k1, steps, draws, factors, decay, weights, start):
    _walk_span(stream, group, k0, k1, steps, draws, factors, decay, weights, start, start, start + weights.size)


@numba.njit(cache=True, nogil=True, parallel=True)
def _walk_parallel(stream, group, k0, k1, steps, draws, factors, decay, weights, start):
    end = start + weights.size
    for span in numba.prange(start // _SPAN, -(-end // _SPAN)):
        first, last = max(start, span * _SPAN), min(end, (span + 1) * _SPAN)
        _walk_span(stream, group, k0, k1, steps, draws, factors, decay, weights, start, first, last)


def walk(
    distribution: str,
    seed: int,
    name: str,
    terms: Sequence[tuple[float, int, int]],
    decay: float,
    weights: np.ndarray,
    start: int = 0,
) -> None:
    """weights ← decay · weights + Σ factor · z in one pass; weights: float32, entries [start, …) of tensor `name`.

    terms: (factor, step, draw). Products are rounded once, then each sum, in the order of the terms: the same bits
    for any division into chunks and any number of threads. Extra memory: 50 KB a thread.
    """
    k0, k1 = ref.key_of(seed, name)
    steps = np.array([step for _, step, _ in terms], np.int64)
    draws = np.array([draw for _, _, draw in terms], np.int64)
    factors = np.array([factor for factor, _, _ in terms], np.float32)
    group = ref.GROUP[distribution]
    keys = _u32(k0), _u32(k1)
    with threads(weights.size) as several:
        run = _walk_parallel if several else _walk_serial
        run(ref.STREAMS[distribution], group, *keys, steps, draws, factors, _f32(decay), weights, start)
