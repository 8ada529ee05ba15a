"""Estimates against gradients: quadratics whose every number is known, and a tiny transformer against its Jacobian."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import CONFIGS
from torch.nn.functional import cross_entropy

from gradientless.cli import main
from gradientless.errors import UserError
from gradientless.run.config import RunConfig
from gradientless.run.diagnose import EXCESS, PROBES, diagnose, diagnose_run, gauss_newton
from gradientless.search.noise import DISTRIBUTIONS

D, FEW = 24, 6
CURVES = torch.linspace(0.5, 3.0, D, dtype=torch.float64)


class Quadratic:
    """½ Σ h w²: gradient h w. Its outputs are √h w with the loss ½ ‖outputs‖², so that the Gauss-Newton matrix is
    diag(h)."""

    def __init__(self, curves: torch.Tensor = CURVES, dtype: torch.dtype = torch.float64):
        self.curves = curves.to(dtype)
        generator = torch.Generator().manual_seed(3)
        start = torch.randn(len(curves), dtype=torch.float64, generator=generator).to(dtype)
        self.a, self.b = (part.clone().requires_grad_() for part in start.split([4, len(curves) - 4]))
        self.parameters = [("a", self.a), ("b", self.b)]

    def __call__(self):
        outputs = self.curves.sqrt() * torch.cat([self.a, self.b])
        return 0.5 * outputs.square().sum(), outputs

    def scalar(self):
        return self()[0]


def near(mean, errors: float = 4.5) -> bool:
    return abs(mean.value - mean.expected) <= errors * mean.error


@pytest.mark.parametrize("noise", DISTRIBUTIONS)
def test_estimates_have_the_moments_of_their_distribution(noise):
    problem = Quadratic()
    found = diagnose(problem, problem.parameters, noise=noise, draws=3000, line_draws=0, probes=0)
    assert found.dimension == D and found.draws == 3000
    assert found.norm_ratio.expected == pytest.approx(D + EXCESS[noise] + 1)
    assert near(found.projection) and near(found.norm_ratio)
    assert found.norm_ratio.error < 0.05 * D
    assert [row.n for row in found.averages] == [10, 100, 1000, 3000]
    for row in found.averages:
        assert row.relative_error.expected == pytest.approx(math.sqrt((D + EXCESS[noise]) / row.n))
        assert row.norm_ratio.expected == pytest.approx((D + EXCESS[noise] + row.n) / row.n)
        assert near(row.cosine) and near(row.relative_error) and near(row.norm_ratio), row


def test_the_formulas_are_those_of_the_papers():
    """Rademacher and sphere: √((d-1)/n) and (d+n-1)/n; Gaussian: √((d+1)/n) and (d+n+1)/n."""
    assert EXCESS["rademacher"] == EXCESS["sphere"] == -1 and EXCESS["gaussian"] == 1
    assert set(DISTRIBUTIONS) <= set(EXCESS)


@pytest.mark.parametrize(("noise", "differs"), [("rademacher", False), ("sphere", False), ("gaussian", True)])
def test_the_two_norms_can_be_told_apart(noise, differs):
    """In few dimensions d and d + 2 lie many standard errors apart."""
    problem = Quadratic(torch.ones(FEW))
    ratio = diagnose(problem.scalar, problem.parameters, noise=noise, draws=3000, line_draws=0).norm_ratio
    assert (abs(ratio.value - FEW) > 4.5 * ratio.error) == differs


def test_the_largest_steps_of_a_quadratic():
    """Curvature 1 everywhere: 2 along the gradient; 2/d along every Rademacher estimate, the descent lemma's bound."""
    problem = Quadratic(torch.ones(D))
    steps = diagnose(problem.scalar, problem.parameters, noise="rademacher", draws=2, line_draws=7).steps
    assert steps.sgd == pytest.approx(2, rel=0.01) and steps.zo == pytest.approx(2 / D, rel=0.01)
    assert steps.by_dimension == pytest.approx(1 / D) and steps.ratio == pytest.approx(1 / D, rel=0.01)


def test_few_curved_directions_allow_larger_steps():
    """Two of 2,000 entries curved: the step along an estimate is bounded by them, not by the dimension."""
    curves = torch.full((2000,), 1e-6)
    curves[:2] = 1.0
    problem = Quadratic(curves)
    found = diagnose(problem, problem.parameters, noise="gaussian", draws=2, line_draws=150, probes=20)
    exact = float((curves**2 * torch.cat([problem.a, problem.b]).detach() ** 2 * curves).sum() / found.gradient_norm**2)
    assert found.curvature.along == pytest.approx(exact, rel=1e-4)
    assert found.curvature.effective_rank == pytest.approx(2, rel=0.01)
    assert found.curvature.step_ratio == pytest.approx(exact / (2.002 + 2 * exact), rel=0.01)
    assert found.steps.ratio == pytest.approx(found.curvature.step_ratio, rel=0.5)
    assert found.steps.ratio > 100 * found.steps.by_dimension


def test_trace_and_top_eigenvalue_of_a_quadratic_are_exact():
    """A diagonal matrix has no variance under Rademacher probes."""
    problem = Quadratic()
    found = diagnose(problem, problem.parameters, draws=2, line_draws=0, probes=5, tolerance=1e-9).curvature
    assert found.trace == pytest.approx(float(CURVES.sum()), rel=1e-12)
    assert found.trace_error < 1e-6 * found.trace
    assert found.top == pytest.approx(3.0, rel=1e-5) and found.residual < 1e-2
    gradient = CURVES * torch.cat([problem.a, problem.b]).detach()
    assert found.along == pytest.approx(float((CURVES * gradient**2).sum() / (gradient**2).sum()), rel=1e-12)


def make_transformer(kind: str, attention: str):
    """A tiny classifier in float64, its batch, and some of its parameters; dropout off."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = CONFIGS[kind]()
        config.num_labels, config._attn_implementation = 3, attention
        config.pad_token_id = 0
        model = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()
    ids = torch.randint(4, 12, (4, 6), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 2, 1])
    for name, parameter in model.named_parameters():
        last = "score" in name or "classifier" in name or "pooler" in name
        parameter.requires_grad_(last or (("attention" in name or "self_attn" in name) and ".0." in name))

    def loss():
        logits = model(input_ids=ids).logits
        return cross_entropy(logits, labels), logits

    return model, loss, [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("kind", "attention"), [("bert", "sdpa"), ("bert", "eager"), ("llama", "sdpa")])
def test_curvature_of_a_transformer_against_its_dense_jacobian(kind, attention):
    _, loss, parameters = make_transformer(kind, attention)
    tensors = [tensor for _, tensor in parameters]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, logits = loss()
        flat = logits.flatten()
        rows = [torch.autograd.grad(each, tensors, retain_graph=True, allow_unused=True) for each in flat]
    jacobian = torch.stack(
        [torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in zip(row, tensors, strict=True)])
         for row in rows]
    )  # fmt: skip
    probabilities = logits.detach().softmax(-1)
    blocks = [(torch.diag(p) - torch.outer(p, p)) / len(probabilities) for p in probabilities]
    matrix = jacobian.T @ torch.block_diag(*blocks) @ jacobian
    eigenvalues = torch.linalg.eigvalsh(matrix)

    found = diagnose(loss, parameters, draws=2, line_draws=0, probes=400, tolerance=1e-12, iterations=3000).curvature
    assert found.top == pytest.approx(float(eigenvalues[-1]), rel=1e-5)
    assert abs(found.trace - float(matrix.trace())) <= 4.5 * found.trace_error
    assert found.trace_error < 0.2 * found.trace
    off_diagonal = matrix - torch.diag(matrix.diag())  # Hutchinson's variance: twice the squares off the diagonal
    assert found.trace_error == pytest.approx(math.sqrt(2 * float(off_diagonal.square().sum()) / 400), rel=0.35)
    assert found.effective_rank == pytest.approx(found.trace / float(eigenvalues[-1]), rel=1e-6)

    vector = [torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(5)) for t in tensors]
    with gauss_newton(loss, tensors) as products:
        image = torch.cat([part.flatten() for part in products.times(vector)])
    wanted = matrix @ torch.cat([part.flatten() for part in vector])
    exact = 1e-10 if kind == "bert" else 1e-5  # a Llama normalises in float32 whatever its weights
    assert float((image - wanted).abs().max()) <= exact * float(wanted.abs().max())


def test_a_model_keeps_its_bits_and_has_no_gradients():
    model, loss, parameters = make_transformer("bert", "sdpa")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state = torch.random.get_rng_state()
    found = diagnose(loss, parameters, draws=20, line_draws=3, probes=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert all(tensor.grad is None for tensor in model.parameters())
    assert found.curvature.probes == 3 and found.curvature.residual < 0.5
    again = diagnose(loss, parameters, draws=20, line_draws=3, probes=3)
    assert again == found


def test_probes_of_the_trace_are_not_those_of_the_estimates():
    assert PROBES != 0


def test_a_loss_without_outputs_has_no_curvature():
    problem = Quadratic()
    assert diagnose(problem.scalar, problem.parameters, draws=2, line_draws=0).curvature is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "diagnose: draws must be >= 2, got 1"),
        ({"eps": 0.0}, "diagnose: eps must be > 0 and finite, got 0.0"),
        ({"noise": "gauss"}, "diagnose: unknown noise 'gauss'; did you mean 'gaussian'?"),
        ({"probes": -1}, "diagnose: probes must be >= 0, got -1"),
    ],
)
def test_bad_numbers(options, message):
    problem = Quadratic()
    with pytest.raises(UserError) as caught:
        diagnose(problem, problem.parameters, **options)
    assert str(caught.value).startswith(message)


def test_nothing_to_estimate():
    problem = Quadratic()
    with pytest.raises(UserError, match="must hold at least one that requires a gradient, got none"):
        diagnose(problem, [("a", problem.a.detach())])
    with torch.no_grad():
        problem.a.zero_(), problem.b.zero_()
    with pytest.raises(UserError, match="the gradient must be finite and not zero"):
        diagnose(problem, problem.parameters)


def arguments(tiny_model: str, table: str) -> dict[str, str]:
    return {
        "data.path": table,
        "data.text_column": "review",
        "data.label_column": "verdict",
        "model": tiny_model,
        "data.max_length": "16",
    }


def test_of_a_configuration(tiny_model, table):
    config = RunConfig.load(None, (), {**arguments(tiny_model, table), "steps": 1, "batch_size": 8, "device": "cpu"})
    found = diagnose_run(config, draws=50, line_draws=4, probes=4)
    assert found.seed == config.seed
    assert near(found.projection, 6) and near(found.norm_ratio, 6)
    assert (
        found.curvature is not None and found.curvature.effective_rank + 3 * found.curvature.effective_rank_error >= 1
    )
    other = diagnose_run(config, draws=50, line_draws=4, probes=4, noise="gaussian")
    assert other.loss == found.loss and other.projection != found.projection


@pytest.mark.parametrize("form", ["table", "markdown", "json"])
def test_the_command(form, tiny_model, table, capsys):
    what = ["--data", table, "--text-column", "review", "--label-column", "verdict", "--model", tiny_model]
    how = ["data.max_length=16", "--draws", "20", "--batch-size", "8", "--device", "cpu", "--format", form]
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", *what, *how])
    assert not ended.value.code
    shown = capsys.readouterr().out
    if form == "json":
        found = json.loads(shown)
        assert found["draws"] == 20 and found["curvature"]["effective_rank"] > 0 and found["steps"]["ratio"] > 0
    else:
        assert "η_SGD" in shown and "effective rank" in shown and "cosine" in shown
        assert shown.count("\n| --- |") == (2 if form == "markdown" else 0)


@pytest.mark.parametrize(
    ("dtype", "eps", "message"),
    [
        (
            torch.float32,
            1e-12,
            r"eps must be >= .* for float32 weights of size .*, got 1e-12; a smaller",
        ),
        (
            torch.float64,
            1e-19,
            r"eps must be >= .* for float64 weights of size .*, got 1e-19; a smaller",
        ),
        (
            torch.bfloat16,
            1e-6,
            r"eps must be >= .* for bfloat16 weights of size .*, got 1e-06; a smaller",
        ),
        (torch.float32, 1e300, r"losses at θ ± ε z must be finite, got a slope of .*; lower eps \(1e\+300\)"),
        (torch.float32, "a", "eps must be > 0 and finite, got 'a'"),
        (torch.float32, True, "eps must be > 0 and finite, got True"),
    ],
)
def test_an_eps_that_measures_nothing_is_refused(dtype, eps, message):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype))
    with pytest.raises(UserError, match=f"^diagnose: {message}"):
        diagnose(lambda: (weight**2).sum(), [("w", weight)], draws=10, eps=eps)


def test_an_eps_of_double_precision_may_be_small():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
    found = diagnose(lambda: (weight**2).sum(), [("w", weight)], draws=10, eps=1e-9, line_draws=0, probes=0)
    assert math.isfinite(found.projection.value)
