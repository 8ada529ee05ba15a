"""Where the rows of a batch stand in what a module is given: not guessed from shapes, but seen, once.

A model hands its modules the rows first, or behind the time ([T, B, width]), laid flat with other things, sorted, or
only those that it chose by what they hold; and it computes some things once for the whole batch. So two points far
apart are evaluated alone, and then in one batch in either order, and what each module is given there is compared with
what it was given before. The rows are in the one dimension that has doubled, if along it the first point's entries
stand before the second's. What is the same in all passes holds for every point. In anything else, points cannot be
told apart.

The two points depend on the tuned tensors alone, so that another process comes to the same decision on other rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradientless.delta import Delta
from gradientless.errors import UserError

HALF = (torch.float16, torch.bfloat16)
FAR = 1.0  # how far the two points are: in sizes of an entry
LEAST = 0.02  # the size of an entry of a tensor that is zero
APART = 0.2  # of the distance between two entries of the batch, which tells them apart in spite of rounding
TAKES = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive")  # as many as there are
OTHERS = 0.02  # of the entries may differ, where a decision was as near as rounding


class Unbatchable(UserError):
    """Points of one batch cannot be told apart in some module; evaluate them one at a time."""


class Place(NamedTuple):
    """Where a tensor of `ndim` dimensions has the rows: dimension `dim`, or None for what holds for every point.

    many: whether a row of the batch may be several entries there, one after the other.
    """

    dim: int | None
    many: bool
    ndim: int


class Seen(NamedTuple):
    """A tensor's shape, and a few numbers that stand for the last dimension of each of its entries: [..., k]."""

    shape: torch.Size
    marks: Tensor

    @staticmethod
    def of(x: Tensor) -> Seen:
        found = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
        if not found.is_floating_point() or found.dim() < 2:
            return Seen(x.shape, found.double().unsqueeze(-1))
        width = found.shape[-1]
        mixed = torch.randn(width, 4, generator=torch.Generator().manual_seed(width)).to(x.device)
        return Seen(x.shape, found.float() @ mixed)


class Trial:
    """Two points, alone and then together: where each caller of `see` has the rows. half: whether anything is computed
    in half precision."""

    def __init__(self, half: bool):
        self._rough, self._loss = (0.03, 0.03) if half else (0.01, 1e-4)  # what rounding may come to, relative
        self._seen: dict[Hashable, list[Seen]] = {}
        self._shapes: dict[Hashable, dict[int | str, torch.Size]] = {}
        self._calls: Counter[Hashable] = Counter()
        self._points: tuple[int, ...] = ()
        self._chosen: dict[Hashable, list[Tensor]] = {}
        self._depth = self._whole = 0  # modules that are running, and calls of a whole model in this pass
        self._pass = 0

    def start(self, *points: int) -> None:
        """The passes that follow are of one point alone (0 or 1), or of two in one batch, in this order."""
        self._points, self._pass = points, 0

    def next_pass(self) -> None:
        self._pass += 1
        self._calls.clear()
        self._depth = self._whole = 0

    def enter(self) -> None:
        """A module begins."""
        self._whole += self._depth == 0
        self._depth += 1

    def leave(self) -> None:
        self._depth -= 1

    def choose(self, entries: Sequence[Tensor]) -> None:
        """A model takes some entries, as many as there are. Raises `Unbatchable` where they depend on the point: then
        the points have by chance as many, if they have. What a model writes is compared no further than its start."""
        if len(self._points) > 1 or not self._depth or self._whole > 1:
            return
        here = (self._pass, self._calls["chosen"])
        self._calls["chosen"] += 1
        if self._points[0] == 0:
            self._chosen[here] = [x.clone() for x in entries]
        elif not all(map(torch.equal, entries, self._chosen.get(here, []))) or here not in self._chosen:
            raise Unbatchable("inject: a model must take the same entries at every point, got others")

    def see(self, caller: Hashable, tensors: Sequence[Tensor], rows: int | None) -> list[int | None] | None:
        """The dimension of the rows of each tensor (None: it holds for every point); None where nothing can be said:
        one point is alone, or did not come here. rows: of the batch, where they are known. Raises `ValueError` with
        what was found instead in the first call of a pass."""
        here: tuple[Hashable, ...] = (self._pass, caller, self._calls[caller])
        self._calls[caller] += 1
        if len(self._points) == 1:
            self._seen[self._points[0], here] = [Seen.of(x) for x in tensors]
            return None
        first, second = (self._seen.get((point, here)) for point in self._points)
        if first is None or second is None:
            return None
        if not len(first) == len(second) == len(tensors):
            raise ValueError(f"{len(tensors)} inputs, where a point alone has {len(first)} or {len(second)}")
        try:
            return [self._dim(*each, rows) for each in zip(first, second, tensors, strict=True)]
        except ValueError:
            if self._calls[caller] == 1:
                raise
            return None  # rows that were written to their end stay in a batch of several points, but not alone

    def grown(self, caller: Hashable, named: Mapping[int | str, Tensor]) -> dict[int | str, int]:
        """By name, the dimension that has doubled, of those of the tensors that have one. Shapes alone are compared."""
        here: tuple[Hashable, ...] = (self._pass, caller, self._calls[caller])
        self._calls[caller] += 1
        shapes = {key: x.shape for key, x in named.items()}
        if len(self._points) == 1:
            self._shapes[self._points[0], here] = shapes
            return {}
        alone, found = self._shapes.get((0, here), {}), {}
        for key, shape in shapes.items():
            dims = [d for d, pair in enumerate(zip(shape, alone.get(key, shape), strict=False)) if pair[0] != pair[1]]
            if len(dims) == 1 and shape[dims[0]] == 2 * alone[key][dims[0]]:
                found[key] = dims[0]
        return found

    def _dim(self, first: Seen, second: Seen, x: Tensor, rows: int | None) -> int | None:
        both, shape = Seen.of(x), list(x.shape)
        if first.shape != second.shape:
            raise ValueError(f"shapes {list(first.shape)} and {list(second.shape)}, which depend on the point")
        if x.shape == first.shape:
            if not (self._alike(both.marks, first.marks) and self._alike(both.marks, second.marks)):
                raise ValueError(f"values {shape} computed once for the whole batch")
            return None
        grown = [d for d, (n, alone) in enumerate(zip(shape, first.shape, strict=False)) if n != alone]
        if x.dim() != len(first.shape) or len(grown) > 1:
            raise ValueError(f"an input of shape {shape}, where a point alone has {list(first.shape)}")
        (dim,) = grown
        if dim >= both.marks.dim() - 1:
            raise ValueError(f"an input of shape {shape}, whose rows are its features")
        times, alone = 1, first.shape[dim]
        if alone == 1 and shape[dim] == rows:  # what an earlier module computed for each row instead of for all
            times = alone = rows // 2
        if shape[dim] != 2 * alone:
            raise ValueError(f"an input of shape {shape}, where a point alone has {list(first.shape)}")
        if not self._alike(both.marks, torch.cat([first.marks] * times + [second.marks] * times, dim)):
            raise ValueError(f"an input of shape {shape} that is not one point's after the other's")
        return dim

    def _alike(self, found: Tensor, wanted: Tensor) -> bool:
        """Whether entries are the same but for rounding, which is less than what tells them from other entries."""
        found, wanted = found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        error = (found - wanted).norm(dim=1)
        if wanted.dtype == torch.float64:  # numbers of tokens and the like
            return not bool(error.any())
        generator, apart = torch.Generator().manual_seed(0), torch.zeros_like(error)
        for _ in range(4):
            apart += (wanted - wanted[torch.randperm(len(wanted), generator=generator)]).norm(dim=1) / 4
        same = error <= (APART * apart).maximum(self._rough * wanted.norm(dim=1))
        return float((~same).double().mean()) <= OTHERS

    def same(self, losses: Sequence[float], alone: Sequence[float]) -> bool:
        """Whether points have these losses in one batch that they have alone, but for rounding."""
        return all(abs(a - b) <= self._loss * abs(b) for a, b in zip(losses, alone, strict=True))


def far(tensors: Mapping[str, Tensor], which: int) -> list[Delta]:
    """A point of its own, far from the tensors as they stand and from every other `which`."""
    generator = torch.Generator().manual_seed(which)
    found: list[Delta] = []
    for name, tensor in tensors.items():
        norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32 if tensor.dtype in HALF else None))
        size, rows = FAR * max(norm / tensor.numel() ** 0.5, LEAST), tensor.shape[0] if tensor.dim() else 1
        left = torch.randn(rows, 1, generator=generator).to(tensor.device)
        right = torch.randn(tensor.numel() // rows, 1, generator=generator).to(tensor.device)
        found.append(Delta(name, left, None, right, size) if tensor.dim() > 1 else Delta(name, size * left.view(-1)))
    return found


class Calm(TorchFunctionMode):
    """Dropout leaves everything in place, so that passes can be compared; generators are put back as they were. What
    is taken of a tensor by what it holds is told to `trial`."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self._trial = trial
        self._states: dict[torch.Generator, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self._states.items():
            generator.set_state(state)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        generator = kwargs.get("generator")
        if generator is not None and generator not in self._states:
            self._states[generator] = generator.get_state()
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "bernoulli_":  # a mask, whose mean it takes
            mean = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].copy_(mean) if isinstance(mean, Tensor) else args[0].fill_(mean)
        if "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        out = func(*args, **kwargs)
        if name in TAKES or (name == "where" and len(args) + len(kwargs) == 1):
            self._trial.choose([x for x in tree_leaves(out) if isinstance(x, Tensor)])
        elif name == "__getitem__":
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._trial.choose(masks)
        return out
