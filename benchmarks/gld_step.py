"""Milliseconds of one GLD step on the head of MiniLM, three ways in one run, and their ratios.

    python benchmarks/gld_step.py            # needs the starter model and data; fetches them on first use

1. this package, on cached features;
2. the usual implementation on cached features: for every candidate, change the tensor, one plain head pass, restore;
3. the thesis's way: the same, with the body run once in every step.

4 tensors, K = 5, batch 64, s = 2 x width, no penalty. The three take turns, so that a machine whose speed drifts moves
them together; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from gradientless.run.config import RunConfig
from gradientless.run.runfolder import RunFolder, processor
from gradientless.run.train import Run


@torch.no_grad()
def plain_step(run: Run, t: int, body: bool, radius: float, candidates: int, entries: int) -> None:
    """A GLD step as it is usually written: torch's generator, a head pass for every candidate."""
    rows = run.train_rows
    indices = torch.from_numpy(rows.batch(t))
    if body:
        features = run.surface.features(rows.encoded.batch(indices.numpy()))
    else:
        features = torch.from_numpy(rows.features[indices.numpy()])
    labels = rows.labels[indices]
    layers = run.surface.layers()

    def loss() -> float:
        hidden = torch.relu(layers.dense(features))
        return float(torch.nn.functional.cross_entropy(layers.out(hidden), labels))

    for tensor in run.surface.trainable().values():
        flat = tensor.view(-1)
        index = torch.randperm(flat.numel())[:entries] if flat.numel() > entries else None
        best, best_loss = None, loss()
        for k in range(candidates):
            radius_k = radius * 2.0**-k
            if index is None:
                old, move = flat.clone(), torch.randn(flat.numel()) * radius_k
                flat += move
                found = loss()
                flat.copy_(old)
            else:
                old, move = flat[index], torch.randn(len(index)) * radius_k
                flat[index] += move
                found = loss()
                flat[index] = old
            if found < best_loss:
                best, best_loss = move, found
        if best is not None:
            if index is None:
                flat += best
            else:
                flat[index] += best


def milliseconds(work: Callable[[int], object], steps: range) -> float:
    begin = time.perf_counter()
    for t in steps:
        work(t)
    return 1000 * (time.perf_counter() - begin) / len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = ["batch_size=64", "optimizer.radius=5e-3", "optimizer.penalty=0"]
    config = RunConfig.load("starter", overrides, {"out": "unused"})
    run = Run(config, RunFolder(Path("unused")), Console(stderr=True))
    assert run.forward is not None
    entries = 2 * run.surface.width
    ours, plain, thesis = [], [], []
    t = 0
    for turn in range(arguments.rounds + 1):  # the first turn compiles and warms up
        results = (
            milliseconds(lambda i: run.step(i, None), range(t, t + 200)),
            milliseconds(lambda i: plain_step(run, i, False, 5e-3, 5, entries), range(t, t + 40)),
            milliseconds(lambda i: plain_step(run, i, True, 5e-3, 5, entries), range(t, t + 3)),
        )
        t += 200
        if turn:
            for kept, value in zip((ours, plain, thesis), results, strict=True):
                kept.append(value)
    rows = {
        "this package, cached features": ours,
        "plain head pass per candidate, cached features": plain,
        "the thesis's way, body in every step": thesis,
    }
    lines = [
        f"GLD step, head of MiniLM ({run.surface.width} wide), 4 tensors, K=5, batch 64, s={entries}; "
        f"{processor()}, {arguments.threads} threads",
        "",
        "| way | ms a step (median) | min | max | over this package |",
        "|---|---:|---:|---:|---:|",
    ]
    base = statistics.median(ours)
    for name, values in rows.items():
        middle = statistics.median(values)
        lines.append(f"| {name} | {middle:.2f} | {min(values):.2f} | {max(values):.2f} | {middle / base:.1f}x |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
