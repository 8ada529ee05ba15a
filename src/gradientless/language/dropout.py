"""Dropout at one rate, wherever a model drops.

Where a model drops is known by its library's code alone: in modules, in functions that are handed a number, inside the
attention's kernel, and there are as many names for the rate. So it is not the rates that are set: while `dropping` is
open, every call of torch's that drops does so at the rate that was asked for, whatever it was told. The model stays in
eval mode, so that nothing else of training acts (layers that are skipped at random, noise in a router).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_F = nn.functional
_DROPS: tuple[Callable[..., Any], ...] = (
    _F.dropout, _F.dropout1d, _F.dropout2d, _F.dropout3d, _F.alpha_dropout, _F.feature_alpha_dropout, torch.dropout,
    torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
)  # fmt: skip
_BEFORE_RATE = 4  # arguments of the attention's function


class _AtRate(TorchFunctionMode):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.acted = False  # whether anything was dropped, or could have been

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPS:
            self.acted = True
            return func(args[0] if args else kwargs["input"], self._rate, True)
        if func is _F.scaled_dot_product_attention:
            self.acted = True
            args, behind = args[:_BEFORE_RATE], args[_BEFORE_RATE + 1 :]
            named = dict(zip(("is_causal",), behind, strict=False))
            return func(*args, **(kwargs | named | {"dropout_p": self._rate}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def dropping(rate: float, generator: torch.Generator | None) -> Iterator[None]:
    """While open, models drop entries with probability `rate`, by masks that `generator` decides, and torch's global
    generator is left as it was; without one, the global generator draws them. A rate of 0 changes nothing."""
    with contextlib.ExitStack() as stack:
        if rate and generator is not None:
            # The library's own dropout knows no generator.
            device = generator.device
            seed = int(torch.randint(2**62, (), generator=generator, device=device))
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(seed)
        if rate:
            stack.enter_context(_AtRate(rate))
        yield


def drops(run: Callable[[], object]) -> bool:
    """Whether a model that `run` calls drops anything anywhere: not every architecture does."""
    watching = _AtRate(0.0)
    with watching:
        run()
    return watching.acted
