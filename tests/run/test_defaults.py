"""What a run takes that names no recipe: by surface, method and reading; and what is told of it."""

from __future__ import annotations

import pytest

from gradientless.errors import UserError
from gradientless.run.config import RunConfig
from gradientless.run.defaults import defaults
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS


def usual(*overrides, **flags) -> RunConfig:
    named = {key.replace("_", "."): value for key, value in flags.items()}
    return RunConfig.load(None, overrides, named, usual=True)


def test_without_anything_it_is_the_starter_recipe():
    assert usual().differences(RunConfig.load("starter")) == []


@pytest.mark.parametrize("surface", ["full", "lora", "prefix", "k_lst", "bias"])
@pytest.mark.parametrize("optimizer", ["gld", "mezo", "adamw"])
def test_what_is_chosen_for_a_head_reaches_nothing_else(surface, optimizer):
    config, head = usual(surface_name=surface, optimizer_name=optimizer), RunConfig.load("starter")
    assert config.batch_size < head.batch_size and config.steps < head.steps
    assert config.evaluate_every < config.steps
    assert "entries" not in config.optimizer.arguments


@pytest.mark.parametrize("surface", ["head", "full", "lora", "prefix", "lst", "unheard of"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *FIRST_ORDER])
def test_every_method_takes_the_options_that_it_is_given(surface, optimizer):
    if surface == "unheard of":
        with pytest.raises(UserError, match=r"^surface\.name: unknown surface 'unheard of'"):
            usual(surface_name=surface, optimizer_name=optimizer)
        return
    assert usual(surface_name=surface, optimizer_name=optimizer).optimizer.name == optimizer


@pytest.mark.parametrize(("given", "reading"), [
    ({}, "head"),
    ({"model": "starter:smollm2"}, "prompt"),
    ({"model": "starter:smollm2", "surface": {"name": "full", "readout": "head"}}, "head"),
    ({"model": "starter:smollm2", "data": {"path": "own.csv"}}, "head"),
    ({"data": {"path": "own.csv"}, "prompt": {"text": "{text} It was"}}, "prompt"),
    ({"model": "no-such-folder/at/all"}, "head"),
])  # fmt: skip
def test_a_head_starts_from_the_probe_where_a_head_reads(given, reading):
    found = defaults({"surface": {"name": "full"}, **given})
    assert ("start" in found["surface"]) == (reading == "head")


def test_what_is_given_stands_above():
    config = usual("optimizer.lr=0.5", "schedule.name=cosine", "batch_size=3", surface_name="lora", steps=40)
    assert config.optimizer.arguments["lr"] == 0.5 and config.optimizer.arguments["eps"] == 1e-3
    assert (config.schedule.name, config.steps, config.batch_size) == ("cosine", 40, 3)
    assert (config.evaluate_every, config.checkpoint_every) == (8, 8)
    assert usual(surface_name="lora", epochs=2.0).steps is None


@pytest.mark.parametrize(
    ("surface", "optimizer"), [("head", "gld"), ("full", "mezo"), ("prefix", "mezo"), ("lst", "adamw"), ("ia3", "mezo")]
)
def test_a_surface_has_a_usual_method(surface, optimizer):
    assert usual(surface_name=surface).optimizer.name == optimizer


def test_own_data_has_no_task(tmp_path):
    assert usual(data_path="own.csv").task is None
    assert usual(data_path=str(tmp_path)).task is None
    assert RunConfig.load("thesis", [], {"data.path": str(tmp_path)}).task == "sst2"  # whose files lie in that folder
    assert RunConfig.load("thesis", [], {"data.path": str(tmp_path / "own.csv")}).task is None


@pytest.mark.parametrize("option", ["optimizer.noise=gaussian", "optimizer.evaluator=walk", "optimizer.rank=4"])
def test_who_says_how_probes_are_made_says_all_of_it(option):
    key, _, value = option.removeprefix("optimizer.").partition("=")
    options = usual(option, surface_name="full", optimizer_name="mezo").optimizer.arguments
    assert (
        str(options.pop(key)) == value and not {"noise", "rank", "evaluator"} & set(options) and options["lr"] == 1e-5
    )
