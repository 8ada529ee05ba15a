"""Whether runs lower the held-out loss, or error: every held-out row before and after, paired.

    python experiments/lowered.py experiments/without_derivative.toml --data path/to/data    # with sst2/ and squad/
    python experiments/lowered.py experiments/forward_on_surfaces.toml --data path/to/data   # with sst2/ and trec/

The weights are those after the last step, not of the best evaluation, so that the held-out rows choose nothing. Runs
that have ended are not run again. `against = "zero-shot"` compares with the prompted model as it is, where a run starts
from something else, such as a new head.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import run_table
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradientless.language.metrics import TEXT_METRICS
from gradientless.run.evaluation import TextRows, logits_of
from gradientless.run.train import Run
from gradientless.run.untuned import prompted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MEASURES = ("loss", "error", "lack of token F1")


def measured(run: Run) -> dict[str, np.ndarray]:
    """measure -> its value on each held-out row, at the weights as they stand: float64 [N]."""
    run.surface.eval()
    rows = run.validation_rows
    if isinstance(rows, TextRows):
        texts, _ = rows.read()
        answers = [row.answers for row in run.validation]
        lack = [1.0 - TEXT_METRICS["token_f1"]([text], [own]) for text, own in zip(texts, answers, strict=True)]
        return {"lack of token F1": np.array(lack)}
    return of_rows(rows.logits(), rows.labels.cpu())


def of_rows(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """logits: [N, C]. labels: [N]."""
    loss = cross_entropy(logits.double(), labels, reduction="none").numpy()
    return {"loss": loss, "error": (logits.argmax(dim=1) != labels).numpy().astype(float)}


def zero_shot(run: Run) -> dict[str, np.ndarray]:
    """As `measured`, of the prompted model as it is."""
    surface = prompted(run.config, run.labels)
    logits = logits_of(surface, surface.encode(run.validation))
    return of_rows(logits, run.validation_rows.labels.cpu())  # type: ignore[union-attr]


def differences(settings: dict[str, Any], place: Path, threads: int, against: str | None) -> dict[str, Any]:
    """What a run changes: measure -> mean before, mean after, mean difference and its standard error."""
    run = Run(*run_table.opened(place, settings), Console(quiet=True))
    before = zero_shot(run) if against == "zero-shot" else measured(run)
    summary = run_table.run(place, settings, threads)
    run.restore()
    if run.done.step != summary["steps"]:
        raise SystemExit(f"{place}: the last checkpoint must be of step {summary['steps']}, got {run.done.step}")
    after = measured(run)
    found: dict[str, Any] = {key: summary[key] for key in ("steps", "forward_passes", "seconds")}
    for key, values in before.items():
        change = after[key] - values
        error = float(change.std(ddof=1)) / math.sqrt(len(change))
        found[key] = [float(values.mean()), float(after[key].mean()), float(change.mean()), error]
    return {**found, "rows": len(change)}


def report(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Write the table as markdown and its numbers as JSON. out: the files' path, without suffix."""
    lines = [
        "| run | steps | forward passes | seconds | held-out | rows | before | after | difference (standard error) "
        "| in standard errors |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in results.items():
        for measure in (each for each in MEASURES if each in found):
            before, after, change, error = found[measure]
            ratio = f"{change / error:+.1f}" if error else "–"
            lines.append(
                f"| {name} | {found['steps']:,} | {found['forward_passes']:,} | {found['seconds']:,.0f} | {measure} "
                f"| {found['rows']:,} | {before:.4f} | {after:.4f} | {change:+.4f} ({error:.4f}) | {ratio} |"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder in which `folder` of each run stands")
    parser.add_argument("--runs", type=Path, default=Path("runs/lowered"), help="where the run folders go")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    arguments = parser.parse_args()
    table = tomllib.loads(arguments.table.read_text("utf-8"))
    results = {}
    for name, own in table["runs"].items():
        settings = {**table["common"], **own}
        against = settings.pop("against", None)
        settings["data.path"] = str(arguments.data / settings.pop("folder"))
        settings["checkpoint_every"] = settings["evaluate_every"] = settings["steps"]
        place = arguments.runs / arguments.table.stem / name.replace(" ", "-")
        results[name] = differences(settings, place, arguments.threads, against)
        report(results, arguments.table.parent / "results" / arguments.table.stem)


if __name__ == "__main__":
    main()
