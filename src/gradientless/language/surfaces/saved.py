"""The two small files that stand beside a saved model: what it was tuned as, and a head of ours."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gradientless.errors import UserError, unknown

NOTE = "gradientless.json"
HEAD_FILE = "head.safetensors"
FORMAT = 1

_TYPES: dict[str, dict[str, Any]] = {
    "head": {
        "head": str,
        "pooling": str,
        "activation": str,
        "labels": list,
        "max_length": int,
        "dropout": (int, float),
        "dtype": str,
    },
    "prompt": {
        "prompt": dict,
        "labels": list,
        "max_length": int,
        "truncation": str,
        "padding": str,
        "dropout": (int, float),
        "dtype": str,
    },
    "tokens": {"labels": list, "max_length": int, "dropout": (int, float), "dtype": str},
    "classifier": {"labels": list, "max_length": int, "dropout": (int, float), "dtype": str},
    "adapter": {"labels": list, "options": dict},
}


def write_note(folder: Path, note: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **note}, indent=2, ensure_ascii=False)
    (folder / NOTE).write_text(text + "\n", encoding="utf-8")


def read_note(folder: Path, surface: str | None = None) -> dict[str, Any]:
    """What `write_note` wrote, its types checked. surface: the one that it must be of.

    Raises `UserError` for a folder without a note, a damaged one, and one of another format or surface.
    """
    path = Path(folder) / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: must hold a saved model with {NOTE}, got {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: must be JSON, got a damaged file ({error})") from None
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        found = note.get("format") if isinstance(note, dict) else note
        raise UserError(f"{path}: must be of format {FORMAT}, got {found!r}")
    if surface is not None and note.get("surface") != surface:
        raise UserError(f"{path}: must be of a model of surface '{surface}', got {note.get('surface')!r}")
    readout = note.get("readout", "head")
    if readout not in _TYPES:
        raise unknown(f"{path}", "readout", readout, _TYPES)
    for name, kind in _TYPES[readout].items():
        if not isinstance(note.get(name), kind):
            raise UserError(f"{path}: must state {name}, got {note.get(name)!r}")
    return note


def write_head(folder: Path, layers: dict[str, nn.Linear]) -> None:
    """`layers` by name, float32, as NAME.weight and NAME.bias."""
    tensors = {
        f"{layer}.{name}": tensor.detach().cpu().contiguous()
        for layer, module in layers.items()
        for name, tensor in module.named_parameters()
    }
    save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})


def read_head(folder: Path, names: tuple[str, ...], classes: int, device: str | torch.device) -> list[nn.Linear]:
    """The layers `names`, from first to last, which must fit each other and the number of classes."""
    path = Path(folder) / HEAD_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: must hold the head, got a missing or damaged file ({error})") from None
    layers = []
    for name in names:
        weight, bias = tensors.get(name + ".weight"), tensors.get(name + ".bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise UserError(f"{path}: must hold {name}.weight [o, i] and {name}.bias [o], got something else")
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        layers.append(layer.to(device))
    fits = all(a.out_features == b.in_features for a, b in pairwise(layers))
    if not fits or layers[-1].out_features != classes:
        raise UserError(f"{path}: must have layers that fit each other and {classes} classes, got something else")
    return layers
