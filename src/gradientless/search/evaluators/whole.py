"""Modules that run with changed tensors in the place of their own, once for each point."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gradientless.search.evaluators.rows import HALF
from gradientless.search.evaluators.sites import Site, summed


class Vectors(Site):
    """A module without children whose tuned tensors are vectors: run for each point with the changed vectors in place.

    Half precision would round a vector near one, such as a normalisation's weight, back to itself: the module then
    computes in single precision and only its output is rounded.
    """

    def prepare(self) -> None:
        own = {key: value for key, value in self.module._parameters.items() if value is not None}
        self.half = any(own[key].dtype in HALF for key in self.held)
        self.values: list[dict[str, Tensor]] = [{} for _ in range(self.owner.points)]
        for key, changes in self.changes.items():
            for values, mine in zip(self.values, changes, strict=True):
                if mine:
                    values[key] = own[key] + summed(own[key], mine).to(own[key].device)
        self.dtypes: dict[torch.dtype, list[torch.dtype | None]] = {}

    def release(self) -> None:
        self.values = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        inputs = [x for x in leaves if isinstance(x, Tensor)]
        if not self.changes or not inputs:
            return self.original(*args, **kwargs)
        points, places = self.owner.points, self.owner.places(self, inputs)
        dim = next((place.dim for place in places if place.dim is not None), None)
        back = None
        if points > 1 and dim is None:
            _, back = self.owner.spread(self, inputs[0])
        dtypes = None
        if self.half or inputs[0].dtype in HALF:
            dtypes = self._dtypes(inputs[0].dtype, args, kwargs)
        found = []
        for p, values in enumerate(self.values):
            mine = []
            for x, (at, _, _) in zip(inputs, places, strict=True):
                size = 0 if at is None else x.shape[at] // points
                part = x if points == 1 or at is None else x.narrow(at, p * size, size)
                mine.append(part.float() if dtypes is not None and part.dtype in HALF else part)
            rest = iter(mine)
            some, named = tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], form)
            with self._holding(values, wide=dtypes is not None):
                found.append(tree_flatten(self.original(*some, **named)))
        outputs = [self._joined(each, dim or 0) for each in zip(*(out for out, _ in found), strict=True)]
        if dtypes is not None:
            outputs = [y if to is None else y.to(to) for y, to in zip(outputs, dtypes, strict=True)]
        return tree_unflatten(outputs if back is None else list(map(back, outputs)), found[0][1])

    def _joined(self, outputs: Sequence[Any], dim: int) -> Any:
        """What the module answers for each point, as one."""
        if len(outputs) == 1 or not isinstance(outputs[0], Tensor):
            return outputs[0]
        if outputs[0].dim() <= dim:
            raise self.owner.unbatchable(self, f"an output of shape {list(outputs[0].shape)}")
        return torch.cat(list(outputs), dim)

    def _dtypes(self, dtype: torch.dtype, args: Any, kwargs: Any) -> list[torch.dtype | None]:
        """Those of the module's own outputs for inputs like these; None for what is no tensor."""
        if dtype not in self.dtypes:
            few, named = tree_map(
                lambda value: value[:1] if isinstance(value, Tensor) and value.dim() else value, (args, kwargs)
            )
            out = tree_leaves(self.original(*few, **named))
            self.dtypes[dtype] = [y.dtype if isinstance(y, Tensor) else None for y in out]
        return self.dtypes[dtype]

    @contextlib.contextmanager
    def _holding(self, values: Mapping[str, Tensor], wide: bool) -> Iterator[None]:
        """wide: the module's other tensors stand there in single precision too."""
        own, statistics = dict(self.module._parameters), dict(self.module._buffers)
        try:
            for held in (self.module._parameters, self.module._buffers) if wide else ():
                held.update({k: x.float() for k, x in held.items() if x is not None and x.dtype in HALF})  # type: ignore
            self.module._parameters.update(values)  # type: ignore[arg-type]
            yield
        finally:
            self.module._parameters.update(own)
            self.module._buffers.update(statistics)


class Replaced(Site):
    """Any other module: the changed tensors stand in the place of its own. What is done with them, and by whom, is not
    known, so they are one point's."""

    def prepare(self) -> None:
        if self.owner.points > 1:
            raise self.owner.unbatchable(self, type(self.module).__name__)
        # Parameters, as the module may be asked for them as such.
        self.values = {key: nn.Parameter(self._value(key), requires_grad=False) for key in self.held}

    def _value(self, key: str) -> Tensor:
        own = self.module.get_parameter(key)
        return own + summed(own, self.changes[key][0]) if key in self.changes else own.detach()

    def put(self) -> None:
        self._own = {key: self.module._parameters[key] for key in self.held}
        self.module._parameters.update(self.values)

    def take(self) -> None:
        self.module._parameters.update(self._own)
        del self._own, self.values

    def placed(self, x: Tensor) -> bool:
        return any(value is x for value in self.values.values())
