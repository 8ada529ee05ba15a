"""STP: Stochastic Three Points.

Bergou, Gorbunov and Richtárik, "Stochastic three points method for unconstrained smooth minimization", SIAM J. Optim.
30(4), 2020 (arXiv 1902.03591), Algorithm 1; thesis Eq. 2.36.

    z ~ D;  θ ← best of { θ, θ + α_t z, θ - α_t z }

Differs from the paper: nothing; D is N(0, I), and α_t is the scheduled radius.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gradientless.search.optim.base import Conversation, ForwardOptimizer
from gradientless.search.optim.checks import check_whole_vector
from gradientless.search.points import ALL, ORIGIN, Direction, Rank, Update, point


class STP(ForwardOptimizer):
    """Stochastic Three Points over the whole vector.

    radius: α, the step size; becomes group["lr"]. penalty, squared: as in `GLD`, of every tensor.
    """

    name = "STP"
    takes_what_it_measured = True

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 1e-3,
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
        defaults = {"lr": radius, "penalty": penalty, "squared": squared}
        super().__init__(
            params, defaults, seed=seed, noise=noise, rank=rank, resample_every=resample_every, evaluator=evaluator,
            check=check,
        )  # fmt: skip

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_whole_vector(self.name, group)

    def search(self, t: int) -> Conversation:
        radius, z = self.param_groups[0]["lr"], Direction(t, 0, ALL)
        candidates = [ORIGIN, point(radius, z), point(-radius, z)]
        answer = yield Rank([candidates], [ALL])
        return Update(candidates[answer.best], answer.loss)
