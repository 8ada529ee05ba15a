"""What every surface promises, over the rows of `cases`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import EXAMPLES

import cases
from gradientless.errors import UserError
from gradientless.language.backbone import checksum
from gradientless.language.surfaces import SURFACES, load
from gradientless.language.surfaces.products import measure

LABELS = ("bad", "good")
HEAD = ("head", "pooling", "hidden", "activation", "start")


def create(name, model, **options):
    standing = {"labels": LABELS, "seed": 3, "device": "cpu", "dtype": "float32", "max_length": 16}
    return SURFACES[name].create(model, **{**standing, **options})


def begun(name, model, **options):
    """The surface at its base, and its rows as it reads them."""
    surface = create(name, model, **options)
    encoded = surface.encode(EXAMPLES)
    before = checksum(surface)
    told = surface.begin(encoded, show=False)
    assert (told is not None) == surface.needs_rows == (checksum(surface) != before)
    return surface.eval(), encoded


def scores(surface, batch):
    with torch.no_grad():
        return surface.logits(surface.prepare(batch))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, case in sorted(cases.SURFACES.items()) for o in case.good])
def test_surface(name, options, models, tmp_path):
    case = cases.SURFACES[name]
    model = models(case.model)
    surface, encoded = begun(name, model, **options)
    batch, labels = encoded.batch([0, 1, 2]), encoded.labels[:3]
    start = scores(surface, batch)
    assert start.shape == (3, 2) and start.dtype == torch.float32
    again, _ = begun(name, model, **options)
    assert torch.equal(scores(again, batch), start)  # the seed and the rows decide, nothing else
    if case.same:
        heads = {key: value for key, value in options.items() if key in HEAD}
        plain, _ = begun("full", model, readout="head", **heads)
        assert torch.equal(scores(plain, batch), start)
    trainable = surface.trainable()
    tuned = {id(p) for p in trainable.values()}
    assert {id(p) for p in surface.parameters() if p.requires_grad} == tuned
    told = surface.describe()
    counted = surface.products()
    assert counted == measure(surface)  # `full` counts without a backward pass
    assert counted.tuned == sum(p.numel() for p in trainable.values()) <= counted.touched <= counted.total
    once = {id(t): t for t in surface.state_dict(keep_vars=True).values() if t.is_floating_point()}
    assert counted.total == sum(t.numel() for t in once.values())
    assert told.endswith(f": {counted}") and f"{counted.touched:,} touched by the backward pass" in told
    assert f"{counted.tuned:,} of {counted.total:,} parameters tuned ({100 * counted.share:.2f}%), " in told
    assert "\n" not in told
    twice = surface.repeated(surface.prepare(batch), 2)
    with torch.no_grad():
        torch.testing.assert_close(surface.logits(twice), torch.cat([start, start]), rtol=1e-5, atol=1e-6)

    state = {n: (t, t.detach().clone()) for n, t in surface.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(surface.logits(surface.prepare(batch)), labels).backward()
        optimizer.step()
    after = surface.state_dict(keep_vars=True)
    assert all(after[n] is t for n, (t, _) in state.items())
    frozen = [n for n, (t, _) in state.items() if id(t) not in tuned]
    assert all(torch.equal(after[n], state[n][1]) for n in frozen) and (frozen or name == "full")
    # A key's bias changes no attention, and a branch may still wait for those behind it: most move, not all.
    moved = [n for n, (t, before) in state.items() if id(t) in tuned and not torch.equal(t, before)]
    assert len(moved) > (len(state) - len(frozen)) / 2

    found = scores(surface, batch)
    assert not torch.equal(found, start)
    surface.save(tmp_path / "saved")
    assert torch.equal(scores(surface, batch), found)
    loaded = load(tmp_path / "saved").eval()
    assert type(loaded) is SURFACES[name] and loaded.labels == LABELS and not loaded.needs_rows
    assert set(loaded.trainable()) == set(trainable)
    assert torch.equal(scores(loaded, batch), found)


@pytest.mark.parametrize("name", sorted(cases.SURFACES))
def test_surface_errors(name, models):
    case = cases.SURFACES[name]
    for options, message in case.bad:
        with pytest.raises(UserError, match=message) as caught:
            create(name, models(case.model), **options)
        assert "\n" not in str(caught.value)


def test_all_mistakes_of_a_ladder_are_told_at_once(models):
    wrong = {"pooling": "maen", "dropout": 1.0, "max_length": 0, "reduction": 5, "window": "trailling", "k": 99}
    with pytest.raises(UserError) as caught:
        create("k_lst", models("distilbert"), **wrong)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(wrong) and all(name in line for name, line in zip(wrong, lines, strict=True))


@pytest.mark.parametrize(("name", "model"), [("prefix", "distilbert"), ("lst", "gpt2"), ("side_lora", "gpt2")])
def test_a_surface_that_the_model_cannot_have(name, model, models):
    message = {
        "prefix": "prefix: the model must go on from keys and values, of one shape in all layers",
        "lst": "lst: unknown architecture with a ladder 'gpt2'",
        "side_lora": "side_lora: the model must have linear layers in its blocks, got none",
    }[name]
    with pytest.raises(UserError, match=message):
        create(name, models(model))


def test_making_a_surface_needs_no_peft_where_it_has_no_part(models):
    """peft is slow to import: only the surfaces that it makes load it."""
    code = (
        "import sys; from gradientless.language.surfaces import SURFACES; "
        f"SURFACES['lst'].create({models('distilbert')!r}, ('a', 'b'), max_length=16); "
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
