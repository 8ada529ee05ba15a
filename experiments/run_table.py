"""Run a table of experiments: tune every method on a part of the training split, run it on all seeds, write the table.

    python experiments/run_table.py experiments/thesis_table.toml --task rotten-tomatoes
    python experiments/run_table.py experiments/thesis_table.toml --task sst2 --data path/to/SST-2

Runs that have ended are not run again, so the command can be stopped and repeated; `--report` only writes the table
from what there is.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits
from gradientless.run.runfolder import RunFolder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OF_SURFACE = ("seconds_a_step", "parameters", "backward_products")  # what a summary says of what was tuned
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # Student's t by degrees of freedom


def run(place: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """The summary of the run with `settings` in folder `place`, which is made unless it has ended before.

    Every run has a process of its own: the peak of the resident memory is then that of its method alone.
    """
    _, folder = opened(place, settings)
    if not folder.summary.exists():
        command = [sys.executable, "-m", "gradientless", "train", str(folder.config), "--out", str(place), "--resume"]
        ended = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"{place}: {ended.stderr.strip()[-2000:]}")
    return {**folder.read_summary(), "folder": folder}


def opened(place: Path, settings: dict[str, Any]) -> tuple[RunConfig, RunFolder]:
    """The configuration of a run in folder `place`, and the folder, which is made unless it is there."""
    config = RunConfig.load(None, (), {**settings, "out": str(place)})
    folder = RunFolder.create(place, config.toml(), resume=True)
    if lines := config.differences(RunConfig.load(folder.config)):
        raise SystemExit(f"{place} holds a run of another configuration, remove it: {'; '.join(lines)}")
    return config, folder


def tuning_data(place: Path, table: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Two tables of rows of the training split, as settings that name them."""
    if not (place / "dev.csv").exists():
        splits = load_splits(RunConfig.load(None, (), data))
        rows = splits.train
        order = np.random.RandomState(table["tune_seed"]).permutation(len(rows))[: table["tune_rows"]]
        place.mkdir(parents=True, exist_ok=True)
        cut = len(order) * 4 // 5
        for name, part in (("train", order[:cut]), ("dev", order[cut:])):
            with open(place / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                writer.writerows((rows[i].text, splits.labels[rows[i].label]) for i in part)
    return {"data.path": str(place)}


def tune(
    place: Path, method: dict[str, Any], table: dict[str, Any], data: dict[str, Any], threads: int
) -> tuple[dict[str, Any], list[Any], float]:
    """The setting of the grid that is best at the end; (setting, loss, accuracy) of all; and the seconds that all took.

    Best is the lowest loss, or, with `choose_by = "accuracy"`, the highest accuracy and then the lowest loss.
    """
    steps = max(1, round(method["steps"] * method.get("tune_share", table["tune_share"])))
    common = {**table["common"], "evaluate_every": steps, "checkpoint_every": steps}
    tried, seconds = [], 0.0
    for values in itertools.product(*method["grid"].values()):
        choice = dict(zip(method["grid"], values, strict=True))
        name = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in choice.items())
        settings = {**common, **data, **method["set"], **choice, "steps": steps, "seed": table["seeds"][0]}
        found = run(place / name, settings, threads)
        seconds += found["wall_seconds"]  # also of a run that had ended before
        tried.append((choice, found["last"]["loss"], found["last"]["accuracy"]))
        print(f"  tune {choice}: loss {tried[-1][1]:.4f} accuracy {100 * tried[-1][2]:.2f}%", flush=True)
    by_accuracy = table.get("choose_by") == "accuracy"
    return min(tried, key=lambda item: (-item[2], item[1]) if by_accuracy else item[1])[0], tried, seconds


def stage_of(method: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """A method with its chosen settings, as a stage: dotted keys become tables."""
    stage: dict[str, Any] = {"steps": method["steps"]}
    for key, value in {**method["set"], **chosen}.items():
        *tables, last = key.split(".")
        place = stage
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value
    return stage


def interval(differences: list[float]) -> str:
    """Mean and 95% interval (Student's t over seeds), in points."""
    mean = 100 * statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f} points (one seed)"
    half = 100 * T_975[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} points, 95% interval [{mean - half:+.2f}, {mean + half:+.2f}]"


def report(results: dict[str, Any], table: dict[str, Any], out: Path) -> None:
    """Write the table as markdown and its numbers as JSON. out: the files' path, without suffix."""
    marks = table.get("report_at", [])
    of_surfaces = table.get("columns") == "surfaces"
    lines = [
        "| optimizer | steps | chosen | "
        + "".join(f"after {mark:,} | " if mark else "at the start | " for mark in marks)
        + "validation accuracy at the end (sd) | F1 | best evaluation | forward passes | seconds "
        + ("| a step | tuned | registered | touched | backward products " if of_surfaces else "")
        + "| memory above the model | seeds |",
        "|---|---:|---|" + "---:|" * (len(marks) + 7 + 5 * of_surfaces),
    ]
    for name, row in results.items():
        runs = row["runs"]
        accuracy = [100 * r["last"]["accuracy"] for r in runs]
        spread = f" ({statistics.stdev(accuracy):.2f})" if len(runs) > 1 else ""
        chosen = ", ".join(
            f"{key.rpartition('.')[0] or key} {value}"
            if key == "schedule.name"
            else f"{key.rpartition('.')[2]} {value:g}"
            for key, value in row["chosen"].items()
        )
        mean = {k: statistics.fmean(r[k] for r in runs) for k in ("forward_passes", "seconds", "peak_memory_mib")}
        lines.append(
            f"| {name} | {runs[0]['steps']:,} | {chosen} | "
            + "".join(f"{_at(runs, mark)} | " for mark in marks)
            + f"{statistics.fmean(accuracy):.2f}{spread} "
            f"| {100 * statistics.fmean(r['last']['f1'] for r in runs):.2f} "
            f"| {100 * statistics.fmean(r['metrics']['accuracy'] for r in runs):.2f} | {mean['forward_passes']:,.0f} "
            f"| {mean['seconds']:,.0f} "
            + (_of_surface(runs) if of_surfaces else "")
            + f"| {mean['peak_memory_mib']:,.0f} MiB | {len(runs)} |"
        )
    lines.append("")
    baseline = table.get("baseline", "AdamW")
    first = next((name for name in results if name.startswith(baseline)), None)
    hours = sum(row.get("tuning_seconds", 0.0) for row in results.values()) / 3600
    if hours:
        lines += [f"- the settings were chosen in {hours:.2f} hours of runs on a part of the training split"]
    against = [(name, first) for name in results if first is not None and name != first]
    for name, base_row in [*against, *table.get("pairs", [])]:
        if name in results and base_row in results:
            base = {r["seed"]: r["last"]["accuracy"] for r in results[base_row]["runs"]}
            pairs = [r["last"]["accuracy"] - base[r["seed"]] for r in results[name]["runs"] if r["seed"] in base]
            if pairs:
                lines.append(f"- {name} minus {base_row}, paired by seed: {interval(pairs)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _of_surface(runs: list[dict[str, Any]]) -> str:
    """Seconds a step (median of the runs' medians), parameters, and products of the backward pass, as cells."""
    counted, step = runs[0]["parameters"], statistics.median(r["seconds_a_step"] for r in runs)
    shown = [f"{step:.3f} s", *(f"{counted[key]:,}" for key in ("tuned", "registered", "touched"))]
    return "".join(f"| {cell} " for cell in (*shown, f"{runs[0]['backward_products']:,}"))


def _at(runs: list[dict[str, Any]], step: int) -> str:
    """Mean accuracy of the evaluation after `step` steps, or a dash."""
    found = [r["at"][str(step)] for r in runs if str(step) in r["at"]]
    return f"{100 * statistics.fmean(found):.2f}" if found else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", help="a folder with the task's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/table"), help="where the run folders go")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--report", action="store_true", help="write the table from runs that have ended; run nothing")
    arguments = parser.parse_args()
    table = tomllib.loads(arguments.table.read_text("utf-8"))
    data = {"task": arguments.task} | ({"data.path": arguments.data} if arguments.data else {})
    place = arguments.runs / arguments.task
    results: dict[str, Any] = {}
    kept = place / "results.json"
    if kept.exists():
        results = json.loads(kept.read_text("utf-8"))
    if not arguments.report:
        grids = any("grid" in method for method in table["methods"].values())
        held_back = tuning_data(place / "tune-data", table, data) if grids else {}
        for name, method in table["methods"].items():
            if name not in results and "grid" not in method:  # it is as it is, or stages of others as these were chosen
                results[name] = {"chosen": {}, "tried": [], "tuning_seconds": 0.0, "runs": []}
            elif name not in results:
                print(f"{name}: tuning", flush=True)
                where = place / "tune" / name.replace(" ", "-")
                chosen, tried, seconds = tune(where, method, table, held_back, arguments.threads)
                results[name] = {"chosen": chosen, "tried": tried, "tuning_seconds": seconds, "runs": []}
        for seed in table["seeds"]:
            for name, method in table["methods"].items():
                if any(r["seed"] == seed for r in results[name]["runs"]):
                    continue
                settings = {**table["common"], **data, "seed": seed}
                if "stages" in method:
                    parts = [(table["methods"][part], results[part]["chosen"]) for part in method["stages"]]
                    settings["stages"] = [stage_of(part, chosen) for part, chosen in parts]
                else:
                    settings |= {**method["set"], **results[name]["chosen"], "steps": method["steps"]}
                found = run(place / name.replace(" ", "-") / str(seed), settings, arguments.threads)
                if "stages" in found:  # what is tuned, and its step, are the last stage's
                    *_, last = found["stages"].values()
                    found |= {key: last[key] for key in OF_SURFACE}
                keys = ("metrics", "last", "steps", "forward_passes", "seconds", "peak_memory_mib", *OF_SURFACE)
                *_, ended = found["folder"].stage_folders() or [found["folder"]]
                metrics = ended.read_metrics()
                at = {str(r["step"]): r["accuracy"] for r in metrics if r["split"] == "validation"}
                marks = {key: value for key, value in at.items() if int(key) in table.get("report_at", [])}
                results[name]["runs"].append(
                    {"seed": seed, "at": marks, **{key: found[key] for key in keys if key in found}}
                )
                print(f"{name} seed {seed}: {100 * found['last']['accuracy']:.2f}%", flush=True)
                kept.write_text(json.dumps(results), encoding="utf-8")
    ended = {name: row for name, row in results.items() if row["runs"]}
    report(ended, table, arguments.table.parent / "results" / f"{arguments.table.stem}_{arguments.task}")


if __name__ == "__main__":
    main()
