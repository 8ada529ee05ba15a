"""How far the default run of every surface and method comes: `python experiments/defaults.py --out runs/defaults`.

Each is `gradientless train --surface S --optimizer O --model M` and no more, on Rotten Tomatoes, one after the other.
What has ended is not run again. A run has learned where its accuracy lies more than two standard errors above the share
of the larger class.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gradientless.language.surfaces import SURFACES

MODELS = ("starter:minilm", "starter:smollm2")
OPTIMIZERS = ("gld", "mezo", "adamw")
OPTIONS = {"layers": [r"surface.pattern=\.5\."]}  # which layers has no default


def run(model: str, surface: str, optimizer: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """The summary of a run, or {"error": what it said}."""
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "gradientless", "train", "--yes", "--model", model, "--surface", surface]
        command += ["--optimizer", optimizer, "--out", str(folder), *OPTIONS.get(surface, []), *more]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if ended.returncode:
            return {"error": ended.stderr.strip().splitlines()[-1]}
    return json.loads(summary.read_text("utf-8"))


def bar_of(summary: dict[str, Any]) -> float:
    """The accuracy from which a run has learned."""
    share, rows = summary["majority"]["share"], sum(each["rows"] for each in summary["classes"].values())
    return share + 2 * math.sqrt(share * (1 - share) / rows)


def first_of(folder: Path) -> float:
    """The accuracy of the first evaluation: before the first step, where features are not kept."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return next(float(line["accuracy"]) for line in lines if line["split"] == "validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--surface", nargs="+", choices=sorted(SURFACES), default=sorted(SURFACES))
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="given to every run, to choose defaults"
    )
    asked = parser.parse_args()
    lines = [
        "Default runs on Rotten Tomatoes. A run has learned from two standard errors above the larger class's share.",
        "",
        "| model | surface | optimizer | first evaluation | best | learned from | steps | forward passes | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in asked.model:
        for surface in asked.surface:
            for optimizer in asked.optimizer:
                folder = asked.out / "-".join([model.partition(":")[2], surface, optimizer, *asked.set]).replace(
                    "/", "_"
                )
                found = run(model, surface, optimizer, folder, asked.set)
                if "error" in found:
                    lines.append(f"| {model} | {surface} | {optimizer} | {found['error']} | | | | | |")
                else:
                    first, best, bar = first_of(folder), found["metrics"]["accuracy"], bar_of(found)
                    lines.append(
                        f"| {model} | {surface} | {optimizer} | {first:.1%} | {best:.1%} | {bar:.1%} | "
                        f"{found['steps']:,} | {found['forward_passes']:,} | {found['wall_seconds']:.0f} |"
                    )
                print(lines[-1], flush=True)
    if asked.table:
        asked.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
