"""Whole runs of the surface `full` through the command line: a tiny Llama behind a prompt, a tiny BERT under a head."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny_run
from gradientless import cli
from gradientless.language.surfaces import FullSurface
from gradientless.language.tasks import Example, Prompt
from gradientless.run.assemble import length_of
from gradientless.run.config import RunConfig
from gradientless.run.objective import Objective
from gradientless.run.replay_run import replay_run
from gradientless.run.train import Run
from gradientless.search.evaluators import Inject, Walk
from gradientless.search.noise import Noise
from gradientless.search.optim.spsa import SPSA
from gradientless.search.points import ALL, Direction, point
from gradientless.search.space import Space
from gradientless.search.trajectory import Trajectory
from tiny_run import gradientless

MEZO = ("optimizer.lr=1e-3", "optimizer.eps=1e-2")
INJECT = ("optimizer.evaluator=inject", "optimizer.rank=1", "optimizer.noise=rademacher")
HALF = ("dtype=bfloat16",)
PROMPT = (
    r'prompt.text="Review: {text}\nSentiment:"',
    "prompt.words={negative=' negative', positive=' positive'}",
)
METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "walk rademacher": ("llama", "mezo", (*MEZO, "optimizer.evaluator=walk", "optimizer.noise=rademacher")),
    "walk gaussian": ("bert", "mezo", (*MEZO, "optimizer.evaluator=walk", "optimizer.weight_decay=0.1")),
    "inject": ("llama", "mezo", (*MEZO, *INJECT)),
    "snapshot": ("llama", "mezo", (*MEZO, "optimizer.evaluator=snapshot", "optimizer.noise=sphere")),
    "mezoadam": ("bert", "mezoadam", (*MEZO, "optimizer.noise=near_normal")),
    "mezomomentum": ("llama", "mezomomentum", (*MEZO, "optimizer.window=4", "optimizer.noise=gaussian")),
    "inject in bfloat16": ("llama", "mezo", (*MEZO, *INJECT, *HALF)),
    "snapshot in bfloat16": ("llama", "mezo", (*MEZO, "optimizer.evaluator=snapshot", *HALF)),
    "adamw": ("llama", "adamw", ("optimizer.lr=1e-3",)),
}
"""name -> model, optimizer, settings."""
FORWARD = [name for name, (_, optimizer, _) in METHODS.items() if optimizer != "adamw"]
KILLED = {"walk rademacher": (("logits", 6), ("_log", 9)), "inject": (("logits", 2), ("_log", 6))}
"""method -> where it is killed, and after which step."""
STEPS = 12
PATIENCE = 120.0  # seconds after which a process counts as hanging
PRELOADED = ["gradientless.cli", "gradientless.run.train", "gradientless.run.report", "gradientless.run.events"]
PRELOADED += ["gradientless.language.surfaces.head_session", "transformers", "matplotlib.backends.backend_agg"]


def arguments(
    models: dict[str, str], rows: str, out: Path, model: str, optimizer: str, *more: str, steps: int = STEPS
) -> list[str]:
    """The command line of a run of the surface full; `more` are settings, which take the place of those here."""
    own = (*PROMPT, "data.max_length=40") if model != "bert" else ("data.max_length=16", "surface.pooling=mean")
    usual = [*own, "surface.name=full", "batch_size=6", "schedule.name=constant"]
    usual += ["evaluate_every=5", "checkpoint_every=4", "log_every=3", f"steps={steps}"]
    given = {setting.partition("=")[0] for setting in more}
    given |= {"steps"} if given & {"forward_passes", "epochs"} else set()
    given |= {"prompt.text", "prompt.words"} if given & {"prompt.text", "prompt.words"} else set()
    usual = [setting for setting in usual if setting.partition("=")[0] not in given]
    where = ["--data", rows, "--model", models[model], "--device", "cpu", "--out", str(out)]
    return ["train", *where, "--optimizer", optimizer, *usual, *more]


def better_and_better(patch: pytest.MonkeyPatch) -> None:
    """The last evaluation is the best, so that a replay repeats every step."""
    evaluate = Run.evaluate
    patch.setattr(Run, "evaluate", lambda run: {**evaluate(run), "accuracy": run.done.step / 100})


def save_language_model(folder: Path, kind: str, seed: int = 5) -> str:
    from tiny_models import make_language_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer = make_language_model(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": save_language_model(folder / "llama", "llama"),
        "another": save_language_model(folder / "another", "llama", seed=6),
        "bert": tiny_run.make_model(folder / "bert"),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv", count=80)


@pytest.fixture(scope="module")
def ended(models, rows, tmp_path_factory) -> Callable[[str], Path]:
    """ended(method) -> the folder of its run, whose last step is its best."""
    place = tmp_path_factory.mktemp("runs")

    def run(method: str) -> Path:
        out = place / method.replace(" ", "-")
        if not out.exists():
            model, optimizer, options = METHODS[method]
            with pytest.MonkeyPatch.context() as patch:
                better_and_better(patch)
                assert gradientless(*arguments(models, rows, out, model, optimizer, *options)) == 0
        return out

    return run


@pytest.fixture
def train(models, rows, tmp_path):
    """train(model, optimizer, settings, …) -> the exit code and the folder."""

    def run(model: str, optimizer: str, *more: str, name: str = "run", steps: int = STEPS) -> tuple[int, Path]:
        code = gradientless(*arguments(models, rows, tmp_path / name, model, optimizer, *more, steps=steps))
        return code, tmp_path / name

    return run


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


def metrics_of(run: Path, split: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [record for record in records if record["split"] == split]


def best_of(run: Path) -> dict[str, torch.Tensor]:
    (place,) = run.glob("best-*")
    return load_file(place / "tensors.safetensors")


def told(text: str) -> str:
    return " ".join(text.split())


def last_line(text: str) -> str:
    return text.rstrip("\n").split("\n")[-1]


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_evaluated_before_its_first_step_and_leaves_its_files(method, ended):
    run = ended(method)
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.toml", "environment.json", "metrics.jsonl", "timings.jsonl", "tensorboard", "model", "summary.json"),
        *(f"checkpoint-{STEPS}", f"best-{STEPS}", "plot.png"),
        *(["trajectory.bin"] if method in FORWARD else []),
    }
    assert [record["step"] for record in metrics_of(run, "validation")] == [0, 5, 10, 12]
    assert metrics_of(run, "validation")[0]["forward_passes"] == 0
    assert [record["step"] for record in metrics_of(run, "train")] == [3, 6, 9, 12]
    summary = summary_of(run)
    each = 2 if method in FORWARD else 3
    assert (summary["steps"], summary["forward_passes"]) == (STEPS, STEPS * each + 2 * (method in FORWARD))
    assert next((run / "tensorboard").iterdir()).stat().st_size > 100
    first, last = metrics_of(run, "validation")[0], summary["last"]
    assert last["loss"] != first["loss"]


WORTH = {
    "rademacher": "the same bits on CPU and GPU",
    "near_normal": "the same bits on CPU and GPU",
    "gaussian": "the same bits on every CPU backend; on a GPU the last bits may differ",
    "sphere": "the same bits on one machine; elsewhere the last bits may differ",
}


@pytest.mark.parametrize("method", FORWARD)
def test_replay_makes_the_same_bytes(method, ended, tmp_path, capsys):
    """And says what it took beside the run, and what the noise is worth on another device."""
    run = ended(method)
    assert gradientless("replay", str(run), "--out", str(tmp_path / "again")) == 0
    said = told(capsys.readouterr().out)
    assert f"steps {STEPS} of {STEPS} bit-equal to the run yes" in said
    took = re.search(r" seconds \d+\.\d \(the run took (\d+\.\d) for these steps\) ", said)
    assert took and took[1] == f"{summary_of(run)['seconds']:.1f}"
    (kind,) = [each.partition("=")[2] for each in METHODS[method][2] if "noise=" in each] or ["gaussian"]
    assert f" noise {kind}: {WORTH[kind]} model " in said
    for file in (run / "model").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_replay_tells_its_progress(ended, tmp_path):
    seen: list[tuple[int, int]] = []
    replay_run(ended("walk rademacher"), None, tmp_path / "again", lambda done, total: seen.append((done, total)))
    assert seen == [(step + 1, STEPS) for step in range(STEPS)]


def test_tuned_weights_are_not_the_base(ended, models):
    for method in METHODS:
        base = load_file(Path(models[METHODS[method][0]]) / "model.safetensors")
        (file,) = (ended(method) / "model").rglob("model.safetensors")
        tuned = load_file(file)
        tensors = {name: tensor for name, tensor in tuned.items() if name in base}
        assert tensors and sum(not torch.equal(base[name].to(t.dtype), t) for name, t in tensors.items()) > 10
        half = any(each in METHODS[method][2] for each in HALF)
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16 if half else torch.float32}


def test_tensorboard_reads_the_events(ended):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ended("walk rademacher")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("validation/loss")]
    assert shown == [(record["step"], pytest.approx(record["loss"])) for record in metrics_of(run, "validation")]
    assert [event.value for event in events.Scalars("learning rate")] == [pytest.approx(1e-3)] * 4


# --- killed, and resumed ---------------------------------------------------------------------------------------------


def _run(arguments: list[str], environment: dict[str, str], kill: tuple[str, int] | None) -> None:
    """What a forked process does. kill: where it is killed, and at which step."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    patch = pytest.MonkeyPatch()
    better_and_better(patch)
    running: list[Run] = []
    step = Run.step

    def seen(run: Run, t: int, logged: bytes | None) -> float:
        running[:] = [run]
        return step(run, t, logged)

    def deadly(owner: type, name: str, step: int) -> None:
        harmless = getattr(owner, name)

        def method(*given: Any, **options: Any) -> Any:
            found = harmless(*given, **options)
            if running and running[0].done.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        patch.setattr(owner, name, method)

    patch.setattr(Run, "step", seen)
    if kill is not None:  # while a probe is measured, or between a record of the log of losses and the next
        deadly(FullSurface if kill[0] == "logits" else Run, *kill)
    cli.main(arguments)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Callable[..., int | None]]:
    """program(arguments, kill) -> the exit code of the command line in a process of its own."""
    environment = {"GRADIENTLESS_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(arguments: list[str], kill: tuple[str, int] | None = None) -> int | None:
        process = context.Process(target=_run, args=(arguments, environment, kill))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode is not None
        return process.exitcode

    yield run


@pytest.mark.parametrize("method", KILLED)
def test_killed_and_resumed_to_the_same_bytes(method, program, ended, models, rows, tmp_path):
    model, optimizer, options = METHODS[method]
    again = [*arguments(models, rows, tmp_path / "killed", model, optimizer, *options), "--resume"]
    for kill in KILLED[method]:
        assert program(again, kill) == -signal.SIGKILL
    assert program(again) == 0
    assert tiny_run.outcome(tmp_path / "killed") == tiny_run.outcome(ended(method))


def test_stopped_and_resumed_to_the_same_bytes(ended, models, rows, tmp_path, monkeypatch):
    """A walk is saved where it stands, between two evaluations."""
    model, optimizer, options = METHODS["walk gaussian"]
    again = arguments(models, rows, tmp_path / "stopped", model, optimizer, *options)
    better_and_better(monkeypatch)
    step = Run.step

    def interrupted(self, t, logged):
        if t == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, t, logged)

    monkeypatch.setattr(Run, "step", interrupted)
    assert gradientless(*again) == cli.STOPPED
    monkeypatch.setattr(Run, "step", step)
    assert gradientless("train", "--out", str(tmp_path / "stopped"), "--resume") == 0
    assert tiny_run.outcome(tmp_path / "stopped") == tiny_run.outcome(ended("walk gaussian"))


@pytest.mark.parametrize("length", ["epochs=0.75", "steps=9"])
def test_a_run_is_not_resumed_on_other_rows(length, models, tmp_path, monkeypatch, capsys):
    table = tmp_path / "rows.csv"
    tiny_run.write_table(table, count=80)
    monkeypatch.setattr(Run, "step", lambda run, t, logged: os.kill(os.getpid(), signal.SIGTERM) or math.nan)
    more = (*MEZO, length)
    assert gradientless(*arguments(models, str(table), tmp_path / "run", "llama", "mezo", *more)) == cli.STOPPED
    monkeypatch.undo()
    tiny_run.write_table(table, count=160)
    capsys.readouterr()
    assert gradientless("train", "--out", str(tmp_path / "run"), "--resume") == 2
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("--resume: the rows must be those that the run began with")


def test_dropout_of_injected_passes_comes_from_the_seed(train):
    options = ("bert", "mezo", *MEZO, *INJECT, "surface.dropout=0.2")
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="the loss at one point must not change within a step"):
        (_, one), (_, other) = (train(*options, name=name, steps=3) for name in ("one", "other"))
    assert (one / "trajectory.bin").read_bytes() == (other / "trajectory.bin").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


# --- after the run ---------------------------------------------------------------------------------------------------


def test_export_opens_with_transformers_alone(ended, models, tmp_path, capsys):
    run, out = ended("walk rademacher"), tmp_path / "tuned"
    assert gradientless("export", str(run), "--out", str(out)) == 0
    told = capsys.readouterr().out
    assert f"folder = '{out}'" in told and "model = AutoModelForCausalLM.from_pretrained(folder)" in told
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    coded = tokenizer("Review: a good film\nSentiment:", return_tensors="pt")
    expected = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    untuned = expected(**coded).logits
    expected.load_state_dict(best_of(run), strict=False)
    found = transformers.AutoModelForCausalLM.from_pretrained(out)(**coded).logits
    assert torch.equal(found, expected(**coded).logits) and not torch.equal(found, untuned)

    half = tmp_path / "half"
    assert gradientless("export", str(run), "--out", str(half), "--dtype", "bfloat16") == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16
    assert gradientless("predict", str(half), "a good film") == 0
    gc.collect()  # the library's progress bars above end their line when they go
    capsys.readouterr()
    assert gradientless("export", str(run), "--out", str(half)) == 2
    assert capsys.readouterr().err == f"out: must be a new or empty folder, got '{half}'\n"
    assert gradientless("export", str(run), "--out", str(tmp_path / "odd"), "--dtype", "int8") == 2
    assert not (tmp_path / "odd").exists() and capsys.readouterr().err.count("\n") == 1


def test_export_makes_the_model_again_from_the_log(ended, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended("inject"), run)
    for place in (run / "model", *run.glob("best-*"), *run.glob("checkpoint-*")):
        shutil.rmtree(place)
    assert gradientless("export", str(run), "--out", str(tmp_path / "tuned")) == 0
    file = "model.safetensors"
    assert (tmp_path / "tuned" / file).read_bytes() == (ended("inject") / "model" / file).read_bytes()


def test_predict_and_eval_of_a_prompted_run(ended, rows, capsys):
    run = ended("inject")
    assert gradientless("eval", str(run), "--json") == 0
    found, expected = json.loads(capsys.readouterr().out), summary_of(run)
    assert found["loss"] == pytest.approx(expected["last"]["loss"], abs=1e-5) and found["rows"] == 8
    assert gradientless("predict", str(run), "a good film", "the plot was bad", "--format", "jsonl") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["a good film", "the plot was bad"]
    assert all(line["label"] in ("negative", "positive") and 0.5 <= line["probability"] <= 1 for line in lines)


def test_replay_from_another_base_is_refused(ended, models, capsys):
    run = ended("snapshot")
    assert gradientless("replay", str(run), "--base", models["another"]) == 2
    expected = "replay: the base model must be the one that the run started from, got another: "
    assert capsys.readouterr().err == f"{expected}{models['another']}\n"
    assert gradientless("replay", str(run), "--base", models["llama"]) == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out)


# --- objectives ------------------------------------------------------------------------------------------------------

OWN = """
import torch
from torch.nn.functional import cross_entropy

calls = 0


def entropy(logits, labels):
    return cross_entropy(logits, labels)


def number(logits, labels):
    return cross_entropy(logits, labels).item()


def words(logits, labels):
    return "low"


def each(logits, labels):
    return cross_entropy(logits, labels, reduction="none")


def nothing(logits, labels):
    return float("nan")


def later(logits, labels):
    global calls
    calls += 1
    return cross_entropy(logits, labels) if calls < 16 else float("nan")


def explodes(logits, labels):
    global calls
    calls += 1
    return cross_entropy(logits, labels) if calls < 16 else 1e6


def sometimes(logits, labels):
    global calls
    calls += 1
    return float("inf") if calls in (5, 6, 9, 11) else cross_entropy(logits, labels)
"""


@pytest.fixture
def own(tmp_path) -> Callable[[str], str]:
    """own(function) -> the setting that names it."""
    (tmp_path / "mine.py").write_text(OWN, "utf-8")
    return lambda name: f"loss={tmp_path / 'mine.py'}:{name}"


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in metrics_of(run, "train")]


@pytest.mark.parametrize("loss", ["accuracy", "f1"])
@pytest.mark.parametrize("method", ["mezo", "inject", "gld"])
def test_what_has_no_derivative_is_minimised(loss, method, train, capsys):
    """Each step sees all rows, so that steps can be compared."""
    options = {
        "mezo": ("llama", "mezo", "optimizer.lr=3e-2", "optimizer.eps=5e-2", "optimizer.samples=4"),
        "inject": ("llama", "mezo", "optimizer.lr=3e-2", "optimizer.eps=5e-2", "optimizer.samples=4", *INJECT),
        "gld": ("bert", "gld", "surface.name=head", "optimizer.radius=1.0"),
    }
    model, optimizer, *more = options[method]
    code, run = train(model, optimizer, *more, f"loss={loss}", "log_every=1", "batch_size=72", steps=16)
    assert code == 0
    found = losses_of(run)
    assert all(0 <= each <= 1 for each in found)
    if loss == "accuracy":  # errors of 72 rows, the mean of eight points with MeZO
        assert all(8 * 72 * each == pytest.approx(round(8 * 72 * each), abs=1e-3) for each in found)
    assert np.mean(found[-4:]) < 0.8 * np.mean(found[:2])
    assert gradientless("replay", str(run)) == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out)


@pytest.mark.parametrize("optimizer", ["mezo", "gld", "adamw"])
def test_a_function_of_ones_own(optimizer, train, own):
    more = {"mezo": ("bert", "mezo", *MEZO), "adamw": ("bert", "adamw", "optimizer.lr=1e-3")}.get(
        optimizer, ("bert", "gld", "surface.name=head", "optimizer.radius=0.1")
    )
    settings = {"built-in": "loss=cross-entropy", "own": own("entropy")}
    runs = [train(*more, setting, name=name, steps=4)[1] for name, setting in settings.items()]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-4)
    if optimizer == "mezo":
        logs = [Trajectory.open(run / "trajectory.bin") for run in runs]
        assert list(logs[0]) == list(logs[1]) and len(logs[0]) == 4


@pytest.mark.parametrize("loss", ["accuracy", "f1", "number"])
def test_gradients_of_what_has_none_are_refused(loss, train, own, capsys):
    setting = own(loss) if loss == "number" else f"loss={loss}"
    code, run = train("bert", "adamw", setting)
    assert code == 2 and not run.exists()
    line = last_line(capsys.readouterr().err)
    if loss == "number":
        assert line == (
            "loss: must be differentiable for first-order optimizers, got a number without a gradient; "
            "use a forward optimizer"
        )
    else:
        assert line == f"loss: must be differentiable for adamw, got '{loss}'; use a forward optimizer"


@pytest.mark.parametrize(("name", "found"), [("words", "str"), ("each", "Tensor of shape (6,)"), ("missing", None)])
def test_a_function_that_returns_no_number_is_one_clear_line(name, found, train, own, capsys):
    code, run = train("bert", "mezo", *MEZO, own(name))
    assert code == 2 and not run.exists()
    line = last_line(capsys.readouterr().err)
    place = own(name).removeprefix("loss=")
    if found is None:
        assert line.startswith("loss: unknown function of ") and "'missing'" in line
    else:
        assert line == f"loss: '{place}' must return a number, got {found}"


# --- starts, lengths, prompts ----------------------------------------------------------------------------------------


def test_a_head_starts_from_the_linear_probe(train, capsys):
    code, run = train("bert", "mezo", *MEZO, "surface.start=probe", steps=4)
    said = told(capsys.readouterr().err)
    assert code == 0 and "start linear probe of 72 rows" in said
    (zero,) = (record for record in metrics_of(run, "validation") if record["step"] == 0)
    assert zero["accuracy"] > tiny_run.SHARE + 0.1
    assert gradientless("replay", str(run)) == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out)


@pytest.mark.parametrize(("limits", "steps"), [((), 11), (("steps=30",), 11), (("steps=4",), 4)])
def test_the_shorter_of_steps_and_forward_passes_ends_a_run(limits, steps, train):
    code, run = train("llama", "mezo", *MEZO, "forward_passes=25", *limits)
    summary = summary_of(run)
    assert code == 0 and (summary["steps"], summary["forward_passes"]) == (steps, 2 + 2 * steps)


@pytest.mark.parametrize(("rows", "batch", "epochs", "steps"), [(1000, 5, 1.1, 220), (29, 7, 7.0, 29), (29, 7, 0.1, 1)])
def test_epochs_are_whole_where_their_decimals_are(rows, batch, epochs, steps):
    config = RunConfig(epochs=epochs, batch_size=batch)
    assert length_of(config, torch.optim.SGD([torch.zeros(1)], lr=1.0), rows) == steps


@pytest.mark.parametrize(("limits", "steps"), [((), 6), (("steps=30",), 6), (("forward_passes=9",), 3)])
def test_epochs_end_a_run(limits, steps, train):
    code, run = train("llama", "mezo", *MEZO, "epochs=0.45", *limits)  # of 12 steps
    assert code == 0 and summary_of(run)["steps"] == steps


def test_an_epoch_as_a_number_of_steps(train, monkeypatch, capsys):
    better_and_better(monkeypatch)
    renewed = []
    renorm = SPSA._renorm
    monkeypatch.setattr(SPSA, "_renorm", lambda self, t: renewed.append(t) or renorm(self, t))
    options = ("optimizer.variance=grad_norm", "optimizer.renorm_every=epoch", "batch_size=20", "epochs=2.5")
    code, run = train("llama", "mezo", *MEZO, *options)
    assert code == 0 and summary_of(run)["steps"] == 9
    assert sorted(set(renewed)) == [0, 4, 8]  # 72 rows make 3.6 steps
    assert gradientless("replay", str(run)) == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out)


def test_a_log_alone_tells_the_length_that_its_schedule_ends_with(train, monkeypatch, capsys):
    better_and_better(monkeypatch)
    code, run = train("llama", "mezo", *MEZO, "steps=30", "forward_passes=25", "schedule.name=linear")
    assert code == 0
    (run / "summary.json").unlink()  # as of a run that was killed before its end
    log = (run / "trajectory.bin").read_bytes()
    assert gradientless("replay", str(run)) == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out) and (run / "trajectory.bin").read_bytes() == log


def test_a_prompt_of_ones_own(train, capsys):
    mine = ("prompt.text='{text} It was'", "prompt.words={negative=' terrible', positive=' great'}")
    code, run = train("llama", "mezo", *MEZO, *mine, "prompt.score=mean", steps=2)
    said = told(capsys.readouterr().err)
    assert code == 0 and "on the prompt '{text} It was' with ' terrible', ' great'" in said
    note = json.loads((run / "model" / "gradientless.json").read_text("utf-8"))
    assert note["prompt"] == {
        "text": "{text} It was",
        "words": {"negative": " terrible", "positive": " great"},
        "score": "mean",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("prompt.text='no place'", PROMPT[1]), "prompt: text must have a slot for a text of the row"),
        (("prompt.text='{text} It was'", "prompt.words={negative=' bad', neutral=' so'}"), "none for 'positive'"),
        (("prompt.text='{text} It was'",), "prompt.words: must name a word for every label, got none"),
        (
            ("prompt.text='{text} It was'", "prompt.words={negative=' good', positive=' good'}"),
            "prompt: label words must differ",
        ),
        (("surface.readout=prompt", PROMPT[1]), "prompt.text: must be given for a causal model"),
        ((PROMPT[1],), "prompt.text: must be given for a causal model"),
    ],
)
def test_a_wrong_prompt_is_one_line(settings, message, train, capsys):
    code, run = train("llama", "mezo", *MEZO, *settings)
    assert code == 2 and not run.exists()
    told_lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert message in told_lines[-1]
    assert all(line.startswith(("train ", "validation ")) for line in told_lines[:-1])


# --- runs that go wrong ----------------------------------------------------------------------------------------------


def test_a_rate_far_too_large_is_told(train, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "MeZO: the loss must not grow")  # which says the same: one voice is enough
        code, _ = train("llama", "mezo", "optimizer.lr=0.2", "optimizer.eps=1e-2", "log_every=1", steps=80)
    said = told(capsys.readouterr().err)
    assert code == 0 and "diverging the training loss rose from " in said
    assert "lower optimizer.lr (now 0.2) three to ten times" in said


def test_a_run_that_explodes_at_once_is_told(train, own, capsys):
    """Before the first losses were logged, and then no further."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MeZO: the loss must not grow")
        code, _ = train("llama", "mezo", *MEZO, own("explodes"), "log_every=10", steps=40)
    said = told(capsys.readouterr().err)
    assert code == 0 and re.search(
        r"diverging the training loss rose from [0-2]\.\d+ to 1e\+06: lower optimizer.lr", said
    )


@pytest.mark.parametrize("loss", ["nothing", "later"])
@pytest.mark.parametrize("evaluator", ["walk", "snapshot"])
def test_losses_that_are_not_finite_end_the_run(evaluator, loss, train, own, models, tmp_path, capsys):
    """With the weights of the last good evaluation, or else of the last step that had a finite loss."""
    more = (*MEZO, f"optimizer.evaluator={evaluator}", "optimizer.patience=4")
    code, run = train("llama", "mezo", *more, own(loss))
    assert code == 2
    line = last_line(capsys.readouterr().err)
    told, step, rest = re.fullmatch(r"(MeZO: .*) \(after step (\d+)\); the cause is (.*)", line).groups()  # type: ignore[union-attr]
    assert told == (
        "MeZO: losses must be finite, got 4 steps in a row without; the weights are those before; "
        "lower lr (0.001) or eps (0.01)"
    )
    assert int(step) == len(Trajectory.open(run / "trajectory.bin"))
    assert not (run / "summary.json").exists()
    assert gradientless("export", str(run), "--out", str(tmp_path / "good"), "--trust-code") == 0
    base, found = (load_file(Path(place) / "model.safetensors") for place in (models["llama"], tmp_path / "good"))
    if loss == "nothing":
        assert rest == (
            f"the model in dtype float32, or loss '{tmp_path / 'mine.py'}:nothing', before anything was tuned; "
            f"gradientless export {run} --out DIR --trust-code writes the weights as they stand"
        )
        assert all(torch.allclose(base[name], found[name], rtol=0, atol=1e-6) for name in found)
    else:
        assert rest == (
            "optimizer.lr = 0.001, which is too high; the last good weights, of the evaluation at step 5, are in "
            f"{run / 'model'}"
        )
        best = load_file(run / "best-5" / "tensors.safetensors")
        assert all(torch.equal(best[name], found[name]) for name in best)
        assert not any(torch.allclose(base[name], found[name], rtol=0, atol=1e-5) for name in best)


def test_a_step_without_a_finite_loss_is_skipped(train, own, capsys):
    code, run = train("llama", "mezo", *MEZO, "optimizer.evaluator=walk", own("sometimes"), "log_every=3", steps=6)
    assert code == 0
    assert all(0 < loss < 100 for loss in losses_of(run))  # of the steps that were measured
    skipped = json.loads((run / "summary.json").read_text("utf-8"))["skipped_steps"]
    assert skipped > 0 and f"skipped {skipped} of 6 steps, whose losses were not" in told(capsys.readouterr().err)
    assert gradientless("replay", str(run), "--trust-code") == 0
    assert "bit-equal to the run yes" in told(capsys.readouterr().out)


# --- rows of a table that the batch does not touch -------------------------------------------------------------------


GOOD_OR_BAD = {"negative": " bad", "positive": " good"}


@pytest.fixture
def objective_of(models):
    """objective_of(model) -> the loss on two short rows of the surface full over that model."""

    def make(model: str, words: Mapping[str, str] = GOOD_OR_BAD) -> Objective:
        options = {} if model == "bert" else {"prompt": Prompt("{text}:", words)}
        folder = models.get(model, model)
        surface = FullSurface.create(folder, ("negative", "positive"), max_length=16, seed=1, **options)
        encoded = surface.encode([Example("a good film", 1), Example("bad", 0)])
        parts = [(surface.prepare(encoded.batch(np.array([row]))), encoded.labels[[row]]) for row in (0, 1)]
        return Objective(surface, parts, Noise(0))

    return make


@pytest.mark.parametrize("model", ["bert", "llama"])  # the second one's table is its output layer, too
@torch.no_grad()
def test_losses_read_the_touched_rows_alone(model, objective_of):
    objective = objective_of(model)
    ((name, rows),) = objective.touched().items()
    tensors = objective.surface.trainable()
    assert 2 < len(rows) < len(tensors[name]) - 2 and len(rows.unique()) == len(rows)
    z = Direction(3, 0, ALL)
    points = [point(0.1, z), point(-0.1, z)]
    space = Space(tensors, Noise(0))
    expected = Walk(space, objective.__call__).losses(points)
    space.settle()
    found = Walk(space, objective).losses(points)
    assert found == pytest.approx(expected, rel=1e-5) and found[0] != found[1]
    space.settle()
    others = torch.ones(len(tensors[name]), dtype=torch.bool)
    others[rows] = False
    tensors[name][others] = math.nan
    assert math.isfinite(objective())


@pytest.fixture
def inject_of(objective_of, monkeypatch):
    """inject_of(model) -> (the evaluator over its objective, the rows of each pass; one of more than `most` fails)."""

    def make(model: str) -> tuple[Inject, SimpleNamespace]:
        objective, seen = objective_of(model), SimpleNamespace(rows=[], most=10_000)
        scores = objective.surface.logits

        def counted(prepared, *more):
            seen.rows.append(len(prepared.tensors["input_ids"]))
            if seen.rows[-1] > seen.most:
                raise torch.OutOfMemoryError("out of memory")
            return scores(prepared, *more)

        monkeypatch.setattr(objective.surface, "logits", counted)
        return Inject(Space(objective.surface.trainable(), Noise(0), rank=1), objective, objective.surface), seen

    return make


POINTS = [point(sign * 0.1, Direction(3, draw, ALL)) for draw in range(200) for sign in (1.0, -1.0)]


@pytest.mark.parametrize("model", ["bert", "llama"])
@torch.no_grad()
def test_a_pass_has_as_many_injected_points_as_its_tokens_allow(model, inject_of):
    """Whole pairs within 1,024 tokens on a processor, and one at the least."""
    inject, seen = inject_of(model)
    tokens = [prepared.tensors["input_ids"].numel() for prepared, _ in inject.closure.parts]
    inject.losses(POINTS[:2])  # where two points are tried
    seen.rows.clear()
    alone = [loss for i in range(0, 8, 2) for loss in inject.losses(POINTS[i : i + 2])]
    assert seen.rows == [2] * 8  # a pass for each of two micro-batches of one row
    for room, count in ((None, 400), (8 * max(tokens), 20), (1, 8)):
        inject.injection.room = room
        seen.rows.clear()
        found = inject.losses(POINTS[:count])
        assert len(found) == count and found[:8] == pytest.approx(alone, rel=1e-5)
        most = [2 * max(1, (room or 1024) // (2 * each)) for each in tokens]
        assert seen.rows == [min(each, count - start) for each in most for start in range(0, count, each)]


@torch.no_grad()
def test_injected_points_that_memory_does_not_hold_are_halved(inject_of):
    inject, seen = inject_of("llama")
    together = inject.losses(POINTS[:16])
    seen.most = 6
    for first in (16, 4):  # what was found is kept
        seen.rows.clear()
        assert inject.losses(POINTS[:16]) == pytest.approx(together, rel=1e-5)
        assert seen.rows[0] == first
    seen.most = 1
    with pytest.raises(torch.OutOfMemoryError):  # which is answered with fewer rows
        inject.losses(POINTS[:2])


def test_a_tied_table_is_read_whole_where_all_of_its_logits_are(objective_of, models, tmp_path):
    several = {"negative": " bad bad", "positive": " good"}
    assert objective_of("llama", several).touched() == {}
    watched = objective_of("llama")
    watched.surface.model.lm_head.register_forward_hook(lambda *_: None)
    assert watched.touched() == {}
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"], tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(tmp_path)
    ((name, rows),) = objective_of(str(tmp_path), several).touched().items()
    assert name == "model.embed_tokens.weight" and len(rows) < len(model.lm_head.weight)


def test_what_a_model_writes_is_not_known_before(objective_of, monkeypatch):
    objective = objective_of("llama")
    assert objective.touched()
    monkeypatch.setattr(objective, "loss", SimpleNamespace(reads="texts"))
    assert objective.touched() == {}


def test_what_was_said_before_the_first_step_is_told_beside_what_is_said_now(models, rows, train, tmp_path, capsys):
    """Also by a run that was stopped and resumed; counted again here from the answers of the two models."""
    from gradientless.run.evaluation import load_splits
    from gradientless.run.predict import predict_labels

    settings = ("optimizer.lr=3e-3", "evaluate_every=6", "best=loss")
    code, run = train("llama", "adamw", *settings, name="straight")
    assert code == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    found = json.loads((run / "summary.json").read_text("utf-8"))
    validation = load_splits(RunConfig.load(run / "config.toml")).validation
    said = {}
    for name in ("before", "after"):
        out = run if name == "after" else tmp_path / "untuned"
        if name == "before":
            given = [each for each in settings if not each.startswith("optimizer.lr")]
            assert gradientless(*arguments(models, rows, out, "llama", "adamw", *given, "optimizer.lr=0", steps=1)) == 0
        said[name] = predict_labels(out, validation)[1]
    right = [("negative", "positive")[row.label] for row in validation]
    apart = [(b, a, r) for b, a, r in zip(said["before"], said["after"], right, strict=True) if b != a]
    assert len(apart) > 1
    told = found["answers"]
    assert (told["asked"], told["changed"]) == (len(validation), len(apart))
    assert told["right"] == sum(a == r for _, a, r in apart) and told["wrong"] == sum(b == r for b, _, r in apart)
    assert [(row["before"], row["after"], row["right"]) for row in told["first"]] == apart[:6]
    share = sum(b == r for b, r in zip(said["before"], right, strict=True)) / len(right)
    assert found["before"]["accuracy"] == pytest.approx(share)
    assert f"accuracy {share:.2%} -> {found['metrics']['accuracy']:.2%}" in shown
    assert f"{len(apart)} of the first {len(validation)} changed: {told['right']} became right" in shown
