"""What stands beside a saved model: what it was tuned as, and a head of ours.

At the top of a saved folder lies what plain transformers opens, with all that was tuned. A model that something of ours
belongs to (a head of ours, a side network) lies in `body/`, so that no library takes the folder for a model with a
classifier of its own, which it would fill with random weights.

The note also holds checksums of all other files of the folder, since safetensors and JSON have none of their own: with
one digit fallen over, they would be another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gradientless.errors import UserError, brief, one_of
from gradientless.schema import POSITIVE, Maybe, Schema, fits, read_sealed, sealed, sha256_of

NOTE = "gradientless.json"
HEAD_FILE = "head.safetensors"
BODY = "body"
ADAPTER_FILE = "adapter_model.safetensors"  # as peft calls it
FORMAT = 1
OWN = "own"  # the readout of a model that a class of the user's own saved without a note
CLASS = "class"  # the key of the class of the user's own that opens the model

FILES = "files"
_SUMS = {FILES: Maybe({str: str})}  # name -> sha256; early ones have none
_READ = {
    **_SUMS,
    "labels": [str],
    "max_length": POSITIVE,
    "dropout": float,
    "dtype": str,
}  # of a model that reads texts
PROMPT = {"text": str, "words": Maybe({str: str}), "score": Maybe(str), "answer": Maybe(str)}
_SHAPES: dict[str, Schema] = {
    "head": {**_READ, "head": str, "pooling": str, "activation": str},
    "prompt": {**_READ, "prompt": PROMPT, "truncation": str, "padding": str, "max_new_tokens": Maybe(POSITIVE)},
    "tokens": _READ,
    "classifier": _READ,
    "adapter": {**_SUMS, "labels": [str], "options": dict},
    OWN: {**_SUMS, "labels": [str]},
}


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """After all other files of the folder, whose checksums it takes, where `note` has none."""
    values = json.loads(json.dumps({"format": FORMAT, FILES: _sums(folder), **note}))
    text = json.dumps(sealed(values), indent=2, ensure_ascii=False)
    (folder / NOTE).write_text(text + "\n", encoding="utf-8")


def _sums(folder: Path) -> dict[str, str]:
    """Of all files but the note itself, and what is for people, such as a model card."""
    read = (path for path in folder.rglob("*") if path.is_file() and path != folder / NOTE and path.suffix != ".md")
    files = sorted(read)
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def changed(folder: Path) -> list[str]:
    """The files of a saved model that are not as they were saved, or gone. Raises `UserError` as `read_note` does."""
    stated = read_note(folder).get(FILES, {})
    found = _sums(Path(folder)) if stated else {}
    return [name for name, checksum in stated.items() if found.get(name) != checksum]


ROWS = "rows"
_OF_ROWS = {"task": str, "text_column": str, "text_pair_column": str, "label_column": str, "pairs": bool}


def note_rows(folder: Path, rows: Mapping[str, Any]) -> None:
    """Add to the note in `folder` how the rows were read that the model was tuned on: "task", where a registered one
    read them, else "text_column", "label_column" and perhaps "text_pair_column"; and "pairs", whether they have two
    texts."""
    _note_more(folder, ROWS, {key: value for key, value in rows.items() if value is not None})


def _note_more(folder: Path, key: str, values: Mapping[str, Any]) -> None:
    write_note(folder, {**_to_write_again(folder), key: dict(values)})


def _to_write_again(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in read_note(folder).items() if key != "format"}


def note_files(folder: Path) -> None:
    """Take the files of `folder` as they are now for those that were saved."""
    write_note(folder, {key: value for key, value in _to_write_again(folder).items() if key != FILES})


MADE = "made"


def note_made(folder: Path, made: Mapping[str, Any]) -> None:
    """Add to the note in `folder` how the model was made, JSON-able."""
    _note_more(folder, MADE, made)


def made_of(folder: Path, schema: Schema) -> dict[str, Any]:
    """What `note_made` noted; empty where nothing was. Raises `UserError` for what is not as `schema` says."""
    found = read_note(folder).get(MADE, {})
    fits(f"{Path(folder) / NOTE}: {MADE}", found, schema)
    return dict(found)


def note_class(folder: Path, name: str, sha256: str | None, labels: Sequence[str]) -> None:
    """Add to the note in `folder`, which is made where there is none, the class of the user's own that saved the model,
    and the checksum of its file."""
    note = {"surface": OWN, "readout": OWN, "labels": list(labels)}
    if (folder / NOTE).exists():
        note = _to_write_again(folder)
        note.pop(FILES, None)  # the class may have changed files that a surface of ours had saved for it
    write_note(folder, {**note, CLASS: {"name": name, **({} if sha256 is None else {"sha256": sha256})}})


def class_of(folder: Path) -> dict[str, str]:
    """What `note_class` noted: "name", and perhaps "sha256"; empty where nothing was."""
    return dict(read_note(folder).get(CLASS, {}))


def rows_of(folder: Path) -> dict[str, Any]:
    """What `note_rows` noted; empty where nothing was. Raises `UserError` for values of other types."""
    found = read_note(folder).get(ROWS, {})
    for name, value in found.items() if isinstance(found, dict) else ((ROWS, found),):
        if not isinstance(value, _OF_ROWS.get(name, object) if isinstance(found, dict) else dict):
            raise UserError(f"{Path(folder) / NOTE}: must state {name} of its rows, got {value!r:.40}")
    return dict(found)


def read_note(folder: Path, surface: str | None = None) -> dict[str, Any]:
    """What `write_note` wrote, its types checked. surface: the one that it must be of.

    Raises `UserError` for a folder without a note, a damaged one, and one of another format or surface.
    """
    path = Path(folder) / NOTE
    if not path.exists():
        raise UserError(f"{folder}: must hold a saved model with {NOTE}, got none")
    note = read_sealed(path, "model")
    if note.get("format") != FORMAT:
        raise UserError(f"{path}: must be of format {FORMAT}, got {brief(note.get('format'))}")
    if surface is not None and note.get("surface") != surface:
        raise UserError(f"{path}: must be of a model of surface '{surface}', got {brief(note.get('surface'))}")
    readout = note.get("readout", "head")
    one_of(f"{path}", "readout", readout, _SHAPES)
    fits(f"{path}", note, {**_SHAPES[readout], CLASS: Maybe({"name": str, "sha256": Maybe(str)})})
    return note


def body_of(folder: Path) -> Path:
    """Where the model lies that something of ours in `folder` belongs to; early versions kept it at the top."""
    body = Path(folder) / BODY
    return body if body.is_dir() else Path(folder)


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
