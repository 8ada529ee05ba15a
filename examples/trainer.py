"""A `transformers` training script with two changed lines: the import, and the options of MeZO.

python examples/trainer.py                                  # the starter encoder on Rotten Tomatoes
python examples/trainer.py --data reviews.csv --model FOLDER
accelerate launch --multi_gpu --num_processes 2 examples/trainer.py --cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from gradientless.integrations.transformers import ForwardTrainer as Trainer  # was: from transformers import Trainer
from gradientless.language.backbone import resolve
from gradientless.language.data import load_table
from gradientless.language.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter:minilm", help="starter:minilm, a hub id or a folder")
    parser.add_argument("--data", type=Path, help="a table with the columns text and label; else Rotten Tomatoes")
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    options = parser.parse_args(arguments)

    splits = load_table(options.data) if options.data else TASKS["rotten-tomatoes"]().load(None)
    source = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(splits.labels))

    def encode(rows):
        return [{**tokenizer(row.text, truncation=True, max_length=128), "labels": row.label} for row in rows]

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            logging_steps=max(1, options.steps // 10),
            save_steps=max(1, options.steps // 2),
            use_cpu=options.cpu,
            report_to=[],
        ),
        processing_class=tokenizer,
        train_dataset=encode(splits.train),
        eval_dataset=encode(splits.validation),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        optimizer_options={"lr": options.lr, "eps": 1e-3, "noise": "rademacher"},  # of forward_optimizer="mezo"
    )
    trainer.train()
    trainer.save_model()
    return trainer.evaluate()


if __name__ == "__main__":
    print(main())
