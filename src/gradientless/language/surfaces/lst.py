"""The surfaces `lst` and `k_lst`: a frozen backbone and a narrow side network that reads its layers (`ladder`).

The side network's last states are projected up to the backbone's width and read in its place: by the language model's
own output layer (readout "prompt"), or by a new classifier ("classifier"). No gradient runs through the backbone, whose
states of a batch are computed once (`prepare`) and used as often as one likes.

k-LST has no publication beyond a talk; how it is read here stands in `ladder`, and the options in `KLstSurface.create`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradientless.errors import Faults, UserError, unknown, whole
from gradientless.language import backbone, reading, readouts, seen
from gradientless.language.data import Encoded, EncodedSpans, EncodedTexts, batch_indices
from gradientless.language.dropout import dropping
from gradientless.language.prompting import MAX_NEW_TOKENS, EncodedAnswers, PromptEncoder
from gradientless.language.surfaces.base import EncodedRows, Part, Surface
from gradientless.language.surfaces.full import prompt_encoder, speaking
from gradientless.language.surfaces.head import POOLINGS
from gradientless.language.surfaces.head import _pool as pool
from gradientless.language.surfaces.ladder import Ladder, Shape, build, family_of, states_of, tower_inputs, window
from gradientless.language.surfaces.products import Products, measure
from gradientless.language.surfaces.pruning import Sums, fishers, magnitudes, prune, sums
from gradientless.language.surfaces.saved import BODY, NOTE, PROMPT, body_of, read_note, write_note
from gradientless.language.tasks.base import Example, Prompt
from gradientless.schema import Maybe, fits, of_fields

READOUTS = ("auto", "prompt", "classifier", "tokens")
INITS = ("fisher", "magnitude", "random")
SIDE_FILE = "side.safetensors"


@dataclass(frozen=True, eq=False)
class PreparedLadder:
    """A batch of tokens, and the backbone's states of it by tower and number (None where the backbone is tuned too).

    It can be kept: nothing in it depends on the side network.
    """

    tensors: dict[str, Tensor]
    features: dict[str, dict[int, Tensor]] | None


@dataclass(frozen=True)
class _Options:
    """What is saved beside the shape."""

    readout: str
    init: str
    fisher_rows: int
    pooling: str
    unfrozen: int
    connection_dropout: float
    dropout: float
    max_length: int
    truncation: str
    padding: str
    seed: int
    max_new_tokens: int = MAX_NEW_TOKENS


_NOTE = {**of_fields(_Options), "prompt": Maybe(PROMPT), "shape": of_fields(Shape)}


class LadderModel(nn.Module):
    """The backbone (a language model, or a body without a head), the side network and perhaps a classifier."""

    def __init__(self, body: nn.Module, side: nn.ModuleDict, head: nn.Linear | None) -> None:
        super().__init__()
        self.backbone = body
        self.side = side
        self.head = head


class LstSurface(Surface):
    """Ladder side-tuning. The side network and the classifier are float32 whatever the backbone's dtype is; unfrozen
    layers of the backbone are of its own. Make one with `create`.

    The model stays in eval mode whatever `train()` says: dropout is the surface's own affair (`language.dropout`).
    """

    owner: ClassVar[str] = "lst"
    keeps_states: ClassVar[bool] = True

    def __init__(
        self,
        model: LadderModel,
        tokenizer: Any,
        labels: Sequence[str],
        encoder: PromptEncoder | None,
        shape: Shape,
        options: _Options,
    ) -> None:
        super().__init__()
        self.model: LadderModel = model
        self.tokenizer, self.labels, self.encoder = tokenizer, tuple(labels), encoder
        self.shape, self.options = shape, options
        self.max_length = options.max_length
        self.dropout = max(options.dropout, options.connection_dropout)
        self._config: Any = model.backbone.config
        self._family = family_of(self.owner, self._config)
        self._init = options.init
        self._products: Products | None = None
        model.requires_grad_(False)
        model.side.requires_grad_(True)
        if model.head is not None:
            model.head.requires_grad_(True)
        for layer in self._unfrozen():
            layer.requires_grad_(True)
        for ladder in self._ladders().values():
            ladder.dropout = options.connection_dropout
        self.eval()

    @classmethod
    def create(
        cls,
        model: str,
        labels: Sequence[str],
        *,
        readout: str = "auto",
        prompt: Prompt | Mapping[str, Prompt] | None = None,
        reduction: int = 8,
        layers: Sequence[int] | int | None = None,
        temperature: float = 0.1,
        init: str = "fisher",
        fisher_rows: int = 64,
        pooling: str = "auto",
        connection_dropout: float = 0.0,
        truncation: str = "right",
        padding: str = "right",
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        max_length: int = 128,
        dropout: float = 0.0,
    ) -> LstSurface:
        """A pretrained model with a side network for `labels` (names by class index).

        readout: "prompt" (a language model answers `prompt`), "classifier" (a linear layer on pooled states; "head" is
            the same) or "auto": the prompt where there is one. "tokens": no classes, but the texts' own tokens, as the
            language model was pretrained to say them (`EncodedTexts`, `EncodedSpans`); to pretrain a side network.
        pooling: of the classifier: "cls", "mean" or "last"; "auto" is the last token of a decoder, the first of an
            encoder-decoder's answer, else the mean.
        reduction: r; the side network's width is d/r. layers: the backbone layers (from 0) that have a side layer, or
            how many, at equal distances; None is all. temperature: T of the gates.
        init: of the side network: "fisher" or "magnitude" (structural pruning by these scores), or "random" (the
            library's first values). "fisher" needs rows: `begin` computes it on `fisher_rows` of them; until then the
            network stands as by "magnitude".
        max_new_tokens: of a text that the model writes.
        connection_dropout: probability with which a row does without a ladder connection; dropout: in the side layers;
            both in training mode only. seed: of all first values.

        Raises `UserError` for anything unknown or not possible.
        """
        shape = Shape(reduction=reduction, layers=layers, temperature=temperature)
        options = _Options(
            readout=readout,
            init=init,
            fisher_rows=fisher_rows,
            pooling=pooling,
            unfrozen=0,
            connection_dropout=connection_dropout,
            dropout=dropout,
            max_length=max_length,
            truncation=truncation,
            padding=padding,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        return cls._create(model, labels, prompt, shape, options, device, dtype)

    @classmethod
    def _create(
        cls,
        model: str,
        labels: Sequence[str],
        prompt: Prompt | Mapping[str, Prompt] | None,
        shape: Shape,
        options: _Options,
        device: str | torch.device,
        dtype: str | torch.dtype,
    ) -> Any:
        if options.readout in ("auto", "head"):
            prompted = options.readout == "auto" and prompt is not None
            options = replace(options, readout="prompt" if prompted else "classifier")
        config = backbone.load_config(model)
        cls._check(model, labels, prompt, shape, options, config)
        side = build(config, shape, options.seed, cls.owner)
        encoder, head = None, None
        if options.readout == "prompt":
            assert prompt is not None
            sides = options.truncation, options.padding
            encoder = prompt_encoder(
                model, prompt, labels, options.max_length, *sides, cls.owner, options.max_new_tokens
            )
            body = speaking(cls.owner, model, encoder, dtype, device)
        elif options.readout == "tokens":
            body = backbone.load_language_model(model, backbone.family(config), dtype, device)
        else:
            body = backbone.load_backbone(model, dtype, device)
            width = side["up"].out_features
            assert isinstance(width, int)
            head = nn.Linear(width, len(labels), device="meta").to_empty(device="cpu")
            generator = torch.Generator().manual_seed(options.seed)
            with torch.no_grad():
                head.weight.normal_(0.0, 0.02, generator=generator)
                head.bias.zero_()
            head = head.to(device)
        if encoder is None:
            seen.require(cls.owner, model, body, options.max_length)
        tokenizer = encoder.tokenizer if encoder else backbone.load_tokenizer(model, options.max_length)
        surface = cls(LadderModel(body, side.to(device), head), tokenizer, labels, encoder, shape, options)
        if options.init != "random":
            surface.initialise(magnitudes(surface.body, config, cls.owner))
        return surface

    @classmethod
    def _check(
        cls,
        model: str,
        labels: Sequence[str],
        prompt: Prompt | Mapping[str, Prompt] | None,
        shape: Shape,
        options: _Options,
        config: Any,
    ) -> None:
        owner, faults = cls.owner, Faults()
        with faults:
            needed = bool(labels) or options.readout not in ("prompt", "tokens")  # choices and tokens stand in the rows
            if needed and (len(labels) < 2 or len(set(labels)) < len(labels)):
                raise UserError(f"{owner}: two labels or more that differ are needed, got {', '.join(labels)}")
        with faults:
            if options.readout not in READOUTS:
                raise unknown(owner, "readout", options.readout, READOUTS)
            if options.readout == "prompt" and prompt is None:
                raise UserError(f"{owner}: readout 'prompt' needs a prompt, got none")
        for what, value, known in (("pooling", options.pooling, POOLINGS), ("init", options.init, INITS)):
            with faults:
                if value not in known:
                    raise unknown(owner, what, value, known)
        with faults:
            if whole(owner, "fisher_rows", options.fisher_rows) < 1:
                raise UserError(f"{owner}: fisher_rows must be >= 1, got {options.fisher_rows}")
        for what, share in (("dropout", options.dropout), ("connection_dropout", options.connection_dropout)):
            with faults:
                if not 0 <= share < 1:
                    raise UserError(f"{owner}: {what} must be >= 0 and < 1, got {share}")
        with faults:
            limit = backbone.longest(config)
            if options.max_length < 1 or (limit is not None and options.max_length > limit):
                raise UserError(
                    f"{owner}: max_length must be from 1 to {limit}, the positions of '{model}', "
                    f"got {options.max_length}"
                )
        with faults:
            shape.check(owner, config)
            cls._check_unfrozen(shape, options, getattr(config, family_of(owner, config).sizes[3][-1]))
        faults.tell()

    @classmethod
    def _check_unfrozen(cls, shape: Shape, options: _Options, depth: int) -> None:
        owner = cls.owner
        if not 0 <= whole(owner, "unfrozen", options.unfrozen) <= depth:
            raise UserError(f"{owner}: unfrozen must be from 0 to the model's {depth} layers, got {options.unfrozen}")
        read = {n for rung in shape.rungs(owner, depth) for n, _ in window(rung, shape.k, depth, shape.window)}
        if options.unfrozen and max(read) < depth - 1:
            raise UserError(
                f"{owner}: unfrozen needs a ladder that reads the model's last layer, {depth - 1}, got none behind "
                f"layer {max(read)}: no gradient would reach the last one"
            )

    @property
    def body(self) -> nn.Module:
        """The backbone without its output layer."""
        return self.model.backbone.base_model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.model.side["up"].weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.backbone.parameters()).dtype

    @property
    def width(self) -> int:
        return int(getattr(self._config, self._family.sizes[0]))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The side network's tensors, the classifier's, and those of unfrozen layers, by `model`'s names."""
        return {name: tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}

    def parts(self) -> dict[str, Part]:
        tensors, found = self.trainable(), {}
        for part, means in (("side", f"side network ({self._told()})"), ("head", self._pooled())):
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(part + ".")}
            if own:
                found[part] = Part(means, own)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
        return found | ({"model": Part("weights of the model", own)} if own else {})

    @property
    def prompted(self) -> bool:
        return self.options.readout != "classifier"

    @property
    def says_tokens(self) -> bool:
        return self.options.readout == "tokens"

    @property
    def plain(self) -> str | None:
        return BODY if self.options.unfrozen else None

    def train(self, mode: bool = True) -> LstSurface:
        super().train(mode)
        self.model.eval()
        for ladder in self._ladders().values():
            ladder.training = mode  # which drops connections by itself
        return self

    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        if self.encoder is not None:
            return self.encoder.encode(examples)
        if self.says_tokens:
            return self._encoded_texts(examples)
        return Encoded(self.tokenizer, examples, self.max_length, backbone.known_tokens(self._config))

    def _encoded_texts(self, examples: Sequence[Example]) -> EncodedTexts:
        """Rows for language modelling as the model's family was pretrained."""
        tokenizer, family, seed = self.tokenizer, backbone.family(self._config), self.options.seed
        known = backbone.known_tokens(self._config)
        if family == "text-to-text":
            sentinels = backbone.sentinels(tokenizer)
            if len(sentinels) < 2:
                got = len(sentinels) or "none"
                raise UserError(f"{self.owner}: readout 'tokens' needs a tokenizer with sentinel tokens, got {got}")
            start, end = int(self._config.decoder_start_token_id), int(self._config.eos_token_id)
            return EncodedSpans(tokenizer, examples, self.max_length, sentinels, start, end, seed, known)
        if family == "masked" and tokenizer.mask_token_id is None:
            raise UserError(f"{self.owner}: readout 'tokens' needs a tokenizer with a mask token, got none")
        mask = tokenizer.mask_token_id if family == "masked" else None
        return EncodedTexts(tokenizer, examples, self.max_length, mask, seed, known)

    def encode_answers(self, examples: Sequence[Example]) -> EncodedAnswers:
        return super().encode_answers(examples) if self.encoder is None else self.encoder.encode_answers(examples)

    def encode_questions(self, examples: Sequence[Example]) -> EncodedAnswers:
        return super().encode_questions(examples) if self.encoder is None else self.encoder.encode_questions(examples)

    def texts(self, prepared: PreparedLadder) -> list[str]:
        """Written greedily. The backbone and the side network read the whole text anew for every token."""
        encoder, asked = self.encoder, prepared
        if encoder is None:
            return super().texts(prepared)

        def scores(written: Tensor) -> Tensor:
            behind = readouts.continued(asked.tensors, written)
            return self._spoken(self.states(self.prepare(behind) if written.shape[1] else asked)[:, -1])

        rows = len(asked.tensors["input_ids"])
        return encoder.texts(readouts.greedily(scores, rows, encoder.stops.to(self.device), encoder.max_new_tokens))

    def blank(self) -> Example:
        return super().blank() if self.encoder is None else self.encoder.blank()

    @property
    def needs_rows(self) -> bool:
        return self._init == "fisher"

    def begin(self, encoded: EncodedRows, show: bool = True) -> str | None:
        """With init "fisher": prune by the Fisher scores of the first `fisher_rows` rows that the seed draws."""
        if not self.needs_rows:
            return None
        rows = min(self.options.fisher_rows, len(encoded))
        chosen = batch_indices(self.options.seed, 0, len(encoded), rows)

        def losses() -> Iterator[Tensor]:
            for row in chosen:
                tensors = self._tensors(encoded.batch([row]))
                scores = self._backbone_logits(tensors)
                wanted = encoded.expected([row]) if isinstance(encoded, EncodedTexts) else encoded.labels[[int(row)]]
                # One score is the log-likelihood of the answer.
                alone = scores.shape[1] == 1
                yield -scores.sum() if alone else nn.functional.cross_entropy(scores, wanted.to(self.device))

        self.initialise(fishers(self.body, self._config, losses(), self.owner))
        return f"{self.owner}: side network pruned from the backbone by Fisher scores of {rows} rows"

    def initialise(self, scores: Sums | Mapping[str, Tensor]) -> None:
        """Prune the backbone into the side network by `scores`: of every entry of the matrices of the backbone's
        layers, by their names in `body`, or their sums over rows and columns (`pruning.Sums`). Any measure will do, a
        forward-only one as well."""
        reduced = {name: value if isinstance(value, tuple) else sums(value) for name, value in scores.items()}
        prune(self.model.side, self.body, self._config, reduced, self.owner)

    def prepare(self, batch: dict[str, Tensor]) -> PreparedLadder:
        """The backbone's states of a batch, without a graph: those that it brings along (`features.keep_states`), or
        else computed; the tokens alone where some of its layers are tuned."""
        tensors = self._tensors(batch)
        if self.prompted:
            reading.states_from(self.model.backbone)
        if self.encoder is not None and "slots" in tensors:
            readouts.settle(self.model.backbone, tensors, self.encoder.words, self.max_length)
        if self.options.unfrozen:
            return PreparedLadder(tensors, None)
        if "states" in batch:
            return PreparedLadder(tensors, self._brought(tensors, cast("list[Tensor]", batch["states"])))
        with torch.no_grad():
            return PreparedLadder(tensors, self._features(tensors))

    def body_checksum(self) -> str:
        """sha256 of the backbone's weights and settings."""
        return f"{backbone.checksum(self.model.backbone)} {backbone.settings(self.model.backbone)}"

    def states_read(self) -> str:
        """Which of the backbone's states the side network reads, in words."""
        return ", ".join(f"{tower} {ladder.features_read}" for tower, ladder in self._ladders().items())

    def state_counts(self, batch: dict[str, Tensor]) -> list[int]:
        """How many vectors `states_of_rows` has of each row."""
        return [sum(each) for each in self._counts(self._masks(self._tensors(batch)))]

    @torch.no_grad()
    def states_of_rows(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The backbone's states of each row of tokens as vectors [count, width]: by tower, token and number of the
        state, without padding."""
        tensors = self._tensors(batch)
        features, masks = self._features(tensors), self._masks(tensors)
        rows: list[list[Tensor]] = [[] for _ in tensors["input_ids"]]
        for tower, states in features.items():
            stacked = torch.stack(list(states.values()), dim=2)  # [B, T, n, d]
            for row, (found, mask) in enumerate(zip(stacked, masks[tower], strict=True)):
                rows[row].append(found[mask].flatten(0, 1))
        return [torch.cat(each) for each in rows]

    def _brought(self, tensors: dict[str, Tensor], states: list[Tensor]) -> dict[str, dict[int, Tensor]]:
        """What `_features` would have computed, from what `states_of_rows` made of each row; zeros where padding is."""
        masks = self._masks(tensors)
        pieces = torch.cat(states).to(self.device).split([count for each in self._counts(masks) for count in each])
        features: dict[str, dict[int, Tensor]] = {}
        for place, (tower, ladder) in enumerate(self._ladders().items()):
            numbers, mask = ladder.features_read, masks[tower]
            found = torch.cat(pieces[place :: len(masks)]).view(-1, len(numbers), self.width)
            whole = found.new_zeros(len(numbers), *mask.shape, self.width)
            whole[:, mask] = found.transpose(0, 1)
            features[tower] = dict(zip(numbers, whole, strict=True))
        return features

    def _counts(self, masks: Mapping[str, Tensor]) -> list[list[int]]:
        """Vectors of each row, by tower."""
        numbers = [len(ladder.features_read) for ladder in self._ladders().values()]
        tokens = [mask.sum(dim=1).tolist() for mask in masks.values()]
        return [[n * count for n, count in zip(numbers, each, strict=True)] for each in zip(*tokens, strict=True)]

    def _masks(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the tokens of each tower stand: bool [B, T]."""
        masks = {tower: tensors["attention_mask"].bool() for tower in self._ladders()}
        if "decoder" in masks:
            masks["decoder"] = torch.ones_like(tensors["decoder_input_ids"], dtype=torch.bool)
        return masks

    def repeated(self, prepared: PreparedLadder, times: int) -> PreparedLadder:
        def copies(tensor: Tensor) -> Tensor:
            return torch.cat([tensor] * times)

        features = prepared.features
        if features is not None:
            features = {t: {n: copies(tensor) for n, tensor in states.items()} for t, states in features.items()}
        return PreparedLadder({name: copies(tensor) for name, tensor in prepared.tensors.items()}, features)

    def logits(self, prepared: PreparedLadder, generator: torch.Generator | None = None) -> Tensor:
        """Class scores [B, C], float32; of the readout "tokens" scores of the vocabulary [M, V] at the M positions of
        the batch that are read (`EncodedTexts`). generator: of the dropout masks, on the surface's device."""
        states = self.states(prepared, generator)
        if self.says_tokens:
            return self._spoken(states[prepared.tensors["said"]])
        if self.encoder is None:
            return self._classified(states, prepared.tensors)
        with reading.answering(self.model.backbone, states.to(self.dtype)):
            return readouts.scores(self.model.backbone, prepared.tensors, self.encoder.words)

    def token_logits(self, prepared: PreparedLadder) -> Tensor:
        """Scores of every token of the vocabulary at every position [B, T, V], where there is the output layer."""
        if not self.prompted:
            raise UserError(f"{self.owner}: scores of tokens need the readout 'prompt' or 'tokens', got 'classifier'")
        known = {name: tensor for name, tensor in prepared.tensors.items() if name not in (*readouts.READ, "said")}
        with reading.answering(self.model.backbone, self.states(prepared).to(self.dtype)):
            return self.model.backbone(**known).logits.float()

    def states(self, prepared: PreparedLadder, generator: torch.Generator | None = None) -> Tensor:
        """What stands in the place of the backbone's last states: float32 [B, T, d]."""
        features = prepared.features if prepared.features is not None else self._features(prepared.tensors)
        states: Tensor | None = None
        with dropping(self.options.dropout if self.training else 0.0, generator):
            for tower, ladder in self._ladders().items():
                states = ladder(features[tower], tower_inputs(prepared.tensors, tower, states), generator)
        return self.model.side["up"](states)

    def products(self) -> Products:
        if self._products is None:
            self._products = measure(self)
        return self._products

    def describe(self) -> str:
        ladders = self._ladders()
        rungs = " + ".join(str(len(ladder.rungs)) for ladder in ladders.values())
        side = self.width // self.shape.reduction
        window = "" if self.shape.k == 1 and self.shape.window != "all" else f", windows of {self._window()}"
        return (
            f"{self.owner} of width {side} (r = {self.shape.reduction}), {rungs} layers{window}, "
            f"{self.options.readout}: {self.products()}"
        )

    def save(self, folder: Path) -> None:
        """Write the backbone, the side network and the options into `folder`; see docs/saved-models.md."""
        folder = Path(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._own_tensors().items()}
        note: dict[str, Any] = {
            "surface": self.owner,
            "labels": list(self.labels),
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": asdict(self.shape),
            **asdict(self.options),
        }
        if self.encoder is not None:
            told = self.encoder.prompt
            note["prompt"] = {"text": told.text, "words": dict(told.words), "score": told.score}
            if not self.labels:
                note["prompt"]["answer"] = told.answer
        try:
            folder.mkdir(parents=True, exist_ok=True)
            backbone.save_pretrained(self.model.backbone, self.tokenizer, folder / BODY)
            save_file(tensors, folder / SIDE_FILE, metadata={"format": "pt"})
            write_note(folder, note)
        except OSError as error:
            raise UserError(f"{folder}: the model must be writable there, got {error.strerror or error}") from None

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
    ) -> LstSurface:
        folder = Path(folder)
        note = read_note(folder, cls.owner)
        fits(f"{folder / NOTE}", note, _NOTE)
        try:
            tensors = load_file(folder / SIDE_FILE)
            stated = _Options(**{field.name: note[field.name] for field in fields(_Options) if field.name in note})
            prompt = Prompt(**note["prompt"]) if "prompt" in note else None
            shape = Shape(**note["shape"])
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder / SIDE_FILE}: must hold the side network, got none or damaged ({error})"
            ) from None
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / NOTE}: must state the options of {cls.owner}, got others ({error})") from None
        place, dtype = str(body_of(folder)), dtype or note["dtype"]
        surface = cls._create(place, note["labels"], prompt, shape, replace(stated, init="random"), device, dtype)
        own = surface._own_tensors()
        if set(own) != set(tensors) or any(own[name].shape != tensors[name].shape for name in own):
            raise UserError(f"{folder / SIDE_FILE}: must hold the side network of its options, got another")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        surface.options = stated
        return surface

    def _own_tensors(self) -> dict[str, Tensor]:
        """What stands beside the backbone: parameters, and the rotary frequencies that pruning chose."""
        tensors: dict[str, Tensor] = {f"side.{n}": p for n, p in self.model.side.named_parameters()}
        tensors |= {f"side.{n}": b for n, b in self.model.side.named_buffers() if n.endswith("inv_freq")}
        if self.model.head is not None:
            tensors |= {f"head.{n}": p for n, p in self.model.head.named_parameters()}
        return tensors

    def _ladders(self) -> dict[str, Ladder]:
        return {tower: ladder for tower, ladder in self.model.side.items() if isinstance(ladder, Ladder)}

    def _unfrozen(self) -> Iterator[nn.Module]:
        path, layers, _ = list(self._family.towers.values())[-1]
        modules = self.body.get_submodule(f"{path}.{layers}".strip("."))
        assert isinstance(modules, nn.ModuleList)
        yield from list(modules)[len(modules) - self.options.unfrozen :]

    def _told(self) -> str:
        """The shape, as far as it is not the default's."""
        told, default = asdict(self.shape), asdict(Shape())
        return ", ".join(f"{name} {told[name]}" for name in told if name == "reduction" or told[name] != default[name])

    def _window(self) -> str:
        return "all layers" if self.shape.window == "all" else f"{self.shape.k} ({self.shape.window})"

    def _tensors(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: tensor.to(self.device) for name, tensor in batch.items() if name != "states"}
        if "decoder" in self._family.towers and "decoder_input_ids" not in tensors:
            start = int(self._config.decoder_start_token_id)
            tensors["decoder_input_ids"] = tensors["input_ids"].new_full((len(tensors["input_ids"]), 1), start)
        return readouts.laid_out(self.model.backbone, tensors, self.max_length)

    def _features(self, tensors: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        wanted = {tower: ladder.features_read for tower, ladder in self._ladders().items()}
        return states_of(self.body, self._family, tensors, wanted)[0]

    def _backbone_logits(self, tensors: dict[str, Tensor]) -> Tensor:
        """Class scores of the backbone itself [B, C]."""
        if self.encoder is not None:
            return readouts.scores(self.model.backbone, tensors, self.encoder.words)
        states = states_of(self.body, self._family, tensors, {})[1]
        return self._spoken(states[tensors["said"]]) if self.says_tokens else self._classified(states, tensors)

    def _spoken(self, states: Tensor) -> Tensor:
        """The output layer's scores of the vocabulary [M, V] for states [M, d]."""
        with reading.answering(self.model.backbone, states.unsqueeze(0).to(self.dtype)):
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=states.device)  # tokens that nobody reads
            return self.model.backbone(input_ids=nothing).logits[0].float()

    def _classified(self, states: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        assert self.model.head is not None
        if "decoder" in self._family.towers:
            return self.model.head(states[:, 0].float())
        return self.model.head(pool(states, tensors["attention_mask"], self._pooling()))

    def _pooled(self) -> str:
        where = "the first state" if "decoder" in self._family.towers else f"{self._pooling()} pooling"
        return f"linear classifier on {where}"

    def _pooling(self) -> str:
        if self.options.pooling != "auto":
            return self.options.pooling
        return "last" if backbone.is_decoder(self._config) else "mean"


class KLstSurface(LstSurface):
    """Ladder side-tuning with windows of k backbone layers."""

    owner: ClassVar[str] = "k_lst"

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: str,
        labels: Sequence[str],
        *,
        k: int = 3,
        window: str = "trailing",
        combine: str = "attention",
        down: str = "linear",
        rank: int = 16,
        sharing: str = "feature",
        unfrozen: int = 0,
        readout: str = "auto",
        prompt: Prompt | Mapping[str, Prompt] | None = None,
        reduction: int = 8,
        layers: Sequence[int] | int | None = None,
        temperature: float = 0.1,
        init: str = "fisher",
        fisher_rows: int = 64,
        pooling: str = "auto",
        connection_dropout: float = 0.0,
        truncation: str = "right",
        padding: str = "right",
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        max_length: int = 128,
        dropout: float = 0.0,
    ) -> KLstSurface:
        """As `LstSurface.create`, and:

        k: backbone layers that a ladder reads. window: "trailing" (its layer and those before), "centred" (k // 2
            before, the rest behind) or "all" (every layer, whatever k is); windows end where the backbone does.
        combine: "attention", with the side network's state as the query and learned positions in the window; or "mean".
        down: "linear", "pool" (means of r channels that stand beside each other; no parameters) or "low-rank" (through
            `rank` channels). sharing: a down-projection for each backbone layer ("feature", wherever it is read), for
            each side layer ("rung") or for all ("shared").
        unfrozen: how many of the backbone's last layers (an encoder-decoder's decoder's) are tuned too; the backward
            pass then runs through these, and the backbone's states are computed anew whenever they are needed.
        """
        shape = Shape(reduction, layers, temperature, k, window, combine, down, rank, sharing)
        options = _Options(
            readout=readout,
            init=init,
            fisher_rows=fisher_rows,
            pooling=pooling,
            unfrozen=unfrozen,
            connection_dropout=connection_dropout,
            dropout=dropout,
            max_length=max_length,
            truncation=truncation,
            padding=padding,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        return cls._create(model, labels, prompt, shape, options, device, dtype)
