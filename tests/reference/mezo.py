"""MeZO and the rules over its estimate: Malladi et al. 2023 (arXiv 2305.17333), Algorithms 1 and 2, A.2 and B;
Kingma and Ba 2015, Algorithm 1; Chen et al. 2019 (ZO-AdaMM), Algorithm 1; Liu et al. 2019 (ZO-signSGD), Algorithm 1;
Zhang et al. 2024 (arXiv 2402.11592), ZO-SGD-Cons; Kiefer and Wolfowitz 1952, thesis Eq. 2.31 and 2.32.

    grad = 1/n sum_j (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps) z_j                            Definition 1
    grad = (L(theta + eps d^-1 z) - L(theta - eps d^-1 z)) / (2 eps) (d z)                              Definition 6
    grad = (L(theta + eps d^-1 z) - L(theta - eps d^-1 z)) / (2 eps) z                                  Definition 7
    grad = (L_t(theta_t + eps z_t) - L_{t-1}(theta_{t-1} + eps z_{t-1})) / eps z_t                      Definition 8
    |L(theta + eps z_l) - L(theta - eps z_l)| / (2 eps), mean over draws: layer l's gradient norm    Proposition 1

    mezo          theta <- theta - eta (grad + lambda theta)
    mezomomentum  m <- beta m + grad;  theta <- theta - eta m
    mezoadam      m, v, m^, v^ of Adam;  theta <- theta - eta m^ / (sqrt(v^) + delta)
    mezoadamm     m, v of Adam, v^ <- max(v^, v);  theta <- theta - eta m / (sqrt(v^) + delta)
    mezosign      theta <- theta - eta sign(grad)
    mezoconservative   theta <- the best of theta, theta - eta grad, theta + eta grad
    kieferwolfowitz    grad_i = (L(theta + eps e_i) - L(theta - eps e_i)) / (2 eps)

`trace(..., rule="mezo")` returns one State a step, `run` the params alone. lr, eps, weight_decay, entries, selection,
indices, reselect_every and penalty may be dicts by tensor name.

Reads the source as: eta(t) = lr * schedule(t). Step t counts from 0; n_t = max(1, int(t / sample_steps * n)), at most
n, under the linear schedule. Draws j < n are the probes; norms take draws n, n + 1, ... A layer is a name up to its
first number. d of 0 is 1; d is computed before the step's probes, at t = 0 and at every multiple of renorm_every.
Weight decay is apart from the gradient, on tensors of two or more dimensions, and multiplies theta before the step. A
step in which a loss is not finite changes nothing and is counted. `window=W`: m and v are those of the last W
estimates, from zero. Tensors with an eps of their own divide by it; a layer's norm is measured with its largest. The
penalty is added to every loss. Noise "sphere" is Gaussian noise scaled to the length sqrt(d) over the d entries that
move of the tensors in one of `spheres`. With `rank` r, z of a matrix is u v' / sqrt(r), u of step t, v of the last step
that resample_every divides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .gld import largest
from .noise import select, tensor_noise


@dataclass
class State:
    params: dict[str, np.ndarray]
    losses: list[float]  # all that were measured, in order
    loss: float  # what the step reports
    gradient: dict[str, np.ndarray] | None  # None: skipped
    moments: dict[str, dict[str, np.ndarray]]
    sigma: dict[str, float]
    skipped: int


def run(params, loss, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, loss, steps, **options)]


def layer(name: str) -> str:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return name


def trace(
    params,
    loss,
    steps,
    *,
    rule="mezo",
    lr=1e-6,
    eps=1e-3,
    weight_decay=0.0,
    samples=1,
    sample_schedule="constant",
    sample_steps=None,
    scale_lr=False,
    estimate="two-point",
    layerwise=False,
    clip=None,
    variance="none",
    expectation=False,
    renorm_every=None,
    norm_samples=1,
    penalty=0.0,
    squared=False,
    entries=None,
    selection="random",
    indices=None,
    reselect_every=1,
    momentum=0.9,
    betas=(0.9, 0.999),
    adam_eps=1e-8,
    window=None,
    importance=None,
    schedule=None,
    seed=0,
    noise="gaussian",
    spheres=None,  # for noise "sphere": lists of the tensors whose directions have one length together; None: all
    rank=None,
    resample_every=1,
) -> list[State]:
    theta = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    chosen: dict[str, np.ndarray] = {}
    d: dict[str, float] = {}
    history: list[dict[str, np.ndarray]] = []
    previous = None
    skipped = 0
    states = []

    def of(option, name):
        return option[name] if isinstance(option, dict) else option

    def mask(name, t):
        """1 on the entries that move."""
        how, s, size = of(selection, name), of(entries, name), theta[name].size
        result = np.zeros(size)
        if how == "fixed":
            result[list(of(indices, name))] = 1
        elif how == "all" or s is None or s >= size:
            result[:] = 1
        else:
            birth = t - t % (of(reselect_every, name) or 1)
            if how == "random":
                chosen[name] = select(s, size, seed, name, birth)
            elif t == birth and how == "magnitude":
                chosen[name] = largest(np.abs(theta[name]), s)
            elif t == birth and how == "fisher":
                chosen[name] = largest(np.asarray(importance(theta, name, t)), s)
            result[chosen[name]] = 1
        return result.reshape(theta[name].shape)

    for t in range(steps):
        eta = {name: of(lr, name) * (schedule(t) if schedule else 1.0) for name in theta}
        moving = {name: mask(name, t) for name in theta}
        measured: list[float] = []

        def drawn(draw, name, t=t, moving=moving):
            kind, shape = ("gaussian" if noise == "sphere" else noise), theta[name].shape
            if rank is None or len(shape) < 2:
                return moving[name] * tensor_noise(kind, shape, seed, name, t, draw)
            columns = theta[name].size // shape[0]
            u = tensor_noise(kind, (shape[0], rank), seed, f"{name}#u", t, draw)
            v = tensor_noise(kind, (columns, rank), seed, f"{name}#v", t - t % resample_every, draw)
            return moving[name] * (u @ v.T / math.sqrt(rank)).reshape(shape)

        def z(draw, name, moving=moving, drawn=drawn):
            value = drawn(draw, name)
            if noise == "sphere":
                (ball,) = [names for names in spheres or [list(theta)] if name in names]
                squares = sum(float(np.sum(drawn(draw, other) ** 2)) for other in ball)
                value = value * math.sqrt(sum(float(np.sum(moving[other])) for other in ball) / squares)
            return value

        def at(move, t=t, measured=measured):
            """L(theta + move), with the penalty."""
            there = {name: theta[name] + move.get(name, 0.0) for name in theta}
            total = float(loss(there, t))
            for name in theta:
                if of(penalty, name):
                    norm = np.sqrt(np.sum(there[name] ** 2))
                    total += of(penalty, name) * (norm**2 if of(squared, name) else norm)
            measured.append(total)
            return total

        def scale(name):
            return d.get(layer(name), 1.0)

        if variance != "none" and (t == 0 if renorm_every is None else t % renorm_every == 0):
            found = {}
            for each in dict.fromkeys(map(layer, theta)):
                names = [name for name in theta if layer(name) == each]
                if variance == "param_norm":
                    found[each] = math.sqrt(sum(float(np.sum(theta[name] ** 2)) for name in names))
                    continue
                rises, largest_eps = [], max(of(eps, name) for name in names)
                for draw in range(samples, samples + norm_samples):
                    step = {name: largest_eps * z(draw, name) for name in names}
                    plus, minus = at(step), at({name: -value for name, value in step.items()})
                    rises.append(abs(plus - minus) / (2 * largest_eps))
                found[each] = float(np.mean(rises))
            d.update({each: value if value != 0 else 1.0 for each, value in found.items() if np.isfinite(value)})

        n = samples if sample_schedule == "constant" else max(1, min(samples, t * samples // sample_steps))
        layers = dict.fromkeys(map(layer, theta)) if layerwise else [None]
        gradient = {name: np.zeros_like(theta[name]) for name in theta}
        told: list[float] = []
        if rule == "kieferwolfowitz":
            for name in theta:
                for i in range(theta[name].size):
                    unit = np.zeros(theta[name].size)
                    unit[i] = 1
                    unit = unit.reshape(theta[name].shape)
                    plus, minus = at({name: of(eps, name) * unit}), at({name: -of(eps, name) * unit})
                    told += [plus, minus]
                    g = (plus - minus) / (2 * of(eps, name))
                    gradient[name] += (g if clip is None else np.clip(g, -clip, clip)) * unit
        else:
            here = at({}) if estimate == "one-sided" else None
            for draw in range(n):
                for each in layers:
                    names = [name for name in theta if each is None or layer(name) == each]
                    step = {name: of(eps, name) * z(draw, name) / scale(name) for name in names}
                    plus = at(step)
                    if estimate == "two-point":
                        minus = at({name: -value for name, value in step.items()})
                        rise = (plus - minus) / 2
                        told += [plus, minus]
                    elif estimate == "one-sided":
                        rise = plus - here
                        told = [here, *told[1:], plus]
                    else:
                        rise = 0.0 if previous is None else plus - previous
                        told = [plus]
                    for name in names:
                        g = rise / of(eps, name)
                        if clip is not None:
                            g = np.clip(g, -clip, clip)
                        with np.errstate(invalid="ignore"):
                            gradient[name] += g * z(draw, name) * (1.0 if expectation else scale(name))
            if not scale_lr:
                gradient = {name: value / n for name, value in gradient.items()}

        if not np.all(np.isfinite(told)):
            skipped += 1
            states.append(
                State(_copy(theta), measured, math.nan, None, states[-1].moments if states else {}, dict(d), skipped)
            )
            continue
        reported = told[0] if estimate == "one-sided" else float(np.mean(told))
        if estimate == "one-point":
            previous = told[0]
        history.append(_copy(gradient))
        past = history if window is None else history[-window:]

        moments: dict[str, dict[str, np.ndarray]] = {}
        move = {}
        if rule in ("mezo", "kieferwolfowitz", "mezoconservative"):
            move = {name: -eta[name] * gradient[name] for name in theta}
        elif rule == "mezosign":
            move = {name: -eta[name] * np.sign(gradient[name]) for name in theta}
        elif rule == "mezomomentum":
            m = {name: np.zeros_like(theta[name]) for name in theta}
            for g in past:
                m = {name: momentum * m[name] + g[name] for name in theta}
            move = {name: -eta[name] * m[name] for name in theta}
            moments = {"momentum": m}
        elif rule in ("mezoadam", "mezoadamm"):
            b1, b2 = betas
            m, v, top = ({name: np.zeros_like(theta[name]) for name in theta} for _ in range(3))
            for g in past:
                m = {name: b1 * m[name] + (1 - b1) * g[name] for name in theta}
                v = {name: b2 * v[name] + (1 - b2) * g[name] ** 2 for name in theta}
                top = {name: np.maximum(top[name], v[name]) for name in theta}
            k = len(past)
            for name in theta:
                if rule == "mezoadam":
                    ratio = (m[name] / (1 - b1**k)) / (np.sqrt(v[name] / (1 - b2**k)) + adam_eps)
                else:
                    ratio = m[name] / (np.sqrt(top[name]) + adam_eps)
                move[name] = -eta[name] * ratio
            moments = {"first": m, "second": v, **({"highest": top} if rule == "mezoadamm" else {})}
        else:
            raise ValueError(rule)

        decays = True
        if rule == "mezoconservative":
            candidates = [{}, move, {name: -value for name, value in move.items()}]
            losses = [measured[0] if estimate == "one-sided" else at({}), *(at(each) for each in candidates[1:])]
            best = int(np.argmin(losses))
            move, decays, reported = candidates[best], best > 0, losses[best]
        for name in theta:
            keep = 1.0
            if decays and theta[name].ndim >= 2:
                keep = 1.0 - eta[name] * of(weight_decay, name)
            theta[name] = keep * theta[name] + move.get(name, 0.0)
        states.append(State(_copy(theta), measured, reported, gradient, moments, dict(d), skipped))
    return states


def _copy(values):
    return {name: value.copy() for name, value in values.items()}
