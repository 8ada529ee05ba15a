"""Every file that is read back: however it is damaged, what is read is the truth, or one line is told.

`--damages 2000` tries so many of each, where the suite tries some.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import damage
from damage import require_one_line
from gradientless.errors import UserError
from gradientless.language.starter import MANIFEST, _sizes
from gradientless.language.surfaces.saved import NOTE
from gradientless.run.evaluation import load_surface
from gradientless.run.replay_run import replay_run
from gradientless.run.report import close
from gradientless.run.runfolder import BEST, RunFolder
from gradientless.run.train import train
from gradientless.schema import SEALS, sealed
from gradientless.search.trajectory import Trajectory
from gradientless.terminal import Console


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return damage.make(tmp_path_factory.mktemp("read-back"))


@pytest.mark.parametrize("name", damage.FILES)
def test_damaged_bytes(name, made, pytestconfig):
    damage.tried(made, name, pytestconfig.getoption("damages"))


@pytest.fixture
def tried(pytestconfig) -> settings:
    return damage.often(pytestconfig.getoption("damages"))


# --- values of other kinds -----------------------------------------------------------------------------------------

OTHERS = [
    None,
    [],
    {},
    "",
    "7",
    "../../x",
    -1,
    0,
    1,
    1.5,
    2**40,
    10**30,
    True,
    [1],
    ["a"],
    {"a": 1},
    [[]],
    float("nan"),
]
Change = Callable[[Any], Any]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Replaces one value of JSON-able data by another, of any kind, or takes it away."""
    where = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
    other = draw(st.sampled_from(OTHERS))
    gone = draw(st.integers(0, 3)) == 0

    def change(values: Any) -> Any:
        changed = copy.deepcopy(values)
        here = changed
        for depth, number in enumerate(where):
            keys = sorted(here) if isinstance(here, dict) else list(range(len(here)))
            key = keys[number % len(keys)]
            inner = here[key]
            if depth == len(where) - 1 or not isinstance(inner, dict | list) or not inner:
                if gone and isinstance(here, dict):
                    del here[key]
                else:
                    here[key] = other
                break
            here = inner
        return changed

    return change


def rewrite(file: Path, change: Change) -> None:
    """Change what a file holds, with its checksum made again: as one who means it would."""
    if file.name == "trajectory.bin":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log = Trajectory.read(file)
            payloads = list(log)
        file.unlink()
        again = Trajectory(file, change(log.header))
        for payload in payloads:
            again.append(payload)
        again.close()
    elif file.suffix == ".jsonl":
        found = change([json.loads(line) for line in file.read_text("utf-8").splitlines()])
        file.write_text("".join(f"{json.dumps(line)}\n" for line in found), "utf-8")
    else:
        found = json.loads(file.read_text("utf-8"))
        changed = change({key: value for key, value in found.items() if key not in SEALS})
        file.write_text(json.dumps(sealed(changed)), "utf-8")


def used(place: Path, use: str) -> None:
    """Do with a run what reads its files back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if use == "replay":
            replay_run(place)
        elif use == "resume":
            folder = RunFolder.open(place, say=lambda line: None)
            train(folder.read_config(), folder, resume=True, console=Console(quiet=True))
        elif use == "close":
            folder = RunFolder.open(place)
            close(folder, folder.read_summary(), Console(quiet=True))
        else:
            load_surface(place, "cpu")


USES = [
    ("ended", "trajectory.bin", "replay"),
    ("ended", "summary.json", "replay"),
    ("ended", f"{BEST}-*/state.json", "replay"),
    ("ended", "summary.json", "resume"),
    ("ended", "summary.json", "close"),
    ("ended", "metrics.jsonl", "close"),
    ("ended", f"model/{NOTE}", "open"),
    ("stopped", "trajectory.bin", "resume"),
    ("stopped", "checkpoint-8/state.json", "resume"),
    ("stopped", f"{BEST}-*/state.json", "resume"),
    ("stopped", "metrics.jsonl", "resume"),
    ("stopped", "timings.jsonl", "resume"),
    ("adamw-stopped", "checkpoint-8/state.json", "resume"),
]


@pytest.mark.parametrize(("run", "file", "use"), USES)
def test_values_of_other_kinds(run, file, use, made, tried):
    """Whoever changed them, checksum and all: the run goes on, or one line tells."""
    place = made / "used"

    @tried
    @given(changes())
    def holds(change: Change) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made / run, place)
        (path,) = place.glob(file)
        rewrite(path, change)
        try:
            used(place, use)
        except UserError as error:
            require_one_line(error)

    holds()


@pytest.mark.parametrize("value", [None, "many", [3], {}, -1, 2.5, True, 10**30])
@pytest.mark.parametrize(
    ("run", "file", "key", "use"),
    [
        ("ended", "trajectory.bin", "version", "replay"),
        ("ended", "trajectory.bin", "first_step", "replay"),
        ("ended", "trajectory.bin", "rows", "replay"),
        ("ended", "trajectory.bin", "scheduled_steps", "replay"),
        ("stopped", "trajectory.bin", "rows", "resume"),
        ("ended", "summary.json", "model_step", "replay"),
        ("ended", "summary.json", "forward_passes", "close"),
        ("ended", f"model/{NOTE}", "max_length", "open"),
    ],
)
def test_one_value_of_another_kind(run, file, key, use, value, made, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(made / run, place)
    rewrite(place / file, lambda found: {**found, key: value})
    with pytest.raises(UserError, match=f"{key} must be a whole number >= "):
        used(place, use)


@pytest.mark.parametrize("values", [[], None, "text", 7])
def test_a_file_that_holds_no_object(values, made, tmp_path):
    for file, use in (("summary.json", "replay"), (f"model/{NOTE}", "open")):
        place = tmp_path / use
        shutil.copytree(made / "ended", place)
        (place / file).write_text(json.dumps(values), "utf-8")
        with pytest.raises(UserError, match="must be an object, got "):
            used(place, use)
    (tmp_path / MANIFEST).write_text(json.dumps(values), "utf-8")
    assert _sizes(tmp_path) is None


def test_a_log_of_a_later_version(made, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(made / "ended", place)
    rewrite(place / "trajectory.bin", lambda found: {**found, "version": 99})
    with pytest.raises(UserError, match="the log must be of version 3 or earlier, got 99"):
        used(place, "replay")
