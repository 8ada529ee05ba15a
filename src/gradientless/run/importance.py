"""Measured importance of entries: the diagonal of the Fisher information without gradients, and with them as a check.

Tu, Berisha, Woolf, Seo and Cao, "Ranking the parameters of deep neural networks using the Fisher information", ICASSP
2016; Berisha and Hero, "Empirical non-parametric estimation of the Fisher information", IEEE SPL 22(7), 2015; thesis
section 2.3, Eq. 2.39 to 2.42.

    θ̃ = θ + z e_i                                              (2.40)
    D(p, q) ≈ 1 - C(X_p, X_q) (N_p + N_q) / (2 N_p N_q)          (2.42)

with C the Friedman-Rafsky count: edges between the two samples in the minimal spanning tree of the outputs of the model
with θ and with θ̃ on the same rows.

Differs from the paper: the outputs compared are logits. z is drawn from N(0, (scale · max|θ|)²) for every entry anew,
where the thesis leaves its size open. D is not cut off at zero: where both samples lie alike, half of the edges that
join neighbours cross, so D is about -1/2. Equal distances, which the statistic does not foresee, count as crossing, so
an entry that changes no bit of the outputs has D = 1/N - 1, the lowest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor, nn

from gradientless.delta import Delta
from gradientless.errors import UserError
from gradientless.search.noise import Noise

LIMIT = 1_000_000  # entries of a tensor: about five minutes of one core at 32 rows
_CHUNK = 256  # entries whose trees are made in one call
_TIE = 1e-12  # edges between the samples come first among equals: an entry of no effect has the lowest D there is
_TINY = 1e-300  # added to every distance: the library takes a distance of zero for a missing edge


def divergences(base: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """D (Eq. 2.42) between the sample `base` [N, C] and each of `moved` [P, N, C]: float64 [P]."""
    count, rows, _ = moved.shape
    nodes = 2 * rows
    points = np.concatenate([np.broadcast_to(base, moved.shape), moved], axis=1).astype(np.float64)
    first, second = np.triu_indices(nodes, 1)
    distance = np.sqrt(((points[:, first] - points[:, second]) ** 2).sum(-1)) + _TINY
    distance *= np.where((first < rows) == (second < rows), 1.0 + _TIE, 1.0)
    # One graph of P components: candidate p holds the nodes [p · 2N, (p + 1) · 2N), its edges in row order.
    columns = (second[None] + nodes * np.arange(count)[:, None]).ravel()
    degree = np.tile(np.arange(nodes - 1, -1, -1), count)
    starts = np.concatenate([[0], np.cumsum(degree)])
    graph = csr_matrix((distance.ravel(), columns, starts), shape=(count * nodes, count * nodes))
    tree = minimum_spanning_tree(graph).tocoo()
    crossing = (tree.row % nodes < rows) != (tree.col % nodes < rows)
    crossings = np.bincount(tree.row[crossing] // nodes, minlength=count)
    return 1.0 - crossings * (2 * rows) / (2 * rows * rows)


def fisher(
    outputs: Callable[[Sequence[Sequence[Delta]]], Tensor],
    name: str,
    theta: Tensor,
    noise: Noise,
    step: int,
    *,
    scale: float = 1.0,
    draws: int = 1,
) -> Tensor:
    """Importance of each entry of `theta` by the divergence that a perturbation of it alone causes: float64 [numel].

    outputs: model outputs [P, C, N] under each of P lists of changes. name: what changes call `theta`. step: keys the
    perturbations. scale, draws: see the module docstring and `GLD`. Raises UserError above LIMIT entries.
    """
    size = theta.numel()
    if size > LIMIT:
        raise UserError(f"fisher: tensor '{name}' must have at most {LIMIT:,} entries, got {size:,}; use 'random'")
    spread = scale * float(theta.detach().abs().max())
    base = outputs([[]])[0].t().double().cpu().numpy()
    total = np.zeros(size)
    gaussian = Noise(noise.seed, "gaussian", noise.backend)
    for draw in range(draws):
        z = gaussian.fill(f"{name}@fisher", step, draw, 0, size, theta.device).to(theta.dtype) * spread
        for start in range(0, size, _CHUNK):
            entries = torch.arange(start, min(start + _CHUNK, size), device=theta.device).split(1)
            moved = outputs([[Delta(name, z[index], index)] for index in entries])
            total[start : start + _CHUNK] += divergences(base, moved.transpose(1, 2).double().cpu().numpy())
    return torch.from_numpy(total / draws)


def fisher_by_gradients(surface: nn.Module, logits: Callable[[], Tensor], name: str) -> Tensor:
    """The diagonal of Eq. 2.39 by gradients, E_x E_{y ~ p(·|x)} [(∂ log p(y|x) / ∂θ_i)²]: float64 [numel].

    logits: the model's outputs [N, C], differentiable in the tensor `name` of `surface.trainable()`. A check on the
    ranking of `fisher`, for models that can be differentiated; `.grad` stays as it is.
    """
    theta = surface.trainable()[name]  # type: ignore[operator]
    with torch.enable_grad():
        log_p = torch.log_softmax(logits(), dim=1)
        total = torch.zeros(theta.numel(), dtype=torch.float64)
        for row in log_p:
            for value in row:
                (gradient,) = torch.autograd.grad(value, theta, retain_graph=True)
                total += float(value.detach().exp()) * gradient.view(-1).double().cpu().square()
    return total / len(log_p)
