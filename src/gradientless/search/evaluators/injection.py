"""Injection: changes of weights applied inside the modules as they run. The weights themselves are never touched.

A module that holds a tuned tensor computes, for the rows of point p,

    Linear              y = x Wᵀ + c_p (x V) Uᵀ + δb_p       for W + c_p U Vᵀ, by thin products alone
    Embedding           y = W[ids] + c_p U[ids] Vᵀ
    Conv1D (W [in,out]) y = x W + c_p (x U) Vᵀ + δb_p
    convolution         y = conv(x, W) + c_p U conv(x, V) + δb_p
    normalisation, or any module without children whose tuned tensors are vectors: itself, with w + δw_p in their place
    any other module, whose tuned tensors are small: W + c_p U Vᵀ and w + δw_p in their place, one point at a time

A batch holds the points' copies of the same rows one after the other: rows [p·B, (p+1)·B) belong to point p. Points
that follow each other along the same directions (the usual ±eps) share their products: one thin matmul in, one out.

What is tied is found by identity, so a table that is embedding and head changes in both places. Where no module can be
told apart by rows (values computed once for the whole batch, such as T5's relative attention bias), several points in
one batch are refused with `Unbatchable`; one point at a time always works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from gradientless.delta import Delta
from gradientless.errors import UserError

HALF = (torch.float16, torch.bfloat16)
SMALL = 1 << 22  # entries up to which a tensor is copied rather than moved
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_ARGUMENTS = ("input_ids", "inputs_embeds", "input_features", "pixel_values")  # before other arguments
DATA = (torch.tensor, torch.as_tensor, torch.from_numpy)  # what they make may be the batch
INSTEAD = "leave it out, or use evaluator 'walk' or 'snapshot'"


class Unbatchable(UserError):
    """Points of one batch cannot be told apart in some module; evaluate them one at a time."""


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


class Injection:
    """Where each tuned tensor is used in `model`, and the changes in force there.

    tensors: name -> tensor (parameters of modules of `model`). Raises `UserError` for a tensor that cannot be injected.

    The first forward pass is watched (a little slower): a tensor that is used outside the module that holds it is a
    `UserError`, and inputs that do not depend on the batch (positions) are noted. Convolutions, embeddings and linear
    layers take inputs [P·B, …] or, of two dimensions, [P·B·n, features].
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]):
        self.model, self.tensors = model, dict(tensors)
        self._name_of = {id(tensor): name for name, tensor in self.tensors.items()}
        self._sites: list[_Site] = []
        strangers: list[tuple[nn.Module, dict[str, str]]] = []
        placed: set[str] = set()
        for module in model.modules():
            held = {key: self._name_of[id(p)] for key, p in module._parameters.items() if id(p) in self._name_of}
            kind = _kind(module, held) if held else None
            if kind is not None:
                self._sites.append(kind(self, module, held))
                placed.update(held.values())
            elif held:
                strangers.append((module, held))
        for module, held in strangers:
            # A tensor that is tied to a layer's is left to that layer: a model's bias beside its output layer.
            alone = {key: name for key, name in held.items() if name not in placed}
            if alone and not _replaceable(module, alone):
                raise UserError(
                    f"inject: tensor '{min(alone.values())}' must belong to a linear layer, embedding, convolution or "
                    f"normalisation, or be small and not of half precision, got {type(module).__name__}; {INSTEAD}"
                )
            if alone:
                self._sites.append(_Replaced(self, module, alone))
        known = {name for site in self._sites for name in site.held.values()}
        for name in self.tensors:
            if name not in known:
                raise UserError(
                    f"inject: tensor '{name}' must be a parameter of the model's modules, got another; {INSTEAD}"
                )
        self._attention = any(
            isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in model.modules()
        )
        self._watched = False
        # Whether points are to be evaluated alone; also set by the evaluator, once a module could not tell them apart.
        self._replaced = [site for site in self._sites if isinstance(site, _Replaced)]
        self.one_by_one = bool(self._replaced)
        self.room: int | None = None  # tokens of a pass that memory held, once a closure ran out of it
        self.points = 0  # P while inside `at`
        self.rows: int | None = None  # P·B of the forward pass that is running, once known
        self.inside: _Site | None = None
        self.constants: WeakIdKeyDictionary | None = None  # while watching: tensors that do not depend on the batch

    @contextlib.contextmanager
    def at(self, changes: Sequence[Sequence[Delta]], batch: int | None = None) -> Iterator[None]:
        """Forward passes inside see point p's `changes[p]` in rows [p·B, (p+1)·B) of their batch of P·B rows.

        Matrices (and tensors of more dimensions) need low-rank Deltas; vectors take any. batch: B, where the model is
        not called as a whole with a batch as its first tensor.
        """
        if self.points:
            raise UserError("inject: changes must be given once, got `at` inside `at`")
        if not changes:
            raise UserError("inject: changes must be given for at least one point, got none")
        runs = self._sorted(changes)
        active = [site for site in self._sites if any(name in runs for name in site.held.values())]
        watch = contextlib.nullcontext() if self._watched else _Watch(self)
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        handle = None
        try:
            self.points, self.given = len(changes), batch
            self.rows = None if batch is None else batch * len(changes)
            if self._attention:
                torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past their modules
            if len(changes) > 1 or not self._watched:
                handle = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            for site in active if self._watched else self._sites:
                site.enter(runs)
            with watch:
                yield
            self._watched = self._watched or any(site.called for site in self._sites)
        finally:
            for site in self._sites:
                site.leave()
            if handle is not None:
                handle.remove()
            if self._attention:
                torch.backends.mha.set_fastpath_enabled(fast_attention)
            self.points, self.rows, self.inside, self.constants = 0, None, None, None

    def _sorted(self, changes: Sequence[Sequence[Delta]]) -> dict[str, list[list[Delta]]]:
        """The changes by tensor and point."""
        found: dict[str, list[list[Delta]]] = {}
        for p, mine in enumerate(changes):
            for change in mine:
                tensor = self.tensors.get(change.name)
                if tensor is None:
                    raise UserError(f"inject: changes must be of the injected tensors, got '{change.name}'")
                if change.right is None and tensor.dim() > 1:
                    got = "dense" if change.index is None else "sparse"
                    raise UserError(
                        f"inject: directions must be low-rank, got a {got} change of '{change.name}'; give rank=1, or "
                        "evaluator 'walk'"
                    )
                found.setdefault(change.name, [[] for _ in changes])[p].append(change)
        return found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: how many rows has this batch?"""
        if self.constants is not None:
            for x in tree_leaves([args, kwargs]):
                if isinstance(x, Tensor):
                    self.constants.pop(x, None)
        if self.given is not None or self.points == 1:
            return
        first = [kwargs.get(name) for name in BATCH_ARGUMENTS]
        tensors = [x for x in tree_leaves([first, args, kwargs]) if isinstance(x, Tensor) and x.dim()]
        self.rows = tensors[0].shape[0] if tensors else None
        if self.rows is not None and self.rows % self.points:
            raise UserError(
                f"inject: a batch of {self.points} points must have rows in that many copies, got {self.rows}"
            )

    def arrange(self, site: _Site, x: Tensor, leading: int) -> tuple[Tensor, int]:
        """The input with a leading dimension of points times rows, and how often each row is to be repeated after.

        leading: dimensions of x before its features.
        """
        if self.constants is not None:
            constant = x in self.constants
            if site.constant is not None and site.constant != constant:
                site.mixed = True
            site.constant = constant
        if self.points == 1:
            return x, 1
        length = x.shape[0] if x.dim() else 0
        if site.mixed:
            raise self._unbatchable(site, "inputs of the batch and others in turn")
        if site.constant:
            if self.rows is not None and (length == 1 or (leading == 1 and site.lookup)):
                x = x.unsqueeze(0) if leading == 1 and site.lookup else x
                return x.expand(self.points, *x.shape[1:]), self.rows // self.points
            if length == self.rows and bool((x == x[:1]).all()):
                return x, 1
            raise self._unbatchable(site, f"values {list(x.shape)} computed once for the whole batch")
        if self.rows is None:
            self.rows = length
        if not length or length % self.points or (length % self.rows if leading == 1 else length != self.rows):
            raise self._unbatchable(site, f"an input of shape {list(x.shape)} in a batch of {self.rows} rows")
        return x, 1

    def _unbatchable(self, site: _Site, got: str) -> Unbatchable:
        name = min(site.held.values())
        return Unbatchable(
            f"inject: the module of '{name}' must see the rows of the batch to tell {self.points} points apart, "
            f"got {got}; evaluate one point at a time, {INSTEAD}"
        )

    def used_outside(self, tensor: Tensor, function: object) -> UserError:
        name = self._name_of[id(tensor)]
        called = getattr(function, "__name__", str(function))
        return UserError(
            f"inject: tensor '{name}' must be used only by calls of the module that holds it, got it in {called}; "
            f"{INSTEAD}"
        )

    def notice(self, x: Tensor) -> None:
        """x is used: if it stands in the place of a tensor, this is the pass to watch."""
        for site in self._replaced:
            site.called = site.called or site.placed(x)

    def tuned(self, x: object) -> bool:
        return id(x) in self._name_of


# Modules -------------------------------------------------------------------------------------------------------------


class _Site:
    """A module that holds tuned tensors. held: attribute -> tensor name."""

    lookup = False  # whether inputs are positions in a table

    def __init__(self, owner: Injection, module: nn.Module, held: dict[str, str]):
        self.owner, self.module, self.held = owner, module, held
        self.constant: bool | None = None  # whether its input was found not to depend on the batch
        self.mixed = False
        self.called = False
        self._entered = False

    def enter(self, runs: Mapping[str, list[list[Delta]]]) -> None:
        """Let the module compute with the changes, until `leave`."""
        for key, name in self.held.items():
            if self.module._parameters[key] is not self.owner.tensors[name]:
                raise UserError(f"inject: the model must keep its parameters, got another in place of '{name}'")
        self.changes = {key: runs[name] for key, name in self.held.items() if name in runs}
        self.prepare()
        self.put()
        self._entered = True

    def leave(self) -> None:
        if not self._entered:
            return
        self.take()
        self._entered = False
        self.changes = {}
        self.release()

    def put(self) -> None:
        """Put `self.forward` before the module's own."""
        self._before = self.module.__dict__.get("forward")
        self.original: Callable[..., Any] = self.module.forward
        self.module.__dict__["forward"] = self.call

    def take(self) -> None:
        """Take away what `put` put."""
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before
        del self.original, self._before

    def call(self, *args: Any, **kwargs: Any) -> Any:
        outer, self.owner.inside, self.called = self.owner.inside, self, True
        try:
            out = self.forward(*args, **kwargs)
        finally:
            self.owner.inside = outer
        if self.owner.constants is not None and isinstance(out, Tensor):
            self.owner.constants.pop(out, None)  # from here on it depends on the point
        return out

    def holds(self, x: Tensor) -> bool:
        return any(self.module._parameters[key] is x for key in self.held)

    def prepare(self) -> None:
        """Make ready what `changes` means here."""

    def release(self) -> None:
        """Forget what `prepare` and the calls kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward")


class _Matrix(_Site):
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
            bias = _sum(self.module.get_parameter("bias"), dense) if dense else None
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
        x, repeat = self.owner.arrange(self, x, self.leading(x))
        y = self.sum(compute, x, *args, **kwargs) if self.runs else compute(x, *args, **kwargs)
        return y if repeat == 1 else y.repeat_interleave(repeat, 0)

    def leading(self, x: Tensor) -> int:
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


class _Linear(_Matrix):
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


class _Conv1D(_Linear):
    """transformers' Conv1D: a linear layer whose weight is [in, out]."""

    function, plain = None, None

    def factors(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair

    def transposed(self, weight: Tensor) -> Tensor:
        return weight


class _Embedding(_Matrix):
    function, plain, lookup = functional.embedding, nn.Embedding, True

    def factors(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair

    def leading(self, x: Tensor) -> int:
        return x.dim()

    def meet(self, inner: Tensor, x: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return functional.embedding(x.reshape(-1)[rows], inner)


class _Convolution(_Matrix):
    """A convolution: V makes R channels of each group, U mixes them. A weight [o, i, …] is a matrix [o, i·…].

    In half precision it computes in single, for the reason given at `_Linear`.
    """

    module: Any

    def forward(self, input: Tensor) -> Tensor:  # the name that torch's convolutions give it
        single = input.dim() == self.module.weight.dim() - 1
        found = self.changed(self.original, input.unsqueeze(0) if single else input)
        return found.squeeze(0) if single else found

    def leading(self, x: Tensor) -> int:
        return x.dim()

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


class _Vectors(_Site):
    """A module without children whose tuned tensors are vectors: run for each point with the changed vectors in place.

    Half precision would round a vector near one, such as a normalisation's weight, back to itself: the module then
    computes in single precision and only its output is rounded.
    """

    def prepare(self) -> None:
        own = {key: value for key, value in self.module._parameters.items() if value is not None}
        self.buffers = {  # a batch normalisation's statistics
            key: value.float()
            for key, value in self.module._buffers.items()
            if value is not None and value.dtype in HALF
        }
        self.half = any(own[key].dtype in HALF for key in self.held)
        self.values: list[dict[str, Tensor]] = []
        for p in range(self.owner.points):
            values = {key: value.detach().float() if value.dtype in HALF else value for key, value in own.items()}
            for key, changes in self.changes.items():
                if changes[p]:
                    values[key] = values[key] + _sum(own[key], changes[p]).to(values[key].device)
            self.values.append(values)
        self.dtypes: dict[torch.dtype, torch.dtype] = {}

    def release(self) -> None:
        self.values, self.buffers = [], {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        if not self.changes or not inputs:
            return self.original(*args, **kwargs)
        x, points = inputs[0], self.owner.points
        ready, repeat = self.owner.arrange(self, x, x.dim() - 1)
        if repeat > 1 and len(inputs) > 1:
            raise self.owner._unbatchable(self, "several inputs, the first without the batch")
        length, size = x.shape[0], ready.shape[0] // points
        half = self.half or x.dtype in HALF
        dtype = self._dtype(x, args, kwargs) if half else None

        def part(p: int) -> Callable[[Any], Any]:
            def choose(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                mine = ready if value is x else value
                if points > 1 and mine.dim() and (mine is ready or mine.shape[0] == length):
                    mine = mine[p * size : (p + 1) * size]
                return mine.float() if half and mine.dtype in HALF else mine

            return choose

        found = []
        for p, values in enumerate(self.values):
            some, named = tree_map(part(p), (args, kwargs))
            with self._holding(values):
                found.append(self.original(*some, **named))
        out = found[0] if points == 1 else torch.cat(found)
        out = out if dtype is None else out.to(dtype)
        return out if repeat == 1 else out.repeat_interleave(repeat, 0)

    def _dtype(self, x: Tensor, args: Any, kwargs: Any) -> torch.dtype:
        """That of the module's own output for inputs like these."""
        if x.dtype not in self.dtypes:
            few = tree_map(
                lambda value: value[:1] if isinstance(value, Tensor) and value.dim() else value, (args, kwargs)
            )
            self.dtypes[x.dtype] = self.original(*few[0], **few[1]).dtype
        return self.dtypes[x.dtype]

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        own, statistics = dict(self.module._parameters), dict(self.module._buffers)
        try:
            self.module._parameters.update(values)  # type: ignore[arg-type]
            self.module._buffers.update(self.buffers)
            yield
        finally:
            self.module._parameters.update(own)
            self.module._buffers.update(statistics)


class _Replaced(_Site):
    """Any other module: the changed tensors stand in the place of its own. What is done with them, and by whom, is not
    known, so they are one point's."""

    def prepare(self) -> None:
        if self.owner.points > 1:
            raise self.owner._unbatchable(self, type(self.module).__name__)
        # Parameters, as the module may be asked for them as such.
        self.values = {key: nn.Parameter(self._value(key), requires_grad=False) for key in self.held}

    def _value(self, key: str) -> Tensor:
        own = self.module.get_parameter(key)
        return own + _sum(own, self.changes[key][0]) if key in self.changes else own.detach()

    def put(self) -> None:
        self._own = {key: self.module._parameters[key] for key in self.held}
        self.module._parameters.update(self.values)

    def take(self) -> None:
        self.module._parameters.update(self._own)
        del self._own, self.values

    def placed(self, x: Tensor) -> bool:
        return any(value is x for value in self.values.values())


def _kind(module: nn.Module, held: Mapping[str, str]) -> type[_Site] | None:
    """How a module that holds tuned tensors takes changes; None: not at all."""
    if set(held) <= {"weight", "bias"}:
        if isinstance(module, nn.Linear):
            return _Linear
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            return _Embedding
        if isinstance(module, CONVOLUTIONS) and type(module).forward in [kind.forward for kind in CONVOLUTIONS]:
            return _Convolution
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', not imported here
            return _Conv1D
    vectors = all(module._parameters[key].dim() <= 1 for key in held)  # type: ignore[union-attr]
    return _Vectors if vectors and not any(True for _ in module.children()) else None


def _replaceable(module: nn.Module, held: Mapping[str, str]) -> bool:
    """Whether a module of no kind can be run with other tensors in place of those that it holds."""
    own = [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
    small = all(module._parameters[key].numel() <= SMALL for key in held)  # type: ignore[union-attr]
    # An embedding of no kind changes its own weights.
    return small and not any(x.dtype in HALF for x in own) and not isinstance(module, nn.Embedding)


def _sum(tensor: Tensor, changes: Sequence[Delta]) -> Tensor:
    """The sum of changes of a vector or a small tensor, in at least single precision."""
    total = torch.zeros_like(tensor, dtype=torch.float32 if tensor.dtype in HALF else tensor.dtype)
    for change in changes:
        right = None if change.right is None else change.right.to(total.dtype)
        Delta(change.name, change.values.to(total.dtype), change.index, right, change.scale).add_to(total)
    return total


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# Watching ------------------------------------------------------------------------------------------------------------


class _Catch(TorchFunctionMode):
    """Runs a module of a class of its own (scaled or shifted embeddings): the one call with the weight is changed."""

    def __init__(self, site: _Matrix):
        super().__init__()
        self.site = site
        self.weight: Any = site.module._parameters["weight"]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is type(self.site).function and len(args) > 1 and args[1] is self.weight:
            return self.site.changed(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if _uses(args, kwargs, lambda x: x is self.weight) and _makes_tensors(out):
            raise self.site.owner.used_outside(self.weight, func)
        return out


class _Watch(TorchFunctionMode):
    """Sees every operation of a forward pass: refuses tuned tensors outside their modules, notes constants."""

    def __init__(self, owner: Injection):
        super().__init__()
        self.owner = owner
        owner.constants = WeakIdKeyDictionary()
        for tensor in (*owner.model.parameters(), *owner.model.buffers()):
            owner.constants[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _makes_tensors(out) and not _in_place(func):
            return out
        given = [x for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor)]
        inside = self.owner.inside
        for x in given:
            if self.owner.tuned(x) and (inside is None or not inside.holds(x)):
                raise self.owner.used_outside(x, func)
            self.owner.notice(x)
        constants = self.owner.constants
        if constants is None:
            return out
        constant = func not in DATA and all(x in constants for x in given)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)] + (given[:1] if _in_place(func) else [])
        for x in made:
            if constant:
                constants[x] = True
            else:
                constants.pop(x, None)
        return out


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _uses(args: Any, kwargs: Any, which: Callable[[Tensor], bool]) -> bool:
    return any(isinstance(x, Tensor) and which(x) for x in tree_leaves([args, kwargs]))


def _makes_tensors(out: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_leaves(out))
