"""What a language model says about label words, choices and answers, computed where it is asked and nowhere else.

The model's own forward runs as it is, with two cuts: its body's states are kept at the positions that are read, and its
output layer gives the rows of the tokens that are read. So models keep whatever their library puts between the two.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.metrics import highest
from gradientless.language.prompting import LabelWords


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
        found = _behind_shared(model, inputs) if several else _of_answers(model, inputs, whole)
        sums = (found * inputs["weights"]).sum(dim=-1)
        return sums.new_full(chosen.shape, -torch.inf).masked_scatter(chosen, sums)
    assert words is not None
    slots, tokens = inputs["slots"], words.tokens.to(inputs["slots"].device)
    options = _options(model, inputs)
    with contextlib.ExitStack() as stack:
        met = [] if whole else stack.enter_context(_states_at(slots, model.get_decoder()))  # type: ignore[operator]
        narrow = (
            words.single and not (whole or normalised) and stack.enter_context(_rows_of(tokens, _output_layer(model)))
        )
        logits = model(**options).logits.float()  # [R, K, tokens], or all positions, or the full vocabulary
    if not met:  # a model whose output layer reads another part than it says
        logits = logits[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots]
    values = logits if narrow else logits[..., tokens]
    if normalised or not words.single:
        values = values - logits.logsumexp(dim=-1, keepdim=True)
    values = values.unflatten(0, (-1, len(words.fills)))  # [B, fills, K, M]
    read = values[:, words.fill.to(slots.device), words.slot.to(slots.device), words.token.to(slots.device)]
    return (read * words.weight.to(slots.device)).sum(dim=-1)


def _of_answers(model: nn.Module, inputs: dict[str, Tensor], whole: bool) -> Tensor:
    """[R, K] log-probabilities of each answer's tokens."""
    slots = inputs["slots"]
    with contextlib.ExitStack() as stack:
        met = [] if whole else stack.enter_context(_states_at(slots, model.get_decoder()))  # type: ignore[operator]
        logits = model(**_options(model, inputs)).logits
    if not met:
        logits = logits[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots]
    # A row at a time, in single precision: the vocabulary is wide.
    return torch.stack([_log_probabilities(*each) for each in zip(logits, inputs["targets"], strict=True)])


def _behind_shared(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """`_of_answers` of a causal model, each row of data read once up to its last token before the answers."""
    ids, mask, targets = inputs["input_ids"], inputs["attention_mask"], inputs["targets"]
    row = inputs["chosen"].nonzero()[:, 0]  # [R], of data
    first = torch.searchsorted(row, torch.arange(len(inputs["chosen"]), device=row.device))  # its first row of tokens
    last = inputs["slots"][:, :1]  # [R, 1], where the answer's first token is read
    width = int((mask.cumsum(dim=1).gather(1, last)).max())
    at = last[first] - torch.arange(width - 1, -1, -1, device=ids.device)  # [B, width], padded at the left
    seen = mask[first].gather(1, at.clamp(min=0)) * (at >= 0)
    there = {"input_ids": ids[first].gather(1, at.clamp(min=0)), "attention_mask": seen}
    there["position_ids"] = (seen.cumsum(dim=1) - 1).clamp(min=0)
    with _states_at(torch.full_like(at[:, :1], width - 1), model.get_decoder()):  # type: ignore[operator]
        out = model(**there, use_cache=True)
    begun = _log_probabilities(out.logits[:, -1][row], targets[:, 0])
    kept = backbone.kept_in(out)
    kept.batch_select_indices(row)
    more = (inputs["weights"][:, 1:] > 0).to(mask.dtype)  # [R, K - 1]
    places = seen.sum(dim=1, keepdim=True)[row] + torch.arange(more.shape[1], device=ids.device)
    logits = model(
        input_ids=targets[:, :-1],
        attention_mask=torch.cat([seen[row], more], dim=1),
        position_ids=places,
        use_cache=True,
        **{_name_of_kept(model): kept},
    ).logits
    rest = [_log_probabilities(*each) for each in zip(logits, targets[:, 1:], strict=True)]
    return torch.cat([begun.unsqueeze(1), torch.stack(rest)], dim=1)


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [N, V]. targets: int64 [N]. Returns float32 [N]."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def _name_of_kept(model: nn.Module) -> str:
    name = backbone.keeps_as(model)
    if name is None:
        raise UserError(
            f"model: must go on from what it kept of a text, got {type(model).__name__}, which keeps nothing"
        )
    return name


READ = ("slots", "targets", "weights", "chosen")  # what says where and what to read is not the model's to see


def _options(model: nn.Module, inputs: dict[str, Tensor], cached: bool = False) -> dict[str, Any]:
    options: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name not in READ}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = cached
    return options


@torch.no_grad()
def written(model: nn.Module, inputs: dict[str, Tensor], stops: Tensor, limit: int, whole: bool = False) -> Tensor:
    """What the model writes, greedily, behind each row: int64 [B, N], N <= limit.

    inputs: of `EncodedAnswers.batch` without answers. A row ends with the first of `stops`; what stands behind it means
    nothing. Keys and values of what was read are kept, so that every further token costs one position; a row that has
    ended is not read further. whole: read all rows until all have ended.
    """
    stops = stops.to(inputs["input_ids"].device)
    options, last = _options(model, inputs, cached=True), inputs["input_ids"].shape[1] - 1
    with contextlib.ExitStack() as stack:
        if "decoder_input_ids" not in inputs:
            at = torch.full_like(inputs["input_ids"][:, :1], last)
            stack.enter_context(_states_at(at, model.get_decoder()))  # type: ignore[operator]
        out = model(**options)
    tokens = stops.new_zeros(len(inputs["input_ids"]), limit)
    rows = torch.arange(len(tokens), device=stops.device)  # those that the model still reads
    going = torch.ones_like(rows, dtype=torch.bool)
    for n in range(limit):
        token = highest(out.logits[:, -1].float())
        tokens[rows, n] = token
        going &= ~torch.isin(token, stops)
        keep = going.nonzero()[:, 0]
        if not len(keep) or n + 1 == limit:
            break
        options = _next(model, options, out, token.unsqueeze(1))
        if len(keep) < len(rows) and not whole:
            options, rows, going = _of_rows(options, keep), rows[keep], going[keep]
        out = model(**options)
    return tokens[:, : n + 1]


def _next(model: nn.Module, options: dict[str, Any], out: Any, token: Tensor) -> dict[str, Any]:
    """The model's arguments for one further token [B, 1] of each row."""
    options = options | {_name_of_kept(model): backbone.kept_in(out)}
    if "decoder_input_ids" in options:
        options.pop("input_ids", None)
        return options | {"decoder_input_ids": token, "encoder_outputs": (out.encoder_last_hidden_state,)}
    mask = options["attention_mask"]
    options |= {"input_ids": token, "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)}
    if "position_ids" in options:
        options["position_ids"] = options["position_ids"][:, -1:] + 1
    return options


def _of_rows(options: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """The arguments of `_next` for the rows `keep` alone."""
    backbone.kept_in(options).batch_select_indices(keep)
    chosen: dict[str, Any] = {name: value[keep] for name, value in options.items() if isinstance(value, Tensor)}
    if "encoder_outputs" in options:
        chosen["encoder_outputs"] = (options["encoder_outputs"][0][keep],)
    return options | chosen


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


def _output_layer(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[operator]


def _is_plain(layer: nn.Module) -> bool:
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not watched


def rows_read(model: nn.Module, inputs: dict[str, Tensor], words: LabelWords | None) -> Tensor | None:
    """The rows of the output layer that `scores` reads, int64; None where it reads all."""
    single = words is not None and words.single and "targets" not in inputs
    return words.tokens if single and words is not None and _is_plain(_output_layer(model)) else None


@contextlib.contextmanager
def _states_at(slots: Tensor, body: nn.Module) -> Iterator[list[bool]]:
    """While open, `body` answers with its states at `slots` alone: [R, K, width]. The list tells whether it did."""
    met: list[bool] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output["last_hidden_state"] = states[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots]
        met.append(True)
        return output

    handle = body.register_forward_hook(keep)
    try:
        yield met
    finally:
        handle.remove()


@contextlib.contextmanager
def _rows_of(tokens: Tensor, layer: nn.Module) -> Iterator[bool]:
    """While open, `layer` answers with its outputs `tokens` alone, in float32; whether it does.

    It does not where its own call means more than its weight: an adapter, a hook, noise that is added on the way. Then
    it has to be called whole.
    """
    if not _is_plain(layer):
        yield False
        return
    assert isinstance(layer, nn.Linear)
    bias = layer.bias

    def rows(states: Tensor) -> Tensor:
        chosen = None if bias is None else bias[tokens].float()
        return nn.functional.linear(states.float(), layer.weight[tokens].float(), chosen)

    layer.forward = rows  # type: ignore[method-assign,assignment]
    try:
        yield True
    finally:
        del layer.forward
