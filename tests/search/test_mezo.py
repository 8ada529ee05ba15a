"""The MeZO family: the papers' steps, estimates against gradients, lean forms against buffers, skips, misuse."""

from __future__ import annotations

import copy
import math
import re
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from test_optimizers import (
    DTYPES,
    FLOOR,
    SHAPES,
    STEPS,
    Closure,
    batch_loss,
    make,
    make_params,
    same,
    scores,
    start,
    train,
    values,
)
from test_walk import Tied
from torch import nn

import cases
from gradientless import MeZO, MeZOAdam, MeZOConservative, MeZOMomentum, MeZOSign, lr_scheduler, no_decay_names
from gradientless.errors import UserError
from gradientless.run.memory import TensorBytes
from gradientless.search.noise import Noise
from gradientless.search.optim import OPTIMIZERS
from gradientless.search.optim.spsa import layer_of
from gradientless.search.points import Losses
from gradientless.search.trajectory import Trajectory
from pages import ROOT
from reference import mezo, schedules

VARIANTS = [(key, v) for key, case in sorted(cases.OPTIMIZERS.items()) if case.estimates for v in case.variants]
NOISES = sorted(cases.NOISES)
CONSTRUCTOR = ("lr", "eps", "weight_decay", "entries", "selection", "indices", "penalty", "squared", "reselect_every")


RULES = [key for key, case in sorted(cases.OPTIMIZERS.items()) if case.estimates and key != "kieferwolfowitz"]


def rounded(params: dict[str, np.ndarray], t: int) -> float:
    """As the optimizer hears it: losses are logged in single precision."""
    return float(np.float32(batch_loss(params, t)))


def options_of(key: str, variant: str) -> dict[str, Any]:
    """The options of a variant as the transcription has them, group options by tensor."""
    case = cases.OPTIMIZERS[key]
    options = {"rule": key, **case.variants[variant]}
    own = case.groups.get(variant, {})
    for option in {option for each in own.values() for option in each}:
        default = {"lr": 1e-6, "eps": 1e-3, "selection": "random", "penalty": 0.0, "weight_decay": 0.0}.get(option)
        options[option] = {name: own[name].get(option, options.get(option, default)) for name in SHAPES}
    sparse = "entries" in options or variant == "magnitude"
    if options.get("layerwise") or options.get("variance") or sparse or own:
        options["spheres"] = [[name] for name in SHAPES]  # each a block by itself
    if options.get("selection") == "fisher":
        options["importance"] = lambda params, name, t: scores(name, t, params[name].size)
    return options


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_steps_are_the_papers(key, variant, kind):
    options = options_of(key, variant)
    if kind == "sphere" and ("rank" in options or key == "kieferwolfowitz"):
        kind = "gaussian"
    states = mezo.trace(
        start(), rounded, STEPS, noise=kind, seed=5, schedule=lambda t: schedules.linear(t, STEPS, FLOOR), **options
    )
    params = make_params()
    more = {} if key == "kieferwolfowitz" else {"noise": kind}
    optimizer = make(key, variant, params, seed=5, check=False, **more)
    scheduler = lr_scheduler(optimizer, "linear", STEPS, floor=FLOOR)
    closure = Closure(params, rounded, record=True)
    tolerance = 5e-6 if kind == "rademacher" else 1e-4
    for t, state in enumerate(states):
        closure.t = t
        closure.seen.clear()
        reported = optimizer.step(closure)
        scheduler.step()
        if not any(group["penalty"] for group in optimizer.param_groups) and key != "kieferwolfowitz":
            assert sorted(loss for _, loss in closure.seen) == pytest.approx(sorted(state.losses), rel=1e-4)
        if (key, variant) != ("mezoconservative", "penalty"):  # a decision reports the loss without the penalty
            assert reported == pytest.approx(state.loss, rel=1e-4)
        assert optimizer.sigma == pytest.approx(state.sigma, rel=1e-3)
        for name, p in params.items():
            expected = state.params[name]
            most = tolerance * max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=most, err_msg=f"{t} {name}")
        for moment, tensors in optimizer.space.buffers.items():
            for name, tensor in tensors.items():
                expected = state.moments[moment][name]
                np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert not any(np.allclose(states[-1].params[name], start()[name], atol=1e-3) for name in SHAPES)


@pytest.mark.parametrize("key", ["mezo", "mezomomentum", "mezoadam", "mezoadamm", "mezosign", "mezoconservative"])
def test_a_step_with_a_loss_that_is_no_number_is_skipped_and_counted(key, tmp_path):
    """As in the transcription, past two such steps; the log replays to the same bits, the counts included."""

    def broken(params, t):
        return math.nan if t == 3 else math.inf if t == 4 and params["dense.bias"][0] > 0 else rounded(params, t)

    states = mezo.trace(start(), broken, 8, seed=5, noise="rademacher", **options_of(key, "plain"))
    params = make_params()
    optimizer = make(key, "plain", params, seed=5, noise="rademacher", check=False)
    optimizer.record(tmp_path / "log")
    closure = Closure(params, broken)
    for t, state in enumerate(states):
        closure.t, before = t, values(params)
        reported = optimizer.step(closure)
        assert math.isnan(reported) == (state.gradient is None)
        assert same(values(params), before) or state.gradient is not None
        assert optimizer.skipped == state.skipped
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), state.params[name], rtol=0, atol=1e-5)
    assert optimizer.skipped >= 1
    again = make_params()
    replayer = make(key, "plain", again, seed=5, noise="rademacher", check=False)
    replayer.replay(tmp_path / "log")
    assert same(values(again), values(params)) and replayer.skipped == optimizer.skipped


# Layers --------------------------------------------------------------------------------------------------------------

LAYERED = {
    "embed.weight": (3, 2),
    "layer.0.weight": (2, 2),
    "layer.0.bias": (2,),
    "layer.1.weight": (2, 2),
    "head": (2,),
}


def layered_loss(params, t):
    return float(
        np.float32(sum((i + 1) * np.sum((p - 0.3 * math.cos(t + i)) ** 2) for i, p in enumerate(params.values())))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"layerwise": True, "samples": 2},
        {"variance": "grad_norm", "norm_samples": 2, "renorm_every": 3},
        {"variance": "param_norm", "renorm_every": 2},
        {"variance": "param_norm", "expectation": True, "layerwise": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
def test_layers_are_told_by_the_first_number_of_a_name(options, kind):
    rng = np.random.default_rng(0)
    first = {name: rng.normal(size=shape) for name, shape in LAYERED.items()}
    layers = [["embed.weight"], ["layer.0.weight", "layer.0.bias"], ["layer.1.weight"], ["head"]]
    states = mezo.trace(first, layered_loss, 8, lr=0.01, eps=0.1, noise=kind, spheres=layers, **options)
    params = make_params(values=first)
    optimizer = MeZO(params.items(), lr=0.01, eps=0.1, noise=kind, check=False, **options)
    assert list(optimizer.layers) == ["embed.weight", "layer.0", "layer.1", "head"]
    closure = Closure(params, layered_loss)
    for t, state in enumerate(states):
        closure.t = t
        optimizer.step(closure)
        assert optimizer.sigma == pytest.approx(state.sigma, rel=1e-4)
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), state.params[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_groups_of_a_layer_that_differ_in_eps_have_one_for_its_norm(order, tmp_path):
    """Of a loss that is a plane: whatever eps is and whoever comes first, σ is the same."""
    rng = np.random.default_rng(0)
    slopes = {name: rng.normal(size=shape) for name, shape in LAYERED.items()}
    own = {name: 0.25 if name.endswith("bias") else 0.0625 for name in LAYERED}
    plane = lambda p, t: 0.1 * sum(float(np.sum(slopes[name] * p[name])) for name in p)  # noqa: E731
    options = {"lr": 0.01, "noise": "rademacher", "variance": "grad_norm", "norm_samples": 3, "check": False}

    def grouped(params):
        return MeZO([{"params": [(name, p)], "eps": own[name]} for name, p in list(params.items())[::order]], **options)

    params = make_params(values=slopes)
    state = mezo.trace(slopes, plane, 1, eps=own, **{key: options[key] for key in options if key != "check"})[0]
    alike, optimizer = MeZO(make_params(values=slopes).items(), eps=0.0625, **options), grouped(params)
    alike.step(Closure(dict(alike.space.tensors), plane))
    log = optimizer.record(tmp_path / "log")
    optimizer.step(Closure(params, plane))
    assert optimizer.sigma == pytest.approx(alike.sigma, rel=1e-4)
    assert optimizer.sigma == pytest.approx(state.sigma, rel=1e-4)
    again = make_params(values=slopes)
    grouped(again).replay(log)
    assert same(values(again), values(params))


def test_names_of_layers():
    assert layer_of("roberta.encoder.layer.11.attention.self.query.weight") == "roberta.encoder.layer.11"
    assert layer_of("0.weight") == "0"
    assert layer_of("h.3.mlp.2.bias") == "h.3"
    assert layer_of("conv1.weight") == "conv1.weight"  # a number is a part by itself
    assert layer_of("embeddings.word.weight") == "embeddings.word.weight"


# Estimates against gradients -----------------------------------------------------------------------------------------

CURVES = np.linspace(0.5, 2.0, 12)


def quadratic() -> tuple[dict[str, nn.Parameter], Any, np.ndarray]:
    params = make_params(values={"layer.0.w": np.linspace(-1, 1, 12).reshape(4, 3), "layer.1.b": np.linspace(1, 2, 12)})

    def loss() -> float:
        w, b = (p.detach().numpy().reshape(-1) for p in params.values())
        return float(np.sum(CURVES * w**2) / 2 + np.sum(CURVES[::-1] * b**2) / 2)

    w, b = (p.detach().numpy().reshape(-1) for p in params.values())
    return params, loss, np.concatenate([CURVES * w, CURVES[::-1] * b])


def dense(optimizer, update_point) -> np.ndarray:
    total = {name: torch.zeros(tensor.numel(), dtype=torch.float64) for name, tensor in optimizer.space.tensors.items()}
    for change in optimizer.space.deltas([update_point])[0]:
        total[change.name] += change.dense(optimizer.space.tensors[change.name]).view(-1)
    return np.concatenate([part.numpy() for part in total.values()])


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"samples": 3},
        {"estimate": "one-sided", "eps": 1e-4},
        {"layerwise": True},
        {"variance": "param_norm"},
        {"variance": "grad_norm", "norm_samples": 4},
        {"rank": 1},
        {"rank": 2, "resample_every": 5},
    ],
    ids=str,
)
def test_estimates_match_the_gradient_within_their_standard_error(options, kind):
    if "rank" in options and kind == "sphere":
        kind = "near_normal"
    params, loss, gradient = quadratic()
    optimizer = MeZO(params.items(), noise=kind, check=False, **options)
    found = []
    for t in range(700):
        talk = optimizer.estimated(t)
        request = next(talk)
        try:
            while True:
                if isinstance(request, Losses):
                    answers = []
                    for point in request.points:
                        with optimizer.space.at(optimizer.space.deltas([point])[0]):
                            answers.append(loss())
                else:
                    answers = [optimizer._norm(block) for block in request.blocks]
                request = talk.send(answers)
        except StopIteration as stop:
            found.append(dense(optimizer, stop.value.gradient))
    mean, error = np.mean(found, 0), np.std(found, 0) / math.sqrt(len(found))
    away = np.abs(mean - gradient) / error
    assert away.max() < 4.5 and np.mean(away**2) < 2.5
    assert error.max() < 0.25 * np.linalg.norm(gradient)


def test_expectation_estimates_the_gradient_over_sigma():
    params, loss, gradient = quadratic()
    optimizer = MeZO(params.items(), variance="param_norm", expectation=True, noise="rademacher", check=False)
    found = []
    for t in range(700):
        talk = optimizer.estimated(t)
        request, answers = next(talk), None
        try:
            while True:
                answers = (
                    [optimizer._norm(block) for block in request.blocks] if not isinstance(request, Losses) else []
                )
                for point in getattr(request, "points", ()):
                    with optimizer.space.at(optimizer.space.deltas([point])[0]):
                        answers.append(loss())
                request = talk.send(answers)
        except StopIteration as stop:
            found.append(dense(optimizer, stop.value.gradient))
    sigma = np.repeat([np.linalg.norm(p.detach().numpy()) for p in params.values()], 12)
    away = np.abs(np.mean(found, 0) - gradient / sigma) / (np.std(found, 0) / math.sqrt(len(found)))
    assert away.max() < 4.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("options", [{}, {"entries": 3}, {"rank": 1}, {"samples": 2}], ids=str)
def test_the_noise_of_the_update_is_that_of_the_probe(options, kind, dtype):
    """The change of the weights lies along what the closure saw between its two calls: cosine 1."""
    if kind == "sphere" and "rank" in options:
        kind = "gaussian"
    params = make_params(dtype, values={"w": np.zeros((6, 5)), "b": np.zeros(7)})
    optimizer = MeZO(params.items(), lr=1.0, eps=2.0**-6, noise=kind, check=False, **options)
    closure = Closure(params, lambda p, t: float(np.sum(np.cos(p["w"] + 1)) + 3 * p["b"][0]), record=True)
    optimizer.step(closure)
    flat = [torch.cat([seen[name].view(-1).double() for name in params]) for seen, _ in closure.seen]
    losses = [loss for _, loss in closure.seen]
    drawn = [(plus - minus) / 2.0**-5 for plus, minus in zip(flat[::2], flat[1::2], strict=True)]
    slopes = [(plus - minus) / 2.0**-5 for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
    along = -sum(slope * z for slope, z in zip(slopes, drawn, strict=True)) / len(drawn)
    moved = torch.cat([p.detach().view(-1).double() for p in params.values()])
    assert torch.equal(moved != 0, along != 0)
    tolerance = 1e-4 if dtype == torch.bfloat16 else 1e-9  # of half precision; of losses in single precision
    assert float(torch.nn.functional.cosine_similarity(moved, along, dim=0)) > 1 - tolerance


# Lean forms ----------------------------------------------------------------------------------------------------------


def ends_of(kind, steps, dtype=torch.float32, **options) -> torch.Tensor:
    params = make_params(dtype)
    optimizer = kind(params.items(), seed=3, check=False, **options)
    closure = Closure(params)
    for t in range(steps):
        closure.t = t
        optimizer.step(closure)
    return torch.cat([p.detach().view(-1) for p in params.values()])


@pytest.mark.parametrize("key", ["mezomomentum", "mezoadam", "mezoadamm"])
@pytest.mark.parametrize("extra", [{}, {"samples": 2, "entries": 3}, {"rank": 1}], ids=str)
def test_a_window_of_all_steps_is_the_buffer(key, extra):
    """To the rounding of single precision; Adam's two forms do the same operations and agree bit for bit."""
    options = {**cases.OPTIMIZERS[key].variants["plain"], **extra}
    lean, buffered = (ends_of(OPTIMIZERS[key], 25, window=window, **options) for window in (25, None))
    if key == "mezomomentum":
        assert float((lean - buffered).abs().max()) < 1e-5
    else:
        assert torch.equal(lean, buffered)


def test_how_well_a_window_of_100_agrees():
    """The figures of docs/methods.md, after 200 steps, over how far the weights went."""
    first = ends_of(MeZO, 0)
    for kind, bound, options in (
        (MeZOMomentum, 2e-5, {"lr": 0.001, "momentum": 0.9}),
        (MeZOAdam, 0.045, {"lr": 0.005, "betas": (0.9, 0.999)}),
    ):
        buffered = ends_of(kind, 200, torch.float64, eps=0.05, **options)
        lean = ends_of(kind, 200, torch.float64, eps=0.05, window=100, **options)
        apart = float((lean - buffered).norm() / (buffered - first.double()).norm())
        print(f"{kind.__name__}: W = 100, {apart:.2g} of the way apart after 200 steps")
        assert bound / 2 < apart < bound


def test_a_window_takes_no_memory_of_the_weights_size():
    params = make_params(values={"w": np.zeros((1000, 50))})
    for kind in (MeZOMomentum, MeZOAdam):
        lean, buffered = (kind(params.items(), window=window, check=False) for window in (3, None))
        assert not lean.space.buffers
        sizes = {name: sum(t.numel() for t in each.values()) for name, each in buffered.space.buffers.items()}
        assert sizes == dict.fromkeys(buffered.buffers, 50_000)


@pytest.mark.parametrize("key", RULES)
def test_buffers_take_the_memory_that_the_docs_say(key):
    """Times the weights, beside them: "none", or "1 x" and so on."""
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    (said,) = re.findall(rf"^\| `{key}` .*\| (none|\d x)[^|]*\|$", page, re.MULTILINE)
    params = make_params(torch.float32)
    optimizer = make(key, "plain", params)
    train(optimizer, Closure(params), 2)
    held = sum(t.numel() for each in optimizer.space.buffers.values() for t in each.values())
    times = held / sum(p.numel() for p in params.values())
    assert times == (0 if said == "none" else int(said[0]))
    assert times == {"mezomomentum": 1, "mezoadam": 2, "mezoadamm": 3}.get(key, 0)


def test_buffers_of_half_precision_weights_are_in_single_precision_and_survive_a_checkpoint():
    params = make_params(torch.bfloat16)
    optimizer = make("mezoadam", "plain", params)
    train(optimizer, Closure(params), 4)
    again = make("mezoadam", "plain", make_params(torch.bfloat16))
    again.load_state_dict(optimizer.state_dict())
    for kind, tensors in optimizer.space.buffers.items():
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        assert same(again.space.buffers[kind], tensors)
    with pytest.raises(UserError, match="MeZOAdam: window must be None, as the state says, got 4"):
        make("mezoadam", "window", params).load_state_dict(optimizer.state_dict())


# fill_grad -----------------------------------------------------------------------------------------------------------


def test_fill_grad_writes_the_estimate_for_any_torch_optimizer():
    params, mine = make_params(), make_params()
    lender = MeZO(params.items(), eps=0.1, samples=2, seed=4, check=False)
    inner = torch.optim.Adam(list(params.values()), lr=0.05, betas=(0.9, 0.999), eps=1e-8)
    optimizer = MeZOAdam(mine.items(), lr=0.05, eps=0.1, samples=2, seed=4, check=False)
    lent, own = Closure(params), Closure(mine)
    for t in range(8):
        lent.t = own.t = t
        before = values(params)
        loss = lender.fill_grad(lent)
        assert same(values(params), before) and all(p.grad.shape == p.shape for p in params.values())
        inner.step()
        inner.zero_grad()
        assert loss == pytest.approx(optimizer.step(own), rel=1e-6)
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), mine[name].detach(), rtol=0, atol=1e-6)
    assert lender.t == 8 and lender.forward_passes == 32


def test_fill_grad_adds_up_and_is_not_logged(tmp_path):
    params = make_params()
    optimizer = MeZO(params.items(), eps=0.1, check=False)
    optimizer.fill_grad(Closure(params))
    once = {name: p.grad.clone() for name, p in params.items()}
    optimizer.t = 0
    optimizer.fill_grad(Closure(params))
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in params.items())
    assert math.isnan(optimizer.fill_grad(Closure(params, lambda p, t: math.nan)))
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in params.items())
    optimizer.record(tmp_path / "log")
    with pytest.raises(
        UserError, match="MeZO: fill_grad must not be logged, since another optimizer moves the weights"
    ):
        optimizer.fill_grad(Closure(params))


# Weight decay --------------------------------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    """A normalisation of no class that torch has."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.scale * x


def test_weight_decay_leaves_biases_and_normalisations_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), RootMeanSquare(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = values(dict(model.named_parameters()))
    optimizer = MeZO(model.named_parameters(), lr=0.5, weight_decay=0.5, check=False)
    optimizer.step(lambda: 1.0)  # the estimate is 0
    decayed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert decayed == {"0.weight", "4.weight"} == set(before) - no_decay_names(model)
    assert torch.equal(model[0].weight.detach(), before["0.weight"] * 0.75)
    assert no_decay_names(nn.LayerNorm((2, 3))) == {"weight", "bias"}
    optimizer.param_groups[0]["weight_decay"] = 0.0
    now = values(dict(model.named_parameters()))
    optimizer.step(lambda: 1.0)
    assert same(values(dict(model.named_parameters())), now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [MeZO, MeZOAdam])
def test_weight_decay_too_small_for_one_step_is_not_lost(kind, dtype, tmp_path):
    """1 - 2e-8 is 1 in single precision; after 763 steps what is owed is 2^-16."""

    def make():
        tensor = nn.Parameter(torch.linspace(0.5, 1.0, 300 * 300).view(300, 300).to(dtype))
        return tensor, kind([("w", tensor)], lr=1e-6, eps=0.01, weight_decay=0.02, check=False, evaluator="snapshot")

    tensor, optimizer = make()
    optimizer.record(tmp_path / "log")
    optimizer.forecast(1000)  # owes nothing
    before = tensor.detach().double()
    for _ in range(762):
        optimizer.step(lambda: 1.0)
    assert torch.equal(tensor.detach().double(), before)
    state = optimizer.state_dict()
    optimizer.step(lambda: 1.0)
    shrunk = 1 - float(tensor.detach().double().sum() / before.sum())
    assert shrunk == pytest.approx(763 * 2e-8, rel=0.5 if dtype == torch.bfloat16 else 0.05)
    again, replayer = make()
    assert replayer.replay(tmp_path / "log") == 763 and torch.equal(again, tensor)
    resumed, fresh = make()
    fresh.load_state_dict(state)
    fresh.step(lambda: 1.0)
    assert torch.equal(resumed, tensor)


class WideRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


@pytest.mark.parametrize("kind", [MeZO, MeZOAdam])
def test_weight_decay_leaves_normalisations_of_any_shape_alone_where_the_model_is_known(kind, tmp_path):
    def make(given):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 4)), WideRMSNorm(), nn.Linear(4, 2))
        options = {"lr": 0.5, "weight_decay": 0.5, "check": False, "model": model if given else None}
        return model, kind(model.named_parameters(), **options)

    model, optimizer = make(True)
    before = values(dict(model.named_parameters()))
    log = optimizer.record(tmp_path / "log")
    assert log.header["undecayed"] == ["1.bias", "1.weight", "2.weight"]
    for _ in range(2):
        optimizer.step(lambda: 1.0)  # the estimate is 0
    after = values(dict(model.named_parameters()))
    assert {name for name in before if not torch.equal(after[name], before[name])} == {"0.weight", "3.weight"}
    for given in (False, True):  # the log tells, not the model
        again, replayer = make(given)
        replayer.replay(tmp_path / "log")
        assert same(values(dict(again.named_parameters())), after)
    _, unaware = make(False)
    old = unaware.record(tmp_path / "old")
    unaware.step(lambda: 1.0)
    again, replayer = make(True)
    replayer.replay(tmp_path / "old")  # of a run that did not know the model
    assert "undecayed" not in old.header and not torch.equal(again[1].weight, torch.ones(2, 4))


# The better of the points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("more", [{}, {"entries": 900}, {"rank": 2}], ids=str)
def test_a_conservative_step_below_the_resolution_is_not_lost(more, dtype, tmp_path):
    """Rounded stochastically it is measured, and the point that was measured is taken, to the bit."""
    slope = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    tensor, seen = nn.Parameter(torch.ones(32, 32, dtype=dtype)), []
    options = {"lr": 1e-6, "eps": 1e-2, "noise": "rademacher", "check": False, **more}

    def closure():
        seen.append(tensor.detach().clone())
        return float((seen[-1].float() * slope).sum())

    optimizer = MeZOConservative([("w", tensor)], **options)
    optimizer.record(tmp_path / "log")
    moves = 0
    for _ in range(60):
        before = tensor.detach().clone()
        optimizer.step(closure)
        candidates, seen = seen[2:], []
        assert len(candidates) == 3 and torch.equal(candidates[0], before)
        assert torch.equal(tensor, min(candidates, key=lambda w: float((w.float() * slope).sum())))
        moves += not torch.equal(tensor, before)
    assert moves > 10 and float(((tensor.detach().float() - 1) * slope).sum()) < 0
    again = nn.Parameter(torch.ones(32, 32, dtype=dtype))
    MeZOConservative([("w", again)], **options).replay(tmp_path / "log")
    assert torch.equal(again, tensor)


# Use -----------------------------------------------------------------------------------------------------------------


def test_in_a_users_loop():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 4)
        y = x[:, :1] * 2
    optimizer = MeZO(model.named_parameters(), lr=1e-6, eps=1e-3)
    losses = [optimizer.step(lambda: nn.functional.mse_loss(model(x), y))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1e4)
    losses += [optimizer.step(lambda: nn.functional.mse_loss(model(x), y)) for _ in range(300)]
    assert scheduler.get_last_lr() == [0.01] and losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.forward_passes == 2 + 2 * 301


def test_the_log_of_20000_steps_is_at_most_200_kilobytes(tmp_path):
    params = make_params()
    sizes = {}
    for name, rates in (("predicted", lambda t: [1e-3]), ("own loop", None)):
        optimizer = MeZO(params.items(), lr=1e-3, check=False)
        optimizer.predicted_lr = rates
        log = optimizer.record(tmp_path / name)
        for _ in range(40):
            optimizer.step(Closure(params))
        assert len(Trajectory.open(tmp_path / name)) == len(log) == 40
        at = [log._ends[i] for i in (9, 39)]
        sizes[name] = at[0] + (20_000 - 10) * (at[1] - at[0]) // 30
    assert sizes["predicted"] < 181_000
    assert sizes["own loop"] < 200 * 1024


# Misuse --------------------------------------------------------------------------------------------------------------


def test_ten_steps_in_a_row_without_a_number_end_the_run(tmp_path):
    params = make_params()
    optimizer = MeZO(params.items(), lr=0.01, eps=0.1, check=False)
    log = optimizer.record(tmp_path / "log")
    closure = Closure(params, lambda p, t: math.nan if t else 1.0)
    optimizer.step(closure)
    closure.t, before = 1, values(params)
    for _ in range(9):
        assert math.isnan(optimizer.step(closure))
    message = (
        r"MeZO: losses must be finite, got 10 steps in a row without; the weights are those before; "
        r"lower lr \(0.01\) or eps \(0.1\)"
    )
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            optimizer.step(closure)
    assert same(values(params), before) and optimizer.skipped == 9 and len(log) == optimizer.t == 10
    again = make_params()
    MeZO(again.items(), lr=0.01, eps=0.1, check=False).replay(tmp_path / "log")
    assert same(values(again), before)
    closure.t = 0
    optimizer.step(closure)  # one good step starts the count anew
    closure.t = 1
    assert math.isnan(optimizer.step(closure))


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, "7.9e-03"), (torch.float16, "9.8e-04"), (torch.float32, "1.2e-07"), (torch.float64, "1.2e-07")],
)
def test_an_eps_that_the_weights_cannot_hold_is_refused(dtype, least):
    params = {"w": nn.Parameter(torch.ones(10, 10, dtype=dtype))}
    kind = str(dtype).removeprefix("torch.")
    message = (
        rf"MeZO: eps must be >= {least} for {kind} weights of size 1 \(root mean square\), got 1e-07; a smaller probe "
        f"is rounded away{', since losses are logged in float32' if dtype == torch.float64 else ''}$"
    )
    with pytest.raises(UserError, match=message):
        MeZO(params.items(), eps=1e-7)
    MeZO(params.items(), eps=float(least))  # what the message names is enough
    MeZO([("w", nn.Parameter(torch.zeros(10, 10, dtype=dtype)))], eps=1e-7)


def test_a_closure_must_not_call_backward():
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([("w", w)])

    def plain():
        loss = (w**2).sum()
        loss.backward()
        return loss

    with pytest.raises(
        UserError, match="MeZO: closure must not call backward, got: element 0 of tensors does not requ"
    ):
        optimizer.step(plain)

    def stubborn():
        with torch.enable_grad():
            return plain()

    for _ in range(2):  # the second adds to a gradient that is there
        with pytest.raises(UserError, match="MeZO: closure must not call backward, got a gradient in 'w'"):
            optimizer.step(stubborn)
    assert torch.equal(w.detach(), torch.ones(3))

    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (None, "NoneType"),
        ({"loss": 1.0}, "dict"),
        ("low", "str"),
        (torch.zeros(3), r"Tensor of shape \(3,\)"),
        (np.zeros((2, 2)), r"ndarray of shape \(2, 2\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("evaluator", ["snapshot", "walk", "inject"])
@pytest.mark.parametrize("check", [True, False])
def test_a_closure_must_return_a_scalar(evaluator, check, loss, told):
    """Said in one line, with the weights where they were."""
    model = nn.Linear(4, 3)
    before = values(dict(model.named_parameters()))
    more = {"rank": 1, "model": model} if evaluator == "inject" else {}
    optimizer = MeZO(model.named_parameters(), evaluator=evaluator, check=check, **more)

    def closure():
        model(torch.ones(2, 4))
        return loss

    with pytest.raises(UserError, match=f"^MeZO: the closure must return a scalar loss, got {told}$"):
        optimizer.step(closure)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6 if evaluator == "walk" else 0)


def test_parameters_must_not_change_between_the_probes_of_a_step():
    w = nn.Parameter(torch.ones(3))
    optimizer = MeZO([("w", w)])

    def moving():
        w.mul_(0.5)
        return 1.0

    message = "MeZO: parameters must not change between the probes of a step, got 'w' changed while the closure ran"
    with pytest.raises(UserError, match=message):
        optimizer.step(moving)

    def replacing():
        w.data = w.data.clone()
        return 1.0

    with pytest.raises(UserError, match=message):
        optimizer.step(replacing)


def test_parameters_on_two_devices_are_refused():
    params = [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(2, device="meta")))]
    for kind in OPTIMIZERS.values():
        with pytest.raises(
            UserError, match=f"{kind.name}: parameters must be on one device, got 'a' on cpu and 'b' on meta"
        ):
            kind(params)


def test_a_diverging_run_says_what_to_lower():
    params = make_params()
    optimizer = MeZO(params.items(), lr=1e-4, eps=0.1, samples=2)
    closure = Closure(params, lambda p, t: 0.7 if t < 60 else 0.7 * 1.1 ** (t - 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for closure.t in range(70):
            optimizer.step(closure)
    message = (
        r"MeZO: the loss must not grow, got about 2\.\d+ at step \d+ after 0.7 over the first 50; lower lr \(0.0001\), "
        r"or average more samples \(2\)"
    )
    with pytest.warns(UserWarning, match=message) as told:
        for closure.t in range(70, 140):
            optimizer.step(closure)
    assert len(told) == 1


def test_a_run_that_explodes_among_its_first_steps_says_so():
    params = make_params()
    optimizer = MeZO(params.items(), lr=1e-4, eps=0.1)
    closure = Closure(params, lambda p, t: 0.7 if t < 5 else 1e4)
    with pytest.warns(UserWarning, match=r"the loss must not grow, got about \d+ at step 6 after 0.7 over the first 5"):
        for closure.t in range(10):
            optimizer.step(closure)


def test_a_resumed_run_warns_as_the_straight_one(tmp_path):
    """From the state, from the log, and never twice."""

    def loss(p, t):
        return 0.7 if t < 60 else 0.7 * 1.1 ** (t - 60)

    def steps(optimizer, closure, first, last):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for closure.t in range(first, last):
                optimizer.step(closure)
        return [str(each.message) for each in told]

    params = make_params()
    optimizer = MeZO(params.items(), lr=1e-4, eps=0.1)
    log = optimizer.record(tmp_path / "log")
    closure = Closure(params, loss)
    assert not steps(optimizer, closure, 0, 65)
    early = copy.deepcopy(optimizer.state_dict())
    (said,) = steps(optimizer, closure, 65, 140)
    late = copy.deepcopy(optimizer.state_dict())

    resumed = MeZO(params.items(), lr=1e-4, eps=0.1)
    resumed.load_state_dict(early)
    assert steps(resumed, closure, 65, 140) == [said]
    resumed.load_state_dict(late)
    assert not steps(resumed, closure, 140, 150)
    resumed.load_state_dict(early)
    for step in range(65, 140):
        resumed.replay_step(log[step])
    assert resumed.search_state() == late["search"]["method"]


def test_a_saved_state_is_not_measured_against_the_weights_again():
    """Weights may have grown past what eps was checked for: the run goes on as it would have."""
    tensor = nn.Parameter(torch.ones(50))
    optimizer = MeZO([("w", tensor)], eps=1e-5)
    state = optimizer.state_dict()
    with torch.no_grad():
        tensor.mul_(1000)
    with pytest.raises(UserError, match=r"MeZO: eps must be >= 1\.\de-04"):
        MeZO([("w", tensor)], eps=1e-5)
    optimizer.load_state_dict(state)


def test_coordinates_are_for_small_problems():
    with pytest.raises(
        UserError, match="KieferWolfowitz: parameters must have at most 4096 entries, got 4097; use MeZO"
    ):
        OPTIMIZERS["kieferwolfowitz"]([("w", nn.Parameter(torch.zeros(4097)))])


def test_kieferwolfowitz_finds_the_gradient_itself():
    params, loss, gradient = quadratic()
    before = np.concatenate([p.detach().numpy().reshape(-1) for p in params.values()])
    optimizer = OPTIMIZERS["kieferwolfowitz"](params.items(), lr=0.5, eps=0.125, check=False)
    optimizer.step(loss)
    after = np.concatenate([p.detach().numpy().reshape(-1) for p in params.values()])
    np.testing.assert_allclose(before - after, 0.5 * gradient, atol=1e-4)
    assert optimizer.forward_passes == 48


# Walking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_a_walk_is_replayed_to_the_bit_and_stays_by_the_snapshot(key, variant, fused, tmp_path):
    ends = []
    for evaluator in ("walk", "snapshot"):
        params = make_params(torch.float32)
        optimizer = make(key, variant, params, seed=5, evaluator=evaluator)
        optimizer.fused = fused and evaluator == "walk"
        optimizer.record(tmp_path / evaluator)
        train(optimizer, Closure(params), STEPS)
        optimizer.settle()
        ends.append(values(params))
        again = make_params(torch.float32)
        replayer = make(key, variant, again, seed=5, evaluator=evaluator)
        replayer.replay(tmp_path / evaluator)
        replayer.settle()
        assert same(values(again), ends[-1])
    for name, walked in ends[0].items():
        torch.testing.assert_close(walked, ends[1][name], rtol=0, atol=1e-3)


# Every rule, evaluator, dtype and noise ------------------------------------------------------------------------------

PLACES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("walk", torch.float32, {}),
    ("snapshot", torch.float32, {}),
    ("snapshot", torch.bfloat16, {}),
    ("snapshot", torch.float16, {}),
    ("inject", torch.float32, {"rank": 1}),
    ("inject", torch.bfloat16, {"rank": 2, "resample_every": 2}),
]


def make_module(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).to(dtype)


def random_state() -> tuple[bytes, bytes]:
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()  # noqa: NPY002 - the global one


@pytest.mark.parametrize(("evaluator", "dtype", "options"), PLACES, ids=[f"{p[0]}-{p[1]}" for p in PLACES])
@pytest.mark.parametrize("key", RULES)
def test_replay_is_training_for_every_rule_evaluator_dtype_and_noise(key, evaluator, dtype, options, tmp_path):
    """Bit for bit, without the module; and the global random state is never touched."""
    options = {**cases.OPTIMIZERS[key].variants["plain"], **options, "evaluator": evaluator, "seed": 5}
    ids, before = torch.arange(8).view(4, 2) % 5, random_state()
    for kind in NOISES:
        if kind == "sphere" and "rank" in options:
            continue
        module, log = make_module(dtype), tmp_path / kind
        optimizer = OPTIMIZERS[key](module.named_parameters(), noise=kind, model=module, **options)
        optimizer.record(log)
        losses = [
            optimizer.step(lambda t=t, run=module: (run(ids).float() - math.sin(t)).square().mean()) for t in range(5)
        ]
        assert len(set(losses)) == 5 and all(map(math.isfinite, losses))
        again = make_module(dtype)
        replayer = OPTIMIZERS[key](again.named_parameters(), noise=kind, **options)
        replayer.follow(Trajectory.open(log).header)
        assert [replayer.replay_step(payload) for payload in Trajectory.open(log)] == losses
        found, first = values(dict(again.named_parameters())), values(dict(make_module(dtype).named_parameters()))
        assert same(found, values(dict(module.named_parameters())))
        assert all(not torch.equal(found[name], first[name]) for name in first), "each tensor moves"
    assert random_state() == before


@pytest.mark.parametrize("evaluator", ["walk", "snapshot", "inject"])
@pytest.mark.parametrize("key", RULES)
def test_tied_tensors_move_once_under_every_rule(key, evaluator, tmp_path):
    """As one tensor alone does, to which the same losses are told."""
    options = {**cases.OPTIMIZERS[key].variants["plain"], "evaluator": evaluator, "check": False}
    options |= {"rank": 1} if evaluator == "inject" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied()
    ids, first, seen = torch.tensor([1, 5, 2, 2, 6]), model.embed.weight.detach().clone(), []

    def closure():
        if evaluator != "inject":  # which never moves them, and watches their use
            seen.append(model.embed.weight.detach() - first)
        return model(ids)

    optimizer = OPTIMIZERS[key](model.named_parameters(), model=model, **options)
    assert list(optimizer.space.tensors) == ["embed.weight"]
    optimizer.record(tmp_path / "log")
    for _ in range(4):
        optimizer.step(closure)
    alone = nn.Parameter(first.clone())
    OPTIMIZERS[key]([("embed.weight", alone)], **options).replay(tmp_path / "log")
    assert torch.equal(model.head.weight, alone) and not torch.equal(alone, first)
    assert model.head.weight is model.embed.weight
    if seen:
        probe = options["eps"] * Noise(0).fill("embed.weight", 0, 0, 0, 28).view(7, 4)
        torch.testing.assert_close(seen[0], probe, rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[1], -probe, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"rank": 2, "samples": 2}], ids=str)
def test_a_penalty_tells_points_apart_by_the_same_measure(options):
    """A weight that is only penalised shrinks: where norms with and without a change differed in their rounding, no
    change would always seem the better, or the worse."""
    tensor = nn.Parameter(0.05 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    options = {"lr": 2e-5, "eps": 1e-3, "penalty": 1.0, "evaluator": "snapshot", "check": False, **options}
    optimizer = MeZOConservative([("w", tensor)], **options)
    taken = 0
    for _ in range(6):
        before, norm = tensor.detach().clone(), float(tensor.detach().double().norm())
        optimizer.step(lambda: 0.0)
        taken += not torch.equal(tensor, before)
        assert float(tensor.detach().double().norm()) <= norm
    assert taken >= 3


def test_options_that_a_log_names_once_must_stay(tmp_path):
    params = make_params()
    optimizer = make("mezo", "plain", params, check=False)
    optimizer.step(lambda: 1.0)
    optimizer.param_groups[0]["eps"] *= 2  # no log is open
    optimizer.step(lambda: 1.0)
    optimizer.record(tmp_path / "log")
    optimizer.step(lambda: 1.0)
    for key in ("lr", "penalty"):  # of which the log tells step by step
        optimizer.param_groups[0][key] += 0.01
        optimizer.step(lambda: 1.0)
    before = values(params)
    for key, value in (("eps", 0.5), ("weight_decay", 0.25), ("entries", 2)):
        kept, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
        with pytest.raises(
            UserError, match=rf"^MeZO: {key} must stay {kept} while a log is open, got {value}; call reco"
        ):
            optimizer.step(lambda: 1.0)
        optimizer.param_groups[0][key] = kept
    assert same(values(params), before) and len(optimizer.trajectory) == optimizer.t - 2
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 2)))]})
    with pytest.raises(
        UserError, match="MeZO: parameter groups must stay 1 while a log is open, got 2; call record ag"
    ):
        optimizer.step(lambda: 1.0)
    optimizer.record(tmp_path / "other")
    optimizer.step(lambda: 1.0)


# Memory --------------------------------------------------------------------------------------------------------------


def largest(work) -> int:
    """The most bytes that tensors and arrays made in `work` held at one time."""
    tracemalloc.start()
    try:
        with TensorBytes() as tensors:
            work()
        return tensors.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("evaluator", "options"),
    [
        ("walk", {}),
        ("walk", {"noise": "rademacher"}),
        ("inject", {"rank": 1}),
        ("inject", {"rank": 1, "penalty": 0.1, "samples": 2}),
        ("snapshot", {}),
    ],
    ids=str,
)
def test_what_a_step_holds_beyond_its_forward_passes(evaluator, options):
    """All tensors and arrays alive at one time, over a bare forward pass: at most 2% of the weights and pieces of
    1 MiB together. A snapshot's copy shows that a copy would be seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(1000, 512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512),
            nn.Linear(512, 512),
        )  # fmt: skip
    ids = torch.arange(64).view(4, 16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.no_grad()
    def closure():
        return float(model(ids).square().mean())

    optimizer = MeZO(model.named_parameters(), evaluator=evaluator, model=model, check=False, **options)
    optimizer.step(closure)  # compiles, and looks for the tensors in the modules
    extra = largest(lambda: optimizer.step(closure)) - largest(closure)
    print(f"{evaluator}: {extra / 2**20:.2f} MiB beyond a forward pass, weights of {size / 2**20:.1f} MiB")
    if evaluator == "snapshot":
        assert extra > size
    else:
        assert extra < 0.02 * size + 2**20


@pytest.mark.parametrize("more", [{}, {"selection": "magnitude", "reselect_every": 100}, {"noise": "sphere"}], ids=str)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("kind", [MeZO, MeZOSign])
def test_selected_entries_keep_the_bound_of_a_walk(kind, share, more):
    """2% of the weights and 16 MiB, however long it walks; what cannot be made again takes at most a bit an entry."""
    params = {f"layer.{i}.w": nn.Parameter(torch.full((1024, 1024), 0.03)) for i in range(8)}
    size = sum(4 * p.numel() for p in params.values())
    more = {"entries": int(share * 2**20), "evaluator": "walk", "check": False, **more}
    optimizer = kind(params.items(), lr=1e-3, eps=1e-3, **more)
    found = largest(lambda: [optimizer.step(lambda: 0.5) for _ in range(3)])
    held = sum(each.bytes for each in optimizer.space.chosen.values())
    print(f"{found / 2**20:.1f} MiB, {held / 2**20:.1f} that stay, weights of {size / 2**20:.0f} MiB")
    assert found <= 0.02 * size + 16 * 2**20
    assert held <= (min(share, 1 / 32) * size if "selection" in more else 0)


@pytest.mark.parametrize("saved", ["as they are", "as positions"])
@pytest.mark.parametrize("entries", [1, 9])
def test_selections_of_a_state_go_on(entries, saved):
    """Those of states that were saved as positions of 64 bits, too."""
    more = {"lr": 1e-2, "entries": entries, "selection": "magnitude", "reselect_every": 10, "check": False}
    params, ends = [{"w": nn.Parameter(torch.linspace(-1, 1, 60))} for _ in range(2)], []
    straight, resumed = (MeZO(each.items(), **more) for each in params)
    straight.step(lambda: float(params[0]["w"].square().sum()))
    state = straight.state_dict()
    if saved == "as positions":
        block = straight.space.blocks["w"]
        state["search"]["chosen"] = {"0 w": straight.space.selected(block, 0).between(0, 60)}
    resumed.load_state_dict(state)
    params[1]["w"].data.copy_(params[0]["w"].data)
    for optimizer, each in zip((straight, resumed), params, strict=True):
        optimizer.step(lambda each=each: float(each["w"].square().sum()))
        ends.append(each["w"].detach())
    assert torch.equal(*ends)
    assert torch.equal(straight.space.chosen["w", 0].data, resumed.space.chosen["w", 0].data)


@pytest.mark.parametrize("samples", [1, 8])
def test_a_snapshot_is_one_copy_however_many_directions_a_point_has(samples):
    params = {f"layer.{i}.w": nn.Parameter(torch.full((512, 512), 0.03)) for i in range(8)}
    size = sum(4 * p.numel() for p in params.values())
    optimizer = MeZOConservative(params.items(), lr=1e-4, samples=samples, evaluator="snapshot", check=False)
    optimizer.step(lambda: 0.5)
    found = largest(lambda: optimizer.step(lambda: 0.5))
    print(f"{samples} samples: {found / 2**20:.1f} MiB, weights of {size / 2**20:.1f} MiB")
    assert size < found < 1.1 * size


def test_fill_grad_holds_the_gradients_and_one_tensor():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = MeZO(model.named_parameters(), evaluator="walk", check=False)
    x = torch.ones(2, 256)
    found = largest(lambda: optimizer.fill_grad(lambda: float(model(x).square().mean())))
    print(f"fill_grad: {found / size:.2f} of the weights")
    assert all(p.grad is not None for p in model.parameters())
    assert size <= found < 1.3 * size
    again = largest(lambda: optimizer.fill_grad(lambda: float(model(x).square().mean())))
    assert again < 0.3 * size, "the gradients are there"
