"""What the tests of the run wing share: a tiny random model, a table of rows, a cache of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the network
sys.path.insert(0, str(Path(__file__).parents[1] / "language"))

import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """The folder of a random DistilBERT body of width 16."""
    import transformers
    from tiny_models import CONFIGS, make_tokenizer

    folder = tmp_path_factory.mktemp("distilbert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        transformers.AutoModel.from_config(CONFIGS["distilbert"]()).save_pretrained(folder)
    make_tokenizer(True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> str:
    """A CSV of 40 rows whose label one word decides; its columns are review and verdict."""
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    words = ["film", "plot", "very", "the", "was"]
    rows = [
        f"{words[i % 5]} {words[i % 3]} {'good' if i % 2 else 'bad'},{'positive' if i % 2 else 'negative'}"
        for i in range(40)
    ]
    file.write_text("review,verdict\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return str(file)
