"""What every task promises, over the rows of `task_cases`: rows, errors, prompts, and where it says it comes from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import tokenizers
import transformers

from gradientless.errors import UserError
from gradientless.language import metrics
from gradientless.language.prompting import PromptEncoder
from gradientless.language.tasks import TASKS, Example, Prompt, find_task
from gradientless.language.tasks.base import KINDS
from gradientless.language.tasks.wording import asked, continued, unclosed
from pages import ROOT, rows
from task_cases import TASKS as CASES
from task_cases import lines

FAMILIES = ("causal", "masked", "text-to-text")


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def good(name, tmp_path):
    return TASKS[name]().load(write(tmp_path / "good", CASES[name].good))


@pytest.mark.parametrize("name", sorted(CASES))
def test_rows_and_errors(name, tmp_path):
    case, task = CASES[name], TASKS[name]()
    splits = good(name, tmp_path)
    assert [(row.text, row.label) for row in splits.train] == case.rows
    assert splits.validation and splits.labels == task.labels
    everything = (*splits.train, *splits.validation, *splits.test)
    if task.kind == "classification":
        assert all(0 <= row.label < len(task.labels) and not row.choices and not row.answers for row in everything)
    elif task.kind == "choice":
        assert all(len(row.choices) > 1 and row.choices[row.label] in row.answers for row in everything)
    else:
        assert all(row.answers and not row.choices and row.label == 0 for row in everything)
    for i, (files, message) in enumerate(case.bad):
        with pytest.raises(UserError, match=message) as caught:
            task.load(write(tmp_path / f"bad{i}", files))
        _, *more = str(caught.value).split("\n")  # every bad row of a file is told
        assert not more or "rows must all be usable" in more[-1]
    with pytest.raises(UserError):
        task.load(tmp_path / "absent")


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_prompts(name, tmp_path):
    row, prompts = good(name, tmp_path).train[0], TASKS[name].prompts
    assert {key: (prompt.render(row, "‹›"), prompt.says(row)) for key, prompt in prompts.items()} == CASES[name].golden


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_states_what_it_is(name):
    task = TASKS[name]
    assert task.key == name and task.source and task.licence and task.version and task.kind in KINDS
    assert task.metric in (metrics.METRICS if task.kind == "classification" else metrics.TEXT_METRICS)
    assert (len(task.labels) > 1) == (task.kind == "classification")
    families = {key.partition(":")[0] for key in task.prompts}
    assert families == set(FAMILIES if task.kind != "generation" else ("causal", "text-to-text"))
    for prompt in task.prompts.values():
        assert tuple(prompt.words) == task.labels  # in the order of the classes


def test_the_page_says_what_the_tasks_say():
    page = [cells for heading, cells in rows(ROOT / "docs" / "tasks.md") if heading == "The tasks"]
    stated = {
        cells[0].strip("`"): (cells[1], cells[2].replace("`", ""), cells[3], cells[5].strip("`")) for cells in page
    }
    assert stated == {
        name: (task.kind, task.source + (f" {config}" if (config := getattr(task, "config", None)) else ""),
               task.licence, task.metric)
        for name, task in TASKS.items()
    }  # fmt: skip
    shown = {
        (cells[0].strip("`"), cells[1].strip("`")): cells[2]
        for heading, cells in rows(ROOT / "docs" / "tasks.md") if heading == "The prompts"
    }  # fmt: skip
    wanted = {}
    for name, task in TASKS.items():
        for key, prompt in task.prompts.items():
            text = prompt.text.replace("\n", "⏎") + ("" if prompt.answer == "{answer}" else f" + {prompt.answer!r}")
            wanted[name, key] = f"`{text}`"
    assert shown == wanted


def test_finding_a_task(tmp_path):
    assert isinstance(find_task("sst2"), TASKS["sst2"])
    with pytest.raises(UserError, match="task: unknown task 'sst22'; did you mean 'sst2'"):
        find_task("sst22")
    with pytest.raises(UserError, match="file not found"):
        find_task(str(tmp_path / "none.toml"))
    assert TASKS["sst2"]().prompt("causal", "mezo").text == "{text} It was {label}"
    with pytest.raises(UserError, match=r"squad: unknown prompt 'masked'\. Known: causal, text-to-text"):
        TASKS["squad"]().prompt("masked")


# --- forms of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"])
def test_fewglue_holds_one_file_a_task(name, tmp_path):
    content = CASES[name].good["train.jsonl"]
    if name == "record":  # three passages, as the others have
        content = content + content.replace("Ann met", "Eve met") + content.replace("Ann met", "Max met")
    splits = TASKS[name]().load(write(tmp_path / "few", {f"{TASKS[name].file}.jsonl": content}))
    whole = good(name, tmp_path)
    everything = {*splits.train, *splits.validation, *splits.test}
    assert splits.train and splits.validation and splits.test
    assert everything >= set(whole.train) and len(everything) == (6 if name == "multirc" else 3)


def test_superglues_files_and_the_hubs_rows_are_one(tmp_path):
    nested = good("wsc", tmp_path).train[0]
    flat = lines({"text": "Ann told Eve that She won.", "span1_text": "Ann", "span2_text": "She", "label": 1})
    two = TASKS["wsc"]().load(write(tmp_path / "wsc", {"train.jsonl": flat, "dev.jsonl": flat}))
    assert two.train == [nested]
    few = lines(*({"question": "is it", "passage": f"P{i}.", "label": i > 0} for i in range(2)))
    two = TASKS["boolq"]().load(write(tmp_path / "boolq", {"train.jsonl": few, "dev.jsonl": few}))
    assert [row.label for row in two.train] == [0, 1]
    hub = lines({"paragraph": "Ann came.", "question": "Who came?", "answer": "Ann", "label": 1, "idx": {"answer": 0}})
    two = TASKS["multirc"]().load(write(tmp_path / "multirc", {"train.jsonl": hub, "dev.jsonl": hub}))
    assert two.train[0].fields == {"paragraph": "Ann came.", "question": "Who came?", "answer": "Ann"}
    assert (two.train[0].text_pair, two.train[0].group) == ("Who came? Ann", "Ann came.")


def test_rows_of_one_class_can_only_be_evaluated_on(tmp_path):
    content = CASES["wsc"].good["train.jsonl"].replace("false", "true")
    splits = TASKS["wsc"]().load(write(tmp_path / "few", {"WSC.jsonl": content}))
    assert splits.train == [] == splits.test and [row.label for row in splits.validation] == [1, 1, 1]


def test_no_paragraph_is_on_both_sides(tmp_path):
    records = [
        {"context": f"C{i // 4}", "question": f"Q{i}", "answers": {"text": ["a"]}} for i in range(120)
    ]  # thirty paragraphs of four questions
    folder = write(tmp_path / "squad", {"dev.jsonl": lines(*records)})
    splits = TASKS["squad"]().load(folder)
    parts = [{row.text for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [24, 3, 3] and len(set.union(*parts)) == 30
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [96, 12, 12]
    assert TASKS["squad"]().load(folder) == splits
    title = good("squad", tmp_path).validation[0]
    assert TASKS["squad"].prompts["causal"].render(title).startswith("Title: Rivers\nContext: The Nile.\n")


def test_record_scores_the_filled_sentence_and_takes_any_right_name(tmp_path):
    row = good("record", tmp_path).validation[0]
    assert (row.choices, row.answers, row.label, row.group) == (("Bob", "Ann"), ("Ann", "Bob"), 0, row.text)
    assert TASKS["record"].prompts["causal"].says(row) == (" So Bob left", " So Ann left")
    assert metrics.TEXT_METRICS["accuracy"](["Ann", "Bob", "Tom"], [row.answers] * 3) == pytest.approx(2 / 3)


def test_drops_answers_are_all_accepted(tmp_path):
    train = good("drop", tmp_path).train
    assert [row.answers for row in train] == [("7", "seven"), ("A", "B"), ("1901",)]


def test_rotten_tomatoes_reads_the_whole_set_too(tmp_path):
    content = "sentence\tlabel\n" + "".join(f'film "{i}" .\t{i % 2}\n' for i in range(10))
    splits = TASKS["rotten-tomatoes"]().load(write(tmp_path / "mr", {"all.tsv": content}))
    assert splits.train[0].text == 'film "2" .' and len(splits.train) == 8


def test_rotten_tomatoes_reads_a_folder_of_splits_as_every_task_does(tmp_path):
    one, two, three = (
        "text,label\n" + f"film {name} \x96 so,{label}\n" for name, label in zip("abc", "011", strict=True)
    )
    files = {"train.csv": one + "other,positive\n", "validation.csv": two, "test.csv": three, "notes.txt": "x"}
    splits = TASKS["rotten-tomatoes"]().load(write(tmp_path / "whole", files))
    assert [[(row.text, row.label) for row in part] for part in (splits.train, splits.validation, splits.test)] == [
        [("film a – so", 0), ("other", 1)], [("film b – so", 1)], [("film c – so", 1)],
    ]  # fmt: skip
    two_files = {"train.tsv": one.replace(",", "\t") + "x\t1\n" * 9, "dev.csv": two}
    splits = TASKS["rotten-tomatoes"]().load(write(tmp_path / "two", two_files))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [10, 1, 0]


# --- the hub ----------------------------------------------------------------------------------------------------------

HUB = {
    "sst5": ({"train": {"text": ["fine"], "label": [3]}, "validation": {"text": ["bad"], "label": [1]}}, 3),
    "trec": (
        {
            "train": {"text": ["Where ?"] * 10, "coarse_label": [4] * 9 + [0]},
            "test": {"text": ["x"], "coarse_label": [2]},
        },
        4,
    ),
    "mnli": (
        {
            "train": {"premise": ["A."], "hypothesis": ["B."], "label": [2]},
            "validation_matched": {"premise": ["C."], "hypothesis": ["D."], "label": [0]},
            "validation_mismatched": {"premise": ["E."], "hypothesis": ["F."], "label": [0]},
            "test_matched": {"premise": ["G."], "hypothesis": ["H."], "label": [-1]},
        },
        2,
    ),
    "snli": (
        {
            "train": {"premise": ["A.", "B."], "hypothesis": ["B.", "C."], "label": [-1, 1]},
            "validation": {"premise": ["C."], "hypothesis": ["D."], "label": [0]},
        },
        1,
    ),
    "boolq": (
        {
            "train": {"question": ["is it"], "answer": [True], "passage": ["It is."]},
            "validation": {"question": ["is it"], "answer": [False], "passage": ["No."]},
        },
        1,
    ),
    "squad": (
        {
            "train": {
                "id": ["1"],
                "title": ["T"],
                "context": ["C"],
                "question": ["Q"],
                "answers": [{"text": ["a", "b"]}],
            },
            "validation": {"title": ["T"], "context": ["D"], "question": ["Q"], "answers": [{"text": ["a"]}]},
        },
        0,
    ),
    "record": (
        {
            "train": {"passage": ["P"], "query": ["@placeholder"], "entities": [["a", "b"]], "answers": [["b"]]},
            "validation": {"passage": ["R"], "query": ["@placeholder"], "entities": [["a"]], "answers": [["a"]]},
            "test": {"passage": ["S"], "query": ["@placeholder"], "entities": [["a"]], "answers": [[]]},
        },
        1,
    ),
}


@pytest.mark.parametrize("name", sorted(HUB))
def test_rows_of_the_hub(name, monkeypatch):
    import datasets
    import huggingface_hub

    asked_for = []

    def load(source, config, revision):
        asked_for.append((source, config, revision))
        return HUB[name][0]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = TASKS[name]().load()
    assert asked_for == [(TASKS[name].source, TASKS[name].config, TASKS[name].revision)]
    if name == "trec":
        assert sorted(row.label for row in (*splits.train, *splits.validation)) == [2] + [4] * 9  # ABBR and LOC
        assert [row.label for row in splits.test] == [0]  # DESC
    else:
        assert len(splits.train) == len(splits.validation) == 1 and splits.test == []
        assert splits.train[0].label == HUB[name][1]


def test_a_hub_without_labels_is_told(monkeypatch):
    hub = {"test": {"sentence": ["x"], "label": [-1]}}
    monkeypatch.setattr(TASKS["sst2"], "_download", lambda self: hub)
    with pytest.raises(UserError, match="sst2: some split must have labelled rows, got none in stanfordnlp/sst2/test"):
        TASKS["sst2"]().load()


# --- examples, prompts, wording ---------------------------------------------------------------------------------------


def test_fields_of_a_row():
    row = Example("a", 0, "b", {"word": "c"})
    assert [row.value(name) for name in ("text", "text_pair", "word")] == ["a", "b", "c"]
    assert replace(row, fields={"text": "d"}).value("text") == "d"
    assert len({row, replace(row)}) == 1
    with pytest.raises(UserError, match=r"unknown field 'wodr'; did you mean 'word'\? Known: text, text_pair, word"):
        row.value("wodr")
    with pytest.raises(UserError, match="unknown field 'text_pair'"):
        Example("a", 0).value("text_pair")


class TestPrompt:
    WORDS: ClassVar = {"n": "no", "y": "yes"}

    def test_slots(self):
        row = Example("T", 0, fields={"word": "W"})
        assert Prompt("{word}: {text} {{x}} {mask}!", self.WORDS).render(row, "yes") == "W: T {x} yes!"
        assert Prompt("{text} A:", self.WORDS).render(row, " yes") == "T A: yes"
        assert Prompt("{label} {word}", self.WORDS).fields == ("word",)

    def test_answers(self):
        row = Example("T", 1, fields={"end": "!"}, choices=("a", "b"), answers=("b",))
        assert Prompt("{text}", answer=" {answer}{end}").says(row) == (" a!", " b!")
        assert Prompt("{text}").says(Example("T", 0, answers=("x", "y"))) == ("x",)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"text": "no slot"}, "prompt: text must have a slot for a text of the row, such as {text}, got 'no slot'"),
            ({"text": "{label}"}, "prompt: text must have a slot for a text of the row"),
            ({"text": "{text} {text}"}, "prompt: text must have the slot {text} once, got '{text} {text}'"),
            ({"text": "{text} {mask} {label}"}, "prompt: text must have one slot for the label word"),
            ({"text": "{text} {"}, "prompt: text must be a template such as 'Review: {text}', got '{text} {'"),
            ({"text": "{text} {}"}, "prompt: a slot must hold a name such as {text}, got {} in '{text} {}'"),
            ({"text": "{text} {a.b}"}, "prompt: a slot must hold a name such as {text}, got {a.b}"),
            ({"words": {"a": "x"}}, "prompt: at least two label words are needed, got 1"),
            ({"words": {"a": "x", "b": " "}}, "prompt: the label word of 'b' must not be empty, got ' '"),
            ({"score": "max"}, "prompt: unknown score 'max'; did you mean 'mean'? Known: mean, sum"),
            ({"answer": "x"}, "prompt: answer must have the slot {answer} once, got 'x'"),
        ],
    )
    def test_what_cannot_be_used_is_told(self, options, message):
        with pytest.raises(UserError) as caught:
            Prompt(**{"text": "{text}", "words": self.WORDS, **options})
        assert str(caught.value).startswith(message)


def test_wording():
    assert [unclosed(text) for text in ("A.", "A?! ", "A", "3.5", "")] == ["A", "A?", "A", "3.5", ""]
    assert [continued(text) for text in ("The dog", "I ran", "I'm in", "USA won")] == [
        "the dog",
        "I ran",
        "I'm in",
        "usa won",
    ]
    assert [asked(text) for text in ("is it so ", "Is it?", "é")] == ["Is it so?", "Is it?", "É?"]


def test_records_are_json(tmp_path):
    """The fixtures are what they claim to be."""
    for case in CASES.values():
        for name, content in case.good.items():
            if name.endswith(".jsonl"):
                assert all(isinstance(json.loads(line), dict) for line in content.splitlines())


# --- through a tokenizer ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE trained on the fixtures, so that what it encodes can be read back letter by letter."""
    inner = tokenizers.ByteLevelBPETokenizer()
    texts = [text for case in CASES.values() for text in case.good.values()]
    inner.train_from_iterator(texts, vocab_size=600, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )


CLASSIFICATIONS = [
    (name, key) for name, task in sorted(TASKS.items()) if task.kind == "classification" for key in task.prompts
]


@pytest.mark.parametrize(("name", "key"), CLASSIFICATIONS)
def test_token_ids_read_as_the_golden_string(name, key, tokenizer, tmp_path):
    task, family = TASKS[name], key.partition(":")[0]
    row = good(name, tmp_path).train[0]
    encoder = PromptEncoder(tokenizer, task.prompts[key], task.labels, family, 512, start=0)
    batch = encoder.encode([row]).batch([0])
    question, words = CASES[name].golden[key]
    for word, ids in zip(words, encoder.words.words, strict=True):
        assert tokenizer.decode(list(ids)).strip() == word.strip()
    asked_first = tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist())
    if family == "masked":
        before, after = question.split("‹›")
        assert asked_first.split("<mask>")[0].rstrip() == before.rstrip()
        assert asked_first.split("<mask>")[-1] == after
    else:  # perhaps with the beginning of a word behind it
        assert asked_first.startswith(question.removesuffix("‹›").rstrip())


@pytest.mark.parametrize("length", [60, 90])
def test_only_the_texts_of_a_row_are_cut(length, tokenizer, tmp_path):
    task = TASKS["boolq"]
    row = replace(good("boolq", tmp_path).train[0], fields={"passage": "Long text. " * 200, "asked": "Is it? " * 100})
    encoder = PromptEncoder(tokenizer, task.prompts["masked"], task.labels, "masked", length)
    encoded = encoder.encode([row])
    assert encoded.cut == 1 and encoded.lengths.tolist() == [pytest.approx(length, abs=3)]
    read = tokenizer.decode(encoded.batch([0])["input_ids"][0].tolist())
    assert " Question: Is it?" in read and read.startswith("Long text.") and " Answer:<mask>" in read
