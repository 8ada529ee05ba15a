"""Ways to use a model without a search or a gradient: prompted as it is, calibrated, with demonstrations, and probed.

Each answers with the scores of the rows that a comparison is made on (`splits.held_out`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language import backbone, seen
from gradientless.language.prompting import PromptEncoder, with_demonstrations
from gradientless.language.splits import few_shot, held_out
from gradientless.language.surfaces import Surface
from gradientless.language.surfaces.full import FullSurface, PromptReading
from gradientless.language.tasks import Example, Prompt, Splits, find_task
from gradientless.run.assemble import make_surface
from gradientless.run.config import RunConfig, SurfaceConfig
from gradientless.run.evaluation import Cut, TextRows, logits_of, pick_device, score, score_texts
from gradientless.run.losses import chosen
from gradientless.run.memory import PeakMemory, loaded

Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Found:
    """What a way to use a model says of the held-out rows, and what it cost.

    metrics: of `score` or `score_texts`. logits: float32 [N, C] of classes or choices; none of texts that are written.
    forward_passes: over one batch, spent before the held-out rows are read. seconds: from the
    loaded model to the logits. peak_memory_mib: above the loaded model. texts_cut: how many held-out rows were cut.
    notes: lines for people, of what was cut or left out.
    """

    metrics: Mapping[str, float]
    logits: Tensor | None
    forward_passes: int
    seconds: float
    peak_memory_mib: float
    texts_cut: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """A way to use a model. options: its own, with their defaults. keys: what else of a configuration it reads.

    seeded: whether the seed changes more than the rows. kinds: of tasks that it can do.
    """

    use: Callable[[RunConfig, Splits, Options], Found]
    keys: tuple[str, ...]
    options: Options
    seeded: bool = False
    kinds: tuple[str, ...] = ("classification", "choice", "generation")


def zero_shot(config: RunConfig, splits: Splits, options: Options) -> Found:
    """The prompted model as it is: scores of the label words or choices, or the text that it writes."""
    surface = prompted(config, splits.labels)
    cost = _Cost(surface)
    return cost.of(splits, _answers(surface, held_out(splits), splits, config))


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
        passes = _batches(blank, config)
    else:
        bias, passes = _scores(surface, [free], config), 1
    encoded = surface.encode(rows)
    scores = logits_of(surface, encoded, config.micro_batch_size) - bias
    return cost.of(splits, Answers(Cut.among(encoded), scores), passes)


def icl(config: RunConfig, splits: Splits, options: Options) -> Found:
    """In-context learning: k answered training rows of each class (in all, without classes) in front of each row.

    They come on top of data.max_length. Where the model has no positions for them all, the first of them are left out
    until the row fits.
    """
    surface = prompted(config, splits.labels)
    cost, rows, reading = _Cost(surface), held_out(splits), surface.reading
    assert isinstance(reading, PromptReading)
    plain, limit = reading.encoder, seen.positions(surface.model)
    shown = demonstrations(splits, options["k"], config.seed)
    asked = _encoded(surface, rows, splits, config)
    parts: list[tuple[np.ndarray, Answers]] = []
    counts = np.zeros(len(rows), dtype=np.int64)  # demonstrations in front of each row
    for count, encoder, part in in_context(plain, shown, asked.wholes, limit):
        reading.encoder, counts[part] = encoder, count
        parts.append((part, _answers(surface, [rows[i] for i in part], splits, config)))
    reading.encoder = plain
    answers = replace(_joined(parts, len(rows)), cut=Cut.among(asked))
    fewer, notes = int((counts < len(shown)).sum()), ()  # type: tuple[int, tuple[str, ...]]
    if fewer:
        most = f"{counts.min()} to {counts.max()}" if counts.min() < counts.max() else f"{counts.max()}"
        notes = (
            f"shown       fewer than {len(shown)} demonstrations to {fewer:,} of {len(rows):,} rows: "
            f"{most} fit into the model's {limit} positions",
        )
    return cost.of(splits, answers, 0, notes)


def linear_probe(config: RunConfig, splits: Splits, options: Options) -> Found:
    """Logistic regression on the pooled features of the training rows (`surfaces/probe.py`)."""
    probe = SurfaceConfig(name="head", start="probe", pooling=config.surface.pooling)
    surface = _surface(config.model_copy(update={"surface": probe}), splits.labels)
    cost, train = _Cost(surface), surface.encode(splits.train)
    surface.begin(train)
    answers = _answers(surface, held_out(splits), splits, config)
    return cost.of(splits, replace(answers, cut=Cut.among(train) + answers.cut), _batches(splits.train, config))


PROMPTED = ("prompt", "surface.truncation", "surface.max_new_tokens", "data.max_length")
WAYS: dict[str, Way] = {
    "zero-shot": Way(zero_shot, PROMPTED, {}),
    "calibrated": Way(calibrated, PROMPTED, {"input": "N/A"}, kinds=("classification", "choice")),
    "icl": Way(icl, PROMPTED, {"k": 2}, seeded=True),
    "linear-probe": Way(linear_probe, ("surface.pooling", "data.max_length"), {}, kinds=("classification",)),
}
SPEAKING = tuple(name for name, way in WAYS.items() if way.keys is PROMPTED)  # those that ask the model for words
HEADS_OF_WORDS = ("ForMaskedLM", "ForPreTraining")  # how encoders with an output layer end in `architectures`


def mute(config: RunConfig) -> str | None:
    """Why the model of a configuration cannot be asked for words about its rows; None where it can."""
    family, own = backbone.family_of(config.model), config.prompt
    prompts = {} if config.task is None else find_task(config.task).prompts
    if own.text is None and family not in prompts:
        return f"there is no prompt for a {family} model"
    if config.kind == "classification" and not own.words and family not in prompts:
        return "there are no words for the labels"
    if family != "masked":
        return None
    heads = tuple(getattr(backbone.load_config(config.model), "architectures", None) or ())
    if any(head.endswith(HEADS_OF_WORDS) for head in heads):
        return None
    return f"'{config.model}' has no output layer that says words"


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


def in_context(
    plain: PromptEncoder, shown: Sequence[Example], wholes: np.ndarray, limit: int | None
) -> Iterator[tuple[int, PromptEncoder, np.ndarray]]:
    """(how many of the rows `shown` stand in front, the encoder that puts them there, which rows it is for: int64).

    plain: the encoder without any. wholes: tokens of each row by it. limit: the most tokens of a row, if there is one.
    Of a row for which that is too few the first of `shown` are left out until it fits.
    """
    needed, pending = np.minimum(wholes, plain.max_length), np.arange(len(wholes))
    for first in range(len(shown) + 1):
        prompt = with_demonstrations(plain.prompt, plain.family, shown[first:], plain.labels)
        tokens = [
            len(plain.tokenizer("".join(text for text, _ in each.pieces))["input_ids"])
            for each in (prompt, plain.prompt)
        ]
        more = tokens[0] - tokens[1]
        fits = np.full(len(pending), limit is None or first == len(shown)) | (needed[pending] + more <= (limit or 0))
        if fits.any():
            room = plain.max_length + more
            yield len(shown) - first, plain.behind(prompt, min(room, limit or room)), pending[fits]
        pending = pending[~fits]
        if not len(pending):
            return


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


def _batches(rows: Sequence[Example], config: RunConfig) -> int:
    return -(-len(rows) // config.batch_size)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a surface says of some rows: `scores`, float32 [N, C], or `texts` with the summed `loss` of `tokens`."""

    cut: Cut
    scores: Tensor | None = None
    texts: tuple[str, ...] = ()
    loss: float = 0.0
    tokens: int = 0


def _encoded(surface: Surface, rows: list[Example], splits: Splits, config: RunConfig) -> Any:
    if splits.kind == "generation":
        return TextRows(surface, rows, splits.kind, config.micro_batch_size)
    return surface.encode(rows)


def _answers(surface: Surface, rows: list[Example], splits: Splits, config: RunConfig) -> Answers:
    encoded = _encoded(surface, rows, splits, config)
    if isinstance(encoded, TextRows):
        texts, loss = encoded.read()
        return Answers(Cut.among(encoded), None, tuple(texts), loss * encoded.tokens, encoded.tokens)
    return Answers(Cut.among(encoded), logits_of(surface, encoded, config.micro_batch_size))


def _joined(parts: Sequence[tuple[np.ndarray, Answers]], count: int) -> Answers:
    """Answers to parts of `count` rows as those to all; `cut` is the first part's."""
    if len(parts) == 1:
        return parts[0][1]
    texts, scores = [""] * count, None
    for rows, answers in parts:
        for row, text in zip(rows, answers.texts, strict=False):
            texts[row] = text
        if answers.scores is not None:
            if scores is None:  # a part may lack choices that others have
                widest = max(len(each.scores[0]) for _, each in parts if each.scores is not None)
                scores = torch.full((count, widest), -torch.inf)
            scores[torch.from_numpy(rows), : len(answers.scores[0])] = answers.scores
    loss, tokens = (sum(getattr(each, key) for _, each in parts) for key in ("loss", "tokens"))
    return Answers(parts[0][1].cut, scores, tuple(texts) if scores is None else (), loss, tokens)


class _Cost:
    """Time and memory since the model was loaded."""

    def __init__(self, surface: Surface):
        loaded(surface, searches=False)
        self._memory, self._begin = PeakMemory(str(surface.device)), time.perf_counter()

    def of(self, splits: Splits, answers: Answers, passes: int = 0, notes: tuple[str, ...] = ()) -> Found:
        """The answers to the held-out rows, scored."""
        rows, scores = held_out(splits), answers.scores
        if scores is None:
            metrics = score_texts(answers.texts, rows, splits.kind, answers.loss / answers.tokens)
        else:
            metrics = score(scores, torch.tensor([row.label for row in rows]))
            if splits.kind == "choice":
                metrics = score_texts(chosen(scores, rows, ()), rows, splits.kind, metrics["loss"])
        if told := answers.cut.of_settings():
            notes = (told, *notes)
        seconds = time.perf_counter() - self._begin
        return Found(metrics, scores, passes, seconds, self._memory.mib(), answers.cut.rows, notes)
