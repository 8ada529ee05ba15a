"""Updates compiled for CPU: weights changed in one pass over memory, half precision rounded stochastically.

The bits of the rounding are those of `reference.rounding`; loops are written for vectors, as the passes in `cpu`.
"""

from __future__ import annotations

import numba
import numpy as np

from gradientless.search.noise import cpu
from gradientless.search.noise import reference as ref
from gradientless.search.noise.cpu import _as_bits, _as_float, _compile, _word_lanes

_u32, _f32 = np.uint32, np.float32
_COUNTERS = 512  # of a chunk; eight entries each, whose arrays stay in cache
_CHUNK = 8 * _COUNTERS
_SPAN = 64 * _CHUNK  # entries that one thread takes at a time


@_compile
def _halves(k0, k1, step, draw, first, words, joined):
    """The random half words of the entries from 8 · `first` on, two in each of `joined`, low half first."""
    count = joined.size // 4
    a, b, c, d = words[0, :count], words[1, :count], words[2, :count], words[3, :count]
    _word_lanes(k0, k1, ref.ROUND, step, draw, first, a, b, c, d)
    for j in range(count):
        joined[4 * j], joined[4 * j + 1], joined[4 * j + 2], joined[4 * j + 3] = a[j], b[j], c[j], d[j]


@numba.njit(inline="always")
def _rounded(value, half):
    """The upper half of a float32's bits, up or down by a random half word."""
    finite = _u32(value & _u32(0x7F800000)) != _u32(0x7F800000)
    # What is not finite passes as it is; no number stays none when its lower half is cut off.
    quiet = _u32(value | _u32(0x400000)) if _u32(value & _u32(0x7FFFFF)) != _u32(0) else value
    return np.uint16(_u32((_u32(value + _u32(half)) if finite else quiet) >> _u32(16)))


@_compile
def _products(left, right, start, sums):
    """Entries [start, start + len(sums)) of left · right, [o, r] and [r, i]: products rounded once, then each sum."""
    columns, at = right.shape[1], 0
    while at < sums.size:
        row, column = (start + at) // columns, (start + at) % columns
        count = min(columns - column, sums.size - at)
        out = sums[at : at + count]
        for k in range(right.shape[0]):
            factor, values = left[row, k], right[k, column : column + count]
            if k == 0:
                for i in range(count):
                    out[i] = factor * values[i]
            else:
                for i in range(count):
                    out[i] += factor * values[i]
        at += count


@_compile
def _store_span(k0, k1, step, draw, offset, raw, out, start, end):
    """Entries [start, end) of a tensor, of which `raw` and `out` hold those from `offset` on."""
    words, joined = np.empty((4, _COUNTERS + 1), _u32), np.empty(4 * (_COUNTERS + 1), _u32)
    for at in range(start, end, _CHUNK):
        stop = min(end, at + _CHUNK)
        first = at // 8
        _halves(k0, k1, step, draw, first, words, joined[: 4 * (-(-stop // 8) - first)])
        halves, values, rounded = joined.view(np.uint16)[at - 8 * first :], raw[at - offset :], out[at - offset :]
        for i in range(stop - at):
            rounded[i] = _rounded(values[i], halves[i])


@_compile
def _store_serial(k0, k1, step, draw, offset, raw, out):
    _store_span(k0, k1, step, draw, offset, raw, out, offset, offset + raw.size)


@numba.njit(cache=True, nogil=True, parallel=True)
def _store_parallel(k0, k1, step, draw, offset, raw, out):
    for part in numba.prange(-(-raw.size // _SPAN)):
        start = offset + part * _SPAN
        _store_span(k0, k1, step, draw, offset, raw, out, start, min(start + _SPAN, offset + raw.size))


@_compile
def _add_span(left, right, weights, start, end):
    sums = np.empty(_CHUNK, _f32)
    for at in range(start, end, _CHUNK):
        count = min(end - at, _CHUNK)
        _products(left, right, at, sums[:count])
        mine = weights[at:]
        for i in range(count):
            mine[i] += sums[i]


@_compile
def _add_serial(left, right, weights):
    _add_span(left, right, weights, 0, weights.size)


@numba.njit(cache=True, nogil=True, parallel=True)
def _add_parallel(left, right, weights):
    for part in numba.prange(-(-weights.size // _SPAN)):
        _add_span(left, right, weights, part * _SPAN, min((part + 1) * _SPAN, weights.size))


@_compile
def _round_span(k0, k1, step, draw, left, right, weights, start, end):
    words, joined, sums = np.empty((4, _COUNTERS), _u32), np.empty(4 * _COUNTERS, _u32), np.empty(_CHUNK, _f32)
    halves = joined.view(np.uint16)
    for at in range(start, end, _CHUNK):
        count = min(end - at, _CHUNK)
        _halves(k0, k1, step, draw, at // 8, words, joined[: 4 * -(-count // 8)])
        _products(left, right, at, sums[:count])
        mine = weights[at:]
        for i in range(count):
            mine[i] = _rounded(_as_bits(_as_float(_u32(_u32(mine[i]) << _u32(16))) + sums[i]), halves[i])


@_compile
def _round_serial(k0, k1, step, draw, left, right, weights):
    _round_span(k0, k1, step, draw, left, right, weights, 0, weights.size)


@numba.njit(cache=True, nogil=True, parallel=True)
def _round_parallel(k0, k1, step, draw, left, right, weights):
    for part in numba.prange(-(-weights.size // _SPAN)):
        start = part * _SPAN
        _round_span(k0, k1, step, draw, left, right, weights, start, min(start + _SPAN, weights.size))


def store_bfloat16(seed: int, name: str, step: int, draw: int, start: int, raw: np.ndarray, out: np.ndarray) -> None:
    """`reference.round_stochastically` of float32 `raw` (as uint32) into bfloat16 `out` (as uint16), with the bits of
    `rounding` for entries [start, start + len(raw))."""
    k0, k1 = (_u32(key) for key in ref.key_of(seed, name))
    with cpu.threads(raw.size) as several:
        (_store_parallel if several else _store_serial)(k0, k1, step, draw, start, raw, out)


def add_product(left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> None:
    """weights ← weights + left · right, all float32: [o, r], [r, i], [o · i]; products and sums rounded in order."""
    with cpu.threads(weights.size) as several:
        (_add_parallel if several else _add_serial)(left, right, weights)


def add_product_bfloat16(
    seed: int, name: str, step: int, draw: int, left: np.ndarray, right: np.ndarray, weights: np.ndarray
) -> None:
    """As `add_product` for bfloat16 weights (as uint16): summed in float32, rounded as `store_bfloat16` does."""
    k0, k1 = (_u32(key) for key in ref.key_of(seed, name))
    with cpu.threads(weights.size) as several:
        (_round_parallel if several else _round_serial)(k0, k1, step, draw, left, right, weights)
