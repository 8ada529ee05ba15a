"""Architectures that differ from most, each for a kind: what holds for all of them is found by a rule."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t
from tiny_models import CONFIGS, DECODERS, EXAMPLES, SMALL, make_tokenizer
from torch import nn

from gradientless.language.surfaces import FullSurface, HeadSurface

LABELS = ("bad", "good")
BERT = {"vocab_size": 14, "max_position_embeddings": 32, **SMALL}
BART = t.BartConfig(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, vocab_size=14, pad_token_id=0, bos_token_id=2,
    eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
)  # fmt: skip


def save(config, folder, auto: str = "AutoModel", encoder: bool = True, **entries) -> str:
    """A random model of `config`, whose weights are large enough to tell texts apart. entries: of its config.json."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(t, auto).from_config(config)
        for tensor in model.parameters():
            if tensor.ndim > 1:
                nn.init.normal_(tensor, 0, 0.3)
    model.tie_weights()
    model.save_pretrained(folder)
    make_tokenizer(encoder).save_pretrained(folder)
    if entries:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return str(folder)


def batch_of(surface):
    return surface.prepare(surface.encode(EXAMPLES).batch(range(len(EXAMPLES))))


@torch.no_grad()
def scores(surface):
    return surface.logits(batch_of(surface))


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
@pytest.mark.parametrize("surface", [HeadSurface, FullSurface])
def test_a_checkpoint_that_asks_for_tuples_is_read_by_name(kind, surface, tmp_path):
    config = BART if kind == "bart" else CONFIGS[kind]()
    folder, encoder = tmp_path / "model", kind not in DECODERS
    options = {"readout": "head"} if surface is FullSurface else {}
    plain = surface.create(save(config, folder, encoder=encoder), LABELS, max_length=20, **options)
    tuples = save(config, folder, encoder=encoder, return_dict=False)
    assert torch.equal(scores(surface.create(tuples, LABELS, max_length=20, **options)), scores(plain))


@pytest.mark.parametrize("config", [
    t.SqueezeBertConfig(embedding_size=16, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
                        intermediate_groups=1, output_groups=1, **BERT),
    t.BertConfig(**BERT),
    t.LongformerConfig(attention_window=8, pad_token_id=0, **BERT),
], ids=["squeezebert asks for its pooler", "bert", "longformer"])  # fmt: skip
def test_states_need_no_pooler(config, tmp_path):
    folder = save(config, tmp_path / "model")
    body = t.AutoModel.from_pretrained(folder).eval()
    surface = HeadSurface.create(folder, LABELS, head="linear", pooling="cls", max_length=20)
    batch = surface.encode(EXAMPLES).batch(range(2))
    with torch.no_grad():
        assert torch.allclose(surface.features(batch), body(**batch).last_hidden_state[:, 0], atol=1e-6)
    assert type(surface.model.pooler) is type(body.pooler), "the pooler is put back"
