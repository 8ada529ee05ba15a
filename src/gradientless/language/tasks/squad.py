"""SQuAD 1.1 (Rajpurkar et al. 2016, https://aclanthology.org/D16-1264): questions whose answer is a span of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, accepted, texts


class Squad(RecordTask):
    """87,599 questions to train on, 10,570 to validate on; several answers may be right."""

    key = "squad"
    source = "rajpurkar/squad"
    licence = "CC BY-SA 4.0"
    version = "1.1"
    kind = "generation"
    metric = "token_f1"
    columns = ("context", "question", "answers")
    unanswered: ClassVar[Mapping[str, Any]] = {"answers": ["?"]}
    prompts = {
        # Of MeZO. `heading` is the line with the title, where the source has one. A line ends the answer.
        "causal": Prompt("{heading}Context: {context}\nQuestion: {question}\nAnswer:", answer=" {answer}\n"),
        "text-to-text": Prompt("{heading}Context: {context}\nQuestion: {question}\nAnswer:"),
    }

    def unlabelled(self, table: Table, row: Row) -> bool:
        return not accepted(table, row, "answers")

    def example(self, table: Table, row: Row) -> Example:
        fields = texts(table, row, "context", "question")
        title = row.values.get("title")
        fields["heading"] = f"Title: {title}\n" if isinstance(title, str) and title.strip() else ""
        answers = accepted(table, row, "answers", required=True)
        context = fields["context"]
        return Example(context, 0, fields["question"], fields, answers=answers, group=context)
