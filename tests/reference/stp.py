"""Stochastic three points: Bergou, Gorbunov, Richtarik 2020 (arXiv 1902.03591), Algorithm 1; thesis Eq. 2.36.

    x <- argmin {f(x), f(x + r_t s), f(x - r_t s)},   s = z(t, 0)

Reads the source as: s is standard normal, not normalised. Ties: the first, in the order written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .noise import tensor_noise


@dataclass
class State:
    params: dict[str, np.ndarray]
    losses: list[float]  # f(x), f(x + r s), f(x - r s)
    chosen: int


def run(params, loss, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, loss, steps, **options)]


def trace(params, loss, steps, *, radius, schedule=None, seed=0, noise="gaussian") -> list[State]:
    x = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    states = []
    for t in range(steps):
        r = radius * (schedule(t) if schedule else 1.0)
        s = {name: tensor_noise(noise, x[name].shape, seed, name, t, 0) for name in x}
        points = [x, {name: x[name] + r * s[name] for name in x}, {name: x[name] - r * s[name] for name in x}]
        losses = [float(loss(point, t)) for point in points]
        chosen = int(np.argmin(losses))
        x = {name: value.copy() for name, value in points[chosen].items()}
        states.append(State(x, losses, chosen))
    return states
