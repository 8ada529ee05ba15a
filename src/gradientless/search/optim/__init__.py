"""Optimizers that need only values of the loss, and torch's own first-order ones to compare them with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gradientless.search.optim.base import ForwardOptimizer
from gradientless.search.optim.checks import number
from gradientless.search.optim.gld import GLD
from gradientless.search.optim.gldsearch import GLDSearch
from gradientless.search.optim.kieferwolfowitz import KieferWolfowitz
from gradientless.search.optim.mezo import MeZO
from gradientless.search.optim.mezoadam import MeZOAdam
from gradientless.search.optim.mezoadamm import MeZOAdaMM
from gradientless.search.optim.mezoconservative import MeZOConservative
from gradientless.search.optim.mezomomentum import MeZOMomentum
from gradientless.search.optim.mezosign import MeZOSign
from gradientless.search.optim.smtp import SMTP
from gradientless.search.optim.spsa import no_decay_names
from gradientless.search.optim.stp import STP

OPTIMIZERS: dict[str, type[ForwardOptimizer]] = {
    "gld": GLD,
    "gldsearch": GLDSearch,
    "stp": STP,
    "smtp": SMTP,
    "mezo": MeZO,
    "mezomomentum": MeZOMomentum,
    "mezoadam": MeZOAdam,
    "mezoadamm": MeZOAdaMM,
    "mezosign": MeZOSign,
    "mezoconservative": MeZOConservative,
    "kieferwolfowitz": KieferWolfowitz,
}


class FirstOrder(NamedTuple):
    """A torch optimizer and the options with which its registry name means it."""

    type: type[torch.optim.Optimizer]
    defaults: dict[str, Any]

    def require(self, option: str, value: Any) -> str | None:
        """What `option` must be where `value` is not that; torch refuses some such values, and learns nan by others."""
        wanted, holds = _REQUIRED[option]
        return None if holds(value) else wanted


def _is_natural(value: Any) -> bool:
    return 0 <= number(value) < math.inf


def _is_share(value: Any) -> bool:
    return 0 <= number(value) < 1


_REQUIRED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0 and finite", _is_natural),
    "eps": ("a number >= 0 and finite", _is_natural),
    "weight_decay": ("a number >= 0 and finite", _is_natural),
    "momentum": ("a number >= 0 and < 1", _is_share),
    "betas": (
        "a list of two numbers >= 0 and < 1",
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_share, value)),
    ),
    "nesterov": ("true or false", lambda value: isinstance(value, bool)),
}


FIRST_ORDER: dict[str, FirstOrder] = {
    "sgd": FirstOrder(torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.0}),
    "momentum": FirstOrder(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.0}),
    "nesterov": FirstOrder(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}),
    "adam": FirstOrder(torch.optim.Adam, {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
    "adamw": FirstOrder(torch.optim.AdamW, {"lr": 5e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}),
}

__all__ = [
    "FIRST_ORDER", "GLD", "OPTIMIZERS", "SMTP", "STP", "FirstOrder", "ForwardOptimizer", "GLDSearch", "KieferWolfowitz",
    "MeZO", "MeZOAdaMM", "MeZOAdam", "MeZOConservative", "MeZOMomentum", "MeZOSign",
    "no_decay_names",
]  # fmt: skip
