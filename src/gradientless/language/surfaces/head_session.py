"""A session on a head of two layers: the logits under many small changes of its tensors, without dense copies.

For features X ([B, d]) the session keeps A = W₁Xᵀ + b₁, H = act(A) and the logits, all transposed so that a row is one
hidden unit over the batch. A candidate that changes s entries of W₁ changes A in the rows of those entries only, by
one multiple of a row of Xᵀ each: s·B products instead of the h·d·B of a head pass. Changes of b₁, W₂ and b₂ touch
what follows from them and nothing before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from gradientless.delta import Delta

ACTIVATION_CODES = {"relu": 0, "tanh": 1, "gelu": 2}
_SQRT_HALF = np.float32(math.sqrt(0.5))
_ZERO, _ONE, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
_PARALLEL_FROM = 1 << 21  # products below which starting threads costs more than they save


@numba.njit(inline="always")
def _activate(x, code):
    if code == 0:
        return max(x, _ZERO)
    if code == 1:
        return np.float32(math.tanh(x))
    return _HALF * x * (_ONE + np.float32(math.erf(x * _SQRT_HALF)))


@numba.njit(cache=True, nogil=True)
def _one(xt, a, h, logits, w2, code, index, values, b1, new_w2, b2, out):
    """Logits [C, B] of one candidate into `out`. index, values: entries of W₁ in any order, repeats allowed; b1 [h] or
    [0] and b2 [C] are added; new_w2 [C, h], or [0, 0] where W₂ does not change."""
    hidden, rows = a.shape
    classes = w2.shape[0]
    width = xt.shape[0]
    slot = np.full(hidden, -1, np.int64)  # place of a changed row in `changed`
    count = 0
    if b1.size:
        changed = np.empty((hidden, rows), np.float32)
        for i in range(hidden):
            slot[i] = i
            for b in range(rows):
                changed[i, b] = a[i, b] + b1[i]
        count = hidden
    else:
        changed = np.empty((min(hidden, index.size), rows), np.float32)
    for e in range(index.size):
        i = index[e] // width
        j = index[e] - i * width
        if slot[i] < 0:
            slot[i] = count
            count += 1
            changed[slot[i], :] = a[i, :]
        row = changed[slot[i]]
        column = xt[j]
        v = values[e]
        for b in range(rows):
            row[b] += v * column[b]
    whole = new_w2.size > 0
    for c in range(classes):
        for b in range(rows):
            out[c, b] = b2[c] if whole else logits[c, b] + b2[c]
    for i in range(hidden):
        if slot[i] >= 0:
            row = changed[slot[i]]
            for b in range(rows):
                row[b] = _activate(row[b], code)
            for c in range(classes):
                if whole:
                    w = new_w2[c, i]
                    for b in range(rows):
                        out[c, b] += w * row[b]
                else:
                    w = w2[c, i]
                    for b in range(rows):
                        out[c, b] += w * (row[b] - h[i, b])
        elif whole:
            for c in range(classes):
                w = new_w2[c, i]
                for b in range(rows):
                    out[c, b] += w * h[i, b]


@numba.njit(cache=True, nogil=True)
def _all_serial(xt, a, h, logits, w2, code, offsets, index, values, b1, new_w2, b2, out):
    for p in range(out.shape[0]):
        start, end = offsets[p], offsets[p + 1]
        bias = b1[p] if b1.shape[0] else b1[:, 0]
        weight = new_w2[p] if new_w2.shape[0] else new_w2[:, 0]
        _one(xt, a, h, logits, w2, code, index[start:end], values[start:end], bias, weight, b2[p], out[p])


@numba.njit(cache=True, nogil=True, parallel=True)
def _all_parallel(xt, a, h, logits, w2, code, offsets, index, values, b1, new_w2, b2, out):
    for p in numba.prange(out.shape[0]):
        start, end = offsets[p], offsets[p + 1]
        bias = b1[p] if b1.shape[0] else b1[:, 0]
        weight = new_w2[p] if new_w2.shape[0] else new_w2[:, 0]
        _one(xt, a, h, logits, w2, code, index[start:end], values[start:end], bias, weight, b2[p], out[p])


class HeadSession:
    """The head act(X W₁ᵀ + b₁) W₂ᵀ + b₂ on one batch of features, and what small changes make of it.

    dense_weight [h, d], dense_bias [h], out_weight [C, h], out_bias [C]: float32, read when the session starts.
    names: what Deltas call them, in this order. features: [B, d].
    """

    def __init__(
        self,
        dense_weight: Tensor,
        dense_bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        *,
        activation: str,
        names: Sequence[str],
        features: Tensor,
    ):
        self._w1, self._b1, self._w2, self._b2 = names
        self._act = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}[activation]
        self._code = ACTIVATION_CODES[activation]
        with torch.no_grad():
            self._xt = features.t().contiguous()
            self._a = torch.addmm(dense_bias.unsqueeze(1), dense_weight, self._xt)
            self._weight, self._bias = out_weight.detach().clone(), out_bias.detach().clone()
            self._refresh()

    def _refresh(self) -> None:
        self._h = self._act(self._a)
        self._logits = torch.addmm(self._bias.unsqueeze(1), self._weight, self._h)

    @torch.no_grad()
    def commit(self, changes: Sequence[Delta]) -> None:
        """Take `changes` as done."""
        self._a, self._weight, self._bias = self._moved(changes)
        self._refresh()

    def _moved(self, changes: Sequence[Delta]) -> tuple[Tensor, Tensor, Tensor]:
        """A, W₂ and b₂ after `changes`; the old tensors where nothing changes them."""
        a, weight, bias = self._a, self._weight, self._bias
        for change in changes:
            if change.name == self._w1:
                width = self._xt.shape[0]
                if change.index is None:
                    a = torch.addmm(a, change.values.view(-1, width), self._xt)
                else:
                    rows = torch.div(change.index, width, rounding_mode="floor")
                    parts = change.values.unsqueeze(1) * self._xt[change.index - rows * width]
                    a = a.index_add(0, rows, parts)
            elif change.name == self._b1:
                a = a + _dense(change, self._a.shape[0]).unsqueeze(1)
            elif change.name == self._w2:
                weight = weight + _dense(change, weight.numel()).view_as(weight)
            else:
                bias = bias + _dense(change, bias.numel())
        return a, weight, bias

    @torch.no_grad()
    def logits(self, candidates: Sequence[Sequence[Delta]]) -> Tensor:
        """Logits [P, C, B] under each candidate's changes, on top of what was committed."""
        dense = any(d.name == self._w1 and d.index is None for changes in candidates for d in changes)
        if dense or self._a.device.type != "cpu":
            found = []
            for changes in candidates:
                a, weight, bias = self._moved(changes)
                found.append(torch.addmm(bias.unsqueeze(1), weight, self._h if a is self._a else self._act(a)))
            return torch.stack(found)
        return self._compiled(candidates)

    def _compiled(self, candidates: Sequence[Sequence[Delta]]) -> Tensor:
        count, (hidden, rows), classes = len(candidates), self._a.shape, self._weight.shape[0]
        touched = {d.name for changes in candidates for d in changes}
        offsets = np.zeros(count + 1, np.int64)
        index: list[np.ndarray] = []
        values: list[np.ndarray] = []
        b1 = np.zeros((count if self._b1 in touched else 0, hidden), np.float32)
        b2 = np.zeros((count, classes), np.float32)
        w2 = np.empty((0, classes, hidden), np.float32)
        if self._w2 in touched:
            w2 = np.repeat(self._weight.numpy()[None], count, 0)
            b2 += self._bias.numpy()
        for p, changes in enumerate(candidates):
            size = 0
            for d in changes:
                v = d.values.numpy().reshape(-1)
                if d.name == self._w1:
                    assert d.index is not None
                    index.append(d.index.numpy())
                    values.append(v)
                    size += v.size
                    continue
                target = (b1 if d.name == self._b1 else w2 if d.name == self._w2 else b2)[p].reshape(-1)
                if d.index is None:
                    target += v
                else:
                    target[d.index.numpy()] += v
            offsets[p + 1] = offsets[p] + size
        out = np.empty((count, classes, rows), np.float32)
        work = (int(offsets[-1]) + count * hidden * (classes + 2) * bool(index or b1.size)) * rows
        (_all_parallel if work >= _PARALLEL_FROM else _all_serial)(
            self._xt.numpy(),
            self._a.numpy(),
            self._h.numpy(),
            self._logits.numpy(),
            self._weight.numpy(),
            self._code,
            offsets,
            np.concatenate(index) if index else np.empty(0, np.int64),
            np.concatenate(values) if values else np.empty(0, np.float32),
            b1,
            w2,
            b2,
            out,
        )
        return torch.from_numpy(out)


def _dense(change: Delta, size: int) -> Tensor:
    """The change as a vector of all `size` entries."""
    if change.index is None:
        return change.values.view(-1)
    return change.values.new_zeros(size).index_put((change.index,), change.values)
