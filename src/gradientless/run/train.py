"""The only training loop: batch, objective, optimizer, log, evaluation, checkpoint; resumed to the same bits.

A resumed run starts from its last checkpoint, repeats the steps that the trajectory still holds without measuring them
again, and goes on. Logs are cut back to the checkpoint and written again on the way, so that they end byte-equal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import NotFinite, UserError, one_line, with_kind
from gradientless.language import backbone
from gradientless.language.data import EncodedTexts, class_balance
from gradientless.language.metrics import METRICS, accuracy_name, alike, by_class, f1_name, highest
from gradientless.language.tables import BadRows
from gradientless.run.assemble import (
    PASSES_OF_FIRST_ORDER,
    Rows,
    base_checksum,
    length_of,
    make_optimizer,
    make_rates,
    make_surface,
)
from gradientless.run.config import RunConfig, optimizer_options
from gradientless.run.evaluation import (
    Cut,
    TextRows,
    evaluate_rows,
    load_splits,
    pick_device,
    reads,
    reads_padding,
    require_finite,
    save_model,
    saved_otherwise,
    score,
    score_texts,
    score_tokens,
    share_right,
)
from gradientless.run.losses import chosen, loss_of, rewarded, weights_of
from gradientless.run.memory import PeakMemory, batch_that_fits, give_back, is_out_of_memory, loaded
from gradientless.run.named import texts_in
from gradientless.run.objective import Objective
from gradientless.run.origin import HEADER, ORIGIN, UNKNOWN, Origin, code_of, data_of, tokens_of
from gradientless.run.runfolder import BEST, BY_CLASS, OF_STAGE, RunFolder, Saved
from gradientless.run.stages import Before, before, check, keeps_adapter, leaves
from gradientless.schema import Maybe, fits, of_fields
from gradientless.search.noise import Noise
from gradientless.search.optim import ForwardOptimizer
from gradientless.search.trajectory import Trajectory
from gradientless.terminal import Console, Counter
from gradientless.writing import replacing

FIGURES = (*METRICS, "loss", "reward")  # of a summary, in their order
UNMOVED = 0.02  # share of the first training loss that a run must take off it, or it says that it did not
PATIENCE = 10  # steps in a row whose loss is not finite, after which a run stops, as methods that skip them have it
DIVERGING = 3  # logs in a row with a risen loss after which the run says so, or ends
GONE = 10  # times the first training loss and one more: what no schedule brings back
MEASURED = ("start", "step", "evaluation")  # what memory is measured of: "start" is what is done before the first step
LOOKED_AT = 64  # rows, of which the shortest and the longest show whether padding is read
ASKED = 200  # validation rows whose answers are kept, to be told beside those of before the first step
TOLD = 6  # of them that changed, which are kept whole
SLOW = 0.1  # seconds of a step from which every step is shown
SHOWN = 4  # rows whose scores the saved model must give again
PARTS = {"adapter": "adapter", "head": "head", "side": "side network"}  # of a surface, in words
SHARED_FROM = 1 << 27  # products of a head pass below which threads wait for each other longer than they work


class Stopped(Exception):
    """The run was asked to stop, saved its state at `step` (of the stage of that name, if any) and can be resumed."""

    def __init__(self, step: int, stage: str | None = None):
        super().__init__(f"stopped at step {step}")
        self.step, self.stage = step, stage

    @property
    def where(self) -> str:
        return f"step {self.step:,}" + ("" if self.stage is None else f" of stage {self.stage}")


@dataclass
class Progressed:
    """What the loop itself remembers between steps; part of every checkpoint."""

    step: int = 0
    forward_passes: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    last_loss: float | None = None  # mean training loss of the steps that were logged last
    logs: int = 0
    far: int = 0  # logs in a row whose mean loss was beyond coming back from
    diverged: bool = False
    evaluations: int = 0
    best_step: int = -1
    best_accuracy: float = -1.0  # or whatever ranks the evaluations: `Run.ranked`; if the loss does, `Run.shown`
    best_loss: float = float("inf")
    first_loss: float | None = None  # mean training loss of the first steps that were logged, or that of the first step
    risen: int = 0  # logs in a row whose mean loss stood far above the first
    not_finite: int = 0  # steps in a row whose loss was not finite
    stale: int = 0  # evaluations since the best one
    ended: bool = False
    seconds: float = 0.0  # of the loop, in all processes
    peaks: dict[str, float] = field(default_factory=dict)  # of memory, by part, the highest of all processes
    untuned: dict[str, float] = field(default_factory=dict)  # the figures of before the first step, where there are any
    answers: list[str] = field(default_factory=list)  # those of before the first step, to the first rows


STATE = {  # of a checkpoint
    "optimizer": dict,
    "progress": of_fields(Progressed),
    "origin": Maybe(ORIGIN),
    "logs": Maybe({str: str}),
    "trajectory": Maybe(str),
}
OF_BEST = {"found": Maybe({str: float}), "by_class": Maybe(BY_CLASS), "answers": Maybe([str])}


class Run:
    """One run of a configuration in a folder, or one stage of it; `train` drives it. before: the stage before it."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        console: Console,
        before: Before | None = None,
        origin: Origin | None = None,
    ):
        if config.surface.start == "previous" and before is None:
            raise UserError("surface.start: 'previous' needs a stage before, got a run without one")
        self.config, self.folder, self.console = config, folder, console
        self.origin = Origin() if origin is None else origin
        self.origin.state("config", config.decisive())
        self.origin.state("code", code_of(config))
        self.device = pick_device(config.device)
        bad = BadRows(config.data.skip_bad_rows)
        splits = load_splits(config, bad)
        self.rows_left_out = bad.count
        for left_out in bad.told:
            console.print(left_out, highlight=False)
        if not splits.validation:
            raise UserError("data: a validation split must have at least one row, got none; give data.validation")
        console.print(f"train       {class_balance(splits.train, splits.labels)}", highlight=False)
        console.print(f"validation  {class_balance(splits.validation, splits.labels)}", highlight=False)
        self.origin.state("labels", list(splits.labels))
        self.origin.state("data", data_of(splits))
        self.labels, self.kind, self.validation = splits.labels, config.kind, splits.validation
        self.test = splits.test if config.data.test is not None else []
        self.reads = reads(config, pairs=splits.validation[0].text_pair is not None)
        # Asked here: whether a name is a folder's depends on where the run was started.
        self.made_of = {"base": backbone.hub_name(config.model), "unchanged": before is None or not before.changed}
        self.reward = None if config.reward is None else rewarded(config.reward)
        self.shown = "reward" if self.reward is not None else "f1" if self.kind == "generation" else "accuracy"
        self.surface = make_surface(config, splits.labels, self.device, None if before is None else before.model)
        console.print(f"surface     {self.surface.describe()}", highlight=False)
        by_itself = "loss" if self.surface.says_tokens else self.shown  # few tokens are said rightly
        self.ranked = by_itself if config.best == "auto" else config.best
        self.rows = len(splits.train)
        self.optimizer = make_optimizer(config, self.surface, self.rows)
        self.forward = self.optimizer if isinstance(self.optimizer, ForwardOptimizer) else None
        if self.forward is not None:
            self.forward.fused = True  # restore, update and next probe in one pass; `evaluate` settles
            self.forward.warns = False  # this loop does
        self.rate_name = "radius" if "radius" in optimizer_options(config.optimizer.name)[0] else "learning rate"
        self.rate = float(self.optimizer.param_groups[0]["lr"])  # before its schedule
        # A gradient of nan must not reach the weights; methods that skip steps count them by an option of their own.
        self.patience = 1 if self.forward is None else getattr(self.forward, "patience", PATIENCE)
        self.steps = length_of(config, self.optimizer, self.rows)
        self.rates = make_rates(config, self.optimizer, self.surface, self.steps)
        loaded(self.surface, searches=self.forward is not None)
        self.memory = PeakMemory(self.device)
        self.noise = Noise(config.seed)
        weights = weights_of(config.class_weights, splits)
        if weights is not None:
            each = zip(splits.labels, weights.tolist(), strict=True)
            console.print(f"weights     {', '.join(f'{name} {value:.3g}' for name, value in each)}", highlight=False)
        loss = loss_of(config.loss, config.reward, self.kind, splits.labels, weights)
        self.train_rows = Rows(self.surface, splits.train, config, "features: train", loss)
        self.validation_rows: Rows | TextRows
        if self.kind == "classification":
            self.validation_rows = Rows(self.surface, splits.validation, config, "features: validation")
        else:
            self.validation_rows = TextRows(self.surface, splits.validation, self.kind, config.micro_batch_size)
        evaluated = self.validation_rows
        encoded = evaluated if isinstance(evaluated, TextRows) else evaluated.encoded
        self.origin.state("tokens", tokens_of([self.train_rows.encoded.fingerprint, encoded.fingerprint]))
        self.cuts = {
            "train": Cut.among(self.train_rows.encoded),
            "validation": Cut.among(encoded),
        }
        self.features_seconds = sum(rows.seconds for rows in (self.train_rows, evaluated) if isinstance(rows, Rows))
        if told := (self.cuts["train"] + self.cuts["validation"]).of_settings():
            console.print(told, highlight=False)
        parts = [] if before is None else before.give(self.surface)
        line = None if "side" in parts else self.surface.begin(self.train_rows.encoded)
        if before is not None:
            taken = " and ".join(
                [*(["its model"] if before.changed else []), *(f"its {PARTS[part]}" for part in parts)]
            )
            line = f"from stage {before.stage.folder}: {taken}" + (f"; {line}" if line else "")
        if line:
            console.print(f"start       {line}", highlight=False)
        if told := reads_padding(self.surface, splits.validation[:LOOKED_AT], self.kind):
            console.print(f"padding     {told}; micro_batch_size = 1 reads rows alone", highlight=False)
        self.surface.train(self.surface.dropout > 0)
        self.done = Progressed()
        self.last: dict[str, float] | None = None  # what the weights as they stand were found to be
        self.by_class: dict[str, Any] = {}  # what the last evaluation found of classes, see `metrics.by_class`
        self.answers: list[str] = []  # of the last evaluation, to the first rows
        self.step_seconds: list[float] = []  # of the steps measured in this process
        self.base = base_checksum(self.surface)
        self.origin.state("model", backbone.settings(self.surface))
        self.origin.state("base", self.base)
        self.memory.end("start")

    def _passes(self, steps: int) -> int:
        return steps * PASSES_OF_FIRST_ORDER if self.forward is None else self.forward.forecast(steps)

    # One step --------------------------------------------------------------------------------------------------------

    def step(self, t: int, logged: bytes | None) -> float:
        """Step `t`: measured, or repeated from its record in the trajectory. Returns its loss."""
        self.last = None
        if self.forward is not None and logged is not None:
            return self.forward.replay_step(logged)
        for group, rate in zip(self.optimizer.param_groups, self.rates(t), strict=True):
            group["lr"] = rate
        objective = self.train_rows.objective(t, self.noise, self.say)
        if self.forward is not None:
            return self.forward.step(objective)
        self.optimizer.zero_grad(set_to_none=True)
        loss = objective.backward()
        if math.isfinite(loss):  # or its gradient would reach the weights
            try:
                self.optimizer.step()
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                self.done.first_loss = loss  # so it is the rate
                raise NotFinite(f"{self.config.optimizer.name}: a step must be finite, got one that is not") from None
        return loss

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """One thread for the steps of a small head on cached features; a function of the configuration, so that a
        resumed run adds up its products in the same order."""
        before = torch.get_num_threads()
        largest = max(tensor.numel() for tensor in self.surface.trainable().values())
        if self.train_rows.features is not None and self.config.batch_size * largest < SHARED_FROM:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def evaluate(self) -> dict[str, float]:
        if self.forward is not None:
            self.forward.settle()
        require_finite("train", self.surface.trainable())
        training = self.surface.training
        self.surface.eval()
        rows = self.validation_rows
        texts: list[str] = []
        if isinstance(rows, TextRows):
            texts, loss = rows.read()
            found = score_texts(texts, self.validation, self.kind, loss)
        elif isinstance(rows.encoded, EncodedTexts):
            found = score_tokens(self.surface, rows.encoded, self.config.micro_batch_size)
        else:
            logits = rows.logits()
            gold = rows.labels.cpu()
            texts, found = chosen(logits, self.validation, self.labels), score(logits, gold)
            self.by_class = by_class(highest(logits).numpy(), gold.numpy(), self.labels)
        if self.reward is not None:
            found["reward"] = self.reward(texts, self.validation)
        self.answers = texts[:ASKED]
        self.surface.train(training)
        if not math.isfinite(found["loss"]):
            raise NotFinite(f"validation: the loss must be finite, got {found['loss']}")
        return found

    # What is not finite ----------------------------------------------------------------------------------------------

    def stopped(self, told: str) -> UserError:
        """The line that ends a run whose weights, losses or scores are not finite: the cause, and which weights were
        good. Those of the best evaluation are saved in model/."""
        done, dtype, finite = self.done, self.config.dtype, True
        if self.forward is not None:
            self.forward.settle()
        try:
            require_finite("train", self.surface.trainable())
        except NotFinite as error:
            told, finite = str(error), False
        causes = []
        if not finite or done.first_loss is not None:
            key = "radius" if self.rate_name == "radius" else "lr"
            causes.append(f"optimizer.{key} = {self.optimizer.param_groups[0]['lr']:.4g}, which is too high")
        if dtype == "float16":
            causes.append("dtype float16, which ends at 65,504 where bfloat16 and float32 go on")
        if not causes:
            causes.append(f"the model in dtype {dtype}, or loss '{self.config.loss}', before anything was tuned")
        if done.best_step > 0:
            self.set_best()
            self.save_model()
            kept = f"the last good weights, of the evaluation at step {done.best_step:,}, are in {self.folder.model}"
        elif finite and self.forward is not None and done.step:
            command = f"gradientless export {self.folder.path} --out DIR{self.folder.asks_for_trust}"
            kept = f"{command} writes the weights as they stand"
        else:
            kept = "no weights were evaluated before"
        return UserError(f"{told} (after step {done.step:,}); the cause is {' or '.join(causes)}; {kept}")

    def save_model(self) -> None:
        """Write model/."""
        with replacing(self.folder.model) as place:
            save_model(self.surface, place, self.reads, self.config.surface.name, self.made_of)

    def remarks(self) -> list[str]:
        """What a reader of the figures must know beside them, and what to try: one line each."""
        done, lines = self.done, []
        key = "optimizer.radius" if self.rate_name == "radius" else "optimizer.lr"
        if done.diverged:
            lines.append(
                f"the run diverged and was ended at step {done.step:,} of {self.steps:,}: its training loss went from "
                f"{done.first_loss:.4g} to {done.last_loss:.4g}; the weights kept are those of the evaluation at step "
                f"{done.best_step:,}; lower {key} (it was {self.rate:.3g}) three to ten times"
            )
        if label := alike(self.by_class):
            share = self.by_class["majority"]["share"]
            lines.append(
                f"every validation row was predicted '{label}' (the largest class is {100 * share:.2f}% of them): no "
                f"class is told from another yet; try class_weights=balanced, best=mcc, more steps or another {key}"
            )
        first, last = done.first_loss, done.last_loss
        if (
            first is not None
            and last is not None
            and done.logs > 1
            and not done.diverged
            and last > first - UNMOVED * abs(first)
        ):
            stayed = last < first + UNMOVED * abs(first)
            course, other = ("stayed where it began", "large, or more steps") if stayed else ("rose", "small")
            lines.append(
                f"the training loss {course} ({first:.4g}, then {last:.4g}): try {key} three to ten times as {other} "
                f"(it was {self.rate:.3g})"
            )
        return lines

    # State -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        require_finite("train", self.surface.trainable())
        tensors: dict[str, Tensor] = {f"weights/{k}": v.detach() for k, v in self.surface.trainable().items()}
        state = self.optimizer.state_dict()
        self.done.peaks = dict(self.memory.peaks)
        record = {
            "optimizer": _without_tensors(state, "optimizer", tensors),
            "progress": asdict(self.done),
            "origin": self.origin.parts,
            "logs": self.folder.log_sums(),
        }
        if self.forward is not None and self.forward.trajectory is not None:
            record["trajectory"] = self.forward.trajectory.check(self.done.step)
        self.folder.save_checkpoint(tensors, record, self.done.step)

    def restore(self, saved: Saved) -> None:
        """Take up a checkpoint."""
        tensors, record, step = saved
        self.folder.truncate_logs(step)
        self.folder.require_logs(record.get("logs", {}))
        self._set_weights(tensors, "weights/")
        options = _options(self.optimizer)
        try:
            self.optimizer.load_state_dict(_with_tensors(record["optimizer"], tensors))
            self.done = Progressed(**record["progress"])
        except Exception as error:  # noqa: BLE001 - torch's optimizers raise whatever comes of other kinds of values
            told = one_line(error) if isinstance(error, UserError) else with_kind(error)
            raise UserError(f"checkpoint of step {step}: must belong to this configuration, got {told}") from None
        if self.done.step != step:
            told = f"got the progress of step {self.done.step}"
            raise UserError(f"checkpoint of step {step}: must tell its own progress, {told}")
        if self.forward is None and (_options(self.optimizer) != options or not _fit(self.optimizer)):
            raise UserError(f"checkpoint of step {step}: must belong to this configuration, got another optimizer's")
        self.folder.drop_older(step)
        for part, peak in self.done.peaks.items():
            self.memory.peaks[part] = max(peak, self.memory.peaks.get(part, 0.0))
        if self.done.best_step >= 0 and self.folder.load_checkpoint(BEST) is None:
            self.say("best        its weights are gone: the best of the evaluations to come is kept")
            self.done.best_step = -1

    @torch.no_grad()
    def _set_weights(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        for name, tensor in self.surface.trainable().items():
            if prefix + name not in weights or weights[prefix + name].shape != tensor.shape:
                raise UserError(
                    f"checkpoint: must hold the weights of this configuration, got none or others of '{name}'"
                )
            tensor.copy_(weights[prefix + name])

    def keep_if_best(self, found: dict[str, float]) -> bool:
        done, loss = self.done, found["loss"]
        value = found[self.shown if self.ranked == "loss" else self.ranked]
        better = done.best_step < 0 or loss < done.best_loss
        if done.best_step >= 0 and self.ranked != "loss":
            better = (value, -loss) > (done.best_accuracy, -done.best_loss)
        done.stale = 0 if better else done.stale + 1
        if better:
            done.best_step, done.best_accuracy, done.best_loss = done.step, value, loss
            weights = {name: tensor.detach() for name, tensor in self.surface.trainable().items()}
            told = {"found": found, "by_class": self.by_class, "answers": self.answers}
            self.folder.save_checkpoint(weights, told, done.step, BEST)
        return better

    def set_best(self) -> dict[str, float]:
        """Take up the best weights; returns what their evaluation found."""
        loaded = self.folder.load_checkpoint(BEST)
        if loaded is None:
            place = self.folder.path / f"{BEST}-{self.done.best_step}"
            raise UserError(f"run: must hold the weights of the best evaluation, got none in '{place}'")
        self._set_weights(loaded[0])
        self.folder.drop_older(loaded[2], BEST)
        self.done.best_step = loaded[2]
        fits(f"the state of {BEST}-{loaded[2]}", loaded[1], OF_BEST)
        self.by_class, self.answers = loaded[1].get("by_class", {}), loaded[1].get("answers", [])
        return loaded[1].get("found") or self.evaluate()

    # The whole -------------------------------------------------------------------------------------------------------

    def open_trajectory(self, log: Trajectory | None, check: str | None = None) -> list[bytes]:
        """Start or continue the log; returns the records of steps after the checkpoint, whose `check` sum is given."""
        if self.forward is None:
            return []
        self.forward.predicted_lr = self.rates
        path = self.folder.trajectory
        if log is None:
            path.unlink(missing_ok=True)
            self.forward.choose_evaluator(Objective.outline(self.surface))
            begun = {"base": self.base, "scheduled_steps": self.steps, "rows": self.rows, "origin": self.origin.parts}
            self.forward.record(path, begun)
            return []
        self.forward.follow(log.header)
        if log.header.get("base") != self.base:
            raise UserError(f"trajectory: {path} must belong to this base model, got the log of another base")
        for key, now in (("rows", self.rows), ("scheduled_steps", self.steps)):
            if log.header.get(key, now) != now:
                what, got = key.replace("_", " "), log.header[key]
                raise UserError(f"trajectory: {path} must be of {now:,} {what}, as the data has it now, got {got:,}")
        if len(log) < self.done.step:
            raise UserError(
                f"trajectory: {path} must hold the {self.done.step} steps of the checkpoint, got {len(log)}"
            )
        if check is not None and log.check(self.done.step) != check:
            raise UserError(
                f"trajectory: {path} must hold the steps of the checkpoint, got others; its check sum differs"
            )
        self.forward.trajectory = log
        return [log[step] for step in range(self.done.step, len(log))]

    def loop(
        self,
        tail: list[bytes],
        show: Callable[[float | None, float | None, bool], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        config, done, folder = self.config, self.done, self.folder
        earlier = folder.read_timings()
        before = max(done.seconds, earlier[-1]["seconds"] if earlier else 0.0)
        start, first = time.perf_counter() - before, done.step
        events = folder.events(first if first else None)
        accuracy: float | None = None
        self.memory.end("step")  # those that were tried to tell how long it will take
        try:
            if not done.step and not self.surface.cacheable:  # a pretrained readout is worth something as it is
                accuracy = self._evaluated(events, start)
                done.untuned, done.answers = self.last or {}, self.answers
                self.memory.end("evaluation")
                show(None, accuracy, True)
            while done.step < self.steps and not done.ended:
                t, begin = done.step, time.perf_counter()
                logged = tail[t - first] if t - first < len(tail) else None
                loss = self.step(t, logged)
                done.not_finite = 0 if math.isfinite(loss) else done.not_finite + 1
                if done.not_finite >= self.patience:
                    raise NotFinite(f"train: the loss must be finite, got {loss} in {done.not_finite} steps in a row")
                if logged is None:
                    self.step_seconds.append(time.perf_counter() - begin)
                done.step = t + 1
                done.forward_passes = (
                    self.forward.forward_passes if self.forward is not None else done.step * PASSES_OF_FIRST_ORDER
                )
                if math.isfinite(loss):  # a skipped step reports another
                    done.loss_sum, done.loss_count = done.loss_sum + loss, done.loss_count + 1
                    if done.first_loss is None:
                        done.first_loss = loss
                last = done.step == self.steps
                if done.step % config.log_every == 0 or last:
                    mean = done.loss_sum / done.loss_count if done.loss_count else math.nan
                    self._log("train", {"loss": mean}, events)
                    rate = self.optimizer.param_groups[0]["lr"]
                    events.add_scalar(self.rate_name, rate, done.step)
                    self.warn_of_divergence(mean)
                    done.logs, done.last_loss = done.logs + 1, mean if done.loss_count else None
                    done.loss_sum, done.loss_count = 0.0, 0
                    show(mean, accuracy, False)
                elif done.step % 10 == 0 or (self.step_seconds and self.step_seconds[-1] > SLOW):
                    show(loss, accuracy, False)
                if last and self.forward is not None:
                    self.forward.finish()
                evaluates = done.step % config.evaluate_every == 0 or last or done.diverged
                if evaluates:
                    self.memory.end("step")
                    accuracy = self._evaluated(events, start)
                    show(done.last_loss if last else loss, accuracy, True)
                    waited = config.patience is not None and done.stale >= config.patience
                    done.ended = waited or done.diverged
                stop = asked_to_stop()  # asked once: a signal between two answers would stop without saving
                if done.step % config.checkpoint_every == 0 or last or done.ended or stop:
                    if not evaluates:
                        self.memory.end("step")
                    evaluates, done.seconds = True, time.perf_counter() - start
                    self.save()
                if evaluates:  # or wrote a checkpoint, which is told with it
                    self.memory.end("evaluation")
                if stop and not last and not done.ended:
                    raise Stopped(done.step)
        finally:
            if self.forward is not None and self.forward.trajectory is not None:
                self.forward.trajectory.close()

    def _evaluated(self, events: Any, start: float) -> float:
        """Evaluate, log it, keep the weights when they are the best so far; returns what is shown of them."""
        found = self.evaluate()
        self._log("validation", found, events)
        self.done.evaluations += 1
        self.keep_if_best(found)
        self.last = found
        self.folder.append_timings({"step": self.done.step, "seconds": time.perf_counter() - start})
        return found[self.shown]

    def _log(self, split: str, values: dict[str, float], events: Any) -> None:
        record = {"step": self.done.step, "split": split, "forward_passes": self.done.forward_passes, **values}
        self.folder.append_metrics(record)
        for name, value in values.items():
            events.add_scalar(f"{split}/{name}", value, self.done.step)

    @property
    def skipped(self) -> int:
        """Steps that changed nothing, since a loss was not finite."""
        return getattr(self.forward, "skipped", 0)

    def warn_of_divergence(self, mean: float) -> None:
        """Say what to lower when the training loss stays far above where it began."""
        done = self.done
        first = math.nan if done.first_loss is None else done.first_loss
        if done.step <= self.config.log_every and mean <= first + 10 * abs(first) + 1:  # else it holds an explosion
            done.first_loss = mean
        # A reward's loss may be below zero. To nan, too.
        rose = done.first_loss is not None and not mean <= done.first_loss + 0.5 * abs(done.first_loss) + 0.1
        done.risen = done.risen + 1 if rose else 0
        gone = done.first_loss is not None and not mean <= done.first_loss + GONE * (abs(done.first_loss) + 1)
        done.far = done.far + 1 if gone else 0
        done.diverged = done.far >= DIVERGING
        if done.risen == DIVERGING:
            key = "optimizer.radius" if self.rate_name == "radius" else "optimizer.lr"
            rate = self.optimizer.param_groups[0]["lr"]
            self.say(
                f"diverging   the training loss rose from {done.first_loss:.4g} to {mean:.4g}: lower {key} "
                f"(now {rate:.3g}) three to ten times"
            )

    def predict_cost(self) -> tuple[int, float]:
        """Forward passes of the run, and minutes, judged by some steps that are measured and not taken.

        By their passes, since later steps may take more: with options, or with more and more samples."""
        passes = self._passes(self.steps)
        times = []
        for t in range(3):
            begin = time.perf_counter()
            done = self.rehearse(self.train_rows.objective(t, self.noise))
            times.append((time.perf_counter() - begin) / done)
        return passes, min(times) * passes / 60

    def rehearse(self, objective: Objective) -> int:
        """Do the work of a step and take nothing. Returns the forward passes that it was."""
        if self.forward is None:
            objective.backward()
            self.optimizer.zero_grad(set_to_none=True)
            return PASSES_OF_FIRST_ORDER
        if self.forward.walking:  # a walk leaves its rounding in the weights: measure where they stand
            passes = self.forward.forecast(1)
            with torch.no_grad():
                for _ in range(passes):
                    objective()
            return passes
        trial = make_optimizer(self.config, self.surface, self.rows)
        assert isinstance(trial, ForwardOptimizer)
        return trial.rehearse(objective)


def train(
    config: RunConfig,
    folder: RunFolder,
    resume: bool = False,
    console: Console | None = None,
    other_code: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Run `config` in `folder` to its end; returns what summary.json holds. resume: continue what the folder holds,
    which must be the same run (see `Origin`); other_code: but for its code. notes: are told once nothing is wrong with
    rows and model, so that a mistake stands alone.

    Nobody else may write into the folder meanwhile. Raises UserError for whatever the user can mend, and Stopped after
    a stop signal, with the state saved.
    """
    console = console or Console(stderr=True)
    one = _train_stages if config.stages else _train
    with folder.held():
        return one(config, folder, resume, console, other_code, notes=notes)


def _train(
    config: RunConfig,
    folder: RunFolder,
    resume: bool,
    console: Console,
    other_code: bool = False,
    before: Before | None = None,
    merges: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """One run, or one stage of one. merges: whether the next stage is made of a model with this one's adapter in it."""
    if resume and folder.summary.exists():
        console.print("the run has ended already; nothing to resume", highlight=False)
        return folder.read_summary()
    started = time.perf_counter()
    saved, log = None, None
    if resume:
        folder.sweep()
        saved = folder.load_checkpoint(device="cpu")
        log = Trajectory.open(folder.trajectory) if folder.trajectory.exists() else None
        if saved is not None:
            fits(f"the state of the checkpoint of step {saved[2]}", saved[1], STATE)
        if log is not None:
            fits(f"trajectory: the header of {folder.trajectory}", log.header, HEADER)
    before_it = [told for told in (saved and saved[1], log and log.header) if told]
    origin = Origin([told["origin"] for told in before_it if "origin" in told], "--resume", other_code, folder.say)
    if before_it and not origin.before and not other_code:
        raise UserError(
            f"--resume: must be of a run that says what it is made of, got one of {UNKNOWN}; "
            "--other-code goes on with it"
        )
    run = Run(config, folder, console, before, origin)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    folder.write_environment(run.device)
    if saved is None:
        folder.truncate_logs(-1)  # what was evaluated before the first step is evaluated again
    else:
        run.restore(saved)
    tail = run.open_trajectory(log, saved and saved[1].get("trajectory"))
    if run.done.step or tail:
        console.print(
            f"resuming    from step {run.done.step:,}, with {len(tail):,} logged steps to repeat", highlight=False
        )
    try:
        with run.threads(), _StopSignals() as asked, _shown(console, run) as show:
            run.loop(tail, show, asked)
    except NotFinite as error:
        raise run.stopped(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold what did not fit
        raise _what_fits(run) from None
    return _end(run, started, merges)


def _train_stages(
    config: RunConfig,
    folder: RunFolder,
    resume: bool,
    console: Console,
    other_code: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The stages one after the other, each in a folder of its own; those that have ended stay as they are."""
    if resume and folder.summary.exists():
        console.print("the run has ended already; nothing to resume", highlight=False)
        return folder.read_summary()
    stages = config.staged
    folder.sweep()
    if not folder.stage_folders():
        check(config, pick_device(config.device))
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    summaries = {}
    for stage, following in itertools.zip_longest(stages, stages[1:]):
        place = folder.stage(stage.folder)
        if not place.summary.exists():
            console.print(f"stage       {stage.number} of {len(stages)}: {stage.name}", highlight=False)
            began = place.holds_run()
            RunFolder.create(place.path, stage.config.toml(), began, folder.say).write_config(stage.config.toml())
            merges = following is not None and not keeps_adapter(stage, following)
            give_back()  # of the stage before, and of the check: no part of this stage's loaded model
            try:
                _train(stage.config, place, began, console, other_code, before(folder, stages, stage), merges)
            except Stopped as stopped:
                raise Stopped(stopped.step, stage.folder) from None
        elif lines := stage.config.differences(place.read_config(texts_in(stage.config.resolved()))):
            raise UserError("\n".join(f"--resume: {stage.line(line)}, of a stage that has ended" for line in lines))
        summaries[stage.folder] = place.read_summary(OF_STAGE)
    with replacing(folder.model) as copy:
        shutil.copytree(place.model, copy, dirs_exist_ok=True)
    *_, last = summaries.values()
    summary: dict[str, Any] = {
        **{key: last[key] for key in ("metrics", "metrics_of", "accuracy_means", "f1_means", "last")},
        **{key: last[key] for key in ("model_step", "ended", "texts_cut", "chosen_among")},
        **{key: last[key] for key in ("majority", "classes", "confusion", "test") if key in last},
        "remarks": [f"{name}: {line}" for name, each in summaries.items() for line in each.get("remarks", ())],
        **{key: sum(each[key] for each in summaries.values()) for key in ("steps", "forward_passes")},
        **{
            key: round(sum(each[key] for each in summaries.values()), 3)
            for key in ("seconds", "wall_seconds", "features_seconds")
        },
        **{
            key: max(each.get(key) or 0.0 for each in summaries.values())
            for key in ("peak_memory_mib", *(f"{part}_peak_memory_mib" for part in MEASURED))
        },
        **{
            key: {name: each.get(key) for name, each in summaries.items()}
            for key in ("seconds_a_step", "parameters", "backward_products")
        },
        "stages": summaries,
    }
    folder.write_summary(summary)
    return summary


def _end(run: Run, started: float, merges: bool) -> dict[str, Any]:
    if run.skipped:
        told = f"skipped     {run.skipped:,} of {run.done.step:,} steps, whose losses were not finite"
        run.say(f"{told}: lower optimizer.lr or optimizer.eps, or look at the loss")
    last = run.last if run.last is not None else run.evaluate()
    found = run.set_best()
    run.save_model()
    tested: dict[str, Any] = {}
    if run.test and not run.surface.says_tokens:
        run.surface.eval()
        tested = evaluate_rows(run.surface, run.test, run.labels, run.kind, run.config.micro_batch_size, run.say)
    if merges and run.surface.mergeable:
        with replacing(run.folder.merged) as place:
            run.surface.save_merged(place)
    timings = run.folder.read_timings()
    counted = run.surface.products()
    means = accuracy_name(run.labels, run.kind), f1_name(run.labels, run.kind)
    if run.surface.says_tokens:
        means = "accuracy (of the tokens)", "f1 (macro, over the tokens)"
    summary = {
        "metrics": {key: found[key] for key in FIGURES if key in found},
        "metrics_of": f"the best of the evaluations on validation, step {run.done.best_step}",
        "chosen_among": run.done.evaluations,
        **run.by_class,
        "best": run.ranked,
        "accuracy_means": means[0],
        "f1_means": means[1],
        "last": {key: last[key] for key in FIGURES if key in last},
        **untuned(run),
        "model_step": run.done.best_step,
        "steps": run.done.step,
        "forward_passes": run.done.forward_passes,
        "seconds": round(timings[-1]["seconds"], 3) if timings else 0.0,
        "wall_seconds": round(time.perf_counter() - started, 3),
        "features_seconds": round(run.features_seconds, 3),
        "seconds_a_step": round(statistics.median(run.step_seconds), 6) if run.step_seconds else None,
        "peak_memory_mib": round(run.memory.highest, 1),
        **{f"{part}_peak_memory_mib": round(run.memory.peaks.get(part, 0.0), 1) for part in MEASURED},
        "parameters": {
            "tuned": counted.tuned,
            "registered": counted.registered,
            "touched": counted.touched if run.forward is None else 0,
            "total": counted.total,
            "share": counted.share,
        },
        "backward_products": counted.calls if run.forward is None else 0,
        "scheduled_steps": run.steps,
        "skipped_steps": run.skipped,
        "rows_left_out": run.rows_left_out,
        "texts_cut": {split: cut.rows for split, cut in run.cuts.items()},
        "base": run.base,
        "ended": "diverged" if run.done.diverged else "patience" if run.done.ended else "steps",
        "remarks": run.remarks(),
        **({"test": tested} if tested else {}),
    }
    if run.forward is not None and run.forward.trajectory is not None:
        summary["trajectory"] = run.forward.trajectory.check(run.done.step)
    if run.folder.whole is not None:
        summary["leaves"] = leaves(run.surface)
    if wrong := saved_otherwise(run.surface, run.folder.model, run.validation[:SHOWN], run.kind):
        run.say(f"saved       the model in {run.folder.model} {wrong}; the checkpoints hold what was found")
    run.folder.write_summary(summary)
    return summary


def untuned(run: Run) -> dict[str, Any]:
    """What the model said before the first step, for the summary: its figures; how many of its answers to the first
    validation rows changed, became right and became wrong; and the first that changed. Nothing, of a model that could
    say nothing yet."""
    before = {key: run.done.untuned[key] for key in FIGURES if key in run.done.untuned}
    if not before or not run.answers:
        return {"before": before} if before else {}
    changed, became = [], {"right": 0, "wrong": 0}
    for first, then, row in zip(run.done.answers, run.answers, run.validation, strict=False):
        if first == then:
            continue
        right = [run.labels[row.label]] if run.labels else list(row.answers)
        was, now = (share_right([answer], [right], run.kind) for answer in (first, then))
        if was != now:
            became["right" if now else "wrong"] += 1
        text = row.text if row.text_pair is None else f"{row.text} / {row.text_pair}"
        changed.append({"before": first, "after": then, "right": " or ".join(right), "text": text})
    told = {"asked": len(run.answers), "changed": len(changed), **became, "first": changed[:TOLD]}
    return {"before": before, "answers": told}


class _StopSignals:
    """While open, a first SIGINT or SIGTERM asks the loop to save and stop; a second SIGINT interrupts at once."""

    def __enter__(self) -> Callable[[], bool]:
        self._asked = False
        self._old: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, where no signal arrives
                break
        return lambda: self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _shown:
    """What is seen of a run's steps while it runs: loss, accuracy, and how fast it goes."""

    def __init__(self, console: Console, run: Run):
        self._console, self._run = console, run

    def __enter__(self) -> Callable[[float | None, float | None, bool], None]:
        run = self._run
        if run.steps - run.done.step > 50:
            passes, minutes = run.predict_cost()
            left = 1 - run.done.step / run.steps
            cost = f"{passes:,} forward passes in {run.steps:,} steps, about {max(0.1, minutes * left):.1f} minutes"
            self._console.print(f"expected    {cost}, {run.memory.highest:.0f} MiB above the model", highlight=False)
        self._counter = Counter(self._console, "training", run.steps, run.done.step, stays=True)
        self._counter.__enter__()
        begin, before = time.perf_counter(), run.done.forward_passes

        def show(loss: float | None, accuracy: float | None, evaluated: bool) -> None:
            parts = [] if loss is None else [f"loss {loss:.4f}"]
            if accuracy is not None and run.reward is not None:
                parts.append(f"reward {accuracy:.4g}")
            elif accuracy is not None:
                parts.append(f"{'token F1' if run.shown == 'f1' else run.shown} {100 * accuracy:.2f}%")
            if passes := run.done.forward_passes - before:
                seconds = max(1e-9, time.perf_counter() - begin) / passes
                parts.append(f"{1 / seconds:,.0f} passes/s" if seconds < 0.1 else f"{seconds:.2g} s a pass")
            self._counter.reach(run.done.step, "  ".join(parts), evaluated)

        return show

    def __exit__(self, *_: object) -> None:
        self._counter.__exit__()


def _what_fits(run: Run) -> UserError:
    """The line that answers running out of memory in a step: the batch that fits."""
    rows_of = run.train_rows
    longest = np.argsort(rows_of.encoded.lengths)[::-1]

    def attempt(count: int) -> None:
        rows = longest[:count].copy()
        part = run.surface.prepare(rows_of.part(rows)), rows_of.expected(rows)
        run.rehearse(Objective(run.surface, [part], run.noise, rows_of.loss))

    return batch_that_fits(attempt, run.config.micro_batch_size or run.config.batch_size, run.device)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Those of each group but for the rate, which the loop sets."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]


def _fit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what a torch optimizer holds of each tensor has its shape, or is one number."""
    return all(
        held is None or (isinstance(held, Tensor) and (held.ndim == 0 or held.shape == tensor.shape))
        for tensor, state in optimizer.state.items()
        for held in state.values()
    )


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON-able data, its tensors moved to `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"__tensor__": path}
    if isinstance(value, dict):
        return {"__dict__": [[key, _without_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__tuple__" in value:
            return tuple(_with_tensors(item, tensors) for item in value["__tuple__"])
        return {key: _with_tensors(item, tensors) for key, item in value["__dict__"]}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value
