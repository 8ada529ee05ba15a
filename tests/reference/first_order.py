"""SGD, momentum, Nesterov, Adam and AdamW as torch.optim defines them; thesis Eq. 2.19 to 2.28.

The second argument is `gradient(params, t) -> dict of arrays` in place of a loss. `lr` is multiplied by schedule(t).

Reads the source as: torch's forms, which differ from the thesis's print. Momentum: b <- mu b + g (b = g at first),
theta <- theta - lr b, so a change of lr acts on the whole buffer at once. Nesterov: theta <- theta - lr (g + mu b),
the gradient taken at theta. Weight decay is added to g, but for AdamW: theta <- (1 - lr wd) theta beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class State:
    params: dict[str, np.ndarray]
    buffers: dict[str, dict[str, np.ndarray]]  # "momentum"; or "exp_avg" and "exp_avg_sq"; by tensor name


def run(params, gradient, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, gradient, steps, **options)]


def trace(
    params,
    gradient,
    steps,
    *,
    rule="sgd",  # sgd, momentum, nesterov, adam, adamw
    lr,
    momentum=0.9,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=None,  # None: torch's default, 0.01 for adamw and 0 otherwise
    schedule=None,
) -> list[State]:
    theta = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    decay = weight_decay if weight_decay is not None else (0.01 if rule == "adamw" else 0.0)
    b = {name: None for name in theta}
    m = {name: np.zeros_like(value) for name, value in theta.items()}
    v = {name: np.zeros_like(value) for name, value in theta.items()}
    states = []
    for t in range(steps):
        eta = lr * (schedule(t) if schedule else 1.0)
        gradients = gradient({name: value.copy() for name, value in theta.items()}, t)
        for name in theta:
            g = np.asarray(gradients[name], dtype=np.float64)
            if rule == "adamw":
                theta[name] = theta[name] * (1 - eta * decay)
            else:
                g = g + decay * theta[name]
            if rule == "sgd":
                theta[name] = theta[name] - eta * g
            elif rule in ("momentum", "nesterov"):
                b[name] = g.copy() if b[name] is None else momentum * b[name] + g
                theta[name] = theta[name] - eta * (g + momentum * b[name] if rule == "nesterov" else b[name])
            elif rule in ("adam", "adamw"):
                m[name] = betas[0] * m[name] + (1 - betas[0]) * g
                v[name] = betas[1] * v[name] + (1 - betas[1]) * g**2
                m_hat = m[name] / (1 - betas[0] ** (t + 1))
                v_hat = v[name] / (1 - betas[1] ** (t + 1))
                theta[name] = theta[name] - eta * m_hat / (np.sqrt(v_hat) + eps)
            else:
                raise ValueError(rule)
        buffers = {}
        if rule in ("momentum", "nesterov"):
            buffers = {"momentum": {name: value.copy() for name, value in b.items()}}
        elif rule in ("adam", "adamw"):
            buffers = {"exp_avg": dict(m), "exp_avg_sq": dict(v)}
        states.append(State(dict(theta), buffers))
    return states
