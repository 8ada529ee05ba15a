"""A session on a head of two layers: the logits under many small changes of its tensors, without dense copies.

For features X ([B, d]) the session keeps A = W₁Xᵀ + b₁, H = act(A) and the logits, all transposed so that a row is one
hidden unit over the batch. A candidate that changes s entries of W₁ changes A in the rows of those entries only, by
one multiple of a row of Xᵀ each: s·B products instead of the h·d·B of a head pass. Changes of b₁, W₂ and b₂ touch
what follows from them and nothing before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from gradientless.delta import Delta, Sweep

ACTIVATION_CODES = {"relu": 0, "tanh": 1, "gelu": 2}
_SQRT_HALF = np.float32(math.sqrt(0.5))
_ZERO, _ONE, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)


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
def _all(xt, a, h, logits, w2, code, offsets, starts, index, values, b1, new_w2, b2, out):
    for p in range(out.shape[0]):
        start, end = offsets[p], offsets[p + 1]
        first = starts[p]
        bias = b1[p] if b1.shape[0] else b1[:, 0]
        weight = new_w2[p] if new_w2.shape[0] else new_w2[:, 0]
        _one(
            xt,
            a,
            h,
            logits,
            w2,
            code,
            index[first : first + end - start],
            values[start:end],
            bias,
            weight,
            b2[p],
            out[p],
        )


@numba.njit(cache=True, nogil=True)
def _activate_all(x, code):
    if code == 0:  # a loop of its own, which becomes vector instructions
        for b in range(x.size):
            x[b] = x[b] if x[b] > _ZERO else _ZERO
    else:
        for b in range(x.size):
            x[b] = _activate(x[b], code)


@numba.njit(cache=True, nogil=True)
def _sweep(xt, a, h, logits, w2, code, index, values, out):
    """Logits [P, C, B] under values [P, s] at the entries `index` ([s], distinct) of W₁ for each candidate p; a
    position ~i < 0 is entry i of b₁. Row by row of A, all candidates side by side."""
    hidden, rows = a.shape
    width = xt.shape[0]
    count, classes = values.shape[0], w2.shape[0]
    ends, order = np.zeros(hidden + 1, np.int64), np.empty(index.size, np.int64)  # entries in the order of their rows
    for e in range(index.size):
        ends[(index[e] // width if index[e] >= 0 else ~index[e]) + 1] += 1
    for i in range(hidden):
        ends[i + 1] += ends[i]
    for e in range(index.size):
        i = index[e] // width if index[e] >= 0 else ~index[e]
        order[ends[i]] = e
        ends[i] += 1
    moved = np.empty((count, rows), np.float32)  # one row of A, then of the change of H, for each candidate
    flat = moved.reshape(-1)
    change = np.zeros((classes, count * rows), np.float32)
    one = np.ones(rows, np.float32)
    start = 0
    for i in range(hidden):
        if ends[i] == start:
            continue
        base, old = a[i], h[i]
        for k in range(start, ends[i]):
            e = order[k]
            column = xt[index[e] % width] if index[e] >= 0 else one
            for p in range(count):
                v = values[p, e]
                if k == start:
                    for b in range(rows):
                        moved[p, b] = base[b] + v * column[b]
                else:
                    for b in range(rows):
                        moved[p, b] += v * column[b]
        start = ends[i]
        _activate_all(flat, code)
        for p in range(count):
            for b in range(rows):
                moved[p, b] -= old[b]
        for c in range(classes):
            w, total = w2[c, i], change[c]
            for b in range(flat.size):
                total[b] += w * flat[b]
    for p in range(count):
        for c in range(classes):
            for b in range(rows):
                out[p, c, b] = logits[c, b] + change[c, p * rows + b]


@numba.njit(cache=True, nogil=True)
def _take(xt, a, h, code, index, values):
    """Make one change of entries of W₁ (or of b₁: position ~i) permanent in A and H, in place."""
    width = xt.shape[0]
    touched = np.zeros(a.shape[0], np.bool_)
    for e in range(index.size):
        v = values[e]
        if index[e] >= 0:
            i = index[e] // width
            row, column = a[i], xt[index[e] - i * width]
            for b in range(row.size):
                row[b] += v * column[b]
        else:
            i = ~index[e]
            row = a[i]
            for b in range(row.size):
                row[b] += v
        touched[i] = True
    for i in range(a.shape[0]):
        if touched[i]:
            h[i, :] = a[i, :]
            _activate_all(h[i], code)


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
            self._weight, self._bias = out_weight.clone(), out_bias.clone()
            self._refresh()
        self._on_cpu = self._a.device.type == "cpu"
        if self._on_cpu:
            tensors = (self._xt, self._a, self._h, self._logits, self._weight)
            self._arrays: Any = tuple(tensor.numpy() for tensor in tensors)

    def _refresh(self) -> None:
        self._h = self._act(self._a)
        self._logits = torch.addmm(self._bias.unsqueeze(1), self._weight, self._h)

    def commit(self, changes: Sequence[Delta]) -> None:
        """Take `changes` as done."""
        for change in changes:
            if change.name == self._w2:
                change.add_to(self._weight)
            elif change.name == self._b2:
                change.add_to(self._bias)
            elif self._on_cpu and not self._is_product(change):
                xt, a, h, *_ = self._arrays
                _take(xt, a, h, self._code, self._inner(change.name, change.index), change.values.numpy().reshape(-1))
            else:
                self._a.copy_(self._moved([change])[0])
                self._h.copy_(self._act(self._a))
        torch.addmm(self._bias.unsqueeze(1), self._weight, self._h, out=self._logits)

    def _inner(self, name: str, index: Tensor | None) -> np.ndarray:
        """Entries of W₁ or b₁ as the compiled loops take them: entry i of b₁ as ~i."""
        entries = np.arange(len(self._a)) if index is None else index.numpy()
        return entries if name == self._w1 else np.invert(entries)

    def logits(self, candidates: Sequence[Sequence[Delta]]) -> Tensor:
        """Logits [P, C, B] under each candidate's changes, on top of what was committed."""
        if self._on_cpu:
            if isinstance(candidates, Sweep) and not (candidates.name == self._w1 and candidates.entries is None):
                return self._swept(candidates)
            if not any(self._is_product(change) for changes in candidates for change in changes):
                return self._compiled(candidates)
        found = []
        for changes in candidates:
            a, weight, bias = self._moved(changes)
            found.append(torch.addmm(bias.unsqueeze(1), weight, self._h if a is self._a else self._act(a)))
        return torch.stack(found)

    def _swept(self, sweep: Sweep) -> Tensor:
        """Logits of candidates that change the same entries of one tensor, by what they have in common."""
        values, index, count = sweep.values, sweep.entries, len(sweep)
        if sweep.name in (self._w1, self._b1):
            out = np.empty((count, *self._logits.shape), np.float32)
            entries = self._inner(sweep.name, index)
            _sweep(*self._arrays, self._code, entries, values.numpy(), out)  # type: ignore[call-arg]
            return torch.from_numpy(out)
        tensor = self._weight if sweep.name == self._w2 else self._bias
        if index is not None:
            values = values.new_zeros(count, tensor.numel()).index_copy_(1, index, values)
        if tensor is self._bias:
            return self._logits + values.unsqueeze(2)
        return torch.mm(values.view(-1, len(self._h)), self._h).view(count, *self._logits.shape).add_(self._logits)

    def _is_product(self, change: Delta) -> bool:
        """Whether a matrix product is the shortest way to what a change does: it is low-rank, or moves all of W₁."""
        return change.right is not None or (change.index is None and change.name == self._w1)

    def _moved(self, changes: Sequence[Delta]) -> tuple[Tensor, Tensor, Tensor]:
        """A, W₂ and b₂ after `changes`; the old tensors where nothing changes them. For any device."""
        a, weight, bias = self._a, self._weight, self._bias
        for change in changes:
            if change.name == self._w1:
                width = self._xt.shape[0]
                if change.right is not None:
                    a = torch.addmm(a, change.values, change.right.T @ self._xt, alpha=change.scale)
                elif change.index is None:
                    a = torch.addmm(a, change.values.view(-1, width), self._xt)
                else:
                    rows = torch.div(change.index, width, rounding_mode="floor")
                    parts = change.values.unsqueeze(1) * self._xt[change.index - rows * width]
                    a = a.index_add(0, rows, parts)
            elif change.name == self._b1:
                a = a + change.dense(a[:, 0]).unsqueeze(1)
            elif change.name == self._w2:
                weight = weight + change.dense(weight)
            else:
                bias = bias + change.dense(bias)
        return a, weight, bias

    def _pack(self, candidates: Sequence[Sequence[Delta]]) -> tuple[np.ndarray, ...]:
        """The candidates as arrays: offsets [P+1] into the values of entries of W₁, and starts [P] of their positions
        in `index`, which candidates of one selection share; b1 [P, h] or [0, h]; the new W₂ [P, C, h] or [0, C, h]; and
        b2 [P, C], new with a new W₂ and else to be added."""
        count, classes, hidden = len(candidates), *self._weight.shape
        touched = {d.name for changes in candidates for d in changes}
        b1 = np.zeros((count if self._b1 in touched else 0, hidden), np.float32)
        b2 = np.zeros((count, classes), np.float32)
        w2 = np.empty((0, classes, hidden), np.float32)
        if self._w2 in touched:
            w2 = np.repeat(self._weight.numpy()[None], count, 0)
            b2 += self._bias.numpy()
        targets = {self._b1: b1, self._w2: w2, self._b2: b2}
        index: list[np.ndarray] = []
        values: list[np.ndarray] = []
        offsets, starts = [0], []
        length, shared = 0, {}  # type: tuple[int, dict[int, int]]
        for p, changes in enumerate(candidates):
            end = offsets[-1]
            if len(changes) == 1 and id(changes[0].index) in shared:
                starts.append(shared[id(changes[0].index)])
                values.append(changes[0].values.numpy())
                offsets.append(end + values[-1].size)
                continue
            starts.append(length)
            for d in changes:
                v = d.values.numpy().reshape(-1)
                if d.name == self._w1:
                    assert d.index is not None
                    if len(changes) == 1:
                        shared[id(d.index)] = length
                    index.append(d.index.numpy())
                    values.append(v)
                    end += v.size
                    length += v.size
                elif d.index is None:
                    targets[d.name][p].reshape(-1)[:] += v
                else:
                    targets[d.name][p].reshape(-1)[d.index.numpy()] += v
            offsets.append(end)
        all_index = index[0] if len(index) == 1 else np.concatenate(index) if index else np.empty(0, np.int64)
        all_values = np.concatenate(values) if values else np.empty(0, np.float32)
        return np.array(offsets), np.array(starts), all_index, all_values, b1, w2, b2

    def _compiled(self, candidates: Sequence[Sequence[Delta]]) -> Tensor:
        offsets, starts, index, values, b1, w2, b2 = self._pack(candidates)
        if not (index.size or b1.size or w2.size):
            return self._logits + torch.from_numpy(b2).unsqueeze(2)
        out = np.empty((*b2.shape, self._a.shape[1]), np.float32)
        _all(*self._arrays, self._code, offsets, starts, index, values, b1, w2, b2, out)  # type: ignore[call-arg]
        return torch.from_numpy(out)
