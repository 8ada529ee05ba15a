"""The surfaces `prefix` and `prompt`: virtual tokens in front of the text, and nothing else (but a head) tuned.

`prefix` gives every layer keys and values of its own for them: Li and Liang, "Prefix-tuning: Optimizing continuous
prompts for generation", ACL 2021, https://arxiv.org/abs/2101.00190. `prompt` gives the first layer their embeddings:
Lester, Al-Rfou and Constant, "The power of scale for parameter-efficient prompt tuning", EMNLP 2021,
https://arxiv.org/abs/2104.08691. A prefix starts as the keys and values of real tokens, drawn from the vocabulary, as
MeZO's does (Malladi et al. 2023, https://arxiv.org/abs/2305.17333); a prompt as their embeddings. Both are saved in
peft's format, and peft opens them.

Differs from the paper: a prefix is tuned itself, as MeZO does, unless `reparameterise` asks for the network that the
paper makes it with. With E [tokens, d], d the width of a layer's keys,

    P = tanh(E W_1' + b_1) W_2' + b_2

E, W and b are tuned, and P, the keys and values of all layers, is what peft is given. The network starts at random, as
peft's; for start "real" W_2 and b_2 are then those whose P is what the model makes of real tokens (least squares; exact
where there are no more tokens than d), which the paper has for a prefix without a network alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradientless.errors import UserError, unknown, whole
from gradientless.language import backbone, reading, seen
from gradientless.language.surfaces.adapter import BESIDE, AdapterSurface
from gradientless.language.surfaces.full import FullSurface, HeadReading
from gradientless.language.surfaces.saved import ADAPTER_FILE

NAME = "prompt_embeddings"  # as peft calls them
NETWORK = "prefix_network"
NETWORK_FILE = "prefix_network.safetensors"
STARTS = ("real", "random")
FAMILIES = ("causal", "masked")


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False))


class _VirtualTokens(AdapterSurface):
    """What the two share: one tensor, which hooks on the stack of layers put in front of the text."""

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: str,
        labels: Sequence[str],
        *,
        tokens: int = 5,
        start: str = "real",
        seed: int = 0,
        **reading: Any,
    ) -> Any:
        """A pretrained model with virtual tokens, for `labels` (names by class index).

        tokens: how many. start: "real" (what the model makes of as many tokens of its vocabulary) or "random" (normal
        values of spread 0.02). seed: of either. reading: what `FullSurface.create` takes, but for its `start`.
        """
        base = FullSurface.create(model, labels, seed=seed, **reading)
        return cls(base.reading, dropout=base.dropout, options={"tokens": tokens, "start": start, "seed": seed})

    def insert(self) -> None:
        count, start = self.options["tokens"], self.options["start"]
        kind = backbone.family(self._config)
        if kind not in FAMILIES:
            raise UserError(f"{self.owner}: the model must be a {' or '.join(FAMILIES)} one, got a {kind} model")
        if start not in STARTS:
            raise unknown(self.owner, "start", start, STARTS)
        limit = seen.positions(self.core)
        room = None if limit is None else limit - self.max_length
        if whole(self.owner, "tokens", count) < 1 or (room is not None and count > room):
            raise UserError(f"{self.owner}: tokens must be from 1 to {room}, what max_length leaves, got {count}")
        generator = torch.Generator().manual_seed(self.options["seed"])
        ids = torch.randint(int(self._config.vocab_size), (1, count), generator=generator).to(self.device)
        try:
            values = self.first_values(ids)
            if start == "random":
                values = torch.empty(values.shape).normal_(0.0, 0.02, generator=generator)
            self.register(values, generator)
            self.hook()
            self.read()
        except UserError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{self.owner}: the model must read virtual tokens in front of a text, got from "
                f"{self._config.model_type}: {reason}"
            ) from None

    @torch.no_grad()
    def read(self) -> None:
        """A short text behind the virtual tokens, of which not every model knows what to make."""
        core, texts = self.core, reading.some_tokens(self.core, 3, 2)
        core(**reading.options(core, reading.padded(texts)))

    def register(self, values: Tensor, generator: torch.Generator) -> None:
        """Put the tuned tensors into `core`. values: of the virtual tokens at first."""
        self.core.register_parameter(NAME, nn.Parameter(values.detach().float().to(self.device).clone()))

    @property
    def _config(self) -> Any:
        return self.core.config

    @property
    def dtype(self) -> torch.dtype:
        return self.core.get_input_embeddings().weight.dtype  # type: ignore[operator]

    @property
    def virtual(self) -> Tensor:
        return self.core.get_parameter(NAME)

    def first_values(self, ids: Tensor) -> Tensor:
        """Of virtual tokens that start as the tokens `ids` [1, tokens]."""
        raise AssertionError("a subclass states it")

    def hook(self) -> None:
        raise AssertionError("a subclass states it")

    def peft_config(self) -> Any:
        raise AssertionError("a subclass states it")

    @property
    def task_type(self) -> str:
        """As peft names what the model does."""
        if isinstance(self.reading, HeadReading):
            return "FEATURE_EXTRACTION"
        return "CAUSAL_LM" if backbone.family(self._config) == "causal" else "FEATURE_EXTRACTION"

    def masked(self, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
        """The stack's arguments with the virtual tokens in the mask and the positions behind them."""
        count, changed = self.options["tokens"], {}
        mask = kwargs.get("attention_mask")
        if mask is not None:
            changed["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], dim=1)
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = kwargs["position_ids"] + count
        return changed

    @property
    def stack(self) -> nn.Module:
        """The part of the model that is given its tokens."""
        return self.core.get_submodule(reading.stack_of(self.core))

    def met(self, kwargs: dict[str, Any]) -> bool:
        """Whether the model has read the virtual tokens already: it goes on from what it kept."""
        kept = backbone.kept_in(kwargs)
        return kept is not None and kept.get_seq_length() > 0

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        tensor = self.core._parameters.pop(NAME)
        try:
            yield
        finally:
            self.core.register_parameter(NAME, tensor)

    def save_adapter(self, folder: Path) -> None:
        self.peft_config().save_pretrained(str(folder))
        save_file({NAME: self.virtual.detach().cpu().contiguous()}, folder / ADAPTER_FILE, metadata={"format": "pt"})

    def load_adapter(self, folder: Path) -> None:
        path = folder / ADAPTER_FILE
        try:
            saved = load_file(path)[NAME]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: must hold the virtual tokens, got none or damaged ({error})") from None
        if saved.shape != self.virtual.shape:
            raise UserError(f"{path}: must hold values {list(self.virtual.shape)}, got {list(saved.shape)}")
        with torch.no_grad():
            self.virtual.copy_(saved)


class PrefixNetwork(nn.Module):
    """What a reparameterised prefix is made by. Bare tensors: their rows are virtual tokens, not the batch's, so they
    are no layer that noise is put into for many points at once."""

    def __init__(self, tokens: int, width: int, entries: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int) -> nn.Parameter:  # as `nn.Linear` draws them
            return nn.Parameter(torch.empty(shape).uniform_(-(width**-0.5), width**-0.5, generator=generator))

        self.embedding = nn.Parameter(torch.empty(tokens, width).normal_(generator=generator))
        self.inner_weight, self.inner_bias = uniform(width, width), uniform(width)
        self.outer_weight, self.outer_bias = uniform(entries, width), uniform(entries)

    def inner(self) -> Tensor:
        return torch.tanh(nn.functional.linear(self.embedding, self.inner_weight, self.inner_bias))

    def forward(self) -> Tensor:
        return nn.functional.linear(self.inner(), self.outer_weight, self.outer_bias)

    @torch.no_grad()
    def meet(self, values: Tensor) -> None:
        """Set the outer layer so that the prefix is `values` [tokens, entries], or as near as it gets."""
        self.outer_bias.copy_(values.mean(dim=0))
        rest = (values - self.outer_bias).double()
        self.outer_weight.copy_((torch.linalg.pinv(self.inner().double()) @ rest).T)


class PrefixSurface(_VirtualTokens):
    """Keys and values of virtual tokens in every layer: [tokens, layers · 2 · heads · entries]."""

    owner: ClassVar[str] = "prefix"

    @classmethod
    def create(  # type: ignore[override]
        cls,
        model: str,
        labels: Sequence[str],
        *,
        tokens: int = 5,
        start: str = "real",
        reparameterise: bool = False,
        seed: int = 0,
        **reading: Any,
    ) -> Any:
        """As `_VirtualTokens.create`, and:

        reparameterise: tune the network of Li and Liang that makes the prefix, not the prefix itself.
        """
        base = FullSurface.create(model, labels, seed=seed, **reading)
        options = {"tokens": tokens, "start": start, "seed": seed}
        if reparameterise:
            options["reparameterise"] = True
        return cls(base.reading, dropout=base.dropout, options=options)

    @property
    def reparameterised(self) -> bool:
        return bool(self.options.get("reparameterise"))

    @property
    def network(self) -> PrefixNetwork:
        return self.core.get_submodule(NETWORK)  # type: ignore[return-value]

    @property
    def virtual(self) -> Tensor:
        return self.network() if self.reparameterised else super().virtual

    def register(self, values: Tensor, generator: torch.Generator) -> None:
        if not self.reparameterised:
            super().register(values, generator)
            return
        network = PrefixNetwork(len(values), self._heads * self._entries, values.shape[1], generator)
        if self.options["start"] == "real":
            network.meet(values.detach().float().cpu())
        self.core.add_module(NETWORK, network.to(self.device))

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        if not self.reparameterised:
            with super().taken_out():
                yield
            return
        network = self.core._modules.pop(NETWORK)
        try:
            yield
        finally:
            self.core.add_module(NETWORK, network)

    def save_adapter(self, folder: Path) -> None:
        """The prefix as peft keeps one, and beside it the network that it is made by, which peft does without."""
        super().save_adapter(folder)
        if self.reparameterised:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.named_parameters()}
            save_file(tensors, folder / NETWORK_FILE, metadata={"format": "pt"})

    def load_adapter(self, folder: Path) -> None:
        if not self.reparameterised:
            super().load_adapter(folder)
            return
        path, own = folder / NETWORK_FILE, dict(self.network.named_parameters())
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: must hold the prefix's network, got none or damaged ({error})") from None
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
            raise UserError(f"{path}: must hold the prefix's network of its options, got another")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def first_values(self, ids: Tensor) -> Tensor:
        pairs = backbone.keys_and_values(self.stack, ids)
        if pairs is None:
            raise UserError(
                f"{self.owner}: the model must go on from keys and values, of one shape in all layers, got "
                f"{self._config.model_type}; surface prompt takes it"
            )
        self._heads, self._entries = pairs[0][0].shape[1], pairs[0][0].shape[3]
        self._layers = len(pairs)
        # [layers, 2, heads, tokens, entries] -> [tokens, layers, 2, heads, entries]
        return torch.stack([torch.cat(pair) for pair in pairs]).permute(3, 0, 1, 2, 4).flatten(1)

    def hook(self) -> None:
        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = _named(module, args) | kwargs
            tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            if self.met(kwargs):
                return (), kwargs | self.masked(kwargs, len(tokens))
            pairs = self.virtual.to(self.dtype).view(-1, self._layers, 2, self._heads, self._entries)
            pairs = pairs.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, len(tokens), -1, -1, -1)
            return (), kwargs | self.masked(kwargs, len(tokens)) | {name: backbone.cache(pairs)}

        stack = self.stack
        name = str(backbone.keeps_as(stack))
        stack.register_forward_pre_hook(give, with_kwargs=True)

    def peft_config(self) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type=self.task_type,
            num_virtual_tokens=self.options["tokens"],
            num_layers=self._layers,
            num_attention_heads=self._heads,
            token_dim=self._heads * self._entries,
            base_model_name_or_path=BESIDE,
            inference_mode=True,
        )


class PromptSurface(_VirtualTokens):
    """Embeddings of virtual tokens in front of the text: [tokens, width]."""

    owner: ClassVar[str] = "prompt"

    def first_values(self, ids: Tensor) -> Tensor:
        return self.core.get_input_embeddings()(ids)[0]  # type: ignore[operator]

    _shown = False  # whether a call is running that has the virtual tokens in front

    def hook(self) -> None:
        """The stack is given tokens of its vocabulary in front, whose embeddings the virtual ones take the place of: a
        model that looks its tokens up again, in a layer or for its positions, finds some."""
        count = self.options["tokens"]
        (instead,) = reading.some_tokens(self.core, count)

        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = _named(module, args) | kwargs
            text = kwargs["input_ids"]
            changed = self.masked(kwargs, len(text))
            self._shown = not self.met(kwargs)
            if not self._shown:
                return (), kwargs | changed
            changed["input_ids"] = torch.cat([instead.expand(len(text), -1), text], dim=1)
            if kwargs.get("position_ids") is not None:
                begin = kwargs["position_ids"].amin(dim=1, keepdim=True)
                first = begin + torch.arange(count, device=text.device)
                changed["position_ids"] = torch.cat([first, changed["position_ids"]], dim=1)
            if kwargs.get("token_type_ids") is not None:
                segments = kwargs["token_type_ids"]
                changed["token_type_ids"] = torch.cat([segments.new_zeros(len(text), count), segments], dim=1)
            return (), kwargs | changed

        def put(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            if not self._shown:
                return embedded
            virtual = self.virtual.to(embedded.dtype).expand(len(embedded), -1, -1)
            return torch.cat([virtual, embedded[:, count:]], dim=1)

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            if self._shown:
                output["last_hidden_state"], self._shown = output.last_hidden_state[:, count:], False
            return output

        stack = self.stack
        stack.register_forward_pre_hook(give, with_kwargs=True)
        stack.register_forward_hook(cut)
        self.core.get_input_embeddings().register_forward_hook(put)  # type: ignore[operator]

    def peft_config(self) -> Any:
        from peft import PromptTuningConfig

        config = self._config
        return PromptTuningConfig(
            task_type=self.task_type,
            num_virtual_tokens=self.options["tokens"],
            num_layers=getattr(config, "num_hidden_layers", None),
            num_attention_heads=getattr(config, "num_attention_heads", None),
            token_dim=self.virtual.shape[1],
            base_model_name_or_path=BESIDE,
            inference_mode=True,
        )
