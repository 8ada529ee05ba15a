"""Space: the tuned tensors by name, their blocks, and the changes that points mean for them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradientless.delta import Delta, Sweep
from gradientless.errors import Faults, UserError, brief, count
from gradientless.search.noise import Noise
from gradientless.search.noise.reference import round_stochastically
from gradientless.search.points import ALL, ORIGIN, BufferUpdate, Direction, Point, Term, combined, scaled
from gradientless.search.selection import DEPENDS_ON_WEIGHTS, Selected, largest
from gradientless.search.uninterrupted import uninterrupted

Entries = list[tuple[str, Tensor | None]]  # per tensor of a block: flat positions, or None for all of them


_SUMMED, _ROWS, _CHUNK = 1 << 14, 1 << 16, 1 << 18  # entries handled at a time
NO_DECAY: Mapping[str, float] = {}


@dataclass(frozen=True)
class Block:
    """Tensors that are searched together, and which of their entries move.

    entries: s, how many move (None: all). lasts: steps that a selection lasts. fixed: the positions of 'fixed'.
    """

    name: str
    tensors: tuple[str, ...]
    size: int
    entries: int | None = None
    selection: str = "all"
    lasts: int = 1
    fixed: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether every entry moves: a block of at most s entries moves whole."""
        return self.fixed is None and (self.selection == "all" or self.entries is None or self.entries >= self.size)

    def birth(self, step: int) -> int:
        """The step in which the selection in force at `step` was made."""
        return step - step % self.lasts


def check_rank(noise: object, rank: object, resample_every: object) -> None:
    """Raise `UserError` unless directions of rank `rank` make sense under a distribution."""
    faults = Faults()
    for option, value in (("rank", 1 if rank is None else rank), ("resample_every", resample_every)):
        with faults:
            count("space", option, value)
    faults.require(
        rank is None or noise != "sphere", f"space: noise 'sphere' must come without rank, got rank {brief(rank)}"
    )
    faults.tell()


class Space:
    """The tensors that a search moves.

    tensors: name -> tensor, contiguous, distinct memory. noise: where directions come from. blocks: see `Block`; the
    blocks ALL (every tensor, whole) is always there.
    rank: r, for directions of low rank: a tensor of two or more dimensions is seen as a matrix of shape[0] rows, on
        which a direction is U Vᵀ / √r. U [rows, r] is noise of the direction's step under the name "TENSOR#u"; V
        [columns, r] is noise of the last step that `resample_every` divides, under "TENSOR#v". Other tensors get dense
        noise.
    """

    _KEPT = 4 << 20  # bytes of selections that are kept instead of made again, beside 1/64 of the weights
    _CACHED_ENTRIES = 1 << 20  # directions of more entries are made again instead of kept for the rest of a step

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        noise: Noise,
        blocks: Iterable[Block] = (),
        rank: int | None = None,
        resample_every: int = 1,
    ):
        check_rank(noise.distribution, rank, resample_every)
        self.tensors, self.noise, self.rank, self.resample_every = dict(tensors), noise, rank, resample_every
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        seen: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            if tensor.is_meta:
                raise UserError(f"space: tensor '{name}' must be in memory, got it on the device meta")
            if not tensor.is_contiguous():
                raise UserError(f"space: tensor '{name}' must be contiguous, got strides {tuple(tensor.stride())}")
            if tensor.numel() == 0 or not tensor.is_floating_point():
                raise UserError(f"space: tensor '{name}' must hold floats, got {tensor.numel()} of {tensor.dtype}")
            other = seen.setdefault(tensor.data_ptr(), name)
            if other != name:
                raise UserError(f"space: tensors must be distinct, got '{name}' tied to '{other}'; pass it once")
        self.blocks: dict[str, Block] = {block.name: block for block in blocks}
        total = sum(tensor.numel() for tensor in self.tensors.values())
        self._all = Block(ALL, tuple(self.tensors), total)
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self._starts: dict[str, dict[str, int]] = {}  # block -> tensor -> its first entry's place in the block
        for block in (*self.blocks.values(), self._all):
            sizes = [self.tensors[name].numel() for name in block.tensors]
            self._starts[block.name] = dict(zip(block.tensors, accumulate(sizes, initial=0), strict=False))
        self._fixed = {
            block.name: Selected(block.fixed.to(self.tensors[block.tensors[0]].device), block.size)
            for block in self.blocks.values()
            if block.fixed is not None
        }
        self.chosen: dict[tuple[str, int], Selected] = {}  # selections that cannot be made again, by block and birth
        self._drawn: dict[tuple[str, int], Selected] = {}  # random ones, as far as there is room
        self._last: dict[tuple[str, int], Selected] = {}  # the last one for which there was none
        self._room = self._KEPT + sum(tensor.nbytes for tensor in self.tensors.values()) // 64
        self._entries: dict[tuple[str, int], Entries] = {}  # of this step
        self._cache: dict[Term, tuple[Sequence[Sequence[Delta]], int]] = {}  # of this step: candidates, and which
        self._lengths: dict[Direction, float] = {}
        # Walking. The weights are at θ + standing, those of `kept` at θ + rest; θ_t is decay · θ + moved.
        self.standing: Point = ORIGIN
        self.rest: Point = ORIGIN
        self.kept: frozenset[str] = frozenset()
        self.moved: Point = ORIGIN
        self.decay: dict[str, float] = {}

    @property
    def size(self) -> int:
        """Entries of all tensors."""
        return self._all.size

    @property
    def half(self) -> bool:
        """Whether any tensor is of half precision."""
        return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in self.tensors.values())

    def block(self, name: str) -> Block:
        return self._all if name == ALL else self.blocks[name]

    # Selections ------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> list[Block]:
        """Blocks whose selection depends on the weights and has to be made in this step."""
        return [
            block
            for block in self.blocks.values()
            if block.selection in DEPENDS_ON_WEIGHTS
            and not block.whole
            and (block.name, block.birth(step)) not in self.chosen
        ]

    def choose(self, block: Block, step: int, scores: Sequence[Tensor] | None = None) -> Selected:
        """Select the entries of `block` with the highest scores, by default |θ|, from this step on; returns them.
        scores: one tensor for each of the block's, of its size."""
        assert block.entries is not None
        if scores is None:
            return self.install(block, step, largest([self.tensors[n] for n in block.tensors], block.entries, True))
        return self.install(block, step, largest(scores, block.entries))

    def install(self, block: Block, step: int, found: Selected) -> Selected:
        found = Selected(found.data.to(self.tensors[block.tensors[0]].device), block.size)
        self.chosen[block.name, block.birth(step)] = found
        return found

    def withdraw(self, block: Block, step: int) -> None:
        """Undo `install`."""
        key = (block.name, block.birth(step))
        self.chosen.pop(key, None)
        self._entries.pop(key, None)

    def inherit(self, other: Space) -> None:
        """Take over the buffers and the selections of `other`, a space of some of these tensors."""
        for name, tensors in other.buffers.items():
            self.buffer(name).update(tensors)
        self.chosen.update(other.chosen)

    def forget(self, step: int, alive: set[tuple[str, int]]) -> None:
        """Drop selections neither in force at `step` nor in `alive` ((block, birth) of directions still pending)."""
        for direction in self._mentioned():
            if direction.block in self.blocks:
                alive = alive | {(direction.block, self.blocks[direction.block].birth(direction.step))}
        self._last.clear()
        for sets in (self.chosen, self._drawn):
            for name, birth in list(sets):
                if birth != self.blocks[name].birth(step) and (name, birth) not in alive:
                    gone = sets.pop((name, birth))
                    self._room += gone.bytes if sets is self._drawn else 0

    def entries(self, block: Block, step: int) -> Entries:
        """Which entries of each tensor move along a direction of `block` born at `step`; kept for the rest of the step,
        which `pieces` does not need."""
        if block.whole:
            return [(name, None) for name in block.tensors]
        key = (block.name, block.birth(step))
        if key not in self._entries:
            found = self.selected(block, step)
            flat = found.data if block.fixed is not None else found.between(0, block.size)
            self._entries[key] = self._split(block, flat)
        return self._entries[key]

    def selected(self, block: Block, step: int) -> Selected:
        """The selection of `block` in force at `step`."""
        key = (block.name, block.birth(step))
        if block.fixed is not None:
            return self._fixed[block.name]
        if block.selection in DEPENDS_ON_WEIGHTS:
            return self.chosen[key]
        if key not in self._drawn and key not in self._last:
            assert block.entries is not None
            device = self.tensors[block.tensors[0]].device
            found = self.noise.selected(block.name, key[1], block.size, block.entries, device)
            if found.bytes <= self._room:
                self._drawn[key] = found
                self._room -= found.bytes
            else:  # passes go through the blocks in turn: those that came first stay for the next pass
                self._last = {key: found}
            return found
        return self._drawn[key] if key in self._drawn else self._last[key]

    def pieces(self, name: str, direction: Direction, count: int) -> Iterator[Tensor]:
        """Which entries of tensor `name` move along `direction`, of a block that does not move whole: flat positions
        (int64), `count` at a time, made as they are asked for."""
        start = self._starts[direction.block][name]
        found = self.selected(self.block(direction.block), direction.step)
        for part in found.pieces(start, start + self.tensors[name].numel(), count):
            yield part - start if start else part

    def between(self, name: str, direction: Direction, start: int, stop: int) -> Tensor:
        """The same of entries [start, stop): int64 [n]."""
        first = self._starts[direction.block][name]
        found = self.selected(self.block(direction.block), direction.step)
        return found.between(first + start, first + stop) - first

    def _split(self, block: Block, flat: Tensor) -> Entries:
        """Flat positions of a block as flat positions of its tensors."""
        if len(block.tensors) == 1:
            return [(block.tensors[0], flat)]
        found: Entries = []
        start = 0
        for name in block.tensors:
            end = start + self.tensors[name].numel()
            inside = flat[(flat >= start) & (flat < end)] - start
            if inside.numel():
                found.append((name, inside))
            start = end
        return found

    # From points to changes ------------------------------------------------------------------------------------------

    def deltas(self, points: Sequence[Point]) -> Sequence[Sequence[Delta]]:
        """What each point changes. Candidates along directions of one block share their `index` objects."""
        sweep = self._sweep(points) if len(points) > 1 else None
        if sweep is not None:
            return sweep
        made = self._generate({term for terms in points for term in terms})
        return [[change for term in terms for change in made[term]] for terms in points]

    def _sweep(self, points: Sequence[Point]) -> Sweep | None:
        """New points of one term each (or none) along different directions of one tensor and step, as a `Sweep`."""
        terms = [point[0] for point in points if point]
        if not terms or max(map(len, points)) > 1 or terms[0] in self._cache:
            return None
        families = {(direction.step, direction.block, direction.buffer) for _, direction in terms}
        (step, name, buffer), tensors = next(iter(families)), self.block(terms[0][1].block).tensors
        if buffer or len(families) > 1 or len(tensors) > 1 or self.low_rank(tensors[0]):
            return None
        ((tensor, index),) = self.entries(self.block(name), step)
        draws, factors = [direction.draw for _, direction in terms], self._factors(terms)
        values = self._rows(self.tensors[tensor], tensor, index, step, draws, factors)
        places = range(len(points))
        if len(terms) < len(points):
            places = [p for p, point in enumerate(points) if point]  # type: ignore[assignment]
            values = values.new_zeros(len(points), values.shape[1]).index_copy_(0, torch.tensor(places), values)
        sweep = Sweep(tensor, values, index)
        if values.numel() <= self._CACHED_ENTRIES:
            self._cache.update((term, (sweep, p)) for term, p in zip(terms, places, strict=True))
        return sweep

    def _factors(self, terms: Sequence[Term]) -> list[float]:
        """What the noise of each term is multiplied by."""
        return [coefficient * self.length(direction) for coefficient, direction in terms]

    def _rows(
        self,
        target: Tensor,
        name: str,
        index: Tensor | None,
        step: int,
        draws: list[int],
        factors: list[float],
    ) -> Tensor:
        """Noise at `index` for each of `draws`, times its factor, in the dtype of `target`: [len(draws), s]."""
        distinct = sorted(set(draws))
        if index is None:
            rows = self.noise.rows(name, step, distinct, target.numel(), target.device)
        else:
            rows = self.noise.gather(name, step, distinct, index)
        if distinct != draws:
            rows = rows[[distinct.index(draw) for draw in draws]]
        if target.dtype == torch.float64:
            rows = rows.double()
        _scale(rows, factors)
        return rows if rows.dtype == target.dtype else rows.to(target.dtype)

    def _generate(self, terms: set[Term]) -> dict[Term, Sequence[Delta]]:
        """The changes that each of `terms` is; those of one block and step are made in one call."""
        made: dict[Term, Sequence[Delta]] = {}
        families: dict[tuple[int, str], list[Term]] = {}
        for term in terms:
            kept = self._cache.get(term)
            direction = term[1]
            if kept is not None:
                made[term] = kept[0][kept[1]]
            elif direction.buffer:
                made[term] = self._from_buffer(*term)
            else:
                families.setdefault((direction.step, direction.block), []).append(term)
        for (step, name), family in families.items():
            family.sort(key=lambda term: term[1].draw)
            draws, factors = [direction.draw for _, direction in family], self._factors(family)
            parts: list[list[Delta]] = [[] for _ in family]
            size = 0
            for tensor, index in self.entries(self.block(name), step):
                if self.low_rank(tensor):
                    pairs = {direction: self._pair(tensor, direction) for _, direction in family}
                    for part, (coefficient, direction) in zip(parts, family, strict=True):
                        change = self._low_rank(tensor, index, coefficient, pairs[direction])
                        if index is not None:
                            change = Delta(tensor, change.values.to(self.tensors[tensor].dtype), index)
                        part.append(change)
                    continue
                scaled = self._rows(self.tensors[tensor], tensor, index, step, draws, factors)
                size += scaled.numel()
                for part, row in zip(parts, scaled.unbind(), strict=True):
                    part.append(Delta(tensor, row, index))
            made.update(zip(family, parts, strict=True))
            if size <= self._CACHED_ENTRIES:
                self._cache.update((term, (parts, p)) for p, term in enumerate(family))
        return made

    def large(self, terms: Point) -> bool:
        """Whether the changes along `terms` are more entries than are made at one time, beside those kept."""
        made = 0
        for term in terms:
            block = self.block(term[1].block)
            if term in self._cache:
                continue
            if block.whole:
                made += sum(self.tensors[name].numel() for name in block.tensors if not self.low_rank(name))
            elif block.fixed is not None:
                made += block.fixed.numel()
            else:
                made += block.entries or 0
        return made > self._CACHED_ENTRIES

    def low_rank(self, name: str) -> bool:
        """Whether directions of tensor `name` are of low rank."""
        return self.rank is not None and self.tensors[name].ndim >= 2

    def _pair(self, name: str, direction: Direction) -> tuple[Tensor, Tensor]:
        """U and V of a direction; its points share them, which is how an injection knows to compute with them once."""
        tensor, rank = self.tensors[name], self.rank or 1
        rows, device = tensor.shape[0], tensor.device
        columns = tensor.numel() // rows
        birth = direction.step - direction.step % self.resample_every
        left = self.noise.fill(f"{name}#u", direction.step, direction.draw, 0, rows * rank, device).view(rows, rank)
        right = self.noise.fill(f"{name}#v", birth, direction.draw, 0, columns * rank, device).view(columns, rank)
        if tensor.dtype == torch.float64:
            left, right = left.double(), right.double()
        return left, right

    def product(self, name: str, index: Tensor | None, coefficient: float, direction: Direction) -> Delta:
        """What `coefficient` times a direction of low rank changes of a tensor, at `index` or (None) everywhere."""
        return self._low_rank(name, index, coefficient, self._pair(name, direction))

    def _low_rank(self, name: str, index: Tensor | None, coefficient: float, pair: tuple[Tensor, Tensor]) -> Delta:
        left, right = pair
        rank, columns = left.shape[1], right.shape[0]
        scale = coefficient / math.sqrt(rank)
        if index is None:
            return Delta(name, left, None, right, scale)
        products = (left[index // columns] * scale) * right[index % columns]
        total = products[:, 0].clone()
        for k in range(1, rank):
            total += products[:, k]
        return Delta(name, total, index)

    def factors(self, direction: Direction, coefficient: float = 1.0) -> dict[str, Delta]:
        """What `coefficient` times `direction` changes, by tensor: of low rank where directions are."""
        return {change.name: change for change in self.deltas([((coefficient, direction),)])[0]}

    def length(self, direction: Direction) -> float:
        """What the drawn entries of `direction` are multiplied by: √d / ‖g‖ over its d entries for 'sphere', else 1."""
        if self.noise.distribution != "sphere" or direction.buffer:
            return 1.0
        if direction not in self._lengths:
            squares, count = 0.0, 0
            for name in self.block(direction.block).tensors:
                for drawn in self._noise_of(name, direction):
                    count += drawn.numel()
                    squares += float(drawn.double().square().sum())
            self._lengths[direction] = math.sqrt(count / squares)
        return self._lengths[direction]

    def _noise_of(self, name: str, direction: Direction) -> Iterator[Tensor]:
        """The entries that `direction` draws for a tensor, in pieces short enough for a sum that no number of threads
        changes."""
        tensor, step, draw = self.tensors[name], direction.step, direction.draw
        if self.block(direction.block).whole:
            for at in range(0, tensor.numel(), _SUMMED):
                yield self.noise.fill(name, step, draw, at, min(_SUMMED, tensor.numel() - at), tensor.device)
        else:
            for part in self.pieces(name, direction, _SUMMED):
                yield self.noise.gather(name, step, [draw], part)[0]

    def _from_buffer(self, coefficient: float, direction: Direction) -> list[Delta]:
        buffer = self.buffers[direction.buffer]
        found = []
        for name, index in self.entries(self.block(direction.block), direction.step):
            flat = buffer[name].view(-1)
            found.append(Delta(name, (flat if index is None else flat[index]) * coefficient, index))
        return found

    # Moves -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, terms: Point, decay: Mapping[str, float] = NO_DECAY, step: int | None = None) -> None:
        """θ ← decay · θ + `terms`, a chunk at a time: each product is rounded once, then each sum, term by term.

        decay: tensor name -> factor. step: tensors of half precision are summed in single precision and rounded
        stochastically, by noise of that step, so that changes below their resolution arrive in the mean; None: as at
        a probe, to the nearest.
        """
        if step is None and not decay:
            for kept, run in groupby(terms, self._cache.__contains__):
                if not kept:
                    self._passes(dict.fromkeys(self.tensors, (1.0, tuple(run))))
                    continue
                for term in run:
                    candidates, at = self._cache[term]
                    for change in candidates[at]:
                        self._add(change, self.tensors[change.name])
            return
        self._passes({name: (decay.get(name, 1.0), terms) for name in self.tensors}, step)

    def _passes(self, moves: Mapping[str, tuple[float, Point]], step: int | None = None) -> None:
        """One pass over each tensor of `moves`: name -> decay and terms."""
        found: dict[int, dict[str, list[Term]]] = {}  # by point, of which there are few, and tensor
        for name, (decay, terms) in moves.items():
            if id(terms) not in found:
                found[id(terms)] = self._by_tensor(terms)
            here = found[id(terms)].get(name, [])
            if here or decay != 1.0:
                self._pass(name, decay, here, step)

    def _by_tensor(self, terms: Point) -> dict[str, list[Term]]:
        """The terms that move an entry of each tensor."""
        found: dict[str, list[Term]] = {}
        for term in terms:
            block = self.block(term[1].block)
            sure = block.whole or len(block.tensors) == 1
            for name in block.tensors:
                if sure or any(True for _ in self.pieces(name, term[1], _ROWS)):
                    found.setdefault(name, []).append(term)
        return found

    def _pass(self, name: str, decay: float, terms: Sequence[Term], step: int | None) -> None:
        """`terms` that move entries of the tensor; consecutive terms of dense noise take one pass together."""
        flat = self.tensors[name].detach().view(-1)
        half = step is not None and flat.dtype in (torch.bfloat16, torch.float16)
        drawn: list[tuple[float, int, int]] = []
        done = 0  # passes before this one, for the bits of the rounding

        def flush() -> None:
            nonlocal drawn, decay, done
            if not drawn and decay == 1.0:
                return
            if half:
                for at in range(0, flat.numel(), _CHUNK):
                    wide = flat[at : at + _CHUNK].float()
                    self.noise.walk(name, wide, drawn, decay, at)
                    self._store(name, flat, at, wide, step or 0, done)
            else:
                self.noise.walk(name, flat, drawn, decay)
            drawn, decay = [], 1.0
            done += 1

        for coefficient, direction in terms:
            whole = self.block(direction.block).whole
            if whole and not direction.buffer and not self.low_rank(name):
                drawn.append((coefficient * self.length(direction), direction.step, direction.draw))
                continue
            flush()
            place = 0  # among the entries that the term moves
            for index in (None,) if whole else self.pieces(name, direction, _ROWS):
                change = self._single(name, index, coefficient, direction, wide=half)
                if not half:
                    self._add(change, self.tensors[name].detach())
                elif change.right is not None:
                    self.noise.add_product(name, flat, change.values * change.scale, change.right, (step or 0, done))
                elif index is None:
                    for at in range(0, flat.numel(), _CHUNK):
                        wide = flat[at : at + _CHUNK].float().add_(change.values.view(-1)[at : at + _CHUNK])
                        self._store(name, flat, at, wide, step or 0, done)
                else:
                    bits = self.noise.rounding(name, step or 0, done, place, index.numel(), flat.device)
                    flat[index] = round_stochastically(flat[index].float() + change.values, bits, flat.dtype)
                    place += index.numel()
            done += 1
        flush()

    def _add(self, change: Delta, tensor: Tensor) -> None:
        """Add `change` to `tensor` in place, a product UVᵀ in a fixed order and without making it."""
        if change.right is None:
            change.add_to(tensor)
        else:
            self.noise.add_product(change.name, tensor.view(-1), change.values * change.scale, change.right)

    def _store(self, name: str, flat: Tensor, at: int, wide: Tensor, step: int, done: int) -> None:
        self.noise.store(name, step, done, at, wide, flat[at : at + wide.numel()])

    @torch.no_grad()
    def store(self, name: str, values: Tensor, start: int, step: int) -> None:
        """Write `values` (float32 or the tensor's dtype, [n]) to entries [start, start + n) of a tensor, half precision
        rounded stochastically by noise of `step`: for rules that compute their update themselves."""
        flat = self.tensors[name].detach().view(-1)
        if flat.dtype in (torch.bfloat16, torch.float16) and values.dtype != flat.dtype:
            self._store(name, flat, start, values.float(), step, 0)
        else:
            flat[start : start + values.numel()] = values

    # Walking ---------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the weights stand at θ_t."""
        return not (self.standing or self.rest or self.moved or self.decay)

    def _mentioned(self) -> set[Direction]:
        """The directions along which the weights stand away from θ_t."""
        return {direction for _, direction in (*self.standing, *self.rest, *self.moved)}

    @torch.no_grad()
    def move_to(self, terms: Point, kept: frozenset[str] = frozenset()) -> None:
        """Go in one pass over memory from wherever the weights stand to θ_t + `terms`; restore, update and next probe
        become one sum for each direction. Tensors in `kept` go to θ_t."""
        sums: dict[tuple[float, bool, bool], Point] = {}
        moves: dict[str, tuple[float, Point]] = {}
        for name in self.tensors:
            kind = self.decay.get(name, 1.0), name in self.kept, name in kept
            if kind not in sums:
                old, new = self.rest if kind[1] else self.standing, ORIGIN if kind[2] else terms
                sums[kind] = combined(scaled(-kind[0], old), self.moved, new)
            moves[name] = kind[0], sums[kind]
        with uninterrupted():  # between two tensors nobody could say where the weights stand
            self._passes(moves)
            self.standing, self.rest, self.kept, self.moved, self.decay = terms, ORIGIN, kept, ORIGIN, {}

    def settle(self) -> None:
        """Bring the weights to θ_t, if they are not there."""
        if not self.settled:
            self.move_to(ORIGIN, self.kept)

    def commit(self, terms: Point, decay: Mapping[str, float] = NO_DECAY) -> None:
        """θ ← decay · θ + `terms` without touching memory; the next move brings it along."""
        if self.decay:
            self.settle()
        if any(factor != 1.0 for factor in decay.values()):
            self.moved, self.decay = terms, dict(decay)
        else:
            self.standing = combined(self.standing, scaled(-1.0, terms))
            self.rest = combined(self.rest, scaled(-1.0, terms))

    def walk_state(self) -> dict[str, Any]:
        """Where the weights stand, as JSON-able data."""
        plain = {key: [[c, *d] for c, d in getattr(self, key)] for key in ("standing", "rest", "moved")}
        return {**plain, "decay": dict(self.decay), "kept": sorted(self.kept)}

    def load_walk_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `walk_state` gave, for weights that stand there."""
        for key in ("standing", "rest", "moved"):
            setattr(self, key, tuple((c, Direction(*rest)) for c, *rest in state[key]))
        self.decay, self.kept = dict(state["decay"]), frozenset(state["kept"])

    @contextlib.contextmanager
    def rows_at(self, rows: Mapping[str, Tensor], terms: Point) -> Iterator[None]:
        """Inside the block, these rows (int64, distinct; of tensors seen as matrices) stand at `terms`; afterwards they
        have their old bits back."""
        saved = {name: self.tensors[name].detach()[index] for name, index in rows.items()}
        try:
            for name, index in rows.items():
                self._move_rows(name, index, terms)
            yield
        finally:
            with uninterrupted():
                for name, old in saved.items():
                    self.tensors[name].detach()[rows[name]] = old

    def _move_rows(self, name: str, rows: Tensor, terms: Point) -> None:
        tensor = self.tensors[name].detach()
        columns = tensor.numel() // tensor.shape[0]
        terms = tuple(term for term in terms if name in self._starts[term[1].block])
        for some in rows.split(max(1, _ROWS // columns)):
            positions = (some.unsqueeze(1) * columns + torch.arange(columns, device=rows.device)).view(-1)
            for coefficient, direction in terms:
                block, index = self.block(direction.block), positions
                if not block.whole:
                    start = self._starts[block.name][name]
                    index = positions[self.selected(block, direction.step).has(positions + start)]
                self._add(self._single(name, index, coefficient, direction), tensor)

    def _single(
        self, name: str, index: Tensor | None, coefficient: float, direction: Direction, wide: bool = False
    ) -> Delta:
        """The change of one tensor at `index` that one term is; dense noise only at an index. wide: in float32."""
        dtype = torch.float32 if wide else self.tensors[name].dtype
        if direction.buffer:
            flat = self.buffers[direction.buffer][name].view(-1)
            return Delta(name, (flat if index is None else flat[index]) * coefficient, index)
        if self.low_rank(name):
            change = self.product(name, index, coefficient, direction)
            return change if index is None else Delta(name, change.values.to(dtype), index)
        assert index is not None
        drawn = self.noise.gather(name, direction.step, [direction.draw], index)
        drawn = drawn.double() if dtype == torch.float64 else drawn
        _scale(drawn, [coefficient * self.length(direction)])
        return Delta(name, drawn[0].to(dtype), index)

    @contextlib.contextmanager
    def at(self, changes: Sequence[Delta]) -> Iterator[None]:
        """The weights stand at `changes` inside the block; afterwards every entry has its old bits back."""
        with self._restored([(change.name, change.index) for change in changes]):
            with torch.no_grad():
                for change in changes:
                    self._add(change, self.tensors[change.name])
            yield

    @contextlib.contextmanager
    def taken(self, terms: Point, step: int | None = None) -> Iterator[None]:
        """The weights stand where `add` at `step` brings them inside the block; afterwards they have their old bits
        back."""
        directions = dict.fromkeys(direction for _, direction in terms)
        with self._restored([place for d in directions for place in self.entries(self.block(d.block), d.step)]):
            self.add(terms, step=step)
            yield

    @contextlib.contextmanager
    def _restored(self, places: Sequence[tuple[str, Tensor | None]]) -> Iterator[None]:
        """Whatever happens to the entries at `places` (None: all of a tensor) inside the block, afterwards they have
        their old bits back. A place is held once, however often it is named."""
        whole = {name for name, index in places if index is None}
        saved: dict[tuple[str, int], tuple[Tensor, Tensor | None, Tensor]] = {}
        for name, index in places:
            if (index is None or name not in whole) and (name, id(index)) not in saved:
                flat = self.tensors[name].detach().view(-1)
                saved[name, id(index)] = flat, index, flat.clone() if index is None else flat[index]
        try:
            yield
        finally:
            with uninterrupted():
                for flat, index, old in saved.values():
                    if index is None:
                        flat.copy_(old)
                    else:
                        flat[index] = old

    @torch.no_grad()
    def update_buffers(self, updates: Mapping[str, BufferUpdate]) -> None:
        """Let the named dense buffers follow; a buffer starts at zero and counts as memory of the tensors' size."""
        for name, (decay, terms) in updates.items():
            changes = self.deltas([terms])[0]
            for buffer in self.buffer(name).values():
                buffer.mul_(decay)
            for change in changes:
                self._add(change, self.buffers[name][change.name])

    def buffer(self, name: str) -> dict[str, Tensor]:
        """The named dense buffer, made of zeros when it is new."""
        if name not in self.buffers:
            self.buffers[name] = {key: torch.zeros_like(tensor).detach() for key, tensor in self.tensors.items()}
        return self.buffers[name]

    def end_step(self) -> None:
        """Forget what was kept for the step's candidates, but for the lengths that the way back to θ needs."""
        self._cache.clear()
        self._entries.clear()
        self._lengths = {direction: self._lengths[direction] for direction in self._lengths.keys() & self._mentioned()}

    @torch.no_grad()
    def squared_norms(
        self, name: str, points: Sequence[Point], changes: Sequence[Sequence[Delta]] | None = None
    ) -> list[float]:
        """‖θ‖² of tensor `name` at each of `points`, in double precision, a chunk at a time.

        changes: of each point, where they have been made. One that is dense or indexed is taken from there.
        """
        flat = self.tensors[name].detach().view(-1)
        base = sum(float(torch.dot(wide, wide)) for wide in map(Tensor.double, flat.split(_ROWS)))
        found = []
        for number, terms in enumerate(points):
            mine = [change for change in (changes[number] if changes is not None else ()) if change.name == name]
            if len(mine) == 1 and mine[0].right is None:
                old = flat if mine[0].index is None else flat[mine[0].index]
                found.append(base + _rise(old, old + mine[0].values.view(-1)))
                continue
            places = [dict(self.entries(self.block(d.block), d.step)) for _, d in terms]
            here = [(term, place[name]) for term, place in zip(terms, places, strict=True) if name in place]
            rise = 0.0
            alone = here[0][1] if len(here) == 1 else None
            if alone is not None:  # cost follows the entries that change
                for part in alone.split(_CHUNK):
                    rise += _rise(flat[part], flat[part] + self._single(name, part, *here[0][0]).values)
            elif here:
                pairs = {d: self._pair(name, d) for (_, d), _ in here if self.low_rank(name) and not d.buffer}
                size = _CHUNK // (4 * self.rank) if pairs and self.rank else _CHUNK
                for at in range(0, flat.numel(), max(1, size)):
                    old = flat[at : at + size]
                    new = old.clone()
                    for term, index in here:
                        self._add_piece(name, new, at, term, index, pairs.get(term[1]))
                    rise += _rise(old, new)
            found.append(base + rise)
        return found

    def _add_piece(
        self, name: str, piece: Tensor, at: int, term: Term, index: Tensor | None, pair: tuple[Tensor, Tensor] | None
    ) -> None:
        """Add one term to `piece`, entries [at, at + n) of a tensor. pair: U and V of a direction of low rank."""
        coefficient, direction = term
        if index is None and direction.buffer:
            piece += self.buffers[direction.buffer][name].view(-1)[at : at + piece.numel()] * coefficient
        elif index is None and pair is None:
            drawn = coefficient * self.length(direction), direction.step, direction.draw
            self.noise.walk(name, piece, [drawn], start=at)
        else:
            if index is None:
                inside = torch.arange(at, at + piece.numel(), device=piece.device)
            else:
                inside = index[(index >= at) & (index < at + piece.numel())]
            if pair is None:
                change = self._single(name, inside, coefficient, direction)
            else:
                change = self._low_rank(name, inside, coefficient, pair)
            piece[inside - at] += change.values.to(piece.dtype)


def _rise(old: Tensor, new: Tensor) -> float:
    """‖new‖² - ‖old‖², in double precision."""
    return float((new.double().square() - old.double().square()).sum())


def _scale(rows: Tensor, factors: list[float]) -> None:
    """Multiply each of `rows` ([n, s]) by its factor, rounded to the rows' dtype, in place."""
    if rows.device.type == "cpu":
        array = rows.numpy()  # the same product in half the time of a small torch operation
        array *= np.array(factors, array.dtype)[:, None]
    else:
        rows.mul_(torch.tensor(factors, dtype=rows.dtype, device=rows.device).unsqueeze(1))
