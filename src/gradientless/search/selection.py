"""Which entries of a block move: thesis section 3.1.

Random sets are functions of (seed, step) and are never stored. Sets that depend on the weights (magnitude) or on
measurements (Fisher) are made once, at their birth, and kept while a direction of that birth is alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradientless.errors import UserError, unknown

SELECTIONS = ("all", "random", "magnitude", "fisher", "fixed")
DEPENDS_ON_WEIGHTS = ("magnitude", "fisher")


def largest(scores: Tensor, count: int) -> Tensor:
    """Flat positions of the `count` largest scores, sorted; among equals the lower position wins. int64 [count]."""
    flat = scores.reshape(-1)
    threshold = torch.topk(flat, count, sorted=True).values[-1]
    above = torch.nonzero(flat > threshold).view(-1)
    equal = torch.nonzero(flat == threshold).view(-1)[: count - above.numel()]
    return torch.cat([above, equal]).sort().values


def check(owner: str, selection: str, entries: int | None, indices: object, name: str, size: int) -> None:
    """Raise `UserError`, naming the tensor, unless the options of a selection make sense for `size` entries."""
    if selection not in SELECTIONS:
        raise unknown(owner, "selection", selection, SELECTIONS)
    if entries is not None and (isinstance(entries, bool) or not isinstance(entries, int) or entries < 1):
        raise UserError(f"{owner}: entries must be an integer >= 1 for tensor '{name}', got {entries!r}")
    if (selection == "fixed") != (indices is not None):
        raise UserError(f"{owner}: indices must be given with selection 'fixed' and only then, for tensor '{name}'")
    if indices is not None:
        flat = torch.as_tensor(indices).view(-1)
        bad = flat.numel() == 0 or flat.is_floating_point() or int(flat.min()) < 0 or int(flat.max()) >= size
        if bad or flat.unique().numel() != flat.numel():
            raise UserError(
                f"{owner}: indices must be distinct positions in [0, {size}) for tensor '{name}', got {indices!r}"
            )
