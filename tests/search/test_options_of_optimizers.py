"""What optimizers refuse in one line: options of wrong types, groups that change to nonsense, tensors frozen later,
parameters that are none, states from elsewhere; and that whoever refuses is as before."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from gradientless.errors import UserError
from gradientless.search.optim import GLD, OPTIMIZERS, STP, KieferWolfowitz, MeZO, MeZOAdam, MeZOMomentum, MeZOSign

KINDS = sorted(OPTIMIZERS)
WRONG: dict[str, Any] = {
    "text": "a", "list": [0.1], "dict": {}, "complex": 1j, "tensor": torch.tensor([0.5, 0.5]), "huge": -(10**5000),
    "nan": math.nan, "function": abs,
}  # fmt: skip


def make_params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return {name: nn.Parameter(torch.randn(2, 3, generator=generator)) for name in ("a.weight", "b.weight")}


def loss(params: dict[str, nn.Parameter]):
    return lambda: sum(float((p.detach() ** 2).sum()) for p in params.values())


def make(key: str, **more: Any):
    params = make_params()
    return OPTIMIZERS[key](params.items(), **more), params


def options_of(key: str) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(OPTIMIZERS[key]).parameters.items() if name != "params"}


@pytest.mark.parametrize("key", KINDS)
def test_every_option_refuses_what_is_of_another_type(key):
    """Each option by each value that it cannot hold: one line with its name, no traceback."""
    tried = 0
    for option, parameter in options_of(key).items():
        for name, value in WRONG.items():
            if (option, name) in {("model", "function")}:
                continue
            with pytest.raises(UserError) as caught:
                make(key, **{option: value})
            told = [line for line in str(caught.value).split("\n") if option in line or "fisher" in option]
            assert told and len(str(caught.value)) < 600, (option, name, str(caught.value))
            tried += 1
        if isinstance(parameter.default, bool):
            for value in ("no", "false", 0, 1, None):
                with pytest.raises(UserError, match=rf"{option} must be True or False, got {value!r}"):
                    make(key, **{option: value})
        elif isinstance(parameter.default, int | float):
            for value in (True, None, "1"):
                with pytest.raises(UserError, match=option if "fisher" not in option else "fisher"):
                    make(key, **{option: value})
    assert tried >= 50


@pytest.mark.parametrize(
    ("key", "options", "wrong"),
    [
        ("mezo", {"samples": "a", "evaluator": "x", "rank": 0, "lr": "b", "seed": -1}, "seed rank samples lr"),
        ("mezoadam", {"betas": 1, "adam_eps": "x", "window": 0, "clip": "c", "check": 3}, "check clip window betas"),
        ("mezomomentum", {"momentum": "m", "layerwise": "no", "eps": None}, "layerwise momentum eps"),
        ("gld", {"sweep": 3, "pool": "p", "noise": 4, "candidates": "c", "penalty": math.inf}, "noise sweep pool"),
        ("gldsearch", {"min_radius": "m", "evaluator": 3, "penalty": "p"}, "evaluator min_radius penalty"),
        ("smtp", {"momentum": 2, "resample_every": 0, "radius": "r"}, "resample_every momentum radius"),
        ("kieferwolfowitz", {"patience": 0, "check": None, "lr": -1}, "check patience lr"),
    ],
)  # fmt: skip
def test_options_of_base_estimate_rule_and_groups_are_told_together(key, options, wrong):
    with pytest.raises(UserError) as caught:
        make(key, **options)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(options)
    assert all(any(name in line for line in lines) for name in wrong.split())


@pytest.mark.parametrize("evaluator", ["snapshot", "walk"])
@pytest.mark.parametrize("key", KINDS)
def test_groups_that_change_to_nonsense_between_steps_are_refused(key, evaluator):
    for bad in (math.nan, math.inf, -1.0, "a", None, True, [1.0]):
        for option in ("lr", "penalty", "squared", "eps", "weight_decay", "candidates"):
            optimizer, params = make(key, evaluator=evaluator)
            optimizer.step(loss(params))
            (group,) = optimizer.param_groups
            if option not in group or (option == "squared" and bad is True):
                continue
            group[option] = bad
            before, t = {name: p.detach().clone() for name, p in params.items()}, optimizer.t
            with pytest.raises(
                UserError, match=rf"{optimizer.name}: {'(lr|radius)' if option == 'lr' else option} must"
            ):
                optimizer.step(loss(params))
            assert optimizer.t == t and all(torch.equal(params[name], value) for name, value in before.items())


@pytest.mark.parametrize("key", ["gld", "mezo", "mezosign"])
def test_groups_may_change_to_what_makes_sense(key):
    optimizer, params = make(key)
    (group,) = optimizer.param_groups
    for value in (1e-3, 0.0, 1, 2.5e-2):  # a schedule may end at zero
        group["lr"] = value
        optimizer.step(loss(params))
    group["penalty"], group["squared"] = 0.25, True
    optimizer.step(loss(params))
    for option, value in (("entries", 2), ("selection", "all"), ("reselect_every", 3), ("indices", [0])):
        before = group[option]
        group[option] = value
        with pytest.raises(
            UserError, match=f"^{optimizer.name}: {option} must stay {before!r}, got .*; make another opt"
        ):
            optimizer.step(loss(params))
        group[option] = before
    optimizer.step(loss(params))


@pytest.mark.parametrize("key", KINDS)
def test_a_tensor_that_is_frozen_later_is_told(key):
    optimizer, params = make(key)
    optimizer.step(loss(params))
    params["b.weight"].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in params.items()}
    for ask in (optimizer.step, optimizer.rehearse):
        with pytest.raises(
            UserError, match=f"^{optimizer.name}: parameters must keep requires_grad, got 'b.weight' froz"
        ):
            ask(loss(params))
    assert all(torch.equal(params[name], value) for name, value in before.items())
    others = OPTIMIZERS[key](params.items())
    for _ in range(3):
        others.step(loss(params))
    assert torch.equal(params["b.weight"], before["b.weight"])
    params["b.weight"].requires_grad_(True)
    optimizer.step(loss(params))


def test_frozen_tensors_do_not_stop_a_replay(tmp_path):
    optimizer, params = make("mezo")
    optimizer.record(tmp_path / "log")
    for _ in range(4):
        optimizer.step(loss(params))
    again = make_params()
    replayer = MeZO(again.items())
    for p in again.values():
        p.requires_grad_(False)
    assert replayer.replay(tmp_path / "log") == 4
    assert all(torch.equal(again[name], p) for name, p in params.items())


@pytest.mark.parametrize("key", KINDS)
def test_parameters_that_are_none(key):
    kind, w = OPTIMIZERS[key], nn.Parameter(torch.ones(2, 2))
    for params, found in [
        (nn.Linear(2, 2), "got Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "got Sequential"),
        (w, "got Parameter"),
        (3, "got int"),
        (None, "got NoneType"),
        ("weights", "got str"),
        ({"w": w}, "got dict"),
        ([("w", w, 3)], "got tuple"),
        ([(3, w)], "got tuple"),
        ([{"params": 3}], "got int"),
        ([w * 1.0], "params must be leaf tensors, got 'param.0', which was computed"),
        ([{"lr": 0.1}], "groups must be dicts with 'params', got {'lr': 0.1}"),
        ([{"params": [w]}, w], "groups must be dicts with 'params', got Parameter"),
        ([{"params": [w], "names": ["a", "b"]}], "a group must name each of its 1 params, got 2 names"),
    ]:
        with pytest.raises(UserError) as caught:
            kind(params)
        assert found in str(caught.value) and "\n" not in str(caught.value)


# States --------------------------------------------------------------------------------------------------------------


def plain(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


class Mine(MeZO):
    """A user's, which forgot to name itself."""


class Passing(MeZO):
    """A user's, which hands on what it does not name."""

    name = "Passing"

    def __init__(self, params: Any, lr: float = 0.25, **more: Any):
        super().__init__(params, lr=lr, **more)


ELSEWHERE = [
    (Passing, {"rank": 1}, Passing, {}, "rank must be 1, as the state says, got None"),
    (Passing, {}, Passing, {"samples": 3}, "samples must be 1, as the state says, got 3"),
    (Passing, {"clip": 1.0}, Passing, {"clip": 2.0}, "clip must be 1.0"),
    (GLD, {"fisher_scale": 2.0}, GLD, {}, "fisher_scale must be 2.0, as the state says, got 1.0"),
    (GLD, {"fisher_rows": 8}, GLD, {"fisher_rows": 9}, "fisher_rows must be 8, as the state says, got 9"),
    (MeZO, {}, STP, {}, "optimizer must be 'MeZO', as the state says, got 'STP'"),
    (MeZOAdam, {}, MeZOSign, {}, "optimizer must be 'MeZOAdam', as the state says, got 'MeZOSign'"),
    (GLD, {}, MeZO, {}, "optimizer must be 'GLD'"),
    (MeZO, {}, Mine, {}, "class must be 'MeZO', as the state says, got 'Mine'"),
    (MeZO, {"rank": 2}, MeZO, {}, "rank must be 2, as the state says, got None"),
    (MeZO, {}, MeZO, {"samples": 3}, "samples must be 1, as the state says, got 3"),
    (MeZO, {"clip": 1.0}, MeZO, {"clip": 2.0}, "clip must be 1.0, as the state says, got 2.0"),
    (MeZO, {"layerwise": True}, MeZO, {}, "layerwise must be True"),
    (MeZO, {"noise": "sphere"}, MeZO, {}, "noise must be 'sphere', as the state says, got 'gaussian'"),
    (MeZO, {}, MeZO, {"seed": 4}, "seed must be 0, as the state says, got 4"),
    (MeZO, {"rank": 1, "resample_every": 2}, MeZO, {"rank": 1}, "resample_every must be 2"),
    (MeZOAdam, {"betas": (0.5, 0.9)}, MeZOAdam, {}, r"betas must be \[0.5, 0.9\]"),
    (MeZOAdam, {"window": 3}, MeZOAdam, {}, "window must be 3"),
    (MeZOMomentum, {"window": 3}, MeZOMomentum, {"window": 4}, "window must be 3"),
    (GLD, {"options": (2, 1)}, GLD, {"options": (2, 2)}, r"options must be \[2, 1\], as the state says, got \[2, 2\]"),
    (GLD, {"options": (2, 1), "confirm": True}, GLD, {"options": (2, 1)}, "confirm must be True"),
    (GLD, {"pool": True}, GLD, {}, "pool must be True"),
    (GLD, {"momentum": 0.5}, GLD, {"momentum": 0.25}, "momentum must be 0.5"),
    (KieferWolfowitz, {}, MeZO, {}, "optimizer must be 'KieferWolfowitz'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "other", "theirs", "message"), ELSEWHERE)
def test_a_state_from_elsewhere_is_refused(kind, options, other, theirs, message):
    params = make_params()
    source = kind(params.items(), **options)
    for _ in range(3):
        source.step(loss(params))
    state = source.state_dict()
    mine = make_params()
    target = other(mine.items(), **theirs)
    for _ in range(2):
        target.step(loss(mine))
    before = copy.deepcopy(plain(target.state_dict()))
    with pytest.raises(UserError, match=f"^{target.name}: {message}"):
        target.load_state_dict(copy.deepcopy(state))
    assert plain(target.state_dict()) == before
    again, own = kind(make_params().items(), **options), plain(state)
    again.load_state_dict(copy.deepcopy(state))
    assert plain(again.state_dict()) == own


@pytest.mark.parametrize("key", KINDS)
def test_every_option_is_of_the_settings_or_of_the_groups(key):
    """Or else no bit of what follows depends on it."""
    made, _ = make(key)
    free = {"evaluator", "model", "check", "patience", "fisher_check", "radius"}  # a radius is the group's "lr"
    assert set(options_of(key)) - free <= {*made.settings(), *made.defaults}


@pytest.mark.parametrize("key", KINDS)
def test_a_refusal_leaves_the_optimizer_as_it_was(key):
    """States that are found to be broken at any place, also behind what was already taken over."""
    source, params = make(key)
    for _ in range(3):
        source.step(loss(params))
    state = source.state_dict()
    ends = []
    for broken in (False, True):
        target, mine = make(key)
        target.step(loss(mine))
        if broken:
            for place in ("t", "forward_passes", "method", "chosen", "buffers", "settings"):
                for value in ("gone", "nonsense", 3.5, [[]])[place == "settings" :]:  # which early states lack
                    bad = copy.deepcopy(state)
                    bad["search"][place] = value
                    if value == "gone":
                        del bad["search"][place]
                    try:
                        target.load_state_dict(bad)
                    except UserError as error:
                        assert "\n" not in str(error)
                    else:
                        pytest.fail(f"{place} = {value!r} was taken")
            for change in ({"lr": math.nan}, {"lr": "a"}, {"penalty": -1.0}, {"params": [0]}):
                bad = copy.deepcopy(state)
                bad["param_groups"][0].update(change)
                with pytest.raises(UserError):
                    target.load_state_dict(bad)
        for _ in range(3):
            target.step(loss(mine))
        ends.append((plain(target.state_dict()), plain(dict(mine))))
    assert ends[0] == ends[1]


def test_a_state_of_other_shapes_or_dtypes_is_refused():
    source, params = make("mezo", rank=1)
    source.step(loss(params))
    for other in (
        {name: nn.Parameter(p.detach().T.contiguous()) for name, p in params.items()},
        {name: nn.Parameter(p.detach().to(torch.bfloat16)) for name, p in params.items()},
        {name: nn.Parameter(torch.zeros(7)) for name in params},
    ):
        with pytest.raises(UserError, match="MeZO: tensors must be those of the state in names, shapes and dtypes"):
            MeZO(other.items(), eps=0.1, rank=1).load_state_dict(source.state_dict())


def test_options_of_groups_come_from_the_state():
    """As with torch's optimizers, whose groups may have been changed since they were made."""
    source, params = make("mezo", eps=0.01, penalty=0.5)
    source.param_groups[0]["lr"] = 0.25
    source.step(loss(params))
    target, _ = make("mezo")
    target.load_state_dict(source.state_dict())
    (group,) = target.param_groups
    assert (group["lr"], group["eps"], group["penalty"]) == (0.25, 0.01, 0.5)


def test_every_optimizer_is_tried():
    assert sorted(cases.OPTIMIZERS) == KINDS
