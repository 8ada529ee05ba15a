"""What the repository promises beside its code: licence, commands, README, changelog, the published experiment."""

from __future__ import annotations

import re
import sys

import pytest

import gradientless
from pages import ROOT, blocks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_the_licence_is_apache():
    assert tomllib.loads(text("pyproject.toml"))["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text("LICENSE") and "Version 2.0, January 2004" in text("LICENSE")


def test_the_ci_script_runs_tests_and_linters():
    assert {"make test", "make check"} <= set(text(".ci/run").split("\n"))
    check = text("Makefile").partition("\ncheck:")[2].partition("\n\n")[0]
    assert all(tool in check for tool in ("ruff check", "ruff format --check", "mypy"))


def test_the_changelog_knows_this_version():
    assert re.search(rf"^## \[?{re.escape(gradientless.__version__)}\b", text("CHANGELOG.md"), re.MULTILINE)
    assert tomllib.loads(text("pyproject.toml"))["project"]["version"] == gradientless.__version__


@pytest.mark.parametrize(
    ("what", "pattern"),
    {
        "what it is": r"\A# gradientless\n+\w",
        "for whom": r"\bFor (people|everyone|those)\b|^#+ .*[Ff]or whom",
        "the two pip lines": r"^(\$ )?\S*(pip|python -m pip) install",
        "the command to train": r"^(\$ )?gradientless train",
        "the command to predict": r"^(\$ )?gradientless predict",
        "make": r"make demo",
        "a worked example, as a run prints it": r"^accuracy +\d\d\.\d\d%",
        "what is there": r"^#+ .*[Ww]hat is there",
        "what is not yet": r"^#+ .*[Nn]ot yet",
    }.items(),
)
def test_the_readme_says(what, pattern):
    assert re.search(pattern, text("README.md"), re.MULTILINE), what


def test_no_line_of_code_in_the_readme_is_long():
    long = [line for block in blocks(ROOT / "README.md") for line in block.text.split("\n") if len(line) > 100]
    assert not long


def test_the_readme_has_a_loop_that_runs():
    programs = [block for block in blocks(ROOT / "README.md") if (block.language, block.note) == ("python", "runnable")]
    assert any(".step(" in block.text and "gradientless" in block.text for block in programs)


def test_the_table_has_the_methods_steps_and_seeds():
    table = tomllib.loads(text("experiments/thesis_table.toml"))
    assert len(set(table["seeds"])) == 3
    found = {
        name: (method["set"]["optimizer.name"], method["steps"], method["set"]["batch_size"])
        for name, method in table["methods"].items()
    }
    assert found == {
        "AdamW, batch 64": ("adamw", 80_000, 64),
        "GLD, batch 64": ("gld", 80_000, 64),
        "GLD*, batch 64": ("gld", 80_000, 64),
        "GLD, batch 256": ("gld", 40_000, 256),
        "GLD, batch 1,024": ("gld", 20_000, 1024),
    }
