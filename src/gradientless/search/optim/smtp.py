"""SMTP: Stochastic Momentum Three Points.

Gorbunov, Bibi, Sener, Bergou and Richtárik, "A stochastic derivative free optimization method with momentum", ICLR
2020 (arXiv 1905.13278), Algorithm 1.

    v± = β v ± s,  s ~ D;   x± = x - γ v±;   z± = x± - γ β/(1-β) v±
    z ← best of { z, z+, z- };  x and v follow the winner (v stays when z itself wins)

Differs from the paper: nothing in exact arithmetic. The weights hold z, the point whose loss is known, and v is a
dense buffer (memory of the weights' size); x = z + γ' β/(1-β) v, with γ' the step size of the last accepted step, is
never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gradientless.errors import Faults, brief
from gradientless.search.optim.base import Conversation, ForwardOptimizer
from gradientless.search.optim.checks import check_whole_vector, number
from gradientless.search.points import ALL, ORIGIN, BufferUpdate, Direction, Point, Rank, Update, point


class SMTP(ForwardOptimizer):
    """Stochastic Momentum Three Points over the whole vector.

    radius: γ, the step size; becomes group["lr"]. momentum: β in [0, 1). penalty, squared: as in `GLD`, of every
        tensor.
    """

    name = "SMTP"
    takes_what_it_measured = True

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 1e-3,
        momentum: float = 0.5,
        penalty: float = 0.0,
        squared: bool = False,
        *,
        seed: int = 0,
        noise: str = "gaussian",
        rank: int | None = None,
        resample_every: int = 1,
        evaluator: str = "auto",
        check: bool = True,
    ):
        self.momentum = momentum
        self._accepted_radius = 0.0
        defaults = {"lr": radius, "penalty": penalty, "squared": squared}
        super().__init__(
            params, defaults, seed=seed, noise=noise, rank=rank, resample_every=resample_every, evaluator=evaluator,
            check=check,
        )  # fmt: skip

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        told = f"SMTP: momentum must be in [0, 1), got {brief(self.momentum)}"
        faults.require(0.0 <= number(self.momentum) < 1.0, told)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_whole_vector(self.name, group)

    def search(self, t: int) -> Conversation:
        gamma, beta, s = self.param_groups[0]["lr"], self.momentum, Direction(t, 0, ALL)
        # z± - z = (γ' - γ) β/(1-β) v ∓ γ/(1-β) s
        drift: Point = ORIGIN
        if "velocity" in self.space.buffers and gamma != self._accepted_radius:
            gap = (self._accepted_radius - gamma) * beta / (1 - beta)
            drift = point(gap, Direction(t, 0, ALL, buffer="velocity"))
        reach = gamma / (1 - beta)
        candidates = [ORIGIN, drift + point(-reach, s), drift + point(reach, s)]
        answer = yield Rank([candidates], [ALL])
        if answer.best == 0:
            return Update(ORIGIN, answer.loss)
        self._accepted_radius = gamma
        sign = 1.0 if answer.best == 1 else -1.0
        return Update(candidates[answer.best], answer.loss, {"velocity": BufferUpdate(beta, point(sign, s))})

    def search_state(self) -> dict[str, Any]:
        return {"accepted_radius": self._accepted_radius}

    def load_search_state(self, state: Mapping[str, Any]) -> None:
        self._accepted_radius = state["accepted_radius"]
