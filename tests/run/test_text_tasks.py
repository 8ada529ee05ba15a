"""Choices and generation, whole: trained, evaluated, predicted, used untuned; rewards; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gradientless.errors import UserError
from gradientless.language.metrics import exact_match, token_f1
from gradientless.language.surfaces import load
from gradientless.language.tasks import Example
from gradientless.run.assemble import Rows, make_optimizer, make_surface
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import TextRows, load_splits
from gradientless.run.losses import loss_of, rewarded
from gradientless.run.objective import Objective
from gradientless.run.runfolder import RunFolder
from gradientless.run.train import Run, train
from gradientless.run.untuned import WAYS
from gradientless.search.noise import Noise
from gradientless.search.optim import ForwardOptimizer
from tiny_run import gradientless

REWARDS = """
def short(texts, rows):
    assert all(isinstance(text, str) for text in texts)
    return [-len(text) / 10 - (text in row.answers) for text, row in zip(texts, rows)]

def right(texts, rows):
    return sum(text in row.answers for text, row in zip(texts, rows)) / len(rows)

def nothing(texts, rows):
    return None

def many(texts, rows):
    return [1.0] * (len(rows) + 1)

def ragged(texts, rows):
    return [[1.0], [1.0, 2.0]]

def attached(texts, rows):
    import torch
    return [torch.ones((), requires_grad=True) for _ in rows]

def broken(texts, rows):
    return {}["word\\nof two lines"]

def undefined(texts, rows):
    return [0.5, float("nan")]

def endless(texts, rows):
    return float("inf")
"""
INJECT = ("optimizer.evaluator=inject", "optimizer.rank=1", "optimizer.noise=rademacher")
SNAPSHOT = ("optimizer.evaluator=snapshot", "optimizer.rank=1", "optimizer.noise=rademacher")
MEZO = ("optimizer.lr=1e-3", "optimizer.eps=1e-2")
VECTORS = ("surface.name=ia3", "surface.max_new_tokens=3", "optimizer.radius=5", "optimizer.candidates=3")
SMALL = ("surface.name=full", "data.max_length=60", "surface.max_new_tokens=6", "batch_size=4", "steps=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """llama/ and t5/, random language models; rows of copa/, record/ and squad/; rewards.py."""
    from tiny_models import make_language_model

    folder = tmp_path_factory.mktemp("text-tasks")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for kind in ("llama", "t5"):
            model, tokenizer = make_language_model(kind)
            model.save_pretrained(folder / kind)
            tokenizer.save_pretrained(folder / kind)
    words = ["good", "bad", "very dull", "great", "bright"]
    copa = [
        {
            "premise": f"The film was {words[i % 5]}.",
            "choice1": "It was good.",
            "choice2": "The plot was very very dull and bad.",
            "question": "cause" if i % 2 else "effect",
            "label": i % 2,
        }
        for i in range(14)
    ]
    record = [
        {
            "passage": f"The plot {i} was dull",
            "query": "So @placeholder was great",
            "entities": ["the plot", "a film", "bright"][: 2 + i % 2],
            "answers": ["a film", "the plot"],
        }
        for i in range(14)
    ]
    squad = [
        {
            "context": f"the film {i // 2} was good",
            "question": "what was good?",
            "answers": {"text": ["the film", "film"] if i % 2 else ["the film was very good"], "answer_start": [0, 4]},
        }
        for i in range(30)
    ]
    for name, rows in (("copa", copa), ("record", record), ("squad", squad)):
        (folder / name).mkdir()
        for part, some in (("train", rows[4:]), ("dev", rows[:4])):
            (folder / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    return folder


def config_of(place: Path, task: str, *overrides: str, model: str = "llama", optimizer: str = "mezo") -> RunConfig:
    flags = {"task": task, "data.path": str(place / task), "model": str(place / model), "device": "cpu"}
    return RunConfig.load(None, settings(overrides), {**flags, "optimizer.name": optimizer})


def settings(overrides) -> list[str]:
    """`SMALL`, but for what `overrides` say otherwise, and these."""
    given = {each.partition("=")[0] for each in overrides}
    return [each for each in SMALL if each.partition("=")[0] not in given] + list(overrides)


@pytest.fixture(scope="module")
def ended(place, tmp_path_factory):
    """run(task, *overrides) -> the folder of its run of two steps, which is not run twice."""
    runs: dict[tuple[str, ...], Path] = {}

    def run(task: str, *overrides: str, model: str = "llama", optimizer: str = "mezo") -> Path:
        key = (task, model, optimizer, *overrides)
        if key not in runs:
            out = tmp_path_factory.mktemp("runs") / "run"
            where = ["--data", str(place / task), "--model", str(place / model), "--device", "cpu", "--out", str(out)]
            code = gradientless("train", "--task", task, *where, "--optimizer", optimizer, *settings(overrides))
            assert code == 0
            runs[key] = out
        return runs[key]

    return run


LOSSES = [
    ("copa", ()),
    ("copa", ("loss=cross-entropy",)),
    ("copa", ("loss=accuracy",)),
    ("copa", ("loss=token-f1",)),
    ("record", ()),
    ("record", ("loss=cross-entropy", "prompt.score=mean")),
    ("squad", ()),
    ("copa", ("loss=exact-match",)),
    ("squad", ("loss=token-f1",)),
    ("squad", ("loss=exact-match",)),
    ("squad", ("reward={rewards}:short",)),
]


def losses_at_points(place: Path, task: str, own, evaluator, model: str) -> list[float]:
    """Losses at theta ± eps z of one batch, as the optimizer of a run measures them."""
    own = [each.format(rewards=place / "rewards.py") for each in own]
    config = config_of(place, task, *MEZO, *evaluator, *own, model=model)
    splits = load_splits(config)
    surface = make_surface(config, splits.labels, "cpu")
    loss = loss_of(config.loss, config.reward, splits.kind, splits.labels)
    rows = Rows(surface, splits.train, config, "train", loss)
    optimizer = make_optimizer(config, surface)
    assert isinstance(optimizer, ForwardOptimizer)
    measured: list[float] = []
    of = loss.of
    object.__setattr__(
        loss, "of", lambda said, expected: measured.append(float(of(said, expected))) or of(said, expected)
    )
    try:
        optimizer.step(rows.objective(0, Noise(config.seed)))
    finally:
        object.__setattr__(loss, "of", of)
    return measured


@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize(("task", "own"), LOSSES, ids=lambda x: "-".join(x) if isinstance(x, tuple) else x)
def test_evaluators_agree(place, task, own, model, recwarn):
    """All points in one batch, and one after the other from a snapshot."""
    together = losses_at_points(place, task, own, INJECT, model)
    apart = losses_at_points(place, task, own, SNAPSHOT, model)
    assert len(together) >= 2 and together[-2:] == pytest.approx(apart[-2:], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["full", "lora", "ia3", "prefix", "prompt", "side_lora", "lst"])
@pytest.mark.parametrize("task", ["copa", "squad"])
def test_surfaces_are_trained_on_the_answers_likelihood(place, task, name):
    """Losses of micro-batches are weighed by their tokens, and so are their gradients."""
    more = ("surface.reduction=4",) if name == "lst" else ()
    found = []
    for size in ("micro_batch_size=8", "micro_batch_size=3"):
        own = (f"surface.name={name}", "optimizer.lr=1e-3", "data.max_length=50", "batch_size=8", *more, size)
        config = config_of(place, task, *own, optimizer="adamw")
        splits = load_splits(config)
        surface = make_surface(config, splits.labels, "cpu")
        loss = loss_of(config.loss, None, splits.kind)
        assert config.loss == "lm"
        rows = Rows(surface, splits.train, config, "train", loss)
        objective = rows.objective(0, Noise(1))
        assert len(set(rows.encoded.tokens[rows.batch(0)].tolist())) > 1
        value = objective.backward()
        assert value == pytest.approx(float(objective().detach()), rel=1e-5)
        found.append(
            (value, [tensor.grad.clone() for tensor in surface.trainable().values() if tensor.grad is not None])
        )
        by_hand = sum(float(-surface(rows.encoded.batch([int(row)])).detach().sum()) for row in rows.batch(0))
        tokens = sum(int(rows.encoded.tokens[int(row)]) for row in rows.batch(0))
        assert value == pytest.approx(by_hand / tokens, rel=1e-4)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] and any(float(grad.abs().max()) > 0 for grad in found[0][1])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)


BESIDE = ("surface.name=lst", "surface.reduction=4")


@pytest.mark.parametrize(
    ("task", "model", "more"),
    [("copa", "llama", ()), ("record", "t5", ()), ("squad", "llama", ()), ("squad", "t5", ()), ("squad", "t5", BESIDE)],
)
def test_a_run_leaves_its_figures(ended, place, task, model, more, capsys):
    run = ended(task, *MEZO, *SNAPSHOT, *more, model=model)
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    kind = "generation" if task == "squad" else "choice"
    assert summary["accuracy_means"] == f"accuracy ({'exact match' if task == 'squad' else 'any right choice'})"
    assert summary["f1_means"].startswith("f1 (of tokens")
    surface, config = load(run / "model"), RunConfig.load(run / "config.toml")
    splits = load_splits(config)
    texts, loss = TextRows(surface, splits.validation, kind).read()
    answers = [row.answers for row in splits.validation]
    right = (
        exact_match(texts, answers)
        if task == "squad"
        else sum(t in a for t, a in zip(texts, answers, strict=True)) / len(texts)
    )
    assert summary["metrics"] == {
        "accuracy": right, "f1": token_f1(texts, answers), "loss": pytest.approx(loss, rel=1e-5),
    }  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [0, 1, 2]
    capsys.readouterr()
    assert gradientless("eval", str(run), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("accuracy", "f1", "loss")} == {
        key: pytest.approx(value, rel=1e-5) for key, value in summary["metrics"].items()
    }


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_masked_models_learn_to_choose(place, tmp_path, kind):
    """A choice behind a text of the row (ReCoRD's gap) in the row that stands for all where products are counted too,
    with a tokenizer to which two of its words without a blank are another one."""
    import families

    families.save(kind, tmp_path / kind)
    flags = {"task": "record", "data.path": str(place / "record"), "model": str(tmp_path / kind), "device": "cpu"}
    own = settings(("data.max_length=24", "steps=1", "surface.readout=prompt", "optimizer.lr=1e-2"))
    for optimizer in ("mezo", "adamw"):
        config = RunConfig.load(None, own, {**flags, "optimizer.name": optimizer})
        folder = RunFolder.create(tmp_path / optimizer, config.toml())
        assert train(config, folder)["parameters"]["touched"] > 0 or optimizer == "mezo"
        before, after = (line["loss"] for line in folder.read_metrics() if line["split"] == "validation")
        assert before != after


def test_the_best_evaluation_of_generation_has_the_highest_token_f1(place, tmp_path, monkeypatch):
    def told(run):
        return {"loss": 1.0, "accuracy": 1 - run.done.step / 9, "f1": run.done.step / 9}

    monkeypatch.setattr(Run, "evaluate", told)
    folder = RunFolder.create(tmp_path / "run", (config := config_of(place, "squad", *MEZO, *SNAPSHOT)).toml())
    assert train(config, folder)["model_step"] == 2


def test_predictions_hold_the_texts(ended, place, tmp_path, capsys):
    run = ended("squad", *MEZO, *SNAPSHOT)
    file = tmp_path / "questions.jsonl"
    row = {"context": "the film was good", "question": "what was good?"}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question": "was it?"}) + "\n", "utf-8")
    capsys.readouterr()
    assert gradientless("predict", str(run), "--file", str(file), "--format", "jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    surface = load(run / "model")
    fields = [{**row, "heading": ""}, {**row, "question": "was it?", "heading": ""}]
    rows = [Example(each["context"], 0, each["question"], each) for each in fields]
    texts = surface.texts(surface.prepare(surface.encode_questions(rows).batch([0, 1])))
    assert found == [
        {"context": each["context"], "question": each["question"], "answer": text}
        for each, text in zip(fields, texts, strict=True)
    ]


def test_predictions_hold_the_choice(ended, tmp_path, capsys):
    run = ended("copa", *MEZO, *SNAPSHOT)
    file = tmp_path / "new.jsonl"
    row = {"premise": "It was dull.", "choice1": "A film.", "choice2": "The plot was bad.", "question": "cause"}
    file.write_text(json.dumps(row) + "\n", "utf-8")
    capsys.readouterr()
    assert gradientless("predict", str(run), "--file", str(file)) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head == "premise,choice1,choice2,question,answer,probability"
    text, *_, answer, probability = line.split(",")
    assert (
        text == "It was dull."
        and answer in ("a Film.", "a film.", "the plot was bad.")
        and 0.5 <= float(probability) <= 1
    )


class TestUntuned:
    def test_zero_shot_is_what_the_model_says(self, place):
        for task in ("copa", "squad"):
            config = config_of(place, task)
            splits = load_splits(config)
            found = WAYS["zero-shot"].use(config, splits, {})
            texts, loss = TextRows(make_surface(config, (), "cpu"), splits.validation, splits.kind).read()
            assert found.metrics["loss"] == pytest.approx(loss, rel=1e-5)
            assert found.metrics["f1"] == token_f1(texts, [row.answers for row in splits.validation])

    def test_calibrated_takes_away_what_a_choice_scores_without_content(self, place):
        config = config_of(place, "record")
        splits = load_splits(config)
        found = WAYS["calibrated"].use(config, splits, {"input": "N/A"}).logits
        surface = make_surface(config, (), "cpu")
        for row, scores in zip(splits.validation, found, strict=True):
            free = Example("N/A", row.label, None, {**row.fields, "points": "N/A"}, row.choices, row.answers)
            with torch.no_grad():
                plain, bias = (surface(surface.encode([each]).batch([0]))[0] for each in (row, free))
            count = len(row.choices)
            assert torch.allclose(scores[:count], (plain - bias)[:count], atol=1e-3)
            assert scores[count:].isinf().all()
        with pytest.raises(UserError, match="calibrated: rows must have classes or choices, got texts to write"):
            WAYS["calibrated"].use(config_of(place, "squad"), load_splits(config_of(place, "squad")), {"input": "N/A"})

    def test_in_context_rows_are_answered(self, place):
        from gradientless.run.untuned import demonstrations, in_context

        config = config_of(place, "squad", "data.max_length=64")
        splits = load_splits(config)
        (row,) = demonstrations(splits, 1, config.seed)
        plain = make_surface(config, (), "cpu").reading.encoder
        ((_, shown, _),) = in_context(plain, [row], np.array([30]), None)
        said = f"Context: {row.fields['context']}\nQuestion: {row.fields['question']}\nAnswer: {row.answers[0]}\n\n"
        assert shown.prompt.text == said + "{heading}Context: {context}\nQuestion: {question}\nAnswer:"

    @pytest.mark.parametrize("task", ["record", "squad"])
    def test_rows_with_fewer_demonstrations_are_scored_with_the_others(self, place, task, monkeypatch):
        """Parts of the rows, each behind as many demonstrations as fit, against each row behind its own alone."""
        from gradientless.run.untuned import demonstrations, in_context

        config = config_of(place, task, "data.max_length=60")
        splits = load_splits(config)
        longer = {"squad": "context", "record": "points"}[task]
        more = [
            replace(row, fields={**row.fields, longer: "very " * 3 * i + row.fields[longer]})
            for i, row in enumerate(splits.validation)
        ]
        splits = replace(splits, validation=more)
        plain = make_surface(config, (), "cpu").reading.encoder
        wholes = (plain.encode if task == "record" else plain.encode_questions)(more).wholes
        ((_, shown, _),) = in_context(plain, demonstrations(splits, 1, config.seed), wholes, None)
        limit = int(np.sort(wholes)[1]) + shown.max_length - plain.max_length
        monkeypatch.setattr("gradientless.language.backbone.longest", lambda _: limit)
        config = config_of(place, task, f"data.max_length={wholes.max()}")
        whole = WAYS["icl"].use(config, splits, {"k": 1})
        assert whole.notes == (
            f"shown       fewer than 1 demonstrations to 2 of 4 rows: 0 to 1 fit into the model's {limit} positions",
        )
        each = [WAYS["icl"].use(config, replace(splits, validation=[row]), {"k": 1}) for row in more]
        for key in ("accuracy", "f1"):
            assert whole.metrics[key] == pytest.approx(sum(one.metrics[key] for one in each) / len(each))
        if task == "record":
            for scores, one in zip(whole.logits, each, strict=True):
                assert torch.allclose(scores[: one.logits.shape[1]], one.logits[0], atol=1e-3)

    def test_what_calibration_reads_is_counted(self, place):
        """One empty input where the classes are the same for all rows; where choices are a row's own, one a row."""
        config = config_of(place, "copa", "batch_size=3")
        found = WAYS["calibrated"].use(config, load_splits(config), {"input": "N/A"})
        assert len(load_splits(config).validation) == 4 and found.forward_passes == 2


class TestRewards:
    def test_a_reward_is_maximised_with_mezo_and_gld(self, ended, place):
        reward = f"reward={place / 'rewards.py'}:short"
        for optimizer, own in (("mezo", (*MEZO, *INJECT)), ("gld", ("optimizer.radius=0.1",))):
            run = ended("squad", reward, *own, optimizer=optimizer)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            rewards = [line["reward"] for line in lines if line["split"] == "validation"]
            summary = json.loads((run / "summary.json").read_text("utf-8"))
            assert (
                summary["metrics"]["reward"] == max(rewards)
                and RunConfig.load(run / "config.toml", code=None).loss == "reward"
            )
            assert next(line["loss"] for line in lines if line["split"] == "train") >= 0

    @pytest.mark.parametrize(
        ("task", "optimizer", "own"),
        [
            ("squad", "gld", ("reward={rewards}:short", *VECTORS, "batch_size=6")),
            ("squad", "mezo", ("reward={rewards}:short", *SNAPSHOT, "optimizer.lr=1e-2", "optimizer.eps=3e-2")),
            ("copa", "gld", ("loss=token-f1", "prompt.score=mean", *VECTORS)),
            ("copa", "gld", ("loss=exact-match", "prompt.score=mean", *VECTORS)),
        ],
        ids=["reward-gld", "reward-mezo", "token-f1-gld", "exact-match-gld"],
    )
    def test_a_few_steps_on_one_batch_improve_it(self, place, task, optimizer, own):
        own = [each.format(rewards=place / "rewards.py") for each in own]
        given = [] if any(each.startswith("batch_size") for each in own) else ["batch_size=10"]
        config = config_of(place, task, *own, *given, optimizer=optimizer)
        splits = load_splits(config)
        surface = make_surface(config, splits.labels, "cpu")
        loss = loss_of(config.loss, config.reward, splits.kind, splits.labels)
        objective = Rows(surface, splits.train, config, "train", loss).objective(0, Noise(config.seed))
        made, before = make_optimizer(config, surface), float(objective())
        for _ in range(2):
            made.step(objective)
        assert float(objective()) < before

    def test_of_classes_it_is_given_their_names(self, place):
        give = loss_of("reward", f"{place / 'rewards.py'}:right", "classification", ("no", "yes"))
        rows = [Example("a", 0, answers=("yes",)), Example("b", 1, answers=("yes",))]
        assert give.of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), rows) == -0.5

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("nothing", "must return a number, or one for each of the 2 rows, got NoneType"),
            ("many", r"must return a number, or one for each of the 2 rows, got list of shape \(3,\)"),
            ("ragged", r"must return a number, or one for each of the 2 rows, got list \(ValueError: .*\)"),
            ("attached", r"must return a number, or one for each of the 2 rows, got list \(RuntimeError: .*grad.*\)"),
            ("broken", r"must return a number, got KeyError: 'word.*of two lines'"),
            ("undefined", "must return finite numbers, got nan for row 2 of 2"),
            ("endless", "must return finite numbers, got inf"),
        ],
    )
    def test_what_is_no_number_is_one_line(self, place, name, line):
        reward = f"{place / 'rewards.py'}:{name}"
        with pytest.raises(UserError) as caught:
            rewarded(reward)(["a", "b"], [Example("a", 0), Example("b", 0)])
        assert re.fullmatch(re.escape(f"reward: '{reward}' ") + line, str(caught.value))

    def test_no_memory_left_in_a_reward_is_told_as_elsewhere(self, monkeypatch):
        def full(texts, rows):
            raise torch.OutOfMemoryError("none left")

        monkeypatch.setattr("gradientless.run.losses.own", lambda *_: full)
        with pytest.raises(torch.OutOfMemoryError):
            rewarded("mine:full")(["a"], [Example("a", 0)])

    def test_a_broken_reward_ends_the_program_with_one_line(self, place, tmp_path, capsys):
        where = ["--data", str(place / "copa"), "--model", str(place / "llama"), "--out", str(tmp_path / "run")]
        own = f"reward={place / 'rewards.py'}:broken"
        assert gradientless("train", "--task", "copa", *where, "--optimizer", "mezo", *settings((own,))) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("reward: '")

    @pytest.mark.parametrize(
        ("own", "line"),
        [
            (("reward=shortest",), "reward: must be 'module:function' or 'file.py:function', got 'shortest'"),
            (("reward={rewards}:shrt",), "unknown function of"),
            (("loss=reward",), "reward: must name a 'module:function' for loss 'reward', got nothing"),
            (("reward={rewards}:short", "loss=lm"), "reward: must stand alone, got loss 'lm' too"),
            (("loss=f1",), "loss: must be lm, exact-match, token-f1 or reward for a task of kind generation, got 'f1'"),
        ],
    )
    def test_mistakes(self, place, own, line):
        own = [each.format(rewards=place / "rewards.py") for each in own]
        with pytest.raises(UserError, match=line):
            config_of(place, "squad", *own)

    def test_first_order_refuses_what_has_no_derivative(self, place):
        with pytest.raises(UserError, match="loss: must be differentiable for adamw, got 'token-f1'"):
            config_of(place, "squad", "loss=token-f1", optimizer="adamw")


def test_the_answers_likelihood_is_a_loss_of_classes_too(place, tmp_path):
    """The label word alone: the logarithm of its probability among all words, not among the labels."""
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"a film {i},{'yn'[i % 2]}\n" for i in range(20)), "utf-8")
    flags = {"data.path": str(table), "model": str(place / "llama"), "device": "cpu", "optimizer.name": "mezo"}
    own = ("loss=lm", "prompt.text='{text} It was'", "prompt.words={y=' great', n=' terrible'}")
    config = RunConfig.load(None, settings(own), flags)
    splits = load_splits(config)
    surface = make_surface(config, splits.labels, "cpu")
    rows = Rows(surface, splits.train, config, "train", loss_of("lm", None, "classification", splits.labels))
    objective = rows.objective(0, Noise(1))
    assert isinstance(objective, Objective)
    total, count = 0.0, 0
    for row in rows.batch(0):
        example = splits.train[int(row)]
        front = surface.tokenizer(f"{example.text} It was")["input_ids"]
        whole = surface.tokenizer(f"{example.text} It was{(' terrible', ' great')[example.label]}")["input_ids"]
        with torch.no_grad():
            logits = surface.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        total += sum(float(logits[at - 1, whole[at]]) for at in range(len(front), len(whole)))
        count += len(whole) - len(front)
    assert splits.labels == ("n", "y") and float(objective().detach()) == pytest.approx(-total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            ("surface.name=head",),
            r"surface: must read a prompt for a task of kind choice \(bias, full, .*\), got 'head'",
        ),
        (("surface.readout=head",), "got 'full' with readout 'head'"),
    ],
)
def test_surfaces_that_read_no_prompt_are_refused(place, own, line):
    config = config_of(place, "copa", *own)
    with pytest.raises(UserError, match=line):
        make_surface(config, (), "cpu")
