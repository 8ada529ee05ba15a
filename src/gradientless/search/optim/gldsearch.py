"""GLDSearch: the original Gradientless Descent, the whole vector and a range of radii.

Golovin et al., "Gradientless Descent: High-Dimensional Zeroth-Order Optimization", ICLR 2020 (arXiv 1911.06317),
Algorithm 1 (GLD-Search); thesis Eq. 2.37 and 2.38.

    K = log2(R/r);  v_k ~ 2^-k R D,  k = 0 … K;  θ ← best of { θ, θ + v_k }

Differs from the paper: nothing; D is N(0, I), one of the paper's choices, so the length of v_k is about 2^-k R √n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from gradientless.errors import Faults, brief
from gradientless.search.optim.base import Conversation, ForwardOptimizer
from gradientless.search.optim.checks import check_whole_vector, number
from gradientless.search.points import ALL, ORIGIN, Direction, Rank, Update, point


class GLDSearch(ForwardOptimizer):
    """Gradientless Descent over the whole vector.

    radius: R, the largest radius; becomes group["lr"]. min_radius: r, so that floor(log2(R/r)) + 1 radii are tried; a
    schedule moves both. penalty, squared: as in `GLD`, of every tensor.
    """

    name = "GLDSearch"
    takes_what_it_measured = True

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 1e-3,
        min_radius: float = 3e-5,
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
        self.radius, self.min_radius = radius, min_radius
        defaults = {"lr": radius, "penalty": penalty, "squared": squared}
        super().__init__(
            params, defaults, seed=seed, noise=noise, rank=rank, resample_every=resample_every, evaluator=evaluator,
            check=check,
        )  # fmt: skip
        self.candidates = math.floor(math.log2(radius / min_radius)) + 1

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        most, least = number(self.radius), number(self.min_radius)
        if 0 < most < math.inf:  # else it is told of the groups
            told = f"got {brief(self.min_radius)} and {brief(self.radius)}"
            holds = 0 < least <= most
            faults.require(holds, f"GLDSearch: 0 < min_radius <= radius must hold, {told}")
            few = not holds or most / 2.0**200 < least
            faults.require(few, f"GLDSearch: radius / min_radius must be < 2^200, {told}")

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "candidates": self.candidates}

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_whole_vector(self.name, group)

    def search(self, t: int) -> Conversation:
        radius = self.param_groups[0]["lr"]
        candidates = [ORIGIN, *(point(radius * 2.0**-k, Direction(t, k, ALL)) for k in range(self.candidates))]
        answer = yield Rank([candidates], [ALL])
        return Update(candidates[answer.best], answer.loss)
