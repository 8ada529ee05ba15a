"""Ways to use a model without a search or a gradient: prompted as it is, calibrated, with demonstrations, and probed.

Each answers with the scores of the rows that a comparison is made on (`splits.held_out`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.prompting import with_demonstrations
from gradientless.language.splits import few_shot, held_out
from gradientless.language.surfaces import Surface
from gradientless.language.surfaces.full import FullSurface, PromptReading
from gradientless.language.tasks import Example, Prompt, Splits
from gradientless.run.assemble import make_surface, prompt_of
from gradientless.run.config import PromptConfig, RunConfig, SurfaceConfig
from gradientless.run.evaluation import TextRows, logits_of, pick_device, score, score_texts
from gradientless.run.losses import chosen
from gradientless.run.memory import PeakMemory, loaded

Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Found:
    """What a way to use a model says of the held-out rows, and what it cost.

    metrics: of `score` or `score_texts`. logits: float32 [N, C] of classes or choices; none of texts that are written.
    forward_passes: over one batch, spent before the held-out rows are read. seconds: from the
    loaded model to the logits. peak_memory_mib: above the loaded model.
    """

    metrics: Mapping[str, float]
    logits: Tensor | None
    forward_passes: int
    seconds: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Way:
    """A way to use a model. options: its own, with their defaults. keys: what else of a configuration it reads.

    seeded: whether the seed changes more than the rows.
    """

    use: Callable[[RunConfig, Splits, Options], Found]
    keys: tuple[str, ...]
    options: Options
    seeded: bool = False


def zero_shot(config: RunConfig, splits: Splits, options: Options) -> Found:
    """The prompted model as it is: scores of the label words or choices, or the text that it writes."""
    surface = prompted(config, splits.labels)
    return _Cost(surface).of(splits, config)


def calibrated(config: RunConfig, splits: Splits, options: Options) -> Found:
    """Scores less those of an input without content, whose answer shows the model's bias.

    In probabilities over the labels: p / p_free, normalised (Zhao et al. 2021, https://arxiv.org/abs/2102.09690, with
    W = diag(p_free)^-1 and b = 0). Choices of a row's own are scored behind an input without content each.
    """
    if splits.kind == "generation":
        raise UserError("calibrated: rows must have classes or choices, got texts to write")
    surface = prompted(config, splits.labels)
    cost, rows = _Cost(surface), held_out(splits)
    assert isinstance(surface.reading, PromptReading)
    free = content_free(surface.reading.encoder.prompt, options["input"])
    if splits.kind == "choice":
        blank = [replace(row, fields={**row.fields, **free.fields}) for row in rows]
        bias = _scores(surface, blank, config)
        bias[bias.isinf()] = 0  # choices that there are not
    else:
        bias = _scores(surface, [free], config)
    return cost.of(splits, config, 1, _scores(surface, rows, config) - bias)


def icl(config: RunConfig, splits: Splits, options: Options) -> Found:
    """In-context learning: k answered training rows of each class (in all, without classes) in front of each row."""
    surface = prompted(demonstrated(config, splits, options["k"]), splits.labels)
    return _Cost(surface).of(splits, config)


def linear_probe(config: RunConfig, splits: Splits, options: Options) -> Found:
    """Logistic regression on the pooled features of the training rows (`surfaces/probe.py`)."""
    probe = SurfaceConfig(name="head", start="probe", pooling=config.surface.pooling)
    surface = _surface(config.model_copy(update={"surface": probe}), splits.labels)
    cost = _Cost(surface)
    surface.begin(surface.encode(splits.train))
    return cost.of(splits, config, -(-len(splits.train) // config.batch_size))


PROMPTED = ("prompt", "surface.truncation", "surface.max_new_tokens", "data.max_length")
WAYS: dict[str, Way] = {
    "zero-shot": Way(zero_shot, PROMPTED, {}),
    "calibrated": Way(calibrated, PROMPTED, {"input": "N/A"}),
    "icl": Way(icl, PROMPTED, {"k": 2}, seeded=True),
    "linear-probe": Way(linear_probe, ("surface.pooling", "data.max_length"), {}),
}


def prompted(config: RunConfig, labels: tuple[str, ...]) -> FullSurface:
    """The whole model of a configuration behind its prompt. Raises UserError where there is none."""
    made = _surface(_behind_prompt(config), labels)
    assert isinstance(made, FullSurface)
    return made


def _behind_prompt(config: RunConfig) -> RunConfig:
    own = config.surface
    surface = SurfaceConfig(name="full", readout="prompt", truncation=own.truncation, max_new_tokens=own.max_new_tokens)
    return config.model_copy(update={"surface": surface})


def content_free(prompt: Prompt, text: str) -> Example:
    """A row that says `text` wherever the prompt has a row's text."""
    return Example(text, 0, text, dict.fromkeys(prompt.fields, text))


def demonstrated(config: RunConfig, splits: Splits, k: int) -> RunConfig:
    """`config` with k demonstrations of each class in its prompt, and with the room that they take."""
    prompt = prompt_of(_behind_prompt(config), config.model)
    assert prompt is not None  # the readout asks for one
    model = backbone.load_config(config.model)
    rows = demonstrations(splits, k, config.seed)
    more = with_demonstrations(prompt, backbone.family(model), rows, splits.labels)
    tokenizer = backbone.load_tokenizer(config.model, config.data.max_length)
    tokens = [tokenizer("".join(text for text, _ in each.pieces))["input_ids"] for each in (more, prompt)]
    room = config.data.max_length + len(tokens[0]) - len(tokens[1])
    longest = backbone.longest(model)
    data = config.data.model_copy(update={"max_length": room if longest is None else min(room, longest)})
    score: Any = more.score
    own = PromptConfig(text=more.text, words=dict(more.words), score=score, answer=more.answer)
    return config.model_copy(update={"prompt": own, "data": data})


def demonstrations(splits: Splits, k: int, seed: int) -> list[Example]:
    """k training rows of each class (in all, without classes), drawn and shuffled by `seed`.

    Raises UserError for a class with fewer."""
    if not splits.labels:
        if len(splits.train) < k:
            raise UserError(f"icl: k must be <= the training rows, got {k} and {len(splits.train)}")
        return [splits.train[i] for i in np.random.RandomState(seed).permutation(len(splits.train))[:k]]
    rows = few_shot(splits, k, seed).train
    if len(rows) < k * len(splits.labels):
        counts = {name: sum(row.label == i for row in rows) for i, name in enumerate(splits.labels)}
        short = ", ".join(f"{name} {count}" for name, count in counts.items() if count < k)
        raise UserError(f"icl: k must be <= the training rows of every class, got {k} and {short}")
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def _surface(config: RunConfig, labels: tuple[str, ...]) -> Surface:
    return make_surface(config, labels, pick_device(config.device))


def _scores(surface: Surface, rows: list[Example], config: RunConfig) -> Tensor:
    return logits_of(surface, surface.encode(rows), config.micro_batch_size)


class _Cost:
    """Time and memory since the model was loaded."""

    def __init__(self, surface: Surface):
        self._surface = surface
        loaded(surface, searches=False)
        self._memory, self._begin = PeakMemory(str(surface.device)), time.perf_counter()

    def of(self, splits: Splits, config: RunConfig, passes: int = 0, logits: Tensor | None = None) -> Found:
        """What the surface says of the held-out rows. logits: when they are computed already."""
        rows, size = held_out(splits), config.micro_batch_size
        if splits.kind == "generation":
            texts, loss = TextRows(self._surface, rows, splits.kind, size).read()
            metrics = score_texts(texts, rows, splits.kind, loss)
        else:
            logits = _scores(self._surface, rows, config) if logits is None else logits
            labels = torch.tensor([row.label for row in rows])
            metrics = score(logits, labels)
            if splits.kind == "choice":
                metrics = score_texts(chosen(logits, rows, ()), rows, splits.kind, metrics["loss"])
        return Found(metrics, logits, passes, time.perf_counter() - self._begin, self._memory.mib())
