"""Walking: in place from point to point, replayed pass by pass, and the promises that hold for every evaluator."""

from __future__ import annotations

import io
import math
import signal

import numpy as np
import pytest
import torch
from torch import nn

from gradientless.errors import UserError
from gradientless.search.evaluators import Snapshot, Walk, resolve
from gradientless.search.noise import DISTRIBUTIONS, Noise
from gradientless.search.optim import GLD, SMTP, STP, ForwardOptimizer
from gradientless.search.points import ALL, ORIGIN, Direction, Losses, Update, combined, point, scaled
from gradientless.search.space import Block, Space
from gradientless.search.trajectory import Trajectory

SHAPES = {"emb": (10, 6), "dense.weight": (4, 6), "bias": (5,), "conv": (2, 3, 2)}


class TwoPoint(ForwardOptimizer):
    """Two points, their difference, weight decay on all but the bias: what the MeZO family does to the weights."""

    name = "TwoPoint"

    def __init__(self, params, lr=1e-3, eps=1e-3, weight_decay=0.0, **more):
        self.eps, self.weight_decay = eps, weight_decay
        super().__init__(params, {"lr": lr}, **more)

    def search(self, t):
        z, lr = Direction(t, 0, ALL), self.param_groups[0]["lr"]
        plus, minus = yield Losses([point(self.eps, z), point(-self.eps, z)])
        decay = {name: 1 - lr * self.weight_decay for name in self.space.tensors if name != "bias"}
        slope = (plus - minus) / (2 * self.eps)
        return Update(point(-lr * slope, z), (plus + minus) / 2, decay=decay if self.weight_decay else {})


def make_params(dtype=torch.float32, shapes=SHAPES) -> dict[str, nn.Parameter]:
    rng = np.random.default_rng(3)
    return {name: nn.Parameter(torch.tensor(rng.normal(size=shape)).to(dtype)) for name, shape in shapes.items()}


class Bowl:
    """A bowl that moves with the step."""

    def __init__(self, params):
        self.params, self.t = params, 0

    def __call__(self):
        goal = 0.3 * math.sin(3 * self.t + 1)
        return sum(((p.double() - goal) ** 2).sum() for p in self.params.values())


class Rows(Bowl):
    """As `Bowl`, but of the embedding only two rows count, others in each step."""

    def rows(self):
        return torch.tensor([self.t % 10, (3 * self.t + 5) % 10]).unique()

    def touched(self):
        return {"emb": self.rows()} if self.t != 3 else {}

    def __call__(self):
        goal = 0.3 * math.sin(3 * self.t + 1)
        parts = {**self.params, "emb": self.params["emb"][self.rows()] if self.t != 3 else self.params["emb"]}
        return sum(((p.double() - goal) ** 2).sum() for p in parts.values())


def values(params):
    return {name: p.detach().clone() for name, p in params.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


METHODS = {
    "two points": lambda params, **more: TwoPoint(params, lr=1e-2, **more),
    "two points, sphere": lambda params, **more: TwoPoint(params, lr=1e-2, noise="sphere", **more),
    "two points, rank 2": lambda params, **more: TwoPoint(params, lr=1e-2, rank=2, resample_every=3, **more),
    "two points, decay": lambda params, **more: TwoPoint(params, lr=1e-2, weight_decay=0.5, **more),
    "stp": lambda params, **more: STP(params, radius=0.1, noise="rademacher", **more),
    "stp, penalty": lambda params, **more: STP(params, radius=0.1, penalty=0.2, **more),
    "smtp": lambda params, **more: SMTP(params, radius=0.05, **more),
    "gld": lambda params, **more: GLD(params, radius=0.2, candidates=3, **more),
    "gld, entries": lambda params, **more: GLD(params, radius=0.4, entries=3, **more),
    "gld, magnitude": lambda params, **more: GLD(
        params, radius=0.4, entries=3, selection="magnitude", reselect_every=3, **more
    ),
    "gld, options": lambda params, **more: GLD(params, radius=0.3, options=(2, 2), candidates=2, **more),
    "gld, momentum": lambda params, **more: GLD(params, radius=0.3, momentum=0.4, **more),
}
STEPS = 9


def train(optimizer, closure, first, last, by_hand=()):
    losses = []
    for t in range(first, last):
        closure.t = t
        if t in by_hand:
            optimizer.settle()
        losses.append(optimizer.step(closure))
    return losses


@pytest.mark.parametrize("loss", [Bowl, Rows])
@pytest.mark.parametrize(("fused", "by_hand"), [(False, ()), (True, ()), (True, (0, 1, 4, 5, 8)), (False, (2,))])
@pytest.mark.parametrize("method", METHODS)
def test_replay_repeats_the_walk(method, fused, by_hand, loss, tmp_path):
    params = make_params()
    optimizer = METHODS[method](params.items(), seed=5, evaluator="walk")
    optimizer.fused = fused
    log = optimizer.record(tmp_path / "log")
    assert log.header["evaluator"] == "walk" and log.header["fused"] is fused
    losses = train(optimizer, loss(params), 0, STEPS, by_hand)
    assert optimizer.space.settled is not fused or "two points" not in method
    again = make_params()
    replayer = METHODS[method](again.items(), seed=5, evaluator="walk")
    replayer.follow(log.header)
    assert [replayer.replay_step(payload) for payload in Trajectory.open(tmp_path / "log")] == losses
    assert same(values(again), values(params))  # as they stand
    assert replayer.space.walk_state() == optimizer.space.walk_state()
    optimizer.finish()
    whole = make_params()
    assert METHODS[method](whole.items(), seed=5).replay(tmp_path / "log") == STEPS
    assert same(values(whole), values(params))
    assert not same(values(whole), values(make_params()))
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("loss", [Bowl, Rows])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_stop_and_resume_is_the_straight_run(method, fused, loss):
    """The checkpoint holds the weights as they stand, away from θ, and says where that is."""
    straight = make_params()
    optimizer = METHODS[method](straight.items(), seed=5, evaluator="walk")
    optimizer.fused = fused
    losses = train(optimizer, loss(straight), 0, 5)
    assert optimizer.space.settled is not fused or "two points" not in method
    file = io.BytesIO()
    torch.save({"model": values(straight), "optimizer": optimizer.state_dict()}, file)
    losses += train(optimizer, loss(straight), 5, STEPS)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = make_params()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["model"][name])
    resumed = METHODS[method](params.items(), seed=5, evaluator="walk")
    resumed.fused = fused
    resumed.load_state_dict(saved["optimizer"])
    assert train(resumed, loss(params), 5, STEPS) == losses[5:]
    assert same(values(params), values(straight))
    assert resumed.space.walk_state() == optimizer.space.walk_state()


@pytest.mark.parametrize("loss", [Bowl, Rows])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_walk_and_snapshot_meet_the_same_points(method, fused, loss):
    """In float64, where rounding cannot change a decision, losses and weights agree to its last digits."""
    ends = []
    for kind in ("snapshot", "walk"):
        params = make_params(torch.float64)
        optimizer = METHODS[method](params.items(), seed=5, evaluator=kind)
        optimizer.fused = fused
        losses = train(optimizer, loss(params), 0, STEPS)
        optimizer.finish()
        ends.append((losses, values(params)))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(ends[1][1][name], ends[0][1][name], rtol=0, atol=1e-6)
    assert not same(ends[0][1], values(make_params(torch.float64)))


@torch.no_grad()
def test_evaluators_agree_on_the_losses_at_the_same_points():
    params = make_params()
    space, closure = Space(params, Noise(3)), Bowl(params)
    points = [ORIGIN, *(point(c, Direction(t, 0, ALL)) for t in range(3) for c in (1e-3, -1e-3))]
    points.append((*points[1], *points[4]))
    expected = Snapshot(space, closure).losses(points)
    before = values(params)
    walked = Walk(space, closure).losses([*points, ORIGIN])
    np.testing.assert_allclose(walked[:-1], expected, rtol=1e-6)  # float32 weights, a few roundings apart
    assert walked[-1] == pytest.approx(expected[0], rel=1e-6)
    for name, p in params.items():
        assert (p.detach() - before[name]).abs().max() <= 8 * 2.0**-24 * before[name].abs().max()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_a_flat_loss_leaves_only_rounding_over_10_000_steps(noise, fused):
    """No update at all: what is left after 20,000 probes is rounding. Bound: rms 1e-5 of the weights' rms, as √(passes)
    roundings of half a last bit have it; a single probe is 1e-3."""
    params = {"w": nn.Parameter(torch.randn(512, generator=torch.Generator().manual_seed(1)))}
    before = params["w"].detach().clone()
    optimizer = TwoPoint(params.items(), noise=noise, evaluator="walk", check=False)
    optimizer.fused = fused
    for _ in range(10_000):
        optimizer.step(lambda: 1.0)
    optimizer.settle()
    drift = (params["w"].detach() - before).double()
    rms = float(drift.square().mean().sqrt() / before.double().square().mean().sqrt())
    assert 0 < rms < 1e-5
    assert abs(float(drift.mean())) < 1e-5


def test_moves_are_one_pass_of_one_product_for_each_direction():
    params = make_params()
    space = Space(params, Noise(3))
    a, b = Direction(0, 0, ALL), Direction(1, 0, ALL)
    noise = {d: {n: Noise(3).fill(n, d.step, 0, 0, p.numel()).view_as(p) for n, p in params.items()} for d in (a, b)}
    expected = values(params)
    space.move_to(point(1e-3, a))
    space.move_to(point(-1e-3, a))
    space.commit(point(0.25, a), {"emb": 0.5})
    assert space.standing == point(-1e-3, a)  # a commit touches nothing
    space.move_to(point(2e-3, b))
    f32 = lambda c: torch.tensor(c, dtype=torch.float32)  # noqa: E731
    for name, p in params.items():
        w = expected[name] + f32(1e-3) * noise[a][name]
        w = w + f32(-2e-3) * noise[a][name]
        decay = 0.5 if name == "emb" else 1.0
        w = w * decay + f32(decay * 1e-3 + 0.25) * noise[a][name]
        w = w + f32(2e-3) * noise[b][name]
        assert torch.equal(p.detach(), w), name
    space.commit(ORIGIN, {"emb": 0.5})
    space.commit(point(1.0, b))  # a second commit over a decay that waits: first settled
    assert space.standing == point(-1.0, b)
    space.settle()
    assert space.settled


@pytest.mark.parametrize("fused", [False, True])
def test_the_length_of_a_direction_is_measured_once(fused, monkeypatch):
    """Its noise is asked for by itself for that alone: passes make their own."""
    asked, inner = [], Noise.fill
    monkeypatch.setattr(Noise, "fill", lambda noise, *a: asked.append(a[:2]) or inner(noise, *a))
    params = make_params()
    optimizer = TwoPoint(params.items(), lr=1e-2, noise="sphere", evaluator="walk", check=False)
    optimizer.fused = fused
    train(optimizer, Bowl(params), 0, 4)
    optimizer.settle()
    assert sorted(asked) == sorted((name, step) for name in SHAPES for step in range(4))
    assert len(optimizer.space._lengths) <= 1, "of the last step alone"


def test_points_combine_by_direction():
    a, b = Direction(0, 0, ALL), Direction(1, 0, ALL)
    assert combined(point(1.0, a), point(2.0, b), point(0.5, a)) == ((1.5, a), (2.0, b))
    assert combined(point(1.0, a), scaled(-1.0, point(1.0, a))) == ORIGIN


@pytest.mark.parametrize("kind", [*DISTRIBUTIONS, "rank 1", "rank 3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_updates_noise_is_the_probes(kind, dtype):
    """Entry by entry, to the last bit, for every shape, whole and by selected entries."""
    rank = {"rank 1": 1, "rank 3": 3}.get(kind)
    noise = Noise(7, "gaussian" if rank else kind)
    for steps in ((4,), (4, 5)):
        probe, update, walk = (make_params(dtype) for _ in range(3))
        terms = tuple((0.3, Direction(step, 1, ALL)) for step in steps)
        space = Space(probe, noise, rank=rank, resample_every=2)
        with space.at(space.deltas([terms])[0]):
            seen = values(probe)
        assert same(values(probe), values(update))
        Space(update, noise, rank=rank, resample_every=2).add(terms)
        assert same(values(update), seen)
        Space(walk, noise, rank=rank, resample_every=2).move_to(terms)
        assert same(values(walk), seen)
        assert not same(seen, values(probe))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_points_too_large_to_be_made_are_the_same_to_the_last_bit(dtype, rank, monkeypatch):
    """Before them and between, terms that are kept from another point of the step; several births of a selection."""
    params, seen = make_params(dtype), []
    blocks = [Block("emb", ("emb",), 60, 7, "random"), Block("rest", tuple(SHAPES)[1:], 41)]
    space = Space(params, Noise(3), blocks, rank)
    space.buffer("m")["emb"].fill_(0.3)
    first = point(0.3, Direction(0, 0, "emb"))
    points = [first, (*first, (0.2, Direction(1, 0, ALL))), point(0.5, Direction(1, 1, "rest"))]
    points += [(*points[1], *points[2], (-0.7, Direction(2, 0, "emb")), *first, (0.5, Direction(0, 0, "emb", "m")))]
    before = values(params)
    for limit in (10**6, 30, 0):
        monkeypatch.setattr(Space, "_CACHED_ENTRIES", limit)
        space.end_step()
        seen.append([])
        Snapshot(space, lambda: seen[-1].append(values(params)) or 0.0).losses(points)
        assert same(values(params), before)
    for found in seen[1:]:
        assert all(same(a, b) for a, b in zip(found, seen[0], strict=True))
    assert not any(same(state, before) for state in seen[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.embed(ids[:-1])), ids[1:])


def test_tied_tensors_move_once():
    ids = torch.tensor([1, 5, 2, 2, 6])
    for kind in ("walk", "snapshot"):
        torch.manual_seed(0)
        model = Tied()
        before = model.embed.weight.detach().clone()
        optimizer = TwoPoint(model.named_parameters(), lr=1.0, evaluator=kind, check=False)
        assert list(optimizer.space.tensors) == ["embed.weight"]
        optimizer.step(lambda model=model: model(ids))
        moved = (model.embed.weight.detach() - before).view(-1)
        z = Noise(0).fill("embed.weight", 0, 0, 0, 28)
        ratio = moved / z
        torch.testing.assert_close(ratio, ratio.mean().expand(28), rtol=1e-3, atol=1e-5)
        assert model.head.weight is model.embed.weight


def test_global_random_state_is_untouched():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is the point
    for dtype, kind in ((torch.float32, "walk"), (torch.bfloat16, "snapshot")):
        params = make_params(dtype)
        for noise in DISTRIBUTIONS:
            TwoPoint(params.items(), noise=noise, evaluator=kind).step(Bowl(params))
        TwoPoint(params.items(), rank=1, evaluator=kind).step(Bowl(params))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_rows_that_a_batch_does_not_touch_are_not_probed_but_updated():
    params = make_params()
    before, seen = values(params), []
    optimizer = TwoPoint(params.items(), lr=1e-2, evaluator="walk", check=False)
    closure = Rows(params)

    class Watching(Rows):
        def __call__(self):
            seen.append(values(params))
            return super().__call__()

    closure = Watching(params)
    optimizer.step(closure)
    rows = closure.rows()
    others = [i for i in range(10) if i not in rows.tolist()]
    z = Noise(0).fill("emb", 0, 0, 0, 60).view(10, 6)
    for sign, state in zip((1, -1), seen, strict=True):
        assert torch.equal(state["emb"][others], before["emb"][others])
        assert torch.equal(state["emb"][rows], before["emb"][rows] + sign * torch.tensor(1e-3) * z[rows])
    moved = (params["emb"].detach() - before["emb"]) / z
    torch.testing.assert_close(moved, moved.mean().expand(10, 6), rtol=1e-3, atol=1e-4)
    assert moved.mean().abs() > 1e-3


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_walk(dtype):
    params = make_params(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        UserError,
        match=rf"^TwoPoint: evaluator walk must have float32 weights, got {kind}; "
        r"use evaluator 'inject' \(rank=1\) or 'snapshot'$",
    ):
        TwoPoint(params.items(), evaluator="walk")
    assert resolve("auto", Space(params, Noise(0))) == "snapshot"


def test_auto_walks_where_copies_would_be_large():
    space = Space(make_params(), Noise(0))
    assert resolve("auto", space) == "snapshot"
    large = Space({"w": torch.empty(2**22 + 1)}, Noise(0))
    assert resolve("auto", large) == "walk"
    assert resolve("auto", Space({"w": torch.empty(2**22 + 1, dtype=torch.bfloat16)}, Noise(0))) == "snapshot"

    def closure():
        return 0.0

    closure.session = lambda: None
    assert resolve("auto", large, closure) == "session"


def test_evaluators_are_refused_by_name():
    params = make_params()
    with pytest.raises(UserError, match="TwoPoint: unknown evaluator 'wlk'; did you mean 'walk'"):
        TwoPoint(params.items(), evaluator="wlk")
    with pytest.raises(UserError, match=r"TwoPoint: evaluator session must have a closure with a method session\(\)"):
        TwoPoint(params.items(), evaluator="session").step(Bowl(params))
    for rank in (0, True, 1.5):
        with pytest.raises(UserError, match=f"space: rank must be an integer >= 1, got {rank}"):
            TwoPoint(params.items(), rank=rank)
    with pytest.raises(UserError, match="space: resample_every must be an integer >= 1, got 0"):
        TwoPoint(params.items(), rank=1, resample_every=0)
    with pytest.raises(UserError, match="space: noise 'sphere' must come without rank, got rank 1"):
        TwoPoint(params.items(), rank=1, noise="sphere")


def test_a_log_says_how_it_was_walked(tmp_path):
    params = make_params()
    optimizer = TwoPoint(params.items(), evaluator="walk")
    optimizer.record(tmp_path / "log")
    optimizer.fused = True
    with pytest.raises(UserError, match="TwoPoint: fused must be set before record"):
        optimizer.step(Bowl(params))
    other = TwoPoint(params.items(), evaluator="snapshot")
    with pytest.raises(UserError, match="TwoPoint: evaluator must be walk, as the log says, got snapshot"):
        other.replay(tmp_path / "log")
    other.trajectory = optimizer.trajectory
    with pytest.raises(UserError, match="evaluator must be what the log's header says, walk, got snapshot"):
        other.step(Bowl(params))


@pytest.mark.parametrize("given", [False, True], ids=["the closure has the model", "the optimizer has it"])
def test_the_header_of_an_empty_log_follows_the_first_closure(given, tmp_path, monkeypatch):
    """With directions of low rank it is the closure's model that decides against walking: known at the first step."""
    monkeypatch.setattr("gradientless.search.evaluators.SMALL", 0)
    model, x = nn.Linear(4, 3), torch.ones(2, 4)

    def closure():
        return float(model(x).double().square().sum())

    before = values(dict(model.named_parameters()))
    optimizer = TwoPoint(model.named_parameters(), rank=1, model=model if given else None)
    optimizer.record(tmp_path / "log", {"base": "b"})
    assert (optimizer.trajectory.header.get("evaluator") == "walk") is not given
    closure.model = model
    for _ in range(3):
        optimizer.step(closure)
    log = Trajectory.open(tmp_path / "log")
    assert len(log) == 3 and "evaluator" not in log.header and log.header["base"] == "b"
    again = {name: nn.Parameter(tensor.clone()) for name, tensor in before.items()}
    TwoPoint(again.items(), rank=1).replay(log)
    assert same(values(again), values(dict(model.named_parameters())))
    del closure.model
    if not given:
        with pytest.raises(UserError, match="evaluator must be what the log's header says, one that leaves no trace"):
            optimizer.step(closure)


def test_a_step_that_fails_on_its_way_is_settled_and_ends_its_log(tmp_path):
    params = make_params()
    before = values(params)
    optimizer = TwoPoint(params.items(), evaluator="walk", check=False)

    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert optimizer.space.settled
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)
    optimizer.step(Bowl(params))  # without a log nothing is lost
    optimizer.record(tmp_path / "log")
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    with pytest.raises(UserError, match="a step that failed while walking must not be followed by others"):
        optimizer.step(Bowl(params))


@pytest.mark.parametrize(
    ("loss", "fused", "evaluator"),
    [
        (Bowl, False, "walk"),
        (Bowl, True, "walk"),
        (Rows, False, "walk"),
        (Rows, True, "walk"),
        (Bowl, False, "snapshot"),
    ],
)
def test_ctrl_c_leaves_every_tensor_where_the_log_says(loss, fused, evaluator, tmp_path, monkeypatch):
    """Whenever it arrives: between two tensors of a move or of a restoring, in a probe, while a step is taken."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    left = [math.inf]

    def cut(work):
        def at_work(self, *args, **options):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return work(self, *args, **options)

        return at_work

    for owner, name in ((Space, "_pass"), (Space, "_move_rows"), (Space, "_add"), (torch.Tensor, "copy_")):
        monkeypatch.setattr(owner, name, cut(getattr(owner, name)))
    stopped = set()
    try:
        for moment in range(1, 40):
            params = make_params()
            optimizer = TwoPoint(params.items(), lr=1e-2, weight_decay=0.5, evaluator=evaluator, check=False)
            optimizer.fused = fused
            log = optimizer.record(tmp_path / f"{moment}")
            left[0] = moment
            with pytest.raises(KeyboardInterrupt):
                train(optimizer, loss(params), 0, STEPS)
            left[0] = math.inf
            assert len(log) == optimizer.t
            stopped.add(optimizer.t)
            optimizer.settle()
            again = make_params()
            TwoPoint(again.items(), lr=1e-2, weight_decay=0.5, evaluator=evaluator, check=False).replay(log.path)
            for name, p in params.items():
                torch.testing.assert_close(p, again[name], rtol=0, atol=2e-6)  # a probe is 1e-3
    finally:
        signal.signal(signal.SIGINT, handler)
    assert {0, 1, 2} <= stopped


def test_20_000_steps_are_logged_in_200_kb(tmp_path):
    params = {"w": nn.Parameter(torch.zeros(2))}
    optimizer = TwoPoint(params.items(), evaluator="walk", check=False)
    optimizer.fused, optimizer.predicted_lr = True, lambda t: [1e-3]
    begun = optimizer.record(tmp_path / "log").path.stat().st_size
    for _ in range(200):
        optimizer.step(lambda: 1.0)
    assert (tmp_path / "log").stat().st_size - begun < 200 * 9 + 20
    assert begun + 20_000 * 9 + 20 < 200 * 1024


def test_a_rehearsal_leaves_no_trace():
    params = make_params()
    optimizer = TwoPoint(params.items(), evaluator="walk")
    optimizer.fused = True
    closure = Bowl(params)
    optimizer.step(closure)
    before, stood = values(params), optimizer.space.walk_state()
    optimizer.rehearse(closure)
    assert same(values(params), before) and optimizer.space.walk_state() == stood


def test_weights_changed_away_from_where_they_belong_are_noticed():
    params = make_params()
    optimizer = METHODS["two points"](params.items(), evaluator="walk")
    optimizer.fused = True
    train(optimizer, Bowl(params), 0, 2)
    with torch.no_grad():
        params["dense.weight"].mul_(0.5)
    for use in (optimizer.settle, lambda: optimizer.step(Bowl(params))):
        with pytest.raises(UserError, match=r"TwoPoint: parameters must not .* got 'dense.weight' .* call settle\(\)"):
            use()


@pytest.mark.parametrize("fused", [False, True])
def test_weights_may_be_changed_where_they_belong(fused):
    """Between two steps, after `settle`, by a state that is loaded: nothing is counted on then."""
    params = make_params()
    optimizer = METHODS["two points"](params.items(), evaluator="walk")
    optimizer.fused = fused
    train(optimizer, Bowl(params), 0, 2)
    optimizer.settle()
    with torch.no_grad():
        params["bias"].copy_(torch.ones(5))
    optimizer.step(Bowl(params))
    state, stood = optimizer.state_dict(), values(params)
    train(optimizer, Bowl(params), 0, 2)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for name, value in stood.items():
            params[name].copy_(value)
    optimizer.step(Bowl(params))
    optimizer.rehearse(Bowl(params))
    optimizer.step(Bowl(params))
    optimizer.finish()


@pytest.mark.filterwarnings("error:TwoPoint")
@pytest.mark.parametrize("evaluator", ["walk", "snapshot"])
def test_logged_weights_that_others_change_are_told_once(evaluator, tmp_path):
    params = make_params()
    optimizer = METHODS["two points"](params.items(), evaluator=evaluator, check=False)
    optimizer.record(tmp_path / "log")
    train(optimizer, Bowl(params), 0, 2)
    optimizer.rehearse(Bowl(params))
    train(optimizer, Bowl(params), 0, 1)
    with torch.no_grad():
        params["bias"].add_(1.0)
    with pytest.warns(UserWarning, match="TwoPoint: parameters must not change between logged steps, got 'bias'"):
        optimizer.step(Bowl(params))
    with torch.no_grad():
        params["bias"].add_(1.0)
    train(optimizer, Bowl(params), 0, 2)
