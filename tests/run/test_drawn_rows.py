"""Which rows a configuration means: a task of the user's own, few-shot sets, sets of n rows, and their seed."""

from __future__ import annotations

import pytest

from gradientless.errors import UserError
from gradientless.language.splits import few_shot, subset
from gradientless.language.tasks import Example, read_task
from gradientless.run.assemble import prompt_of
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits

TASK = """
data = "films.csv"
validation = "held.csv"
text = "Film: {text}\\nVerdict:"
score = "mean"
label = "verdict"

[words]
bad = "dull"
good = "bright"
"""


@pytest.fixture
def task(tmp_path) -> str:
    """A TOML task of 30 training rows and 10 held-out ones, a third of them good."""
    lines = [f"film {i},{'bad' if i % 3 else 'good'}" for i in range(40)]
    for name, part in (("films.csv", lines[:30]), ("held.csv", lines[30:])):
        (tmp_path / name).write_text("text,verdict\n" + "\n".join(part) + "\n", "utf-8")
    (tmp_path / "films.toml").write_text(TASK, "utf-8")
    return str(tmp_path / "films.toml")


def load(task: str, *overrides: str) -> RunConfig:
    return RunConfig.load(None, overrides, {"task": task})


def test_a_task_of_the_users_own(task, tmp_path):
    config = load(task)
    assert load_splits(config) == read_task(tmp_path / "films.toml").load()
    assert RunConfig.load(None, (), {"task": task, "seed": 1}).task == task
    (tmp_path / "again.toml").write_text(config.toml(), "utf-8")
    assert RunConfig.load(tmp_path / "again.toml") == config


def test_the_prompt_is_that_of_the_task_with_its_score(task, tmp_path):
    import transformers

    transformers.GPT2Config().save_pretrained(tmp_path / "model")
    prompt = prompt_of(load(task), str(tmp_path / "model"))
    assert prompt is not None and (prompt.text, prompt.score) == ("Film: {text}\nVerdict:", "mean")
    assert dict(prompt.words) == {"bad": "dull", "good": "bright"}
    assert prompt_of(load(task, "prompt.score=sum"), str(tmp_path / "model")).score == "sum"  # type: ignore[union-attr]
    own = prompt_of(load(task, "prompt.text=So {text}"), str(tmp_path / "model"))
    assert own is not None and own.score == "sum"


def test_few_shot_rows_are_drawn_by_the_seed_of_the_split_or_of_the_run(task):
    rows = load_splits(load(task))
    drawn = load_splits(load(task, "data.few_shot=4", "seed=21"))
    assert drawn == few_shot(rows, 4, 21) and len(drawn.train) == len(drawn.validation) == 8
    assert drawn.test == rows.validation
    assert load_splits(load(task, "data.few_shot=4", "seed=5", "data.split_seed=21")) == drawn
    assert load_splits(load(task, "data.few_shot=4", "seed=13")).train != drawn.train


def test_subsets(task):
    rows = load_splits(load(task))
    drawn = load_splits(load(task, "data.subset=[12, 6, 5]", "seed=21"))
    assert drawn == subset(rows, 12, 6, 5, 21) and len(drawn.test) == 5
    assert len(load_splits(load(task, "data.subset=[12, 6]")).test) == 10


def test_the_seed_of_the_split_holds_out_the_tenth_of_a_table(table):
    def held(*overrides: str) -> list[Example]:
        columns = {"data.path": table, "data.text_column": "review", "data.label_column": "verdict"}
        return load_splits(RunConfig.load(None, overrides, columns)).validation

    assert held("seed=1", "data.split_seed=7") == held("seed=7") != held("seed=1")


def test_an_absent_class_is_one_line(task, tmp_path):
    (tmp_path / "films.toml").write_text(TASK + 'dire = "dire"\n', "utf-8")
    with pytest.raises(UserError) as told:
        load_splits(load(task, "data.few_shot=4"))
    assert str(told.value) == "few_shot: every class must have training rows to draw from, got bad 20, good 10, dire 0"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.few_shot=0"], "data.few_shot: must be >= 1, got 0"),
        (["data.subset=[5]"], "data.subset: must be [train, validation] or [train, validation, test] in whole numbers"),
        (["data.subset=[0, 5]"], "data.subset: must be [train, validation] or"),
        (["data.subset=all"], "data.subset: must be [train, validation] or"),
        (["data.subset=[5, 5]", "data.few_shot=2"], "data.subset: must not stand beside data.few_shot, got [5, 5]"),
        (["data.split_seed=-1"], "data.split_seed: must be >= 0, got -1"),
        (["task=no-such.toml"], "task: file not found, got 'no-such.toml'"),
    ],
)
def test_mistakes_are_one_line(overrides, line):
    with pytest.raises(UserError) as told:
        RunConfig.load(None, overrides)
    assert str(told.value).startswith(line) and "\n" not in str(told.value)


def test_another_prompt_of_the_task_is_taken_by_its_name(tmp_path):
    from tiny_models import make_language_model

    from gradientless.language.tasks import TASKS

    for kind in ("gpt2", "bert"):
        model, tokenizer = make_language_model(kind)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)

    def asked(task, *overrides, kind="gpt2"):
        config = RunConfig.load(None, overrides, {"task": task, "model": str(tmp_path / kind), "surface.name": "full"})
        return prompt_of(config, config.model)

    prompts = TASKS["sst2"].prompts
    assert asked("sst2") == prompts["causal"]
    assert asked("sst2", "prompt.name=mezo") == prompts["causal:mezo"]
    assert asked("sst2", "prompt.name=mezo", "prompt.score=mean").score == "mean"
    with pytest.raises(UserError, match=r"prompt.name: unknown causal prompt of sst2 'mezzo'; did .* Known: mezo"):
        asked("sst2", "prompt.name=mezzo")
    with pytest.raises(UserError, match=r"prompt.name: unknown masked prompt of sst2 'mezo'\. Known: none"):
        asked("sst2", "prompt.name=mezo", kind="bert")
    with pytest.raises(UserError, match=r"prompt.name: must not stand beside prompt.text, got 'mezo'"):
        asked("sst2", "prompt.name=mezo", "prompt.text=So {text}")
    with pytest.raises(UserError, match=r"prompt.name: must name a prompt of a task, got 'mezo' without one"):
        asked(None, "prompt.name=mezo", "data.path=rows.csv")
