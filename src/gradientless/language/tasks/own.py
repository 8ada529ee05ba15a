"""A user's own data as a prompted task, described by one TOML file.

    data = "reviews.csv"                        # beside this file; or a folder with train, dev and test files
    text = "Review: {text}\\nSentiment: {label}"  # slots are columns of the data

    [words]                                     # label as the data writes it -> label word
    0 = "negative"
    1 = "positive"

More keys, all of them optional: `kind` ("classification", "choice" or "generation"), `name`, `validation` (a file),
`label` (the column with the label), `score` ("sum" or "mean"), `answer` (how a choice or an answer is said),
`choices` (the columns with the candidates), `answers` (the column with the accepted answer or answers), `licence`;
`[columns]` (slot -> column, where they differ) and `[prompts.FAMILY]` with a `text`, and `words`, `score` or `answer`,
for one family of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradientless.errors import UserError, unknown
from gradientless.inputs import is_file, read_text, toml
from gradientless.language.tables import SUFFIXES, BadRows, Row, Table, read_table
from gradientless.language.tasks.base import KINDS, Example, Prompt, Splits
from gradientless.language.tasks.records import RecordTask, accepted

FAMILIES = ("causal", "masked", "text-to-text")
_TEXT = {"name", "kind", "data", "validation", "label", "answers", "licence", "text", "score", "answer"}
_KEYS = (*sorted(_TEXT), "choices", "columns", "words", "prompts")
_PROMPT_KEYS = ("text", "words", "score", "answer")


class OwnTask(RecordTask):
    """The user's rows and prompt. Made by `read_task`; its attributes are the instance's."""

    metric = "accuracy"

    def __init__(self, path: Path, stated: Mapping[str, Any], prompts: Mapping[str, Prompt]) -> None:
        kind = stated.get("kind", KINDS[0])
        words = next(iter(prompts.values())).words
        self._data = path.parent / stated["data"]
        self._validation = path.parent / stated["validation"] if "validation" in stated else None
        self._column: dict[str, str] = dict(stated.get("columns", {}))
        self._choices: tuple[str, ...] = tuple(stated.get("choices", ()))
        self._answers: str = stated.get("answers", "answer")
        own: dict[str, Any] = {
            "key": stated.get("name", path.stem),
            "source": str(self._data),
            "licence": stated.get("licence", "not stated"),
            "version": "your own",
            "kind": kind,
            "labels": tuple(words),
            "metric": "token_f1" if kind == "generation" else "accuracy",
            "prompts": dict(prompts),
            "label_columns": (stated.get("label", "label"),),
            "unanswered": {self._answers: "?"} if kind == "generation" else {stated.get("label", "label"): 0},
        }
        for name, value in own.items():
            setattr(self, name, value)
        # `columns` of a table are checked by their own names.
        slots = dict.fromkeys(name for prompt in prompts.values() for name in prompt.fields)
        self._slots = tuple(slots)
        self.columns = tuple(self._of(slot) for slot in slots) + self._choices  # type: ignore[misc]

    def load(self, path: Path | None = None, bad: BadRows | None = None) -> Splits:
        """The rows that the file names, or those of `path`, which must have the same columns."""
        path = self._data if path is None else path
        splits = super().load(path, bad)
        if self.labels and len({row.label for row in splits.train}) < 2:
            raise UserError(f"{path}: training rows must be of two classes or more, got one")
        return splits

    def _local_tables(self, path: Path) -> dict[str, Table]:
        tables = super()._local_tables(path)
        if self._validation is not None and path == self._data:
            tables["validation"] = read_table(self._validation)
        return tables

    def unlabelled(self, table: Table, row: Row) -> bool:
        if self.kind == "generation":
            return not accepted(table, row, self._answers)
        return super().unlabelled(table, row)

    def label(self, table: Table, row: Row) -> int:
        """Of a choice: the number of the right one from 0, its column, or its text."""
        column = self.label_columns[0]
        table.require(column, "label")
        value = row.values[column]
        written = str(value).lower() if isinstance(value, bool) else str(value).strip()
        if self.kind == "choice":
            said = [str(row.values.get(each)).strip() for each in self._choices]
            known = {**{text: i for i, text in enumerate(said)}, **{c: i for i, c in enumerate(self._choices)}}
            known |= {str(i): i for i in range(len(said))}
        else:
            known = {name: i for i, name in enumerate(self.labels)}
        if written not in known:
            wanted = ", ".join(self._choices or self.labels)
            raise UserError(
                f"{table.path}: line {row.line}: column '{column}' must hold one of {wanted:.200}, got '{written:.40}'"
            )
        return known[written]

    def example(self, table: Table, row: Row) -> Example:
        fields = {slot: table.text(row, self._of(slot)).strip() for slot in self._slots}
        text, *rest = fields.values()
        pair = rest[0] if rest else None
        if self.kind == "generation":
            table.require(self._answers, "answer")
            return Example(text, 0, pair, fields, answers=accepted(table, row, self._answers, required=True))
        label = self.label(table, row)
        if self.kind == "choice":
            choices = tuple(table.text(row, column).strip() for column in self._choices)
            return Example(text, label, pair, fields, choices, (choices[label],))
        return Example(text, label, pair, fields)

    def _of(self, slot: str) -> str:
        return self._column.get(slot, slot)


def read_task(path: Path) -> OwnTask:
    """The task that the TOML file `path` describes. Its data is read by `load`.

    Raises `UserError` for everything that is wrong with the file, one line for each fault.
    """
    stated = toml(read_text(path, "task"), f"{path}")
    faults = _faults(path, stated)
    prompts: dict[str, Prompt] = {}
    if not faults:
        prompts = _prompts(stated, faults)
    if faults:
        raise UserError("\n".join(f"{path}: {fault}" for fault in faults))
    return OwnTask(path, stated, prompts)


def _faults(path: Path, stated: Mapping[str, Any]) -> list[str]:
    """What is wrong before any prompt is made: unknown keys, wrong types, keys that do not belong together."""
    faults = [str(unknown("task", "key", key, _KEYS)) for key in stated if key not in _KEYS]
    faults += [
        f"{key} must be a text, got {stated[key]!r:.40}"
        for key in sorted(_TEXT & set(stated))
        if not isinstance(stated[key], str) or not stated[key].strip()
    ]
    for key in ("columns", "words"):
        if key in stated and not _is_table_of_texts(stated[key]):
            faults.append(f"[{key}] must be a table of texts, got {stated[key]!r:.60}")
    choices = stated.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or len(choices) == 1:
        faults.append(f"choices must be a list of two columns or more, got {choices!r:.60}")
    for key in ("data", "text"):
        if key not in stated:
            faults.append(f"{key} must be given, got nothing")
    if isinstance(data := stated.get("data"), str) and not (path.parent / data).exists():
        faults.append(f"data must be a file or a folder, got '{data}', which is not there")
    if isinstance(held := stated.get("validation"), str) and not is_file(path.parent / held):
        faults.append(f"validation must be a file ({', '.join(SUFFIXES)}), got '{held}', which is not there")
    kind = stated.get("kind", KINDS[0])
    if kind not in KINDS:
        return [*faults, str(unknown("task", "kind", kind, KINDS))]
    if kind == "classification" and "words" not in stated:
        faults.append("[words] must be given for a classification: label = label word; got nothing")
    if kind != "classification" and "words" in stated:
        faults.append(f"[words] must stay away for kind '{kind}', whose rows have their own; got some")
    if (kind == "choice") != bool(choices):
        faults.append(f"choices must be given for kind 'choice' and only then, got kind '{kind}'")
    if kind != "generation" and "answers" in stated:
        faults.append(f"answers must be given for kind 'generation' only, got kind '{kind}'")
    prompts = stated.get("prompts", {})
    if not isinstance(prompts, dict) or not all(isinstance(each, dict) for each in prompts.values()):
        return [*faults, f"[prompts] must hold tables such as [prompts.masked], got {prompts!r:.60}"]
    for family, each in prompts.items():
        if family not in FAMILIES:
            faults.append(str(unknown("task", "family of models", family, FAMILIES)))
        for key, value in each.items():
            if key not in _PROMPT_KEYS:
                faults.append(str(unknown(f"prompts.{family}", "key", key, _PROMPT_KEYS)))
            elif not (_is_table_of_texts(value) if key == "words" else isinstance(value, str)):
                faults.append(f"prompts.{family}: {key} must be a {'table of texts' if key == 'words' else 'text'}")
    return faults


def _is_table_of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _prompts(stated: Mapping[str, Any], faults: list[str]) -> dict[str, Prompt]:
    """A prompt for each family; what is wrong with one is added to `faults`, once."""
    common = {key: stated[key] for key in _PROMPT_KEYS if key in stated}
    prompts = {}
    for family in FAMILIES:
        own = stated.get("prompts", {}).get(family, {})
        try:
            made = {**common, **own}
            labels = stated.get("words", {})
            if set(made.get("words", {})) == set(labels):
                made["words"] = {label: made["words"][label] for label in labels}  # in the order of the classes
            prompts[family] = prompt = Prompt(**made)
            if set(prompt.words) != set(labels):
                raise UserError(
                    f"prompts.{family}: words must name the labels of [words] ({', '.join(labels)}), "
                    f"got {', '.join(prompt.words) or 'none'}"
                )
        except UserError as error:
            if str(error) not in faults:
                faults.append(str(error))
    if not faults:
        slots = {name for prompt in prompts.values() for name in prompt.fields}
        for slot in stated.get("columns", {}):
            if slot not in slots:
                faults.append(str(unknown("columns", "slot", slot, sorted(slots))))
    return prompts
