"""What a language model says about label words, choices and answers, computed where it is asked and nowhere else.

The model's own forward runs as it is, with shortcuts that were seen to hold for this model (`reading`): its states are
kept at the positions that are read, its output layer gives the rows of the tokens that are read, what a row's choices
have in common is read once, and what was read of a text is kept while it is written. Where one does not hold, the plain
way is gone instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.language import backbone, reading
from gradientless.language.metrics import highest
from gradientless.language.prompting import LabelWords
from gradientless.language.reading import Places, answer_at


def settle(model: nn.Module, inputs: dict[str, Tensor], words: LabelWords | None, length: int = reading.LENGTH) -> None:
    """See which shortcuts hold for the model with inputs like these, while nothing is changed inside it: `scores` and
    `written` would see it themselves. length: tokens of the longest row."""
    reading.states_from(model)
    if "position_ids" in inputs:
        reading.padded_left(model, length)
    if "slots" not in inputs:
        going_on(model, length)
    elif "targets" in inputs:
        if not reading.is_text_to_text(model):
            sharing(model, length)
    elif words is not None and words.single:
        reading.output_layer(model)


def scores(
    model: nn.Module,
    inputs: dict[str, Tensor],
    words: LabelWords | None,
    whole: bool = False,
    share: bool = False,
    normalised: bool = False,
) -> Tensor:
    """Score of every label word or choice: float32 [B, C], differentiable in the model's weights.

    inputs: of `EncodedPrompts.batch` or `EncodedAnswers.batch`, on the model's device. Words of one token each are
    scored by their logits, whose differences are those of the log-probabilities; else, as choices are, by the sum (or
    mean) of their tokens' log-probabilities. A choice that its row does not have scores -inf. whole: compute logits at
    all positions and of the full vocabulary, as the library does. share: a causal model reads what the choices of a row
    have in common once, and goes on behind it with what it kept. normalised: give words of one token their
    log-probability too, which costs the logits of the full vocabulary.
    """
    if "targets" in inputs:
        chosen = inputs["chosen"]
        several = share and not whole and len(inputs["input_ids"]) > len(chosen) and inputs["targets"].shape[1] > 1
        places = sharing(model) if several else None
        found = _of_answers(model, inputs, whole) if places is None else _behind_shared(model, inputs, places)
        sums = (found * inputs["weights"]).sum(dim=-1)
        return sums.new_full(chosen.shape, -torch.inf).masked_scatter(chosen, sums)
    assert words is not None
    inputs = laid_out(model, inputs)
    tokens = words.tokens.to(inputs["slots"].device)
    layer = None if whole or normalised or not words.single else _layer(model)
    with reading.rows_of(tokens, layer) as narrow:
        logits = answer_at(model, _options(model, inputs), inputs["slots"], whole).logits.float()  # [R, K, tokens or V]
    values = logits if narrow else logits[..., tokens]
    if normalised or not words.single:
        values = values - logits.logsumexp(dim=-1, keepdim=True)
    values = values.unflatten(0, (-1, len(words.fills)))  # [B, fills, K, M]
    device = values.device
    read = values[:, words.fill.to(device), words.slot.to(device), words.token.to(device)]
    return (read * words.weight.to(device)).sum(dim=-1)


def _of_answers(model: nn.Module, inputs: dict[str, Tensor], whole: bool = False) -> Tensor:
    """[R, K] log-probabilities of each answer's tokens."""
    inputs = laid_out(model, inputs)
    logits = answer_at(model, _options(model, inputs), inputs["slots"], whole).logits
    # A row at a time, in single precision: the vocabulary is wide.
    return torch.stack([_log_probabilities(*each) for each in zip(logits, inputs["targets"], strict=True)])


def _behind_shared(model: nn.Module, inputs: dict[str, Tensor], how: Places) -> Tensor:
    """`_of_answers` of a causal model, each row of data read once up to its last token before the answers."""
    ids, mask, targets = inputs["input_ids"], inputs["attention_mask"], inputs["targets"]
    row = inputs["chosen"].nonzero()[:, 0]  # [R], of data
    first = torch.searchsorted(row, torch.arange(len(inputs["chosen"]), device=row.device))  # its first row of tokens
    last = inputs["slots"][:, :1]  # [R, 1], where the answer's first token is read
    width = int((mask.cumsum(dim=1).gather(1, last)).max())
    at = last[first] - torch.arange(width - 1, -1, -1, device=ids.device)  # [B, width], padded at the left
    seen = mask[first].gather(1, at.clamp(min=0)) * (at >= 0)
    there = {"input_ids": ids[first].gather(1, at.clamp(min=0)), "attention_mask": seen} | how.of(seen)
    given = reading.options(model, there, keep=True)
    out = answer_at(model, given, torch.full_like(at[:, :1], width - 1))
    begun = _log_probabilities(out.logits[:, 0][row], targets[:, 0])
    kept = backbone.kept_in(out)
    kept.batch_select_indices(row)
    more = (inputs["weights"][:, 1:] > 0).to(mask.dtype)  # [R, K - 1]
    both = torch.cat([seen[row], more], dim=1)
    behind = {"input_ids": targets[:, :-1], "attention_mask": both}
    behind |= {name: places[:, width:] for name, places in how.of(both).items()}
    logits = model(**reading.options(model, behind, keep=True), **{str(backbone.keeps_as(model)): kept}).logits
    rest = [_log_probabilities(*each) for each in zip(logits, targets[:, 1:], strict=True)]
    return torch.cat([begun.unsqueeze(1), torch.stack(rest)], dim=1)


@reading.once
def sharing(model: nn.Module, length: int = reading.LENGTH) -> Places | None:
    """How a causal model goes on behind what choices share, where that gives what whole rows give; else None."""
    length = reading.length_of(model, length)
    begun = [*reading.some_tokens(model, length - 3, length // 2, 2)]
    said = [*reading.some_tokens(model, 3, 1, 2, 4, 2, 3)]
    rows = [torch.cat([begun[n // 2], each[:-1]]) for n, each in enumerate(said)]
    longest = max(map(len, said))
    inputs = reading.padded(rows)
    counts = torch.tensor([[len(each)] for each in said], device=rows[0].device)
    steps = torch.arange(longest, device=rows[0].device).unsqueeze(0)
    fronts = torch.tensor([[len(begun[n // 2])] for n in range(len(said))], device=rows[0].device)
    inputs |= {
        "slots": torch.minimum(fronts - 1 + steps, fronts - 2 + counts),
        "targets": reading.padded(said)["input_ids"],
        "weights": (steps < counts).float(),
        "chosen": torch.ones(3, 2, dtype=torch.bool, device=rows[0].device),
    }
    dtype = next(model.parameters()).dtype
    return reading.agreeing(
        reading.places_of(model),
        lambda places: _behind_shared(model, inputs, places)[steps < counts],
        lambda: _of_answers(model, inputs)[steps < counts].to(dtype),
    )


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [N, V]. targets: int64 [N]. Returns float32 [N]."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


READ = ("slots", "targets", "weights", "chosen")  # what says where and what to read is not the model's to see


def _options(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    return reading.options(model, {name: tensor for name, tensor in inputs.items() if name not in READ})


def laid_out(model: nn.Module, inputs: dict[str, Tensor], length: int = reading.LENGTH) -> dict[str, Tensor]:
    """A batch as the model reads it: with padding in front of its texts (it has `position_ids` then) where that changes
    nothing, and positions as the model counts them. length: as of `settle`."""
    if "position_ids" not in inputs:
        return inputs
    how = reading.padded_left(model, length)
    if how is None:
        return _padded_right(inputs)
    return {name: x for name, x in inputs.items() if name != "position_ids"} | how.of(inputs["attention_mask"])


def _padded_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with padding behind its texts instead of in front of them."""
    mask = inputs["attention_mask"]
    before = (mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    turned = (torch.arange(mask.shape[1], device=mask.device) + before) % mask.shape[1]
    moved = {n: x.gather(1, turned) if x.shape == mask.shape else x for n, x in inputs.items() if n != "position_ids"}
    return moved | ({"slots": inputs["slots"] - before} if "slots" in inputs else {})


# --- texts that the model writes -----------------------------------------------------------------------------------


@torch.no_grad()
def written(model: nn.Module, inputs: dict[str, Tensor], stops: Tensor, limit: int, whole: bool = False) -> Tensor:
    """What the model writes, greedily, behind each row: int64 [B, N], N <= limit.

    inputs: of `EncodedAnswers.batch` without answers. A row ends with the first of `stops`; what stands behind it means
    nothing. What the model keeps of a text is used where it was seen to be enough, so that every further token costs
    one position; else all is read again for each token. A row that has ended is not read further. whole: read all rows
    until all have ended.
    """
    stops = stops.to(inputs["input_ids"].device)
    going = going_on(model)
    text = _Anew(model, inputs) if going is None else _Kept(model, inputs, going.places)
    tokens = stops.new_zeros(len(inputs["input_ids"]), limit)
    rows = torch.arange(len(tokens), device=stops.device)  # those that the model still reads
    unended = torch.ones_like(rows, dtype=torch.bool)
    for n in range(limit):
        token = highest(text.logits.float())
        tokens[rows, n] = token
        unended &= ~torch.isin(token, stops)
        keep = unended.nonzero()[:, 0]
        if not len(keep) or n + 1 == limit:
            break
        if len(keep) < len(rows) and not whole and (going is None or going.drops):
            text.keep(keep)
            token, rows, unended = token[keep], rows[keep], unended[keep]
        text.add(token)
    return tokens[:, : n + 1]


class _Anew:
    """Texts of which all is read again for each token. logits: [B, V] of the token behind each."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        self.inputs = inputs if self.ids == "decoder_input_ids" else _padded_right(inputs)
        if self.ids == "input_ids":
            self.ends = self.inputs["attention_mask"].sum(dim=1, keepdim=True)  # [B, 1], where the next token belongs
        else:
            self.ends = torch.full_like(inputs[self.ids][:, :1], inputs[self.ids].shape[1])
        self._read()

    def _read(self) -> None:
        given = reading.options(self.model, self.inputs)
        self.logits = answer_at(self.model, given, self.ends - 1).logits[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with the rows `rows` alone."""
        self.inputs, self.ends = {name: tensor[rows] for name, tensor in self.inputs.items()}, self.ends[rows]

    def add(self, token: Tensor) -> None:
        """Write a token behind each: int64 [B]."""
        token = token.unsqueeze(1)
        wider = torch.cat([self.inputs[self.ids], token], dim=1).scatter(1, self.ends, token)
        self.inputs = self.inputs | {self.ids: wider}
        if self.ids == "input_ids":
            mask = self.inputs["attention_mask"]
            mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1).scatter(1, self.ends, 1)
            self.inputs["attention_mask"] = mask
        self.ends = self.ends + 1
        self._read()


class _Kept:
    """As `_Anew`, with what the model keeps: it reads the new tokens alone."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], places: Places) -> None:
        self.model, self.places = model, places
        self.given: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
        if "decoder_input_ids" in inputs:
            with model.get_encoder().register_forward_hook(self._encoded):  # type: ignore[operator]
                self._read(inputs["decoder_input_ids"])
        else:
            self._read(inputs["input_ids"])

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given["encoder_outputs"] = output

    def _read(self, tokens: Tensor) -> None:
        count, given = tokens.shape[1], dict(self.given)
        if "decoder_input_ids" in given:
            given["decoder_input_ids"] = tokens
        else:
            given["input_ids"] = tokens
            given |= {name: places[:, -count:] for name, places in self.places.of(given["attention_mask"]).items()}
        given = reading.options(self.model, given, keep=True)
        out = answer_at(self.model, given, torch.full_like(tokens[:, :1], count - 1))
        self.logits = out.logits[:, 0]
        self.given[str(backbone.keeps_as(self.model))] = backbone.kept_in(out)
        if "encoder_outputs" in self.given:
            self.given.pop("input_ids", None)

    def keep(self, rows: Tensor) -> None:
        kept: dict[str, Any] = {name: x[rows] for name, x in self.given.items() if isinstance(x, Tensor)}
        if "encoder_outputs" in self.given:
            chosen = copy.copy(self.given["encoder_outputs"])
            chosen["last_hidden_state"] = chosen.last_hidden_state[rows]
            kept["encoder_outputs"] = chosen
        backbone.kept_in(self.given).batch_select_indices(rows)
        self.given |= kept

    def add(self, token: Tensor) -> None:
        if "decoder_input_ids" not in self.given:
            mask = self.given["attention_mask"]
            self.given["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        self._read(token.unsqueeze(1))


@dataclass(frozen=True)
class Going:
    """How a model goes on with a text. drops: whether what it keeps can be cut to some of the rows."""

    places: Places
    drops: bool


@reading.once
def going_on(model: nn.Module, length: int = reading.LENGTH) -> Going | None:
    """How a model goes on with a text behind what it kept, where that gives what reading all again gives; else None."""
    length = reading.length_of(model, length)
    rows = reading.some_tokens(model, length - 3, length // 2, 2)
    inputs = reading.padded(rows, left=True)
    if reading.is_text_to_text(model):
        start = getattr(model.config, "decoder_start_token_id", None)
        first = torch.full_like(inputs["input_ids"][:, :1], 0 if start is None else start)
        inputs = reading.padded(rows) | {"decoder_input_ids": first}
    tokens = torch.stack(reading.some_tokens(model, 3, 3))  # [2, 3], two for each row
    left = torch.tensor([0, 2], device=tokens.device)

    def logits_of(text: _Anew | _Kept, drops: bool) -> Tensor:
        """[3, 2, V], behind each of the rows that are left: with none, one and two tokens written there."""
        found = [text.logits[left]]
        for token in tokens:
            if drops and len(text.logits) > len(left):
                text.keep(left)
            text.add(token[left] if drops else token)
            found.append(text.logits if drops else text.logits[left])
        return torch.stack(found)

    return reading.agreeing(
        [Going(places, drops) for places in reading.places_of(model) for drops in (True, False)],
        lambda going: logits_of(_Kept(model, inputs, going.places), going.drops),
        lambda: logits_of(_Anew(model, inputs), drops=False),
    )


@torch.no_grad()
def greedily(scores: Callable[[Tensor], Tensor], rows: int, stops: Tensor, limit: int) -> Tensor:
    """As `written`, of anything that scores the token [rows, V] behind those that are written, int64 [rows, n]."""
    tokens = stops.new_empty(rows, 0)
    ended = torch.zeros(rows, dtype=torch.bool, device=stops.device)
    while tokens.shape[1] < limit and not bool(ended.all()):
        token = highest(scores(tokens))
        tokens = torch.cat([tokens, token.unsqueeze(1)], dim=1)
        ended |= torch.isin(token, stops)
    return tokens


def continued(inputs: dict[str, Tensor], written: Tensor) -> dict[str, Tensor]:
    """`inputs` of `EncodedAnswers.batch` without answers, and behind each row what is `written` there: int64 [B, N]."""
    if "decoder_input_ids" in inputs:
        return inputs | {"decoder_input_ids": torch.cat([inputs["decoder_input_ids"], written], dim=1)}
    more = {"input_ids": written, "attention_mask": torch.ones_like(written)}
    if "position_ids" in inputs:
        more["position_ids"] = inputs["position_ids"][:, -1:] + torch.ones_like(written).cumsum(dim=1)
    return inputs | {name: torch.cat([inputs[name], tensor], dim=1) for name, tensor in more.items()}


def _layer(model: nn.Module) -> nn.Module | None:
    name = reading.output_layer(model)
    return None if name is None else model.get_submodule(name)


def rows_read(model: nn.Module, inputs: dict[str, Tensor], words: LabelWords | None) -> tuple[nn.Module, Tensor] | None:
    """The output layer, and the rows of it that `scores` reads, int64; None where it reads all."""
    if words is None or not words.single or "targets" in inputs:
        return None
    layer = _layer(model)
    return (layer, words.tokens) if layer is not None and reading.is_plain(layer) else None
