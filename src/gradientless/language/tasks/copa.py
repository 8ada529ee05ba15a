"""COPA (Roemmele et al. 2011, https://people.ict.usc.edu/~gordon/copa.html): which of two is cause or effect?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gradientless.errors import unknown
from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, texts
from gradientless.language.tasks.wording import continued, unclosed

_CONNECTIVES = {"cause": "because", "effect": "so"}


class Copa(RecordTask):
    """400 premises to train on, 100 to validate on. SuperGLUE publishes no test labels."""

    key = "copa"
    source = "aps/super_glue"
    config = "copa"
    file = "COPA"
    licence = "BSD 2-clause"
    version = "SuperGLUE"
    kind = "choice"
    metric = "accuracy"
    columns = ("premise", "choice1", "choice2", "question")
    unanswered: ClassVar[Mapping[str, Any]] = {"label": 0}
    spellings = {"0": 0, "1": 1}
    prompts = {
        "causal": Prompt("{statement} {connective} {label}"),  # of MeZO
        "masked": Prompt('"{first}" or "{second}"? {statement}, {connective} {mask}'),  # of PET
        "text-to-text": Prompt("{statement} {connective}"),
    }

    def example(self, table: Table, row: Row) -> Example:
        fields = texts(table, row, *self.columns)
        if fields["question"] not in _CONNECTIVES:
            raise unknown(f"{table.path}: line {row.line}", "question", fields["question"], _CONNECTIVES)
        choices = (continued(fields["choice1"]), continued(fields["choice2"]))
        fields |= {
            "statement": unclosed(fields["premise"]),
            "connective": _CONNECTIVES[fields["question"]],
            "first": unclosed(choices[0]),
            "second": unclosed(choices[1]),
        }
        label = self.label(table, row)
        return Example(fields["premise"], label, None, fields, choices, (choices[label],))
