"""DROP (Dua et al. 2019, https://aclanthology.org/N19-1246): to count, compare and compute on a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, accepted, texts


class Drop(RecordTask):
    """77,400 questions to train on, 9,535 to validate on.

    Every span of a record counts as a right answer by itself, as MeZO has it: the source does not tell the spans of one
    answer from the answers of several people. DROP's own score, which pairs the spans of an answer, is not computed.
    """

    key = "drop"
    source = "ucinlp/drop"
    licence = "CC BY-SA 4.0"
    version = "as published"
    kind = "generation"
    metric = "token_f1"
    columns = ("passage", "question", "answers_spans")
    unanswered: ClassVar[Mapping[str, Any]] = {"answers_spans": ["?"]}
    prompts = {
        "causal": Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:", answer=" {answer}\n"),  # of MeZO
        "text-to-text": Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:"),
    }

    def unlabelled(self, table: Table, row: Row) -> bool:
        return not accepted(table, row, "answers_spans")

    def example(self, table: Table, row: Row) -> Example:
        fields = texts(table, row, "passage", "question")
        answers = accepted(table, row, "answers_spans", required=True)
        passage = fields["passage"]
        return Example(passage, 0, fields["question"], fields, answers=answers, group=passage)
