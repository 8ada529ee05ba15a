"""Stochastic momentum three points: Gorbunov, Bibi, Sener et al. 2020 (arXiv 1905.13278), Algorithm 1.

    v+ = beta v + s,  v- = beta v - s;   x± = x - gamma v±;   z± = x± - gamma beta / (1 - beta) v±
    z <- argmin {f(z), f(z+), f(z-)};    x, v follow the winner (unchanged when z stays)

Reads the source as: the weights (and `State.params`) are z, the points at which f is known; v = 0 and x = z at the
start; s = z(t, 0), standard normal; gamma = radius * schedule(t). x is carried along here as in the paper; whoever
keeps z alone has x = z + gamma' beta / (1 - beta) v, gamma' being that of the last accepted step. Ties: the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .noise import tensor_noise


@dataclass
class State:
    params: dict[str, np.ndarray]  # z
    x: dict[str, np.ndarray]
    momentum: dict[str, np.ndarray]  # v
    gamma: float | None  # of the last accepted step; None before it
    losses: list[float]  # f(z), f(z+), f(z-)
    chosen: int


def run(params, loss, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, loss, steps, **options)]


def trace(params, loss, steps, *, radius, momentum=0.5, schedule=None, seed=0, noise="gaussian") -> list[State]:
    beta = momentum
    z = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    x = {name: value.copy() for name, value in z.items()}
    v = {name: np.zeros_like(value) for name, value in z.items()}
    accepted = None
    states = []
    for t in range(steps):
        gamma = radius * (schedule(t) if schedule else 1.0)
        s = {name: tensor_noise(noise, z[name].shape, seed, name, t, 0) for name in z}
        trials = [(z, x, v)]
        for sign in (+1, -1):
            v_new = {name: beta * v[name] + sign * s[name] for name in z}
            x_new = {name: x[name] - gamma * v_new[name] for name in z}
            z_new = {name: x_new[name] - gamma * beta / (1 - beta) * v_new[name] for name in z}
            trials.append((z_new, x_new, v_new))
        losses = [float(loss(trial[0], t)) for trial in trials]
        chosen = int(np.argmin(losses))
        z, x, v = ({name: value.copy() for name, value in part.items()} for part in trials[chosen])
        if chosen:
            accepted = gamma
        states.append(State(z, x, v, accepted, losses, chosen))
    return states
