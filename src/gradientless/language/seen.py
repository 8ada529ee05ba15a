"""What rows of tokens show of a model, whatever its configuration says.

Names and numbers of a configuration mean other things from one architecture to the next: a number of positions may
count those that padding takes, or stand for none at all; a model among those that write may read both ways; states may
be narrower than the width. So each is seen, once, before it is relied on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradientless.errors import UserError, one_line
from gradientless.language import backbone, reading
from gradientless.language.dropout import drops

SHORT = 8  # tokens of a row that is to show something


@dataclass(frozen=True)
class Seen:
    """width: entries of a state. left_to_right: whether the first state knows nothing of the tokens behind it."""

    width: int
    left_to_right: bool


def see(model: nn.Module) -> Seen:
    """What the states show of a model of the library's. Raises `UserError` for one that does not read tokens alone."""
    body = _body(model)
    one, other = _plain_tokens(model.config)
    ids = torch.full((2, SHORT), one)
    ids[1, 1:] = other
    states = _states(body, model.config, ids).float()
    moved, size = (states[0, 0] - states[1, 0]).abs().max(), states[0, 0].abs().max()
    # A mixture of experts adds up the tokens of a batch in another order, and rounds otherwise; what a token tells
    # another is seldom that small.
    rounding = 1e-5 if next(body.parameters()).dtype == torch.float32 else 2e-2
    within = moved <= rounding * size or not bool(states.isfinite().all())  # weights at NaN show nothing
    alike = moved == 0 or (within and backbone.is_decoder(model.config))
    return Seen(states.shape[-1], bool(alike))


def require_dropout(owner: str, name: str, model: nn.Module, rate: float) -> None:
    """Raise `UserError` where a rate of dropout is asked for and the model, called `name`, drops nothing."""
    if rate and not _drops(model):
        raise UserError(f"{owner}: dropout must be 0 for '{name}', which drops nothing anywhere, got {rate}")


@reading.once
def _drops(model: nn.Module) -> bool:
    batch = reading.heard(model, reading.some_tokens(model, SHORT))
    return drops(lambda: model(**reading.options(model, batch)))


def longest(model: nn.Module, wanted: int) -> int | None:
    """The most tokens of a row that the model reads, where that is fewer than `wanted`; else None.

    What its configuration states holds where no table of positions seems to end before; where one does, a row that goes
    beyond its end is tried, and where nothing is stated, one of as many tokens as are wanted. Raises `UserError` where
    a row fails without a table that ends.
    """
    stated = backbone.longest(model.config)
    if stated is not None and wanted > stated:
        return longest(model, stated) or stated
    body = _reader(model)
    tries = sorted({end + 1 for end in _table_ends(body, model.config) if end < wanted})
    for length in tries if stated is not None else [*tries, wanted]:  # not what is stated: that may be a million
        try:
            _states(body, model.config, _row(model.config, length), _Lookups())
        except _Beyond as beyond:  # by fewer than `length`, since a shorter row was read
            return longest(model, length - beyond.by) or length - beyond.by
    return None


def require(owner: str, name: str, model: nn.Module, max_length: int) -> None:
    """Raises `UserError` where the model called `name` reads no rows of `max_length` tokens."""
    limit = longest(model, max_length)
    if limit is not None:
        raise UserError(f"{owner}: max_length must be <= {limit}, the positions of '{name}', got {max_length}")


def positions(model: nn.Module) -> int | None:
    """The most tokens of a row; None where the model states none."""
    stated = backbone.longest(model.config)
    return None if stated is None else longest(model, stated) or stated


class _Uses(TorchFunctionMode):
    """Counts the uses of a table that are no look-up of some tokens in it."""

    def __init__(self, table: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self._table, self._tokens, self.others = table, tokens, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, given = func(*args, **kwargs), (*args, *kwargs.values())
        if isinstance(out, Tensor) and any(value is self._table for value in given):
            looked_up = func is nn.functional.embedding and bool(torch.isin(given[0], self._tokens).all())
            self.others += not looked_up
        return out


@reading.once
def uses_of_table(model: nn.Module) -> int:
    """How often a reading uses the table of tokens other than by looking the row's own tokens up in it."""
    row = reading.padded(reading.some_tokens(model, SHORT))
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    with _Uses(table.weight, row["input_ids"]) as uses:
        model(**reading.options(model, row))
    return uses.others


def linear(model: nn.Module, layers: Mapping[str, nn.Linear]) -> set[str]:
    """The names of those of `layers` that answer a row of tokens as a linear layer does."""
    found: set[str] = set()
    others: set[str] = set()

    def compare(name: str, layer: Any, args: tuple[Any, ...], output: Any) -> None:
        plain = len(args) == 1 and isinstance(output, Tensor) and args[0].shape[-1] == layer.in_features
        if plain:
            expected = nn.functional.linear(args[0], layer.weight, layer.bias)
            plain = output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-2, atol=1e-4)
        (found if plain else others).add(name)

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(functools.partial(compare, name)))
        _states(_reader(model), model.config, _row(model.config, SHORT))
    return found - others


def _reader(model: nn.Module) -> Any:
    """What reads the texts."""
    return model.get_encoder() if model.config.is_encoder_decoder else _body(model)  # type: ignore


def _body(model: nn.Module) -> nn.Module:
    """The model without an output layer, also where the library has no name for it."""
    body: nn.Module = model.base_model  # type: ignore[assignment]
    if body is model and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        with _reading(model.config, SHORT):
            return model.get_submodule(reading.stack_of(model))
    return body


def _table_ends(body: nn.Module, config: Any) -> Iterator[int]:
    """The lengths at which tables seem to end that are looked up one row further for a token more.

    They may be of distances, which are cut off there."""
    kept = []
    for length in (SHORT, SHORT + 1):
        lookups = _Lookups()
        _states(body, config, _row(config, length), lookups)
        kept.append(lookups.met)
    for (largest, _), (next_largest, rows) in zip(*kept, strict=False):
        if next_largest == largest + 1:
            yield rows - (next_largest - SHORT)


class _Beyond(Exception):
    """A table was looked up beyond its end, `by` so many rows."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by


class _Lookups(TorchFunctionMode):
    """Keeps of every lookup in a table its largest index and the table's rows. One beyond the end is not let through:
    on a GPU it would end the process."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        looked_up = _lookup(func, args, kwargs)
        if looked_up is not None:
            rows, index = looked_up
            largest = int(index.max())
            if largest >= rows:
                raise _Beyond(largest - rows + 1)
            self.met.append((largest, rows))
        return func(*args, **kwargs)


def _lookup(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Tensor] | None:
    """The rows of the table that a function of torch's looks things up in, and where."""
    table: Any
    dim: Any
    index: Any
    if func is nn.functional.embedding:
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        table, dim, index = given["weight"], 0, given["input"]
    elif func in (torch.gather, Tensor.gather, torch.index_select, Tensor.index_select):
        given = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
        table, dim, index = (given.get(name) for name in ("input", "dim", "index"))
    elif func is Tensor.__getitem__ and isinstance(args[1], Tensor):
        table, dim, index = args[0], 0, args[1]
    else:
        return None
    if not isinstance(table, Tensor) or index.dtype not in (torch.int64, torch.int32) or not index.numel():
        return None
    return table.shape[dim], index


@torch.no_grad()
def _states(body: nn.Module, config: Any, ids: Tensor, watching: _Lookups | None = None) -> Tensor:
    """The states of rows `ids` without padding. Raises `UserError`, and what `watching` does."""
    ids = ids.to(next(body.parameters()).device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    with _reading(config, ids.shape[1]), contextlib.nullcontext() if watching is None else watching:
        return backbone.hidden_states(body, batch)


@contextlib.contextmanager
def _reading(config: Any, count: int) -> Iterator[None]:
    """While open, a model that does not read rows of `count` tokens is a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        got = f"{config.model_type}: {one_line(error)}"
        raise UserError(f"model: must read a row of {count} tokens, got from {got}") from None


def _row(config: Any, length: int) -> Tensor:
    return torch.full((1, length), _plain_tokens(config)[0])


def _plain_tokens(config: Any) -> tuple[int, int]:
    """Two tokens that mean nothing to the model's own code."""
    text = config.get_text_config()
    special: set[Any] = set()
    for name in ("pad", "bos", "eos", "mask", "cls", "sep", "unk", "decoder_start"):
        token = getattr(text, f"{name}_token_id", None)
        special.update(token if isinstance(token, list) else [token])
    one, other, *_ = (token for token in range(32) if token not in special)
    return one, other
