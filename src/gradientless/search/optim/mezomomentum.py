"""MeZO with momentum, from a dense buffer or from a window of logged scalars.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333), B.2.

    m ← β m + ĝ;   θ ← (1 - η λ) θ - η m
    window W:  m = Σ_{k<W} β^k ĝ_{t-k},  with the noise of each ĝ made again

Differs from the paper: it names no formula; this is torch.optim.SGD's momentum, which the authors' code uses, with
weight decay apart from the gradient. The paper remembers all steps, which is a window of at least their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradientless.errors import Faults, brief
from gradientless.search.optim.base import Conversation, ForwardOptimizer
from gradientless.search.optim.checks import number
from gradientless.search.optim.entrywise import Entrywise, entries
from gradientless.search.points import Point, Update


class MeZOMomentum(Entrywise):
    """Momentum over the estimate. Options beyond those of `SPSA`:

    momentum: β in [0, 1). window: None for a dense buffer (memory of the weights' size, in single precision), or W, the
        steps that are remembered (no such memory; a step makes the noise of W steps again).
    """

    name = "MeZOMomentum"
    buffers = ("momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        momentum: float = 0.9,
        window: int | None = None,
        **options: Any,
    ):
        self.momentum = momentum
        super().__init__(params, window, lr=lr, **options)

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        told = f"{self.name}: momentum must be in [0, 1), got {brief(self.momentum)}"
        faults.require(0.0 <= number(self.momentum) < 1.0, told)

    def search(self, t: int) -> Conversation:
        update = yield from super().search(t)
        if self.window is None or not update.point:
            return update
        estimates = enumerate(reversed(self.window.estimates))
        step = tuple((-self.rate(d.block) * self.momentum**k * g, d) for k, terms in estimates for g, d in terms)
        return update._replace(point=step)

    def apply(self, update: Update) -> None:
        if self.window is None:
            super().apply(update)
        else:
            ForwardOptimizer.apply(self, update)

    def change(self, name: str, start: int, stop: int, gradient: Point) -> Tensor:
        m = self.buffer("momentum", name, start, stop)
        m.mul_(self.momentum).add_(entries(self.space, gradient, name, start, stop))
        return m * -self.group(name)["lr"]
