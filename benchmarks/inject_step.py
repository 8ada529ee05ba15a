"""What a two-point step costs when the noise is added inside the modules, over two bare forward passes.

    python benchmarks/inject_step.py                            # float32 and bfloat16, a model of SmolLM2-135M's shape
    python benchmarks/inject_step.py --tokens 28 --piece 4      # as `gradientless train` meets short prompts on a CPU
    python benchmarks/inject_step.py --threads 1 --clock processor                              # on a busy machine

The model has random weights (30 layers, width 576, 9 heads of which 3 for keys and values, MLP 1,536, 49,152 words,
tied head) and 16 rows of 48 tokens; the loss is the cross-entropy of the last token, or of all tokens (--logits all).
These take turns, so that a machine whose speed drifts moves them together; medians are printed:

1. two bare forward passes of 16 rows;
2. one bare forward pass of 32 rows;
3. the two points of a step in one batch of 32 rows, rank-1 noise in every tensor, made anew in each step;
4. the same with plain closures: two injected forward passes of 16 rows;
5. making the noise alone;
6. a whole step of MeZO: 3, the weights' update, and all that the optimizer does around them;
7. the update alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradientless.run.runfolder import processor
from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import Injection
from gradientless.search.noise import Noise
from gradientless.search.optim import MeZO
from gradientless.search.points import ALL, Direction, point
from gradientless.search.space import Space

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Closure:
    """The loss of one batch, of all points in one forward pass where it can; `piece` rows of the batch at a time."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, every: bool, piece: int):
        self.model, self.parts, self.every = model, ids.split(piece), every

    def losses_of(self, copies: int, injected: Callable[[], AbstractContextManager] = nullcontext) -> list[float]:
        found = torch.zeros(copies)
        for part in self.parts:
            ids = part.repeat(copies, 1)
            with injected():
                logits = self.model(input_ids=ids, logits_to_keep=0 if self.every else 2, use_cache=False).logits
            for copy, (mine, words) in enumerate(zip(logits.chunk(copies), ids.chunk(copies), strict=True)):
                mine, words = mine[:, :-1].flatten(0, 1), words[:, 1 - logits.shape[1] :].flatten()
                found[copy] += torch.nn.functional.cross_entropy(mine, words) * len(part)
        return found.tolist()

    def __call__(self) -> float:
        return self.losses_of(1)[0]

    def injected(self, injection: Injection) -> _Runner:
        return _Runner(self, injection)


class _Runner:
    def __init__(self, closure: Closure, injection: Injection):
        self.closure, self.injection = closure, injection

    def losses(self, changes: list) -> list[float]:
        return self.closure.losses_of(len(changes), lambda: self.injection.at(changes))


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    work()
    return clock() - begin


@torch.no_grad()
def measure(dtype: torch.dtype, arguments: argparse.Namespace) -> list[tuple[str, list[float]]]:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=arguments.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval().to(arguments.device, dtype)
    space = Space(dict(model.named_parameters()), Noise(0, arguments.noise), rank=arguments.rank)
    injection = Injection(model, space.tensors)
    ids = torch.randint(0, 49152, (arguments.rows, arguments.tokens), device=arguments.device)
    closure = Closure(model, ids, arguments.logits == "all", arguments.piece or arguments.rows)
    step = 0

    def points() -> list:
        nonlocal step
        step += 1
        z = Direction(step, 0, ALL)
        space.end_step()
        return [point(1e-3, z), point(-1e-3, z)]

    together = Inject(space, closure, injection)
    apart = Inject(space, closure.__call__, injection)
    optimizer = MeZO(
        model.named_parameters(), lr=1e-6, noise=arguments.noise, rank=arguments.rank, evaluator="inject", check=False
    )
    ways: dict[str, Callable[[], object]] = {
        "two bare forward passes": lambda: (closure(), closure()),
        "one bare forward pass of twice the rows": lambda: closure.losses_of(2),
        "two points injected, one batch": lambda: together.losses(points()),
        "two points injected, one at a time": lambda: apart.losses(points()),
        "of which the noise's factors": lambda: space.deltas(points()),
        "a whole step with its update": lambda: optimizer.step(closure),
        "of which the update": lambda: space.add(point(1e-6, Direction(step, 0, ALL)), step=step),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):  # the first turn compiles, watches and warms up
        for name, work in ways.items():
            found = seconds(work, CLOCKS[arguments.clock])
            if turn:
                taken[name].append(found)
    return list(taken.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--piece", type=int, help="rows that the model sees at a time (default: all)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--noise", default="rademacher")
    parser.add_argument("--logits", choices=["last", "all"], default="last")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: on a busy machine, with one thread")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pieces = f" in pieces of {arguments.piece} rows" if arguments.piece else ""
    lines = [
        f"Two-point step with rank-{arguments.rank} noise injected, {arguments.layers} layers of SmolLM2-135M's shape, "
        f"{arguments.rows} x {arguments.tokens} tokens{pieces}, loss of {arguments.logits} token(s); {processor()}, "
        f"{arguments.threads} threads, {arguments.clock} time; medians of {arguments.rounds} rounds",
        "",
        "| dtype | what | ms | min | max | over two bare passes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in arguments.dtype or ["float32", "bfloat16"]:
        rows = measure(getattr(torch, name), arguments)
        base = statistics.median(rows[0][1])
        for what, values in rows:
            middle = statistics.median(values)
            milliseconds = " | ".join(f"{1000 * value:.0f}" for value in (middle, min(values), max(values)))
            lines.append(f"| {name} | {what} | {milliseconds} | {middle / base:.2f} |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
