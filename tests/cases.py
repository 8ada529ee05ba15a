"""One row per registered name: options that must work, and options that must be refused with the message's pattern.

`test_registries` holds every registry against these rows, so that a new name without a row fails; the tests of each
kind run the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from task_cases import TASKS as TASKS

Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """good: options to construct with. bad: options, and the pattern of the error's message."""

    good: tuple[Options, ...] = ({},)
    bad: tuple[tuple[Options, str], ...] = ()


@dataclass(frozen=True)
class SurfaceCase(Case):
    """model: the tiny random one that it is tried in. same: whether it starts as that model under the same head."""

    model: str = "distilbert"
    same: bool = False


@dataclass(frozen=True)
class OptimizerCase:
    """variants: by name, options under which the optimizer is held to its transcription, its replay and its promises.

    groups: options of single tensors, by variant and tensor. descends: variants that must come near a minimum.
    estimates: whether it steps along an estimate of the gradient, rather than to the best of some points.
    """

    variants: dict[str, Options]
    bad: tuple[tuple[Options, str], ...]
    groups: dict[str, dict[str, Options]] = field(default_factory=dict)
    descends: tuple[str, ...] = ()
    estimates: bool = False


_R = r"must be > 0 and finite for tensor 'dense.weight', got "
_PENALTY = r"penalty must be >= 0 and finite for tensor 'dense.weight', got "

OPTIMIZERS: dict[str, OptimizerCase] = {
    "gld": OptimizerCase(
        variants={
            "plain": {"radius": 0.4},
            "one candidate": {"radius": 0.3, "candidates": 1},
            "all": {"radius": 0.4, "selection": "all", "entries": 2},
            "entries": {"radius": 0.4, "entries": 3},
            "reselect": {"radius": 0.4, "entries": 3, "reselect_every": 4},
            "magnitude": {"radius": 0.4, "entries": 3, "selection": "magnitude", "reselect_every": 4},
            "magnitude each step": {"radius": 0.4, "entries": 3, "selection": "magnitude"},
            "fisher": {"radius": 0.4, "entries": 3, "selection": "fisher", "reselect_every": 5},
            "fixed": {"radius": 0.4},
            "groups": {"radius": 0.4, "entries": 3},
            "penalty": {"radius": 0.4, "penalty": 0.3},
            "penalty squared": {"radius": 0.4, "entries": 3, "penalty": 0.2, "squared": True},
            "pool": {"radius": 0.4, "entries": 7, "pool": True, "reselect_every": 3},
            "pool whole": {"radius": 0.3, "pool": True, "penalty": 0.1},
            "pool magnitude": {
                "radius": 0.4, "entries": 7, "pool": True, "selection": "magnitude", "reselect_every": 3,
            },
            "pool fisher": {"radius": 0.4, "entries": 7, "pool": True, "selection": "fisher", "reselect_every": 3},
            "parallel": {"radius": 0.2, "sweep": "parallel", "entries": 3},
            "parallel penalty": {"radius": 0.2, "sweep": "parallel", "penalty": 0.2},
            "momentum": {"radius": 0.3, "momentum": 0.5},
            "momentum entries": {"radius": 0.4, "momentum": 0.6, "entries": 3, "reselect_every": 2},
            "momentum weighted": {"radius": 0.3, "momentum": 0.5, "momentum_weighted": True},
            "momentum parallel": {"radius": 0.2, "momentum": 0.3, "momentum_weighted": True, "sweep": "parallel"},
            "momentum pool": {"radius": 0.3, "momentum": 0.3, "momentum_weighted": True, "pool": True, "entries": 7},
            "options 1x1": {"radius": 0.4, "options": (1, 1)},
            "options 1x3": {"radius": 0.4, "options": (1, 3), "entries": 3},
            "options 2x2": {"radius": 0.4, "options": (2, 2), "candidates": 3},
            "options 3x1": {"radius": 0.4, "options": (3, 1), "entries": 3, "reselect_every": 3, "penalty": 0.1},
            "options magnitude": {
                "radius": 0.4, "options": (2, 2), "candidates": 2, "entries": 3, "selection": "magnitude",
                "reselect_every": 3,
            },
            "options fisher": {
                "radius": 0.4, "options": (2, 1), "candidates": 3, "entries": 3, "selection": "fisher",
                "reselect_every": 3,
            },
            "confirm": {"radius": 0.4, "options": (2, 1), "confirm": True},
            "confirm 2x2": {"radius": 0.4, "options": (2, 2), "candidates": 3, "confirm": True, "entries": 3},
        },
        groups={
            "fixed": {
                "dense.weight": {"selection": "fixed", "indices": [7, 1, 2, 11]},
                "dense.bias": {"selection": "fixed", "indices": [0, 3]},
                "out.weight": {"selection": "fixed", "indices": list(range(8))},
            },
            "groups": {
                "dense.weight": {
                    "lr": 0.5, "candidates": 3, "entries": 5, "selection": "magnitude", "reselect_every": 4,
                },
                "dense.bias": {"selection": "all", "penalty": 0.2, "squared": True},
                "out.weight": {"lr": 0.2, "candidates": 6, "penalty": 0.1, "reselect_every": 2},
            },
        },
        descends=(
            "plain", "entries", "reselect", "pool", "pool whole", "parallel", "momentum entries", "momentum weighted",
            "options 1x1", "options 2x2", "options 3x1", "confirm",
        ),
        bad=(
            ({"radius": 0.0}, f"GLD: radius {_R}0.0"),
            ({"radius": -1}, f"GLD: radius {_R}-1"),
            ({"radius": float("nan")}, f"GLD: radius {_R}nan"),
            ({"radius": float("inf")}, f"GLD: radius {_R}inf"),
            ({"candidates": 0}, "GLD: candidates must be an integer >= 1 for tensor 'dense.weight', got 0"),
            ({"candidates": 2.0}, "GLD: candidates must be an integer >= 1 for tensor 'dense.weight', got 2.0"),
            ({"candidates": True}, "GLD: candidates must be an integer >= 1 for tensor 'dense.weight', got True"),
            ({"candidates": 201}, "GLD: candidates must be <= 200 for tensor 'dense.weight', got 201"),
            ({"reselect_every": 0}, "GLD: reselect_every must be an integer >= 1 for tensor 'dense.weight', got 0"),
            ({"entries": 0}, "GLD: entries must be an integer >= 1 for tensor 'dense.weight', got 0"),
            ({"entries": 1.5}, "GLD: entries must be an integer >= 1 for tensor 'dense.weight', got 1.5"),
            ({"entries": True}, "GLD: entries must be an integer >= 1 for tensor 'dense.weight', got True"),
            ({"penalty": -0.1}, f"GLD: {_PENALTY}-0.1"),
            ({"penalty": float("nan")}, f"GLD: {_PENALTY}nan"),
            (
                {"selection": "magnitud"},
                "GLD: unknown selection 'magnitud'; did you mean 'magnitude'.*all, fisher, fixed",
            ),
            ({"selection": "fixed"}, "GLD: indices must be given with selection 'fixed' and only then"),
            ({"indices": [1]}, "GLD: indices must be given with selection 'fixed' and only then"),
            ({"sweep": "turn"}, "GLD: unknown sweep 'turn'; did you mean 'turns'"),
            ({"momentum": 1.0}, r"GLD: momentum must be in \[0, 1\), got 1.0"),
            ({"momentum": -0.1}, r"GLD: momentum must be in \[0, 1\), got -0.1"),
            ({"momentum_weighted": True}, "GLD: momentum_weighted must come with momentum > 0, got momentum 0"),
            ({"confirm": True}, "GLD: confirm must come with options, got options None"),
            ({"options": (2, 1), "pool": True}, "GLD: options must stand alone"),
            ({"options": (2, 1), "momentum": 0.5}, "GLD: options must stand alone"),
            ({"options": (2, 1), "sweep": "parallel"}, "GLD: options must stand alone"),
            ({"options": (0, 1)}, r"GLD: options must be two integers >= 1 .*got \(0, 1\)"),
            ({"options": (2,)}, r"GLD: options must be two integers >= 1 .*got \(2,\)"),
            ({"options": "22"}, r"GLD: options must be two integers >= 1 .*got '22'"),
            ({"options": (True, 1)}, r"GLD: options must be two integers >= 1 .*got \(True, 1\)"),
            ({"options": (4, 1), "candidates": 2}, r"GLD: options per level must be <= candidates \+ 1 = 3, got 4"),
            ({"fisher_scale": 0.0}, "GLD: fisher_scale must be > 0, .*got 0.0, 1 and 32"),
            ({"fisher_draws": 0}, "GLD: fisher_scale must be > 0, fisher_draws >= 1 .*got 1.0, 0 and 32"),
            ({"fisher_rows": 1}, "GLD: fisher_scale must be > 0, .*fisher_rows >= 2, got 1.0, 1 and 1"),
            ({"seed": -1}, r"noise: seed must be an integer in \[0, 2\^64\), got -1"),
            ({"noise": "gauss"}, "noise: unknown distribution 'gauss'; did you mean 'gaussian'"),
        ),
    ),
    "gldsearch": OptimizerCase(
        variants={
            "plain": {"radius": 0.5, "min_radius": 0.03},
            "one radius": {"radius": 0.2, "min_radius": 0.2},
            "powers of two": {"radius": 0.5, "min_radius": 0.5 / 8},
        },
        descends=("plain",),
        bad=(
            ({"radius": 0.0}, f"GLDSearch: radius {_R}0.0"),
            ({"radius": 0.1, "min_radius": 0.0}, "GLDSearch: 0 < min_radius <= radius must hold, got 0.0 and 0.1"),
            ({"radius": 0.1, "min_radius": 0.2}, "GLDSearch: 0 < min_radius <= radius must hold, got 0.2 and 0.1"),
            ({"radius": float("inf")}, f"GLDSearch: radius {_R}inf"),
            ({"radius": 1e30, "min_radius": 1e-50}, r"GLDSearch: radius / min_radius must be < 2\^200, got 1e-50 an"),
            ({"penalty": -1.0}, f"GLDSearch: {_PENALTY}-1.0"),
        ),
    ),
    "stp": OptimizerCase(
        variants={"plain": {"radius": 0.1}},
        descends=("plain",),
        bad=(
            ({"radius": 0.0}, f"STP: radius {_R}0.0"),
            ({"radius": float("inf")}, f"STP: radius {_R}inf"),
            ({"penalty": -1.0}, f"STP: {_PENALTY}-1.0"),
        ),
    ),
    "smtp": OptimizerCase(
        variants={"plain": {
            "radius": 0.05}, "heavy": {"radius": 0.02, "momentum": 0.8}, "none": {"radius": 0.1, "momentum": 0.0},
        },
        descends=("plain",),
        bad=(
            ({"radius": -1.0}, f"SMTP: radius {_R}-1.0"),
            ({"momentum": 1.0}, r"SMTP: momentum must be in \[0, 1\), got 1.0"),
            ({"momentum": -0.5}, r"SMTP: momentum must be in \[0, 1\), got -0.5"),
            ({"penalty": float("nan")}, f"SMTP: {_PENALTY}nan"),
        ),
    ),
}  # fmt: skip


def _refused(owner: str) -> tuple[tuple[Options, str], ...]:
    """Options that every rule over an estimate refuses."""
    at = "for tensor 'dense.weight', got "
    return (
        ({"lr": 0.0}, f"{owner}: lr must be > 0 and finite {at}0.0"),
        ({"lr": float("nan")}, f"{owner}: lr must be > 0 and finite {at}nan"),
        ({"eps": -1}, f"{owner}: eps must be > 0 and finite {at}-1"),
        ({"eps": float("inf")}, f"{owner}: eps must be > 0 and finite {at}inf"),
        ({"eps": 1e-30}, rf"{owner}: eps must be >= \d\.\de-0\d for float64 weights of size .*, got 1e-30"),
        ({"weight_decay": -0.1}, f"{owner}: weight_decay must be >= 0 and finite {at}-0.1"),
        ({"penalty": -0.1}, f"{owner}: penalty must be >= 0 and finite {at}-0.1"),
        ({"clip": 0.0}, f"{owner}: clip must be > 0, got 0.0"),
        ({"patience": 0}, f"{owner}: patience must be an integer >= 1, got 0"),
        ({"seed": -1}, r"noise: seed must be an integer in \[0, 2\^64\), got -1"),
    )


def _refused_estimates(owner: str) -> tuple[tuple[Options, str], ...]:
    return (
        *_refused(owner),
        ({"samples": 0}, f"{owner}: samples must be an integer >= 1, got 0"),
        ({"samples": 1.0}, f"{owner}: samples must be an integer >= 1, got 1.0"),
        ({"samples": True}, f"{owner}: samples must be an integer >= 1, got True"),
        ({"sample_schedule": "linea"}, f"{owner}: unknown sample_schedule 'linea'; did you mean 'linear'"),
        ({"sample_schedule": "linear"}, f"{owner}: sample_steps must be given with sample_schedule 'linear' and only"),
        ({"sample_steps": 10}, f"{owner}: sample_steps must be given with sample_schedule 'linear' and only then"),
        ({"estimate": "two-points"}, f"{owner}: unknown estimate 'two-points'; did you mean 'two-point'"),
        ({"estimate": "one-point", "samples": 2}, f"{owner}: estimate 'one-point' must have samples 1 and no layerw"),
        ({"estimate": "one-point", "layerwise": True}, f"{owner}: estimate 'one-point' must have samples 1 and no lay"),
        ({"variance": "grad"}, f"{owner}: unknown variance 'grad'; did you mean 'grad_norm'"),
        ({"expectation": True}, f"{owner}: expectation must come with variance 'grad_norm' or 'param_norm'"),
        ({"renorm_every": 5}, f"{owner}: renorm_every must come with variance 'grad_norm' or 'param_norm'"),
        ({"variance": "grad_norm", "renorm_every": 0}, f"{owner}: renorm_every must be an integer >= 1, got 0"),
        ({"norm_samples": 0}, f"{owner}: norm_samples must be an integer >= 1, got 0"),
        ({"entries": 0}, f"{owner}: entries must be an integer >= 1 for tensor 'dense.weight', got 0"),
        ({"reselect_every": 0}, f"{owner}: reselect_every must be an integer >= 1, got 0"),
        ({"selection": "fixed"}, f"{owner}: indices must be given with selection 'fixed' and only then"),
        ({"noise": "gauss"}, "noise: unknown distribution 'gauss'; did you mean 'gaussian'"),
        ({"rank": 0}, "space: rank must be an integer >= 1, got 0"),
        ({"rank": 1, "noise": "sphere"}, "space: noise 'sphere' must come without rank, got rank 1"),
        ({"evaluator": "wall"}, f"{owner}: unknown evaluator 'wall'"),
    )


_MOMENTUM = (
    ({"momentum": 1.0}, r"MeZOMomentum: momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": -0.1}, r"MeZOMomentum: momentum must be in \[0, 1\), got -0.1"),
    ({"window": 0}, "MeZOMomentum: window must be an integer >= 1, got 0"),
)


def _adam(owner: str) -> tuple[tuple[Options, str], ...]:
    return (
        ({"betas": (0.9,)}, rf"{owner}: betas must be two numbers in \[0, 1\), got \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, rf"{owner}: betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"adam_eps": 0.0}, f"{owner}: adam_eps must be > 0 and finite, got 0.0"),
        ({"window": 1.5}, f"{owner}: window must be an integer >= 1, got 1.5"),
    )


_EPS = {"lr": 0.01, "eps": 0.1}
OPTIMIZERS |= {
    "mezo": OptimizerCase(
        variants={
            "plain": _EPS,
            "weight decay": {**_EPS, "weight_decay": 0.5},
            "samples": {**_EPS, "samples": 3},
            "samples scaled": {"lr": 0.005, "eps": 0.1, "samples": 3, "scale_lr": True},
            "samples linear": {**_EPS, "samples": 4, "sample_schedule": "linear", "sample_steps": 12},
            "samples linear scaled": {
                "lr": 0.003, "eps": 0.1, "samples": 6, "sample_schedule": "linear", "sample_steps": 8, "scale_lr": True,
            },
            "one-sided": {**_EPS, "estimate": "one-sided", "samples": 2},
            "one-point": {"lr": 1e-4, "eps": 0.3, "estimate": "one-point"},
            "layerwise": {"lr": 0.02, "eps": 0.1, "layerwise": True, "samples": 2},
            "clip": {**_EPS, "clip": 0.5, "samples": 2},
            "grad norm": {**_EPS, "variance": "grad_norm", "norm_samples": 2, "renorm_every": 5},
            "grad norm once": {**_EPS, "variance": "grad_norm"},
            "param norm": {**_EPS, "variance": "param_norm", "renorm_every": 4, "samples": 2},
            "expectation": {"lr": 0.02, "eps": 0.1, "variance": "param_norm", "expectation": True},
            "expectation grad norm": {
                "lr": 0.02, "eps": 0.1, "variance": "grad_norm", "norm_samples": 3, "expectation": True,
                "renorm_every": 3,
            },
            "penalty": {**_EPS, "penalty": 0.3},
            "penalty squared": {**_EPS, "penalty": 0.1, "squared": True, "samples": 2},
            "entries": {**_EPS, "entries": 3},
            "reselect": {**_EPS, "entries": 3, "reselect_every": 4, "samples": 2},
            "magnitude": {**_EPS, "entries": 3, "selection": "magnitude", "reselect_every": 4},
            "fisher": {**_EPS, "entries": 3, "selection": "fisher", "reselect_every": 5},
            "groups": _EPS,
            "low rank": {**_EPS, "rank": 1},
            "low rank 2": {**_EPS, "rank": 2, "resample_every": 3, "samples": 2},
            "low rank entries": {**_EPS, "rank": 2, "entries": 3},
        },
        groups={
            "groups": {
                "dense.weight": {"lr": 0.02, "eps": 0.05, "weight_decay": 0.3},
                "dense.bias": {"selection": "fixed", "indices": [0, 3], "weight_decay": 0.4},
                "out.weight": {"entries": 5, "penalty": 0.2, "squared": True},
            },
        },
        descends=(
            "plain", "samples", "samples scaled", "samples linear", "one-sided", "layerwise", "param norm", "low rank",
            "low rank 2",
        ),
        bad=_refused_estimates("MeZO"),
        estimates=True,
    ),
    "mezomomentum": OptimizerCase(
        variants={
            "plain": {"lr": 0.003, "eps": 0.1, "momentum": 0.7},
            "samples": {"lr": 0.003, "eps": 0.1, "samples": 2, "weight_decay": 0.2, "entries": 3},
            "window": {"lr": 0.003, "eps": 0.1, "window": 4},
            "window long": {"lr": 0.003, "eps": 0.1, "window": 100, "samples": 2, "weight_decay": 0.2},
            "window magnitude": {
                "lr": 0.003, "eps": 0.1, "window": 5, "entries": 3, "selection": "magnitude", "reselect_every": 2,
            },
            "window low rank": {"lr": 0.003, "eps": 0.1, "window": 3, "rank": 2, "resample_every": 2},
        },
        descends=("plain", "window"),
        bad=(*_refused_estimates("MeZOMomentum"), *_MOMENTUM),
        estimates=True,
    ),
    "mezoadam": OptimizerCase(
        variants={
            "plain": {"lr": 0.05, "eps": 0.1},
            "samples": {"lr": 0.05, "eps": 0.1, "samples": 2, "weight_decay": 0.2, "betas": (0.8, 0.95)},
            "window": {"lr": 0.05, "eps": 0.1, "window": 4},
            "window long": {"lr": 0.05, "eps": 0.1, "window": 100, "samples": 2, "weight_decay": 0.2},
            "window magnitude": {
                "lr": 0.05, "eps": 0.1, "window": 5, "entries": 3, "selection": "magnitude", "reselect_every": 2,
                "adam_eps": 0.01,
            },
            "low rank": {"lr": 0.05, "eps": 0.1, "rank": 2, "resample_every": 3, "adam_eps": 1e-3},
        },
        descends=("plain", "window"),
        bad=(*_refused_estimates("MeZOAdam"), *_adam("MeZOAdam")),
        estimates=True,
    ),
    "mezoadamm": OptimizerCase(
        variants={
            "plain": {"lr": 0.1, "eps": 0.1},
            "one-sided": {"lr": 0.1, "eps": 0.01, "estimate": "one-sided", "betas": (0.9, 0.9), "weight_decay": 0.1},
            "window": {"lr": 0.1, "eps": 0.1, "window": 4, "betas": (0.5, 0.3)},
            "window long": {"lr": 0.1, "eps": 0.1, "window": 100},
        },
        descends=("plain", "window"),
        bad=(*_refused_estimates("MeZOAdaMM"), *_adam("MeZOAdaMM")),
        estimates=True,
    ),
    "mezosign": OptimizerCase(
        variants={
            "plain": {"lr": 0.02, "eps": 0.1},
            "samples": {"lr": 0.02, "eps": 0.1, "samples": 3, "weight_decay": 0.2},
            "entries": {"lr": 0.02, "eps": 0.1, "entries": 3},
            "many samples": {"lr": 0.05, "eps": 0.1, "samples": 20},
        },
        descends=("many samples",),
        bad=_refused_estimates("MeZOSign"),
        estimates=True,
    ),
    "mezoconservative": OptimizerCase(
        variants={
            "plain": {"lr": 0.03, "eps": 0.1},
            "one-sided": {"lr": 0.03, "eps": 0.1, "estimate": "one-sided", "samples": 2, "weight_decay": 0.2},
            "penalty": {"lr": 0.03, "eps": 0.1, "penalty": 0.2},
        },
        descends=("plain",),
        bad=_refused_estimates("MeZOConservative"),
        estimates=True,
    ),
    "kieferwolfowitz": OptimizerCase(
        variants={"plain": {"lr": 0.1, "eps": 0.1}, "decay": {"lr": 0.1, "eps": 0.1, "weight_decay": 0.2, "clip": 3.0}},
        descends=("plain",),
        bad=_refused("KieferWolfowitz"),
        estimates=True,
    ),
}  # fmt: skip

FIRST_ORDER: dict[str, Case] = {
    "sgd": Case(({"lr": 0.05}, {"lr": 0.05, "weight_decay": 0.1}), (({"lr": -1.0}, "Invalid learning rate"),)),
    "momentum": Case(({"lr": 0.02}, {"lr": 0.02, "momentum": 0.8}), (({"momentum": -1.0}, "Invalid momentum"),)),
    "nesterov": Case(({"lr": 0.02},), (({"momentum": 0.0}, "Nesterov momentum requires a momentum"),)),
    "adam": Case(({"lr": 0.05}, {"lr": 0.05, "weight_decay": 0.1}), (({"betas": (1.0, 0.9)}, "Invalid beta"),)),
    "adamw": Case(({"lr": 0.05}, {"lr": 0.05, "weight_decay": 0.3}), (({"eps": -1.0}, "Invalid epsilon"),)),
}

_SCHEDULE_ERRORS = (
    ({"floor": -0.1}, r"schedule: floor must be in \[0, 1\], got -0.1"),
    ({"floor": 1.5}, r"schedule: floor must be in \[0, 1\], got 1.5"),
    ({"total": 0}, "schedule: total must be >= 1, got 0"),
    ({"warmup": 10}, r"schedule: warmup must be in \[0, 10\) steps, got 10"),
    ({"warmup": -1}, r"schedule: warmup must be in \[0, 10\) steps, got -1"),
)
SCHEDULES: dict[str, Case] = {
    "constant": Case(({}, {"warmup": 5}), (*_SCHEDULE_ERRORS, ({"name": "const"}, "did you mean 'constant'"))),
    "linear": Case(({}, {"floor": 0.1}, {"floor": 0.1, "warmup": 4}), _SCHEDULE_ERRORS),
    "cosine": Case(({}, {"floor": 0.1}, {"floor": 0.2, "warmup": 6}), _SCHEDULE_ERRORS),
    "cosine-restarts": Case(
        ({}, {"cycles": 3}, {"floor": 0.1, "cycles": 4}, {"floor": 0.1, "cycles": 2, "warmup": 3}),
        (*_SCHEDULE_ERRORS, ({"cycles": 0}, "schedule: cycles must be >= 1, got 0")),
    ),
}

# good: options of a Block or group; bad: of GLD over one tensor 'w' of 6 entries.
_ENTRIES = ({"entries": 0}, "GLD: entries must be an integer >= 1 for tensor 'w', got 0")
SELECTIONS: dict[str, Case] = {
    "all": Case(({}, {"entries": 2}), (_ENTRIES,)),
    "random": Case(({"entries": 2}, {"entries": 2, "reselect_every": 3}), (_ENTRIES,)),
    "magnitude": Case(({"entries": 2}, {"entries": 5, "reselect_every": 2}), (_ENTRIES,)),
    "fisher": Case(({"entries": 2}, {"entries": 2, "reselect_every": 2}), (_ENTRIES,)),
    "fixed": Case(
        ({"indices": [4, 0]}, {"indices": (1,)}),
        (
            ({}, "GLD: indices must be given with selection 'fixed' and only then, for tensor 'w'"),
            ({"indices": [6]}, r"GLD: indices must be distinct positions in \[0, 6\) for tensor 'w', got \[6\]"),
            ({"indices": [-1]}, r"GLD: indices must be distinct positions in \[0, 6\) for tensor 'w', got \[-1\]"),
            ({"indices": [2, 2]}, r"GLD: indices must be distinct positions in \[0, 6\) for tensor 'w', got \[2, 2\]"),
            ({"indices": []}, r"GLD: indices must be distinct positions in \[0, 6\) for tensor 'w', got \[\]"),
            ({"indices": [0.5]}, r"GLD: indices must be distinct positions in \[0, 6\) for tensor 'w', got \[0.5\]"),
        ),
    ),
}

NOISES: dict[str, Case] = {
    kind: Case(
        ({"seed": 0, "distribution": kind}, {"seed": 2**64 - 1, "distribution": kind, "backend": "torch"}),
        (
            ({"seed": -1, "distribution": kind}, r"noise: seed must be an integer in \[0, 2\^64\), got -1"),
            ({"seed": 2**64, "distribution": kind}, r"noise: seed must be an integer in \[0, 2\^64\), got 184"),
            ({"seed": 1.0, "distribution": kind}, r"noise: seed must be an integer in \[0, 2\^64\), got 1.0"),
            ({"seed": True, "distribution": kind}, r"noise: seed must be an integer in \[0, 2\^64\), got True"),
            ({"seed": 0, "distribution": kind[:-1]}, f"noise: unknown distribution .*did you mean '{kind}'"),
            ({"seed": 0, "distribution": kind, "backend": "nump"}, "noise: unknown backend 'nump'.*auto, numba, torch"),
        ),
    )
    for kind in ("gaussian", "rademacher", "near_normal", "sphere")
}

EVALUATORS: dict[str, Case] = {  # good: the head's activation and the optimizer variants under which they must agree
    "inject": Case(({"activation": "relu"},)),
    "snapshot": Case(({"activation": "relu"},)),
    "walk": Case(({"activation": "relu"},)),
    "session": Case(({"activation": "relu"}, {"activation": "tanh"}, {"activation": "gelu"})),
}

_RANK = "{}: rank must be from 1 to 16, the widest layer's, got {}"
_LST = (
    ({"reduction": 3}, "lst: reduction must divide the model's width 16, got 3"),
    ({"reduction": 0}, "lst: reduction must divide the model's width 16, got 0"),
    ({"layers": 3}, "lst: layers must be from 1 to the model's 2, got 3"),
    ({"layers": [1, 0]}, r"lst: layers must be rising numbers from 0 to 1, got \[1, 0\]"),
    ({"temperature": 0.0}, "lst: temperature must be > 0, got 0.0"),
    ({"init": "fischer"}, "lst: unknown init 'fischer'; did you mean 'fisher'"),
    ({"fisher_rows": 0}, "lst: fisher_rows must be >= 1, got 0"),
    ({"connection_dropout": 1.0}, "lst: connection_dropout must be >= 0 and < 1, got 1.0"),
    ({"dropout": -0.1}, "lst: dropout must be >= 0 and < 1, got -0.1"),
    ({"readout": "promt"}, "lst: unknown readout 'promt'; did you mean 'prompt'"),
    ({"readout": "prompt"}, "lst: readout 'prompt' needs a prompt, got none"),
    ({"pooling": "maen"}, "lst: unknown pooling 'maen'; did you mean 'mean'"),
    ({"max_length": 33}, "lst: max_length must be from 1 to 32"),
    ({"labels": ("a", "a")}, "lst: two labels or more that differ are needed, got a, a"),
)

SURFACES: dict[str, SurfaceCase] = {  # in a tiny random body without a language head
    "full": SurfaceCase(
        ({"readout": "head"},),
        (
            ({"readout": "promt"}, "full: unknown readout 'promt'; did you mean 'prompt'"),
            ({"readout": "prompt"}, "full: readout 'prompt' needs a prompt, got none"),
            ({"readout": "head", "dropout": 1.0}, "dropout must be >= 0 and < 1, got 1.0"),
        ),
        same=True,
    ),
    "head": SurfaceCase(
        (
            {},
            {"head": "library"},
            {"head": "two-layer", "pooling": "mean"},
            {"head": "two-layer", "pooling": "last", "hidden": 5, "activation": "tanh"},
            {"head": "two-layer", "pooling": "cls", "activation": "gelu"},
        ),
        (
            ({"labels": ("one",)}, "head: at least two labels are needed, got 1"),
            ({"labels": ("a", "a")}, "head: labels must differ, got a, a"),
            ({"head": "three-layer"}, "head: unknown kind of head 'three-layer'; did you mean 'two-layer'"),
            ({"pooling": "maen"}, "did you mean 'mean'"),
            ({"head": "two-layer", "hidden": 0}, "head: hidden must be >= 1, got 0"),
            ({"max_length": 0}, "head: max_length must be >= 1, got 0"),
            ({"max_length": 1000}, "head: max_length must be <= 32"),
            ({"dropout": 1.0}, "head: dropout must be >= 0 and < 1, got 1.0"),
        ),
        same=True,
    ),
    "bias": SurfaceCase(({}, {"head": "two-layer"}), (({"readout": "promt"}, "unknown readout 'promt'"),), same=True),
    "ia3": SurfaceCase(({}, {"start": "probe"}), (({"start": "prob"}, "unknown start 'prob'"),), same=True),
    "k_lst": SurfaceCase(
        (
            {"k": 2, "init": "magnitude", "reduction": 4},
            {"k": 2, "window": "centred", "sharing": "shared", "down": "low-rank", "rank": 2, "reduction": 4},
            {"window": "all", "k": 1, "sharing": "rung", "combine": "mean", "down": "pool", "init": "random"},
            {"k": 1, "unfrozen": 1, "init": "magnitude"},
        ),
        (
            *(({"k": 1, **options}, "k_" + message) for options, message in _LST),
            ({"k": 0, "reduction": 4}, "k_lst: k must be from 1 to the model's 2 layers, got 0"),
            ({"k": 3, "reduction": 4}, "k_lst: k must be from 1 to the model's 2 layers, got 3"),
            ({"k": 2, "unfrozen": 3}, "k_lst: unfrozen must be from 0 to the model's 2 layers, got 3"),
            ({"k": 2, "window": "trailling"}, "k_lst: unknown window 'trailling'; did you mean 'trailing'"),
            ({"k": 2, "combine": "means"}, "k_lst: unknown way to combine 'means'; did you mean 'mean'"),
            ({"k": 2, "down": "pol"}, "k_lst: unknown kind of down-sampling 'pol'; did you mean 'pool'"),
            ({"k": 2, "sharing": "rungs"}, "k_lst: unknown sharing 'rungs'; did you mean 'rung'"),
            (
                {"k": 2, "down": "low-rank", "rank": 3},
                "k_lst: rank must be from 1 to the side network's width 2, got 3",
            ),
        ),
    ),
    "layers": SurfaceCase(
        ({"pattern": ["lin1", "layer_norm"]}, {"pattern": r"layer\.1\."}),
        (
            ({"pattern": "atention"}, "layers: unknown pattern 'atention'; did you mean 'attention'"),
            ({"pattern": "("}, r"layers: pattern must be a regular expression, got '\('"),
        ),
        same=True,
    ),
    "lora": SurfaceCase(
        ({"rank": 2}, {"rank": 1, "alpha": 4.0, "targets": ["q_lin", r".*layer\.1.*v_lin"]}),
        (
            ({"rank": 0}, _RANK.format("lora", 0)),
            ({"rank": 17}, _RANK.format("lora", 17)),
            ({"alpha": 0.0}, "lora: alpha must be > 0, got 0.0"),
            ({"targets": ["q_lim"]}, "lora: unknown target 'q_lim'; did you mean 'q_lin'"),
            ({"targets": ["("]}, r"lora: targets must be names or regular expressions, got '\('"),
        ),
        same=True,
    ),
    "lst": SurfaceCase(
        ({}, {"reduction": 4, "init": "magnitude", "layers": 1}, {"init": "random", "pooling": "cls"}),
        _LST,
    ),
    "prefix": SurfaceCase(
        ({"tokens": 3}, {"tokens": 1, "start": "random"}),
        (
            ({"tokens": 0}, "prefix: tokens must be from 1 to 16, what max_length leaves, got 0"),
            ({"tokens": 17}, "prefix: tokens must be from 1 to 16, what max_length leaves, got 17"),
            ({"start": "reel"}, "prefix: unknown start 'reel'; did you mean 'real'"),
        ),
        model="llama",
    ),
    "prompt": SurfaceCase(
        ({"tokens": 3}, {"tokens": 1, "start": "random"}),
        (
            ({"tokens": 17}, "prompt: tokens must be from 1 to 16, what max_length leaves, got 17"),
            ({"start": "reel"}, "prompt: unknown start 'reel'; did you mean 'real'"),
        ),
    ),
    "side_lora": SurfaceCase(
        ({"rank": 2}, {"rank": 1, "alpha": 4.0, "targets": ["v_lin", "out_lin"]}),
        (
            ({"rank": 0}, _RANK.format("side_lora", 0)),
            ({"rank": 17}, _RANK.format("side_lora", 17)),
            ({"alpha": -1.0}, "side_lora: alpha must be > 0, got -1.0"),
            ({"targets": ["q_lim"]}, "side_lora: unknown target 'q_lim'; did you mean 'q_lin'"),
            ({"targets": ["q_lin"]}, "side_lora: targets must name the layers between a branch and the residual path"),
        ),
        same=True,
    ),
}
