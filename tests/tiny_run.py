"""A whole run in seconds: a random BERT of width 16, and rows whose label one word decides. Needs no download."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "language"))

WORDS = {"positive": ("good", "bright"), "negative": ("bad", "dull")}
FILLERS = ("a", "the", "film", "plot", "was", "very")
SHARE = 0.6  # of rows that are positive: what guessing the larger class reaches


def gradientless(*arguments: str) -> int:
    """The exit code of the command line."""
    import pytest

    from gradientless import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


def make_model(folder: Path, seed: int = 5) -> str:
    """Save the body and its tokenizer into `folder`; returns it as text."""
    import torch
    import transformers
    from tiny_models import CONFIGS, make_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModel.from_config(CONFIGS["bert"]()).save_pretrained(folder)
    make_tokenizer(True).save_pretrained(folder)
    return str(folder)


def rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): some words of no meaning, and one that decides."""
    generator = random.Random(seed)
    made = []
    for i in range(count):
        label = "positive" if i < SHARE * count else "negative"
        words = [generator.choice(FILLERS) for _ in range(generator.randint(2, 5))]
        words.insert(generator.randrange(len(words) + 1), generator.choice(WORDS[label]))
        made.append((" ".join(words), label))
    generator.shuffle(made)
    return made


def write_table(file: Path, count: int = 300, seed: int = 0) -> str:
    """A CSV with the columns text and label; returns its path as text."""
    file.write_text(
        "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(count, seed)), encoding="utf-8"
    )
    return str(file)


def arguments(
    model: str, table: str, out: Path, *more: str, steps: int | None = 20, optimizer: str = "gld"
) -> list[str]:
    """The command line of a training run; `more` are further options and key=value settings."""
    usual = {"--data": table, "--model": model, "--max-length": "16", "--batch-size": "16", "--optimizer": optimizer}
    usual |= {"--device": "cpu", "--out": str(out)} | ({} if steps is None else {"--steps": str(steps)})
    options = [part for option, value in usual.items() if option not in more for part in (option, value)]
    often = [f"{key}_every={n}" for key, n in (("evaluate", 10), ("checkpoint", 10), ("log", 5))]
    given = {setting.partition("=")[0] for setting in more}
    often = [setting for setting in often if setting.partition("=")[0] not in given]
    return ["train", *options, "surface.pooling=mean", *often, *more]


METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GLD": ("gld", ("optimizer.radius=0.1", "optimizer.entries=2*width")),
    "options 2x2": ("gld", ("optimizer.radius=0.1", "optimizer.entries=2*width", "optimizer.options=[2, 2]")),
    "magnitude": (
        "gld",
        ("optimizer.radius=0.1", "optimizer.entries=2*width", "optimizer.selection=magnitude"),
    ),
    "Fisher": (
        "gld",
        (
            *("optimizer.radius=0.1", "optimizer.entries=2*width", "optimizer.selection=fisher"),
            *("optimizer.fisher_rows=8", "optimizer.reselect_every=70"),
        ),
    ),
    "AdamW": ("adamw", ("optimizer.lr=1e-2",)),
}
"""The methods that are killed and resumed: name -> optimizer, settings."""


def outcome(run: Path) -> dict[str, str]:
    """What two equal runs have alike: sha256 of weights, log of losses and metrics; what was said before and after."""
    files = [
        *run.glob("model/**/*.safetensors"),
        *run.glob("checkpoint-*/*.safetensors"),
        *run.glob("best-*/*.safetensors"),
    ]
    files += [run / "metrics.jsonl", *run.glob("trajectory.bin")]
    found = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        found |= {key: json.dumps(summary[key]) for key in ("before", "answers") if key in summary}
    return found


UNEVEN = ("log_every=7", "checkpoint_every=10", "evaluate_every=15")
"""Settings under which a checkpoint falls between two lines of the log."""


class Log:
    """The log of a run that may go on in another process, as seen from when this object was made."""

    def __init__(self, out: Path):
        self._file = out / "metrics.jsonl"
        self._before = self._identity()

    def reaches(self, step: int) -> bool:
        """Whether it was written since (a resumed run writes it anew) and holds a line of `step` or later."""
        if self._identity() == self._before:
            return False
        lines = self._file.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        return step == 0 or bool(whole and json.loads(whole[-1])["step"] >= step)

    def _identity(self) -> tuple[int, int] | None:
        if not self._file.exists():
            return None
        status = self._file.stat()
        return status.st_ino, status.st_mtime_ns
