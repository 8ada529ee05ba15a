"""docs/coverage.md: every row is shown by a test that exists or by a command that there is, and stands somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest

from gradientless.cli import app
from pages import ROOT, rows

PAGE = ROOT / "docs" / "coverage.md"
ROWS = [(heading, *cells) for heading, cells in rows(PAGE)]
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


@lru_cache
def names_of(file: Path) -> frozenset[str]:
    """Tests of a file, as pytest names them: "test_x", "TestY::test_z"."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def fault(shown: str) -> str | None:
    """What is wrong with one thing that is to show a row; None when it is there."""
    if shown.startswith("tests/"):
        path, _, name = shown.partition("::")
        file = ROOT / path
        if not file.is_file():
            return f"no file {path}"
        return None if name.partition("[")[0] in names_of(file) else f"no test {name} in {path}"
    program, *arguments = shlex.split(shown)
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        return None if arguments and set(arguments) <= targets else f"no target of `{shown}`"
    if program == "gradientless":
        return None if arguments and arguments[0] in COMMANDS else f"no command `{shown}`"
    if program == "python":
        return None if arguments and (ROOT / arguments[0]).is_file() else f"no program of `{shown}`"
    return f"neither a test nor a known command: `{shown}`"


def test_rows_are_whole():
    assert len(ROWS) > 150
    assert all(len(row) == 4 and row[1] for row in ROWS)
    assert len({row[:2] for row in ROWS}) == len(ROWS)


def test_every_row_is_shown():
    faults = []
    for heading, item, _, shown in ROWS:
        things = re.findall(r"`([^`]+)`", shown)
        if "missing:" in shown or not things:
            faults.append(f"{heading} | {item} | {shown or 'missing: everything'}")
        else:
            faults += [f"{heading} | {item} | {wrong}" for wrong in map(fault, things) if wrong]
    assert not faults, "\n" + "\n".join(faults)


def test_every_row_stands_somewhere():
    for heading, item, where, _ in ROWS:
        paths = re.findall(r"`([^`]+)`", where)
        assert paths, (heading, item)
        for path in paths:
            assert (ROOT / path).exists() or (ROOT / "src" / "gradientless" / path).exists(), (heading, item, path)


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        ("tests/test_coverage.py::test_rows_are_whole", None),
        ("tests/run/test_train.py::TestARun::test_summary", None),
        ("tests/test_coverage.py::test_of_nothing", "no test test_of_nothing in tests/test_coverage.py"),
        ("tests/test_coverage.py", "no test  in tests/test_coverage.py"),
        ("tests/test_coverage.py::fault", "no test fault in tests/test_coverage.py"),
        ("tests/nowhere.py::test_x", "no file tests/nowhere.py"),
        ("make tea", "no target of `make tea`"),
        ("gradientless teach", "no command `gradientless teach`"),
        ("python nowhere.py", "no program of `python nowhere.py`"),
        ("look", "neither a test nor a known command: `look`"),
    ],
)
def test_what_is_not_there_is_found(shown, wrong):
    assert fault(shown) == wrong
