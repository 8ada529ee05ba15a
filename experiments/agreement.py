"""Label log-likelihoods against those of lm-evaluation-harness, an implementation of its own, for the same strings.

    python experiments/agreement.py --model starter:smollm2 --task sst2 --data path/to/sst2-sentences

Prints the largest difference over the first rows of the validation split, in float32. Needs the package `lm-eval`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from gradientless.language import readouts
from gradientless.language.backbone import resolve
from gradientless.language.surfaces import FullSurface
from gradientless.language.tasks import Example, Prompt
from gradientless.run.config import RunConfig
from gradientless.run.evaluation import load_splits

SIZE = 16  # rows at a time
LENGTH = 512  # tokens of a row


@torch.no_grad()
def ours(model: str, prompt: Prompt, labels: Sequence[str], rows: Sequence[Example], length: int = LENGTH) -> Tensor:
    """Log-likelihood of each label's words behind each row: float32 [N, C]."""
    surface = FullSurface.create(model, tuple(labels), prompt=prompt, max_length=length)
    encoded = surface.encode(list(rows))
    found = []
    for start in range(0, len(rows), SIZE):
        tensors = surface.prepare(encoded.batch(range(start, min(start + SIZE, len(rows))))).tensors
        found.append(readouts.scores(surface.model, tensors, surface.reading.encoder.words, normalised=True))
    return torch.cat(found)


def theirs(model: str, prompt: Prompt, labels: Sequence[str], rows: Sequence[Example], length: int = LENGTH) -> Tensor:
    """The same, by the harness: each row and word as plain strings."""
    folder = str(resolve(model))
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    harness = HFLM(pretrained=library, tokenizer=tokenizer, batch_size=SIZE, max_length=length)
    asked = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(prompt.text.replace("{text}", row.text), prompt.words[label]),
            idx=number,
        )
        for number, (row, label) in enumerate((row, label) for row in rows for label in labels)
    ]
    answers = [float(value) for value, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    return torch.tensor(answers).view(len(rows), len(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="starter:smollm2")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", help="a folder with the task's files")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--text", default="Review: {text}\nSentiment:")
    parser.add_argument("--words", default=" negative, positive", help="one for each label, between commas")
    arguments = parser.parse_args()
    splits = load_splits(
        RunConfig.load(None, (), {"task": arguments.task} | ({"data.path": arguments.data} if arguments.data else {}))
    )
    prompt = Prompt(arguments.text, dict(zip(splits.labels, arguments.words.split(","), strict=True)))
    rows = splits.validation[: arguments.rows]
    first, second = (find(arguments.model, prompt, splits.labels, rows) for find in (ours, theirs))
    print(
        f"{len(rows)} rows, {len(splits.labels)} labels: largest difference {float((first - second).abs().max()):.2e}, "
        f"log-likelihoods from {float(second.min()):.2f} to {float(second.max()):.2f}"
    )


if __name__ == "__main__":
    main()
