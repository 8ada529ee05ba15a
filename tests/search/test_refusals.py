"""What an optimizer cannot work with ends in one line, whoever made it: calls, tensors, closures, searches."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradientless.errors import NotFinite, UserError
from gradientless.search.noise import DISTRIBUTIONS, Noise
from gradientless.search.optim import GLD, OPTIMIZERS, ForwardOptimizer, MeZO
from gradientless.search.points import ALL, ORIGIN, Direction, Losses, Update, point

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).eval()


def one_line(made, message: str, kind: type[UserError] = UserError) -> None:
    with pytest.raises(kind, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)


class TestCalls:
    @pytest.mark.parametrize("name", sorted(OPTIMIZERS))
    def test_an_unknown_option(self, name):
        owner = OPTIMIZERS[name].name
        one_line(
            lambda: OPTIMIZERS[name](model().parameters(), learning_rate=1),
            f"^{owner}: unknown option 'learning_rate'.* Known: .*seed",
        )

    def test_no_parameters(self):
        one_line(MeZO, r"^MeZO: params must be tensors or \(name, tensor\) pairs, got none$")

    @pytest.mark.parametrize("name", sorted(OPTIMIZERS))
    def test_no_closure(self, name):
        optimizer = OPTIMIZERS[name](model().parameters())
        one_line(optimizer.step, f"^{optimizer.name}: step needs a closure that returns the loss, got NoneType$")

    def test_a_closure_that_asks_for_something(self):
        optimizer = MeZO(model().parameters())
        told = "^MeZO: closure must take no arguments, got one that asks for batch, labels$"
        one_line(lambda: optimizer.step(lambda batch, labels, k=1: 0.0), told)

    def test_an_error_of_the_closures_own_is_its_own(self):
        def closure():
            raise TypeError("mine")

        with pytest.raises(TypeError, match=r"^mine$"):
            MeZO(model().parameters()).step(closure)


class TestTensors:
    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: torch.eye(4).to_sparse(), "dense, got the layout sparse_coo of 'p'"),
            (lambda: torch.eye(4).to_sparse_csr(), "dense, got the layout sparse_csr of 'p'"),
            (lambda: torch.eye(4).to(torch.float8_e4m3fn), "of float16, .*, got float8_e4m3fn of 'p'"),
            (lambda: torch.eye(4).to(torch.float8_e5m2), "of float16, .*, got float8_e5m2 of 'p'"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
    @pytest.mark.parametrize("kind", [MeZO, GLD])
    def test_of_another_kind(self, kind, make, told):
        one_line(lambda: kind([("p", nn.Parameter(make()))]), f"^{kind.name}: params must be {told}")

    @pytest.mark.parametrize("kind", [MeZO, GLD])
    def test_that_are_nowhere(self, kind):
        told = "^space: tensor 'p' must be in memory, got it on the device meta$"
        one_line(lambda: kind([("p", nn.Parameter(torch.empty(4, device="meta")))]), told)

    @pytest.mark.parametrize("kind", [MeZO, GLD])
    def test_that_are_lazy(self, kind):
        told = f"^{kind.name}: params must be of a known shape, got the lazy parameter of 'weight'"
        one_line(lambda: kind(nn.LazyLinear(3).named_parameters()), told)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("kind", [MeZO, GLD])
    def test_that_are_not_finite_at_the_start(self, kind, value):
        net = model()
        net[0].weight.data[1, 2] = value
        told = f"^{kind.name}: parameters must be finite at the start, got others in '0.weight'$"
        one_line(lambda: kind(net.named_parameters()).step(lambda: cross_entropy(net(X), Y)), told, NotFinite)

    @pytest.mark.parametrize("logs", [False, True])
    @pytest.mark.parametrize("kind", [MeZO, GLD])
    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (torch.ones(5, 3), r"keep their shapes, got 'p' of \[5, 3\] where it had \[4, 4\]"),
            (torch.ones(2, 8), r"keep their shapes, got 'p' of \[2, 8\] where it had \[4, 4\]"),
            (torch.ones(8, 4).t()[:, ::2], "stay contiguous, got 'p'"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*parameters must not change between logged steps")
    def test_whose_data_is_replaced_by_another_shape(self, kind, data, told, logs, tmp_path):
        p = nn.Parameter(torch.ones(4, 4))
        optimizer = kind([("p", p)])
        if logs:
            optimizer.record(tmp_path / "log")
        optimizer.step(lambda: p.square().sum())
        p.data = data
        one_line(lambda: optimizer.step(lambda: p.square().sum()), f"^{kind.name}: parameters must {told}")


class TestSearches:
    """Of an optimizer of one's own."""

    @staticmethod
    def asked(search):
        class Own(ForwardOptimizer):
            name = "Own"

            def __init__(self, params, *, seed=0):
                super().__init__(params, {"lr": 0.1}, seed=seed)

        Own.search = search
        net = model()
        return lambda: Own(net.named_parameters()).step(lambda: cross_entropy(net(X), Y))

    def test_that_return_no_update(self):
        def search(self, t):
            yield Losses([ORIGIN])

        one_line(self.asked(search), "^Own: search must return an Update, got None$")

    def test_that_ask_for_nothing(self):
        told = "^Own: search must yield requests and return an Update, got Update.* and no request$"
        one_line(self.asked(lambda self, t: Update(ORIGIN, 0.0)), told)

    def test_that_ask_for_something_else(self):
        def search(self, t):
            yield 3

        one_line(self.asked(search), "^Own: search must yield Losses, Rank or Norms, got 3$")

    def test_that_raise(self):
        def search(self, t):
            (loss,) = yield Losses([point(1.0, Direction(t, 0, ALL))])
            return Update(ORIGIN, loss / 0)

        one_line(self.asked(search), "^Own: search must not raise, got ZeroDivisionError: float division by zero$")


class TestCompiled:
    @pytest.mark.parametrize("given", ["plain", "compiled"])
    @pytest.mark.parametrize("over", ["plain", "compiled"])
    def test_a_compiled_model_steps_as_the_plain_one(self, given, over):
        """Noise is put inside its modules, which compiled code would not see."""

        def steps(compiled: bool) -> list[float]:
            net = model()
            run = torch.compile(net, backend="eager") if compiled else net
            inside = run if given == "compiled" else net
            names = [name for name, _ in net.named_parameters()]
            tensors = (run if over == "compiled" else net).parameters()
            optimizer = MeZO(zip(names, tensors, strict=True), lr=1e-2, rank=1, model=inside)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                return [optimizer.step(lambda: cross_entropy(run(X), Y)) for _ in range(3)]

        assert steps(True) == steps(False)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("step", "draw"), [(2**32, 0), (0, 2**32), (2**40 + 3, 1), (-1, 0)])
def test_noise_does_not_repeat(step, draw, distribution, backend):
    noise, index = Noise(1, distribution, backend), torch.arange(3)
    noise.fill("w", 2**32 - 1, 2**32 - 1, 0, 4)
    flat = torch.zeros(4)
    for ask in (
        lambda: noise.fill("w", step, draw, 0, 4),
        lambda: noise.rows("w", step, [0, draw], 4),
        lambda: noise.gather("w", step, [draw], index),
        lambda: noise.walk("w", flat, [(1.0, 0, 0), (1.0, step, draw)]),
        lambda: noise.rounding("w", step, draw, 0, 4, torch.device("cpu")),
        lambda: noise.store("w", step, draw, 0, torch.ones(4), torch.empty(4, dtype=torch.bfloat16)),
    ):
        one_line(ask, r"^noise: steps and draws must be in \[0, 2\^32\), beyond which noise repeats, got ")
    assert not flat.any()
