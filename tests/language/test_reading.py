"""How a language model is read: what it keeps, where its logits come from, against plain transformers.

Models are those whose library says one thing and does another, or keeps what others do not.
"""

from __future__ import annotations

import pytest
import torch
import transformers as t
from tiny_models import SMALL, byte_level, roberta_like, wordpiece

from gradientless.language import backbone, reading, readouts
from gradientless.language.surfaces import SURFACES, load
from gradientless.language.tasks import Example, Prompt

TEXTS = ["a good film", "the plot was very very dull", "bright", "bad film the plot was dull and the film was bad"]
LABELS = ("bad", "good")
ROWS = {
    "masked": Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great"}),
    "causal": Prompt("Review: {text}\nSentiment:", {"bad": " negative", "good": " positive"}),
    "text-to-text": Prompt("Review: {text}\nSentiment:", {"bad": "a", "good": "b"}),
}
CHOICES = [Example(text, 0, choices=("very good", "terrible", "a film the plot was")) for text in TEXTS]
TOKENIZERS = {"masked": wordpiece, "causal": byte_level, "text-to-text": roberta_like, "roberta": roberta_like}

POSITIONS = {"max_position_embeddings": 64}
KEYS = {"num_key_value_heads": 1, **POSITIONS, **SMALL}
LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
STATE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2}
HALVES = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
HALVES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "decoder_start_token_id": 1, **POSITIONS}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
CONFIGS = {
    # name: (class, family, its options)
    "mobilebert": ("MobileBertConfig", "masked", {"embedding_size": 8, "true_hidden_size": 8, **POSITIONS, **SMALL}
                   | {"intra_bottleneck_size": 8}),
    "esm": ("EsmConfig", "masked", {"mask_token_id": 4, "position_embedding_type": "absolute", **POSITIONS, **SMALL}),
    "modernbert": ("ModernBertConfig", "masked", {"cls_token_id": 2, "sep_token_id": 3, **POSITIONS, **SMALL}),
    "bart": ("BartConfig", "text-to-text", HALVES),
    "mvp": ("MvpConfig", "text-to-text", HALVES),
    "blenderbot": ("BlenderbotSmallConfig", "text-to-text", HALVES),
    "prophetnet": ("ProphetNetConfig", "text-to-text", {"hidden_size": 16, "ngram": 2, "decoder_start_token_id": 1}
                   | {f"num_{half}_layers": 2 for half in ("encoder", "decoder")}
                   | {f"num_{half}_attention_heads": 2 for half in ("encoder", "decoder")}
                   | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **POSITIONS}),
    "switch": ("SwitchTransformersConfig", "text-to-text", {"num_experts": 2, "num_sparse_encoder_layers": 1, **T5}
               | {"num_sparse_decoder_layers": 1}),
    "llama": ("LlamaConfig", "causal", KEYS),
    "llama4": ("Llama4TextConfig", "causal", {"intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 8}
               | KEYS),
    "modernbert decoder": ("ModernBertDecoderConfig", "causal", {"cls_token_id": 1, "sep_token_id": 0, **POSITIONS}
                           | SMALL),
    "mistral, a short window": ("MistralConfig", "causal", {"sliding_window": 5, "head_dim": 8, **KEYS}),
    "gemma3n": ("Gemma3nTextConfig", "causal", {"head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4, **KEYS}
                | {"hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"]}
                | {"activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2}),
    "lfm2": ("Lfm2Config", "causal", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
             | KEYS),
    "qwen3-next": ("Qwen3NextConfig", "causal", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
                   | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **LINEAR, **KEYS}
                   | {"shared_expert_intermediate_size": 16}),
    "mamba": ("MambaConfig", "causal", STATE),
    "mamba2": ("Mamba2Config", "causal", {"head_dim": 8, "num_heads": 4, "n_groups": 1, "chunk_size": 8, **STATE}),
    "rwkv": ("RwkvConfig", "causal", {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}),
    "gpt": ("OpenAIGPTConfig", "causal", {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "roberta decoder": ("RobertaConfig", "roberta", {"is_decoder": True, "pad_token_id": 0, **POSITIONS, **SMALL}),
    "camembert decoder": ("CamembertConfig", "roberta", {"is_decoder": True, "pad_token_id": 3, **POSITIONS, **SMALL}),
    "electra decoder": ("ElectraConfig", "causal", {"is_decoder": True, "embedding_size": 16, **POSITIONS, **SMALL}),
}  # fmt: skip
SPREAD = {"mamba": 1.0, "camembert decoder": 1.0, "switch": 1.0}  # at which texts differ; 0.25 in the others
WORDS = ("mobilebert", "esm", "modernbert", "bart", "mvp", "blenderbot", "prophetnet",
         "llama4", "modernbert decoder", "roberta decoder", "lfm2")  # fmt: skip
SAYING = ("llama", "mistral, a short window", "lfm2", "qwen3-next", "mamba", "mamba2", "rwkv", "gpt", "roberta decoder",
          "camembert decoder", "electra decoder", "bart", "prophetnet", "switch", "modernbert decoder")  # fmt: skip


def family(name: str) -> str:
    return CONFIGS[name][1].replace("roberta", "causal")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where a model of a name lies, made at its first use."""
    made: dict[str, str] = {}

    def find(name: str) -> str:
        if name not in made:
            kind, tokens, options = CONFIGS[name]
            tokenizer = TOKENIZERS[tokens]()
            ends = {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": 1, "bos_token_id": 0}
            config = getattr(t, kind)(vocab_size=len(tokenizer), **(ends | options))
            kinds = {"masked": t.AutoModelForMaskedLM, "causal": t.AutoModelForCausalLM}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = kinds.get(family(name), t.AutoModelForSeq2SeqLM).from_config(config).eval()
                for key, tensor in model.named_parameters():
                    if tensor.ndim > 1 and "A_log" not in key:
                        torch.nn.init.normal_(tensor, 0.0, SPREAD.get(name, 0.25))
                    elif "bias" in key:
                        torch.nn.init.normal_(tensor, 0.0, 0.5)
                for key, tensor in model.named_buffers():
                    if key == "final_logits_bias":
                        tensor.normal_()
            model.tie_weights()
            made[name] = str(tmp_path_factory.mktemp("model"))
            model.save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return find


def surface(folder: str, prompt: Prompt, labels=(), name: str = "full", **options):
    options = {"readout": "prompt", "max_length": 40, "max_new_tokens": 7, **options}
    return SURFACES[name].create(folder, labels, prompt=prompt, **options)


def alone(made, batch) -> list[torch.Tensor]:
    """The library's logits of each row by itself, without padding and whatever is kept."""
    found = []
    for row, mask in enumerate(batch["attention_mask"]):
        given = {"input_ids": batch["input_ids"][row : row + 1, mask.bool()]}
        if "decoder_input_ids" in batch:
            given["decoder_input_ids"] = batch["decoder_input_ids"][row : row + 1]
        found.append(made.model(**given).logits[0])
    return found


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", WORDS)
@torch.no_grad()
def test_label_words_score_as_the_library_says(saved, name, padding):
    """Nothing is read past its place: a weight without its layer, a bias behind it, a layer of another name."""
    rows = [Example(text, 0) for text in TEXTS] if name != "mobilebert" else [Example(TEXTS[0], 0)] * 2
    made = surface(saved(name), ROWS[family(name)], LABELS, padding=padding)
    found = made.logits(made.prepare(made.encode(rows).batch(range(len(rows)))))
    plain = surface(saved(name), ROWS[family(name)], LABELS).encode(rows).batch(range(len(rows)))
    words = made.reading.encoder.words
    assert words.single
    wanted = [
        each[int(slot)][[ids[0] for ids in words.words]]
        for each, slot in zip(alone(made, plain), plain["slots"], strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)
    assert (found[:, 0] - found[:, 1]).abs().min() > 1e-3


@pytest.mark.parametrize("name", SAYING)
@torch.no_grad()
def test_choices_score_as_whole_rows_alone(saved, name):
    made = surface(saved(name), Prompt("{text} so it was", {}))
    batch = made.encode(CHOICES).batch(range(len(CHOICES)))
    found = made.logits(made.prepare(batch)).flatten()
    wanted = [
        sum(
            float(logits.log_softmax(-1)[slot, target]) * float(weight)
            for slot, target, weight in zip(
                batch["slots"][row], batch["targets"][row], batch["weights"][row], strict=True
            )
        )
        for row, logits in enumerate(alone(made, batch))
    ]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-3)


def token_by_token(made, batch, count: int) -> list[list[int]]:
    """What is written where each row is read alone, from its first token, for each token anew."""
    said = []
    for row, mask in enumerate(batch["attention_mask"]):
        ids, out = batch["input_ids"][row, mask.bool()].tolist(), []
        for _ in range(count):
            one = {"input_ids": torch.tensor([ids + out]), "attention_mask": torch.ones(1, len(ids + out))}
            if "decoder_input_ids" in batch:
                begun = batch["decoder_input_ids"][row].tolist()
                one = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
                one["decoder_input_ids"] = torch.tensor([begun + out])
            out.append(int(alone(made, one)[0][-1].argmax()))
        said.append(out)
    return said


def assert_written(made) -> None:
    encoded = made.encode_questions([Example(text, 0, answers=("x",)) for text in TEXTS])
    batch = encoded.batch(range(len(TEXTS)))
    wanted = token_by_token(made, batch, 6)
    asked = made.prepare(batch).tensors
    assert readouts.written(made.model, asked, torch.tensor([-1]), 6).tolist() == wanted
    assert len({tuple(row) for row in wanted}) > 1
    stops = [wanted[0][1], wanted[1][3]]  # at which rows end at places of their own
    for row, found in zip(wanted, readouts.written(made.model, asked, torch.tensor(stops), 6).tolist(), strict=True):
        end = next((n + 1 for n, token in enumerate(row) if token in stops), 6)
        assert found[:end] == row[:end]


@pytest.mark.parametrize("name", SAYING)
@torch.no_grad()
def test_texts_are_those_token_by_token(saved, name):
    """Whatever the model keeps of a text, or if it keeps nothing."""
    assert_written(surface(saved(name), Prompt("{text} so", {}, "sum", " {answer}")))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "mistral, a short window", "roberta decoder"])
@torch.no_grad()
def test_texts_behind_virtual_tokens(saved, name, kind):
    made = surface(saved(name), Prompt("{text} so", {}, "sum", " {answer}"), (), kind, tokens=3)
    for tensor in made.trainable().values():
        tensor.add_(0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    assert_written(made)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "mamba", "roberta decoder", "modernbert"])
@torch.no_grad()
def test_virtual_tokens_that_are_real_ones_read_like_them(saved, name, tmp_path):
    """Also in a model whose layers look its tokens up again; and they are saved without heads to tell of."""
    made = surface(saved(name), ROWS[family(name)], LABELS, "prompt", tokens=3)
    (front,) = reading.some_tokens(made.model, 3)
    made.virtual.copy_(made.model.get_input_embeddings()(front))
    rows = [Example(text, 0) for text in TEXTS]
    batch = made.encode(rows).batch(range(len(rows)))
    found = made.logits(made.prepare(batch))
    plain = surface(saved(name), ROWS[family(name)], LABELS)
    longer = {
        "input_ids": torch.cat([front.expand(len(rows), -1), batch["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(len(rows), 3, dtype=torch.int64), batch["attention_mask"]], dim=1),
    }
    tokens = [ids[0] for ids in made.reading.encoder.words.words]
    logits = alone(plain, longer)
    wanted = [each[int(slot) + 3][tokens] for each, slot in zip(logits, batch["slots"], strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)
    made.save(tmp_path / "model")
    again = load(tmp_path / "model")
    torch.testing.assert_close(again.logits(again.prepare(batch)), found)


# --- shortcuts are seen to hold ------------------------------------------------------------------------------------


def model_of(saved, name: str) -> torch.nn.Module:
    return backbone.load_language_model(saved(name), family(name))


def test_the_usual_model_is_read_the_short_way(saved):
    model = model_of(saved, "llama")
    assert (reading.states_from(model), reading.output_layer(model)) == ("model", "lm_head")
    assert reading.padded_left(model) == readouts.sharing(model) == reading.Places(0)
    assert readouts.going_on(model) == readouts.Going(reading.Places(0), drops=True)


def test_positions_are_counted_as_the_model_does(saved):
    """From behind its padding token, in one whose padding is not the first."""
    assert readouts.going_on(model_of(saved, "camembert decoder")).places == reading.Places(4)


@pytest.mark.parametrize(
    ("spoil", "ask"),
    [
        (lambda m: m.model.register_forward_hook(lambda *_: None), lambda m: reading.states_from(m) == "model"),
        (lambda m: wrong_states(m), lambda m: reading.states_from(m) is None),
        (lambda m: m.lm_head.register_forward_hook(lambda *x: x[2] + 1), lambda m: reading.output_layer(m) is None),
        (lambda m: forgets(m), lambda m: readouts.going_on(m) is None and readouts.sharing(m) is None),
    ],
)
def test_a_way_that_leads_elsewhere_is_not_gone(saved, spoil, ask):
    model = model_of(saved, "llama")
    spoil(model)
    assert ask(model)


def test_the_output_layer_is_the_one_that_speaks(saved):
    """Whatever the model says it is."""
    model = model_of(saved, "llama")
    model.other = torch.nn.Linear(16, model.config.vocab_size)
    model.get_output_embeddings = lambda: model.other
    assert reading.output_layer(model) == "lm_head"


def wrong_states(model) -> None:
    """The logits depend on the state before, too."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda states: forward(states + states.roll(1, dims=1))


def forgets(model) -> None:
    """What was kept is not looked at."""
    name = backbone.keeps_as(model.model)
    model.model.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | {name: None}), with_kwargs=True)


def test_rows_that_cannot_be_dropped_are_read_on(saved, monkeypatch):
    def select(self, indices):
        raise NotImplementedError("this layer keeps something else")

    monkeypatch.setattr(t.DynamicCache, "batch_select_indices", select)
    model = model_of(saved, "llama")
    assert readouts.going_on(model) == readouts.Going(reading.Places(0), drops=False)
    assert readouts.sharing(model) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_seen_leaves_no_trace_and_is_the_same_while_training(saved, dtype):
    model = backbone.load_language_model(saved("llama"), "causal", dtype)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        module.training = True
    before = torch.get_rng_state()
    assert readouts.going_on(model) == readouts.Going(reading.Places(0), drops=True)
    assert readouts.sharing(model) == reading.Places(0) and reading.output_layer(model) == "lm_head"
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_a_wrong_way_is_told_from_rounding():
    wanted = torch.linspace(-4, 4, 100).to(torch.bfloat16)
    assert reading.near((wanted.float() * 1.004).to(torch.bfloat16), wanted)
    assert not reading.near(wanted.roll(20), wanted) and not reading.near(wanted[:50], wanted)
    single = wanted.float()
    assert reading.near(single + 1e-4, single) and not reading.near(single + 0.1, single)
    assert not reading.near(single.where(single < 3, torch.nan), single)
    for same in (torch.zeros(7), torch.full((7,), torch.nan), torch.full((7,), -torch.inf)):
        assert not reading.near(same, same)


def test_an_output_layer_of_zeros_shows_no_shortcut():
    """It agrees with every way, right or wrong, and is tuned afterwards."""
    config = t.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.MambaForCausalLM(config).eval()
    said = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data.zero_()
    row = {
        "input_ids": torch.tensor([[5, 9, 3, 7], [8, 2, 6, 4]]),
        "attention_mask": torch.ones(2, 4, dtype=torch.int64),
    }
    stops = torch.tensor([39])
    readouts.written(model, row, stops, 3)  # which looks at the model
    model.lm_head.weight.data.copy_(said)
    assert torch.equal(
        readouts.written(model, row, stops, 6),
        readouts.greedily(lambda ids: model(torch.cat([row["input_ids"], ids], 1)).logits[:, -1], 2, stops, 6),
    )


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_what_is_kept_is_found_whatever_it_is_called(name):
    """The library has renamed the argument before."""
    stack = torch.nn.Identity()
    made: dict = {}
    exec(f"def forward(input_ids, {name}=None): ...", made)
    stack.forward = made["forward"]
    kept = t.DynamicCache()
    assert backbone.keeps_as(stack) == name
    assert backbone.kept_in({"input_ids": torch.zeros(1, 1), "kept": kept}) is kept
    stack.forward = lambda input_ids, **more: None
    assert backbone.keeps_as(stack) is None and backbone.kept_in({"input_ids": torch.zeros(1, 1)}) is None
