"""What a recipe means for the optimizer, tensor by tensor; and what the command line means for a recipe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradientless import cli
from gradientless.run.assemble import make_optimizer, make_rates
from gradientless.run.config import RunConfig

SHAPES = {"head.dense.weight": (6, 6), "head.dense.bias": (6,), "head.out.weight": (2, 6), "head.out.bias": (2,)}


@pytest.fixture
def surface() -> Any:
    tensors = {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}
    return SimpleNamespace(trainable=lambda: tensors, width=6)


def config_of(*overrides: str) -> RunConfig:
    return RunConfig.load(None, overrides)


def test_options_by_name_pattern(surface):
    rules = [
        "{pattern='*.dense.weight', radius=0.1, candidates=3, entries=7, selection='magnitude', reselect_every=9}",
        "{pattern='*.out.weight', selection='fixed', indices=[3, 1], penalty=0.5, squared=true}",
        "{pattern='*.weight', candidates=99}",
    ]
    optimizer = make_optimizer(config_of("optimizer.entries=2*width", f"tensors=[{', '.join(rules)}]"), surface)
    keys = ("lr", "candidates", "entries", "selection", "reselect_every", "indices", "penalty", "squared")
    assert {group["names"][0]: tuple(group[key] for key in keys) for group in optimizer.param_groups} == {
        "head.dense.weight": (0.1, 3, 7, "magnitude", 9, None, 0.0, False),
        "head.dense.bias": (0.005, 5, 12, "random", None, None, 0.0, False),
        "head.out.weight": (0.005, 5, 12, "fixed", None, [3, 1], 0.5, True),
        "head.out.bias": (0.005, 5, 12, "random", None, None, 0.0, False),
    }


def test_a_tensor_of_at_most_s_entries_moves_whole(surface):
    optimizer = make_optimizer(config_of("optimizer.entries=2*width"), surface)
    whole = {
        name: index is None for name in SHAPES for _, index in optimizer.space.entries(optimizer.space.block(name), 0)
    }
    assert whole == {name: name != "head.dense.weight" for name in SHAPES}  # out.weight has just the 12 entries


def test_weight_decay_leaves_normalisations_of_any_shape_alone():
    surface = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm((2, 4)))
    surface.trainable = lambda: {f"tuned.{name}": tensor for name, tensor in surface.named_parameters()}
    config = config_of("optimizer.name=mezo", "optimizer.lr=0.5", "optimizer.weight_decay=0.5")
    assert make_optimizer(config, surface).decay() == {"tuned.0.weight": 0.75}


def test_a_schedule_of_a_tensors_own(surface):
    rule = "{pattern='head.dense.*', radius=0.1, schedule={name='linear', floor=0.5}}"
    config = config_of("optimizer.radius=0.2", "schedule.name=cosine", f"tensors=[{rule}]")
    rates = make_rates(config, make_optimizer(config, surface), surface, 100)
    assert rates(0) == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert rates(50) == pytest.approx([0.075, 0.075, 0.1, 0.1])
    assert rates(100) == pytest.approx([0.05, 0.05, 0.0, 0.0])


def test_a_schedule_moves_first_order_rates_too(surface):
    config = config_of("optimizer.name=adamw", "optimizer.lr=1e-3", "schedule.name=linear")
    rates = make_rates(config, make_optimizer(config, surface), surface, 10)
    assert [rates(t) for t in (0, 5, 9)] == [pytest.approx([1e-3]), pytest.approx([5e-4]), pytest.approx([1e-4])]


@pytest.fixture
def loaded(monkeypatch):
    """loaded(arguments) -> the configuration that `gradientless train` makes of them; nothing is run."""
    seen: list[RunConfig] = []

    def look(config: RunConfig, *how: bool) -> None:
        seen.append(config)
        raise SystemExit(0)

    monkeypatch.setattr("gradientless.cli.train._open_run", look)

    def load(*arguments: str) -> RunConfig:
        with pytest.raises(SystemExit):
            cli.main(["train", *arguments])
        return seen.pop()

    return load


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--model", "owner/name", "model"),
        ("--task", "sst2", "task"),
        ("--data", "rows.csv", "data.path"),
        ("--surface", "head", "surface.name"),
        ("--optimizer", "stp", "optimizer.name"),
        ("--steps", 7, "steps"),
        ("--forward-passes", 700, "forward_passes"),
        ("--epochs", 1.5, "epochs"),
        ("--batch-size", 8, "batch_size"),
        ("--micro-batch-size", 4, "micro_batch_size"),
        ("--max-length", 9, "data.max_length"),
        ("--device", "cpu", "device"),
        ("--dtype", "bfloat16", "dtype"),
        ("--seed", 3, "seed"),
        ("--out", "somewhere", "out"),
        ("--text-column", "a", "data.text_column"),
        ("--text-pair-column", "b", "data.text_pair_column"),
        ("--label-column", "c", "data.label_column"),
        ("--validation", "dev.csv", "data.validation"),
    ],
)
def test_every_plain_option_is_a_key_of_the_recipe(option, value, key, loaded):
    found: Any = loaded(option, str(value))
    assert found == RunConfig.load(None, (), {key: value}, usual=True)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_train_without_an_argument_runs_the_starter_recipe(loaded):
    assert loaded() == RunConfig.load("starter")
