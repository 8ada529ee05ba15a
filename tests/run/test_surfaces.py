"""Whole runs of every kind of optimizer on the surfaces beside and inside a model: resumed, replayed, opened."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from gradientless import cli
from gradientless.language.surfaces import load
from gradientless.language.surfaces.lst import LstSurface
from gradientless.run.predict import predict_texts
from gradientless.run.train import Run
from tiny_run import gradientless

ANSWERS = ("prompt.text={text} the film was", 'prompt.words.negative=" bad"', 'prompt.words.positive=" good"')
SURFACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "k_lst": ("bert", ("surface.k=2", "surface.reduction=4", "surface.window=centred")),
    "lora": ("bert", ("surface.rank=2", "surface.targets=['query', 'value']")),
    "lst": ("bert", ("surface.reduction=4", "surface.fisher_rows=8")),
    "prefix": ("llama", ("surface.tokens=3", *ANSWERS)),
    "side_lora": ("bert", ("surface.rank=2", "surface.start=probe")),
}
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("adamw", ("optimizer.lr=1e-2",)),
    "gld": ("gld", ("optimizer.radius=0.1", "optimizer.candidates=3", "optimizer.pool=true", "optimizer.entries=64")),
    "mezo inject": ("mezo", ("optimizer.lr=1e-3", "optimizer.rank=1", "optimizer.evaluator=inject")),
    "mezo snapshot": ("mezo", ("optimizer.lr=1e-3", "optimizer.evaluator=snapshot")),
    "mezo walk": ("mezo", ("optimizer.lr=1e-3", "optimizer.evaluator=walk")),
}
STEPS, STOP = 6, 3
OFTEN = ("checkpoint_every=2", "evaluate_every=3", "log_every=4", "--batch-size", "8")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny_run.make_model(folder / "bert"),
        "llama": families.save("llama", folder / "llama"),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv", 40)


@pytest.fixture
def command(models, rows, tmp_path):
    """command(surface, settings, …) -> the arguments of a run into the folder `out` (`name` below tmp_path)."""

    def build(surface: str, *more: str, name: str = "run", model: str | None = None, **options) -> list[str]:
        kind, own = SURFACES[surface]
        given = {setting.partition("=")[0] for setting in more}
        own = tuple(setting for setting in own if setting.partition("=")[0] not in given)
        return tiny_run.arguments(
            models[model or kind], rows, tmp_path / name, "--surface", surface, *own, *OFTEN, *more,
            **{"steps": STEPS, **options},
        )  # fmt: skip

    return build


def saved(run: Path) -> dict[str, bytes]:
    """The files that two equal runs have alike."""
    files = [*run.rglob("*.safetensors"), run / "metrics.jsonl", *run.glob("trajectory.bin")]
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(files) if "replayed" not in file.parts}


CASES = [(s, m) for s in SURFACES for m in METHODS]


@pytest.mark.parametrize(("surface", "method"), CASES)
def test_runs_stops_resumes_and_replays(surface, method, command, tmp_path, monkeypatch, capsys):
    optimizer, options = METHODS[method]
    assert gradientless(*command(surface, *options, optimizer=optimizer)) == 0
    run, told = tmp_path / "run", " ".join(capsys.readouterr().err.split())
    shown = re.search(r"surface (\w+).* ([\d,]+) of ([\d,]+) parameters tuned \([\d.]+%\), ([\d,]+) registered, ", told)
    assert shown and shown[1] == surface and "touched by the backward pass" in told
    tuned, total = (int(shown[i].replace(",", "")) for i in (2, 3))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    counted, backward = summary["parameters"], optimizer == "adamw"
    assert (counted["tuned"], counted["total"], counted["share"]) == (tuned, total, tuned / total)
    assert counted["registered"] == int(shown[4].replace(",", "")) and (counted["touched"] >= tuned) == backward
    assert (summary["backward_products"] > 0) == backward and summary["seconds_a_step"] > 0
    (place,) = run.glob("checkpoint-*")
    state = load_file(place / "tensors.safetensors")
    weights = {name: tensor for name, tensor in state.items() if name.startswith("weights/")}
    assert sum(tensor.numel() for tensor in weights.values()) == tuned < total
    (best,) = run.glob("best-*")
    assert sum(tensor.numel() for tensor in load_file(best / "tensors.safetensors").values()) == tuned

    step = Run.step

    def stopping(self, t, logged):
        if t == STOP - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, t, logged)

    monkeypatch.setattr(Run, "step", stopping)
    assert gradientless(*command(surface, *options, optimizer=optimizer, name="stopped")) == cli.STOPPED
    monkeypatch.setattr(Run, "step", step)
    assert gradientless("train", "--out", str(tmp_path / "stopped"), "--resume") == 0
    assert saved(tmp_path / "stopped") == saved(run)

    if optimizer != "adamw":
        capsys.readouterr()
        assert gradientless("replay", str(run)) == 0
        assert re.search(r"bit-equal to the run +yes", capsys.readouterr().out)
        replayed = load(run / "replayed").state_dict()
        kept = load(run / "model").state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in replayed.items())


PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bias": ("bert", ()),
    "ia3": ("bert", ()),
    "layers": ("bert", ("surface.pattern=layer.1",)),
    "prefix": ("llama", ("surface.tokens=3", "surface.reparameterise=true", *ANSWERS)),
    "prefix masked": ("bert", ("surface.tokens=3",)),
    "prompt": ("bert", ("surface.tokens=3",)),
}


@pytest.mark.parametrize("method", ["adamw", "gld", "mezo walk"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_model_run(part, method, command, tmp_path, monkeypatch, capsys):
    surface = part.partition(" ")[0]
    monkeypatch.setitem(SURFACES, surface, PARTS[part])
    optimizer, options = METHODS[method]
    assert gradientless(*command(surface, *options, optimizer=optimizer, steps=3)) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert 0 < summary["parameters"]["tuned"] < summary["parameters"]["total"]
    assert (summary["backward_products"] > 0) == (optimizer == "adamw")
    saved = load(run / "model").trainable()
    assert sum(tensor.numel() for tensor in saved.values()) == summary["parameters"]["tuned"]
    if optimizer != "adamw":
        assert gradientless("replay", str(run)) == 0
        assert re.search(r"bit-equal to the run +yes", capsys.readouterr().out)


def test_a_start_that_rows_decide(command, tmp_path, rows, capsys):
    """Replay needs the rows of such a start, and the same ones; of any other start it needs none."""
    table = tmp_path / "rows.csv"
    for surface, start in (("lst", "surface.init=fisher"), ("k_lst", "surface.init=magnitude")):
        table.write_text(Path(rows).read_text("utf-8"), "utf-8")
        made = command(surface, start, *METHODS["mezo walk"][1], name=surface, optimizer="mezo")
        assert gradientless(*(str(table) if each == rows else each for each in made)) == 0
        table.unlink()
        capsys.readouterr()
        code, told = gradientless("replay", str(tmp_path / surface)), capsys.readouterr()
        assert (code == 2 and "rows.csv" in told.err) if surface == "lst" else (code == 0 and "yes" in told.out)
    lines = Path(rows).read_text("utf-8").replace("good", "film").split("\n")
    table.write_text("\n".join(lines), "utf-8")
    assert gradientless("replay", str(tmp_path / "lst")) == 2
    line = capsys.readouterr().err.rstrip("\n")
    assert line.startswith("replay: the rows must be those that the run began with")


@pytest.mark.parametrize("surface", SURFACES)
def test_the_tuned_model_is_used(surface, command, tmp_path, models, capsys):
    """eval, predict, export; that it opens as its card says, `test_exports.py` shows."""
    optimizer, options = METHODS["adamw"]
    assert gradientless(*command(surface, *options, "surface.start=default", optimizer=optimizer, steps=2)) == 0
    run, out = tmp_path / "run", tmp_path / "out"
    capsys.readouterr()
    assert gradientless("eval", str(run), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    told = json.loads((run / "summary.json").read_text("utf-8"))["metrics"]
    assert found["loss"] == pytest.approx(told["loss"], rel=1e-5) and found["rows"] == 4
    labels, probabilities = predict_texts(run, ["a good film", "bad"])
    assert gradientless("predict", str(run), "a good film", "--format", "jsonl") == 0
    assert json.loads(capsys.readouterr().out)["label"] == labels[0] in ("negative", "positive")
    assert gradientless("export", str(run), "--out", str(out)) == 0
    assert (predict_texts(out, ["a good film", "bad"])[1] == probabilities).all()


def test_connection_dropout_acts_while_training(command, tmp_path):
    for name, more in (
        ("with", ("surface.connection_dropout=0.5",)),
        ("again", ("surface.connection_dropout=0.5",)),
        ("without", ()),
    ):
        assert gradientless(*command("lst", *METHODS["adamw"][1], *more, name=name, optimizer="adamw", steps=2)) == 0
    files = [tmp_path / name / "model" / "side.safetensors" for name in ("with", "again", "without")]
    first, again, without = (file.read_bytes() for file in files)
    assert first == again != without


@pytest.mark.parametrize("method", ["adamw", "mezo walk"])
def test_the_backbone_runs_once_where_its_states_are_kept(method, command, tmp_path, monkeypatch):
    optimizer, options = METHODS[method]
    runs = []
    features = LstSurface._features
    monkeypatch.setattr(LstSurface, "_features", lambda self, tensors: runs.append(1) or features(self, tensors))
    counts = []
    for name, more in (("kept", ("surface.cache=true",)), ("again", ("surface.cache=true",)), ("without", ())):
        start = "surface.init=magnitude"
        assert gradientless(*command("lst", *options, start, *more, name=name, optimizer=optimizer)) == 0
        counts.append(len(runs))
    once = 5  # described; short rows with and without padding; the saved model beside the tuned one
    assert counts[1] - counts[0] == once and counts[2] - counts[1] > STEPS + once
    kept, again, without = (
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("kept", "again", "without")
    )
    assert kept["metrics"] == again["metrics"] and kept["last"]["loss"] == pytest.approx(
        without["last"]["loss"], rel=1e-3
    )
    weights = [load_file(tmp_path / name / "model" / "side.safetensors") for name in ("kept", "again")]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("surface", "settings", "model", "message"),
    [
        (
            "lora",
            ("surface.cache=true",),
            "bert",
            "surface.cache: surface 'lora' has no states to keep, got true; those that have: k_lst, lst",
        ),
        (
            "k_lst",
            ("surface.cache=true", "surface.unfrozen=1"),
            "bert",
            "surface.cache: needs a frozen backbone, got surface.unfrozen = 1",
        ),
        ("lora", ("surface.targets=['quary']",), "bert", "lora: unknown target 'quary'; did you mean 'query'"),
        ("lora", ("surface.rank=17",), "bert", "lora: rank must be from 1 to 16, the widest layer's, got 17"),
        ("lora", ("surface.rank=0",), "bert", "surface.rank: must be >= 1, got 0"),
        ("lora", ("surface.rank=true",), "bert", "surface.rank: must be a number, got true"),
        ("k_lst", ("surface.k=3",), "bert", "k_lst: k must be from 1 to the model's 2 layers, got 3"),
        ("lst", ("surface.reduction=32",), "bert", "lst: reduction must divide the model's width 16, got 32"),
        ("lst", ("surface.init=fischer",), "bert", "lst: unknown init 'fischer'; did you mean 'fisher'"),
        (
            "lora",
            ("surface.k=3",),
            "bert",
            "surface.k: surface 'lora' has no such option, got 3; those that have it: k_lst",
        ),
        (
            "lst",
            ("surface.rank=4",),
            "bert",
            "surface.rank: surface 'lst' has no such option, got 4; those that have it: k_lst, lora, side_lora",
        ),
        ("lora", ("surface.rnk=4",), "bert", "surface: unknown key 'rnk'; did you mean 'rank'"),
        (
            "lora",
            ("surface.targets=[]",),
            "bert",
            "lora: targets must be one pattern or a list of at least one, got []",
        ),
        (
            "lora",
            ("surface.name=layers", "surface.pattern=[]"),
            "bert",
            "layers: pattern must be one pattern or a list of at least one, got []",
        ),
        (
            "lst",
            ("surface.layers=true",),
            "bert",
            "surface.layers: must be a whole number >= 1, or a list of whole numbers >= 0, got true",
        ),
        (
            "lst",
            ("surface.layers=abc",),
            "bert",
            "surface.layers: must be a whole number >= 1, or a list of whole numbers >= 0, got 'abc'",
        ),
        (
            "lst",
            ("surface.layers=[0, -1]",),
            "bert",
            "surface.layers: must be a whole number >= 1, or a list of whole numbers >= 0, got [0, -1]",
        ),
        ("lst", ("surface.layers=[]",), "bert", "lst: layers must be rising numbers from 0 to 1, got []"),
        (
            "k_lst",
            ("surface.layers=[0]", "surface.k=1", "surface.unfrozen=1"),
            "bert",
            "k_lst: unfrozen needs a ladder that reads the model's last layer, 1, got none behind layer 0",
        ),
        ("lora", ("surface.name=loar",), "bert", "surface.name: unknown surface 'loar'; did you mean 'lora'"),
        ("lora", ("surface.name=layers",), "bert", "surface.pattern: must be given for surface 'layers', got nothing"),
        (
            "lora",
            ("surface.name=layers", "surface.pattern=atention"),
            "bert",
            "layers: unknown pattern 'atention'; did you mean 'attention'",
        ),
        ("lora", ("surface.name=bias",), "llama", "bias: the model must have biases, got none"),
    ],
)
def test_bad_input_is_one_line(surface, settings, model, message, command, tmp_path, capsys):
    arguments = command(surface, *settings, model=model)
    if any(setting.startswith("surface.name") for setting in settings):  # else given twice
        at = arguments.index("--surface")
        arguments[at : at + 2] = []
        arguments = [a for a in arguments if not a.startswith(("surface.rank", "surface.targets"))]
    if model == "llama":
        arguments += ["prompt.text=" + ANSWERS[0].partition("=")[2], *ANSWERS[1:]]
    assert gradientless(*arguments) == 2
    told = capsys.readouterr().err
    lines = [
        line for line in told.split("\n") if line and not re.match(r"train  |validation  |\w+: the recipe's ", line)
    ]
    assert len(lines) == 1 and lines[0].startswith(message), told
    assert not (tmp_path / "run").exists()
