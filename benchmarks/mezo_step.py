"""Milliseconds of a two-point step on all weights of MiniLM that walks them in place, over two bare forward passes.

    python benchmarks/mezo_step.py            # needs the starter model; fetches it on first use

Batch 16 x 32 random token ids. The step: probe θ + εz, probe θ - εz, update. `settled` brings the weights home after
every step (three passes over memory), `fused` leaves restoring and update to the next step's first pass (two). The
usual implementation seeds torch's generator anew for each of four passes of `p.data.add_(z, alpha)`. All take turns, so
that a machine whose speed drifts moves them together; the least of the repetitions counts.

Memory: live bytes of tensors made during a step beyond those of the bare forwards, plus numba's scratch.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gradientless.language.backbone import load_backbone
from gradientless.run.memory import TensorBytes
from gradientless.run.runfolder import processor
from gradientless.search.optim import ForwardOptimizer
from gradientless.search.points import ALL, Direction, Losses, Update, point

EPS, LR = 1e-3, 1e-6


class TwoPoint(ForwardOptimizer):
    """θ ← θ - lr · (L(θ + εz) - L(θ - εz)) / 2ε · z."""

    name = "TwoPoint"

    def search(self, t):
        z = Direction(t, 0, ALL)
        plus, minus = yield Losses([point(EPS, z), point(-EPS, z)])
        return Update(point(-LR * (plus - minus) / (2 * EPS), z), (plus + minus) / 2)


def usual(model: nn.Module, closure: Callable[[], Tensor], seed: int) -> None:
    """A step as it is usually written."""

    def perturb(scale: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=p.shape)
            p.data.add_(z, alpha=scale)

    perturb(EPS)
    plus = float(closure())
    perturb(-2 * EPS)
    minus = float(closure())
    perturb(EPS)
    perturb(-LR * (plus - minus) / (2 * EPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_backbone("starter:minilm").requires_grad_(True).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (arguments.batch, arguments.length), generator=draw)

    @torch.no_grad()
    def closure() -> Tensor:
        return model(input_ids=ids).last_hidden_state.square().mean()

    ways: dict[str, Callable[[int], object]] = {"two bare forwards": lambda t: (float(closure()), float(closure()))}
    for noise in ("rademacher", "near_normal", "gaussian"):
        for fused in (True, False):
            optimizer = TwoPoint(model.named_parameters(), {"lr": LR}, noise=noise, evaluator="walk", check=False)
            optimizer.fused = fused

            def walk(t: int, optimizer: ForwardOptimizer = optimizer) -> None:
                optimizer.step(closure)

            ways[f"walk, {noise}, {'fused' if fused else 'settled'}"] = walk
    ways["usual implementation"] = lambda t: usual(model, closure, t)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.repetitions + 1):  # the first turn compiles and warms up
        for name, work in ways.items():
            work(turn)  # each comes to its own standing before it is timed
            begin = time.perf_counter()
            work(turn + 1000)
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin))
    memory: dict[str, int] = {}
    for name, work in ways.items():
        gc.collect()
        with TensorBytes() as counter, torch.no_grad():
            work(0)
        memory[name] = counter.peak
    base, bare = min(times["two bare forwards"]), memory["two bare forwards"]
    lines = [
        f"A two-point step on all of MiniLM ({weights / 2**20:.1f} MiB), batch {arguments.batch} x {arguments.length}; "
        f"{processor()}, {arguments.threads} threads",
        "",
        "| way | ms (least) | over two bare forwards | extra MiB | of the weights |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in times.items():
        extra = (memory[name] - bare) / 2**20
        share = (memory[name] - bare) / weights
        lines.append(f"| {name} | {min(found):.0f} | {min(found) / base:.2f}x | {extra:.1f} | {share:.1%} |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
