"""Tiny random models of every family that the side surfaces know, with a language head, and rows to feed them."""

from __future__ import annotations

import torch
import transformers
from tiny_models import CONFIGS, DECODERS, make_tokenizer

from gradientless.language.tasks import Prompt

SIZES = {"vocab_size": 15, "num_hidden_layers": 4}
FAMILIES = ("bert", "distilbert", "roberta", "opt", "llama", "t5")
LABELS = ("bad", "good")
WORDS = {"bad": "bad", "good": "good"}


def config_of(kind: str):
    if kind == "t5":
        return transformers.T5Config(
            vocab_size=15, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=4, num_decoder_layers=4,
            pad_token_id=0, decoder_start_token_id=0, eos_token_id=3,
        )  # fmt: skip
    if kind == "opt":
        return transformers.OPTConfig(
            vocab_size=12, hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=32, pad_token_id=1, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
    config = CONFIGS[kind]()
    config.vocab_size = 12 if kind in DECODERS else 15
    setattr(config, "n_layers" if kind == "distilbert" else "num_hidden_layers", 4)
    if kind == "llama":
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 4
    return config


def prompt_of(kind: str) -> Prompt:
    if kind in ("opt", "llama"):
        return Prompt("{text} the film was", {"bad": " bad", "good": " good"})
    return Prompt("{text} film {mask}", WORDS) if kind != "t5" else Prompt("{text} film", WORDS)


def save(kind: str, path) -> str:
    """A random language model of `kind`, whose weights are large enough that layers matter, and its tokenizer."""
    config = config_of(kind)
    classes = {"opt": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = getattr(transformers, classes.get(kind, "AutoModelForMaskedLM")).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.25)
                else:
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    decoder = kind in ("opt", "llama")
    tokenizer = make_tokenizer(not decoder)
    if not decoder:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(path)
    return str(path)


def add_sentinels(folder: str, count: int) -> None:
    """Give the text-to-text model in `folder` the tokens <extra_id_0>, <extra_id_1>, …"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{n}>" for n in range(count)]})
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
