"""Schedules against their formulas, and as torch schedulers that move the radius."""

from __future__ import annotations

import pytest
import torch

from cases import SCHEDULES
from gradientless import GLD, lr_scheduler
from gradientless.errors import UserError
from gradientless.search.schedules import multiplier
from reference import schedules as written

TOTAL = 23
FORMULAS = {
    "constant": lambda t, total, floor, cycles: written.constant(t, total),
    "linear": lambda t, total, floor, cycles: written.linear(t, total, floor),
    "cosine": lambda t, total, floor, cycles: written.cosine(t, total, floor),
    "cosine-restarts": written.cosine_restarts,
}


def expected(name: str, t: int, total: int, floor=0.0, warmup=0, cycles=1) -> float:
    formula = lambda step, rest: FORMULAS[name](step, rest, floor, cycles)  # noqa: E731
    return written.warmup(formula, t, total, warmup) if warmup else formula(t, total)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, case in sorted(SCHEDULES.items()) for o in case.good])
def test_multipliers(name, options):
    for total in (1, TOTAL, 24):
        if options.get("warmup", 0) >= total:
            continue
        at = multiplier(name, total, **options)
        for t in range(total + 1):
            assert at(t) == pytest.approx(expected(name, t, total, **options), abs=1e-12), t
        assert at(total + 5) == pytest.approx(at(total))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, case in sorted(SCHEDULES.items()) for o in case.good])
def test_a_torch_scheduler_moves_the_radius(name, options):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = GLD([("w", weight)], radius=0.25, candidates=2, check=False)
    scheduler = lr_scheduler(optimizer, name, TOTAL, **options)
    for t in range(TOTAL):
        radius = 0.25 * expected(name, t, TOTAL, **options)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(radius, abs=1e-12)
        seen = []
        optimizer.step(lambda seen=seen: seen.append(weight.detach().clone()) or 0.0)
        z = optimizer.space.noise.fill("w", t, 0, 0, 3)
        torch.testing.assert_close(seen[1], radius * z)  # the first candidate has the scheduled radius
        torch.testing.assert_close(seen[2], radius / 2 * optimizer.space.noise.fill("w", t, 1, 0, 3))
        scheduler.step()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_errors(name):
    for bad, message in SCHEDULES[name].bad:
        options = {"total": 10, **bad}
        with pytest.raises(UserError, match=message):
            multiplier(options.pop("name", name), **options)


def test_unknown_name():
    with pytest.raises(UserError, match=r"schedule: unknown name 'cosin'; did you mean 'cosine'\? Known: constant"):
        multiplier("cosin", 5)
