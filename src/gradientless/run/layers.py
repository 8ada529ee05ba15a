"""Where the values of a configuration come from: recipes, flags and `key=value` overrides, one layer over another.

Layers, later ones win: the defaults below, the recipe (and the recipe that it `extends`), then flags and overrides
together (both speak for the person at the keyboard; a key given by both with two values is an error). A layer is read
as one intention, therefore

- data.path without task means "my own table": the task of a lower layer falls away, unless the path is a folder, which
  is the task's; task without data.path likewise drops a lower layer's data section;
- any of steps, forward_passes and epochs replaces those of a lower layer;
- another optimizer.name drops the lower layers' options of the optimizer, and of its tensors.

A list is replaced as a whole, but for stages: `stages.2.steps` and `stages.NAME.steps` are keys of a stage.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from gradientless.errors import UserError, brief, unknown
from gradientless.inputs import is_file, read_text, toml

LENGTHS = ("steps", "forward_passes", "epochs")  # the shortest of those that are given ends a run


def recipes() -> dict[str, str]:
    """The built-in recipes: name -> TOML text."""
    folder = resources.files("gradientless") / "recipes"
    texts = {
        file.name.removesuffix(".toml"): file.read_text("utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
    return dict(sorted(texts.items()))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The recipe's values, with those of the recipe that it `extends` beneath them. Raises UserError."""
    name, above = str(recipe), dict[str, dict[str, Any]]()  # the recipes by where they stand, the extending one first
    while True:
        file = Path(name)
        values = toml(_text_of(name), f"recipe: '{name}'")
        above[str(file.resolve()) if is_file(file) else name] = values
        base = values.pop("extends", None)
        if base is None:
            break
        beside = file.parent / str(base)
        below = str(beside.resolve()) if is_file(file) and is_file(beside) else base
        if not isinstance(base, str) or below in above:
            raise UserError(f"recipe: '{name}' must extend another recipe by name or file, got {shown(base)}")
        name = below
    *others, found = above.values()
    for values in reversed(others):
        found, _ = stack(found, values)
    return found


def _text_of(recipe: str) -> str:
    """The TOML text of a file or of a built-in recipe."""
    if is_file(recipe):
        return read_text(Path(recipe), "recipe")
    if recipe in recipes():
        return recipes()[recipe]
    if recipe.endswith(".toml") or len(Path(recipe).parts) > 1:
        raise UserError(f"recipe: file not found, got '{recipe}'. Built-in recipes: {', '.join(recipes())}")
    raise unknown("recipe", "recipe", recipe, recipes())


def parse_value(text: str) -> Any:
    """A value of the command line: TOML if it is TOML, a number as Python writes it (.5), else text."""
    try:
        parsed = toml(f"value = {text}", "override")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except UserError:  # so it is plain text, such as a path or a name
        if re.fullmatch(r"[+-]?(\d+\.?|\d*\.\d+)([eE][+-]?\d+)?", text.strip()):
            return float(text)
    return text


DEFAULT = object()  # "take the recipe's value back"


def keyboard_layer(overrides: Iterable[str], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What flags and `key=value` overrides say together, and a line for each that cannot stand."""
    layer: dict[str, Any] = {}
    lines: list[str] = []
    for key, value in flags.items():
        if value is not None:
            _put(layer, key.split("."), value, lines)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            lines.append(f"override: must be key=value, got '{override}'")
            continue
        _put(layer, key.split("."), DEFAULT if text.strip() == "default" else parse_value(text), lines)
    return layer, lines


def _put(layer: dict[str, Any], path: Sequence[str], value: Any, lines: list[str]) -> None:
    """Set the value at `path`, a table key by key; a line where another value stands there already."""
    *parents, last = path
    for depth, parent in enumerate(parents, 1):
        below = layer.setdefault(parent, {})
        if not isinstance(below, dict):
            beside = ".".join(path[:depth])
            lines.append(f"{'.'.join(path)}: must not stand beside a value of '{beside}' itself, got {shown(value)}")
            return
        layer = below
    there = layer.setdefault(last, {} if isinstance(value, dict) else value)
    if isinstance(value, dict) and isinstance(there, dict):
        for key, each in value.items():
            told: list[str] = []
            _put(there, [key], each, told)
            lines += [f"{'.'.join(path)}.{line}" for line in told]
    elif repr(there) != repr(value):  # by what they look like: 1 is not true, and nan is nan
        lines.append(f"{'.'.join(path)}: must be given once, got {shown(there)} and {shown(value)}")


def stack(below: dict[str, Any], above: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`above` over `below` by the rules of this module's docstring, and a line for what fell away unasked."""
    below = copy.deepcopy(below)
    notes: list[str] = []

    def drop(key: str, reason: str) -> None:
        if key in below:
            del below[key]
            notes.append(f"{key}: the recipe's value does not apply, {reason}")

    data = _table(above, "data")
    if "path" in data and "task" not in above and not _is_folder(data["path"]):
        below.pop("task", None)  # no note: whoever names their own data means it
    if "task" in above and "path" not in data:
        drop("data", "task was given")
    lengths = [key for key in LENGTHS if above.get(key, DEFAULT) is not DEFAULT]
    for key in LENGTHS if lengths else ():
        if key not in above:
            drop(key, f"{' and '.join(lengths)} were given")
    name, old = _table(above, "optimizer").get("name"), _table(below, "optimizer")
    if name is not None and name != old.get("name", "gld"):
        if set(old) - {"name"}:
            notes.append(f"optimizer: the recipe's options of {old.get('name', 'gld')} do not apply to {name}")
        below.pop("optimizer", None)
        drop("tensors", f"the optimizer is {name}")
    return _merge(below, above), notes


def settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a layer and their values, as they are given on a command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value).lower() if isinstance(value, bool) else str(value)


def _is_folder(path: Any) -> bool:
    return isinstance(path, (str, Path)) and Path(path).expanduser().is_dir()


def _table(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A section, or an empty one where the section is missing or no table."""
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if value is DEFAULT:
            merged.pop(key, None)
        elif key == "stages" and isinstance(value, dict):
            merged[key] = _merge_stages(merged.get(key), value)
        elif isinstance(value, dict):
            old = merged.get(key)
            merged[key] = _merge(old if isinstance(old, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _merge_stages(below: Any, above: dict[str, Any]) -> list[Any]:
    """The recipe's stages with `above` (number or name of a stage -> values) over them."""
    stages = list(below) if isinstance(below, (list, tuple)) else []
    for key, value in above.items():
        names = [stage.get("name") for stage in stages]
        number = int(key) if key.isdecimal() else names.index(key) + 1 if key in names else 0
        if not 1 <= number <= len(stages):
            known = [str(i) for i in range(1, len(stages) + 1)] + [name for name in names if isinstance(name, str)]
            raise unknown("stages", "stage", key, known)
        if not isinstance(value, dict):
            raise UserError(f"stages.{key}: must be a table, got {shown(value)}")
        stages[number - 1] = stack(stages[number - 1], value)[0]
    return stages


def shown(value: Any) -> str:
    if value is DEFAULT:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing" if value is None else brief(value)
