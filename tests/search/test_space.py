"""The passes over memory: equal bits however they are divided, nothing of a tensor's size held, half precision."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gradientless.delta import Sweep
from gradientless.run.memory import TensorBytes
from gradientless.search import selection
from gradientless.search import space as space_module
from gradientless.search.noise import Noise, cpu, reference
from gradientless.search.optim import GLD, STP, ForwardOptimizer, MeZO
from gradientless.search.optim.entrywise import entries
from gradientless.search.points import ALL, Direction, Losses, Update, point
from gradientless.search.space import Block, Space
from reference import noise as written

KINDS = tuple(reference.STREAMS)
TERMS = [(0.3, 3, 1), (-0.1, 2, 0), (1e-3, 2**31 + 1, 5)]
HALF = [torch.bfloat16, torch.float16]


def weights(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


# Passes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 1, 77, 4096, 2**34 + 5])
def test_a_pass_is_the_sum_written_out(kind, start):
    """Each product rounded once, then each sum, on either backend, wherever the pass begins."""
    noise, readable = Noise(9, kind), Noise(9, kind, "torch")
    expected = weights(9001) * torch.tensor(0.9)
    for factor, step, draw in TERMS:
        expected = expected + torch.tensor(factor, dtype=torch.float32) * readable.fill("w", step, draw, start, 9001)
    for one in (noise, readable):
        found = weights(9001)
        one.walk("w", found, TERMS, 0.9, start)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_change_no_bit(kind, monkeypatch):
    ran = []
    inner = cpu._walk_parallel
    monkeypatch.setattr(cpu, "_walk_parallel", lambda *args: ran.append(1) or inner(*args))
    noise, count = Noise(9, kind), 2 * cpu._SPAN + 333
    whole = weights(count)
    noise.walk("w", whole, TERMS, 0.9)
    pieces = weights(count)
    for at in range(0, count, 9_999):
        noise.walk("w", pieces[at : at + 9_999], TERMS, 0.9, at)
    assert torch.equal(pieces, whole) and not ran
    threads = numba.config.NUMBA_NUM_THREADS + 1
    try:
        torch.set_num_threads(threads)
        spread = weights(count)
        noise.walk("w", spread, TERMS, 0.9)
        assert ran and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert torch.equal(spread, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_pass_in_chunks(kind, monkeypatch):
    monkeypatch.setattr("gradientless.search.noise._CHUNK", 64)
    for dtype in (torch.float64, *HALF):
        found, expected = weights(300).to(dtype), weights(300).to(dtype)
        Noise(9, kind).walk("w", found, TERMS[:2])
        for factor, step, draw in TERMS[:2]:
            drawn = Noise(9, kind).fill("w", step, draw, 0, 300)
            product = drawn.double() * factor if dtype == torch.float64 else (drawn * factor).to(dtype)
            expected = expected + product
        assert torch.equal(found, expected)


# Directions ----------------------------------------------------------------------------------------------------------

SHAPES = {"w": (6, 5), "conv": (3, 2, 4), "b": (7,)}


def made(space: Space, direction: Direction) -> dict[str, np.ndarray]:
    with torch.no_grad():
        for tensor in space.tensors.values():
            tensor.zero_()
    space.add(point(1.0, direction))
    return {name: tensor.detach().numpy().copy() for name, tensor in space.tensors.items()}


def zeros(dtype=torch.float64):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def test_the_sphere_is_that_of_the_whole_direction():
    space = Space(zeros(), Noise(4, "sphere"))
    found, expected = made(space, Direction(2, 3, ALL)), written.sphere(SHAPES, 4, 2, 3)
    assert sum(np.sum(z**2) for z in found.values()) == pytest.approx(6 * 5 + 3 * 2 * 4 + 7, rel=1e-12)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)
    blocks = [Block("w", ("w",), 30), Block("b", ("b",), 7, 3, "random")]
    space = Space(zeros(), Noise(4, "sphere"), blocks)
    alone = made(space, Direction(2, 3, "w"))
    assert np.sum(alone["w"] ** 2) == pytest.approx(30) and not alone["b"].any()
    some = made(space, Direction(2, 3, "b"))
    assert np.sum(some["b"] ** 2) == pytest.approx(3) and np.count_nonzero(some["b"]) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "every"), [(1, 1), (2, 3), (4, 1)])
def test_directions_of_low_rank(kind, rank, every):
    for step in (0, 4, 5):
        space = Space(zeros(), Noise(4, kind), rank=rank, resample_every=every)
        found = made(space, Direction(step, 1, ALL))
        factors = space.factors(Direction(step, 1, ALL), 0.5)
        for name, shape in SHAPES.items():
            expected = written.low_rank(kind, shape, 4, name, step, 1, rank, every)
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(
                factors[name].dense(space.tensors[name]).numpy(), 0.5 * expected, rtol=0, atol=1e-5
            )
        assert factors["w"].values.shape == (6, rank) and factors["conv"].right.shape == (8, rank)
        assert factors["b"].right is None
        if kind == "rademacher" and rank == 1:
            assert set(np.unique(found["w"])) == {-1.0, 1.0}
    index = torch.tensor([1, 7, 29])
    fixed = Space(zeros(), Noise(4, kind), [Block("w", ("w",), 30, fixed=index)], rank, every)
    some = made(fixed, Direction(5, 1, "w"))["w"].reshape(-1)
    np.testing.assert_allclose(some[index], found["w"].reshape(-1)[index], rtol=0, atol=1e-12)
    assert np.count_nonzero(some) <= 3


def test_low_rank_adds_are_divided_without_a_change(monkeypatch):
    whole, parts = weights(600).view(30, 20), weights(600).view(30, 20)
    for tensor, chunk in ((whole, 1 << 18), (parts, 45)):
        monkeypatch.setattr("gradientless.search.space._CHUNK", chunk)
        Space({"w": tensor}, Noise(1), rank=3).add(point(0.1, Direction(0, 0, ALL)))
    assert torch.equal(whole, parts) and not torch.equal(whole, weights(600).view(30, 20))


# Half precision ------------------------------------------------------------------------------------------------------


def test_rounding_bits_are_as_written_on_every_backend():
    expected = written.rounding(1000, 6, "w", 4, 2)
    for backend in ("numba", "torch"):
        noise = Noise(6, backend=backend)
        assert noise.rounding("w", 4, 2, 0, 1000, torch.device("cpu")).tolist() == expected.tolist()
        assert noise.rounding("w", 4, 2, 13, 500, torch.device("cpu")).tolist() == expected[13:513].tolist()
    bits = Noise(6).rounding("w", 0, 0, 0, 200_000, torch.device("cpu")).double()
    assert abs(bits.mean() - (2**16 - 1) / 2) < 5 * 2**16 / math.sqrt(12 * 200_000)
    assert bits.min() < 16 and bits.max() > 2**16 - 17


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("value", [1.0, 1.001, -1.0007, 3.3e-3, -2.5e-5, 4.1e-8, 0.0, 777.7])
def test_stochastic_rounding_is_right_in_the_mean_and_never_passes_a_neighbour(dtype, value):
    bits = torch.arange(2**16, dtype=torch.int32)
    wide = torch.full((2**16,), value)
    found = reference.round_stochastically(wide, bits, dtype)
    levels = found.unique()
    assert len(levels) <= 2 and levels.min().float() <= wide[0] <= levels.max().float()
    gap = float(levels.max().float() - levels.min().float())
    assert abs(float(found.double().mean()) - float(wide[0])) <= gap * (
        2.0**-12 if dtype == torch.float16 else 2.0**-15
    )
    if float(wide[0].to(dtype)) == float(wide[0]):
        assert len(levels) == 1
    else:
        assert levels[1] == torch.nextafter(levels[0].float().to(dtype), torch.tensor(math.inf, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_that_are_not_finite_stay_so(dtype):
    wide = torch.tensor([math.inf, -math.inf, math.nan])
    found = reference.round_stochastically(wide, torch.full((3,), 2**16 - 1, dtype=torch.int32), dtype)
    assert found[:2].tolist() == [math.inf, -math.inf] and found[2].isnan()


class TwoPoint(ForwardOptimizer):
    name = "TwoPoint"

    def search(self, t):
        z, lr = Direction(t, 0, ALL), self.param_groups[0]["lr"]
        plus, minus = yield Losses([point(1e-2, z), point(-1e-2, z)])
        return Update(point(-lr * (plus - minus) / 2e-2, z), (plus + minus) / 2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_does_not_drift_over_1_000_steps(dtype):
    """A flat loss: probes put every bit back, and an update of nothing rounds nothing."""
    params = {"w": nn.Parameter(weights(300).view(20, 15).to(dtype)), "b": nn.Parameter(weights(9).to(dtype))}
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = TwoPoint(params.items(), {"lr": 1.0})
    for _ in range(1_000):
        optimizer.step(lambda: 2.5)
    assert all(torch.equal(p.detach(), before[name]) for name, p in params.items())


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_updates_below_the_resolution_arrive_in_the_mean(dtype, rank):
    """1,000 updates of one direction, each a hundredth of the distance between neighbours of 1.0: to the nearest none
    would arrive."""
    step = float(torch.finfo(dtype).eps) / 100
    tensor = torch.ones(64, 32, dtype=dtype)
    space = Space({"w": tensor}, Noise(0, "rademacher"), rank=rank)
    nearest = torch.ones(64, 32, dtype=dtype)
    direction = Direction(0, 0, ALL)
    for t in range(1_000):
        space.add(point(step, direction), step=t)
    Space({"w": nearest}, Noise(0, "rademacher"), rank=rank).add(point(step, direction))
    assert torch.equal(nearest, torch.ones(64, 32, dtype=dtype))
    z = torch.zeros(64, 32)
    Space({"w": z}, Noise(0, "rademacher"), rank=rank).add(point(1.0, direction))
    arrived = ((tensor.float() - 1.0) * z).double()
    spread = float(arrived.std()) / math.sqrt(arrived.numel())
    assert abs(float(arrived.mean()) - 1_000 * step) < 5 * spread < 100 * step


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_replays_to_the_same_bits(dtype, tmp_path):
    def params():
        return {"w": nn.Parameter(weights(60).view(6, 10).to(dtype)), "b": nn.Parameter(weights(9).to(dtype))}

    for make in (
        lambda p: TwoPoint(p.items(), {"lr": 1e-4}),
        lambda p: TwoPoint(p.items(), {"lr": 1e-4}, rank=2),
        lambda p: STP(p.items(), radius=0.05),
    ):
        tuned = params()
        optimizer = make(tuned)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        optimizer.record(path)
        for _ in range(8):
            optimizer.step(lambda tuned=tuned: sum(float(p.detach().double().square().sum()) for p in tuned.values()))
        again = params()
        make(again).replay(path)
        assert all(torch.equal(again[name], p) for name, p in tuned.items())
        assert not torch.equal(tuned["w"], params()["w"])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_rule_may_store_what_it_computed(dtype):
    tensor = torch.ones(8, 4, dtype=dtype)
    space = Space({"w": tensor}, Noise(0))
    values = torch.full((16,), 1.0 + float(torch.finfo(dtype).eps) / 2)
    space.store("w", values, 8, step=3)
    assert set(tensor.view(-1)[8:24].tolist()) <= {1.0, float(values[0]), 1.0 + float(torch.finfo(dtype).eps)}
    assert len(tensor.view(-1)[8:24].unique()) == (1 if dtype == torch.float32 else 2)
    assert torch.equal(tensor.view(-1)[:8], torch.ones(8, dtype=dtype))


# Memory --------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        old = {t.untyped_storage().data_ptr() for t in tree_flatten((arguments, keywords))[0] if hasattr(t, "dtype")}
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize(("dtype", "evaluator"), [(torch.float32, "walk"), (torch.bfloat16, None)], ids=str)
def test_nothing_of_a_tensors_size_is_held(dtype, evaluator, rank, monkeypatch):
    """A walking step, and the commit of one in half precision: numpy's arrays counted too."""
    made_by_numpy = []
    for kind in ("empty", "zeros"):
        inner = getattr(np, kind)
        monkeypatch.setattr(
            np, kind, lambda *a, _inner=inner, **k: made_by_numpy.append(_inner(*a, **k)) or made_by_numpy[-1]
        )
    tensor = nn.Parameter(torch.zeros(2048, 4096, dtype=dtype))
    optimizer = TwoPoint([("w", tensor)], {"lr": 1e-3}, rank=rank, evaluator=evaluator or "auto", check=False)
    with Largest() as seen:
        if evaluator:
            optimizer.step(lambda: 1.0)
        else:
            optimizer.space.add(point(1e-3, Direction(0, 0, ALL)), {"w": 0.5}, step=0)
    largest = max([seen.bytes, *(array.nbytes for array in made_by_numpy)])
    assert largest <= 0.02 * tensor.numel() * tensor.element_size() + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_norm_is_measured_without_a_copy(dtype):
    flat = torch.full((1_500_000,), 0.5, dtype=dtype)
    with Largest() as seen:
        (squared,) = Space({"w": flat}, Noise(0)).squared_norms("w", [()])
    assert squared == pytest.approx(375_000, rel=1e-5) and seen.bytes <= 2**20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_backend_in_torch_holds_less_than_8_mib_in_a_pass(dtype, kind):
    noise, flat = Noise(0, kind, "torch"), torch.zeros(1_000_000, dtype=dtype)
    space = Space({"w": flat}, noise)
    with TensorBytes() as counter:
        space.add(point(1e-3, Direction(0, 0, ALL)), step=0)
    assert counter.peak < 8 * 2**20 and flat.any()
    with TensorBytes() as counter:
        drawn = noise.gather("w", 0, [0], torch.arange(0, 1_000_000, 4))
    assert counter.peak < 8 * 2**20 + 8 * 250_000 + 4 * drawn.numel()


SELECTIONS = [
    Block("w", ("w",), 500, 200, "random"),
    Block("w", ("w",), 500, 9, "random"),
    Block("w", ("w",), 500, 200, "magnitude"),
    Block("w", ("w",), 500, None, "fixed", fixed=torch.randperm(500, generator=torch.Generator().manual_seed(1))[:99]),
    Block("some", ("b", "w", "c"), 541, 100, "random"),
    Block("some", ("b", "w", "c"), 541, 3, "magnitude"),
]


@pytest.mark.parametrize("kind", ["gaussian", "sphere", "rank 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", SELECTIONS, ids=lambda block: f"{block.selection} {block.entries} of {block.name}")
def test_a_selection_moves_in_pieces_as_at_once(block, dtype, kind, monkeypatch):
    """Probes, walks, walks of some rows, rules entry by entry, and updates rounded stochastically."""
    rank, noise = (2, Noise(4)) if kind == "rank 2" else (None, Noise(4, kind))
    found = []
    for size in (1 << 16, 16):
        monkeypatch.setattr(selection, "WINDOW", size)
        monkeypatch.setattr(selection, "_READ", size)
        monkeypatch.setattr(space_module, "_ROWS", size)
        tensors = {
            "w": weights(500).view(20, 25).to(dtype),
            "b": weights(40).to(dtype),
            "c": torch.ones(1, dtype=dtype),
        }
        space = Space(tensors, noise, [block], rank)
        for due in space.due(2):
            space.choose(due, 2)
        terms = ((0.3, Direction(2, 1, block.name)), (-0.2, Direction(2, 0, ALL)), (0.1, Direction(2, 0, block.name)))
        states = []
        with space.at(space.deltas([terms])[0]):
            states.append(list(map(torch.clone, tensors.values())))
        with space.taken(terms):
            states.append(list(map(torch.clone, tensors.values())))
        rows = torch.tensor([1, 7, 19])
        with space.rows_at({"w": rows}, terms):
            states.append([tensors["w"][rows].clone()])
        assert all(torch.equal(a, b) for a, b in zip(*states[:2], strict=True))
        assert torch.equal(states[0][0][rows], states[2][0])
        states.append([entries(space, terms[:1], "w", start, start + 100) for start in range(0, 500, 100)])
        space.add(terms, {"w": 0.5}, step=3)
        found.append([*states, list(tensors.values())])
    for a, b in zip(*found, strict=True):
        assert all(map(torch.equal, a, b))
    moved = (states[0][0] != weights(500).view(20, 25).to(dtype)).sum()
    assert moved > 400, "the whole direction between them"


def test_random_sets_are_kept_while_they_are_mentioned():
    def births(optimizer):
        return {birth for _, birth in optimizer.space._drawn}

    def of(kind, **more):
        params = {name: nn.Parameter(torch.full((10,), 0.5)) for name in "ab"}
        optimizer = kind(params.items(), entries=3, check=False, **more)
        for _ in range(5):
            optimizer.step(lambda: float(sum(p.sum() for p in params.values())))
        return optimizer

    assert births(of(MeZO, evaluator="snapshot")) == set()
    assert births(of(MeZO, evaluator="walk")) == {4}, "the last step's, by which it went back"
    assert births(of(MeZO, evaluator="walk", reselect_every=4)) == {4}
    trees = of(GLD, options=(2, 2))
    assert births(trees) <= {birth for _, birth in trees.alive()}
    params = {"w": nn.Parameter(torch.ones(10))}
    walking = MeZO(params.items(), lr=1e-3, entries=3, evaluator="walk", check=False)
    walking.fused = True
    for t in range(3):
        walking.step(lambda: float(params["w"].sum()))
        assert births(walking) == {t}, "the way back"
    walking.settle()


def test_sets_without_room_are_made_again(monkeypatch):
    """The same bits, and no more bytes than there is room for, or than the largest takes."""
    ends = []
    for room in (1 << 20, 200):
        monkeypatch.setattr(Space, "_KEPT", room)
        params = {f"{i}": nn.Parameter(weights(640 + i)) for i in range(9)}
        optimizer = MeZO(params.items(), lr=1e-3, eps=1e-3, entries=100, evaluator="walk", check=False)
        sizes, inner = [], optimizer.space.noise.selected
        monkeypatch.setattr(optimizer.space.noise, "selected", lambda *a, _in=inner, _s=sizes: _s.append(1) or _in(*a))
        for _ in range(3):
            optimizer.step(lambda params=params: float(sum(p.square().sum() for p in params.values())))
            kept = sum(found.bytes for found in optimizer.space._drawn.values())
            assert kept + optimizer.space._room == room + sum(4 * p.numel() for p in params.values()) // 64
            assert optimizer.space._room >= 0 and len(optimizer.space._last) <= 1
        ends.append((sizes, list(params.values())))
    assert len(ends[0][0]) == 27 < len(ends[1][0])
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


def test_rows_that_are_probed_alone_keep_the_bound_of_a_walk():
    table = nn.Parameter(torch.zeros(30_522, 384))

    def closure():
        return 1.0

    closure.touched = lambda: {"w": torch.arange(0, 4096 * 7, 7)}
    optimizer = TwoPoint([("w", table)], {"lr": 1e-3}, evaluator="walk", check=False)
    with TensorBytes() as counter:
        optimizer.step(closure)
    copy = 4096 * 384 * 4
    assert copy < counter.peak < copy + 5 * 2**20 < 0.02 * table.numel() * 4 + 16 * 2**20


@pytest.mark.parametrize("more", [{}, {"rank": 8}, {"entries": 100_000}, {"noise": "sphere"}], ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_a_norm_penalty_keeps_the_bound_of_a_walk(squared, more):
    """2% of the weights and 16 MiB, all tensors together that are held at one time."""
    params = {f"layer.{i}.w": nn.Parameter(torch.full((1024, 1024), 0.03)) for i in range(8)}
    more = {"penalty": 0.1, "squared": squared, "evaluator": "walk", "check": False, **more}
    optimizer = MeZO(params.items(), lr=1e-3, eps=1e-3, **more)
    with TensorBytes() as counter:
        optimizer.step(lambda: 0.0)
    assert counter.peak <= 0.02 * 32 * 2**20 + 16 * 2**20
    assert any(not torch.equal(p, torch.full_like(p, 0.03)) for p in params.values())  # by the penalty alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_norms_at_points_are_those_of_the_weights_there(rank, dtype, monkeypatch):
    monkeypatch.setattr(space_module, "_CHUNK", 60)
    tensors = {"w": weights(13 * 17).view(13, 17).to(dtype), "b": weights(40).to(dtype)}
    blocks = [Block("some", ("w", "b"), 13 * 17 + 40, 50, "random"), Block("w", ("w",), 13 * 17)]
    space = Space(tensors, Noise(4), blocks, rank)
    space.buffer("m")["w"].fill_(0.5)
    some, whole = Direction(3, 1, "some"), Direction(2, 0, ALL)
    points = [(), point(0.3, whole), point(0.3, some), ((0.3, whole), (-0.7, some), (0.2, Direction(3, 0, "w")))]
    points += [((0.4, Direction(3, 0, ALL, "m")), (0.1, some)), point(0.4, Direction(3, 0, "some", "m"))]
    for name in tensors:
        found = space.squared_norms(name, points)
        for terms, squared in zip(points, found, strict=True):
            with space.at(space.deltas([terms])[0]):
                expected = float(tensors[name].double().square().sum())
            assert squared == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 8), (3, 2), (5, 200), (0, 70_001), (7, 131_072)])
def test_the_compiled_rounding_into_bfloat16_is_the_reference(start, count):
    noise, device = Noise(3), torch.device("cpu")
    wide = torch.randn(count, generator=torch.Generator().manual_seed(1))
    for i, special in enumerate((math.inf, -math.inf, math.nan, 0.0, 3.4e38)):
        wide[i * count // 5] = special
    out = torch.empty(count, dtype=torch.bfloat16)
    noise.store("w", 4, 2, start, wide, out)
    bits = noise.rounding("w", 4, 2, start, count, device)
    expected = reference.round_stochastically(wide, bits, torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())  # which of the many "no number"s it is does not matter
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 3, 1), (301, 577, 1), (600, 1001, 3), (90_001, 7, 2)])
def test_the_compiled_product_is_the_one_in_torch(dtype, rows, columns, rank):
    """Sizes within a chunk, within a thread's span, and beyond; rows that end within chunks."""
    generator = torch.Generator().manual_seed(2)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(columns, rank, generator=generator)
    first = torch.randn(rows * columns, generator=generator)
    first[-1] = math.inf
    found = {}
    for backend in ("torch", "numba"):
        found[backend] = first.to(dtype, copy=True)
        rounding = (4, 2) if dtype == torch.bfloat16 else None
        Noise(3, backend=backend).add_product("w", found[backend], left, right, rounding)
    assert torch.equal(found["torch"], found["numba"]) and not torch.equal(found["torch"], first.to(dtype))


def test_some_of_the_points_of_a_sweep_are_read_as_those_of_a_list():
    space = Space({"b": weights(7)}, Noise(0, "gaussian"), [Block("b", ("b",), 7)])
    points = [point(0.1 * draw, Direction(2, draw, "b")) for draw in range(6)]
    whole = space.deltas(points)
    assert isinstance(whole, Sweep) and len(whole) == 6
    for some in (whole[2:4], whole[4:8], list(whole)[2:4]):
        assert len(some) == 2 and [len(mine) for mine in some] == [1, 1]
    for p, (mine,) in enumerate(whole[2:4], start=2):
        assert mine.name == "b" and torch.equal(mine.values, whole[p][0].values)
