"""How good gradient estimates from losses are at one point of a real model, and what that means for the step size.

Estimate (SPSA, thesis section 2.2.3): g_i = (L(θ + εz_i) - L(θ - εz_i)) / 2ε · z_i ≈ z_i z_iᵀ ∇L; the mean of n is ĝ.
With entries of mean 0, variance 1 and E ‖z‖² z zᵀ = (d + 1 + k) I, where k = 1 for Gaussian z and k = -1 for Rademacher
z and z on the sphere of radius √d, as ε → 0:

    E ‖ĝ - ∇L‖² / ‖∇L‖² = (d + k) / n        E ‖ĝ‖² / ‖∇L‖² = (d + k + n) / n

The descent lemma (Malladi et al., NeurIPS 2023, arXiv 2305.17333, Lemma 1) bounds the expected loss after a step by
L - η ‖∇L‖² + η² ℓ/2 · E ‖ĝ‖², so that the largest permissible step shrinks by that second ratio (their Lemma 2):
η_ZO = n / (d + n - 1) · η_SGD for k = -1. That is so for curvature alike in all directions. Where few directions are
curved, what counts instead of d is about the local effective rank r = tr(G) / λ_max(G) (their Assumption 1), here of
the Gauss-Newton matrix G = Jᵀ H J of the batch: J is the outputs' derivative by the parameters, H the loss's second
derivative by the outputs.

Memory: beside the tuned tensors a gradient, the running mean, one direction and a copy to go back to, each as large as
they are; sums over the draws are float64 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gradientless.delta import Delta
from gradientless.errors import UserError, brief, unknown, whole
from gradientless.run.assemble import Rows, make_surface
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits, pick_device
from gradientless.search.noise import Noise
from gradientless.search.optim.checks import eps_is_felt, number
from gradientless.search.points import ALL, Direction, point
from gradientless.search.space import Space

EXCESS = {"gaussian": 1.0, "rademacher": -1.0, "near_normal": 1.0 - 1 / 16, "sphere": -1.0}
"""k of the module's formulas: for independent entries, their fourth moment less 2."""

ESTIMATES, PROBES, START = 0, 1, 2  # steps whose directions serve the estimates, the trace, the power iteration

LossFn = Callable[[], Tensor | tuple[Tensor, Tensor]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Mean:
    """What was measured over draws, its standard error, and what it should be."""

    value: float
    error: float
    expected: float


@dataclass(frozen=True)
class Average:
    """The average of the first n estimates against the gradient; see `_Bench.average` for the errors.

    relative_error: ‖ĝ - ∇L‖ / ‖∇L‖. norm_ratio: ‖ĝ‖² / ‖∇L‖².
    """

    n: int
    cosine: Mean
    relative_error: Mean
    norm_ratio: Mean


@dataclass(frozen=True)
class Steps:
    """The largest step that does not raise the loss: along the gradient, and along single estimates on average.

    zo: over `draws` estimates. by_dimension: η_ZO / η_SGD of the descent lemma, 1 / (d + k + 1).
    """

    sgd: float
    zo: float
    by_dimension: float
    draws: int

    @property
    def ratio(self) -> float:
        return self.zo / self.sgd


@dataclass(frozen=True)
class Curvature:
    """Of the Gauss-Newton matrix at the batch. trace: by Hutchinson's estimator, with its standard error.

    residual: ‖Gv - λv‖ / λ of the top eigenvalue `top` and its vector. along: gᵀGg / ‖g‖², the curvature along the
    gradient g.
    """

    trace: float
    trace_error: float
    probes: int
    top: float
    residual: float
    iterations: int
    along: float

    @property
    def step_ratio(self) -> float:
        """η_ZO / η_SGD for n = 1 where the loss is quadratic with this curvature: gᵀGg ‖g‖² / E ĝᵀGĝ, exact for
        Gaussian z and about so for the others."""
        return self.along / (self.trace + 2 * self.along)

    @property
    def effective_rank(self) -> float:
        return self.trace / self.top if self.top else math.nan

    @property
    def effective_rank_error(self) -> float:
        return self.trace_error / self.top if self.top else math.nan


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. projection: gᵢ·∇L / ‖∇L‖² over the draws; norm_ratio: ‖gᵢ‖² / ‖∇L‖²."""

    noise: str
    eps: float
    seed: int
    dimension: int
    draws: int
    loss: float
    gradient_norm: float
    projection: Mean
    norm_ratio: Mean
    averages: tuple[Average, ...]
    steps: Steps | None
    curvature: Curvature | None

    def tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """(header, rows) of each table of the report, as text."""
        head: list[tuple[str, ...]] = [
            ("tuned parameters d", f"{self.dimension:,}", ""),
            ("loss", f"{self.loss:.4f}", ""),
            ("norm of the gradient", f"{self.gradient_norm:.4g}", ""),
            ("one estimate · gradient / ‖gradient‖²", _with_error(self.projection), f"{self.projection.expected:g}"),
            ("‖one estimate‖² / ‖gradient‖²", _with_error(self.norm_ratio), f"{self.norm_ratio.expected:,.0f}"),
        ]
        if self.steps is not None:
            steps = self.steps
            head += [
                ("largest step along the gradient, η_SGD", f"{steps.sgd:.3g}", ""),
                (f"largest step along one estimate (mean of {steps.draws}), η_ZO", f"{steps.zo:.3g}", ""),
                ("η_ZO / η_SGD", f"{steps.ratio:.3g}", f"{steps.by_dimension:.3g} by the dimension"),
            ]
        if self.curvature is not None:
            found = self.curvature
            rank = f"{found.effective_rank:.2f} ± {found.effective_rank_error:.2f}"
            head += [
                ("Gauss-Newton trace", f"{found.trace:.4g} ± {found.trace_error:.2g} ({found.probes} probes)", ""),
                ("Gauss-Newton top eigenvalue", f"{found.top:.4g} (residual {found.residual:.0e})", ""),
                ("curvature along the gradient", f"{found.along:.4g}", ""),
                ("local effective rank", rank, ""),
                ("η_ZO / η_SGD by this curvature", f"{found.step_ratio:.3g}", ""),
            ]
        rows: list[tuple[str, ...]] = []
        for row in self.averages:
            pairs = ((_shown(m.value), f"{_shown(m.expected)} ± {_shown(m.error, 2)}")
                     for m in (row.cosine, row.relative_error, row.norm_ratio))  # fmt: skip
            rows.append((f"{row.n:,}", *(text for pair in pairs for text in pair)))
        columns = ("n", "cosine", "expected", "relative error", "expected", "squared-norm ratio", "expected")
        return [((f"{self.noise}, ε = {self.eps:g}", "measured", "expected"), head), (columns, rows)]

    def markdown(self) -> str:
        """The report as Markdown tables."""
        parts = []
        for header, rows in self.tables():
            lines = [header, tuple("---" for _ in header), *rows]
            parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n")
        return "\n".join(parts)

    def show(self, console: Any) -> None:
        """The report as tables of the terminal. console: rich's."""
        from rich.table import Table

        for header, rows in self.tables():
            table = Table(*header)
            for cells in rows:
                table.add_row(*cells)
            console.print(table)

    def data(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        found = asdict(self)
        if self.steps is not None:
            found["steps"]["ratio"] = self.steps.ratio
        if self.curvature is not None:
            for name in ("effective_rank", "effective_rank_error", "step_ratio"):
                found["curvature"][name] = getattr(self.curvature, name)
        return found


def _shown(value: float, digits: int = 4) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _with_error(mean: Mean) -> str:
    digits = max(0, 1 - math.floor(math.log10(mean.error))) if mean.error > 0 else 4
    return f"{mean.value:,.{digits}f} ± {mean.error:,.{digits}f}"


def diagnose(
    loss_fn: LossFn,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    noise: str = "rademacher",
    draws: int = 1000,
    eps: float = 1e-3,
    seed: int = 0,
    line_draws: int = 50,
    probes: int = 100,
    tolerance: float = 1e-4,
    iterations: int = 200,
    say: Say | None = None,
) -> Diagnosis:
    """Compare estimates of the gradient of `loss_fn` at the weights as they stand with the gradient itself.

    loss_fn: the loss on one batch, a scalar that autograd can differentiate by the parameters, the same for the same
        weights; or (loss, outputs), where the loss was computed from the tensor `outputs`, such as a model's logits:
        then the Gauss-Newton matrix is measured too.
    parameters: (name, tensor) pairs, as of `model.named_parameters()`; those that require no gradient are left out.
    noise: distribution of z. draws: how many estimates. eps: ε, in units of the weights.
    line_draws: estimates whose mean loss decides what the largest step is; 0 leaves the steps out.
    probes: for the trace; 0 leaves the curvature out. tolerance, iterations: relative change of the top eigenvalue in
        one step of the power iteration at which it ends, and its most steps.
    say: where progress goes. Raises UserError for numbers that make no sense and for a gradient of zero.
    The weights have their old bits afterwards; no `.grad` appears.
    """
    for name, value, least in (("draws", draws, 2), ("line_draws", line_draws, 0), ("probes", probes, 0)):
        if whole("diagnose", name, value) < least:
            raise UserError(f"diagnose: {name} must be >= {least}, got {value}")
    if not 0 < number(eps) < math.inf:
        raise UserError(f"diagnose: eps must be > 0 and finite, got {brief(eps)}")
    if noise not in EXCESS:
        raise unknown("diagnose", "noise", noise, EXCESS)
    tensors = {name: tensor for name, tensor in parameters if tensor.requires_grad}
    if not tensors:
        raise UserError("diagnose: parameters must hold at least one that requires a gradient, got none")
    eps_is_felt("diagnose", eps, tensors.values(), logged=False)
    space = Space(tensors, Noise(seed, noise))
    return _Bench(loss_fn, space, eps, EXCESS[noise], say or (lambda line: None)).run(
        draws, line_draws, probes, tolerance, iterations
    )


class _Bench:
    """The loss, its gradient, and directions at one point."""

    def __init__(self, loss_fn: LossFn, space: Space, eps: float, excess: float, say: Say):
        self.loss_fn, self.space, self.eps, self.excess, self.say = loss_fn, space, eps, excess, say
        self.tensors = list(space.tensors.values())
        self.dimension = sum(tensor.numel() for tensor in self.tensors)
        with torch.enable_grad():
            loss, _ = self.forward()
            found = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        self.loss = float(loss.detach())
        self.gradient = [
            torch.zeros_like(tensor) if part is None else part.detach()
            for tensor, part in zip(self.tensors, found, strict=True)
        ]
        self.square = _dot(self.gradient, self.gradient)
        if not 0 < self.square < math.inf:
            raise UserError(f"diagnose: the gradient must be finite and not zero, got a squared norm of {self.square}")

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The loss and, where the caller gives them, the outputs."""
        found = self.loss_fn()
        return found if isinstance(found, tuple) else (found, None)

    @torch.no_grad()
    def loss_at(self, direction: Sequence[Tensor], coefficient: float) -> float:
        """The loss at θ + coefficient · direction."""
        names = self.space.tensors
        changes = [Delta(name, (part * coefficient).view(-1)) for name, part in zip(names, direction, strict=True)]
        with self.space.at(changes):
            return float(self.forward()[0])

    def estimate(self, draw: int) -> tuple[float, list[Tensor]]:
        """(slope, z): the estimate is their product."""
        z = _direction(self.space, ESTIMATES, draw)
        slope = (self.loss_at(z, self.eps) - self.loss_at(z, -self.eps)) / (2 * self.eps)
        if not math.isfinite(slope):
            told = f"losses at θ ± ε z must be finite, got a slope of {slope}; lower eps ({self.eps:g})"
            raise UserError(f"diagnose: {told}")
        return slope, z

    def run(self, draws: int, line_draws: int, probes: int, tolerance: float, iterations: int) -> Diagnosis:
        projections, ratios, averages = self.estimates(draws)
        steps = self.steps(line_draws) if line_draws else None
        curvature = self.curvature(probes, tolerance, iterations) if probes else None
        return Diagnosis(
            self.space.noise.distribution, self.eps, self.space.noise.seed, self.dimension, draws, self.loss,
            math.sqrt(self.square), projections, ratios, tuple(averages), steps, curvature,
        )  # fmt: skip

    def estimates(self, draws: int) -> tuple[Mean, Mean, list[Average]]:
        total = [torch.zeros_like(part) for part in self.gradient]
        projections, ratios = _Sums(), _Sums()
        averages = []
        stops = {n for n in (10, 100, 1000, 10_000, 100_000) if n < draws} | {draws}
        for n in range(1, draws + 1):
            slope, z = self.estimate(n - 1)
            for part, entries in zip(total, z, strict=True):
                part.add_(entries, alpha=slope)
            projections.add(slope * _dot(z, self.gradient) / self.square)
            ratios.add(slope * slope * _dot(z, z) / self.square)
            if n in stops:
                averages.append(self.average(total, n))
                self.say(f"{n:,} of {draws:,} estimates: cosine {averages[-1].cosine.value:.4f}")
        expected = self.dimension + self.excess + 1
        return projections.mean(1.0), ratios.mean(expected), averages

    def average(self, total: Sequence[Tensor], n: int) -> Average:
        """Of `total`, the sum of n estimates. The errors are those of one such average, to first order in the mean of
        the squared slopes (whose relative error is √(2/n)) and in what the parts off the gradient have in common."""
        inner, outer = _dot(total, self.gradient) / n, _dot(total, total) / (n * n)
        off = (self.dimension + self.excess) / n  # the expected squared relative error
        slopes, common = math.sqrt(2 / n), math.sqrt(2 * self.dimension) / n
        cosine = 1 / math.sqrt(1 + off)
        square_error = math.hypot(off * slopes, common)
        return Average(
            n,
            Mean(
                inner / math.sqrt(outer * self.square) if outer else math.nan,
                cosine / 2 * math.hypot((1 - cosine**2) * slopes, cosine**2 * common),
                cosine,
            ),
            Mean(
                math.sqrt(max(0.0, outer - 2 * inner + self.square) / self.square),
                square_error / (2 * math.sqrt(off)) if off else 0.0,
                math.sqrt(off),
            ),
            Mean(outer / self.square, math.hypot((off + 2) * slopes, common), 1 + off),
        )

    # The largest step ------------------------------------------------------------------------------------------------

    def steps(self, draws: int) -> Steps:
        found = [self.estimate(draw)[0] for draw in range(draws)]

        def along_estimates(rate: float) -> float:
            losses = [
                self.loss_at(_direction(self.space, ESTIMATES, i), -rate * slope) for i, slope in enumerate(found)
            ]
            return sum(losses) / draws

        by_dimension = 1 / (self.dimension + self.excess + 1)
        sgd = self.largest(lambda rate: self.loss_at(self.gradient, -rate), 1.0)
        self.say(f"largest step along the gradient {sgd:.3g}")
        zo = self.largest(along_estimates, sgd * by_dimension)
        self.say(f"largest step along one estimate {zo:.3g}")
        return Steps(sgd, zo, by_dimension, draws)

    def largest(self, loss: Callable[[float], float], start: float, halvings: int = 8) -> float:
        """The step to which the loss stays at or below that of no step: the first crossing above steps that lower it,
        found by doubling, then by bisection to a factor of 2^(2^-halvings)."""

        def lowers(rate: float) -> bool:
            return loss(rate) <= self.loss  # false for a loss that is not a number

        rate = start
        for _ in range(60):
            if lowers(rate):
                break
            rate /= 2
        low = rate
        for _ in range(60):
            if not lowers(2 * low):
                break
            low *= 2
        exponent, width = math.log2(low), 1.0
        for _ in range(halvings):
            width /= 2
            if lowers(2 ** (exponent + width)):
                exponent += width
        return float(2**exponent)

    # Curvature -------------------------------------------------------------------------------------------------------

    def curvature(self, probes: int, tolerance: float, iterations: int) -> Curvature | None:
        with gauss_newton(self.forward, self.tensors) as matrix:
            if matrix is None:
                return None
            traces = _Sums()
            # Rademacher probes whatever the estimates' noise: of all with independent entries they vary least.
            spins = Space(self.space.tensors, Noise(self.space.noise.seed, "rademacher"))
            for probe in range(probes):
                traces.add(matrix.quadratic(_direction(spins, PROBES, probe)))
            trace = traces.mean(math.nan)
            self.say(f"trace {trace.value:.4g} ± {trace.error:.2g}")
            along = matrix.quadratic(self.gradient) / self.square
            vector = _direction(spins, START, 0)
            top = residual = 0.0
            for count in range(1, iterations + 1):
                size = math.sqrt(_dot(vector, vector))
                if size == 0:
                    return Curvature(trace.value, trace.error, probes, 0.0, 0.0, count, along)
                vector = _scaled(vector, 1 / size)
                image = matrix.times(vector)
                before, top = top, _dot(vector, image)
                if top > 0:
                    off = [part - top * entries for part, entries in zip(image, vector, strict=True)]
                    residual = math.sqrt(_dot(off, off)) / top
                if abs(top - before) <= tolerance * abs(top):
                    break
                vector = image
            self.say(f"top eigenvalue {top:.4g} after {count} products")
        return Curvature(trace.value, trace.error, probes, top, residual, count, along)


class GaussNewton:
    """Products with G = Jᵀ H J of one batch; see `gauss_newton`."""

    def __init__(self, loss: Tensor, outputs: Tensor, tensors: Sequence[Tensor]):
        self._outputs, self._tensors = outputs, tensors
        (self._slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        self._free = torch.zeros_like(outputs, requires_grad=True)
        # Jᵀu is linear in u, so its derivative by u, applied to v, is Jv.
        self._back = torch.autograd.grad(
            outputs, tensors, self._free, create_graph=True, retain_graph=True, allow_unused=True
        )

    def forward(self, vector: Sequence[Tensor]) -> Tensor:
        """Jv."""
        used = [(back, part) for back, part in zip(self._back, vector, strict=True) if back is not None]
        found = torch.autograd.grad(
            [back for back, _ in used], self._free, [part for _, part in used], retain_graph=True
        )
        return found[0]

    def _loss_part(self, change: Tensor) -> Tensor:
        """H times a change of the outputs."""
        if self._slope.grad_fn is None:  # a loss that is linear in the outputs
            return torch.zeros_like(change)
        (found,) = torch.autograd.grad(self._slope, self._outputs, change, retain_graph=True, allow_unused=True)
        return torch.zeros_like(change) if found is None else found

    def times(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Gv."""
        seen = self._loss_part(self.forward(vector))
        found = torch.autograd.grad(self._outputs, self._tensors, seen, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if part is None else part for t, part in zip(self._tensors, found, strict=True)]

    def quadratic(self, vector: Sequence[Tensor]) -> float:
        """vᵀGv, by way of the outputs alone."""
        change = self.forward(vector)
        return _dot([change], [self._loss_part(change)])


@contextmanager
def gauss_newton(
    forward: Callable[[], tuple[Tensor, Tensor | None]], tensors: Sequence[Tensor]
) -> Iterator[GaussNewton | None]:
    """Products with the Gauss-Newton matrix of (loss, outputs); None where there are no outputs."""
    # Fused attention has no second derivative; the plain one has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss, outputs = forward()
        yield None if outputs is None else GaussNewton(loss, outputs, tensors)


def _direction(space: Space, step: int, draw: int) -> list[Tensor]:
    """z, in the tensors' shapes."""
    (changes,) = space.deltas([point(1.0, Direction(step, draw, ALL))])
    space.end_step()
    made = {change.name: change.values for change in changes}
    return [made[name].view(tensor.shape) for name, tensor in space.tensors.items()]


class _Sums:
    """Running sums of a number and its square."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    def mean(self, expected: float) -> Mean:
        mean = self.total / self.count
        spread = max(0.0, self.squares / self.count - mean * mean) * self.count / max(1, self.count - 1)
        return Mean(mean, math.sqrt(spread / self.count), expected)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The inner product, summed in float64, in pieces."""
    total = 0.0
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a.detach().reshape(-1).split(1 << 20), b.detach().reshape(-1).split(1 << 20), strict=True):
            total += float(torch.dot(x.double(), y.double()))
    return total


def _scaled(vector: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [part * factor for part in vector]


# Of a configuration --------------------------------------------------------------------------------------------------


def diagnose_run(config: RunConfig, say: Say | None = None, **options: Any) -> Diagnosis:
    """`diagnose` for the surface that `train` would tune, at its base, on the first batch of the configuration.

    options: those of `diagnose`. The seed is the configuration's.
    """
    if config.stages:
        raise UserError("stages: must not stand in a recipe to diagnose, got a run of several stages")
    device = pick_device(config.device)
    if config.kind == "generation":
        raise UserError(f"diagnose: the task must have classes or choices, got '{config.task}'")
    splits = load_splits(config)
    surface = make_surface(config, splits.labels, device)
    surface.eval()
    rows = Rows(surface, splits.train, config, "features: train")
    batch = rows.batch(0)
    prepared, labels = surface.prepare(rows.part(batch)), rows.labels[torch.from_numpy(batch).to(rows.labels.device)]

    def loss() -> tuple[Tensor, Tensor]:
        logits = surface.logits(prepared)
        return cross_entropy(logits, labels), logits

    named: list[tuple[str, nn.Parameter]] = list(surface.trainable().items())
    return diagnose(loss, named, seed=config.seed, say=say, **options)
