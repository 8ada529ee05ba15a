"""Delta: a change of one named tensor. The one file that the search and the language wing both import."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of the tensor `name`; several Deltas of one tensor add up in the order in which they stand.

    values: dense, of the tensor's number of elements; or sparse, [s], beside `index`.
    index: None (dense) or int64 [s], distinct flat positions in row-major order. Deltas that change the same entries
        share one `index` object, which is how an evaluator recognises candidates that it can compute together.
    """

    name: str
    values: Tensor
    index: Tensor | None = None

    def add_to(self, tensor: Tensor) -> None:
        """Add this change to `tensor` in place (one rounding per entry; contiguous tensors only)."""
        flat = tensor.view(-1)
        if self.index is None:
            flat.add_(self.values.view(-1))
        else:
            flat.index_add_(0, self.index, self.values)
