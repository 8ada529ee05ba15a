"""The model card of an exported folder: README.md, with the header that the hub reads.

Names of labels, prompts, columns and files come from outside: in the header they are quoted texts of YAML, below it
spans of code, in which neither Markdown nor HTML means anything. No path of the machine stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradientless.inputs import read_text, toml
from gradientless.language import backbone
from gradientless.language.surfaces import Surface
from gradientless.language.surfaces.opening import SAMPLE, Opening, prompt_of
from gradientless.language.tasks import TASKS
from gradientless.run.report import SHARES, percent
from gradientless.run.runfolder import RunFolder
from gradientless.run.sealed import require_toml
from gradientless.schema import COUNT, Maybe, Nullable, read_json

CARD = "README.md"
MADE = {  # what is noted of a run in the folder that was exported from it
    "base": Maybe(Nullable(str)),
    "unchanged": Maybe(bool),
    **dict.fromkeys(("model", "data", "surface", "method", "version", "seed"), Maybe(str)),
    **dict.fromkeys(("task", "text_column", "label_column"), Maybe(str)),
    **dict.fromkeys(("steps", "model_step", "forward_passes", "chosen_among"), Maybe(COUNT)),
    **dict.fromkeys(("metrics", "test"), Maybe({str: Nullable(float)})),
    "largest": Maybe(float),
}
FIGURES = ("accuracy", "f1", "mcc", "balanced_accuracy", "loss")


def made_by(folder: RunFolder) -> dict[str, Any]:
    """How the run in `folder` made its model, as far as its files say. Nothing that they name is run."""
    require_toml(folder.config)
    config = toml(read_text(folder.config, "run"), "run")
    data = config.get("data", {})
    methods = [_method(stage) for stage in config.get("stages") or (config,)]
    model = str(config.get("model", ""))
    made: dict[str, Any] = {
        "model": _named(model),
        "surface": ", then ".join(surface for surface, _ in methods),
        "method": ", then ".join(method for _, method in methods),
        "seed": str(config.get("seed", 0)),
    }
    if model.startswith(backbone.STARTER):  # which is the same from everywhere
        made["base"] = backbone.hub_name(model)
    if folder.environment.exists():
        versions = read_json(folder.environment, "run", {"versions": {str: str}})["versions"]
        if "gradientless" in versions:
            made["version"] = versions["gradientless"]
    if "task" in config:
        made["task"] = _named(config["task"])
    made |= {key: data[key] for key in ("text_column", "label_column") if key in data and "task" not in config}
    if "path" in data:
        made["data"] = _named(data["path"])
    if not folder.summary.exists():
        return made
    summary = folder.read_summary()
    made |= {key: summary[key] for key in ("steps", "model_step", "forward_passes", "chosen_among") if key in summary}
    for key in ("metrics", "test"):
        found = {name: value for name, value in summary.get(key, {}).items() if name in FIGURES}
        if found:
            made[key] = found
    if summary.get("majority"):
        made["largest"] = summary["majority"]["share"]
    return made


def _method(config: Mapping[str, Any]) -> tuple[str, str]:
    optimizer = config.get("optimizer", {})
    told = [
        f"{key} {value}" for key, value in optimizer.items() if key != "name" and isinstance(value, (int, float, str))
    ]
    name = _named(str(optimizer.get("name", "")))
    return str(config.get("surface", {}).get("name", "")), f"{name} ({', '.join(told)})" if told else name


def _named(place: str) -> str:
    """The last part of a path, which says nothing of the machine."""
    return Path(place.replace("\\", "/")).name if "/" in place or "\\" in place else place


def card(surface: Surface, opening: Opening, made: Mapping[str, Any], asked: str) -> str:
    """The text of README.md. made: of `made_by`, with "base", the name of the base model on the hub, where it has
    one. asked: what `gradientless predict` is given behind the folder."""
    return "".join(f"{line}\n" for line in [*_header(surface, opening, made), *_body(surface, opening, made, asked)])


def _header(surface: Surface, opening: Opening, made: Mapping[str, Any]) -> Iterator[str]:
    yield "---"
    yield f"library_name: {opening.library}"
    if opening.pipeline is not None:
        yield f"pipeline_tag: {opening.pipeline}"
    if made.get("base"):
        yield f"base_model: {quoted(made['base'])}"
    yield "tags:"
    for tag in ("gradientless", *(("text-classification",) if surface.labels else ())):
        yield f"- {tag}"
    figures = [(split, key, value) for split, key, value in _figures(made) if key in ("accuracy", "f1")]
    if figures:
        yield "model-index:"
        yield f"- name: {quoted('tuned ' + (made.get('model') or 'model'))}"
        yield "  results:"
        for split in dict.fromkeys(split for split, _, _ in figures):
            yield "  - task:"
            yield f"      type: {'text-classification' if surface.labels else 'text-generation'}"
            yield "    dataset:"
            yield f"      name: {quoted(_data(made))}"
            yield f"      type: {quoted(made['task'] if made.get('task') in TASKS else 'own')}"
            yield f"      split: {split}"
            yield "    metrics:"
            for each, key, value in figures:
                if each == split:
                    yield f"    - type: {key}"
                    yield f"      value: {value:.4f}"
    yield "---"


def _figures(made: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for split, key in (("validation", "metrics"), ("test", "test")):
        found = made.get(key, {})
        for name in FIGURES:
            if found.get(name) is not None:
                yield split, name, found[name]


def _data(made: Mapping[str, Any]) -> str:
    return str(made.get("task") or made.get("data") or "rows of its maker")


def _body(surface: Surface, opening: Opening, made: Mapping[str, Any], asked: str) -> Iterator[str]:
    base = made.get("base") or made.get("model")
    yield ""
    title = f"{code_span(base)}, tuned" if base else "A tuned model"
    yield f"# {title} to classify texts" if surface.labels else f"# {title}"
    yield ""
    yield from _open_lines(opening, asked)
    prompt = prompt_of(surface)
    yield ""
    yield "## What it does"
    yield ""
    yield f"- Data: {code_span(_data(made))}" + (
        f", columns {code_span(made['text_column'])} and {code_span(made.get('label_column', 'label'))}"
        if "text_column" in made
        else ""
    )
    if surface.labels:
        yield f"- Labels: {', '.join(map(code_span, surface.labels))}"
    if prompt is not None:
        yield f"- Prompt: {code_span(prompt.text)}"
        for label, word in prompt.words.items():
            yield f"- Word of {code_span(label)}: {code_span(word)}"
    if hasattr(surface, "max_length"):  # which a class of the user's own may do without
        yield f"- Longest text: {surface.max_length} tokens; of a longer one the rest is not read."
    yield ""
    yield "## How well"
    yield ""
    figures = list(_figures(made))
    if figures:
        yield "| rows | figure | value |"
        yield "|---|---|---:|"
        for split, key, value in figures:
            shown = percent(value) if key in SHARES else f"{value:.4f}"
            yield f"| {split} | {key.replace('_', ' ')} | {shown} |"
        if "largest" in made:
            yield f"| validation | share of the largest class | {percent(made['largest'])} |"
        yield ""
        if made.get("chosen_among", 1) > 1:
            yield (
                f"The validation rows also chose the weights: those of step {made.get('model_step', 0):,}, the best of "
                f"{made['chosen_among']} evaluations."
            )
        if "test" in made:
            yield "The test rows chose nothing."
    else:
        yield "Not known: no figures came with the model."
    yield ""
    yield "## How it was made"
    yield ""
    if made.get("base"):
        yield f"- Base model: {code_span(made['base'])}, on the hub"
    elif made.get("model"):
        yield f"- Base model: {code_span(made['model'])}, not on the hub as it stands; all of it that is needed is here"
    for name, key in (("Tuned", "surface"), ("Method", "method"), ("Seed", "seed")):
        if made.get(key):
            yield f"- {name}: {code_span(made[key])}"
    for name, key in (("Steps", "steps"), ("Forward passes", "forward_passes")):
        if key in made:
            yield f"- {name}: {made[key]:,}"
    if "version" in made:
        yield f"- Package: gradientless {code_span(made['version'])}"


def _open_lines(opening: Opening, asked: str) -> Iterator[str]:
    """How to open the folder, as Markdown."""
    yield opening.sentence
    if opening.code is not None:
        yield ""
        yield "```python"
        yield opening.code.rstrip("\n")
        yield "```"
    yield ""
    yield "With the package gradientless:"
    yield ""
    yield "```sh"
    yield f"gradientless predict . {asked}"
    yield "```"


def asked_with(surface: Surface, pairs: bool) -> str:
    """What `gradientless predict` is given behind the folder."""
    if not surface.labels:
        return "--file rows.jsonl"
    return f"'{SAMPLE}'" + (" 'its second text'" if pairs else "")


def code_span(text: str) -> str:
    """A text as Markdown's code, in one line."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest or shown != shown.strip() or not shown else f"{fence}{shown}{fence}"


def quoted(text: str) -> str:
    """A text as YAML's, in double quotes and one line."""
    return '"' + "".join(map(_in_yaml, text)) + '"'


def _in_yaml(each: str) -> str:
    if each in '"\\':
        return "\\" + each
    if each.isprintable():
        return each
    code = ord(each)
    if 0xD800 <= code < 0xE000:  # half of a character, which YAML has no word for
        return "\ufffd"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
