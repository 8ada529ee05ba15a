"""The surface `head`: a frozen body and a classification head, dense -> activation -> out.

Three kinds. "library": the head that the library's own sequence classifier of the architecture has, on the first token;
what is saved opens with plain transformers. "two-layer": a head of our own on pooled features of any encoder or
decoder, or on the first state of an encoder-decoder's decoder. "linear": the same without the inner layer. What is
saved of the latter two opens with a few lines (docs/saved-models.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradientless.errors import UserError, unknown
from gradientless.language import backbone, features, seen
from gradientless.language.data import Encoded, EncodedRows
from gradientless.language.metrics import highest
from gradientless.language.surfaces.base import Part, Prepared, Surface
from gradientless.language.surfaces.probe import linear_probe
from gradientless.language.surfaces.products import Products, measure
from gradientless.language.surfaces.saved import BODY, NOTE, body_of, read_head, read_note, write_head, write_note
from gradientless.language.tasks.base import Example

if TYPE_CHECKING:
    from gradientless.language.surfaces.head_session import HeadSession

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
}
HEADS = ("auto", "library", "linear", "two-layer")
POOLINGS = ("auto", "cls", "mean", "last")
STARTS = ("random", "probe")


@dataclass(frozen=True)
class LibraryHead:
    """Where an architecture's sequence classifier keeps its head. All of them read the first token.

    drops_input: whether dropout also acts on the features (it always acts between the layers).
    """

    dense: str
    activation: str
    out: str
    drops_input: bool = False


_ROBERTA = LibraryHead("classifier.dense", "tanh", "classifier.out_proj", drops_input=True)
LIBRARY_HEADS: dict[str, LibraryHead] = {
    "bert": LibraryHead("bert.pooler.dense", "tanh", "classifier"),
    "camembert": _ROBERTA,
    "distilbert": LibraryHead("pre_classifier", "relu", "classifier"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


@dataclass(frozen=True)
class HeadLayers:
    """The head's two layers; `names` are those of dense weight, dense bias, out weight and out bias, in this order."""

    dense: nn.Linear
    activation: str
    out: nn.Linear
    names: tuple[str, str, str, str]


@dataclass(frozen=True)
class LinearHead:
    """The one layer of a linear head; `names` are those of its weight and bias."""

    out: nn.Linear
    names: tuple[str, str] = ("head.out.weight", "head.out.bias")


class HeadSurface(Surface):
    """A frozen pretrained body with a classification head, the only part that is tuned.

    The body stays in eval mode whatever `train()` says: its dropout is no part of a head's training. The head and the
    features are float32 whatever the body's dtype is. Make one with `create` or `load`.
    """

    cacheable = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        labels: Sequence[str],
        layers: HeadLayers | LinearHead,
        *,
        kind: str,
        pooling: str,
        max_length: int,
        dropout: float,
        drops_input: bool = False,
        start: str = "random",
    ) -> None:
        super().__init__()
        self.model = model
        if isinstance(layers, LinearHead):
            self.head = nn.ModuleDict({"out": layers.out})
            self.session = None  # type: ignore[method-assign,assignment]
        elif kind == "two-layer":
            self.head = nn.ModuleDict({"dense": layers.dense, "out": layers.out})
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.kind = kind
        self.pooling = pooling
        self.max_length = max_length
        self.dropout = dropout
        self.start = start
        self._drops_input = drops_input
        self._layers = layers
        self._body_checksum: str | None = None
        self._products: Products | None = None
        for parameter in self.trainable().values():
            parameter.requires_grad_(True)
        self.eval()

    @classmethod
    def create(
        cls,
        model: str,
        labels: Sequence[str],
        *,
        head: str = "auto",
        pooling: str = "auto",
        hidden: int | None = None,
        activation: str = "auto",
        start: str = "random",
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        max_length: int = 128,
        dropout: float = 0.0,
    ) -> HeadSurface:
        """A pretrained model with a head for `labels` (names by class index).

        head: "library", "two-layer", "linear" or "auto": linear for start "probe"; else the library's where the
            architecture has one that we know and neither `pooling`, `hidden` nor `activation` asks for something else,
            but two-layer for `starter:` models, whose first token was not trained to stand for the text, and for
            decoders, whose first token cannot.
        pooling: "cls" (first token; of an encoder-decoder the decoder's, which is all that it has), "mean" (over the
            text's tokens), "last" (the text's last token). "auto" is the first token for library heads and
            encoder-decoders, else the mean.
        hidden: width of the two-layer head's inner layer, by default that of the features. activation: "relu", "tanh"
            or "gelu"; "auto" is the library head's own, and relu for the two-layer head.
        start: "random", or "probe": `begin` sets a linear head to the logistic regression on the training rows.
        seed: of the head's first values, drawn from a generator of its own. Heads of ours start as `nn.Linear`
            does; a library head starts as its library starts it (normal weights of the model's `initializer_range`,
            zero biases), save for tensors that the checkpoint holds in the right shape, which are kept: the pooler of a
            BERT, or the head of a classifier that was tuned before.
        dropout: probability, used by `logits` in training mode only.

        Raises `UserError` for anything unknown or not possible.
        """
        _check(labels, head, pooling, hidden, activation, max_length, dropout)
        if start not in STARTS:
            raise unknown("head", "start", start, STARTS)
        if start == "probe" and head not in ("auto", "linear"):
            raise UserError(f"head: start 'probe' needs head 'linear', got '{head}'")
        if start == "probe" and head == "auto":
            head = "linear"
        if head == "linear" and (hidden is not None or activation != "auto"):
            raise UserError(f"head: 'linear' has no inner layer, got hidden {hidden}, activation {activation}")
        config = backbone.load_config(model)
        answers = bool(getattr(config, "is_encoder_decoder", False))  # and its first state is read
        if answers and (pooling not in ("auto", "cls") or head == "library"):
            told = f"pooling {pooling}" if head != "library" else "head 'library'"
            raise UserError(
                f"head: '{model}' is an encoder-decoder, of which a new head reads the first state, got {told}"
            )
        library = LIBRARY_HEADS.get(config.model_type)
        if head == "auto":
            asks = pooling in ("mean", "last") or hidden is not None or activation not in ("auto", _own(library))
            untrained = model.startswith(backbone.STARTER) or backbone.is_decoder(config)
            head = "two-layer" if library is None or asks or untrained else "library"
        tokenizer = backbone.load_tokenizer(model, max_length)
        if head == "library":
            if library is None:
                known = ", ".join(sorted(LIBRARY_HEADS))
                raise UserError(f"head: 'library' is known for {known}, got '{config.model_type}'; use 'two-layer'")
            if pooling not in ("auto", "cls") or hidden is not None or activation not in ("auto", library.activation):
                raise UserError(
                    f"head: the library head of '{config.model_type}' has pooling cls, activation {library.activation} "
                    f"and no other width, got pooling {pooling}, activation {activation}, hidden {hidden}; "
                    "use 'two-layer'"
                )
            made = cls._create_library(model, tokenizer, labels, library, seed, device, dtype, max_length, dropout)
            made._look(model)
            return made
        body = backbone.load_backbone(model, dtype, device)
        width = seen.see(body).width
        generator = torch.Generator().manual_seed(seed)
        inner = width if hidden is None or head == "linear" else hidden
        dense = None if head == "linear" else _linear(width, inner, generator, device)
        made = cls._own_head(
            body,
            tokenizer,
            labels,
            dense,
            _linear(inner, len(labels), generator, device),
            pooling="cls" if answers else "mean" if pooling == "auto" else pooling,
            activation="relu" if activation == "auto" else activation,
            max_length=max_length,
            dropout=dropout,
            start=start,
        )
        made._look(model)
        return made

    def _look(self, model: str) -> None:
        """Raises `UserError` where the body cannot be read as it is to be."""
        seen.require("head", model, self._body(), self.max_length)
        answers = bool(getattr(self._body().config, "is_encoder_decoder", False))
        if self.pooling == "cls" and not answers and seen.see(self._body()).left_to_right:
            got = f"head 'library' for '{model}'; use 'two-layer'" if self.kind == "library" else f"cls for '{model}'"
            raise UserError(
                "head: pooling must be mean or last for a decoder, whose first token knows nothing of the text, "
                f"got {got}"
            )

    @classmethod
    def _own_head(
        cls,
        body: nn.Module,
        tokenizer: Any,
        labels: Sequence[str],
        dense: nn.Linear | None,
        out: nn.Linear,
        *,
        pooling: str,
        activation: str,
        max_length: int,
        dropout: float,
        start: str = "random",
    ) -> HeadSurface:
        names = ("head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias")
        return cls(
            body,
            tokenizer,
            labels,
            LinearHead(out) if dense is None else HeadLayers(dense, activation, out, names),
            kind="linear" if dense is None else "two-layer",
            pooling=pooling,
            max_length=max_length,
            dropout=dropout,
            start=start,
        )

    @classmethod
    def _create_library(
        cls,
        model: str,
        tokenizer: Any,
        labels: Sequence[str],
        library: LibraryHead,
        seed: int | None,
        device: str | torch.device,
        dtype: str | torch.dtype,
        max_length: int,
        dropout: float,
    ) -> HeadSurface:
        """seed None: the head must stand in the checkpoint, whole and in the right shape."""
        parts = (library.dense + ".weight", library.dense + ".bias", library.out + ".weight", library.out + ".bias")
        classifier, absent = backbone.load_classifier(model, len(labels), labels, dtype, device, seed or 0, parts)
        if seed is None and absent:
            raise UserError(f"{model}: the checkpoint must hold a head for {len(labels)} classes, got none or another")
        dense, out = classifier.get_submodule(library.dense), classifier.get_submodule(library.out)
        assert isinstance(dense, nn.Linear) and isinstance(out, nn.Linear)
        generator = torch.Generator().manual_seed(seed or 0)
        spread = float(getattr(classifier.config, "initializer_range", 0.02))
        for name in parts:  # in this order, so that what is drawn for one tensor depends on those before it only
            if name not in absent:
                continue
            tensor = classifier.get_parameter(name)
            fresh = torch.zeros(tensor.shape)
            if name.endswith("weight"):
                fresh.normal_(0.0, spread, generator=generator)
            with torch.no_grad():
                tensor.copy_(fresh)
        return cls(
            classifier,
            tokenizer,
            labels,
            HeadLayers(dense, library.activation, out, parts),
            kind="library",
            pooling="cls",
            max_length=max_length,
            dropout=dropout,
            drops_input=library.drops_input,
        )

    @property
    def width(self) -> int:
        """Entries of one row of features."""
        layers = self._layers
        return layers.out.in_features if isinstance(layers, LinearHead) else layers.dense.in_features

    @property
    def activation(self) -> str:
        """The activation between the head's layers, by name; "auto" for a head without any."""
        return "auto" if isinstance(self._layers, LinearHead) else self._layers.activation

    @property
    def device(self) -> torch.device:
        """Where the head stands (the body stands there too)."""
        return self._layers.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The body's dtype; the head is float32."""
        return next(self._body().parameters()).dtype

    def layers(self) -> HeadLayers:
        """The two tuned layers. Raises `UserError` for a linear head, which has one."""
        if isinstance(self._layers, LinearHead):
            raise UserError("head: must have two layers here, got a linear head")
        return self._layers

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tuned tensors by name: the library model's own names, or head.dense.* and head.out.*."""
        layers = self._layers
        tensors: tuple[Any, ...] = (layers.out.weight, layers.out.bias)
        if isinstance(layers, HeadLayers):
            tensors = (layers.dense.weight, layers.dense.bias, *tensors)
        return dict(zip(layers.names, cast("tuple[nn.Parameter, ...]", tensors), strict=True))

    def parts(self) -> dict[str, Part]:
        return {"head": Part(self.shape(), self.trainable())}

    def train(self, mode: bool = True) -> HeadSurface:
        """Training mode for the head alone."""
        super().train(mode)
        self.model.eval()
        return self

    def body_checksum(self) -> str:
        """sha256 of the frozen weights and settings, which the features depend on (computed once)."""
        if self._body_checksum is None:
            exclude = self._layers.names if self.kind == "library" else ()
            self._body_checksum = f"{backbone.checksum(self.model, exclude)} {backbone.settings(self.model)}"
        return self._body_checksum

    @property
    def needs_rows(self) -> bool:
        return self.start == "probe"

    def begin(self, encoded: EncodedRows, show: bool = True) -> str | None:
        """With start "probe": set the head to the linear probe of these rows."""
        if not self.needs_rows:
            return None
        assert isinstance(self._layers, LinearHead)
        found = np.asarray(features.compute(self, encoded, show=show, title="features: linear probe"))
        weight, bias = linear_probe(found, encoded.labels.numpy(), self.labels)
        out = self._layers.out
        with torch.no_grad():
            out.weight.copy_(weight)
            out.bias.copy_(bias)
        right = highest(torch.from_numpy(found @ weight.numpy().T + bias.numpy())) == encoded.labels
        return f"linear probe of {len(found):,} rows, {100 * float(right.double().mean()):.2f}% of them right"

    def pooled(self, batch: dict[str, Tensor]) -> Tensor:
        """Pooled features of a batch of tokens (`Encoded.batch`): float32 [B, width]."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        config: Any = self._body().config
        if getattr(config, "is_encoder_decoder", False):
            start = int(config.decoder_start_token_id)
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
        return _pool(backbone.hidden_states(self._body(), batch), batch["attention_mask"], self.pooling)

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """`pooled` without a graph."""
        return self.pooled(batch)

    def prepare(self, batch: Tensor | dict[str, Tensor]) -> Prepared:
        """The frozen part: of a batch of tokens, or of features ([B, width]) that were computed before."""
        features = self.features(batch) if isinstance(batch, dict) else batch.to(self.device, torch.float32)
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"head: features must be [B, {self.width}], got {list(features.shape)}")
        return Prepared(features)

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Rows as token ids: their texts and nothing else."""
        return Encoded(self.tokenizer, examples, self.max_length, backbone.known_tokens(self._body().config))

    def repeated(self, prepared: Prepared, times: int) -> Prepared:
        return Prepared(prepared.features.repeat(times, 1))

    def logits(self, prepared: Prepared, generator: torch.Generator | None = None) -> Tensor:
        """Class scores [B, C], differentiable in the head. Dropout acts in training mode only, where the library has
        it, drawn from `generator` (on the head's device) or else from torch's global one."""
        return self.scores(prepared.features, generator)

    def scores(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class scores [B, C] of pooled features [B, width]."""
        layers = self._layers
        features = self._drop(features, generator) if self._drops_input else features
        if isinstance(layers, LinearHead):
            return layers.out(self._drop(features, generator))
        inner = ACTIVATIONS[layers.activation](layers.dense(features))
        return layers.out(self._drop(inner, generator))

    def session(self, prepared: Prepared) -> HeadSession:
        """Many small changes of the head at once, on one batch."""
        from gradientless.language.surfaces.head_session import HeadSession

        layers = self.layers()
        return HeadSession(
            layers.dense.weight,
            layers.dense.bias,
            layers.out.weight,
            layers.out.bias,
            activation=layers.activation,
            names=layers.names,
            features=prepared.features,
        )

    def products(self) -> Products:
        if self._products is None:
            self._products = measure(self)
        return self._products

    def describe(self) -> str:
        return f"{self.shape()}: {self.products()}"

    def shape(self) -> str:
        """The head in a few words."""
        layers = self._layers
        inner = f" -> {layers.dense.out_features} ({layers.activation})" if isinstance(layers, HeadLayers) else ""
        return f"{self.kind} head on {self.pooling} pooling, {self.width}{inner} -> {layers.out.out_features}"

    @property
    def place(self) -> str:
        """Where the library's model lies in what `save` writes."""
        return "." if self.kind == "library" else BODY

    def save(self, folder: Path, surface: str = "head") -> None:
        """Write model, tokenizer and head into `folder` (made if absent); see docs/saved-models.md."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            backbone.save_pretrained(self.model, self.tokenizer, folder / self.place)
            if self.kind == "library":
                backbone.note_classes(folder)
            if self.kind != "library":
                write_head(folder, dict(self.head.items()))  # type: ignore[arg-type]
            note = {
                "surface": surface,
                "head": self.kind,
                "pooling": self.pooling,
                "activation": self.activation,
                "labels": list(self.labels),
                "max_length": self.max_length,
                "dropout": self.dropout,
                "dtype": str(self.dtype).removeprefix("torch."),
            }
            write_note(folder, note)
        except OSError as error:
            raise UserError(f"{folder}: the model must be writable there, got {error.strerror or error}") from None

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        surface: str = "head",
    ) -> HeadSurface:
        """What `save` wrote. dtype: of the body; by default the one it was saved in."""
        folder = Path(folder)
        note = read_note(folder, surface)
        kind = note["head"]
        if kind not in HEADS[1:]:
            raise unknown(f"{folder / NOTE}", "kind of head", kind, HEADS[1:])
        labels, pooling, activation = note["labels"], note["pooling"], note["activation"]
        max_length, dropout = note["max_length"], note["dropout"]
        _check(labels, kind, pooling, None, activation, max_length, dropout)
        dtype = note["dtype"] if dtype is None else dtype
        place = str(folder if kind == "library" else body_of(folder))
        tokenizer = backbone.load_tokenizer(place, max_length)
        if kind == "library":
            architecture = backbone.load_config(str(folder)).model_type
            if architecture not in LIBRARY_HEADS:
                raise unknown(f"{folder / NOTE}", "architecture with a library head", architecture, LIBRARY_HEADS)
            library = LIBRARY_HEADS[architecture]
            return cls._create_library(
                str(folder), tokenizer, labels, library, None, device, dtype, max_length, dropout
            )
        body = backbone.load_backbone(place, dtype, device)
        layers = read_head(folder, ("out",) if kind == "linear" else ("dense", "out"), len(labels), device)
        return cls._own_head(
            body,
            tokenizer,
            labels,
            None if kind == "linear" else layers[0],
            layers[-1],
            pooling=pooling,
            activation=activation,
            max_length=max_length,
            dropout=dropout,
        )

    def _body(self) -> nn.Module:
        return self.model.base_model if self.kind == "library" else self.model  # type: ignore[return-value]

    def _drop(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.dropout == 0:
            return values
        keep = torch.empty_like(values).bernoulli_(1 - self.dropout, generator=generator)
        return values * keep / (1 - self.dropout)


def _own(library: LibraryHead | None) -> str | None:
    return None if library is None else library.activation


def _check(
    labels: Sequence[str], head: str, pooling: str, hidden: int | None, activation: str, max_length: int, dropout: float
) -> None:
    if len(labels) < 2:
        raise UserError(f"head: at least two labels are needed, got {len(labels)}")
    if len(set(labels)) < len(labels):
        raise UserError(f"head: labels must differ, got {', '.join(labels)}")
    if head not in HEADS:
        raise unknown("head", "kind of head", head, HEADS)
    if pooling not in POOLINGS:
        raise unknown("head", "pooling", pooling, POOLINGS)
    if activation not in ("auto", *ACTIVATIONS):
        raise unknown("head", "activation", activation, ("auto", *ACTIVATIONS))
    if hidden is not None and hidden < 1:
        raise UserError(f"head: hidden must be >= 1, got {hidden}")
    if max_length < 1:
        raise UserError(f"head: max_length must be >= 1, got {max_length}")
    if not 0 <= dropout < 1:
        raise UserError(f"head: dropout must be >= 0 and < 1, got {dropout}")


def _linear(inputs: int, outputs: int, generator: torch.Generator, device: str | torch.device) -> nn.Linear:
    """A layer that starts as `nn.Linear` does (uniform within 1/sqrt(inputs)), drawn from `generator`."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer.to(device)


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """hidden [B, T, width], mask [B, T] with the padding at the right -> float32 [B, width]."""
    if pooling == "cls":
        return hidden[:, 0].float()
    lengths = mask.sum(dim=1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), (lengths - 1).clamp(min=0)].float()
    total = (hidden.float() * mask.unsqueeze(-1)).sum(dim=1)
    return total / lengths.clamp(min=1).unsqueeze(-1)
