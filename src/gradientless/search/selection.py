"""Which entries of a block move: thesis section 3.1.

Random sets are functions of (seed, step) and are never stored. Sets that depend on the weights (magnitude) or on
measurements (Fisher) are made once, at their birth, and kept while a direction of that birth is alive. A set takes at
most a bit for each entry of its block, 1/32 of weights in single precision, and is read a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError, brief, count, one_of

SELECTIONS = ("all", "random", "magnitude", "fisher", "fixed")
DEPENDS_ON_WEIGHTS = ("magnitude", "fisher")
WINDOW, _READ = 1 << 17, 1 << 16  # entries that are looked through at a time, to choose them and to read them


class Selected:
    """Which entries of a block are selected, in few bytes.

    data: their positions (integers [s]); or bits, uint8 [⌈size / 8⌉], entry i in bit i % 8 of byte i // 8.
    size: entries of the block.
    """

    def __init__(self, data: Tensor, size: int):
        self.data, self.size = data, size

    @property
    def bytes(self) -> int:
        return self.data.nbytes

    def between(self, start: int, stop: int) -> Tensor:
        """The selected positions in [start, stop), in their order: int64 [n]."""
        if self.data.dtype != torch.uint8:
            whole = start == 0 and stop == self.size
            return (self.data if whole else self.data[(self.data >= start) & (self.data < stop)]).long()
        first = start // 8
        data, inside = self.data[first : -(-stop // 8)], slice(start - 8 * first, stop - 8 * first)
        if data.device.type == "cpu":  # in a fifth of the time
            bits = np.unpackbits(data.numpy(), bitorder="little").view(bool)
            return torch.from_numpy(np.flatnonzero(bits[inside])).add_(start)
        return torch.nonzero((data.unsqueeze(1) >> _places(data.device) & 1).view(-1)[inside]).view(-1).add_(start)

    def pieces(self, start: int, stop: int, count: int) -> Iterator[Tensor]:
        """`between`, `count` at a time, the last piece the shorter."""
        width = _READ if self.data.dtype == torch.uint8 else stop - start
        held = torch.empty(0, dtype=torch.int64, device=self.data.device)
        for at in range(start, stop, width):
            found = self.between(at, min(at + width, stop))
            held = torch.cat([held, found]) if held.numel() else found
            while held.numel() >= count:
                yield held[:count]
                held = held[count:]
        if held.numel():
            yield held

    def has(self, positions: Tensor) -> Tensor:
        """Which of `positions` (int64 [n]) are selected: bool [n]."""
        if self.data.dtype != torch.uint8:
            return torch.isin(positions, self.data)
        return self.data[positions >> 3] >> (positions & 7).to(torch.uint8) & 1 == 1


def takes_bits(size: int, count: int) -> bool:
    """Whether `count` of `size` entries take no more as bits than as positions."""
    return size <= 32 * count


def packed(windows: Iterable[Tensor], size: int, count: int, device: torch.device) -> Selected:
    """`count` of `size` entries in few bytes. windows: the positions (int64, sorted) in each `WINDOW` entries."""
    if not takes_bits(size, count):
        return Selected(torch.cat([positions.to(device, _kind(size)) for positions in windows]), size)
    bits = torch.empty(-(-size // 8), dtype=torch.uint8, device=device)
    for part, at, positions in zip(bits.split(WINDOW // 8), range(0, size, WINDOW), windows, strict=True):
        marks = torch.zeros(8 * part.numel(), dtype=torch.uint8, device=device)
        marks[positions.to(device) - at] = 1
        part.copy_((marks.view(-1, 8) << _places(device)).sum(1))
    return Selected(bits, size)


def selected(positions: Tensor, size: int, device: torch.device) -> Selected:
    """Sorted `positions` (int64 [s]) of `size`, in few bytes."""
    if not takes_bits(size, positions.numel()):
        return Selected(positions.to(device, _kind(size)), size)
    edges = torch.arange(0, size + WINDOW, WINDOW, device=positions.device)
    ends = torch.searchsorted(positions, edges).tolist()
    return packed((positions[start:end] for start, end in pairwise(ends)), size, positions.numel(), device)


def largest(scores: Sequence[Tensor], count: int, absolute: bool = False) -> Selected:
    """The positions of the `count` largest of `scores`, flat and one after another, or of their absolute values; among
    equals the lower position wins. A few arrays of `WINDOW` entries are held."""
    flats = [tensor.detach().reshape(-1) for tensor in scores]
    starts = list(accumulate(map(len, flats), initial=0))
    size, device = starts.pop(), flats[0].device
    wide = torch.float64 if any(flat.dtype == torch.float64 for flat in flats) else torch.float32

    def windows() -> Iterator[Tensor]:
        for at in range(0, size, WINDOW):
            ends = ((max(0, at - start), max(0, at + WINDOW - start)) for start in starts)
            part = torch.cat([flat[first:end].to(wide) for flat, (first, end) in zip(flats, ends, strict=True)])
            yield part.abs_() if absolute else part

    least, equals = _least_of_largest(windows, count, wide)

    def chosen() -> Iterator[Tensor]:
        left = equals
        for at, part in zip(range(0, size, WINDOW), windows(), strict=True):
            found = part > least
            equal = torch.nonzero(part == least).view(-1)[:left]
            found[equal] = True
            left -= equal.numel()
            yield torch.nonzero(found).view(-1).add_(at)

    return packed(chosen(), size, count, device)


def _least_of_largest(windows: Callable[[], Iterable[Tensor]], count: int, wide: torch.dtype) -> tuple[float, int]:
    """The least of the `count` largest, and how many of these are equal to it. windows: floats of dtype `wide`."""
    if count <= WINDOW:
        best = torch.empty(0, dtype=wide)
        for part in windows():
            joined = torch.cat([best.to(part.device), part])
            best = torch.topk(joined, min(count, joined.numel())).values
        return float(best[-1]), int((best == best[-1]).sum())
    # Without sorting: as integers in the order of the floats, by the digits to the base 2^16, the first one signed.
    kind, digits = (torch.int64, 4) if wide == torch.float64 else (torch.int32, 2)
    most, least, equals = torch.iinfo(kind).max, 0, count
    for digit in reversed(range(digits)):
        leading = digit == digits - 1
        tally = torch.zeros(1 << 16, dtype=torch.int64)
        for part in (part for window in windows() for part in window.split(_READ)):
            raw = part.add(0.0).view(kind).long()  # the two zeros are one
            found = torch.where(raw < 0, raw ^ most, raw) >> 16 * digit
            found = found + (1 << 15) if leading else found[found >> 16 == least] & 0xFFFF
            tally += torch.bincount(found, minlength=1 << 16).cpu()
        from_top = tally.flip(0).cumsum(0)
        above = int((from_top < equals).sum())
        equals -= int(from_top[above - 1]) if above else 0
        least = (1 << 15) - 1 - above if leading else (least << 16) + (1 << 16) - 1 - above
    return float(torch.tensor([least if least >= 0 else least ^ most], dtype=kind).view(wide)), equals


def _kind(size: int) -> torch.dtype:
    return torch.int32 if size <= 2**31 else torch.int64


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check(owner: str, selection: str, entries: int | None, indices: object, name: str, size: int) -> None:
    """Raise `UserError`, naming the tensor, unless the options of a selection make sense for `size` entries."""
    one_of(owner, "selection", selection, SELECTIONS)
    if entries is not None:
        count(owner, "entries", entries, f" for tensor '{name}'")
    if (selection == "fixed") != (indices is not None):
        raise UserError(f"{owner}: indices must be given with selection 'fixed' and only then, for tensor '{name}'")
    if indices is not None:
        try:
            flat = torch.as_tensor(indices).view(-1)
        except (TypeError, ValueError, RuntimeError):  # text, rows of several lengths, numbers beyond 64 bits
            flat = torch.empty(0)
        whole = flat.numel() > 0 and flat.dtype in _WHOLE
        if not whole or int(flat.min()) < 0 or int(flat.max()) >= size or flat.unique().numel() != flat.numel():
            told = f"indices must be distinct positions in [0, {size}) for tensor '{name}', got {brief(indices)}"
            raise UserError(f"{owner}: {told}")
