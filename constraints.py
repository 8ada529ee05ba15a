"""Which versions an environment is made of: the pinned ones, or the oldest that the metadata allows.

    python constraints.py pinned python3.10 python3.13   # constraints.txt: what pip resolves for each of these Pythons
    python constraints.py oldest                         # the lower bound of each requirement of the installed package

It runs before anything is installed, so it needs nothing but Python and, for `pinned`, a pip that knows --python.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

TORCH = "torch==2.13.0"  # held by hand: another release is another download of gigabytes for everyone
HEADER = f"""\
# The versions that the tests run with, for each Python: written by `make constraints`.
# {TORCH} is held in constraints.py; a line that serves some platforms alone does no harm on the others.
"""


def normal(name: str) -> str:
    """A package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def oldest(requirements: Iterable[str]) -> list[str]:
    """`name==lower bound` of each requirement of a package's metadata, but for those of the package itself.

    Raises ValueError where a requirement has no lower bound.
    """
    pins = []
    for requirement in requirements:
        said = requirement.partition(";")[0]
        name = re.match(r"[\w.-]+", said)
        bound = re.search(r">=\s*([\w.]+)", said)
        if name is None or (bound is None and normal(name[0]) != "gradientless"):
            raise ValueError(f"a requirement must have a lower bound, got '{requirement}'")
        if bound is not None:
            pins.append(f"{normal(name[0])}=={bound[1]}")
    return sorted(pins)


def resolved(python: str) -> dict[str, Any]:
    """pip's report of what it would install for the tests under the interpreter `python`, with nothing there yet."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--dry-run", "--ignore-installed"]
    done = subprocess.run(
        [*command, "--report", "-", "pip", "setuptools", TORCH, ".[dev]"], check=True, stdout=subprocess.PIPE
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def pinned(reports: Iterable[dict[str, Any]]) -> list[str]:
    """`name==version` of each package that the reports name; where they differ, a line for each range of Pythons."""
    found: dict[str, dict[tuple[int, ...], str]] = {}
    for report in reports:
        python = tuple(map(int, report["environment"]["python_version"].split(".")))
        for package in report["install"]:
            if "dir_info" not in package["download_info"]:  # the project itself
                version = package["metadata"]["version"].partition("+")[0]
                found.setdefault(normal(package["metadata"]["name"]), {})[python] = version
    lines = []
    for name, versions in sorted(found.items()):
        groups = [(version, list(run)) for version, run in groupby(sorted(versions), key=versions.__getitem__)]
        starts = [".".join(map(str, run[0])) for _, run in groups]
        for place, (version, _) in enumerate(groups):
            marks = [f"python_version >= '{starts[place]}'"] if place else []
            marks += [f"python_version < '{starts[place + 1]}'"] if place + 1 < len(groups) else []
            lines.append(f"{name}=={version}" + ("; " + " and ".join(marks) if marks else ""))
    return lines


def main(kind: str, *pythons: str) -> None:
    if kind == "oldest":
        print("\n".join(oldest(importlib.metadata.requires("gradientless") or [])))
    else:
        print(HEADER + "\n".join(pinned(map(resolved, pythons))))


if __name__ == "__main__":
    main(*sys.argv[1:])
