"""Delta: a change of one named tensor. The one file that the search and the language wing both import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of the tensor `name`; several Deltas of one tensor add up in the order in which they stand.

    values: dense, of the tensor's number of elements; sparse, [s], beside `index`; or low-rank, U [o, r], beside
        `right`.
    index: None, or int64 [s], distinct flat positions in row-major order. Deltas that change the same entries
        share one `index` object, which is how an evaluator recognises candidates that it can compute together.
    right: None, or V [i, r]: the change is scale · U Vᵀ of a tensor seen as a matrix of o = shape[0] rows.
    """

    name: str
    values: Tensor
    index: Tensor | None = None
    right: Tensor | None = None
    scale: float = 1.0

    def dense(self, tensor: Tensor) -> Tensor:
        """The change as a tensor of the shape and dtype of `tensor`."""
        found = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        self.add_to(found)
        return found

    def add_to(self, tensor: Tensor) -> None:
        """Add this change to `tensor` in place (one rounding per entry; contiguous tensors only)."""
        flat = tensor.view(-1)
        if self.right is not None:
            flat.view(self.values.shape[0], -1).addmm_(self.values, self.right.T, alpha=self.scale)
        elif self.index is None:
            flat.add_(self.values.view(-1))
        else:
            flat.index_add_(0, self.index, self.values)


class Sweep(Sequence[Sequence[Delta]]):
    """Candidates that differ in one thing: candidate p changes the same entries of tensor `name` by values[p].

    values: [P, s]. entries: int64 [s], distinct flat positions, or None for all of them. To read it is to read a list
    of lists of one `Delta` each, of which slices are again a `Sweep`; an evaluator that can take all candidates at once
    finds them side by side in `values`.
    """

    def __init__(self, name: str, values: Tensor, entries: Tensor | None = None):
        self.name, self.values, self.entries = name, values, entries

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, p: int | slice) -> Any:
        if isinstance(p, slice):
            return Sweep(self.name, self.values[p], self.entries)
        return [Delta(self.name, self.values[p], self.entries)]
