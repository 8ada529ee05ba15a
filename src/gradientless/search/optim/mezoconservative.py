"""Conservative MeZO: the step is taken, reversed or left, whichever has the lowest loss on the step's batch.

Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024 (arXiv
2402.11592), ZO-SGD-Cons.

    u = -η ĝ;   θ ← best of { θ, θ + u, θ - u }

Differs from the paper: weight decay is applied to a step that is taken, after the choice.

Half precision holds few of its steps: θ ± u is rounded stochastically, by the step's noise, when it is measured and
again, to the same bits, when it is taken. Where the model itself never stands there (evaluators inject and session),
θ ± u is measured as they see it, and what is taken differs from that by the rounding.
"""

from __future__ import annotations

from gradientless.search.optim.base import Conversation
from gradientless.search.optim.spsa import SPSA
from gradientless.search.points import ALL, ORIGIN, Rank, Update, scaled


class MeZOConservative(SPSA):
    """The better of the points; the options are those of `SPSA`."""

    name = "MeZOConservative"

    def search(self, t: int) -> Conversation:
        estimate = yield from self.estimated(t)
        if estimate is None:
            return self.skip()
        step = tuple((-self.rate(d.block) * slope, d) for slope, d in estimate.gradient)
        candidates = [ORIGIN, step, scaled(-1.0, step)]
        answer = yield Rank([candidates], [ALL], taken=True)
        return Update(candidates[answer.best], answer.loss, decay=self.decay() if answer.best else {})

    def passes(self, t: int) -> int:
        return super().passes(t) + (2 if self.estimate == "one-sided" else 3)
