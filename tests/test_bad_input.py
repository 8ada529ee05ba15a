"""Bad input: each one clear line, exit code 2, nothing half-written. A torn log is repaired with a word.

Through the command line as a person types it; what is printed before the mistake shows (rows, labels) is no part of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network

import pytest

import tiny_run
from gradientless import cli
from gradientless.schema import read_sealed, sealed
from gradientless.search.trajectory import Trajectory

CHATTER = r"train  |validation  |surface  |parameters tuned|resuming  |\w+: the recipe's "
GOOD = "a good film,positive\na bad film,negative\n" * 10


@pytest.fixture(autouse=True)
def own_places(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny_run.write_table(tmp_path / "rows.csv", 60)


@pytest.fixture
def command(model, rows, tmp_path) -> Callable[..., list[str]]:
    """command(settings, …, data=…, model=…) -> the arguments of a run into the folder `run`."""

    def build(*more: str, data: str = rows, model: str = model, **options) -> list[str]:
        return tiny_run.arguments(model, data, tmp_path / "run", *more, **options)

    return build


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[[list[str]], list[str]]:
    """The lines that refuse a command: exit code 2, no traceback, and no file that was not there before."""

    def lines(arguments: list[str]) -> list[str]:
        before = {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
        capsys.readouterr()
        assert run(arguments) == 2
        told = capsys.readouterr()
        after = {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
        assert before == after
        assert told.out == "" and "Traceback" not in told.err and not re.search(r"\.py:\d", told.err)
        return [line for line in told.err.splitlines() if line.strip() and not re.match(CHATTER, line)]

    return lines


class TestData:
    def test_missing_file(self, command, refused):
        (line,) = refused(command(data="no-such.csv"))
        assert line == "data: file not found, got 'no-such.csv'"

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
    def test_a_pipe_that_nobody_writes_to(self, command, refused, tmp_path):
        os.mkfifo(tmp_path / "pipe.csv")
        (line,) = refused(command(data="pipe.csv"))
        assert line == "data: must be a file, got 'pipe.csv', a pipe that nobody writes to"

    def test_a_name_that_is_no_text(self, command, refused):
        """What a shell hands on as bytes that are not UTF-8."""
        (line,) = refused(command(data="b\udcff.csv"))
        assert line == "arguments: must be text in UTF-8, got b'b\\xff.csv'"

    def test_half_a_character(self, command, refused, tmp_path):
        rows = [json.dumps({"text": "a film" + " \ud83d" * (i == 7), "label": i % 2}) for i in range(20)]
        (tmp_path / "cut.jsonl").write_text("\n".join(rows))
        (line,) = refused(command(data="cut.jsonl"))
        assert line.startswith("cut.jsonl: line 8: must hold whole characters")

    def test_names_that_are_too_long(self, command, refused):
        (line,) = refused(command(data=f"{'x' * 300}.csv"))
        assert "got 'xxx" in line and "too long" in line
        for more in (["--out", "x" * 300], ["--model", "x" * 300], ["x" * 300]):
            assert len(refused([*command(), *more])) == 1

    def test_missing_validation_file(self, command, refused):
        (line,) = refused(command("--validation", "no-such.csv"))
        assert line == "data: file not found, got 'no-such.csv'"

    @pytest.mark.parametrize(("option", "what"), [("--text-column", "txt"), ("--label-column", "labl")])
    def test_missing_column(self, option, what, command, refused):
        (line,) = refused(command(option, what))
        nearest = option.removeprefix("--").removesuffix("-column")
        assert f"'{what}'" in line and f"did you mean '{nearest}'?" in line and "rows.csv" in line

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"text,label\n" + b"a good film,positive\n" * 9, "must hold at least two classes, got one: 'positive'"),
            (b"text,label\n" + GOOD.encode() + b",positive\n", "line 22: column 'text'"),
            (b"text,label\n" + GOOD.encode() + b"  ,positive\n", "line 22: column 'text'"),
            (b"text,label\n" + GOOD.encode() + b"a film,\n", "line 22: column 'label' must hold a word"),
            (bytes(range(256)) * 40, ""),
            (b"\x89PNG\r\n\x1a\n" + b"\x00\x01\x02\x03" * 500, ""),
            (b"", ""),
            (b"text,label\n", ""),
        ],
        ids=["one class", "empty text", "blank text", "no label", "junk", "an image", "empty file", "no rows"],
    )
    def test_content(self, content, message, command, refused, tmp_path):
        (tmp_path / "bad.csv").write_bytes(content)
        (line,) = refused(command(data="bad.csv"))
        assert line.startswith("bad.csv:") and message in line

    def test_a_folder_without_rows(self, command, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        (line,) = refused(command(data="empty"))
        assert line == "empty: the folder must hold train.csv, train.tsv or train.jsonl, got none"


class TestConfiguration:
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--steps", "0"], "steps: must be >= 1, got 0"),
            (["--steps", "-3"], "steps: must be >= 1, got -3"),
            (["--batch-size", "0"], "batch_size: must be >= 1, got 0"),
            (["--task", "rotten-tomatos"], "task: unknown task 'rotten-tomatos'; did you mean 'rotten-tomatoes'?"),
            (["--optimizer", "adamv"], "optimizer: unknown optimizer 'adamv'; did you mean 'adam'?"),
            (
                ["--optimizer", "no.py:Mine"],
                "optimizer: must name an existing file in 'file.py:Class', got 'no.py:Mine'",
            ),
            (["--surface", "haed"], "surface.name: unknown surface 'haed'; did you mean 'head'?"),
            (["optimizer.radios=1"], "optimizer: unknown option of gld 'radios'; did you mean 'radius'?"),
            (["--dtype", "float23"], "dtype: must be 'float32', 'bfloat16' or 'float16', got 'float23'"),
            (["--device", "gpu"], "device: must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
            (["--device", "cuda:99"], "device: must be one that this machine has"),
            (["--model", "starter:minilmm"], "model: unknown starter model 'starter:minilmm'; did you mean"),
        ],
    )
    def test_one_line(self, more, message, refused):
        (line,) = refused(["train", *more, "--out", "run"])
        assert line.startswith(message)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["optimizer.radius=0"], "GLD: radius must be > 0 and finite for tensor 'head.dense.weight', got 0"),
            (["optimizer.radius=-1"], "GLD: radius must be > 0 and finite for tensor 'head.dense.weight', got -1"),
            (["optimizer.entries=0"], "GLD: entries must be"),
            (["tensors=[{pattern='*.out.bias', entries=0}]"], "GLD: entries must be"),
            (["tensors=[{pattern='*.out.bias', radius=0}]"], "GLD: radius must be > 0"),
            (["tensors=[{pattern='nothing', radius=1}]"], "tensors: pattern must match a tensor, got 'nothing'"),
            (["optimizer.options=[9, 2]"], "GLD: options per level must be <= candidates + 1 = 6, got 9"),
            (["forward_passes=3"], "forward_passes: must pay for one step"),
            (["surface.head=library"], "head: the library head of 'bert' has pooling cls"),
            (["--max-length", "500"], "head: max_length must be <= 32"),
        ],
    )
    def test_seen_only_with_the_model(self, more, message, command, refused):
        steps = None if more[0].startswith("forward") else 20
        arguments = command(*more, steps=steps)
        if "--max-length" in more:
            del arguments[arguments.index("--max-length") : arguments.index("--max-length") + 2]
        (line,) = refused(arguments)
        assert line.startswith(message)
        if "tensors=" in more[0] and "nothing" not in more[0]:
            assert "'head.out.bias'" in line

    def test_two_mistakes_are_both_told(self, refused):
        lines = refused(["train", "--steps", "0", "--batch-size", "0", "--optimizer", "gldd", "--out", "run"])
        assert lines[0] == "steps: must be >= 1, got 0" and lines[1] == "batch_size: must be >= 1, got 0"
        assert len(lines) == 3 and lines[2].startswith("optimizer: unknown optimizer 'gldd'; did you mean 'gld'?")

    @pytest.mark.parametrize("key", ["steps", "batch_size", "forward_passes", "evaluate_every"])
    @pytest.mark.parametrize("value", [str(2**32), str(2**64), "1" * 5000, f"0x{'f' * 5000}"])
    def test_counts_that_are_too_large(self, command, refused, key, value):
        (line,) = refused(command(f"{key}={value}"))
        assert line.startswith(f"{key}: must be ") and len(line) < 400

    def test_zero_bytes_and_large_numbers_in_a_recipe(self, refused, tmp_path):
        for text in ('model = "a\\u0000b"', f"steps = {'9' * 5000}", f"steps = 0x{'f' * 5000}", f"x = {'[' * 9000}"):
            (tmp_path / "recipe.toml").write_text(text)
            (line,) = refused(["train", "recipe.toml", "--out", "run"])
            assert line.startswith("recipe: 'recipe.toml': ") and len(line) < 400

    def test_broken_toml(self, refused, tmp_path):
        (tmp_path / "recipe.toml").write_text("steps = 3\n[optimizer\nname = 'gld'\n")
        (line,) = refused(["train", "recipe.toml", "--out", "run"])
        assert line.startswith("recipe: 'recipe.toml': must be valid TOML, got: ") and "line 2" in line
        (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe\x00junk")
        (line,) = refused(["train", "recipe.toml", "--out", "run"])
        assert line == "recipe: must be text in UTF-8, got 'recipe.toml' with byte 0xff at position 0"

    def test_unknown_model_while_offline(self, command, refused):
        (line,) = refused(command(model="nobody/no-such-model"))
        assert line.startswith("unknown model 'nobody/no-such-model': ") and "the hub could not be reached" in line

    def test_a_folder_without_a_model(self, command, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        (line,) = refused(command(model="empty"))
        assert line == "model: the folder empty must hold a config.json, got none"

    def test_unwritable_folder(self, command, refused, tmp_path):
        (tmp_path / "file").touch()
        arguments = command()
        arguments[arguments.index("--out") + 1] = "file/run"
        (line,) = refused(arguments)
        assert line == "out: must be a folder that can be written, got 'file/run' (Not a directory)"

    def test_a_folder_with_something_else(self, command, refused, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").touch()
        (line,) = refused(command())
        assert line.startswith("out: must be a new or empty folder") and "holds 'thesis.txt'" in line

    def test_unwritable_cache(self, command, refused, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path / "file" / "cache"))
        (line,) = refused(command())
        assert line.startswith("cache: the folder ") and line.endswith("must be writable, got Not a directory")


@pytest.fixture
def stopped(command, tmp_path) -> Path:
    """A run of 20 steps as a kill after the checkpoint of its 20th leaves it."""
    assert run(command()) == 0
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


class TestResume:
    @pytest.mark.parametrize("damage", ["junk", "cut short", "one bit", "state"])
    def test_corrupted_checkpoint(self, damage, stopped, command, refused):
        place = stopped / "checkpoint-20"
        file = place / ("state.json" if damage == "state" else "tensors.safetensors")
        whole = file.read_bytes()
        bits = bytes([whole[-1] ^ 1])
        file.write_bytes({"junk": b"junk", "one bit": whole[:-1] + bits}.get(damage, whole[: len(whole) // 2]))
        (line,) = refused([*command(), "--resume"])
        assert line.startswith(f"checkpoint {place}: corrupted (") and "must be whole, or be deleted" in line

    def test_trajectory_of_another_base(self, stopped, command, refused, tmp_path):
        other = tiny_run.make_model(tmp_path / "other", seed=6)
        log = stopped / "trajectory.bin"
        kept = log.read_bytes()
        arguments = command()
        arguments[arguments.index("--out") + 1] = str(tmp_path / "second")
        arguments[arguments.index("--model") + 1] = other
        assert run(arguments) == 0
        log.write_bytes((tmp_path / "second" / "trajectory.bin").read_bytes())
        (line,) = refused([*command(), "--resume"])
        model = command()[command().index("--model") + 1]
        told = f"the configuration must be what the run began with, got model: '{model}' here, '{other}' there"
        assert line == f"--resume: {told}"
        (line,) = refused(["replay", str(stopped)])
        assert line == f"replay: {told}"
        log.write_bytes(kept)
        (line,) = refused(["replay", str(stopped), "--base", other])
        assert line == f"replay: the base model must be the one that the run started from, got another: {other}"

    def test_damaged_trajectory(self, stopped, command, refused):
        log = stopped / "trajectory.bin"
        whole = log.read_bytes()
        log.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
        for arguments in ([*command(), "--resume"], ["replay", str(stopped)]):
            (line,) = refused(arguments)
            assert line.startswith(f"trajectory: {log} is damaged at step ") and "its check sum differs" in line
        log.write_bytes(b"junk")
        (line,) = refused(["replay", str(stopped)])
        assert line == f"trajectory: {log} must begin with 'gradientless trajectory 1', got another file"

    def test_trajectory_shorter_than_its_checkpoint(self, stopped, command, refused):
        log = Trajectory.open(stopped / "trajectory.bin")
        log.truncate(15)
        log.close()
        (line,) = refused([*command(), "--resume"])
        assert line == f"trajectory: {log.path} must hold the 20 steps of the checkpoint, got 15"

    def test_another_configuration(self, stopped, command, refused):
        lines = refused([*command(), "--resume", "--seed", "1", "optimizer.radius=0.5"])
        assert len(lines) == 2 and all(line.startswith("--resume: must agree with the run in ") for line in lines)

    def test_a_torn_last_record_is_repaired_with_a_word(self, stopped, command, tmp_path):
        """As a whole program, so that the word is seen as a person sees it."""
        expected = tiny_run.outcome(stopped)
        log, metrics = stopped / "trajectory.bin", stopped / "metrics.jsonl"
        with open(log, "ab") as file:
            file.write(b"\x80\x01\x02")
        with open(metrics, "ab") as file:
            file.write(b'{"step": 21, "spl')
        program = [sys.executable, "-m", "gradientless", *command(), "--resume"]
        told = subprocess.run(program, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        lines = [line for line in told.stderr.splitlines() if "torn" in line]
        assert lines == [
            f"trajectory: {log}: the torn record of step 20 was cut off",
            "metrics.jsonl: the last line was torn and is left out (line 7)",
        ]
        assert "Warning" not in told.stderr
        assert tiny_run.outcome(stopped) == expected

    @pytest.mark.parametrize("steps", [0, 7, 19])
    def test_replay_of_a_shortened_log(self, stopped, refused, steps):
        counts = {
            "metrics": {},
            "steps": 20,
            "model_step": 20,
            "forward_passes": 20,
            "seconds": 1,
            "peak_memory_mib": 1,
        }
        (stopped / "summary.json").write_text(json.dumps(counts))
        log = Trajectory.open(stopped / "trajectory.bin")
        log.truncate(steps)
        log.close()
        (line,) = refused(["replay", str(stopped)])
        told = f"must hold the 20 steps of the run's weights, got {steps}; was it shortened?"
        assert line == f"replay: {stopped / 'trajectory.bin'} {told}"

    def test_a_damaged_summary(self, stopped, refused):
        (stopped / "summary.json").write_text("{")
        (line,) = refused(["replay", str(stopped)])
        assert line == f"run: summary.json must be JSON, got a corrupted file in '{stopped}'"

    def test_eval_and_predict_before_the_end(self, stopped, refused, tmp_path):
        import shutil

        shutil.rmtree(stopped / "model")
        for arguments in (["eval", str(stopped)], ["predict", str(stopped), "a film"]):
            (line,) = refused(arguments)
            assert line == f"model: the run must have ended, got '{stopped}' without model/"

    def test_predict_with_a_damaged_model(self, stopped, refused):
        note = stopped / "model" / "gradientless.json"
        kept = note.read_bytes()
        note.write_text(json.dumps(sealed({**read_sealed(note, "model"), "format": 7})))
        (line,) = refused(["predict", str(stopped), "a film"])
        assert line == f"{note}: must be of format 1, got 7"
        (stopped / "model" / "head.safetensors").write_bytes(b"junk")
        note.write_bytes(kept)
        (line,) = refused(["predict", str(stopped), "a film"])
        told = f"got a changed 'head.safetensors' in '{stopped / 'model'}'"
        assert line == f"model: must hold the files that were saved, {told}"
