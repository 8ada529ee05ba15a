"""What a backward pass multiplies: which tensors its matrix products touch, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradientless.language.surfaces.base import Surface

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Products:
    """Entries of tensors, and products.

    tuned: entries that training changes. registered: entries of `nn.Parameter`s, tuned or frozen (buffers are not
    counted). total: entries of parameters and buffers of the model. touched: entries of the tuned tensors and of the
    frozen matrices that a product of the backward pass reads, which is what carries a gradient on to its input. names:
    those tensors. calls: matrix products of the backward pass. multiplies: their multiply-adds.
    """

    tuned: int
    registered: int
    total: int
    touched: int
    names: frozenset[str]
    calls: int
    multiplies: int

    def __str__(self) -> str:
        return (
            f"{self.tuned:,} of {self.total:,} parameters tuned ({100 * self.share:.2f}%), "
            f"{self.registered:,} registered, {self.touched:,} touched by the backward pass"
        )

    @property
    def share(self) -> float:
        """Of the model's entries that are tuned."""
        return self.tuned / self.total


class Watch(TorchDispatchMode):
    """While open, notes the matrix products that run: how many, their size, and which known tensors they read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items() if tensor.ndim > 1}
        self.read: set[str] = set()
        self.calls = 0
        self.multiplies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in _PRODUCTS:
            left, right = [argument for argument in args if isinstance(argument, Tensor)][-2:]
            self.calls += 1
            self.multiplies += left.numel() * right.shape[-1]
            for matrix in (left, right):
                name = self._names.get(matrix.untyped_storage().data_ptr())
                if name is not None:
                    self.read.add(name)
        return output


def unreached(surface: Surface) -> list[str]:
    """Tuned tensors that no gradient reaches, by name, on a row of one word."""
    trainable = surface.trainable()
    batch = surface.encode([surface.blank()]).batch([0])
    with torch.enable_grad():
        scores = surface.logits(surface.prepare(batch))
        if not scores.requires_grad:
            return list(trainable)
        grads = torch.autograd.grad(scores.sum(), list(trainable.values()), allow_unused=True)
    return [name for name, grad in zip(trainable, grads, strict=True) if grad is None]


def measure(surface: Surface, batch: Any = None) -> Products:
    """Of one backward pass of `surface` over `batch` (`EncodedRows.batch`), by default a row of one word.

    Products with a copy of a matrix, such as the rows of an output layer that stand for label words, are counted as
    work and not by name. Gradients that stood in the parameters are left as they were.
    """
    trainable, watch = surface.trainable(), Watch(_tensors(surface))
    with torch.enable_grad():
        loss = _loss(surface, _prepared(surface, batch))
        with watch:
            torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    return _counted(surface, watch.read, watch.calls, watch.multiplies)


def of_whole(surface: Surface, batch: Any = None) -> Products:
    """As `measure`, of a surface that tunes all of its model: without a backward pass, whose gradients would take the
    model's size. Every product of the forward pass has two in the backward pass there, one for each of its factors."""
    watch, prepared = Watch({}), _prepared(surface, batch)
    with torch.enable_grad(), watch:  # without gradients the library would take other ways
        _loss(surface, prepared)
    return _counted(surface, set(), 2 * watch.calls, 2 * watch.multiplies)


def _prepared(surface: Surface, batch: Any) -> Any:
    if batch is None and surface.cacheable:  # which reads features: none have to be computed to count behind them
        batch = torch.zeros(1, surface.width)
    elif batch is None:
        batch = surface.encode([surface.blank()]).batch([0])
    return surface.prepare(batch)


def _loss(surface: Surface, prepared: Any) -> Tensor:
    return surface.logits(prepared).logsumexp(-1).sum()


def _tensors(surface: Surface) -> dict[str, Tensor]:
    """All of the model by name; a head of ours that stands beside it, too."""
    model = surface.model
    return {**dict(model.named_buffers()), **dict(model.named_parameters()), **surface.trainable()}


def _counted(surface: Surface, read: set[str], calls: int, multiplies: int) -> Products:
    tensors, trainable = _tensors(surface), surface.trainable()
    kept = surface.model.state_dict().keys() | trainable.keys()
    return Products(
        tuned=sum(tensor.numel() for tensor in trainable.values()),
        registered=sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter)),
        total=sum(tensor.numel() for name, tensor in tensors.items() if name in kept and tensor.is_floating_point()),
        touched=sum(tensors[name].numel() for name in read | set(trainable)),
        names=frozenset(read | set(trainable)),
        calls=calls,
        multiplies=multiplies,
    )
