"""Fisher importance against its transcription, its limit, and the ranking by gradients that checks it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gradientless.errors import UserError
from gradientless.language.surfaces.head_session import HeadSession
from gradientless.run import importance
from gradientless.run.importance import divergences, fisher, fisher_by_gradients
from gradientless.run.objective import Objective
from gradientless.search.noise import Noise
from reference import fisher as written

NAMES = ("w1", "b1", "w2", "b2")


def head(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (5, 4), "b1": (5,), "w2": (3, 5), "b2": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


FEATURES = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))


def logits(weights: dict[str, torch.Tensor], features: torch.Tensor = FEATURES) -> torch.Tensor:
    return torch.tanh(features @ weights["w1"].T + weights["b1"]) @ weights["w2"].T + weights["b2"]


def session(weights: dict[str, torch.Tensor]) -> HeadSession:
    return HeadSession(*weights.values(), activation="tanh", names=NAMES, features=FEATURES)


def test_divergences_are_the_transcriptions():
    generator = np.random.default_rng(2)
    base = generator.normal(size=(8, 3))
    moved = base + generator.normal(size=(20, 8, 3)) * np.linspace(0.1, 3, 20)[:, None, None]
    expected = [written.divergence(base, each) for each in moved]
    assert divergences(base, moved).tolist() == pytest.approx(expected) and len(set(expected)) > 4


@pytest.mark.parametrize("name", ["w1", "b1", "w2"])
@pytest.mark.parametrize(("scale", "draws"), [(1.0, 1), (0.3, 1), (2.0, 3)])
def test_importance_is_the_transcriptions(name, scale, draws, monkeypatch):
    weights = head()
    monkeypatch.setattr(importance, "_CHUNK", 7)  # several batches, the last one short
    found = fisher(session(weights).logits, name, weights[name], Noise(5), 30, scale=scale, draws=draws)
    spread = scale * float(weights[name].abs().max())
    fills = [Noise(5).fill(f"{name}@fisher", 30, draw, 0, weights[name].numel()) for draw in range(draws)]
    z = spread * torch.stack(fills).double().numpy()

    def outputs(theta: np.ndarray) -> np.ndarray:
        own = {key: torch.from_numpy(theta) if key == name else value.double() for key, value in weights.items()}
        return logits(own, FEATURES.double()).numpy()

    expected = written.importance(outputs, weights[name].double().numpy(), z)
    assert found.tolist() == pytest.approx(expected.reshape(-1).tolist())
    assert found.shape == (weights[name].numel(),) and found.unique().numel() > 1


def test_the_perturbations_are_as_large_as_the_largest_weight():
    theta = torch.zeros(200, 100)
    theta[3, 4] = -2.5
    seen = []

    def outputs(candidates):
        seen.extend(change.values for changes in candidates for change in changes)
        return torch.randn(len(candidates), 2, 4)

    fisher(outputs, "w", theta, Noise(0), 0)
    z = torch.cat(seen)
    assert z.numel() == 20_000 and float(z.std()) == pytest.approx(2.5, rel=0.02) and abs(float(z.mean())) < 0.06


def test_an_entry_without_effect_is_the_least_important():
    weights = head()
    weights["w2"][:, 2] = 0.0  # nothing reads the third hidden unit
    unread = HeadSession(*weights.values(), activation="relu", names=NAMES, features=FEATURES)
    found = fisher(unread.logits, "w1", weights["w1"], Noise(1), 0).view(5, 4)
    assert (found[2] == 1 / 9 - 1).all() and found.min() == 1 / 9 - 1 and found.unique().numel() > 2


def test_a_tensor_above_the_limit_is_refused():
    theta = torch.zeros(1).expand(importance.LIMIT + 1)
    with pytest.raises(UserError, match="fisher: tensor 'w' must have at most 1,000,000 entries, got 1,000,001"):
        fisher(lambda _: torch.zeros(1, 2, 2), "w", theta, Noise(0), 0)


class Surface(torch.nn.Module):
    training = False
    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.tensors = {name: tensor.requires_grad_(True) for name, tensor in head(3).items()}

    def trainable(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def prepare(self, features: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(features=features)

    def logits(self, prepared: SimpleNamespace, generator: None = None) -> torch.Tensor:
        return logits(self.tensors, prepared.features)

    def session(self, prepared: SimpleNamespace) -> HeadSession:
        weights = [tensor.detach() for tensor in self.tensors.values()]
        return HeadSession(*weights, activation="tanh", names=NAMES, features=prepared.features)


def test_gradients_are_finite_differences():
    surface = Surface()
    found = fisher_by_gradients(surface, lambda: logits(surface.tensors), "w2").view(3, 5)
    weights = {name: tensor.detach().double() for name, tensor in surface.tensors.items()}
    base = torch.log_softmax(logits(weights, FEATURES.double()), 1)
    for c, h in ((0, 0), (1, 3), (2, 4)):
        moved = {**weights, "w2": weights["w2"].clone()}
        moved["w2"][c, h] += 1e-6
        slope = (torch.log_softmax(logits(moved, FEATURES.double()), 1) - base) / 1e-6
        assert float(found[c, h]) == pytest.approx(float((base.exp() * slope.square()).sum(1).mean()), rel=1e-3)
    assert all(tensor.grad is None for tensor in surface.tensors.values())


def test_the_check_says_how_well_the_rankings_agree():
    surface, told = Surface(), []
    part = (surface.prepare(FEATURES), torch.zeros(len(FEATURES), dtype=torch.int64))
    objective = Objective(surface, [part], Noise(4), say=told.append)  # type: ignore[arg-type]
    plain = objective.importance("w2", 20, rows=6)
    assert told == []
    assert torch.equal(objective.importance("w2", 20, rows=6, check=True), plain)
    (line,) = told
    assert line.startswith("fisher: step 20, w2: rank correlation with the gradients' (Eq. 2.39) ")
    assert -1 <= float(line.rpartition(" ")[2]) <= 1
