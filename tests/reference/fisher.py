"""Importance of the entries of a tensor: thesis section 2.3, Eq. 2.39 to 2.42.

Berisha & Hero 2015 (D_alpha divergence), Friedman & Rafsky 1979 (the two-sample count), Tu et al. 2016 (the use).

Reads the source as: X_p and X_q are the outputs [N, C] of the same N rows under theta and under theta with z added to
one entry, so N_p = N_q = N. The estimate may be negative and is not clipped. With several perturbations the
estimates are averaged. N(0, max|theta|) has max|theta| for standard deviation.

Equal distances leave the minimal spanning tree, and so the count, undetermined (rows of one output, entries without
effect): compare implementations on points in general position.
"""

from __future__ import annotations

import numpy as np

from .noise import FISHER, gaussian


def minimal_spanning_tree(points: np.ndarray) -> list[tuple[int, int]]:
    """Prim's algorithm on the Euclidean distances of points [n, d]: n - 1 edges (point in the tree, point joined)."""
    n = len(points)
    inside, edges = {0}, []
    while len(inside) < n:
        shortest = None
        for i in sorted(inside):
            distance = np.sqrt(np.sum((points - points[i]) ** 2, axis=1))
            for j in range(n):
                if j not in inside and (shortest is None or distance[j] < shortest[0]):
                    shortest = (distance[j], i, j)
        inside.add(shortest[2])
        edges.append(shortest[1:])
    return edges


def friedman_rafsky(x_p: np.ndarray, x_q: np.ndarray) -> int:
    """C(X_p, X_q): edges of the minimal spanning tree of all points that join a point of p and a point of q."""
    n_p = len(x_p)
    edges = minimal_spanning_tree(np.concatenate([x_p, x_q]).astype(np.float64))
    return sum((i < n_p) != (j < n_p) for i, j in edges)


def divergence(x_p: np.ndarray, x_q: np.ndarray) -> float:
    """Eq. 2.42."""
    n_p, n_q = len(x_p), len(x_q)
    return 1.0 - friedman_rafsky(x_p, x_q) * (n_p + n_q) / (2.0 * n_p * n_q)


def perturbations(theta: np.ndarray, seed: int, name: str, step: int, samples: int = 1, scale=None) -> np.ndarray:
    """z [samples, *theta.shape] ~ N(0, scale^2) from the stream FISHER, draw = sample; scale: max|theta|."""
    scale = np.max(np.abs(theta)) if scale is None else scale
    draws = [gaussian(theta.size, seed, name, step, draw, FISHER) for draw in range(samples)]
    return scale * np.stack(draws).reshape(samples, *theta.shape)


def importance(outputs, theta: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Eq. 2.40 and 2.42 for every entry. outputs(theta) -> [N, C]; z in theta's shape or [samples, *shape]."""
    theta = np.asarray(theta, dtype=np.float64)
    z = np.asarray(z, dtype=np.float64).reshape(-1, theta.size)
    x_p = outputs(theta)
    result = np.zeros(theta.size)
    for i in range(theta.size):
        for sample in z:
            perturbed = theta.copy()
            perturbed.flat[i] += sample[i]
            result[i] += divergence(x_p, outputs(perturbed)) / len(z)
    return result.reshape(theta.shape)


ACTIVATIONS = {
    "relu": (lambda a: np.maximum(a, 0.0), lambda a: (a > 0).astype(np.float64)),
    "tanh": (np.tanh, lambda a: 1.0 - np.tanh(a) ** 2),
}


def two_layer_logits(params, x, activation="relu") -> np.ndarray:
    """[N, C]. params: "w1" [H, D], "b1" [H], "w2" [C, H], "b2" [C] (rows are outputs, as in torch)."""
    return ACTIVATIONS[activation][0](x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fisher_diagonal(params, x, activation="relu", labels=None) -> dict[str, np.ndarray]:
    """The diagonal of Eq. 2.39 for the softmax of a two-layer net: the mean over the rows x [N, D] of
    E[(d log p(y | x) / d theta_i)^2], y drawn from the model itself, or y = labels where given (empirical Fisher)."""
    act, slope = ACTIVATIONS[activation]
    result = {name: np.zeros_like(value, dtype=np.float64) for name, value in params.items()}
    for n, row in enumerate(x):
        a = params["w1"] @ row + params["b1"]
        h = act(a)
        p = np.exp(log_softmax(params["w2"] @ h + params["b2"]))
        for y in range(len(p)):
            weight = p[y] if labels is None else float(labels[n] == y)
            d_logits = -p
            d_logits[y] += 1.0
            d_a = (params["w2"].T @ d_logits) * slope(a)
            gradient = {"w1": np.outer(d_a, row), "b1": d_a, "w2": np.outer(d_logits, h), "b2": d_logits}
            for name, g in gradient.items():
                result[name] += weight * g**2 / len(x)
    return result
