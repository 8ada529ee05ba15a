"""Options: Coşlu's thesis, section 3.3, Algorithm 2 (page 25), its listing line by line, in float64.

An option p = (i, v) is a perturbation that a tensor has not taken yet. psi(theta) holds the first-level options of a
tensor and psi(p) those that follow p: a tree of `depth` levels (l in the thesis), `width` options each (m). A step
tries `tries` (K) fresh perturbations under every leaf, keeps the best m of them there as the leaf's own options, and
moves the tensor to the first-level option above the best point of all. Its other first-level options are dropped with
all that stands under them.

Where the listing leaves a choice open, this reads the source as:

* psi(theta_1). "At the root of the tree is the parameter, which can be described as an 'empty' option where the
  perturbation vector is 0" (page 24): here the tree begins as a chain of l empty options. Step j (from 0) then has
  m^min(j, l) leaves, and theta moves for the first time in step l (from 0); so the first update too is influenced by
  (l + 1) b samples and sum_{i=0..l} m^i K perturbations, as page 24 says of every update.
* How often v_k is drawn. Lines 10 to 14 stand inside the procedure, hence anew under every leaf: m^l K a tensor and
  step (pages 25 and 32). Again the sum of page 24 counts so; one list of K for all leaves would make it (l + 1) K.
* J(theta_t,p) of lines 15 and 16 is asked for under every leaf: it was last known on another batch. The text counts K
  passes a leaf (as it does for Algorithm 1); the listing needs K + 1. Each is asked for once, though lines 15 and 16
  both name it.
* The other tensors. By the listing J of a perturbed tensor takes the others as they stand, those before it in the loop
  at theta_t+1 (line 5), those behind it at theta_t, and nobody's untaken options. "For m = 1 the
  method is equivalent to Algorithm 1" (page 23) then holds for one tensor, l steps later ("the next iteration will
  update the parameter with p*"); of several, each is searched while the others are l steps behind. Section 4 (page 26)
  counts on the equivalence with four tensors: it holds for any number where the others stand at the first of their
  options on every level (`others_at_first`).
* An option keeps its own i and v from the step it was born in: "a tuple (i, v)" (page 23). A later step's indices or
  radius do not touch it. The i of a step is chosen at theta_t (line 3), once for all leaves.
* R(theta_t) in line 11 under a leaf is the tensor's radius in this step (Eq. 4.2), wherever the recursion stands.
* The exponent. Line 11 says 2^-k for k = 1, ..., K: radii from R/2. Eq. 2.37 (r_0 = R) and the interval
  [2^(1-K) R, R] of page 22 begin with R itself. `first` is the first exponent: 1 is the listing's, 0 is the text's.
* Order and ties. psi is a set: its order decides ties, the numbers of the leaves and what "first" is. By the listing
  only line 15 ranks, the best first, its candidates in the order written: (i, 0), then v_1, ..., v_K. With `reorder`
  line 19 ranks again: the child with the lowest J under it in this step comes first. A tie is the earlier one's. Where
  m > K + 1, all K + 1 candidates are kept.
* The penalty. The norm in J(theta) = L(theta) + lambda ||theta||_2 (Eq. 4.3) is that of the tensor searched, all its
  entries, not squared; the norms of the others would be the same in every candidate of a decision.
* The end: theta_T+1 is left; options that were never taken are dropped.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Option:
    indices: np.ndarray  # i: positions in the flattened (row-major) tensor
    values: np.ndarray  # v, one for each index, radius included
    born: tuple[int, int, int]  # step, leaf, k; k = 0 is the empty candidate (i, 0); (-1, 0, 0) is the tree's beginning
    children: list[Option] = field(default_factory=list)  # psi(p); none for a leaf


@dataclass
class Decision:
    """Of one tensor in one step; leaves from 0, in the order of the recursion (depth first, siblings as in psi)."""

    losses: list[list[float]]  # for each leaf: J(theta_p), J(theta_p,1), ..., J(theta_p,K)
    kept: list[list[int]]  # for each leaf: the k of line 15's top m, the best first; 0 is (i, 0)
    option_losses: list[float]  # line 4: for each p in psi(theta_t)
    best: int  # p* as its place in psi(theta_t)


@dataclass
class State:
    """After a step."""

    params: dict[str, np.ndarray]  # theta_t+1
    options: dict[str, list[Option]]  # psi(theta_t+1)
    decisions: dict[str, Decision]  # in the order of the tensors

    @property
    def losses(self) -> list[float]:
        """Every J that the step asked for, in order."""
        return [loss for decision in self.decisions.values() for leaf in decision.losses for loss in leaf]


def trace(
    params,
    loss,
    steps,
    direction,
    *,
    width,
    depth,
    tries,
    radius,
    penalty=0.0,
    select=None,
    first=1,
    others_at_first=False,
    reorder=False,
) -> list[State]:
    """Runs Algorithm 2; steps t, leaves and positions count from 0, k from 1 as in the listing.

    params: {name: array}. loss(params, t): L of all tensors on step t's batch, without the penalty.
    direction(t, name, leaf, k): entries of the draw from D, before the radius, in the order of the step's indices.
    radius: R, a number or radius(t, name). penalty: lambda, a number or {name: number}.
    select(t, name, theta): flat indices, or all where None.
    """
    theta = {name: np.array(value, dtype=np.float64) for name, value in params.items()}
    psi = {name: beginning(depth) for name in theta}

    def update(t, name) -> Decision:
        # 3: i <- SelectPerturbationIndices(theta_t, s)
        i = np.arange(theta[name].size) if select is None else np.asarray(select(t, name, theta[name].copy()))
        rest = {other: at_first(theta[other], psi[other]) if others_at_first else theta[other] for other in theta}
        R = radius(t, name) if callable(radius) else radius
        weight = penalty[name] if isinstance(penalty, dict) else penalty
        losses: list[list[float]] = []
        kept: list[list[int]] = []

        def J(point):
            norm = np.sqrt(np.sum(point**2))
            return float(loss({**rest, name: point}, t)) + weight * norm

        def compute_option_loss(theta_t, p, i):  # 7: procedure ComputeOptionLoss(theta_t, p, i)
            theta_p = perturbed(theta_t, p.indices, p.values)
            if not p.children:  # 8: if psi(p) = {} then
                # 9: (If this is the last level of options, apply perturbations to set the next level and return
                #    the minimum loss)
                leaf = len(losses)
                candidates, points = [Option(i, np.zeros(len(i)), (t, leaf, 0))], [theta_p]
                for k in range(1, tries + 1):  # 10: for k = 1, ..., K do
                    r_k = 2.0 ** -(first + k - 1) * R  # 11: r_k <- 2^-k R(theta_t)
                    v_k = r_k * entries(direction(t, name, leaf, k), len(i))  # 12: v_k ~ r_k D
                    theta_p_k = theta_p  # 13: theta_t,p,k <- theta_t,p
                    theta_p_k = perturbed(theta_p_k, i, v_k)  # 14: theta_t,p,k(i) <- theta_t,p,k(i) + v_k
                    candidates.append(Option(i, v_k, (t, leaf, k)))
                    points.append(theta_p_k)
                # 15: psi(p) <- arg min^(m) over p' of { J(theta_t,p,p') | p' in {(i, 0), (i, v_k) | k = 1..K} }
                losses.append([J(point) for point in points])
                kept.append(ranking(losses[leaf])[:width])
                p.children = [candidates[k] for k in kept[leaf]]
                return min(losses[leaf])  # 16: return min over k of { J(theta_t,p), J(theta_t,p,k) }
            else:  # 17: else
                # 18: (If this is not the last level of options, recursively return the minimum loss across all
                #    children)
                # 19: return min over p' in psi(p) of ComputeOptionLoss(theta_t,p, p', i)
                below = [compute_option_loss(theta_p, child, i) for child in p.children]
                if reorder:
                    p.children = [p.children[place] for place in ranking(below)]
                return min(below)

        # 4: p* <- arg min over p in psi(theta_t) of ComputeOptionLoss(theta_t, p, i)
        option_losses = [compute_option_loss(theta[name], p, i) for p in psi[name]]
        best = int(np.argmin(option_losses))
        chosen = psi[name][best]
        theta[name] = perturbed(theta[name], chosen.indices, chosen.values)  # 5: theta_t+1 <- theta_t,p*
        psi[name] = chosen.children  # 6: psi(theta_t+1) <- psi(p*)
        return Decision(losses, kept, option_losses, best)

    states = []
    for t in range(steps):  # 1: for t = 1, ..., T do
        decisions = {name: update(t, name) for name in theta}  # 2: for each tensor theta_t do
        states.append(State(deepcopy(theta), deepcopy(psi), decisions))
    return states


def beginning(depth) -> list[Option]:
    """psi(theta_1): a chain of `depth` empty options."""
    level: list[Option] = []
    for _ in range(depth):
        level = [Option(np.arange(0), np.zeros(0), (-1, 0, 0), level)]
    return level


def perturbed(theta, indices, values) -> np.ndarray:
    """A copy with theta(i) <- theta(i) + v."""
    flat = theta.flatten()
    flat[indices] += values
    return flat.reshape(theta.shape)


def at_first(theta, options) -> np.ndarray:
    """theta with the first of the options applied, and the first of those that follow it, to the last level."""
    while options:
        theta, options = perturbed(theta, options[0].indices, options[0].values), options[0].children
    return theta


def ranking(losses) -> list[int]:
    """Places from the lowest to the highest, the earlier first of equals."""
    return [int(place) for place in np.argsort(losses, kind="stable")]


def entries(values, size) -> np.ndarray:
    flat = np.asarray(values, dtype=np.float64).ravel()
    assert flat.size == size, f"direction: one entry for each of {size} indices, got {flat.size}"
    return flat
