"""Injection: what the modules give equals what they give when their weights are really moved."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradientless.delta import Delta
from gradientless.errors import UserError
from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import SMALL, Injection, Unbatchable
from gradientless.search.evaluators.snapshot import Snapshot
from gradientless.search.noise import Noise
from gradientless.search.points import ALL, ORIGIN, Direction, point
from gradientless.search.space import Space

ROWS, TRIED = 4, 4  # calls in which two points are tried, each alone, and both in either order


class RMSNorm(nn.Module):
    """As models write it: no torch module."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ShiftedRMSNorm(RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * nn.functional.rms_norm(x, self.weight.shape)


class Gated(RMSNorm):
    def forward(self, x, gate, *, scale=1.0):
        return super().forward(x * torch.sigmoid(gate) * scale)


class Conv1D(nn.Module):
    """transformers' layer, whose weight is [in, out]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_())
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class ShiftedTable(nn.Embedding):
    """As OPT's positions: other arguments, and an offset."""

    def forward(self, mask):
        return super().forward(torch.cumsum(mask, 1) * mask + 1)


class ScaledTable(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class LinearOfItsOwn(nn.Linear):
    def forward(self, x):
        return functional.linear(torch.tanh(x), self.weight, self.bias) * 0.5


class Positions(nn.Module):
    """Adds what was computed once for the whole batch. shape: of the ids of its table."""

    def __init__(self, shape: str):
        super().__init__()
        self.table, self.shape = nn.Embedding(9, 6), shape
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        time = x.shape[1]
        ids = torch.arange(time)
        if self.shape == "row":
            found = self.inner(self.table(ids.unsqueeze(0)))
        elif self.shape == "flat":
            found = self.table(ids)
        elif self.shape == "expanded":
            found = self.table(ids.expand(x.shape[0], -1))
        else:  # T5: [T, T] relative positions
            found = self.table((ids[:, None] - ids[None]).abs()).mean(1)
        return x + found


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.table(ids))))


def floats(*shape):
    return torch.randn(ROWS, *shape)


def ids(*shape):
    return torch.randint(0, 7, (ROWS, *shape))


MODULES = {
    "linear": lambda: (nn.Linear(6, 5), floats(3, 6)),
    "linear without bias": lambda: (nn.Linear(6, 5, bias=False), floats(6)),
    "linear, rows laid flat": lambda: (nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 5)), floats(3, 6)),
    "linear class of its own": lambda: (LinearOfItsOwn(6, 5), floats(3, 6)),
    "two layers": lambda: (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), floats(3, 6)),
    "Conv1D": lambda: (Conv1D(5, 6), floats(3, 6)),
    "embedding": lambda: (nn.Embedding(7, 5, padding_idx=0), ids(3)),
    "embedding, rows laid flat": lambda: (nn.Sequential(nn.Flatten(0), nn.Embedding(7, 5)), ids(3)),
    "embedding with arguments of its own": lambda: (ShiftedTable(9, 5), torch.ones(ROWS, 3, dtype=torch.long)),
    "embedding with a factor": lambda: (ScaledTable(7, 5), ids(3)),
    "tied head": lambda: (Tied(), ids(3)),
    "conv1d": lambda: (nn.Conv1d(6, 4, 3, padding=1), floats(6, 7)),
    "conv2d": lambda: (nn.Conv2d(6, 4, (2, 3), stride=2, bias=False), floats(6, 5, 7)),
    "conv2d in groups, reflected": lambda: (
        nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="reflect", dilation=2), floats(6, 5, 7)
    ),
    "conv1d, depthwise": lambda: (nn.Conv1d(6, 6, 3, groups=6), floats(6, 7)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), floats(2, 3, 3, 4)),
    "layer norm": lambda: (nn.LayerNorm(6), floats(3, 6)),
    "torch's RMS norm": lambda: (nn.RMSNorm(6), floats(3, 6)),
    "RMS norm": lambda: (RMSNorm(6), floats(3, 6)),
    "RMS norm around one": lambda: (ShiftedRMSNorm(6), floats(3, 6)),
    "group norm": lambda: (nn.GroupNorm(2, 6), floats(6, 5)),
    "batch norm": lambda: (nn.BatchNorm1d(6).eval(), floats(6, 5)),
    "positions in a row": lambda: (Positions("row"), floats(5, 6)),
    "positions, flat": lambda: (Positions("flat"), floats(5, 6)),
    "positions, expanded": lambda: (Positions("expanded"), floats(5, 6)),
}  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float32):
    """(model, one batch) with values that are not those of a fresh module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, batch = MODULES[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype), batch.to(dtype) if batch.is_floating_point() else batch


def directions(tensors, count: int, rank: int = 2, seed: int = 5):
    """Per direction: name -> (U, V) or a dense change."""
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=noise)

    found = []
    for _ in range(count):
        made = {}
        for name, tensor in tensors.items():
            o = tensor.shape[0]
            made[name] = (draw(o, rank), draw(tensor.numel() // o, rank)) if tensor.ndim > 1 else draw(o)
        found.append(made)
    return found


def along(direction, coefficient: float) -> list[Delta]:
    found = []
    for name, parts in direction.items():
        if isinstance(parts, tuple):
            found.append(Delta(name, parts[0], None, parts[1], coefficient))
        else:
            found.append(Delta(name, coefficient * parts))
    return found


def some_points(tensors, size: float = 0.1):
    """Five points: ± a direction, nothing, another direction, a sum of both."""
    first, second = directions(tensors, 2)
    return [
        along(first, size),
        along(first, -size),
        [],
        along(second, 2 * size),
        along(first, size) + along(second, -size),
    ]


@torch.no_grad()
def moved(model: nn.Module, tensors, changes, batch):
    """The model's output with its weights really moved."""
    other = copy.deepcopy(model)
    theirs = dict(other.named_parameters())
    for change in changes:
        change.add_to(theirs[change.name].data)
    return other(batch)


@torch.no_grad()
def batched(model, injection, points, batch):
    """The model's outputs at points in one batch, as the evaluator gets there; raises where it would not."""

    def outputs(points):
        with injection.at(points):
            return model(torch.cat([batch] * len(points))).chunk(len(points))

    if len(points) > 1 and not injection.tried:
        refused = injection.try_together(lambda points: [float(out.square().mean()) for out in outputs(points)])
        if refused is not None:
            raise refused
    return outputs(points)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("order", [slice(None), slice(0, 2), slice(3, None)])
def test_equals_moved_weights(kind, order):
    model, batch = make(kind)
    tensors = dict(model.named_parameters())
    injection = Injection(model, tensors)
    points = some_points(tensors)[order]
    for _ in range(2):  # the first is watched
        for mine, found in zip(points, batched(model, injection, points, batch), strict=True):
            torch.testing.assert_close(found, moved(model, tensors, mine, batch), rtol=1e-5, atol=1e-5)
    for mine in points:
        (found,) = batched(model, injection, [mine], batch)
        torch.testing.assert_close(found, moved(model, tensors, mine, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_each_tensor_alone(kind):
    model, batch = make(kind)
    for name, tensor in model.named_parameters():
        tensors = {name: tensor}
        points = some_points(tensors)
        for mine, found in zip(points, batched(model, Injection(model, tensors), points, batch), strict=True):
            torch.testing.assert_close(found, moved(model, tensors, mine, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_other_dtypes(kind, dtype):
    model, batch = make(kind)
    tensors = dict(model.named_parameters())
    points = some_points(tensors)
    wanted = [moved(model, tensors, mine, batch) for mine in points]
    model, batch = model.to(dtype), batch.to(dtype) if batch.is_floating_point() else batch
    tensors = dict(model.named_parameters())
    if dtype == torch.float64:
        points = some_points({name: tensor.float() for name, tensor in tensors.items()})
        points = [[Delta(c.name, c.values.double(), None, c.right if c.right is None else c.right.double(), c.scale)
                   for c in mine] for mine in points]  # fmt: skip
        wanted = [moved(model, tensors, mine, batch) for mine in points]
    tolerance = 1e-12 if dtype == torch.float64 else 0.06 if dtype == torch.bfloat16 else 0.01
    for found, expected in zip(batched(model, Injection(model, tensors), points, batch), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["layer norm", "RMS norm", "linear"])
def test_noise_smaller_than_a_step_of_the_weights_counts_in_half_precision(kind):
    """1e-3 added to a bfloat16 weight near one is lost; injected, its mean effect over many rows is there."""
    model, _ = make(kind)
    batch = torch.randn(512, 6, generator=torch.Generator().manual_seed(1))
    tensors = dict(model.named_parameters())
    (direction,) = directions(tensors, 1, rank=1)
    points = [along(direction, 1e-3), along(direction, -1e-3)]
    plus, minus = batched(model, Injection(model, tensors), points, batch)
    slope = plus - minus
    model, batch = model.bfloat16(), batch.bfloat16()
    plus, minus = batched(model, Injection(model, dict(model.named_parameters())), points, batch)
    found = (plus.double() - minus.double()).flatten()
    assert float(functional.cosine_similarity(found, slope.double().flatten(), 0)) > 0.5
    projected = float(found @ slope.double().flatten() / slope.double().flatten().square().sum())
    assert projected == pytest.approx(1, abs=0.25)


def test_the_probe_of_two_points_is_one_product_in_and_one_out(monkeypatch):
    model, batch = make("linear")
    tensors = dict(model.named_parameters())
    injection = Injection(model, tensors)
    points = some_points(tensors)
    batched(model, injection, points[:2], batch)
    with injection.at(points):
        (site,) = injection._sites
        assert [(run.first, run.last) for run in site.runs] == [(0, 2), (3, 4), (4, 5)]
        assert [len(run.pairs) for run in site.runs] == [1, 1, 2]


class OfItsOwn(nn.Module):
    """A matrix, a vector and a number beside layers, one of which reads the vector in a hook."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 5))
        self.table, self.gates = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, *, shift=0.0):
        states = self.first(x)
        weights = (states @ self.get_parameter("table").T).softmax(-1)
        hook = self.second.register_forward_pre_hook(lambda module, args: (args[0] * torch.sigmoid(self.gates),))
        found = self.second(weights @ self.table + shift) * self.scale
        hook.remove()
        return found


@pytest.mark.parametrize("only", ["", "table", "gates", "scale", "second"])
@torch.no_grad()
def test_a_module_of_another_kind_runs_with_its_tensors_in_place(only):
    """One point at a time, its children's changes included; the evaluator knows without a try."""
    torch.manual_seed(1)
    model, batch = OfItsOwn(), torch.randn(ROWS, 3, 6)
    tensors = {name: tensor for name, tensor in model.named_parameters() if only in name}
    trace = Trace(model)
    injection = Injection(model, tensors)
    found = {name: tensor.unsqueeze(0) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}
    points = some_points(found)
    for mine in points:
        (alone,) = batched(model, injection, [mine], batch)
        torch.testing.assert_close(alone, moved(model, tensors, mine, batch), rtol=1e-5, atol=1e-5)
    assert injection.one_by_one == (only != "second") and injection._watched
    if only != "second":
        with pytest.raises(Unbatchable, match=r"must see the rows .*, got OfItsOwn; evaluate one point at a time"):
            batched(model, injection, points, batch)
    trace.check()
    space = Space(tensors, Noise(0, "gaussian"), rank=1)
    closure = Batched(model, batch)
    wanted = Snapshot(space, Closure(model, batch)).losses(points_of_a_step())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Inject(space, closure, injection).losses(points_of_a_step()) == pytest.approx(wanted, rel=1e-5)
    assert closure.calls == (TRIED + 1 if only == "second" else 4)


def test_arguments_by_name_and_several_inputs():
    gated = Gated(6)
    x, gate = torch.randn(4, 6), torch.randn(4, 6)
    points = some_points({"weight": gated.weight})[:2]
    injection = Injection(gated, {"weight": gated.weight})

    def outputs(points):
        with injection.at(points):
            return gated(x.repeat(len(points), 1), gate=gate.repeat(len(points), 1), scale=2.0).chunk(len(points))

    with torch.no_grad():
        assert injection.try_together(lambda points: [float(out.mean()) for out in outputs(points)]) is None
        found = outputs(points)
    for mine, out in zip(points, found, strict=True):
        other = copy.deepcopy(gated)
        mine[0].add_to(other.weight.data)
        torch.testing.assert_close(out, other(x, gate, scale=2.0))
    for model, arguments in ((nn.Linear(6, 5), {"input": x}), (nn.Conv1d(6, 4, 3), {"input": torch.randn(6, 7)})):
        tensors = dict(model.named_parameters())
        (mine,) = some_points(tensors)[:1]
        with torch.no_grad(), Injection(model, tensors).at([mine]):
            found = model(**arguments)
        torch.testing.assert_close(found, moved(model, tensors, mine, arguments["input"]))


@pytest.mark.parametrize("time", [5, 2 * ROWS])
def test_what_is_computed_once_for_the_batch_is_refused_or_done_alone(time):
    """Also when its length is by chance the batch's."""
    model = Positions("square")
    x = torch.randn(ROWS, time, 6)
    tensors = {"table.weight": model.table.weight}
    points = some_points(tensors)[:2]
    injection = Injection(model, tensors)
    with pytest.raises(
        Unbatchable, match=r"inject: the module of 'table.weight' must see the rows of the batch to tell 2"
    ):
        batched(model, injection, points, x)
    for mine in points:
        (found,) = batched(model, injection, [mine], x)
        torch.testing.assert_close(found, moved(model, tensors, mine, x), rtol=1e-5, atol=1e-5)


def test_rows_that_were_chosen_are_refused():
    """A mixture of experts: which rows an expert sees depends on the point."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(6, 6)

        def forward(self, x):
            flat = x.flatten(0, 1)
            return self.expert(flat[flat[:, 0] > 0])

    model = Experts()
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    tensors = dict(model.named_parameters())
    with pytest.raises(Unbatchable, match="an input of shape"):
        batched(model, Injection(model, tensors), some_points(tensors)[:2], x)


def test_parts_of_a_model_that_nobody_calls_as_a_whole():
    model = nn.Sequential(nn.Linear(6, 6), Positions("row"))
    tensors = dict(model.named_parameters())
    points, injection = some_points(tensors)[:3], Injection(model, tensors)
    x = torch.randn(2, 4, 6)

    def outputs(points):
        with injection.at(points):
            return model[1](model[0](torch.cat([x] * len(points)))).chunk(len(points))

    with torch.no_grad():
        assert injection.try_together(lambda points: [float(out.mean()) for out in outputs(points)]) is None
        found = outputs(points)
    for mine, out in zip(points, found, strict=True):
        torch.testing.assert_close(out, moved(model, tensors, mine, x), rtol=1e-5, atol=1e-5)


class Trace:
    """What a model is, to the bit."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.was = self.look()

    def look(self):
        tensors = [(name, id(p), p._version, p.grad, p.requires_grad) for name, p in self.model.named_parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()]
        return tensors, hooks, [sorted(m.__dict__) for m in self.model.modules()]

    def check(self):
        assert self.look() == self.was
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.values[name])
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", MODULES)
def test_leaves_no_trace(kind):
    model, batch = make(kind)
    trace = Trace(model)
    tensors = dict(model.named_parameters())
    injection = Injection(model, tensors)
    points = some_points(tensors)
    state = torch.get_rng_state()
    before = model(batch)
    for _ in range(2):
        batched(model, injection, points, batch)
    with injection.at(points[:1]):
        model(batch)  # where gradients are recorded too
    assert torch.equal(model(batch), before)
    assert torch.equal(torch.get_rng_state(), state)
    trace.check()


def test_an_exception_inside_leaves_the_model_clean():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(6, 6), RMSNorm(6), nn.Linear(5, 6)

        def forward(self, x):
            return self.second(self.norm(self.first(x)))

    model = Breaks()
    model.first.__dict__["forward"] = lambda x: nn.Linear.forward(model.first, x)  # as other packages do
    trace = Trace(model)
    tensors = dict(model.named_parameters())
    injection = Injection(model, tensors)
    points = some_points(tensors)[:2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            batched(model, injection, points[:1], torch.randn(3, 6))
        trace.check()
    with pytest.raises(Unbatchable, match="got RuntimeError: mat1 and mat2 shapes cannot be multiplied"):
        batched(model, injection, points, torch.randn(3, 6))
    trace.check()
    with pytest.raises(KeyboardInterrupt), injection.at(points):
        raise KeyboardInterrupt
    trace.check()
    with contextlib.suppress(RuntimeError), injection.at(points[:1]):
        model.norm(torch.randn(3, 4))
    trace.check()
    with (
        injection.at(points[:1]),
        pytest.raises(UserError, match="inject: changes must be given once, got `at` inside"),
    ):
        injection.at(points[:1]).__enter__()
    trace.check()


class Direct(nn.Module):
    def __init__(self, direct: bool = True):
        super().__init__()
        self.linear, self.direct = nn.Linear(6, 6), direct

    def forward(self, x):
        return self.linear(x) @ self.linear.weight.T if self.direct else self.linear(x) * self.linear.weight.size(0)


class Odd(nn.Linear):
    def forward(self, x):
        return torch.matmul(x, self.weight) + functional.linear(x, self.weight)


def holder(rows: int = 3, dtype: torch.dtype = torch.float32):
    module = nn.Module()
    module.table = nn.Parameter(torch.zeros(rows, 4, dtype=dtype))
    return module


def all_of(model: nn.Module) -> Injection:
    return Injection(model, dict(model.named_parameters()))


def run_with(model: nn.Module, tensors, batch, copies: int = 1):
    (direction,) = directions(tensors, 1)
    with torch.no_grad(), Injection(model, tensors).at([along(direction, 1.0)] * copies):
        model(batch)


def give(*changes: Delta):
    with all_of(nn.Linear(2, 2)).at([changes] if changes else []):
        pass


class Kept(nn.Module):
    """Keeps its parameter in a second place, from which it reads it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(6, 2))
        self.kept = [self.table]

    def forward(self, x):
        return x @ self.kept[0]


def replaced():
    model = nn.Linear(2, 2)
    injection = all_of(model)
    model.bias = nn.Parameter(torch.ones(2))
    with injection.at([[]]):
        pass


def attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    run_with(model, {"w": model.self_attn.out_proj.weight}, torch.ones(2, 3, 8))


INSTEAD = "leave it out, or use evaluator 'walk' or 'snapshot'"
PLACE = "must belong to a linear layer, embedding, convolution or normalisation, or be small and not of half precision"
USED = "must be used only by calls of the module that holds it"
REFUSED = {
    "a parameter of half precision in a module of its own": (
        lambda: all_of(holder(dtype=torch.bfloat16)),
        f"tensor 'table' {PLACE}, got Module; leave it out, or use evaluator 'snapshot'",
    ),
    "a large parameter in a module of its own": (
        lambda: all_of(holder(rows=(SMALL >> 2) + 1)),
        f"tensor 'table' {PLACE}, got Module; {INSTEAD}",
    ),
    "not the model's": (
        lambda: Injection(nn.Linear(2, 2), {"x": torch.zeros(2, 2)}),
        f"tensor 'x' must be a parameter of the model's modules, got another; {INSTEAD}",
    ),
    "an embedding that changes its own weights": (
        lambda: all_of(nn.Embedding(3, 4, max_norm=1.0)),
        f"tensor 'weight' {PLACE}, got Embedding; {INSTEAD}",
    ),
    "used past its module": (
        lambda: run_with(model := Direct(), dict(model.named_parameters()), torch.ones(2, 6)),
        f"tensor 'linear.weight' {USED}, got it in __get__; {INSTEAD}",
    ),
    "used by its module in another way": (
        lambda: run_with(model := Odd(6, 6), dict(model.named_parameters()), torch.ones(2, 6)),
        f"tensor 'weight' {USED}, got it in matmul; {INSTEAD}",
    ),
    "kept in a second place": (
        lambda: run_with(model := Kept(), {"table": model.table}, torch.ones(2, 6)),
        f"tensor 'table' {USED}, got it in matmul; {INSTEAD}",
    ),
    "attention, which reads its projection's weight": (
        attention,
        f"tensor 'w' {USED}, got it in multi_head_attention_forward; {INSTEAD}",
    ),
    "a dense change": (
        lambda: give(Delta("weight", torch.ones(2, 2))),
        "directions must be low-rank, got a dense change of 'weight'; give rank=1, or evaluator 'walk' or 'snapshot'",
    ),
    "a sparse change": (
        lambda: give(Delta("weight", torch.ones(1), torch.tensor([3]))),
        "directions must be low-rank, got a sparse change of 'weight'; give rank=1, or evaluator 'walk' or 'snapshot'",
    ),
    "an unknown name": (
        lambda: give(Delta("weigt", torch.ones(2))),
        "changes must be of the injected tensors, got 'weigt'",
    ),
    "no points": (give, "changes must be given for at least one point, got none"),
    "several points that were not tried": (
        lambda: run_with(model := nn.Linear(2, 2), dict(model.named_parameters()), torch.ones(4, 2), copies=2),
        "the module of 'bias' must see the rows of the batch to tell 2 points apart, got a call of another kind than "
        f"when two points were tried; evaluate one point at a time, {INSTEAD}",
    ),
    "another parameter since": (replaced, "the model must keep its parameters, got another in place of 'bias'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    make_it, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        make_it()
    assert str(error.value) == f"inject: {message}"


def test_looking_at_a_weight_is_not_using_it():
    model = Direct(direct=False)
    tensors = dict(model.named_parameters())
    batched(model, Injection(model, tensors), [along(directions(tensors, 1)[0], 1)], torch.ones(2, 6))


@pytest.mark.parametrize("tuned", ["linear", "norm"])
def test_torch_encoder_layers_do_not_read_past_their_modules(tuned):
    """Its fast path computes with the weights alone; it is off inside, and only there."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tensors = {name: tensor for name, tensor in model.named_parameters() if tuned in name}
    x = torch.randn(3, 5, 8)
    points = some_points(tensors)
    injection = Injection(model, tensors)
    for _ in range(2):
        for mine, found in zip(points, batched(model, injection, points, x), strict=True):
            torch.testing.assert_close(found, moved(model, tensors, mine, x), rtol=1e-5, atol=1e-5)
            (alone,) = batched(model, injection, [mine], x)
            torch.testing.assert_close(alone, moved(model, tensors, mine, x), rtol=1e-5, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


# The evaluator --------------------------------------------------------------------------------------------------------


class Closure:
    """The mean of the outputs' squares, one point a call or all in one batch."""

    def __init__(self, model, batch):
        self.model, self.batch, self.calls, self.rows = model, batch, 0, 0

    def __call__(self):
        self.calls += 1
        self.rows += len(self.batch)
        return self.model(self.batch).square().mean()


class Batched(Closure):
    def injected(self, injection):
        closure = self

        class Runner:
            def losses(self, changes):
                closure.calls += 1
                with injection.at(changes):
                    out = closure.model(torch.cat([closure.batch] * len(changes)))
                return [float(part.square().mean()) for part in out.chunk(len(changes))]

        return Runner()


def points_of_a_step():
    z, other = Direction(4, 0, ALL), Direction(4, 1, ALL)
    return [point(1e-2, z), point(-1e-2, z), ORIGIN, point(2e-2, other) + point(1e-2, z)]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("kind", ["tied head", "two layers", "Conv1D", "conv2d", "layer norm", "positions in a row"])
@torch.no_grad()
def test_the_evaluator_agrees_with_snapshots(kind, noise, rank):
    model, batch = make(kind)
    space = Space(dict(model.named_parameters()), Noise(0, noise), rank=rank)
    points = points_of_a_step()
    wanted = Snapshot(space, Closure(model, batch)).losses(points)
    assert Inject(space, Closure(model, batch), model).losses(points) == pytest.approx(wanted, rel=1e-5)
    together = Batched(model, batch)
    assert Inject(space, together, Injection(model, space.tensors)).losses(points) == pytest.approx(wanted, rel=1e-5)
    assert together.calls == TRIED + 1


@torch.no_grad()
def test_points_along_a_direction_share_its_factors():
    model, _ = make("two layers")
    space = Space(dict(model.named_parameters()), Noise(0, "gaussian"), rank=1)
    plus, minus = space.deltas(points_of_a_step()[:2])
    for one, other in zip(plus, minus, strict=True):
        assert (one.values is other.values and one.right is other.right) == (one.right is not None)


@torch.no_grad()
def test_the_evaluator_goes_on_one_point_at_a_time():
    model, batch = Positions("square"), torch.randn(ROWS, 5, 6)
    space = Space({"table.weight": model.table.weight}, Noise(0, "gaussian"), rank=1)
    points = points_of_a_step()
    closure = Batched(model, batch)
    injection = Injection(model, space.tensors)
    wanted = Snapshot(space, Closure(model, batch)).losses(points)
    with pytest.warns(UserWarning, match=r"'table.weight' must see the rows.* done from now on"):
        assert Inject(space, closure, injection).losses(points) == pytest.approx(wanted, rel=1e-5)
    assert closure.calls == 3 + len(points)
    assert Inject(space, closure, injection).losses(points) == pytest.approx(wanted, rel=1e-5)
    assert closure.calls == 3 + 2 * len(points)


@torch.no_grad()
def test_dense_directions_are_refused():
    model, batch = make("two layers")
    space = Space(dict(model.named_parameters()), Noise(0, "gaussian"))
    with pytest.raises(UserError, match=r"directions must be low-rank, got a dense change of '0.weight'; give rank=1"):
        Inject(space, Closure(model, batch), model).losses(points_of_a_step())
