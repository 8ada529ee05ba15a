"""Rows of a file that cannot be used: all told at once, or left out with a count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_run
from gradientless.errors import UserError
from gradientless.language.data import load_table
from gradientless.language.tables import MOST_TOLD, BadRows
from gradientless.language.tasks import find_task
from tiny_run import gradientless

ROWS = [f"{text},{label}" for text, label in tiny_run.rows(40)]
FAULTS = {  # by the line of the file where one stands
    4: (",positive", "column 'text' must hold text, got an empty one"),
    9: ("a film,", "column 'label' must hold a word or a whole number, got nothing"),
    12: (
        "good, film,positive",
        "must have 2 fields as the header has, got 3 (a text with a comma needs quotation marks)",
    ),
}


def written(file: Path) -> Path:
    lines = ["text,label", *ROWS]
    for line, (text, _) in FAULTS.items():
        lines[line - 1] = text
    file.write_text("\n".join(lines) + "\n")
    return file


def test_all_are_told_at_once(tmp_path):
    file = written(tmp_path / "rows.csv")
    with pytest.raises(UserError) as refused:
        load_table(file)
    told = [f"{file}: line {line}: {fault}" for line, (_, fault) in FAULTS.items()]
    told.append(f"{file}: rows must all be usable, got 3 of 40 that are not; --skip-bad-rows leaves them out")
    assert str(refused.value).split("\n") == told


def test_of_many_the_first_are_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n' * 2 + '{"text": "", "label": 0}\n' * 30)
    with pytest.raises(UserError) as refused:
        load_table(tmp_path / "rows.jsonl")
    *first, last = str(refused.value).split("\n")
    assert [line.split(": ")[1] for line in first] == [f"line {3 + i}" for i in range(MOST_TOLD)]
    assert f"got 30 of 32 that are not, the first {MOST_TOLD} as above; --skip-bad-rows" in last


def test_where_all_are_bad_there_is_one_line_and_nothing_to_skip(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,1\n,0\n,1\n")
    for bad in (BadRows(), BadRows(skip=True)):
        with pytest.raises(UserError, match=r"line 2: .* \(none of the 3 rows can be used\)$") as refused:
            load_table(tmp_path / "rows.csv", bad=bad)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("rows.csv", "text,label\na,0\nb,1\nc\nd,0,1\ne,1\nf,0\n", [4, 5]),
        ("rows.tsv", "text\tlabel\na\t0\nb\t1\nc\nd\t0\t1\ne\t1\nf\t0\n", [4, 5]),
        ("rows.jsonl", '{"text": "a", "label": 0}\n' * 2 + '{"te\n[1]\n7\n{"text": "\\ud800", "label": 1}\n'
         + '{"text": "b", "label": 1}\n' * 2, [3, 4, 5, 6]),
    ],
    ids=["csv", "tsv", "jsonl"],
)  # fmt: skip
def test_what_is_no_row_of_its_format_is_left_out_too(name, content, lines, tmp_path):
    (tmp_path / name).write_text(content)
    bad = BadRows(skip=True)
    splits = load_table(tmp_path / name, bad=bad)
    assert len(splits.train) + len(splits.validation) == 4 and bad.count == len(lines)
    (told,) = bad.told
    assert told.startswith(f"left out    {len(lines)} of {len(lines) + 4} rows of {name}, such as line {lines[0]}: ")


def test_of_a_task(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 5 + " \t1\nbad\t7\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    with pytest.raises(UserError) as refused:
        find_task("sst2").load(tmp_path)
    assert [line.split(": ")[1] for line in str(refused.value).split("\n")[:2]] == ["line 12", "line 13"]
    bad = BadRows(skip=True)
    assert len(find_task("sst2").load(tmp_path, bad).train) == 10 and bad.count == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


def test_a_run_and_eval_leave_them_out_and_say_so(model, tmp_path, capsys):
    file, run = str(written(tmp_path / "rows.csv")), tmp_path / "run"
    given = tiny_run.arguments(model, file, run, "optimizer.radius=0.1", steps=10)
    assert gradientless(*given) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4 and not run.exists()
    assert gradientless(*given, "--skip-bad-rows") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "left out 3 of 40 rows of rows.csv, such as line 4: column 'text' must hold text, got an empty one" in said
    assert json.loads((run / "summary.json").read_text())["rows_left_out"] == 3
    assert gradientless("eval", str(run / "model"), "--data", file) == 2
    assert "got 3 of 40 that are not" in capsys.readouterr().err
    assert gradientless("eval", str(run / "model"), "--data", file, "--skip-bad-rows", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == 37 and said.err.startswith("left out    3 of 40 rows")
