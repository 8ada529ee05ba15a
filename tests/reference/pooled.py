"""GLD on one pool with a norm penalty: Coşlu's thesis, Algorithm 1, chapter 5 (page 36) and Eq. 4.3 (page 32), float64.

Chapter 5: "consider the entire set of trainable parameters as a single large unit and select s indices at random from
that large unit to train each step." Algorithm 1 then has one tensor, theta: the parameters laid end to end. Everything
that it says of a tensor holds for the block: one i, one R, one v_k for each k, one decision a step.

    J(theta) = L(theta) + lambda ||theta||_2                                                        (Eq. 4.3)

Where the text leaves a choice open, this reads the source as:

* theta in Eq. 4.3. In chapters 3 and 4 theta is what is trained as a unit, so for a pool it is the pool, and the norm
  is sqrt(sum of all squares). The sum of the tensors' norms is another function and takes other decisions.
* The norm is of every entry of the pool, whether or not i selects it, and is not squared (Eq. 2.8 squares, Eq. 4.3
  does not).
* The exponent. Line 5 says 2^-k for k = 1, ..., K: radii from R/2. Eq. 2.37 (r_0 = R) and the interval
  [2^(1-K) R, R] of page 22 begin with R itself. `first` is the first exponent: 1 is the listing's, 0 is the text's.
* The order in the block: that of the parameters as given, each row-major.
* J(theta_t) in line 9 is asked for first, on the step's own batch; a tie is the first's.

Algorithm 2 on a pool: give `options.trace` the one tensor join(params), and a loss that takes it through split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class State:
    """After a step."""

    params: dict[str, np.ndarray]  # theta_t+1
    losses: list[float]  # J(theta_t), J(theta_t,1), ..., J(theta_t,K): all that the step asked for, in order
    chosen: int  # the k of the arg min; 0 is theta_t


def join(params) -> np.ndarray:
    """The block: all tensors in the order given, each row-major, laid end to end."""
    return np.concatenate([np.asarray(value, dtype=np.float64).ravel() for value in params.values()])


def split(block, like) -> dict[str, np.ndarray]:
    """The block's tensors again, with the names and shapes of `like`."""
    tensors, start = {}, 0
    for name, value in like.items():
        shape = np.shape(value)
        tensors[name] = block[start : start + int(np.prod(shape))].reshape(shape)
        start += tensors[name].size
    return tensors


def trace(params, loss, steps, direction, *, tries, radius, penalty=0.0, select=None, first=1) -> list[State]:
    """Runs Algorithm 1 on the pool; steps t and positions count from 0, k from 1 as in the listing.

    params: {name: array}. loss(params, t): L of all tensors on step t's batch, without the penalty.
    direction(t, k): entries of the draw from D over the block, before the radius, in the order of the step's indices.
    radius: R, a number or radius(t). select(t, block): positions in the block, or all where None.
    """
    theta = join(params)

    def J(block, t):
        return float(loss(split(block, params), t)) + penalty * np.sqrt(np.sum(block**2))  # Eq. 4.3

    states = []
    for t in range(steps):  # 1: for t = 1, ..., T do
        # 2: for each tensor theta_t do (there is one: the pool)
        # 3: i <- SelectPerturbationIndices(theta_t, s)
        i = np.arange(theta.size) if select is None else np.asarray(select(t, theta.copy()))
        R = radius(t) if callable(radius) else radius
        points = [theta]
        for k in range(1, tries + 1):  # 4: for k = 1, ..., K do
            r_k = 2.0 ** -(first + k - 1) * R  # 5: r_k <- 2^-k R(theta_t)
            entries = np.asarray(direction(t, k), dtype=np.float64).ravel()
            assert entries.size == len(i), f"direction: one entry for each of {len(i)} indices, got {entries.size}"
            v_k = r_k * entries  # 6: v_k ~ r_k D
            theta_k = theta.copy()  # 7: theta_t,k <- theta_t
            theta_k[i] += v_k  # 8: theta_t,k(i) <- theta_t,k(i) + v_k
            points.append(theta_k)
        # 9: theta_t+1 <- arg min over theta of { J(theta_t), J(theta_t,k) }
        losses = [J(point, t) for point in points]
        chosen = int(np.argmin(losses))
        theta = points[chosen]
        states.append(State(split(theta.copy(), params), losses, chosen))
    return states
