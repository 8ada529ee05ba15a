"""The command line: the whole way of a run on a tiny model, and bad input as one clear line and exit code 2."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gradientless import cli
from gradientless.run.runfolder import RunFolder

COMMANDS = ("train", "eval", "predict", "replay", "list", "assets")


def run(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


@pytest.fixture
def fails(capsys):
    """The lines on stderr of a command that ends with exit code 2."""

    def lines(*arguments: str) -> list[str]:
        assert run(*arguments) == 2
        told = capsys.readouterr()
        assert told.out == "" and "Traceback" not in told.err
        return told.err.rstrip("\n").split("\n")

    return lines


def training(table: str, tiny_model: str, out: Path, *more: str) -> list[str]:
    columns = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    length = ["--steps", "8", "--batch-size", "8", "--max-length", "16", "--device", "cpu", "--out", str(out)]
    return ["train", *columns, *length, "evaluate_every=4", "checkpoint_every=4", "log_every=2", *more]


@pytest.fixture(scope="module")
def finished(table, tiny_model, tmp_path_factory) -> Path:
    """A run that has ended."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(*training(table, tiny_model, out)) == 0
    return out


def test_off_a_terminal_an_evaluation_has_its_line(table, tiny_model, tmp_path, capsys):
    assert run(*training(table, tiny_model, tmp_path / "run", "surface.name=full", "surface.head=linear")) == 0
    first, *lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("training    ")]
    assert re.fullmatch(r"training    0 of 8  accuracy \d+\.\d\d%", first)  # no step was measured yet
    assert [line[12] for line in lines] == ["4", "8"]
    number = r"\d[\d.,e+-]*"
    of_steps = rf"training    \d of 8  loss {number}  accuracy {number}%  {number} (passes/s|s a pass)(  \d+ s left)?"
    assert all(re.fullmatch(of_steps, line) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--seed", "1", "--seed", "2"), "--seed: must be given once, got 2 values"),
        (("--seed=1", "--steps", "3", "--seed=1"), "--seed: must be given once, got 2 values"),
        (("--seed", "1", "seed=2"), "seed: must be given once, got 1 and 2"),
    ],
)
def test_an_option_has_one_value(arguments, line, fails, tmp_path):
    assert fails("train", "--out", str(tmp_path / "run"), *arguments) == [line]
    assert not (tmp_path / "run").exists()


def test_an_option_of_several_values_is_given_several_times(capsys):
    assert run("profile", "--fits", "nothing", "--model", "a/b", "--model", "c/d") == 2
    assert "given once" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
def test_what_does_not_fit_into_memory_is_one_line(error, table, tiny_model, tmp_path, fails, monkeypatch):
    """Wherever it is asked for, here where the model is loaded; and its folder is free again."""

    def allocate(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("gradientless.run.train.make_surface", allocate)
    (line,) = fails(*training(table, tiny_model, tmp_path / "run"))[-1:]
    assert line.startswith("memory: must hold what was asked for") and not (tmp_path / "run").exists()


class TestTheWholeWay:
    def test_a_run_leaves_its_files(self, finished):
        names = {path.name for path in finished.iterdir()}
        assert {"config.toml", "environment.json", "trajectory.bin", "metrics.jsonl", "summary.json"} <= names
        assert {"model", "plot.png", "tensorboard", "timings.jsonl", "checkpoint-8"} <= names
        summary = json.loads((finished / "summary.json").read_text())
        assert 0 <= summary["metrics"]["accuracy"] <= 1 and summary["steps"] == 8

    def test_eval_agrees_with_the_summary(self, finished, capsys):
        assert run("eval", str(finished), "--json") == 0
        found = json.loads(capsys.readouterr().out)
        expected = json.loads((finished / "summary.json").read_text())["metrics"]
        assert found["accuracy"] == expected["accuracy"] and found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert run("eval", str(finished), "--split", "train") == 0
        assert "accuracy" in capsys.readouterr().out

    def test_predict_from_arguments_file_and_standard_input(self, finished, table, tmp_path, capsys, monkeypatch):
        assert run("predict", str(finished), "a good film", "the plot, was bad") == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert [row["text"] for row in rows] == ["a good film", "the plot, was bad"]
        assert all(row["label"] in ("negative", "positive") and 0.5 <= float(row["probability"]) <= 1 for row in rows)

        out = tmp_path / "labels.jsonl"
        columns = ["--file", table, "--text-column", "review", "--format", "jsonl", "--out", str(out)]
        assert run("predict", str(finished), *columns) == 0
        assert len(out.read_text().splitlines()) == 40

        code = "import sys; from gradientless.cli import main; main()"
        answer = subprocess.run(
            [sys.executable, "-c", code, "predict", str(finished), "--format", "jsonl"],
            input=b"a good film\nthe plot, was bad\n",
            capture_output=True,
            check=True,
        )
        piped = [json.loads(line) for line in answer.stdout.splitlines()]
        assert [(p["label"], p["probability"]) for p in piped] == [
            (row["label"], pytest.approx(float(row["probability"]), abs=1e-5)) for row in rows
        ]

    def test_logits_come_in_the_order_of_the_rows(self, finished):
        from gradientless.language.data import Encoded
        from gradientless.language.tasks import Example
        from gradientless.run.evaluation import load_surface, logits_of
        from gradientless.run.predict import predict_texts

        texts = ["the plot was very very dull", "good", "a bad bad bad film the plot was dull", "a good film"]
        surface = load_surface(finished, "cpu")
        with torch.no_grad():
            surface.layers().out.weight.mul_(1000)  # a random body tells texts apart only in the last digits

        def logits(*chosen: str) -> torch.Tensor:
            return logits_of(surface, Encoded(surface.tokenizer, [Example(t, 0) for t in chosen], 16), batch_size=2)

        alone = torch.cat([logits(text) for text in texts])
        assert len(alone[:, 0].round(decimals=3).unique()) == 4
        assert torch.allclose(logits(*texts), alone, atol=5e-4)
        labels, probabilities = predict_texts(finished, texts)
        assert labels == [surface.labels[row.argmax()] for row in probabilities] and probabilities.shape == (4, 2)
        assert predict_texts(finished, [])[1].shape == (0, 2)

    def test_replay(self, finished, tmp_path, capsys):
        assert run("replay", str(finished), "--out", str(tmp_path / "again")) == 0
        assert "yes" in capsys.readouterr().out
        model = (finished / "model" / "model.safetensors").read_bytes()
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == model

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
        ],
        ids=["the system's", "a library's"],
    )
    def test_a_full_disk_is_one_line_and_loses_nothing(self, error, finished, table, tiny_model, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise error

        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_checkpoint", full)
            assert run(*training(table, tiny_model, out)) == 2
        assert run("train", "--out", str(out), "--resume") == 0
        model = (finished / "model" / "model.safetensors").read_bytes()
        assert (out / "model" / "model.safetensors").read_bytes() == model

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EIO, "broken"),
            SafetensorError("I/O error: broken (os error 5)"),
            OSError(errno.EROFS, "broken", b"place"),
        ],
        ids=["without a name", "a library's", "with a name in bytes"],
    )
    def test_an_error_of_the_system_is_one_line(self, error, table, tiny_model, tmp_path, monkeypatch, fails):
        def wrong(*_: object) -> None:
            raise error

        def lost(*_: object) -> None:
            raise OSError(errno.EROFS, "read-only", "another")

        monkeypatch.setattr(RunFolder, "save_checkpoint", wrong)
        monkeypatch.setattr(RunFolder, "withdraw", lost)
        line = fails(*training(table, tiny_model, tmp_path / "run"))[-1]
        assert line.startswith("file: must be one that can be used, got ") and "broken" in line

    def test_other_errors_are_shown_whole(self, table, tiny_model, tmp_path, monkeypatch):
        def wrong(*_: object) -> None:
            raise RuntimeError("other")

        monkeypatch.setattr(RunFolder, "save_checkpoint", wrong)
        with pytest.raises(RuntimeError, match="other"):
            cli.main(training(table, tiny_model, tmp_path / "run"))

    def test_a_finished_run_is_not_overwritten(self, finished, table, tiny_model, fails):
        assert "which holds a run" in fails(*training(table, tiny_model, finished))[-1]

    def test_resume_must_agree(self, finished, fails):
        (line,) = fails("train", "--out", str(finished), "--resume", "--seed", "7")
        assert line == f"--resume: must agree with the run in '{finished}', got seed: 7 here, 42 there"

    def test_stopped_and_resumed_to_the_same_bytes(self, finished, table, tiny_model, tmp_path, capsys, monkeypatch):
        out = tmp_path / "stopped"
        from gradientless.run.train import Run

        step = Run.step

        def interrupted(self, t, logged):
            if t == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, t, logged)

        monkeypatch.setattr(Run, "step", interrupted)
        assert run(*training(table, tiny_model, out)) == cli.STOPPED
        told = capsys.readouterr().err
        assert f"continue with: gradientless train --out {out} --resume" in " ".join(told.split())
        monkeypatch.setattr(Run, "step", step)
        assert run("train", "--out", str(out), "--resume", "--micro-batch-size", "8") == 0
        for name in ("metrics.jsonl", "trajectory.bin", "model/model.safetensors"):
            assert (out / name).read_bytes() == (finished / name).read_bytes()
        assert "micro_batch_size = 8" in (out / "config.toml").read_text()

    def test_first_order_runs_through_the_same_door(self, table, tiny_model, tmp_path):
        out = tmp_path / "adamw"
        assert run(*training(table, tiny_model, out, "--optimizer", "adamw", "optimizer.lr=1e-3")) == 0
        assert json.loads((out / "summary.json").read_text())["steps"] == 8

    def test_a_folder_is_named_after_the_run(self, table, tiny_model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments = training(table, tiny_model, Path("x"))
        at = arguments.index("--out")
        for _ in range(2):
            assert run(*arguments[:at], *arguments[at + 2 :]) == 0
        assert sorted(p.name for p in Path("runs").iterdir()) == ["reviews-gld-seed42", "reviews-gld-seed42-2"]


class TestBadInput:
    def test_two_mistakes_at_once(self, fails):
        first, second = fails("train", "--steps", "0", "--optimizer", "gldd")
        assert first == "steps: must be >= 1, got 0"
        assert second.startswith("optimizer: unknown optimizer 'gldd'; did you mean 'gld'?")

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["train", "thesi"], "recipe: unknown recipe 'thesi'; did you mean 'thesis'?"),
            (["train", "no/such.toml"], "recipe: file not found, got 'no/such.toml'"),
            (["train", "--task", "sst-2"], "task: unknown task 'sst-2'; did you mean 'sst2'?"),
            (["train", "schedule.name=linaer"], "schedule.name: unknown schedule 'linaer'; did you mean 'linear'?"),
            (["train", "stepz=4"], "config: unknown key 'stepz'; did you mean 'steps'?"),
            (["list", "task"], "list: unknown kind 'task'; did you mean 'tasks'?"),
            (["assets", "minilmm"], "assets: unknown asset 'minilmm'; did you mean 'minilm'?"),
            (["replay", "no-such-run"], "run: folder not found, got 'no-such-run'"),
            (["eval", "no-such-run"], "model: folder not found, got 'no-such-run'"),
            (["predict", "no-such-run", "text"], "model: folder not found, got 'no-such-run'"),
            (["predict", "x", "text", "--format", "cvs"], "--format: unknown format 'cvs'; did you mean 'csv'?"),
            (
                ["predict", "x", "text", "--file", "y"],
                "predict: texts must be given as arguments or as --file, got both",
            ),
            (["predict", "x", "t", "--out", "no/y"], "--out: must lie in an existing folder, got 'no/y'"),
            (["predict", "x", "--file", "no-such.txt"], "file: file not found, got 'no-such.txt'"),
        ],
    )
    def test_one_line(self, fails, arguments, line, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (found,) = fails(*arguments)
        assert found.startswith(line)
        assert list(tmp_path.iterdir()) == []

    def test_broken_toml_says_the_line(self, fails, tmp_path):
        (tmp_path / "r.toml").write_text("steps = 3\n[optimizer\n")
        (line,) = fails("train", str(tmp_path / "r.toml"))
        assert "must be valid TOML" in line and "line 2" in line

    def test_unwritable_folder(self, fails, tmp_path):
        (tmp_path / "file").touch()
        (line,) = fails("train", "--out", str(tmp_path / "file" / "run"))
        assert line.startswith("out: must be a folder that can be written, got")

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (["--data", "no-such.csv"], "data: file not found, got 'no-such.csv'"),
            (["--text-column", "reviw"], "did you mean 'review'?"),
            (["optimizer.radius=-1"], "GLD: radius must be > 0"),
            (["optimizer.entries=0"], "entries must be"),
            (["tensors=[{pattern='*.bias', entries=0}]"], "bias"),
        ],
    )
    def test_a_mistake_seen_only_with_the_data_frees_the_folder(self, more, line, capsys, table, tiny_model, tmp_path):
        out = tmp_path / "run"
        arguments = training(table, tiny_model, out)
        if more[0] in arguments:
            arguments[arguments.index(more[0]) + 1] = more[1]
            more = []
        assert run(*arguments, *more) == 2
        assert line in capsys.readouterr().err.strip().split("\n")[-1]
        assert not out.exists()

    def test_corrupted_checkpoint(self, capsys, table, tiny_model, tmp_path):
        out = tmp_path / "run"
        assert run(*training(table, tiny_model, out)) == 0
        (out / "summary.json").unlink()
        (out / "checkpoint-8" / "tensors.safetensors").write_bytes(b"junk")
        capsys.readouterr()
        assert run("train", "--out", str(out), "--resume") == 2
        assert "checkpoint-8: corrupted" in capsys.readouterr().err.strip().split("\n")[-1]

    def test_texts_that_are_none(self, finished, fails, tmp_path):
        assert fails("predict", str(finished), " ") == [
            "predict: some row must have a text, got none: nothing in text 1"
        ]
        (tmp_path / "t.txt").write_bytes(b"\x80\x81\xff")
        assert "must be text in UTF-8" in fails("predict", str(finished), "--file", str(tmp_path / "t.txt"))[0]

    def test_eval_of_labels_that_the_model_does_not_know(self, finished, capsys, tmp_path):
        rows = "\n".join(f"film {i},{'up' if i % 2 else 'down'}" for i in range(20))
        (tmp_path / "o.csv").write_text("review,verdict\n" + rows)
        columns = ["--text-column", "review", "--label-column", "verdict"]
        assert run("eval", str(finished), "--data", str(tmp_path / "o.csv"), *columns) == 2
        line = capsys.readouterr().err.strip()
        assert line == "data: labels must be those of the model (negative, positive), got 'down', 'up'"

    def test_eval_of_a_model_without_data(self, finished, fails):
        (line,) = fails("eval", str(finished / "model"))
        assert line.startswith("eval: --task or --data must be given with the folder of a model")

    def test_a_missing_package_is_named(self, monkeypatch, fails, tmp_path):
        monkeypatch.setitem(sys.modules, "tomli_w", None)
        monkeypatch.delitem(sys.modules, "gradientless.run.config")
        (line,) = fails("train")
        assert line == cli.INSTALL.format("tomli_w")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"gradientless {command}" in capsys.readouterr().out.replace("Usage: gradientless", "")


def test_starting_values_in_the_help_are_those_of_the_docs(capsys):
    """Every row names a lr and an eps that stand in a row of the table for the same thing."""
    assert run("train", "--help") == 0
    lines = re.findall(r"  (\S.*?)  +optimizer.lr=(\S+) optimizer.eps=(\S+)", capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| ")]
    assert len(lines) == 7
    for what, lr, eps in lines:
        kind = what.split(",")[0].split()[0]
        size = what.rpartition(", ")[2] if "illion" in what else ""
        rows = [row for row in table if row[0].startswith(kind) and size in f"{row[0]} {row[1]}"]
        assert any(lr in row[2] and eps in row[3] for row in rows if len(row) == 5), what


@pytest.mark.parametrize(
    ("settings", "flags", "told"),
    [
        ((), {"optimizer.name": "mezo"}, ["steps=10000", "optimizer.lr=0.003", "schedule.name=linear"]),
        (("steps=7", "optimizer.lr=1e-3"), {"optimizer.name": "mezo"}, ["batch_size=64", "evaluate_every=1"]),
        (("forward_passes=70",), {"surface.name": "lora"}, ["surface.start=probe", "optimizer.rank"]),
    ],
)
def test_what_is_taken_unasked_is_told_as_it_would_be_given(settings, flags, told):
    from gradientless.run.config import RunConfig

    config = RunConfig.load(None, settings, flags, usual=True)
    begin, _, line = str(cli.train._unasked(config, settings, flags)).partition(": ")
    assert begin == f"{config.surface.name} by {config.optimizer.name}, taken unasked"
    assert [setting for setting in told if setting in line] == [setting for setting in told if "rank" not in setting]
    names = {setting.partition("=")[0] for setting in settings}
    assert not names & {each.partition("=")[0] for each in line.split()} and ("steps" in names) <= (
        "steps=" not in line
    )
    again = RunConfig.load(None, [*settings, *line.split()], flags)
    assert again.differences(config) == []


def test_nothing_is_told_of_the_usual_head():
    from gradientless.run.config import RunConfig

    assert cli.train._unasked(RunConfig.load(None, ("seed=3",), usual=True), ("seed=3",), {}) is None


def test_help_version_and_list_as_a_program():
    program = [sys.executable, "-m", "gradientless"]
    told = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("gradientless ")
    everything = subprocess.run([*program, "list"], capture_output=True, text=True, check=True).stdout
    for name in ("rotten-tomatoes", "starter:minilm", "gldsearch", "adamw", "head", "cosine-restarts", "thesis-best"):
        assert name in everything
    bad = subprocess.run([*program, "train", "--steps", "0"], capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (2, "steps: must be >= 1, got 0\n")


def test_assets_tells_without_fetching(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path))
    assert run("assets") == 0
    told = capsys.readouterr().out
    assert "minilm" in told and "absent" in told and str(tmp_path) in told


def test_resume_must_name_a_run(tmp_path, capsys, monkeypatch):
    assert run("train", "--out", str(tmp_path / "typo"), "--resume") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"--resume: must find a run to continue, got none in '{tmp_path / 'typo'}'")
    monkeypatch.chdir(tmp_path)
    assert run("train", "--resume") == 2
    assert capsys.readouterr().err.startswith("--resume: must find a run to continue, got none in 'runs/")
    assert not (tmp_path / "typo").exists()


def test_streams_that_the_caller_closed(table, tiny_model, tmp_path):
    """As under cron."""
    command = [sys.executable, "-m", "gradientless", *training(table, tiny_model, tmp_path / "run")]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0 and (tmp_path / "run" / "summary.json").is_file()
