"""The documentation is true: recipes load and fit a head, marked Python runs, tables name every option and default.

A block ```toml is a recipe. A block ```python runnable runs in a namespace of its own; ```python NAME.py is a file that
lies beside the page's recipes. Other blocks are only shown.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gradientless.language.surfaces import SURFACES, options_of
from gradientless.run.assemble import make_optimizer
from gradientless.run.config import (
    DEFAULT_STEPS,
    DEFAULT_TASK,
    DataConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
    ScheduleConfig,
    SurfaceConfig,
    TensorConfig,
    optimizer_options,
)
from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS
from pages import ROOT, Block, blocks, rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCKS = [block for page in PAGES for block in blocks(page)]
RECIPES = [block for block in BLOCKS if block.language == "toml"]
PROGRAMS = [block for block in BLOCKS if block.language == "python" and block.note == "runnable"]
FILES = [block for block in BLOCKS if block.language == "python" and block.note.endswith(".py")]
HEADS = {
    "two-layer": ("head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias"),
    "library": ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"),
}


def place(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder with the files that the pages show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in FILES:
        (tmp_path / file.note).write_text(file.text, "utf-8")
        monkeypatch.delitem(sys.modules, file.note.removesuffix(".py"), raising=False)
    return tmp_path


def test_there_is_something_to_run():
    assert len(RECIPES) >= 10 and len(PROGRAMS) >= 5 and FILES


@pytest.mark.parametrize("block", RECIPES, ids=place)
def test_recipes_load_and_make_an_optimizer(block, folder):
    (folder / "recipe.toml").write_text(block.text, "utf-8")
    config = RunConfig.load("recipe.toml", code=None)
    assert config.notes == ()
    names = HEADS["library" if config.surface.head == "library" else "two-layer"]
    shapes = ((6, 6), (6,), (2, 6), (2,))
    tensors = {name: torch.zeros(shape, requires_grad=True) for name, shape in zip(names, shapes, strict=True)}
    make_optimizer(config, SimpleNamespace(trainable=lambda: tensors, width=6))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", PROGRAMS, ids=place)
def test_marked_programs_run(block, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(block.text, place(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        other = page if not file else page.parent / file
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


# --- options.md against the code -----------------------------------------------------------------------------------


def documented() -> dict[str, dict[str, object]]:
    """heading -> {key: default} of the tables of options.md whose first column is a key."""
    found: dict[str, dict[str, object]] = {}
    for heading, cells in rows(ROOT / "docs" / "options.md"):
        if len(cells) == 3 and (match := re.fullmatch(r"`([\w.]+)`( \*)?", cells[0])):
            value = None if cells[1] in ("-", "required") else tomllib.loads(f"x = {cells[1].strip('`')}")["x"]
            found.setdefault(heading.strip("`"), {})[match[1]] = value
    return found


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_every_key_of_a_recipe_is_documented_with_its_default():
    sections = {
        "data": DataConfig,
        "surface": SurfaceConfig,
        "prompt": PromptConfig,
        "schedule": ScheduleConfig,
        "tensors": TensorConfig,
    }
    wanted = {
        key: field.get_default(call_default_factory=True) for key, field in RunConfig.model_fields.items()
        if key not in (*sections, "optimizer", "stages")
    }  # fmt: skip
    wanted |= {"task": DEFAULT_TASK, "steps": DEFAULT_STEPS}
    for section, model in sections.items():
        fields = {key: None if field.is_required() else field.default for key, field in model.model_fields.items()}
        wanted |= {f"{section}.{key}": default for key, default in fields.items()}
    tables = documented()
    headings = ("Keys of a recipe", "Data", "Surface", "Prompt", "Schedule", "Tensors")
    assert {key: value for heading in headings for key, value in tables[heading].items()} == wanted
    assert OptimizerConfig.model_fields["name"].default == "gld"


def test_options_of_surfaces_are_documented_with_the_surfaces_and_defaults():
    """A key of some surfaces alone ends in "(`surface`, `surface`: default; …)"; a recipe can set what they take."""
    told: dict[str, dict[str, str]] = {}
    for heading, cells in rows(ROOT / "docs" / "options.md"):
        if heading == "Surface" and len(cells) == 3 and (found := re.search(r" \(((`\w+`(, |: ))+.*)\)$", cells[2])):
            told[cells[0].strip("`").removeprefix("surface.")] = {
                name: default.strip("`")
                for part in found[1].split("; ")
                for names, _, default in [part.rpartition(": ")]
                for name in re.findall(r"`(\w+)`", names)
            }
    for surface, kind in SURFACES.items():
        given = {"seed", "device", "dtype", "max_length", "prompt", "padding"}  # by other keys of a run, or not
        own = {name: p.default for name, p in options_of(kind).items() if name not in given}
        assert set(own) <= set(SurfaceConfig.model_fields), surface
        for name, default in own.items():
            if SurfaceConfig.model_fields[name].default is None and name not in ("hidden", "start"):
                plainly = str(default).lower() if isinstance(default, bool) else str(default)
                shown = {inspect.Parameter.empty: "required", None: "all"}.get(default, plainly)
                assert told[name][surface] in (shown, f"{shown} of the blocks"), (surface, name)
    for name, surfaces in told.items():
        assert set(surfaces) == {s for s, kind in SURFACES.items() if name in options_of(kind)}, name


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FIRST_ORDER])
def test_every_option_of_an_optimizer_is_documented_with_its_default(name):
    wanted = {key: plain(value) for key, value in optimizer_options(name)[0].items()}
    assert documented()[name] == wanted


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_star_means_that_the_option_may_differ_by_tensor(name):
    options = optimizer_options(name)[0]
    group = OPTIMIZERS[name]([("w", torch.zeros(3, requires_grad=True))]).defaults
    stars = {
        cells[0].split("`")[1]
        for heading, cells in rows(ROOT / "docs" / "options.md")
        if heading == f"`{name}`" and cells[0].endswith("*")
    }
    first_only = {"radius"} if name in ("gldsearch", "stp", "smtp") else set()  # one radius for the whole vector
    mine = {"radius" if key == "lr" and "radius" in options else key for key in group}
    assert stars == mine & set(options) - first_only
