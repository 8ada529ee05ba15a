"""SPSA: the gradient estimated from losses at a few points, which the rules of the MeZO family share.

Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", IEEE TAC 37(3),
1992; thesis Eq. 2.33. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv
2305.17333): Definition 1 (n-SPSA), A.2 (sample schedules), B.3 (Definition 6, Proposition 1), B.4 (Definition 7), B.5
(Definition 8).

    two-point   g_j = (L(θ + ε z_j) - L(θ - ε z_j)) / 2ε        ĝ = 1/n Σ_j g_j z_j
    one-sided   g_j = (L(θ + ε z_j) - L(θ)) / ε
    one-point   g   = (L_t(θ_t + ε z_t) - L_{t-1}(θ_{t-1} + ε z_{t-1})) / ε        (n = 1)
    layerwise   one estimate per layer ℓ, along z_ℓ, which is z on the layer's tensors and 0 elsewhere
    variance    probes along z_ℓ / σ_ℓ for all layers at once, ĝ_ℓ = g σ_ℓ z_ℓ; σ_ℓ = ‖θ_ℓ‖₂ or about ‖∇_ℓ L‖₂:
                the mean over draws of |L(θ + ε z_ℓ) - L(θ - ε z_ℓ)| / 2ε
    expectation probes along z_ℓ / σ_ℓ, ĝ_ℓ = g z_ℓ

Differs from the paper: a layer is what the first number in a tensor's name tells, and a tensor without a number is one
by itself, where the paper keeps the embedding and the head as one each. Definition 8 prints no z_t after the quotient;
it is there. In the first step a one-point estimate only measures. σ of 0 counts as 1, as in the authors' code. All n
draws share the step's batch. Groups may differ in ε: each divides by its own, and the probes for a layer's σ have the
largest of its groups. Steps with a loss that is not finite are skipped.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from gradientless.errors import Faults, NotFinite, UserError, brief, count, one_of
from gradientless.search.optim.base import ForwardOptimizer
from gradientless.search.optim.checks import eps_is_felt, flags, number, penalty, rate
from gradientless.search.optim.gld import FISHER_LASTS
from gradientless.search.points import ALL, ORIGIN, Direction, Losses, Norms, Point, Request, Update
from gradientless.search.selection import check as check_selection
from gradientless.search.space import Block

_FELT = 2.0**-16  # of a weight: 256 times what single precision tells apart
_EARLY = 50  # steps whose mean loss tells where a run began
_NAMES = {
    "sample_schedule": ("constant", "linear"),
    "estimate": ("two-point", "one-sided", "one-point"),
    "variance": ("none", "grad_norm", "param_norm"),
}


class Part(NamedTuple):
    """Tensors that share ε, η and σ: a block, its parameter group's index and its layer."""

    block: str
    tensors: tuple[str, ...]
    group: int
    layer: str


class Estimate(NamedTuple):
    """ĝ as a point whose coefficients are without the learning rate, and the loss to report."""

    gradient: Point
    loss: float


def layer_of(name: str) -> str:
    """The layer of a tensor: its name up to its first number, or the whole name."""
    match = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return match[1] if match else name


class SPSA(ForwardOptimizer):
    """What every rule over an estimate takes; see the module docstring. Options marked * may differ by group.

    lr*: η. eps*: ε, in units of the weights. weight_decay*: the weights of two or more dimensions are multiplied by
        1 - η · weight_decay in each step; biases and the weights of normalisations have fewer, and are left alone, as
        are normalisations of more dimensions in `model`, where it is given. Of all their entries, also with `entries`.
        Factors nearer to 1 than 2^-16, as those of MeZO's rates, are gathered over steps and applied together.
    samples: n. sample_schedule: 'constant', or 'linear': n_t = max(1, floor(n t / sample_steps)), at most n.
    scale_lr: let η grow with n_t, that is, add the draws instead of averaging them.
    estimate: 'two-point', 'one-sided' or 'one-point'. layerwise: one estimate per layer.
    clip: bound of |g|. variance: 'none', 'grad_norm' or 'param_norm'. expectation: change the expectation with σ.
    renorm_every: steps after which σ is computed again; None: only in the first. norm_samples: draws for 'grad_norm'.
    penalty*, squared*: as in `GLD`, of every tensor; part of the losses that are told apart and reported.
    entries*, selection*, reselect_every*, indices*: as in `GLD`: a probe and its estimate move these entries only.
    patience: skipped steps in a row after which the run ends with an error.
    Raises UserError for values out of range, with the tensor's name where it is about one.
    """

    name = "SPSA"
    importance_options: Mapping[str, Any] = {"scale": 1.0, "draws": 1, "rows": 32, "check": False}  # as `GLD` has them

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        samples: int = 1,
        sample_schedule: str = "constant",
        sample_steps: int | None = None,
        scale_lr: bool = False,
        estimate: str = "two-point",
        layerwise: bool = False,
        clip: float | None = None,
        variance: str = "none",
        expectation: bool = False,
        renorm_every: int | None = None,
        norm_samples: int = 1,
        penalty: float = 0.0,
        squared: bool = False,
        entries: int | None = None,
        selection: str = "random",
        reselect_every: int | None = None,
        indices: Any = None,
        patience: int = 10,
        *,
        seed: int = 0,
        noise: str = "gaussian",
        rank: int | None = None,
        resample_every: int = 1,
        evaluator: str = "auto",
        model: torch.nn.Module | None = None,
        check: bool = True,
    ):
        self.samples, self.sample_steps = samples, sample_steps
        self.renorm_every, self.norm_samples, self.patience = renorm_every, norm_samples, patience
        self.sample_schedule, self.scale_lr, self.estimate, self.layerwise = (
            sample_schedule,
            scale_lr,
            estimate,
            layerwise,
        )
        self.clip, self.variance, self.expectation = clip, variance, expectation
        self.skipped = self._in_a_row = 0
        self.sigma: dict[str, float] = {}  # by layer; 1 where it is missing
        self.owed: dict[str, float] = {}  # by the first tensor of a group: the decay that is still to be applied
        self.undecayed: frozenset[str] = frozenset()  # tensors of normalisations, as far as the model tells them
        self._last: float | None = None  # the loss that a one-point estimate is compared with
        self._seen = 0  # finite losses so far, at most _EARLY
        self._first = self._recent = 0.0  # the mean loss of the first steps, and about that of the last ones
        self._warned = False
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "squared": squared,
            "entries": entries,
            "selection": selection,
            "reselect_every": reselect_every,
            "indices": indices,
        }
        super().__init__(
            params, defaults, seed=seed, noise=noise, rank=rank, resample_every=resample_every, evaluator=evaluator,
            model=model, check=check,
        )  # fmt: skip

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        for option in ("samples", "sample_steps", "renorm_every", "norm_samples", "patience"):
            with faults:
                value = getattr(self, option)
                if value is not None or option not in ("sample_steps", "renorm_every"):
                    count(self.name, option, value)
        for option, known in _NAMES.items():
            with faults:
                one_of(self.name, option, getattr(self, option), known)
        with faults:
            flags(self.name, scale_lr=self.scale_lr, layerwise=self.layerwise, expectation=self.expectation)
        schedule, plain = self.sample_schedule, self.variance == "none"
        for wrong, told in (
            (
                schedule in ("constant", "linear") and (schedule == "linear") != (self.sample_steps is not None),
                "sample_steps must be given with sample_schedule 'linear' and only then",
            ),
            (self.clip is not None and not number(self.clip) > 0, f"clip must be > 0, got {brief(self.clip)}"),
            (
                self.expectation is True and plain,
                "expectation must come with variance 'grad_norm' or 'param_norm'",
            ),
            (
                self.renorm_every is not None and plain,
                "renorm_every must come with variance 'grad_norm' or 'param_norm'",
            ),
            (
                self.estimate == "one-point" and (self.samples != 1 or self.layerwise is True),
                "estimate 'one-point' must have samples 1 and no layerwise",
            ),
        ):
            faults.require(not wrong, f"{self.name}: {told}")

    def __init_subclass__(cls, **more: Any):
        """A rule's constructor takes its own options and, as **options, those of the estimate: one signature."""
        super().__init_subclass__(**more)
        own = dict(inspect.signature(cls.__init__).parameters)
        if own.pop("options", None) is not None:
            rest = {key: each for key, each in inspect.signature(SPSA.__init__).parameters.items() if key not in own}
            whole = [each for key, each in {**own, **rest}.items() if key != "self"]
            cls.__signature__ = inspect.Signature(sorted(whole, key=lambda each: each.kind))  # type: ignore[attr-defined]

    # Groups, layers, blocks ------------------------------------------------------------------------------------------

    def _build(self) -> None:
        super()._build()
        if isinstance(self.model, nn.Module):
            spared = {id(tensor) for tensor in _of_normalisations(self.model).values()}
            self.undecayed |= {name for name, tensor in self.space.tensors.items() if id(tensor) in spared}

    def check_group(self, group: Mapping[str, Any]) -> None:
        faults, where = Faults(), f" for tensor '{group['names'][0]}'"
        with faults:
            rate(self.name, group, "lr")
        eps, decay, lasts = group["eps"], group["weight_decay"], group["reselect_every"]
        told = f"{self.name}: eps must be > 0 and finite{where}, got {brief(eps)}"
        faults.require(0 < number(eps) < math.inf, told)
        with faults:
            penalty(self.name, group)
        told = f"{self.name}: weight_decay must be >= 0 and finite{where}, got {brief(decay)}"
        faults.require(0 <= number(decay) < math.inf, told)
        with faults:
            if lasts is not None:
                count(self.name, "reselect_every", lasts)
        with faults:
            for each, tensor in zip(group["names"], group["params"], strict=True):
                check_selection(self.name, group["selection"], group["entries"], group["indices"], each, tensor.numel())
            if group["indices"] is not None and len(group["params"]) > 1:
                raise UserError(f"{self.name}: indices must be given for a group of one tensor")
        faults.tell()

    def check_weights(self, group: Mapping[str, Any]) -> None:
        """A probe must move a weight of the usual size: by one unit in the last place at the least, of single precision
        where the weights have more.

        Not where probes are added inside the modules: they never meet the weights."""
        if self.rank is not None and (self.evaluator == "inject" or (self.evaluator == "auto" and self.model)):
            return
        eps_is_felt(self.name, group["eps"], group["params"])

    def blocks(self) -> list[Block]:
        by_layer = self.layerwise or self.variance != "none"
        parts: dict[tuple[int, str, str], list[str]] = {}
        found, sizes = [], {}
        for index, group in enumerate(self.param_groups):
            sparse = group["indices"] is not None or (group["entries"] is not None and group["selection"] != "all")
            for name, tensor in zip(group["names"], group["params"], strict=True):
                sizes[name] = tensor.numel()
                key = (index, layer_of(name) if by_layer else "", name if sparse else "")
                parts.setdefault(key, []).append(name)
        self.parts: list[Part] = []
        for (index, layer, alone), names in parts.items():
            group = self.param_groups[index]
            label = alone or f"@{index}:{layer}"
            if len(parts) == 1 and not alone:
                self.parts.append(Part(ALL, tuple(names), index, layer))
                continue
            self.parts.append(Part(label, tuple(names), index, layer))
            size = sum(sizes[name] for name in names)
            if alone:
                fixed = None if group["indices"] is None else torch.as_tensor(group["indices"]).view(-1).long()
                lasts = int(group["reselect_every"] or (FISHER_LASTS if group["selection"] == "fisher" else 1))
                found.append(Block(label, tuple(names), size, group["entries"], group["selection"], lasts, fixed))
            else:
                found.append(Block(label, tuple(names), size))
        self._part_of = {part.block: part for part in self.parts}
        layers: dict[str, list[Part]] = {}
        for part in self.parts:
            layers.setdefault(part.layer, []).append(part)
        self.layers = layers
        return found

    # The estimate ----------------------------------------------------------------------------------------------------

    def samples_at(self, t: int) -> int:
        """n_t."""
        if self.sample_schedule == "constant":
            return self.samples
        assert self.sample_steps is not None
        return max(1, min(self.samples, t * self.samples // self.sample_steps))

    def _renorms(self, t: int) -> bool:
        if self.variance == "none":
            return False
        return t == 0 if self.renorm_every is None else t % self.renorm_every == 0

    def _probe(self, t: int, draw: int, parts: Iterable[Part], sign: float) -> Point:
        """± ε z / σ over `parts`."""
        return tuple((sign * self._eps(part) / self._sigma(part), Direction(t, draw, part.block)) for part in parts)

    def _eps(self, part: Part) -> float:
        return float(self.param_groups[part.group]["eps"])

    def _sigma(self, part: Part) -> float:
        return self.sigma.get(part.layer, 1.0)

    def estimated(self, t: int) -> Generator[Request, Any, Estimate | None]:
        """ĝ at θ_t; None when a loss was not finite."""
        if self._renorms(t):
            yield from self._renorm(t)
        n = self.samples_at(t)
        together = list(self.layers.values()) if self.layerwise else [self.parts]
        probes = [(parts, draw) for draw in range(n) for parts in together]
        if self.estimate == "two-point":
            points = [self._probe(t, draw, parts, sign) for parts, draw in probes for sign in (1.0, -1.0)]
        else:
            points = [self._probe(t, draw, parts, 1.0) for parts, draw in probes]
            if self.estimate == "one-sided":
                points.insert(0, ORIGIN)
        losses: list[float] = yield Losses(points)
        if not all(map(math.isfinite, losses)):
            return None
        self._in_a_row = 0
        if self.estimate == "two-point":
            rises = [(plus - minus) / 2 for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
            loss = sum(losses) / len(losses)
        elif self.estimate == "one-sided":
            rises, loss = [plus - losses[0] for plus in losses[1:]], losses[0]
        else:
            rises, loss = [losses[0] - (losses[0] if self._last is None else self._last)], losses[0]
            self._last = loss
        share = 1.0 if self.scale_lr else 1.0 / n
        gradient: list[tuple[float, Direction]] = []
        for (parts, draw), rise in zip(probes, rises, strict=True):
            for part in parts:
                slope = rise / self._eps(part)
                if self.clip is not None:
                    slope = min(max(slope, -self.clip), self.clip)
                if not self.expectation:
                    slope *= self._sigma(part)
                gradient.append((slope * share, Direction(t, draw, part.block)))
        return Estimate(tuple(gradient), loss)

    def _renorm(self, t: int) -> Generator[Request, Any, None]:
        """σ of every layer; one that is not finite stays what it was."""
        names = list(self.layers)
        if self.variance == "param_norm":
            norms: list[float] = yield Norms([part.block for part in self.parts])
            found = {name: 0.0 for name in names}
            for part, norm in zip(self.parts, norms, strict=True):
                found[part.layer] += norm * norm
            found = {name: math.sqrt(square) for name, square in found.items()}
        else:
            draws = range(self.samples, self.samples + self.norm_samples)  # not those of the step
            # One for all of a layer, whose groups may differ: the largest, which the weights of each can hold.
            eps = {name: max(map(self._eps, parts)) for name, parts in self.layers.items()}
            points = [
                tuple((sign * eps[name], Direction(t, draw, part.block)) for part in self.layers[name])
                for name in names for draw in draws for sign in (1.0, -1.0)
            ]  # fmt: skip
            losses: list[float] = yield Losses(points)
            found = {}
            for i, name in enumerate(names):
                mine = losses[2 * i * self.norm_samples : 2 * (i + 1) * self.norm_samples]
                rises = [abs(plus - minus) / (2 * eps[name]) for plus, minus in zip(mine[::2], mine[1::2], strict=True)]
                found[name] = sum(rises) / len(rises)
        self.sigma.update({name: norm or 1.0 for name, norm in found.items() if math.isfinite(norm)})

    def skip(self) -> Update:
        """Change nothing, because a loss was not finite; `patience` times in a row is an error."""
        if self._in_a_row + 1 >= self.patience:
            group = self.param_groups[0]
            raise NotFinite(
                f"{self.name}: losses must be finite, got {self.patience} steps in a row without; the weights are "
                f"those before; lower lr ({group['lr']:g}) or eps ({group['eps']:g})"
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        return Update(ORIGIN, math.nan)

    def rate(self, block: str) -> float:
        """η of a direction's block."""
        return float(self.param_groups[self._part_of[block].group]["lr"])

    def decay(self) -> dict[str, float]:
        """By tensor of two or more dimensions that is of no normalisation, the product of 1 - η · weight_decay over
        this step and those that still owe theirs: nearer to 1 than `_FELT`, single precision would round it away."""
        found = {}
        for group in self.param_groups:
            if not group.get("weight_decay"):
                continue
            factor = self.owed.pop(group["names"][0], 1.0) * (1.0 - group["lr"] * group["weight_decay"])
            if 1.0 - factor < _FELT:
                self.owed[group["names"][0]] = factor
                continue
            for name, tensor in zip(group["names"], group["params"], strict=True):
                if tensor.ndim >= 2 and name not in self.undecayed:
                    found[name] = factor
        return found

    def header(self) -> dict[str, Any]:
        """As the base has it; and the tensors that weight decay spares, since a replay may not know the model."""
        decays = self.undecayed and any(group.get("weight_decay") for group in self.param_groups)
        return {**super().header(), **({"undecayed": sorted(self.undecayed)} if decays else {})}

    def follow(self, header: Mapping[str, Any]) -> None:
        self.undecayed = frozenset(header.get("undecayed", ()))
        super().follow(header)

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        loss = super().step(closure)
        self._watch(loss, self.warns)
        return loss

    def replay_step(self, payload: bytes) -> float:
        loss = super().replay_step(payload)
        self._watch(loss, False)  # what the logged steps had to say was said then
        return loss

    def _watch(self, loss: float, warns: bool) -> None:
        """Say once, when losses have grown far beyond those of the first steps, what to lower."""
        if not math.isfinite(loss):
            return
        exploded = self._seen > 0 and loss > self._first + 10 * abs(self._first) + 1
        if self._seen < _EARLY and not exploded:  # which is no beginning to compare with
            self._seen += 1
            self._first += (loss - self._first) / self._seen
            self._recent = self._first
            return
        self._recent += (loss - self._recent) / _EARLY
        if self._warned or self._recent <= self._first + 2 * abs(self._first):
            return
        self._warned = True
        if warns:
            lr, recent, first = self.param_groups[0]["lr"], self._recent, self._first
            warnings.warn(
                f"{self.name}: the loss must not grow, got about {recent:.3g} at step {self.t} after {first:.3g} "
                f"over the first {self._seen}; lower lr ({lr:g}), or average more samples ({self.samples})",
                stacklevel=3,
            )

    # Passes and state ------------------------------------------------------------------------------------------------

    def passes(self, t: int) -> int:
        """Forward passes of step t."""
        probes = self.samples_at(t) * (len(self.layers) if self.layerwise else 1)
        measured = {"two-point": 2 * probes, "one-sided": 1 + probes, "one-point": probes}[self.estimate]
        if self.variance == "grad_norm" and self._renorms(t):
            measured += 2 * self.norm_samples * len(self.layers)
        return measured

    def forecast(self, steps: int) -> int:
        first = 2 * (self.check and self.t == 0 and steps > 0)
        end = self.t + steps
        regular = max(self.t, min(end, max(1, self.sample_steps or 0)))  # from here on a period is as the one before
        period = [self.passes(t) for t in range(regular, min(end, regular + (self.renorm_every or 1)))]
        times, rest = divmod(end - regular, max(1, len(period)))
        before = sum(self.passes(t) for t in range(self.t, regular))
        return first + before + times * sum(period) + sum(period[:rest])

    def search_state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "sigma": dict(self.sigma),
            "last": self._last,
            "owed": dict(self.owed),
            "watched": [self._seen, self._first, self._recent, self._warned],
        }

    def load_search_state(self, state: Mapping[str, Any]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self.sigma, self._last = dict(state["sigma"]), state["last"]
        self.owed = dict(state.get("owed", {}))
        self._seen, self._first, self._recent, self._warned = state.get("watched", (0, 0.0, 0.0, False))


_NORMALISATIONS = tuple(
    kind
    for kind in vars(nn).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and "Norm" in kind.__name__
)


def _of_normalisations(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of torch's normalisations and of modules that are called so, such as LlamaRMSNorm."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMALISATIONS) or re.search(r"Norm(\dd)?$", type(module).__name__)
        for name, parameter in module.named_parameters(recurse=False)
    }


def no_decay_names(model: nn.Module) -> set[str]:
    """The parameters of `model` that weight decay should leave alone: those of normalisations, and all of fewer than
    two dimensions, which biases are, and the weights of normalisations that no name tells. An optimizer that is given
    the `model` leaves these alone; one that sees tensors only, those of fewer than two dimensions."""
    return set(_of_normalisations(model)) | {name for name, p in model.named_parameters() if p.ndim < 2}
