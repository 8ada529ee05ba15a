"""The documented optimizer of one's own, trained from the command line by its file's name, and replayed."""

from __future__ import annotations

import pytest

from gradientless import cli
from pages import ROOT, blocks


def test_the_documented_optimizer_trains_and_replays(table, tiny_model, tmp_path, monkeypatch, capsys):
    (file,) = [block for block in blocks(ROOT / "docs" / "api.md") if block.note == "mine.py"]
    (tmp_path / "mine.py").write_text(file.text, "utf-8")
    monkeypatch.chdir(tmp_path)
    data = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    method = ["--optimizer", "mine.py:BestOfK", "optimizer.radius=2e-2", "optimizer.candidates=8", "--steps", "6"]
    for command in (["train", *data, *method, "--max-length", "16", "--out", "own"], ["replay", "own"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert not ended.value.code
    assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())
