"""A ladder side network: a narrow transformer of the backbone's own kind that reads the backbone's layers.

Sung, Cho and Bansal, "LST: Ladder side-tuning for parameter and memory efficient transfer learning", NeurIPS 2022,
https://arxiv.org/abs/2206.06522, section 3. With h_0 the backbone's embeddings, h_i the output of its layer i, s_i that
of side layer i and D_i the down-projections from width d to d/r:

    s_0 = D_0 h_0
    s_i = layer_i( μ_i D_i h_i + (1 - μ_i) s_{i-1} ),   μ_i = sigmoid(α_i / T)

k-LST (a talk of 2023, its only publication) puts in the place of D_i h_i what an attention over k layers makes of them,
at every token by itself:

    Σ_j w_j D_j h_j,   w = softmax_j( (Q_i s_{i-1}) · (D_j h_j + p_j) / sqrt(d/r) ),   j in the window of i

with p_j a learned position of the block in the window. k = 1 leaves LST, without a parameter more.

Side layers are the library's own, made from a shrunken configuration, so that masks, rotary angles and relative
positions are the family's. Their first values come from the backbone by structural pruning (section 3.3 there): the
most important channels of the residual stream (one set for the whole network, since the residual path joins all
layers), of every attention head and of every feed-forward layer are kept, rows and columns alike.

Differs from the paper: scores of a structure are summed over all its tensors (the paper's code multiplies those of a
block's tensors); pruned networks start with down-projections that pick the kept channels and an up-projection that puts
them back, so that the side network starts as the pruned backbone (the paper draws them); heads are pruned each by
itself, and rotary pairs whole, with their frequencies. The gate weighs the backbone, as the paper's text has it (its
code's gate weighs the side network, which is the same up to the sign of α).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.errors import Faults, UserError, unknown, whole
from gradientless.language import backbone

WINDOWS = ("trailing", "centred", "all")
DOWNS = ("linear", "pool", "low-rank")
SHARINGS = ("feature", "rung", "shared")
COMBINES = ("attention", "mean")


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps what the ladder needs.

    towers: tower -> (path of the stack below the body, path of its layers below the stack, of its last norm or "").
    sizes: names in the configuration of: width, feed-forward width, heads, layers. head: of the entries of a head,
    where they are free of width / heads. rotary: whether queries and keys are turned in pairs.
    axes: (pattern of a layer's tensor, set of its rows, set of its columns); the set "width" is the residual stream's,
    others belong to one layer. "x.q" keeps the same entries of its heads as "x.k", and "x.o" as "x.v".
    """

    towers: dict[str, tuple[str, str, str]]
    sizes: tuple[str, str, str, tuple[str, ...]]
    axes: tuple[tuple[str, str, str], ...]
    head: str | None = None
    rotary: bool = False
    embeddings: str = "embeddings"
    also: tuple[str, ...] = ()  # further entries of the configuration that are the width


_BERT = Family(
    {"stack": ("", "encoder.layer", "")},
    ("hidden_size", "intermediate_size", "num_attention_heads", ("num_hidden_layers",)),
    (
        (r"attention\.self\.query\.", "self.q", "width"),
        (r"attention\.self\.key\.", "self.k", "width"),
        (r"attention\.self\.value\.", "self.v", "width"),
        (r"attention\.output\.dense\.", "width", "self.o"),
        (r"intermediate\.dense\.", "inner", "width"),
        (r"(attention\.)?output\.LayerNorm\.", "width", ""),
        (r"output\.dense\.", "width", "inner"),
    ),
)
_LLAMA = Family(
    {"stack": ("", "layers", "norm")},
    ("hidden_size", "intermediate_size", "num_attention_heads", ("num_hidden_layers",)),
    (
        (r"self_attn\.q_proj\.", "self.q", "width"),
        (r"self_attn\.k_proj\.", "self.k", "width"),
        (r"self_attn\.v_proj\.", "self.v", "width"),
        (r"self_attn\.o_proj\.", "width", "self.o"),
        (r"mlp\.(gate|up)_proj\.", "inner", "width"),
        (r"mlp\.down_proj\.", "width", "inner"),
        (r"(input|post_attention)_layernorm\.", "width", ""),
    ),
    head="head_dim",
    rotary=True,
    embeddings="embed_tokens",
)
_T5 = Family(
    {
        "encoder": ("encoder", "block", "final_layer_norm"),
        "decoder": ("decoder", "block", "final_layer_norm"),
    },
    ("d_model", "d_ff", "num_heads", ("num_layers", "num_decoder_layers")),
    (
        (r"layer\.\d\.SelfAttention\.q\.", "self.q", "width"),
        (r"layer\.\d\.SelfAttention\.k\.", "self.k", "width"),
        (r"layer\.\d\.SelfAttention\.v\.", "self.v", "width"),
        (r"layer\.\d\.SelfAttention\.o\.", "width", "self.o"),
        (r"layer\.\d\.EncDecAttention\.q\.", "cross.q", "width"),
        (r"layer\.\d\.EncDecAttention\.k\.", "cross.k", "width"),
        (r"layer\.\d\.EncDecAttention\.v\.", "cross.v", "width"),
        (r"layer\.\d\.EncDecAttention\.o\.", "width", "cross.o"),
        (r"layer\.\d\.DenseReluDense\.wi(_\d)?\.", "inner", "width"),
        (r"layer\.\d\.DenseReluDense\.wo\.", "width", "inner"),
        (r"layer\.\d\.layer_norm\.", "width", ""),
        (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "", ""),
    ),
    head="d_kv",
    embeddings="embed_tokens",
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "camembert": _BERT,
    "distilbert": Family(
        {"stack": ("", "transformer.layer", "")},
        ("dim", "hidden_dim", "n_heads", ("n_layers",)),
        (
            (r"attention\.q_lin\.", "self.q", "width"),
            (r"attention\.k_lin\.", "self.k", "width"),
            (r"attention\.v_lin\.", "self.v", "width"),
            (r"attention\.out_lin\.", "width", "self.o"),
            (r"ffn\.lin1\.", "inner", "width"),
            (r"ffn\.lin2\.", "width", "inner"),
            (r"(sa|output)_layer_norm\.", "width", ""),
        ),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": Family(
        {"stack": ("decoder", "layers", "final_layer_norm")},
        ("hidden_size", "ffn_dim", "num_attention_heads", ("num_hidden_layers",)),
        (
            (r"self_attn\.q_proj\.", "self.q", "width"),
            (r"self_attn\.k_proj\.", "self.k", "width"),
            (r"self_attn\.v_proj\.", "self.v", "width"),
            (r"self_attn\.out_proj\.", "width", "self.o"),
            (r"fc1\.", "inner", "width"),
            (r"fc2\.", "width", "inner"),
            (r"(self_attn|final)_layer_norm\.", "width", ""),
        ),
        embeddings="embed_tokens",
        also=("word_embed_proj_dim",),
    ),
    "qwen2": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
    "xlm-roberta": _BERT,
}


@dataclass(frozen=True)
class Shape:
    """What a ladder is made of; `k_lst` says what its options mean.

    layers: the backbone layers (from 0) that have a side layer, by tower; None is every one.
    """

    reduction: int = 8
    layers: Sequence[int] | int | None = None
    temperature: float = 0.1
    k: int = 1
    window: str = "trailing"
    combine: str = "attention"
    down: str = "linear"
    rank: int = 16
    sharing: str = "feature"

    def check(self, owner: str, config: Any) -> None:
        """Raises `UserError` when `config`'s model cannot have such a ladder."""
        family = family_of(owner, config)
        width = getattr(config, family.sizes[0])
        for what in ("reduction", "k", "rank"):
            whole(owner, what, getattr(self, what))
        faults = Faults()
        divides = self.reduction >= 1 and width % self.reduction == 0
        with faults:
            if not divides:
                raise UserError(f"{owner}: reduction must divide the model's width {width}, got {self.reduction}")
        for what, value, known in (
            ("window", self.window, WINDOWS),
            ("way to combine", self.combine, COMBINES),
            ("kind of down-sampling", self.down, DOWNS),
            ("sharing", self.sharing, SHARINGS),
        ):
            with faults:
                if value not in known:
                    raise unknown(owner, what, value, known)
        depths = [getattr(config, name) for name in family.sizes[3]]
        with faults:
            if self.window != "all" and not 1 <= self.k <= min(depths):
                raise UserError(f"{owner}: k must be from 1 to the model's {min(depths)} layers, got {self.k}")
        with faults:
            if not self.temperature > 0:
                raise UserError(f"{owner}: temperature must be > 0, got {self.temperature}")
        with faults:
            if self.down == "low-rank" and divides and not 1 <= self.rank <= width // self.reduction:
                wide = f"the side network's width {width // self.reduction}"
                raise UserError(f"{owner}: rank must be from 1 to {wide}, got {self.rank}")
        with faults:
            for depth in depths:
                self.rungs(owner, depth)
        faults.tell()

    def rungs(self, owner: str, depth: int) -> tuple[int, ...]:
        """The backbone layers that have a side layer; a number of them stands for that many at equal distances."""
        if self.layers is None:
            return tuple(range(depth))
        several = isinstance(self.layers, Sequence) and all(type(layer) is int for layer in self.layers)
        if type(self.layers) is not int and not several:
            raise UserError(f"{owner}: layers must be a whole number or a list of whole numbers, got {self.layers!r}")
        if isinstance(self.layers, int):
            if not 1 <= self.layers <= depth:
                raise UserError(f"{owner}: layers must be from 1 to the model's {depth}, got {self.layers}")
            return tuple((i + 1) * depth // self.layers - 1 for i in range(self.layers))
        chosen = tuple(self.layers)
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
            raise UserError(f"{owner}: layers must be rising numbers from 0 to {depth - 1}, got {list(chosen)}")
        return chosen


def family_of(owner: str, config: Any, what: str = "architecture with a ladder") -> Family:
    """What we know of the model's architecture. what: how a line calls it where it is unknown."""
    if config.model_type not in FAMILIES:
        raise unknown(owner, what, config.model_type, FAMILIES)
    if config.model_type == "opt" and config.word_embed_proj_dim != config.hidden_size:
        raise UserError(f"{owner}: the model's states must all have one width, got an OPT that projects its embeddings")
    return FAMILIES[config.model_type]


def axes_of(family: Family, name: str) -> tuple[str, str]:
    """The sets of the rows and columns of a layer's tensor, by its name or the end of one that is longer."""
    for pattern, rows, columns in family.axes:
        if re.search(rf"(^|\.){pattern}", name):
            return rows, columns
    raise KeyError(name)


def window(rung: int, k: int, depth: int, kind: str) -> list[tuple[int, int]]:
    """(backbone layer, its place in the window) of what ladder `rung` (its backbone layer) reads.

    "trailing": the layer and the k - 1 before it. "centred": k // 2 before it, the layer, the rest behind it. "all":
    every layer. Places that fall outside the backbone are left out, so that windows at the edges are shorter.
    """
    if kind == "all":
        return [(layer, layer) for layer in range(depth)]
    first = rung - (k - 1 if kind == "trailing" else k // 2)
    return [(first + place, place) for place in range(k) if 0 <= first + place < depth]


class ChannelPool(nn.Module):
    """Means of groups of r channels that stand beside each other: [..., d] -> [..., d/r]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.width, -1)).mean(-1)


class Ladder(nn.Module):
    """The side network of one tower of the backbone (an encoder or a decoder has one, an encoder-decoder two).

    stack: the library's own module, narrow, with one layer a rung and no embeddings. same_heads: whether it has as many
    attention heads as the backbone. Gates start in the middle
    (α = 0, μ = 1/2).
    """

    def __init__(
        self,
        stack: nn.Module,
        shape: Shape,
        width: int,
        depth: int,
        layers_path: str,
        rungs: Sequence[int],
        same_heads: bool,
    ) -> None:
        super().__init__()
        side = width // shape.reduction
        self.same_heads = same_heads
        self.stack = stack
        self.shape, self.rungs, self.depth = shape, tuple(rungs), depth
        self._layers_path = layers_path
        self.dropout = 0.0
        self.windows = [window(rung, shape.k, depth, shape.window) for rung in self.rungs]
        wide = shape.window == "all"
        attends = shape.combine == "attention" and (shape.k > 1 or wide)
        self.gates = nn.Parameter(torch.zeros(len(self.rungs)))
        self.first = nn.Linear(width, side)  # of the embeddings, which have no window
        self.downs = nn.ModuleDict()
        for rung, seen in zip(self.rungs, self.windows, strict=True):
            for layer, _ in seen:
                key = self._down_key(rung, layer)
                if key not in self.downs:
                    self.downs[key] = _down(shape, width, side)
        self.queries = nn.ModuleDict()  # by number of the rung, where its window has more than one layer
        for number, seen in enumerate(self.windows):
            if attends and len(seen) > 1:
                self.queries[str(number)] = nn.Linear(side, side, bias=False)
        if attends:
            self.positions = nn.Parameter(torch.randn(depth if wide else shape.k, side) * 0.02)

    @property
    def features_read(self) -> tuple[int, ...]:
        """The backbone's states that are read: 0 is the embeddings, i the output of layer i - 1."""
        return (0, *sorted({layer + 1 for seen in self.windows for layer, _ in seen}))

    def layers(self) -> nn.ModuleList:
        return self.stack.get_submodule(self._layers_path)  # type: ignore[return-value]

    def forward(
        self, features: Mapping[int, Tensor], inputs: dict[str, Any], generator: torch.Generator | None = None
    ) -> Tensor:
        """The side network's last states [B, T, d/r].

        features: the backbone's states [B, T, d] by their number in `features_read`. inputs: what the stack takes
        beside its embeddings (masks, positions, an encoder's states). generator: of the connections' dropout.
        """
        dtype = self.gates.dtype
        low: dict[str, Tensor] = {}

        def lowered(rung: int, layer: int) -> Tensor:
            key = self._down_key(rung, layer)
            name = f"{key} {layer}"
            if name not in low:
                low[name] = self.downs[key](features[layer + 1].to(dtype))
            return low[name]

        def climb(number: int, states: Tensor) -> Tensor:
            rung, seen = self.rungs[number], self.windows[number]
            read = [self._dropped(lowered(rung, layer), generator) for layer, _ in seen]
            gate = torch.sigmoid(self.gates[number] / self.shape.temperature)
            return gate * self._combined(number, states, read) + (1 - gate) * states

        with _climbing(self.layers(), climb):
            return backbone.hidden_states(self.stack, inputs | {"inputs_embeds": self.first(features[0].to(dtype))})

    def _combined(self, number: int, states: Tensor, read: list[Tensor]) -> Tensor:
        if len(read) == 1:
            return read[0]
        values = torch.stack(read)  # [n, B, T, d/r]
        if str(number) not in self.queries:
            return values.mean(0)
        first, last = self.windows[number][0][1], self.windows[number][-1][1]  # places of a window follow each other
        query = self.queries[str(number)](states) / math.sqrt(states.shape[-1])
        # Elementwise: as products of matrices these are many of one row, whose copies cost more than their work.
        scores = (values * query).sum(-1) + (query @ self.positions[first : last + 1].T).movedim(-1, 0)
        return (scores.softmax(0).unsqueeze(-1) * values).sum(0)

    def _dropped(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """With whole connections left out, each row's by itself, in training mode."""
        if not self.training or self.dropout == 0:
            return values
        shape = (values.shape[0], *[1] * (values.ndim - 1))
        keep = torch.empty(shape, dtype=values.dtype, device=values.device).bernoulli_(
            1 - self.dropout, generator=generator
        )
        return values * keep / (1 - self.dropout)

    def _down_key(self, rung: int, layer: int) -> str:
        return {"feature": f"{layer}", "rung": f"{rung}", "shared": "all"}[self.shape.sharing]


@contextmanager
def _climbing(layers: nn.ModuleList, climb: Any) -> Iterator[None]:
    """While open, layer number n is given `climb(n, states)` for its states."""

    def hook(number: int) -> Any:
        def mix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (climb(number, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": climb(number, kwargs["hidden_states"])}

        return mix

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_pre_hook(hook(number), with_kwargs=True))
        yield


def _down(shape: Shape, width: int, side: int) -> nn.Module:
    if shape.down == "pool":
        return ChannelPool(side)
    if shape.down == "low-rank":
        return nn.Sequential(nn.Linear(width, shape.rank, bias=False), nn.Linear(shape.rank, side))
    return nn.Linear(width, side)


class Given(nn.Module):
    """In the place of embeddings: what is given for them."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, *others: Any, **more: Any) -> Tensor:
        return inputs_embeds


class Nothing(nn.Module):
    """In the place of embeddings that are added: nothing."""

    def forward(self, *others: Any, **more: Any) -> Tensor:
        return torch.zeros(())


def side_config(config: Any, shape: Shape, owner: str) -> Any:
    """The configuration of the narrow model: width, heads and feed-forward layers over r, one layer a rung.

    Heads keep their number where the width allows, and lose entries; else there are as many as divide the width.
    """
    family = family_of(owner, config)
    r = shape.reduction
    width, inner, heads, depths = family.sizes
    side = copy.deepcopy(config)
    narrow = getattr(config, width) // r
    setattr(side, width, narrow)
    setattr(side, inner, max(1, getattr(config, inner) // r))
    for name in depths:
        setattr(side, name, len(shape.rungs(owner, getattr(config, name))))
    count = getattr(config, heads)
    if family.head is not None:
        entries = head_entries(family, config) // r
        setattr(side, family.head, max(2, entries - entries % 2) if family.rotary else max(1, entries))
    else:
        setattr(side, heads, max(n for n in range(1, min(count, narrow) + 1) if narrow % n == 0))
    for name in family.also:
        setattr(side, name, narrow)
    return side


def head_entries(family: Family, config: Any) -> int:
    """Entries of one attention head."""
    own = getattr(config, family.head, None) if family.head is not None else None
    return int(own or getattr(config, family.sizes[0]) // getattr(config, family.sizes[2]))


def build(config: Any, shape: Shape, seed: int, owner: str) -> nn.ModuleDict:
    """The side network of `config`'s model, with the library's random values: a `Ladder` for each tower, and `up`.

    Values are drawn from `seed`; torch's global generator is left as it was.
    """
    family = family_of(owner, config)
    width = getattr(config, family.sizes[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        narrow_config = side_config(config, shape, owner)
        same_heads = getattr(narrow_config, family.sizes[2]) == getattr(config, family.sizes[2])
        narrow = backbone.from_config(narrow_config)
        network = nn.ModuleDict()
        for number, (tower, (path, layers, _)) in enumerate(family.towers.items()):
            stack = narrow.get_submodule(path)
            setattr(stack, family.embeddings, Given() if family.embeddings == "embeddings" else None)
            if config.model_type == "opt":
                stack.embed_positions = Nothing()
            if getattr(stack, "pooler", None) is not None:
                stack.pooler = None  # type: ignore[assignment]
            depth = getattr(config, family.sizes[3][number])
            network[tower] = Ladder(stack, shape, width, depth, layers, shape.rungs(owner, depth), same_heads)
        network["up"] = nn.Linear(width // shape.reduction, width)
    return network.eval()


def tower_inputs(tensors: Mapping[str, Any], tower: str, before: Tensor | None) -> dict[str, Any]:
    """What a tower takes beside its tokens. before: the last states of the encoder that a decoder reads."""
    mask = tensors["attention_mask"]
    if tower == "decoder":
        return {"encoder_hidden_states": before, "encoder_attention_mask": mask}
    return {"attention_mask": mask} | {name: tensors[name] for name in ("position_ids",) if name in tensors}


def states_of(
    body: nn.Module, family: Family, tensors: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[int, Tensor]], Tensor]:
    """The backbone's states [B, T, d] by tower and number (0 is the embeddings, i the output of layer i - 1), before
    any last norm; and its own last states. wanted: the numbers to keep, by tower."""
    kept: dict[str, dict[int, Tensor]] = {tower: {} for tower in family.towers}

    def before(tower: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[tower][0] = args[0] if args else kwargs["hidden_states"]

        return keep

    def behind(tower: str, number: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[tower][number] = output[0] if isinstance(output, tuple) else output

        return keep

    last: Tensor | None = None
    with ExitStack() as stack:
        for tower, (path, layers, _) in family.towers.items():
            modules = body.get_submodule(f"{path}.{layers}".strip("."))
            assert isinstance(modules, nn.ModuleList)
            numbers = wanted.get(tower, ())
            if 0 in numbers:
                stack.enter_context(modules[0].register_forward_pre_hook(before(tower), with_kwargs=True))
            for number in numbers:
                if number:
                    stack.enter_context(modules[number - 1].register_forward_hook(behind(tower, number)))
        if tuple(family.towers) == ("stack",):
            last = backbone.hidden_states(body, dict(tensors))
        else:
            for tower, (path, _, _) in family.towers.items():
                ids = tensors["decoder_input_ids" if tower == "decoder" else "input_ids"]
                inputs = tower_inputs(tensors, tower, last) | {"input_ids": ids}
                last = backbone.hidden_states(body.get_submodule(path), inputs)
    assert last is not None
    return kept, last
