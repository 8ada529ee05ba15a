"""The surface `full` on tiny random models: scores against the library's own logits, row by row, and what is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import EXAMPLES, LANGUAGE_MODELS

from gradientless.errors import UserError
from gradientless.language import reading, readouts, surfaces
from gradientless.language.backbone import family, load_config
from gradientless.language.surfaces import FullSurface, HeadSurface
from gradientless.language.tasks import Prompt
from gradientless.schema import read_sealed
from gradientless.search.evaluators.injection import Injection

LABELS = ("negative", "positive")
PROMPTS = {
    "causal": Prompt("Review: {text}\nSentiment:", {"negative": " negative", "positive": " positive"}),
    "masked": Prompt("{text}. It was {mask}.", {"negative": "terrible", "positive": "great"}),
    "text-to-text": Prompt("Review: {text} Sentiment:", {"negative": "negative", "positive": "positive"}),
}
LIBRARY = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "text-to-text": transformers.AutoModelForSeq2SeqLM,
}


def create(folder: str, **options) -> FullSurface:
    return FullSurface.create(folder, LABELS, **{"prompt": PROMPTS, "max_length": 60, "seed": 3, **options})


def by_hand(model, tokenizer, kind: str, text: str, words: list[str], mean: bool = False) -> torch.Tensor:
    """Log-probabilities of the words behind one prompt, one forward each, no padding, the library alone."""
    found = []
    for word in words:
        if kind == "masked":
            count = len(tokenizer(" " + word, add_special_tokens=False)["input_ids"])
            coded = tokenizer(f"{text}. It was {tokenizer.mask_token * count}.", return_tensors="pt")
            coded.pop("token_type_ids", None)
            gold = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            places = (coded["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
            logits = model(**coded).logits[0, places]
        elif kind == "causal":
            front = tokenizer(f"Review: {text}\nSentiment:", add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"Review: {text}\nSentiment: {word}", add_special_tokens=False)["input_ids"]
            gold = whole[len(front) :]
            logits = model(input_ids=torch.tensor([whole])).logits[0, len(front) - 1 : -1]
        else:
            coded = tokenizer(f"Review: {text} Sentiment:", return_tensors="pt")
            gold = tokenizer(word, add_special_tokens=False)["input_ids"]
            start = torch.tensor([[model.config.decoder_start_token_id, *gold[:-1]]])
            coded.pop("token_type_ids", None)
            logits = model(**coded, decoder_input_ids=start).logits[0]
        each = logits.log_softmax(-1)[torch.arange(len(gold)), gold]
        found.append(each.mean() if mean else each.sum())
    return torch.stack(found)


def plain(folder: str):
    kind = family(load_config(folder))
    model = LIBRARY[kind].from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder), kind


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("padding", ["right", "left"])
@torch.no_grad()
def test_scores_are_the_librarys_row_by_row(language_models, kind, padding):
    surface = create(language_models(kind), padding=padding)
    model, tokenizer, name = plain(language_models(kind))
    assert surface.reading.encoder.family == name
    words = [PROMPTS[name].words[label].strip() for label in LABELS]
    batch = surface.encode(EXAMPLES).batch(range(len(EXAMPLES)))
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2  # rows of different lengths
    together = surface(batch)
    assert together.shape == (5, 2) and together.dtype == torch.float32
    for row, example in enumerate(EXAMPLES):
        expected = by_hand(model, tokenizer, name, example.text, words)
        assert (expected[1] - expected[0]).abs() > 1e-3
        torch.testing.assert_close(together[row].log_softmax(0), expected.log_softmax(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@torch.no_grad()
def test_what_is_not_computed_changes_nothing(language_models, kind):
    surface = create(language_models(kind))
    tensors = surface.prepare(surface.encode(EXAMPLES).batch(range(5))).tensors
    words = surface.reading.encoder.words
    whole = readouts.scores(surface.model, tensors, words, whole=True)
    sizes = []
    layer = surface.model.get_output_embeddings()
    for hooked in (False, True):  # whoever hooks the output layer sees it called, at one position a row
        handle = layer.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape))) if hooked else None
        torch.testing.assert_close(readouts.scores(surface.model, tensors, words), whole, rtol=1e-5, atol=1e-5)
        if handle is not None:
            handle.remove()
    assert sizes == [(*tensors["slots"].shape, layer.out_features)] and "forward" not in vars(layer)
    assert not any(module._forward_hooks for module in surface.model.modules())


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "t5"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("score", ["sum", "mean"])
@torch.no_grad()
def test_words_of_several_tokens(language_models, kind, padding, score):
    folder = language_models(kind)
    model, tokenizer, name = plain(folder)
    words = {"masked": ["dull", "great dull plot", "terrible film"]}.get(
        name, ["dull", "positive dull", "positive film"]
    )
    labels = ("a", "b", "c")
    prompt = Prompt(PROMPTS[name].text, dict(zip(labels, words, strict=True)), score)
    surface = FullSurface.create(folder, labels, prompt=prompt, max_length=60, padding=padding)
    assert len({len(word) for word in surface.reading.encoder.words.words}) > 1
    together = surface(surface.encode(EXAMPLES).batch(range(5)))
    for row, example in enumerate(EXAMPLES):
        expected = by_hand(model, tokenizer, name, example.text, words, score == "mean")
        torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_words_that_share_their_beginning_share_a_row(language_models):
    words = {"a": " positive dull", "b": " positive film", "c": " dull"}
    surface = FullSurface.create(
        language_models("gpt2"), tuple(words), prompt=Prompt(PROMPTS["causal"].text, words), max_length=60
    )
    first = surface.reading.encoder.words.words[0]
    assert surface.reading.encoder.words.fills == (first[:-1],)
    assert surface.encode(EXAMPLES).batch([0, 1])["input_ids"].shape[0] == 2


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_the_librarys_model_and_loads_again(language_models, kind, dtype, tmp_path):
    surface = create(language_models(kind), dtype=dtype, padding="left", truncation="left")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        batch = surface.encode(EXAMPLES).batch(range(5))
        before = surface(batch)
        surface.save(tmp_path)
        again = surfaces.load(tmp_path)
        assert isinstance(again, FullSurface) and str(again.dtype) == f"torch.{dtype}"
        assert torch.equal(again(again.encode(EXAMPLES).batch(range(5))), before)
        assert again.reading.encoder.prompt == surface.reading.encoder.prompt and again.labels == LABELS
        assert (again.reading.encoder.truncation, again.reading.encoder.padding) == ("left", "left")
        model = LIBRARY[surface.reading.encoder.family].from_pretrained(tmp_path, dtype="auto").eval()
    tuned = surface.trainable()
    dtypes = {tensor.dtype for tensor in tuned.values()}  # where they differ, the library opens all in the widest
    assert {t.dtype for t in model.parameters()} == (dtypes if len(dtypes) == 1 else {torch.float32})
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, tuned[name].to(tensor.dtype))
    note = json.loads((tmp_path / "gradientless.json").read_text())
    assert (note["surface"], note["prompt"]["text"]) == ("full", surface.reading.encoder.prompt.text)
    with pytest.raises(UserError, match="must be of a model of surface 'head', got 'full'"):
        HeadSurface.load(tmp_path)


def test_the_documented_lines_open_a_language_model(language_models, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "saved-models.md").read_text(encoding="utf-8")
    lines = next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "CausalLM" in block)
    surface = create(language_models("llama"))
    surface.save(tmp_path)
    scope = {"folder": str(tmp_path), "texts": [row.text for row in EXAMPLES]}
    exec(lines, scope)
    expected = surface(surface.encode(EXAMPLES).batch(range(5)))
    torch.testing.assert_close(torch.stack(scope["scores"]), expected, rtol=1e-4, atol=1e-4)


def test_everything_is_tuned_and_tied_tensors_once(language_models):
    surface = create(language_models("llama"))
    trainable = surface.trainable()
    assert surface.model.lm_head.weight is trainable["model.embed_tokens.weight"] and "lm_head.weight" not in trainable
    surface(surface.encode(EXAMPLES).batch(range(5))).sum().backward()
    assert all(tensor.grad is not None for tensor in trainable.values())
    total = sum(tensor.numel() for tensor in trainable.values())
    assert f"{total:,} of {total:,} parameters tuned (100.00%)" in surface.describe()
    assert surface.width == 16 and surface.session is None and not surface.cacheable


@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_repeated_rows_stand_in_consecutive_copies(language_models, kind):
    prompt = Prompt("Review: {text} Sentiment:", {"negative": "dull", "positive": "very dull film"})
    surface = create(language_models(kind), prompt=prompt)
    prepared = surface.prepare(surface.encode(EXAMPLES).batch(range(5)))
    once = surface.logits(prepared)
    repeated = surface.repeated(prepared, 3)
    assert all(torch.equal(t, torch.cat([prepared.tensors[n]] * 3)) for n, t in repeated.tensors.items())
    torch.testing.assert_close(surface.logits(repeated), once.repeat(3, 1), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_mode_only_and_is_seeded(language_models):
    surface = create(language_models("gpt2"), dropout=0.5)
    prepared = surface.prepare(surface.encode(EXAMPLES).batch(range(5)))
    with torch.no_grad():
        quiet = surface.logits(prepared, torch.Generator().manual_seed(1))
        assert torch.equal(quiet, surface.logits(prepared, torch.Generator().manual_seed(2)))
        surface.train()
        state = torch.get_rng_state()
        first = surface.logits(prepared, torch.Generator().manual_seed(1))
        assert torch.equal(first, surface.logits(prepared, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, surface.logits(prepared, torch.Generator().manual_seed(2)))
        assert torch.equal(state, torch.get_rng_state())
    still = create(language_models("gpt2")).train()
    assert still.training and not still.model.training


# --- the readout head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "head"), [("distilbert", "library"), ("bert", "library"), ("bert", "two-layer"),
                                            ("llama", "linear"), ("gpt2", "two-layer")])  # fmt: skip
def test_under_a_head_the_scores_are_those_of_the_surface_head(models, kind, head, tmp_path):
    options = {"head": head, "seed": 3, "max_length": 20}
    frozen = HeadSurface.create(models(kind), LABELS, **options)
    surface = FullSurface.create(models(kind), LABELS, readout="head", **options)
    batch = surface.encode(EXAMPLES).batch(range(5))
    assert torch.equal(surface(batch), frozen(batch))
    surface(batch).sum().backward()
    assert all(tensor.grad is not None for tensor in surface.trainable().values())
    assert len(surface.trainable()) > len(frozen.trainable())
    named = dict(surface.model.named_parameters())
    assert all(named[name] is tensor for name, tensor in surface.trainable().items())
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(0.01)
    surface.save(tmp_path)
    again = surfaces.load(tmp_path)
    assert isinstance(again, FullSurface) and torch.equal(again(batch), surface(batch))
    assert surface(batch).ne(frozen(batch)).all()


def test_a_pooler_that_nothing_reads_is_not_tuned(tmp_path):
    from tiny_models import CONFIGS, make_tokenizer

    transformers.AutoModel.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path)
    make_tokenizer(True).save_pretrained(tmp_path)
    surface = FullSurface.create(str(tmp_path), LABELS, head="two-layer", max_length=20)
    assert not any("pooler" in name for name in surface.trainable())
    assert any("pooler" in name for name, _ in surface.model.named_parameters())


@pytest.mark.parametrize("labels", [("x", "y"), ("x", "y", "z")])
@pytest.mark.parametrize("kind", ["full", "head"])
def test_the_linear_probe_is_scikit_learns(models, labels, kind, tmp_path, monkeypatch):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path))
    surface = surfaces.SURFACES[kind].create(models("bert"), labels, start="probe", max_length=20)
    rows = [type(row)(row.text, i % len(labels)) for i, row in enumerate(EXAMPLES * 3)]
    encoded = surface.encode(rows)
    assert "linear probe of 15 rows" in surface.begin(encoded, show=False)
    frozen = HeadSurface.create(models("bert"), labels, head="two-layer", pooling="mean", max_length=20)
    values = frozen.features(encoded.batch(range(15))).double().numpy()
    spread = values.std(0)
    scaled = (values - values.mean(0)) / np.maximum(spread, 0.01 * spread.mean())
    strengths = {"C": [1e-4, 1e-3, 1e-2, 1e-1, 1.0]}
    folds = StratifiedKFold(5)  # of 15 rows, five or more a class
    search = GridSearchCV(LogisticRegression(max_iter=5000), strengths, scoring="neg_log_loss", cv=folds)
    expected = search.fit(scaled, encoded.labels.numpy()).predict_log_proba(scaled)
    found = surface(encoded.batch(range(15))).log_softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    short = [type(row)(row.text, i % (len(labels) - 1)) for i, row in enumerate(EXAMPLES)]
    with pytest.raises(UserError, match=f"start 'probe' needs rows of every class, got none of '{labels[-1]}'"):
        surface.begin(surface.encode(short), show=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "haed"}, "full: unknown readout 'haed'; did you mean 'head'"),
        ({"readout": "prompt", "prompt": None}, "full: readout 'prompt' needs a prompt, got none"),
        ({"prompt": {"masked": PROMPTS["masked"]}}, "needs a prompt for causal models, got those for: masked"),
        ({"start": "probe"}, "full: start 'probe' needs the readout 'head', got 'prompt'"),
        ({"max_length": 65}, "full: max_length must be <= 64, the positions of"),
        ({"dropout": -0.1}, "full: dropout must be >= 0 and < 1, got -0.1"),
        ({"padding": "middle"}, "prompt: unknown padding 'middle'"),
        ({"truncation": "rigth"}, "prompt: unknown truncation 'rigth'; did you mean 'right'"),
    ],
)
def test_bad_options_are_told_in_one_line(language_models, options, message):
    with pytest.raises(UserError, match=message) as caught:
        create(language_models("llama"), **options)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_a_language_head_is_refused(language_models, tmp_path):
    transformers.AutoModel.from_pretrained(language_models("bert")).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(language_models("bert")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"must hold all weights of its model, got none for cls\.predictions"):
        create(str(tmp_path))


def test_only_the_label_words_rows_of_the_output_layer_are_computed(language_models):
    layer = create(language_models("llama")).model.get_output_embeddings()
    tokens, states = torch.tensor([3, 7]), torch.randn(2, 1, 16)
    whole = layer(states)
    with reading.rows_of(tokens, layer) as narrow:
        assert narrow
        torch.testing.assert_close(layer(states), whole[..., tokens])
    for tuned in (torch.nn.Linear(2, 2), layer):  # a layer that noise is added in is called whole
        inside = Injection(torch.nn.ModuleList([tuned]), {"w": tuned.weight}).at([[]])
        with inside, reading.rows_of(tokens, layer) as narrow:
            assert narrow == (tuned is not layer) and torch.equal(layer(states), whole) == (not narrow)


def test_damaged_notes_are_told_in_one_line(language_models, tmp_path):
    surface = create(language_models("llama"))
    surface.save(tmp_path)
    path = tmp_path / "gradientless.json"
    note = read_sealed(path, "model")
    for change, message in [
        ({"surface": "ful"}, "unknown surface 'ful'; did you mean 'full'"),
        ({"readout": "promt"}, "unknown readout 'promt'; did you mean 'prompt'"),
        ({"prompt": {"txt": ""}}, r"prompt\.text must be there, got none"),
        ({"labels": None}, "labels must be a list, got None"),
    ]:
        path.write_text(json.dumps(note | change))
        with pytest.raises(UserError, match=message):
            surfaces.load(tmp_path)
