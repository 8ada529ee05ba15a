"""The surfaces `lora` and `ia3`: small layers inside the model's linear layers, made and saved by peft.

Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022, https://arxiv.org/abs/2106.09685.
Liu et al., "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning", NeurIPS 2022,
https://arxiv.org/abs/2205.05638. Both start as the model itself.

Differs from the paper: LoRA stands in all linear layers of the blocks unless `targets` names fewer (the paper: queries
and values), but for those where peft's format has no place for a branch: in some mixtures of experts it takes the names
of feed-forward layers for those of experts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gradientless.errors import UserError, one_line
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
from gradientless.language.surfaces.ladder import axes_of, family_of
from gradientless.language.surfaces.saved import ADAPTER_FILE


class _PeftSurface(AdapterSurface):
    """An adapter that peft puts into linear layers."""

    mergeable: ClassVar[bool] = True

    def names(self) -> list[str]:
        """The layers that are to have an adapter."""
        raise AssertionError("a subclass states it")

    def config(self, names: list[str]) -> Any:
        """peft's configuration of the adapter in the layers `names`."""
        raise AssertionError("a subclass states it")

    def insert(self) -> None:
        names = self._taken(self.names())
        # Not a child: its tensors are the core's, under names that would only be longer.
        self._peft = (self._put(self.core, names),)

    def _put(self, core: nn.Module, names: list[str]) -> Any:
        """peft's own model around `core`. Raises `UserError` where peft refuses."""
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what peft asks of transformers
            torch.default_generator.manual_seed(self.options["seed"])
            try:
                return get_peft_model(core, self.config(names))  # type: ignore[arg-type]
            except UserError:
                raise
            except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
                got = one_line(error, 300)
                raise UserError(f"{self.owner}: peft must be able to adapt this model, got: {got}") from None

    def _taken(self, names: list[str]) -> list[str]:
        """Those of `names` in which peft puts an adapter, seen on a copy of the model without its weights."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        while True:
            bare = _without_weights(self.core)
            self._put(bare, names)
            there = {name for name, module in bare.named_modules() if isinstance(module, BaseTunerLayer)}
            if there == set(names):
                return names
            left = [name for name in names if name in there]
            missed = next((name for name in names if name not in there), None)
            if missed is None or not left or self.options.get("targets") is not None:
                told = missed or sorted(there - set(names))[0]
                kind = self.core.config.model_type  # type: ignore[union-attr]
                raise UserError(
                    f"{self.owner}: peft must put an adapter into the layers that are named and no others, "
                    f"got another place for {told} of a {kind}; name others in targets"
                )
            names = left

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = {name: module for name, module in self.core.named_modules() if isinstance(module, BaseTunerLayer)}
        try:
            for name, layer in layers.items():
                swap(self.core, name, layer.get_base_layer())
            yield
        finally:
            for name, layer in layers.items():
                swap(self.core, name, layer)  # type: ignore[arg-type]

    def save_merged(self, folder: Path) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.core.modules() if isinstance(module, BaseTunerLayer)]
        kept = [{n: t.detach().clone() for n, t in layer.get_base_layer().named_parameters()} for layer in layers]
        for layer in layers:
            layer.merge()
        try:
            with self.taken_out():
                self.reading.save(Path(folder), self.dropout)
        finally:
            for layer, tensors in zip(layers, kept, strict=True):
                layer.merged_adapters.clear()
                with torch.no_grad():  # peft's own way back subtracts, and rounds
                    for name, tensor in layer.get_base_layer().named_parameters():
                        tensor.copy_(tensors[name])

    def save_adapter(self, folder: Path) -> None:
        self._peft[0].peft_config["default"].base_model_name_or_path = BESIDE
        # The embeddings are the base's; looking whether they are would ask the hub for the base.
        self._peft[0].save_pretrained(str(folder), save_embedding_layers=False)

    def load_adapter(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict

        try:  # peft's own way of reading opens a pickle where this file is missing
            set_peft_model_state_dict(self._peft[0], load_file(folder / ADAPTER_FILE))
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            got = f"none or another ({one_line(error)})"
            raise UserError(f"{folder}: must hold an adapter in peft's format, got {got}") from None

    def linears(self) -> dict[str, nn.Linear]:
        found = block_linears(self.core)
        if not found:
            raise UserError(f"{self.owner}: the model must have linear layers in its blocks, got none")
        return found


class LoraSurface(_PeftSurface):
    """Low-rank branches beside the model's linear layers."""

    owner: ClassVar[str] = "lora"

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
    ) -> LoraSurface:
        """A pretrained model with branches. The options are `SideLoraSurface.create`'s."""
        base = FullSurface.create(model, labels, seed=seed, **reading)
        chosen = None if targets is None else patterns(cls.owner, "targets", targets)
        options = {"rank": rank, "alpha": alpha, "targets": chosen, "seed": seed}
        return cls(base.reading, dropout=base.dropout, options=options)

    def names(self) -> list[str]:
        return targeted(self.owner, list(self.linears()), self.options["targets"])

    def config(self, names: list[str]) -> Any:
        from peft import LoraConfig

        linears, rank, alpha = self.linears(), self.options["rank"], self.options["alpha"]
        require_branches(self.owner, [linears[name] for name in names], rank, alpha)
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)


class Ia3Surface(_PeftSurface):
    """A factor for every entry of keys, values and what a feed-forward's second layer reads, one to begin with."""

    owner: ClassVar[str] = "ia3"

    @classmethod
    def create(cls, model: str, labels: Sequence[str], *, seed: int = 0, **reading: Any) -> Ia3Surface:  # type: ignore[override]
        """A pretrained model with factors. reading: what `FullSurface.create` takes."""
        base = FullSurface.create(model, labels, seed=seed, **reading)
        return cls(base.reading, dropout=base.dropout, options={"seed": seed})

    def names(self) -> list[str]:
        return [
            name for name in self.linears() if self._axes(name)[0].endswith((".k", ".v")) or self._reads_inner(name)
        ]

    def config(self, names: list[str]) -> Any:
        from peft import IA3Config

        return IA3Config(target_modules=names, feedforward_modules=list(filter(self._reads_inner, names)))

    def _reads_inner(self, name: str) -> bool:
        return self._axes(name)[1] == "inner"

    def _axes(self, name: str) -> tuple[str, str]:
        family = family_of(self.owner, self.core.config, "architecture whose keys and values have names")
        return axes_of(family, name + ".weight")


def _without_weights(core: nn.Module) -> nn.Module:
    """A copy of the modules of `core`, whose tensors hold nothing."""
    bare: dict[int, Any] = {id(tensor): nn.Parameter(tensor.detach().to("meta"), False) for tensor in core.parameters()}
    bare |= {id(tensor): tensor.to("meta") for tensor in core.buffers()}
    return copy.deepcopy(core, bare)
