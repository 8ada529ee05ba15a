"""`gradientless list` and `assets`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from gradientless.cli.options import app
from gradientless.errors import UserError, unknown
from gradientless.terminal import say

KINDS = ("tasks", "models", "optimizers", "surfaces", "schedules", "recipes")


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(metavar=f"[{'|'.join(KINDS)}]", help="What to list; all of it by default.")
    ] = None,
) -> None:
    """The names that recipes and options may use.

    \b
    gradientless list
    gradientless list optimizers
    """
    if kind is not None and kind not in KINDS:
        raise unknown("list", "kind", kind, KINDS)
    for each in KINDS if kind is None else (kind,):
        rows = _names(each)
        width = max(map(len, rows))
        if kind is None:
            say(f"{each}:")
        for name, about in rows.items():
            say(f"{'' if kind else '  '}{name:<{width}}  {about}")


def _names(kind: str) -> dict[str, str]:
    """name -> one line about it."""
    if kind == "tasks":
        from gradientless.language.tasks import TASKS

        return {name: _first_line(task) + _labels(task.labels) for name, task in TASKS.items()}
    if kind == "models":
        from gradientless.language.starter import ASSETS

        models = {f"starter:{name}": asset.about for name, asset in ASSETS.items() if asset.kind == "model"}
        return {**models, "OWNER/NAME": "any model of the Hugging Face hub", "FOLDER": "a model saved by transformers"}
    if kind == "optimizers":
        from gradientless.search.optim import FIRST_ORDER, OPTIMIZERS

        first = {name: f"torch.optim.{each.type.__name__}, by gradients." for name, each in FIRST_ORDER.items()}
        own = {"FILE.py:CLASS": "your own class"}
        return {**{name: _module_line(each) for name, each in OPTIMIZERS.items()}, **first, **own}
    if kind == "surfaces":
        from gradientless.language.surfaces import SURFACES

        known = {name: _first_line(surface) for name, surface in SURFACES.items()}
        return {**known, "FILE.py:CLASS": "your own class"}
    if kind == "schedules":
        from gradientless.search.schedules import SCHEDULES

        known = {name: _first_line(schedule) for name, schedule in SCHEDULES.items()}
        return {**known, "FILE.py:FUNCTION": "your own function"}
    from gradientless.run.layers import recipes

    return {name: text.partition("\n")[0].lstrip("# ") for name, text in recipes().items()}


def _labels(labels: tuple[str, ...]) -> str:
    return f" Labels: {', '.join(labels)}." if labels else ""


def _first_line(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((thing.__doc__ or "").strip().partition("\n\n")[0].split())


def _module_line(algorithm: type) -> str:
    """What the module of an algorithm says of it."""
    return _first_line(sys.modules[algorithm.__module__])


@app.command()
def assets(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Assets to fetch now.", show_default=False)
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch all that are absent.")] = False,
) -> None:
    """The starter model and data: what is there, how large, under which licence; and fetch them.

    \b
    gradientless assets
    gradientless assets --fetch
    gradientless assets minilm
    """
    from gradientless.language import starter

    strange = [
        str(unknown("assets", "asset", name, starter.ASSETS)) for name in names or () if name not in starter.ASSETS
    ]
    if strange:
        raise UserError("\n".join(strange))
    for name in starter.ASSETS if fetch else names or ():
        starter.ensure(name)
    for status in starter.status():
        asset = status.asset
        there = (
            f"{status.size / 1e6:.0f} MB in the cache"
            if status.path
            else f"absent ({asset.size / 1e6:.0f} MB to fetch)"
        )
        say(f"{status.name:<14} {asset.about}; {asset.distribution} {asset.version}; {asset.licence}; {there}")
    say(f"cache: {starter.cache_folder()}")
