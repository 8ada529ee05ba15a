"""What comes from outside reaches the terminal as text: no control characters, no markup."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

import gradientless
from gradientless import cli
from gradientless.terminal import Console, Told, plain, say

NASTY = "a\x1b[31mred\x1b]0;title\x07 [/red] [bold]x \x9b2J \u202e :smile:\r"
SHOWN = "a\\x1b[31mred\\x1b]0;title\\x07 [/red] [bold]x \\x9b2J \\u202e :smile:\\r"


def test_plain():
    assert plain(NASTY) == SHOWN
    assert plain("two\nlines\tand é 日本 😀") == "two\nlines\tand é 日本 😀"
    assert plain("\udcff.csv") == "\\udcff.csv"


def test_say(capsys):
    say(NASTY)
    say(NASTY, error=True)
    assert capsys.readouterr() == (SHOWN + "\n", SHOWN + "\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_console(terminal):
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=terminal, color_system=None)
    table = Table(title=NASTY, box=None)
    table.add_column(NASTY)
    table.add_row(NASTY)
    console.print(NASTY, highlight=False)
    console.print(table)
    written = out.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "")  # rich's own
    assert written.count(SHOWN) == 4 and not set(written) & set("\x1b\x07\x9b\u202e\r")


def test_a_progress_bar():
    out = io.StringIO()
    with Progress(Told(), console=Console(file=out, width=300)) as bar:
        bar.add_task(NASTY)
    written = out.getvalue()
    assert SHOWN.partition("\\x07")[0] in written and "[bold]x \\x9b2J \\u202e :smile:" in written
    assert not set(written) & set("\x1b\x07\x9b\u202e\r")


def test_an_error_is_escaped(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d.csv").write_text("\x1b[31mtext,[/red]\na,b\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--data", "d.csv", "--out", "run"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "\\x1b[31mtext, [/red]" in error and "\x1b" not in error


def test_nobody_else_prints():
    """Modules print by `say` and by this console alone."""
    root = Path(gradientless.__file__).parent
    for path in root.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert "json" in ast.unparse(node), f"{path}:{node.lineno} prints"  # which escapes by itself
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                assert "Console" not in [name.name for name in node.names], f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module == "rich.progress":
                assert "TextColumn" not in [name.name for name in node.names], f"{path}:{node.lineno}"
