"""Weights, losses and scores that are not finite: none is saved as a result, and none is turned into an accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_run
from gradientless.errors import NotFinite, UserError
from gradientless.language.metrics import highest
from gradientless.language.readouts import greedily
from gradientless.language.surfaces.saved import note_files
from gradientless.language.tasks import Example, Splits
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import require_finite, score
from gradientless.run.losses import LOSSES, chosen
from gradientless.run.predict import predict_texts
from gradientless.run.untuned import WAYS
from gradientless.search.optim import FIRST_ORDER
from tiny_run import gradientless

OWN = """
import torch
from torch.nn.functional import cross_entropy

calls = 0


def later(logits, labels):
    global calls
    calls += 1
    return cross_entropy(logits, labels) * (1 if calls < 19 else float("inf"))


class Bursts(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.steps = 0

    def step(self):
        super().step()
        self.steps += 1
        if self.steps == 16:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv", count=60)


@pytest.fixture
def train(model, rows, tmp_path, capsys):
    """train(settings, …) -> (exit code, the run's folder, the last line)."""

    def run(*more: str, **options: Any) -> tuple[int, Path, str]:
        capsys.readouterr()
        code = gradientless(*tiny_run.arguments(model, rows, tmp_path / "run", *more, **options))
        return code, tmp_path / "run", capsys.readouterr().err.rstrip("\n").split("\n")[-1]

    return run


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "setting", "line"),
        [
            ("sgd", "lr=-1", "lr: must be a number >= 0 and finite, got -1"),
            ("sgd", "lr=nan", "lr: must be a number >= 0 and finite, got nan"),
            ("adam", "lr=inf", "lr: must be a number >= 0 and finite, got inf"),
            ("adamw", "lr=true", "lr: must be a number >= 0 and finite, got true"),
            ("momentum", "lr=fast", "lr: must be a number >= 0 and finite, got 'fast'"),
            ("adam", "betas=[0.9, 0.9, 0.9]", "betas: must be a list of two numbers >= 0 and < 1, got [0.9, 0.9, 0.9]"),
            ("adam", "betas=text", "betas: must be a list of two numbers >= 0 and < 1, got 'text'"),
            ("adamw", "betas=2.0", "betas: must be a list of two numbers >= 0 and < 1, got 2.0"),
            ("adamw", "betas=[0.9, 2.0]", "betas: must be a list of two numbers >= 0 and < 1, got [0.9, 2.0]"),
            ("adamw", "betas=[nan, 0.9]", "betas: must be a list of two numbers >= 0 and < 1, got [nan, 0.9]"),
            ("adam", "eps=-1e-8", "eps: must be a number >= 0 and finite, got -1e-08"),
            ("sgd", "weight_decay=inf", "weight_decay: must be a number >= 0 and finite, got inf"),
            ("momentum", "momentum=1.5", "momentum: must be a number >= 0 and < 1, got 1.5"),
            ("nesterov", "nesterov=3", "nesterov: must be true or false, got 3"),
        ],
    )
    def test_of_first_order_methods(self, name, setting, line):
        with pytest.raises(UserError) as found:
            RunConfig.load(None, [f"optimizer.{setting}"], {"optimizer.name": name})
        assert str(found.value) == f"optimizer.{line}"

    def test_all_at_once_and_of_tensors(self):
        tensors = "tensors=[{pattern='*', lr=-3, betas=[1, 1]}]"
        with pytest.raises(UserError) as found:
            RunConfig.load(None, ["optimizer.lr=-1", tensors], {"optimizer.name": "adam"})
        assert [line.partition(":")[0] for line in str(found.value).split("\n")] == [
            "optimizer.lr", "tensors[0].lr", "tensors[0].betas",
        ]  # fmt: skip

    def test_that_do_not_go_together(self, train):
        code, run, line = train("optimizer.momentum=0", optimizer="nesterov")
        assert code == 2 and line.startswith("optimizer: options must be what nesterov takes together, got ")
        assert not run.exists()

    def test_every_option_has_a_requirement_that_its_default_meets(self):
        for kind in FIRST_ORDER.values():
            for option, value in kind.defaults.items():
                assert kind.require(option, value) is None
                assert kind.require(option, "text") and kind.require(option, -1.5)


class TestARun:
    @pytest.mark.parametrize(
        ("name", "rate"),
        [("sgd", "1e38"), ("adamw", "1e38"), ("momentum", "1e300"), ("mezo", "1e38"), ("mezo", "1e300")],
    )
    def test_a_rate_that_no_weight_survives(self, name, rate, train):
        code, run, line = train(f"optimizer.lr={rate}", "schedule.name=constant", optimizer=name)
        assert code == 2 and f"the cause is optimizer.lr = {float(rate):.4g}, which is too high" in line
        assert not (run / "summary.json").exists() and not (run / "model").exists()
        assert not list(run.glob("checkpoint-*"))

    @pytest.mark.parametrize(
        ("what", "told"),
        [
            ("loss=mine.py:later", "train: the loss must be finite, got inf in 1 steps in a row (after step 18)"),
            ("mine.py:Bursts", "train: the loss must be finite"),
        ],
    )
    def test_ends_with_the_last_good_weights(self, what, told, train, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(OWN, "utf-8")
        monkeypatch.chdir(tmp_path)
        own = what.startswith("loss")
        code, run, line = train(
            *([what] if own else []), "optimizer.lr=0.1", steps=30, optimizer="sgd" if own else what
        )
        assert code == 2
        if own:
            assert line.startswith(told)
        else:
            assert line.startswith(
                "train: weights must be finite in torch.float32, got others in 'head.dense.weight' (after"
            )
        assert line.endswith(f"the last good weights, of the evaluation at step 10, are in {run / 'model'}")
        assert not (run / "summary.json").exists()
        best, saved = load_file(run / "best-10" / "tensors.safetensors"), load_file(run / "model" / "head.safetensors")
        for name, tensor in best.items():
            assert torch.equal(saved[name.removeprefix("head.")], tensor)
        assert gradientless("eval", str(run), "--trust-code") == 0

    def test_weights_are_looked_at_before_a_checkpoint(self, train, tmp_path, monkeypatch):
        """No loss and no evaluation is told between the step and the checkpoint."""
        (tmp_path / "mine.py").write_text(OWN, "utf-8")
        monkeypatch.chdir(tmp_path)
        more = ("checkpoint_every=8", "evaluate_every=10")
        code, run, line = train(*more, "optimizer.lr=0.1", steps=30, optimizer="mine.py:Bursts")
        assert code == 2 and "(after step 16)" in line
        assert [place.name for place in run.glob("checkpoint-*")] == ["checkpoint-8"]

    @pytest.mark.parametrize("name", ["gld", "stp", "gldsearch"])
    def test_a_search_that_never_finds_a_finite_loss(self, name, train, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text("def never(logits, labels):\n    return float('nan')\n", "utf-8")
        monkeypatch.chdir(tmp_path)
        code, _, line = train("loss=mine.py:never", "evaluate_every=100", steps=30, optimizer=name)
        assert code == 2 and "in 10 steps in a row (after step 9)" in line
        assert "the cause is the model in dtype float32, or loss 'mine.py:never', before anything was tuned" in line

    @pytest.mark.parametrize("name", ["gld", "mezo", "sgd"])
    def test_a_dtype_that_is_too_small(self, name, rows, tmp_path, capsys):
        """The whole model in float16, whose states overflow."""
        big = Path(tiny_run.make_model(tmp_path / "big"))
        tensors = load_file(big / "model.safetensors")
        layers = {key: 3e4 * tensor if "LayerNorm.weight" in key else tensor for key, tensor in tensors.items()}
        save_file(layers, big / "model.safetensors", metadata={"format": "pt"})
        more = ("surface.name=full", "surface.start=random", "dtype=float16", "optimizer.evaluator=snapshot")
        more = {"sgd": more[:3], "gld": more, "mezo": (*more, "optimizer.eps=9")}[name]
        code = gradientless(*tiny_run.arguments(str(big), rows, tmp_path / "run", *more, steps=3, optimizer=name))
        line = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert code == 2 and "dtype float16, which ends at 65,504" in line
        assert not (tmp_path / "run" / "summary.json").exists()


class TestScores:
    @pytest.mark.parametrize("row", [[0.0, math.nan], [math.nan, 1.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    def test_the_highest_of_a_row_is_that_of_finite_scores(self, row):
        good = [[0.5, -math.inf], [2.0, 2.0]]
        assert highest(torch.tensor(good)).tolist() == [0, 0]
        scores, labels = torch.tensor([*good, row]), torch.tensor([0, 0, 0])
        with pytest.raises(NotFinite, match=r"model: scores must be finite, got .* in 1 of 3 rows"):
            highest(scores)
        with pytest.raises(NotFinite):
            score(scores, labels)
        with pytest.raises(NotFinite):
            chosen(scores, [Example("a", 0)] * 3, ("x", "y"))
        for name in ("accuracy", "f1"):
            assert math.isnan(LOSSES[name].of(scores, labels))
        with pytest.raises(NotFinite):
            greedily(lambda tokens: scores, 3, torch.tensor([5]), 2)

    @pytest.fixture
    def broken(self, train):
        """A finished run whose saved head holds nan."""
        code, run, _ = train(optimizer="adamw", steps=4)
        assert code == 0
        head = run / "model" / "head.safetensors"
        tensors = load_file(head)
        tensors["out.bias"][1] = math.nan
        save_file(tensors, head, metadata={"format": "pt"})
        note_files(run / "model")
        return run

    def test_eval_predict_and_export(self, broken, capsys, tmp_path):
        assert gradientless("eval", str(broken)) == 2
        assert capsys.readouterr().err.endswith("model: scores must be finite, got nan in 6 of 6 rows\n")
        assert gradientless("predict", str(broken), "a good film") == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.endswith("model: scores must be finite, got nan in 1 of 1 rows\n")
        with pytest.raises(NotFinite):
            predict_texts(broken, ["a film", "the plot"])
        assert gradientless("export", str(broken), "--out", str(tmp_path / "out"), "--dtype", "float16") == 2
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("way", ["zero-shot", "calibrated", "icl"])
    @pytest.mark.parametrize("kind", ["classification", "choice", "generation"])
    def test_untuned(self, way, kind, tmp_path, monkeypatch):
        from tiny_models import make_language_model

        if (way, kind) == ("calibrated", "generation"):
            return
        language, tokenizer = make_language_model("llama")
        language.get_output_embeddings().weight.data[:] = math.nan
        language.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        fields = {"text": "a film"}
        row = {
            "classification": Example("a film", 0),
            "choice": Example("a film", 0, fields=fields, choices=("good", "bad"), answers=("good",)),
            "generation": Example("a film", 0, fields=fields, answers=("good",)),
        }[kind]
        labels = ("negative", "positive") if kind == "classification" else ()
        other = Example("the plot", 1) if kind == "classification" else row
        splits = Splits([row, other] * 3, [row, other], [], labels)
        prompt = ["prompt.text={text} was {label}"]
        words = ["prompt.words={negative=' bad', positive=' good'}"] if labels else []
        where = {"model": str(tmp_path / "model"), "device": "cpu", "data.path": "rows.csv"}
        where |= {"data.max_length": 30, "surface.max_new_tokens": 4}
        config = RunConfig.load(None, [*prompt, *words], where)
        monkeypatch.setattr(RunConfig, "kind", kind)
        with pytest.raises(NotFinite, match="scores must be finite, got nan"):
            WAYS[way].use(config, splits, WAYS[way].options)

    def test_weights_out_of_a_dtype(self):
        require_finite("export", {"a": torch.tensor([65504.0]).half()})
        with pytest.raises(NotFinite, match=r"export: weights must be finite in torch.float16, got others in 'a'"):
            require_finite("export", {"a": torch.tensor([1.0, 7e4]).half()})


def test_what_is_written_of_a_run_is_json(train):
    """Not nan, which is none."""
    _, run, _ = train("optimizer.lr=1e38", optimizer="sgd", steps=30)
    for file in run.glob("*.jsonl"):
        for line in file.read_text("utf-8").splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(name))
