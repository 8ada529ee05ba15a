"""Every surface in a small random model of every family, under a head and behind a prompt: kept, or refused in a line.

Behind a prompt the adapters are tried in `test_adapters` and side networks in `test_lst`; here are the cells beside.
"""

from __future__ import annotations

import sys
from pathlib import Path

import families
import pytest
import torch
from families import FAMILIES, LABELS, prompt_of
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language.surfaces import SURFACES
from gradientless.run.objective import Objective
from gradientless.search.evaluators import Inject, Snapshot
from gradientless.search.noise import Noise
from gradientless.search.points import ALL as EVERY
from gradientless.search.points import ORIGIN, Direction, point
from gradientless.search.space import Space

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import surfaces_on_starters as starters

OPTIONS = {
    "k_lst": {"reduction": 4, "k": 2},
    "layers": {"pattern": [r"\.1\.", "[nN]orm"]},
    "lora": {"rank": 2},
    "lst": {"reduction": 4},
    "prefix": {"tokens": 3},
    "prompt": {"tokens": 3},
    "side_lora": {"rank": 2},
}
ENCODERS, DECODERS = ("bert", "distilbert", "roberta"), ("opt", "llama")


def refusal(name: str, kind: str, readout: str) -> str | None:
    """Why a family cannot have a surface; None where it can."""
    if name in ("prefix", "prompt") and kind == "t5":
        return f"{name}: the model must be a causal or masked one, got a text-to-text model"
    if name == "prefix" and kind == "distilbert":
        return "prefix: the model must go on from keys and values, of one shape in all layers, got distilbert"
    if name == "bias" and kind in ("llama", "t5"):
        return "bias: the model must have biases, got none"
    return None


ALL = [(n, k, r) for n in SURFACES for k in FAMILIES for r in ("head", "prompt") if (n, r) != ("head", "prompt")]
CELLS = [cell for cell in ALL if refusal(*cell) is None and (cell[2] == "head" or cell[0] == "full")]
CELLS = [cell for cell in CELLS if cell[0] not in ("lst", "k_lst") or cell[1] == "t5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = families.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def given(name, kind, readout):
    prompt = prompt_of(kind) if readout == "prompt" else None
    return {"rows": EXAMPLES, "labels": LABELS, "prompt": prompt, "lr": 0.01, **OPTIONS.get(name, {})}


@pytest.mark.parametrize(("name", "kind", "readout"), CELLS)
def test_contract(name, kind, readout, folder, tmp_path):
    kept = starters.contract(name, folder(kind), tmp_path, **given(name, kind, readout))
    assert kept.starts is (None if name in ("lst", "k_lst", "prefix", "prompt") else True)
    assert kept.frozen and kept.loads and kept.opened, kept
    assert kept.opened == ("peft" if name in ("lora", "side_lora", "ia3") else "transformers")
    assert kept.moved > 0 and kept.tuned > 0 and kept.share <= 1 and kept.whole


INSIDE = [(*cell, {}) for cell in ALL if refusal(*cell) is None]
INSIDE += [("k_lst", kind, "prompt", options) for kind in ("bert", "t5") for options in (
    {"unfrozen": 1}, {"window": "all", "sharing": "rung", "down": "low-rank", "rank": 2})]  # fmt: skip
INSIDE += [("prefix", kind, "prompt", {"reparameterise": True}) for kind in (*DECODERS, "bert")]


@pytest.mark.parametrize(("name", "kind", "readout", "more"), INSIDE)
@pytest.mark.filterwarnings("ignore:inject")  # where points are evaluated one at a time
@torch.no_grad()
def test_noise_inside_the_modules_is_noise_in_the_weights(name, kind, readout, more, folder):
    """The losses at θ ± εz, at θ and at a sum of two directions, injected and written into the weights."""
    options = {"readout": readout, "prompt": prompt_of(kind) if readout == "prompt" else None, "max_length": 16}
    if name == "head":
        options = {"max_length": 16}
    surface = SURFACES[name].create(folder(kind), LABELS, **options, **OPTIONS.get(name, {}), **more)
    tensors = surface.trainable()
    for tensor in tensors.values():  # gates at 0 and branches that are shut would hide much
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    encoded = surface.encode(EXAMPLES)
    parts = [(surface.prepare(encoded.batch(rows)), encoded.labels[rows]) for rows in ([0, 1, 2], [3, 4])]
    noise = Noise(0, "gaussian")
    objective, space = Objective(surface, parts, noise), Space(tensors, noise, rank=1)
    z, other = Direction(3, 0, EVERY), Direction(3, 1, EVERY)
    points = [point(0.05, z), point(-0.05, z), ORIGIN, point(0.05, other) + point(-0.02, z)]
    before = {name: tensor.clone() for name, tensor in surface.state_dict().items()}
    wanted = Snapshot(space, objective).losses(points)
    assert len(set(wanted)) == 4
    inject = Inject(space, objective, surface)
    found = inject.losses(points)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert inject.losses(points) == found  # the first pass is watched, which changes nothing
    assert all(torch.equal(tensor, before[name]) for name, tensor in surface.state_dict().items())
    if name in ("lst", "k_lst", "prefix", "prompt"):  # gates, places in a window, virtual tokens
        assert inject.injection.one_by_one


def test_a_head_reads_the_first_state_of_a_decoder(folder):
    """Of T5's, behind its start token; there is nothing else to pool."""
    surface = SURFACES["head"].create(folder("t5"), LABELS, max_length=16)
    batch = surface.encode(EXAMPLES).batch([0, 1])
    start = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = surface.model(**tokens, decoder_input_ids=start).last_hidden_state
    assert surface.pooling == "cls" and torch.equal(surface.features(batch), states[:, 0])
    for options in ({"pooling": "mean"}, {"head": "library"}):
        with pytest.raises(UserError, match=r"^head: '.*' is an encoder-decoder, of which a new head reads the first"):
            SURFACES["head"].create(folder("t5"), LABELS, max_length=16, **options)


@pytest.mark.parametrize(("name", "kind", "readout"), [cell for cell in ALL if refusal(*cell) is not None])
def test_refused(name, kind, readout, folder, tmp_path):
    with pytest.raises(UserError, match=refusal(name, kind, readout)) as caught:
        starters.contract(name, folder(kind), tmp_path, **given(name, kind, readout))
    assert "\n" not in str(caught.value)
