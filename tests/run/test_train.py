"""Whole runs through the command line, on a tiny random BERT and rows made from a template."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from gradientless import cli
from gradientless.language.data import batch_indices
from gradientless.language.surfaces import HeadSurface
from gradientless.run.assemble import make_surface
from gradientless.run.evaluation import evaluate_folder, load_splits, load_surface, logits_of
from gradientless.run.predict import predict_texts
from gradientless.run.runfolder import RunFolder
from gradientless.run.train import Run, Stopped
from gradientless.schema import sealed, unsealed
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS
from gradientless.search.schedules import multiplier
from tiny_run import gradientless

MAJORITY = 0.6
GLD = ("optimizer.radius=0.1",)
ADAMW = ("optimizer.lr=1e-2",)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv")


@pytest.fixture
def train(model, rows, tmp_path):
    """train(name, settings, …) -> the run's folder, after a run that ended well."""

    def run(name: str, *more: str, **options: Any) -> Path:
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / name, *more, **options)) == 0
        return tmp_path / name

    return run


@pytest.fixture(scope="module")
def finished(model, rows, tmp_path_factory) -> Path:
    """A run of GLD that has ended."""
    out = tmp_path_factory.mktemp("runs") / "gld"
    assert gradientless(*tiny_run.arguments(model, rows, out, *GLD, steps=150)) == 0
    return out


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


def metrics_of(run: Path, split: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [record for record in records if record["split"] == split]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The weights after the last step."""
    (place,) = run.glob("checkpoint-*")
    tensors = load_file(place / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("weights/")}


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights and losses, but for rounding."""
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys() and len(left) == 4
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    for split in ("train", "validation"):
        losses = [[record["loss"] for record in metrics_of(run, split)] for run in (one, other)]
        assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


class TestARun:
    def test_leaves_its_files(self, finished):
        names = {path.name for path in finished.iterdir()}
        assert names == {
            *("config.toml", "environment.json", "metrics.jsonl", "timings.jsonl", "trajectory.bin", "tensorboard"),
            *("checkpoint-150", f"best-{summary_of(finished)['model_step']}", "model", "summary.json", "plot.png"),
        }
        assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_summary(self, finished):
        summary = summary_of(finished)
        assert MAJORITY < summary["metrics"]["accuracy"] <= 1 and 0 < summary["metrics"]["f1"] <= 1
        assert summary["steps"] == 150 and summary["forward_passes"] == 150 * 4 * 5 + 150 + 2
        parts = [summary[f"{part}_peak_memory_mib"] for part in ("start", "step", "evaluation")]
        assert summary["seconds"] > 0 and summary["peak_memory_mib"] >= max(parts) >= min(parts) >= 0
        counts = {"tuned": 306, "registered": 5826, "touched": 0, "total": 5826, "share": 306 / 5826}
        assert summary["parameters"] == counts and summary["backward_products"] == 0
        assert 0 < summary["seconds_a_step"] < summary["seconds"]
        assert summary["f1_means"] == "f1 (binary, of 'positive')"
        best = max(metrics_of(finished, "validation"), key=lambda record: (record["accuracy"], -record["loss"]))
        assert (best["step"], best["accuracy"]) == (summary["model_step"], summary["metrics"]["accuracy"])

    def test_learns(self, finished):
        first, *_, last = metrics_of(finished, "train")
        assert last["loss"] < 0.8 * first["loss"]
        assert summary_of(finished)["last"]["accuracy"] > MAJORITY + 0.2

    def test_tensorboard_reads_the_events(self, finished):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(finished / "tensorboard"))
        events.Reload()
        assert {"train/loss", "validation/accuracy", "validation/loss", "radius"} <= set(events.Tags()["scalars"])
        shown = [(event.step, event.value) for event in events.Scalars("validation/accuracy")]
        records = metrics_of(finished, "validation")
        assert shown == [(record["step"], pytest.approx(record["accuracy"])) for record in records]

    @pytest.mark.parametrize(
        ("optimizer", "key", "shown"), [("gld", "radius", "radius"), ("adamw", "lr", "learning rate")]
    )
    def test_the_rate_of_each_step_is_that_of_its_schedule(self, optimizer, key, shown, train):
        """As the optimizer has it when a step is logged."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        schedule = ("schedule.name=linear", "schedule.floor=0.2", "schedule.warmup=2", "log_every=1")
        run = train("scheduled", f"optimizer.{key}=0.05", *schedule, optimizer=optimizer, steps=8)
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        curve = multiplier("linear", 8, floor=0.2, warmup=2)
        expected = [(t + 1, pytest.approx(0.05 * curve(t))) for t in range(8)]
        assert [(event.step, event.value) for event in events.Scalars(shown)] == expected
        assert len({curve(t) for t in range(8)}) > 6

    def test_says_what_it_does_and_what_comes_next(self, train, capsys):
        run = train("told", *GLD, steps=60)
        told = capsys.readouterr()
        chatter = " ".join(told.err.split())
        assert "270 rows: negative 40.0%, positive 60.0%" in chatter and "306 of 5,826 parameters tuned" in chatter
        assert "expected 1,262 forward passes in 60 steps" in chatter and "MiB above the model" in chatter
        predict, view, replay, plot = told.out.rstrip("\n").split("\n")[-4:]
        assert predict.startswith("predict ") and f"gradientless predict {run} " in predict
        assert view.startswith("view ") and view.endswith(f"tensorboard --logdir {run / 'tensorboard'}")
        assert replay.startswith("replay ") and replay.endswith(f"gradientless replay {run}")
        assert plot.endswith(str(run / "plot.png"))
        assert "forward passes 1,262" in " ".join(told.out.split())

    @pytest.mark.parametrize("done", [0, 300])
    def test_expected_minutes_and_memory_are_those_of_its_steps(self, done, model, rows, tmp_path, monkeypatch, capsys):
        """Of steps that take a fifth of a second and 96 MiB; done: steps that a resumed run has behind it."""
        held = 96

        def rehearse(run, objective):
            taken = torch.ones(held << 18)
            time.sleep(0.2)
            return int(taken[0]) * 21

        def stop(run, *_):
            raise Stopped(run.done.step)

        def begin(run, *_):
            run.done.step = done
            return []

        monkeypatch.setattr(Run, "rehearse", rehearse)
        monkeypatch.setattr(Run, "open_trajectory", begin)
        monkeypatch.setattr(Run, "loop", stop)
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / "run", *GLD, steps=600)) == cli.STOPPED
        said = " ".join(capsys.readouterr().err.split())
        found = re.search(
            r"expected ([\d,]+) forward passes in 600 steps, about ([\d.]+) minutes, (\d+) MiB above", said
        )
        assert found is not None and found[1] == "12,602"
        assert 2 * (1 - done / 600) <= float(found[2]) + 0.05 <= 6 * (1 - done / 600)
        assert held <= int(found[3]) < held + 200

    def test_seconds_are_those_of_the_clock(self, train, monkeypatch):
        step, took = Run.step, 0.05

        def slow(self, t, logged):
            time.sleep(took)
            return step(self, t, logged)

        monkeypatch.setattr(Run, "step", slow)
        begin = time.perf_counter()
        summary = summary_of(train("slow", *GLD, steps=20))
        elapsed = time.perf_counter() - begin
        assert 20 * took <= summary["seconds"] <= summary["wall_seconds"] <= elapsed
        assert took <= summary["seconds_a_step"] <= summary["seconds"] / 20 + took

    def test_the_peak_is_that_of_what_its_steps_held(self, train, monkeypatch):
        step, held = Run.step, 64

        def heavy(self, t, logged):
            taken = torch.ones(held << 18)
            return step(self, t, logged) * float(taken[0])

        monkeypatch.setattr(Run, "step", heavy)
        summary = summary_of(train("heavy", *GLD, steps=4))
        assert (
            summary["peak_memory_mib"]
            >= summary["step_peak_memory_mib"]
            >= held - 1  # pages that lay free are taken again
            > summary["start_peak_memory_mib"] - 32
        )

    def test_the_best_weights_are_kept_not_the_last(self, train, monkeypatch, capsys):
        evaluate = Run.evaluate

        def worse_and_worse(self):
            return {**evaluate(self), "accuracy": 1 - self.done.step / 100}

        monkeypatch.setattr(Run, "evaluate", worse_and_worse)
        run = train("worse", *GLD, steps=30)
        assert summary_of(run)["model_step"] == 10
        best = load_file(run / "best-10" / "tensors.safetensors")
        saved = {name: tensor.detach() for name, tensor in load_surface(run).trainable().items()}
        assert all(torch.equal(saved[name], tensor) for name, tensor in best.items())
        last = weights_of(run)
        assert not any(torch.equal(last[f"weights/{name}"], tensor) for name, tensor in best.items())
        assert gradientless("replay", str(run)) == 0
        assert "steps 10 of 30 bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize(
        ("best", "step", "ended"),
        [("auto", 30, 50), ("accuracy", 30, 50), ("loss", 20, 40), ("f1", 10, 30)],
    )
    def test_what_tells_the_best_evaluation(self, best, step, ended, train, monkeypatch):
        """And what patience waits for. Among equal accuracies it is the lowest loss."""
        found = {
            "accuracy": {10: 0.7, 20: 0.8, 30: 0.9, 40: 0.9},
            "loss": {10: 0.5, 20: 0.3, 30: 0.4, 40: 0.45},
            "f1": {10: 0.9, 20: 0.1, 30: 0.2, 40: 0.3},
        }
        told = lambda run: {key: values.get(run.done.step, values[40]) for key, values in found.items()}  # noqa: E731
        monkeypatch.setattr(Run, "evaluate", told)
        summary = summary_of(train(best, *GLD, f"best={best}", "patience=2", steps=100))
        assert (summary["model_step"], summary["steps"], summary["ended"]) == (step, ended, "patience")
        assert summary["metrics"] == {key: values[step] for key, values in found.items()}
        assert summary["best"] == ("accuracy" if best == "auto" else best)

    def test_the_best_reward_needs_one(self, model, rows, tmp_path, capsys):
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / "none", *GLD, "best=reward")) == 2
        line = "best: must be accuracy, f1 or loss where no reward is given, got 'reward'"
        assert capsys.readouterr().err.endswith(line + "\n")

    def test_forecast_is_what_is_spent(self, train):
        """The budget of forward passes is kept, and used up as far as whole steps go."""
        budget = 333
        spent = summary_of(train("budget", *GLD, "forward_passes=333", steps=None))["forward_passes"]
        assert budget - 21 < spent <= budget

    def test_early_stopping(self, train):
        run = train("early", "optimizer.radius=1e-9", "patience=2", steps=100)
        summary = summary_of(run)
        assert (summary["ended"], summary["steps"]) == ("patience", 30)
        assert [record["step"] for record in metrics_of(run, "validation")] == [10, 20, 30]


class TestMethods:
    @pytest.mark.parametrize("name", sorted([*OPTIMIZERS, *FIRST_ORDER]))
    def test_every_registered_one_runs(self, name, train):
        run = train(name, steps=6, optimizer=name)
        summary = summary_of(run)
        assert summary["steps"] == 6 and summary["forward_passes"] >= 6
        assert (run / "trajectory.bin").exists() == (name in OPTIMIZERS)
        (first,) = metrics_of(run, "validation")
        assert first["loss"] == first["loss"]  # not nan

    @pytest.mark.parametrize("name", sorted(FIRST_ORDER))
    def test_first_order_methods_take_torchs_own_steps(self, name, train):
        """On the same batches as every other method, at the rates of the schedule."""
        steps, rate = 5, 0.05
        run = train(
            name, f"optimizer.lr={rate}", "schedule.name=linear", "schedule.floor=0.2", steps=steps, optimizer=name
        )
        config = RunFolder(run).read_config()
        splits = load_splits(config)
        surface = make_surface(config, splits.labels, "cpu")
        encoded, kind, curve = surface.encode(splits.train), FIRST_ORDER[name], multiplier("linear", steps, floor=0.2)
        before = {key: tensor.detach().clone() for key, tensor in surface.trainable().items()}
        optimizer = kind.type(surface.trainable().values(), **{**kind.defaults, "lr": rate})
        for t in range(steps):
            picked = batch_indices(config.seed, t, len(splits.train), 16)
            optimizer.param_groups[0]["lr"] = rate * curve(t)
            optimizer.zero_grad()
            logits = surface.logits(surface.prepare(encoded.batch(picked)))
            torch.nn.functional.cross_entropy(logits, encoded.labels[torch.from_numpy(picked)]).backward()
            optimizer.step()
        found = weights_of(run)
        for key, tensor in surface.trainable().items():
            torch.testing.assert_close(found[f"weights/{key}"], tensor.detach(), rtol=1e-4, atol=1e-6)
            assert not torch.allclose(tensor, before[key], atol=1e-4)

    @pytest.mark.parametrize(
        "options",
        [
            ("optimizer.options=[2, 2]",),
            ("optimizer.selection=magnitude", "optimizer.entries=2*width"),
            ("optimizer.selection=fisher", "optimizer.entries=2*width", "optimizer.fisher_rows=8"),
            ("optimizer.pool=true", "optimizer.entries=2*width"),
            ("optimizer.sweep=parallel", "optimizer.momentum=0.5"),
            ("tensors=[{pattern='*.bias', radius=0.01, schedule={name='linear', floor=0.1}}]",),
        ],
        ids=["options", "magnitude", "fisher", "pool", "momentum", "tensors"],
    )
    def test_variants_of_gld_learn_and_replay(self, options, train, capsys):
        run = train("variant", *GLD, *options, steps=80)
        losses = [record["loss"] for record in metrics_of(run, "train")]
        assert sum(losses[8:]) < sum(losses[:8])
        assert gradientless("replay", str(run)) == 0
        assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())

    def test_a_users_own(self, train, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from gradientless.search.optim import GLD\n\n\nclass Mine(GLD):\n    name = 'Mine'\n", "utf-8"
        )
        (tmp_path / "torchs.py").write_text(
            "import torch\n\n\nclass Plain(torch.optim.SGD):\n    def __init__(self, params, lr=0.1):\n"
            "        super().__init__(params, lr=lr)\n",
            "utf-8",
        )
        options = (*GLD, "optimizer.entries=8", "schedule.floor=0.1")
        mine = train("mine", *options, optimizer=f"{tmp_path / 'mine.py'}:Mine")
        gld = train("gld", *options)
        assert (mine / "metrics.jsonl").read_bytes() == (gld / "metrics.jsonl").read_bytes()
        assert b'"optimizer": "Mine"' in (mine / "trajectory.bin").read_bytes()
        plain = train("plain", "optimizer.lr=0.05", optimizer=f"{tmp_path / 'torchs.py'}:Plain")
        sgd = train("sgd", "optimizer.lr=0.05", optimizer="sgd")
        assert (plain / "metrics.jsonl").read_bytes() == (sgd / "metrics.jsonl").read_bytes()

    @pytest.mark.parametrize(("optimizer", "options"), [("gld", GLD), ("adamw", ADAMW)])
    def test_micro_batches_and_recomputed_features_change_nothing(self, optimizer, options, train):
        whole = train("whole", *options, optimizer=optimizer)
        assert_same_run(whole, train("micro", *options, "--micro-batch-size", "5", optimizer=optimizer))
        assert_same_run(whole, train("recomputed", *options, "surface.recompute=true", optimizer=optimizer))

    def test_the_body_runs_once_for_a_data_set_or_in_every_step(self, train, monkeypatch, tmp_path):
        monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path / "cache"))
        calls: list[int] = []
        features = HeadSurface.features

        def counted(self, batch):
            calls.append(len(batch["input_ids"]))
            return features(self, batch)

        for look in ("reads_padding", "saved_otherwise"):  # which read a few rows, once a run
            monkeypatch.setattr(f"gradientless.run.train.{look}", lambda *_: None)
        monkeypatch.setattr(HeadSurface, "features", counted)
        train("first", *GLD, steps=4)
        assert sum(calls) == 300
        calls.clear()
        train("second", *GLD, "--seed", "1", steps=4)  # another split: other rows
        assert sum(calls) == 300
        calls.clear()
        train("third", *GLD, steps=4)
        assert calls == []
        train("recomputed", *GLD, "surface.recompute=true", steps=4)
        assert calls[:4] == [16, 16, 16, 16] and sum(calls) == 4 * 16 + 30  # weights are evaluated once

    def test_dropout_warns_methods_that_compare_losses(self, train):
        with pytest.warns(UserWarning, match="GLD: the loss at one point must not change within a step"):
            train("gld", *GLD, "surface.dropout=0.5", steps=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train("without", *GLD, steps=4)
            train("adamw", *ADAMW, "surface.dropout=0.5", steps=4, optimizer="adamw")

    @pytest.mark.parametrize("name", ["sgd", "adamw", "gld", "mezo"])
    @pytest.mark.filterwarnings("ignore:.*the loss at one point must not change")
    def test_dropout_acts_in_the_steps_of_every_method_and_in_no_evaluation(self, name, train):
        options = ("optimizer.evaluator=snapshot",) if name in OPTIMIZERS else ()
        rate = ("optimizer.radius=1e-9",) if name == "gld" else ("optimizer.lr=1e-9",)  # weights stay where they are
        runs = [
            train(f"{i}", *options, *rate, f"surface.dropout={dropout}", "log_every=1", steps=6, optimizer=name)
            for i, dropout in enumerate((0.0, 0.6, 0.6))
        ]
        without, one, again = ([each["loss"] for each in metrics_of(run, "train")] for run in runs)
        assert one == again and all(abs(a - b) > 1e-5 for a, b in zip(without, one, strict=True))
        evaluated = [metrics_of(run, "validation")[-1]["loss"] for run in runs]
        assert evaluated == pytest.approx([evaluated[0]] * 3, abs=1e-6)

    def test_a_warning_is_one_line_without_its_place_in_the_code(self, train, monkeypatch, capsys):
        def show(message, category, filename, lineno, file=None, line=None):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

        before = warnings.formatwarning
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", show)  # as outside of pytest, which collects warnings
            train("gld", *GLD, "surface.dropout=0.5", steps=2)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "must not change" in line]
        assert line.startswith("GLD: the loss at one point must not change within a step, got ")
        assert line.endswith("or does the closure draw a new batch?") and ".py" not in line
        assert warnings.formatwarning is before


class TestStopAndResume:
    @pytest.mark.parametrize(("optimizer", "options"), [("gld", GLD), ("adamw", ADAMW)])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_to_the_same_bytes(self, optimizer, options, number, train, model, rows, tmp_path, monkeypatch, capsys):
        straight = train("straight", *options, steps=40, optimizer=optimizer)
        again = tiny_run.arguments(model, rows, tmp_path / "stopped", *options, steps=40, optimizer=optimizer)
        step = Run.step

        def interrupted(self, t, logged):
            if t == 24:
                os.kill(os.getpid(), number)
            return step(self, t, logged)

        capsys.readouterr()
        monkeypatch.setattr(Run, "step", interrupted)
        assert gradientless(*again) == cli.STOPPED == 130
        last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert last == (
            f"stopped, with everything saved at step 25; continue with: "
            f"gradientless train --out {tmp_path / 'stopped'} --resume"
        )
        assert not (tmp_path / "stopped" / "model").exists()
        (state,) = (tmp_path / "stopped").glob("checkpoint-*/state.json")
        record = unsealed("run", json.loads(state.read_text("utf-8")), state)
        progress = record["state"]["progress"]
        assert progress["seconds"] > 0 and set(progress["peaks"]) == {"start", "step", "evaluation"}
        progress["peaks"]["step"], progress["seconds"] = 1e6, 1000.0  # as if it had taken so much until then
        state.write_text(json.dumps(sealed(record)), "utf-8")
        monkeypatch.setattr(Run, "step", step)
        assert gradientless("train", "--out", str(tmp_path / "stopped"), "--resume") == 0
        assert "resuming from step 25" in " ".join(capsys.readouterr().err.split())
        names = ["metrics.jsonl", *(["trajectory.bin"] if optimizer == "gld" else [])]
        for name in [*names, "model/body/model.safetensors", "model/head.safetensors"]:
            assert (tmp_path / "stopped" / name).read_bytes() == (straight / name).read_bytes()
        own, other = summary_of(tmp_path / "stopped"), summary_of(straight)
        for key in ("metrics", "last", "forward_passes", "steps", "model_step", "base"):
            assert own[key] == other[key]
        assert own["peak_memory_mib"] == own["step_peak_memory_mib"] == 1e6 and own["seconds"] > 1000
        timings = [json.loads(line)["seconds"] for line in (tmp_path / "stopped" / "timings.jsonl").open()]
        assert timings == sorted(timings) and own["seconds"] == pytest.approx(timings[-1], abs=1e-3)

    def test_a_run_that_has_ended_says_so(self, finished, capsys):
        before = (finished / "metrics.jsonl").read_bytes()
        assert gradientless("train", "--out", str(finished), "--resume") == 0
        assert "the run has ended already; nothing to resume" in capsys.readouterr().err
        assert (finished / "metrics.jsonl").read_bytes() == before

    def test_a_run_that_stopped_early_stays_ended(self, train):
        run = train("early", "optimizer.radius=1e-9", "patience=2", steps=100)
        model = (run / "model" / "head.safetensors").read_bytes()
        (run / "summary.json").unlink()  # as if killed before it was written
        assert gradientless("train", "--out", str(run), "--resume") == 0
        assert summary_of(run)["steps"] == 30 and summary_of(run)["ended"] == "patience"
        assert (run / "model" / "head.safetensors").read_bytes() == model


class TestOutOfMemory:
    @pytest.fixture(autouse=True)
    def no_features_yet(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path / "cache"))

    @pytest.fixture
    def small_machine(self, monkeypatch):
        """small_machine(what): calls of the surface with more than 6 rows find no memory."""

        def shrink(owner: type, name: str, rows_of: Any) -> None:
            whole = getattr(owner, name)

            def limited(self, *given, **options):
                if rows_of(self, *given) > 6:
                    raise torch.OutOfMemoryError("tried to allocate more than there is")
                return whole(self, *given, **options)

            monkeypatch.setattr(owner, name, limited)

        return shrink

    @pytest.mark.parametrize("what", ["session", "gradients", "features", "features in each step"])
    def test_answered_with_the_batch_that_fits(self, what, small_machine, model, rows, tmp_path, capsys):
        more = [*GLD, "surface.recompute=true"] if what == "features in each step" else list(GLD)
        optimizer = "gld"
        if what == "session":
            small_machine(HeadSurface, "session", lambda surface, prepared: len(prepared.features))
        elif what == "gradients":
            optimizer, more = "adamw", list(ADAMW)
            small_machine(
                HeadSurface, "logits", lambda surface, prepared, *_: torch.is_grad_enabled() * len(prepared.features)
            )
        else:
            small_machine(HeadSurface, "features", lambda surface, batch: len(batch["input_ids"]))
        again = tiny_run.arguments(model, rows, tmp_path / "run", *more, optimizer=optimizer)
        assert gradientless(*again) == 2
        last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert last == (
            "memory: a batch of 16 must fit on cpu, got out of memory; 4 at a time fit: "
            "add --micro-batch-size 4 (the same losses), and --resume to continue"
        )
        assert gradientless(*again, "--micro-batch-size", "4", "--resume") == 0
        assert summary_of(tmp_path / "run")["steps"] == 20

    def test_nothing_fits(self, model, rows, tmp_path, capsys, monkeypatch):
        def none(*_: Any) -> None:
            raise torch.OutOfMemoryError("none")

        monkeypatch.setattr(HeadSurface, "features", none)
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / "run")) == 2
        last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert last == "memory: one example must fit on cpu, got out of memory; use a smaller model or dtype"
        assert not (tmp_path / "run").exists()


class TestAfterTheRun:
    def test_the_saved_model_predicts_as_the_run_did(self, finished, rows):
        texts = [text for text, _ in tiny_run.rows(40, seed=9)]
        labels, probabilities = predict_texts(finished, texts)
        surface = load_surface(finished / "model")
        (best,) = finished.glob("best-*")
        for name, tensor in load_file(best / "tensors.safetensors").items():
            assert torch.equal(surface.trainable()[name].detach(), tensor)
        from gradientless.language.data import Encoded
        from gradientless.language.tasks import Example

        logits = logits_of(surface, Encoded(surface.tokenizer, [Example(text, 0) for text in texts], 16))
        torch.testing.assert_close(torch.softmax(logits, 1), torch.from_numpy(probabilities))
        truth = [label for _, label in tiny_run.rows(40, seed=9)]
        assert sum(a == b for a, b in zip(labels, truth, strict=True)) / 40 > MAJORITY + 0.2

    def test_rows_are_scored_by_the_names_of_their_labels(self, finished):
        """Whose order may be another in other data."""
        splits = load_splits(RunFolder(finished).read_config())
        found = evaluate_folder(finished, splits)
        turned = [replace(row, label=1 - row.label) for row in splits.validation]
        again = evaluate_folder(finished, replace(splits, validation=turned, labels=splits.labels[::-1]))
        assert again == found and found["accuracy"] == summary_of(finished)["metrics"]["accuracy"] > MAJORITY
        assert evaluate_folder(finished, replace(splits, validation=turned))["accuracy"] < 1 - MAJORITY

    def test_eval(self, finished, rows, capsys):
        assert gradientless("eval", str(finished), "--json") == 0
        found, expected = json.loads(capsys.readouterr().out), summary_of(finished)["metrics"]
        assert (found["accuracy"], found["f1"], found["rows"]) == (expected["accuracy"], expected["f1"], 30)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        more = ["--data", rows, "--validation", rows]
        assert gradientless("eval", str(finished / "model"), *more) == 0
        told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert told["rows"] == "300" and told["accuracy"].endswith("%")

    def test_predict(self, finished, rows, tmp_path, capsys, monkeypatch):
        texts = ["the film was good", 'dull, "the" plot was bad']
        assert gradientless("predict", str(finished), *texts) == 0
        from_arguments = capsys.readouterr().out
        table = list(csv.DictReader(io.StringIO(from_arguments)))
        assert [row["text"] for row in table] == texts
        assert [row["label"] for row in table] == ["positive", "negative"]
        assert all(0.5 <= float(row["probability"]) <= 1 for row in table)

        (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", "utf-8")
        assert gradientless("predict", str(finished), "--file", str(tmp_path / "texts.txt")) == 0
        assert capsys.readouterr().out == from_arguments

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
        assert gradientless("predict", str(finished), "--format", "jsonl") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        shares = [line.pop("probabilities") for line in lines]
        flat = [
            line | {f"probability_{k}": v for k, v in each.items()} for line, each in zip(lines, shares, strict=True)
        ]
        assert [{key: str(value) for key, value in line.items()} for line in flat] == table

        out = tmp_path / "labels.csv"
        assert gradientless("predict", str(finished), "--file", rows, "--out", str(out)) == 0
        assert capsys.readouterr().out == "" and len(list(csv.DictReader(out.open()))) == 300

    def test_replay_makes_the_same_bytes(self, finished, tmp_path, capsys):
        assert gradientless("replay", str(finished), "--out", str(tmp_path / "again")) == 0
        assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())
        for name in ("body/model.safetensors", "head.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (finished / "model" / name).read_bytes()

    def test_replay_of_a_first_order_run_is_one_clear_line(self, train, capsys):
        run = train("adamw", *ADAMW, steps=4, optimizer="adamw")
        capsys.readouterr()
        assert gradientless("replay", str(run)) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1
        assert told.err.startswith("replay: the run must hold trajectory.bin, got none in ")
        assert "first-order runs have no log of losses" in told.err

    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("tasks", ["sst2", "rotten-tomatoes"]),
            ("models", ["starter:minilm"]),
            ("optimizers", [*OPTIMIZERS, *FIRST_ORDER]),
            ("surfaces", ["head"]),
            ("schedules", ["constant", "linear", "cosine", "cosine-restarts"]),
        ],
    )
    def test_list(self, kind, names, capsys):
        assert gradientless("list", kind) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines} >= set(names)
        assert all(len(line.split()) > 2 for line in lines)  # each says something

    def test_assets(self, capsys):
        assert gradientless("assets") == 0
        told = capsys.readouterr().out
        assert "minilm" in told and "movie-reviews" in told and "cache: " in told
