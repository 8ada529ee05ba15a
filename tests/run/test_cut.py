"""Texts that are cut are told: by train, eval, predict and compare, plain and behind a prompt, and in the summary."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiny_run
from gradientless.language.data import Encoded
from gradientless.language.tasks import Example
from gradientless.run.compare import compare, configurations, read_methods
from tiny_run import gradientless

LONG = "very " * 9 + "good"  # 10 tokens, and [CLS] and [SEP]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """bert/, a random body; gpt2/, a random language model; train.csv (12 of 30 rows long), dev.csv (1 of 6 is)."""
    from tiny_models import make_language_model

    folder = tmp_path_factory.mktemp("cut")
    tiny_run.make_model(folder / "bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, tokenizer = make_language_model("gpt2")
    model.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    for name, long, count in (("train", 12, 30), ("dev", 1, 6)):
        rows = [f"{LONG if i < long else 'a film'},{'yn'[i % 2]}" for i in range(count)]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n", "utf-8")
    return folder


def ask(place: Path, model: str, *settings: str) -> list[str]:
    rows = ["--data", str(place / "train.csv"), "--validation", str(place / "dev.csv")]
    few = ["steps=1", "batch_size=4", "surface.pooling=mean", *settings]
    return [*rows, "--model", str(place / model), "--device", "cpu", "--optimizer", "adamw", *few]


PROMPT = ("surface.name=full", "prompt.text='{text} It was'", "prompt.words={y=' great', n=' terrible'}")


def told(err: str) -> list[str]:
    return [" ".join(line.split()) for line in err.splitlines() if line.startswith("texts cut")]


@pytest.mark.parametrize(
    ("model", "length", "whole", "settings"),
    [("bert", 8, 12, ()), ("gpt2", 10, None, PROMPT)],
)
def test_train_eval_and_predict(place, tmp_path, model, length, whole, settings, capsys):
    run, plain = tmp_path / "run", tmp_path / "plain.txt"
    assert gradientless("train", *ask(place, model, *settings), "--max-length", str(length), "--out", str(run)) == 0
    (line,) = told(capsys.readouterr().err)
    head, _, remedy = line.partition("; ")
    assert head == f"texts cut 13 of 36 rows to {length} tokens"
    needed = int(remedy.removeprefix("data.max_length=").removesuffix(" keeps them whole"))
    assert whole is None or needed == whole
    assert json.loads((run / "summary.json").read_text("utf-8"))["texts_cut"] == {"train": 12, "validation": 1}

    assert gradientless("eval", str(run), "--json") == 0
    out, err = capsys.readouterr()
    wanted = f"texts cut {{}} to {length} tokens, as the model was tuned; the longest has {needed}"
    assert told(err) == [wanted.format("1 of 6 rows")] and json.loads(out)["texts_cut"] == 1
    plain.write_text(f"a film\n{LONG}\n", "utf-8")
    assert gradientless("predict", str(run), "--file", str(plain)) == 0
    out, err = capsys.readouterr()
    assert told(err) == [wanted.format("1 of 2 rows")] and len(out.splitlines()) == 3
    assert gradientless("predict", str(run), "a film") == 0
    assert not told(capsys.readouterr().err)

    longer = [*ask(place, model, *settings), "--max-length", str(needed), "--out", str(tmp_path / "whole")]
    assert gradientless("train", *longer) == 0
    assert not told(capsys.readouterr().err)
    assert json.loads((tmp_path / "whole/summary.json").read_text("utf-8"))["texts_cut"] == {
        "train": 0,
        "validation": 0,
    }


def test_compare(place, tmp_path):
    flags = {"data.path": str(place / "train.csv"), "data.validation": str(place / "dev.csv"), "forward_passes": 3}
    flags |= {"model": str(place / "gpt2"), "device": "cpu"}
    names = ("zero-shot", "icl", "probe=linear-probe", "adamw")
    shared = [*PROMPT, "data.max_length=10", "batch_size=4"]
    methods, shared = read_methods(names, [*(each for each in shared if "surface" not in each), "icl:k=1"])
    (tmp_path / "out").mkdir()
    console = Console(file=io.StringIO(), width=200)
    found = compare(methods, configurations(methods, (1,), None, shared, flags), tmp_path / "out", console)
    shown = [line for line in console.file.getvalue().splitlines() if "texts cut" in line]
    assert [line.partition("texts cut")[0].split() for line in shown] == [
        ["zero-shot", "seed", "1"], ["icl", "seed", "1"], ["probe", "seed", "1"], [],
    ]  # fmt: skip
    assert len({line.partition("; ")[2] for line in shown[:2]}) == 1  # the same rows, whatever stands in front of them
    counts = {name: results[0]["texts_cut"] for name, results in found.results.items()}
    assert counts == {"zero-shot": 1, "icl": 1, "probe": 13, "adamw": 13}


def test_rows_of_the_limits_very_length_are_whole():
    from tiny_models import make_tokenizer

    rows = [Example("very " * n, 0) for n in (4, 5, 9)]
    assert Encoded(make_tokenizer(True), rows, 6).wholes.tolist() == [6, 7, 11]
    pairs = [Example("very very", 0, "a film"), Example("very very", 0, "a")]
    assert Encoded(make_tokenizer(True), pairs, 6).wholes.tolist() == [7, 6]
