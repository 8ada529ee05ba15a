"""What people see: every line that reaches the terminal is written here.

Labels, column names, file names, texts and values of configurations come from outside. Control characters in them
(colours, moves of the cursor, titles of windows, text that runs backwards) are shown as escapes, and what looks like
rich's markup is text.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY = 30.0  # seconds between the lines of a `Counter` off a terminal

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


class Counter:
    """Counts up to a total while long work is done: a bar on a terminal; elsewhere a line every half minute, also while
    a single part of the work takes longer than that, so that a log shows that it goes on.

    stays: whether the bar is left to be seen when the work has ended. shown: False counts without a word.
    """

    def __init__(
        self,
        console: rich.console.Console,
        title: str,
        total: int,
        done: int = 0,
        stays: bool = False,
        shown: bool = True,
    ) -> None:
        self._console, self._title, self._total, self._first, self._done = console, title, total, done, done
        self._note, self._begin, self._ended = "", 0.0, threading.Event()
        self._bar: Progress | None = None
        self._shown = shown and not console.quiet
        if self._shown and console.is_terminal:
            columns = (Told(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), Told("{task.fields[note]}"))
            self._bar = Progress(*columns, console=console, transient=not stays)

    def __enter__(self) -> Counter:
        self._begin = time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._done, note="")
            self._bar.start()
        elif self._shown:
            threading.Thread(target=self._say_often, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def reach(self, done: int, note: str = "", tells: bool = False) -> None:
        """So much is done. note: what else is shown; tells: whether it is worth a line of its own."""
        self._done, self._note = done, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif tells and self._shown:
            self._say()

    def advance(self, done: int) -> None:
        self.reach(self._done + done)

    def _say_often(self) -> None:
        while not self._ended.wait(LINE_EVERY):
            self._say()

    def _say(self) -> None:
        line = f"{self._title:<11} {self._done:,} of {self._total:,}"
        if self._note:
            line += f"  {self._note}"
        if self._first < self._done < self._total:
            took = (time.perf_counter() - self._begin) / (self._done - self._first)
            line += f"  {duration(took * (self._total - self._done))} left"
        self._console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as people say it."""
    for unit, name in ((1, "s"), (60, "min")):
        if seconds < 100 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"
