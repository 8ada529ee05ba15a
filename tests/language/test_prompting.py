"""Prompts as token ids: golden rows, label words at token boundaries, what is cut, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_models import byte_level, make_language_model, make_tokenizer, roberta_like, unigram, wordpiece

from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.prompting import PromptEncoder
from gradientless.language.tasks import TASKS, Example, Prompt

LABELS = ("negative", "positive")
WORDS = {"negative": "negative", "positive": "positive"}
FILMS = {"negative": "terrible", "positive": "great"}


def encoder(tokenizer, prompt, family, max_length=64, labels=LABELS, **options) -> PromptEncoder:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    start = 0 if family == "text-to-text" else None
    return PromptEncoder(tokenizer, prompt, labels, family, max_length, start=start, **options)


def tokens(made: PromptEncoder, example: Example) -> list[str]:
    batch = made.encode([example]).batch([0])
    kept = batch["input_ids"][0][batch["attention_mask"][0] == 1]
    return made.tokenizer.convert_ids_to_tokens(kept.tolist())


def word_tokens(made: PromptEncoder) -> list[list[str]]:
    return [made.tokenizer.convert_ids_to_tokens(list(word)) for word in made.words.words]


GOLDEN = [
    (
        byte_level,
        "causal",
        Prompt("Review: {text}\nSentiment: {label}", WORDS),
        ["Review", ":", "Ġa", "Ġgood", "Ġfilm", "Ċ", "Sentiment", ":"],
        [["Ġnegative"], ["Ġpositive"]],
        7,
    ),
    (
        wordpiece,
        "masked",
        Prompt("{text} It was {mask}.", FILMS),
        ["[CLS]", "a", "good", "film", "it", "was", "[MASK]", ".", "[SEP]"],
        [["terrible"], ["great"]],
        6,
    ),
    (
        roberta_like,
        "masked",
        Prompt("{text} It was {mask}.", FILMS),
        ["<s>", "a", "Ġgood", "Ġfilm", "ĠIt", "Ġwas", "<mask>", ".", "</s>"],
        [["Ġterrible"], ["Ġgreat"]],
        6,
    ),
    (
        unigram,
        "text-to-text",
        Prompt("{text} It was {label}", FILMS),
        "▁a▁good▁film▁It▁was</s>",
        None,
        0,
    ),
]


@pytest.mark.parametrize(
    ("make", "family", "prompt", "row", "words", "slot"), GOLDEN, ids=lambda x: getattr(x, "__name__", None)
)
def test_golden_tokens(make, family, prompt, row, words, slot):
    made = encoder(make(), prompt, family)
    found = tokens(made, Example("a good film", 1))
    assert found == row or "".join(found) == row
    assert made.encode([Example("a good film", 1)]).batch([0])["slots"][0, 0] == slot
    if words is not None:
        assert word_tokens(made) == words
    else:  # a Unigram's pieces are what its few lines taught it; they begin with the blank and spell the word
        assert ["".join(word) for word in word_tokens(made)] == ["▁terrible", "▁great"]


@pytest.mark.parametrize("make", [byte_level, roberta_like, unigram, wordpiece])
def test_prompt_and_word_are_the_tokens_of_the_whole_text(make):
    """Where the blank is written, in the template or in the word, changes nothing."""
    tokenizer = make()
    for words in (WORDS, {label: " " + word for label, word in WORDS.items()}):
        for text in ("Review: {text}\nSentiment:", "Review: {text}\nSentiment: ", "Review: {text}\nSentiment: {label}"):
            made = encoder(tokenizer, Prompt(text, words), "causal")
            encoded = made.encode([Example("a good film", 1)])
            ids = encoded.batch([0])["input_ids"][0].tolist()
            plain = tokenizer("Review: a good film\nSentiment: positive", add_special_tokens=False)["input_ids"]
            front = ids if len(made.words.words[1]) == 1 else ids[: int(encoded.batch([0])["slots"][0, 0]) + 1]
            front = [i for i in front if i not in tokenizer.all_special_ids]
            assert [*front, *made.words.words[1]] == plain


def test_a_word_at_the_very_beginning_has_no_blank():
    made = encoder(roberta_like(), Prompt("{mask}: {text}", FILMS), "masked")
    assert not any(token.startswith("Ġ") for word in word_tokens(made) for token in word)
    assert tokens(made, Example("film", 0))[:2] == ["<s>", "<mask>"]


def test_two_texts():
    prompt = Prompt("{text} {text_pair} It was {mask}.", FILMS)
    made = encoder(wordpiece(), prompt, "masked")
    assert tokens(made, Example("a film", 0, "a plot")) == [
        "[CLS]", "a", "film", "a", "plot", "it", "was", "[MASK]", ".", "[SEP]",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"\{text_pair\} needs a second text in every row, got none in row 2"):
        made.encode([Example("a", 0, "b"), Example("a", 0)])


LONG = "a good film the plot was very bright"


@pytest.mark.parametrize(
    ("side", "kept"), [("right", ["a", "Ġgood", "Ġfilm"]), ("left", ["very", "Ġbright"])]
)  # what a text begins with depends on what is in front of it
def test_the_text_is_cut_and_the_prompt_is_not(side, kept):
    prompt = Prompt("{text}\nSentiment:", WORDS)
    room = len(kept) + 3
    made = encoder(byte_level(), prompt, "causal", room, truncation=side)
    whole = encoder(byte_level(), prompt, "causal")
    encoded = made.encode([Example(LONG, 1), Example("a film", 0)])
    found = made.tokenizer.decode(encoded.batch([0])["input_ids"][0])
    assert found.endswith("\nSentiment:") and (encoded.cut, encoded.lengths[0]) == (1, room)
    text = found.removesuffix("\nSentiment:").strip()
    assert LONG.startswith(text) if side == "right" else LONG.endswith(text)
    assert len(text.split()) >= len(kept) - 1
    assert (
        encoded.batch([1])["input_ids"].tolist()
        == whole.encode([Example("a film", 0)]).batch([0])["input_ids"].tolist()
    )


@pytest.mark.parametrize("make", [wordpiece, roberta_like])
@pytest.mark.parametrize("before", ["It was ", "It was (", ""])
def test_a_choice_right_behind_a_text_of_the_row(make, before):
    """As ReCoRD's names stand in their sentence: the blank in front of the gap is the row's to say."""
    prompt = Prompt("the plot. {before}{mask}{after}")
    made = encoder(make(), prompt, "masked", labels=())
    row = Example("a", 0, fields={"before": before, "after": " film."}, choices=("good", "very dull"))
    batch = made.encode([row]).batch([0])
    for line, mask, targets, weights, choice in zip(
        *(batch[key].tolist() for key in ("input_ids", "attention_mask", "targets", "weights")),
        row.choices,
        strict=True,
    ):
        word = [token for token, weight in zip(targets, weights, strict=True) if weight]
        seen = [token for token, there in zip(line, mask, strict=True) if there]
        at = seen.index(made.tokenizer.mask_token_id)
        whole = made.tokenizer(prompt.render(row, choice))["input_ids"]
        assert [*seen[:at], *word, *seen[at + len(word) :]] == whole


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_character_of_several_tokens_is_cut_whole(side):
    """The byte tokens of one character share its place in the text; cutting between them once went on for ever."""
    text = "a 日本語 film 語語 é"
    for room in range(5, 30):
        made = encoder(byte_level(), Prompt("{text}\nSentiment:", WORDS), "causal", room, truncation=side)
        encoded = made.encode([Example(text, 1)])
        found = made.tokenizer.decode(encoded.batch([0])["input_ids"][0]).removesuffix("\nSentiment:")
        assert encoded.lengths[0] <= room and "\ufffd" not in found
        assert text.startswith(found) if side == "right" else text.endswith(found)
    made = encoder(byte_level(), Prompt("{text}\nSentiment:", WORDS), "causal", 5, truncation=side)
    with pytest.raises(UserError, match="max_length must leave room for the text, got 5 tokens for row 1"):
        made.encode([Example("語", 1)])


def test_the_longer_of_two_texts_is_cut_first():
    prompt = Prompt("{text} and {text_pair} It was {mask}.", FILMS)
    short, long = "a film", LONG
    made = encoder(wordpiece(), prompt, "masked", 14)
    found = tokens(made, Example(long, 0, short))
    assert len(found) == 14 and found[-7:-1] == ["a", "film", "it", "was", "[MASK]", "."]


@pytest.mark.parametrize("side", ["right", "left"])
def test_nothing_left_to_keep(side):
    made = encoder(byte_level(), Prompt("Review: {text}\nSentiment:", WORDS), "causal", 5, truncation=side)
    with pytest.raises(
        UserError, match="max_length must leave room for the text, got 5 tokens for row 1, whose prompt alone takes 6"
    ):
        made.encode([Example(LONG, 1)])


def test_a_row_without_a_token_in_front_of_its_answer_is_told():
    """A causal model would read its answer behind padding, or behind nothing: scores that hang on the rows beside."""
    words = Prompt("{text}", {"n": " bad", "p": " good"})
    rows = [Example("a film", 0), Example("   ", 1), Example("", 0, choices=("a", "b"), answers=("a",))]
    for tokenizer, prompt, some in (
        (make_tokenizer(False), words, rows[:2]),  # drops white space
        (byte_level(), words, [rows[0], rows[2]]),
        (byte_level(), Prompt("{text}{label}"), [dataclasses.replace(row, choices=("a", "b")) for row in rows[:2]]),
    ):
        made = encoder(tokenizer, prompt, "causal", 64, labels=("n", "p") if prompt.words else ())
        for encode in (made.encode, made.encode_questions):
            with pytest.raises(
                UserError, match=r"^prompt: a row must have a token in front of its answer, got none in"
            ):
                encode(some)
        assert len(made.encode(some[:1])) == 1
    assert len(encoder(wordpiece(), words, "causal", 64, labels=("n", "p")).encode(rows)) == 3  # behind [CLS]


def test_batches_are_padded_at_the_side_that_is_asked():
    rows = [Example("a film", 0), Example(LONG, 1)]
    prompt = Prompt("Review: {text}\nSentiment:", WORDS)
    right = encoder(byte_level(), prompt, "causal").encode(rows).batch([0, 1])
    left = encoder(byte_level(), prompt, "causal", padding="left").encode(rows).batch([0, 1])
    width = right["input_ids"].shape[1]
    short = int(right["attention_mask"][0].sum())
    assert right["slots"].tolist() == [[short - 1], [width - 1]] and left["slots"].tolist() == [
        [width - 1],
        [width - 1],
    ]
    assert (
        left["position_ids"][0].tolist() == [0] * (width - short) + list(range(short)) and "position_ids" not in right
    )
    assert left["input_ids"][0, width - short :].tolist() == right["input_ids"][0, :short].tolist()


def test_the_fingerprint_sees_what_a_batch_depends_on():
    rows, prompt = [Example("a film", 0), Example(LONG, 1)], Prompt("Review: {text}\nSentiment:", WORDS)
    base = encoder(byte_level(), prompt, "causal").encode(rows)
    assert base.fingerprint == encoder(byte_level(), prompt, "causal").encode(rows).fingerprint
    others = [
        encoder(byte_level(), prompt, "causal").encode([rows[0], Example(LONG, 0)]),
        encoder(byte_level(), prompt, "causal").encode([Example("a plot", 0), rows[1]]),
        encoder(byte_level(), prompt, "causal", padding="left").encode(rows),
        encoder(byte_level(), Prompt("Film: {text}\nSentiment:", WORDS), "causal").encode(rows),
        encoder(byte_level(), Prompt(prompt.text, {"negative": " dull", "positive": " bright"}), "causal").encode(rows),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert base.lengths.tolist() == base.batch([0, 1])["attention_mask"].sum(1).tolist()
    assert base.labels.tolist() == [0, 1] and len(base) == 2 and base.lengths.dtype == np.int64


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("Review:", WORDS, r"text must have a slot for a text of the row, such as \{text\}"),
        ("{text} {text}", WORDS, r"text must have the slot \{text\} once"),
        ("{text} {label} {mask}", WORDS, "text must have one slot for the label word"),
        ("{t.x}", WORDS, r"a slot must hold a name such as \{text\}"),
        ("{text", WORDS, "text must be a template such as"),
        ("{text}", {"negative": "no"}, "at least two label words are needed, got 1"),
        ("{text}", {"negative": "no", "positive": " "}, "the label word of 'positive' must not be empty"),
    ],
)
def test_prompts_that_no_model_can_use(text, words, message):
    with pytest.raises(UserError, match=message):
        Prompt(text, words)
    with pytest.raises(UserError, match="unknown score 'mena'; did you mean 'mean'"):
        Prompt("{text}", WORDS, "mena")


@pytest.mark.parametrize(
    ("make", "family", "text", "words", "message"),
    [
        (wordpiece, "masked", "{text} It was", FILMS, r"must have the slot \{mask\} in its text"),
        (byte_level, "causal", "{text} is {label}.", WORDS, "the slot must stand at the end for a causal model"),
        (unigram, "text-to-text", "{label}: {text}", WORDS, "the slot must stand at the end for a text-to-text model"),
        (byte_level, "masked", "{text} {mask}", WORDS, "needs a tokenizer with a mask token"),
        (byte_level, "causal", "{text}", {"negative": "a", "good": "b"},
         "words must name every label, got none for 'positive'"),
        (wordpiece, "masked", "{text} {mask}", {"negative": "Great", "positive": "great"},
         "label words must differ in their tokens, got 'Great' and 'great'"),
        (wordpiece, "masked", "{text} {mask}", {"negative": "§", "positive": "great"},
         "the label word '§' must map to known tokens, got none"),
        (byte_level, "causal", "{text} Sentim{label}", {"negative": "ent", "positive": "ental"},
         "the label word 'ent' must be tokens of its own, got one with"),
    ],
)  # fmt: skip
def test_prompts_that_this_model_cannot_use(make, family, text, words, message):
    with pytest.raises(UserError, match=message):
        encoder(make(), Prompt(text, words), family)


def test_a_row_without_a_field_is_told():
    with pytest.raises(UserError, match="unknown field 'txt'; did you mean 'text'"):
        encoder(byte_level(), Prompt("{txt}", WORDS), "causal").encode([Example("a", 0)])


@pytest.mark.parametrize("name", ["sst2", "rotten-tomatoes"])
def test_the_prompts_of_the_tasks(name):
    row = Example("a good film", 1)
    prompts = TASKS[name].prompts
    causal = encoder(byte_level(), prompts["causal"], "causal")
    assert causal.tokenizer.decode(causal.encode([row]).batch([0])["input_ids"][0]) == "Review: a good film\nSentiment:"
    assert [causal.tokenizer.decode(word) for word in causal.words.words] == [" negative", " positive"]
    masked = encoder(roberta_like(), prompts["masked"], "masked")
    ids = masked.encode([row]).batch([0])["input_ids"][0]
    assert masked.tokenizer.decode(ids) == "<s>a good film It was<mask>.</s>"
    assert [masked.tokenizer.decode(word) for word in masked.words.words] == [" terrible", " great"]
    assert set(prompts) == {"causal", "causal:mezo", "masked", "text-to-text"}
    assert all(set(prompt.words) == set(TASKS[name].labels) for prompt in prompts.values())


def test_a_text_longer_than_the_limit_makes_the_library_warn_of_nothing(tmp_path, monkeypatch):
    from transformers.utils import logging

    model, tokenizer = make_language_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = []
    monkeypatch.setattr(logging.get_logger("transformers.tokenization_utils_base"), "warning", told.append)
    assert len(backbone.load_tokenizer(str(tmp_path), 8)("a good film " * 9)["input_ids"]) > 8
    assert not told
