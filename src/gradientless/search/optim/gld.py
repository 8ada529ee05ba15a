"""GLD: Gradientless Descent for fine-tuning, tensors in turn, a binary search over radii in each.

Coslu, "Gradientless Optimization for Language Model Finetuning" (master's thesis, TU München, 2024): Algorithm 1,
sections 3.1 and 3.2, Eq. 4.3, and the extensions that its chapter 5 proposes; Algorithm 2 stands in `options`. The
base is Golovin et al., "Gradientless Descent", ICLR 2020 (arXiv 1911.06317).

    for each tensor θ in turn:  i ← selected entries;  r_k = 2^-k R,  v_k ~ r_k N(0, I),  k = 0 … K-1
                                θ(i) ← best of { θ(i), θ(i) + v_k }  by  J = L + λ ‖θ‖₂

Differs from the paper: k starts at 0, so that the radii are R, R/2, …, 2^(1-K) R as the thesis's text and its code
have them, where Algorithm 1 prints 2^-k R from k = 1. Chapter 5 gives ideas without formulas; they are read as:
`pool`, one set of s entries over all tensors; `sweep="parallel"`, the candidates of all tensors measured at the
weights the step began with, each tensor taking its own best; `momentum` μ, candidates shifted by m, with
m ← μ m + (1 - μ) w u for the accepted update u (zero when nothing was accepted) and w = 1, or with
`momentum_weighted` the improvement of u over the mean improvement of accepted updates so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gradientless.errors import Faults, UserError, brief, count, one_of
from gradientless.search.optim.base import SHARED_LEAVES, Conversation, ForwardOptimizer, log_version
from gradientless.search.optim.checks import flags, number, penalty, rate
from gradientless.search.optim.options import OptionTrees
from gradientless.search.points import ORIGIN, POOL, BufferUpdate, Direction, Point, Rank, Update, point, scaled
from gradientless.search.selection import check
from gradientless.search.space import Block

SWEEPS = ("turns", "parallel")
FISHER_LASTS = 10_000  # steps; thesis, section 4.2
MOST_LEVELS, MOST_LEAVES = 100, 65_535  # of options; a log has 16 bits for the number of a leaf


def _lasts(group: Mapping[str, Any]) -> int:
    return int(group["reselect_every"] or (FISHER_LASTS if group["selection"] == "fisher" else 1))


class GLD(ForwardOptimizer):
    """Gradientless Descent; see the module docstring. Options marked * may differ by parameter group.

    radius*: R, the largest radius, in units of the weights; becomes group["lr"], so torch's schedulers move it.
    candidates*: K, radii tried per tensor.
    entries*: s, entries that move at once; a tensor of at most s entries moves whole. None: all.
    selection*: 'random', 'magnitude', 'fisher' (needs a closure with `importance`), 'fixed' (with `indices`) or 'all'.
    reselect_every*: steps that a selection lasts; None is 10,000 for 'fisher' and 1 for the others.
    indices*: flat positions of the one tensor of a 'fixed' group.
    penalty*: λ of the tensor searched. squared*: the squared norm (Eq. 2.8) instead of the plain one (Eq. 4.3).
    options: (m, levels) of Algorithm 2; None is Algorithm 1. confirm: see `options`.
    pool: draw the s entries (of the first group) from all tensors as from one vector.
    fisher_scale, fisher_draws, fisher_rows: handed to the closure's `importance`: the spread of a perturbation over
        max|θ|, perturbations per entry, and model outputs compared. fisher_check: have the ranking compared with that
        of the gradients (Eq. 2.39), where the model can be differentiated.
    sweep: 'turns' or 'parallel'. momentum, momentum_weighted: see the module docstring.
    Raises UserError for values out of range, with the tensor's name where it is about one.
    """

    name = "GLD"
    takes_what_it_measured = True

    def __init__(
        self,
        params: Iterable[Any],
        radius: float = 5e-3,
        candidates: int = 5,
        entries: int | None = None,
        selection: str = "random",
        reselect_every: int | None = None,
        indices: Any = None,
        penalty: float = 0.0,
        squared: bool = False,
        options: tuple[int, int] | None = None,
        confirm: bool = False,
        pool: bool = False,
        sweep: str = "turns",
        momentum: float = 0.0,
        momentum_weighted: bool = False,
        fisher_scale: float = 1.0,
        fisher_draws: int = 1,
        fisher_rows: int = 32,
        fisher_check: bool = False,
        *,
        seed: int = 0,
        noise: str = "gaussian",
        rank: int | None = None,
        resample_every: int = 1,
        evaluator: str = "auto",
        check: bool = True,
    ):
        self.options = options if options is None or not isinstance(options, list) else tuple(options)
        self.confirm = confirm
        self.fisher_scale, self.fisher_draws, self.fisher_rows = fisher_scale, fisher_draws, fisher_rows
        self.importance_options = {
            "scale": fisher_scale,
            "draws": fisher_draws,
            "rows": fisher_rows,
            "check": fisher_check,
        }
        self.pool, self.sweep, self.momentum, self.momentum_weighted = pool, sweep, momentum, momentum_weighted
        self._gain_sum, self._gain_count = 0.0, 0
        defaults = {
            "lr": radius,
            "candidates": candidates,
            "entries": entries,
            "selection": selection,
            "reselect_every": reselect_every,
            "indices": indices,
            "penalty": penalty,
            "squared": squared,
        }
        super().__init__(
            params, defaults, seed=seed, noise=noise, rank=rank, resample_every=resample_every, evaluator=evaluator,
            check=check,
        )  # fmt: skip
        self.trees = None if options is None else OptionTrees(*options, confirm)

    def check_options(self, faults: Faults) -> None:
        super().check_options(faults)
        fisher = self.importance_options
        with faults:
            one_of("GLD", "sweep", self.sweep, SWEEPS)
        with faults:
            flags("GLD", pool=self.pool, momentum_weighted=self.momentum_weighted, confirm=self.confirm)
        with faults:
            flags("GLD", fisher_check=fisher["check"])
        with faults:
            self._check_shape()
        for wrong, told in (
            (not 0.0 <= number(self.momentum) < 1.0, f"momentum must be in [0, 1), got {brief(self.momentum)}"),
            (
                self.momentum_weighted is True and self.momentum == 0,
                "momentum_weighted must come with momentum > 0, got momentum 0",
            ),
            (self.confirm is True and self.options is None, "confirm must come with options, got options None"),
            (
                self.options is not None and (self.sweep != "turns" or self.momentum != 0 or self.pool is True),
                "options must stand alone, got them with pool, momentum or sweep 'parallel'",
            ),
            (
                not 0 < number(fisher["scale"]) < math.inf
                or not all(isinstance(fisher[key], int) and fisher[key] >= n for key, n in (("draws", 1), ("rows", 2)))
                or fisher["draws"] is True,
                "fisher_scale must be > 0, fisher_draws >= 1 and fisher_rows >= 2, "
                f"got {brief(fisher['scale'])}, {brief(fisher['draws'])} and {brief(fisher['rows'])}",
            ),
        ):
            faults.require(not wrong, f"GLD: {told}")

    def _check_shape(self) -> None:
        pair = (1, 1) if self.options is None else self.options if isinstance(self.options, tuple) else ()
        if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in pair):
            told = "options must be two integers >= 1 (options per level, levels)"
            raise UserError(f"GLD: {told}, got {brief(self.options)}")
        width, levels = pair
        if width > MOST_LEAVES or levels > MOST_LEVELS or width**levels > MOST_LEAVES:
            told = f"options must have at most {MOST_LEVELS} levels and {MOST_LEAVES:,} leaves, m^levels"
            raise UserError(f"GLD: {told}, got {brief(self.options)}")

    def check_group(self, group: Mapping[str, Any]) -> None:
        faults, where = Faults(), f" for tensor '{group['names'][0]}'"
        with faults:
            rate("GLD", group)
        for key in ("candidates", "reselect_every"):
            with faults:
                if group[key] is not None or key == "candidates":
                    count("GLD", key, group[key], where)
        with faults:
            penalty("GLD", group)
        with faults:
            for each, tensor in zip(group["names"], group["params"], strict=True):
                check("GLD", group["selection"], group["entries"], group["indices"], each, tensor.numel())
            if group["indices"] is not None and len(group["params"]) > 1:
                raise UserError("GLD: indices must be given for a group of one tensor")
        if number(group["candidates"]) > 200:
            faults.lines.append(f"GLD: candidates must be <= 200{where}, got {brief(group['candidates'])}")
        faults.tell()
        least, width = group["candidates"] + 1, self.options[0] if isinstance(self.options, tuple) else 0
        if number(width) > least:
            raise UserError(f"GLD: options per level must be <= candidates + 1 = {least}, got {width}")

    def blocks(self) -> list[Block]:
        if self.pool:
            group = self.param_groups[0]
            names = tuple(name for each in self.param_groups for name in each["names"])
            sizes = sum(p.numel() for each in self.param_groups for p in each["params"])
            return [Block(POOL, names, sizes, group["entries"], group["selection"], _lasts(group))]
        found = []
        for group in self.param_groups:
            for name, tensor in zip(group["names"], group["params"], strict=True):
                fixed = None if group["indices"] is None else torch.as_tensor(group["indices"]).view(-1).long()
                found.append(
                    Block(name, (name,), tensor.numel(), group["entries"], group["selection"], _lasts(group), fixed)
                )
        return found

    def perturbations(self, t: int, block: str, leaf: int = 0) -> list[Point]:
        """v_0 … v_{K-1} of the block; those of every leaf of its options are others."""
        group = self.group(block)
        first = leaf * group["candidates"]
        return [point(group["lr"] * 2.0**-k, Direction(t, first + k, block)) for k in range(group["candidates"])]

    def search(self, t: int) -> Conversation:
        if self.trees is not None:
            return self.trees.search(t, list(self.space.blocks), self.perturbations)
        return self._parallel(t) if self.sweep == "parallel" else self._turns(t)

    def _candidates(self, t: int, block: str, here: Point) -> list[Point]:
        shift: Point = ()
        if self.momentum and "momentum" in self.space.buffers:
            shift = point(1.0, Direction(t, 0, block, buffer="momentum"))
        return [here] + [here + v + shift for v in self.perturbations(t, block)]

    def _turns(self, t: int) -> Conversation:
        here, velocity, loss = ORIGIN, ORIGIN, float("nan")
        for block in self.space.blocks:
            candidates = self._candidates(t, block, here)
            answer = yield Rank([candidates], [block], improvement=self.momentum_weighted)
            velocity += self._impulse(candidates[answer.best][len(here) :], answer.improvement)
            here, loss = candidates[answer.best], answer.loss
        return self._update(here, loss, velocity)

    def _parallel(self, t: int) -> Conversation:
        blocks = list(self.space.blocks)
        groups = [self._candidates(t, block, ORIGIN) for block in blocks]
        answer = yield Rank(groups, blocks, improvement=self.momentum_weighted)
        winners = [group[order[0]] for group, order in zip(groups, answer.order, strict=True)]
        gains = [[gain] for gain in answer.improvement] or [[] for _ in blocks]
        velocity = sum((self._impulse(won, gain) for won, gain in zip(winners, gains, strict=True)), ORIGIN)
        return self._update(sum(winners, ORIGIN), answer.loss, velocity)

    def _impulse(self, accepted: Point, gain: list[float]) -> Point:
        """(1 - μ) w u of one tensor."""
        if not self.momentum or not accepted:
            return ORIGIN
        weight = 1.0
        if self.momentum_weighted:
            self._gain_sum, self._gain_count = self._gain_sum + gain[0], self._gain_count + 1
            weight = gain[0] * self._gain_count / self._gain_sum if self._gain_sum > 0 else 1.0
        return scaled((1.0 - self.momentum) * weight, accepted)

    def _update(self, here: Point, loss: float, velocity: Point) -> Update:
        if not self.momentum:
            return Update(here, loss)
        return Update(here, loss, {"momentum": BufferUpdate(self.momentum, velocity)})

    def follow(self, header: Mapping[str, Any]) -> None:
        version = log_version(header)
        if self.trees is not None and version <= SHARED_LEAVES:
            raise UserError(
                f"GLD: a log of options must be of version {SHARED_LEAVES + 1} or later, got {version}: its leaves "
                "shared their perturbations; replay it with the version of this package that wrote it"
            )
        super().follow(header)

    def pending(self) -> Point:
        return ORIGIN if self.trees is None else self.trees.pending()

    def alive(self) -> set[tuple[str, int]]:
        if self.trees is None:
            return set()
        return {(d.block, self.space.block(d.block).birth(d.step)) for d in self.trees.directions()}

    def search_state(self) -> dict[str, Any]:
        trees = None if self.trees is None else self.trees.state()
        return {"trees": trees, "gains": [self._gain_sum, self._gain_count]}

    def load_search_state(self, state: Mapping[str, Any]) -> None:
        self._gain_sum, self._gain_count = state["gains"]
        if self.trees is not None:
            self.trees.load(state["trees"])
