"""The features of a split on disk: right rows, computed once, and again when the file is damaged."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language import features
from gradientless.language.data import Encoded
from gradientless.language.surfaces.head import HeadSurface


@pytest.fixture
def surface(models):
    return HeadSurface.create(models("bert"), ("bad", "good"), head="two-layer", max_length=20)


@pytest.fixture
def encoded(surface):
    return Encoded(surface.tokenizer, EXAMPLES, 20)


def test_rows_stand_in_order_and_are_computed_once(surface, encoded, tmp_path, monkeypatch):
    made = features.compute(surface, encoded, 2, tmp_path, show=False)
    assert isinstance(made, np.memmap) and made.dtype == np.float32 and not made.flags.writeable
    alone = torch.cat([surface.features(encoded.batch([row])) for row in range(len(EXAMPLES))])
    np.testing.assert_allclose(made, alone, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(HeadSurface, "features", None)
    np.testing.assert_array_equal(features.compute(surface, encoded, 2, tmp_path, show=False), made)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    np.testing.assert_array_equal(np.load(next(tmp_path.iterdir())), made)  # opens with plain numpy


def test_rows_of_like_length_share_a_batch(surface, encoded, tmp_path, monkeypatch):
    """So there is little padding: the longest of a batch is no longer than the shortest of the next."""
    computed, seen = HeadSurface.features, []

    def watched(surface, batch):
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        seen.append((min(lengths), max(lengths)))
        return computed(surface, batch)

    monkeypatch.setattr(HeadSurface, "features", watched)
    features.compute(surface, encoded, 2, tmp_path, show=False)
    assert len(seen) == 3 and all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(seen))
    assert seen[0][0] < seen[-1][1] and list(encoded.lengths) != sorted(encoded.lengths)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_computed_again_with_a_word(surface, encoded, tmp_path, capsys, damage):
    made = np.array(features.compute(surface, encoded, 2, tmp_path, show=False))
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[200] ^= 1
    path.write_bytes({"cut": content[:-40], "flip": content, "empty": b""}[damage])
    np.testing.assert_array_equal(features.compute(surface, encoded, 2, tmp_path), made)
    assert "is damaged and is computed again" in " ".join(capsys.readouterr().err.split())


def test_the_key_sees_model_data_length_pooling_and_dtype(models, surface, encoded):
    def made(**options):
        return HeadSurface.create(models("bert"), ("bad", "good"), max_length=20, **{"head": "two-layer", **options})

    keys = {
        features.key(surface, encoded),
        features.key(surface, Encoded(surface.tokenizer, EXAMPLES, 5)),
        features.key(surface, Encoded(surface.tokenizer, EXAMPLES[:3], 20)),
        features.key(made(pooling="last"), encoded),
        features.key(made(dtype="bfloat16"), encoded),
        features.key(HeadSurface.create(models("distilbert"), ("bad", "good"), max_length=20), encoded),
    }
    assert len(keys) == 6
    assert features.key(made(seed=5), encoded) == features.key(surface, encoded)  # the head does not matter


@pytest.mark.parametrize("key", [features.key, features.states_key])
@pytest.mark.parametrize("part", ["body_checksum", "read", "dtype", "fingerprint", "max_length"])
def test_the_key_sees_every_part_alone(part, key, monkeypatch):
    """Each of two surfaces or rows that differ in nothing else has a key of its own."""

    def found(**other):
        told = {
            "body_checksum": "a",
            "read": "cls",
            "dtype": torch.float32,
            "fingerprint": "b",
            "max_length": 20,
        } | other
        methods = {"body_checksum": lambda: told["body_checksum"], "states_read": lambda: told["read"]}
        surface = SimpleNamespace(pooling=told["read"], dtype=told["dtype"], **methods)
        return key(surface, SimpleNamespace(fingerprint=told["fingerprint"], max_length=told["max_length"]))

    others = {"dtype": torch.bfloat16, "max_length": 21}
    assert found() == found() != found(**{part: others.get(part, "z")})
    before = found()
    monkeypatch.setattr(features, "VERSION", features.VERSION + 1)
    assert found() != before


def test_another_model_of_the_same_kind_is_not_served_these_features(models, surface, encoded, tmp_path):
    made = features.compute(surface, encoded, 2, tmp_path, show=False)
    other = HeadSurface.create(models("bert"), ("bad", "good"), head="two-layer", max_length=20)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.01)
    found = features.compute(other, encoded, 2, tmp_path, show=False)
    assert len(list(tmp_path.iterdir())) == 2 and not np.allclose(found, made)


def test_outputs_that_are_not_finite_are_refused_and_leave_no_file(surface, encoded, tmp_path):
    with torch.no_grad():
        next(surface.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="outputs must be finite"):
        features.compute(surface, encoded, 2, tmp_path, show=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(surface, encoded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"):
        features.compute(surface, encoded, 2, tmp_path / "file" / "below", show=False)
