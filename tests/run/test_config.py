"""RunConfig: layers, overrides, and every mistake at once."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from gradientless.errors import UserError
from gradientless.run.config import (
    OptimizerConfig,
    RunConfig,
    optimizer_class,
    optimizer_options,
    resolve_entries,
)
from gradientless.run.layers import parse_value, recipes
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS


def lines(*args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        RunConfig.load(*args, **kwargs)
    return str(caught.value).split("\n")


@pytest.mark.parametrize("name", recipes())
def test_builtin_recipes_resolve_and_are_read_back_equal(name, tmp_path):
    config = RunConfig.load(name)
    file = tmp_path / "config.toml"
    file.write_text(config.toml(), encoding="utf-8")
    assert RunConfig.load(file) == config
    assert RunConfig.load(file).differences(config) == []


def test_thesis_recipe_holds_the_settings_of_the_thesis():
    config = RunConfig.load("thesis")
    expected = {"radius": 5e-3, "candidates": 5, "entries": "2*width", "penalty": 0.05}
    assert config.optimizer.name == "gld" and config.optimizer.arguments == expected
    assert (config.schedule.name, config.schedule.floor) == ("linear", 0.1)
    assert (config.batch_size, config.steps, config.evaluate_every, config.seed) == (64, 80000, 5000, 42)
    assert (config.task, config.model) == ("sst2", "distilbert-base-cased")
    best = RunConfig.load("thesis-best")
    assert best.differences(config) == ["optimizer.radius: 0.0075 here, 0.005 there"]


def test_a_toml_with_everything_is_read_back_equal(tmp_path):
    config = RunConfig.load(
        "thesis",
        [
            "tensors=[{pattern='*.bias', radius=1e-2, schedule={name='cosine', floor=0.2}}, {pattern='*', entries=3}]",
            "optimizer.options=[2, 2]",
            "patience=3",
            "micro_batch_size=8",
        ],
    )
    assert config.tensors[0].arguments == {"radius": 0.01} and config.tensors[0].schedule.floor == 0.2
    file = tmp_path / "config.toml"
    file.write_text(config.toml(), encoding="utf-8")
    assert RunConfig.load(file) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7.5e-3", 0.0075),
        (".5", 0.5),
        ("-3", -3),
        ("true", True),
        ("[2, 2]", [2, 2]),
        ("linear", "linear"),
        ("'5'", "5"),
        ("a/b.csv", "a/b.csv"),
        ("1\nseed = 3", "1\nseed = 3"),
        ("", ""),
    ],
)
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_all_mistakes_at_once():
    found = lines(
        None,
        [
            "steps=0",
            "batch_size=true",
            "task=sst-2",
            "model=starter:minilmm",
            "surface.name=heed",
            "schedule.name=lin",
            "schedule.floor=2",
            "dtype=float33",
            "device=gpu",
            "optimizer.radus=1",
            "optimizer.candidates=x",
            "optimizer.entries=foo",
            "tensors=[{pattern='*', rad=3}]",
            "data.txt=3",
            "optimzer.name=gld",
            "radius=1",
            "novalue",
        ],
    )
    for start in (
        "override: must be key=value, got 'novalue'",
        "steps: must be >= 1, got 0",
        "batch_size: must be a number, got true",
        "task: unknown task 'sst-2'; did you mean 'sst2'?",
        "model: unknown starter model 'starter:minilmm'; did you mean 'starter:minilm'?",
        "surface.name: unknown surface 'heed'; did you mean 'head'?",
        "schedule.name: unknown schedule 'lin'; did you mean 'linear'?",
        "schedule.floor: must be <= 1, got 2",
        "dtype: must be 'float32', 'bfloat16' or 'float16', got 'float33'",
        "device: must be auto, cpu, cuda, cuda:N or mps, got 'gpu'",
        "optimizer: unknown option of gld 'radus'; did you mean 'radius'?",
        "optimizer.candidates: must be a number, got 'x'",
        "optimizer.entries: must be a whole number or 'N*width', got 'foo'",
        "tensors[0]: unknown option of gld 'rad'; did you mean 'radius'?",
        "data: unknown key 'txt'",
        "config: unknown key 'optimzer'; did you mean 'optimizer'?",
        "config: unknown key 'radius'; did you mean 'optimizer.radius'?",
    ):
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == 17


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["batch_size=4", "micro_batch_size=5"], "micro_batch_size: must be <= batch_size (4), got 5"),
        (["micro_batch_size=0"], "micro_batch_size: must be >= 1, got 0"),
        (["batch_size=0"], "batch_size: must be >= 1, got 0"),
        (["steps=1.5"], "steps: must be a whole number, got 1.5"),
        (["seed=-1"], "seed: must be >= 0, got -1"),
        (["steps=5", "schedule.warmup=5"], "schedule.warmup: must be < steps (5), got 5"),
        (["optimizer=gld"], "optimizer: must be a table, got 'gld'"),
        (["optimizer.seed=3"], "optimizer.seed: must be given as the run's seed, got 3"),
        (["optimizer.squared=1"], "optimizer.squared: must be true or false, got 1"),
        (["tensors=[{radius=1}]"], "tensors[0].pattern: must be given, got nothing"),
        (
            ["model=no/such/model"],
            "model: must be starter:NAME, an existing folder or a hub id such as owner/name, got",
        ),
        (["surface.head=librry"], "surface.head: must be 'auto', 'library', 'two-layer' or 'linear', got 'librry'"),
        (["surface.dropout=1"], "surface.dropout: must be < 1, got 1"),
        (["steps=3", "steps=4"], "steps: must be given once, got 3 and 4"),
        (["batch_size=4000000000"], "batch_size: must be <= 16777216, got 4000000000"),
        (["optimizer.radius=0.1", "optimizer={radius=0.2}"], "optimizer.radius: must be given once, got 0.1 and 0.2"),
        (["optimizer={radius=nan}", "optimizer.radius=1"], "optimizer.radius: must be given once, got nan and 1"),
        (["data.path=x", "data=3"], "data: must be given once, got {'path': 'x'} and 3"),
        (["seed=1", "seed.x=2"], "seed.x: must not stand beside a value of 'seed' itself, got 2"),
        (["optimizer.name=nofile.py:X"], "optimizer: must name an existing file in 'file.py:Class', got 'nofile.py:X'"),
    ],
)
def test_one_mistake(overrides, line):
    (found,) = lines(None, overrides)
    assert found.startswith(line)


def test_mistakes_in_building_it_directly():
    with pytest.raises(ValidationError, match="steps: must be >= 1, got 0"):
        RunConfig(steps=0)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FIRST_ORDER])
def test_every_optimizer_has_its_options(name):
    known, takes_others = optimizer_options(name)
    assert known and not takes_others and "seed" not in known and "params" not in known
    assert RunConfig(optimizer={"name": name}).optimizer.name == name
    with pytest.raises(ValidationError, match=f"unknown option of {name} 'no_such'"):
        RunConfig(optimizer={"name": name, "no_such": 1})


class TestLayers:
    def test_own_data_takes_the_place_of_the_task(self):
        config = RunConfig.load("starter", (), {"data.path": "x.csv"})
        assert config.task is None and config.data.path == "x.csv"
        assert RunConfig.load("thesis", ["data.path=folder", "task=sst2"]).task == "sst2"

    def test_a_task_takes_the_place_of_own_data(self, tmp_path):
        recipe = tmp_path / "r.toml"
        recipe.write_text("[data]\npath = 'x.csv'\n")
        config = RunConfig.load(recipe, ["task=sst2"])
        assert config.data.path is None and config.notes == ("data: the recipe's value does not apply, task was given",)

    def test_steps_and_forward_passes_replace_each_other(self):
        config = RunConfig.load("starter", ["forward_passes=900"])
        assert (config.steps, config.forward_passes) == (None, 900)
        both = RunConfig.load("starter", ["forward_passes=900", "steps=5"])
        assert (both.steps, both.forward_passes) == (5, 900)
        assert RunConfig.load("starter", ["epochs=0.5"]).steps is None
        assert RunConfig.load("starter", ["epochs=default"]).steps == RunConfig.load("starter").steps is not None
        assert RunConfig.load(None, ["stages=[{epochs=2}]", "steps=9"]).staged[0].config.steps is None
        assert lines(None, ["epochs=0"]) == ["epochs: must be > 0, got 0"]

    def test_another_optimizer_drops_the_options_of_the_first(self):
        config = RunConfig.load("starter", ["optimizer.lr=1e-3"], {"optimizer.name": "adamw"})
        assert config.optimizer.arguments == {"lr": 1e-3}
        assert config.notes == ("optimizer: the recipe's options of gld do not apply to adamw",)
        assert RunConfig.load("starter", ["optimizer.name=gld"]).optimizer.arguments["candidates"] == 5

    def test_default_takes_a_value_back(self):
        assert "entries" not in RunConfig.load("starter", ["optimizer.entries=default"]).optimizer.arguments

    def test_keys_of_one_table_are_gathered(self):
        config = RunConfig.load("starter", ["optimizer.radius=0.1", "optimizer={name='gld', radius=0.1, candidates=2}"])
        assert (config.optimizer.arguments["radius"], config.optimizer.arguments["candidates"]) == (0.1, 2)

    def test_flags_and_overrides_may_not_disagree(self):
        assert lines("starter", ["steps=4"], {"steps": 3}) == ["steps: must be given once, got 3 and 4"]
        assert RunConfig.load("starter", ["steps=3"], {"steps": 3}).steps == 3

    def test_numbers_as_column_names(self):
        assert RunConfig.load(None, ["data.path=x.csv", "data.text_column=0"]).data.text_column == "0"


class TestRecipes:
    def test_unknown(self):
        (line,) = lines("thesi")
        assert line.startswith("recipe: unknown recipe 'thesi'; did you mean 'thesis'?")

    def test_missing_file(self):
        (line,) = lines("no/such.toml")
        assert line.startswith("recipe: file not found, got 'no/such.toml'")

    def test_broken_toml_says_the_line(self, tmp_path):
        file = tmp_path / "r.toml"
        file.write_text("steps = 3\nseed = = 4\n")
        (line,) = lines(file)
        assert "must be valid TOML" in line and "line 2" in line

    def test_binary_junk(self, tmp_path):
        file = tmp_path / "r.toml"
        file.write_bytes(b"\xff\xfe\x00")
        assert lines(file) == [f"recipe: must be text in UTF-8, got '{file}' with byte 0xff at position 0"]

    def test_extends_a_recipe_beside_it(self, tmp_path):
        (tmp_path / "base.toml").write_text("extends = 'thesis'\nsteps = 7\n")
        (tmp_path / "delta.toml").write_text("extends = 'base.toml'\n[optimizer]\nradius = 0.1\n")
        config = RunConfig.load(tmp_path / "delta.toml")
        assert config.steps == 7 and config.task == "sst2"
        assert config.optimizer.arguments["radius"] == 0.1 and config.optimizer.arguments["penalty"] == 0.05

    def test_extends_itself(self, tmp_path):
        file = tmp_path / "r.toml"
        file.write_text(f"extends = '{file}'\n")
        assert "must extend another recipe" in lines(file)[0]

    def test_two_that_extend_each_other(self, tmp_path):
        (tmp_path / "a.toml").write_text("extends = 'b.toml'\n")
        (tmp_path / "b.toml").write_text("extends = 'a.toml'\n")
        assert "must extend another recipe" in lines(tmp_path / "a.toml")[0]


def test_entries_by_width():
    assert [resolve_entries(e, 384) for e in ("2*width", "1 * width", 7, None)] == [768, 384, 7, None]
    with pytest.raises(UserError, match="got 'width'"):
        resolve_entries("width", 384)


class TestOwnOptimizer:
    def test_class_of_a_file(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("class Mine:\n    def __init__(self, params, radius=1.0, *, seed=0): ...\n")
        assert optimizer_class(f"{file}:Mine").__name__ == "Mine"
        config = RunConfig.load(None, ["optimizer.radius=2"], {"optimizer.name": f"{file}:Mine"})
        assert config.optimizer == OptimizerConfig(name=f"{file}:Mine", radius=2)
        (line,) = lines(None, ["optimizer.rate=2"], {"optimizer.name": f"{file}:Mine"})
        assert "unknown option" in line and "'rate'" in line

    def test_unknown_class_gives_the_nearest(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("class Mine: ...\n")
        (line,) = lines(None, (), {"optimizer.name": f"{file}:Mne"})
        assert "did you mean 'Mine'?" in line

    def test_a_file_that_fails(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text("1 / 0\n")
        (line,) = lines(None, (), {"optimizer.name": f"{file}:Mine"})
        assert "could not be run (ZeroDivisionError" in line
