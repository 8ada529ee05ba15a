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

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_run
from gradientless import cli
from gradientless.errors import UserError
from gradientless.language.kept import kept
from gradientless.language.starter import MANIFEST, _sizes, _write_manifest
from gradientless.language.surfaces.saved import NOTE, read_note
from gradientless.run.compare import RESULT
from gradientless.run.evaluation import load_surface
from gradientless.run.replay_run import replay_run
from gradientless.run.report import close
from gradientless.run.runfolder import BEST, RunFolder
from gradientless.run.sealed import write_sealed
from gradientless.run.train import train
from gradientless.schema import SEALS, read_sealed, sealed
from gradientless.search.trajectory import Trajectory
from gradientless.terminal import Console

Damage = Callable[[bytes], bytes]
ASSET = {"model.safetensors": 8, "vocab.txt": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with an ended run, one that was stopped (its copy without an end), and one by AdamW."""
    place = tmp_path_factory.mktemp("read-back")
    files = tiny_run.make_model(place / "model"), tiny_run.write_table(place / "rows.csv", count=30)
    for name, optimizer, rate in (("ended", "gld", "optimizer.radius=0.1"), ("adamw", "adamw", "optimizer.lr=1e-2")):
        more = (rate, "checkpoint_every=4", "evaluate_every=4", "log_every=2")
        with pytest.raises(SystemExit) as done:
            cli.main(tiny_run.arguments(*files, place / name, *more, steps=8, optimizer=optimizer))
        assert not done.value.code
    for name, of in (("stopped", "ended"), ("adamw-stopped", "adamw")):
        shutil.copytree(place / of, place / name)
        (place / name / "summary.json").unlink()
    asset = place / "asset"
    asset.mkdir()
    for file, size in ASSET.items():
        (asset / file).write_bytes(bytes(size))
    _write_manifest(asset, ASSET)
    kept_array(place, lambda told: None)
    metrics = {"accuracy": 0.5, "f1": 0.25, "loss": 1.5}
    write_sealed(
        place / "mezo-seed1.json",
        {"method": "mezo", "options": {}, "config": {"seed": 1}, "metrics": metrics, "forward_passes": 8,
         "seconds": 1.5, "peak_memory_mib": 2.0, "texts_cut": 0},
    )  # fmt: skip
    return place


def kept_array(place: Path, damaged: Callable[[str], None]) -> np.ndarray[Any, Any]:
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, wanted)

    return np.array(kept(place / "features.npy", write, damaged, (3, 4)))


def records(place: Path) -> object:
    """Header, records and their check sum, which a summary and a checkpoint name; a torn end is told of in a line."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        log = Trajectory.read(place / "ended" / "trajectory.bin")
    if told:
        raise UserError(str(told[0].message))
    if log.check(len(log)) != read_sealed(place / "ended" / "summary.json", "run")["trajectory"]:
        raise UserError("replay: another check sum")
    return log.header, list(log)


def lines(place: Path, name: str) -> object:
    """A log of lines, as a resumed run reads it."""
    folder = RunFolder(place / "stopped")
    found = folder.load_checkpoint()
    assert found is not None
    before = (folder.path / name).read_bytes()
    try:
        folder.truncate_logs(found[2])
        folder.require_logs(found[1]["logs"])
        return (folder.path / name).read_bytes()
    finally:
        (folder.path / name).write_bytes(before)


def state(place: Path, kind: str) -> object:
    found = RunFolder(place / "stopped", say=lambda line: None).load_checkpoint(kind)
    assert found is not None
    return found[1:]


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.toml": ("ended/config.toml", lambda place: RunFolder(place / "ended").read_config().resolved()),
    "summary.json": ("ended/summary.json", lambda place: RunFolder(place / "ended").read_summary()),
    "trajectory.bin": ("ended/trajectory.bin", records),
    "metrics.jsonl": ("stopped/metrics.jsonl", lambda place: lines(place, "metrics.jsonl")),
    "timings.jsonl": ("stopped/timings.jsonl", lambda place: lines(place, "timings.jsonl")),
    "state.json": ("stopped/checkpoint-8/state.json", lambda place: state(place, "checkpoint")),
    "gradientless.json": (f"ended/model/{NOTE}", lambda place: read_note(place / "ended" / "model")),
    "asset.json": (f"asset/{MANIFEST}", lambda place: _sizes(place / "asset") or one_line_of("asset.json")),
    "features.npy": ("features.npy", lambda place: kept_array(place, lambda told: None).tolist()),
    "mezo-seed1.json": ("mezo-seed1.json", lambda place: read_sealed(place / "mezo-seed1.json", "--out", RESULT)),
}


def one_line_of(name: str) -> None:
    raise UserError(f"{name}: is made again")


def require_one_line(error: UserError) -> None:
    assert str(error) and "\n" not in str(error), str(error)


# --- damage --------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What may happen to the bytes of a file: some are others, are lost, are put in, are doubled, or it ends early."""
    at, until = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    other = draw(st.binary(max_size=12))
    flip = draw(st.integers(1, 255))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "replace", "lose", "double", "empty"]))

    def damage(content: bytes) -> bytes:
        i, j = int(at * (len(content) - 1)), int(until * len(content))
        return {
            "flip": content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :],
            "cut": content[:i],
            "insert": content[:i] + other + content[i:],
            "replace": content[:i] + other + content[i + len(other) :],
            "lose": content[:i] + content[j:],
            "double": content[:j] + content[i:],
            "empty": b"",
        }[kind]

    return damage


@pytest.fixture
def tried(pytestconfig) -> settings:
    """How often something is tried; the same things each time."""
    return settings(max_examples=pytestconfig.getoption("damages"), deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes(name, made, tried):
    path, read = FILES[name]
    file = made / path
    truth, content = read(made), file.read_bytes()

    @tried
    @given(damages())
    def holds(damage: Damage) -> None:
        file.write_bytes(damage(content))
        try:
            assert read(made) == truth
        except UserError as error:
            require_one_line(error)

    try:
        holds()
    finally:
        file.write_bytes(content)


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
