"""MeZO: stochastic gradient descent along an estimated gradient, at the memory of inference.

Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023
(arXiv 2305.17333), Algorithms 1 and 2; the rule is ZO-SGD (thesis, section 2.2.3, Eq. 2.33). The estimate ĝ and its
options stand in `spsa`.

    θ ← (1 - η λ) θ - η ĝ

Differs from the paper: weight decay λ leaves tensors of fewer than two dimensions alone, that is, biases and the
weights of normalisations, with all other normalisations of a model that is given, and the batch is the same for all n
draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gradientless.errors import UserError
from gradientless.search.optim.base import Conversation
from gradientless.search.optim.entrywise import entries
from gradientless.search.optim.spsa import SPSA
from gradientless.search.points import Update


class MeZO(SPSA):
    """Stochastic gradient descent along the estimate; the options are those of `SPSA`."""

    name = "MeZO"
    _filling = False

    def search(self, t: int) -> Conversation:
        estimate = yield from self.estimated(t)
        if estimate is None:
            return self.skip()
        if self._filling:
            return Update(estimate.gradient, estimate.loss)
        step = tuple((-self.rate(d.block) * slope, d) for slope, d in estimate.gradient)
        return Update(step, estimate.loss, decay=self.decay())

    @torch.no_grad()
    def fill_grad(self, closure: Callable[[], Any]) -> float:
        """Add the estimate to `.grad` of every parameter, as a backward pass would, for any torch optimizer to use.

        Takes the place of `step`: the weights stay, and no learning rate or weight decay of this optimizer counts.
        Memory: one copy of the parameters, the gradients, and for a moment the largest tensor. A step that is skipped
        adds nothing. Returns the loss.
        """
        if self.trajectory is not None:
            raise UserError(f"{self.name}: fill_grad must not be logged, since another optimizer moves the weights")
        self._filling = True
        try:
            return self.step(closure)
        finally:
            self._filling = False

    def apply(self, update: Update) -> None:
        if not self._filling:
            super().apply(update)
            return
        self.space.settle()
        for name, tensor in self.space.tensors.items():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            if update.point:
                tensor.grad.view(-1).add_(entries(self.space, update.point, name, 0, tensor.numel()))
