"""Task: rows with labels, and where they come from. A task knows no tokenizer and no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True)
class Example:
    """One row: its text, the index of its label, and a second text for pair tasks."""

    text: str
    label: int
    text_pair: str | None = None


@dataclass(frozen=True)
class Splits:
    """The rows of a data set. `test` may be empty; `labels` holds the label names by index."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]


class Task(ABC):
    """A named data set. Subclasses state where it comes from and read it.

    key: the name in `TASKS`. source: where the rows come from (a hub id where there is one). licence: as far as the
    source states one. version: of the source, or of our split. metric: the one that comparisons rank by.
    """

    key: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    version: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]

    @abstractmethod
    def load(self, path: Path | None = None) -> Splits:
        """Read the rows: from the task's own source, or from a folder of the user's. Raises `UserError`."""
