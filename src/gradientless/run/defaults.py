"""What a run takes that names no recipe: values by what is tuned, by which method, and by how scores are read.

The values stand in `defaults.toml`, as rules; those of the starter recipe are chosen for a frozen model's head and
would be wrong for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from gradientless.errors import UserError
from gradientless.inputs import toml
from gradientless.run.layers import LENGTHS, stack


def defaults(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run without a recipe, of which `layer` says what was given at the keyboard.

    Nothing is checked here: what is unknown fits no rule."""
    rules = toml((resources.files("gradientless") / "run" / "defaults.toml").read_text("utf-8"), "defaults")["rule"]
    found: dict[str, Any] = {}
    surface = str(_section(layer, "surface").get("name", "head"))
    optimizer = str(_section(layer, "optimizer").get("name", _usual(surface)))
    found["surface"], found["optimizer"] = {"name": surface}, {"name": optimizer}
    case = {"surface": surface, "optimizer": optimizer, "reading": None}
    for rule in rules:
        when = rule.pop("when", {})
        if "reading" in when and case["reading"] is None:
            case["reading"] = _reading(layer, surface, found)
        if all(case[key] in allowed for key, allowed in when.items()):
            found = stack(found, rule)[0]
    if {"evaluator", "noise", "rank"} & set(
        _section(layer, "optimizer")
    ):  # who says how probes are made says all of it
        for key in ("noise", "rank"):
            found["optimizer"].pop(key, None)
    if "path" in _section(layer, "data") and "task" not in layer:  # a table or folder of the user's own
        del found["task"]
    steps = layer.get("steps", found["steps"])
    if isinstance(steps, int) and not any(key in layer for key in LENGTHS if key != "steps"):
        times = 10 if surface == "head" else 5  # an evaluation of features that are kept costs next to nothing
        found["evaluate_every"] = found["checkpoint_every"] = max(1, -(-steps // times))
    return found


def _section(layer: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = layer.get(key)
    return section if isinstance(section, Mapping) else {}


def _usual(surface: str) -> str:
    """The optimizer of a surface: direct search for a head; a side network's own gradients; else MeZO."""
    return {"head": "gld", "lst": "adamw", "k_lst": "adamw", "side_lora": "adamw"}.get(surface, "mezo")


def _reading(layer: Mapping[str, Any], surface: str, found: Mapping[str, Any]) -> str:
    """How class scores are read: "head" or "prompt"."""
    from gradientless.language import backbone
    from gradientless.language.tasks import find_task

    readout = _section(layer, "surface").get("readout", "auto")
    if readout != "auto" or surface == "head":
        return "head" if readout == "head" or surface == "head" else "prompt"
    if _section(layer, "prompt"):
        return "prompt"
    try:
        family = backbone.family_of(str(layer.get("model", found["model"])))
        task = layer.get("task", None if "path" in _section(layer, "data") else found["task"])
        asked = task is not None and family in find_task(task).prompts
    except UserError:  # which the configuration's own check tells
        return "head"
    return "prompt" if asked and family != "masked" else "head"
