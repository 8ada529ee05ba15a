"""The plot, the closing table and published tables."""

from __future__ import annotations

import io
import json

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from gradientless.errors import UserError
from gradientless.run import report
from gradientless.run.runfolder import RunFolder

SUMMARY = {
    "metrics": {"accuracy": 0.7654321, "f1": 0.75, "loss": 0.512345},
    "forward_passes": 123456,
    "steps": 5000,
    "seconds": 12.34,
    "peak_memory_mib": 40.2,
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "my run", "task = 'sst2'\n")


@pytest.mark.parametrize("logged", [True, False])  # a first-order run keeps no log to replay
def test_close_shows_results_and_what_to_do_next(logged, folder):
    if logged:
        folder.trajectory.write_bytes(b"")
    for step in (1, 2):
        folder.append_metrics({"step": step, "split": "train", "forward_passes": step * 21, "loss": 0.7})
        folder.append_metrics(
            {"step": step, "split": "validation", "forward_passes": step * 21, "loss": 0.6 / step, "accuracy": 0.5}
        )
    shown = io.StringIO()
    report.close(folder, SUMMARY, Console(file=shown, width=60))
    text = shown.getvalue()
    for part in ("76.54%", "75.00%", "0.5123", "123,456", "5,000", "12.3 s", "40.2 MiB"):
        assert part in text
    assert f"gradientless predict '{folder.path}' '{report.SAMPLE}'" in text
    assert f"tensorboard --logdir '{folder.tensorboard}'" in text
    assert (f"gradientless replay '{folder.path}'" in text) == logged
    assert folder.plot.read_bytes().startswith(b"\x89PNG")


def test_seconds_include_features():
    assert ("seconds", "42.3 s") in report.closing_rows({**SUMMARY, "features_seconds": 30.0})


def test_no_plot_before_the_first_evaluation(folder):
    folder.append_metrics({"step": 1, "split": "train", "forward_passes": 21, "loss": 0.7})
    assert report.plot(folder) is False and not folder.plot.exists()


def test_the_plot_shows_accuracy_and_loss_of_the_evaluations(folder, monkeypatch):
    records = [(21, 0.7, 0.5), (42, 0.6, 0.75), (63, float("nan"), 0.5)]
    for step, (passes, loss, accuracy) in enumerate(records, 1):
        shared = {"step": step, "forward_passes": passes}
        folder.append_metrics({**shared, "split": "train", "loss": 9.0})
        folder.append_metrics({**shared, "split": "validation", "loss": loss, "accuracy": accuracy})
    drawn, titles = [], []
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **style: drawn.append((list(x), list(y))))
    title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axes, text: (titles.append(text), title(axes, text)))
    assert report.plot(folder) is True
    assert titles == ["validation accuracy", "validation loss"]
    assert drawn == [([21, 42, 63], [0.5, 0.75, 0.5]), ([21, 42], [0.7, 0.6])]


def test_a_loss_that_ran_away_leaves_a_gap(folder):
    nan = float("nan")
    folder.append_metrics({"step": 1, "split": "validation", "forward_passes": 1, "loss": nan, "accuracy": 0.5})
    assert report.plot(folder) is True


def test_markdown_table(tmp_path):
    files = []
    for seed, accuracy in enumerate((0.80, 0.82, 0.84)):
        files.append(tmp_path / f"summary-{seed}.json")
        files[-1].write_text(json.dumps({**SUMMARY, "metrics": {"accuracy": accuracy}}))
    table = report.markdown_table({"GLD": files, "AdamW": files[:1]})
    assert table.splitlines() == [
        "| method | steps | forward passes | validation accuracy | memory above the model | runs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| GLD | 5,000 | 123,456 | 82.00% ± 2.00 | 40 MiB | 3 |",
        "| AdamW | 5,000 | 123,456 | 80.00% | 40 MiB | 1 |",
    ]


def test_markdown_table_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="table: file not found"):
        report.markdown_table({"GLD": [tmp_path / "none.json"]})
    file = tmp_path / "summary.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="the summaries of 'GLD' must hold the number steps"):
        report.markdown_table({"GLD": [file]})
    with pytest.raises(UserError, match="must have at least one run"):
        report.markdown_table({"GLD": []})
