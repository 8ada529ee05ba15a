"""The surface `head` on tiny random models: what it computes, what it leaves alone, and who opens what it saves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import DECODERS, EXAMPLES

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.data import Encoded
from gradientless.language.surfaces import SURFACES
from gradientless.language.surfaces.head import LIBRARY_HEADS, HeadSurface

LABELS = ("bad", "good")
NAMES = {
    "bert": ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"),
    "distilbert": ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"),
    "roberta": (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ),
}
NAMES["xlm-roberta"] = NAMES["camembert"] = NAMES["roberta"]


def encode(surface: HeadSurface) -> dict[str, torch.Tensor]:
    return Encoded(surface.tokenizer, EXAMPLES, surface.max_length).batch(range(len(EXAMPLES)))


def create(models, kind: str, **options) -> HeadSurface:
    return HeadSurface.create(models(kind), LABELS, **{"max_length": 20, "seed": 3, **options})


def stir(surface: HeadSurface) -> None:
    """Move every tuned entry, so that no test passes by zeros."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator))


def test_registry_names_the_class():
    assert SURFACES["head"] is HeadSurface
    assert sorted(NAMES) == sorted(LIBRARY_HEADS)


@pytest.mark.parametrize("kind", sorted(LIBRARY_HEADS))
def test_library_head_computes_what_the_library_does_and_opens_there(models, kind, tmp_path):
    surface = create(models, kind)
    assert surface.kind == "library" and tuple(surface.trainable()) == NAMES[kind]
    stir(surface)
    batch = encode(surface)
    ours = surface(batch)
    surface.save(tmp_path)

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    coded = tokenizer([row.text for row in EXAMPLES], padding=True, truncation=True, return_tensors="pt")
    if kind == "distilbert":
        coded.pop("token_type_ids", None)
    assert torch.equal(plain(**coded).logits, ours.detach())
    assert plain.config.id2label == {0: "bad", 1: "good"}
    parameters = dict(plain.named_parameters())
    for name, tensor in surface.trainable().items():
        assert torch.equal(parameters[name], tensor)

    again = HeadSurface.load(tmp_path)
    assert torch.equal(again(batch), ours) and again.labels == LABELS and again.max_length == 20


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_two_layer_head_matches_rows_taken_one_by_one_and_round_trips(models, kind, pooling, tmp_path):
    if pooling == "cls" and kind in DECODERS:
        with pytest.raises(UserError, match="pooling must be mean or last for a decoder"):
            create(models, kind, pooling=pooling)
        return
    surface = create(models, kind, head="two-layer", pooling=pooling, hidden=5, activation="gelu")
    assert tuple(surface.trainable()) == ("head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias")
    stir(surface)
    batch = encode(surface)
    together = surface(batch).detach()
    weights = {name: tensor.detach() for name, tensor in surface.trainable().items()}
    body = transformers.AutoModel.from_pretrained(models(kind)).eval()
    for row in range(len(EXAMPLES)):  # one text alone needs no padding and no mask
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        states = body(ids.unsqueeze(0)).last_hidden_state[0].detach()
        pooled = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
        inner = torch.nn.functional.gelu(weights["head.dense.weight"] @ pooled + weights["head.dense.bias"])
        alone = weights["head.out.weight"] @ inner + weights["head.out.bias"]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)

    surface.save(tmp_path)
    again = HeadSurface.load(tmp_path)
    assert torch.equal(again(batch).detach(), together)
    assert (again.pooling, again.activation, again.labels, again.max_length) == (pooling, "gelu", LABELS, 20)
    assert again.body_checksum() == surface.body_checksum()


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_the_three_documented_lines_open_a_two_layer_model(models, kind, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "saved-models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    surface = create(models, kind, head="two-layer")
    stir(surface)
    surface.save(tmp_path)
    if kind == "distilbert":  # its own tokenizers make no segment ids; our tiny one does
        path = tmp_path / "body" / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"model_input_names": ["input_ids", "attention_mask"]}))
    scope = {"folder": str(tmp_path), "texts": [row.text for row in EXAMPLES]}
    exec(blocks[1], scope)
    torch.testing.assert_close(scope["logits"], surface(encode(surface)), rtol=1e-4, atol=1e-5)


def test_the_documented_lines_open_a_library_model(models, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "saved-models.md").read_text(encoding="utf-8")
    surface = create(models, "bert")
    surface.save(tmp_path)
    scope = {"folder": str(tmp_path), "texts": [row.text for row in EXAMPLES]}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.S)[0], scope)
    assert torch.equal(scope["logits"], surface(encode(surface)))


def test_only_the_head_is_trained_and_the_body_stays_in_eval_mode(models):
    surface = create(models, "bert", dropout=0.5)
    trained = {name for name, tensor in surface.named_parameters() if tensor.requires_grad}
    assert trained == {"model." + name for name in NAMES["bert"]}
    before = surface.body_checksum()
    surface.train()
    assert surface.training and not any(module.training for module in surface.model.modules())
    surface(encode(surface)).sum().backward()
    torch.optim.SGD(surface.trainable().values(), lr=1.0).step()
    assert all(tensor.grad is None for tensor in surface.parameters() if not tensor.requires_grad)
    surface._body_checksum = None
    assert surface.body_checksum() == before


def test_dropout_acts_in_training_mode_only_and_is_drawn_from_the_generator(models):
    surface = create(models, "roberta", dropout=0.5)
    stir(surface)
    prepared = surface.prepare(encode(surface))
    quiet = surface.logits(prepared)
    assert torch.equal(quiet, surface.logits(prepared))
    surface.train()
    state = torch.get_rng_state()
    first = surface.logits(prepared, torch.Generator().manual_seed(1))
    assert torch.equal(first, surface.logits(prepared, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, surface.logits(prepared, torch.Generator().manual_seed(2)))
    assert not torch.equal(first, quiet) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options", [{}, {"head": "two-layer"}])
def test_the_seed_alone_decides_the_first_weights(models, options):
    state = torch.get_rng_state()
    one, two = create(models, "bert", **options), create(models, "bert", **options)
    other = create(models, "bert", **{**options, "seed": 4})
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in one.trainable().items():
        assert torch.equal(tensor, two.trainable()[name])
    weight = one.layers().names[0]
    assert not torch.equal(one.trainable()[weight], other.trainable()[weight])
    assert one.body_checksum() == two.body_checksum() == other.body_checksum()


def test_a_library_head_keeps_what_the_checkpoint_holds(models, tmp_path):
    first = create(models, "bert")
    stir(first)
    first.save(tmp_path)
    kept = HeadSurface.create(str(tmp_path), LABELS, seed=11, max_length=20)
    for name, tensor in first.trainable().items():
        assert torch.equal(tensor, kept.trainable()[name])
    wider = HeadSurface.create(str(tmp_path), ("x", "y", "z"), seed=11, max_length=20)
    assert torch.equal(wider.trainable()[NAMES["bert"][0]], first.trainable()[NAMES["bert"][0]])
    assert wider.trainable()["classifier.weight"].shape == (3, 16)
    assert wider.trainable()["classifier.weight"].std() < 0.1  # initializer_range is 0.02; the stirred ones spread by 1
    assert not wider.trainable()["classifier.bias"].any()


@pytest.mark.parametrize("head", ["library", "two-layer"])
def test_a_half_precision_body_keeps_a_float32_head_through_saving(models, head, tmp_path):
    surface = create(models, "bert", head=head, dtype="bfloat16")
    stir(surface)
    assert surface.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in surface.trainable().values()} == {torch.float32}
    batch = encode(surface)
    assert surface.features(batch).dtype == torch.float32
    surface.save(tmp_path)
    again = HeadSurface.load(tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(again(batch), surface(batch))
    if head == "library":
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(
            dict(plain.named_parameters())["classifier.weight"], surface.trainable()["classifier.weight"]
        )


def test_prepared_features_give_the_same_logits(models):
    surface = create(models, "distilbert")
    batch = encode(surface)
    prepared = surface.prepare(surface.features(batch))
    assert torch.equal(surface.logits(prepared), surface(batch)) and not prepared.features.requires_grad
    with pytest.raises(ValueError, match=r"features must be \[B, 16\], got \[2, 3\]"):
        surface.prepare(torch.zeros(2, 3))


def test_auto_takes_the_library_head_unless_something_else_is_asked(models):
    assert create(models, "bert").kind == "library"
    assert create(models, "bert", pooling="mean").kind == "two-layer"
    assert create(models, "bert", hidden=4).kind == "two-layer"
    assert create(models, "bert", activation="relu").kind == "two-layer"
    assert (create(models, "gpt2").kind, create(models, "gpt2").pooling) == ("two-layer", "mean")
    tuned = 16 * 16 + 16 + 16 * 2 + 2
    assert f": {tuned} of " in create(models, "gpt2").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "libary"}, "did you mean 'library'"),
        ({"pooling": "max"}, "unknown pooling 'max'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"hidden": 0}, "hidden must be >= 1, got 0"),
        ({"max_length": 33}, "max_length must be <= 32, the positions of"),
        ({"max_length": 2}, "max_length must be > 2, the special tokens of"),
        ({"dropout": 1.0}, "dropout must be >= 0 and < 1, got 1.0"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"head": "library", "pooling": "mean"}, "use 'two-layer'"),
    ],
)
def test_bad_options_are_told_in_one_line(models, options, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        create(models, "bert", **options)
    assert "\n" not in str(caught.value)


def test_a_library_head_that_is_not_known_is_refused(models):
    with pytest.raises(UserError, match=r"'library' is known for bert, .*got 'gpt2'"):
        create(models, "gpt2", head="library")


def test_damaged_saved_models_are_told_in_one_line(models, tmp_path):
    with pytest.raises(UserError, match=r"must hold a saved model with gradientless\.json"):
        HeadSurface.load(tmp_path)
    surface = create(models, "bert", head="two-layer")
    surface.save(tmp_path)
    head = (tmp_path / "head.safetensors").read_bytes()
    (tmp_path / "head.safetensors").write_bytes(head[:50])
    with pytest.raises(UserError, match="missing or damaged file"):
        HeadSurface.load(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(head)
    body = (tmp_path / "body" / "model.safetensors").read_bytes()
    (tmp_path / "body" / "model.safetensors").write_bytes(body[:500])
    with pytest.raises(UserError, match="could not be loaded") as caught:
        HeadSurface.load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "gradientless.json").write_text("{")
    with pytest.raises(UserError, match="must be JSON, got a corrupted file"):
        HeadSurface.load(tmp_path)


def test_a_checkpoint_without_some_body_weights_is_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    surface = create(models, "bert", head="two-layer")
    surface.save(tmp_path)
    tensors = load_file(tmp_path / "body" / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "body" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"must hold all weights.*encoder\.layer\.0\.output\.dense\.weight"):
        HeadSurface.load(tmp_path)


def test_resolve_tells_what_a_model_may_be(tmp_path):
    with pytest.raises(UserError, match=r"did you mean 'starter:minilm'"):
        backbone.resolve("starter:minilmm")
    with pytest.raises(UserError, match=r"must hold a config\.json"):
        backbone.resolve(str(tmp_path))
    (tmp_path / "body").mkdir()
    (tmp_path / "body" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"must hold a config\.json, got none; a model lies in .*body$"):
        backbone.resolve(str(tmp_path))
    with pytest.raises(UserError, match="must be a folder with a model, or a hub id"):
        backbone.resolve("./nowhere")
    assert backbone.resolve("owner/name") == "owner/name"


def test_an_unknown_model_while_offline_is_one_line():
    with pytest.raises(UserError, match="unknown model 'owner/nowhere-to-be-found': not a folder") as caught:
        backbone.load_config("owner/nowhere-to-be-found")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_opened(models, tmp_path):
    surface = create(models, "bert", head="two-layer")
    surface.save(tmp_path)
    torch.save(surface.model.state_dict(), tmp_path / "body" / "pytorch_model.bin")
    (tmp_path / "body" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights, and pickled ones are not opened"):
        HeadSurface.load(tmp_path)


def test_checksum_sees_every_entry(models):
    surface = create(models, "bert", head="two-layer")
    before = backbone.checksum(surface.model)
    last = next(surface.model.parameters()).view(-1)[-1:]
    with torch.no_grad():
        last.copy_(torch.nextafter(last, last + 1))
    assert backbone.checksum(surface.model) != before
