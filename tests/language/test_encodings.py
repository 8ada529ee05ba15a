"""Token ids of many rows: made a part at a time, as if at once; kept on disk under all that they depend on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import make_tokenizer

from gradientless.language import encodings
from gradientless.language.data import Encoded
from gradientless.language.encodings import Ragged
from gradientless.language.prompting import PromptEncoder
from gradientless.language.tasks import Example, Prompt

WORDS = ["a", "the", "film", "plot", "was", "very", "good", "bright", "bad", "dull"]
ROWS = [Example(" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) + f" {WORDS[i % 10]}", i % 2) for i in range(23)]
PAIRS = [dataclasses.replace(row, text_pair=f"the {WORDS[i % 9]} plot") for i, row in enumerate(ROWS)]
PROMPT = Prompt("{text} it was", {"n": "bad", "p": "good"})


def plain(rows, length=5, tokenizer=None) -> Encoded:
    return Encoded(tokenizer or make_tokenizer(True), rows, length)


def prompted(rows, length=7, prompt=PROMPT, truncation="right"):
    return PromptEncoder(make_tokenizer(True), prompt, ("n", "p"), "causal", length, truncation=truncation).encode(rows)


def same(one, other) -> bool:
    batches = one.batch(range(len(one))), other.batch(range(len(other)))
    alike = all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    return alike and np.array_equal(one.wholes, other.wholes) and one.fingerprint == other.fingerprint


def test_ragged():
    rows = [[1, 2, 3], [], [4]]
    made = Ragged.of(rows)
    assert [row.tolist() for row in made] == rows and made.lengths.tolist() == [3, 0, 1]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.parametrize("make", [plain, prompted])
@pytest.mark.parametrize("rows", [ROWS, PAIRS], ids=["single", "pairs"])
def test_parts_are_as_one(monkeypatch, make, rows):
    whole = make(rows)
    assert (whole.wholes > whole.max_length).any()  # some are cut
    for size in (1, 5, len(rows)):
        monkeypatch.setattr(encodings, "AT_A_TIME", size)
        assert same(make(rows), whole)


class TestKept:
    @pytest.fixture(autouse=True)
    def many(self, monkeypatch, tmp_path):
        monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path))
        monkeypatch.setattr(encodings, "LARGE", 5)
        self.folder = tmp_path / "encoded"

    def files(self) -> int:
        return len(list(self.folder.iterdir())) if self.folder.exists() else 0

    @pytest.mark.parametrize("make", [plain, prompted])
    def test_once(self, make, monkeypatch):
        with monkeypatch.context() as few:
            few.setattr(encodings, "LARGE", 1000)
            want = make(ROWS)
        assert self.files() == 0
        assert same(make(ROWS), want) and self.files() == 1

        def none(*_):
            raise AssertionError("made again")

        monkeypatch.setattr(encodings.Ragged, "of", none)
        assert same(make(ROWS), want) and self.files() == 1

    def test_every_part_of_the_key(self):
        """Other texts, pairs, order, length, prompt, side or tokenizer: other ids. Other labels: the same ones."""
        plain(ROWS)
        made = 1
        assert plain([dataclasses.replace(row, label=0) for row in ROWS]).labels.sum() == 0 and self.files() == made
        for other in (
            lambda: plain(ROWS[::-1]),
            lambda: plain([*ROWS[:-1], dataclasses.replace(ROWS[-1], text="dull")]),
            lambda: plain(PAIRS),
            lambda: plain(ROWS, length=6),
            lambda: plain(ROWS, tokenizer=make_tokenizer(False)),
            lambda: prompted(ROWS),
            lambda: prompted(ROWS, prompt=dataclasses.replace(PROMPT, text="{text} that was")),
            lambda: prompted(ROWS, truncation="left"),
            lambda: prompted(ROWS, prompt=dataclasses.replace(PROMPT, words={"n": "very bad", "p": "good"})),
            lambda: prompted([dataclasses.replace(row, fields={"text": "a film"}) for row in ROWS]),
        ):
            other()
            made += 1
            assert self.files() == made

    def test_a_setting_of_the_tokenizer_that_its_file_does_not_hold(self):
        rows = [dataclasses.replace(row, text=f"{row.text} [SEP] dull") for row in ROWS]
        apart = make_tokenizer(True)
        apart.split_special_tokens = True
        whole, split = plain(rows, length=20), plain(rows, length=20, tokenizer=apart)
        assert self.files() == 2 and not same(whole, split)
        assert split.wholes[0] == len(apart(rows[0].text)["input_ids"]) > whole.wholes[0]

    def test_a_damaged_file_is_made_again(self, capsys, monkeypatch):
        with monkeypatch.context() as few:  # not mapped from the file
            few.setattr(encodings, "LARGE", 1000)
            want = plain(ROWS)
        plain(ROWS)
        (file,) = self.folder.iterdir()
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert same(plain(ROWS), want) and "is damaged" in capsys.readouterr().err
        assert same(plain(ROWS), want) and "is damaged" not in capsys.readouterr().err

    def test_a_tokenizer_that_does_not_tell_what_it_does_keeps_nothing(self, monkeypatch):
        tokenizer = make_tokenizer(True)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        plain(ROWS, tokenizer=tokenizer)
        assert self.files() == 0
