"""The documented optimizer of one's own, trained from the command line by its file's name, and replayed."""

from __future__ import annotations

import pytest

from gradientless import cli
from pages import ROOT, blocks


def test_the_documented_optimizer_trains_and_replays(table, tiny_model, tmp_path, monkeypatch, capsys):
    (file,) = [block for block in blocks(ROOT / "docs" / "api.md") if block.note == "mine.py"]
    (tmp_path / "mine.py").write_text(file.text, "utf-8")
    monkeypatch.chdir(tmp_path)
    data = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    method = ["--optimizer", "mine.py:BestOfK", "optimizer.radius=2e-2", "optimizer.candidates=8", "--steps", "6"]
    for command in (["train", *data, *method, "--max-length", "16", "--out", "own"], ["replay", "own", "--trust-code"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert not ended.value.code
    told = " ".join(capsys.readouterr().out.split())
    assert "bit-equal to the run yes" in told and "replay gradientless replay own --trust-code" in told


RAISING = """
import torch
from gradientless.search.optim import MeZO
class Divides(MeZO):
    def __init__(self, params, lr=1e-3, *, seed=0):
        super().__init__(params, lr, seed=1 // 0)
class Without(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        raise RuntimeError("no such\\nthing")
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Divides", "ZeroDivisionError: integer division or modulo by zero"),
        ("Without", "RuntimeError: no such thing"),
    ],
)
def test_an_optimizer_that_raises_while_it_is_made_is_one_line(
    name, told, table, tiny_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "raising.py").write_text(RAISING, "utf-8")
    monkeypatch.chdir(tmp_path)
    data = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *data, "--optimizer", f"raising.py:{name}", "--steps", "2", "--max-length", "16"])
    assert ended.value.code == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert errors.endswith(f"optimizer: 'raising.py:{name}' must be made without an error, got {told}")


SEARCHING = """
from gradientless import ForwardOptimizer
from gradientless.search.points import ORIGIN, Losses
class Takes(ForwardOptimizer):
    def __init__(self, params, radius=1e-3):
        super().__init__(params, {"lr": radius})
class Nothing(ForwardOptimizer):
    name = "Nothing"
    def __init__(self, params, radius=1e-3, *, seed=0):
        super().__init__(params, {"lr": radius}, seed=seed)
    def search(self, t):
        yield Losses([ORIGIN])
class Raises(Nothing):
    name = "Raises"
    def search(self, t):
        yield Losses([ORIGIN])
        raise KeyError("what")
"""


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (SEARCHING, "Takes", "'searching.py:Takes' must take seed as an option, which decides its noise, got none"),
        (SEARCHING, "Nothing", "Nothing: search must return an Update, got None"),
        (SEARCHING, "Raises", "Raises: search must not raise, got KeyError: 'what'"),
        (
            "import neighbour\n" + SEARCHING,
            "Nothing",
            "optimizer: searching.py could not be run (ModuleNotFoundError: No module named 'neighbour')",
        ),
    ],
)
def test_an_optimizer_that_lacks_what_is_required_is_one_line(
    text, name, told, table, tiny_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "searching.py").write_text(text, "utf-8")
    (tmp_path / "neighbour.py").write_text("", "utf-8")
    monkeypatch.chdir(tmp_path)
    data = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *data, "--optimizer", f"searching.py:{name}", "--steps", "2", "--max-length", "16"])
    assert ended.value.code == 2
    assert " ".join(capsys.readouterr().err.split()).endswith(told)
