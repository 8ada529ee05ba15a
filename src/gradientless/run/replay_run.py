"""Make a run's tuned model again from its base model and its trajectory, without data."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.surfaces import Surface
from gradientless.language.surfaces.adapter import ADAPTER_CONFIG, AdapterSurface, name_base
from gradientless.language.surfaces.full import FullSurface
from gradientless.language.surfaces.opening import Opening, opening
from gradientless.language.surfaces.saved import NOTE, changed, class_of, made_of, note_files, read_note, rows_of
from gradientless.run.assemble import base_checksum, make_optimizer, make_rates, make_surface
from gradientless.run.card import CARD, MADE, asked_with, card, made_by
from gradientless.run.config import RunConfig, optimizer_options
from gradientless.run.evaluation import load_splits, load_surface, model_folder, require_finite, save_model
from gradientless.run.named import TRUST
from gradientless.run.origin import HEADER, Origin, code_of, data_of, differing
from gradientless.run.runfolder import BEST, RunFolder
from gradientless.run.stages import Before, before
from gradientless.schema import fits
from gradientless.search.optim import ForwardOptimizer
from gradientless.search.trajectory import Trajectory
from gradientless.writing import replacing, require_no_links

Write = Callable[[Surface], str]
"""Writes a model, and says where."""

BIT_EXACT = {  # what a replay on another kind of device may expect of the noise
    "rademacher": "the same bits on CPU and GPU",
    "near_normal": "the same bits on CPU and GPU",
    "gaussian": "the same bits on every CPU backend; on a GPU the last bits may differ",
    "sphere": "the same bits on one machine; elsewhere the last bits may differ",
}


def replay_run(
    run: str | Path,
    base: str | None = None,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: bool = False,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Replay the run in folder `run` to the step whose weights it saved; write the model to `out`, new or empty.

    base: the base model, when it lies elsewhere than the configuration says. Returns what was done, for people: steps,
    whether the weights equal the run's bit for bit, and where the model was written. progress: told (steps, total).
    keep: whether to write the model to replayed/ in the run folder where `out` is None, unless that is being written
    to. trust_code: whether code that the run's configuration names may be run.
    Of a run of several stages each is replayed from what the stage before left; one by a first-order method, which has
    no log of losses, is taken as it stands. Raises UserError.
    """
    folder = RunFolder.open(run)
    code = None if trust_code else ()
    config = folder.read_config(code)
    if out is not None:
        require_new(out)
    elif keep:
        require_no_links(folder.path)

    def save_into(place: Path, surface: Surface) -> None:
        last = config.staged[-1].config if config.stages else config
        noted = rows_of(folder.model) if (folder.model / NOTE).exists() else {}
        name = backbone.hub_name(config.model if base is None else base)
        made = {"base": name, "unchanged": not config.stages and folder.whole is None}
        save_model(surface, place, noted, last.surface.name, made)

    def save(surface: Surface) -> str:
        if out is not None:
            save_into(Path(out), surface)
            return str(out)
        try:
            with folder.held(), replacing(folder.replayed) as place:
                save_into(place, surface)
        except UserError as error:
            return f"not written; --out DIR writes it elsewhere ({error})"
        return str(folder.replayed)

    write = save if keep or out is not None else None
    with tempfile.TemporaryDirectory() as work:
        if config.stages:
            return _replay_stages(folder, config, base, write, progress, Path(work))
        if folder.whole is None:
            return _replay(folder, config, base, write, progress, None)
        stages = folder.whole.read_config(code).staged
        stage = next(stage for stage in stages if stage.folder == folder.path.absolute().name)
        behind = before(folder.whole, stages, stage, base, Path(work))
        return _replay(folder, stage.config, base, write, progress, behind)


def require_new(out: str | Path) -> None:
    """Raises UserError unless `out` is free, or an empty folder."""
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"out: must be a new or empty folder, got '{out}'")


def _replay_stages(
    whole: RunFolder,
    config: RunConfig,
    base: str | None,
    write: Write | None,
    progress: Callable[[int, int], None],
    work: Path,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    stages = config.staged
    for stage in stages:
        folder = whole.stage(stage.folder)
        if not folder.holds_run():
            result[stage.folder] = "not begun"
        elif not folder.trajectory.exists():
            result[stage.folder] = f"not replayed: {stage.config.optimizer.name} keeps no log of losses"
        else:
            last = stage is stages[-1]
            behind = before(whole, stages, stage, base, work)
            found = _replay(folder, stage.config, base, write if last else None, progress, behind)
            result |= {f"{stage.folder}: {name}": value for name, value in found.items()}
    if len(result) == len(stages):  # one line of each: none was replayed
        raise UserError(
            f"replay: a stage must hold {whole.trajectory.name}, got none in '{whole.path}'; first-order stages have "
            "no log of losses and start again from their checkpoint: gradientless train --resume"
        )
    if write is not None and stages[-1].folder in result:
        result["model"] = "not written: the last stage was not replayed"
    return result


def _replay(
    folder: RunFolder,
    config: RunConfig,
    base: str | None,
    write: Write | None,
    progress: Callable[[int, int], None],
    behind: Before | None,
) -> dict[str, Any]:
    """Replay one run, or one stage behind another."""
    if not folder.trajectory.exists():
        raise UserError(
            f"replay: the run must hold {folder.trajectory.name}, got none in '{folder.path}'; first-order runs have "
            "no log of losses and start again from their checkpoint: gradientless train --resume"
        )
    log = Trajectory.read(folder.trajectory)
    fits(f"replay: the header of {folder.trajectory}", log.header, HEADER)
    then = log.header.get("origin", {})
    origin = Origin([then], "replay", other_code=True, say=lambda _: None)
    origin.state("config", config.decisive())
    labels = then["labels"] if "labels" in then else _labels(folder, config)
    surface = make_surface(config, tuple(labels), "cpu", base if behind is None else behind.model)
    parts = [] if behind is None else behind.give(surface)
    needs_rows = surface.needs_rows and "side" not in parts
    if needs_rows:
        splits = load_splits(config)
        origin.state("data", data_of(splits))
        surface.begin(surface.encode(splits.train))
    if log.header.get("base") != base_checksum(surface):
        what = "base model and the rows must be those" if needs_rows else "base model must be the one"
        raise UserError(f"replay: the {what} that the run started from, got another: {base or config.model}")
    optimizer = make_optimizer(config, surface, log.header.get("rows"))
    if not isinstance(optimizer, ForwardOptimizer):
        raise UserError(f"replay: the optimizer must be a forward one, got {config.optimizer.name}")
    summary = folder.read_summary() if folder.summary.exists() else {}
    steps = int(summary.get("model_step", len(log)))
    if len(log) < steps:
        raise UserError(
            f"replay: {folder.trajectory} must hold the {steps:,} steps of the run's weights, got {len(log):,}; was it "
            "shortened?"
        )
    if summary.get("trajectory", log.check(len(log))) != log.check(len(log)):
        raise UserError("replay: the log must hold what the run wrote, got a changed file; its check sum differs")
    early = summary.get("scheduled_steps", config.steps or len(log))  # the first logs did not say
    total = int(log.header.get("scheduled_steps", early))
    optimizer.predicted_lr = make_rates(config, optimizer, surface, total)
    optimizer.follow(log.header)
    begin = time.perf_counter()
    for step in range(steps):
        optimizer.replay_step(log[step])
        progress(step + 1, steps)
    optimizer.settle()
    if steps == total:
        optimizer.finish()
    require_finite("replay", surface.trainable())
    seconds = f"{time.perf_counter() - begin:.1f}"
    if summary.get("seconds") and steps:
        seconds += f" (the run took {summary['seconds'] * steps / max(1, summary['steps']):.1f} for these steps)"
    result: dict[str, Any] = {"steps": f"{steps:,} of {len(log):,}"}
    kept = folder.load_checkpoint(BEST)
    if kept is None or kept[2] != steps:
        result["bit-equal to the run"] = f"not known: the run holds no {BEST}-{steps}"
    else:
        try:
            equal = all(
                name in kept[0] and torch.equal(tensor, kept[0][name]) for name, tensor in surface.trainable().items()
            )
            result["bit-equal to the run"] = "yes" if equal else "NO"
        except FileNotFoundError:
            equal, result["bit-equal to the run"] = True, "not known: the run has gone on meanwhile"
        if not equal:
            warnings.warn("replay: the weights differ from the run's; another version of torch or numpy?", stacklevel=2)
    if (folder.model / NOTE).exists() and (others := changed(folder.model)):
        result["saved model"] = f"CHANGED: {', '.join(others)}"
    noise = str({**optimizer_options(config.optimizer.name)[0], **config.optimizer.arguments}.get("noise", "gaussian"))
    code = code_of(config)
    if then.get("code", code) != code:
        result["code"] = f"other than the run's: {differing(then['code'], code)}"
    result["log"] = f"{folder.trajectory.stat().st_size:,} bytes"
    result["seconds"] = seconds
    result["noise"] = f"{noise}: {BIT_EXACT.get(noise, 'of your own')}"
    if write is not None:
        result["model"] = write(surface)
    return result


def _labels(folder: RunFolder, config: RunConfig) -> tuple[str, ...]:
    """Label names: from the saved model, so that no data is needed; from the data when there is none yet."""
    if (folder.model / NOTE).exists():
        return tuple(read_note(folder.model)["labels"])
    return load_splits(config).labels


def export_run(
    run: str | Path, out: str | Path, dtype: str | None = None, trust_code: bool = False, merge: bool = False
) -> Exported:
    """Write the model of a run (or of a saved folder) to the new folder `out`, with a card that says how to open it.

    dtype: to cast the weights to. trust_code: as of `replay_run`. merge: put an adapter into the model's own weights.
    Raises UserError.
    """
    require_new(out)
    code = None if trust_code else ()
    place, folder = Path(out), RunFolder(Path(run))
    with tempfile.TemporaryDirectory() as work:
        source: str | Path = run
        if folder.holds_run() and not folder.model.is_dir() and folder.trajectory.exists():
            replay_run(run, None, work, trust_code=trust_code)
            source = work
        saved = model_folder(source)
        surface, noted, own = load_surface(source, "cpu", code), rows_of(saved), class_of(saved).get("name", "")
        if merge and not surface.mergeable:
            kind = read_note(saved)["surface"]
            raise UserError(f"export: --merge needs an adapter of lora, ia3 or side_lora, got surface {kind}")
        made = (made_by(folder) if folder.holds_run() else {}) | made_of(saved, MADE)
        if merge:
            surface.save_merged(Path(work) / "merged")
            surface, own = load_surface(Path(work) / "merged", "cpu"), ""
    if dtype is not None:
        surface.to(backbone.dtype_of(dtype))
        require_finite("export", dict(surface.named_parameters()))
    if not own and isinstance(surface, AdapterSurface) and surface.tunes == "model":
        surface = FullSurface(surface.reading, dropout=surface.dropout)  # nothing is in it but the model's own
    save_model(surface, place, noted, own, made)
    if surface.prompted and made.get("base") and made.get("unchanged") and (place / ADAPTER_CONFIG).exists():
        name_base(place, made["base"])
        note_files(place)
    pairs = bool(noted.get("pairs"))
    here, there = (opening(surface, folder, pairs, bool(own)) for folder in (".", str(place)))
    asked = asked_with(surface, pairs) + (f" {TRUST}" if own else "")
    (place / CARD).write_text(card(surface, here, made, asked), encoding="utf-8")
    return Exported(place, there, asked)


@dataclass(frozen=True)
class Exported:
    """What was exported: where to, how it opens, and what `gradientless predict` is given behind the folder."""

    folder: Path
    opening: Opening
    asked: str
