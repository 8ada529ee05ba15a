"""What a stage of a run leaves, and what the next one takes up of it.

A stage is a run of its own in RUN/stages/NUMBER-NAME. What it tuned is handed on in two ways. Weights of the model's
own reach the next stage as the model that it is made of: a plain folder, with adapters merged. Behind a classification
head that model has lost its output layer; a stage that needs one has it from the last model that had it. A side
network, virtual tokens, an adapter of the same options and a head are copied tensor by tensor, where the next stage has
the same. The weights are those of the best evaluation, as they are saved. All of it lies on the disk, so that a stage
that is resumed or replayed starts from the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.surfaces import Surface
from gradientless.language.tasks import Splits
from gradientless.run.assemble import Rows, length_of, make_optimizer, make_rates, make_surface, speaks
from gradientless.run.config import RunConfig, Stage
from gradientless.run.evaluation import load_splits
from gradientless.run.losses import loss_of, weights_of
from gradientless.run.runfolder import BEST, OF_STAGE, RunFolder
from gradientless.search.noise import Noise
from gradientless.search.optim import ForwardOptimizer
from gradientless.writing import replacing

MANY = 100  # forward passes of a step above which none is tried before the run

Leaves = Mapping[str, Any]
"""What a stage leaves, JSON-able. model: where the plain model lies in the stage's folder, None where its own weights
are as they were. prompted: whether that model has its output layer. parts: name -> means, and the tensors' shapes."""


def leaves(surface: Surface) -> dict[str, Any]:
    """What a stage with this surface leaves."""
    folder = RunFolder(Path())
    plain = folder.merged / surface.merged if surface.mergeable else None
    if surface.plain is not None:
        plain = folder.model / surface.plain
    return {
        "model": None if plain is None else plain.as_posix(),
        "prompted": surface.prompted,
        "parts": {
            name: {"means": part.means, "tensors": {key: list(tensor.shape) for key, tensor in part.tensors.items()}}
            for name, part in surface.parts().items()
        },
    }


def keeps_adapter(stage: Stage, following: Stage) -> bool:
    """Whether the next stage tunes the same adapter further, rather than a model with it merged."""
    one, other = ((c.surface.model_dump(exclude={"start"}), c.prompt) for c in (stage.config, following.config))
    return one == other and following.config.surface.start in (None, "previous")


def taken(stage: Stage, left: Leaves, following: Stage, mine: Leaves) -> list[str]:
    """The parts that the next stage takes up tensor by tensor. mine: what it would leave itself."""
    if following.config.surface.start not in (None, "previous"):
        return []
    same = [part for part in mine["parts"] if part != "model" and left["parts"].get(part) == mine["parts"][part]]
    return [part for part in same if part != "adapter" or keeps_adapter(stage, following)]


def handed_model(stage: Stage, left: Leaves, following: Stage) -> str | None:
    """Where in the stage's folder the model lies that the next stage is made of; None where it is made of the same."""
    kept = "adapter" in left["parts"] and keeps_adapter(stage, following)
    return None if kept else left["model"]


# --- before anything runs ------------------------------------------------------------------------------------------


def check(config: RunConfig, device: str) -> None:
    """Make every stage's surface and optimizer once, of the base model, try a step on two rows, and see that each stage
    can go on from the one before. Raises UserError with a line for each mistake."""
    lines: list[str] = []
    shared = load_splits(config)
    stage: Stage | None = None
    left: Leaves = {}
    for following in config.staged:
        try:
            own = (following.config.task, following.config.data) != (config.task, config.data)
            splits = load_splits(following.config) if own else shared
            mine = _rehearsed(following.config, splits, device)
        except UserError as error:
            lines += [following.line(line) for line in str(error).split("\n")]
            stage = None  # what it would leave is not known
            continue
        if stage is not None:
            lines += _refusals(stage, left, following, mine)
        elif following.number == 1 and following.config.surface.start == "previous":
            lines.append(f"{following.owner}.surface.start: 'previous' needs a stage before, got the first")
        stage, left = following, mine
    if lines:
        raise UserError("\n".join(lines))


def _rehearsed(config: RunConfig, splits: Splits, device: str) -> Leaves:
    surface = make_surface(config, splits.labels, device)
    optimizer = make_optimizer(config, surface, len(splits.train))
    make_rates(config, optimizer, surface, length_of(config, optimizer, len(splits.train)))
    few = config.model_copy(
        update={
            "batch_size": 2,
            "micro_batch_size": 2,
            "surface": config.surface.model_copy(update={"recompute": True, "cache": False}),
        }
    )
    loss = loss_of(config.loss, config.reward, config.kind, splits.labels, weights_of(config.class_weights, splits))
    objective = Rows(surface, splits.train[:2], few, "", loss).objective(0, Noise(config.seed))
    if not isinstance(optimizer, ForwardOptimizer):
        objective.backward()
    elif optimizer.forecast(1) <= MANY:
        optimizer.rehearse(objective)
    return leaves(surface)


def _refusals(stage: Stage, left: Leaves, following: Stage, mine: Leaves) -> Iterator[str]:
    parts = taken(stage, left, following, mine)
    own = {name: part["means"] for name, part in mine["parts"].items() if name != "model"}
    theirs = {name: part["means"] for name, part in left["parts"].items()}
    if following.config.surface.start == "previous" and own and not parts:
        yield (
            f"{following.owner}.surface.start: 'previous' needs {' or '.join(own.values())} of {stage.owner}, "
            f"got {', '.join(theirs.values())}"
        )
        return
    merged = {"model", "adapter"} if handed_model(stage, left, following) is not None else set()
    lost = [name for name in theirs if name not in (*parts, *merged)]
    if set(lost) - {"head"} or lost == list(theirs):
        told = ", ".join(theirs[name] for name in lost)
        has = ", ".join(own.values()) or mine["parts"]["model"]["means"]
        yield f"{following.owner}: needs a place for what {stage.owner} tuned, {told}; got {has}"


# --- from one stage to the next ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Before:
    """The stage before one, what it left, and the model that the next one's surface is made of."""

    stage: Stage
    following: Stage
    folder: RunFolder
    left: Leaves
    model: str
    changed: bool
    """Whether the stage itself changed that model."""

    def give(self, surface: Surface) -> list[str]:
        """Copy into `surface` what the stage left of its parts; returns their names."""
        parts = taken(self.stage, self.left, self.following, leaves(surface))
        loaded = self.folder.load_checkpoint(BEST) if parts else None
        if parts and loaded is None:
            raise UserError(f"{self.stage.owner}: must hold the weights that it left, got none in '{self.folder.path}'")
        with torch.no_grad():
            for part in parts:
                for name, tensor in surface.parts()[part].tensors.items():
                    found = loaded[0].get(name)  # type: ignore[index]
                    if found is None or found.shape != tensor.shape:
                        told = f"must hold the weights that it left, got none or others of '{name}'"
                        raise UserError(f"{self.stage.owner}: {told} in '{self.folder.path}'")
                    tensor.copy_(found)
        return parts


def before(
    whole: RunFolder, stages: Sequence[Stage], following: Stage, base: str | None = None, work: Path | None = None
) -> Before | None:
    """What stands before the stage `following` of the run in `whole`; None before the first.

    base: the base model, where it lies elsewhere. work: a folder for a model that has to be made, for those who only
    read the run; it is made in the stage's folder by default. Raises UserError when a stage before has not ended.
    """
    model, found = following.config.model if base is None else base, None
    speaking, has = model, True  # the last model with an output layer, and whether that is `model`
    for stage, next_one in itertools.pairwise(stages[: following.number]):
        folder = whole.stage(stage.folder)
        left = folder.read_summary(OF_STAGE)["leaves"]
        place = handed_model(stage, left, next_one)
        if place is not None:
            model, has = str(folder.path / place), left["prompted"]
        if not has and speaks(next_one.config, model):
            spoken = folder.speaking
            if not spoken.exists() and work is not None:
                spoken = work / stage.folder
            if not spoken.exists():
                options = stage.config.dtype, stage.config.data.max_length
                with replacing(spoken) as made:
                    backbone.save_speaking(model, speaking, made, *options)
            model, has = str(spoken), True
        if has:
            speaking = model
        found = Before(stage, next_one, folder, left, model, place is not None)
    return found
