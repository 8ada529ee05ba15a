"""MultiRC (Khashabi et al. 2018, https://aclanthology.org/N18-1023): which of the answers to a question are right?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradientless.errors import UserError
from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, texts

_WORDS = {"no": "No", "yes": "Yes"}
_QUESTION = '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?'


class Multirc(RecordTask):
    """27,243 answers to train on, 4,848 to validate on; a row is one answer to one question.

    Ranked by accuracy over answers, as MeZO does. The class F1 is the paper's F1a (over all answers, of "yes");
    `metrics.all_right` over the questions is its EM.
    """

    key = "multirc"
    source = "aps/super_glue"
    config = "multirc"
    file = "MultiRC"
    licence = "none stated; research data (SuperGLUE)"
    version = "SuperGLUE"
    labels = ("no", "yes")
    metric = "accuracy"
    columns = ("paragraph", "question", "answer")
    prompts = {
        "causal": Prompt(_QUESTION + "\n{label}", _WORDS),
        "masked": Prompt('{paragraph} Question: {question} Is the correct answer "{answer}"? {mask}.', _WORDS),
        "text-to-text": Prompt(_QUESTION, _WORDS),
    }

    def records(self, table: Table) -> Table:
        """SuperGLUE's own files hold a passage a line, with its questions, with their answers."""
        if "passage" not in table.columns or "paragraph" in table.columns:
            return table
        rows = [
            Row(row.line, {"paragraph": text, "question": question, **answer, "answer": answer.get("text")})
            for row in table.rows
            for text, question, answer in _unfolded(table, row)
        ]
        return replace(table, columns=(*self.columns, "label"), rows=rows)

    def example(self, table: Table, row: Row) -> Example:
        fields = texts(table, row, *self.columns)
        pair = f"{fields['question']} {fields['answer']}"
        return Example(fields["paragraph"], self.label(table, row), pair, fields, group=fields["paragraph"])


def _unfolded(table: Table, row: Row) -> list[tuple[Any, Any, dict[str, Any]]]:
    try:
        passage = row.values["passage"]
        return [
            (passage["text"], question["question"], dict(answer))
            for question in passage["questions"]
            for answer in question["answers"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{table.path}: line {row.line}: 'passage' must hold text, questions and their answers ({error!r})"
        ) from None
