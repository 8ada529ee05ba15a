"""The matrix of architectures: a quick part of it, that its checks can fail, and its command."""

from __future__ import annotations

import os
import time

import checks
import matrix
import pytest
import torch
from checks import FAULT, LIMIT, OK, REFUSED, Outcome, Subject, Wrong
from tiny_architectures import ARCHITECTURES

from gradientless.errors import UserError
from gradientless.language.surfaces import FullSurface, HeadSurface
from gradientless.search.evaluators.inject import Inject
from gradientless.search.space import Space
from pages import ROOT, rows

# Of as different kinds as can be, each on the surface and in the checks where it is most unlike the others.
QUICK = {
    "mobilebert": ("full", ["scores", "saved", "inject"]),  # an output layer that is never called
    "longformer": ("full, head", ["scores", "inject"]),  # tokens before rows
    "deberta-v2, its own output layer": ("full", ["scores", "walk", "dropout"]),  # the table itself is its last layer
    "roberta (causal)": ("full", ["choices", "texts"]),  # positions behind the padding's index
    "marian": ("full", ["scores", "saved", "texts"]),  # a bias behind the output layer, positions that are not saved
    "opt, projected": ("full, head", ["scores", "walk", "dropout"]),  # states of another width
    "llama": ("prefix", ["saved", "choices", "texts"]),
    "mamba": ("full", ["padding", "choices", "texts"]),  # states that are no keys and values
    "qwen3_5_text": ("prompt", ["choices", "texts"]),  # layers of both kinds
    "phimoe": ("lora", ["scores", "inject", "saved"]),  # a router that answers with a tuple
    "xlnet": ("full", ["scores"]),  # reads both ways
    "fnet": ("head", ["scores", "padding"]),  # knows no mask
    "flaubert": ("prefix", ["scores"]),  # takes no longer mask than its tokens
    "xlm": ("prefix", ["scores"]),
    "ibert": ("prompt", ["scores"]),  # embeddings that come with a scale
    "perceiver": ("head", ["scores"]),  # takes no tokens by that name
    "prophetnet (causal)": ("prompt", ["scores"]),
    "kimi_linear": ("prompt", ["scores"]),  # a million positions, and a table that seems to end
    "canine": ("full, head", ["walk"]),  # tokens of several tables
    "rwkv": ("full", ["dropout", "texts"]),  # drops nothing
    "gpt_oss": ("bias", ["inject"]),  # a router that is no layer
    "albert": ("prompt", ["scores"]),  # made without a pooler, and without what stands behind it
    "t5": ("lora", ["dropout"]),  # answers with logits where others answer with states
    "diffllama": ("full", ["scores"]),  # is not made with a rate of dropout
    "qwen2_moe": ("lora", ["scores"]),  # a layer of one output
}
REFUSED_ONLY = {  # what of this is refused, and the line that says so
    ("mobilebert", "inject"): "inject: tensor 'mobilebert.embeddings.word_embeddings.weight'",
    ("xlnet", "scores"): "full: a prompt needs a model that reads left to right or fills masks, got",
    ("flaubert", "scores"): "prefix: the model must go on from keys and values, of one shape in all layers",
    ("xlm", "scores"): "prefix: the model must go on from keys and values, of one shape in all layers",
    ("ibert", "scores"): "prompt: the model must read virtual tokens in front of a text, got from",
    ("perceiver", "scores"): "model: must read a row of 8 tokens, got from perceiver: ",
    ("prophetnet (causal)", "scores"): "prompt: the model must read virtual tokens in front of a text, got from",
    ("rwkv", "dropout"): "full: dropout must be 0 for '/model0', which drops nothing anywhere, got 0.5",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    return lambda name: Subject(ARCHITECTURES[name], tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", [name for name in QUICK if ARCHITECTURES[name].known])
def test_no_fault_in_the_quick_part(name, subject_of):
    surface, asked = QUICK[name]
    found = checks.outcomes(subject_of(name), surface, asked)
    assert set(found) == set(asked)
    assert not {check: each for check, each in found.items() if each.word == FAULT}
    refused = {(name, check): each.line for check, each in found.items() if each.word == REFUSED}
    expected = {cell: line for cell, line in REFUSED_ONLY.items() if cell[0] == name}
    assert set(refused) == set(expected), refused
    assert all(line.startswith(expected[cell]) for cell, line in refused.items()), refused


def test_the_published_table_is_of_all_architectures_and_has_no_fault():
    page = ROOT / "docs" / "architectures.md"
    table = {name: cells for _, (name, *cells) in rows(page)}
    left_out = page.read_text("utf-8").partition("Not in this version of the library: ")[2]
    assert not [name for name in ARCHITECTURES if name not in table and name not in left_out]
    assert not [name for name in table if name not in ARCHITECTURES]
    assert not [name for name, cells in table.items() if FAULT in " ".join(cells)]


# --- the checks can fail ----------------------------------------------------------------------------------------------


def wrapped(change):
    """A method in the place of the old one that changes what it gives."""
    return lambda old: lambda self, *args, **more: change(old(self, *args, **more))


SPOILED = {  # check -> what is spoiled, which the check must see
    "scores": (FullSurface, "logits", wrapped(lambda found: found.flip(1))),
    "scores under a head": (HeadSurface, "pooled", wrapped(lambda found: found.flip(1))),
    "padding": (HeadSurface, "pooled", wrapped(lambda found: found - found.mean(0))),
    "walk": (Space, "move_to", lambda old: lambda self, *_: None),
    "inject": (Inject, "losses", wrapped(lambda found: found[::-1])),
    "saved": (FullSurface, "save", lambda old: lambda self, folder: (reset(self), old(self, folder))[1]),
    "choices": (FullSurface, "logits", wrapped(lambda found: found * 1.01)),
    "texts": (FullSurface, "texts", wrapped(lambda found: [text[:-1] for text in found])),
    "dropout": (FullSurface, "logits", lambda old: lambda self, prepared, generator=None: old(self.eval(), prepared)),
}


@torch.no_grad()
def reset(surface) -> None:
    next(iter(surface.trainable().values())).zero_()


@pytest.fixture(scope="module")
def gpt2(subject_of):
    return subject_of("gpt2")


@pytest.mark.parametrize("what", SPOILED)
def test_each_check_sees_what_it_is_there_for(what, monkeypatch, gpt2):
    owner, name, spoil = SPOILED[what]
    check, tried = what.partition(" ")[0], "full, head" if owner is HeadSurface else "full"
    gpt2.made.clear()
    assert checks.outcomes(gpt2, tried, [check])[check].word == OK
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    gpt2.made.clear()
    found = checks.outcomes(gpt2, tried, [check])[check]
    assert found.word == FAULT and "blind" not in found.line, found


def test_every_check_is_seen_to_fail():
    assert {what.partition(" ")[0] for what in SPOILED} == set(checks.CHECKS)


@pytest.mark.parametrize(
    ("raised", "word"),
    [
        (Wrong("x"), FAULT),
        (RuntimeError("x"), FAULT),
        (UserError("x: must be y, got z"), REFUSED),
        (checks.Limit("x"), LIMIT),
    ],
)
def test_what_a_check_raises_is_an_outcome(raised, word, subject_of):
    def check():
        raise raised

    assert checks.attempt(subject_of("gpt2"), check).word == word


# --- the command and its table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcome", "code"), [(None, 0), (Outcome(FAULT, "x differs"), 1)])
def test_the_command_says_whether_all_is_well(outcome, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "KEPT", tmp_path)
    monkeypatch.setitem(checks.CHECKS, "scores", lambda subject, tried: outcome)
    asked = ["--only", "bert", "--checks", "scores", "--surfaces", "head", "--out", str(tmp_path / "table.md")]
    assert matrix.main(asked) == code
    assert ("FAULT head | scores: x differs" in capsys.readouterr().out) == (code == 1)
    assert f"| bert | {'scores' and 'FAULT[1]' if code else 'ok'} |" in (tmp_path / "table.md").read_text("utf-8")
    monkeypatch.setitem(checks.CHECKS, "scores", None)  # what is known is not examined again
    assert matrix.main(asked) == code


@pytest.mark.parametrize("way", ["hangs", "dies"])
def test_one_that_hangs_or_dies_does_not_end_the_run(way, monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "SECONDS", 1)
    monkeypatch.setitem(checks.CHECKS, "scores", lambda *_: time.sleep(60) if way == "hangs" else os._exit(9))
    found = matrix.row_of("bert", ["head"], ["scores"], tmp_path / "bert.json")["head"]["scores"]
    assert found.word == FAULT and ("within 1 s" if way == "hangs" else "code 9") in found.line
