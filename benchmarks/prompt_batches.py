"""What a batch of prompts costs when only what is needed is computed.

    python benchmarks/prompt_batches.py                     # starter:smollm2, float32, one thread

Rows of 3 to 50 words, lengths drawn as skewed as those of review sentences, behind the prompt of SST-2. The ways take
turns, so that a machine whose speed drifts moves them together; medians of the processor's time are printed.

A step of 16 rows: 1. one padded batch and all logits, as the library computes them; 2. one padded batch, the full
vocabulary at the label's position; 3. the label words' logits alone; 4. the same in pieces of four rows sorted by
length, as a training step takes them on a CPU. Evaluation of 128 rows: 5. in order, 16 rows at a time, label words
alone; 6. sorted by length, as many as 1,024 tokens hold, as `gradientless eval` does. 7. Encoding these 128 rows, once
a run and not once a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradientless.language import readouts
from gradientless.language.surfaces import FullSurface
from gradientless.language.tasks import Example, Prompt
from gradientless.run.assemble import FEW
from gradientless.run.evaluation import logits_of
from gradientless.run.runfolder import processor

WORDS = ("the", "a", "film", "plot", "story", "cast", "is", "was", "and", "of", "with", "very", "dull", "warm", "sharp")
LABELS = ("negative", "positive")
PROMPT = Prompt("Review: {text}\nSentiment:", {"negative": " negative", "positive": " positive"})


def rows(count: int) -> list[Example]:
    draw = np.random.RandomState(0)
    lengths = np.clip(np.exp(draw.normal(2.8, 0.6, count)), 3, 50).astype(int)
    return [Example(" ".join(draw.choice(WORDS, length)), int(draw.randint(2))) for length in lengths]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="starter:smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    surface = FullSurface.create(arguments.model, LABELS, prompt=PROMPT, max_length=128, dtype=arguments.dtype)
    examples = rows(128)
    encoded = surface.encode(examples)
    words = surface.reading.encoder.words
    step = np.arange(16)
    by_length = step[np.argsort(encoded.lengths[step], kind="stable")]

    def scores(chosen: np.ndarray, **options: bool) -> Tensor:
        return readouts.scores(surface.model, surface.prepare(encoded.batch(chosen)).tensors, words, **options)

    def together(order: np.ndarray, size: int) -> Tensor:
        return torch.cat([scores(order[at : at + size]) for at in range(0, len(order), size)])

    ways: dict[str, Callable[[], object]] = {
        "step: one batch, all logits": lambda: scores(step, whole=True),
        "step: one batch, the full vocabulary at the label": lambda: scores(step, normalised=True),
        "step: one batch, label words alone": lambda: scores(step),
        f"step: pieces of {FEW} by length, label words alone": lambda: together(by_length, FEW),
        "evaluation: 16 at a time, in order": lambda: together(np.arange(128), 16),
        "evaluation: 1,024 tokens at a time, by length": lambda: logits_of(surface, encoded),
        "encoding the rows of the evaluation": lambda: surface.encode(examples),
    }
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, work in ways.items():
            begin = time.process_time()
            work()
            if repeat:  # the first round warms up
                seen[name].append(time.process_time() - begin)
    found = {name: statistics.median(times) for name, times in seen.items()}
    first = {kind: next(found[name] for name in found if name.startswith(kind)) for kind in ("step", "evaluation")}
    lines = ["| way | processor's seconds | of the first |", "|---|---:|---:|"]
    for name, value in found.items():
        kind = "step" if name.startswith("step") else "evaluation"
        lines.append(f"| {name} | {value:.3f} | {value / first[kind]:.2f} |")
    title = f"`{arguments.model}`, {arguments.dtype}, {arguments.threads} thread(s), {processor()}"
    text = "\n".join([title, "", *lines]) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
