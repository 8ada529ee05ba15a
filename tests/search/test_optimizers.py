"""What every optimizer promises, over the rows of `cases`: the paper's steps, replay, resume, no trace, few passes."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
import gradientless.search.optim.base as shell
from gradientless import lr_scheduler
from gradientless.errors import UserError
from gradientless.language.surfaces.head_session import HeadSession
from gradientless.search.evaluators import Session, Snapshot
from gradientless.search.noise import Noise
from gradientless.search.optim import FIRST_ORDER, GLD, OPTIMIZERS, SMTP, STP, ForwardOptimizer, GLDSearch, MeZO
from gradientless.search.points import ALL, ORIGIN, Direction, Losses, Update, point
from gradientless.search.space import Space
from gradientless.search.trajectory import Trajectory
from reference import first_order, gld, gldsearch, noise, schedules, smtp, stp

SHAPES = {"dense.weight": (4, 3), "dense.bias": (4,), "out.weight": (2, 4)}
STEPS, FLOOR = 12, 0.3
VARIANTS = [(key, variant) for key, case in sorted(cases.OPTIMIZERS.items()) for variant in case.variants]
DIRECT = [(key, variant) for key, variant in VARIANTS if not cases.OPTIMIZERS[key].estimates]
GLD_VARIANTS = [variant for key, variant in VARIANTS if key == "gld"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def target() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


TARGET = target()


def batch_loss(params: dict[str, np.ndarray], t: int) -> float:
    """A bowl that moves with the step, as batches do, and couples the tensors."""
    parts = [float(np.sum((params[name] - TARGET[name] - 0.3 * math.sin(3 * t + 1)) ** 2)) for name in sorted(params)]
    return sum(parts) + 0.1 * parts[0] * parts[-1] + 0.05 * math.sin(5 * parts[0])


def bowl(params: dict[str, np.ndarray], t: int = 0) -> float:
    return sum(float(np.sum((params[name] - TARGET[name]) ** 2)) for name in sorted(params))


def scores(block: str, step: int, size: int) -> np.ndarray:
    """Importances that change from step to step."""
    return np.random.default_rng([step, len(block), size]).normal(size=size)


OPTIONS_OF_IMPORTANCE = {"scale": 1.0, "draws": 1, "rows": 32, "check": False}


class Closure:
    """The loss of a dictionary of parameters on the batch of step t. Counts its calls and may record what it saw."""

    def __init__(self, params: dict[str, nn.Parameter], loss=batch_loss, record: bool = False):
        self.params, self.loss, self.record = params, loss, record
        self.t = self.calls = 0
        self.seen: list[tuple[dict[str, Tensor], float]] = []

    def __call__(self) -> float:
        self.calls += 1
        value = self.loss({name: p.detach().double().numpy() for name, p in self.params.items()}, self.t)
        if self.record:
            self.seen.append(({name: p.detach().clone() for name, p in self.params.items()}, value))
        return value

    def importance(self, name: str, step: int, **options: Any) -> Tensor:
        assert options == OPTIONS_OF_IMPORTANCE
        return torch.from_numpy(scores(name, step, int(np.prod(SHAPES[name]))))


def make_params(dtype=torch.float64, values=None) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.tensor(value).to(dtype)) for name, value in (values or start()).items()}


def make(key: str, variant: str, params: dict[str, nn.Parameter], **more: Any) -> ForwardOptimizer:
    case = cases.OPTIMIZERS[key]
    groups: Any = list(params.items())
    own = case.groups.get(variant)
    if own:
        groups = [{"params": [(name, p)], **own[name]} for name, p in params.items()]
    return OPTIMIZERS[key](groups, **{**case.variants[variant], **more})


def train(optimizer, closure, steps, first=0, each=None) -> list[float]:
    """`steps` steps under a linear schedule; what each step returned."""
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    found = []
    for t in range(first, first + steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.setdefault("initial_lr", rate)
            group["lr"] = rate * schedules.linear(t, STEPS, FLOOR)
        closure.t = t
        found.append(optimizer.step(closure))
        if each is not None:
            each(t)
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def values(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def plain_state(state: Any) -> Any:
    """A state dict with tensors as lists, to compare."""
    if isinstance(state, Tensor):
        return str(state.dtype), state.double().tolist()
    if isinstance(state, dict):
        return {key: plain_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain_state(value) for value in state]
    return state


# The papers ----------------------------------------------------------------------------------------------------------


def transcribed(key: str, variant: str, kind: str) -> list[Any]:
    """The states of the float64 transcription under the options of a variant."""
    case = cases.OPTIMIZERS[key]
    options = {
        "noise": kind,
        "seed": 5,
        "schedule": lambda t: schedules.linear(t, STEPS, FLOOR),
        **case.variants[variant],
    }
    if key == "stp":
        return stp.trace(start(), batch_loss, STEPS, **options)
    if key == "smtp":
        return smtp.trace(start(), batch_loss, STEPS, **options)
    if key == "gldsearch":  # the package's schedule moves both radii, so every step is a search of its own
        schedule = options.pop("schedule")
        big, small, states, params = options["radius"], options["min_radius"], [], start()
        for t in range(STEPS):
            scaled = {"radius": big * schedule(t), "min_radius": small * schedule(t) * (1 - 1e-12)}
            drawn = lambda n, seed, name, step, draw, t=t: noise.NOISE[kind](n, seed, name, t, draw)  # noqa: E731
            loss = lambda p, step, t=t: batch_loss(p, t)  # noqa: E731
            states += gldsearch.trace(params, loss, 1, **{**options, **scaled, "noise": drawn})
            params = states[-1].params
        return states
    for name, own in case.groups.get(variant, {}).items():
        for option, value in own.items():
            option = "radius" if option == "lr" else option
            standing = options.get(option, {"candidates": 5, "selection": "random", "penalty": 0.0}.get(option))
            if not isinstance(standing, dict):
                standing = dict.fromkeys(SHAPES, standing)
            options[option] = {**standing, name: value}
    for option in ("reselect_every", "squared"):
        if isinstance(options.get(option), dict):
            options[option] = {name: value or 1 for name, value in options[option].items()}
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}

    def importance(params, block, t):
        names = list(SHAPES) if block == "@pool" else [block]
        return np.concatenate([scores(name, t, sizes[name]) for name in names])

    return gld.trace(start(), batch_loss, STEPS, importance=importance, **options)


def tree_of(option) -> list:
    return [
        (tuple((pytest.approx(c, rel=1e-12), d.step, d.draw) for c, d in child.change), tree_of(child))
        for child in option.children
    ]


@pytest.mark.parametrize("kind", sorted(noise.NOISE.keys() & cases.NOISES))
@pytest.mark.parametrize(("key", "variant"), DIRECT)
def test_steps_are_the_papers(key, variant, kind):
    states = transcribed(key, variant, kind)
    params = make_params()
    optimizer = make(key, variant, params, seed=5, noise=kind, check=False)
    scheduler = lr_scheduler(optimizer, "linear", STEPS, floor=FLOOR)
    selected: dict[str, list[int]] = {}

    class Watching(Closure):
        def __call__(self) -> float:
            for block in optimizer.space.blocks.values():
                flat, at = [], 0
                found = dict(optimizer.space.entries(block, optimizer.t))
                for name in block.tensors:
                    size = optimizer.space.tensors[name].numel()
                    index = found.get(name, []) if name in found or len(block.tensors) == 1 else []
                    flat += [at + i for i in (range(size) if index is None else list(index))]
                    at += size
                selected[block.name] = sorted(int(i) for i in flat)
            return super().__call__()

    closure = Watching(params)
    tolerance = {
        "rademacher": 1e-11 if "weighted" not in variant and "momentum" not in variant else 1e-6,
        "near_normal": 1e-6,
        "gaussian": 1e-5,
    }[kind]
    for t in range(STEPS):
        state = states[t]
        closure.t = t
        reported = optimizer.step(closure)
        scheduler.step()
        for name, p in params.items():
            np.testing.assert_allclose(
                p.detach().numpy(), state.params[name], rtol=0, atol=tolerance, err_msg=f"{t} {name}"
            )
        if key == "gld":
            assert selected == {block: index.tolist() for block, index in state.selected.items()}
            if optimizer.trees is not None:
                for block, options in state.options.items():
                    assert tree_of(optimizer.trees.trees[block]) == gld.tree(options)
            for name, buffer in optimizer.space.buffers.get("momentum", {}).items():
                expected = state.momentum[name] if not optimizer.pool else pool_part(state.momentum["@pool"], name)
                np.testing.assert_allclose(buffer.view(-1).numpy(), expected, rtol=0, atol=tolerance + 1e-6)
            if optimizer.trees is not None:
                with optimizer.space.at(optimizer.space.deltas([optimizer.pending()])[0]):
                    for name, p in params.items():
                        np.testing.assert_allclose(p.detach().numpy(), state.pending[name], rtol=0, atol=tolerance)
            if all(group["penalty"] == 0 for group in optimizer.param_groups) and optimizer.sweep == "turns":
                assert reported == pytest.approx(min(list(state.losses.values())[-1]), rel=1e-5)
        else:
            assert reported == pytest.approx(min(state.losses), rel=1e-5)
        if key == "smtp":
            for name, buffer in optimizer.space.buffers.get("velocity", {}).items():
                np.testing.assert_allclose(buffer.numpy(), state.momentum[name], rtol=0, atol=tolerance * 10)
            assert optimizer._accepted_radius == pytest.approx(state.gamma or 0.0)
    if len(states) > STEPS:
        optimizer.finish()
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), states[-1].params[name], rtol=0, atol=tolerance)
    winners = [c for state in states[:STEPS] for c in (state.chosen.values() if key == "gld" else [state.chosen])]
    assert len(set(winners)) > 1 or variant == "options 1x1" or variant == "options 1x3"  # the steps decide something
    moved = [name for name in SHAPES if not np.array_equal(states[-1].params[name], start()[name])]
    assert moved == list(SHAPES)


def pool_part(flat: np.ndarray, name: str) -> np.ndarray:
    at = 0
    for other, shape in SHAPES.items():
        size = int(np.prod(shape))
        if other == name:
            return flat[at : at + size]
        at += size
    raise KeyError(name)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("extra", [{}, {"entries": 2, "reselect_every": 3, "penalty": 0.1}])
def test_one_option_a_level_is_algorithm_1_a_few_steps_later(levels, extra):
    paths = []
    for options in (None, (1, levels)):
        params = make_params(values={name: start()[name] for name in ("dense.weight", "dense.bias")})
        optimizer = GLD(list(params.items()), radius=0.4, options=options, **extra)
        closure, path = Closure(params), [values(params)]
        for t in range(10):
            closure.t = t
            optimizer.step(closure)
            path.append(values(params))
        optimizer.finish()
        paths.append((path, values(params)))
    (plain, end), (shifted, shifted_end) = paths
    for t in range(11):
        expected = plain[max(0, t - levels)]
        for name in expected:
            torch.testing.assert_close(shifted[t][name], expected[name], rtol=0, atol=1e-12)
    for name in end:
        torch.testing.assert_close(shifted_end[name], end[name], rtol=0, atol=1e-12)
    assert sum(not same(a, b) for a, b in itertools.pairwise(plain)) > 5


@pytest.mark.parametrize(
    ("rule", "options"), [(n, o) for n, case in sorted(cases.FIRST_ORDER.items()) for o in case.good]
)
def test_first_order_rules(rule, options):
    params = make_params()
    entry = FIRST_ORDER[rule]
    optimizer = entry.type(list(params.values()), **{**entry.defaults, **options})
    scheduler = lr_scheduler(optimizer, "linear", STEPS, floor=FLOOR)

    def gradient(theta, t):
        return {name: (1 + 0.1 * t) * (theta[name] - TARGET[name]) for name in theta}

    states = first_order.trace(
        start(), gradient, STEPS, rule=rule, schedule=lambda t: schedules.linear(t, STEPS, FLOOR), **options
    )
    for t in range(STEPS):
        found = gradient({name: p.detach().numpy() for name, p in params.items()}, t)
        for name, p in params.items():
            p.grad = torch.from_numpy(found[name])
        optimizer.step()
        scheduler.step()
        for name, p in params.items():
            np.testing.assert_allclose(p.detach().numpy(), states[t].params[name], rtol=0, atol=1e-12)
    for bad, message in cases.FIRST_ORDER[rule].bad:
        with pytest.raises(ValueError, match=message):
            entry.type(list(params.values()), **{**entry.defaults, **bad})


# Replay and resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_replay_is_training(key, variant, dtype, tmp_path):
    params = make_params(dtype)
    optimizer = make(key, variant, params, seed=5)
    log = optimizer.record(tmp_path / "log", {"base": "none"})
    losses = train(optimizer, Closure(params), STEPS)
    assert len(log) == STEPS and log.header["base"] == "none"
    again = make_params(dtype)
    replayer = make(key, variant, again, seed=5)
    assert [replayer.replay_step(payload) for payload in Trajectory.open(tmp_path / "log")] == losses
    assert same(values(again), values(params))
    assert plain_state(replayer.state_dict()["search"]) == plain_state(optimizer.state_dict()["search"])
    optimizer.finish()
    replayer.finish()
    assert same(values(again), values(params))
    whole = make_params(dtype)
    assert make(key, variant, whole, seed=5).replay(tmp_path / "log") == STEPS
    assert same(values(whole), values(params))
    assert not same(values(whole), values(make_params(dtype)))


@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_records_of_other_bytes_are_replayed_or_told_in_one_line(key, variant, tmp_path):
    """Of one who knows how to make a log: its check sums are right."""
    params = make_params()
    optimizer = make(key, variant, params, seed=5)
    optimizer.record(tmp_path / "log")
    train(optimizer, Closure(params), 6)
    whole, chosen = list(Trajectory.open(tmp_path / "log")), random.Random(f"{key} {variant}")
    for number in range(40):
        again = make(key, variant, make_params(), seed=5)
        log = Trajectory(tmp_path / f"log-{number}", optimizer.trajectory.header)
        other = chosen.randrange(len(whole))
        for step, payload in enumerate(whole):
            if step == other and payload:
                at, how = chosen.randrange(len(payload)), chosen.randrange(3)
                put = bytes([chosen.choice((0, 1, 127, 128, 255, chosen.randrange(256)))])
                payload = payload[:at] + (b"" if how == 1 else put) + payload[at + (how != 2) :]
            log.append(payload)
        log.close()
        try:
            again.replay(tmp_path / f"log-{number}")
        except UserError as error:
            assert str(error) and "\n" not in str(error)


def test_replay_refuses_a_log_of_other_options_or_another_base(tmp_path):
    """A log that does not say its settings, as early ones did not."""

    def record(optimizer, name):
        optimizer.trajectory = Trajectory(tmp_path / name, {"optimizer": optimizer.name, "seed": 0})

    params = make_params()
    optimizer = make("gld", "magnitude", params)
    record(optimizer, "log")
    train(optimizer, Closure(params), 5)
    shifted = make_params(values={name: value[::-1].copy() for name, value in start().items()})
    with pytest.raises(UserError, match=r"replay: step 0 must select .*'dense.weight'; another base?"):
        make("gld", "magnitude", shifted).replay(tmp_path / "log")
    params = make_params()
    with pytest.raises(UserError, match=r"replay: a record must .*; other options\?"):
        GLD(list(params.items())[:1], radius=0.4).replay(tmp_path / "log")
    plain = make_params()
    optimizer = GLD(plain.items(), radius=0.4)
    record(optimizer, "long")
    optimizer.step(Closure(plain, lambda p, t: 1.0))
    with pytest.raises(UserError, match="replay: a record must hold what the optimizer asks for, got a longer one"):
        replayed = STP(make_params().items())
        replayed.name = "GLD"
        replayed.replay(tmp_path / "long")
    optimizer = GLD(plain.items(), radius=0.4, check=False)
    record(optimizer, "many")
    lowest = iter([2.0] * 5 + [1.0] + [3.0] * 10)
    optimizer.step(lambda: next(lowest))
    with pytest.raises(UserError, match=r"replay: a record must name candidates below 3, got 5; other options\?"):
        GLD(make_params().items(), candidates=2).replay(tmp_path / "many")
    optimizer = GLD(list(plain.items())[:1], radius=0.4)
    record(optimizer, "short")
    optimizer.predicted_lr = lambda t: [0.4]
    optimizer.step(Closure(plain, lambda p, t: 1.0))
    with pytest.raises(UserError, match="replay: a record must hold what the optimizer asks for, got a shorter one"):
        replayer = GLD(list(make_params().items())[:1], radius=0.4)
        replayer.predicted_lr = lambda t: [0.4]
        replayer.momentum_weighted = replayer.momentum = 0.5
        replayer.replay(tmp_path / "short")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "rademacher"}, "MeZO: noise must be 'gaussian', as the log says, got 'rademacher'"),
        ({"rank": 2}, "MeZO: rank must be 1, as the log says, got 2"),
        ({"rank": None}, "MeZO: rank must be 1, as the log says, got None"),
        ({"seed": 1}, "MeZO: seed must be 0, as the log says, got 1"),
        ({"eps": 0.2}, "MeZO: eps must be 0.1, as the log says, got 0.2"),
        ({"samples": 2}, "MeZO: samples must be 1, as the log says, got 2"),
        ({"lr": 5.0, "patience": 3, "check": False}, None),
    ],
)
def test_a_log_names_the_settings_that_its_bits_depend_on(options, message, tmp_path):
    params = make_params()
    options = {"rank": 1, "eps": 0.1, **options}
    optimizer = MeZO(params.items(), eps=0.1, rank=1, check=False)
    optimizer.record(tmp_path / "log")
    train(optimizer, Closure(params), 2)
    again = make_params()
    replayer = MeZO(again.items(), **options)
    if message is None:
        replayer.replay(tmp_path / "log")
        assert same(values(again), values(params))
        return
    with pytest.raises(UserError, match=f"^{message}$"):
        replayer.replay(tmp_path / "log")
    assert same(values(again), values(make_params()))


def test_a_log_names_its_optimizer_tensors_and_groups(tmp_path):
    params = make_params()
    groups = [{"params": [item], "eps": 0.1 * (i + 1)} for i, item in enumerate(params.items())]
    optimizer = MeZO(groups)
    optimizer.record(tmp_path / "log")
    renamed = [{"params": [(name + "x", p) for name, p in g["params"]], "eps": g["eps"]} for g in groups]
    for other, told in (
        (MeZO(list(params.items())), "eps must be '.*', as the log says, got "),
        (MeZO(groups[:-1]), "eps must be '.*', as the log says, got "),
        (MeZO(renamed), "tensors must be those of the log in names, shapes and dtypes, got others"),
        (GLD(params.items()), "optimizer must be 'MeZO', as the log says, got 'GLD'"),
    ):
        with pytest.raises(UserError, match=f"^{other.name}: {told}"):
            other.replay(tmp_path / "log")


@pytest.mark.parametrize("evaluator", ["walk", "snapshot"])
@pytest.mark.parametrize("key", ["gld", "mezo", "stp"])
def test_a_log_names_the_weights_that_it_starts_from(key, evaluator, tmp_path):
    params = make_params(torch.float32)
    optimizer = make(key, "plain", params, evaluator=evaluator)
    log = optimizer.record(tmp_path / "log")
    train(optimizer, Closure(params), 4)
    others = make_params(torch.float32)
    with torch.no_grad():
        others["dense.bias"][0].nextafter_(torch.tensor(9.0))  # one last bit
    before = values(others)
    message = (
        f"must be those that the log starts from, with check sum {log.header['start']}, got [0-9a-f]{{8}}; another"
    )
    with pytest.raises(UserError, match=rf"^{optimizer.name}: parameters {message} base model\?$"):
        make(key, "plain", others, evaluator=evaluator).replay(tmp_path / "log")
    assert same(values(others), before)
    turned = dict(reversed(make_params(torch.float32).items()))
    make(key, "plain", turned, evaluator=evaluator).follow(log.header)  # the order of tensors is not their values


def test_a_log_from_before_it_named_its_start_and_version_is_read(tmp_path):
    """Its rates are doubles: 9 bytes in each of these steps."""
    params = make_params()
    optimizer = make("mezo", "plain", params)
    optimizer.trajectory = Trajectory(tmp_path / "log", optimizer.header())
    train(optimizer, Closure(params), 4)
    again = make_params()
    assert {len(payload) for payload in optimizer.trajectory} == {9 + 8}
    assert make("mezo", "plain", again).replay(tmp_path / "log") == 4
    assert same(values(again), values(params))


def test_a_log_begun_in_the_middle_is_replayed_from_there(tmp_path):
    params = make_params()
    optimizer = make("mezo", "plain", params)
    train(optimizer, Closure(params), 2)
    state, middle = optimizer.state_dict(), values(params)
    optimizer.record(tmp_path / "log")
    train(optimizer, Closure(params), 4, first=2)
    with pytest.raises(UserError, match="MeZO: replay must begin at step 2, as the log does, got an optimizer at st"):
        make("mezo", "plain", make_params()).replay(tmp_path / "log")
    replayer = make("mezo", "plain", make_params())
    replayer.load_state_dict(state)
    with pytest.raises(UserError, match="MeZO: parameters must be those that the log starts from"):
        replayer.replay(tmp_path / "log")
    again = make_params(values={name: value.numpy() for name, value in middle.items()})
    replayer = make("mezo", "plain", again)
    replayer.load_state_dict(state)
    replayer.replay(tmp_path / "log")
    assert same(values(again), values(params))


def test_replay_with_predicted_radii_logs_less(tmp_path):
    rates = lambda t: [0.4 * schedules.linear(t, STEPS, FLOOR)]  # noqa: E731
    sizes, ends = [], []
    for predicted in (None, rates):
        params = make_params()
        optimizer = make("gld", "plain", params)
        optimizer.predicted_lr = predicted
        optimizer.record(tmp_path / f"{predicted is None}")
        train(optimizer, Closure(params), STEPS)
        again = make_params()
        replayer = make("gld", "plain", again)
        replayer.predicted_lr = predicted
        replayer.replay(tmp_path / f"{predicted is None}")
        assert same(values(again), values(params))
        sizes.append((tmp_path / f"{predicted is None}").stat().st_size)
        ends.append(values(params))
    assert same(*ends)
    assert 0 < sizes[0] - sizes[1] < 9 * STEPS


@pytest.mark.parametrize("key", ["mezo", "gld"])
def test_scheduled_rates_are_read_from_a_saved_state_on_and_after_a_failed_step(key, tmp_path):
    params = make_params()
    optimizer = make(key, "plain", params)
    log = optimizer.record(tmp_path / "log")
    train(optimizer, Closure(params), 4)
    state, middle = plain_state(optimizer.state_dict()), values(params)

    def failing():
        raise RuntimeError("out of memory")

    train(optimizer, Closure(params), 2, first=4)
    optimizer.param_groups[0]["lr"] *= 0.3
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    train(optimizer, Closure(params), 4, first=6)
    again = make_params()
    make(key, "plain", again).replay(tmp_path / "log")
    assert same(values(again), values(params))
    again = make_params(values={name: value.numpy() for name, value in middle.items()})
    resumed = make(key, "plain", again)
    resumed.load_state_dict(state)
    for step in range(4, len(log)):
        resumed.replay_step(log[step])
    assert same(values(again), values(params))


def test_a_second_log_begins_with_the_radii(tmp_path):
    params = make_params()
    optimizer = make("gld", "plain", params, radius=0.4)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.record(tmp_path / "one")
    optimizer.step(Closure(params))
    state, base = optimizer.state_dict(), values(params)
    optimizer.record(tmp_path / "two")
    optimizer.step(Closure(params))
    again = make_params(values={name: value.numpy() for name, value in base.items()})
    replayer = make("gld", "plain", again, radius=0.4)
    replayer.load_state_dict(state)
    replayer.param_groups[0]["lr"] = 0.4
    replayer.replay(tmp_path / "two")
    assert same(values(again), values(params))


@pytest.mark.parametrize("stop", [7])
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_stop_and_resume_is_the_straight_run(key, variant, stop):
    straight = make_params(torch.float32)
    optimizer = make(key, variant, straight, seed=5)
    closure = Closure(straight)
    losses = train(optimizer, closure, stop)
    file = io.BytesIO()
    torch.save({"model": values(straight), "optimizer": optimizer.state_dict()}, file)
    losses += train(optimizer, closure, STEPS - stop, stop)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = make_params(torch.float32)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["model"][name])
    resumed = make(key, variant, params, seed=5)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.t == stop
    assert train(resumed, Closure(params), STEPS - stop, stop) == losses[stop:]
    assert same(values(params), values(straight))
    assert plain_state(resumed.state_dict()) == plain_state(optimizer.state_dict())
    optimizer.finish()
    resumed.finish()
    assert same(values(params), values(straight))


@pytest.mark.parametrize("key", sorted(OPTIMIZERS))
def test_a_copy_is_made_by_its_state(key):
    optimizer = OPTIMIZERS[key](make_params().items())
    message = f"^{optimizer.name}: an optimizer must be copied by its state, got copy or pickle; make another over"
    for copied in (copy.copy, copy.deepcopy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())):
        with pytest.raises(UserError, match=message):
            copied(optimizer)


def test_a_state_of_another_optimizer_is_refused():
    params = make_params()
    state = make("gld", "plain", params, seed=5).state_dict()
    for other, message in [
        (
            make("gld", "plain", params, seed=6),
            "GLD: seed must be 5, as the state says, got 6",
        ),
        (
            make("gld", "plain", params, seed=5, noise="rademacher"),
            "GLD: noise must be 'gaussian', as the state says",
        ),
        (make("gld", "options 2x2", params, seed=5), "GLD: options must be None, as the state says, got"),
        (make("gld", "plain", dict(reversed(params.items())), seed=5), "GLD: state_dict must be of the parameters"),
    ]:
        with pytest.raises(UserError, match=message):
            other.load_state_dict(copy.deepcopy(state))
    torch_state = torch.optim.SGD(list(params.values()), lr=1.0).state_dict()
    with pytest.raises(UserError, match="GLD: state_dict must come from a forward optimizer, got no 'search'"):
        make("gld", "plain", params).load_state_dict(torch_state)


# No trace ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_weights_keep_their_bits_when_nothing_is_better(key, variant, dtype):
    """All losses equal: the lowest index, which is "no change", wins everywhere."""
    params = make_params(dtype)
    before = values(params)
    optimizer = make(key, variant, params, penalty=0.0)
    for group in optimizer.param_groups:
        group["penalty"] = group["weight_decay"] = 0.0
    closure = Closure(params, lambda p, t: 1.5)
    assert train(optimizer, closure, 4) == [1.5] * 4
    optimizer.finish()
    assert same(values(params), before)
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key", "variant"), DIRECT)
def test_the_update_moves_the_weights_to_what_the_closure_saw(key, variant, dtype):
    """Bit for bit the point measured lowest (with what is still pending): the update's noise is the probe's."""
    params = make_params(dtype)
    optimizer = make(key, variant, params, check=False)
    for group in optimizer.param_groups:
        group["penalty"] = 0.0
    closure = Closure(params, record=True)
    random_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is the point
    moves = 0

    def check(t):
        nonlocal moves
        losses = [loss for _, loss in closure.seen]
        if variant.startswith(("parallel", "momentum parallel")):
            assert len(closure.seen) == 1 + 3 * 5
            for i, (name, p) in enumerate(params.items()):
                own = [0, *range(1 + 5 * i, 6 + 5 * i)]
                winner = min(own, key=lambda j: (losses[j], j))
                assert torch.equal(p, closure.seen[winner][0][name])
                moves += winner > 0
        else:
            with optimizer.space.at(optimizer.space.deltas([optimizer.pending()])[0]):
                now = values(params)
            if "confirm" in variant:
                assert any(same(now, seen) for seen, _ in closure.seen)
            else:
                assert same(now, closure.seen[losses.index(min(losses))][0])
            moves += losses.index(min(losses)) > 0
        closure.seen.clear()

    train(optimizer, closure, STEPS, each=check)
    assert moves > 2
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert np.array_equal(np.random.get_state()[1], random_state[1])  # noqa: NPY002


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "entries", "pool", "momentum", "options 2x2"])
def test_measuring_leaves_no_trace(variant, dtype):
    params = make_params(dtype)
    optimizer = make("gld", variant, params)
    closure = Closure(params)
    train(optimizer, closure, 5)
    space, before = optimizer.space, values(params)
    points = [
        (*point(1e3, Direction(4, 0, block)), *point(-0.1, Direction(2, 1, ALL)), *point(1e-3, Direction(3, 2, block)))
        for block in [*space.blocks, ALL]
    ]
    where = Snapshot(space, closure)
    first = where.losses([ORIGIN, *points, ORIGIN])
    assert same(values(params), before)
    assert where.losses([*reversed(points), ORIGIN]) == [*reversed(first[1:-1]), first[0]]
    assert same(values(params), before)

    def failing():
        failing.calls += 1
        if failing.calls == 3:
            raise RuntimeError("out of memory")
        return 1.0

    failing.calls = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert same(values(params), before)


@pytest.mark.parametrize("key", sorted(OPTIMIZERS))
def test_parameter_order_is_irrelevant_to_the_noise(key):
    params = make_params()
    spaces = [make(key, "plain", dict(order), seed=8).space for order in (params.items(), reversed(params.items()))]
    for block in [ALL, *spaces[0].blocks]:
        found = [{d.name: d.values for d in space.deltas([point(0.5, Direction(3, 1, block))])[0]} for space in spaces]
        assert same(*found)
        expected = Noise(8, spaces[0].noise.distribution).fill("dense.bias", 3, 1, 0, 4).double() * 0.5
        whole = "dense.bias" in found[0] and spaces[0].block(block).whole
        assert not whole or torch.equal(found[0]["dense.bias"], expected)
    variant = {"gld": "parallel"}.get(key, "plain")
    ends = []
    for flip in (False, True):
        mine = make_params()
        optimizer = make(key, variant, dict(reversed(mine.items())) if flip else mine, seed=8)
        train(optimizer, Closure(mine), STEPS)
        ends.append(values(mine))
    assert same(*ends)


# Decisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "variant"), DIRECT)
def test_a_loss_that_is_not_a_number_never_wins(key, variant):
    params = make_params()
    optimizer = make(key, variant, params, check=False)
    before = values(params)

    def only_here(p, t):
        return 1.0 if all(np.array_equal(p[name], before[name].numpy()) for name in p) else math.nan

    train(optimizer, Closure(params, only_here), 3)
    optimizer.finish()
    assert same(values(params), before)
    # and the other way round: any finite loss beats the weights' own that is not a number
    params = make_params()
    optimizer = make(key, variant, params, check=False)
    for group in optimizer.param_groups:
        group["penalty"] = 0.0
    closure = Closure(params, lambda p, t: math.nan if only_here(p, t) == 1.0 else 2.0)
    closure.t = 0
    assert optimizer.step(closure) == 2.0
    optimizer.finish()
    if "confirm" not in variant:
        assert not same(values(params), before)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("key", sorted(OPTIMIZERS))
def test_losses_without_a_number_change_nothing(key, value, tmp_path):
    params = make_params()
    optimizer = make(key, "plain", params)
    optimizer.record(tmp_path / "log")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = optimizer.step(Closure(params, lambda p, t: value))
    assert math.isnan(found) if cases.OPTIMIZERS[key].estimates else found == math.inf
    assert same(values(params), values(make_params()))


@pytest.mark.parametrize(
    ("key", "variant", "winner"), [("gld", "plain", 1.0), ("stp", "plain", 1.0), ("smtp", "none", -1.0)]
)
def test_among_equals_the_first_wins(key, variant, winner):
    params = make_params(values={"w": np.zeros(3)})
    optimizer = make(key, variant, params, seed=2)
    optimizer.step(Closure(params, lambda p, t: float(not p["w"].any())))
    z = Noise(2).fill("w", 0, 0, 0, 3).double()
    torch.testing.assert_close(params["w"].detach(), winner * optimizer.param_groups[0]["lr"] * z, rtol=0, atol=0)


def test_penalty_decides():
    """Losses are equal, so the smallest norm of the tensor searched wins, and the loss reported is without penalty."""
    for squared in (False, True):
        params = make_params()
        optimizer = make("gld", "penalty", params, squared=squared, check=False)
        closure = Closure(params, lambda p, t: 0.25, record=True)
        assert optimizer.step(closure) == 0.25
        first = [seen["dense.weight"].norm() for seen, _ in closure.seen[:6]]
        assert params["dense.weight"].detach().norm() == min(first)
    params = make_params(values={"w": np.array([3.0, 4.0])})
    optimizer = GLD(params.items(), radius=1.0, penalty=0.5, check=False)
    space, points = optimizer.space, [ORIGIN, point(1.0, Direction(0, 0, "w"))]
    moved = np.array([3.0, 4.0]) + Noise(0).fill("w", 0, 0, 0, 2).double().numpy()
    assert optimizer._penalised([1.0, 1.0], points, "w") == pytest.approx([3.5, 1 + 0.5 * np.linalg.norm(moved)])
    optimizer.param_groups[0]["squared"] = True
    assert optimizer._penalised([1.0, 1.0], points, "w") == pytest.approx([13.5, 1 + 0.5 * np.sum(moved**2)])
    both = (*point(1.0, Direction(0, 0, "w")), *point(2.0, Direction(1, 0, "w")))
    twice = moved + 2 * Noise(0).fill("w", 1, 0, 0, 2).double().numpy()
    assert space.squared_norms("w", [both]) == pytest.approx([np.sum(twice**2)])


# Forward passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [None, 3])
def test_algorithm_1_measures_no_point_twice(entries):
    params = make_params()
    optimizer = GLD(params.items(), radius=0.4, candidates=5, entries=entries)
    closure = Closure(params, record=True)
    train(optimizer, closure, STEPS)
    assert optimizer.forward_passes == closure.calls == 2 + STEPS * (1 + 3 * 5)
    per_step = [closure.seen[2 + 16 * t : 18 + 16 * t] for t in range(STEPS)]
    assert all(len({str(plain_state(seen)) for seen, _ in step}) == 16 for step in per_step)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_forecast_is_what_is_spent(key, variant, check):
    params = make_params()
    optimizer = make(key, variant, params, check=check)
    closure = Closure(params)
    state = plain_state(optimizer.state_dict())
    forecast = optimizer.forecast(STEPS)
    assert plain_state(optimizer.state_dict()) == state and closure.calls == 0
    long = optimizer.forecast(1000)
    train(optimizer, closure, 5)
    assert optimizer.forward_passes == closure.calls
    rest, spent = optimizer.forecast(STEPS - 5), closure.calls
    train(optimizer, closure, STEPS - 5, 5)
    assert optimizer.forward_passes == closure.calls
    if "confirm" in variant:  # whether the current loss is known already depends on the losses
        assert forecast <= closure.calls <= forecast + 2 * 3 * STEPS
    else:
        assert forecast == closure.calls
        assert rest == closure.calls - spent
        if "linear" not in variant and "norm" not in variant:  # as many passes in every step
            assert long == forecast + (1000 - STEPS) * optimizer.forecast(1)
    assert optimizer.forecast(0) == 0


@pytest.mark.parametrize(("key", "variant"), VARIANTS)
def test_a_rehearsal_changes_nothing(key, variant):
    ends = []
    for rehearse in (False, True):
        params = make_params()
        optimizer = make(key, variant, params)
        closure = Closure(params)
        if rehearse:
            before = plain_state(optimizer.state_dict())
            passes = optimizer.rehearse(closure)
            assert passes == optimizer.forecast(1) - 2 == closure.calls >= 1  # a rehearsal checks no repetition
            assert plain_state(optimizer.state_dict()) == before
        train(optimizer, closure, 5)
        ends.append((values(params), plain_state(optimizer.state_dict())))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_the_first_step_warns_when_the_loss_of_one_point_changes():
    params = make_params()
    calls = itertools.count()
    with pytest.warns(
        UserWarning, match="STP: the loss at one point must not change within a step, got 0 then 1; is dropout"
    ):
        STP(params.items()).step(lambda: float(next(calls)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STP(params.items(), check=False).step(lambda: float(next(calls)))
        optimizer = STP(params.items())
        optimizer.step(lambda: math.nan)
        optimizer.step(lambda: float(next(calls)))


# Evaluators ----------------------------------------------------------------------------------------------------------


class HeadClosure:
    """The loss of a head of two layers, with a session."""

    def __init__(self, activation: str, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.features, self.labels = draw(16, 6), torch.arange(16) % 3
        self.names = ("dense.weight", "dense.bias", "out.weight", "out.bias")
        shapes = ((5, 6), (5,), (3, 5), (3,))
        self.params = {n: nn.Parameter(draw(*shape) * 0.5) for n, shape in zip(self.names, shapes, strict=True)}
        self.activation = activation
        self.act = {"relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}[activation]

    def __call__(self) -> Tensor:
        w1, b1, w2, b2 = self.params.values()
        hidden = self.act(nn.functional.linear(self.features, w1, b1))
        return nn.functional.cross_entropy(nn.functional.linear(hidden, w2, b2), self.labels)

    def session(self):
        tensors = [p.detach() for p in self.params.values()]
        inner = HeadSession(*tensors, activation=self.activation, names=self.names, features=self.features)
        labels = self.labels

        class Losses_:
            def losses(self, candidates):
                logits = inner.logits(candidates)
                return (
                    nn.functional.cross_entropy(logits, labels.expand(len(logits), -1), reduction="none")
                    .mean(1)
                    .tolist()
                )

            def commit(self, changes):
                inner.commit(changes)

        return Losses_()


@pytest.mark.parametrize("activation", [o["activation"] for o in cases.EVALUATORS["session"].good])
@pytest.mark.parametrize(
    "variant",
    ["plain", "entries", "penalty", "pool", "pool whole", "parallel", "momentum entries", "options 2x2", "options 3x1",
     "confirm 2x2", "gldsearch", "stp", "smtp"],
)  # fmt: skip
def test_evaluators_agree(variant, activation, monkeypatch):
    """At every point that training meets, committed beginnings included."""
    closure = HeadClosure(activation)
    key, variant = (variant, "plain") if variant in OPTIMIZERS else ("gld", variant)
    optimizer = make(key, variant, closure.params)
    largest, met = 0.0, 0

    class Both(Session):
        def losses(self, points, shared=None):
            nonlocal largest, met
            found = super().losses(points, shared)
            expected = Snapshot(self.space, closure).losses(points)
            largest = max(largest, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
            met += len(points)
            return found

    monkeypatch.setattr(shell, "evaluator", lambda space, given, *_: Both(space, given.session))
    with torch.no_grad():
        first = float(closure())
    for _ in range(6):
        optimizer.step(closure)
    optimizer.finish()
    assert largest < 1e-5
    assert met == optimizer.forward_passes
    with torch.no_grad():
        assert float(closure()) < first
    assert all(p.grad is None for p in closure.params.values())


def test_a_closure_with_a_session_is_measured_by_it():
    closure = HeadClosure("relu")
    space = Space(closure.params, Noise(0))
    assert isinstance(shell.evaluator(space, closure), Session)
    assert isinstance(shell.evaluator(space, closure.__call__), Snapshot)


# Descent -------------------------------------------------------------------------------------------------------------

DESCENDS = [(key, variant) for key, case in sorted(cases.OPTIMIZERS.items()) for variant in case.descends]


@pytest.mark.parametrize(("key", "variant"), DESCENDS)
def test_every_optimizer_comes_near_a_minimum(key, variant):
    params = make_params(torch.float32)
    optimizer = make(key, variant, params, check=False)
    for group in optimizer.param_groups:
        group["penalty"] = 0.0
    closure = Closure(params, bowl)
    first = closure()
    for step in range(2000):
        if optimizer.step(closure) < first / 100:
            break
        if step % 40 == 39:
            for group in optimizer.param_groups:
                group["lr"] *= 0.85
    optimizer.finish()
    assert closure() < first / 100
    assert step < 1500


def test_every_optimizer_has_a_variant_that_descends():
    assert {key for key, _ in DESCENDS} == set(OPTIMIZERS)


# Groups and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "entries", "pool", "options 2x2", "momentum", "magnitude"])
def test_a_group_added_later(variant):
    """Added before the first step, it is as if it had been there; added later, what was learned is kept."""
    ends = []
    for late in (False, True):
        params = make_params()
        items = list(params.items())
        options = cases.OPTIMIZERS["gld"].variants[variant]
        groups = [{"params": items[:2]}, {"params": items[2:], "lr": 0.1}]
        optimizer = GLD(groups[:1] if late else groups, **options)
        if late:
            optimizer.add_param_group({"params": iter(items[2:]), "lr": 0.1})
        train(optimizer, Closure(params), 5)
        ends.append(values(params))
    assert same(*ends)

    params = make_params()
    items = list(params.items())
    optimizer = GLD(items[:2], **cases.OPTIMIZERS["gld"].variants[variant])
    train(optimizer, Closure(params), 6)
    before = optimizer.state_dict()["search"]
    buffers = {kind: values(tensors) for kind, tensors in before["buffers"].items()}
    optimizer.add_param_group({"params": items[2:]})
    after = optimizer.state_dict()["search"]
    assert plain_state(after["chosen"]) == plain_state(before["chosen"])
    for kind, tensors in buffers.items():
        assert same({name: after["buffers"][kind][name] for name in tensors}, tensors)
        assert torch.equal(after["buffers"][kind]["out.weight"], torch.zeros(2, 4, dtype=torch.float64))
    train(optimizer, Closure(params), 6, 6)
    optimizer.finish()
    assert not torch.equal(params["out.weight"].detach(), torch.tensor(start()["out.weight"]))


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    params = make_params()
    items = list(params.items())
    optimizer = GLD(items[:2], radius=0.4)
    for group, message in [
        ({"params": items[2:], "lr": -1.0}, "GLD: radius must be > 0 and finite for tensor 'out.weight', got -1.0"),
        ({"params": items[:1]}, "GLD: parameter names must be distinct, got 'dense.weight' twice"),
        ({"params": [params["out.weight"]]}, r"GLD: a later group must give \(name, tensor\) pairs, got a bare tensor"),
        ({"params": items[2:], "radius": 1.0}, r"GLD: group options must be among .*'lr'.*, got \['radius'\]"),
        ({"params": [("tied", nn.Parameter(params["dense.bias"].data))]}, "got 'tied' tied to 'dense.bias'"),
    ]:
        with pytest.raises(UserError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1 and list(optimizer.space.tensors) == ["dense.weight", "dense.bias"]
        optimizer.step(Closure(params))


@pytest.mark.parametrize("key", ["gld", "mezo", "mezoadam"])
def test_a_group_added_where_a_schedule_or_the_weights_have_moved_the_others(key):
    """Rates may be zero and weights larger than eps was checked for: only the new group is measured anew."""
    params = make_params()
    (name, tensor), *others = params.items()
    optimizer = OPTIMIZERS[key]([(name, tensor)])
    optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        tensor.mul_(1e15)
    message = f"must be > 0 and finite for tensor '{others[0][0]}', got 0.0"
    with pytest.raises(UserError, match=message):
        optimizer.add_param_group({"params": others, "lr": 0.0})
    assert list(optimizer.space.tensors) == [name]
    optimizer.add_param_group({"params": others, "lr": 0.1})
    before = values(params)
    optimizer.step(lambda: sum(float((other**2).sum()) for _, other in others))
    assert torch.equal(tensor, before[name]) and not same(values(params), before)


@pytest.mark.parametrize("key", sorted(OPTIMIZERS))
def test_options_that_are_refused(key):
    for options, message in cases.OPTIMIZERS[key].bad:
        with pytest.raises(UserError, match=message) as caught:
            OPTIMIZERS[key](make_params().items(), **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "options", "wrong"),
    [
        ("mezo", {"samples": 0, "clip": -1.0, "estimate": "three-point"}, ("samples", "unknown estimate", "clip")),
        ("mezo", {"sample_schedule": "lin", "sample_steps": 3}, ("unknown sample_schedule",)),
        ("mezo", {"lr": -1.0, "eps": 0.0, "penalty": -1.0, "entries": 0}, ("lr", "eps", "penalty", "entries")),
        ("gld", {"sweep": "turn", "momentum": 1.0, "confirm": True}, ("unknown sweep", "momentum", "confirm")),
        ("gld", {"radius": 0.0, "candidates": 0, "penalty": -1.0}, ("radius", "candidates", "penalty")),
    ],
)
def test_options_that_are_refused_are_told_at_once(key, options, wrong):
    with pytest.raises(UserError) as caught:
        OPTIMIZERS[key](make_params().items(), **options)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(wrong) and all(f": {name} " in line for name, line in zip(wrong, lines, strict=True))


@pytest.mark.parametrize("key", sorted(OPTIMIZERS))
def test_parameters_that_are_refused(key):
    kind = OPTIMIZERS[key]
    w = nn.Parameter(torch.zeros(2, 3))
    for params, message in [
        ([], f"{kind.name}: params must hold at least one tensor that requires_grad, got none"),
        ([("w", torch.zeros(2))], "params must hold at least one tensor that requires_grad, got none"),
        ([("w", 3)], rf"{kind.name}: params must be tensors or \(name, tensor\) pairs, got int"),
        (
            [("w", w), ("w", nn.Parameter(torch.zeros(1)))],
            f"{kind.name}: parameter names must be distinct, got 'w' twice",
        ),
        ([("a", w), ("b", nn.Parameter(w.data))], "space: tensors must be distinct, got 'b' tied to 'a'; pass it once"),
        ([("a", nn.Parameter(torch.zeros(2, 3).t()))], r"space: tensor 'a' must be contiguous, got strides \(1, 3\)"),
        ([("a", nn.Parameter(torch.zeros(0)))], "space: tensor 'a' must hold floats, got 0 of torch.float32"),
        (
            [("a", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))],
            "'a' must hold floats, got 2 of torch.complex64",
        ),
        ([{"params": [("w", w)], "radius": 1.0}], rf"{kind.name}: group options must be among .*, got \['radius'\]"),
    ]:
        with pytest.raises(UserError, match=message):
            kind(params)
    with pytest.raises(UserError, match=f"{kind.name}: step needs a closure that returns the loss, got NoneType"):
        kind([w]).step(None)


@pytest.mark.parametrize(
    ("selection", "options"), [(n, o) for n, case in sorted(cases.SELECTIONS.items()) for o in case.good]
)
def test_selections(selection, options):
    params = make_params(values={"w": np.array([0.1, -3.0, 2.0, -2.0, 0.0, 1.0])})
    optimizer = GLD(params.items(), radius=0.1, selection=selection, check=False, **options)
    closure = Closure(params, lambda p, t: float(np.sum(p["w"] ** 2)), record=True)
    closure.importance = lambda name, step, **more: torch.arange(6.0).roll(step)
    moved: set[int] = set()
    for t in range(3):
        closure.t = t
        before = params["w"].detach().clone()
        optimizer.step(closure)
        here = {int(i) for seen, _ in closure.seen for i in torch.nonzero(seen["w"] != before).view(-1)}
        assert len(here) == {"all": 6, "fixed": len(options.get("indices", ()))}.get(selection, options.get("entries"))
        if selection == "fixed":
            assert here == set(options["indices"])
        if selection == "random":
            birth = t - t % options.get("reselect_every", 1)
            assert sorted(here) == noise.select(2, 6, 0, "w", birth).tolist()
        if selection == "magnitude" and t == 0:
            assert here == ({1, 2} if options["entries"] == 2 else {0, 1, 2, 3, 5})
        if selection == "fisher":
            birth = t - t % options.get("reselect_every", 10_000)
            assert here == {(4 + birth) % 6, (5 + birth) % 6}
        moved |= here
        closure.seen.clear()
    for bad, message in cases.SELECTIONS[selection].bad:
        with pytest.raises(UserError, match=message):
            GLD(params.items(), selection=selection, **bad)


def test_fisher_needs_a_closure_that_measures_importance():
    params = make_params()
    optimizer = GLD(params.items(), selection="fisher", entries=2, fisher_scale=0.5, fisher_draws=3, fisher_rows=8)
    with pytest.raises(
        UserError, match=r"GLD: selection 'fisher' must have a closure with a method importance.*got none"
    ):
        optimizer.step(lambda: 1.0)
    asked = []
    closure = Closure(params)
    closure.importance = lambda name, step, **options: asked.append((name, step, options)) or torch.zeros(SHAPES[name])
    optimizer.step(closure)
    own = {"scale": 0.5, "draws": 3, "rows": 8}
    assert asked == [(name, 0, {**OPTIONS_OF_IMPORTANCE, **own}) for name in SHAPES]


def test_indices_belong_to_one_tensor():
    with pytest.raises(UserError, match="GLD: indices must be given for a group of one tensor"):
        GLD(make_params().items(), selection="fixed", indices=[1, 0])


def test_frozen_tensors_are_left_out_and_nameless_ones_are_numbered():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3), requires_grad=False)
    c = nn.Parameter(torch.zeros(1))
    assert list(GLD([a, b, c]).space.tensors) == ["param.0", "param.2"]
    assert list(GLD([{"params": [a]}, {"params": ("c", c) and [("c", c)]}]).space.tensors) == ["param.0", "c"]


def test_defaults_are_the_thesis():
    optimizer = GLD(make_params().items())
    assert {k: optimizer.defaults[k] for k in ("lr", "candidates", "selection", "penalty")} == {
        "lr": 5e-3, "candidates": 5, "selection": "random", "penalty": 0.0,
    }  # fmt: skip
    assert GLD(make_params().items(), selection="fisher", entries=2).space.blocks["dense.bias"].lasts == 10_000
    assert GLD(make_params().items(), entries=2).space.blocks["dense.bias"].lasts == 1
    assert GLDSearch(make_params().items(), radius=1e-3, min_radius=3e-5).candidates == 6
    assert SMTP(make_params().items()).momentum == 0.5


# The shell, for whoever writes an optimizer --------------------------------------------------------------------------


class Estimate(ForwardOptimizer):
    """Two points and their difference: a method whose answers are losses."""

    name = "Estimate"

    def __init__(self, params, lr=0.01, **more):
        super().__init__(params, {"lr": lr}, **more)

    def search(self, t):
        z = Direction(t, 0, ALL)
        plus, minus = yield Losses([point(1e-3, z), point(-1e-3, z)])
        return Update(point(-self.param_groups[0]["lr"] * (plus - minus) / 2e-3, z), (plus + minus) / 2)


def test_an_optimizer_that_asks_for_losses_learns_and_replays(tmp_path):
    params = make_params(torch.float32)
    optimizer = Estimate(params.items())
    optimizer.record(tmp_path / "log")
    closure = Closure(params, bowl)
    first = closure()
    losses = [optimizer.step(closure) for _ in range(150)]
    assert closure() < 0.1 * first
    assert optimizer.forward_passes == 2 + 2 * 150
    again = make_params(torch.float32)
    replayer = Estimate(again.items())
    assert [replayer.replay_step(payload) for payload in Trajectory.open(tmp_path / "log")] == losses
    assert same(values(again), values(params))
    broken = Estimate(params.items(), check=False)
    assert broken.step(Closure(params, lambda p, t: 1e300)) != broken.step(closure)  # too large to log: infinite


def test_an_optimizer_must_define_its_search():
    with pytest.raises(TypeError, match="ForwardOptimizer must define search"):
        ForwardOptimizer(make_params().items(), {"lr": 1.0}).step(lambda: 1.0)
