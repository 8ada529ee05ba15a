"""A closure that may only measure: it returns a number, without backward, and the weights stay as they stand."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradientless.errors import UserError


class Watched:
    """The `closure` of an optimizer, called `owner` in errors, over `tensors` by name. A call returns the loss, and
    raises UserError where that is no scalar or where it has done more than measure."""

    def __init__(self, owner: str, tensors: Mapping[str, Tensor], closure: Callable[[], Any]):
        self._owner, self._tensors, self._closure = owner, tensors, closure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._closure, name)  # sessions and importances

    def _state(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Of each tensor: its memory and version, and those of its gradient."""
        return [(version(tensor), version(tensor.grad)) for tensor in self._tensors.values()]

    def __call__(self) -> float:
        before = self._state()
        try:
            loss = self._closure()
        except TypeError as error:
            if told := _asks(self._closure):
                raise UserError(
                    f"{self._owner}: closure must take no arguments, got one that asks for {told}"
                ) from error
            raise
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise UserError(f"{self._owner}: closure must not call backward, got: {error}") from error
        for name, old, new in zip(self._tensors, before, self._state(), strict=True):
            if new[1] != old[1]:
                raise UserError(f"{self._owner}: closure must not call backward, got a gradient in '{name}'")
            if new[0] != old[0]:
                raise UserError(
                    f"{self._owner}: parameters must not change between the probes of a step, got '{name}' changed "
                    "while the closure ran"
                )
        return self._scalar(loss)

    def _scalar(self, loss: Any) -> float:
        if not isinstance(loss, Tensor) or loss.numel() == 1:
            with contextlib.suppress(TypeError, ValueError):
                return float(loss)
        shape = f" of shape {tuple(loss.shape)}" if hasattr(loss, "shape") else ""
        raise UserError(f"{self._owner}: the closure must return a scalar loss, got {type(loss).__name__}{shape}")


def _asks(closure: Callable[[], Any]) -> str:
    """The arguments that a closure must be given."""
    try:
        takes = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):  # what is written in C may not tell
        return ""
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return ", ".join(each.name for each in takes if each.default is each.empty and each.kind not in optional)


def version(tensor: Tensor | None) -> tuple[int, int]:
    """What tells a change of a tensor in place, or another in its place: its memory and its count of changes."""
    if tensor is None:
        return 0, 0
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
