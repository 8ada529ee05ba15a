"""What every task asks the two starter models, as text and as token ids of their own tokenizers, kept for comparison.

    python experiments/golden_prompts.py            # writes results/golden_prompts.json
    python experiments/golden_prompts.py --check    # says where what is made now differs from it

SmolLM2's byte-level tokenizer reads the causal prompts, MiniLM's WordPiece (BERT's) the masked ones. Each task has
three rows of our own: a plain one; a long one with characters of several bytes, cut at the right and at the left; one
with white space and case as they should not be. They go through the task's own reader.

Either way the ids are compared with those that `tokenizers` alone gives for the whole string, with the label word,
choice or answer in its place. Of a row that was cut that string is what its tokens decode to.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gradientless.language import backbone
from gradientless.language.prompting import SIDES, PromptEncoder
from gradientless.language.tasks import TASKS, Example, Prompt

FILE = Path(__file__).parent / "results" / "golden_prompts.json"
STARTERS = {"causal": "starter:smollm2", "masked": "starter:minilm"}
LENGTH = 72  # tokens of a row
GAP = "‹›"

LONG = (
    "Zoë’s café in 東京 opens at 8 — and closes, so they say, when the last guest has left; nobody has ever seen it. "
    "The plot is thin, the cast is not: naïve, loud, and very much alive 🙂. Some would call it slow. Others would say "
    "that a story about waiting has to make its public wait, and that it does so with grace, wit and 12 songs. "
) * 2
TEXTS = {  # <text> and <word> in the records
    "plain": ("The plot is thin, but Zoe sings well.", "fell"),
    "long": (LONG, "fell down the stairs"),
    "odd": ("  tHE  Plot\tis THIN ,\n\n but It   sings !? ", "  FELL "),
}
FILM = {"text": "<text>", "label": 1}
PAIR = {"premise": "<text>", "hypothesis": "It <word>", "label": 1}
RECORDS: dict[str, dict[str, Any]] = {
    "ag-news": {"text": "<text>", "label": 2},
    "boolq": {"passage": "<text>", "question": "is it true that it <word>", "answer": True},
    "cb": PAIR,
    "copa": {"premise": "<text>", "choice1": "It <word>.", "choice2": "I slept.", "question": "cause", "label": 0},
    "drop": {"passage": "<text>", "question": "Who <word>?", "answers_spans": {"spans": ["<word>"], "types": ["span"]}},
    "imdb": FILM | {"source": "imdb"},
    "mnli": PAIR,
    "multirc": {
        "passage": {
            "text": "<text>",
            "questions": [{"question": "Who <word>?", "answers": [{"text": "It <word>", "label": 1}]}],
        }
    },
    "record": {
        "passage": "<text>\n@highlight\nAnn <word>",
        "query": "So @placeholder left",
        "entities": ["Ann", "Zoë <word>"],
        "answers": ["Ann"],
    },
    "rotten-tomatoes": FILM | {"source": "rotten_tomatoes"},
    "rte": PAIR | {"label": "entailment"},
    "snli": PAIR | {"label": "neutral"},
    "squad": {
        "id": "1",
        "context": "<text>",
        "question": "Who <word>?",
        "answers": {"text": ["<word>"], "answer_start": [0]},
    },
    "sst2": {"sentence": "<text>", "label": 1},
    "sst5": {"text": "<text>", "label": 3},
    "trec": {"question": "<text>", "label": 4},
    "wic": {"word": "thin", "sentence1": "<text>", "sentence2": "It <word>.", "label": False},
    "wsc": {"text": "<text> She <word>.", "target": {"span1_text": "Zoe", "span2_text": "She"}, "label": True},
}


def rows(task: str) -> dict[str, Example]:
    """The task's rows, by their names in `TEXTS`, as its reader makes them of a local file."""
    found = {}
    for name, (text, word) in TEXTS.items():
        record = json.dumps(RECORDS[task])
        for slot, value in (("<text>", text), ("<word>", word)):
            record = record.replace(slot, json.dumps(value)[1:-1])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "train.jsonl").write_text((record + "\n") * 10, "utf-8")
            splits = TASKS[task]().load(Path(folder))
            found[name] = (splits.train or splits.validation or splits.test)[0]  # they are all alike
    return found


def cases() -> Iterator[tuple[str, str, str, Prompt]]:
    """(task, family, name of the prompt, prompt) of all that a starter model can be asked."""
    for task in sorted(TASKS):
        for name, prompt in sorted(TASKS[task].prompts.items()):
            family = name.partition(":")[0]
            if family in STARTERS:
                yield task, family, name, prompt


def texts(prompt: Prompt, row: Example) -> dict[str, Any]:
    """What needs no tokenizer."""
    return {"asked": prompt.render(row, GAP), "says": list(prompt.says(row))}


def ids(encoder: PromptEncoder, row: Example) -> dict[str, Any]:
    """All that the model sees of a row, without padding, and where it is read."""
    encoded = encoder.encode([row]) if row.choices or encoder.words else encoder.encode_answers([row])
    batch = encoded.batch([0])
    seen = [line[mask.bool()].tolist() for line, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    found: dict[str, Any] = {"cut": encoded.cut, "ids": seen, "slots": batch["slots"].tolist()}
    if encoder.words is None:
        found["targets"] = [
            line[weight > 0].tolist() for line, weight in zip(batch["targets"], batch["weights"], strict=True)
        ]
        if not row.choices:
            found["question"] = encoder.encode_questions([row]).batch([0])["input_ids"][0].tolist()
    return found


def wholes(encoder: PromptEncoder, found: Mapping[str, Any]) -> Iterator[list[int]]:
    """The row's tokens with each of what may be said in its place, put together of what the model sees."""
    words = encoder.words
    said = found["targets"] if words is None else words.words
    for number, word in enumerate(said):
        line = number if words is None else int(words.fill[number, 0])
        tokens, first = found["ids"][line], found["slots"][line][0]
        if encoder.family == "causal":
            yield [*tokens[: first + 1], *word]
        else:
            masks = len(word) if words is None else len(words.fills[line])
            yield [*tokens[:first], *word, *tokens[first + masks :]]


def confirm(alone: Tokenizer, prompt: Prompt, row: Example, cut: bool, wholes: Sequence[list[int]]) -> None:
    """Raises AssertionError where `tokenizers` alone reads the whole string in another way."""
    around = {alone.token_to_id("[CLS]"), alone.token_to_id("[SEP]")}  # it puts them there itself
    for said, whole in zip(prompt.says(row), wholes, strict=True):
        text = prompt.render(row, said)
        if cut:
            text = alone.decode([token for token in whole if token not in around], skip_special_tokens=False)
        found = alone.encode(text)
        assert found.ids == whole, (text, found.tokens, [alone.id_to_token(token) for token in whole])


def golden() -> dict[str, Any]:
    """Everything, by task and prompt."""
    found: dict[str, Any] = {}
    examples = {task: rows(task) for task in TASKS}
    for family, starter in STARTERS.items():
        tokenizer = backbone.load_tokenizer(starter, LENGTH)
        alone = Tokenizer.from_file(str(Path(backbone.resolve(starter)) / "tokenizer.json"))
        alone.no_truncation()
        alone.no_padding()
        for task, of, name, prompt in cases():
            if of != family:
                continue
            entry: dict[str, Any] = {}
            for kind, row in examples[task].items():
                entry[kind] = texts(prompt, row)
                for side in SIDES:
                    labels = TASKS[task].labels
                    encoder = PromptEncoder(
                        tokenizer, prompt, labels, family, LENGTH, truncation=side, max_new_tokens=8
                    )
                    read = ids(encoder, row)
                    confirm(alone, prompt, row, bool(read["cut"]), list(wholes(encoder, read)))
                    if side == SIDES[0] or read["cut"]:
                        entry[kind][side] = read
                    if encoder.words is not None:
                        entry["words"] = [list(word) for word in encoder.words.words]
            found[f"{task} {name}"] = entry
    return dict(sorted(found.items()))


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{place}/{key}")
    elif old != new:
        yield f"{place.lstrip('/')}: {old} is now {new}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    made = golden()
    if options.check:
        if found := list(differences(json.loads(FILE.read_text("utf-8")), made)):
            raise SystemExit("\n".join(found))
        print(f"{len(made)} prompts are as they were")
        return
    lines = (f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in made.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
