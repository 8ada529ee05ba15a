"""Modules with a matrix, whose low-rank changes are added to what they compute: thin products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradientless.delta import Delta
from gradientless.search.evaluators.rows import HALF
from gradientless.search.evaluators.sites import Site, makes_tensors, summed


class Run(NamedTuple):
    """Points first … last - 1, along the same pairs: p changes by the sum of coefficients[p - first][j] U_j V_jᵀ."""

    first: int
    last: int
    pairs: list[tuple[Tensor, Tensor]]
    coefficients: list[list[float]]
    dense: list[Tensor | None]  # per point: the change of the bias


class Thin(NamedTuple):
    """A `Run` ready for one dtype: y += [(x inner)·column, own point's unit vector] @ outer."""

    first: int
    last: int
    inner: Tensor | None  # [i, R]
    column: Tensor | None  # [points, 1, R]
    outer: Tensor  # [R, o], and below it the changes of the bias, [points, o]
    biased: bool


class Matrix(Site):
    """A module with a matrix `weight`, changed by low-rank terms, and perhaps a `bias`."""

    function: Any = None  # what its class's forward calls with the weight
    plain: type[nn.Module] | None = None  # the class whose forward is known; others are run with `function` caught

    def prepare(self) -> None:
        self._thin: dict[tuple[torch.dtype, torch.device], list[Thin]] = {}
        self.runs: list[Run] = []
        nothing: list[list[Delta]] = [[] for _ in range(self.owner.points)]
        weights, biases = self.changes.get("weight", nothing), self.changes.get("bias", nothing)
        before: list[tuple[int, int]] | None = None
        for p, (mine, dense) in enumerate(zip(weights, biases, strict=True)):
            key = [(id(change.values), id(change.right)) for change in mine]
            if key != before:
                pairs = [(change.values, change.right) for change in mine if change.right is not None]
                self.runs.append(Run(p, p, pairs, [], []))
            bias = summed(self.module.get_parameter("bias"), dense) if dense else None
            last = self.runs[-1]
            self.runs[-1] = last._replace(
                last=p + 1,
                coefficients=[*last.coefficients, [change.scale for change in mine]],
                dense=[*last.dense, bias],
            )
            before = key
        self.runs = [run for run in self.runs if run.pairs or any(bias is not None for bias in run.dense)]

    def release(self) -> None:
        self._thin, self.runs = {}, []

    def factors(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(what meets the input [i, r], what makes the output [o, r]) of a pair (U, V)."""
        return pair[1], pair[0]

    def thin(self, like: Tensor) -> list[Thin]:
        """The runs in the dtype and on the device of `like`, an output."""
        key = like.dtype, like.device
        if key not in self._thin:
            self._thin[key] = [self._ready(run, *key) for run in self.runs]
        return self._thin[key]

    def _ready(self, run: Run, dtype: torch.dtype, device: torch.device) -> Thin:
        inner = column = None
        outer = []
        if run.pairs:
            sides = [self.factors(pair) for pair in run.pairs]
            inner = _join([side[0] for side in sides]).to(device, dtype)
            outer.append(_join([side[1] for side in sides]).to(device, dtype).T)
            each = [
                [c for c, side in zip(row, sides, strict=True) for _ in range(side[0].shape[1])]
                for row in run.coefficients
            ]
            column = torch.tensor(each, dtype=torch.float64).to(dtype).to(device).unsqueeze(1)
        found = next((bias for bias in run.dense if bias is not None), None)
        if found is not None:
            rows = [torch.zeros_like(found) if bias is None else bias for bias in run.dense]
            outer.append(torch.stack(rows).to(device, dtype))
        return Thin(
            run.first, run.last, inner, column, outer[0] if len(outer) == 1 else torch.cat(outer), found is not None
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # the input by name
            args = (kwargs.pop(next(iter(kwargs))),)
        known = type(self.module).forward is self.plain.forward and self._before is None if self.plain else True
        if known:
            return self.changed(self.original, *args, **kwargs)
        with _Catch(self):
            return self.original(*args, **kwargs)

    def changed(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """compute(x, …) with the points' changes."""
        x, back = self.arranged(x)
        changes = self.runs and x.numel()  # an expert may get no token
        y = self.sum(compute, x, *args, **kwargs) if changes else compute(x, *args, **kwargs)
        return y if back is None else back(y)

    def arranged(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The input with the rows of the points first, and what brings an output back into the order of the input."""
        ((dim, _, _),) = self.owner.places(self, [x])
        if self.owner.points == 1 or dim == 0:
            return x, None
        if dim is None:
            x = x.unsqueeze(0) if self.lookup and x.dim() == 1 else x
            return self.owner.spread(self, x)
        if dim >= self.leading(x):
            raise self.owner.unbatchable(self, f"an input of shape {list(x.shape)} with its rows in dimension {dim}")
        return x.movedim(dim, 0).contiguous(), lambda y: y.movedim(0, dim).contiguous()

    def leading(self, x: Tensor) -> int:
        """Dimensions of x that are not its features, and that an output has too."""
        return x.dim() - 1

    def sum(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """compute(x, …) plus the changes, added in place."""
        y = compute(x, *args, **kwargs)
        out = y.reshape(-1, y.shape[-1])
        size = out.shape[0] // self.owner.points
        for thin in self.thin(y):
            rows = slice(thin.first * size, thin.last * size)
            left = self.left(thin, x, rows, y.dtype)
            if left is None:
                out[rows].view(thin.last - thin.first, size, -1).add_(thin.outer.unsqueeze(1))
            else:
                out[rows].addmm_(left, thin.outer)
        return out.view(y.shape)

    def left(self, thin: Thin, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor | None:
        """What multiplies `thin.outer`: [(x inner)·column, own point's unit vector]; None for the latter alone."""
        if thin.inner is None or thin.column is None:
            return None
        points = thin.last - thin.first
        met = self.meet(thin.inner, x, rows, dtype).view(points, -1, thin.inner.shape[1]) * thin.column
        if thin.biased:
            unit = torch.eye(points, dtype=dtype, device=met.device).unsqueeze(1)
            met = torch.cat([met, unit.expand(-1, met.shape[1], -1)], 2)
        return met.view(-1, met.shape[2])

    def meet(self, inner: Tensor, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """Those rows of x times `inner`: [rows, R]."""
        flat = x.reshape(-1, x.shape[-1])[rows]
        return (flat if flat.dtype == dtype else flat.to(dtype)) @ inner


class Linear(Matrix):
    """In half precision a sum that is already rounded would swallow most of the noise, which is smaller than its last
    digit: there the noise comes first, and the product is added to it before the one rounding."""

    function: Any = functional.linear
    plain: type[nn.Module] | None = nn.Linear

    def sum(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self.module
        weight, bias = module.weight, module.bias
        if x.dtype not in HALF or weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type) or self.patched:
            return super().sum(compute, x, *args, **kwargs)
        weight = self.transposed(weight)
        flat = x.reshape(-1, x.shape[-1])
        size = flat.shape[0] // self.owner.points
        parts, done = [], 0
        for thin in self.thin(x):
            if thin.first > done:
                parts.append(x.new_zeros((thin.first - done) * size, weight.shape[1]))
            left = self.left(thin, x, slice(thin.first * size, thin.last * size), x.dtype)
            parts.append(thin.outer.repeat_interleave(size, 0) if left is None else left @ thin.outer)
            done = thin.last
        if done < self.owner.points:
            parts.append(x.new_zeros((self.owner.points - done) * size, weight.shape[1]))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        y = y.addmm_(flat, weight)
        if bias is not None:
            y = y.add_(bias)
        return y.view(*x.shape[:-1], y.shape[1])

    @property
    def patched(self) -> bool:
        """Whether another package's forward stands before the module's own."""
        return self._before is not None and self.plain is None

    def transposed(self, weight: Tensor) -> Tensor:
        return weight.T


class Conv1D(Linear):
    """transformers' Conv1D: a linear layer whose weight is [in, out]."""

    function, plain = None, None

    def factors(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair

    def transposed(self, weight: Tensor) -> Tensor:
        return weight


class Embedding(Matrix):
    function, plain, lookup = functional.embedding, nn.Embedding, True

    def factors(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair

    def leading(self, x: Tensor) -> int:
        return x.dim()

    def meet(self, inner: Tensor, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return functional.embedding(x.reshape(-1)[rows], inner)


class Convolution(Matrix):
    """A convolution: V makes R channels of each group, U mixes them. A weight [o, i, …] is a matrix [o, i·…].

    In half precision it computes in single, for the reason given at `Linear`.
    """

    module: Any

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's convolutions give it
        single = input.dim() == self.module.weight.dim() - 1
        found = self.changed(self.original, input.unsqueeze(0) if single else input)
        return found.squeeze(0) if single else found

    def leading(self, x: Tensor) -> int:
        return 1

    def sum(self, compute: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias, wide = self.module.weight, self.module.bias, x
        if x.dtype in HALF:
            wide = x.float()
            y = self.module._conv_forward(wide, weight.float(), None if bias is None else bias.float())
        else:
            y = compute(x)
        groups, out = self.module.groups, self.module.out_channels
        size = y.shape[0] // self.owner.points
        for thin in self.thin(y):
            rows = slice(thin.first * size, thin.last * size)
            mine = y[rows]
            points, rank = thin.last - thin.first, 0
            if thin.inner is not None and thin.column is not None:
                rank = thin.inner.shape[1]
                kernel = thin.inner.T.reshape(rank, *weight.shape[1:]).repeat(groups, *[1] * (y.dim() - 1))
                met = self.module._conv_forward(wide[rows], kernel, None).view(points, size, groups, rank, -1)
                met = met * thin.column.view(points, 1, 1, rank, 1)
                mixed = torch.einsum("pbgrs,rgo->pbgos", met, thin.outer[:rank].view(rank, groups, out // groups))
                mine += mixed.reshape(mine.shape)
            if thin.biased:
                mine += thin.outer[rank:].repeat_interleave(size, 0).view(-1, out, *[1] * (y.dim() - 2))
        return y.to(x.dtype)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Catch(TorchFunctionMode):
    """Runs a module of a class of its own (scaled or shifted embeddings): the one call with the weight is changed."""

    def __init__(self, site: Matrix):
        super().__init__()
        self.site = site
        self.weight: Any = site.module._parameters["weight"]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is type(self.site).function and len(args) > 1 and args[1] is self.weight:
            return self.site.changed(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if makes_tensors(out):
            for x in tree_leaves([args, kwargs]):
                if isinstance(x, Tensor) and self.site.holds(x):
                    raise self.site.owner.used_outside(x, func)
        return out
