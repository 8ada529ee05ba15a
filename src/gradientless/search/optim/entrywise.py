"""Rules that need the estimate entry by entry: they go through the tensors a piece at a time, never a dense copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradientless.errors import Faults, count
from gradientless.search.optim.base import Conversation
from gradientless.search.optim.spsa import SPSA
from gradientless.search.points import Direction, Point, Update
from gradientless.search.space import Space

PIECE = 1 << 18  # entries that are held at a time


def entries(space: Space, terms: Point, name: str, start: int, stop: int) -> Tensor:
    """Entries [start, stop) of tensor `name` of a sum of directions: each product is rounded once, then each sum."""
    tensor = space.tensors[name]
    total = torch.zeros(stop - start, dtype=working(tensor), device=tensor.device)
    for coefficient, direction in terms:
        block = space.block(direction.block)
        if name not in block.tensors:
            continue
        factor = coefficient * space.length(direction)
        if space.low_rank(name):
            total += _low_rank(space, coefficient, direction, name, start, stop)
        elif block.whole:
            space.noise.walk(name, total, [(factor, direction.step, direction.draw)], start=start)
        else:
            inside = space.between(name, direction, start, stop)
            drawn = space.noise.gather(name, direction.step, [direction.draw], inside)[0]
            total[inside - start] += drawn.to(total.dtype) * factor
    return total


def _low_rank(space: Space, coefficient: float, direction: Direction, name: str, start: int, stop: int) -> Tensor:
    """The same of one direction of low rank: only the rows of U that the piece meets are multiplied out."""
    if not space.block(direction.block).whole:
        inside = space.between(name, direction, start, stop)
        values = space.product(name, inside, coefficient, direction).values
        piece = torch.zeros(stop - start, dtype=values.dtype, device=values.device)
        piece[inside - start] = values
        return piece
    change = space.product(name, None, coefficient, direction)
    assert change.right is not None
    columns = change.right.shape[0]
    first, last = start // columns, -(-stop // columns)
    left = change.values[first:last] * change.scale
    rows = left[:, :1] * change.right[:, 0]
    for k in range(1, left.shape[1]):
        rows += left[:, k : k + 1] * change.right[:, k]
    return rows.reshape(-1)[start - first * columns : stop - first * columns]


def working(tensor: Tensor) -> torch.dtype:
    """The precision in which a rule computes: double for double, else single."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Window:
    """The estimates of the last steps as sums of directions: a few scalars each, the noise is made again."""

    def __init__(self, length: int):
        self.estimates: deque[Point] = deque(maxlen=length)

    def directions(self) -> Iterator[Direction]:
        for terms in self.estimates:
            for _, direction in terms:
                yield direction

    def state(self) -> list[Any]:
        return [[[c, d.step, d.draw, d.block] for c, d in terms] for terms in self.estimates]

    def load(self, state: list[Any]) -> None:
        self.estimates.clear()
        for terms in state:
            self.estimates.append(tuple((c, Direction(step, draw, block)) for c, step, draw, block in terms))


class Entrywise(SPSA):
    """A rule that says, for a piece of a tensor, by what it changes.

    Its `Update` holds the estimate, not the change: `apply` makes the change. It remembers past estimates in dense
    buffers (`buffers`, of the tensors' size each, in single precision at the least) or in a window of `window` steps.
    """

    buffers: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], window: int | None = None, **options: Any):
        self._length, self.window = window, None
        self.taken = 0  # estimates so far
        super().__init__(params, **options)
        self.window = None if window is None else Window(window)

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        with faults:
            if self._length is not None:
                count(self.name, "window", self._length)

    def _build(self) -> None:
        super()._build()
        for kind in self.buffers if self._length is None else ():
            self.space.buffers[kind] = {
                name: torch.zeros_like(tensor, dtype=working(tensor)).detach()
                for name, tensor in self.space.tensors.items()
            }

    def search(self, t: int) -> Conversation:
        estimate = yield from self.estimated(t)
        if estimate is None:
            return self.skip()
        self.taken += 1
        if self.window is not None:
            self.window.estimates.append(estimate.gradient)
        return Update(estimate.gradient, estimate.loss, decay=self.decay())

    def change(self, name: str, start: int, stop: int, gradient: Point) -> Tensor:
        """What is added to entries [start, stop) of tensor `name`, in its working precision."""
        raise TypeError(f"{type(self).__name__} must define change(name, start, stop, gradient)")

    def apply(self, update: Update) -> None:
        self.space.settle()
        if not update.point:  # skipped
            return
        for name, tensor in self.space.tensors.items():
            flat = tensor.view(-1)
            for start in range(0, tensor.numel(), PIECE):
                stop = min(start + PIECE, tensor.numel())
                change = self.change(name, start, stop, update.point)
                wide = flat[start:stop].to(change.dtype) * update.decay.get(name, 1.0)
                self.space.store(name, wide + change, start, self.t)

    def buffer(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """A piece of a dense buffer, to be changed in place."""
        return self.space.buffers[kind][name].view(-1)[start:stop]

    def alive(self) -> set[tuple[str, int]]:
        if self.window is None:
            return set()
        return {(d.block, self.space.block(d.block).birth(d.step)) for d in self.window.directions()}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "window": self._length}

    def search_state(self) -> dict[str, Any]:
        window = None if self.window is None else self.window.state()
        return {**super().search_state(), "taken": self.taken, "window": window}

    def load_search_state(self, state: Mapping[str, Any]) -> None:
        super().load_search_state(state)
        self.taken = state["taken"]
        if self.window is not None:
            self.window.load(state["window"])
