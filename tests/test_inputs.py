"""Files that people hand in: what is none, what never ends, what no tool can read; each one line."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from gradientless.errors import UserError
from gradientless.inputs import halves, is_file, read_file, read_text, toml
from gradientless.language.data import load_table
from gradientless.language.tables import read_table
from gradientless.language.tasks import Example
from gradientless.run.layers import parse_value, read_recipe

DIGITS = "9" * 5000
posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes and devices")


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestFiles:
    def test_a_file_is_read(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("\ufeffgré\n".encode())
        assert read_text(tmp_path / "a.txt", "data") == "gré\n"
        assert read_file(tmp_path / "a.txt", "data").startswith(b"\xef\xbb\xbfgr")

    @pytest.mark.parametrize("name", ["none.csv", "x" * 5000, "a\0b"])
    def test_a_name_without_a_file(self, name):
        assert not is_file(name)
        assert refusal(read_file, Path(name), "data").startswith("data: ")

    @posix
    def test_a_pipe_without_a_writer_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.csv")
        assert refusal(read_table, tmp_path / "pipe.csv").endswith("a pipe that nobody writes to")

    @posix
    def test_a_pipe_with_a_writer_is_read(self, tmp_path):
        pipe = tmp_path / "pipe.txt"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # so that the writer may open
        writer = os.open(pipe, os.O_WRONLY)
        os.close(reader)

        def write() -> None:
            for _ in range(3):
                os.write(writer, b"a line\n")
            os.close(writer)

        later = threading.Timer(0.1, write)
        later.start()
        assert read_file(pipe, "file") == b"a line\n" * 3
        later.join()

    @posix
    @pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
    def test_a_device_is_no_file(self, device):
        assert refusal(read_file, Path(device), "file") == f"file: must be a file, got '{device}', which is none"

    def test_a_folder_is_no_file(self, tmp_path):
        assert "data: must be" in refusal(read_file, tmp_path, "data")


class TestToml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (f"steps = {DIGITS}", "must be valid TOML"),
            (f"steps = 0x{'f' * 5000}", "whole numbers must have at most 64 bits, got a larger one in 'steps'"),
            ("[data]\nsubset = [1, 9223372036854775808]", "got a larger one in 'data.subset'"),
            ('model = "a\\u0000b"', "must not hold a zero byte, got one in 'model'"),
            ('[[stages]]\nname = "a\\u0000"', "got one in 'stages.name'"),
            ('"a\\u0000b" = 1', "got one in 'a key'"),
            (f"a = {'[' * 5000}", "must be valid TOML"),
        ],
    )
    def test_what_cannot_be_meant(self, text, message):
        assert message in refusal(toml, text, "recipe")

    def test_numbers_of_64_bits_are_read(self):
        assert toml("a = 9223372036854775807\nb = -9223372036854775808", "recipe") == {"a": 2**63 - 1, "b": -(2**63)}

    @pytest.mark.parametrize("text", [f"0x{'f' * 5000}", "[" * 5000, "18446744073709551616"])
    def test_an_override_that_is_no_toml_is_text(self, text):
        assert parse_value(text) in (text, float(text) if text.isdecimal() else text)

    def test_a_long_chain_of_recipes(self, tmp_path):
        """Each extends the next one: the nearest value holds."""
        for i in range(1500):
            base = f'extends = "{i + 1}.toml"\n' if i < 1499 else ""
            (tmp_path / f"{i}.toml").write_text(f"{base}seed = {i}\n" if i else f"{base}steps = 7\n")
        assert read_recipe(tmp_path / "0.toml") == {"seed": 1, "steps": 7}

    def test_recipes_that_extend_each_other(self, tmp_path):
        for name, other in ("ab", "bc", "ca"):
            (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"')
        assert "must extend another recipe" in refusal(read_recipe, tmp_path / "a.toml")


class TestText:
    def test_halves(self):
        assert halves("a \ud83d") and halves("\udcff.csv")
        assert not halves("a 😀 é") and not halves("")

    @pytest.mark.parametrize("where", ["text", "label", "other"])
    def test_half_a_character_in_json(self, tmp_path, where):
        rows = [{"text": "good", "label": "a", "other": "x"}, {"text": "bad", "label": "b", "other": "x"}]
        rows[1][where] += "\ud83d"
        (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        table = read_table(tmp_path / "d.jsonl")
        (row,) = table.faulty  # which is refused, or left out, with the others
        assert len(table.rows) == 1 and row.line == 2
        assert "line 2: must hold whole characters, got half of a surrogate pair" in row.fault

    def test_whole_characters_in_json_are_read(self, tmp_path):
        (tmp_path / "d.jsonl").write_text('{"text": "\\ud83d\\ude00 \\\\ud83d"}')
        assert read_table(tmp_path / "d.jsonl").rows[0].values["text"] == "😀 \\ud83d"

    @pytest.mark.parametrize(
        "more",
        [{"text": "\ud83d"}, {"text_pair": "a\ud83d"}, {"choices": ("a", "\ude00")}, {"fields": {"q": "\ud83d"}}],
    )
    def test_half_a_character_in_an_example(self, more):
        with pytest.raises(UserError, match="texts must hold whole characters"):
            Example(**{"text": "a", "label": 0, **more})

    def test_a_label_of_thousands_of_digits(self, tmp_path):
        """It is a word: other numbers are then words, too."""
        (tmp_path / "d.csv").write_text(f"text,label\na,{DIGITS}\nb,10\nc,{DIGITS}\nd,10\n")
        assert load_table(tmp_path / "d.csv").labels == ("10", DIGITS)

    def test_a_number_of_thousands_of_digits_in_json(self, tmp_path):
        (tmp_path / "d.jsonl").write_text(f'{{"text": "a", "label": {DIGITS}}}\n')
        assert "line 1: not valid JSON" in refusal(read_table, tmp_path / "d.jsonl")
