"""What comes from outside reaches the terminal as text: no control characters, no markup."""

from __future__ import annotations

import ast
import io
import threading
import time
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

import gradientless
from gradientless import cli, terminal
from gradientless.terminal import Console, Counter, Told, duration, plain, say

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


class TestACounter:
    """Long work is seen: a bar on a terminal, lines elsewhere."""

    def test_off_a_terminal_says_a_line_now_and_then(self, monkeypatch):
        """Also while a single part of the work takes longer."""
        lines: list[str] = []
        enough = threading.Event()
        console = Console(file=io.StringIO(), width=300)
        monkeypatch.setattr(terminal, "LINE_EVERY", 0.01)
        monkeypatch.setattr(console, "print", lambda line, **_: (lines.append(line), len(lines) > 3 and enough.set()))
        with Counter(console, "features", 1200) as counter:
            counter.reach(400)
            assert enough.wait(60)
        assert lines[-1].startswith("features    400 of 1,200  ") and lines[-1].endswith(" left")
        told = len(lines)
        time.sleep(0.1)
        assert len(lines) <= told + 1  # one that was on its way

    def test_off_a_terminal_says_what_is_worth_a_line(self):
        out = io.StringIO()
        with Counter(Console(file=out, width=300), "training", 20, done=5) as counter:
            counter.reach(10, "loss 0.5")
            assert not out.getvalue()
            counter.reach(20, "loss 0.25", tells=True)
        assert out.getvalue() == "training    20 of 20  loss 0.25\n"

    @pytest.mark.parametrize("options", [{"shown": False}, {}])
    def test_that_is_not_shown_says_nothing(self, options, monkeypatch):
        monkeypatch.setattr(terminal, "LINE_EVERY", 0.001)
        out = io.StringIO()
        with Counter(Console(file=out, quiet=not options, force_terminal=False), "x", 2, **options) as counter:
            counter.reach(1, tells=True)
            time.sleep(0.05)
        assert not out.getvalue()

    def test_on_a_terminal_is_a_bar(self):
        out = io.StringIO()
        with Counter(Console(file=out, width=300, force_terminal=True), NASTY, 20, stays=True) as counter:
            counter.reach(7, "loss 0.5", tells=True)
        assert "7/20" in out.getvalue() and "loss 0.5" in out.getvalue() and "7 of 20" not in out.getvalue()

    @pytest.mark.parametrize(("seconds", "said"), [(99.4, "99 s"), (600, "10 min"), (6100, "1.7 h")])
    def test_durations(self, seconds, said):
        assert duration(seconds) == said


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
