"""ForwardTrainer: a `transformers.Trainer` that takes its steps by forward passes.

The Trainer's loop stays as it is: data loaders, logging, evaluation, callbacks, schedulers, checkpoints. What differs
is one thing: a micro-batch is kept instead of differentiated, and the optimizer's step measures the loss of all kept
micro-batches as often as its method asks. No backward pass, no `.grad`, no gradient scaler, no wrapper for
distributed training (whose buckets are as large as the model): processes exchange two numbers for each measured loss.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    import transformers
    from accelerate.optimizer import AcceleratedOptimizer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gradientless: the package '{error.name}' is missing; "
        "install it with: pip install 'gradientless[integrations]'",
        name=error.name,
    ) from None
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer import OPTIMIZER_NAME

from gradientless.errors import UserError, unknown, whole
from gradientless.language.backbone import checksum
from gradientless.search.fingerprint import fingerprint
from gradientless.search.optim import OPTIMIZERS, ForwardOptimizer
from gradientless.search.trajectory import Trajectory
from gradientless.writing import write_atomically

TRAJECTORY_NAME = "trajectory.bin"
IGNORED = -100  # a label that no loss counts
FORWARD_SHARE = 1 / 3  # of the Trainer's estimate of operations, which counts a backward pass as two forward passes


class ForwardTrainer(transformers.Trainer):
    """A Trainer whose steps need only values of the loss.

    forward_optimizer: a name of `gradientless.search.optim.OPTIMIZERS`, or a `ForwardOptimizer` class; it gets every
        parameter that requires gradients, under its name in the model.
    optimizer_options: its arguments. `seed` is by default `args.seed`, and `lr`, where the method has an option of
        this name, `args.learning_rate`; a radius is never taken from there. `args.weight_decay` goes to a method
        that has weight decay, and is refused for one that has not.
    optimizers: a ready ForwardOptimizer, and a scheduler or None, as for `Trainer`; instead of the two above.
    forward_passes: a budget of them, over whole batches: training ends before the step that would exceed it, where
        `args` does not end it earlier. Schedulers run towards that end.
    checksum_every: steps after which several processes compare their weights; 0: never.

    Everything else is as for `Trainer`. The model stands in eval() during a step, so that dropout is off and the loss
    at one point is one number. `max_grad_norm` means nothing here. Of several micro-batches
    (gradient_accumulation_steps) and processes the mean loss is taken, weighted by labels that count (not -100).

    Beside the Trainer's files there is `trajectory.bin` in `args.output_dir` and in every checkpoint: the log from
    which `ForwardOptimizer.replay` makes the weights again. A new run replaces it.

    Raises UserError for an optimizer that is no ForwardOptimizer, for DeepSpeed, FSDP, several devices in one process,
    NEFTune, a checkpoint without optimizer state, and weights that differ between processes.
    """

    def __init__(
        self,
        *args: Any,
        forward_optimizer: str | type[ForwardOptimizer] = "mezo",
        optimizer_options: Mapping[str, Any] | None = None,
        forward_passes: int | None = None,
        checksum_every: int = 100,
        **kwargs: Any,
    ):
        self.forward_optimizer, self.optimizer_options = forward_optimizer, dict(optimizer_options or {})
        if forward_passes is not None and whole("ForwardTrainer", "forward_passes", forward_passes) < 1:
            raise UserError(f"ForwardTrainer: forward_passes must be >= 1, got {forward_passes}")
        self.forward_passes, self.checksum_every = forward_passes, checksum_every
        self._affordable: int | None = None  # steps that they pay for, from an optimizer's first step on
        self._parts: list[dict[str, Any]] = []  # the micro-batches of the step, as the model takes them
        self._items: Tensor | int | None = None  # the Trainer's count of their labels
        self._measured: float | None = None  # the step's loss, until the Trainer looks whether to log
        self._resumed, self._ended = False, False
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, _Begin(self))
        if not self._given_type():
            raise unknown("ForwardTrainer", "forward_optimizer", forward_optimizer, OPTIMIZERS)
        refused = {
            "deepspeed": self.is_deepspeed_enabled,
            "fsdp": self.is_fsdp_enabled,
            "neftune_noise_alpha": self.args.neftune_noise_alpha is not None,
            "parallelism_config": self.args.parallelism_config is not None,
        }
        for option, given in refused.items():
            if given:
                raise UserError(f"ForwardTrainer: {option} must be off, got {getattr(self.args, option, 'on')}")
        if self.args.n_gpu > 1:
            raise UserError(
                f"ForwardTrainer: each process must have one device, got {self.args.n_gpu}; "
                "set CUDA_VISIBLE_DEVICES, or start with accelerate launch"
            )
        if self.optimizer is not None:
            self._check_type(self.optimizer)
            if self.optimizer_options:
                raise UserError("ForwardTrainer: optimizer_options must come without optimizers, got both")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        accelerator.scaler = None  # nothing is differentiated, so nothing can underflow
        accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)  # autocast, but no DDP
        accelerator.prepare_optimizer = self._prepare_optimizer
        accelerator.clip_grad_norm_ = lambda *args, **kwargs: None  # there is no gradient

    # The optimizer ---------------------------------------------------------------------------------------------------

    def _given_type(self) -> type[ForwardOptimizer] | None:
        given = self.forward_optimizer
        if isinstance(given, str):
            return OPTIMIZERS.get(given)
        return given if inspect.isclass(given) and issubclass(given, ForwardOptimizer) else None

    def _check_type(self, optimizer: Any) -> None:
        if not isinstance(optimizer, ForwardOptimizer):
            found = type(optimizer).__name__
            raise UserError(f"ForwardTrainer: optimizers must give a ForwardOptimizer, got {found}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that was named, unless there is one."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind = self._given_type()
            assert kind is not None and model is not None
            takes = inspect.signature(kind).parameters
            options = {"seed": self.args.seed, **self.optimizer_options}
            if "model" in takes:
                options.setdefault("model", model)
            if "lr" in takes:
                options.setdefault("lr", self.args.learning_rate)
            if self.args.weight_decay:
                if "weight_decay" not in takes:
                    raise UserError(
                        f"ForwardTrainer: weight_decay must be 0 for {kind.name}, got {self.args.weight_decay}"
                    )
                options.setdefault("weight_decay", self.args.weight_decay)
            strange = sorted(set(options) - set(takes))
            if strange:
                raise unknown("ForwardTrainer", f"option of {kind.name}", strange[0], set(takes) - {"params"})
            self.optimizer = kind(model.named_parameters(), **options)
        return self.optimizer

    def _prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        return optimizer if isinstance(optimizer, _Stepping) else _Stepping(optimizer, self._take_step)

    @property
    def _forward(self) -> ForwardOptimizer:
        """The optimizer itself, also where accelerate has wrapped it."""
        found: Any = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        self._check_type(found)
        forward: ForwardOptimizer = found
        return forward

    # A step ----------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keep a micro-batch for the step. Returns zero; the step adds its loss to what the Trainer reports."""
        model.eval()
        self._parts.append(dict(self._prepare_inputs(inputs)))
        self._items = num_items_in_batch
        return torch.zeros((), device=self.args.device)

    def _take_step(self, optimizer: ForwardOptimizer) -> None:
        parts, self._parts = self._parts, []
        if self.state.global_step >= self.state.max_steps:
            return  # the Trainer goes on for a step behind a checkpoint of the last one within an epoch
        before = optimizer.forward_passes
        loss = optimizer.step(_Batch(self, parts, self._items))
        passes = optimizer.forward_passes - before
        operations = super().floating_point_ops
        self.current_flos += round(passes * FORWARD_SHARE * sum(operations(part) for part in parts))
        self._measured = loss
        if self.checksum_every and optimizer.t % self.checksum_every == 0:
            self._check_alike()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing here: the step counts the passes that it made."""
        return 0

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, which sums losses in `tr_loss` until it logs: that of the step is put there first."""
        loss, self._measured = self._measured, None
        if loss is not None and self.args.logging_nan_inf_filter and not math.isfinite(loss):
            tr_loss += tr_loss / (self.state.global_step - self._globalstep_last_logged)  # their average, as there
        elif loss is not None:
            tr_loss += loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def sums_over_batches(self) -> bool:
        """Whether `compute_loss` gives a micro-batch's part of the whole batch's mean, rather than its own mean."""
        stated = getattr(self, "loss_is_scaled_for_ga", None)
        return self.compute_loss_func is not None if stated is None else bool(stated)

    def labels_in(self, inputs: Mapping[str, Any]) -> int:
        """Labels of a micro-batch that its mean loss counts; its rows, where it has no tensor of labels."""
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            if labels.ndim > 1 and self._shifts_labels():
                labels = labels[..., 1:]
            return int(labels.ne(IGNORED).sum())
        return len(next(value for value in inputs.values() if isinstance(value, Tensor)))

    def _shifts_labels(self) -> bool:
        """Whether the model's loss leaves out the first label of each row: a decoder's, and no text-to-text model's."""
        model: Any = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
        return shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["forward_passes"] = self._forward.forward_passes
        if "train_runtime" in logs:  # the Trainer's first words after its last step
            self._end()
        super().log(logs, start_time)

    # Several processes -----------------------------------------------------------------------------------------------

    def gathered(self, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        """`values` of every process, in their order: [processes, len(values)] on the CPU."""
        own = torch.tensor([values], dtype=dtype)
        if self.args.world_size == 1:
            return own
        return self.accelerator.gather(own.to(self.args.device)).cpu()

    def _check_alike(self) -> None:
        """Raise UserError unless all processes hold the same bits."""
        if self.args.world_size == 1:
            return
        sums = self.gathered([fingerprint(self._forward.space.tensors)], torch.int64).view(-1).tolist()
        if len(set(sums)) > 1:
            shown = ", ".join(f"{value:08x}" for value in sums)
            raise UserError(f"ForwardTrainer: processes must hold equal weights, got {shown} at step {self._forward.t}")

    # Start, end, checkpoints -----------------------------------------------------------------------------------------

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the steps that the budget of forward passes pays for."""
        self._parts, self._measured, self._resumed, self._ended = [], None, False, False
        *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        if self.forward_passes is not None:
            self.create_optimizer()
            if self._affordable is None or not self._forward.t:
                self._affordable = self._forward.steps_within(self.forward_passes)
            max_steps = min(max_steps, self._affordable)
        return *others, max_steps

    def _begin(self) -> None:
        """Before the first step: equal weights everywhere, and a log."""
        self._forward  # noqa: B018 - a subclass may have made another optimizer
        if self.args.world_size > 1:  # as DDP does: all processes start from the first one's weights
            assert self.model is not None
            with torch.no_grad():
                for tensor in [*self.model.parameters(), *self.model.buffers()]:
                    torch.distributed.broadcast(tensor.data, 0)
        if not self._resumed:
            self._start_log()
        self._check_alike()

    def _end(self) -> None:
        """Behind the last step, and before the Trainer puts other weights in the place of these."""
        if self._ended:
            return
        self._ended = True
        self._forward.finish()
        self._check_alike()
        log = self._forward.trajectory
        if log is not None:
            log.sync()

    def _load_best_model(self) -> None:
        self._end()
        super()._load_best_model()

    @property
    def _log_file(self) -> Path:
        return Path(str(self.args.output_dir)) / TRAJECTORY_NAME

    def _start_log(self) -> None:
        """Log to a new file; on with the present one where training simply goes on. The first process writes."""
        optimizer = self._forward
        if not self.is_world_process_zero() or (optimizer.trajectory is not None and optimizer.t):
            return
        if optimizer.trajectory is not None and optimizer.trajectory.path != self._log_file:
            return  # the user's own
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log_file.unlink(missing_ok=True)
        assert self.model is not None
        optimizer.record(self._log_file, {"base": checksum(self.model)})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        log = self._forward.trajectory
        if log is not None and self.is_world_process_zero():
            log.sync()
            shutil.copyfile(log.path, Path(output_dir) / TRAJECTORY_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (Path(checkpoint) / OPTIMIZER_NAME).is_file():
            raise UserError(
                f"ForwardTrainer: a checkpoint to resume from must hold {OPTIMIZER_NAME}, got "
                f"'{checkpoint}' without; was it saved with save_only_model?"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, self._resumed = self._forward, checkpoint is not None
        if checkpoint is None or not self.is_world_process_zero():
            return
        if optimizer.trajectory is not None:
            optimizer.trajectory.close()
            optimizer.trajectory = None
        saved = Path(checkpoint) / TRAJECTORY_NAME
        if not saved.is_file():
            self._start_log()
            return
        optimizer.resume(Trajectory.read(saved))  # before anything is written
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._log_file, saved.read_bytes())
        optimizer.trajectory = Trajectory.open(self._log_file)


class _Begin(transformers.TrainerCallback):
    """Tells the trainer that its model and optimizer are ready: a step of the loop without a method of its own."""

    def __init__(self, trainer: ForwardTrainer):
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin()


class _Stepping(AcceleratedOptimizer):
    """What the Trainer's loop steps: it calls `take` with the optimizer, once for each whole batch."""

    def __init__(self, optimizer: ForwardOptimizer, take: Callable[[ForwardOptimizer], None]):
        super().__init__(optimizer, device_placement=False)
        self._take = take

    def step(self, closure: Any = None) -> None:
        if self.gradient_state.sync_gradients:
            self._take(self.optimizer)


class _Batch:
    """The loss of the micro-batches `parts` over all processes, at the weights as they stand: the optimizer's closure.

    items: the labels of the whole batch, for a loss function of the user's that divides by it.
    """

    def __init__(self, trainer: ForwardTrainer, parts: Sequence[dict[str, Any]], items: Tensor | int | None):
        assert trainer.model is not None
        self.model: nn.Module = trainer.model
        self._trainer, self._parts, self._items = trainer, parts, items
        self._sums = trainer.sums_over_batches()
        self._weights = [1] * len(parts) if self._sums else [trainer.labels_in(part) for part in parts]

    def __call__(self) -> float:
        trainer, total = self._trainer, 0.0
        for part, weight in zip(self._parts, self._weights, strict=True):
            if not weight:
                continue  # a mean over no label is not a number
            with trainer.compute_loss_context_manager():
                items = self._items if self._sums else None
                loss = trainer.compute_loss(self.model, dict(part), num_items_in_batch=items)
            assert isinstance(loss, Tensor)
            total += float(loss) * weight
        weight = 1 if self._sums else sum(self._weights)
        sums = trainer.gathered([total, weight]).tolist()  # added up in one order, so that all get the same bits
        whole = sum(weight for _, weight in sums)
        return sum(value for value, _ in sums) / whole if whole else math.nan
