"""ReCoRD (Zhang et al. 2018, https://arxiv.org/abs/1810.12885): which entity of a news text fills a gap?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradientless.errors import UserError
from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, texts

GAP = "@placeholder"


class Record(RecordTask):
    """100,730 gaps to train on, 10,000 to validate on; several spellings of the entity may be right.

    The label is the first choice that is right; a prediction counts when it is any of them.
    """

    key = "record"
    source = "aps/super_glue"
    config = "record"
    file = "ReCoRD"
    licence = "none stated; research data (SuperGLUE)"
    version = "SuperGLUE"
    kind = "choice"
    metric = "accuracy"
    columns = ("passage", "query", "entities", "answers")
    prompts = {
        # Of MeZO (after GPT-3): the filled sentence is one more highlight of the text, and is scored whole.
        "causal": Prompt("{points}\n-{label}", answer=" {before}{answer}{after}"),
        "masked": Prompt("{points}\n- {before}{mask}{after}"),
        "text-to-text": Prompt("{points}\n-", answer="{before}{answer}{after}"),
    }

    def unlabelled(self, table: Table, row: Row) -> bool:
        return not row.values.get("answers")

    def records(self, table: Table) -> Table:
        """SuperGLUE's own files hold a passage a line, entities as positions in it, and its queries with answers."""
        if "qas" not in table.columns:
            return table
        return replace(table, columns=self.columns, rows=[each for row in table.rows for each in _unfolded(table, row)])

    def example(self, table: Table, row: Row) -> Example:
        fields = texts(table, row, "passage", "query")
        if fields["query"].count(GAP) != 1:
            raise UserError(f"{table.path}: line {row.line}: query must hold {GAP} once, got {fields['query']!r:.200}")
        fields["before"], _, fields["after"] = fields["query"].partition(GAP)
        fields["points"] = fields["passage"].replace("@highlight\n", "- ")
        choices = _names(table, row, "entities")
        answers = _names(table, row, "answers")
        right = [i for i, choice in enumerate(choices) if choice in answers]
        if not right:
            raise UserError(
                f"{table.path}: line {row.line}: an answer must be one of the entities ({', '.join(choices):.200}), "
                f"got {', '.join(answers):.100}"
            )
        return Example(fields["passage"], right[0], fields["query"], fields, choices, answers, fields["passage"])


def _names(table: Table, row: Row, column: str) -> tuple[str, ...]:
    values = row.values[column]
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) and value.strip() for value in values):
        raise UserError(
            f"{table.path}: line {row.line}: column '{column}' must hold a list of names, got {values!r:.80}"
        )
    return tuple(dict.fromkeys(value.strip() for value in values))


def _unfolded(table: Table, row: Row) -> list[Row]:
    try:
        passage: dict[str, Any] = row.values["passage"]
        text = passage["text"]
        entities = [text[entity["start"] : entity["end"] + 1] for entity in passage["entities"]]
        return [
            Row(
                row.line,
                {
                    "passage": text,
                    "query": query["query"],
                    "entities": entities,
                    "answers": [answer["text"] for answer in query.get("answers", ())],
                },
            )
            for query in row.values["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{table.path}: line {row.line}: must hold a passage with text and entities, and qas ({error!r})"
        ) from None
