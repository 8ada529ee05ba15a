"""Gradientless Descent for training: Algorithms 1 and 2 of B. Coslu's thesis, with its penalty and chapter 5.

Notation: a *block* is a tensor, or with `pool=True` all tensors concatenated in parameter order (name "@pool").
z(t, k) is the noise of step t, draw k; J is the objective of a candidate; R(t) = radius * schedule(t).

Algorithm 1 (`options=None`), for each block in turn:
    candidates  {theta} + {theta(i) + 2^-k R(t) z(t, k)(i) + m(i) | k = 0 .. K-1}        (m = 0 without momentum)
    theta <- argmin J, the first one on ties;  J = L + penalty * norm(block)  (Eq. 4.3; squared norm: Eq. 2.8)
    m <- mu m + (1 - mu) w u                                                             (chapter 5; u the move made)

Algorithm 2 (`options=(m, levels)`), for each block in turn, the others at the first option of every level:
    under leaf j of the tree of options, from the left, its own K + 1 candidates, those of the draws j K + k; the m best
    become the leaf's children;
    theta <- theta + p*;  psi(theta) <- psi(p*);  p* the first-level option with the lowest loss under it.
    `confirm`: only if that loss is below J(theta) on this batch, else psi(theta) <- psi(first option), displaced by it.

`trace` returns one State a step, and for Algorithm 2 one more: the state after finish(). `run` returns their params.

Any of radius, candidates, entries, selection, indices, reselect_every, penalty, squared, schedule and momentum may be
a dict from block name to value.

Reads the source as:
- Radii are R, R/2, ..., 2^(1-K) R (the text of section 3.1), not 2^-k R for k = 1 .. K (line 5 of the listing).
- Steps count from 0. The entries i of step t are those of its birth step t - t % reselect_every; "magnitude" and
  "fisher" look at the committed weights, without options, at the start of the birth step.
- The penalty is that of the block searched, whole: with `pool` the norm of all tensors together.
- The option kept when nothing is confirmed is the first one in the order the step found, not in its new order. The
  current loss carries the penalty like any other.
- sweep="parallel" with options: the others stand at their best pending options of the start of the step.
- momentum=0 is no momentum: m stays 0, although m <- 0 m + (1 - 0) u would shift each step by the last move.
- The mean improvement that weights momentum is over the accepted updates of all blocks, so that a block whose updates
  bring more than the others' moves its buffer more.
- Momentum has no meaning given together with options.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field

import numpy as np

from .noise import select, tensor_noise

POOL = "@pool"
Terms = tuple[tuple[float, int, int], ...]  # (coefficient, step, draw) of each direction in a sum


@dataclass
class Option:
    """A perturbation (dense, of the whole block) relative to its parent, the terms it is made of, and psi(p)."""

    values: np.ndarray
    terms: Terms = ()
    children: list[Option] = field(default_factory=list)
    loss: float = np.inf  # the lowest loss under this option when last searched


@dataclass
class State:
    """After one step. Dicts by block name are over "@pool" alone when pooled."""

    params: dict[str, np.ndarray]  # committed
    pending: dict[str, np.ndarray]  # with the best pending options; equal to params in Algorithm 1
    options: dict[str, list[Option]]  # psi of each block; empty lists in Algorithm 1
    momentum: dict[str, np.ndarray]  # m of each block, flat
    improvements: dict[str, list[float]]  # of the accepted updates so far
    selected: dict[str, np.ndarray]  # the flat entries that moved in this step
    losses: dict[str, list[float]]  # J of every candidate of this step, in order of evaluation
    chosen: dict[str, int]  # winner: candidate, or first-level option in the order the step found; -1: not confirmed


def tree(options: list[Option]) -> list:
    """[(terms, tree of children), ...]: what to compare an implementation's tree of options with."""
    return [(p.terms, tree(p.children)) for p in options]


def empty_options(size: int, levels: int) -> list[Option]:
    if levels == 0:
        return []
    return [Option(np.zeros(size), children=empty_options(size, levels - 1))]


def largest(scores: np.ndarray, s: int) -> np.ndarray:
    """The s largest, lower index first on ties; ascending."""
    order = sorted(range(scores.size), key=lambda i: (-scores.flat[i], i))
    return np.array(sorted(order[:s]), dtype=np.int64)


def run(params, loss, steps, **options) -> list[dict[str, np.ndarray]]:
    return [state.params for state in trace(params, loss, steps, **options)]


def trace(
    params,
    loss,
    steps,
    *,
    radius=5e-3,
    candidates=5,
    entries=None,
    selection="random",
    indices=None,
    reselect_every=1,
    importance=None,  # for "fisher": (params, block name, step) -> an array of scores in the block's size
    penalty=0.0,
    squared=False,
    options=None,
    confirm=False,
    pool=False,
    sweep="turns",
    momentum=0.0,
    momentum_weighted=False,
    schedule=None,
    seed=0,
    noise="gaussian",
) -> list[State]:
    shapes = {name: np.shape(value) for name, value in params.items()}
    blocks = {POOL: list(shapes)} if pool else {name: [name] for name in shapes}

    def of(option, block):
        return option[block] if isinstance(option, dict) else option

    def flat(values, block):
        return np.concatenate([np.asarray(values[name], dtype=np.float64).reshape(-1) for name in blocks[block]])

    def tensors(vectors) -> dict[str, np.ndarray]:
        result = {}
        for block, names in blocks.items():
            start = 0
            for name in names:
                size = int(np.prod(shapes[name]))
                result[name] = vectors[block][start : start + size].reshape(shapes[name]).copy()
                start += size
        return result

    theta = {block: flat(params, block) for block in blocks}
    size = {block: theta[block].size for block in blocks}
    psi = {block: empty_options(size[block], options[1]) if options else [] for block in blocks}
    m_buffer = {block: np.zeros(size[block]) for block in blocks}
    improvements: dict[str, list[float]] = {block: [] for block in blocks}
    chosen_entries: dict[str, np.ndarray] = {}

    def select_perturbation_indices(block, t) -> np.ndarray:
        """Called once for each block at the start of step t."""
        how, s, n = of(selection, block), of(entries, block), size[block]
        if how == "fixed":
            return np.sort(np.asarray(of(indices, block), dtype=np.int64))
        if how == "all" or s is None or s >= n:
            return np.arange(n)
        birth = t - t % of(reselect_every, block)
        if how == "random":
            return select(s, n, seed, block, birth)
        if block in chosen_entries and t != birth:
            return chosen_entries[block]
        if how == "magnitude":
            return largest(np.abs(theta[block]), s)
        if how == "fisher":
            return largest(np.asarray(importance(tensors(theta), block, t)), s)
        raise ValueError(how)

    def perturbations(block, t, i, leaf=0) -> list[Option]:
        """v_k on the entries i, k = 0 .. K-1."""
        result = []
        r = of(radius, block) * (of(schedule, block)(t) if schedule else 1.0)
        for k in range(of(candidates, block)):
            draw = leaf * of(candidates, block) + k
            z = flat({name: tensor_noise(noise, shapes[name], seed, name, t, draw) for name in blocks[block]}, block)
            r_k = 2.0**-k * r
            v_k = np.zeros(size[block])
            v_k[i] = r_k * z[i]
            result.append(Option(v_k, ((r_k, t, draw),)))
        return result

    def objective(vectors, block, t) -> float:
        norm = np.sqrt(np.sum(vectors[block] ** 2))
        return float(loss(tensors(vectors), t)) + of(penalty, block) * (norm**2 if of(squared, block) else norm)

    def best_pending(block) -> np.ndarray:
        value, level = theta[block].copy(), psi[block]
        while level:
            value, level = value + level[0].values, level[0].children
        return value

    def algorithm_1(block, t, i, standing, losses) -> int:
        mu = of(momentum, block)
        shift = np.zeros(size[block])
        shift[i] = m_buffer[block][i]
        moves = [np.zeros(size[block])] + [v.values + shift for v in perturbations(block, t, i)]
        losses += [objective({**standing, block: theta[block] + move}, block, t) for move in moves]
        best = int(np.argmin(losses))  # the first of equals
        theta[block] = theta[block] + moves[best]
        weight = 1.0
        if best > 0:
            improvements[block].append(losses[0] - losses[best])
            if momentum_weighted:
                weight = improvements[block][-1] / np.mean([x for each in improvements.values() for x in each])
        if mu:
            m_buffer[block] = mu * m_buffer[block] + (1 - mu) * weight * moves[best]
        return best

    def algorithm_2(block, t, i, standing, losses) -> int:
        width, _ = options
        leaves = itertools.count()

        def compute_option_loss(theta_p, p) -> float:
            if not p.children:
                proposed = [Option(np.zeros(size[block])), *perturbations(block, t, i, next(leaves))]
                for c in proposed:
                    c.loss = objective({**standing, block: theta_p + c.values}, block, t)
                    losses.append(c.loss)
                order = sorted(range(len(proposed)), key=lambda k: (proposed[k].loss, k))
                p.children = [proposed[k] for k in order[:width]]
            else:
                for child in p.children:
                    compute_option_loss(theta_p + child.values, child)
                p.children = sorted(p.children, key=lambda child: child.loss)  # stable: lowest index first
            p.loss = p.children[0].loss
            return p.loss

        current = None
        if confirm:
            current = objective({**standing, block: theta[block]}, block, t)
            losses.append(current)
        found = [compute_option_loss(theta[block] + p.values, p) for p in psi[block]]
        best = int(np.argmin(found))
        if current is not None and not found[best] < current:
            first = psi[block][0]
            for child in first.children:
                child.values, child.terms = first.values + child.values, first.terms + child.terms
            psi[block] = first.children
            return -1
        p_star = psi[block][best]
        theta[block] = theta[block] + p_star.values
        psi[block] = p_star.children
        return best

    if options and np.any([of(momentum, block) for block in blocks]):
        raise ValueError("momentum with options is not defined")
    states = []
    for t in range(steps):
        chosen_entries = {block: select_perturbation_indices(block, t) for block in blocks}
        at_start = {block: best_pending(block) for block in blocks}
        all_losses: dict[str, list[float]] = {block: [] for block in blocks}
        chosen = {}
        for block in blocks:
            standing = at_start if sweep == "parallel" else {other: best_pending(other) for other in blocks}
            algorithm = algorithm_2 if options else algorithm_1
            chosen[block] = algorithm(block, t, chosen_entries[block], standing, all_losses[block])
        states.append(
            State(
                params=tensors(theta),
                pending=tensors({block: best_pending(block) for block in blocks}),
                options=copy.deepcopy(psi),
                momentum=copy.deepcopy(m_buffer),
                improvements=copy.deepcopy(improvements),
                selected=copy.deepcopy(chosen_entries),
                losses=all_losses,
                chosen=chosen,
            )
        )
    if options:  # finish()
        last = tensors({block: best_pending(block) for block in blocks})
        fresh = {block: empty_options(size[block], options[1]) for block in blocks}
        states.append(State(last, copy.deepcopy(last), fresh, copy.deepcopy(m_buffer), improvements, {}, {}, {}))
    return states
