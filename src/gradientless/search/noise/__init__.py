"""The noise function: any entry of any random direction, computed again wherever it is needed.

One specification (`reference`, in torch, for every device) and a compiled backend for CPU (`cpu`, numba); both give the
same bits, Gaussian values included. `Noise` chooses by the device of what it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError, brief, one_of
from gradientless.search.noise import cpu, reference, updates
from gradientless.search.selection import Selected, selected, takes_bits

DISTRIBUTIONS = (*reference.STREAMS, "sphere")
_CHUNK = 1 << 17  # entries of which a pass holds temporary tensors
_GATHERED = 1 << 15  # the same of entries that stand anywhere, each with a counter to itself
BACKENDS = ("auto", "torch", "numba")


def _require_addresses(*numbers: int) -> None:
    """Raise `UserError` for a step or a draw that the counter cannot hold: its noise would be that of another."""
    for number in numbers:
        if not 0 <= number < 1 << 32:
            raise UserError(f"noise: steps and draws must be in [0, 2^32), beyond which noise repeats, got {number}")


class Noise:
    """Entries of random directions under one seed.

    seed: any integer of 64 bits. distribution: 'gaussian', 'rademacher', 'near_normal' (a centred count of 32 fair
    bits, scaled to variance 1), or 'sphere' (uniform on the sphere of radius √d: here the Gaussian entries, which
    `Space` scales, since their length is that of a whole direction). backend: 'numba' (CPU), 'torch' (any device), or
    'auto'.
    """

    def __init__(self, seed: int, distribution: str = "gaussian", backend: str = "auto"):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise UserError(f"noise: seed must be an integer in [0, 2^64), got {brief(seed)}")
        one_of("noise", "distribution", distribution, DISTRIBUTIONS)
        one_of("noise", "backend", backend, BACKENDS)
        self.seed, self.distribution, self.backend = seed, distribution, backend
        self.kind = "gaussian" if distribution == "sphere" else distribution  # what single entries are drawn from

    def _compiled(self, device: torch.device) -> bool:
        if self.backend == "numba" and device.type != "cpu":
            raise UserError(f"noise: backend numba must be on device cpu, got {device}")
        return self.backend != "torch" and device.type == "cpu"

    def fill(
        self, name: str, step: int, draw: int, start: int, count: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Entries [start, start + count) of direction (step, draw) of tensor `name`: float32 [count]."""
        _require_addresses(step, draw)
        device = torch.device(device)
        if self._compiled(device):
            out = np.empty(count, np.float32)
            cpu.fill(self.kind, self.seed, name, step, draw, start, out)
            return torch.from_numpy(out)
        drawn = torch.empty(count, device=device)
        for at in range(0, count, _CHUNK):
            part = drawn[at : at + _CHUNK]
            part.copy_(reference.run(self.kind, self.seed, name, step, draw, start + at, part.numel(), device))
        return drawn

    def rows(
        self, name: str, step: int, draws: Sequence[int], count: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The first `count` entries of several directions of one step: float32 [len(draws), count]."""
        _require_addresses(step, *draws)
        device = torch.device(device)
        if self._compiled(device):
            out = np.empty((len(draws), count), np.float32)
            cpu.fill_rows(self.kind, self.seed, name, step, np.asarray(draws, np.int64), out)
            return torch.from_numpy(out)
        return torch.stack([self.fill(name, step, draw, 0, count, device) for draw in draws])

    def gather(self, name: str, step: int, draws: Sequence[int], index: Tensor) -> Tensor:
        """Entries at flat positions `index` (int64 [s]) of several directions of one step: float32 [len(draws), s]."""
        _require_addresses(step, *draws)
        if self._compiled(index.device):
            out = np.empty((len(draws), index.numel()), np.float32)
            cpu.gather(self.kind, self.seed, name, step, np.asarray(draws, np.int64), index.numpy(), out)
            return torch.from_numpy(out)
        rows = torch.empty(len(draws), index.numel(), device=index.device)
        for row, draw in zip(rows, draws, strict=True):
            for part, out in zip(index.split(_GATHERED), row.split(_GATHERED), strict=True):
                out.copy_(reference.values(self.kind, self.seed, name, step, draw, part))
        return rows

    def walk(
        self, name: str, flat: Tensor, terms: Sequence[tuple[float, int, int]], decay: float = 1.0, start: int = 0
    ) -> None:
        """flat ← decay · flat + Σ factor · z in place, a chunk at a time; terms: (factor, step, draw).

        flat: entries [start, start + n) of tensor `name`, contiguous. Products are rounded once (to `flat`'s dtype,
        where that is not float64), then each sum, in the order of the terms, on every backend.
        """
        for _, step, draw in terms:
            _require_addresses(step, draw)
        if self._compiled(flat.device) and flat.dtype == torch.float32:
            cpu.walk(self.kind, self.seed, name, terms, decay, flat.numpy(), start)
            return
        for at in range(0, flat.numel(), _CHUNK):
            part = flat[at : at + _CHUNK]
            if decay != 1.0:
                part.mul_(decay)
            for factor, step, draw in terms:
                drawn = self.fill(name, step, draw, start + at, part.numel(), flat.device)
                if flat.dtype == torch.float64:
                    drawn = drawn.double()
                part.add_(drawn.mul_(factor).to(flat.dtype))

    def store(self, name: str, step: int, draw: int, start: int, wide: Tensor, out: Tensor) -> None:
        """Write `wide` (float32 [count]) rounded stochastically into `out` (half precision [count], contiguous)."""
        _require_addresses(step, draw)
        if self._compiled(out.device) and out.dtype == torch.bfloat16:
            raw, half = wide.contiguous().numpy().view(np.uint32), out.view(torch.int16).numpy().view(np.uint16)
            updates.store_bfloat16(self.seed, name, step, draw, start, raw, half)
            return
        for at in range(0, wide.numel(), _CHUNK):
            part, target = wide[at : at + _CHUNK], out[at : at + _CHUNK]
            bits = self.rounding(name, step, draw, start + at, part.numel(), out.device)
            target.copy_(reference.round_stochastically(part, bits, out.dtype))

    def add_product(
        self, name: str, flat: Tensor, left: Tensor, right: Tensor, rounding: tuple[int, int] | None = None
    ) -> None:
        """flat ← flat + left · rightᵀ in place, of [o, r] and [i, r]; `flat`: all o · i entries of tensor `name`.

        Every product is rounded once, then each sum, in order. rounding: half precision is summed in single precision
        and rounded stochastically by noise (step, draw); None: the product is rounded to `flat`'s dtype and added.
        """
        _require_addresses(*(rounding or ()))
        single = left.dtype == right.dtype == torch.float32
        if self._compiled(flat.device) and single and flat.dtype == torch.float32:
            updates.add_product(left.contiguous().numpy(), right.T.contiguous().numpy(), flat.numpy())
            return
        if self._compiled(flat.device) and single and flat.dtype == torch.bfloat16 and rounding is not None:
            half = flat.view(torch.int16).numpy().view(np.uint16)
            factors = left.contiguous().numpy(), right.T.contiguous().numpy()
            updates.add_product_bfloat16(self.seed, name, *rounding, *factors, half)
            return
        columns = right.shape[0]
        rows = max(1, _CHUNK // columns)
        for first in range(0, left.shape[0], rows):
            mine = left[first : first + rows]
            total = mine[:, :1] * right[:, 0]
            for k in range(1, left.shape[1]):
                total += mine[:, k : k + 1] * right[:, k]
            at, part = first * columns, flat[first * columns : first * columns + total.numel()]
            if rounding is None:
                part += total.view(-1).to(flat.dtype)
            else:
                self.store(name, *rounding, at, part.float().add_(total.view(-1)), part)

    def rounding(self, name: str, step: int, draw: int, start: int, count: int, device: torch.device) -> Tensor:
        """Random numbers for stochastic rounding of entries [start, start + count): int32 in [0, 2^16)."""
        _require_addresses(step, draw)
        if self._compiled(device):
            out = np.empty(count, np.int32)
            cpu.rounding(self.seed, name, step, draw, start, out)
            return torch.from_numpy(out)
        bits = torch.empty(count, dtype=torch.int32, device=device)
        for at in range(0, count, _CHUNK):
            part = bits[at : at + _CHUNK]
            part.copy_(reference.rounding_run(self.seed, name, step, draw, start + at, part.numel(), device))
        return bits

    def select(self, name: str, step: int, size: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """`count` distinct positions of range(size) for block `name` at `step`, sorted: int64 [count]."""
        return self.selected(name, step, size, count, device).between(0, size)

    def selected(self, name: str, step: int, size: int, count: int, device: torch.device | str = "cpu") -> Selected:
        """The same in few bytes."""
        _require_addresses(step)
        device = torch.device(device)
        if self.backend == "torch":
            return selected(reference.select(self.seed, name, step, size, count), size, device)
        if not takes_bits(size, count):
            return selected(torch.from_numpy(cpu.select(self.seed, name, step, size, count)), size, device)
        return Selected(torch.from_numpy(cpu.mark(self.seed, name, step, size, count)).to(device), size)
