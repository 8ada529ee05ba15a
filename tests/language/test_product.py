"""Every optimizer on every surface, with every evaluator, in every dtype: it moves what is tuned and nothing else, and
its log makes the same bits again; or it is refused in a line.

The suite runs as many cells as it takes for any two values of different axes to meet, save for Kiefer-Wolfowitz on more
than a few hundred entries; `make product` runs all.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator

import families
import numpy as np
import pytest
import torch
from families import LABELS, prompt_of
from test_cells import OPTIONS
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language.surfaces import SURFACES
from gradientless.run.objective import Objective
from gradientless.search.evaluators import EVALUATORS
from gradientless.search.noise import Noise
from gradientless.search.optim import OPTIMIZERS

AXES = (tuple(OPTIMIZERS), tuple(SURFACES), (*EVALUATORS, "auto"), ("bfloat16", "float16", "float32"))
IN_FLOAT32 = ("head", "ia3", "k_lst", "lora", "lst", "prefix", "prompt", "side_lora")  # whatever the model is in
FEW_ENTRIES = ("head", "prefix", "prompt")
BEHIND_PROMPTS = ("prefix", "prompt")


def refusal(key: str, name: str, evaluator: str, dtype: str) -> str | None:
    """Why there is no such cell; None where there is."""
    if key == "kieferwolfowitz" and name == "full":
        return "KieferWolfowitz: parameters must have at most 4096 entries, got "
    if evaluator == "session" and name != "head":
        return "evaluator session must have a closure with a method session"
    if evaluator == "walk" and dtype != "float32" and name not in IN_FLOAT32:
        return f"evaluator walk must have float32 weights, got {dtype}; use evaluator 'inject'"
    if evaluator == "inject" and key == "kieferwolfowitz":
        return "inject: directions must be low-rank, got a sparse change of "
    return None


CELLS = list(itertools.product(*AXES))
KEPT = [cell for cell in CELLS if refusal(*cell) is None]
QUICK = [cell for cell in KEPT if cell[0] != "kieferwolfowitz" or cell[1] in FEW_ENTRIES]  # 2 d passes a step
REFUSED = [cell for cell in CELLS if refusal(*cell) is not None]


def pairwise(cells: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Cells in which every pair of values of two axes stands, each cell with as many new pairs as any has left."""
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in cells}
    missing = set().union(*pairs.values())
    while missing:
        best = max(pairs, key=lambda cell: len(pairs[cell] & missing))
        missing -= pairs.pop(best)
        yield best


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        kept, whole = metafunc.function is test_kept, metafunc.config.getoption("--product")
        chosen = (KEPT if kept else REFUSED) if whole else pairwise(QUICK if kept else REFUSED)
        metafunc.parametrize("cell", sorted(chosen), ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = families.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def make(name: str, dtype: str, folder):
    kind = "llama" if name in BEHIND_PROMPTS else "bert"
    options = {"readout": "prompt", "prompt": prompt_of(kind)} if name in BEHIND_PROMPTS else {}
    return SURFACES[name].create(folder(kind), LABELS, dtype=dtype, max_length=16, **options, **OPTIONS.get(name, {}))


def optimizer_of(key: str, evaluator: str, surface):
    """By its defaults, but for steps that a tiny model feels, and noise of low rank where it is to be injected."""
    kind = OPTIMIZERS[key]
    takes = inspect.signature(kind).parameters
    options = {"eps": 1e-2, "lr": 1e-3} if "eps" in takes else {"radius": 1e-2}
    options |= {"min_radius": 1e-3} if "min_radius" in takes else {}
    options |= {"rank": 1} if evaluator == "inject" and "rank" in takes else {}
    options |= {"model": surface} if "model" in takes else {}
    return kind(surface.trainable().items(), seed=5, evaluator=evaluator, **options)


def objectives(surface):
    encoded = surface.encode(EXAMPLES)
    for rows in ([0, 1, 2], [3, 4], [2, 0]):
        yield Objective(surface, [(surface.prepare(encoded.batch(rows)), encoded.labels[rows])], Noise(5))


def bits(tensors) -> dict[str, bytes]:
    return {name: tensor.detach().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def random_state() -> tuple[bytes, bytes]:
    return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()  # noqa: NPY002 - the global one


@pytest.mark.filterwarnings("ignore:inject")  # where points are evaluated one at a time
def test_kept(cell, folder, tmp_path):
    key, name, evaluator, dtype = cell
    steps = 1 if key == "kieferwolfowitz" else 3
    surface = make(name, dtype, folder).eval()
    start, global_state = bits(surface.state_dict()), random_state()
    optimizer = optimizer_of(key, evaluator, surface)
    optimizer.record(tmp_path / "log")
    losses = [optimizer.step(objective) for objective in itertools.islice(objectives(surface), steps)]
    optimizer.finish()
    assert all(map(math.isfinite, losses)) and random_state() == global_state
    end, tuned = bits(surface.state_dict()), {id(tensor) for tensor in surface.trainable().values()}
    moved = {n: t for n, t in surface.state_dict(keep_vars=True).items() if end[n] != start[n]}
    assert moved and {id(t) for t in moved.values()} <= tuned
    assert all(p.grad is None for p in surface.parameters())
    again = make(name, dtype, folder)
    replayer = optimizer_of(key, evaluator, again)
    assert replayer.replay(tmp_path / "log") == steps
    assert bits(again.state_dict()) == end


@torch.no_grad()
def test_refused(cell, folder):
    key, name, evaluator, dtype = cell
    surface = make(name, dtype, folder).eval()
    with pytest.raises(UserError, match=refusal(*cell)) as caught:
        optimizer_of(key, evaluator, surface).step(next(objectives(surface)))
    assert "\n" not in str(caught.value)
