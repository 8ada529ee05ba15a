"""What the tests of the documentation read from a markdown page: its fenced blocks and its tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its first line, its text, and the line where it starts."""

    page: str
    line: int
    language: str
    note: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    opened: tuple[int, str, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text("utf-8").split("\n"), 1):
        if opened is None and (match := re.fullmatch(r"```(\w*) ?(.*)", line)):
            opened = number, match[1], match[2].strip()
        elif opened is not None and line == "```":
            yield Block(page.name, *opened, "\n".join(inside) + "\n")
            opened, inside = None, []
        elif opened is not None:
            inside.append(line)
    if opened is not None:
        raise ValueError(f"{page.name}: the block of line {opened[0]} must be closed")


def rows(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(heading above it, cells) of every table row of a page, without header rows."""
    heading, before = "", ""
    for line in page.read_text("utf-8").split("\n"):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        is_row = line.startswith("|")
        if is_row and before.startswith("|") and not re.fullmatch(r"[|:\- ]+", line):
            yield heading, [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        before = line
