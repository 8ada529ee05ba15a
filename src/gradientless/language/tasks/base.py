"""Task: rows, the questions they become, and where they come from. A task knows no tokenizer and no model."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gradientless.errors import UserError, unknown
from gradientless.inputs import halves

if TYPE_CHECKING:
    from gradientless.language.tables import BadRows


@dataclass(frozen=True)
class Example:
    """One row.

    text, text_pair: what a model without a prompt reads; the second is there for tasks about two texts.
    label: index of the row's class, or of the right one of its choices; 0 for generation.
    fields: further texts of the row by name, for templates.
    choices: candidates of a multiple-choice row, as a template says them.
    answers: the texts that count as right, for generation and for choices (where more than one may be right).
    group: rows of one group stand on the same passage; no split parts them.
    """

    text: str
    label: int
    text_pair: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    group: str | None = None

    def __post_init__(self) -> None:
        for text in (self.text, self.text_pair or "", *self.fields.values(), *self.choices, *self.answers):
            if halves(text):
                raise UserError(
                    f"example: texts must hold whole characters, got half of a surrogate pair in {text!r:.60}"
                )

    def value(self, name: str) -> str:
        """The text of the row that a template calls `name`. Raises `UserError` that lists the names there are."""
        if name in self.fields:
            return self.fields[name]
        own = {"text": self.text} | ({} if self.text_pair is None else {"text_pair": self.text_pair})
        if name not in own:
            raise unknown("prompt", "field", name, (*own, *self.fields))
        return own[name]


@dataclass(frozen=True)
class Splits:
    """The rows of a data set. `test` may be empty; `labels` holds the label names by index (none without classes)."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    labels: tuple[str, ...]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.labels:
            return "classification"
        rows = self.train or self.validation or self.test
        return "choice" if rows and rows[0].choices else "generation"


SLOTS = ("label", "mask")  # two spellings of one thing: where the label word, choice or answer stands
SCORES = ("sum", "mean")


@dataclass(frozen=True)
class Prompt:
    """How a row becomes a question to a language model, and which word of its answer means which label.

    text: a template with fields of the row (`{text}`, `{premise}`, …) and perhaps the slot of the label word, written
        `{label}` or `{mask}`. A template without a slot has it at its end. Braces that stand for themselves are
        doubled.
    words: label name -> label word. How words and template join is `language/prompting.py`'s to say. Empty where each
        row has choices or an answer of its own.
    score: of a word of several tokens: "sum" of their log-probabilities, or their "mean".
    answer: how a choice or an answer is said at the slot: a template with `{answer}`, for rows without label words.

    Raises `UserError` for a template or words that cannot be used with any model.
    """

    text: str
    words: Mapping[str, str] = field(default_factory=dict, hash=False)
    score: str = "sum"
    answer: str = "{answer}"
    pieces: tuple[tuple[str, str | None], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """`pieces`: (literal text, the field behind it or None), from left to right."""
        parsed = _parse(self.text, "Review: {text}")
        names = [name for _, name in parsed if name is not None]
        if not set(names) - set(SLOTS):
            raise UserError(f"prompt: text must have a slot for a text of the row, such as {{text}}, got {self.text!r}")
        for name in names:
            if not name.isidentifier():
                raise UserError(f"prompt: a slot must hold a name such as {{text}}, got {{{name}}} in {self.text!r}")
            if names.count(name) > 1:
                raise UserError(f"prompt: text must have the slot {{{name}}} once, got {self.text!r}")
        if sum(name in SLOTS for name in names) > 1:
            raise UserError(
                f"prompt: text must have one slot for the label word, {{label}} or {{mask}}, got {self.text!r}"
            )
        if self.score not in SCORES:
            raise unknown("prompt", "score", self.score, SCORES)
        if len(self.words) == 1:
            raise UserError("prompt: at least two label words are needed, got 1")
        for label, word in self.words.items():
            if not word.strip():
                raise UserError(f"prompt: the label word of '{label}' must not be empty, got {word!r}")
        if [name for _, name in _parse(self.answer, "{answer}")].count("answer") != 1:
            raise UserError(f"prompt: answer must have the slot {{answer}} once, got {self.answer!r}")
        object.__setattr__(self, "pieces", parsed)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that `text` names, from left to right."""
        return tuple(name for _, name in self.pieces if name is not None and name not in SLOTS)

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """The fields of a row that `answer` names."""
        return tuple(name for _, name in _parse(self.answer, "{answer}") if name not in (None, "answer"))

    def render(self, example: Example, said: str = "") -> str:
        """The whole text of `example` with `said` at the slot, or at the end where there is no slot."""
        at_end = not any(name in SLOTS for _, name in self.pieces)
        parts = [
            literal + ("" if name is None else said if name in SLOTS else example.value(name))
            for literal, name in self.pieces
        ]
        return "".join(parts) + (said if at_end else "")

    def says(self, example: Example) -> tuple[str, ...]:
        """What may stand at the slot: the label words; or the row's choices or first answer, as `answer` has it."""
        if self.words:
            return tuple(self.words.values())
        pieces = _parse(self.answer, "{answer}")
        return tuple(
            "".join(
                literal + ("" if name is None else candidate if name == "answer" else example.value(name))
                for literal, name in pieces
            )
            for candidate in example.choices or example.answers[:1]
        )


def _parse(template: str, example: str) -> tuple[tuple[str, str | None], ...]:
    try:
        return tuple((literal, name) for literal, name, *_ in string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt: text must be a template such as {example!r}, got {template!r} ({error})") from None


FILM_REVIEW_PROMPTS: Mapping[str, Prompt] = {
    "causal": Prompt("Review: {text}\nSentiment:", {"negative": " negative", "positive": " positive"}),
    # The template and words of LM-BFF and MeZO for films (Gao et al. 2021, https://aclanthology.org/2021.acl-long.295).
    "masked": Prompt("{text} It was {mask}.", {"negative": "terrible", "positive": "great"}),
    "text-to-text": Prompt("Review: {text}\nSentiment:", {"negative": "negative", "positive": "positive"}),
    "causal:mezo": Prompt("{text} It was {label}", {"negative": "terrible", "positive": "great"}),
}

KINDS = ("classification", "choice", "generation")


class Task(ABC):
    """A named data set. Subclasses state where it comes from and read it.

    key: the name in `TASKS`. source: where the rows come from (a hub id where there is one). licence: as far as the
    source states one. version: of the source, or of our split. metric: the one that comparisons rank by.
    kind: one of `KINDS`. labels: class names by index, none unless it is a classification.
    prompts: by family of models ("causal", "masked", "text-to-text"), as far as the task has one; "family:name" is a
    second one of that family.
    """

    key: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    version: ClassVar[str]
    kind: ClassVar[str] = "classification"
    labels: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]
    prompts: ClassVar[Mapping[str, Prompt]] = {}

    @abstractmethod
    def load(self, path: Path | None = None, bad: BadRows | None = None) -> Splits:
        """Read the rows: from the task's own source, or from a folder of the user's. bad: what is done about rows that
        cannot be used; they are refused by default. Raises `UserError`."""

    @abstractmethod
    def load_rows(self, path: Path, bad: BadRows | None = None) -> list[Example]:
        """All labelled rows of one file, with the columns of the task's own. Raises `UserError`."""

    def prompt(self, family: str, name: str | None = None) -> Prompt:
        """The prompt for a family of models; `name`: another than the first. Raises `UserError` where there is none."""
        wanted = family if name is None else f"{family}:{name}"
        if wanted not in self.prompts:
            raise unknown(self.key, "prompt", wanted, self.prompts)
        return self.prompts[wanted]
