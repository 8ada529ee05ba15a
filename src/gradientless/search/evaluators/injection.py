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
Where a module has these rows is seen once (`try_together`); where points cannot be told apart, several in one batch
are refused with `Unbatchable`. One point at a time always works.

What is tied is found by identity, so a table that is embedding and head changes in both places.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradientless.delta import Delta
from gradientless.errors import UserError, with_kind
from gradientless.search.evaluators.matrices import Conv1D, Convolution, Embedding, Linear
from gradientless.search.evaluators.rows import HALF, Calm, Place, Trial, Unbatchable, far
from gradientless.search.evaluators.sites import Site, makes_tensors
from gradientless.search.evaluators.whole import Replaced, Vectors

SMALL = 1 << 22  # entries up to which a tensor is copied rather than moved
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """While open, what `torch.compile` made runs as it was written: compiled code does not see what is put inside."""
    dynamo = "torch._dynamo" in sys.modules  # or nothing was compiled, and to ask would import it
    return torch.compiler.set_stance("force_eager") if dynamo else contextlib.nullcontext()


class Injection:
    """Where each tuned tensor is used in `model`, and the changes in force there.

    tensors: name -> tensor (parameters of modules of `model`). Raises `UserError` for a tensor that cannot be injected.

    The first forward pass is watched (a little slower): a tensor that is used outside the module that holds it is a
    `UserError`.

    one_by_one: whether points are to be evaluated alone, always.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]):
        self.model, self.tensors = model, dict(tensors)
        half = any(tensor.dtype in HALF for tensor in self.tensors.values())
        self._instead = "evaluator 'snapshot'" if half else "evaluator 'walk' or 'snapshot'"
        instead = f"leave it out, or use {self._instead}"
        self._name_of = {id(tensor): name for name, tensor in self.tensors.items()}
        self._sites: list[Site] = []
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
                    f"normalisation, or be small and not of half precision, got {type(module).__name__}; {instead}"
                )
            if alone:
                self._sites.append(Replaced(self, module, alone))
        known = {name for site in self._sites for name in site.held.values()}
        for name in self.tensors:
            if name not in known:
                raise UserError(
                    f"inject: tensor '{name}' must be a parameter of the model's modules, got another; {instead}"
                )
        self._attention = any(
            isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in model.modules()
        )
        self._watched = False
        self._replaced = [site for site in self._sites if isinstance(site, Replaced)]
        self.one_by_one = bool(self._replaced)
        self.tried = self.one_by_one  # whether `try_together` is done with
        self.room: int | None = None  # tokens of a pass that memory held, once a closure ran out of it
        self.points = 0  # P while inside `at`
        self.rows: int | None = None  # P·B of the forward pass that is running, once known
        self.inside: Site | None = None
        self._trial: Trial | None = None
        self._gate: nn.Module | None = None  # the outermost module that is given the rows of the batch
        self._gates: dict[int | str, int] = {}  # in which of its arguments, and in which of their dimensions

    @contextlib.contextmanager
    def at(self, changes: Sequence[Sequence[Delta]]) -> Iterator[None]:
        """Forward passes inside see point p's `changes[p]` in rows [p·B, (p+1)·B) of their batch of P·B rows.

        Matrices (and tensors of more dimensions) need low-rank Deltas; vectors take any. Several points are for after
        `try_together`.
        """
        if self.points:
            raise UserError("inject: changes must be given once, got `at` inside `at`")
        if not changes:
            raise UserError("inject: changes must be given for at least one point, got none")
        runs = self._sorted(changes)
        active = [site for site in self._sites if any(name in runs for name in site.held.values())]
        watch = contextlib.nullcontext() if self._watched else _Watch(self)
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        gates = [] if self._gate is None else [self._gate]
        if self._trial is not None:
            self._trial.next_pass()
            gates = list(self.model.modules())
        handles = []
        try:
            self.points = len(changes)
            if self._attention:
                torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past their modules
            if len(changes) > 1 or self._trial is not None:
                handles = [gate.register_forward_pre_hook(self._begin, with_kwargs=True) for gate in gates]
            if self._trial is not None:
                leave, enter = self._trial.leave, self._trial.enter
                for module in gates:
                    handles.append(module.register_forward_pre_hook(lambda *_: enter()))
                    handles.append(module.register_forward_hook(lambda *_: leave(), always_call=True))
            for site in active if self._watched else self._sites:
                site.enter(runs)
            with watch, _uncompiled():
                yield
            self._watched = self._watched or any(site.called for site in self._sites)
        finally:
            for site in self._sites:
                site.leave()
            for handle in handles:
                handle.remove()
            if self._attention:
                torch.backends.mha.set_fastpath_enabled(fast_attention)
            self.points, self.rows, self.inside = 0, None, None

    # Where the rows are ----------------------------------------------------------------------------------------------

    def try_together(self, losses: Callable[[Sequence[Sequence[Delta]]], Sequence[float]]) -> Unbatchable | None:
        """See where the modules have the rows of a batch, and that a point's loss is the same in a batch with another
        as it is alone. Returns why points are to be evaluated alone from now on (`one_by_one`), if they are.

        losses: those at points, evaluated in one batch under `at`.
        """
        half = torch.is_autocast_enabled() or any(tensor.dtype in HALF for tensor in self.model.parameters())
        trial = self._trial = Trial(half)
        points = [far(self.tensors, which) for which in (0, 1)]
        devices = {tensor.device for tensor in self.tensors.values() if tensor.device.type == "cuda"}
        found: list[list[float]] = []
        try:
            with torch.random.fork_rng(devices=list(devices)), Calm(trial):
                for order in ((0,), (1,), (0, 1), (1, 0)):
                    trial.start(*order)
                    found.append([float(loss) for loss in losses([points[p] for p in order])])
            one, other, forth, back = found
            if trial.same(forth, one + other) and trial.same(back, other + one):
                self.tried = True
                return None
            told = ", ".join(f"{loss:.7g}" for each in found for loss in each)
            reason = f"points must have the loss in a batch with others that they have alone, got {told}"
        except Unbatchable as error:
            reason = str(error).removeprefix("inject: ")
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a model may take a batch of two points for anything
            reason = f"two points must be computed in one batch, got {with_kind(error)}"
        finally:
            self._trial = None
        self.tried = self.one_by_one = True
        return Unbatchable(f"inject: {reason}")

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called that may be given the batch: how many rows has it?"""
        given: dict[int | str, Tensor] = {key: x for key, x in enumerate(args) if isinstance(x, Tensor)}
        given |= {key: x for key, x in kwargs.items() if isinstance(x, Tensor)}
        if self._trial is not None:
            shapes = self._trial.grown(module, given)
            if shapes and self._gate is None:
                self._gate, self._gates = module, shapes
        if module is self._gate:
            found = [given[key].shape[dim] for key, dim in self._gates.items() if key in given]
            self.rows = found[0] if found else None

    def places(self, site: Site, inputs: Sequence[Tensor]) -> list[Place]:
        """Where each of the inputs of a call of `site` has the rows of the points. Raises `Unbatchable`."""
        if self._trial is not None:
            try:
                dims = self._trial.see(site, inputs, self.rows)
            except ValueError as error:
                raise self.unbatchable(site, str(error)) from None
            if dims is not None:
                site.places = self._learned(site, inputs, dims)
        if self.points == 1:
            return [Place(0, True, x.dim()) for x in inputs]
        if site.places is None or len(site.places) != len(inputs):
            raise self.unbatchable(site, "a call of another kind than when two points were tried")
        for x, (dim, many, ndim) in zip(inputs, site.places, strict=True):
            if dim is None:
                continue
            length = x.shape[dim] if dim < x.dim() and (dim == 0 or x.dim() == ndim) else 0
            rows = self.rows or self.points
            if not length or length % rows or length % self.points or (not many and length != rows):
                raise self.unbatchable(site, f"an input of shape {list(x.shape)} in a batch of {self.rows} rows")
        return site.places

    def _learned(self, site: Site, inputs: Sequence[Tensor], dims: Sequence[int | None]) -> list[Place]:
        found = [
            Place(dim, dim is not None and x.shape[dim] != self.rows, x.dim())
            for x, dim in zip(inputs, dims, strict=True)
        ]
        if site.places is None:
            return found
        if [place.dim for place in site.places] != list(dims):
            raise self.unbatchable(site, "inputs of the batch and others in turn")
        return [new._replace(many=new.many or old.many) for new, old in zip(found, site.places, strict=True)]

    def spread(self, site: Site, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What holds for every row of the batch, [1, …], as one copy for each point; and what makes rows of those."""
        if self.rows is None or x.dim() == 0 or x.shape[0] != 1:
            raise self.unbatchable(site, f"values {list(x.shape)} computed once for the whole batch")
        rows = self.rows // self.points
        return x.expand(self.points, *x.shape[1:]), lambda y: y.repeat_interleave(rows, 0)

    def unbatchable(self, site: Site, got: str) -> Unbatchable:
        name = min(site.held.values())
        return Unbatchable(
            f"inject: the module of '{name}' must see the rows of the batch to tell {self.points} points apart, "
            f"got {got}; evaluate one point at a time, leave it out, or use {self._instead}"
        )

    # Tuned tensors ---------------------------------------------------------------------------------------------------

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
                        f"{self._instead}"
                    )
                found.setdefault(change.name, [[] for _ in changes])[p].append(change)
        return found

    def used_outside(self, tensor: Tensor, function: object) -> UserError:
        name = self._name_of[id(tensor)]
        called = getattr(function, "__name__", str(function))
        return UserError(
            f"inject: tensor '{name}' must be used only by calls of the module that holds it, got it in {called}; "
            f"leave it out, or use {self._instead}"
        )

    def notice(self, x: Tensor) -> None:
        """x is used: if it stands in the place of a tensor, this is the pass to watch."""
        for site in self._replaced:
            site.called = site.called or site.placed(x)

    def tuned(self, x: object) -> bool:
        return id(x) in self._name_of


def _kind(module: nn.Module, held: Mapping[str, str]) -> type[Site] | None:
    """How a module that holds tuned tensors takes changes; None: not at all."""
    vectors = all(module._parameters[key].dim() <= 1 for key in held)  # type: ignore[union-attr]
    if set(held) <= {"weight", "bias"}:
        if isinstance(module, nn.Linear) and (not vectors or type(module).forward is nn.Linear.forward):
            return Linear
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            return Embedding
        if isinstance(module, CONVOLUTIONS) and type(module).forward in [kind.forward for kind in CONVOLUTIONS]:
            return Convolution
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', not imported here
            return Conv1D
    return Vectors if vectors and not any(True for _ in module.children()) else None


def _replaceable(module: nn.Module, held: Mapping[str, str]) -> bool:
    """Whether a module of no kind can be run with other tensors in place of those that it holds."""
    own = [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]
    small = all(module._parameters[key].numel() <= SMALL for key in held)  # type: ignore[union-attr]
    # An embedding of no kind changes its own weights.
    return small and not any(x.dtype in HALF for x in own) and not isinstance(module, nn.Embedding)


class _Watch(TorchFunctionMode):
    """Sees every operation of a forward pass, and refuses tuned tensors outside their modules."""

    def __init__(self, owner: Injection):
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not makes_tensors(out) and not _in_place(func):
            return out
        inside = self.owner.inside
        for x in tree_leaves([args, kwargs]):
            if isinstance(x, Tensor):
                if self.owner.tuned(x) and (inside is None or not inside.holds(x)):
                    raise self.owner.used_outside(x, func)
                self.owner.notice(x)
        return out


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
