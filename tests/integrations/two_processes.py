"""Run by `accelerate launch`: trains in two processes, then with weights that part; each process writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "language"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_trainer import make_model, make_trainer  # noqa: E402

from gradientless.errors import UserError  # noqa: E402
from gradientless.search.fingerprint import fingerprint  # noqa: E402

METHODS = {
    "stp": {"radius": 0.02},
    "mezo": {"lr": 0.02, "eps": 1e-3, "noise": "rademacher", "evaluator": "walk"},
}


class Parting(transformers.TrainerCallback):
    """One process's weights change behind the others' back."""

    def on_step_end(self, args, state, control, model=None, **others):
        if args.process_index == 1 and state.global_step == 3:
            with torch.no_grad():
                next(model.parameters()).add_(1e-6)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank = transformers.TrainingArguments(str(out), use_cpu=True).process_index
    seen: dict[str, Any] = {}
    for method, options in METHODS.items():
        model = make_model(seed=rank)  # unequal at first: the first process's count
        trainer = make_trainer(out / method, method, options, model)
        trainer.train()
        seen[method] = {
            "processes": trainer.args.world_size,
            "backend": torch.distributed.get_backend(),
            "wrapped": trainer.model_wrapped is not trainer.model,
            "fingerprint": fingerprint(dict(trainer.model.named_parameters())),
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "logs": trainer.optimizer.optimizer.trajectory is not None,
        }
    parted = make_trainer(out / "parted", trainer={"checksum_every": 2, "callbacks": [Parting()]}, save_strategy="no")
    try:
        parted.train()
    except UserError as error:
        seen["error"] = str(error)
    (out / f"seen-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
