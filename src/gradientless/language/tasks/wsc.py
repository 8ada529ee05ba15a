"""WSC as in SuperGLUE (Levesque et al. 2012, https://arxiv.org/abs/1905.00537): does a pronoun mean this noun?"""

from __future__ import annotations

from dataclasses import replace

from gradientless.language.tables import Row, Table
from gradientless.language.tasks.base import Example, Prompt
from gradientless.language.tasks.records import RecordTask, texts

_WORDS = {"no": "No", "yes": "Yes"}
_QUESTION = '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?'


class Wsc(RecordTask):
    """554 pairs to train on, 104 to validate on. SuperGLUE publishes no test labels."""

    key = "wsc"
    source = "aps/super_glue"
    config = "wsc.fixed"
    file = "WSC"
    licence = "none stated; research data (SuperGLUE)"
    version = "SuperGLUE, fixed spans"
    labels = ("no", "yes")
    spellings = {"False": 0, "false": 0, "True": 1, "true": 1}
    metric = "accuracy"
    columns = ("text", "span1_text", "span2_text")
    prompts = {
        "causal": Prompt(_QUESTION + "\n{label}", _WORDS),
        "masked": Prompt('{text} Does the pronoun "{pronoun}" refer to {noun}? {mask}.', _WORDS),
        "text-to-text": Prompt(_QUESTION, _WORDS),
    }

    def records(self, table: Table) -> Table:
        """SuperGLUE's own files hold the spans in a `target`; the hub holds them beside the text."""
        if "target" not in table.columns:
            return table
        rows = []
        for row in table.rows:
            target = row.values.get("target")
            rows.append(Row(row.line, {**row.values, **(target if isinstance(target, dict) else {})}))
        return replace(table, columns=(*table.columns, "span1_text", "span2_text"), rows=rows)

    def example(self, table: Table, row: Row) -> Example:
        found = texts(table, row, *self.columns)
        fields = {"noun": found["span1_text"], "pronoun": found["span2_text"].lower()}
        about = f"{fields['pronoun']}: {fields['noun']}"
        return Example(found["text"], self.label(table, row), about, fields)
