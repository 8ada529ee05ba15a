"""The surface `full`: every parameter that the class scores depend on is tuned.

Two readouts. "prompt": a language model answers a prompt, and its scores of the label words are the class scores; what
is saved is the plain language model. "head": the classification heads of the surface `head`, with the body tuned too;
what is saved is what that surface saves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradientless.errors import UserError, unknown
from gradientless.language import backbone, readouts, seen
from gradientless.language.data import Encoded, EncodedRows
from gradientless.language.dropout import dropping
from gradientless.language.prompting import MAX_NEW_TOKENS, EncodedAnswers, PromptEncoder
from gradientless.language.surfaces.base import Part, PreparedTokens, Surface
from gradientless.language.surfaces.head import HeadSurface
from gradientless.language.surfaces.products import Products, of_whole
from gradientless.language.surfaces.saved import NOTE, read_note, write_note
from gradientless.language.tasks.base import Example, Prompt

READOUTS = ("auto", "head", "prompt")


class Reading(ABC):
    """One way from tokens to class scores through a model that is tuned whole.

    model: the module whose parameters are tuned. fixed: beginnings of the names of those that are not, since they have
    no effect, or are computed by the library (`backbone.not_learned`).
    """

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int
    width: int
    fixed: tuple[str, ...] = ()
    place: str = "."  # of the library's model in what `save` writes

    @property
    def body(self) -> nn.Module:
        """The library's model."""
        return self.model

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> EncodedRows: ...
    @abstractmethod
    def scores(self, tensors: dict[str, Tensor], generator: torch.Generator | None) -> Tensor: ...
    @abstractmethod
    def describe(self) -> str: ...
    @abstractmethod
    def save(self, folder: Path, dropout: float) -> None: ...

    needs_rows: bool = False
    encoder: PromptEncoder | None = None

    def begin(self, encoded: EncodedRows, show: bool) -> str | None:
        return None

    def meet(self, tensors: dict[str, Tensor]) -> None:
        """Find out what has to be known of the model to read a batch like this, before noise is put into it."""
        return


class PromptReading(Reading):
    """A language model's scores of label words, choices or answers, behind a prompt; and what it writes there."""

    encoder: PromptEncoder

    def __init__(self, model: nn.Module, encoder: PromptEncoder) -> None:
        self.model, self.encoder = model, encoder
        self.tokenizer, self.labels, self.max_length = encoder.tokenizer, encoder.labels, encoder.max_length
        self.width = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
        self.fixed = tuple(backbone.not_learned(model))

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        return self.encoder.encode(examples)

    def scores(self, tensors: dict[str, Tensor], generator: torch.Generator | None) -> Tensor:
        return readouts.scores(self.model, tensors, self.encoder.words, share=self.encoder.family == "causal")

    def meet(self, tensors: dict[str, Tensor]) -> None:
        readouts.settle(self.model, tensors, self.encoder.words, self.max_length)

    def describe(self) -> str:
        words = ", ".join(f"{self.encoder.prompt.words[label]!r}" for label in self.labels)
        words = words or f"answers said {self.encoder.prompt.answer!r}"
        return f"full {self.encoder.family} model on the prompt {self.encoder.prompt.text!r} with {words}"

    def save(self, folder: Path, dropout: float) -> None:
        encoder = self.encoder
        folder.mkdir(parents=True, exist_ok=True)
        backbone.save_pretrained(self.model, self.tokenizer, folder)
        note = {
            "surface": "full",
            "readout": "prompt",
            "prompt": {
                "text": encoder.prompt.text,
                "words": {label: encoder.prompt.words[label] for label in self.labels},
                "score": encoder.prompt.score,
                **({} if self.labels else {"answer": encoder.prompt.answer}),
            },
            "labels": list(self.labels),
            "max_length": self.max_length,
            "truncation": encoder.truncation,
            "padding": encoder.padding,
            "max_new_tokens": encoder.max_new_tokens,
            "dropout": dropout,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }
        write_note(folder, note)


class HeadReading(Reading):
    """A classification head on pooled features."""

    def __init__(self, head: HeadSurface) -> None:
        self.head = head
        # A head of ours stands beside the body; the library's stands inside its model.
        self.model = head.model if head.kind == "library" else head
        self.tokenizer, self.labels, self.max_length, self.width = (
            head.tokenizer,
            head.labels,
            head.max_length,
            head.width,
        )
        computed = backbone.not_learned(head.model)
        # The body's own pooler is no part of pooled features.
        own = ("model.pooler.", *(f"model.{name}" for name in computed))
        self.fixed = tuple(computed) if head.kind == "library" else own
        self.needs_rows = head.needs_rows
        self.place = head.place

    @property
    def body(self) -> nn.Module:
        return self.head.model

    def encode(self, examples: Sequence[Example]) -> Encoded:
        return self.head.encode(examples)

    def scores(self, tensors: dict[str, Tensor], generator: torch.Generator | None) -> Tensor:
        return self.head.scores(self.head.pooled(tensors), generator)

    def describe(self) -> str:
        return f"full model under a {self.head.shape()}"

    def save(self, folder: Path, dropout: float) -> None:
        self.head.save(folder, "full")

    def begin(self, encoded: EncodedRows, show: bool) -> str | None:
        return self.head.begin(encoded, show)


class FullSurface(Surface):
    """A pretrained model, all of it tuned. Make one with `create` or `load`.

    The model stays in eval mode whatever `train()` says: dropout is its own affair (`language.dropout`).
    """

    def __init__(self, reading: Reading, *, dropout: float) -> None:
        super().__init__()
        self.model = reading.model
        self.reading = reading
        self.tokenizer, self.labels, self.max_length = reading.tokenizer, reading.labels, reading.max_length
        self.dropout = dropout
        self._products: Products | None = None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(reading.fixed))
        self.eval()

    @classmethod
    def create(
        cls,
        model: str,
        labels: Sequence[str],
        *,
        readout: str = "auto",
        prompt: Prompt | Mapping[str, Prompt] | None = None,
        truncation: str = "right",
        padding: str = "right",
        max_new_tokens: int = MAX_NEW_TOKENS,
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
    ) -> FullSurface:
        """A pretrained model that is tuned whole, for `labels` (names by class index).

        readout: "prompt", "head" or "auto": the prompt where there is one.
        prompt: template and label words; or those by family of models, of which the model's own is taken.
        truncation, padding: sides, "right" or "left", of prompts. max_new_tokens: of a text that the model writes.
        head, pooling, hidden, activation, start, seed: of the readout "head"; see `HeadSurface.create`.
        dropout: probability wherever the model drops, its attention included, in training mode only; what the model's
            own configuration says of rates is not used.

        All parameters are of `dtype`, but for a head, which is float32. Raises `UserError` for anything unknown or not
        possible.
        """
        if readout not in READOUTS:
            raise unknown("full", "readout", readout, READOUTS)
        if not 0 <= dropout < 1:
            raise UserError(f"full: dropout must be >= 0 and < 1, got {dropout}")
        if readout == "auto":
            readout = "head" if prompt is None else "prompt"
        if readout == "head":
            made = HeadSurface.create(
                model,
                labels,
                head=head,
                pooling=pooling,
                hidden=hidden,
                activation=activation,
                start=start,
                seed=seed,
                device=device,
                dtype=dtype,
                max_length=max_length,
                dropout=dropout,
            )
            return cls(HeadReading(made), dropout=dropout)
        if start != "random":
            raise UserError(f"full: start '{start}' needs the readout 'head', got 'prompt'")
        if prompt is None:
            raise UserError("full: readout 'prompt' needs a prompt, got none")
        encoder = prompt_encoder(model, prompt, labels, max_length, truncation, padding, "full", max_new_tokens)
        module = speaking("full", model, encoder, dtype, device)
        seen.require_dropout("full", model, module, dropout)
        return cls(PromptReading(module, encoder), dropout=dropout)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def width(self) -> int:
        return self.reading.width

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that is learned and has an effect, by its name in `model`; tied ones once."""
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def head_tensors(self) -> dict[str, nn.Parameter]:
        """The classification head's; none behind a prompt."""
        return self.reading.head.trainable() if isinstance(self.reading, HeadReading) else {}

    def parts(self) -> dict[str, Part]:
        head = self.head_tensors()
        own = {name: tensor for name, tensor in self.trainable().items() if name not in head}
        found = {"model": Part("weights of the model", own)}
        if isinstance(self.reading, HeadReading):
            found["head"] = Part(self.reading.head.shape(), head)
        return found

    @property
    def prompted(self) -> bool:
        return isinstance(self.reading, PromptReading)

    @property
    def plain(self) -> str | None:
        return self.reading.place

    def train(self, mode: bool = True) -> FullSurface:
        super().train(mode)
        self.model.eval()
        if isinstance(self.reading, HeadReading):
            self.reading.head.training = mode  # which drops by itself
        return self

    @property
    def needs_rows(self) -> bool:
        return self.reading.needs_rows

    def begin(self, encoded: EncodedRows, show: bool = True) -> str | None:
        return self.reading.begin(encoded, show)

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        return self.reading.encode(examples)

    def encode_answers(self, examples: Sequence[Example]) -> EncodedAnswers:
        if self.reading.encoder is None:
            return super().encode_answers(examples)
        return self.reading.encoder.encode_answers(examples)

    def encode_questions(self, examples: Sequence[Example]) -> EncodedAnswers:
        if self.reading.encoder is None:
            return super().encode_questions(examples)
        return self.reading.encoder.encode_questions(examples)

    def blank(self) -> Example:
        return super().blank() if self.reading.encoder is None else self.reading.encoder.blank()

    def texts(self, prepared: PreparedTokens) -> list[str]:
        encoder = self.reading.encoder
        if encoder is None:
            return super().texts(prepared)
        # Noise inside the model tells copies of a batch apart by where their rows stand.
        whole, limit = prepared.copies > 1, encoder.max_new_tokens
        return encoder.texts(readouts.written(self.model, prepared.tensors, encoder.stops, limit, whole))

    def prepare(self, batch: dict[str, Tensor]) -> PreparedTokens:
        """The batch on the model's device."""
        tensors = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.reading.meet(tensors)
        return PreparedTokens(tensors)

    def repeated(self, prepared: PreparedTokens, times: int) -> PreparedTokens:
        tensors = {name: torch.cat([tensor] * times) for name, tensor in prepared.tensors.items()}
        return PreparedTokens(tensors, prepared.copies * times)

    def logits(self, prepared: PreparedTokens, generator: torch.Generator | None = None) -> Tensor:
        """Class scores [B, C], float32. Dropout inside the model is seeded from `generator`."""
        with dropping(self.dropout if self.training else 0.0, generator):
            return self.reading.scores(prepared.tensors, generator)

    def products(self) -> Products:
        if self._products is None:
            self._products = of_whole(self)
        return self._products

    def touched(self, prepared: PreparedTokens) -> dict[str, Tensor]:
        """The batch's tokens in the table of a single tower; of one that is tied to an output layer, the label words
        too, or nothing where all of that layer is read."""
        body: Any = self.reading.body
        try:
            table = body.get_input_embeddings()
        except NotImplementedError:  # the library's answer for a model whose tokens have several tables
            return {}
        if type(table) is not nn.Embedding or body.config.is_encoder_decoder or "input_ids" not in prepared.tensors:
            return {}
        name = next((name for name, tensor in self.trainable().items() if tensor is table.weight), None)
        if name is None:
            return {}
        rows = prepared.tensors["input_ids"].unique()
        holders = [m for m in body.modules() if any(p is table.weight for p in m.parameters(recurse=False))]
        others = [m for m in holders if m is not table]
        if seen.uses_of_table(body) > len(others):  # past the modules that hold it
            return {}
        if others:
            encoder = self.reading.encoder
            read = None if encoder is None else readouts.rows_read(body, prepared.tensors, encoder.words)
            if read is None or others != [read[0]]:
                return {}
            rows = torch.cat([rows, read[1].to(rows.device)]).unique()
        return {name: rows}

    def describe(self) -> str:
        return f"{self.reading.describe()}: {self.products()}"

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and prompt or head into `folder` (made if absent); see docs/saved-models.md."""
        try:
            self.reading.save(Path(folder), self.dropout)
        except OSError as error:
            raise UserError(f"{folder}: the model must be writable there, got {error.strerror or error}") from None

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
    ) -> FullSurface:
        """What `save` wrote. dtype: of the body; by default the one it was saved in."""
        folder = Path(folder)
        note = read_note(folder, "full")
        if note.get("readout") != "prompt":
            return cls(HeadReading(HeadSurface.load(folder, device, dtype, "full")), dropout=note["dropout"])
        try:
            prompt = Prompt(**note["prompt"])
        except TypeError as error:
            raise UserError(f"{folder / NOTE}: prompt must hold text, words and score ({error})") from None
        return cls.create(
            str(folder),
            note["labels"],
            readout="prompt",
            prompt=prompt,
            truncation=note["truncation"],
            padding=note["padding"],
            max_new_tokens=note.get("max_new_tokens", MAX_NEW_TOKENS),
            device=device,
            dtype=note["dtype"] if dtype is None else dtype,
            max_length=note["max_length"],
            dropout=note["dropout"],
        )


def prompt_encoder(
    model: str,
    prompt: Prompt | Mapping[str, Prompt],
    labels: Sequence[str],
    max_length: int,
    truncation: str,
    padding: str,
    owner: str = "full",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> PromptEncoder:
    config = backbone.load_config(model)
    family = backbone.family(config)
    if not isinstance(prompt, Prompt):
        if family not in prompt:
            have = ", ".join(prompt) or "none"
            raise UserError(f"{owner}: '{model}' needs a prompt for {family} models, got those for: {have}")
        prompt = prompt[family]
    return PromptEncoder(
        backbone.load_tokenizer(model, max_length),
        prompt,
        labels,
        family,
        max_length,
        truncation=truncation,
        padding=padding,
        start=getattr(config, "decoder_start_token_id", None),
        max_new_tokens=max_new_tokens,
        known=backbone.known_tokens(config),
    )


def speaking(
    owner: str, model: str, encoder: PromptEncoder, dtype: str | torch.dtype, device: str | torch.device
) -> nn.Module:
    """The language model that answers the encoder's prompts. Raises `UserError` where it cannot read them."""
    module = backbone.load_language_model(model, encoder.family, dtype, device)
    seen.require(owner, model, module, encoder.max_length)
    if encoder.family == "causal" and not seen.see(module).left_to_right:
        raise UserError(
            f"{owner}: a prompt needs a model that reads left to right or fills masks, got '{model}', whose states "
            "know the tokens behind them; a head reads it"
        )
    return module
