"""Tiny random models of many architectures, made from the library's configurations by one rule and few exceptions.

The rule: of a configuration's sizes, whichever of `SIZES` it has are made small, and its special tokens are its
tokenizer's. What an architecture needs beyond that stands beside its name. A name is the library's `model_type`; what
follows a comma tells variants of one architecture apart.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "true_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner", "hidden_dim", "dff"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 96),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim", "d_kv"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "rotary_dim": 4, "layer_types": None,
}  # fmt: skip

BYTES = {"vocab_size": 384, "decoder_start_token_id": 0}
LATENT = {"head_dim": 4, "num_key_value_heads": 2}  # DeepSeek's attention: head_dim is that of its rotary part
MIXED = ["linear_attention", "full_attention"]
LINEAR = {
    "layer_types": MIXED, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
ALONE = {"is_decoder": True, "is_encoder_decoder": False}  # the decoder of an encoder-decoder
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DORY = {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
MAMBA2 = {"state_size": 4, "expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8}

ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {}, "bert": {}, "big_bird": {}, "camembert": {}, "convbert": {}, "data2vec-text": {}, "deberta": {},
    "deberta-v2": {}, "deberta-v2, its own output layer": {"legacy": False},
    "deberta-v2, relative positions": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {}, "electra": {}, "electra, narrow embeddings": {"embedding_size": 8}, "ernie": {},
    "esm": {"position_embedding_type": "absolute"}, "esm, rotary": {"position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 2}, "eurobert": {}, "flaubert": {}, "fnet": {},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8}, "gte": {}, "ibert": {},
    "jina_embeddings_v3": {}, "layoutlm": {"max_2d_position_embeddings": 16}, "longformer": {"attention_window": 16},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16}, "megatron-bert": {},
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}, "modernbert": {},
    "mpnet": {}, "mra": {}, "nomic_bert": {}, "nystromformer": {},
    "perceiver": {"num_latents": 6, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2,
                  "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 16},
    "reformer": {"attn_layers": ["local", "local"], "local_attn_chunk_length": 8, "axial_pos_shape": [8, 12],
                 "axial_pos_embds_dim": [8, 8], "feed_forward_size": 32, "attention_head_size": 8},
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 8}, "roberta": {}, "roberta-prelayernorm": {},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "roformer": {}, "squeezebert": {"q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
                                    "intermediate_groups": 1, "output_groups": 1},
    "tapas": {}, "ultrabert": {}, "xlm": {}, "xlm-roberta": {}, "xlm-roberta-xl": {},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"}, "yoso": {},
}  # fmt: skip
WITHOUT_WORDS: dict[str, dict[str, Any]] = {  # encoders of which the library has no masked-language model
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 2}, "splinter": {},
}  # fmt: skip
TEXT_TO_TEXT: dict[str, dict[str, Any]] = {
    "bart": {}, "bigbird_pegasus": {}, "blenderbot": {}, "blenderbot-small": {},
    "fsmt": {"langs": ["en", "de"]}, "led": {"attention_window": 16, "max_encoder_position_embeddings": 96,
                                               "max_decoder_position_embeddings": 96},
    "longt5": {}, "longt5, transient-global": {"encoder_attention_type": "transient-global"}, "m2m_100": {},
    "marian": {}, "mbart": {}, "mt5": {}, "mvp": {}, "nllb-moe": {"num_experts": 4, "expert_capacity": 64},
    "pegasus": {}, "pegasus_x": {"block_size": 8}, "plbart": {}, "prophetnet": {},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, "t5": {},
    "t5, gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "t5, bytes": BYTES, "umt5": {},
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "afmoe": {}, "apertus": {}, "arcee": {}, "bamba": {**STATES, "attn_layer_indices": [1]}, "bart": ALONE, "beam": {},
    "bert": {"is_decoder": True}, "bert-generation": {"is_decoder": True}, "bert-generation, both ways": {},
    "big_bird": {"is_decoder": True}, "biogpt": {}, "bitnet": {}, "bloom": {},
    "camembert": {"is_decoder": True}, "codegen": {"n_head": 4}, "cohere": {}, "cohere2": {}, "cohere2_moe": {},
    "ctrl": {}, "cwm": {}, "data2vec-text": {"is_decoder": True}, "deepseek_v2": LATENT, "deepseek_v3": LATENT,
    "diffllama": {"num_key_value_heads": 2}, "doge": {}, "dory": DORY,
    "dots1": {"n_shared_experts": 1}, "electra": {"is_decoder": True}, "ernie": {"is_decoder": True},
    "ernie4_5": {}, "ernie4_5_moe": {"moe_num_shared_experts": 1, "moe_k": 2}, "exaone": {}, "exaone4": {},
    "exaone_moe": {}, "falcon": {}, "falcon, alibi": {"alibi": True},
    "falcon, new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, with biases": {"bias": True, "parallel_attn": False},
    "falcon_h1": {**STATES, "mamba_d_ssm": 32, "mamba_expand": 2},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 4},
    "flex_olmo": {}, "flint": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "hidden_size_per_layer_input": 8,
                     "vocab_size_per_layer_input": 512, "activation_sparsity_pattern": [0.0, 0.0],
                     "intermediate_size": [32, 32], "altup_num_inputs": 2},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0},
    "glm": {}, "glm4": {}, "glm4_moe": {"n_shared_experts": 1}, "glm4_moe_lite": LATENT, "gpt2": {},
    "gpt_bigcode": {}, "gpt_bigcode, many keys": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {}, "gpt_neox, one after the other": {"use_parallel_residual": False}, "gpt_neox_japanese": {},
    "gpt_oss": {}, "gptj": {}, "granite": {}, "granitemoe": {},
    "granitemoehybrid": {**STATES, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "granitemoeshared": {"shared_intermediate_size": 16}, "helium": {}, "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2}, "hyperclovax": {}, "internlm3": {}, "jais2": {},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
              "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": MIXED, "mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 2,
                    "linear_head_dim": 8, "num_experts_per_token": 2, "qk_head_dim": 8, "num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {}, "llama, tied and with biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama4_text": {"intermediate_size_mlp": 32},
    "longcat_flash": {**LATENT, "qk_head_dim": 8, "ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2,
                      "expert_ffn_hidden_size": 16},
    "mamba": {"state_size": 4, "time_step_rank": 4}, "mamba2": MAMBA2, "marian": ALONE, "mbart": ALONE,
    "megatron-bert": {"is_decoder": True}, "minicpm3": LATENT, "minimax": {"layer_types": MIXED, "block_size": 8},
    "minimax_m2": {}, "ministral": {}, "mistral": {}, "mistral, window": {"sliding_window": 8},
    "mixtral": {}, "modernbert-decoder": {}, "mpt": {}, "mvp": ALONE, "nanochat": {}, "nemotron": {},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "ssm_state_size": 4, "mamba_num_heads": 4,
                   "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "moe_shared_expert_intermediate_size": 16},
    "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {}, "openai-gpt": {}, "opt": {},
    "opt, projected": {"word_embed_proj_dim": 8, "do_layer_norm_before": False}, "pegasus": ALONE, "persimmon": {},
    "phi": {}, "phi3": {}, "phimoe": {}, "plbart": ALONE, "prophetnet": ALONE, "qwen2": {},
    "qwen2_moe": {}, "qwen3": {},
    "qwen3_5_text": LINEAR, "qwen3_5_moe_text": LINEAR, "qwen3_moe": {}, "qwen3_next": LINEAR,
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 96},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8,
                 "axial_pos_shape": [8, 12], "axial_pos_embds_dim": [8, 8], "feed_forward_size": 32,
                 "attention_head_size": 8},
    "rembert": {"is_decoder": True, "input_embedding_size": 8, "output_embedding_size": 8},
    "roberta": {"is_decoder": True}, "roberta-prelayernorm": {"is_decoder": True}, "roformer": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 16, "context_length": 96}, "seed_oss": {}, "smollm3": {}, "solar_open": {},
    "stablelm": {}, "starcoder2": {}, "vaultgemma": {}, "xglm": {"attention_heads": 2},
    "xlm-roberta": {"is_decoder": True}, "xlm-roberta-xl": {"is_decoder": True},
    "xlnet": {}, "xlstm": {"num_blocks": 2, "hidden_size": 128, "embedding_dim": 128},
    "youtu": LATENT,
    "zamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
              "use_mamba_kernels": False, "n_mamba_heads": 2, "num_key_value_heads": 2, "attention_hidden_size": 32,
              "attention_head_dim": 16, "num_hidden_layers": 4,
              "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"mamba_d_state": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8, "layers_block_type":
               ["mamba", "hybrid"], "hybrid_layer_ids": [1], "mamba_headdim": 8, "adapter_rank": 4},
}  # fmt: skip

KINDS = {
    "masked": (ENCODERS, "AutoModelForMaskedLM"),
    "without words": (WITHOUT_WORDS, "AutoModel"),
    "text-to-text": (TEXT_TO_TEXT, "AutoModelForSeq2SeqLM"),
    "causal": (CAUSAL, "AutoModelForCausalLM"),
}
VOCABULARY = ("good", "film", "the", "plot", "was", "dull", "bright", "very", "bad", "a")
LINES = [  # of which tokenizers make every word of the vocabulary one token
    *(f"{a} {b} {c}" for a in VOCABULARY for b in VOCABULARY for c in ("so", "it", "great", "terrible")),
    *["Review: a film\nSentiment: great", "It was bad.", "so it was a film."] * 20,
]


def unigram() -> Any:
    """Like T5's, with every word one piece. (Its trainer finds too little in so few lines.)"""
    words = sorted({word for line in LINES for word in line.split()})
    letters = sorted(set("".join(words)) | set(string.ascii_letters + string.punctuation))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -9.0) for letter in letters]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


LIKE_ROBERTA = (
    "roberta", "camembert", "data2vec-text", "esm", "longformer", "luke", "mpnet", "flaubert", "xlm", "xlnet", "xmod",
)  # fmt: skip


@dataclass
class Architecture:
    """name: of the table. kind: a key of `KINDS`. options: of its configuration, beside the rule's."""

    name: str
    kind: str
    options: dict[str, Any]

    @property
    def model_type(self) -> str:
        return self.name.partition(",")[0].removesuffix(" (causal)")

    @property
    def auto(self) -> str:
        """The class of the library that opens its models."""
        return KINDS[self.kind][1]

    @property
    def known(self) -> bool:
        """Whether this version of the library has it."""
        return self.model_type in transformers.CONFIG_MAPPING

    @cached_property
    def tokenizer(self) -> Any:
        """Made once: what its trainer finds is not the same every time."""
        if self.name == "t5, bytes":
            return transformers.ByT5Tokenizer()
        if self.kind == "text-to-text":
            return (
                unigram()
                if "t5" in self.name or "switch" in self.name
                else tiny_models.roberta_like(LINES, ascii_alone=True)
            )
        if self.model_type.startswith(LIKE_ROBERTA):
            return tiny_models.roberta_like(LINES, ascii_alone=True)
        encoder = self.kind != "causal" or self.model_type in ENCODERS
        return tiny_models.wordpiece(LINES) if encoder else tiny_models.byte_level(lines=LINES, ascii_alone=True)

    def config(self, **more: Any) -> Any:
        """Its configuration, with `more` in it."""
        kind, tokenizer = transformers.CONFIG_MAPPING[self.model_type], self.tokenizer
        has = kind().to_dict()
        end = next(i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None)
        begin = next(i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id, end) if i is not None)
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens = {"pad_token_id": pad, "bos_token_id": begin, "eos_token_id": end, "vocab_size": len(tokenizer)}
        others = {
            "cls_token_id": begin, "sep_token_id": end, "mask_token_id": tokenizer.mask_token_id,
            "decoder_start_token_id": pad if "t5" in self.name else end, "src_vocab_size": len(tokenizer),
            "tgt_vocab_size": len(tokenizer), "type_vocab_size": 2,
        }  # fmt: skip
        if self.kind == "text-to-text":
            tokens["decoder_start_token_id"] = others["decoder_start_token_id"]
        sizes = {name: value for name, value in (SIZES | others).items() if name in has}
        return kind(**(sizes | tokens | self.options | more))

    def save(self, folder: Path, **more: Any) -> str:
        """A random model and its tokenizer in `folder`, of weights so large that all of it matters; `more` is put into
        its configuration and does not change the weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.auto).from_config(self.config(**more)).eval()
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    noise = torch.randn(tensor.shape)
                    if tensor.ndim > 1:
                        tensor.copy_(0.25 * noise)
                    elif name.endswith("norm.weight") and not tensor.any():  # a norm that scales by one and its weight
                        tensor.copy_(1.5 * noise)
                    elif not any(part in name for part in ("A_log", "dt_", "time_", "recurrent_param")):  # may explode
                        # Of either sign: a tied output layer would repeat the last token, whatever the text is.
                        tensor.mul_(noise.sign()).add_(0.3 * noise)
        model.tie_weights()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return str(folder)


def _named(kind: str, name: str) -> str:
    """An architecture that is there in several kinds says so."""
    others = [other for other, (table, _) in KINDS.items() if other != kind and name in table]
    return f"{name} (causal)" if kind == "causal" and others else name


ARCHITECTURES: dict[str, Architecture] = {
    _named(kind, name): Architecture(_named(kind, name), kind, options)
    for kind, (table, _) in KINDS.items()
    for name, options in table.items()
}
