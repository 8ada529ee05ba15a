"""What a run and `eval` tell of themselves: figures that a constant answer cannot raise, and of which rows they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny_run
from gradientless.errors import UserError
from gradientless.language.tasks import Example, Splits
from gradientless.run.config import RunConfig
from gradientless.run.losses import loss_of, weights_of
from gradientless.run.report import class_lines, figure_rows
from gradientless.run.train import Run
from gradientless.schema import SEALS, read_sealed, sealed
from tiny_run import gradientless

GLD = ("optimizer.radius=0.1",)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_run.make_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv")


@pytest.fixture
def train(model, rows, tmp_path):
    """train(settings, …) -> the run's folder, after a run that ended well."""

    def run(*more: str, **options: Any) -> Path:
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / "run", *more, **options)) == 0
        return tmp_path / "run"

    return run


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


def told(text: str) -> str:
    return " ".join(text.split())


class TestAConstantAnswer:
    def test_is_called_one(self, train, capsys):
        """A run that moves nothing says the same of every row."""
        run = train("optimizer.radius=1e-9", steps=20)
        said, summary = told("".join(capsys.readouterr())), summary_of(run)
        assert summary["metrics"]["mcc"] == 0.0 and summary["metrics"]["balanced_accuracy"] == 0.5
        (label,) = [name for name, of in summary["classes"].items() if of["predicted"]]
        assert f"every validation row was predicted '{label}' (the largest class is 60.00% of them)" in said
        assert "try class_weights=balanced, best=mcc" in said
        assert "the training loss stayed where it began" in said and "try optimizer.radius three to ten times" in said
        assert summary["majority"] == {"label": "positive", "share": 0.6}
        assert sum(map(sum, summary["confusion"])) == 30

        assert gradientless("eval", str(run)) == 0
        shown = told(capsys.readouterr().out)
        assert ", largest class 60.00%" in shown and "mcc 0.0000" in shown and "balanced accuracy 50.00%" in shown
        assert "class rows predicted precision recall f1 negative 12 " in shown and "class \\ predicted" in shown
        assert f"every row was predicted '{label}': no class is told from another" in shown

    def test_a_run_that_learned_is_not(self, train, capsys):
        summary = summary_of(train(*GLD, steps=150))
        said = told("".join(capsys.readouterr()))
        assert summary["remarks"] == [] and "every validation row" not in said and "stayed where it began" not in said
        assert summary["metrics"]["mcc"] > 0.5 and f"mcc {summary['metrics']['mcc']:.4f}" in said
        right = sum(summary["confusion"][i][i] for i in range(2))
        assert right / 30 == pytest.approx(summary["metrics"]["accuracy"])

    def test_a_loss_that_rose_is_told_with_the_other_advice(self, train, capsys):
        train("optimizer.lr=30", optimizer="sgd", steps=20)
        assert "the training loss rose" in (said := told("".join(capsys.readouterr())))
        assert "optimizer.lr three to ten times as small (it was 30)" in said

    @pytest.mark.parametrize("best", ["mcc", "balanced_accuracy"])
    def test_the_best_may_be_what_it_cannot_raise(self, best, train):
        run = train(*GLD, f"best={best}", steps=60)
        summary, records = summary_of(run), [json.loads(line) for line in (run / "metrics.jsonl").open()]
        found = {r["step"]: r[best] for r in records if r["split"] == "validation"}
        assert summary["best"] == best and found[summary["model_step"]] == max(found.values())
        assert summary["metrics"][best] == max(found.values())


class TestWhatTheyAreFiguresOf:
    def test_rows_that_chose_the_checkpoint_are_told(self, train, capsys):
        run = train(*GLD, steps=30)
        step = summary_of(run)["model_step"]
        assert f"the validation rows, which also chose step {step} among 3 evaluations" in told(
            "".join(capsys.readouterr())
        )
        assert summary_of(run)["chosen_among"] == 3

    def test_rows_to_test_on_choose_nothing(self, train, tmp_path, capsys):
        file = tiny_run.write_table(tmp_path / "test.csv", count=90, seed=8)
        run = train(*GLD, "--test", file, steps=40)
        said, summary = told("".join(capsys.readouterr())), summary_of(run)
        assert "those of the test rows chose nothing" in said and summary["test"]["rows"] == 90
        assert f"test accuracy {100 * summary['test']['accuracy']:.2f}%, largest class 60.00%" in said
        for how in (["--split", "test"], ["--data", file]):
            assert gradientless("eval", str(run), "--json", *how) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-5)
            assert (found["rows"], found["confusion"]) == (90, summary["test"]["confusion"])

    def test_a_missing_file_to_test_on_ends_the_run_before_it_begins(self, model, rows, tmp_path, capsys):
        more = [*GLD, "--test", str(tmp_path / "none.csv")]
        assert gradientless(*tiny_run.arguments(model, rows, tmp_path / "run", *more)) == 2
        assert "file not found" in capsys.readouterr().err and not (tmp_path / "run").exists()

    def test_a_file_is_scored_whole(self, train, tmp_path, capsys, monkeypatch):
        """By a run, by what was exported of it, from elsewhere; with the columns that it was tuned on."""
        own, few = tmp_path / "own.csv", tmp_path / "few.csv"
        body = "".join(f"{text},{label}\n" for text, label in tiny_run.rows(60, seed=2))
        own.write_text("review,verdict\n" + body)
        few.write_text("review,verdict\nthe film was good,positive\n")  # nothing could be split off
        columns = ["--text-column", "review", "--label-column", "verdict"]
        run = train(*GLD, "--data", str(own), *columns, steps=10)
        assert gradientless("export", str(run), "--out", str(tmp_path / "tuned")) == 0
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        for place in (run, tmp_path / "tuned", run / "model"):
            for file, count in ((own, 60), (few, 1)):
                assert gradientless("eval", str(place), "--data", file.name, "--json") == 0
                found = json.loads(capsys.readouterr().out)
                assert (found["split"], found["rows"]) == (f"all of {file.name}", count)
        assert gradientless("eval", str(run), "--data", own.name, "--split", "train", "--json") == 0
        assert json.loads(capsys.readouterr().out)["rows"] == 54

    def test_a_file_with_another_label_is_refused(self, train, tmp_path, capsys):
        run, other = train(*GLD, steps=10), tmp_path / "other.csv"
        other.write_text("text,label\ngood,positive\nbad,dull\n")
        capsys.readouterr()
        assert gradientless("eval", str(run), "--data", str(other)) == 2
        line = "data: labels must be those of the model (negative, positive), got 'dull'"
        assert capsys.readouterr().err == f"{line}\n"

    def test_of_a_task_the_files_columns_are_the_tasks(self, model, tmp_path, capsys):
        task, file = tmp_path / "mine.toml", tmp_path / "rows.csv"
        task.write_text('data = "rows.csv"\ntext = "{text} It was"\n[words]\nnegative = "bad"\npositive = "good"\n')
        tiny_run.write_table(file, count=40)
        settings = ["--task", str(task), "--model", model, "--max-length", "16", "--steps", "4", "surface.name=head"]
        assert gradientless("train", *settings, "--out", str(tmp_path / "run"), "--device", "cpu") == 0
        capsys.readouterr()
        assert gradientless("eval", str(tmp_path / "run"), "--data", str(file), "--json") == 0
        assert json.loads(capsys.readouterr().out)["rows"] == 40

    @pytest.mark.parametrize("rows_", [{"pairs": 1}, {"text_column": None}, ["text"], "x"])
    def test_a_note_of_other_types_is_one_line(self, rows_, train, capsys):
        run = train(*GLD, steps=10)
        note = run / "model" / "gradientless.json"
        values = {key: value for key, value in read_sealed(note, "model").items() if key not in SEALS}
        note.write_text(json.dumps(sealed({**values, "rows": rows_})))
        capsys.readouterr()
        assert gradientless("eval", str(run / "model"), "--data", "x.csv") == 2
        assert "must state " in (said := capsys.readouterr().err) and said.count("\n") == 1

    def test_one_evaluation_chooses_nothing(self, train, capsys):
        run = train(*GLD, "evaluate_every=20", steps=20)
        assert "also chose" not in told("".join(capsys.readouterr())) and summary_of(run)["chosen_among"] == 1


class TestDivergence:
    def test_ends_the_run_with_the_best_weights(self, train, capsys, monkeypatch):
        """The first steps learn; then the loss leaves."""
        step = Run.step
        gone = lambda run, t, logged: step(run, t, logged) if t < 12 else 4e15  # noqa: E731
        monkeypatch.setattr(Run, "step", gone)
        run = train(*GLD, steps=400)
        said, summary = told("".join(capsys.readouterr())), summary_of(run)
        assert summary["ended"] == "diverged" and summary["steps"] == 25  # logs of 15, 20 and 25
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        found = [r["accuracy"] for r in records if r["split"] == "validation"]
        assert summary["metrics"]["accuracy"] == max(found) and (run / "model").is_dir()
        assert "the run diverged and was ended at step 25 of 400: its training loss went from 0." in said
        kept = f"the weights kept are those of the evaluation at step {summary['model_step']}; lower optimizer.radius"
        assert f"{kept} (it was 0.1) three to ten times" in said
        assert gradientless("train", "--out", str(run), "--resume") == 0
        assert "has ended already" in capsys.readouterr().err

    def test_a_loss_that_comes_back_does_not(self, train, monkeypatch):
        step = Run.step
        monkeypatch.setattr(
            Run, "step", lambda run, t, logged: 4e15 if 10 <= t < 20 else step(run, t, logged)
        )  # of two logs
        assert summary_of(train(*GLD, steps=60))["ended"] == "steps"


class TestClassWeights:
    SPLITS = Splits([Example("a", 0)] * 6 + [Example("b", 1)] * 2, [], [], ("no", "yes"))

    def test_balanced_is_scikit_learns(self):
        from sklearn.utils.class_weight import compute_class_weight

        wanted = compute_class_weight("balanced", classes=np.array([0, 1]), y=[0] * 6 + [1] * 2)
        assert weights_of("balanced", self.SPLITS).tolist() == pytest.approx(wanted.tolist()) == [8 / 12, 2.0]
        assert weights_of({"yes": 5}, self.SPLITS).tolist() == [1.0, 5.0] and weights_of(None, self.SPLITS) is None

    def test_the_loss_is_torchs_and_its_parts_add_up(self):
        weights = torch.tensor([0.5, 3.0])
        loss = loss_of("cross-entropy", None, "classification", ("no", "yes"), weights)
        scores, labels = torch.randn(6, 2, generator=torch.manual_seed(1)), torch.tensor([0, 0, 1, 0, 1, 0])
        whole = loss.of(scores, labels)
        assert float(whole) == pytest.approx(float(cross_entropy(scores, labels, weight=weights)))
        assert loss.weight is not None and loss.differentiable
        parts = [float(loss.of(scores[p], labels[p])) * loss.weight(labels[p]) for p in (slice(0, 2), slice(2, 6))]
        assert sum(parts) / loss.weight(labels) == pytest.approx(float(whole))

    @pytest.mark.parametrize("optimizer", ["gld", "adamw"])
    def test_a_run_is_given_them(self, optimizer, train, capsys):
        rate = "optimizer.radius=0.1" if optimizer == "gld" else "optimizer.lr=1e-2"
        summary_of(train(rate, "class_weights=balanced", optimizer=optimizer, steps=10))
        assert "weights negative 1.25, positive 0.833" in told("".join(capsys.readouterr()))

    def test_a_heavy_class_is_said_of_everything(self, train):
        run = train("class_weights.negative=1e4", "optimizer.lr=1e-2", optimizer="adamw", steps=30)
        assert summary_of(run)["classes"]["negative"]["predicted"] == 30

    @pytest.mark.parametrize(
        ("settings", "line"),
        [
            (["class_weights.positive=0"], 'class_weights: must be "balanced" or a table of label = weight > 0'),
            (["class_weights=equal"], 'class_weights: must be "balanced" or a table of label = weight > 0'),
            (["class_weights=balanced", "loss=f1"], "class_weights: must stand with loss 'cross-entropy'"),
            (["class_weights=balanced", "task=copa"], "class_weights: must stand with loss 'cross-entropy'"),
            (["class_weights=balanced", "surface.readout=tokens"], "class_weights: must stand with classes"),
            (["task=copa", "best=mcc"], "best: must be accuracy, f1 or loss for a task of kind choice, got 'mcc'"),
        ],
    )
    def test_refused(self, settings, line):
        with pytest.raises(UserError) as refused:
            RunConfig.load(None, settings)
        assert str(refused.value).startswith(line) and "\n" not in str(refused.value)

    def test_an_unknown_label_is_refused(self):
        with pytest.raises(UserError, match="class_weights: unknown label 'yess'; did you mean 'yes'"):
            weights_of({"yess": 2.0}, self.SPLITS)


def test_of_many_classes_the_worst_are_shown():
    classes = {
        f"c{i}": {"rows": int(i != 3), "predicted": 1, "precision": 1.0, "recall": 1.0, "f1": 1 - i / 100}
        for i in range(14)
    }
    head, *lines, rest = class_lines({"classes": classes, "confusion": [[0] * 14] * 14})
    assert head.split() == ["class", "rows", "predicted", "precision", "recall", "f1"]
    assert [line.split()[0] for line in lines] == [f"c{i}" for i in range(13, 3, -1)]
    assert rest.startswith("and 3 classes with a higher f1")


def test_figures_as_people_read_them():
    found = {"accuracy": 0.95, "mcc": 0.0, "rows": 40, "majority": {"label": "a", "share": 0.95}, "classes": {}}
    assert figure_rows(found) == [("accuracy", "95.00%, largest class 95.00%"), ("mcc", "0.0000"), ("rows", "40")]
