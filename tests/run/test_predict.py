"""What goes out of `predict`: every row of the input in its place, with what it had and what the model says of it."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

import tiny_run
from tiny_run import gradientless


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def single(model, tmp_path_factory) -> str:
    """A run on a table with a column `text`."""
    place = tmp_path_factory.mktemp("single")
    rows = tiny_run.write_table(place / "rows.csv", 80)
    assert gradientless(*tiny_run.arguments(model, rows, place / "run", "optimizer.radius=0.1", steps=20)) == 0
    return str(place / "run")


@pytest.fixture(scope="module")
def paired(model, tmp_path_factory) -> str:
    """A run on a table with the columns `first`, `second` and `label`."""
    place = tmp_path_factory.mktemp("paired")
    body = "".join(f"{text},the film,{label}\n" for text, label in tiny_run.rows(60))
    (place / "rows.csv").write_text("first,second,label\n" + body)
    columns = ["--text-column", "first", "--text-pair-column", "second"]
    given = tiny_run.arguments(model, str(place / "rows.csv"), place / "run", "optimizer.radius=0.1", *columns)
    assert gradientless(*given) == 0
    return str(place / "run")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


class TestRowsThatCannotBeRead:
    def test_of_a_table_keep_their_place(self, single, tmp_path, capsys):
        file = tmp_path / "rows.csv"
        file.write_text("id,text\n1,the film was good\n2,\n3,bad\n4,a,b\n5,dull\n")
        assert gradientless("predict", single, "--file", str(file)) == 0
        said = capsys.readouterr()
        rows = table(said.out)
        assert [row["id"] for row in rows] == ["1", "2", "3", "4", "5"]
        assert [bool(row["label"]) for row in rows] == [True, False, True, False, True]
        assert all(not row[key] for row in rows if not row["label"] for key in row if key.startswith("prob"))
        assert said.err == (
            f"no answer   for 2 of 5 rows, such as {file}: line 3: column 'text' must hold text, got an empty one\n"
        )

    def test_of_lines_and_of_json(self, single, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good\n\n \nbad\n\n")))
        assert gradientless("predict", single, "--format", "jsonl") == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["text"] for row in found] == ["good", "", " ", "bad", ""]
        assert [row["label"] is None for row in found] == [False, True, True, False, True]
        assert found[1]["probabilities"] == {"negative": None, "positive": None}
        file = tmp_path / "rows.jsonl"
        file.write_text('{"text": "good", "id": 1}\n{"text"\n{"id": 3}\n')
        assert gradientless("predict", single, "--file", str(file), "--format", "jsonl") == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(row["id"], row["label"] is None) for row in found] == [(1, False), (None, True), (3, True)]

    def test_none_that_can_is_refused(self, single, tmp_path, capsys):
        (tmp_path / "rows.csv").write_text("id,text\n1,\n2, \n")
        assert gradientless("predict", single, "--file", str(tmp_path / "rows.csv")) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.endswith("line 2: column 'text' must hold text, got an empty one\n")


class TestWhatGoesOut:
    def test_the_other_columns_and_all_probabilities(self, single, tmp_path, capsys):
        """A column of the file keeps its name, one of the answer gives way."""
        file = tmp_path / "rows.csv"
        file.write_text("label,text,note\npositive,the film was good,x\n")
        assert gradientless("predict", single, "--file", str(file)) == 0
        (row,) = table(capsys.readouterr().out)
        own, said = ["label", "text", "note"], ["predicted_label", "probability"]
        assert [*row] == [*own, *said, "probability_negative", "probability_positive"]
        assert (row["label"], row["note"]) == ("positive", "x")
        shares = [float(row[f"probability_{name}"]) for name in ("negative", "positive")]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and max(shares) == float(row["probability"])
        assert shares[row["predicted_label"] == "positive"] == max(shares)


class TestTwoTexts:
    def test_as_arguments_are_a_pair(self, paired, capsys):
        assert gradientless("predict", paired, "the film was good", "the film") == 0
        (row,) = table(capsys.readouterr().out)
        assert (row["text"], row["text_pair"]) == ("the film was good", "the film")
        assert gradientless("predict", paired, "the film was good", "the film", "bad", "a plot") == 0
        first, second = table(capsys.readouterr().out)
        assert first == row and second["text_pair"] == "a plot"

    def test_one_is_refused(self, paired, tmp_path, capsys):
        (tmp_path / "lines.txt").write_text("a\nb\n")
        for more, line in (
            (["good"], "texts: must be two by two for a model of two texts, got 1"),
            (["--file", str(tmp_path / "lines.txt")], "predict: a model of two texts must be given them as arguments"),
        ):
            assert gradientless("predict", paired, *more) == 2
            assert capsys.readouterr().err.startswith(line)

    def test_of_a_table_are_read_by_the_columns_of_the_run(self, paired, tmp_path, capsys):
        (tmp_path / "rows.csv").write_text("second,first\nthe film,the film was good\n")
        assert gradientless("predict", paired, "--file", str(tmp_path / "rows.csv")) == 0
        (row,) = table(capsys.readouterr().out)
        assert gradientless("predict", paired, "the film was good", "the film") == 0
        (same,) = table(capsys.readouterr().out)
        assert row["probability"] == same["probability"] and row["second"] == "the film"

    def test_a_column_of_them_is_refused_of_a_model_of_one(self, single, tmp_path, capsys):
        (tmp_path / "rows.csv").write_text("text,second\na,b\n")
        for place in (single, str(Path(single) / "model")):
            more = ["--file", str(tmp_path / "rows.csv"), "--text-pair-column", "second"]
            assert gradientless("predict", place, *more) == 2
            said = capsys.readouterr()
            assert said.err == "--text-pair-column: must stay away from a model of one text, got 'second'\n"
            assert said.out == ""

    def test_the_closing_line_asks_for_what_the_run_takes(self, single, paired):
        from gradientless.run.report import next_commands
        from gradientless.run.runfolder import RunFolder

        told = [next_commands(RunFolder(Path(run)))["predict"] for run in (single, paired)]
        assert told == [
            f"gradientless predict {single} 'a text'",
            f"gradientless predict {paired} 'a text' 'its second text'",
        ]
