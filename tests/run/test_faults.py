"""The command that makes the table of faults (docs/security.md): a part of it, and what it has uncovered."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_run
from gradientless import writing
from gradientless.language.surfaces.saved import changed as changed_files
from gradientless.language.surfaces.saved import read_note
from gradientless.run import runfolder
from gradientless.run.runfolder import BEST, RunFolder
from gradientless.schema import sealed, sha256_of
from tiny_run import gradientless

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "experiments" / "results" / "faults.md"


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ended")
    files = tiny_run.make_model(place / "model"), tiny_run.write_table(place / "rows.csv", 40)
    lora = ("--surface", "lora", "optimizer.lr=1e-3")
    assert gradientless(*tiny_run.arguments(*files, place / "lora", *lora, steps=2, optimizer="mezo")) == 0
    assert gradientless(*tiny_run.arguments(*files, place / "head", "optimizer.radius=0.1", steps=2)) == 0
    return place


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "steps = 1\n")


def test_a_part_of_the_table(tmp_path):
    """In a process of its own, since it forks."""
    page = tmp_path / "page.md"
    part = ["--every", "50", "--rows", "kills-gld", "gone", "--out", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "faults.py"), *part],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + (page.read_text("utf-8") if page.exists() else "")
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| GLD")]
    assert len(rows) == 2 and all(re.search(r"\| [1-9]\d* \| .* \| 0 \|$", row) for row in rows)


def test_the_page_is_whole_and_nothing_was_lost_or_wrong():
    text = PAGE.read_text("utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    rows = {what: (int(times.replace(",", "")), wrong) for what, times, _, wrong in cells[1:] if times != "---:"}
    found = {what for what, (_, wrong) in rows.items() if wrong != "0"}
    assert {what.partition(": ")[0] + ":" for what in found} <= {"asset.json:", "GLD on a head:"} and len(found) <= 2
    kills = [times for what, (times, _) in rows.items() if "killed (SIGKILL) at every operation" in what]
    assert len(kills) == 3 and min(kills) > 200
    damaged = [times for what, (times, _) in rows.items() if "an early end" in what]
    assert len(damaged) > 15 and sorted(damaged)[1] >= 2000  # one stopped at what it found


# --- what it has uncovered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "file"),
    [
        ("head", "head.safetensors"),
        ("head", "body/model.safetensors"),
        ("head", "body/tokenizer.json"),
        ("lora", "adapter_model.safetensors"),
        ("lora", "base/body/model.safetensors"),
        ("lora", "adapter_config.json"),
    ],
)
def test_a_file_of_a_saved_model_that_was_changed_or_is_gone(run, file, ended, tmp_path, capsys):
    """One digit in the weights would be another model, which nothing tells of."""
    place = Path(shutil.copytree(ended / run, tmp_path / "run"))
    changed = place / "model" / file
    content = bytearray(changed.read_bytes())
    content[-3] ^= 1
    for told, change in (("a changed", lambda: changed.write_bytes(content)), ("no", changed.unlink)):
        change()
        line = f"model: must hold the files that were saved, got {told} '{file}' in '{place / 'model'}'"
        for command in (
            ["eval", str(place)],
            ["predict", str(place), "a good film"],
            ["predict", str(place / "model"), "a good film"],
            ["export", str(place), "--out", str(tmp_path / "exported")],
        ):
            capsys.readouterr()
            assert gradientless(*command) == 2
            assert capsys.readouterr().err.rstrip("\n").split("\n")[-1] == line, command
        assert gradientless("replay", str(place)) == 0
        found = " ".join(capsys.readouterr().out.split())
        assert "bit-equal to the run yes" in found and f"saved model CHANGED: {file}" in found
        assert not (tmp_path / "exported").exists()


def test_a_saved_model_says_the_checksums_of_its_files_and_leaves_the_rest_alone(ended, tmp_path):
    place = Path(shutil.copytree(ended / "lora" / "model", tmp_path / "model"))
    stated = read_note(place)["files"]
    present = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert set(stated) == {name for name in present if name != "gradientless.json" and not name.endswith(".md")}
    assert all(sha256_of(place / name) == checksum for name, checksum in stated.items())
    (place / "README.md").write_text("mine", "utf-8")
    (place / "more.txt").write_text("mine", "utf-8")
    assert gradientless("predict", str(place), "a good film") == 0
    note = {key: value for key, value in read_note(place).items() if key not in ("format", "files")}
    (place / "gradientless.json").write_text(json.dumps(sealed({"format": 1, **note})), "utf-8")  # as early ones were
    assert changed_files(place) == [] and gradientless("predict", str(place), "a good film") == 0


def test_an_event_that_cannot_be_written_is_told_where_it_is_said(folder, monkeypatch):
    events = folder.events()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space"):
        events.add_scalar("loss", 1.0, 1)


def test_the_checkpoint_before_one_is_removed_though_a_kill_left_it(folder):
    weights = {"w": torch.ones(2)}
    for kind in ("checkpoint", BEST):
        for step in (1, 2):
            folder.save_checkpoint(weights, {}, step, kind)
            (folder.path / f"{kind}-{step}").rename(folder.path / f"kept-{step}")
        for step in (1, 2):
            (folder.path / f"kept-{step}").rename(folder.path / f"{kind}-{step}")
        folder.drop_older(2, kind)
        assert [place.name for place in folder.path.glob(f"{kind}-*")] == [f"{kind}-2"]


def test_a_run_that_is_taken_back_half_is_still_one(folder, monkeypatch):
    folder.write_environment("cpu")
    once = writing.remove

    def broken(path: Path) -> None:
        if path == folder.timings:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        once(path)

    monkeypatch.setattr(runfolder, "remove", broken)
    with pytest.raises(OSError, match="Input"):
        folder.withdraw()
    assert folder.holds_run()
    monkeypatch.setattr(runfolder, "remove", once)
    folder.withdraw()
    assert not folder.path.exists()


def test_a_folder_that_is_gone_is_not_begun_again_within_a_run(tmp_path):
    with pytest.raises(FileNotFoundError), writing.replacing(tmp_path / "gone" / "model"):
        pass
    assert not (tmp_path / "gone").exists()
