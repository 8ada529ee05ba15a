"""Milliseconds of a two-point step on all weights of MiniLM that walks them in place, over two bare forward passes.

    python benchmarks/mezo_step.py            # needs the starter model; fetches it on first use
    python benchmarks/mezo_step.py --drift    # how far 10,000 steps of walking stray from the sum of their updates

Batch 16 x 32 random token ids. The step: probe θ + εz, probe θ - εz, update. `settled` brings the weights home after
every step (three passes over memory), `fused` leaves restoring and update to the next step's first pass (two); `rows`
is fused, and its closure says which rows of the token table the batch touches, so that the others are not probed. The
usual implementation seeds torch's generator anew for each of four passes of `p.data.add_(z, alpha)`. All take turns, so
that a machine whose speed drifts moves them together; the least of the repetitions counts.

Memory: live bytes of tensors made during a step beyond those of the bare forwards, plus numba's scratch.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
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


def rows_alone(model: nn.Module, ids: Tensor, noise: str) -> Callable[[int], object]:
    """A fused step of a copy of the model, whose closure tells the rows that it touches."""
    model = copy.deepcopy(model)
    (table,) = [name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight]

    class Closure:
        @torch.no_grad()
        def __call__(self) -> Tensor:
            return model(input_ids=ids).last_hidden_state.square().mean()

        def touched(self) -> dict[str, Tensor]:
            return {table: ids.unique()}

    optimizer = TwoPoint(model.named_parameters(), {"lr": LR}, noise=noise, evaluator="walk", check=False)
    optimizer.fused = True
    closure = Closure()
    return lambda t: optimizer.step(closure)


class Summed(TwoPoint):
    """Adds up its updates in double precision beside the weights, which walk."""

    name = "Summed"

    def apply(self, update: Update) -> None:
        for name, tensor in self.space.tensors.items():
            if not hasattr(self, "exact"):
                self.exact = self.start.double()
            for factor, z in update.point:
                drawn = self.space.noise.fill(name, z.step, z.draw, 0, tensor.numel())
                self.exact += factor * drawn.double().view_as(tensor)
        super().apply(update)


def drift(steps: int = 10_000) -> list[str]:
    """The distance of walked weights from the sum of their updates in double precision, a table."""
    lines = [
        f"{steps:,} steps of walking, a matrix of 64 x 64 weights of unit variance, eps {EPS:g}: distance from the "
        "sum of the updates in double precision, as root mean squares of entries",
        "",
        "| noise | steps are | drift over the weights | bound, 2^-24 sqrt(passes) | updates over the weights |",
        "|---|---|---:|---:|---:|",
    ]
    for noise in ("rademacher", "gaussian"):
        for fused in (True, False):
            weights = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
            goal = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double()
            optimizer = Summed([("w", weights)], {"lr": LR}, noise=noise, evaluator="walk", check=False)
            optimizer.fused, optimizer.start = fused, weights.detach().clone()
            for _ in range(steps):
                optimizer.step(lambda w=weights, goal=goal: (w.double() - goal).square().sum())
            optimizer.settle()
            size = float(optimizer.start.square().mean().sqrt())
            off = float((weights.detach().double() - optimizer.exact).square().mean().sqrt())
            moved = float((optimizer.exact - optimizer.start.double()).square().mean().sqrt())
            bound = 2.0**-24 * math.sqrt(steps * (2 if fused else 3))
            how = "fused" if fused else "settled"
            lines.append(f"| {noise} | {how} | {off / size:.1e} | {bound:.1e} | {moved / size:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--drift", action="store_true", help="the drift of walking, without the starter model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.drift:
        show(drift(), arguments.out)
        return
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
        if noise != "near_normal":
            ways[f"walk, {noise}, rows"] = rows_alone(model, ids, noise)
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
    show(lines, arguments.out)


def show(lines: list[str], file: Path | None) -> None:
    print("\n".join(lines))
    if file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
