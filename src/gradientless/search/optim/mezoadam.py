"""MeZO-Adam: Adam over the estimate, from dense buffers or from a window of logged scalars.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333), B.2; Kingma and
Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015 (arXiv 1412.6980), Algorithm 1.

    m ← β1 m + (1 - β1) ĝ;   v ← β2 v + (1 - β2) ĝ²
    θ ← (1 - η λ) θ - η m̂ / (√v̂ + δ),   m̂ = m / (1 - β1^k),  v̂ = v / (1 - β2^k) after k estimates
    window W:  m and v of the last W estimates alone, k ≤ W

Differs from the paper: weight decay is apart from the gradient, as in AdamW. The paper remembers all steps, which is a
window of at least their number. Steps that are skipped do not count in k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradientless.errors import Faults, brief
from gradientless.search.optim.checks import number
from gradientless.search.optim.entrywise import Entrywise, entries
from gradientless.search.points import Point


class MeZOAdam(Entrywise):
    """Adam over the estimate. Options beyond those of `SPSA`:

    betas: β1 and β2, each in [0, 1). adam_eps: δ, > 0. window: None for dense buffers (memory of twice the weights, in
        single precision), or W, the steps that are remembered (no such memory; each step makes the noise of W steps).
    """

    name = "MeZOAdam"
    buffers: tuple[str, ...] = ("first", "second")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        window: int | None = None,
        **options: Any,
    ):
        self.betas, self.adam_eps = tuple(betas) if isinstance(betas, list) else betas, adam_eps
        super().__init__(params, window, lr=lr, **options)

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        pair = self.betas if isinstance(self.betas, tuple) else ()
        holds = len(pair) == 2 and all(0.0 <= number(beta) < 1.0 for beta in pair)
        faults.require(holds, f"{self.name}: betas must be two numbers in [0, 1), got {brief(self.betas)}")
        told = f"{self.name}: adam_eps must be > 0 and finite, got {brief(self.adam_eps)}"
        faults.require(0 < number(self.adam_eps) < math.inf, told)

    def change(self, name: str, start: int, stop: int, gradient: Point) -> Tensor:
        past = [gradient] if self.window is None else list(self.window.estimates)
        if self.window is None:
            moments = [self.buffer(kind, name, start, stop) for kind in self.buffers]
        else:
            like = entries(self.space, (), name, start, stop)
            moments = [torch.zeros_like(like) for _ in self.buffers]
        for estimate in past:
            self.remember(moments, entries(self.space, estimate, name, start, stop))
        return self.ratio(moments, self.taken if self.window is None else len(past)) * -self.group(name)["lr"]

    def remember(self, moments: list[Tensor], g: Tensor) -> None:
        """m and v follow an estimate, in place."""
        for moment, beta, seen in zip(moments, self.betas, (g, g * g), strict=False):
            moment.mul_(beta).add_(seen, alpha=1.0 - beta)

    def ratio(self, moments: list[Tensor], k: int) -> Tensor:
        """m̂ / (√v̂ + δ) after k estimates."""
        first, second = moments
        m = first / (1.0 - self.betas[0] ** k)
        v = second / (1.0 - self.betas[1] ** k)
        return m / (v.sqrt() + self.adam_eps)
