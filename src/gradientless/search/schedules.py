"""Schedules: how a radius or a learning rate changes over a run. A schedule is a multiplier of a step.

In a recipe a schedule is named; in a loop of your own, `lr_scheduler` makes a torch scheduler of it, which moves
`group["lr"]`: the learning rate of an estimating optimizer and the radius of a searching one. A function of your own
takes the place of a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch

from gradientless.errors import UserError, brief, unknown, with_kind

Schedule = Callable[[float, float, int], float]  # (progress in [0, 1], floor, cycles) -> multiplier


def constant(progress: float, floor: float, cycles: int) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, floor: float, cycles: int) -> float:
    """1 - t (1 - h) / T, from 1 to the floor h (thesis, Eq. 4.1)."""
    return 1.0 - progress * (1.0 - floor)


def cosine(progress: float, floor: float, cycles: int) -> float:
    """h + (1 - h) (1 + cos(pi t / T)) / 2 (Loshchilov and Hutter, SGDR, arXiv 1608.03983, Eq. 5, one cycle)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_restarts(progress: float, floor: float, cycles: int) -> float:
    """Cosine in `cycles` equal cycles, each starting again at 1 (SGDR with T_mult = 1)."""
    place = progress * cycles
    return cosine(1.0 if progress >= 1.0 else place - math.floor(place), floor, cycles)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine-restarts": cosine_restarts,
}


def multiplier(
    schedule: str | Schedule, total: int, *, floor: float = 0.0, warmup: int = 0, cycles: int = 1
) -> Callable[[int], float]:
    """The multiplier as a function of the step t = 0, 1, …

    schedule: of `SCHEDULES`, or a function of your own, which is tried before it is used. total: steps T of the run.
    floor: h, the multiplier at the end. warmup: steps over which the multiplier rises linearly from 1/warmup to 1
    before the schedule runs over the remaining total - warmup steps (Goyal et al., arXiv 1706.02677, section 2.2).
    cycles: restarts of 'cosine-restarts'.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise unknown("schedule", "name", schedule, SCHEDULES)
    if not 0.0 <= floor <= 1.0:
        raise UserError(f"schedule: floor must be in [0, 1], got {floor}")
    if total < 1:
        raise UserError(f"schedule: total must be >= 1, got {total}")
    if not 0 <= warmup < total:
        raise UserError(f"schedule: warmup must be in [0, {total}) steps, got {warmup}")
    if cycles < 1:
        raise UserError(f"schedule: cycles must be >= 1, got {cycles}")
    curve = SCHEDULES[schedule] if isinstance(schedule, str) else _checked(schedule)

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return curve(min(1.0, (step - warmup) / (total - warmup)), floor, cycles)

    for step in () if isinstance(schedule, str) else (warmup, (warmup + total) // 2, total - 1):
        at(step)
    return at


def _checked(schedule: Schedule) -> Schedule:
    """A schedule of the user's own, whose answers are looked at."""
    name = getattr(schedule, "__name__", type(schedule).__name__)

    def curve(progress: float, floor: float, cycles: int) -> float:
        wanted = f"schedule: '{name}' must return a finite number >= 0, got"
        try:
            found = schedule(progress, floor, cycles)
        except Exception as error:
            raise UserError(f"{wanted} {with_kind(error)} at progress {progress:.3g}") from error
        number = isinstance(found, Real) and not isinstance(found, bool)
        if not number or not 0.0 <= found < math.inf:
            raise UserError(f"{wanted} {brief(found)} at progress {progress:.3g}")
        return float(found)

    return curve


def lr_scheduler(
    optimizer: torch.optim.Optimizer,
    schedule: str | Schedule,
    total: int,
    *,
    floor: float = 0.0,
    warmup: int = 0,
    cycles: int = 1,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as a torch LR scheduler; call its `step()` after each `optimizer.step(…)`."""
    at = multiplier(schedule, total, floor=floor, warmup=warmup, cycles=cycles)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, at)
