"""What every surface promises, tried on the two starter models: `python experiments/surfaces_on_starters.py`.

For each surface: at the start the class scores are those of the model without it, where the method promises that; three
steps of AdamW on four sentences leave every frozen weight as it was, to the bit, and move what is tuned; what is saved
loads again with equal scores, and peft or transformers open it. `contract` does this for any model, and the tests call
it for small random ones of every family.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language.surfaces import SURFACES, Surface, load
from gradientless.language.surfaces.adapter import BASE
from gradientless.language.surfaces.saved import body_of
from gradientless.language.tasks.base import FILM_REVIEW_PROMPTS, Example, Prompt

LABELS = ("negative", "positive")
ROWS = (
    Example("a gripping, beautifully acted film", 1),
    Example("the plot is thin and the jokes fall flat", 0),
    Example("warm, funny and true to its people", 1),
    Example("an hour too long", 0),
)
SAME = ("bias", "full", "head", "ia3", "layers", "lora", "side_lora")  # start as the model without them
IN_PEFT = ("ia3", "lora", "prefix", "prompt", "side_lora")
STEPS, LR, CLOSE = 3, 1e-3, 1e-4


@dataclass(frozen=True)
class Kept:
    """What a surface kept of its promises. starts: None where it promises nothing. opened: by which library."""

    tuned: int
    share: float
    starts: bool | None
    frozen: bool
    moved: int
    loads: bool
    opened: str
    seconds: float

    @property
    def whole(self) -> bool:
        return self.starts is not False and self.frozen and self.moved > 0 and self.loads and bool(self.opened)


def contract(
    name: str,
    model: str,
    folder: Path,
    *,
    rows: Sequence[Example] = ROWS,
    labels: Sequence[str] = LABELS,
    prompt: Prompt | Mapping[str, Prompt] | None = None,
    lr: float = LR,
    max_length: int = 16,
    **options: Any,
) -> Kept:
    """Try surface `name` on `model`, read behind `prompt` or, without one, under a head; saves into `folder`.

    Raises `UserError` for a surface that the model cannot have.
    """
    begin = time.perf_counter()
    prompt = None if name == "head" else prompt  # which has no other reading
    standing: dict[str, Any] = {"seed": 3, "max_length": max_length}
    reading: dict[str, Any] = {"readout": "head" if prompt is None else "prompt", "prompt": prompt}
    surface = SURFACES[name].create(model, labels, **standing, **({} if name == "head" else reading), **options)
    encoded = surface.encode(rows)
    surface.begin(encoded, show=False)
    batch, gold = encoded.batch(range(len(rows))), encoded.labels
    start = _scores(surface, batch)
    starts = None
    if name in SAME:
        heads = {key: options[key] for key in ("head", "pooling", "hidden", "activation") if key in options}
        plain = SURFACES["full"].create(model, labels, **standing, **reading, **heads)
        starts = torch.equal(start, _scores(plain, batch))
        del plain
    tuned = {id(tensor) for tensor in surface.trainable().values()}
    state = surface.state_dict(keep_vars=True)
    before = {key: tensor.detach().clone() for key, tensor in state.items()}
    optimizer = torch.optim.AdamW(surface.trainable().values(), lr=lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(surface.logits(surface.prepare(batch)), gold).backward()
        optimizer.step()
    optimizer.zero_grad()
    frozen = all(torch.equal(state[key], before[key]) for key in state if id(state[key]) not in tuned)
    moved = sum(not torch.equal(state[key], before[key]) for key in state if id(state[key]) in tuned)
    found = _scores(surface, batch)
    assert not torch.equal(found, start), f"{name}: three steps changed no score"
    surface.save(folder)
    loads = torch.equal(_scores(load(folder).eval(), batch), found)
    counted = surface.products()
    return Kept(
        counted.tuned, counted.share, starts, frozen, moved, loads, _opened(name, surface, batch, folder),
        time.perf_counter() - begin,
    )  # fmt: skip


def _scores(surface: Surface, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return surface.logits(surface.prepare(batch))


@torch.no_grad()
def _opened(name: str, surface: Any, batch: dict[str, Tensor], folder: Path) -> str:
    """The library that opened what was saved and found the surface's own model there; "" for none."""
    place = body_of(folder / BASE if (folder / BASE).is_dir() else folder)
    ours, kind = surface.model, transformers.AutoModel
    said_by = getattr(getattr(surface, "reading", None), "encoder", None)
    if getattr(surface, "encoder", None) is not None:  # lst behind a prompt
        kind = _language_class(surface.encoder.family)
    elif said_by is not None:
        kind = _language_class(said_by.family)
    elif getattr(surface, "reading", surface) is not surface or name == "head":
        head = surface if name == "head" else surface.reading.head
        ours = head.model
        if head.kind == "library":
            kind = transformers.AutoModelForSequenceClassification
    if name in ("lst", "k_lst"):
        ours = surface.model.backbone
    opened: Any = kind.from_pretrained(place).eval()
    tokens = {key: tensor for key, tensor in batch.items() if key != "slots"}
    if opened.config.is_encoder_decoder and said_by is None and "decoder_input_ids" not in tokens:
        tokens["decoder_input_ids"] = torch.full_like(tokens["input_ids"][:, :1], opened.config.decoder_start_token_id)
    causal = said_by is not None and said_by.family == "causal"
    if name in IN_PEFT and (name not in ("prefix", "prompt") or causal):
        import peft

        opened = peft.PeftModel.from_pretrained(opened, str(folder)).eval()
        answers = [_last(each, tokens) for each in (opened, ours)]
        length = min(answer.shape[1] for answer in answers)
        written = tokens["attention_mask"].bool() if answers[0].ndim == 3 and "decoder_input_ids" not in tokens else ...
        theirs, own = (answer[:, -length:][written] for answer in answers)
        return "peft" if torch.allclose(theirs, own, atol=CLOSE, rtol=CLOSE) else ""
    if name in ("prefix", "prompt"):  # the model without the tokens
        with surface.taken_out():
            own_state = ours.state_dict()
    else:
        own_state = ours.state_dict()
    theirs = opened.state_dict()
    shared = [key for key in own_state if key in theirs]
    equal = all(torch.equal(theirs[key], own_state[key]) for key in shared)
    return "transformers" if equal and len(shared) == len(own_state) else ""


def _language_class(family: str) -> Any:
    classes = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}
    return getattr(transformers, classes.get(family, "AutoModelForSeq2SeqLM"))


def _last(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """What a model answers with: logits, or last states."""
    known = {key: tensor for key, tensor in tokens.items() if key != "token_type_ids" or _takes_segments(model)}
    answer = model(**known)
    return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state


def _takes_segments(model: Any) -> bool:
    return getattr(model.config, "type_vocab_size", 0) > 0


# --- the starter models ---------------------------------------------------------------------------------------------

STARTERS: dict[str, dict[str, Any]] = {  # MiniLM comes without a language head
    "starter:minilm": {"prompt": None},
    "starter:smollm2": {"prompt": FILM_REVIEW_PROMPTS},
}
OPTIONS: dict[str, dict[str, Any]] = {"layers": {"pattern": r"\.5\."}, "k_lst": {"k": 3}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=STARTERS, help="one of the two; both by default")
    parser.add_argument("--surface", action="append", choices=sorted(SURFACES), help="all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        f"What every surface promises, on the starter models; {STEPS} steps of AdamW, {arguments.threads} threads",
        "",
        "| model | surface | tuned | share | starts as the model | frozen the same | loads the same | opened by | s |",
        "|---|---|---:|---:|---|---|---|---|---:|",
    ]
    broken = []
    said = {True: "yes", False: "NO", None: "not promised"}
    for model in arguments.model or STARTERS:
        for name in arguments.surface or sorted(SURFACES):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    kept = contract(
                        name, model, Path(folder), max_length=32, **STARTERS[model], **OPTIONS.get(name, {})
                    )
                except UserError as error:
                    lines.append(f"| {model} | {name} | refused: {error} | | | | | | |")
                    print(lines[-1], flush=True)
                    continue
            lines.append(
                f"| {model} | {name} | {kept.tuned:,} | {100 * kept.share:.2f}% | {said[kept.starts]} | "
                f"{said[kept.frozen]} | {said[kept.loads]} | {kept.opened or 'NOTHING'} | {kept.seconds:.0f} |"
            )
            print(lines[-1], flush=True)
            if not kept.whole:
                broken.append(f"{model} {name}")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if broken:
        raise SystemExit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
