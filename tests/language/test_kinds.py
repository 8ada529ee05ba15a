"""Architectures that differ from most, each for a kind: what holds for all of them is found by a rule."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, DECODERS, EXAMPLES, SMALL, make_tokenizer
from torch import nn

from gradientless.errors import UserError
from gradientless.language import backbone, seen
from gradientless.language.prompting import PromptEncoder
from gradientless.language.surfaces import SURFACES, FullSurface, HeadSurface, load
from gradientless.language.surfaces.lora import LoraSurface
from gradientless.language.surfaces.part import LayersSurface
from gradientless.language.surfaces.side_lora import SideLoraSurface
from gradientless.language.tasks import Example, Prompt

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


@pytest.fixture
def plain_tokenizers(monkeypatch):
    """Transformers 5.0 opens no tokenizer beside a model whose usual one needs a package that is not there."""
    monkeypatch.setattr(backbone, "load_tokenizer", lambda folder, _: t.PreTrainedTokenizerFast.from_pretrained(folder))


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


# --- what is seen of a model, not read from its configuration --------------------------------------------------------

OFFSET = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # positions begin behind padding's number


class TestPositions:
    """A row of the most tokens is read, and one of a token more refused, wherever the limit stands."""

    @pytest.mark.parametrize(("config", "most"), [
        (t.RobertaPreLayerNormConfig(**BERT, **OFFSET), 30),
        (t.MPNetConfig(**BERT, **OFFSET), 30),
        (t.EsmConfig(mask_token_id=4, position_embedding_type="absolute", **BERT, **OFFSET), 30),
        (t.LongformerConfig(attention_window=8, **BERT, **OFFSET), 30),
        (t.XLMRobertaXLConfig(**BERT, **{**OFFSET, "pad_token_id": 3}), 28),
        (t.BertConfig(**BERT), 32),
        (BART, 32),  # whose table has two rows more than positions
        (t.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=4, **BERT), 32),
    ], ids=lambda value: getattr(value, "model_type", value))  # fmt: skip
    def test_of_a_head(self, config, most, tmp_path):
        folder = save(config, tmp_path / "model")
        surface = HeadSurface.create(folder, LABELS, max_length=most)
        batch = surface.encode([Example("good " * 50, 1)]).batch([0])
        assert batch["input_ids"].shape == (1, most)
        assert torch.isfinite(surface.features(batch)).all()
        assert seen.positions(surface.model) == most
        with pytest.raises(
            UserError, match=f"^head: max_length must be <= {most}, the positions of .*, got {most + 1}"
        ):
            HeadSurface.create(folder, LABELS, max_length=most + 1)

    @pytest.mark.parametrize("config", [
        t.XLNetConfig(vocab_size=14, d_model=16, n_layer=2, n_head=2, d_inner=32),
        t.T5Config(vocab_size=14, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0),
        t.BloomConfig(vocab_size=14, hidden_size=16, n_layer=1, n_head=2),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_a_model_without_a_limit_reads_any_row(self, config, tmp_path):
        surface = HeadSurface.create(save(config, tmp_path / "model"), LABELS, max_length=300)
        assert torch.isfinite(scores(surface)).all()
        assert seen.positions(surface.model) is None

    def test_a_limit_that_no_configuration_states(self, tmp_path):
        config = t.MptConfig(vocab_size=12, d_model=16, n_heads=2, n_layers=1, max_seq_len=16)
        folder = save(config, tmp_path / "model", encoder=False)
        HeadSurface.create(folder, LABELS, max_length=16)
        with pytest.raises(UserError, match=r"^model: must read a row of 17 tokens, got from mpt: "):
            HeadSurface.create(folder, LABELS, max_length=17)

    def test_behind_a_prompt(self, tmp_path):
        folder = save(t.RobertaConfig(is_decoder=True, **BERT, **OFFSET), tmp_path / "model", "AutoModelForCausalLM")
        prompt = Prompt("{text} the film was", {"bad": " bad", "good": " good"})
        FullSurface.create(folder, LABELS, prompt=prompt, max_length=30)
        with pytest.raises(UserError, match=r"^full: max_length must be <= 30, the positions of"):
            FullSurface.create(folder, LABELS, prompt=prompt, max_length=31)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_rows_as_long_as_what_is_stated_are_not_tried(kind, monkeypatch):
    """A table that seems to end is looked at where it does."""
    config = CONFIGS[kind]()
    config.max_position_embeddings = 10**6 if kind == "llama" else 4096
    model, tried = t.AutoModel.from_config(config).eval(), []
    monkeypatch.setattr(seen, "_table_ends", lambda body, config: [12, 20, 5000])
    row = seen._row
    monkeypatch.setattr(seen, "_row", lambda config, length: tried.append(length) or row(config, length))
    assert seen.longest(model, 30) is None and tried == [13, 21]


def past_the_layer(kind, config):
    """A model that multiplies by its table of tokens itself."""

    class Past(kind):
        def forward(self, input_ids=None, attention_mask=None):
            return self.base_model(input_ids).last_hidden_state @ self.get_input_embeddings().weight.t()

    return Past(config)


DEBERTA = {"vocab_size": 15, "max_position_embeddings": 32, **SMALL}


@pytest.mark.parametrize(("make", "uses"), [
    (lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(legacy=False, **DEBERTA)), 1),
    (lambda: past_the_layer(t.GPT2LMHeadModel, CONFIGS["gpt2"]()), 1),
    (lambda: past_the_layer(t.LlamaForCausalLM, CONFIGS["llama"]()), 1),
    (lambda: t.GPT2LMHeadModel(CONFIGS["gpt2"]()), 1),  # by its output layer, which holds the table too
    (lambda: t.LlamaForCausalLM(CONFIGS["llama"]()), 0),
    (lambda: t.BertModel(CONFIGS["bert"]()), 0),
])  # fmt: skip
def test_a_table_that_is_more_than_looked_up_is_seen(make, uses):
    assert seen.uses_of_table(make().eval()) == uses


def test_a_model_that_takes_no_tokens_is_refused_in_a_line(tmp_path):
    config = t.PerceiverConfig(
        num_latents=6, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=2, vocab_size=15,
        num_self_attention_heads=2, num_cross_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    folder = save(config, tmp_path / "model", "AutoModelForMaskedLM")
    with pytest.raises(UserError, match=r"^model: must read a row of 8 tokens, got from perceiver: .*'inputs'$"):
        HeadSurface.create(folder, LABELS, max_length=20)


class TestDirection:
    @pytest.mark.parametrize("config", [
        t.BertConfig(is_decoder=True, **BERT),
        t.RobertaConfig(is_decoder=True, **BERT, **OFFSET),
        t.CamembertConfig(is_decoder=True, **BERT, **OFFSET),
        t.ElectraConfig(is_decoder=True, embedding_size=16, **BERT),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_the_first_token_of_a_decoder_stands_for_nothing(self, config, tmp_path):
        folder = save(config, tmp_path / "model", "AutoModelForCausalLM")
        surface = HeadSurface.create(folder, LABELS, max_length=20)
        assert surface.pooling == "mean"
        assert (scores(surface)[0] - scores(surface)[1:]).abs().amax(dim=1).min() > 1e-4
        with pytest.raises(UserError, match="first token knows nothing of the text, got cls"):
            HeadSurface.create(folder, LABELS, max_length=20, pooling="cls", head="two-layer")
        if config.model_type != "electra":
            with pytest.raises(UserError, match=r"knows nothing of the text, got head 'library' .*; use 'two-layer'"):
                HeadSurface.create(folder, LABELS, max_length=20, head="library")

    @pytest.mark.parametrize("config", [
        t.XLNetConfig(vocab_size=14, d_model=16, n_layer=2, n_head=2, d_inner=32),
        t.BertGenerationConfig(**BERT, **OFFSET),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_what_reads_both_ways_says_nothing_behind_a_prompt(self, config, tmp_path, plain_tokenizers):
        folder = save(config, tmp_path / "model", "AutoModelForCausalLM")
        prompt = Prompt("{text} the film was", {"bad": " bad", "good": " good"})
        with pytest.raises(
            UserError, match=r"^full: a prompt needs a model that reads left to right or fills masks, got"
        ):
            FullSurface.create(folder, LABELS, prompt=prompt, max_length=20)
        assert torch.isfinite(scores(HeadSurface.create(folder, LABELS, max_length=20, pooling="cls"))).all()

    @pytest.mark.parametrize("config", [
        t.BertGenerationConfig(is_decoder=True, **BERT, **OFFSET), CONFIGS["llama"](), CONFIGS["gpt2"](),
        t.MambaConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2),
    ], ids=lambda config: config.model_type)  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_reads_left_to_right(self, config, dtype):
        assert seen.see(t.AutoModel.from_config(config).eval().to(dtype)).left_to_right


MASKED = {**BERT, "vocab_size": 15, "pad_token_id": 0}


@pytest.mark.parametrize("config", [
    t.AlbertConfig(embedding_size=16, **MASKED), t.BertConfig(**MASKED), t.RobertaConfig(**MASKED),
    t.ElectraConfig(embedding_size=16, **MASKED),
], ids=lambda config: config.model_type)  # fmt: skip
@pytest.mark.parametrize("name", ["prompt", "full"])
def test_a_masked_model_made_without_a_pooler_is_read(config, name, tmp_path):
    folder = save(config, tmp_path / "model", "AutoModelForMaskedLM")
    tokenizer = make_tokenizer(True)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    prompt = Prompt("{text} was {mask}", {"bad": "bad", "good": "good"})
    surface = SURFACES[name].create(folder, LABELS, prompt=prompt, max_length=20)
    assert torch.isfinite(scores(surface)).all()
    head = HeadSurface.create(folder, LABELS, head="linear", max_length=20)  # its checkpoint lacks the pooler
    assert "pooler" not in " ".join(head.state_dict()) and torch.isfinite(scores(head)).all()


@pytest.mark.parametrize(("config", "width"), [
    (t.OPTConfig(vocab_size=14, hidden_size=16, word_embed_proj_dim=8, ffn_dim=32, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=32), 8),
    (t.OPTConfig(vocab_size=14, hidden_size=16, word_embed_proj_dim=24, ffn_dim=32, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=32), 24),
    (t.ElectraConfig(embedding_size=8, **BERT), 16),
    (t.GPT2Config(vocab_size=14, n_positions=32, n_embd=16, n_layer=1, n_head=2), 16),
], ids=["narrow", "wide", "electra", "gpt2"])  # fmt: skip
@pytest.mark.parametrize("head", ["two-layer", "linear"])
def test_a_head_is_as_wide_as_the_states(config, width, head, tmp_path):
    folder = save(config, tmp_path / "model", encoder=config.model_type == "electra")
    for surface in (HeadSurface.create(folder, LABELS, head=head, max_length=20),
                    FullSurface.create(folder, LABELS, readout="head", head=head, max_length=20)):  # fmt: skip
        assert surface.width == width
        assert scores(surface).shape == (5, 2)


# --- branches in linear layers ---------------------------------------------------------------------------------------

MIXTURE = {"num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
           "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip
PROMPT = Prompt("{text} the film was", {"bad": " bad", "good": " good"})


class TestBranches:
    def make(self, config, tmp_path, surface=LoraSurface, **options):
        folder = save(config, tmp_path / "model", "AutoModelForCausalLM", encoder=False)
        return surface.create(folder, LABELS, prompt=PROMPT, max_length=20, **{"rank": 4, **options})

    @pytest.mark.parametrize("config", [
        t.Glm4MoeConfig(head_dim=8, **MIXTURE, **BERT),
        t.DeepseekV3Config(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                           **{**MIXTURE, "num_key_value_heads": 2}, **BERT),
        t.Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, num_key_value_heads=1, moe_intermediate_size=32,
                         shared_expert_intermediate_size=32, **BERT),
        t.PhimoeConfig(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=1, head_dim=8, **BERT),
        t.FalconConfig(vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_stand_where_they_are_saved_and_opened_by_peft(self, config, tmp_path):
        surface = self.make(config, tmp_path)
        names = [name for name in surface.trainable() if "q_proj" in name or "query_key_value" in name or "q_a" in name]
        assert names, "attention has them in each of these"
        assert not any(".experts." in name or "router" in name for name in surface.trainable())
        with torch.no_grad():
            for tensor in surface.trainable().values():
                tensor.add_(0.3)
        told = scores(surface)
        surface.save(tmp_path / "saved")
        torch.testing.assert_close(scores(load(tmp_path / "saved")), told, rtol=1e-4, atol=1e-4)
        base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "base").eval()
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
        ids = torch.arange(4, 12)[None]
        with torch.no_grad():
            torch.testing.assert_close(opened(ids).logits, surface.model(ids).logits, rtol=1e-4, atol=1e-4)

    def test_that_are_asked_for_stand_there_or_are_refused(self, tmp_path):
        config, targets = t.Glm4MoeConfig(head_dim=8, **MIXTURE, **BERT), ["gate_proj", "up_proj", "down_proj"]
        try:
            surface = self.make(config, tmp_path, targets=targets)
        except UserError as refused:
            told = r"lora: peft must put .* got another place for model\.layers\.\d.* of a glm4_moe; .*"
            assert re.fullmatch(told, str(refused))
        else:  # as peft before 0.19 does
            layers = {name.split(".lora_")[0] for name in surface.trainable()}
            assert layers == {f"model.layers.{place}.{name}" for place in ("0.mlp", "1.mlp.shared_experts")
                              for name in targets}  # fmt: skip
        assert self.make(config, tmp_path, targets=["q_proj"]).trainable()

    @pytest.mark.parametrize("config", [
        t.Mamba2Config(vocab_size=14, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2, head_dim=8,
                       num_heads=4, n_groups=1, chunk_size=8),
        t.MambaConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2),
        t.FalconMambaConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, state_size=4, expand=2),
    ], ids=lambda config: config.model_type)  # fmt: skip
    def test_that_peft_refuses_are_one_line(self, config, tmp_path):
        with pytest.raises(UserError, match=r"^lora: peft must be able to adapt this model, got: .*out_proj") as told:
            self.make(config, tmp_path)
        assert "\n" not in str(told.value)
        assert self.make(config, tmp_path, targets=["in_proj"]).trainable()

    def test_beside_linear_layers_with_a_forward_of_their_own(self, tmp_path):
        falcon = t.FalconConfig(vocab_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        surface = self.make(falcon, tmp_path, SideLoraSurface)
        assert any("query_key_value" in name for name in surface.trainable())
        plain = FullSurface.create(str(tmp_path / "model"), LABELS, prompt=PROMPT, max_length=20)
        torch.testing.assert_close(scores(surface), scores(plain))


# --- what is saved is what was tuned ---------------------------------------------------------------------------------

SEQ2SEQ = {key: value for key, value in BART.to_diff_dict().items() if not key.startswith(("model_", "transformers_"))}
LANGUAGES = {"langs": ["a", "b"], "src_vocab_size": 14, "tgt_vocab_size": 14}
TABLES = {
    "marian": (t.MarianConfig(**SEQ2SEQ), "AutoModelForSeq2SeqLM", 2),
    "pegasus": (t.PegasusConfig(**SEQ2SEQ), "AutoModelForSeq2SeqLM", 2),
    "fsmt": (
        t.FSMTConfig(**LANGUAGES, **SEQ2SEQ),
        "AutoModelForSeq2SeqLM",
        2,
    ),
    "roformer": (t.RoFormerConfig(embedding_size=16, **BERT), "AutoModelForMaskedLM", 1),
}


@pytest.mark.usefixtures("plain_tokenizers")
class TestTablesThatTheLibraryComputes:
    def make(self, kind, tmp_path, surface=FullSurface, **options):
        config, auto, _ = TABLES[kind]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(t, auto).from_config(config)
        model.save_pretrained(tmp_path / "model")
        make_tokenizer(True).save_pretrained(tmp_path / "model")
        return surface.create(str(tmp_path / "model"), LABELS, readout="head", max_length=20, **options)

    @pytest.mark.parametrize("kind", TABLES)
    @pytest.mark.parametrize("options", [{}, {"surface": LayersSurface, "pattern": "embed_positions|layer"}],
                             ids=["full", "layers"])  # fmt: skip
    def test_are_not_tuned_and_the_rest_is_saved(self, kind, options, tmp_path):
        surface = self.make(kind, tmp_path, **options)
        tables = [name for name, _ in surface.model.named_parameters() if "embed_positions" in name]
        assert len(tables) == TABLES[kind][2]
        assert not {*tables} & {*surface.trainable()}
        with torch.no_grad():
            for tensor in surface.trainable().values():
                tensor.add_(0.1)
        surface.save(tmp_path / "saved")
        torch.testing.assert_close(scores(load(tmp_path / "saved")), scores(surface))

    @pytest.mark.parametrize("kind", TABLES)
    def test_alone_are_refused(self, kind, tmp_path):
        with pytest.raises(UserError, match=r"^layers: pattern must match a tensor that is learned .* got 'embed_pos"):
            self.make(kind, tmp_path, LayersSurface, pattern="embed_positions")

    def test_tables_that_are_learned_stay(self, tmp_path):
        folder = save(BART, tmp_path / "model")
        assert "model.encoder.embed_positions.weight" in FullSurface.create(folder, LABELS, max_length=20).trainable()
        for kind in ("gpt2", "roberta"):
            assert not backbone.not_learned(t.AutoModel.from_config(CONFIGS[kind]()))

    def test_weights_that_lack_are_told_all_the_same(self, tmp_path):
        folder = save(t.MarianConfig(**SEQ2SEQ), tmp_path / "model", "AutoModelForSeq2SeqLM")
        file = tmp_path / "model" / "model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(file).items() if "layer_norm" not in name}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"must hold all weights of its model, got none for .*layer_norm"):
            HeadSurface.create(folder, LABELS, max_length=20)


# --- tokens ----------------------------------------------------------------------------------------------------------


class TestTokensBeyondTheTable:
    """Of tokenizers that were given more tokens without a row of the model's for them."""

    def make(self, tmp_path, kind="llama", added=None, **more):
        auto = "AutoModelForCausalLM" if kind in DECODERS else "AutoModelForMaskedLM"
        config = CONFIGS[kind]()
        config.vocab_size = 12 if kind in DECODERS else 14
        folder = save(config, tmp_path / "model", auto, encoder=kind not in DECODERS)
        tokenizer = t.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens(more) if more else tokenizer.add_tokens(added)
        assert len(tokenizer) == config.vocab_size + 1
        tokenizer.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
    def test_padding_is_masked_so_any_other_will_do(self, kind, tmp_path):
        folder = self.make(tmp_path, kind, pad_token="[more]")
        surface = HeadSurface.create(folder, LABELS, max_length=20)
        alone = surface.encode(EXAMPLES).batch([0])
        both = surface.encode(EXAMPLES).batch([0, 1])
        assert both["input_ids"].max() < 14
        torch.testing.assert_close(surface.features(both)[:1], surface.features(alone), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("surface", ["head", "full", "prompt", "lst"])
    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_in_a_text_are_refused(self, surface, kind, tmp_path):
        folder = self.make(tmp_path, kind, added="superb")
        options = {"readout": "head"} if surface in ("full", "lst") else {}
        if surface == "prompt" and kind == "bert":
            surface, options = "full", {"readout": "head"}
        elif surface == "prompt":
            surface, options = "full", {"prompt": PROMPT}
        made = SURFACES[surface].create(folder, LABELS, max_length=20, **options)
        assert scores(made).shape == (5, 2)
        with pytest.raises(UserError, match=r"^model: must have a row for every token .* token 1[24] \('superb'\)$"):
            made.encode([*EXAMPLES, Example("a superb film", 1)])

    def test_as_label_words_are_refused(self, tmp_path):
        folder = self.make(tmp_path, added="superb")
        prompt = Prompt("{text} the film was", {"bad": " bad", "good": " superb"})
        with pytest.raises(UserError, match=r"^model: must have a row .* got 12 rows and token 12 \('superb'\)$"):
            FullSurface.create(folder, LABELS, prompt=prompt, max_length=20)

    def test_as_masks_are_refused(self, tmp_path):
        folder = self.make(tmp_path, "bert", mask_token="[MASK]")
        prompt = Prompt("{text} film {mask}", {"bad": "bad", "good": "good"})
        with pytest.raises(UserError, match=r"^model: must have a row .* got 14 rows and token 14 \('\[MASK\]'\)$"):
            FullSurface.create(folder, LABELS, prompt=prompt, max_length=20)


@pytest.mark.parametrize("text", ["日本語" * 30, "Straße der Grüße " * 12, "ab😀" * 40, "plain " * 40])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_by_tokens_where_a_character_has_several(text, side):
    tokenizer = t.ByT5Tokenizer()
    encoder = PromptEncoder(
        tokenizer, Prompt("Review: {text}\nSentiment:", {"bad": "a", "good": "b"}), LABELS, "text-to-text", 60,
        start=0, truncation=side,
    )  # fmt: skip
    encoded = encoder.encode([Example(text, 1), Example("short", 0)])
    ids = encoded.batch([0])["input_ids"][0]
    assert 57 <= len(ids) <= 60, "no more goes than must, and no part of a character stays"
    said = tokenizer.decode(ids, skip_special_tokens=True).removeprefix("Review: ").removesuffix("\nSentiment:")
    assert said == (text[: len(said)] if side == "right" else text[len(text) - len(said) :])
    assert encoded.cut == 1
