"""How a saved model is opened: the lines of code that classify a text, without this package where that is possible.

The lines are exact for the model at hand: tokens of label words, special tokens and the template stand in them as this
package reads them. They read one text, so that nothing is padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from gradientless.language.prompting import PromptEncoder
from gradientless.language.surfaces.adapter import BASE, AdapterSurface
from gradientless.language.surfaces.base import Surface
from gradientless.language.surfaces.full import FullSurface, HeadReading, PromptReading
from gradientless.language.surfaces.head import HeadSurface
from gradientless.language.surfaces.lst import LstSurface
from gradientless.language.surfaces.prefix import PrefixSurface, PromptSurface
from gradientless.language.surfaces.saved import BODY, HEAD_FILE, NOTE
from gradientless.language.tasks.base import Prompt

AUTO = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "text-to-text": "AutoModelForSeq2SeqLM"}
PIPELINES = {"causal": "text-generation", "masked": "fill-mask"}
APPLIED = {"relu": "torch.relu", "tanh": "torch.tanh", "gelu": "torch.nn.functional.gelu"}
POOLED = {"mean": "states.mean(0)", "cls": "states[0]", "last": "states[-1]"}

OURS = "gradientless"
SAMPLE = "a text to classify"


@dataclass(frozen=True)
class Opening:
    """sentence: what opens the folder, and what does not. code: Python that does, with `folder` in it; None where each
    row brings its own choices or is answered by a text. library: that the folder is for, as the hub calls it. pipeline:
    the task of the library's pipeline that opens the folder rightly, if there is one."""

    sentence: str
    code: str | None
    library: str
    pipeline: str | None = None


def opening(surface: Surface, folder: str, pairs: bool = False, own: bool = False) -> Opening:
    """Of what `surface` saved in `folder`. pairs: whether it reads two texts. own: whether it is of a class of the
    user's own."""
    if own:
        told = f"A class of its maker's reads the folder, with the package gradientless; {NOTE} names it."
        return Opening(told, None, OURS)
    row = row_for(surface, pairs)
    if isinstance(surface, AdapterSurface) and surface.tunes == "adapter":
        return _of_adapter(surface, folder, row)
    if isinstance(surface, HeadSurface):
        return _of_head(surface, folder, row)
    if isinstance(surface, FullSurface):
        place = f"/{BASE}" if isinstance(surface, AdapterSurface) else ""
        if isinstance(surface.reading, HeadReading):
            return _of_head(surface.reading.head, folder, row, place)
        assert isinstance(surface.reading, PromptReading)
        return _of_prompt(surface.reading, folder, row, place)
    told = (
        f"transformers opens the model in {BODY}/ without the side network, which is no part of an architecture of its."
    )
    return _with_this_package(surface, folder, row, told)


def prompt_of(surface: Surface) -> Prompt | None:
    """The prompt behind which the surface reads texts, if it does."""
    encoder = None
    if isinstance(surface, FullSurface):
        encoder = surface.reading.encoder
    elif isinstance(surface, LstSurface):
        encoder = surface.encoder
    return None if encoder is None else encoder.prompt


def row_for(surface: Surface, pairs: bool) -> dict[str, str]:
    """A row for the surface to read: texts by the fields that it knows them by."""
    prompt = prompt_of(surface)
    fields = prompt.fields if prompt is not None else ("text", "text_pair") if pairs else ("text",)
    return {field: SAMPLE if field == "text" else f"another text, {field}" for field in fields}


def _of_head(head: HeadSurface, folder: str, row: Mapping[str, str], place: str = "") -> Opening:
    if head.kind == "library":
        if _surplus(head):
            return _classifier(head, folder, row, place)
        told = f"transformers.pipeline opens {'the folder' if not place else place[1:] + '/'} as a text classifier."
        return Opening(told, _pipeline(folder, row, place), "transformers", None if place else "text-classification")
    told = (
        f"transformers opens the model in {BODY}/, and a few lines put the head on it; transformers.pipeline does not: "
        "no classifier of the library's computes this head."
    )
    return Opening(told, _own_head(head, folder, row, place), OURS)


def _of_prompt(reading: PromptReading, folder: str, row: Mapping[str, str], place: str = "") -> Opening:
    encoder = reading.encoder
    kind = AUTO[encoder.family]
    where = "the folder" if not place else f"{place[1:]}/"
    told = f"transformers.{kind} opens {where}; its scores of the label words behind the prompt are the classes'."
    pipeline = None if place else PIPELINES.get(encoder.family)
    if encoder.words is None:
        told = (
            f"transformers.{kind} opens {where}; gradientless predict reads rows with their prompt and their choices."
        )
        return Opening(told, None, "transformers", pipeline)
    return Opening(told, _prompted(encoder, folder, row, place), "transformers", pipeline)


def _of_adapter(surface: AdapterSurface, folder: str, row: Mapping[str, str]) -> Opening:
    reading, virtual = surface.reading, isinstance(surface, PromptSurface)
    told = f"peft.PeftModel puts the adapter into the model in {BASE}/, which transformers opens."
    if isinstance(reading, PromptReading):
        if reading.encoder.words is None:
            return Opening(told + " gradientless predict reads rows with their prompt.", None, "peft")
        return Opening(told, _prompted(reading.encoder, folder, row, f"/{BASE}", True), "peft")
    assert isinstance(reading, HeadReading)
    head = reading.head
    if virtual and head.kind == "library":
        told = "peft gives the head the first virtual token's state, not the text's, for which it was tuned."
        return _with_this_package(surface, folder, row, told)
    if isinstance(surface, (PrefixSurface, PromptSurface)) and len(row) > 1:
        told = "peft does not tell the second text from the first, behind virtual tokens."
        return _with_this_package(surface, folder, row, told)
    if head.kind == "library":
        code = _classifier(head, folder, row, f"/{BASE}", True).code
        return Opening(told, code, "peft")
    skipped = surface.options["tokens"] if virtual else 0
    return Opening(told, _own_head(head, folder, row, f"/{BASE}", True, skipped), "peft")


def _with_this_package(surface: Surface, folder: str, row: Mapping[str, str], told: str) -> Opening:
    told += " The package gradientless reads it rightly."
    if not surface.labels:
        return Opening(told, None, OURS)
    fields = {key: value for key, value in row.items() if key not in ("text", "text_pair")}
    more = [repr(row["text_pair"])] if "text_pair" in row else ["None"] if fields else []
    more += [repr(fields)] if fields else []
    code = f"""\
from gradientless.language.tasks import Example
from gradientless.run.predict import predict_labels

folder = {folder!r}
row = Example({", ".join([repr(row.get("text", "")), "0", *more])})
labels, _, probabilities = predict_labels(folder, [row])
print(dict(zip(labels, probabilities[0].tolist())))
"""
    return Opening(told, code, OURS)


# --- code ------------------------------------------------------------------------------------------------------------


def _pipeline(folder: str, row: Mapping[str, str], place: str) -> str:
    asked = repr(row["text"]) if len(row) == 1 else repr(dict(row))
    return f"""\
from transformers import pipeline

folder = {folder!r}
classify = pipeline("text-classification", model={_path(place)})
print(classify({asked}, truncation=True, top_k=None))
"""


def _classifier(head: HeadSurface, folder: str, row: Mapping[str, str], place: str, adapted: bool = False) -> Opening:
    code = f"""\
{_imports("AutoModelForSequenceClassification", adapted)}
folder = {folder!r}
{_opened("AutoModelForSequenceClassification", place, adapted)}
with torch.no_grad():
    scores = model(**{_tokens(head, row)}).logits[0].float()
{_printed(head)}"""
    told = "transformers.AutoModelForSequenceClassification opens the folder; its pipeline gives the model too much."
    return Opening(told, code, "transformers")


def _own_head(
    head: HeadSurface, folder: str, row: Mapping[str, str], place: str, adapted: bool = False, skipped: int = 0
) -> str:
    body = f"{place}/{BODY}"
    more = ""
    if head.model.config.is_encoder_decoder:  # type: ignore[union-attr]
        more = ", decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id]])"
    lines = [f"pooled = {POOLED[head.pooling]}"]
    if head.kind == "two-layer":
        applied = APPLIED[head.activation]
        lines.append(f'pooled = {applied}(head["dense.weight"] @ pooled + head["dense.bias"])')
    lines.append('scores = head["out.weight"] @ pooled + head["out.bias"]')
    found = "last_hidden_state[0]" + (f"[{skipped}:]" if skipped else "")
    return f"""\
{_imports("AutoModel", adapted, "from safetensors.torch import load_file")}
folder = {folder!r}
{_opened("AutoModel", body, adapted)}
head = load_file({_path(f"{place}/{HEAD_FILE}")})
with torch.no_grad():
    states = model(**{_tokens(head, row, bool(skipped))}{more}).{found}.float()
{chr(10).join(lines)}
{_printed(head)}"""


def _prompted(
    encoder: PromptEncoder, folder: str, row: Mapping[str, str], place: str = "", adapted: bool = False
) -> str:
    assert encoder.words is not None
    front, back, before, after = encoder.around
    words = dict(zip(encoder.labels, map(list, encoder.words.words), strict=True))
    lines = [f"words = {words!r}  # tokens of the label words", f"row = {dict(row)!r}"]
    read, end = "model(torch.tensor([ids]))", "len(logits)"
    if encoder.family == "masked":
        lines += [f"front = {_coded(front, before)}", f"back = {_coded(back, (), after)}"]
        ids, end = "[*front, *[tokenizer.mask_token_id] * len(word), *back]", "len(logits) - len(back)"
    elif encoder.family == "causal":
        lines.append(f"front = {_coded(front, before)}")
        ids = "[*front, *word[:-1]]"
    else:
        lines.append(f"ids = {_coded(front, before, after)}")
        ids, said = "", f"torch.tensor([[{encoder.start}, *word[:-1]]])"
        read = f"model(input_ids=torch.tensor([ids]), decoder_input_ids={said})"
    lines += ["scores = []", "for word in words.values():", *([f"    ids = {ids}"] if ids else [])]
    over = "mean" if encoder.prompt.score == "mean" else "sum"
    return f"""\
{_imports(AUTO[encoder.family], adapted)}
folder = {folder!r}
{_opened(AUTO[encoder.family], place, adapted)}
{chr(10).join(lines)}
    with torch.no_grad():
        logits = {read}.logits[0].float().log_softmax(-1)
    end = {end}
    scores.append(logits[range(end - len(word), end), word].{over}())
print(dict(zip(words, torch.stack(scores).softmax(0).tolist())))
"""


def _coded(template: str, before: tuple[int, ...], after: tuple[int, ...] = ()) -> str:
    """The tokens of a template with special ones around them."""
    code = f'tokenizer({template!r}.format(**row), add_special_tokens=False)["input_ids"]'
    if not before and not after:
        return code
    return f"[{', '.join([*map(str, before), '*' + code, *map(str, after)])}]"


def _imports(kind: str, adapted: bool, more: str = "") -> str:
    lines = ["from peft import PeftModel"] if adapted else []
    lines += [more] if more else []
    return "\n".join(["import torch", *lines, f"from transformers import {kind}, AutoTokenizer", ""])


def _opened(kind: str, place: str, adapted: bool) -> str:
    lines = [
        f"tokenizer = AutoTokenizer.from_pretrained({_path(place)})",
        f"model = {kind}.from_pretrained({_path(place)}).eval()",
    ]
    if adapted:
        lines.append("model = PeftModel.from_pretrained(model, folder).eval()")
    return "\n".join(lines)


def _path(place: str) -> str:
    return f'f"{{folder}}{place}"' if place else "folder"


def _tokens(head: HeadSurface, row: Mapping[str, str], virtual: bool = False) -> str:
    more = ", return_token_type_ids=False" if _surplus(head) or virtual else ""
    return f'tokenizer({", ".join(map(repr, row.values()))}, truncation=True{more}, return_tensors="pt")'


def _surplus(head: HeadSurface) -> bool:
    """Whether the tokenizer makes segment ids that the model does not take."""
    known = inspect.signature(head.model.forward).parameters
    return "token_type_ids" in head.tokenizer.model_input_names and "token_type_ids" not in known


def _printed(head: HeadSurface) -> str:
    return f"labels = {list(head.labels)!r}\nprint(dict(zip(labels, scores.softmax(0).tolist())))\n"
