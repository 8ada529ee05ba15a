"""Choices and answers of a row's own: their log-likelihoods, and what is written, against the library's plain use."""

from __future__ import annotations

import itertools
import json

import families
import pytest
import torch
import transformers
from tiny_models import byte_level, unigram

from gradientless.errors import UserError
from gradientless.language import readouts
from gradientless.language.prompting import PromptEncoder
from gradientless.language.surfaces import SURFACES, FullSurface, load
from gradientless.language.tasks import Example, Prompt
from gradientless.search.evaluators.injection import Injection
from gradientless.search.noise import Noise
from gradientless.search.points import ALL, Direction, point
from gradientless.search.space import Space

CHOICES = [
    Example("a good film", 1, choices=("the plot", "very bright", "dull dull"), answers=("very bright",)),
    Example("the film was very very dull", 0, choices=("bad", "a terrible film"), answers=("bad",)),
    Example("bright", 1, choices=("the film", "positive"), answers=("positive",)),
]
ANSWERS = [
    Example("a good film", 0, answers=("the plot", "plot")),
    Example("the film was very very dull", 0, answers=("bad",)),
    Example("bright", 0, answers=("a very bright film",)),
]
CHOICE = Prompt("Review: {text}\nSentiment: {label}", answer="{answer}.")
ANSWER = Prompt("Review: {text}\nSentiment:", answer=" {answer}\n")
KINDS = ("llama", "opt", "gpt2", "t5")
MASKED = Prompt("Review: {text} It was {mask}.")


def surface(models, kind: str, prompt: Prompt, name: str = "full", **options):
    options = {"readout": "prompt", "max_length": 60, "max_new_tokens": 9, **options}
    return SURFACES[name].create(models(kind), (), prompt=prompt, **options)


def plain_likelihoods(model, tokenizer, kind: str, front: str, said: str, end: bool = False) -> tuple[float, int]:
    """Sum of the log-probabilities of the tokens of `said` behind `front`, and how many they are: one at a time."""
    if kind == "t5":
        source = tokenizer(front, return_tensors="pt")["input_ids"]
        answer = tokenizer(said.strip(), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
        decoder = [model.config.decoder_start_token_id, *answer]
        logits = model(input_ids=source, decoder_input_ids=torch.tensor([decoder])).logits[0]
        first = 1
        ids = decoder
    else:
        ids = tokenizer(front + said, add_special_tokens=False)["input_ids"]
        first = len(tokenizer(front, add_special_tokens=False)["input_ids"])
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    total = 0.0
    for at in range(first, len(ids)):
        total += float(logits[at - 1].log_softmax(-1)[ids[at]])
    return total, len(ids) - first


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_choices_are_scored_as_one_by_one(language_models, kind, padding):
    made = surface(language_models, kind, CHOICE, padding=padding)
    mean = surface(language_models, kind, Prompt(CHOICE.text, score="mean", answer=CHOICE.answer))
    found = made(made.encode(CHOICES).batch([0, 1, 2]))
    means = mean(mean.encode(CHOICES).batch([0, 1, 2]))
    assert found.shape == (3, 3) and torch.isinf(found).sum() == 2
    for row, example in enumerate(CHOICES):
        front = f"Review: {example.text}\nSentiment:"
        for column, choice in enumerate(example.choices):
            total, tokens = plain_likelihoods(made.model, made.tokenizer, kind, front, f" {choice}.")
            assert found[row, column] == pytest.approx(total, rel=1e-5, abs=1e-4)
            assert means[row, column] == pytest.approx(total / tokens, rel=1e-5, abs=1e-4)
    assert len({round(float(x), 3) for x in found[found.isfinite()]}) == 7


@pytest.mark.parametrize("name", ["full", "lora", "prefix", "prompt", "side_lora"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_choices_share_is_read_once(language_models, name, padding):
    """The scores and their gradients are those of the whole rows; the model sees fewer tokens."""
    made = surface(language_models, "llama", CHOICE, name, padding=padding, max_length=50)
    tensors = made.prepare(made.encode(CHOICES).batch([0, 1, 2])).tensors
    seen: list[int] = []
    stack = made.model.get_decoder()
    handle = stack.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    found = []
    for share in (True, False):
        values = readouts.scores(made.model, tensors, None, share=share)
        finite = values[values.isfinite()]
        found.append((finite, torch.autograd.grad(finite.square().sum(), list(made.trainable().values()))))
    handle.remove()
    assert len(seen) == 3 and seen[0] + seen[1] < seen[2]
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_answer_alone_is_scored(language_models, kind):
    made = surface(language_models, kind, ANSWER)
    encoded = made.encode_answers(ANSWERS)
    found = made(encoded.batch([2, 0, 1]))
    assert found.shape == (3, 1)
    for row, place in enumerate([2, 0, 1]):
        example = ANSWERS[place]
        front = f"Review: {example.text}\nSentiment:"
        end = "" if kind == "t5" else "\n"
        total, tokens = plain_likelihoods(made.model, made.tokenizer, kind, front, f" {example.answers[0]}{end}", True)
        assert found[row, 0] == pytest.approx(total, rel=1e-5, abs=1e-4)
        assert encoded.tokens[place] == tokens


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_a_masked_model_scores_a_choice_at_as_many_masks(language_models, kind):
    made = surface(language_models, kind, MASKED)
    found = made(made.encode(CHOICES).batch([0, 1, 2]))
    tokenizer = made.tokenizer
    for row, example in enumerate(CHOICES):
        for column, choice in enumerate(example.choices):
            front = f"Review: {example.text} It was"
            ids = tokenizer(f"{front} {choice}", add_special_tokens=False)["input_ids"]
            first = len(tokenizer(front, add_special_tokens=False)["input_ids"])
            word, back = ids[first:], tokenizer(".", add_special_tokens=False)["input_ids"]
            masked = ids[:first] + [tokenizer.mask_token_id] * len(word) + back
            whole = [tokenizer.convert_tokens_to_ids("[CLS]" if kind == "bert" else "<s>"), *masked]
            whole.append(tokenizer.convert_tokens_to_ids("[SEP]" if kind == "bert" else "</s>"))
            logits = made.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(float(logits[1 + first + i, token]) for i, token in enumerate(word))
            assert found[row, column] == pytest.approx(total, rel=1e-5, abs=1e-4)
    with pytest.raises(UserError, match="a text can be written by causal and text-to-text models, got a masked one"):
        made.encode_questions(ANSWERS)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_are_those_of_the_library_row_by_row(language_models, kind):
    made = surface(language_models, kind, ANSWER)
    encoder = made.reading.encoder
    found = made.texts(made.prepare(made.encode_questions(ANSWERS).batch([0, 1, 2])))
    expected = []
    for example in ANSWERS:
        ids = made.tokenizer(f"Review: {example.text}\nSentiment:", return_tensors="pt")["input_ids"]
        options = {"eos_token_id": encoder.stops.tolist(), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 9}
        out = made.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        out = out[1:] if kind == "t5" else out[ids.shape[1] :]
        text = made.tokenizer.decode(out, skip_special_tokens=True)
        expected.append(text.split("\n")[0].strip())
    assert found == expected and len(set(expected)) > 1


def endings(made):
    """Eight questions, and two stops with which what the model writes about them ends at the most places."""
    texts = ["a good", "bad", "the plot was", "dull film", "very bright plot", "great", "a", "terrible film good"]
    asked = made.prepare(made.encode_questions([Example(text, 0) for text in texts]).batch(range(8)))
    free = readouts.written(made.model, asked.tensors, torch.tensor([-1]), 12)
    assert free.shape == (8, 12)
    pairs = itertools.combinations(free.unique().tolist(), 2)
    return asked, torch.tensor(max(pairs, key=lambda stops: len(set(lengths(free, stops)))))


def lengths(ids: torch.Tensor, stops) -> list[int]:
    """Tokens of each row up to its first stop."""
    return [next((n + 1 for n, token in enumerate(row) if token in stops), len(row)) for row in ids.tolist()]


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "full") for kind in KINDS), ("llama", "prefix"), ("llama", "prompt")]
)
@torch.no_grad()
def test_a_row_that_has_ended_is_not_read_further(language_models, kind, name):
    made = surface(language_models, kind, ANSWER, name, max_length=50)
    asked, stops = endings(made)
    sizes: list[int] = []
    read = "decoder_input_ids" if kind == "t5" else "input_ids"
    handle = made.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs[read])), with_kwargs=True
    )
    found = readouts.written(made.model, asked.tensors, stops, 12)
    handle.remove()
    took = lengths(found, stops.tolist())
    assert sizes == [sum(length > n for length in took) for n in range(max(took))] and len(set(sizes)) > 2
    options = {"eos_token_id": stops.tolist(), "do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
    for row, length in enumerate(took):
        if name == "full":
            ids = asked.tensors["input_ids"][row, asked.tensors["attention_mask"][row].bool()].unsqueeze(0)
            out = made.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
            out = out[1 if kind == "t5" else ids.shape[1] :]
        else:
            out = readouts.written(made.model, asked.tensors, stops, 12, whole=True)[row, :length]
        assert out.tolist() == found[row, :length].tolist()


@pytest.mark.parametrize(("kind", "name"), [("llama", "full"), ("opt", "lora"), ("t5", "lora")])
@torch.no_grad()
def test_copies_of_a_batch_stay_whole(language_models, kind, name):
    """Noise inside the model tells points apart by where their copies of the rows stand."""
    made = surface(language_models, kind, ANSWER, name, max_length=50)
    asked, made.reading.encoder.stops = endings(made)
    space = Space(made.trainable(), Noise(0, "rademacher"), rank=1)
    changes = space.deltas([point(0.1, Direction(0, 0, ALL)), point(-0.1, Direction(0, 0, ALL))])
    injection = Injection(made, made.trainable())

    def written(points):
        with injection.at(points):
            return made.texts(made.repeated(asked, len(points)))

    assert injection.try_together(lambda points: [len(written(points)) / len(points)] * len(points)) is None
    together = written(changes)
    apart = []
    for change in changes:
        with space.at(change):
            apart += made.texts(asked)
    assert together == apart and apart[:8] != apart[8:]


@pytest.mark.parametrize("name", ["lora", "ia3", "prefix", "prompt", "side_lora", "bias"])
@torch.no_grad()
def test_texts_of_a_surface_are_those_without_a_cache(language_models, name, tmp_path):
    """The adapter moved away from its start; what is saved writes the same."""
    made = surface(language_models, "opt" if name == "bias" else "llama", ANSWER, name, max_length=50)
    with torch.no_grad():
        for tensor in made.trainable().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    found = made.texts(made.prepare(made.encode_questions(ANSWERS).batch([0, 1, 2])))
    stops = set(made.reading.encoder.stops.tolist())
    for example, text in zip(ANSWERS, found, strict=True):
        ids = made.tokenizer(f"Review: {example.text}\nSentiment:")["input_ids"]
        out = []
        while len(out) < 9 and not stops & set(out):
            together = torch.tensor([ids + out])
            out.append(int(made.model(together, torch.ones_like(together), use_cache=False).logits[0, -1].argmax()))
        assert text == made.tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
    made.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.texts(again.prepare(again.encode_questions(ANSWERS).batch([0, 1, 2]))) == found


@pytest.mark.parametrize("name", ["lst", "k_lst"])
def test_a_side_network_scores_choices(language_models, name, tmp_path):
    options = {"k": 1} if name == "k_lst" else {}
    made = SURFACES[name].create(
        language_models("llama"), (), prompt=CHOICE, readout="prompt", max_length=40, reduction=4, **options
    )
    found = made(made.encode(CHOICES).batch([0, 1]))
    assert found.shape == (2, 3) and found.requires_grad
    assert made(made.encode_answers(CHOICES).batch([0])).tolist() == [
        [pytest.approx(float(found.detach()[0, 1]), abs=1e-4)]
    ]
    made.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again(again.encode(CHOICES).batch([0, 1])), found)


@pytest.mark.parametrize("name", ["lst", "k_lst", "k_lst unfrozen"])
@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
@torch.no_grad()
def test_texts_of_a_side_network_are_those_row_by_row(kind, name, tmp_path):
    """Without padding, every token read off the scores of all tokens; what is saved writes the same."""
    name, _, more = name.partition(" ")
    options = {"readout": "prompt", "max_length": 30, "reduction": 2, "max_new_tokens": 7, "seed": 1}
    options |= {"k": 2, "unfrozen": 1 if more else 0} if name == "k_lst" else {}
    folder = families.save(kind, tmp_path / kind)
    prompt = Prompt("the film was {text}", answer=" {answer}\n")
    made = SURFACES[name].create(folder, (), prompt=prompt, **options)
    rows = [Example(text, 0, answers=("bad",)) for text in ("a good plot", "dull", "very very bright the film was bad")]
    encoded = made.encode_questions(rows)
    for seed in range(20):  # until the texts differ
        for tensor in made.trainable().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        found = made.texts(made.prepare(encoded.batch([0, 1, 2])))
        if len(set(found)) > 1:
            break
    stops = set(made.encoder.stops.tolist())
    for example, text in zip(rows, found, strict=True):
        ids = torch.tensor([made.tokenizer(f"the film was {example.text}")["input_ids"]])
        out = [0] if kind == "t5" else []
        while len(out) < (8 if kind == "t5" else 7) and not stops & set(out[-1:]):
            batch = {"input_ids": ids, "decoder_input_ids": torch.tensor([out])}
            if kind != "t5":
                batch = {"input_ids": torch.cat([ids, torch.tensor([out], dtype=torch.int64)], dim=1)}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            out.append(int(made.token_logits(made.prepare(batch))[0, -1].argmax()))
        assert text == made.tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
    assert len(set(found)) > 1
    assert [made.texts(made.prepare(encoded.batch([i])))[0] for i in range(3)] == found
    made.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.texts(again.prepare(again.encode_questions(rows).batch([0, 1, 2]))) == found


def test_a_side_network_without_a_prompt_writes_nothing(tmp_path):
    folder = families.save("llama", tmp_path / "llama")
    made = SURFACES["lst"].create(folder, ("a", "b"), readout="classifier", reduction=4, max_length=16)
    with pytest.raises(UserError, match="surface: texts are written by a language model behind a prompt, got Lst"):
        made.encode_questions(ANSWERS)


def test_a_written_answer_ends_with_its_line():
    """Stops are the tokens with a line break in them, whatever they are called."""
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens(["good\nbad"])
    encoder = PromptEncoder(tokenizer, ANSWER, (), "causal", 40)
    stops = {tokenizer.decode([i]) for i in encoder.stops.tolist()}
    assert "\n" in stops and "<end>" in stops and all("\n" in stop or stop == "<end>" for stop in stops)
    ids = tokenizer(" a film\nbad\n")["input_ids"]
    assert encoder.texts(torch.tensor([ids, [tokenizer.eos_token_id] * len(ids)])) == ["a film", ""]
    assert encoder.texts(torch.tensor([[len(tokenizer) - 1, ids[0]]])) == ["good"]


def test_a_line_break_in_front_of_the_answer_is_not_left_to_the_model():
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    encoder = PromptEncoder(tokenizer, Prompt("Review: {text}\n{label}"), (), "causal", 40)
    ids = encoder.encode_questions(ANSWERS[:1]).batch([0])["input_ids"][0]
    assert tokenizer.decode(ids) == "Review: a good film\n"
    batch = encoder.encode_answers(ANSWERS[:1]).batch([0])
    assert tokenizer.decode(batch["targets"][0]) == "\nthe plot"


def test_the_text_is_cut_and_answers_are_not():
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.eos_token
    long = Example("a good film " * 9, 0, choices=("bad", "very very bright"), answers=("very very bright",))
    encoder = PromptEncoder(tokenizer, CHOICE, (), "causal", 16, max_new_tokens=6)
    for encoded, room in ((encoder.encode([long]), 16), (encoder.encode_questions([long]), 10)):
        batch = encoded.batch([0])
        assert encoded.cut == 1 and batch["attention_mask"].sum(dim=1).max() == room
        assert "\nSentiment:" in tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(UserError, match="max_length must leave room for the text, got 9 tokens for row 1"):
        PromptEncoder(tokenizer, CHOICE, (), "causal", 9, max_new_tokens=6).encode_questions([long])


@pytest.mark.parametrize(
    ("read", "row", "line"),
    [
        ("encode", Example("a", 0), "every row must have choices of its own, got none in row 1"),
        ("encode_answers", Example("a", 0), "every row must have answers of its own, got none in row 1"),
    ],
)
def test_rows_without_what_is_asked_are_refused(read, row, line):
    tokenizer = unigram()
    encoder = PromptEncoder(tokenizer, CHOICE, (), "text-to-text", 40, start=0)
    with pytest.raises(UserError, match=line):
        getattr(encoder, read)([row])


def test_words_and_rows_of_ones_own_do_not_go_together():
    tokenizer = unigram()
    with pytest.raises(UserError, match="words must stay away where rows have choices"):
        PromptEncoder(tokenizer, Prompt("{text}", {"a": "good", "b": "bad"}), (), "text-to-text", 40, start=0)


def test_what_is_saved_says_how_it_answers(language_models, tmp_path):
    made = surface(language_models, "llama", ANSWER)
    assert "answers said ' {answer}\\n'" in made.describe()
    made.save(tmp_path)
    note = json.loads((tmp_path / "gradientless.json").read_text())
    assert (note["max_new_tokens"], note["prompt"]["answer"]) == (9, " {answer}\n")
    again = load(tmp_path)
    assert isinstance(again, FullSurface) and again.reading.encoder.prompt == ANSWER
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), transformers.LlamaForCausalLM)
