"""Adapters: surfaces that put something small into a model that reads as `full` does, and tune that and the head.

What is saved: the model without the adapter in `base/`, as `full` saves it (plain transformers opens it; a tuned head
stands there), and the adapter beside it, in peft's format where peft has one.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from gradientless.errors import UserError, unknown, whole
from gradientless.language import seen
from gradientless.language.surfaces.base import Part, Surface
from gradientless.language.surfaces.full import FullSurface, HeadReading, Reading
from gradientless.language.surfaces.products import Products, measure
from gradientless.language.surfaces.saved import NOTE, read_note, write_note

BASE = "base"
ADAPTER_CONFIG = "adapter_config.json"  # as peft calls it
BESIDE = "the folder base beside this file"
"""What peft's file calls the base model: no path, which would lie elsewhere from another working directory, and no name
of the hub. Whoever opens the adapter alone is told where the base lies."""


def name_base(folder: Path, name: str) -> None:
    """Let the adapter in `folder` call its base model `name`."""
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"base_model_name_or_path": name}, indent=2) + "\n", encoding="utf-8")


class AdapterSurface(FullSurface):
    """What the adapters share. Make one with `create` or `load`.

    options: of the adapter alone, as they are saved. core: the library's model that the adapter is put into.
    """

    owner: ClassVar[str]
    tunes: ClassVar[str] = "adapter"  # what is tuned beside the head, as `parts` names it

    def __init__(self, reading: Reading, *, dropout: float, options: dict[str, Any]) -> None:
        super().__init__(reading, dropout=dropout)
        self.options = options
        self.core: nn.Module = reading.head.model if isinstance(reading, HeadReading) else reading.model
        self.model.requires_grad_(False)
        self.insert()
        for tensor in self.head_tensors().values():
            tensor.requires_grad_(True)
        self.eval()

    @abstractmethod
    def insert(self) -> None:
        """Put the adapter into `core`; its tensors, and only these, then require gradients."""

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """While open, the model is as it was without the adapter."""
        yield

    def save_adapter(self, folder: Path) -> None:
        """Write what stands beside `base/`, by default nothing: what is tuned is the model's own."""

    def load_adapter(self, folder: Path) -> None:
        """Read what `save_adapter` wrote."""

    def parts(self) -> dict[str, Part]:
        found = super().parts()
        own = found.pop("model")
        told = ", ".join(f"{name} {value}" for name, value in self.options.items() if name != "seed")
        return {self.tunes: Part(f"{self.owner} ({told})" if told else self.owner, own.tensors)} | found

    @property
    def plain(self) -> str | None:
        return (Path(BASE) / self.reading.place).as_posix() if self.tunes == "model" else None

    @property
    def merged(self) -> str:
        return self.reading.place

    def products(self) -> Products:
        if self._products is None:
            self._products = measure(self)
        return self._products

    def describe(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.options.items() if value is not None)
        return f"{self.owner} ({told}) in a {self.reading.describe()}: {self.products()}"

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.taken_out():
                self.reading.save(folder / BASE, self.dropout)
            self.save_adapter(folder)
            note = {"surface": self.owner, "readout": "adapter", "labels": list(self.labels), "options": self.options}
            write_note(folder, note)
        except OSError as error:
            raise UserError(f"{folder}: the model must be writable there, got {error.strerror or error}") from None

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> Any:
        folder = Path(folder)
        note = read_note(folder, cls.owner)
        base = FullSurface.load(folder / BASE, device, dtype)
        try:
            surface = cls(base.reading, dropout=base.dropout, options=note["options"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / NOTE}: must state the options of {cls.owner}, got others ({error})") from None
        surface.load_adapter(folder)
        return surface


def block_linears(core: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model's repeated blocks, by name; those of embeddings and heads are not among them, nor
    are layers that are made of a linear one and answer with anything else (a router's choice of experts)."""
    found = {
        name: module
        for name, module in core.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }
    own = {name: module for name, module in found.items() if type(module).forward is not nn.Linear.forward}
    linear = seen.linear(core, own) if own else own
    return {name: module for name, module in found.items() if name not in own or name in linear}


def require_branches(owner: str, linears: Iterable[nn.Linear], rank: Any, alpha: Any) -> None:
    """Raises `UserError` for low-rank branches that cannot stand beside these layers. A layer may be narrower than the
    rank, as a gate of one output is; its branch then has entries to spare."""
    fullest = max(min(linear.in_features, linear.out_features) for linear in linears)
    if not 1 <= whole(owner, "rank", rank) <= fullest:
        raise UserError(f"{owner}: rank must be from 1 to {fullest}, the widest layer's, got {rank}")
    if not alpha > 0:
        raise UserError(f"{owner}: alpha must be > 0, got {alpha}")


def patterns(owner: str, what: str, given: str | Sequence[str]) -> list[str]:
    """One pattern or several as a list. Raises `UserError` for none, and for what is no text."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not found or not all(isinstance(pattern, str) for pattern in found):
        told = list(given) if isinstance(given, Sequence) else given
        raise UserError(f"{owner}: {what} must be one pattern or a list of at least one, got {told!r}")
    return found


def targeted(owner: str, names: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    """Those of `names` that `targets` name: a whole name, its last parts, or a regular expression for all of it.

    Raises `UserError` for a target that matches nothing, with the nearest names.
    """
    if targets is None:
        return list(names)
    found: set[str] = set()
    for target in patterns(owner, "targets", targets):
        try:
            hits = {n for n in names if n == target or n.endswith("." + target) or re.fullmatch(target, n)}
        except re.error as error:
            raise UserError(
                f"{owner}: targets must be names or regular expressions, got {target!r} ({error})"
            ) from None
        if not hits:
            raise unknown(owner, "target", target, sorted({name.rsplit(".", 1)[-1] for name in names}))
        found |= hits
    return [name for name in names if name in found]


def swap(core: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(core.get_submodule(parent), last, module)


__all__ = ["AdapterSurface", "Surface", "block_linears", "patterns", "require_branches", "swap", "targeted"]
