"""Every task end to end on local rows: zero-shot, and a short MeZO run, in one table.

    python experiments/acceptance_tasks.py --data FOLDER
    python experiments/acceptance_tasks.py --data FOLDER --model starter:smollm2 --tasks copa,squad --steps 4 --rows 32

FOLDER holds a folder for each task (`FOLDERS`). DROP, of which there is none, is read from rows that this script
writes. Both figures are of one run: that of its evaluation before the first step, and that after the last one. Rank-one
noise is added inside the model, which is in bfloat16. Rows that are all of one class (WSC's) are evaluated on, not
learned from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gradientless.errors import UserError
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits
from gradientless.run.runfolder import RunFolder
from gradientless.run.train import train
from gradientless.run.untuned import WAYS

FOLDERS = {
    "sst2": "sst2-sentences",
    "sst5": "sst5",
    "trec": "trec",
    "rte": "rte",
    "cb": "cb",
    "boolq": "boolq",
    "wic": "wic",
    "snli": "snli-dev",
    "mnli": "mnli-dev-matched",
    "wsc": "fewglue32",
    "multirc": "fewglue32",
    "copa": "copa",
    "record": "fewglue32",
    "squad": "squad-dev-xquad",
    "drop": None,  # written below
}
MEZO = ("optimizer.evaluator=inject", "optimizer.rank=1", "optimizer.noise=rademacher", "optimizer.eps=1e-3")
HEAD = ("task", "kind", "train", "held out", "zero-shot, %", "MeZO, %", "of", "loss", "loss after", "passes", "s")


def write_drop(folder: Path) -> Path:
    """DROP-like rows: a passage with numbers, and questions that count, compare and subtract."""
    rows = []
    for i in range(24):
        ann, bob = 3 + i % 7, 12 + i % 5
        passage = f"In game {i + 1}, Ann scored {ann} points and Bob scored {bob} points. The game was played in Rome."
        for question, answer in (
            ("How many points did Ann score?", str(ann)),
            ("Who scored more points?", "Bob"),
            ("How many more points did Bob score than Ann?", str(bob - ann)),
        ):
            spans = {"spans": [answer], "types": ["span"]}
            rows.append({"passage": passage, "question": question, "answers_spans": spans})
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def measured(task: str, path: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """A row of the table."""
    begin = time.perf_counter()
    overrides = [
        *MEZO,
        "surface.name=full",
        "surface.readout=prompt",
        "dtype=bfloat16",
        f"optimizer.lr={options.lr}",
        f"steps={options.steps}",
        f"batch_size={options.batch_size}",
        f"evaluate_every={options.steps}",
        f"data.max_length={options.max_length}",
        f"surface.max_new_tokens={options.max_new_tokens}",
        f"seed={options.seed}",
    ]
    flags = {"task": task, "data.path": str(path), "model": options.model, "device": options.device}
    flags |= {"optimizer.name": "mezo"}
    config = RunConfig.load(None, overrides, flags)
    splits = load_splits(config)
    if len(splits.train) >= 3 * options.rows:
        config = RunConfig.load(None, [*overrides, f"data.subset=[{2 * options.rows}, {options.rows}]"], flags)
        splits = load_splits(config)
    if not splits.train:
        found = WAYS["zero-shot"].use(config, splits, {}).metrics
        figures: list[dict[str, Any]] = [dict(found)]
        passes, meant = "", "accuracy"
    else:
        folder = RunFolder.create(out, config.toml())
        summary = train(config, folder, console=Console(quiet=True))
        lines = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
        figures = [line for line in lines if line["split"] == "validation"]
        passes, meant = str(summary["forward_passes"]), summary["accuracy_means"]
    key, meant = ("f1", "token F1") if splits.kind == "generation" else ("accuracy", meant.partition(" ")[0])
    first, last = figures[0], figures[-1] if splits.train else None
    return [
        task,
        splits.kind,
        str(len(splits.train)),
        str(len(splits.validation)),
        f"{100 * first[key]:.1f}",
        "" if last is None else f"{100 * last[key]:.1f}",
        meant,
        f"{first['loss']:.3f}",
        "" if last is None else f"{last['loss']:.3f}",
        passes,
        f"{time.perf_counter() - begin:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="starter:smollm2")
    parser.add_argument("--tasks", default=",".join(FOLDERS), help="with commas between them")
    parser.add_argument("--rows", type=int, default=32, help="to validate on; twice as many to train on")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    asked = options.tasks.split(",")
    if strange := [task for task in asked if task not in FOLDERS]:
        parser.error(f"--tasks: must be of {', '.join(FOLDERS)}, got {', '.join(strange)}")
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as place:
        for task in asked:
            name = FOLDERS[task]
            path = write_drop(Path(place) / "drop-rows") if name is None else options.data / name
            try:
                row = measured(task, path, Path(place) / task, options)
            except UserError as error:
                raise SystemExit(f"{task}: {error}") from None
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    about = f"{options.model}, bfloat16, {options.steps} steps of MeZO (lr {options.lr:g}, batch {options.batch_size})"
    lines += ["", f"{about}, texts cut to {options.max_length} tokens, answers to {options.max_new_tokens}."]
    print("\n".join(lines[-2:]))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
