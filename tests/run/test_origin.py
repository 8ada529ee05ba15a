"""A run goes on, and is replayed, as what it was: what changed in its files, rows, model or code is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny_run
from gradientless import cli
from gradientless.errors import UserError
from gradientless.language.surfaces import HeadSurface
from gradientless.language.tasks import Example, Splits
from gradientless.run import origin
from gradientless.run.config import RunConfig
from gradientless.run.origin import Origin, code_of, data_of
from gradientless.run.runfolder import RunFolder
from gradientless.run.sealed import require_toml, sealed_toml, write_sealed
from gradientless.run.train import Run
from gradientless.schema import checksum, read_sealed, sealed, unsealed
from gradientless.search.trajectory import MAGIC, Trajectory
from tiny_run import gradientless

STEPS = 30
OPTIONS = {"gld": ("optimizer.radius=0.1",), "adamw": ("optimizer.lr=1e-2",)}


@pytest.fixture
def told(capsys) -> Callable[[], str]:
    """The last line on standard error."""
    return lambda: capsys.readouterr().err.rstrip("\n").split("\n")[-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, rows, and for each optimizer a run that was stopped and the same run without a stop."""
    place = tmp_path_factory.mktemp("origin")
    tiny_run.make_model(place / "model")
    tiny_run.write_table(place / "rows.csv", count=60)
    tiny_run.write_table(place / "dev.csv", count=12, seed=1)
    step = Run.step

    def interrupted(self, t, logged):
        if t == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, t, logged)

    for optimizer in OPTIONS:
        assert gradientless(*arguments(place, place / f"{optimizer}-straight", optimizer)) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "step", interrupted)
            assert gradientless(*arguments(place, place / f"{optimizer}-stopped", optimizer)) == cli.STOPPED
    return place


def arguments(place: Path, out: Path, optimizer: str) -> list[str]:
    more = (*OPTIONS[optimizer], "checkpoint_every=7", "--validation", str(place / "dev.csv"))
    files = str(place / "model"), str(place / "rows.csv")
    return tiny_run.arguments(*files, out, *more, steps=STEPS, optimizer=optimizer)


@pytest.fixture(params=sorted(OPTIONS))
def stopped(request, place, tmp_path, monkeypatch) -> Path:
    """A copy of the stopped run, with a model and rows that may be changed."""
    for name in ("rows.csv", "dev.csv"):
        shutil.copy(place / name, tmp_path / name)
    shutil.copytree(place / "model", tmp_path / "model")
    run = tmp_path / "run"
    shutil.copytree(place / f"{request.param}-stopped", run)
    restate(run, lambda text: text.replace(str(place), str(tmp_path)))
    return run


def restate(run: Path, change: Callable[[str], str]) -> None:
    """Change the configuration in every place where the run tells it."""
    file = run / "config.toml"
    text = change(without_seal(file.read_text("utf-8")))
    file.write_text(sealed_toml(text), "utf-8")
    if (run / "trajectory.bin").exists():
        rewrite_header(run, lambda header: json.loads(change(json.dumps(header))))
    for state in run.glob("checkpoint-*/state.json"):
        record = unsealed("run", json.loads(state.read_text("utf-8")), state)
        state.write_text(json.dumps(sealed(json.loads(change(json.dumps(record))))), "utf-8")


def without_seal(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith("# sha256"))


def rewrite_header(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    log = Trajectory.open(run / "trajectory.bin")
    records = list(log)
    log.close()
    log.path.unlink()
    again = Trajectory(log.path, change(log.header))
    for record in records:
        again.append(record)
    again.close()


def resume(run: Path, *more: str) -> int:
    return gradientless("train", "--out", str(run), "--resume", *more)


def same_as_straight(place: Path, run: Path) -> bool:
    """Whether weights, metrics and the log's records are those of the run that was not stopped."""
    logged = (run / "trajectory.bin").exists()
    runs = run, place / ("gld-straight" if logged else "adamw-straight")
    found, expected = (
        {name: digest for name, digest in tiny_run.outcome(each).items() if name != "trajectory.bin"} for each in runs
    )
    records = [list(Trajectory.open(each / "trajectory.bin")) if logged else [] for each in runs]
    return found == expected and records[0] == records[1]


def test_what_did_not_change_goes_on_to_the_same_bytes(place, stopped):
    assert resume(stopped) == 0
    assert same_as_straight(place, stopped)


class TestRows:
    @pytest.mark.parametrize("file", ["rows.csv", "dev.csv"])
    @pytest.mark.parametrize("what", ["a text", "a label", "the order"])
    def test_others_are_refused(self, what, file, stopped, tmp_path, told):
        head, first, second, *rest = (tmp_path / file).read_text("utf-8").splitlines()
        text, _, label = first.rpartition(",")
        other = "positive" if label == "negative" else "negative"
        changed = {
            "a text": [f"{text} very,{label}", second],
            "a label": [f"{text},{other}", second],
            "the order": [second, first],
        }[what]
        (tmp_path / file).write_text("\n".join([head, *changed, *rest]) + "\n", "utf-8")
        assert resume(stopped) == 2
        assert told() == (
            "--resume: the rows must be those that the run began with: their texts, their labels and their order, "
            "got others"
        )

    def test_a_checksum_tells_every_part_of_a_row(self):
        row = Example("a", 0, "b", {"c": "d"}, ("e", "f"), ("e",), "g")
        others = [
            Example("x", 0, "b", {"c": "d"}, ("e", "f"), ("e",), "g"),
            Example("a", 1, "b", {"c": "d"}, ("e", "f"), ("e",), "g"),
            Example("a", 0, None, {"c": "d"}, ("e", "f"), ("e",), "g"),
            Example("a", 0, "b", {"c": "x"}, ("e", "f"), ("e",), "g"),
            Example("a", 0, "b", {"c": "d"}, ("f", "e"), ("e",), "g"),
            Example("a", 0, "b", {"c": "d"}, ("e", "f"), ("f",), "g"),
        ]
        sums = [data_of(Splits([each], [row], [], ())) for each in (row, *others)]
        sums += [data_of(Splits([row], [each], [], ())) for each in others]
        sums.append(data_of(Splits([row, row], [], [], ())))
        assert len(set(sums)) == len(sums)


class TestModel:
    def test_another_tokenizer(self, stopped, tmp_path, told):
        file = tmp_path / "model" / "tokenizer.json"
        words = json.loads(file.read_text("utf-8"))
        vocabulary = words["model"]["vocab"]
        vocabulary["good"], vocabulary["film"] = vocabulary["film"], vocabulary["good"]
        file.write_text(json.dumps(words), "utf-8")
        assert resume(stopped) == 2
        assert told() == "--resume: the tokenizer and the prompt must encode the rows as when the run began, got others"

    def test_other_settings(self, stopped, tmp_path, told):
        """Which no weight tells."""
        file = tmp_path / "model" / "config.json"
        settings = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps({**settings, "layer_norm_eps": 0.1}), "utf-8")
        assert resume(stopped) == 2
        assert told() == "--resume: the model's settings must be those that the run began with, got others"

    def test_other_weights(self, stopped, tmp_path, told):
        file = tmp_path / "model" / "model.safetensors"
        tensors = load_file(file)
        name = next(key for key in sorted(tensors) if "encoder" in key)
        save_file({**tensors, name: tensors[name] + 1e-4}, file, metadata={"format": "pt"})
        assert resume(stopped) == 2
        assert told() == "--resume: the base model's weights must be those that the run began with, got others"


class TestConfiguration:
    @pytest.mark.parametrize(
        ("old", "new", "key"),
        [
            ("seed = 42", "seed = 43", "seed"),
            ("warmup = 0", "warmup = 5", "schedule.warmup"),
            ("batch_size = 16", "batch_size = 15", "batch_size"),
        ],
    )
    def test_that_says_otherwise_than_the_runs_files(self, old, new, key, stopped, told):
        file = stopped / "config.toml"
        text = without_seal(file.read_text("utf-8"))
        assert old in text
        file.write_text(sealed_toml(re.sub(rf"^{re.escape(old)}(\.0)?$", new, text, count=1, flags=re.M)), "utf-8")
        assert resume(stopped) == 2
        line = told()
        assert line.startswith(f"--resume: the configuration must be what the run began with, got {key}: ")

    def test_a_changed_file_is_refused_wherever_it_is_read(self, place, tmp_path, told):
        run = tmp_path / "run"
        shutil.copytree(place / "gld-straight", run)
        text = (run / "config.toml").read_text("utf-8")
        (run / "config.toml").write_text(text.replace("seed = 42", "seed = 41"), "utf-8")
        line = f"run: config.toml must hold what the run wrote, got a changed file in '{run}'"
        for command in ("eval", "replay"):
            assert gradientless(command, str(run)) == 2 and told() == line
        assert resume(run) == 2 and told() == line


class TestCode:
    @pytest.fixture
    def another(self, monkeypatch) -> None:
        monkeypatch.setattr(origin, "_sources", lambda: "0123456789abcdef")

    def test_is_refused_with_a_way_on(self, another, place, stopped, told, capsys):
        assert resume(stopped) == 2
        line = told()
        assert line.startswith(
            "--resume: the code must be what the run began with, got its sources 0123456789abcdef here, "
        )
        assert line.endswith("there; --other-code goes on with it")
        assert resume(stopped, "--other-code") == 0
        assert "other code  its sources 0123456789abcdef here" in capsys.readouterr().err
        assert same_as_straight(place, stopped)

    def test_once_accepted_it_is_the_runs(self, another, stopped, monkeypatch, told):
        step = Run.step

        def interrupted(self, t, logged):
            if t == 22:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, t, logged)

        monkeypatch.setattr(Run, "step", interrupted)
        assert resume(stopped, "--other-code") == cli.STOPPED
        monkeypatch.setattr(Run, "step", step)
        assert resume(stopped) == 0

    def test_other_rows_are_refused_all_the_same(self, another, stopped, tmp_path, told):
        (tmp_path / "rows.csv").write_text((tmp_path / "rows.csv").read_text("utf-8").replace("film", "plot"), "utf-8")
        assert resume(stopped, "--other-code") == 2 and "the rows must be those" in told()

    def test_a_package_of_another_version(self, stopped, monkeypatch, told):
        version = origin.importlib.metadata.version
        monkeypatch.setattr(
            origin.importlib.metadata, "version", lambda name: "9.9" if name == "torch" else version(name)
        )
        assert resume(stopped) == 2
        assert f"got torch 9.9 here, {version('torch')} there" in told()

    def test_of_the_users_own(self, tmp_path):
        files = {name: tmp_path / f"{name}.py" for name in ("loss", "give", "mine")}
        files["loss"].write_text("def f(logits, labels):\n    return 1.0\n", "utf-8")
        files["give"].write_text("def f(texts, rows):\n    return 1.0\n", "utf-8")
        files["mine"].write_text("from gradientless import GLD\n\n\nclass Mine(GLD):\n    pass\n", "utf-8")
        own = {name: f"{file}:{'Mine' if name == 'mine' else 'f'}" for name, file in files.items()}
        configs = [
            RunConfig.load(None, [f"loss={own['loss']}", f"optimizer.name={own['mine']}"]),
            RunConfig.load(None, [f"reward={own['give']}"]),
        ]
        before = [code_of(config) for config in configs]
        for file in files.values():
            file.write_text(file.read_text("utf-8") + "\n# changed\n", "utf-8")
        after = [code_of(config) for config in configs]
        changed = [{key for key in one if one[key] != other[key]} for one, other in zip(before, after, strict=True)]
        assert changed == [{own["loss"], own["mine"]}, {own["give"]}]

    def test_what_decides_no_number_is_none_of_it(self, tmp_path, monkeypatch):
        root = tmp_path / "gradientless"
        shutil.copytree(Path(origin.inspect.getfile(origin.gradientless)).parent, root)
        monkeypatch.setattr(origin.inspect, "getfile", lambda _: str(root / "__init__.py"))
        found = []
        for name in (None, "cli/runs.py", "run/report.py", "search/space.py", "language/data.py", "run/objective.py"):
            if name is not None:
                (root / name).write_text((root / name).read_text("utf-8") + "\n# changed\n", "utf-8")
            found.append(origin._sources.__wrapped__())
        assert found[0] == found[1] == found[2] and len(set(found[2:])) == 4


class TestAnEarlierVersion:
    """Whose files say nothing of what the run is made of, and hold no checksums of themselves."""

    @pytest.fixture
    def earlier(self, stopped) -> Path:
        return self.unmake(stopped)

    def unmake(self, run: Path) -> Path:
        text = (run / "config.toml").read_text("utf-8")
        (run / "config.toml").write_text(without_seal(text), "utf-8")
        for state in run.glob("*/state.json"):
            record = unsealed("run", json.loads(state.read_text("utf-8")), state)
            for key in ("origin", "logs", "trajectory"):
                record["state"].pop(key, None)
            old = {"format": 1, "step": record["step"], "sha256": record["tensors"], "state": record["state"]}
            state.write_text(json.dumps(old), "utf-8")
        if (run / "trajectory.bin").exists():
            rewrite_header(run, lambda header: {key: value for key, value in header.items() if key != "origin"})
            content = (run / "trajectory.bin").read_bytes()
            (run / "trajectory.bin").write_bytes(re.sub(rb'"check": "\w+", ', b"", content, count=1))
        if (run / "summary.json").exists():
            (run / "summary.json").write_text(json.dumps(read_sealed(run / "summary.json", "run")), "utf-8")
        return run

    def test_goes_on_when_it_is_asked_to(self, earlier, place, told):
        assert resume(earlier) == 2
        assert told() == (
            "--resume: must be of a run that says what it is made of, got one of a version that did not note it; "
            "--other-code goes on with it"
        )
        assert resume(earlier, "--other-code") == 0
        assert same_as_straight(place, earlier)

    def test_is_replayed_and_evaluated(self, place, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(place / "gld-straight", run)
        self.unmake(run)
        assert gradientless("replay", str(run)) == 0
        assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())
        assert gradientless("eval", str(run)) == 0


class TestReplay:
    @pytest.fixture
    def run(self, place, tmp_path) -> Path:
        shutil.copytree(place / "gld-straight", tmp_path / "run")
        return tmp_path / "run"

    def test_other_code_is_told(self, run, monkeypatch, capsys):
        monkeypatch.setattr(origin, "_sources", lambda: "0123456789abcdef")
        assert gradientless("replay", str(run)) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "code other than the run's: its sources 0123456789abcdef here" in said
            and "bit-equal to the run yes" in said
        )

    def test_another_step_in_the_summary(self, run, told):
        summary = read_sealed(run / "summary.json", "run")
        text = (run / "summary.json").read_text("utf-8")
        (run / "summary.json").write_text(
            text.replace(f'"model_step": {summary["model_step"]}', '"model_step": 5'), "utf-8"
        )
        assert gradientless("replay", str(run)) == 2
        assert told() == f"run: summary.json must hold what the run wrote, got a changed file in '{run}'"

    def test_what_cannot_be_compared_is_not_said_to_be_equal(self, run, capsys):
        for best in run.glob("best-*"):
            shutil.rmtree(best)
        assert gradientless("replay", str(run)) == 0
        assert "bit-equal to the run not known: the run holds no best-" in " ".join(capsys.readouterr().out.split())

    def test_a_log_that_was_cut(self, run, told):
        log = Trajectory.open(run / "trajectory.bin")
        log.truncate(2)
        log.close()
        assert gradientless("replay", str(run)) == 2
        assert told().endswith("steps of the run's weights, got 2; was it shortened?")

    def test_other_records(self, run, told):
        """Whose own check sums are right."""
        log = Trajectory.open(run / "trajectory.bin")
        records = list(log)
        log.truncate(len(log) - 1)
        log.append(bytes([records[-1][0] ^ 1]) + records[-1][1:])
        log.close()
        assert gradientless("replay", str(run)) == 2
        assert told() == "replay: the log must hold what the run wrote, got a changed file; its check sum differs"

    def test_needs_neither_rows_nor_the_saved_model(self, run, capsys):
        """Labels stand in the log."""
        shutil.rmtree(run / "model")
        restate(run, lambda text: text.replace("rows.csv", "moved.csv"))
        assert gradientless("replay", str(run)) == 0
        assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())


class TestFiles:
    def test_every_digit_is_noticed_or_harmless(self, place):
        """Of all files that a resumed run reads back, as they are read."""
        folder = RunFolder(place / "gld-stopped")
        (state,) = folder.path.glob("checkpoint-*/state.json")
        sums = json.loads(state.read_text("utf-8"))["state"]["logs"]
        assert set(sums) == {"metrics.jsonl", "timings.jsonl"}
        step = int(state.parent.name.partition("-")[2])

        def readings(folder: RunFolder) -> dict[Path, Callable[[], object]]:
            return {
                folder.config: lambda: folder.read_config().resolved(),
                folder.path / state.relative_to(state.parents[1]): lambda: folder.load_checkpoint()[1:],  # type: ignore[index]
                folder.metrics: lambda: (folder.truncate_logs(step), folder.require_logs(sums)),
                folder.timings: lambda: (folder.truncate_logs(step), folder.require_logs(sums)),
                folder.trajectory: lambda: Trajectory.open(folder.trajectory).header,
            }

        noticed = 0
        for file, read in readings(folder).items():
            good, content = read(), file.read_bytes()
            end = content.find(b"\n", len(MAGIC)) if file == folder.trajectory else len(content)
            spots = [match.start() for match in re.finditer(rb"\d", content[:end])]
            for spot in spots[:: max(1, len(spots) // 60)]:
                changed = bytearray(content)
                changed[spot] = ord("0") + (content[spot] - ord("0") + 3) % 10
                file.write_bytes(bytes(changed))
                try:
                    assert read() == good, (file.name, spot)
                except UserError:
                    noticed += 1
                finally:
                    file.write_bytes(content)
        assert noticed > 200

    def test_a_changed_file_ends_a_resumed_run_in_one_line(self, stopped, told):
        folder = RunFolder(stopped)
        (state,) = stopped.glob("checkpoint-*/state.json")
        for file, number in (
            (state, b'"forward_passes": '),
            (folder.metrics, b'"loss": 0.'),
            (folder.timings, b'"seconds": 0.'),
        ):
            content = file.read_bytes()
            at = content.find(number) + len(number)
            file.write_bytes(content[:at] + (b"1" if content[at : at + 1] != b"1" else b"2") + content[at + 1 :])
            assert resume(stopped) == 2
            line = told()
            assert file.name in line and (
                "must hold what the run wrote" in line or "does not match its checksum" in line
            )
            file.write_bytes(content)

    def test_records_of_before_the_checkpoint(self, place, tmp_path, told):
        """Which are not read again, but would be by a replay."""
        run = tmp_path / "run"
        shutil.copytree(place / "gld-stopped", run)
        log = Trajectory.open(run / "trajectory.bin")
        records = list(log)
        log.truncate(3)
        for record in [bytes([records[3][0] ^ 1]) + records[3][1:], *records[4:]]:
            log.append(record)
        log.close()
        assert resume(run) == 2 and "must hold the steps of the checkpoint, got others" in told()

    def test_the_best_weights_are_gone(self, place, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(place / "gld-stopped", run)
        for best in run.glob("best-*"):
            shutil.rmtree(best)
        assert resume(run) == 0
        assert "its weights are gone" in " ".join(capsys.readouterr().err.split())
        assert read_sealed(run / "summary.json", "run")["model_step"] in (20, 30)

    def test_values_are_sealed_not_their_layout(self, tmp_path):
        values = {"a": 0.1, "b": [1, None, {"c": "é"}], "d": float("inf")}
        path = tmp_path / "x.json"
        write_sealed(path, values)
        assert read_sealed(path, "run") == {**values, "d": None}
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")), indent=7), "utf-8")
        assert read_sealed(path, "run") == {**values, "d": None}
        assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1}) != checksum({"a": 1, "b": 2.5})
        path.write_text("[1]", "utf-8")
        with pytest.raises(UserError, match=r"x\.json in .*: it must be an object, got \[1\]"):
            read_sealed(path, "run")

    def test_toml_without_a_checksum_is_read_as_it_stands(self, tmp_path):
        path = tmp_path / "config.toml"
        for text, holds in (
            ("a = 1\n", True),
            (sealed_toml("a = 1\n"), True),
            (sealed_toml("a = 1\n").replace("1", "2", 1), False),
        ):
            path.write_text(text, "utf-8")
            if holds:
                require_toml(path)
            else:
                with pytest.raises(UserError, match="must hold what the run wrote"):
                    require_toml(path)


class TestFeatures:
    def test_of_a_model_with_other_settings_are_not_served(self, place, tmp_path):
        """Which has the same weights."""
        shutil.copytree(place / "model", tmp_path / "other")
        settings = json.loads((tmp_path / "other" / "config.json").read_text("utf-8"))
        (tmp_path / "other" / "config.json").write_text(json.dumps({**settings, "hidden_act": "relu"}), "utf-8")
        one, same, other = (
            HeadSurface.create(str(folder), ("a", "b"), pooling="mean", max_length=16).body_checksum()
            for folder in (place / "model", place / "model", tmp_path / "other")
        )
        assert one == same != other


def test_parts_are_compared_as_they_become_known():
    origin_ = Origin([{"data": "new"}, {"data": "old"}])
    with pytest.raises(UserError, match="the rows must be those"):
        origin_.state("data", "new")  # the older of two files says otherwise
    lenient = Origin([{"code": {"x": "1"}, "base": "a"}], other_code=True, say=lambda _: None)
    lenient.state("code", {"x": "2"})
    with pytest.raises(UserError, match="the base model's weights"):
        lenient.state("base", "b")
    assert lenient.parts == {"code": {"x": "2"}, "base": "b"}
