"""What a configuration means: its rows, its surface, its optimizer, and the objective of each step."""

from __future__ import annotations

import fnmatch
import inspect
import math
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError, unknown, with_kind
from gradientless.language import backbone, features
from gradientless.language.data import EncodedTexts, batch_indices
from gradientless.language.surfaces import SURFACES, Surface, options_of
from gradientless.language.surfaces.base import EncodedRows
from gradientless.language.tasks import Example, Prompt, find_task
from gradientless.run.config import (
    OF_THE_RUN,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SurfaceConfig,
    TensorConfig,
    is_epoch,
    optimizer_class,
    optimizer_options,
    resolve_entries,
    schedule_of,
    surface_class,
)
from gradientless.run.evaluation import logits_of
from gradientless.run.layers import shown
from gradientless.run.losses import LOSSES, ROWS, Loss
from gradientless.run.memory import batch_that_fits, is_out_of_memory
from gradientless.run.named import is_own
from gradientless.run.objective import BACKWARD, Objective
from gradientless.search.noise import Noise
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS, ForwardOptimizer
from gradientless.search.schedules import multiplier

NEVER = 1 << 30  # steps
PASSES_OF_FIRST_ORDER = 1 + BACKWARD
FEW = 4  # rows that a CPU is given at a time, where the model itself runs in every step

Rates = Callable[[int], list[float]]


def make_surface(config: RunConfig, labels: tuple[str, ...], device: str, model: str | None = None) -> Surface:
    """The surface at its base: the pretrained body, and the head as the seed makes it. model: stands in for
    config.model, where the same model lies elsewhere."""
    name = config.surface.name
    kind, model = surface_class(name), config.model if model is None else model
    known = options_of(kind)
    if config.kind != "classification" and ("readout" not in known or config.surface.readout == "head"):
        have = ", ".join(name for name, other in sorted(SURFACES.items()) if "readout" in options_of(other))
        raise UserError(
            f"surface: must read a prompt for a task of kind {config.kind} ({have}), got '{config.surface.name}'"
            + (" with readout 'head'" if "readout" in known else "")
        )
    options = config.surface.model_dump(exclude={"name", "recompute", "cache"}, exclude_none=True)
    if options.get("start") == "previous":  # which is taken up once the surface stands
        del options["start"]
    if "readout" in known:
        options["prompt"] = prompt_of(config, model)
        if options["readout"] == "auto":
            options["readout"] = "head" if options["prompt"] is None else "prompt"
    strange = []
    if config.surface.cache and not kind.keeps_states:
        have = ", ".join(name for name, other in sorted(SURFACES.items()) if other.keeps_states)
        strange.append(
            f"surface.cache: surface '{config.surface.name}' has no states to keep, got true; those that have: {have}"
        )
    if config.surface.cache and config.surface.unfrozen:
        strange.append(f"surface.cache: needs a frozen backbone, got surface.unfrozen = {config.surface.unfrozen}")
    for key, value in options.items():
        if key in SurfaceConfig.model_fields and key not in known and value != SurfaceConfig.model_fields[key].default:
            have = ", ".join(name for name, other in sorted(SURFACES.items()) if key in options_of(other))
            strange.append(
                f"surface.{key}: surface '{config.surface.name}' has no such option, got {shown(value)}; "
                f"those that have it: {have}"
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in (*options, *OF_THE_RUN):
            strange.append(f"surface.{key}: must be given for surface '{config.surface.name}', got nothing")
    if strange:
        raise UserError("\n".join(strange))
    if config.model.startswith(backbone.STARTER) and options["head"] == "auto" and options.get("start") != "probe":
        options["head"] = "two-layer"  # as `create` has it for the starter's name, wherever the model lies
    of_run = {"seed": config.seed, "device": device, "dtype": config.dtype, "max_length": config.data.max_length}
    taken = {key: value for key, value in options.items() if key in known}
    made = _made("surface", name, lambda: kind.create(model, labels, **of_run, **taken))
    if is_own(name):
        _require_surface(name, made)
    return made  # type: ignore[no-any-return]


def _require_surface(name: str, made: object) -> None:
    """Raises UserError for what a class of the user's own made, unless a run can use it."""
    if not isinstance(made, Surface):
        raise UserError(f"surface: create of '{name}' must return a Surface, got {type(made).__name__}")
    lacks = [key for key in ("model", "labels", "max_length", "dropout") if not hasattr(made, key)]
    if lacks:
        raise UserError(f"surface: '{name}' must have what a Surface has, got no {', '.join(lacks)}")
    tensors = made.trainable()
    if not tensors or not all(tensor.requires_grad for tensor in tensors.values()):
        got = "none" if not tensors else "some that are frozen"
        raise UserError(f"surface: '{name}' must have tensors to tune, which require a gradient, got {got}")


def speaks(config: RunConfig, model: str) -> bool:
    """Whether the surface reads the model's output layer."""
    if "readout" not in options_of(surface_class(config.surface.name)):
        return False
    return config.surface.readout == "tokens" or prompt_of(config, model) is not None


def prompt_of(config: RunConfig, model: str) -> Prompt | None:
    """The prompt by which the model is read: the configuration's own, or the task's for the model's family."""
    own, family = config.prompt, backbone.family(backbone.load_config(model))
    classes = config.kind == "classification"
    wanted = not classes or config.surface.readout == "prompt" or bool(own.text or own.name or own.words)
    if config.surface.readout == "head" or (family == "masked" and not wanted):
        return None
    task = None if config.task is None else find_task(config.task)
    tasks = {} if task is None else task.prompts
    if own.name is not None:
        if task is None:
            raise UserError(f"prompt.name: must name a prompt of a task, got '{own.name}' without one")
        names = [key.partition(":")[2] for key in tasks if key.startswith(f"{family}:")]
        if own.name not in names:
            raise unknown("prompt.name", f"{family} prompt of {task.key}", own.name, names or ["none"])
    if own.text is None and family not in tasks:
        if wanted:
            raise UserError(f"prompt.text: must be given for a {family} model where the task has none, got nothing")
        return None
    base = tasks.get(family) if task is None or own.name is None else task.prompt(family, own.name)
    text = own.text if own.text is not None else base.text  # type: ignore[union-attr]
    words = own.words or (base.words if base is not None else {})
    if classes and not words:
        raise UserError("prompt.words: must name a word for every label, got none")
    score = own.score or (base.score if base is not None and own.text is None else "sum")
    answer = own.answer or (base.answer if base is not None else "{answer}")
    return Prompt(text, words, score, answer)


def base_checksum(surface: Surface) -> str:
    """sha256 of all weights of the surface."""
    return backbone.checksum(surface)


def make_optimizer(config: RunConfig, surface: Surface, rows: int | None = None) -> torch.optim.Optimizer:
    """The optimizer over the surface's tensors, each in a group of its own where the recipe names tensors.

    rows: to train on, which tell the steps that "epoch" means as an option; None where a few steps are all."""
    name = config.optimizer.name
    epoch = NEVER if rows is None else math.ceil(Fraction(rows, config.batch_size))
    options = _options(config.optimizer, surface, epoch)
    tensors = list(surface.trainable().items())
    groups: Any = tensors
    if config.tensors:
        groups = []
        for key, tensor in tensors:
            match = next((t for t in config.tensors if fnmatch.fnmatchcase(key, t.pattern)), None)
            own = {} if match is None else _options(match, surface, epoch)
            if "radius" in own:
                own["lr"] = own.pop("radius")
            groups.append({"params": [(key, tensor)], **own})
        for t in config.tensors:
            if not any(fnmatch.fnmatchcase(key, t.pattern) for key, _ in tensors):
                names = ", ".join(key for key, _ in tensors)
                raise UserError(f"tensors: pattern must match a tensor, got '{t.pattern}'. Tensors: {names}")
    if name in FIRST_ORDER:
        kind = FIRST_ORDER[name]
        try:
            return kind.type(_plain(groups), **{**kind.defaults, **options})
        except (TypeError, ValueError) as error:  # options that do not go together
            raise UserError(f"optimizer: options must be what {name} takes together, got {options} ({error})") from None
    chosen = optimizer_class(name)
    if issubclass(chosen, ForwardOptimizer):
        if "lr" in options and name in OPTIMIZERS and "lr" not in optimizer_options(name)[0]:
            raise UserError(f"optimizer.lr: must be given as radius for {name}, got lr")
        if is_own(name) and "seed" not in inspect.signature(chosen).parameters:
            raise UserError(f"optimizer: '{name}' must take seed as an option, which decides its noise, got none")
        if "model" in inspect.signature(chosen).parameters:
            options["model"] = surface  # where an evaluator works inside it
        return _made("optimizer", name, lambda: chosen(groups, **options, seed=config.seed))
    if not issubclass(chosen, torch.optim.Optimizer):
        raise UserError(f"optimizer: '{name}' must be a ForwardOptimizer or a torch.optim.Optimizer, got {chosen!r}")
    return _made("optimizer", name, lambda: chosen(_plain(groups), **options))


def _made(owner: str, name: str, make: Callable[[], Any]) -> Any:
    """An optimizer or a surface; what the user's own raises while it is made is one line."""
    try:
        return make()
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)) or not is_own(name):
            raise
        raise UserError(f"{owner}: '{name}' must be made without an error, got {with_kind(error)}") from error


def _options(section: OptimizerConfig | TensorConfig, surface: Surface, epoch: int) -> dict[str, Any]:
    """The section's options of the optimizer, with "N*width" and "epoch" as numbers."""
    options = {key: epoch if is_epoch(key, value) else value for key, value in section.arguments.items()}
    if "entries" in options:
        options["entries"] = resolve_entries(options["entries"], surface.width)
    return options


def _plain(groups: Any) -> Any:
    """Parameters as first-order optimizers of any torch version take them: without names."""
    if groups and isinstance(groups[0], dict):
        return [{**group, "params": [tensor for _, tensor in group["params"]]} for group in groups]
    return [tensor for _, tensor in groups]


def length_of(config: RunConfig, optimizer: torch.optim.Optimizer, rows: int) -> int:
    """Steps of a run over so many rows: as configured, as many as its epochs hold or as its forward passes pay for."""
    steps = config.steps
    if config.epochs is not None:
        whole = math.ceil(Fraction(str(config.epochs)) * rows / config.batch_size)
        steps = whole if steps is None else min(steps, whole)
    budget = config.forward_passes
    if budget is None:
        assert steps is not None
        return steps
    if isinstance(optimizer, ForwardOptimizer):
        return optimizer.steps_within(budget, steps)
    if budget < PASSES_OF_FIRST_ORDER:
        raise UserError(f"forward_passes: must pay for one step ({PASSES_OF_FIRST_ORDER} passes), got {budget}")
    return min(budget // PASSES_OF_FIRST_ORDER, steps or budget)


def make_rates(config: RunConfig, optimizer: torch.optim.Optimizer, surface: Surface, steps: int) -> Rates:
    """The learning rate (or radius) of every group as a function of the step."""
    start = [float(group["lr"]) for group in optimizer.param_groups]
    schedules: list[ScheduleConfig] = [config.schedule] * len(start)
    if config.tensors:
        for i, key in enumerate(surface.trainable()):
            own = next((t.schedule for t in config.tensors if fnmatch.fnmatchcase(key, t.pattern)), None)
            schedules[i] = own or config.schedule
    curves = [
        multiplier(schedule_of(s.name), steps, floor=s.floor, warmup=s.warmup, cycles=s.cycles) for s in schedules
    ]
    return lambda step: [rate * curve(step) for rate, curve in zip(start, curves, strict=True)]


class Rows:
    """One split as the surface takes it: features computed once, or tokens when they are to be computed each step.

    encoded: as the loss of the configuration reads it. Without `loss`, for the scores of `logits` alone.
    seconds: spent on features, or on a frozen backbone's states; little where the cache held them.
    """

    def __init__(
        self, surface: Surface, examples: Sequence[Example], config: RunConfig, title: str, loss: Loss | None = None
    ):
        self.surface, self._config = surface, config
        self.loss = LOSSES["cross-entropy"] if loss is None else loss
        self._examples, self._tokens = examples, None
        if self.loss.reads == "answers":
            answers = surface.encode_answers(examples)
            self._tokens, encoded = answers.tokens.to(surface.device), cast(EncodedRows, answers)
        elif self.loss.reads == "texts":
            encoded = cast(EncodedRows, surface.encode_questions(examples))
        else:
            encoded = surface.encode(examples)
        begin = time.perf_counter()
        if config.surface.cache:
            if self._tokens is not None or config.kind != "classification" or isinstance(encoded, EncodedTexts):
                raise UserError("surface.cache: must be on rows of a class, got answers or texts to be said")
            size = config.micro_batch_size or min(config.batch_size, 64)
            encoded = features.keep_states(cast(Any, surface), encoded, size, title=title)
        self.encoded, self.labels = encoded, encoded.labels.to(surface.device)
        self.features: np.ndarray | None = None
        if surface.cacheable and not config.surface.recompute:
            size = config.micro_batch_size or min(config.batch_size, 64)
            try:
                # A plain array over the mapped file: the memmap type itself is slow to index.
                self.features = np.asarray(features.compute(cast(Any, surface), cast(Any, encoded), size, title=title))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold what did not fit
                longest = np.argsort(encoded.lengths)[::-1]
                raise batch_that_fits(
                    lambda count: surface.prepare(encoded.batch(longest[:count].copy())), size, surface.device
                ) from None
        self.seconds = time.perf_counter() - begin

    def part(self, rows: np.ndarray) -> Tensor | dict[str, Tensor]:
        if self.features is None:
            return self.encoded.batch(rows)
        return torch.from_numpy(self.features.take(rows, axis=0))

    def batch(self, step: int) -> np.ndarray:
        """Which rows step `step` sees: int64 [B], a function of (seed, step) alone."""
        return batch_indices(self._config.seed, step, len(self.encoded), self._config.batch_size)

    def objective(self, step: int, noise: Noise, say: Callable[[str], None] = print) -> Objective:
        """The loss on the batch of `step`."""
        config = self._config
        pieces = self._pieces(self.batch(step))
        parts = [(self.surface.prepare(self.part(piece)), self.expected(piece)) for piece in pieces]
        generator = None
        if self.surface.training and self.surface.dropout > 0:
            generator = torch.Generator(self.surface.device).manual_seed((config.seed << 32 | step) % 2**63)
        return Objective(self.surface, parts, noise, self.loss, generator, say)

    def expected(self, rows: np.ndarray) -> Any:
        """What the loss expects of `rows`; see `Loss.against`."""
        if self.loss.against == ROWS:
            return [self._examples[int(row)] for row in rows]
        if isinstance(self.encoded, EncodedTexts):
            return self.encoded.expected(rows).to(self.labels.device)
        values = self.labels if self._tokens is None else self._tokens
        return values[torch.from_numpy(rows).to(values.device)]

    def _pieces(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of a step in pieces that the model sees at a time; tokens are sorted by length: little padding."""
        size = self._config.micro_batch_size or len(rows)
        if not self.surface.cacheable:
            rows = rows[np.argsort(self.encoded.lengths[rows], kind="stable")]
            if self.surface.device.type == "cpu":  # which is as fast with a few rows as with many
                size = min(size, FEW)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of every row at the weights as they stand: [N, C] on the CPU."""
        if self.features is None:
            return logits_of(self.surface, self.encoded, self._config.micro_batch_size)
        found = []
        for start in range(0, len(self.encoded), 4096):
            piece = np.arange(start, min(start + 4096, len(self.encoded)))
            found.append(self.surface.logits(self.surface.prepare(self.part(piece))).float().cpu())
        return torch.cat(found)
