"""Label log-likelihoods against lm-evaluation-harness, which was written by others."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from gradientless.language.tasks import Example, Prompt

SPEC = importlib.util.spec_from_file_location("agreement", Path(__file__).parents[2] / "experiments" / "agreement.py")
agreement = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(agreement)

WORDS = ("good", "bad", "film", "very", "the", "plot", "dull", "bright")
ROWS = [Example(" ".join(WORDS[(i * 7 + j * j * (i + 1)) % 8] for j in range(1 + i % 9)), i % 2) for i in range(200)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("words", [(" negative", " positive"), (" dull", " very good film")])
def test_label_log_likelihoods_of_200_rows_are_those_of_the_harness(language_models, kind, words):
    prompt = Prompt("Review: {text}\nSentiment:", dict(zip(("a", "b"), words, strict=True)))
    ours = agreement.ours(language_models(kind), prompt, ("a", "b"), ROWS, 64)
    theirs = agreement.theirs(language_models(kind), prompt, ("a", "b"), ROWS, 64)
    assert theirs.shape == (200, 2) and theirs.std(0).min() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
