"""The surface `side_lora`: LoRA whose backward pass runs through the low-rank branches and never through pretrained
products.

After a talk of 2023, its only publication ("keep pretrained weights as buffers; during backprop only go through the
newly inserted LoRA layers"). Every linear layer of the model's blocks becomes

    y = x W^T + b + s (x A^T) B^T,   s = alpha / rank,   W and b buffers,

and its backward pass computes, with dy the gradient of y,

    dB = s dy^T (x A^T),   dA = (s dy B)^T x,   dx = (s dy B) A

and no more. What LoRA computes beside that, and this skips, is one product a linear layer: dy W, the pretrained part of
dx. (Neither computes dW = dy^T x.) Everything else is as usual: residual paths, normalisations, the products of
queries with keys and of attention with values, and the output layer or head, whose product is where gradients come in.

So the gradient is not that of the loss: the paths through W are left out of it. With B = 0, as it starts, dx is zero at
every linear layer, and the residual paths alone carry the gradient down. The layers that write to the residual stream
(an attention's output, a feed-forward's second layer) then get the gradient of their B at the first step, in every
block; those that other layers' dx has to reach (queries, keys, values, a feed-forward's first layer, the encoder below
a decoder) get theirs once the B behind them has moved, from the second step on.

In the forward pass it equals LoRA, and it is saved as LoRA in peft's format. What the talk leaves open is read so: the
branches stand in all linear layers of the blocks. `targets` may name fewer; the others then pass no gradient at all,
and a branch that none would reach is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradientless.errors import UserError
from gradientless.language.surfaces.adapter import (
    BESIDE,
    AdapterSurface,
    block_linears,
    patterns,
    require_branches,
    swap,
    targeted,
)
from gradientless.language.surfaces.full import FullSurface
from gradientless.language.surfaces.products import unreached
from gradientless.language.surfaces.saved import ADAPTER_FILE

PREFIX = "base_model.model."


class SideLinear(nn.Module):
    """A pretrained linear layer whose weights are buffers, with a branch of rank `rank`, or none (rank 0)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, scale
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        if rank:
            # As peft starts them: A uniform within 1/sqrt(inputs), B zero.
            down = nn.Linear(self.in_features, rank, bias=False, device="meta").to_empty(device="cpu")
            up = nn.Linear(rank, self.out_features, bias=False, device="meta").to_empty(device="cpu")
            with torch.no_grad():
                bound = 1 / math.sqrt(self.in_features)
                down.weight.uniform_(-bound, bound, generator=generator)
                up.weight.zero_()
            self.lora_A, self.lora_B = down.to(linear.weight.device), up.to(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        # Cut off from its input, the pretrained product leaves nothing in the graph: dy W is never computed.
        y = nn.functional.linear(x.detach(), self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(y.dtype) * self.scale

    def merged(self) -> nn.Linear:
        """A plain layer that computes what this one does."""
        linear = self.plain()
        if self.lora_A is not None and self.lora_B is not None:
            branch = self.lora_B.weight.detach() @ self.lora_A.weight.detach() * self.scale
            linear.weight = nn.Parameter((self.weight + branch).to(self.weight.dtype), requires_grad=False)
        return linear

    def plain(self) -> nn.Linear:
        """The pretrained layer, sharing its memory."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear


class SideLoraSurface(AdapterSurface):
    """Low-rank branches, and a backward pass through them alone. The branches are float32."""

    owner: ClassVar[str] = "side_lora"
    mergeable: ClassVar[bool] = True

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: str,
        labels: Sequence[str],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] | None = None,
        seed: int = 0,
        **reading: Any,
    ) -> SideLoraSurface:
        """A pretrained model with branches, for `labels` (names by class index).

        rank, alpha: of the branches, which count alpha / rank. targets: the linear layers with a branch (names, last
        parts of names, or regular expressions), by default all of the model's blocks. seed: of the first values.
        reading: what `FullSurface.create` takes. Raises `UserError` for anything unknown or not possible.
        """
        base = FullSurface.create(model, labels, seed=seed, **reading)
        chosen = None if targets is None else patterns(cls.owner, "targets", targets)
        options = {"rank": rank, "alpha": alpha, "targets": chosen, "seed": seed}
        surface = cls(base.reading, dropout=base.dropout, options=options)
        walled = unreached(surface)
        if walled:
            raise UserError(
                f"{cls.owner}: targets must name the layers between a branch and the residual path too, "
                f"got none behind {walled[0]}, which no gradient would reach"
            )
        return surface

    def insert(self) -> None:
        linears = block_linears(self.core)
        if not linears:
            raise UserError(f"{self.owner}: the model must have linear layers in its blocks, got none")
        rank, alpha = self.options["rank"], self.options["alpha"]
        require_branches(self.owner, linears.values(), rank, alpha)
        chosen = set(targeted(self.owner, list(linears), self.options["targets"]))
        generator = torch.Generator().manual_seed(self.options["seed"])
        self.branched = [name for name in linears if name in chosen]
        for name, linear in linears.items():
            swap(self.core, name, SideLinear(linear, rank if name in chosen else 0, alpha / rank, generator))

    @contextmanager
    def taken_out(self, merged: bool = False) -> Iterator[None]:
        branched = {name: module for name, module in self.core.named_modules() if isinstance(module, SideLinear)}
        try:
            for name, module in branched.items():
                swap(self.core, name, module.merged() if merged else module.plain())
            yield
        finally:
            for name, module in branched.items():
                swap(self.core, name, module)

    def save_merged(self, folder: Path) -> None:
        with self.taken_out(merged=True):
            self.reading.save(Path(folder), self.dropout)

    def save_adapter(self, folder: Path) -> None:
        """LoRA in peft's format: `PeftModel.from_pretrained(base, folder)` opens it."""
        from peft import LoraConfig

        config = LoraConfig(
            r=self.options["rank"],
            lora_alpha=self.options["alpha"],
            target_modules=list(self.branched),
            base_model_name_or_path=BESIDE,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        save_file(self._branches(), folder / ADAPTER_FILE, metadata={"format": "pt"})

    def load_adapter(self, folder: Path) -> None:
        path = folder / ADAPTER_FILE
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: must hold the branches, got none or damaged ({error})") from None
        own = self._branches()
        if set(saved) != set(own) or any(saved[name].shape != own[name].shape for name in own):
            raise UserError(f"{path}: must hold the branches of its options, got others")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def _branches(self) -> dict[str, Tensor]:
        """By peft's names; the tensors share the model's memory."""
        return {
            f"{PREFIX}{name}.{part}.weight": self.core.get_parameter(f"{name}.{part}.weight").detach()
            for name in self.branched
            for part in ("lora_A", "lora_B")
        }
