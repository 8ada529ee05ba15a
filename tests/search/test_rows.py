"""Wherever a model has the rows of its batch, points are told apart there, or evaluated alone: never mixed up."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import Injection
from gradientless.search.evaluators.snapshot import Snapshot
from gradientless.search.noise import Noise
from gradientless.search.optim import MeZO
from gradientless.search.points import ALL, ORIGIN, Direction, point
from gradientless.search.space import Space

WIDTH, TRIED = 6, 4  # calls in which two points are tried, each alone, and both in either order


class Base(nn.Module):
    """Ids to scores of each row; `between` is what each model does with the states [B, T, width]."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.norm = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.between(self.table(ids), ids)).mean(1))

    def between(self, states, ids):
        return self.inner(self.norm(states))


class TimeFirst(Base):
    def between(self, states, ids):
        return self.inner(self.norm(states.transpose(0, 1))).transpose(0, 1)


class TableTimeFirst(Base):
    def forward(self, ids):
        return super().forward(ids.T)

    def between(self, states, ids):
        return self.inner(self.norm(states)).transpose(0, 1)


class TimeFirstInBlocks(Base):
    """[time / 2, 2, rows, width]: the rows third."""

    def between(self, states, ids):
        rows, time, width = states.shape
        blocks = states.transpose(0, 1).reshape(time // 2, 2, rows, width)
        return self.inner(self.norm(blocks)).view(time, rows, width).transpose(0, 1)


class Flat(Base):
    def between(self, states, ids):
        return self.inner(self.norm(states.flatten(0, 1))).view(states.shape)


class FlatTimeFirst(Base):
    def between(self, states, ids):
        turned = states.transpose(0, 1)
        return self.inner(self.norm(turned.flatten(0, 1))).view(turned.shape).transpose(0, 1)


class Windows(Base):
    def between(self, states, ids):
        rows, time, width = states.shape
        return self.inner(self.norm(states.view(rows * 2, time // 2, width))).view(states.shape)


class WindowsFirst(Base):
    """Windows of all rows, one after the other."""

    def between(self, states, ids):
        first, second = states.chunk(2, 1)
        return torch.cat(self.inner(self.norm(torch.cat([first, second]))).chunk(2), 1)


class Sorted(Base):
    """Rows in the order of what they hold."""

    def between(self, states, ids):
        order = states.sum((1, 2)).argsort()
        return self.inner(self.norm(states[order]))[order.argsort()]


class SortedByIds(Base):
    """In an order that no point changes, and that mixes the points' rows all the same."""

    def between(self, states, ids):
        order = ids.sum(1).argsort()
        return self.inner(states[order])[order.argsort()]


class Interleaved(Base):
    """The first row beside the last, the second beside the last but one, and so on."""

    def between(self, states, ids):
        pairs = torch.stack([states, states.flip(0)], 1).flatten(0, 1)
        forth, back = self.inner(pairs).unflatten(0, (-1, 2)).unbind(1)
        return forth + back.flip(0)


class Experts(Base):
    """Each token goes to one of two layers."""

    def __init__(self):
        super().__init__()
        self.gate, self.other = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def between(self, states, ids):
        flat = states.flatten(0, 1)
        chosen, out = self.gate(flat).argmax(1), torch.zeros_like(flat)
        for number, layer in enumerate((self.inner, self.other)):
            mine = torch.where(chosen == number)[0]
            out[mine] = layer(flat[mine])
        return out.view(states.shape)


class BetterHalf(Base):
    """Half of each row's tokens go on: which, depends on the point, and how many does not."""

    def between(self, states, ids):
        score, out = self.gate(states).squeeze(-1), states.clone()
        chosen = score > score.median(1, keepdim=True).values
        out[chosen] = self.inner(states[chosen])
        return out

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)


class SortedExperts(Experts):
    """The tokens in the order of their experts, all of which see all of them."""

    def between(self, states, ids):
        flat = states.flatten(0, 1)
        chosen = self.gate(flat).argmax(1)
        order = chosen.argsort(stable=True)
        sorted_, which = flat[order], chosen[order].unsqueeze(1)
        out = torch.where(which == 0, self.inner(sorted_), self.other(sorted_))
        return out[order.argsort()].view(states.shape)


class WithoutPadding(Base):
    """Only tokens above 1 are computed."""

    def between(self, states, ids):
        out = torch.zeros_like(states)
        out[ids > 1] = self.inner(states[ids > 1])
        return out


class OfAllRows(Base):
    """A row looks at the mean of all rows."""

    def between(self, states, ids):
        return self.inner(states - states.mean((0, 1)))


class RowsAsFeatures(Base):
    """The rows are what a layer sums over."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(1, WIDTH)

    def between(self, states, ids):
        return self.inner(states + self.mix(states.mean(2, keepdim=True)).cumsum(0) * 0.1)


class Rotated(Base):
    """Positions from a table, where a row dimension is put before them by hand."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(40, WIDTH)

    def between(self, states, ids):
        turn = self.positions(torch.arange(ids.shape[1]))[None, None, :, :]
        return self.inner((states.unsqueeze(1) * turn.cos()).squeeze(1))


class Relative(Base):
    """Distances, a square of numbers for the whole batch."""

    def __init__(self):
        super().__init__()
        self.distances = nn.Embedding(40, 1)

    def between(self, states, ids):
        place = torch.arange(ids.shape[1])
        weights = self.distances((place[:, None] - place[None]).abs()).squeeze(-1).softmax(-1)
        return self.inner(weights @ states)


class Positions(Base):
    def __init__(self):
        super().__init__()
        self.positions, self.turn = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH)

    def between(self, states, ids):
        found = self.turn(self.positions(torch.arange(ids.shape[1]).unsqueeze(0)))
        return self.inner(states + found)


class Router(nn.Module):
    """Without children, and its answer is a tuple with a number among its tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(WIDTH, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, states, *, top: int):
        scores = states @ self.weight + self.bias
        return scores.softmax(-1), scores.topk(top, -1).indices, top


class Routed(Base):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def between(self, states, ids):
        shares, best, top = self.router(states, top=2)
        return self.inner(states) * shares.gather(-1, best).sum(-1, keepdim=True) / top


class RoutedTimeFirst(Routed):
    def between(self, states, ids):
        return super().between(states.transpose(0, 1), ids).transpose(0, 1)


class Matmul(nn.Linear):
    """A linear layer that computes in its own words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class OwnWords(Base):
    def __init__(self):
        super().__init__()
        self.inner = Matmul(WIDTH, WIDTH)


class GatedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, gate, table):
        return functional.rms_norm(x * torch.sigmoid(gate), (WIDTH,)) * self.weight + table


class Gated(Base):
    """A module with three inputs: two of the batch, and one of the model with as many entries as the batch has rows."""

    def __init__(self):
        super().__init__()
        self.norm, self.register = GatedNorm(), torch.randn(8, WIDTH)

    def between(self, states, ids):
        time = states.shape[1]
        return self.inner(self.norm(states, states.flip(1), self.register.repeat(5, 1)[:time].to(states.dtype)))


class BatchStatistics(Base):
    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)

    def between(self, states, ids):
        return self.inner(self.statistics(states.transpose(1, 2)).transpose(1, 2))


TOGETHER = (
    TimeFirst,
    TableTimeFirst,
    TimeFirstInBlocks,
    Flat,
    Windows,
    Positions,
    Routed,
    RoutedTimeFirst,
    Gated,
    Base,
)
ALONE = (
    FlatTimeFirst, WindowsFirst, Sorted, SortedByIds, Interleaved, BetterHalf, Experts, SortedExperts, OfAllRows,
    RowsAsFeatures, Rotated, Relative,
)  # fmt: skip
SHAPES = ((4, 10), (4, 8), (4, 16), (8, 16), (2, 4), (2, 8), (3, 6), (1, 2), (1, 4), (6, 24))  # rows, and their tokens


def made(kind: type[Base], dtype: torch.dtype = torch.float32) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind().to(dtype).eval()


def batch_of(rows: int, time: int):
    generator = torch.Generator().manual_seed(rows * 100 + time)
    ids = torch.randint(0, 11, (rows, time), generator=generator)
    return ids, torch.randint(0, 3, (rows,), generator=generator)


class Together:
    """The loss of a batch; of several points in one batch too."""

    def __init__(self, model: nn.Module, ids, labels):
        self.model, self.ids, self.labels, self.passes = model, ids, labels, 0

    def __call__(self):
        return float(functional.cross_entropy(self.model(self.ids).float(), self.labels))

    def injected(self, injection):
        return Runner(self, injection)


class Runner:
    def __init__(self, closure: Together, injection):
        self.closure, self.injection = closure, injection

    def losses(self, points):
        self.closure.passes += 1
        with self.injection.at(points):
            out = self.closure.model(self.closure.ids.repeat(len(points), 1))
        return [functional.cross_entropy(mine.float(), self.closure.labels) for mine in out.chunk(len(points))]


def points_of_a_step():
    z, other = Direction(4, 0, ALL), Direction(4, 1, ALL)
    return [point(0.1, z), point(-0.1, z), ORIGIN, point(0.2, other) + point(0.1, z)]


def measured(kind: type[Base], first: int, points=None, dtype: torch.dtype = torch.float32, only: str = ""):
    """(Losses by copies, those injected, whether points were evaluated alone) on batches of all shapes, of which the
    first decides."""
    model = made(kind, dtype)
    tensors = {name: tensor for name, tensor in model.named_parameters() if only in name}
    space = Space(tensors, Noise(0, "gaussian"), rank=1)
    points = points or points_of_a_step()
    wanted, found, where = [], [], None
    for shape in (SHAPES[first], *SHAPES):
        closure = Together(model, *batch_of(*shape))
        wanted.append(Snapshot(space, closure).losses(points))
        where = Inject(space, closure, model if where is None else where.injection)
        found.append(where.losses(points))
    return wanted, found, where.injection.one_by_one


@pytest.mark.parametrize("first", [0, 1, 4, 9])
@pytest.mark.parametrize("kind", [*TOGETHER, *ALONE, WithoutPadding])
@pytest.mark.filterwarnings("ignore:inject")
@torch.no_grad()
def test_every_point_has_the_loss_of_its_own_weights(kind, first):
    """Also where the batch has by chance as many rows as tokens, whichever batch came first; and whether points share
    a batch depends on the model alone."""
    wanted, found, alone = measured(kind, first)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    if kind is not WithoutPadding:  # whose rows are those of the data: what is computed of each point has one size
        assert alone == (kind in ALONE)


@pytest.mark.parametrize("kind", [TimeFirst, Flat, Positions, Routed, Gated, FlatTimeFirst, Experts, Rotated])
@pytest.mark.filterwarnings("ignore:inject")
@torch.no_grad()
def test_half_precision_comes_to_the_same_decision(kind):
    z = Direction(4, 0, ALL)
    points = [point(0.3, z), point(-0.3, z)]
    wanted = torch.tensor(measured(kind, 0, points)[0])
    for dtype in (torch.bfloat16, torch.float16):
        _, found, alone = measured(kind, 0, points, dtype)
        assert alone == (kind in ALONE)
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("only", ["table", "inner", "norm", "out", "bias", "gate", "other", "positions", "turn", "mix"])
@pytest.mark.filterwarnings("ignore:inject")
@torch.no_grad()
def test_some_tensors_alone(only):
    """Where the points differ not before, or not behind, what moves the rows."""
    some = [kind for kind in (*TOGETHER, *ALONE) if any(only in name for name, _ in made(kind).named_parameters())]
    for kind in some:
        wanted, found, _ = measured(kind, 1, only=only)
        told = lambda said, kind=kind: f"{kind.__name__}: {said}"  # noqa: E731
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6, msg=told)


class Dropping(Base):
    """Dropout by a module, by a function, and by a mask that is drawn from a generator."""

    def __init__(self):
        super().__init__()
        self.drop, self.generator = nn.Dropout(0.5), torch.Generator().manual_seed(3)

    def between(self, states, ids):
        states = functional.dropout(self.drop(super().between(states, ids)), 0.3, self.training)
        keep = torch.empty_like(states).bernoulli_(0.5, generator=self.generator)
        return states * keep / 0.5


@torch.no_grad()
def test_dropout_does_not_hide_where_the_rows_are():
    """Nor do the passes in which they are looked for draw anything."""
    model = made(Dropping).train()
    space, closure = Space(dict(model.named_parameters()), Noise(0), rank=1), Together(model, *batch_of(4, 8))
    states = torch.get_rng_state(), model.generator.get_state()
    inject = Inject(space, closure, model)
    assert inject.injection.try_together(closure.injected(inject.injection).losses) is None
    assert all(map(torch.equal, states, (torch.get_rng_state(), model.generator.get_state())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject.losses(points_of_a_step())
    assert closure.passes == TRIED + 1 and not inject.injection.one_by_one


@torch.no_grad()
def test_rows_that_see_each_other_are_kept_apart():
    """Statistics of the batch, in training mode: no shape tells, and what comes in is the same."""
    model = made(BatchStatistics).train()
    space = Space({"table.weight": model.table.weight}, Noise(0, "gaussian"), rank=1)
    points, closure = points_of_a_step(), Together(model, *batch_of(4, 8))
    inject = Inject(space, closure, model)
    with pytest.warns(UserWarning, match="done from now on, which takes a pass per point"):
        found = inject.losses(points)
    assert inject.injection.one_by_one
    assert found == pytest.approx(Snapshot(space, closure).losses(points), rel=1e-5)


@torch.no_grad()
def test_one_batch_that_cannot_be_shared_decides_nothing_for_the_next():
    """So that a resumed run, which does not see that batch, goes on as the straight one."""

    class Sometimes(Base):
        def between(self, states, ids):
            if states.shape[1] < 8:
                return super().between(states.transpose(0, 1), ids).transpose(0, 1)
            return super().between(states, ids)

    model = made(Sometimes)
    space, points, injection = Space(dict(model.named_parameters()), Noise(0), rank=1), points_of_a_step(), model
    passes = []
    for shape in ((4, 8), (2, 4), (4, 8)):
        closure = Together(model, *batch_of(*shape))
        where = Inject(space, closure, injection)
        injection = where.injection
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = where.losses(points)
        assert found == pytest.approx(Snapshot(space, closure).losses(points), rel=1e-5)
        passes.append((closure.passes, len(said)))
    assert passes == [(TRIED + 1, 0), (1 + 4, 1), (1, 0)]


def test_steps_are_the_same_whichever_batch_was_the_first():
    """A run that goes on in another process has the losses of the straight one, to the bit."""
    for kind in (TimeFirst, Flat, Experts, Rotated):
        batches = [batch_of(*shape) for shape in SHAPES[:4]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            straight, again = (
                MeZO(model.named_parameters(), lr=1e-2, eps=1e-2, rank=1, model=model)
                for model in (made(kind), made(kind))
            )
            losses = [straight.step(Together(straight.model, *batch)) for batch in batches]
            for batch in batches[:2]:
                again.step(Together(again.model, *batch))
            later = made(kind)
            resumed = MeZO(later.named_parameters(), lr=1e-2, eps=1e-2, rank=1, model=later)
            later.load_state_dict(again.model.state_dict())
            resumed.load_state_dict(again.state_dict())
            assert [resumed.step(Together(later, *batch)) for batch in batches[2:]] == losses[2:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layer_that_gets_nothing_has_nothing_to_change(dtype):
    """An expert of whom no token asks: rows of a linear layer, a table, a convolution and a normalisation."""
    for layer, empty in (
        (nn.Linear(6, 4), torch.zeros(0, 6)),
        (nn.Linear(6, 4), torch.zeros(2, 0, 6)),
        (nn.Embedding(5, 4), torch.zeros(0, 3, dtype=torch.long)),
        (nn.Conv1d(6, 4, 3), torch.zeros(0, 6, 5)),
        (nn.LayerNorm(6), torch.zeros(0, 6)),
    ):
        layer, given = layer.to(dtype), empty if empty.dtype == torch.long else empty.to(dtype)
        for only in ("weight", "bias"):
            tensors = {name: tensor for name, tensor in layer.named_parameters() if name == only}
            if not tensors:
                continue
            space = Space(tensors, Noise(0), rank=1)
            with Injection(layer, tensors).at(space.deltas([point(0.1, Direction(0, 0, ALL))])):
                found = layer(given)
            assert found.shape == layer(given).shape and found.dtype == dtype
