"""What people see: every line that reaches the terminal is written here.

Labels, column names, file names, texts and values of configurations come from outside. Control characters in them
(colours, moves of the cursor, titles of windows, text that runs backwards) are shown as escapes, and what looks like
rich's markup is text.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# All control characters but the tab and the line feed; what turns the direction of text; halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with its control characters as escapes, such as \\x1b."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(line: object, error: bool = False) -> None:
    """Print a line on standard output, or (error) on standard error."""
    print(plain(str(line)), file=sys.stderr if error else sys.stdout)


def say_on_stderr(line: str) -> None:
    """`say` for those who are given a function that says."""
    say(line, error=True)


class Console(rich.console.Console):
    """rich's console, to which strings are text: no markup, no emoji codes, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Every string that is printed, alone or in a table, passes here."""
        return super().render_str(plain(text), **options)


class Told(TextColumn):
    """A column of a progress bar that shows a text."""

    def __init__(self, text_format: str = "{task.description}") -> None:
        super().__init__(text_format, markup=False)

    def render(self, task: Any) -> Text:
        shown = super().render(task)
        shown.plain = plain(shown.plain)
        return shown


class _Bar(Progress):
    def stop(self) -> None:
        """End the bar. One that is not shown ends without a word; rich before 15 printed an empty line."""
        if not self.disable:
            super().stop()


def counting_bar(console: Console, shown: bool = True) -> Progress:
    """A bar that counts up to a total and says how long that takes: on terminals alone, and gone when it ends."""
    columns = (Told(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return _Bar(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
