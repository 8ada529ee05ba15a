"""The surfaces (what of a model is tuned) by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradientless.errors import UserError, one_of
from gradientless.language.surfaces.base import Surface
from gradientless.language.surfaces.full import FullSurface
from gradientless.language.surfaces.head import HeadSurface
from gradientless.language.surfaces.lora import Ia3Surface, LoraSurface
from gradientless.language.surfaces.lst import KLstSurface, LstSurface
from gradientless.language.surfaces.part import BiasSurface, LayersSurface
from gradientless.language.surfaces.prefix import PrefixSurface, PromptSurface
from gradientless.language.surfaces.saved import NOTE, changed, class_of, read_note
from gradientless.language.surfaces.side_lora import SideLoraSurface

SURFACES: dict[str, type[Surface]] = {
    "bias": BiasSurface,
    "full": FullSurface,
    "head": HeadSurface,
    "ia3": Ia3Surface,
    "k_lst": KLstSurface,
    "layers": LayersSurface,
    "lora": LoraSurface,
    "lst": LstSurface,
    "prefix": PrefixSurface,
    "prompt": PromptSurface,
    "side_lora": SideLoraSurface,
}


def options_of(surface: type[Surface]) -> dict[str, inspect.Parameter]:
    """What `surface.create` takes by name, with what it hands on to the surface that it stands on."""
    own = dict(inspect.signature(surface.create).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
        own = {**inspect.signature(FullSurface.create).parameters, **own}
    return {name: parameter for name, parameter in own.items() if parameter.kind is parameter.KEYWORD_ONLY}


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    own: Callable[[str], type[Surface]] | None = None,
) -> Surface:
    """What the `save` of any surface wrote; by default in the dtype it was saved in. Raises `UserError`, for files that
    are not as they were saved, too.

    own: finds the class of the user's own that a folder names, "file.py:Class"."""
    if others := changed(folder):
        each = (f"{'a changed' if (Path(folder) / name).exists() else 'no'} '{name}'" for name in others)
        raise UserError(f"model: must hold the files that were saved, got {' and '.join(each)} in '{folder}'")
    if named := class_of(folder):
        if own is None:
            told = f"must be opened by the class that saved it, '{named['name']}', got none; use the load of the class"
            raise UserError(f"{Path(folder) / NOTE}: {told}")
        return own(named["name"]).load(folder, device, dtype)
    name: Any = read_note(folder).get("surface")
    one_of(f"{Path(folder) / NOTE}", "surface", name, SURFACES)
    return SURFACES[name].load(folder, device, dtype)


__all__ = ["SURFACES", "FullSurface", "HeadSurface", "Surface", "load", "options_of"]
