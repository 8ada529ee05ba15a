"""Tiny random models of each architecture, made from a configuration, with a tokenizer of a few words."""

from __future__ import annotations

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import RobertaProcessing, TemplateProcessing

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


# --- language models behind prompts --------------------------------------------------------------------------------

LINES = [
    "Review: a good film\nSentiment: positive",
    "Review: the plot was very dull\nSentiment: negative",
    "the film was bright. It was great.",
    "a bad film. It was terrible.",
    "It was great. It was terrible.",
    "Sentiment: positive Sentiment: negative",
] * 4


def _byte_level(end: str, merges: int, lines: list[str] = LINES, ascii_alone: bool = False) -> Tokenizer:
    """ascii_alone: no tokens of bytes that are no character by themselves."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if not ascii_alone or c.isascii() or c in "ĠĊ"]
    inner.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 5 + merges, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return inner


def byte_level(merges: int = 200, lines: list[str] = LINES, ascii_alone: bool = False):
    """Like GPT-2's and SmolLM2's: no special tokens around a text, none for padding. Few merges split words."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level("<end>", merges, lines, ascii_alone), eos_token="<end>"
    )


def roberta_like(lines: list[str] = LINES, merges: int = 200, ascii_alone: bool = False):
    """Byte-level with <s> and </s> around a text and a mask token that takes the blank in front of it."""
    inner = _byte_level("<pad>", merges, lines, ascii_alone)
    inner.add_special_tokens(["<s>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    s, e = inner.token_to_id("<s>"), inner.token_to_id("</s>")
    inner.post_processor = RobertaProcessing(("</s>", e), ("<s>", s), add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def wordpiece(lines: list[str] = LINES, size: int = 200):
    """Like BERT's: lower case, [CLS] and [SEP] around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(names, special, strict=True)))


def unigram(lines: list[str] = LINES, size: int = 120):
    """Like T5's: pieces begin with the blank in front of them; </s> behind a text."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(
        lines,
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def language(kind: str, vocabulary: int, positions: int = 64):
    small = {**SMALL, "vocab_size": vocabulary}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    t = transformers
    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=2, n_head=2, **ends)
        ),
        "llama": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                max_position_embeddings=positions, num_key_value_heads=1, tie_word_embeddings=True, **ends, **small
            )
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=vocabulary, hidden_size=16, word_embed_proj_dim=8, ffn_dim=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=positions, **ends,
            )
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(max_position_embeddings=positions, **small)),
        "distilbert": lambda: t.DistilBertForMaskedLM(
            t.DistilBertConfig(
                vocab_size=vocabulary, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=positions
            )
        ),
        "roberta": lambda: t.RobertaForMaskedLM(
            t.RobertaConfig(max_position_embeddings=positions + 2, pad_token_id=0, type_vocab_size=1, **small)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )
        ),
    }  # fmt: skip
    return made[kind]()


TOKENIZERS = {"bert": wordpiece, "distilbert": wordpiece, "roberta": roberta_like, "t5": unigram}
LANGUAGE_MODELS = ("bert", "distilbert", "gpt2", "llama", "opt", "roberta", "t5")


def make_language_model(kind: str, merges: int = 200):
    """(model with its language head, tokenizer), weights as spread as to tell texts apart."""
    tokenizer = TOKENIZERS[kind]() if kind in TOKENIZERS else byte_level(merges)
    model = language(kind, len(tokenizer))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.mul_(8)
    return model.eval(), tokenizer
