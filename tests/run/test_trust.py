"""A folder that somebody sent runs none of their code, is written to nowhere but in itself, and opens no pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

import tiny_run
from gradientless import cli
from gradientless.errors import UserError
from gradientless.language.surfaces.saved import note_files
from gradientless.run import lock, named, replay_run
from gradientless.run.config import RunConfig
from gradientless.run.lock import Busy
from gradientless.run.runfolder import BEST, RunFolder
from gradientless.run.sealed import sealed_toml, write_sealed
from gradientless.run.train import Run
from gradientless.schema import read_sealed
from gradientless.search.trajectory import Trajectory
from gradientless.writing import open_new, write_atomically, write_where_asked
from tiny_run import gradientless

MARKED = "import pathlib\npathlib.Path({mark!r}).touch()\n"
CODE = {
    "evil_loss.py": "def f(scores, labels):\n    return -scores.gather(1, labels[:, None]).mean()\n",
    "evil_reward.py": "def f(texts, rows):\n    return float(len(texts))\n",
    "evil_optimizer.py": "from gradientless import GLD\n\n\nclass Mine(GLD):\n    pass\n",
}


@pytest.fixture
def told(capsys) -> Callable[[], list[str]]:
    """The lines on standard error, but those about texts."""
    return lambda: capsys.readouterr().err.rstrip("\n").split("\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, rows, a run that ended and one that was stopped."""
    place = tmp_path_factory.mktemp("trust")
    tiny_run.make_model(place / "model")
    tiny_run.write_table(place / "rows.csv", count=60)
    assert gradientless(*arguments(place, place / "ended")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", stopping(Run.step, 14))
        assert gradientless(*arguments(place, place / "stopped")) == cli.STOPPED
    return place


def stopping(step: Callable, at: int) -> Callable:
    def stepped(self, t, logged):
        if t == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, t, logged)

    return stepped


def arguments(place: Path, out: Path, *more: str, optimizer: str = "gld") -> list[str]:
    files = str(place / "model"), str(place / "rows.csv")
    return tiny_run.arguments(*files, out, "optimizer.radius=0.1", *more, steps=20, optimizer=optimizer)


@pytest.fixture
def copied(place, tmp_path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(place / name, tmp_path / name))

    return copy


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory, with files of code each of which leaves a mark where it runs; the mark."""
    mark = tmp_path / "it-ran"
    for name, text in CODE.items():
        (tmp_path / name).write_text(MARKED.format(mark=str(mark)) + text, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    for name in CODE:
        sys.modules.pop(name.removesuffix(".py"), None)


def restate(run: Path, change: Callable[[str], str]) -> None:
    """Change config.toml as whoever sends a folder can: with the checksum of what then stands there."""
    text = re.sub(r"^# sha256.*\n?", "", (run / "config.toml").read_text("utf-8"), flags=re.M)
    (run / "config.toml").write_text(sealed_toml(change(text)), "utf-8")


def reads(run: Path, out: Path) -> dict[str, list[str]]:
    """The commands that read a run folder."""
    return {
        "eval": ["eval", str(run)],
        "replay": ["replay", str(run)],
        "replay elsewhere": ["replay", str(run), "--out", str(out / "replayed")],
        "export": ["export", str(run), "--out", str(out / "exported")],
        "resume": ["train", "--out", str(run), "--resume"],
        "recipe": ["train", str(run / "config.toml"), "--out", str(out / "again")],
        "diagnose": ["diagnose", str(run / "config.toml"), "--draws", "2"],
        "compare": [
            *("compare", str(run / "config.toml"), "--methods", "adamw", "--forward-passes", "9"),
            *("--out", str(out / "compared")),
        ],
    }


WANTS = {  # what stands in config.toml, what is planted there, and the name of the code
    "loss": ('loss = "cross-entropy"', 'loss = "evil_loss.py:f"', "evil_loss.py:f"),
    "module": ('loss = "cross-entropy"', 'loss = "evil_loss:f"', "evil_loss:f"),
    "reward": ('loss = "cross-entropy"', 'loss = "reward"\nreward = "evil_reward.py:f"', "evil_reward.py:f"),
    "optimizer": ('name = "gld"', 'name = "evil_optimizer.py:Mine"', "evil_optimizer.py:Mine"),
}


class TestCodeThatAFileNames:
    @pytest.mark.parametrize(
        ("command", "what"),
        [
            (command, what)
            for command in reads(Path(), Path())
            for what in WANTS
            if (command, what) != ("compare", "optimizer")  # whose methods take its place
        ],
    )
    def test_runs_nowhere(self, what, command, planted, copied, tmp_path, told):
        run = copied("ended" if command != "resume" else "stopped")
        if command == "export":
            shutil.rmtree(run / "model")
        old, new, name = WANTS[what]
        assert old in (run / "config.toml").read_text("utf-8")
        restate(run, lambda text: text.replace(old, new, 1))
        assert gradientless(*reads(run, tmp_path)[command]) == 2
        assert told()[-1] == (
            "code: must be named on this command line, or allowed by --trust-code, before it runs; "
            f"got '{name}', which '{run / 'config.toml'}' wants to run"
        )
        assert not planted.exists()
        assert not list(tmp_path.glob("again*"))

    def test_all_of_it_is_told_in_one_line(self, planted, copied, told):
        run = copied("ended")
        for old, new, _ in (WANTS["loss"], WANTS["optimizer"]):
            restate(run, lambda text, old=old, new=new: text.replace(old, new, 1))
        assert gradientless("eval", str(run)) == 2
        (line,) = told()
        assert "'evil_optimizer.py:Mine' and 'evil_loss.py:f'" in line
        assert not planted.exists()

    def test_of_a_stage(self, planted, copied, told):
        run = copied("ended")
        stages = (
            '\n[[stages]]\nname = "a"\n\n[[stages]]\nname = "b"\n\n[stages.optimizer]\nname = "evil_optimizer:Mine"\n'
        )
        restate(run, lambda text: text.replace("stages = []\n", "") + stages)
        assert gradientless("eval", str(run)) == 2
        assert "got 'evil_optimizer:Mine'" in told()[-1] and not planted.exists()

    def test_of_a_log(self, planted, copied, told):
        """Whose header tells the configuration too."""
        run = copied("stopped")
        log = Trajectory.open(run / "trajectory.bin")
        records, header = list(log), log.header
        log.close()
        log.path.unlink()
        header["origin"]["config"]["loss"] = "evil_loss.py:f"
        again = Trajectory(log.path, header)
        for record in records:
            again.append(record)
        again.close()
        for command in ("replay", "resume"):
            assert gradientless(*reads(run, run)[command]) == 2
            assert "got 'evil_loss.py:f', which 'the run's log or checkpoint' wants to run" in told()[-1]
        assert not planted.exists()

    def test_of_a_result_of_compare(self, planted, place, tmp_path, told):
        out = tmp_path / "compared"
        files = ["--data", str(place / "rows.csv"), "--model", str(place / "model"), "--device", "cpu"]
        files += ["data.max_length=16"]
        command = ["compare", "--methods", "linear-probe", "--out", str(out), *files]
        assert gradientless(*command) == 0
        (record,) = out.glob("*-seed42.json")
        kept = read_sealed(record, "compare")
        write_sealed(record, {**kept, "config": {**kept["config"], "loss": "evil_loss.py:f"}})
        assert gradientless(*command) == 2
        assert "'evil_loss.py:f'" in told()[-1] and not planted.exists()

    @pytest.mark.parametrize("how", ["named", "trusted"])
    def test_runs_where_the_person_says_so(self, how, planted, place, tmp_path, told):
        run, own = tmp_path / "run", ["--optimizer", "evil_optimizer.py:Mine", "loss=evil_loss.py:f"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "step", stopping(Run.step, 14))
            command = arguments(place, run, "loss=evil_loss.py:f", optimizer="evil_optimizer.py:Mine")
            assert gradientless(*command) == cli.STOPPED
        planted.unlink()
        resumed = ["train", "--out", str(run), "--resume"]
        assert gradientless(*resumed, "--optimizer", "evil_optimizer.py:Mine") == 2
        assert "got 'evil_loss.py:f', which" in told()[-1]
        assert gradientless(*resumed, *(own if how == "named" else ["--trust-code"])) == 0
        assert planted.exists()
        for command in (["eval"], ["replay"], ["export", "--out", str(tmp_path / how)]):
            assert gradientless(command[0], str(run), *command[1:], "--trust-code") == 0

    def test_predict_needs_none_of_it(self, planted, copied, tmp_path):
        run = copied("ended")
        restate(run, lambda text: text.replace(*WANTS["loss"][:2], 1))
        assert gradientless("predict", str(run), "a good film") == 0
        assert not planted.exists()

    def test_a_changed_file_is_told_before_it_runs(self, planted, place, tmp_path, capsys):
        run = tmp_path / "run"
        command = arguments(place, run, "loss=evil_loss.py:f", "surface.recompute=true")
        assert gradientless(*command) == 0
        assert re.search(
            r"^# sha256 of the code 'evil_loss\.py:f': [0-9a-f]{64}$", (run / "config.toml").read_text(), re.M
        )
        capsys.readouterr()
        assert gradientless("eval", str(run), "--trust-code") == 0
        assert "other code" not in capsys.readouterr().err
        file = tmp_path / "evil_loss.py"
        file.write_text(file.read_text("utf-8") + "\nprint('the other code')\n", "utf-8")
        assert gradientless("eval", str(run), "--trust-code") == 0
        found = capsys.readouterr()
        assert found.err.count("other code  'evil_loss.py:f' is not what it was when the run began\n") == 1
        (tmp_path / "evil_loss.py").write_text("raise RuntimeError('here')\n", "utf-8")
        assert gradientless("eval", str(run), "--trust-code") == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("other code") and "here" in second

    def test_a_program_names_what_it_runs(self, planted):
        assert RunConfig(loss="evil_loss.py:f").loss == "evil_loss.py:f" and planted.exists()

    def test_only_what_is_being_read_is_kept_from_running(self, planted):
        with pytest.raises(UserError, match=r"got 'evil_loss\.py:f', which 'x' wants"), named.only((), "x"):
            named.own("loss", "evil_loss.py:f", "function")
        assert not planted.exists()
        named.own("loss", "evil_loss.py:f", "function")
        assert planted.exists()


class TestLinks:
    """In a folder that is written to: what they point at is not touched."""

    @pytest.fixture
    def outside(self, tmp_path) -> Path:
        folder = tmp_path / "outside"
        folder.mkdir()
        (folder / "file").write_text("mine", "utf-8")
        return folder

    @staticmethod
    def of(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    @pytest.mark.parametrize(
        "name",
        [
            *("metrics.jsonl", "timings.jsonl", "trajectory.bin", "environment.json", "config.toml", "summary.json"),
            *(".config.toml.partial", ".metrics.jsonl.partial", ".timings.jsonl.partial", ".environment.json.partial"),
            *(".summary.json.partial", ".plot.png.partial", ".probe.partial", ".lock", "plot.png", "tensorboard"),
            *(".model.partial", ".checkpoint-20.partial", ".best-20.partial", "model", "replayed", ".replayed.partial"),
            "checkpoint-20",
        ],
    )
    @pytest.mark.parametrize("command", ["resume", "replay"])
    def test_planted_ones_are_refused(self, command, name, copied, outside, told):
        run = copied("stopped")
        before = self.of(outside)
        folder = "." not in name or name.startswith((".model", ".check", ".best", ".repl"))
        if (run / name).exists():
            content = run / name
            shutil.move(content, outside / name)
            before = self.of(outside) if content.is_file() or not folder else {**before}
            os.symlink(outside / name, run / name)
        else:
            os.symlink(outside if folder else outside / "file", run / name)
        assert gradientless(*reads(run, outside)[command]) == 2
        assert told()[-1] == (
            f"run: must hold files and folders alone to be written to, got a link, '{name}', in '{run}'"
        )
        assert {key: value for key, value in self.of_files(outside).items() if key in before} == before

    @staticmethod
    def of_files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def test_deep_ones_and_pipes(self, copied, outside, told):
        run = copied("stopped")
        os.symlink(outside, run / "tensorboard" / "deep")
        assert gradientless(*reads(run, outside)["resume"]) == 2 and "'tensorboard/deep'" in told()[-1]
        (run / "tensorboard" / "deep").unlink()
        os.mkfifo(run / "plot.png")
        assert gradientless(*reads(run, outside)["resume"]) == 2 and "got a pipe or a device, 'plot.png'" in told()[-1]

    @pytest.mark.parametrize("name", [".config.toml.partial", ".probe.partial", "..probe.partial.partial"])
    def test_temporary_ones_in_a_folder_without_a_run(self, name, place, outside, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        os.symlink(outside / "file", run / name)
        assert gradientless(*arguments(place, run)) == 0
        assert self.of(outside) == {"file": b"mine"}

    def test_a_log_with_another_name_is_copied_before_it_is_changed(self, copied, tmp_path):
        run = copied("stopped")
        names = ("metrics.jsonl", "timings.jsonl", "trajectory.bin")
        for name in names:
            os.link(run / name, tmp_path / name)
        before = {name: (tmp_path / name).read_bytes() for name in names}
        assert gradientless(*reads(run, tmp_path)["resume"]) == 0
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
        assert all((run / name).read_bytes() != before[name] for name in names)

    def test_the_run_folder_itself_may_be_one(self, copied, tmp_path):
        os.symlink(copied("stopped"), tmp_path / "link")
        assert gradientless(*reads(tmp_path / "link", tmp_path)["resume"]) == 0

    def test_files_are_made_exclusively(self, outside):
        os.symlink(outside / "none", outside / "link")
        for name in ("file", "link"):
            with pytest.raises(FileExistsError):
                open_new(outside / name)
        os.symlink(outside / "file", outside / ".new.partial")
        write_atomically(outside / "new", b"new")
        assert (outside / "file").read_bytes() == b"mine" and (outside / "new").read_bytes() == b"new"
        assert not (outside / "none").exists()


class TestPredictOut:
    @pytest.fixture
    def predict(self, place) -> Callable[[Path], int]:
        return lambda out: gradientless("predict", str(place / "ended"), "a good film", "--out", str(out))

    def test_a_link_stays_one(self, predict, tmp_path):
        (tmp_path / "file").write_text("old", "utf-8")
        (tmp_path / "file").chmod(0o640)
        os.symlink("file", tmp_path / "link")
        assert predict(tmp_path / "link") == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text("utf-8").startswith("text,label")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        os.symlink("made", tmp_path / "dangling")
        assert predict(tmp_path / "dangling") == 0
        assert (tmp_path / "dangling").is_symlink() and (tmp_path / "made").read_text("utf-8").startswith("text,label")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link", "made"]

    def test_a_pipe_is_written_into(self, predict, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
        reader.start()
        assert predict(tmp_path / "pipe") == 0
        reader.join(10)
        assert read[0].startswith(b"text,label") and stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)

    def test_more_than_a_pipe_holds(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()), daemon=True)
        reader.start()
        write_where_asked(tmp_path / "pipe", bytes(range(256)) * 4096)
        reader.join(10)
        assert read == [bytes(range(256)) * 4096]

    def test_a_device_is_written_into(self, predict):
        """A terminal, since a failure of this test would replace /dev/null for everybody."""
        master, slave = os.openpty()
        try:
            assert predict(Path(os.ttyname(slave))) == 0
            assert os.read(master, 1000).startswith(b"text,label")
            assert stat.S_ISCHR(Path(os.ttyname(slave)).lstat().st_mode)
        finally:
            os.close(slave)
            os.close(master)

    def test_what_is_no_place_for_a_file(self, predict, tmp_path, told):
        assert predict(tmp_path) == 2
        assert told()[-1] == f"--out: must be a file that can be written, got '{tmp_path}' (Is a directory)"

    def test_a_file_that_fails_leaves_the_old_one(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("old", "utf-8")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_where_asked(tmp_path / "file", b"new")
        assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == ["old"]


WAITS = """
import sys, time
from pathlib import Path
from gradientless.run.runfolder import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Begins a process that holds a folder until its standard input is closed."""
    begun: list[subprocess.Popen[str]] = []

    def begin(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        begun.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


class TestTwoProcesses:
    def test_the_second_is_refused_with_the_firsts_id_and_host(self, writer, copied, told):
        run = copied("stopped")
        process, before = writer(run), snapshot(run)
        assert gradientless(*reads(run, run)["resume"]) == 2
        assert told()[-1] == (
            f"run: must be written to by one process at a time, got '{run}', which process {process.pid} on "
            f"{socket.gethostname()} writes to"
        )
        assert snapshot(run) == before
        process.communicate()
        assert not (run / ".lock").exists()
        assert gradientless(*reads(run, run)["resume"]) == 0

    def test_a_killed_ones_lock_is_none(self, writer, copied):
        run = copied("stopped")
        process = writer(run)
        process.kill()
        process.wait()
        assert (run / ".lock").read_text("utf-8") == f"{process.pid} {socket.gethostname()}"
        assert gradientless(*reads(run, run)["resume"]) == 0
        assert not (run / ".lock").exists()

    def test_two_that_begin_a_run(self, writer, place, tmp_path, told):
        writer(tmp_path / "run")
        assert gradientless(*arguments(place, tmp_path / "run")) == 2
        assert "must be written to by one process at a time" in told()[-1]

    def test_a_reader_beside_a_writer_works_and_writes_nothing(self, writer, copied, tmp_path, capsys):
        run = copied("ended")
        writer(run)
        before = snapshot(run)
        for command, arguments in reads(run, tmp_path).items():
            if command in ("eval", "replay", "replay elsewhere", "export"):
                assert gradientless(*arguments) == 0, command
        told = " ".join(capsys.readouterr().out.split())
        assert "bit-equal to the run yes" in told and "model not written; --out DIR writes it elsewhere (run: " in told
        assert snapshot(run) == before
        assert (tmp_path / "replayed" / "gradientless.json").exists()

    def test_a_run_that_is_read_while_it_goes_on(self, place, tmp_path, capsys):
        """A record that is being written is none, and a checkpoint may go while it is read."""
        run = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "gradientless", *long_run(place, run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 120
            while not list(run.glob("checkpoint-*")):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            for turn in range(3):
                replay_run.replay_run(run, keep=True)
                replay_run.export_run(run, tmp_path / f"exported-{turn}")
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == cli.STOPPED
        assert not (run / "replayed").exists()
        found = replay_run.replay_run(run, keep=True)
        log = Trajectory.read(run / "trajectory.bin")
        assert found["steps"] == f"{len(log):,} of {len(log):,}" and (run / "replayed").exists()

    def test_a_checkpoint_that_goes_while_it_is_looked_for(self, tmp_path, monkeypatch):
        folder = RunFolder.create(tmp_path / "run", "steps = 1\n")
        folder.save_checkpoint({"w": torch.ones(2)}, {}, 1, BEST)
        saved, first = RunFolder._saved, []

        def gone_on(self, kind):
            found = saved(self, kind)
            if not first:
                first.append(found)
                RunFolder(folder.path).save_checkpoint({"w": torch.zeros(2)}, {}, 2, BEST)
            return found

        monkeypatch.setattr(RunFolder, "_saved", gone_on)
        loaded = folder.load_checkpoint(BEST)
        assert loaded is not None and loaded[2] == 2

    def test_a_lock_that_its_holder_has_just_removed(self, tmp_path, monkeypatch):
        """It locks nothing: whoever comes next makes a file anew."""
        once, taken = lock._lock, []

        def lock_and_lose(handle: int) -> None:
            once(handle)
            if not taken:
                (tmp_path / ".lock").unlink()
            taken.append(handle)

        monkeypatch.setattr(lock, "_lock", lock_and_lose)
        with lock.locked(tmp_path, print):
            assert len(taken) == 2 and (tmp_path / ".lock").exists()

    @pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOSYS, True), (errno.EAGAIN, False)])
    def test_a_file_system_without_locks(self, number, goes_on, tmp_path, monkeypatch):
        def refuse(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(lock, "_lock", refuse)
        said: list[str] = []
        if goes_on:
            with lock.locked(tmp_path / "run", said.append):
                pass
            assert said == [
                f"no lock     the file system of '{tmp_path / 'run'}' has none: start no second process on this run"
            ]
        else:
            with (
                pytest.raises(Busy, match="which another process writes to"),
                lock.locked(tmp_path / "run", said.append),
            ):
                pass

    def test_what_was_refused_leaves_nothing(self, tmp_path, place, told):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "thesis.txt").write_text("mine", "utf-8")
        assert gradientless(*arguments(place, tmp_path / "notes")) == 2
        assert told()[-1].endswith("which holds 'thesis.txt'")
        assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


def long_run(place: Path, out: Path) -> list[str]:
    files = str(place / "model"), str(place / "rows.csv")
    often = ("evaluate_every=5", "checkpoint_every=5", "optimizer.radius=0.1")
    return tiny_run.arguments(*files, out, *often, steps=2_000_000)


class TestReplayElsewhere:
    @pytest.mark.parametrize("there", ["a file", "a folder that is not empty"])
    def test_what_is_there_is_not_overwritten(self, there, place, tmp_path, told):
        if there == "a file":
            out = tmp_path / "out"
            out.write_text("mine", "utf-8")
        else:
            out = Path(shutil.copytree(place / "model", tmp_path / "out"))
        before = snapshot(tmp_path)
        assert gradientless("replay", str(place / "ended"), "--out", str(out)) == 2
        assert told()[-1] == f"out: must be a new or empty folder, got '{out}'"
        assert snapshot(tmp_path) == before

    def test_within_the_run_folder_it_is_replaced(self, copied):
        run = copied("ended")
        for _ in range(2):
            assert gradientless("replay", str(run)) == 0
            (run / "replayed" / "more").touch()
        assert gradientless("replay", str(run)) == 0
        assert not (run / "replayed" / "more").exists() and not (run / ".lock").exists()

    def test_of_a_run_folder_that_cannot_be_written(self, copied, monkeypatch, capsys):
        run = copied("ended")

        def refuse(*_: object) -> int:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(lock, "_acquired", refuse)
        assert gradientless("replay", str(run)) == 0
        assert "not written; --out DIR writes it elsewhere (out: must be a folder that can be written" in " ".join(
            capsys.readouterr().out.split()
        )


class TestPickles:
    """Whatever they are called and whoever names them."""

    @pytest.fixture
    def bomb(self, tmp_path) -> Path:
        """A pickle that leaves a mark where it is opened."""

        class Marks:
            def __reduce__(self):
                return open, (str(tmp_path / "opened"), "w")

        torch.save({"w": Marks()}, tmp_path / "bomb.bin")
        return tmp_path / "bomb.bin"

    @pytest.fixture
    def model(self, place, tmp_path) -> Path:
        return Path(shutil.copytree(place / "model", tmp_path / "model"))

    def train(self, place: Path, model: Path, out: Path) -> int:
        return gradientless(*tiny_run.arguments(str(model), str(place / "rows.csv"), out, steps=2))

    @pytest.mark.parametrize("kind", ["a bomb", "tensors", "raw"])
    def test_a_models_weights(self, kind, bomb, model, place, tmp_path, told):
        (model / "model.safetensors").unlink()
        if kind == "a bomb":
            shutil.copy(bomb, model / "pytorch_model.bin")
        elif kind == "tensors":
            torch.save({"w": torch.ones(2)}, model / "pytorch_model.bin")
        else:
            (model / "pytorch_model.bin").write_bytes(b"\x80\x04raw")
        assert self.train(place, model, tmp_path / "run") == 2
        assert told()[-1] == (
            f"model: '{model}' could not be loaded: it has no safetensors weights, and pickled ones are not opened"
        )
        assert not (tmp_path / "opened").exists()

    def test_a_list_of_parts_that_names_one(self, model, place, tmp_path, told):
        from safetensors.torch import load_file

        tensors = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        torch.save(tensors, model / "part.bin")
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "part.bin")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        assert self.train(place, model, tmp_path / "run") == 2
        assert told()[-1].endswith("weights must be in safetensors, pickled ones are not opened, got one")

    @pytest.mark.parametrize("weights", ["adapter_model.bin", "adapter_model.safetensors"])
    def test_an_adapter_beside_a_model(self, weights, bomb, model, place, tmp_path, told):
        adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "base_model_name_or_path": "evil/model"}
        (model / "adapter_config.json").write_text(json.dumps(adapter), "utf-8")
        shutil.copy(bomb, model / weights)
        assert self.train(place, model, tmp_path / "run") == 2
        assert told()[-1] == f"model: '{model}' must be a model alone, got an adapter in it; merge the adapter before"
        assert not (tmp_path / "opened").exists()

    def test_the_adapter_of_a_saved_model(self, bomb, place, tmp_path, told):
        run = tmp_path / "run"
        lora = ("--surface", "lora", "optimizer.lr=1e-3")
        files = str(place / "model"), str(place / "rows.csv")
        assert gradientless(*tiny_run.arguments(*files, run, *lora, steps=2, optimizer="mezo")) == 0
        assert gradientless("predict", str(run), "a good film") == 0
        (run / "model" / "adapter_model.safetensors").unlink()
        shutil.copy(bomb, run / "model" / "adapter_model.bin")
        note_files(run / "model")  # by whoever sent it
        told()
        assert gradientless("predict", str(run), "a good film") == 2
        assert "must hold an adapter in peft's format" in told()[-1] and not (tmp_path / "opened").exists()

    def test_torch_opens_its_own_again_afterwards(self, model, tmp_path):
        from gradientless.language import backbone

        load = torch.load
        backbone.load_backbone(str(model))
        assert torch.load is load


class TestModelsOfOthers:
    def test_their_code_is_not_run(self, place, tmp_path, planted, told):
        model = Path(shutil.copytree(place / "model", tmp_path / "sent"))
        shutil.copy(tmp_path / "evil_loss.py", model / "modeling_evil.py")
        for name, entry in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
            settings = json.loads((model / name).read_text("utf-8"))
            changed = {**settings, "auto_map": {entry: "modeling_evil.f", "AutoConfig": "modeling_evil.f"}}
            (model / name).write_text(json.dumps({**changed, "model_type": "evil"}), "utf-8")
        assert TestPickles().train(place, model, tmp_path / "run") == 2
        assert len([line for line in told() if line.startswith("model: ")]) == 1 and not planted.exists()

    def test_a_kernel_of_the_hub_is_not_fetched(self, place, tmp_path, told):
        model = Path(shutil.copytree(place / "model", tmp_path / "sent"))
        settings = json.loads((model / "config.json").read_text("utf-8"))
        for key in ("attn_implementation", "_attn_implementation"):
            (model / "config.json").write_text(json.dumps({**settings, key: "evil/kernel"}), "utf-8")
            if transformers.AutoConfig.from_pretrained(model)._attn_implementation is None:
                continue  # a version of the library that does not read that key
            assert TestPickles().train(place, model, tmp_path / f"run-{key}") == 2
            assert told()[-1] == (
                f"model: '{model}' must be computed by code that is installed, got the kernel 'evil/kernel'"
            )
