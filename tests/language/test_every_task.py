"""Each task's own masked and text-to-text prompt: its token ids, and a tiny model of each family that reads them.

The tokenizers are trained here on the prompts themselves. What is expected is what `tokenizers` alone makes of the
whole strings, whose texts are golden (`task_cases`, `experiments/results/golden_prompts.json`).
"""

from __future__ import annotations

import pytest
import torch
from test_golden_prompts import golden_prompts
from tiny_models import language, roberta_like, unigram, wordpiece

from gradientless.language.prompting import PromptEncoder
from gradientless.language.surfaces import FullSurface
from gradientless.language.surfaces.full import PromptReading
from gradientless.language.tasks import TASKS

LENGTH = 500
KINDS = {"bert": "masked", "distilbert": "masked", "roberta": "masked", "t5": "text-to-text"}
ROWS = {task: [row for kind, row in golden_prompts.rows(task).items() if kind != "long"] for task in TASKS}
LINES = [
    prompt.render(row, said)
    for task in TASKS
    for prompt in TASKS[task].prompts.values()
    for row in ROWS[task]
    for said in prompt.says(row)
]
MAKERS = {"bert": wordpiece, "distilbert": wordpiece, "roberta": roberta_like, "t5": unigram}
CASES = [(kind, task) for kind in KINDS for task in sorted(TASKS) if KINDS[kind] in TASKS[task].prompts]


@pytest.fixture(scope="module")
def made():
    """made(kind) -> (model, tokenizer), each made once."""
    found = {}

    def of(kind):
        if kind not in found:
            tokenizer = MAKERS[kind](LINES, 600)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                found[kind] = language(kind, len(tokenizer), LENGTH), tokenizer
        return found[kind]

    return of


def encoder_of(tokenizer, kind, task) -> PromptEncoder:
    family, start = KINDS[kind], 0 if kind == "t5" else None
    prompt = TASKS[task].prompts[family]
    return PromptEncoder(tokenizer, prompt, TASKS[task].labels, family, LENGTH, start=start, max_new_tokens=4)


@pytest.mark.parametrize(("kind", "task"), [case for case in CASES if case[0] != "distilbert"])
def test_token_ids_are_those_of_the_whole_text(made, kind, task):
    _, tokenizer = made(kind)
    alone, encoder = tokenizer.backend_tokenizer, encoder_of(tokenizer, kind, task)
    for row in ROWS[task]:
        read = golden_prompts.ids(encoder, row)
        if kind != "t5":
            golden_prompts.confirm(alone, encoder.prompt, row, False, list(golden_prompts.wholes(encoder, read)))
            continue
        (asked,) = {tuple(line) for line in read["ids"]}
        front = encoder.prompt.render(row).rstrip()
        assert list(asked) == alone.encode(front).ids
        said = [list(word) for word in encoder.words.words] if encoder.words else read["targets"]
        end = [] if encoder.words or row.choices else [tokenizer.eos_token_id]
        wanted = [alone.encode(text.rstrip(), add_special_tokens=False).ids + end for text in encoder.prompt.says(row)]
        assert said == wanted


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_model_of_each_family_reads_it(made, kind, task):
    model, tokenizer = made(kind)
    encoder, rows = encoder_of(tokenizer, kind, task), ROWS[task]
    surface = FullSurface(PromptReading(model, encoder), dropout=0.0)
    with torch.no_grad():
        if TASKS[task].kind == "generation":
            prepared = surface.prepare(surface.encode_questions(rows).batch(range(len(rows))))
            assert len(surface.texts(prepared)) == len(rows)
            scores = surface(surface.encode_answers(rows).batch(range(len(rows))))
            assert scores.shape == (len(rows), 1) and bool((scores < 0).all())
            return
        scores = surface(surface.encode(rows).batch(range(len(rows))))
        alone = torch.cat([surface(surface.encode([row]).batch([0])) for row in rows])
    assert scores.shape == (len(rows), len(TASKS[task].labels) or len(rows[0].choices))
    assert torch.allclose(scores, alone, atol=1e-3) and float(scores.std(dim=1).min()) > 0
