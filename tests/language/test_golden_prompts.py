"""The golden prompts of the two starter models: their texts, and that all are there.

Their token ids are checked by `python experiments/golden_prompts.py --check`, which needs the starter models.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from gradientless.language.tasks import TASKS
from pages import ROOT

spec = importlib.util.spec_from_file_location("golden_prompts", ROOT / "experiments" / "golden_prompts.py")
assert spec is not None and spec.loader is not None
golden_prompts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden_prompts)

GOLDEN = json.loads(golden_prompts.FILE.read_text("utf-8"))
CASES = list(golden_prompts.cases())


def test_every_task_and_prompt_is_there():
    assert list(GOLDEN) == sorted(f"{task} {name}" for task, _, name, _ in CASES)
    assert {task for task, *_ in CASES} == set(TASKS)


@pytest.mark.parametrize(("task", "family", "name", "prompt"), CASES, ids=lambda each: each if each in TASKS else "")
def test_the_texts_are_what_is_asked(task, family, name, prompt):
    entry, found = GOLDEN[f"{task} {name}"], golden_prompts.rows(task)
    assert set(entry) == {*found, *(["words"] if TASKS[task].labels else [])}
    for kind, row in found.items():
        kept = entry[kind]
        assert golden_prompts.texts(prompt, row) == {key: kept[key] for key in ("asked", "says")}
        assert {side for side in golden_prompts.SIDES if side in kept} == (
            {"right", "left"} if kind == "long" else {"right"}
        )
        for side in golden_prompts.SIDES[: 1 + (kind == "long")]:
            assert kept[side]["cut"] == (kind == "long")
            for line in kept[side]["ids"]:
                assert len(line) <= golden_prompts.LENGTH
    assert len({json.dumps(entry["long"][side]["ids"]) for side in golden_prompts.SIDES}) == 2


def test_a_difference_is_found():
    changed = json.loads(json.dumps(GOLDEN))
    changed["sst2 causal"]["plain"]["right"]["ids"][0][0] += 1
    del changed["trec masked"]
    found = list(golden_prompts.differences(GOLDEN, changed))
    assert [line.partition(":")[0] for line in found] == ["sst2 causal/plain/right/ids", "trec masked"]
    assert not list(golden_prompts.differences(GOLDEN, GOLDEN))
