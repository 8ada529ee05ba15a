"""GLD-Search over the whole vector: Golovin, Karro, Kochanski et al. 2020 (arXiv 1911.06317), Algorithm 1;
thesis Eq. 2.37 and 2.38.

    for k = 0 .. K:  r_k = 2^-k R,  v_k ~ r_k D;      x <- argmin {f(x), f(x + v_k)}

Reads the source as: K = floor(log2(R / r)), so that no radius is below r; v_k = r_k z(t, k) with z standard normal,
not normalised. Under a schedule R is R(t) and r stays, so K follows; k = 0 is always tried. Ties: the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .noise import tensor_noise


@dataclass
class State:
    params: dict[str, np.ndarray]
    losses: list[float]  # of theta, then of each candidate
    chosen: int  # 0: no change


def run(params, loss, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, loss, steps, **options)]


def trace(params, loss, steps, *, radius, min_radius, schedule=None, seed=0, noise="gaussian") -> list[State]:
    x = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    states = []
    for t in range(steps):
        big_r = radius * (schedule(t) if schedule else 1.0)
        last = max(0, math.floor(math.log2(big_r / min_radius)))
        points = [x]
        for k in range(last + 1):
            r_k = 2.0**-k * big_r
            points.append({name: x[name] + r_k * tensor_noise(noise, x[name].shape, seed, name, t, k) for name in x})
        losses = [float(loss(point, t)) for point in points]
        chosen = int(np.argmin(losses))
        x = {name: value.copy() for name, value in points[chosen].items()}
        states.append(State(x, losses, chosen))
    return states
