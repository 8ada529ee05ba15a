"""A module that holds tuned tensors, and computes with changes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradientless.delta import Delta
from gradientless.errors import UserError
from gradientless.search.evaluators.rows import HALF, Place

if TYPE_CHECKING:
    from gradientless.search.evaluators.injection import Injection


class Site:
    """A module that holds tuned tensors. held: attribute -> tensor name."""

    lookup = False  # whether inputs are positions in a table

    def __init__(self, owner: Injection, module: nn.Module, held: dict[str, str]):
        self.owner, self.module, self.held = owner, module, held
        self.places: list[Place] | None = None  # of the rows in each of its inputs, once points were tried together
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
            return self.forward(*args, **kwargs)
        finally:
            self.owner.inside = outer

    def holds(self, x: Tensor) -> bool:
        return any(self.module._parameters[key] is x for key in self.held)

    def prepare(self) -> None:
        """Make ready what `changes` means here."""

    def release(self) -> None:
        """Forget what `prepare` and the calls kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward")


def summed(tensor: Tensor, changes: Sequence[Delta]) -> Tensor:
    """The sum of changes of a vector or a small tensor, in at least single precision."""
    total = torch.zeros_like(tensor, dtype=torch.float32 if tensor.dtype in HALF else tensor.dtype)
    for change in changes:
        right = None if change.right is None else change.right.to(total.dtype)
        Delta(change.name, change.values.to(total.dtype), change.index, right, change.scale).add_to(total)
    return total


def makes_tensors(out: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_leaves(out))
