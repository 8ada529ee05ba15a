"""The rate that is asked for is the rate that acts, wherever a model drops and whatever its configuration says."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import EXAMPLES, SMALL, make_tokenizer
from torch import nn

from gradientless.errors import UserError
from gradientless.language.dropout import dropping
from gradientless.language.surfaces import FullSurface
from gradientless.language.surfaces.saved import body_of
from gradientless.language.tasks import Prompt

LABELS = ("bad", "good")
GQA = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 1}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "vocab_size": 14, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
t = transformers
CONFIGS = {
    # Rates are numbers that the forward hands to functions.
    "llama": lambda rate: t.LlamaConfig(vocab_size=12, attention_dropout=rate, **GQA),
    "opt": lambda rate: t.OPTConfig(
        vocab_size=12, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=1,
        dropout=rate, attention_dropout=rate, layerdrop=rate,
    ),
    # Whole layers are skipped at random beside it, in training mode.
    "bart": lambda rate: t.BartConfig(
        dropout=rate, attention_dropout=rate, activation_dropout=rate, encoder_layerdrop=rate, decoder_layerdrop=rate,
        **BART,
    ),
    # No dropout at all is built where its rate is 0.
    "modernbert": lambda rate: t.ModernBertConfig(
        vocab_size=14, max_position_embeddings=32, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2,
        eos_token_id=3, attention_dropout=rate, mlp_dropout=rate, embedding_dropout=rate, **SMALL,
    ),
    "bert": lambda rate: t.BertConfig(
        vocab_size=14, max_position_embeddings=32, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, **SMALL
    ),
    # A rate that must be a whole number, in a configuration within the configuration.
    "mpt": lambda rate: t.MptConfig(
        vocab_size=12, d_model=16, n_heads=2, n_layers=2, max_seq_len=32, resid_pdrop=rate, emb_pdrop=rate,
        attn_config={"attn_pdrop": int(rate > 0)},
    ),
}  # fmt: skip
DECODERS = ("llama", "opt", "mpt")


def make(kind: str, rate: float, folder, dropout: float, **options) -> FullSurface:
    folder = folder / f"{kind} {rate}"
    if not folder.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = t.AutoModel.from_config(CONFIGS[kind](rate))
            for tensor in model.parameters():
                if tensor.ndim > 1:
                    nn.init.normal_(tensor, 0, 0.3)
        model.save_pretrained(folder)
        make_tokenizer(kind not in DECODERS).save_pretrained(folder)
    return FullSurface.create(str(folder), LABELS, readout="head", max_length=20, dropout=dropout, **options)


@torch.no_grad()
def scores(surface: FullSurface, seed: int = 0):
    batch = surface.encode(EXAMPLES).batch(range(len(EXAMPLES)))
    return surface.logits(surface.prepare(batch), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rate_that_is_asked_for_acts_and_no_other(kind, tmp_path):
    still = scores(make(kind, 0.0, tmp_path, 0.5))
    trained = {rate: make(kind, rate, tmp_path, 0.5).train() for rate in (0.0, 0.9)}
    drawn = [scores(trained[0.0]), scores(trained[0.9]), scores(trained[0.9]), scores(trained[0.9], seed=1)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[2], drawn[3])
    assert (drawn[0] - still).abs().max() > 1e-3
    assert torch.equal(scores(make(kind, 0.9, tmp_path, 0.0).train()), still), "without dropout nothing is random"
    assert torch.equal(scores(trained[0.9].eval()), still)


@pytest.mark.parametrize("kind", ["bart", "modernbert", "mpt"])
def test_the_models_own_rates_are_saved_as_they_were(kind, tmp_path):
    for rate in (0.0, 0.9):
        make(kind, rate, tmp_path, 0.5).save(tmp_path / "saved")
        folders = tmp_path / f"{kind} {rate}", body_of(tmp_path / "saved")
        texts = [(each / "config.json").read_text() for each in folders]
        before, after = ([line for line in text.splitlines() if "drop" in line] for text in texts)
        assert before == after != []


def test_a_head_of_the_library_drops_too(tmp_path):
    surface = make("bert", 0.0, tmp_path, 0.5, head="library").train()
    features = torch.ones(1, 16)
    drawn = {surface.reading.head.scores(features, torch.Generator().manual_seed(n)).sum().item() for n in range(8)}
    assert len(drawn) > 4


class TestRate:
    ones = torch.ones(4, 64, 64)

    @pytest.mark.parametrize("rate", [0.2, 0.7])
    @pytest.mark.parametrize("drop", [
        nn.Dropout(0.0).eval(), nn.Dropout(0.9), lambda x: nn.functional.dropout(x, 0.1, False),
        lambda x: nn.functional.dropout(input=x, p=0.0, training=True, inplace=True),
        lambda x: torch.dropout(x, 0.3, False),
    ], ids=["module at rest", "module", "function", "function by name", "built in"])  # fmt: skip
    def test_of_entries(self, drop, rate):
        with dropping(rate, torch.Generator().manual_seed(0)):
            dropped = drop(self.ones)
        assert abs(float((dropped == 0).float().mean()) - rate) < 0.02
        torch.testing.assert_close(dropped.max(), torch.tensor(1 / (1 - rate)))
        assert torch.equal(self.ones, torch.ones(4, 64, 64))

    @pytest.mark.parametrize("call", [
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, None, 0.0, False),
        lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.9),
    ], ids=["nothing", "by place", "by name"])  # fmt: skip
    def test_of_attention(self, call):
        keys, values = torch.zeros(1, 1, 64, 8), torch.eye(64)[None, None]  # what comes out are the attention's weights
        with dropping(0.3, torch.Generator().manual_seed(0)):
            weights = call(torch.zeros(1, 1, 500, 8), keys, values)
        assert abs(float((weights == 0).float().mean()) - 0.3) < 0.02
        causal = nn.functional.scaled_dot_product_attention
        with dropping(0.3, torch.Generator().manual_seed(0)):
            seen = causal(keys, keys, values, None, 0.0, True)[0, 0]
        assert not seen.triu(1).any()
        assert seen.tril().any()

    def test_masks_are_the_generators_and_the_global_one_stands(self):
        state = torch.get_rng_state()
        drawn = []
        for seed in (0, 0, 1):
            with dropping(0.5, torch.Generator().manual_seed(seed)):
                drawn.append(nn.functional.dropout(self.ones))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[1], drawn[2])
        assert torch.equal(torch.get_rng_state(), state)
        with dropping(0.0, None):
            assert torch.equal(nn.Dropout(0.5).eval()(self.ones), self.ones)


WITHOUT = {  # architectures that drop nothing anywhere
    "mamba": lambda: t.MambaConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, state_size=4),
    "rwkv": lambda: t.RwkvConfig(
        vocab_size=12, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32
    ),
    "mamba2": lambda: t.Mamba2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, state_size=4, expand=2, head_dim=8, num_heads=4, n_groups=1,
        chunk_size=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_rate_that_cannot_act_is_refused(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.AutoModelForCausalLM.from_config(WITHOUT[kind]()).save_pretrained(tmp_path)
    make_tokenizer(False).save_pretrained(tmp_path)
    asked = {"prompt": Prompt("{text} was", {"bad": " bad", "good": " good"}), "max_length": 16}
    FullSurface.create(str(tmp_path), LABELS, **asked)
    with pytest.raises(UserError, match=r"^full: dropout must be 0 for '.*', which drops nothing anywhere, got 0\.5$"):
        FullSurface.create(str(tmp_path), LABELS, dropout=0.5, **asked)
    state = torch.get_rng_state()
    surface = FullSurface.create(str(tmp_path), LABELS, dropout=0.5, max_length=16)  # a head drops by itself
    assert surface.dropout == 0.5 and torch.equal(torch.get_rng_state(), state)


T5 = {"vocab_size": 14, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
WORDS = {  # text-to-text models, whose rates act behind a prompt as well as under a head
    "t5": lambda: t.T5Config(decoder_start_token_id=0, **T5),
    "mt5": lambda: t.MT5Config(decoder_start_token_id=0, **T5),
    "switch": lambda: t.SwitchTransformersConfig(
        decoder_start_token_id=0, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **T5
    ),
    "bart": lambda: t.BartConfig(**BART),
}


@pytest.mark.parametrize("kind", WORDS)
def test_a_rate_acts_on_words_of_a_text_to_text_model(kind, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        t.AutoModelForSeq2SeqLM.from_config(WORDS[kind]()).save_pretrained(tmp_path)
    make_tokenizer(True).save_pretrained(tmp_path)
    asked = {"prompt": Prompt("{text} was", {"bad": "bad", "good": "good"}), "max_length": 16}
    surface = FullSurface.create(str(tmp_path), LABELS, dropout=0.5, **asked)
    still, drawn = scores(surface), scores(surface.train())
    assert (drawn - still).abs().max() > 1e-4


def test_an_architecture_that_refuses_rates_of_dropout_is_loaded(tmp_path):
    own = {**GQA, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModel.from_config(t.DiffLlamaConfig(vocab_size=12, **own)).eval()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(False).save_pretrained(tmp_path / "model")
    surface = FullSurface.create(str(tmp_path / "model"), LABELS, readout="head", max_length=20)
    for name, tensor in model.named_parameters():
        assert torch.equal(surface.trainable()[f"model.{name}"], tensor)
    surface.save(tmp_path / "saved")
    assert t.AutoConfig.from_pretrained(body_of(tmp_path / "saved")).attention_dropout == 0
