"""The shell of every search: a `torch.optim.Optimizer` that holds a conversation with a generator, and its replay.

A search method implements `search(t)`: it yields requests (`Losses`, `Rank`), is sent the answers, and returns one
`Update`. The shell measures, adds norm penalties, logs the answers, commits the update. `replay` runs the same
generator on logged answers.
"""

from __future__ import annotations

import inspect
import json
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradientless.delta import Delta
from gradientless.errors import Faults, NotFinite, UserError, brief, one_of, unknown, whole, with_kind
from gradientless.search.evaluators import EVALUATORS, Evaluator, Inject, Snapshot, check_walkable, evaluator, resolve
from gradientless.search.evaluators.injection import Injection
from gradientless.search.fingerprint import fingerprint
from gradientless.search.noise import Noise
from gradientless.search.optim.checks import flags, named_groups, number
from gradientless.search.points import (
    ALL,
    ORIGIN,
    Losses,
    Norms,
    Point,
    Ranking,
    Request,
    Update,
    by_block,
    common_prefix,
)
from gradientless.search.rates import Rates
from gradientless.search.selection import WINDOW, Selected, selected
from gradientless.search.space import Block, Space, check_rank
from gradientless.search.trajectory import Record, Trajectory
from gradientless.search.uninterrupted import uninterrupted
from gradientless.search.watched import Watched, version

Conversation = Generator[Request, Any, Update]
# Versions of what the records of a log mean: from the first one on, rates are predicted from those before; up to the
# second, all leaves of a tensor's options share their perturbations; the last is that of logs written now.
PREDICTED_RATES, SHARED_LEAVES, VERSION = 2, 2, 3


def f32(value: float) -> float:
    """`value` rounded to single precision, as the log holds it; infinite when it is too large for that."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def _taken(kind: type) -> set[str]:
    """What the constructor of a class takes by name, with what it hands on to those of its bases."""
    found: set[str] = set()
    for init in filter(inspect.isfunction, (vars(each).get("__init__") for each in kind.__mro__)):
        takes = inspect.signature(init).parameters.values()
        found |= {each.name for each in takes if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
        if not any(each.kind is each.VAR_KEYWORD for each in takes):
            break
    return found


class _Made(type):
    """What makes an optimizer of its class, once its options are seen to be there."""

    name: str

    def __call__(cls, *given: Any, **options: Any) -> Any:
        takes = _taken(cls)
        for option in options:
            if option not in takes:
                raise unknown(cls.name, "option", option, takes - {"self", "params"})
        if not given and "params" in takes and "params" not in options:
            raise UserError(f"{cls.name}: params must be tensors or (name, tensor) pairs, got none")
        return super().__call__(*given, **options)


class ForwardOptimizer(torch.optim.Optimizer, metaclass=_Made):
    """A torch optimizer that needs only values of the loss.

    params: an iterable of tensors, of (name, tensor) pairs such as `model.named_parameters()`, or of groups (dicts
        with "params" and options). Tensors that do not require gradients are left out. Names key the noise; tensors
        without a name are called "param.0", "param.1", … in their order.
    defaults: options of every group; "lr" is the number that torch's LR schedulers move.
    seed, noise: see `Noise`. rank, resample_every: directions of low rank, see `Space`.
    evaluator: how losses are measured, a key of `EVALUATORS` or "auto". model: the module to which evaluator "inject"
        adds noise, when the closure has no attribute `model`.
    fused: an attribute, False at first. With evaluator "walk" and True, a step leaves the weights standing at its last
        point, from where the next step goes on in one pass; call `settle()` before the weights are used for anything
        else. Set it before `record`.
    check: evaluate one point twice in the first step and warn when the losses differ.
    warns: an attribute, True at first: methods that watch their losses warn when these grow.
    """

    name = "ForwardOptimizer"
    takes_what_it_measured = False  # whether updates are points that were measured, to be met again to the last bit
    importance_options: Mapping[str, Any] = {}  # what `closure.importance` is called with

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        seed: int = 0,
        noise: str = "gaussian",
        rank: int | None = None,
        resample_every: int = 1,
        evaluator: str = "auto",
        model: torch.nn.Module | None = None,
        check: bool = True,
    ):
        self.evaluator, self.model, self.check = evaluator, model, check
        self.rank, self.resample_every = rank, resample_every
        faults = Faults()
        with faults:
            self._noise = Noise(seed, noise)
        self.check_options(faults)
        groups = named_groups(self.name, params, defaults)
        for group in groups:
            with faults:
                self.check_group({**defaults, **group})
        faults.tell()
        self._ready = False
        super().__init__(groups, defaults)
        self._ready = True
        self.t = 0
        self.forward_passes = 0
        self.trajectory: Trajectory | None = None
        self.predicted_lr: Callable[[int], Sequence[float]] | None = None  # where a configuration sets the rates
        self._last_lr: list[float] | None = None
        self._rates = Rates()  # those of the log so far, whether written or read
        self._followed = VERSION  # of the log that is replayed
        self._ranked = False
        self._known: dict[Point, list[float]] = {}  # losses measured in this step: a point met again costs nothing
        self.fused = False
        self.warns = True
        self._build()
        for group in self.param_groups:
            self.check_weights(group)
        self.walking = resolve(evaluator, self.space, None, model) == "walk"
        if self.walking:
            check_walkable(self.space, self.name)
        self._left = False  # whether the last step left the weights standing
        self._logged: int | None = None  # groups that the log knows, once a step was checked
        self._said = False  # whether a change of logged parameters was told
        self._noted: list[tuple[int, int]] | None = None  # versions of the parameters after the last write of ours
        self._torn = False  # whether a step failed on its way: its passes are in the weights but not in the log
        self._told: frozenset[str] = frozenset()  # tensors whose rows are probed alone, as logged last
        self._queue: list[Sequence[Point]] = []  # where a replayed step goes, once its record is read

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = inspect.signature(cls.__init__)  # which Python would not look for behind the `__call__` of its metaclass
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]

    # Parameters ------------------------------------------------------------------------------------------------------

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add tensors. After construction: names must be given, as (name, tensor) pairs."""
        if not self._ready:
            super().add_param_group(group)
            return
        items = list(group.get("params", ()))
        if not all(isinstance(item, tuple) for item in items):
            raise UserError(f"{self.name}: a later group must give (name, tensor) pairs, got a bare tensor")
        (named,) = named_groups(self.name, [{**group, "params": items}], self.defaults)
        self.check_group({**self.defaults, **named})
        taken = set(named["names"]) & set(self.space.tensors)
        if taken:
            raise UserError(f"{self.name}: parameter names must be distinct, got '{min(taken)}' twice")
        self.settle()
        super().add_param_group(named)
        before = self.space
        try:
            self._build()
            self.check_weights(self.param_groups[-1])
        except UserError:
            self.param_groups.pop()
            self._build()
            raise
        finally:
            self.space.inherit(before)

    def _build(self) -> None:
        """Make what depends on the groups: the space and its blocks."""
        tensors: dict[str, Tensor] = {}
        for group in self.param_groups:
            tensors.update(zip(group["names"], group["params"], strict=True))
        first, *others = tensors
        for name in others:
            if tensors[name].device != tensors[first].device:
                raise UserError(
                    f"{self.name}: parameters must be on one device, got '{first}' on {tensors[first].device} and "
                    f"'{name}' on {tensors[name].device}"
                )
        self._noted = None  # other tensors, or a state whose weights may be loaded after it
        self._group_of = {name: group for group in self.param_groups for name in group["names"]}
        self._injection: Injection | None = None
        self.space = Space(tensors, self._noise, self.blocks(), self.rank, self.resample_every)
        self._options = [
            {key: group[key] for key in self.defaults if key in group} for group in self.param_groups
        ]  # as checked last

    def check_options(self, faults: Faults) -> None:
        """Tell `faults` of each option of the constructor that makes no sense. They are kept as attributes."""
        with faults:
            one_of(self.name, "evaluator", self.evaluator, ["auto", *EVALUATORS])
        with faults:
            check_rank(getattr(self, "_noise", Noise(0)).distribution, self.rank, self.resample_every)
        with faults:
            flags(self.name, check=self.check)
        fits = self.model is None or isinstance(self.model, torch.nn.Module)
        faults.require(fits, f"{self.name}: model must be a torch.nn.Module, got {type(self.model).__name__}")

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise `UserError` for options that make no sense, naming the tensor."""

    def check_weights(self, group: Mapping[str, Any]) -> None:
        """Raise `UserError` for options that do not go with the weights as the search finds them at its start."""

    def blocks(self) -> list[Block]:
        """The blocks that this search addresses beyond ALL."""
        return []

    def group(self, block: str) -> dict[str, Any]:
        """The parameter group of a block: of its tensor, or of the first tensor for blocks of several."""
        return self._group_of.get(block, self.param_groups[0])

    # The conversation ------------------------------------------------------------------------------------------------

    def search(self, t: int) -> Conversation:
        """One step of the method; see the module docstring."""
        raise TypeError(f"{type(self).__name__} must define search(t)")

    def pending(self) -> Point:
        """What `finish` commits: options not yet taken. Nothing for most methods."""
        return ORIGIN

    def alive(self) -> set[tuple[str, int]]:
        """(block, birth) of every selection that a pending direction still mentions."""
        return set()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """One step. closure: returns the loss at the weights as they stand, a scalar; it must see the same batch each
        time it is called within a step and must not call backward. Returns the loss that the step reports."""
        if not callable(closure):
            raise UserError(f"{self.name}: step needs a closure that returns the loss, got {type(closure).__name__}")
        self._check_untouched()
        self._check_groups(self.trajectory is not None)
        self.choose_evaluator(closure)
        by_hand = self._left and self.space.settled
        where = self._evaluator(closure)
        log = bytearray()
        try:
            update = self._ask(closure, where, log)
        except BaseException:
            self._rates, self._last_lr = Rates(), None  # this step's were not logged: the next begins anew
            if self.walking:
                self._torn = self._torn or self.trajectory is not None
                self.space.settle()
            self._note()
            raise
        loss = f32(update.loss)
        if self._ranked:  # decisions do not tell the loss; answers to `Losses` do
            log += struct.pack("<f", loss)
        with uninterrupted():  # a step is logged and taken, or neither
            if self.walking:
                self._log_walk(log, by_hand)
            if self.trajectory is not None:
                self.trajectory.append(bytes(log))
            self._commit(update)
            if not self.fused:
                self.space.settle()
            self._note()
        return loss

    def _evaluator(self, closure: Callable[[], Any]) -> Evaluator:
        watched = Watched(self.name, self.space.tensors, closure)
        where = evaluator(self.space, watched, self.evaluator, self.model, self.name)
        if isinstance(where, Inject):  # its first pass is watched, which is slow: once is enough
            if self._injection is None or self._injection.model is not where.injection.model:
                self._injection = where.injection
            where.injection = self._injection
        return where

    def _ask(self, closure: Callable[[], Any], where: Evaluator, log: bytearray) -> Update:
        if self.check and self.t == 0:
            self._check_repeatable(where)
        self._log_lr(log)
        for block in self._due():
            found = self._select(block, closure)
            if block.selection == "fisher":
                log += b"".join(_bytes_of(found, block))
            else:
                log += struct.pack("<I", _sum_of_selected(found, block))
        self._ranked = False
        return self._converse(lambda request: self._measure(request, where, log))

    def _due(self) -> list[Block]:
        """Blocks whose selection is made in this step; they see the weights themselves, not where a walk stands."""
        due = self.space.due(self.t)
        if due:
            self.space.settle()
        return due

    @torch.no_grad()
    def replay_step(self, payload: bytes) -> float:
        """Repeat the step that logged `payload`, without a model. Returns the loss that the step reported."""
        record = Record(payload)
        self.forward_passes += 2 * (self.check and self.t == 0)
        self._read_lr(record)
        self._queue.clear()
        for block in self._due():
            if block.selection == "fisher":
                assert block.entries is not None
                found = selected(record.positions(block.entries, block.size), block.size, torch.device("cpu"))
                self.space.install(block, self.t, found)
                continue
            if _sum_of_selected(self._select(block, None), block) != record.uint32():
                raise UserError(f"replay: step {self.t} must select what was logged of '{block.name}'; another base?")
        self._ranked = False
        update = self._converse(lambda request: self._recall(request, record))
        loss = record.floats(1)[0] if self._ranked else f32(update.loss)
        if self.walking:
            self._repeat_walk(record)
        record.end()
        self._commit(update)
        if not self.fused:
            self.space.settle()
        self._note()
        return loss

    def _converse(self, answer: Callable[[Request], Any]) -> Update:
        self._known.clear()
        talk: Any = self.search(self.t)
        told: Any = None
        if not inspect.isgenerator(talk):
            found = brief(talk)
            raise UserError(f"{self.name}: search must yield requests and return an Update, got {found} and no request")
        while True:
            try:
                request = talk.send(told)
            except StopIteration as stop:
                if not isinstance(stop.value, Update):
                    raise UserError(f"{self.name}: search must return an Update, got {brief(stop.value)}") from None
                return stop.value
            except Exception as error:
                if isinstance(error, UserError) or type(self).__module__.startswith("gradientless."):
                    raise
                raise UserError(f"{self.name}: search must not raise, got {with_kind(error)}") from error
            if not isinstance(request, Request):
                raise UserError(f"{self.name}: search must yield Losses, Rank or Norms, got {brief(request)}")
            told = answer(request)

    def _commit(self, update: Update) -> None:
        self.apply(update)
        self._left = not self.space.settled
        self.space.end_step()
        self.t += 1
        self.space.forget(self.t, self.alive())

    def apply(self, update: Update) -> None:
        """Change the weights and the dense buffers as `update` says; a rule with dense state of its own extends it."""
        if self.walking:
            self.space.commit(update.point, update.decay)
            if update.buffers:  # directions may name a buffer, which now changes
                self.space.settle()
        else:
            self.space.add(update.point, update.decay, None if self.takes_what_it_measured else self.t)
        if update.buffers:
            self.space.update_buffers(update.buffers)

    # Walking ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring the weights to where the last step's update moved them; nothing unless `fused`."""
        if not self.space.settled:
            self._check_untouched()
            self.space.settle()
            self._note()

    # Parameters that others change ----------------------------------------------------------------------------------

    def _versions(self) -> list[tuple[int, int]]:
        return [version(tensor) for tensor in self.space.tensors.values()]

    def _note(self) -> None:
        """What was written so far was written by us."""
        self._noted = self._versions()

    def _check_untouched(self) -> None:
        """Parameters may be changed between steps, but not unnoticed where a log or a walk counts on them."""
        if self._noted is None or (self.trajectory is None and self.space.settled):
            return
        found = self._versions()
        if found == self._noted:
            return
        name = next(key for key, old, new in zip(self.space.tensors, self._noted, found, strict=True) if old != new)
        if not self.space.settled:
            raise UserError(
                f"{self.name}: parameters must not change while the weights stand at a probe, got '{name}' written to "
                "between two steps; call settle() before you change them"
            )
        self._note()
        if not self._said:
            self._said = True
            warnings.warn(
                f"{self.name}: parameters must not change between logged steps, got '{name}' written to: unless it "
                "holds what it held, the log no longer leads to these weights; call record again, with a new file",
                stacklevel=4,
            )

    def _check_groups(self, logs: bool) -> None:
        """Options of groups may change between steps, as torch's do, to what makes sense: but not those that a log
        named, once, at its start, nor those that say what a selection born in an earlier step is."""
        count = len(self.param_groups)
        self._logged = (self._logged or count) if logs else None
        held = " while a log is open" if logs else ""
        then = "call record again, with a new file" if logs else "make another optimizer"
        if logs and count != self._logged:
            told = f"parameter groups must stay {self._logged}{held}, got {count}; {then}"
            raise UserError(f"{self.name}: {told}")
        for group, old in zip(self.param_groups, self._options, strict=True):
            changed = [key for key, value in old.items() if group[key] is not value and not _equal(group[key], value)]
            for key in changed:
                if key in _OF_BIRTH or (logs and key not in _MEASURED):
                    told = f"{key} must stay {brief(old[key])}{held}, got {brief(group[key])}; {then}"
                    raise UserError(f"{self.name}: {told}")
            if changed and not (changed == ["lr"] and 0 <= number(group["lr"]) < math.inf):
                self.check_group(_begun(group))
            old.update((key, group[key]) for key in changed)
        for name, tensor in self.space.tensors.items():
            if not tensor.requires_grad:
                told = f"parameters must keep requires_grad, got '{name}' frozen; make another optimizer without it"
                raise UserError(f"{self.name}: {told}")
            if tensor.shape != self.space.shapes[name]:
                was, found = list(self.space.shapes[name]), list(tensor.shape)
                told = f"parameters must keep their shapes, got '{name}' of {found} where it had {was}"
                raise UserError(f"{self.name}: {told}; make another optimizer")
            if not tensor.is_contiguous():
                told = f"parameters must stay contiguous, got '{name}' with strides {tuple(tensor.stride())}"
                raise UserError(f"{self.name}: {told}")

    def follow(self, header: Mapping[str, Any]) -> None:
        """Replay as the log with this header was written, walking or not, fused or not; refuse other settings, and at
        its first step other weights."""
        if log_version(header) > VERSION:
            told = f"the log must be of version {VERSION} or earlier, got {log_version(header)}"
            raise UserError(f"{self.name}: {told}, which a later version of this package wrote")
        self._check_settings(self.header(), header, "the log")
        walked = header.get("evaluator") == "walk"
        if self.evaluator != "auto" and walked != (self.evaluator == "walk"):
            wanted = "walk" if walked else "any but walk"
            raise UserError(f"{self.name}: evaluator must be {wanted}, as the log says, got {self.evaluator}")
        if walked:
            check_walkable(self.space, self.name)
        if "start" in header and self.t == header.get("first_step", self.t):  # early logs do not say
            found = f"{fingerprint(self.space.tensors):08x}"
            if found != header["start"]:
                raise UserError(
                    f"{self.name}: parameters must be those that the log starts from, with check sum "
                    f"{header['start']}, got {found}; another base model?"
                )
        self.walking, self.fused = walked, bool(header.get("fused"))
        self._followed = log_version(header)

    def _check_settings(self, own: Mapping[str, Any], stated: Mapping[str, Any], source: str) -> None:
        """Raise `UserError` where this optimizer's settings are not those that a log or a state was made with."""
        own, stated = (json.loads(json.dumps(dict(settings))) for settings in (own, stated))  # as a file has them
        for option, value in own.items():
            if option in stated and option not in ("evaluator", "fused") and stated[option] != value:
                if option == "tensors":
                    told = f"tensors must be those of {source} in names, shapes and dtypes, got others"
                else:
                    told = f"{option} must be {brief(stated[option])}, as {source} says, got {brief(value)}"
                raise UserError(f"{self.name}: {told}")

    def choose_evaluator(self, closure: Any) -> None:
        """Settle how a closure like this is measured, and refuse what the log could not repeat.

        A step does it by itself, and an empty log is begun again where the closure decided otherwise than its header
        says."""
        walking = resolve(self.evaluator, self.space, closure, self.model) == "walk"
        if self.trajectory is not None:
            header = self.trajectory.header
            differs = walking != (header.get("evaluator") == "walk")
            if differs and self.evaluator == "auto" and not len(self.trajectory):
                header = {key: value for key, value in header.items() if key not in ("evaluator", "fused")}
                self.trajectory.restate({**header, **self._walk_header(walking)})
            elif differs:
                logged = header.get("evaluator", "one that leaves no trace")
                raise UserError(
                    f"{self.name}: evaluator must be what the log's header says, {logged}, got "
                    f"{resolve(self.evaluator, self.space, closure, self.model)}; name it when the optimizer is made"
                )
            if walking and self.fused and not self.trajectory.header.get("fused"):
                raise UserError(f"{self.name}: fused must be set before record, got a log that says otherwise")
            if self._torn:
                raise UserError(
                    f"{self.name}: a step that failed while walking must not be followed by others in the same log, "
                    "got one; resume from the last checkpoint"
                )
        self.walking = walking

    def _log_walk(self, log: bytearray, by_hand: bool) -> None:
        """Log what replay cannot know: that the weights were settled by hand, which tensors' rows are probed alone."""
        header = {} if self.trajectory is None else self.trajectory.header
        flags = bool(by_hand and header.get("fused")) | 2 * (self.space.kept != self._told)
        if flags:
            log.append(flags)
        if flags & 2:
            self._told = self.space.kept
            numbers = [i for i, name in enumerate(self.space.tensors) if name in self._told]
            log += struct.pack(f"<{len(numbers) + 1}H", len(numbers), *numbers)

    def _repeat_walk(self, record: Record) -> None:
        flags = record.bytes(1, 4)[0] if record.left() else 0
        if flags & 2:
            names = list(self.space.tensors)
            self._told = frozenset(names[i] for i in record.uint16(record.uint16(1)[0], len(names)))
        if flags & 1:
            self.space.settle()
        for points in self._queue:
            for terms in points:
                self.space.move_to(terms, self._told)
            if not points:
                self.space.settle()

    def forecast(self, steps: int) -> int:
        """Forward passes that `steps` further steps take; nothing is measured or changed.

        With GLD's `confirm` it is a lower bound: at most two passes a tensor and step more, as the losses fall.
        """
        before = self.search_state(), self.t, self.forward_passes
        settled = 16  # steps after which every method asks for the same number of points
        spent: list[int] = []
        try:
            for _ in range(min(steps, settled)):
                start = self.forward_passes + 2 * (self.check and self.t == 0)
                self.forward_passes = start
                self._converse(self._imagine)
                spent.append(self.forward_passes - before[2] - sum(spent))
                self.t += 1
        finally:
            self.t, self.forward_passes = before[1], before[2]
            self.load_search_state(before[0])
        return sum(spent) + (max(0, steps - settled) * spent[-1] if spent else 0)

    def steps_within(self, forward_passes: int, most: int | None = None) -> int:
        """How many further steps so many forward passes pay for, at the most `most`. Raises UserError for none."""
        low, high = 0, forward_passes if most is None else min(most, forward_passes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.forecast(middle) <= forward_passes else (low, middle - 1)
        if low < 1:
            needed = self.forecast(1)
            raise UserError(f"forward_passes: must pay for one step ({needed} passes), got {forward_passes}")
        return low

    @torch.no_grad()
    def rehearse(self, closure: Callable[[], Any]) -> int:
        """Measure what a step would measure and take nothing; selections that need measuring are drawn at random.
        Returns the forward passes that it took.

        With evaluator "walk" it holds a copy of the weights."""
        self._check_untouched()
        self._check_groups(self.trajectory is not None)
        self.choose_evaluator(closure)
        where = self._evaluator(closure)
        tensors = self.space.tensors.values() if self.walking else ()
        copies, stood = [tensor.detach().clone() for tensor in tensors], self.space.walk_state()
        before, due = (self.search_state(), self.forward_passes), self.space.due(self.t)
        try:
            for block in due:
                assert block.entries is not None
                self.space.install(block, self.t, self._noise.selected(block.name, self.t, block.size, block.entries))
            self._converse(lambda request: self._measure(request, where, bytearray()))
            return self.forward_passes - before[1]
        finally:
            self.load_search_state(before[0])
            self.forward_passes = before[1]
            for block in due:
                self.space.withdraw(block, self.t)
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
            self.space.load_walk_state(stood)
            self.space.end_step()
            self._note()

    def _imagine(self, request: Request) -> Any:
        if isinstance(request, Losses):
            self._losses(request.points, None)
            return [0.0] * len(request.points)
        if isinstance(request, Norms):
            return [1.0] * len(request.blocks)
        self._losses([terms for group in request.groups for terms in group], None)
        order = [list(range(min(request.keep, len(group)))) for group in request.groups]
        return Ranking(order, list(range(len(order))), 0.0, [0.0] * len(order))

    def finish(self) -> None:
        """Commit what is still pending; call once, after the last step."""
        self.settle()
        self.space.add(self.pending(), step=None if self.takes_what_it_measured else self.t)
        self.space.end_step()
        self._note()

    def _select(self, block: Block, closure: Any) -> Selected:
        if block.selection == "magnitude":
            return self.space.choose(block, self.t)
        importance = getattr(closure, "importance", None)
        if importance is None:
            raise UserError(
                f"{self.name}: selection 'fisher' must have a closure with a method importance(name, step, …), "
                "got none; use selection 'random' or 'magnitude'"
            )
        scores = [importance(name, self.t, **self.importance_options) for name in block.tensors]
        return self.space.choose(block, self.t, scores)

    def _check_repeatable(self, where: Evaluator) -> None:
        for name, tensor in self.space.tensors.items():
            if not bool(torch.stack(tensor.detach().aminmax()).isfinite().all()):
                raise NotFinite(f"{self.name}: parameters must be finite at the start, got others in '{name}'")
        first, second = where.losses([ORIGIN, ORIGIN])
        self.forward_passes += 2
        if first != second and not (math.isnan(first) and math.isnan(second)):
            warnings.warn(
                f"{self.name}: the loss at one point must not change within a step, got {first:.6g} then {second:.6g}; "
                "is dropout on (call model.eval()), or does the closure draw a new batch?",
                stacklevel=3,
            )

    # Answers ---------------------------------------------------------------------------------------------------------

    def _penalised(self, losses: Sequence[float], points: Sequence[Point], block: str) -> list[float]:
        """J = L + λ‖θ‖₂ (or λ‖θ‖₂²), θ being the block searched (thesis, Eq. 4.3 and 2.8); of ALL, every tensor."""
        total = list(losses)
        changes: Sequence[Sequence[Delta]] | None = None
        names = self.space.block(block).tensors
        for unit in [(name,) for name in names] if block == ALL else [names]:
            group = self._group_of[unit[0]]
            weight = group.get("penalty", 0.0)
            if not weight:
                continue
            if self.walking:
                self.space.settle()
            elif changes is None and not any(map(self.space.large, points)):  # made for the losses, too
                changes = self.space.deltas(points)
            squares = map(sum, zip(*(self.space.squared_norms(name, points, changes) for name in unit), strict=True))
            for i, squared in enumerate(squares):
                total[i] += weight * (squared if group.get("squared") else math.sqrt(max(squared, 0.0)))
        return total

    def _norm(self, block: str) -> float:
        """‖θ‖₂ over all entries of a block's tensors."""
        return math.sqrt(sum(self.space.squared_norms(name, [ORIGIN])[0] for name in self.space.block(block).tensors))

    def _losses(self, points: Sequence[Point], where: Evaluator | None, taken: bool = False) -> list[float]:
        """The losses at `points`, each measured once a step. where None: a replay, which only counts them. taken: see
        `Rank`."""
        places = [self._known.setdefault(by_block(terms), []) for terms in points]  # one look-up each: long keys
        new = {id(place): (place, terms) for place, terms in zip(places, points, strict=True) if not place}
        self.forward_passes += len(new)
        found: Sequence[float] = [math.nan] * len(new)
        if isinstance(where, Snapshot):
            where.step = self.t if taken else None
        if where is not None and new:
            found = where.losses([terms for _, terms in new.values()], common_prefix(points))
        elif new and self.walking:
            self._queue.append([terms for _, terms in new.values()])
        for (place, _), loss in zip(new.values(), found, strict=True):
            place.append(loss)
        return [place[0] for place in places]

    def _measure(self, request: Request, where: Evaluator, log: bytearray) -> Any:
        if isinstance(request, Losses):
            losses = self._penalised(self._losses(request.points, where), request.points, request.block)
            rounded = [f32(loss) for loss in losses]
            log += struct.pack(f"<{len(rounded)}f", *rounded)
            return rounded
        if isinstance(request, Norms):
            self.space.settle()
            norms = [f32(self._norm(block)) for block in request.blocks]
            log += struct.pack(f"<{len(norms)}f", *norms)
            return norms
        self._ranked = True
        flat = [terms for group in request.groups for terms in group]
        raw = self._losses(flat, where, request.taken)
        order, best, gains, lowest = [], [], [], math.inf
        start = 0
        for group, block in zip(request.groups, request.blocks, strict=True):
            losses = raw[start : start + len(group)]
            total = self._penalised(losses, group, block)
            start += len(group)
            key = [math.inf if math.isnan(loss) else loss for loss in total]
            ranked = sorted(range(len(key)), key=key.__getitem__)[: request.keep]
            order.append(ranked)
            best.append(key[ranked[0]])
            if request.improvement:
                gains.append(f32(key[0] - key[ranked[0]]) if key[0] < math.inf else 0.0)
            lowest = min(lowest, losses[ranked[0]])
        groups = sorted(range(len(best)), key=best.__getitem__)
        log += bytes(i for ranked in order for i in ranked)
        if len(groups) > 1:
            log += struct.pack(f"<{len(groups)}H", *groups)
        if request.improvement:
            log += struct.pack(f"<{len(gains)}f", *gains)
        return Ranking(order, groups, lowest, gains)

    def _recall_penalty(self, blocks: Iterable[str]) -> None:
        """A norm is that of the weights themselves: measuring it has settled them."""
        if any(self._group_of[name].get("penalty") for block in blocks for name in self.space.block(block).tensors):
            self._queue.append([])

    def _recall(self, request: Request, record: Record) -> Any:
        if isinstance(request, Losses):
            self._losses(request.points, None)
            self._recall_penalty([request.block])
            return record.floats(len(request.points))
        if isinstance(request, Norms):
            self._queue.append([])
            return record.floats(len(request.blocks))
        self._ranked = True
        self._losses([terms for group in request.groups for terms in group], None)
        self._recall_penalty(request.blocks)
        order = [record.bytes(min(request.keep, len(group)), len(group)) for group in request.groups]
        groups = record.uint16(len(order), len(order)) if len(order) > 1 else [0]
        gains = record.floats(len(order)) if request.improvement else []
        return Ranking(order, groups, math.nan, gains)

    def _log_lr(self, log: bytearray) -> None:
        """Log the rates of this step, unless a configuration predicts them."""
        if self.trajectory is None or self.predicted_lr is not None:
            return
        rates = [float(group["lr"]) for group in self.param_groups]
        if log_version(self.trajectory.header) >= PREDICTED_RATES:
            log += self._rates.write(rates)
            return
        if self._last_lr == rates:
            log.append(0)
            return
        self._last_lr = rates
        log.append(len(rates))
        log += struct.pack(f"<{len(rates)}d", *rates)

    def _read_lr(self, record: Record) -> None:
        if self.predicted_lr is not None:
            rates = self.predicted_lr(self.t)
        elif self._followed >= PREDICTED_RATES:
            rates = self._rates.read(record.take)
        else:
            (count,) = record.bytes(1)
            if not count:
                return
            rates = record.doubles(count)
        if len(rates) != len(self.param_groups):
            told = f"the rates of {len(self.param_groups)} groups, got those of {len(rates)}"
            raise UserError(f"replay: a record must hold {told}; other options?")
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    # State -----------------------------------------------------------------------------------------------------------

    def search_state(self) -> dict[str, Any]:
        """The method's own state as JSON-able data; Points as nested lists."""
        return {}

    def load_search_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `search_state` gave."""

    def __getstate__(self) -> dict[str, Any]:
        """Not to be had: what torch copies and pickles of an optimizer is not all of this one, and the rest has to
        mean the tensors that were copied."""
        raise UserError(
            f"{self.name}: an optimizer must be copied by its state, got copy or pickle; make another over the copied "
            "parameters and give it state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Groups as torch has them, and under "search" the step, the method's state, live selections and buffers."""
        state = super().state_dict()
        state["search"] = {
            "t": self.t,
            "forward_passes": self.forward_passes,
            "seed": self._noise.seed,
            "noise": self._noise.distribution,
            "settings": json.loads(json.dumps(self.settings())),
            "method": self.search_state(),
            "chosen": {f"{birth} {block}": found.data for (block, birth), found in self.space.chosen.items()},
            "buffers": {name: dict(tensors) for name, tensors in self.space.buffers.items()},
            **({"rates": self._rates.state()} if self._rates.state() else {}),
            **({"walk": {**self.space.walk_state(), "left": self._left}} if self.walking else {}),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave to an optimizer of the same class, over the same parameters, made with the
        same options. The options of groups are the state's, as with torch's optimizers. Raises UserError for another
        state, and is then as it was."""
        before, method = dict(self.__dict__), self.search_state()
        try:
            self._load(state_dict)
        except Exception as error:
            self.__dict__.clear()
            self.__dict__.update(before)
            self.load_search_state(method)
            if isinstance(error, UserError):
                raise
            told = f"one that is not ({with_kind(error)})"
            raise UserError(f"{self.name}: state_dict must be whole, got {told}") from error

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        if "search" not in state_dict:
            raise UserError(f"{self.name}: state_dict must come from a forward optimizer, got no 'search'")
        search = state_dict["search"]
        for key in ("t", "forward_passes"):
            whole(self.name, f"{key} of the state", search[key])
        for key in ("method", "settings"):
            if not isinstance(search.get(key, {}), dict):
                raise UserError(f"{self.name}: {key} of the state must be a table, got {brief(search[key])}")
        stated = search.get("settings", {key: search[key] for key in ("seed", "noise")})  # which early states lack
        settings = self.settings()
        tensors = settings.pop("tensors")  # which names that differ tell better
        self._check_settings(settings, stated, "the state")
        saved, own = ([group["names"] for group in of] for of in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise UserError(f"{self.name}: state_dict must be of the parameters {own} in this order, got {saved}")
        self._check_settings({"tensors": tensors}, stated, "the state")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "search"})
        for group in self.param_groups:
            self.check_group(_begun(group))
        self._build()
        self.t, self.forward_passes = search["t"], search["forward_passes"]
        for label, data in search["chosen"].items():
            birth, name = label.split(" ", 1)
            block = self.space.block(name)
            if data.dtype == torch.int64:  # as states were saved before
                data = selected(data, block.size, data.device).data
            self.space.install(block, int(birth), Selected(data, block.size))
        for name, tensors in search["buffers"].items():
            for key, value in tensors.items():
                self.space.buffer(name)[key].copy_(value)
        self._rates, self._last_lr = Rates(search.get("rates")), None
        if "walk" in search:
            self.space.load_walk_state(search["walk"])
            self._left, self._told = search["walk"]["left"], self.space.kept
        self.load_search_state(search["method"])

    # Log and replay --------------------------------------------------------------------------------------------------

    def record(self, path: Any, header: Mapping[str, Any] | None = None) -> Trajectory:
        """From now on, log every step to a new trajectory at `path`, whose header names the weights as they stand."""
        self._last_lr, self._rates = None, Rates()  # every log begins with the rates
        self.settle()
        self._told, self._left, self._torn, self._said, self._noted = frozenset(), False, False, False, None
        self._check_groups(False)
        self._logged = len(self.param_groups)
        begun = {"start": f"{fingerprint(self.space.tensors):08x}", "first_step": self.t}
        self.trajectory = Trajectory(path, {**self.header(), **begun, "version": VERSION, **(header or {})})
        return self.trajectory

    def resume(self, log: Trajectory) -> None:
        """Go on with a log that holds the steps before this optimizer's next one. Raises UserError for another."""
        self.follow(log.header)
        end = log.header.get("first_step", self.t - len(log)) + len(log)  # early logs do not say where they begin
        if end != self.t:
            raise UserError(f"{self.name}: the log must end at step {self.t}, as the optimizer stands, got {end}")
        self.trajectory = log

    def header(self) -> dict[str, Any]:
        """What a log of this optimizer says in its first lines: the settings that its bits depend on; the options of
        its groups, by a check sum where groups differ; under walking that, and whether steps are fused."""
        told = {}
        groups = {key: [group[key] for group in self.param_groups] for key in self._options[0]}
        for key, each in groups.items():
            if key not in _UNTOLD and all(map(_is_plain, each)):
                told[key] = each[0] if all(value == each[0] for value in each) else _sum_of(each)
        settings = self.settings()
        tensors = settings.pop("tensors")  # at the end: what else differs is told in words
        return {**settings, **told, "tensors": tensors, **self._walk_header(self.walking)}

    def settings(self) -> dict[str, Any]:
        """What an optimizer must share with one whose log or state it takes up: its class, its noise, the options of
        its constructor that are attributes and plain, and, by a check sum, the tensors' names, shapes and dtypes."""
        # A class of a user's may hand on to its base what its own constructor does not name.
        constructors = filter(inspect.isfunction, (vars(kind).get("__init__") for kind in type(self).__mro__))
        options = {key for each in constructors for key in inspect.signature(each).parameters}
        mine = {key: getattr(self, key) for key in sorted(options) if hasattr(self, key)}
        told = {key: value for key, value in mine.items() if key not in _UNTOLD and _is_plain(value)}
        tensors = sorted([name, list(t.shape), str(t.dtype)] for name, t in self.space.tensors.items())
        noise = {"seed": self._noise.seed, "noise": self._noise.distribution}
        return {"optimizer": self.name, "class": type(self).__name__, **told, **noise, "tensors": _sum_of(tensors)}

    def _walk_header(self, walking: bool) -> dict[str, Any]:
        return {"evaluator": "walk", "fused": self.fused} if walking else {}

    def replay(self, trajectory: Trajectory | Any, finish: bool = True) -> int:
        """Make the weights again that a run logged, starting from its base. Returns the steps replayed."""
        log = trajectory if isinstance(trajectory, Trajectory) else Trajectory.read(trajectory)
        first = log.header.get("first_step", self.t)
        if self.t != first:
            raise UserError(
                f"{self.name}: replay must begin at step {first}, as the log does, got an optimizer at step {self.t}; "
                "load the state and the weights of that step"
            )
        self.follow(log.header)
        for payload in log:
            self.replay_step(payload)
        if finish:
            self.finish()
        return len(log)


# Options that no bit of a replay needs.
_UNTOLD = {"params", "lr", "radius", "evaluator", "model", "check", "patience", "fisher_check"}

_MEASURED = {"lr", "radius", "penalty", "squared"}  # options whose effect a log holds, step by step

_OF_BIRTH = {"entries", "selection", "reselect_every", "indices"}  # options that say which entries a direction moves


def log_version(header: Mapping[str, Any]) -> int:
    """The version of a log with this header; see `VERSION`."""
    return int(header.get("version", 1))


def _bytes_of(found: Selected, block: Block) -> Iterator[bytes]:
    """The positions as a log has them, a piece at a time."""
    for positions in found.pieces(0, block.size, WINDOW):
        yield positions.cpu().numpy().astype("<i8").tobytes()


def _sum_of_selected(found: Selected, block: Block) -> int:
    total = 0
    for piece in _bytes_of(found, block):
        total = zlib.crc32(piece, total)
    return total


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _begun(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it is checked once steps were taken: a schedule may have brought its rate to zero."""
    return {**group, "lr": 1.0} if number(group["lr"]) == 0 else group


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and _is_plain(a) and bool(a == b)


def _sum_of(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value).encode()):08x}"
