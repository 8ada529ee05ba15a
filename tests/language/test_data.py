"""Own data, tasks, metrics, batches and encoding, on rows written by hand."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from tiny_models import EXAMPLES, make_tokenizer

from gradientless.errors import UserError
from gradientless.language import metrics
from gradientless.language.data import Encoded, batch_indices, class_balance, load_table
from gradientless.language.tables import read_table
from gradientless.language.tasks import TASKS, Example
from gradientless.language.tasks.rotten_tomatoes import mend


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


CSV = 'text,label\n"good, very good",yes\n"two\nlines",no\nbad,no\nfine,yes\n'


def test_csv_with_quotes_is_split_by_seed_and_class(tmp_path):
    path = write(tmp_path, "rows.csv", CSV)
    splits = load_table(path, seed=1)
    assert splits.labels == ("no", "yes") and splits.test == []
    assert {row.text: row.label for row in splits.train + splits.validation} == {
        "good, very good": 1,
        "two\nlines": 0,
        "bad": 0,
        "fine": 1,
    }
    assert Counter(row.label for row in splits.validation) == {0: 1, 1: 1}
    assert load_table(path, seed=1) == splits
    assert any(load_table(path, seed=seed) != splits for seed in range(2, 9))


def test_a_tenth_of_each_class_is_set_aside(tmp_path):
    rows = "".join(f"text {i},{'a' if i % 3 else 'b'}\n" for i in range(300))
    splits = load_table(write(tmp_path, "rows.csv", "text,label\n" + rows))
    assert Counter(row.label for row in splits.validation) == {0: 20, 1: 10}
    assert len(splits.train) == 270 and not set(splits.train) & set(splits.validation)


def test_unquoted_tsv_keeps_its_quotation_marks_and_quoted_tsv_loses_them(tmp_path):
    plain = 'sentence\tlabel\n" good start\t1\nno end "\t0\n"so" they say\t1\n'
    rows = read_table(write(tmp_path, "plain.tsv", plain)).rows
    assert [row.values["sentence"] for row in rows] == ['" good start', 'no end "', '"so" they say']
    quoted = 'sentence\tlabel\n"a ""good"" one"\t1\n"two\nlines"\t0\nplain\t1\n'
    rows = read_table(write(tmp_path, "quoted.tsv", quoted)).rows
    assert [(row.line, row.values["sentence"]) for row in rows] == [
        (2, 'a "good" one'),
        (3, "two\nlines"),
        (5, "plain"),
    ]


def test_a_stray_pair_of_quotes_does_not_swallow_a_line(tmp_path):
    content = 'sentence\tlabel\n"open\t1\nclosed"\t0\nrest\t1\n'
    assert len(read_table(write(tmp_path, "rows.tsv", content)).rows) == 3


def test_jsonl_with_number_labels_and_pairs(tmp_path):
    rows = [{"premise": "a", "claim": "b", "y": y} for y in (10, 2, 10, 2.0)]
    path = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    splits = load_table(path, "premise", "claim", "y", validation=path)
    assert splits.labels == ("2", "10")
    assert splits.train[0] == Example("a", 1, "b") and [row.label for row in splits.validation] == [1, 0, 1, 0]


def test_folder_with_its_own_splits(tmp_path):
    write(tmp_path, "train.tsv", "text\tlabel\nx\t1\ny\t0\n")
    write(tmp_path, "dev.csv", "text,label\nz,1\n")
    write(tmp_path, "test.jsonl", '{"text": "no label here"}\n')
    splits = load_table(tmp_path)
    assert [row.text for row in splits.validation] == ["z"] and splits.test == []
    write(tmp_path, "test.jsonl", '{"text": "w", "label": 0}\n')
    assert load_table(tmp_path).test == [Example("w", 0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "txt,label\na,0\nb,1\n", "unknown column for the text 'text'; did you mean 'txt'? Known: label, txt"),
        ("a.csv", "text,lable\na,0\nb,1\n", "did you mean 'lable'"),
        ("a.csv", "text,label\na,0\nb,0\n", "must hold at least two classes, got one: '0'"),
        ("a.csv", "text,label\na,0\n ,1\n", "line 3: column 'text' must hold text, got an empty one"),
        ("a.csv", "text,label\na,0\nb,\n", "line 3: column 'label' must hold a word or a whole number, got nothing"),
        ("a.csv", "text,label\na,0\nb,c,1\n", "line 3: must have 2 fields as the header has, got 3"),
        ("a.csv", 'text,label\n"a,0\n', "not valid CSV"),
        ("a.csv", "text,text\na,0\n", "column names must differ"),
        ("a.csv", "text,label\n", "at least one row below its header, got none"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", " \n\n", "the file is empty"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0", "must be UTF-8 text, got byte 0x89 at position 0"),
        ("a.csv", b"text,label\n\0,1\n", "must be text, got binary data"),
        ("a.csv", "text,label\n".encode("utf-16"), "must be UTF-8 text, got UTF-16"),
        ("a.tsv", "text\tlabel\na\t0\nb\n", "line 3: must have 2 fields"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"\n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: must be a JSON object, got list"),
        (
            "a.jsonl",
            '{"text": 3, "label": 0}\n{"text": "b", "label": 1}\n',
            "line 1: column 'text' must hold text, got int",
        ),
        ("a.jsonl", '{"text": "b", "label": 1}\n{"label": 0}\n', "line 2: column 'text' must hold text, got nothing"),
        ("a.csv", "text,label\n" + "".join(f"t,{i}.5\n" for i in range(50)), "must hold classes, got 50 different"),
        ("a.csv", "text,label\na,0\nb,1\n", "some class must have two rows or more"),
        ("a.parquet", "x", "must end in .csv, .tsv, .jsonl, got '.parquet'"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_table(write(tmp_path, name, content))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_missing_files_and_unseen_labels(tmp_path):
    with pytest.raises(UserError, match="file not found"):
        load_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"must hold train\.csv"):
        load_table(tmp_path)
    train = write(tmp_path, "a.csv", "text,label\na,0\nb,1\n")
    other = write(tmp_path, "b.csv", "text,label\na,0\nb,7\n")
    with pytest.raises(
        UserError, match=r"b\.csv: line 3: label must be one of the training data's, got '7' \(known: 0, 1"
    ):
        load_table(train, validation=other)


def test_class_balance():
    rows = [Example("a", 0), Example("b", 1), Example("c", 1), Example("d", 1)]
    assert class_balance(rows, ("no", "yes")) == "4 rows: no 25.0%, yes 75.0%"


def test_batches_cut_an_endless_chain_of_permutations():
    steps = np.concatenate([batch_indices(7, step, 10, 4) for step in range(10)])
    for epoch in range(4):
        part = steps[10 * epoch : 10 * epoch + 10]
        assert sorted(part) == list(range(10))
        key = np.array([7, epoch], dtype=np.uint64)
        np.testing.assert_array_equal(part, np.random.Generator(np.random.Philox(key=key)).permutation(10))
    np.testing.assert_array_equal(batch_indices(7, 1, 10, 20), steps[20:40])
    assert batch_indices(7, 10**9, 10, 4).dtype == np.int64
    batch_indices(7, 0, 10, 4)[:] = 0  # a copy: what a caller does to it stays with the caller
    np.testing.assert_array_equal(batch_indices(7, 0, 10, 4), steps[:4])
    with pytest.raises(UserError, match="rows and batch_size must be >= 1"):
        batch_indices(0, 0, 10, 0)


def test_encoded_batches_are_padded_to_their_longest_row():
    encoded = Encoded(make_tokenizer(True), EXAMPLES, max_length=6)
    assert encoded.lengths.tolist() == [5, 6, 3, 6, 6] and encoded.labels.tolist() == [1, 0, 1, 0, 1]
    batch = encoded.batch([0, 2])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 7, 3], [2, 13, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["token_type_ids"].shape == (2, 5) and batch["input_ids"].dtype == torch.int64


def test_encoded_pairs_and_fingerprint():
    tokenizer = make_tokenizer(True)
    pairs = [Example("a film", 0, "good")]
    assert Encoded(tokenizer, pairs, 9).batch([0])["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    prints = {
        Encoded(tokenizer, rows, length).fingerprint
        for rows, length in [
            (pairs, 9),
            (pairs, 10),
            ([Example("a film", 1, "good")], 9),
            ([Example("a plot", 0, "good")], 9),
            ([Example("a film good", 0)], 9),
        ]
    }
    assert len(prints) == 5
    with pytest.raises(UserError, match="every row or no row must have a second text"):
        Encoded(tokenizer, [*pairs, Example("a", 0)], 9)
    with pytest.raises(UserError, match="at least one row"):
        Encoded(tokenizer, [], 9)


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_agree_with_scikit_learn(classes):
    generator = np.random.default_rng(classes)
    gold, predicted = generator.integers(0, classes, 60), generator.integers(0, classes, 60)
    average = "binary" if classes == 2 else "macro"
    assert metrics.f1(predicted, gold, classes) == pytest.approx(
        sklearn_metrics.f1_score(gold, predicted, average=average)
    )
    assert metrics.accuracy(predicted, gold) == pytest.approx(sklearn_metrics.accuracy_score(gold, predicted))


def test_metric_corners():
    assert metrics.f1([0, 0], [0, 0], 2) == 0.0 and metrics.f1([1, 1], [1, 1], 2) == 1.0
    assert metrics.f1_name(("negative", "positive")) == "f1 (binary, of 'positive')"
    assert metrics.f1_name(("a", "b", "c")) == "f1 (macro, over 3 classes)"
    with pytest.raises(ValueError, match="at least one prediction"):
        metrics.accuracy([], [])


def test_sst2_reads_a_glue_folder(tmp_path):
    write(tmp_path, "train.tsv", 'sentence\tlabel\na " good one \t1\nbad \t0\n')
    write(tmp_path, "dev.tsv", "sentence\tlabel\nfine\t1\n")
    write(tmp_path, "test.tsv", "index\tsentence\n0\tno label\n")
    splits = TASKS["sst2"]().load(tmp_path)
    assert splits.train == [Example('a " good one', 1), Example("bad", 0)]
    assert splits.validation == [Example("fine", 1)] and splits.test == [] and splits.labels == ("negative", "positive")
    write(tmp_path, "dev.tsv", "sentence\tlabel\nfine\t-1\n")
    message = r"dev\.tsv: line 2: label must be 0 \(negative\) or 1 \(positive\), got '-1'"
    with pytest.raises(UserError, match=message):
        TASKS["sst2"]().load(tmp_path)


def test_rotten_tomatoes_splits_by_the_seed_0_permutation_and_mends(tmp_path):
    rows = [f"row {i} \x97 end,{i % 2},rotten_tomatoes\n" for i in range(20)] + ["other,1,imdb\n"] * 3
    write(tmp_path, "rows.csv", "text,label,source\n" + "".join(rows))
    splits = TASKS["rotten-tomatoes"]().load(tmp_path)
    order = np.random.RandomState(0).permutation(20)
    assert [row.text for row in splits.train] == [f"row {i} \u2014 end" for i in order[:16]]
    assert [row.label for row in splits.validation] == [i % 2 for i in order[16:18]]
    assert len(splits.test) == 2
    assert mend("it\x92s\x85 caf\xe9 \x81") == "it\u2019s\u2026 caf\xe9 \x81"
