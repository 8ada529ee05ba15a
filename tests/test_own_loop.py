"""The optimizers in a user's own loop: a model that is not ours, a closure, a torch scheduler, a saved state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gradientless import GLD, SMTP, STP, GLDSearch

STEPS = 40


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
    model[2].weight.requires_grad_(False)  # a frozen tensor is left alone
    return model


MAKERS = {
    "gld": lambda p: GLD(p, radius=0.3, candidates=4),
    "gld with options": lambda p: GLD(p, radius=0.3, candidates=3, entries=6, options=(2, 2)),
    "gld with momentum": lambda p: GLD(p, radius=0.3, candidates=4, momentum=0.4, momentum_weighted=True),
    "gld by magnitude": lambda p: GLD(p, radius=0.3, entries=12, selection="magnitude", reselect_every=7),
    "gldsearch": lambda p: GLDSearch(p, radius=0.2, min_radius=0.01),
    "stp": lambda p: STP(p, radius=0.05),
    "smtp": lambda p: SMTP(p, radius=0.03),
}


def loop(model, optimizer, scheduler, first: int, last: int) -> list[float]:
    x, y = data()
    losses = []
    for t in range(first, last):
        rows = torch.arange(t * 32, t * 32 + 32) % len(x)
        batch, labels = x[rows], y[rows]

        def closure(batch=batch, labels=labels):
            return nn.functional.cross_entropy(model(batch), labels)

        losses.append(optimizer.step(closure))
        scheduler.step()
    return losses


def make(kind: str):
    model = make_model()
    optimizer = MAKERS[kind](model.named_parameters())
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.005)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_ten_lines_learn_and_continue_from_a_saved_state(kind, tmp_path):
    model, optimizer, scheduler = make(kind)
    x, y = data()
    with torch.no_grad():
        first = float(nn.functional.cross_entropy(model(x), y))
    frozen = model[2].weight.clone()
    radius = optimizer.param_groups[0]["lr"]

    losses = loop(model, optimizer, scheduler, 0, STEPS // 2 - 3)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
    losses += loop(model, optimizer, scheduler, STEPS // 2 - 3, STEPS)
    optimizer.finish()

    with torch.no_grad():
        assert float(nn.functional.cross_entropy(model(x), y)) < first - 0.05
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005) and radius > 0.01
    assert torch.equal(model[2].weight, frozen)
    assert all(p.grad is None for p in model.parameters())

    resumed_model, resumed, resumed_scheduler = make(kind)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in {"model": resumed_model, "optimizer": resumed, "scheduler": resumed_scheduler}.items():
        part.load_state_dict(saved[name])
    tail = loop(resumed_model, resumed, resumed_scheduler, STEPS // 2 - 3, STEPS)
    resumed.finish()
    assert tail == losses[STEPS // 2 - 3 :]
    for name, value in model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], value), name
    assert resumed.forward_passes == optimizer.forward_passes


def test_the_loop_replays_without_the_model(tmp_path):
    model, optimizer, scheduler = make("gld")
    optimizer.record(tmp_path / "run.log")
    loop(model, optimizer, scheduler, 0, 20)
    other = copy.deepcopy(make_model())
    MAKERS["gld"](other.named_parameters()).replay(tmp_path / "run.log")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_dropout_is_noticed():
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    x, y = data()
    with (
        torch.random.fork_rng(devices=[]),
        pytest.warns(UserWarning, match="GLD: the loss at one point must not change"),
    ):
        GLD(model.named_parameters()).step(lambda: nn.functional.cross_entropy(model(x), y))
