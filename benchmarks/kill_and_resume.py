"""Kill runs (SIGKILL) at random moments, while saving too, resume each time, and compare with a straight run.

    python benchmarks/kill_and_resume.py            # ends with exit code 1 when a byte differs

For each method: one straight run, and one that is killed ten times: twice at a random moment of its start, else up to
20 ms after a random step, half of these at the next sight of a half-written file, so that they fall into saving.
Weights (model, best and last checkpoint), the log of losses and the
metrics must be byte-equal. Model and rows are the tests' own: a random BERT of width 16; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny_run
from gradientless.run.runfolder import processor

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


class Program:
    """The installed program, each run a process of its own."""

    def __init__(self, cache: Path):
        self._environment = {**os.environ, **ENVIRONMENT, "GRADIENTLESS_CACHE": str(cache)}

    def start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gradientless.cli", *arguments]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
        )

    def finish(self, arguments: list[str], out: Path) -> tuple[float, float]:
        """Run to the end; returns the seconds until the first metrics, and until the end."""
        begin = time.perf_counter()
        first = 0.0
        with self.start(arguments) as process:
            while process.poll() is None:
                if not first and (out / "metrics.jsonl").exists():
                    first = time.perf_counter() - begin
                time.sleep(0.01)
            if process.returncode:
                assert process.stderr is not None
                raise SystemExit(f"a run failed:\n{process.stderr.read().decode()}")
        return first, time.perf_counter() - begin

    def kill(self, arguments: list[str], out: Path, step: int | None, delay: float, saving: bool) -> bool:
        """Start, and kill `delay` seconds after the log shows `step` (None: after the start, at the first step at the
        latest); saving: at the next sight of a half-written file after that. Returns whether the run still went on."""
        shown = tiny_run.Log(out)
        with self.start(arguments) as process:
            begin = time.perf_counter()
            while process.poll() is None:
                if shown.reaches(step or 0) or (step is None and time.perf_counter() - begin > delay):
                    break
                time.sleep(0.0005)
            end = time.perf_counter() + (0 if step is None else delay)
            while process.poll() is None and (
                time.perf_counter() < end or (saving and not list(out.glob(".*.partial")))
            ):
                time.sleep(0.0005)
            process.kill()
            process.wait()
            return process.returncode < 0


def saved_step(out: Path) -> int:
    """The step of the newest checkpoint; 0 when there is none."""
    return max((int(place.name.split("-")[1]) for place in out.glob("checkpoint-*")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="for each method")
    parser.add_argument("--steps", type=int, default=1500, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--methods", nargs="*", default=list(tiny_run.METHODS), choices=list(tiny_run.METHODS))
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    lines = [
        f"Killed {given.kills} times with SIGKILL and resumed each time, against the straight run of {given.steps:,} "
        f"steps, a checkpoint every 10, an evaluation every 15; {processor()}, {os.cpu_count()} cores",
        "",
        "| method | kills | with half-written files | checkpoints resumed from | files compared | byte-equal |",
        "|---|---:|---:|---|---:|---|",
    ]
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = Program(folder / "cache")
        model, rows = tiny_run.make_model(folder / "model"), tiny_run.write_table(folder / "rows.csv")
        warm = folder / "warm"
        program.finish(tiny_run.arguments(model, rows, warm), warm)  # compiles what is compiled once for a machine
        for method in given.methods:
            optimizer, options = tiny_run.METHODS[method]
            straight, killed = folder / method / "straight", folder / method / "killed"

            def arguments(out: Path, optimizer: str = optimizer, options: tuple[str, ...] = options) -> list[str]:
                return tiny_run.arguments(
                    model, rows, out, *options, *tiny_run.UNEVEN, steps=given.steps, optimizer=optimizer
                )

            first, whole = program.finish(arguments(straight), straight)
            print(
                f"{method}: straight run, first metrics after {first:.1f} s, end after {whole:.1f} s", file=sys.stderr
            )
            moments = random.Random(f"{given.seed} {method}")
            steps = sorted(moments.sample(range(given.steps - 100), given.kills))
            hits, halves, resumed = 0, 0, []
            for kill in range(given.kills):
                again = [*arguments(killed), "--resume"]
                if kill % 5 == 4:
                    hits += program.kill(again, killed, None, moments.uniform(0, first), saving=False)
                else:
                    after = moments.uniform(0, 0.02)
                    hits += program.kill(again, killed, steps[kill], after, saving=kill % 2 == 1)
                halves += bool(list(killed.glob(".*.partial")) or list(killed.glob("*-superseded")))
                resumed.append(saved_step(killed))
                print(f"{method}: kill {kill + 1} at step {resumed[-1]} or later", file=sys.stderr)
            program.finish([*arguments(killed), "--resume"], killed)
            expected, found = tiny_run.outcome(straight), tiny_run.outcome(killed)
            equal = expected == found
            good = good and equal and hits == given.kills
            points = ", ".join(f"{step:,}" for step in resumed)
            lines.append(f"| {method} | {hits} | {halves} | {points} | {len(expected)} | {'yes' if equal else 'NO'} |")
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
