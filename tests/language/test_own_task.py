"""A user's own data as a prompted task: one TOML, and every mistake in it told in a line."""

from __future__ import annotations

import json

import pytest

from gradientless.errors import UserError
from gradientless.language.tasks import find_task, read_task
from pages import ROOT, blocks

CSV = "text,label\n" + "".join(f'"film, {i}",{i % 2}\n' for i in range(20))
WORDS = '[words]\n0 = "negative"\n1 = "positive"\n'
TASK = 'data = "reviews.csv"\ntext = "Review: {text}\\nSentiment: {label}"\n'


def write(folder, task, name="film.toml", **files):
    for stem, content in {"reviews": CSV, **files}.items():
        suffix = ".jsonl" if content.startswith("{") else ".csv"
        (folder / (stem + suffix)).write_text(content, "utf-8")
    (folder / name).write_text(task, "utf-8")
    return folder / name


def test_the_page_shows_a_task_that_works(tmp_path):
    block = next(block for block in blocks(ROOT / "docs" / "tasks.md") if block.note == "film.toml")
    task = read_task(write(tmp_path, block.text))
    assert (task.key, task.kind, task.labels, task.metric) == ("film", "classification", ("0", "1"), "accuracy")
    splits = task.load()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 2, 2]
    row = splits.train[0]
    assert row.text.startswith("film, ") and row.label == int(row.text[-1]) % 2
    for family in ("causal", "masked", "text-to-text"):
        prompt = task.prompt(family)
        assert prompt.render(row, "positive") == f"Review: {row.text}\nSentiment: positive"
        assert prompt.says(row) == ("negative", "positive")
    assert find_task(str(tmp_path / "film.toml")).load() == splits == task.load(tmp_path / "reviews.csv")


def test_columns_labels_validation_and_families(tmp_path):
    task = (
        'name = "tone"\ndata = "rows.jsonl"\nvalidation = "held.jsonl"\nlabel = "good"\n'
        'licence = "mine"\nscore = "mean"\n'
        'text = "{title}: {body}"\n[columns]\nbody = "content"\n[words]\nfalse = "bad"\ntrue = "good"\n'
        '[prompts.masked]\ntext = "{mask}! {body}"\nwords = {true = "Happy", false = "Sad"}\n'
    )
    rows = [{"title": "T", "content": f"C{i}", "good": i % 2 == 0} for i in range(4)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    own = read_task(write(tmp_path, task, rows=content, held=content.replace("C", "D")))
    splits = own.load()
    assert [(row.text, row.text_pair, row.label) for row in splits.train] == [
        ("T", f"C{i}", 1 - i % 2) for i in range(4)
    ]
    assert [row.fields["body"] for row in splits.validation] == ["D0", "D1", "D2", "D3"] and splits.test == []
    assert (own.key, own.licence, own.labels, own.prompt("causal").score) == ("tone", "mine", ("false", "true"), "mean")
    assert own.prompt("causal").render(splits.train[0], " good") == "T: C0 good"
    assert own.prompt("masked").says(splits.train[0]) == ("Sad", "Happy")
    assert own.prompt("masked").render(splits.train[0], "Happy") == "Happy! C0"


def test_a_choice_and_a_generation(tmp_path):
    task = (
        'kind = "choice"\ndata = "rows.csv"\ntext = "{premise} so"\nanswer = " {answer}."\n'
        'choices = ["first", "second"]\n'
    )
    rows = "premise,first,second,label\nA,b,c,1\nD,e,f,first\nG,h,i,i\n"
    own = read_task(write(tmp_path, task, rows=rows))
    splits = own.load()
    everything = [*splits.train, *splits.validation, *splits.test]
    assert {(row.text, row.choices, row.label, row.answers) for row in everything} == {
        ("A", ("b", "c"), 1, ("c",)), ("D", ("e", "f"), 0, ("e",)), ("G", ("h", "i"), 1, ("i",)),
    }  # fmt: skip
    assert own.prompt("causal").says(next(row for row in everything if row.text == "A")) == (" b.", " c.")
    task = 'kind = "generation"\ndata = "qa.jsonl"\nanswers = "gold"\ntext = "Q: {question}\\nA:"\n'
    rows = "".join(json.dumps({"question": f"q{i}", "gold": ["x", "y"] if i else "z"}) + "\n" for i in range(4))
    own = read_task(write(tmp_path, task, qa=rows))
    splits = own.load()
    everything = [*splits.train, *splits.validation, *splits.test]
    assert own.metric == "token_f1" and splits.labels == ()
    assert {(row.text, row.answers) for row in everything} == {
        ("q0", ("z",)),
        *((f"q{i}", ("x", "y")) for i in (1, 2, 3)),
    }


@pytest.mark.parametrize(
    ("task", "messages"),
    [
        ("data = ", ["must be valid TOML"]),
        (TASK, ["[words] must be given for a classification"]),
        (WORDS, ["data must be given, got nothing", "text must be given, got nothing"]),
        (
            'data = "nowhere.csv"\ntxt = "x"\ntext = ""\n' + WORDS,
            [
                "task: unknown key 'txt'; did you mean 'text'?",
                "text must be a text, got ''",
                "data must be a file or a folder, got 'nowhere.csv', which is not there",
            ],
        ),
        (
            TASK + 'validation = "held.csv"\n' + WORDS,
            ["validation must be a file (.csv, .tsv, .jsonl), got 'held.csv'"],
        ),
        ('kind = "classify"\n' + TASK + WORDS, ["unknown kind 'classify'; did you mean 'classification'?"]),
        (TASK + "[words]\n0 = 1\n", ["[words] must be a table of texts, got {'0': 1}"]),
        (TASK + '[words]\n0 = "x"\n', ["prompt: at least two label words are needed, got 1"]),
        (TASK + '[words]\n0 = "x"\n1 = ""\n', ["prompt: the label word of '1' must not be empty"]),
        (
            TASK.replace("{text}", "text").replace("{label}", "") + WORDS,
            ["prompt: text must have a slot for a text of"],
        ),
        (TASK + 'score = "max"\n' + WORDS, ["prompt: unknown score 'max'"]),
        (
            TASK + 'choices = ["text"]\n' + WORDS,
            ["choices must be a list of two columns or more", "choices must be given for"],
        ),
        (
            TASK + 'answers = "x"\n' + WORDS,
            ["answers must be given for kind 'generation' only, got kind 'classification'"],
        ),
        ('kind = "generation"\n' + TASK + WORDS, ["[words] must stay away for kind 'generation'"]),
        ('kind = "choice"\n' + TASK, ["choices must be given for kind 'choice' and only then, got kind 'choice'"]),
        (TASK + WORDS + '[columns]\ntxt = "a"\n', ["columns: unknown slot 'txt'; did you mean 'text'?"]),
        (TASK + WORDS + "[prompts.mask]\n", ["unknown family of models 'mask'; did you mean 'masked'?"]),
        (TASK + WORDS + '[prompts.masked]\ntxt = "x"\n', ["prompts.masked: unknown key 'txt'; did you mean 'text'?"]),
        (TASK + WORDS + "[prompts.masked]\ntext = 3\n", ["prompts.masked: text must be a text"]),
        (TASK + WORDS + "[prompts]\nmasked = 3\n", ["[prompts] must hold tables such as [prompts.masked]"]),
        (
            TASK + WORDS + '[prompts.masked]\nwords = {a = "x", b = "y"}\n',
            ["prompts.masked: words must name the labels of [words] (0, 1), got a, b"],
        ),
    ],
)
def test_mistakes_in_the_file_are_all_told(task, messages, tmp_path):
    path = write(tmp_path, task)
    with pytest.raises(UserError) as caught:
        read_task(path)
    found = str(caught.value).splitlines()
    assert len(found) == len(messages)
    for message in messages:
        assert any(message in line and line.startswith(str(path)) for line in found), (message, found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (CSV.replace("text,", "body,"), "unknown column for the text 'text'"),
        (CSV.replace("label", "lable"), "unknown column for the label 'label'; did you mean 'lable'"),
        (CSV.replace(",1\n", ",2\n"), "line 3: column 'label' must hold one of 0, 1, got '2'"),
        (CSV.replace(",1\n", ",0\n"), "training rows must be of two classes or more, got one"),
        (CSV.replace('"film, 3"', ""), "line 5: column 'text' must hold text, got an empty one"),
    ],
)
def test_mistakes_in_the_data_are_told(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_task(write(tmp_path, TASK + WORDS, reviews=rows)).load()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"file not found, got .*none\.toml"):
        read_task(tmp_path / "none.toml")
    with pytest.raises(UserError, match="must be readable"):
        read_task(tmp_path)
    (tmp_path / "junk.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="must be text in UTF-8"):
        read_task(tmp_path / "junk.toml")
