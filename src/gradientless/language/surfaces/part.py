"""The surfaces `bias` and `layers`: a part of the model's own tensors, chosen by name.

`bias` is BitFit: Ben Zaken, Ravfogel and Goldberg, "BitFit: Simple parameter-efficient fine-tuning for
transformer-based masked language-models", ACL 2022, https://arxiv.org/abs/2106.10199.

Differs from the paper: nothing; a model without biases (Llama, T5) cannot have it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from gradientless.errors import UserError, unknown
from gradientless.language.surfaces.adapter import AdapterSurface, patterns
from gradientless.language.surfaces.full import FullSurface


class BiasSurface(AdapterSurface):
    """Every bias of the model, and the head."""

    owner: ClassVar[str] = "bias"
    tunes: ClassVar[str] = "model"

    @classmethod
    def create(cls, model: str, labels: Sequence[str], **reading: Any) -> BiasSurface:  # type: ignore[override]
        """A pretrained model whose biases are tuned. reading: what `FullSurface.create` takes."""
        base = FullSurface.create(model, labels, **reading)
        return cls(base.reading, dropout=base.dropout, options={})

    def insert(self) -> None:
        found = [
            tensor
            for name, tensor in self.model.named_parameters()
            if name.rsplit(".", 1)[-1] == "bias" and not name.startswith(self.reading.fixed)
        ]
        head = {id(tensor) for tensor in self.head_tensors().values()}
        if all(id(tensor) in head for tensor in found):
            raise UserError(f"{self.owner}: the model must have biases, got none")
        for tensor in found:
            tensor.requires_grad_(True)


class LayersSurface(AdapterSurface):
    """The tensors whose names match a pattern, and the head."""

    owner: ClassVar[str] = "layers"
    tunes: ClassVar[str] = "model"

    @classmethod
    def create(  # type: ignore[override]
        cls, model: str, labels: Sequence[str], *, pattern: str | Sequence[str], **reading: Any
    ) -> LayersSurface:
        """A pretrained model of which a part is tuned. pattern: regular expressions, found anywhere in a tensor's name.
        reading: what `FullSurface.create` takes. Raises `UserError` for a pattern that matches nothing,
        or nothing with an effect."""
        base = FullSurface.create(model, labels, **reading)
        options = {"pattern": patterns(cls.owner, "pattern", pattern)}
        return cls(base.reading, dropout=base.dropout, options=options)

    def insert(self) -> None:
        tensors = dict(self.model.named_parameters())
        for pattern in self.options["pattern"]:
            try:
                hits = [name for name in tensors if re.search(pattern, name)]
            except re.error as error:
                raise UserError(
                    f"{self.owner}: pattern must be a regular expression, got {pattern!r} ({error})"
                ) from None
            if not hits:
                raise unknown(self.owner, "pattern", pattern, sorted({n for name in tensors for n in name.split(".")}))
            # Not of the body's own pooler, where a head does without it, nor of what the library computes.
            used = [name for name in hits if not name.startswith(self.reading.fixed)]
            if not used:
                raise UserError(
                    f"{self.owner}: pattern must match a tensor that is learned and that the scores depend on, "
                    f"got {pattern!r}, which matches {hits[0]}"
                )
            for name in used:
                tensors[name].requires_grad_(True)
