"""What a language model says about label words, computed where it is asked and nowhere else.

The model's own forward runs as it is, with two cuts: its body's states are kept at the positions that are read, and its
output layer gives the rows of the tokens that are read. So models keep whatever their library puts between the two.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.language.prompting import LabelWords


def scores(
    model: nn.Module, inputs: dict[str, Tensor], words: LabelWords, whole: bool = False, normalised: bool = False
) -> Tensor:
    """Score of every label word: float32 [B, C], differentiable in the model's weights.

    inputs: of `EncodedPrompts.batch`, on the model's device. Words of one token each are scored by their logits, whose
    differences are those of the log-probabilities; else by the sum (or mean) of their tokens' log-probabilities.
    whole: compute logits at all positions and of the full vocabulary, as the library does. normalised: give words of
    one token their log-probability too, which costs the logits of the full vocabulary.
    """
    slots, tokens = inputs["slots"], words.tokens.to(inputs["slots"].device)
    options: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name != "slots"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
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


def _output_layer(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[operator]


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
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer) or _intercepted()
    if type(layer) is not nn.Linear or watched:
        yield False
        return
    bias = layer.bias

    def rows(states: Tensor) -> Tensor:
        chosen = None if bias is None else bias[tokens].float()
        return nn.functional.linear(states.float(), layer.weight[tokens].float(), chosen)

    layer.forward = rows  # type: ignore[method-assign,assignment]
    try:
        yield True
    finally:
        del layer.forward


def _intercepted() -> bool:
    """Whether someone stands between torch's functions and their callers."""
    return bool(torch._C._len_torch_function_stack())
