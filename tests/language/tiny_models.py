"""Tiny random models of each architecture, made from a configuration, with a tokenizer of a few words."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from gradientless.language.tasks import Example

WORDS = ["a", "good", "bad", "film", "very", "the", "plot", "was", "dull", "bright"]
EXAMPLES = [
    Example("a good film", 1),
    Example("the plot was very very dull", 0),
    Example("bright", 1),
    Example("a bad bad bad film the plot was dull", 0),
    Example("the film was good", 1),
]


def make_tokenizer(encoder: bool):
    """An encoder's puts [CLS] and [SEP] around a text and has segment ids; a decoder's has no padding token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if encoder else ["<unk>", "<end>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=special[1] if encoder else special[0]))
    inner.pre_tokenizer = Whitespace()
    if not encoder:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(vocab_size=14, max_position_embeddings=32, **SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=14, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=32
    ),
    "roberta": lambda: transformers.RobertaConfig(
        vocab_size=14, max_position_embeddings=34, pad_token_id=0, type_vocab_size=2, **SMALL
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(
        vocab_size=14, max_position_embeddings=34, pad_token_id=0, type_vocab_size=2, **SMALL
    ),
    "camembert": lambda: transformers.CamembertConfig(
        vocab_size=14, max_position_embeddings=34, pad_token_id=0, type_vocab_size=2, **SMALL
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=12, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=12, max_position_embeddings=32, bos_token_id=1, eos_token_id=1, num_key_value_heads=1, **SMALL
    ),
}
DECODERS = ("gpt2", "llama")
