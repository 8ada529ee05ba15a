"""How a language model is read: where its logits come from, and which shortcuts to them hold.

Nothing here goes by the name of an architecture or of a part of it. The model is watched while it reads a few texts of
random tokens, and a shortcut is taken where it gave what the model gives without it. This is found out once a model, in
eval mode and apart from the rows of a run: the same model is read the same way in every run, resumed run and replay.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradientless.errors import UserError
from gradientless.language import backbone

LENGTH = 24  # tokens of the longest text to watch, where nobody says how long texts are
# How far apart two ways to the same values may be, root mean square, as a share of these values' spread. What a wrong
# way gives is another model's: half of the spread and more.
NEAR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

P = ParamSpec("P")
T = TypeVar("T")


def once(find: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[nn.Module, P], T]:
    """What `find` sees in a model, remembered; in eval mode, without gradients, and global random state untouched."""
    found: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    @functools.wraps(find)
    def ask(model: nn.Module, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if model not in found:
            training = [module for module in model.modules() if module.training]
            device = next(model.parameters()).device
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for module in training:
                    module.training = False
                try:
                    found[model] = find(model, *args, **kwargs)
                finally:
                    for module in training:
                        module.training = True
        return found[model]

    return ask


def agreeing(ways: Sequence[T], go: Callable[[T], Tensor], plainly: Callable[[], Tensor]) -> T | None:
    """The first of `ways` that leads to the values of the plain way; None where none does."""
    wanted = tried(plainly)
    for way in ways if wanted is not None else ():
        found = tried(functools.partial(go, way))
        if found is not None and wanted is not None and near(found, wanted):
            return way
    return None


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether two ways led to the same values, as far as the dtype of those that are `wanted` goes. Values that are all
    one, as those of an output layer of zeros, show nothing: any way leads to them until the layer is tuned."""
    if found.shape != wanted.shape:
        return False
    allowed = NEAR.get(wanted.dtype, NEAR[torch.float32])
    found, wanted = found.double(), wanted.double()
    if not bool((found.isfinite() == wanted.isfinite()).all()):
        return False
    found, wanted = found.nan_to_num(0.0, 0.0, 0.0), wanted.nan_to_num(0.0, 0.0, 0.0)
    spread = (wanted - wanted.mean()).square().mean().sqrt()
    return bool(spread > 0) and bool((found - wanted).square().mean().sqrt() <= allowed * spread)


def tried(way: Callable[[], Tensor]) -> Tensor | None:
    """What a way leads to; None where the model cannot go it."""
    try:
        return way()
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001 (a model that is called as it does not expect raises anything)
        return None


# --- texts to watch ------------------------------------------------------------------------------------------------


def is_text_to_text(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def some_tokens(model: nn.Module, *counts: int) -> list[Tensor]:
    """Random tokens, int64 [count] each, the same ones for a model at all times; none that its configuration names."""
    config: Any = model.config
    named = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    size = int(config.get_text_config().vocab_size)
    usual = torch.tensor([token for token in range(min(size, 4096)) if token not in named])
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    return [usual[torch.randint(len(usual), (count,), generator=generator)].to(device) for count in counts]


def length_of(model: nn.Module, length: int) -> int:
    """`length`, or the most tokens that the model has positions for."""
    limit = backbone.longest(model.config)
    return length if limit is None else min(length, limit)


def padded(rows: Sequence[Tensor], left: bool = False) -> dict[str, Tensor]:
    """Rows of tokens as a batch. The padding is a token like any other: the mask is to hide it."""
    width = max(map(len, rows))

    def filled(row: Tensor, value: int) -> Tensor:
        more = width - len(row)
        return nn.functional.pad(row, (more, 0) if left else (0, more), value=value)

    ids = torch.stack([filled(row, int(rows[0][0])) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.stack([filled(torch.ones_like(row), 0) for row in rows])}


def heard(model: nn.Module, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Texts whose logits are read, as a batch: in a text-to-text model they are what the decoder says."""
    batch = padded(rows)
    if not is_text_to_text(model):
        return batch
    return padded([row.flip(0) for row in rows]) | {"decoder_input_ids": batch["input_ids"]}


# --- the model's own forward ---------------------------------------------------------------------------------------


def options(model: nn.Module, inputs: Mapping[str, Any], keep: bool = False) -> dict[str, Any]:
    """The arguments of the model's forward, of those in `inputs` that it takes. keep: what it needs to go on."""
    known = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    found = {name: value for name, value in inputs.items() if anything or name in known}
    if "use_cache" in known:
        found["use_cache"] = keep
    return found


def at(slots: Tensor, values: Tensor) -> Tensor:
    """values: [R, T, …]; slots: int64 [R, K]. Returns [R, K, …]."""
    return values[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots]


def answer_at(model: nn.Module, given: Mapping[str, Any], slots: Tensor, whole: bool = False) -> Any:
    """What the model answers to the arguments `given`, its logits at `slots` alone: [R, K, V].

    whole: without a shortcut."""
    name = None if whole else states_from(model)
    with _states_at(slots, model, name):
        out = model(**given)
    if name is None:
        out["logits"] = at(slots, out.logits)
    return out


@contextlib.contextmanager
def _states_at(slots: Tensor, model: nn.Module, name: str | None) -> Iterator[None]:
    """While open, the part `name` of a model answers with its states at `slots` alone: [R, K, width]."""
    if name is None:
        yield
        return

    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = at(slots, output.last_hidden_state)
        return output

    with model.get_submodule(name).register_forward_hook(keep):
        yield


@contextlib.contextmanager
def answering(model: nn.Module, states: Tensor) -> Iterator[None]:
    """While open, a language model's body answers with `states` [B, T, width]; its output layer is as ever.

    Raises `UserError` where no body's states are all that the logits are made of."""
    name = states_from(model)
    if name is None:
        raise UserError(f"model: logits must be made of a body's last states, got others in {type(model).__name__}")
    bodies: list[Any] = [model.get_submodule(name)]
    if is_text_to_text(model):
        bodies.append(model.get_encoder())  # type: ignore[operator]
    try:
        for body in bodies:
            body.forward = lambda *_, **__: backbone.states_alone(states)
        yield
    finally:
        for body in bodies:
            del body.forward


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's call means its weight and bias and nothing more: no adapter, hook or noise added on the way."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not watched


@contextlib.contextmanager
def rows_of(tokens: Tensor, layer: nn.Module | None) -> Iterator[bool]:
    """While open, `layer` answers with its outputs `tokens` alone, in float32; whether it does.

    It does not where it is no plain layer: then it has to be called whole.
    """
    if layer is None or not is_plain(layer):
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


# --- what is seen --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _watched(model: nn.Module, see: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """While open, `see(name, module, arguments, output)` is told of every call of a part of the model, as it ends."""

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: see(name, module, (*args, *kwargs.values()), output)

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(watch(name), with_kwargs=True))
        yield


@once
def stack_of(model: nn.Module) -> str:
    """The name of the part that is given a model's tokens and answers with its states; "" is the model itself.

    Raises `UserError` where there is none."""
    (text,) = some_tokens(model, 4)
    batch, found = padded([text]), list[str]()

    def see(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None and any(x is ids for x in given):
            found.append(name)

    ids = batch["input_ids"]
    with backbone.without_pooler(model), _watched(model, see):
        model(**options(model, batch))
    if not found:
        raise UserError(
            f"model: a part must be given the tokens and answer with their states, got none in {type(model).__name__}"
        )
    return found[-1]  # the outermost ends last


@once
def states_from(model: nn.Module) -> str | None:
    """The name of the part whose last states are all that the logits are made of, position by position, so that states
    which nobody reads may be left out; None where there is no such part."""
    rows = some_tokens(model, 9, 5, 7)
    batch = heard(model, rows)
    slots = torch.tensor([[8, 1], [4, 2], [0, 6]], device=rows[0].device)
    found: list[str] = []

    def see(name: str, module: nn.Module, given: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if name and isinstance(states, Tensor) and states.shape[:2] == (3, 9):
            found.append(name)

    given = options(model, batch)
    with _watched(model, see):
        wanted = at(slots, model(**given).logits)

    def kept_by(name: str) -> Tensor:
        with _states_at(slots, model, name):
            return model(**given).logits

    return agreeing(list(dict.fromkeys(reversed(found))), kept_by, lambda: wanted)


@once
def output_layer(model: nn.Module) -> str | None:
    """The name of the linear layer whose outputs are the logits, token by token, so that those of tokens which nobody
    reads may be left out; None where there is none, as where a model multiplies by the weight itself or adds to the
    result."""
    rows = some_tokens(model, 9, 5, 7)
    slots = torch.tensor([[8, 1], [4, 2], [0, 6]], device=rows[0].device)
    given = options(model, heard(model, rows))
    seen: list[tuple[str, int]] = []

    def see(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if type(module) is nn.Linear:
            seen.append((name, output.shape[-1]))

    with _watched(model, see):
        wanted = answer_at(model, given, slots).logits
    tokens = torch.tensor([7, 2, 5, 3, 11], device=slots.device) % wanted.shape[-1]
    names = [name for name, width in reversed(seen) if width == wanted.shape[-1]]

    def said_by(name: str) -> Tensor:
        with rows_of(tokens, model.get_submodule(name)):  # all of them, where the layer is not plain
            return answer_at(model, given, slots).logits

    return agreeing(list(dict.fromkeys(names)), said_by, lambda: wanted[..., tokens])


@dataclass(frozen=True)
class Places:
    """How a model is told where tokens stand. first: the position of a text's first token; None: it sees by itself."""

    first: int | None

    def of(self, mask: Tensor) -> dict[str, Tensor]:
        """The argument for it, of a batch whose tokens stand where `mask` [B, T] is not 0."""
        return {} if self.first is None else {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0) + self.first}


def places_of(model: nn.Module) -> list[Places]:
    """The ways to try: as the model looks positions up itself, from 0, and by itself."""
    if is_text_to_text(model):  # whose decoder's texts begin together
        return [Places(None)]
    (text,) = some_tokens(model, 5)
    known = inspect.signature(model.forward).parameters
    if "position_ids" not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return [Places(None)]
    found: list[int | None] = []

    def see(name: str, module: nn.Module, given: Any, output: Any) -> None:
        ids = next((x for x in given if isinstance(x, Tensor)), None)
        if (
            isinstance(module, nn.Embedding)
            and ids is not None
            and ids.shape[-1:] == (5,)
            and not ids.is_floating_point()
        ):
            row = ids.reshape(-1, 5)[0].tolist()
            if row == list(range(row[0], row[0] + 5)):
                found.append(row[0])

    with _watched(model, see):
        tried(lambda: model(**options(model, padded([text]))).logits)
    return [Places(first) for first in dict.fromkeys([*found, 0, None])]


@once
def padded_left(model: nn.Module, length: int = LENGTH) -> Places | None:
    """How a model reads rows of other lengths that end together; None where padding in front of a text changes it."""
    length = length_of(model, length)
    rows = some_tokens(model, length, length // 2, 3)
    ends, batch = torch.arange(-2, 0, device=rows[0].device).unsqueeze(0), padded(rows, left=True)
    slots = (ends + length).expand(len(rows), -1)

    def each_alone() -> Tensor:
        return torch.cat([answer_at(model, options(model, padded([row])), ends + len(row)).logits for row in rows])

    def found_by(places: Places) -> Tensor:
        return answer_at(model, options(model, batch | places.of(batch["attention_mask"])), slots).logits

    return agreeing(places_of(model), found_by, each_alone)
