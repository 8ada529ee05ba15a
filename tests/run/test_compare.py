"""compare: each method against a computation by hand, the table, what is not measured twice, mistakes."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import signal
import statistics
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from gradientless import cli
from gradientless.errors import UserError
from gradientless.language.prompting import with_demonstrations
from gradientless.language.splits import few_shot
from gradientless.language.tasks import Example, Prompt
from gradientless.run import untuned
from gradientless.run.compare import SPEAKER, Comparison, Method, compare, configurations, read_methods, usual
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits
from pages import ROOT, blocks

PROMPT = "Review: {text} Sentiment:"
WORDS = {"negative": "terrible", "positive": "great"}
TEXT = 'data = "films.csv"\nvalidation = "held.csv"\ntext = "Review: {text} Sentiment:"\nlabel = "label"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """task.toml of 24 training rows and 10 others; gpt2/, a random language model."""
    from tiny_models import make_language_model

    place = tmp_path_factory.mktemp("compare")
    words, fillers = {"negative": "dull", "positive": "bright"}, ("a film", "the plot", "very {good}")
    lines = [f"{fillers[i % 3]} {words[label]} {i},{label}" for i in range(17) for label in words]
    for name, part in (("films.csv", lines[:24]), ("held.csv", lines[24:])):
        (place / name).write_text("text,label\n" + "\n".join(part) + "\n", "utf-8")
    stated = "".join(f'{label} = "{word}"\n' for label, word in WORDS.items())
    (place / "task.toml").write_text(f"{TEXT}[words]\n{stated}", "utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, tokenizer = make_language_model("gpt2")
    model.config.n_positions = 64
    model.save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "gpt2")
    return place


def config_of(folder: Path, *overrides: str, model: str = "gpt2", length: int = 40) -> RunConfig:
    flags = {"task": str(folder / "task.toml"), "model": str(folder / model), "device": "cpu"}
    return RunConfig.load(None, overrides, {**flags, "data.max_length": length})


@torch.no_grad()
def logits_by_hand(folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits of the first tokens of the label words behind `texts`, by the library alone: [N, 2]."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "gpt2").eval()
    rows = []
    for text in texts:
        scores = []
        for word in WORDS.values():
            front = tokenizer(text)["input_ids"]
            whole = tokenizer(f"{text} {word}")["input_ids"]
            logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
            scores.append(sum(logits[at - 1, whole[at]] for at in range(len(front), len(whole))))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def centred(scores: torch.Tensor) -> torch.Tensor:
    """Scores up to what is common to the labels of a row."""
    return (scores - scores.mean(dim=1, keepdim=True)).float()


def prompts_by_hand(rows: list[Example]) -> list[str]:
    return [f"Review: {row.text} Sentiment:" for row in rows]


class TestUntuned:
    def test_zero_shot_is_the_models_answer(self, folder):
        config = config_of(folder)
        splits = load_splits(config)
        found = untuned.zero_shot(config, splits, {})
        by_hand = logits_by_hand(folder, prompts_by_hand(splits.validation))
        assert torch.allclose(centred(found.logits), centred(by_hand), atol=1e-4)
        assert found.forward_passes == 0 and found.seconds > 0

    @pytest.mark.parametrize("way", ["zero-shot", "calibrated", "icl"])
    def test_time_and_memory_are_those_of_reading(self, way, folder, monkeypatch):
        """A fifth of a second and 64 MiB each time that rows are read."""
        read = untuned.logits_of

        def heavy(*arguments):
            taken = torch.ones(64 << 18)
            time.sleep(0.2)
            return read(*arguments) * taken[0]

        monkeypatch.setattr(untuned, "logits_of", heavy)
        config, begin = config_of(folder), time.perf_counter()
        found = untuned.WAYS[way].use(config, load_splits(config), untuned.WAYS[way].options)
        assert 0.2 <= found.seconds <= time.perf_counter() - begin
        assert 64 <= found.peak_memory_mib < 400

    def test_calibrated_divides_by_the_answer_to_nothing(self, folder):
        config = config_of(folder)
        splits = load_splits(config)
        found = untuned.calibrated(config, splits, {"input": "N/A"})
        p = logits_by_hand(folder, prompts_by_hand(splits.validation)).softmax(dim=1)
        free = logits_by_hand(folder, ["Review: N/A Sentiment:"]).softmax(dim=1)
        wanted = (p / free) / (p / free).sum(dim=1, keepdim=True)
        assert torch.allclose(found.logits.softmax(dim=1).double(), wanted, atol=1e-5)
        assert not torch.allclose(p, wanted, atol=1e-2) and found.forward_passes == 1

    def test_icl_puts_answered_rows_in_front(self, folder):
        import transformers

        config = config_of(folder, "seed=21")
        splits = load_splits(config)
        rows = untuned.demonstrations(splits, 1, 21)
        assert sorted(row.label for row in rows) == [0, 1] and all(row in splits.train for row in rows)
        assert set(rows) == set(few_shot(splits, 1, 21).train)
        said = "".join(f"Review: {row.text} Sentiment: {list(WORDS.values())[row.label]}\n\n" for row in rows)
        texts = [said + text for text in prompts_by_hand(splits.validation)]

        surface = untuned.prompted(config, splits.labels)
        ((count, shown, _),) = untuned.in_context(surface.reading.encoder, rows, np.array([8]), 64)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2")
        encoded = shown.encode(splits.validation)
        assert count == 2
        for i, text in enumerate(texts):
            ids = tokenizer(text)["input_ids"]
            assert encoded.batch([i])["input_ids"][0, : len(ids)].tolist() == ids
        found = untuned.icl(config, splits, {"k": 1})
        assert torch.allclose(centred(found.logits), centred(logits_by_hand(folder, texts)), atol=1e-4)

    def test_demonstrations_differ_by_seed(self, folder):
        splits = load_splits(config_of(folder))
        assert untuned.demonstrations(splits, 3, 13) != untuned.demonstrations(splits, 3, 21)
        rows = untuned.demonstrations(splits, 3, 13)
        assert [row.label for row in rows] != sorted(row.label for row in rows)

    def test_demonstrations_leave_the_text_its_room(self, folder):
        config = config_of(folder, length=20)
        splits = load_splits(config)
        plain = untuned.prompted(config, splits.labels).reading.encoder
        rows = untuned.demonstrations(splits, 1, config.seed)
        long = Example("film " * 60, 0)
        before = plain.encode([long])
        ((_, shown, _),) = untuned.in_context(plain, rows, before.wholes, None)
        behind = shown.encode([long])
        assert before.lengths[0] <= 20 and before.cut == behind.cut == 1
        said = "".join(f"{text} {list(WORDS.values())[row.label]}\n\n"
                       for row, text in zip(rows, prompts_by_hand(rows), strict=True))  # fmt: skip
        assert behind.lengths[0] - before.lengths[0] == len(plain.tokenizer(said)["input_ids"])

    def test_demonstrations_without_positions_are_left_out(self, folder):
        """64 positions: the first of 12 demonstrations make room for the text, and longer texts see fewer of them."""
        config = config_of(folder)
        splits = load_splits(config)
        rows = [*splits.validation, Example("a film " * 12 + "bright", 1)]
        splits = replace(splits, validation=rows)
        shown = untuned.demonstrations(splits, 6, config.seed)
        plain = untuned.prompted(config, splits.labels).reading.encoder
        wholes, counts, texts = plain.encode(rows).wholes, {}, {}
        for count, encoder, part in untuned.in_context(plain, shown, wholes, 64):
            for i in part.tolist():
                said = shown[len(shown) - count :]
                front = "".join(f"{text} {list(WORDS.values())[row.label]}\n\n"
                                for row, text in zip(said, prompts_by_hand(said), strict=True))  # fmt: skip
                texts[i], counts[i] = front + prompts_by_hand([rows[i]])[0], count
                ids = plain.tokenizer(texts[i])["input_ids"]
                fill = max(map(len, encoder.words.fills))
                assert encoder.encode([rows[i]]).batch([0])["input_ids"][0, : len(ids)].tolist() == ids
                assert len(ids) + fill <= 64
                more = prompts_by_hand([shown[len(shown) - count - 1]])[0] + " great\n\n" + texts[i]
                assert len(plain.tokenizer(more)["input_ids"]) + fill > 63
        assert sorted(counts) == list(range(11)) and 0 < counts[10] < counts[0] < 12
        found = untuned.icl(config, splits, {"k": 6})
        by_hand = logits_by_hand(folder, [texts[i] for i in range(11)])
        assert torch.allclose(centred(found.logits), centred(by_hand), atol=1e-4)
        (note,) = found.notes
        assert note.startswith("shown       fewer than 12 demonstrations to 11 of 11 rows: ")
        assert note.endswith(f"{counts[10]} to {max(counts.values())} fit into the model's 64 positions")

    def test_linear_probe_is_scikit_learns(self, folder, tiny_model):
        import transformers
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        config = config_of(folder, "surface.pooling=mean", "batch_size=10", model=tiny_model, length=32)
        splits = load_splits(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
        body = transformers.AutoModel.from_pretrained(tiny_model).eval()

        def features(rows: list[Example]) -> np.ndarray:
            with torch.no_grad():
                ids = [tokenizer(row.text, return_tensors="pt")["input_ids"] for row in rows]
                return torch.cat([body(input_ids=each).last_hidden_state.mean(dim=1) for each in ids]).double().numpy()

        train = features(splits.train)
        scaler = StandardScaler().fit(train)
        fitted = LogisticRegression(max_iter=5000)
        fitted.fit(scaler.transform(train), [row.label for row in splits.train])
        wanted = fitted.predict_proba(scaler.transform(features(splits.validation)))
        found = untuned.linear_probe(config, splits, {})
        assert np.allclose(found.logits.softmax(dim=1).numpy(), wanted, atol=2e-3)
        assert found.forward_passes == 3  # 24 rows in batches of 10


def test_demonstrations_of_every_family():
    rows = [Example("so {dull}", 0, fields={"text": "so {dull}"}), Example("so bright", 1)]
    labels, words = ("no", "yes"), {"no": "bad", "yes": "good"}
    masked = with_demonstrations(Prompt("{text} It was {mask} .", words), "masked", rows, labels)
    new = Example("a film", 0)
    before = "so {dull} It was bad .\n\nso bright It was good .\n\n"
    assert masked.render(new, "[MASK]") == before + "a film It was [MASK] ."
    bare = with_demonstrations(Prompt("{text} It was", words), "causal", rows[1:], labels)
    assert bare.render(new) == "so bright It was good\n\na film It was"
    own = with_demonstrations(Prompt("{text}: {label}", {**words, "yes": "\tgood"}), "causal", rows[1:], labels)
    assert own.render(new, "x") == "so bright:\tgood\n\na film: x"


def test_too_few_rows_for_the_demonstrations(folder):
    splits = load_splits(config_of(folder))
    with pytest.raises(UserError) as told:
        untuned.demonstrations(splits, 13, 0)
    wanted = "icl: k must be <= the training rows of every class, got 13 and negative 12, positive 12"
    assert str(told.value) == wanted


# --- the whole -------------------------------------------------------------------------------------------------------

TUNING = ("batch_size=4", "evaluate_every=4", "checkpoint_every=4", "log_every=2", "data.max_length=40")
SETTINGS = ("mezo:optimizer.lr=1e-4", "icl:k=1", "probe:surface.pooling=last", *TUNING)
NAMES = ("zero-shot", "icl", "probe=linear-probe", "mezo", "adamw")


def ask(folder: Path, names=NAMES, settings=SETTINGS, seeds=(13, 21), passes: int | None = 18):
    flags = {
        "task": str(folder / "task.toml"),
        "model": str(folder / "gpt2"),
        "device": "cpu",
        "forward_passes": passes,
    }
    methods, shared = read_methods(names, settings)
    return methods, configurations(methods, seeds, None, shared, flags)


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    os.environ["GRADIENTLESS_CACHE"] = str(out.parent / "cache")
    return out, compare(*ask(folder), out, Console(quiet=True))


class TestTable:
    def test_results_are_those_of_the_methods(self, folder, compared):
        _, found = compared
        assert list(found.results) == ["zero-shot", "icl", "probe", "mezo", "adamw"]
        config = config_of(folder, "seed=21")
        splits = load_splits(config)
        gold = np.array([row.label for row in splits.validation])
        scored = found.results["zero-shot"][1]
        predicted = untuned.zero_shot(config, splits, {}).logits.argmax(dim=1).numpy()
        assert scored["metrics"]["accuracy"] == np.mean(predicted == gold) and scored["seed"] == 21
        passes = {name: [each["forward_passes"] for each in results] for name, results in found.results.items()}
        assert passes == {"zero-shot": [0, 0], "icl": [0, 0], "probe": [6, 6], "mezo": [18, 18], "adamw": [18, 18]}

    def test_a_run_of_its_own_for_every_seed(self, compared):
        out, found = compared
        for name in ("mezo", "adamw"):
            for result in found.results[name]:
                run = out / f"{name}-seed{result['seed']}"
                summary = json.loads((run / "summary.json").read_text())
                assert result["metrics"] == summary["metrics"] and summary["forward_passes"] == 18
                config = RunConfig.load(run / "config.toml")
                assert config.seed == result["seed"] and config.surface.name == "full"
        assert RunConfig.load(out / "mezo-seed13" / "config.toml").optimizer.arguments["lr"] == 1e-4

    def test_mean_and_deviation(self):
        def result(accuracy: float, passes: int) -> dict[str, object]:
            rest = {"forward_passes": passes, "seconds": 1.25, "peak_memory_mib": 2.5}
            return {"metrics": {"accuracy": accuracy, "f1": accuracy / 2}, **rest}

        about = {"task": "t", "model": "m", "seeds": [1, 2], "split": "test", "rows": 1000, "f1_means": "f1 (macro)"}
        found = Comparison({"one": [result(0.5, 1000), result(0.7, 1002)], "two": [result(0.25, 0)]}, about)
        head, _, one, two, _, caption = found.markdown().splitlines()
        assert head == "| method | accuracy, % | F1, % | forward passes | time, s | peak memory, MiB | runs |"
        assert one == "| one | 60.00 (14.14) | 30.00 (7.07) | 1,001 | 1.2 | 2.5 | 2 |"
        assert two == "| two | 25.00 | 12.50 | 0 | 1.2 | 2.5 | 1 |"
        assert caption.startswith("t with m: mean (standard deviation) over seeds 1, 2, scored on 1,000 test rows; f1")

    def test_text_and_json(self, compared, folder):
        out, found = compared
        data = json.loads((out / "compare.json").read_text())
        assert data == json.loads(json.dumps(found.data()))
        assert (data["split"], data["rows"], data["seeds"]) == ("validation", 10, [13, 21])
        text = (out / "compare.md").read_text()
        head, _, *rows, _, caption = text.splitlines()
        titles = ["method", "accuracy, %", "F1, %", "forward passes", "time, s", "peak memory, MiB", "runs"]
        assert [cell.strip() for cell in head.strip("|").split("|")] == titles
        values = [100 * each["metrics"]["accuracy"] for each in data["results"]["mezo"]]
        mean = f"{statistics.fmean(values):.2f} ({statistics.stdev(values):.2f})"
        (row,) = [row for row in rows if row.startswith("| mezo")]
        assert row.split("|")[2].strip() == mean and row.split("|")[4].strip() == "18"
        assert "a backward pass counts as two" in caption and "10 validation rows, on which tuned methods" in caption
        console = Console(record=True, width=200, quiet=False, file=io.StringIO())
        found.show(console)
        shown = console.export_text()
        assert all(
            part in shown for part in ("zero-shot", "probe", mean, "mean (standard deviation) over seeds 13, 21")
        )


def test_time_counts_the_features(folder, tiny_model, tmp_path):
    """As the linear probe's does, a head's on a frozen body begins at the loaded model."""
    flags = {"task": str(folder / "task.toml"), "model": tiny_model, "device": "cpu", "forward_passes": 6}
    methods, shared = read_methods(("head=adamw",), ("surface.name=head", "data.max_length=32", "batch_size=4"))
    found = compare(methods, configurations(methods, (3,), None, shared, flags), tmp_path, Console(quiet=True))
    summary = json.loads((tmp_path / "head-seed3" / "summary.json").read_text("utf-8"))
    assert 0 < summary["features_seconds"] <= summary["wall_seconds"]
    (result,) = found.results["head"]
    assert result["seconds"] == pytest.approx(summary["seconds"] + summary["features_seconds"], abs=2e-3)
    assert "on a frozen body, its features" in found.caption()


def test_what_stood_before_a_method_is_freed_before_it(folder, tmp_path, monkeypatch):
    """Else it would count as a part of the loaded model, and what takes its place as nothing."""

    class Circle:
        pass

    def train(*_, **__):
        seen.append(left())
        metrics = {"accuracy": 0.5, "f1": 0.5, "loss": 1.0}
        costs = {"forward_passes": 1, "seconds": 1.0, "features_seconds": 0.0, "peak_memory_mib": 1.0}
        return {"metrics": metrics, "texts_cut": {}, **costs}

    monkeypatch.setattr("gradientless.run.compare.train", train)
    seen: list[object] = []
    gc.disable()
    try:
        one = Circle()
        one.itself, left = one, weakref.ref(one)
        del one
        compare(*ask(folder, ("mezo",), TUNING, (13,)), tmp_path, Console(quiet=True))
    finally:
        gc.enable()
    assert seen == [None]


class TestGoingOn:
    def test_what_is_there_is_not_measured_again(self, folder, compared, monkeypatch):
        out, found = compared
        for name in ("train", "evaluate_folder"):
            monkeypatch.setattr(f"gradientless.run.compare.{name}", None)
        monkeypatch.setattr(untuned, "_surface", None)
        assert compare(*ask(folder), out, Console(quiet=True)).data() == found.data()
        fewer = compare(*ask(folder, ("icl", "zero-shot"), ("icl:k=1", *TUNING), (21,), None), out, Console(quiet=True))
        assert fewer.results == {name: [found.results[name][1]] for name in ("icl", "zero-shot")}

    def test_a_run_goes_on_where_it_stood(self, folder, tmp_path, monkeypatch):
        from gradientless.run.train import Run

        asked = ask(folder, ("mezo",), ("mezo:optimizer.lr=1e-4", *TUNING), (13,))
        taken: list[int] = []
        step = Run.step

        def counted(self, t, logged):
            taken.append(t)
            if len(taken) == 7:
                raise KeyboardInterrupt
            return step(self, t, logged)

        monkeypatch.setattr(Run, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            compare(*asked, tmp_path, Console(quiet=True))
        compare(*asked, tmp_path, Console(quiet=True))
        assert taken == [*range(7), *range(4, 8)]  # from the checkpoint of step 4

    def test_other_settings_are_refused(self, folder, compared):
        out, _ = compared
        cases = [
            (("icl",), ("icl:k=2", *TUNING), "icl, seed 13: k: 2 here, 1 there"),
            (("mezo",), ("mezo:optimizer.lr=1e-5", *TUNING), "mezo, seed 13: optimizer.lr: 1e-05 here, 0.0001 there"),
            (("zero-shot=icl",), TUNING, "zero-shot, seed 13: icl here, zero-shot there; k: 2 here, nothing there"),
        ]
        for names, settings, line in cases:
            with pytest.raises(UserError) as told:
                compare(*ask(folder, names, settings), out, Console(quiet=True))
            assert str(told.value) == f"--out: must hold results of the same settings, got {line}"

    def test_the_same_answer_is_not_asked_for_twice(self, folder, tmp_path, monkeypatch):
        calls = []
        surface = untuned._surface
        monkeypatch.setattr(untuned, "_surface", lambda *given: calls.append(1) or surface(*given))
        compare(*ask(folder, ("zero-shot", "icl"), ("icl:k=1", *TUNING), (1, 2), None), tmp_path, Console(quiet=True))
        assert len(calls) == 3  # zero-shot once, icl for each seed


def test_test_rows_are_what_a_drawn_split_is_scored_on(folder, tmp_path):
    settings = ("data.few_shot=4", *TUNING, "adamw:optimizer.lr=1e-2")
    found = compare(*ask(folder, ("zero-shot", "adamw"), settings, (13,), 12), tmp_path, Console(quiet=True))
    assert (found.about["split"], found.about["rows"]) == ("test", 10) and "chose" not in found.caption()
    from gradientless.run.evaluation import evaluate_folder

    config = RunConfig.load(tmp_path / "adamw-seed13" / "config.toml")
    by_hand = evaluate_folder(tmp_path / "adamw-seed13", load_splits(config), "test", device="cpu")
    metrics = found.results["adamw"][0]["metrics"]
    assert {"accuracy", "f1", "loss"} <= set(metrics) and metrics == {key: by_hand[key] for key in metrics}


class TestMistakes:
    @pytest.mark.parametrize(
        ("names", "settings", "line"),
        [
            (["zeroshot"], [], "methods: unknown method 'zeroshot'; did you mean 'zero-shot'? Known: adam"),
            (["icl", "icl"], [], "methods: must have names of their own, such as mine=icl, got 'icl' twice"),
            ([], [], "methods: must name at least one, got none"),
            (["icl"], ["icll:k=2"], "methods: unknown method 'icll'; did you mean 'icl'? Known: icl"),
            (["icl"], ["icl:k=0"], "icl:k: must be a whole number >= 1, got 0"),
            (["icl"], ["icl:k=two"], "icl:k: must be a whole number >= 1, got 'two'"),
            (["zero-shot"], ["zero-shot:optimizer.lr=1"], "zero-shot: unknown setting 'optimizer.lr'"),
            (["icl"], ["icl:seed=2"], "icl:seed: must be the same for every method, got one for 'icl' alone"),
            (["mezo"], ["mezo:data.few_shot=2"], "mezo:data.few_shot: must be the same for every method"),
        ],
    )
    def test_one_line(self, names, settings, line):
        with pytest.raises(UserError) as told:
            read_methods(names, settings)
        assert str(told.value).startswith(line) and "\n" not in str(told.value)

    def test_lines_say_whose_they_are(self, folder):
        with pytest.raises(UserError) as told:
            ask(folder, ("zero-shot", "mezo", "adamw"), ("mezo:optimizer.lrr=1", "batch_size=0"), passes=None)
        lines = str(told.value).split("\n")
        assert "batch_size: must be >= 1, got 0" in lines
        assert any(line.startswith("mezo: optimizer: unknown option of mezo 'lrr'") for line in lines)
        with pytest.raises(UserError) as told:
            ask(folder, ("zero-shot", "mezo"), passes=None, settings=())
        assert str(told.value) == "mezo: --forward-passes: must be given for methods that tune, got nothing"

    def test_a_method_that_the_model_cannot_do_is_named(self, folder, tiny_model, tmp_path):
        flags = {"task": str(folder / "task.toml"), "model": tiny_model, "device": "cpu", "data.max_length": 16}
        methods, shared = read_methods(["zero-shot"], [])
        with pytest.raises(UserError) as told:
            compare(methods, configurations(methods, [1], None, shared, flags), tmp_path, Console(quiet=True))
        assert str(told.value).startswith("zero-shot: ") and "\n" not in str(told.value)

    def test_settings_of_one_win_over_those_of_all(self, folder):
        settings = ("optimizer.lr=1e-3", "b:optimizer.lr=1e-5", *TUNING)
        methods, configs = ask(folder, ("mezo", "b=mezo", "zero-shot"), settings)
        assert methods[1] == Method("b", "mezo", ("optimizer.lr=1e-5",))
        assert [configs[label][0].optimizer.arguments["lr"] for label in ("mezo", "b")] == [1e-3, 1e-5]


class TestCommand:
    def run(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *arguments])
        return ended.value.code or 0

    def test_prints_and_saves(self, folder, tmp_path, capsys):
        what = ["--task", str(folder / "task.toml"), "--model", str(folder / "gpt2"), "--device", "cpu"]
        how = ["--methods", "zero-shot, calibrated", "--seeds", "1,2", "--out", str(tmp_path / "new" / "out")]
        assert self.run(*what, *how, "data.max_length=40") == 0
        told = capsys.readouterr().out
        assert "calibrated" in told and "compare.md" in told
        assert json.loads((tmp_path / "new" / "out" / "compare.json").read_text())["seeds"] == [1, 2]

    def test_the_commands_of_the_documentation_are_understood(self, monkeypatch, tmp_path):
        asked = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("gradientless.run.compare.compare", lambda *given: asked.append(given) or exit(7))
        commands = [block.text for block in blocks(ROOT / "docs" / "compare.md") if block.language == "sh"]
        for command in commands:
            words = shlex.split(command.replace("\\\n", " "))
            assert words[:2] == ["gradientless", "compare"] and self.run(*words[2:]) == 7
        (first, configs, _), (second, others, _), (_, starters, _), (_, masked, _), (_, causal, _) = asked
        assert [method.label for method in first][-2:] == ["mezo", "adamw"] and first[2].options == {"k": 4}
        assert configs["mezo"][2].seed == 42 and configs["mezo"][0].optimizer.arguments == {"lr": 1e-6}
        assert [method.label for method in second] == ["linear-probe", "head", "gld", "from-probe"]
        assert others["head"][0].surface.name == "head" and others["from-probe"][0].surface.start == "probe"
        assert starters["mezo"][0].forward_passes == 302 and starters["minilm-head"][0].model == "starter:minilm"
        assert masked["mezo"][4].seed == 100 and masked["adamw"][0].batch_size == 8
        assert causal["mezo"][0].optimizer.arguments == {"rank": 1, "lr": 1e-7} and causal["icl"][0].dtype == "float16"

    def test_a_stop_signal_says_how_to_go_on(self, folder, tmp_path, capsys, monkeypatch):
        from gradientless.run.train import Run

        step = Run.step

        def interrupted(self, t, logged):
            if t == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, t, logged)

        monkeypatch.setattr(Run, "step", interrupted)
        what = ["--task", str(folder / "task.toml"), "--model", str(folder / "gpt2"), "--device", "cpu"]
        how = ["--methods", "mezo", "--forward-passes", "18", "--out", str(tmp_path / "out"), *TUNING]
        assert self.run(*what, *how) == cli.STOPPED
        told = capsys.readouterr().err
        assert f"stopped at step 3; continue with the same command and --out {tmp_path / 'out'}" in told

    def test_a_folder_that_cannot_be_written(self, folder, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert self.run("--task", str(folder / "task.toml"), "--out", str(tmp_path / "file" / "out")) == 2
        assert capsys.readouterr().err.startswith("--out: must be a folder that can be written, got")

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--methods", "mezzo"], "methods: unknown method 'mezzo'; did you mean 'mezo'?"),
            (["--seeds", "1,x"], "--seeds: must be different whole numbers >= 0 with commas between them, got '1,x'"),
            (["--seeds", "1,1"], "--seeds: must be different whole numbers"),
            (
                ["--task", "squad", "--methods", "mezo", "--forward-passes", "9", "loss=accuracy"],
                "loss: must be lm, exact-match, token-f1 or reward for a task of kind generation, got 'accuracy'",
            ),
            (["--task", "sst-2"], "task: unknown task 'sst-2'; did you mean 'sst2'?"),
        ],
    )
    def test_mistakes_end_with_one_line(self, arguments, line, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.run(*arguments) == 2
        told = capsys.readouterr()
        assert told.err.startswith(line) and told.err.count("\n") == 1 and told.out == ""


class TestUnasked:
    """What a comparison takes that names no model or no methods."""

    WORDS = "zero-shot, calibrated, icl"

    def test_without_a_model_it_is_one_that_says_words(self, monkeypatch):
        monkeypatch.setattr("gradientless.language.starter.ensure", lambda *_: pytest.fail("nothing is fetched yet"))
        names, flags, notes = usual(None, None, [], {"task": "sst2", "model": None})
        assert names == list(untuned.WAYS) and flags["model"] == SPEAKER
        assert notes == [f"model       {SPEAKER}, taken unasked: {self.WORDS} ask it for words"]
        assert usual(["icl"], None, [], {"task": "sst2"})[1]["model"] == SPEAKER
        assert usual(["linear-probe", "a=mezo"], None, [], {"task": "sst2"})[1:] == ({"task": "sst2"}, [])

    @pytest.mark.parametrize("given", ["setting", "flag"])
    def test_an_encoder_that_says_none_is_probed(self, given, tiny_model):
        settings, flags = ([f"model={tiny_model}"], {}) if given == "setting" else ([], {"model": tiny_model})
        names, _, notes = usual(None, None, settings, {"task": "sst2", **flags})
        assert names == ["linear-probe"]
        told = f"'{tiny_model}' has no output layer that says words"
        assert notes == [f"methods     linear-probe, taken unasked; not {self.WORDS}: {told}"]

    def test_a_table_without_a_prompt_is_probed(self, folder):
        flags = {"data.path": str(folder / "films.csv"), "model": str(folder / "gpt2")}
        names, _, (note,) = usual(None, None, [], flags)
        assert names == ["linear-probe"] and note.endswith("there is no prompt for a causal model")
        text = ["prompt.text='{text} is'", "prompt.words.dull=bad", "prompt.words.bright=good"]
        assert usual(None, None, text, flags)[::2] == (list(untuned.WAYS), [])

    @pytest.mark.parametrize(
        ("task", "names"), [("copa", ["zero-shot", "calibrated", "icl"]), ("squad", ["zero-shot", "icl"])]
    )
    def test_rows_without_classes(self, task, names, folder):
        assert usual(None, None, [], {"task": task, "model": str(folder / "gpt2")})[0] == names

    def test_what_is_asked_for_stays(self, tiny_model):
        assert usual(["zero-shot"], None, [], {"task": "sst2", "model": tiny_model})[::2] == (["zero-shot"], [])

    def test_the_command_runs_and_says_so(self, tiny_model, folder, tmp_path, capsys):
        files = ["--task", str(folder / "task.toml"), "--model", tiny_model, "data.max_length=16"]
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *files, "--out", str(tmp_path / "out")])
        assert not ended.value.code
        told = capsys.readouterr()
        assert told.err.startswith("methods     linear-probe, taken unasked") and "linear-probe" in told.out
