"""From rows and a prompt to token ids: where label words stand, which tokens they are, and what is cut when it is long.

All that is decided about token boundaries is decided here:

- White space between the template and a label word belongs to the word. `Sentiment: {label}` with "good" and
  `Sentiment:` with " good" are one prompt; a template without a slot joins its word by the word's own leading white
  space, or by one blank where it has none. A choice right behind a text of the row takes that text's.
- A label word's tokens are those that it adds to the template's text in front of it, so that a byte-level tokenizer
  gives its " good", a Unigram one its "▁good" and a WordPiece one its "good". Case is the tokenizer's to fold.
- A row's own choices and answers are words in the same sense, but that white space at their end stays: a line break
  there is how an answer ends.
- Text in front of the slot and text behind it are tokenised apart: no token spans the slot.
- The tokenizer's own special tokens stand around the whole; nothing stands behind the slot of a causal model.

What is too long is cut from the row's texts, never from the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError, unknown
from gradientless.language.encodings import Ragged, encoded, require_known
from gradientless.language.tasks.base import SLOTS, Example, Prompt

SIDES = ("right", "left")
MAX_NEW_TOKENS = 32  # of a generated answer, where nobody says

Ids = tuple[int, ...]
Line = tuple[Ids, Ids, list[int]]  # tokens, decoder tokens, positions read


@dataclass(frozen=True, eq=False)
class LabelWords:
    """The label words as token ids, and where a model's answer to them is read.

    A row of data becomes one row of tokens for each of `fills`: what is written at the slot (nothing, a word without
    its last token, or masks). It is read at `slots` positions; word c is scored by its tokens `token[c]`, each read in
    row `fill[c]` at slot `slot[c]`. tokens: the distinct ids that are read; `token` counts in them.

    words: token ids of each word. single: whether every word is one token, so that scores need no normalisation.
    mean: whether a word's score is the mean over its tokens, not their sum. fill, slot, token, weight: [C, L].
    """

    words: tuple[Ids, ...]
    fills: tuple[Ids, ...]
    slots: int
    tokens: Tensor
    fill: Tensor
    slot: Tensor
    token: Tensor
    weight: Tensor

    @property
    def single(self) -> bool:
        return all(len(word) == 1 for word in self.words)

    @classmethod
    def of(cls, words: Sequence[Ids], fills: Sequence[Ids], fill_of: Sequence[int], mean: bool) -> LabelWords:
        """fill_of: which of `fills` each word is read behind (or at the masks of)."""
        longest = max(map(len, words))
        tokens = sorted({token for word in words for token in word})
        fill = torch.tensor(fill_of).unsqueeze(1).expand(-1, longest).contiguous()
        slot = torch.arange(longest).expand(len(words), -1).contiguous()
        token = torch.zeros(len(words), longest, dtype=torch.int64)
        weight = torch.zeros(len(words), longest)
        for c, word in enumerate(words):
            token[c, : len(word)] = torch.tensor([tokens.index(t) for t in word])
            weight[c, : len(word)] = 1 / len(word) if mean else 1.0
        # Beyond a word's end the slot is repeated: it is read and weighs nothing.
        slot = torch.minimum(slot, torch.tensor([len(word) - 1 for word in words]).unsqueeze(1))
        return cls(tuple(words), tuple(fills), longest, torch.tensor(tokens), fill, slot, token, weight)


class PromptEncoder:
    """Rows to token ids for one model and one prompt.

    family: "causal", "masked" or "text-to-text". labels: label names by class index; the prompt must have a word for
    each. None where every row has choices or answers of its own. max_length: the most tokens of a row, those of the
    label word, choice or answer included. truncation: the side on which a text is cut. padding: the side on which
    shorter rows of a batch are filled. start: what the decoder of a text-to-text model begins with. max_new_tokens: of
    a generated answer. known: the tokens that the model has rows for, where it counts them. words: the label words,
    None without labels.

    Raises `UserError` for a template that does not fit the family, for label words that cannot be told apart and for
    tokens that are not known.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Prompt,
        labels: Sequence[str],
        family: str,
        max_length: int,
        *,
        truncation: str = "right",
        padding: str = "right",
        start: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        known: int | None = None,
    ) -> None:
        for what, side in (("truncation", truncation), ("padding", padding)):
            if side not in SIDES:
                raise unknown("prompt", what, side, SIDES)
        self.tokenizer, self.prompt, self.labels, self.family = tokenizer, prompt, tuple(labels), family
        self.max_length, self.truncation, self.padding = max_length, truncation, padding
        self.start, self.max_new_tokens, self._known = start, max_new_tokens, known
        self._front, self._back, self._joint = _sides(prompt, family)
        if prompt.words and not labels:
            raise UserError("prompt: words must stay away where rows have choices or answers of their own, got some")
        self.words = self._label_words() if labels else None
        self._before, self._after = self._special()

    def encode(self, examples: Sequence[Example]) -> EncodedPrompts | EncodedAnswers:
        """Token ids of `examples` for scores of their classes or choices, cut to fit.

        Raises `UserError` when nothing of a text would be left.
        """
        if self.words is None:
            said = [self._says(example, number, "choice") for number, example in enumerate(examples, 1)]
            return self._with_answers(examples, said, self.prompt.score == "mean")
        fills = max(map(len, self.words.fills))
        fronts, backs, wholes = self._fitted(examples, [fills] * len(examples))
        return EncodedPrompts(self, fronts, backs, [example.label for example in examples], wholes)

    def encode_answers(self, examples: Sequence[Example]) -> EncodedAnswers:
        """Token ids of `examples`, each with its right answer alone: label word, choice or first accepted answer."""
        if self.words is not None:
            return self._with_answers(examples, [(self.words.words[example.label],) for example in examples])
        said = []
        for number, example in enumerate(examples, 1):
            right = example.label if example.choices else 0
            said.append((self._says(example, number, "answer")[right],))
        return self._with_answers(examples, said)

    def encode_questions(self, examples: Sequence[Example]) -> EncodedAnswers:
        """Token ids of `examples` without an answer, which the model is to write."""
        if self.family == "masked":
            raise UserError("prompt: a text can be written by causal and text-to-text models, got a masked one")
        return self._with_answers(examples, [()] * len(examples))

    def behind(self, prompt: Prompt, max_length: int) -> PromptEncoder:
        """As this one, with another prompt (as one with demonstrations in front) and the room that it needs."""
        return PromptEncoder(
            self.tokenizer,
            prompt,
            self.labels,
            self.family,
            max_length,
            truncation=self.truncation,
            padding=self.padding,
            start=self.start,
            max_new_tokens=self.max_new_tokens,
            known=self._known,
        )

    @property
    def around(self) -> tuple[str, str, Ids, Ids]:
        """What stands around the slot of a label word: the templates in front and behind, for `str.format`, and the
        special tokens outside of them."""
        front, back = (
            "".join(
                literal.replace("{", "{{").replace("}", "}}") + (f"{{{field}}}" if field else "")
                for literal, field in side
            )
            for side in (self._front, self._back)
        )
        return front, back, self._before, self._after

    def blank(self) -> Example:
        """A row that says one word wherever a template has a text."""
        word = "a " if self._behind_text else "a"  # the choice behind it is to be a word, too: not "aa"
        fields = dict.fromkeys((*self.prompt.fields, *self.prompt.answer_fields), word)
        return Example("a", 0, "a", fields, () if self.words is not None else ("a",), ("a",))

    def _with_answers(
        self, examples: Sequence[Example], said: Sequence[tuple[Ids, ...]], mean: bool = False
    ) -> EncodedAnswers:
        if self.family == "causal":  # the last token of an answer is read, not seen
            more = [max(len(ids) - 1 for ids in each) if each else self.max_new_tokens for each in said]
        else:
            more = [max(map(len, each), default=0) for each in said]
        behind = self._line_break if self.family == "causal" and not any(said) else ()
        fronts, backs, wholes = self._fitted(examples, more, behind)
        return EncodedAnswers(self, fronts, backs, said, [example.label for example in examples], wholes, mean)

    def _says(self, example: Example, number: int, what: str) -> tuple[Ids, ...]:
        """The tokens of a row's choices, or of its first accepted answer."""
        if not (example.choices or (what == "answer" and example.answers)):
            raise UserError(f"prompt: every row must have {what}s of its own, got none in row {number}")
        said, ahead = self.prompt.says(example), None
        if self._behind_text:
            ahead = _render(self._front, {name: example.value(name) for name in self.prompt.fields})
        if self.family != "text-to-text" or example.choices:
            return tuple(self._added(said, what, ahead))
        # There an answer ends with the end of the text.
        return tuple((*ids, self.tokenizer.eos_token_id) for ids in self._added([text.rstrip() for text in said], what))

    def _fitted(
        self, examples: Sequence[Example], more: Sequence[int], behind: Ids = ()
    ) -> tuple[Ragged, Ragged, np.ndarray]:
        """Tokens in front of the slot and behind it, and how many tokens each row had before it was cut.

        more: tokens at each row's slot. behind: tokens behind those in front."""
        if not examples:
            raise UserError("data: a split must have at least one row, got none")
        for number, example in enumerate(examples, 1):
            if "text_pair" in self.prompt.fields and example.text_pair is None:
                raise UserError(f"prompt: {{text_pair}} needs a second text in every row, got none in row {number}")

        def code(some: range) -> list[Sequence[Sequence[int]]]:
            rows = [{name: examples[i].value(name) for name in self.prompt.fields} for i in some]
            fronts = self._ids([self._ahead(row) for row in rows])
            backs: list[Ids] = self._ids([_render(self._back, row) for row in rows]) if self._back else [()] * len(rows)
            wholes = []
            for at, i in enumerate(some):
                room = self.max_length - len(self._before) - len(self._after)
                if self.family != "text-to-text":  # where the answer stands in the decoder
                    room -= more[i]
                excess = len(fronts[at]) + len(backs[at]) - room
                wholes.append((self.max_length + excess,))
                if excess > 0:
                    fronts[at], backs[at] = self._cut(rows[at], room, i + 1)
            ahead = [(*self._before, *front, *behind) for front in fronts]
            return [ahead, [back + self._after for back in backs], wholes]

        room_of = hashlib.sha256(np.asarray(more, dtype=np.int64).tobytes()).hexdigest()
        settings = (self.family, self.prompt, self.max_length, self.truncation, behind, room_of)
        fronts, backs, wholes = encoded(examples, 3, code, self.tokenizer, settings)
        for column in (fronts, backs):
            require_known(self.tokenizer, self._known, column.values)
        if self.family == "causal" and not fronts.lengths.all():
            number = int(fronts.lengths.argmin()) + 1
            raise UserError(f"prompt: a row must have a token in front of its answer, got none in row {number}")
        return fronts, backs, wholes.values.astype(np.int64)

    @cached_property
    def _line_break(self) -> Ids:
        """A line break in front of the slot, which is not left to the model to write: it would end the answer."""
        gap = self._gap(self.prompt.answer)
        if "\n" not in gap:
            return ()
        front, whole = self._ids([self._context, self._context + gap])
        return whole[len(front) :]

    @cached_property
    def stops(self) -> Tensor:
        """The tokens with which a written answer ends: those that hold a line break, and the tokenizer's end."""
        names = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        spellings = ("\n", "Ċ", "<0x0A>")  # plain, byte-level, and as a byte that has no piece
        likely = [i for i, name in enumerate(names) if name is not None and any(each in name for each in spellings)]
        found = {i for i in likely if "\n" in self.tokenizer.decode([i])} | {self.tokenizer.eos_token_id}
        return torch.tensor(sorted(i for i in found if i is not None), dtype=torch.int64)

    def texts(self, ids: Tensor) -> list[str]:
        """What was written, up to the first line break and without white space around it. ids: [B, N]."""
        ends, found = set(self.stops.tolist()), []
        for row in ids.tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            found.append(text.partition("\n")[0].strip())
        return found

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        # Not verbose: the tokenizer would warn of texts that are too long, which are cut afterwards.
        coded = self.tokenizer(list(texts), add_special_tokens=False)
        return [tuple(ids) for ids in coded["input_ids"]]

    def _special(self) -> tuple[Ids, Ids]:
        """The special tokens that stand before and behind a text."""
        plain = tuple(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = tuple(self.tokenizer("a")["input_ids"])
        for at in range(len(whole) - len(plain) + 1):
            if whole[at : at + len(plain)] == plain:
                return whole[:at], () if self.family == "causal" else whole[at + len(plain) :]
        raise UserError("prompt: the tokenizer must put its special tokens around a text, got something else")

    def _label_words(self) -> LabelWords:
        absent = [label for label in self.labels if label not in self.prompt.words]
        if absent:
            known = ", ".join(self.prompt.words)
            raise UserError(f"prompt: words must name every label, got none for '{absent[0]}' (known: {known})")
        words = self._added([self.prompt.words[label].rstrip() for label in self.labels], "label word")
        for i, word in enumerate(words):
            if word in words[:i]:
                first, second = (self.prompt.words[self.labels[j]] for j in (words.index(word), i))
                raise UserError(f"prompt: label words must differ in their tokens, got {first!r} and {second!r}")
        mean = self.prompt.score == "mean"
        if self.family == "masked":
            mask = self.tokenizer.mask_token_id
            if mask is None:
                raise UserError("prompt: a masked prompt needs a tokenizer with a mask token, got none")
            require_known(self.tokenizer, self._known, [mask])
            lengths = sorted({len(word) for word in words})
            return LabelWords.of(words, [(mask,) * n for n in lengths], [lengths.index(len(w)) for w in words], mean)
        # A word is read behind its own beginning; words that share one share the row.
        beginnings = {word[:-1] for word in words}
        fills = sorted(b for b in beginnings if not any(o != b and o[: len(b)] == b for o in beginnings))
        return LabelWords.of(
            words, fills, [next(i for i, f in enumerate(fills) if f[: len(w) - 1] == w[:-1]) for w in words], mean
        )

    @property
    def _behind_text(self) -> bool:
        """Whether choices stand right behind a text of the row, whose white space then is theirs."""
        alone = self._front[-1][0] == "" == self._joint
        return alone and self.family != "text-to-text" and not self.prompt.words

    def _ahead(self, texts: Mapping[str, str]) -> str:
        """What a row says in front of the slot, without the white space that belongs to the word."""
        text = _render(self._front, texts)
        return text.rstrip() if self._behind_text else text

    @property
    def _context(self) -> str:
        """The template's text in front of the slot; a row's text, where there is none of its own."""
        if self.family == "text-to-text":
            return ""
        return self._front[-1][0] or ("a" if len(self._front) > 1 else "")

    def _gap(self, said: str, ahead: str | None = None) -> str:
        """The white space between the template (or a row's text `ahead` of the slot) and what is said at the slot."""
        if self.family == "text-to-text":
            return ""
        if ahead is not None:
            return ahead[len(ahead.rstrip()) :]
        own = said[: len(said) - len(said.lstrip())]
        return own or (self._joint if self._joint is not None else " ")

    def _added(self, said: Sequence[str], what: str, ahead: str | None = None) -> list[Ids]:
        """The tokens that each of `said` adds to the text in front of it, which is the row's own where `ahead` is."""
        context = self._context if ahead is None else (ahead.split() or [""])[-1]
        front, *wholes = self._ids([context, *(context + self._gap(text, ahead) + text.lstrip() for text in said)])
        found = []
        for text, whole in zip(said, wholes, strict=True):
            ids = whole[len(front) :]
            if whole[: len(front)] != front:
                raise UserError(
                    f"prompt: the {what} {text!r} must be tokens of its own, got one with {context[-20:]!r}"
                )
            if not ids or (what == "label word" and self.tokenizer.unk_token_id in ids):
                raise UserError(f"prompt: the {what} {text!r} must map to known tokens, got none")
            require_known(self.tokenizer, self._known, ids)
            found.append(ids)
        return found

    def _cut(self, row: Mapping[str, str], room: int, number: int) -> tuple[Ids, Ids]:
        """Front and back of a row whose texts are cut until they fit into `room` tokens."""
        texts = dict(row)
        while True:
            front, back = self._ids([self._ahead(texts), _render(self._back, texts)])
            excess = len(front) + len(back) - room
            if excess <= 0:
                return front, back
            ends = {field: self._ends(text) for field, text in texts.items()}
            for field, keep in _shares({field: len(kept) for field, kept in ends.items()}, excess).items():
                if keep == len(ends[field]):
                    continue
                texts[field] = _shortened(texts[field], ends[field], keep, self.truncation)
                if not texts[field]:
                    bare = dict.fromkeys(texts, "")
                    alone = sum(map(len, self._ids([self._ahead(bare), _render(self._back, bare)])))
                    raise UserError(
                        f"prompt: max_length must leave room for the text, got {self.max_length} tokens for row "
                        f"{number}, whose prompt alone takes {self.max_length - room + alone}"
                    )

    def _ends(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `text` begins and ends in it; of a tokenizer that does not say, those of each character
        by itself (its bytes, or more than it has in the text)."""
        if not self.tokenizer.is_fast:
            distinct = sorted(set(text))
            counts = {each: max(1, len(ids)) for each, ids in zip(distinct, self._ids(distinct), strict=True)}
            return [(i, i + 1) for i, each in enumerate(text) for _ in range(counts[each])]
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(begin, end) for begin, end in coded["offset_mapping"] if end > begin]

    def rows(self, front: Ids, back: Ids) -> list[Line]:
        """One row of data as rows of tokens: one for each of the fills."""
        assert self.words is not None
        return [self._line(front, back, fill, len(fill) + 1) for fill in self.words.fills]

    def line(self, front: Ids, back: Ids, answer: Ids) -> Line:
        """One row of data with one answer, read at as many positions as it has tokens (none to read: a question)."""
        fill = (self.tokenizer.mask_token_id,) * len(answer) if self.family == "masked" else answer[:-1]
        return self._line(front, back, fill, len(answer))

    def _line(self, front: Ids, back: Ids, fill: Ids, reads: int) -> Line:
        """reads: positions that are read, where they are not those of masks."""
        if self.family == "text-to-text":
            assert self.start is not None
            return front + back, (self.start, *fill), list(range(reads))
        if self.family == "masked":
            return front + fill + back, (), list(range(len(front), len(front) + len(fill)))
        return front + fill, (), list(range(len(front) - 1, len(front) - 1 + reads))

    def batch(self, rows: Sequence[Line], slots: int, padding: str | None = None) -> dict[str, np.ndarray]:
        """Rows of tokens as arrays; see `EncodedPrompts.batch`. slots: K. padding: another side than the encoder's."""
        # What a text-to-text model is asked it reads both ways: padding in front of it would only move positions.
        padding = "right" if self.family == "text-to-text" else padding or self.padding
        width = max(len(ids) for ids, _, _ in rows)
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = np.full((len(rows), width), pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        read = np.zeros((len(rows), slots), dtype=np.int64)
        for at, (tokens, _, places) in enumerate(rows):
            begin = width - len(tokens) if padding == "left" else 0
            ids[at, begin : begin + len(tokens)] = tokens
            mask[at, begin : begin + len(tokens)] = 1
            if places:
                read[at] = [begin + p for p in (*places, *[places[-1]] * (slots - len(places)))]
        batch = {"input_ids": ids, "attention_mask": mask} | ({"slots": read} if slots else {})
        if padding == "left":
            batch["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        if self.family == "text-to-text":
            decoder = np.full((len(rows), max(len(tokens) for _, tokens, _ in rows)), pad, dtype=np.int64)
            for at, (_, tokens, _) in enumerate(rows):
                decoder[at, : len(tokens)] = tokens
            batch["decoder_input_ids"] = decoder
        return batch

    def digest(self, fronts: Ragged, backs: Ragged, labels: Tensor, *more: object) -> str:
        """sha256 of all that batches depend on, in hex. more: what there is beside prompts and labels."""
        words = None if self.words is None else (self.words.words, self.words.fills)
        stated = (self.max_length, len(labels), self.family, words, self.padding, *more)
        digest = hashlib.sha256("\0".join(map(str, stated)).encode())
        for part in (fronts, backs):
            digest.update(part.lengths.tobytes())
            digest.update(np.ascontiguousarray(part.values).data)
        digest.update(labels.numpy().tobytes())
        return digest.hexdigest()


class EncodedPrompts:
    """The prompts of one split as token ids: the interface of `data.Encoded`.

    labels: int64 [N]. lengths: int64 [N], tokens of each row (the longest of its fills). wholes: int64 [N], before its
    text was cut. cut: rows whose text was. fingerprint: sha256 of all that `batch` depends on, in hex.
    """

    def __init__(
        self, encoder: PromptEncoder, fronts: Ragged, backs: Ragged, labels: list[int], wholes: np.ndarray
    ) -> None:
        self._encoder, self.max_length = encoder, encoder.max_length
        self.wholes, self.cut = wholes, int((wholes > encoder.max_length).sum())
        self._fronts, self._backs = fronts, backs
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)
        assert encoder.words is not None
        self._slots = encoder.words.slots
        more = 0 if encoder.family == "text-to-text" else max(map(len, encoder.words.fills))
        self.lengths = fronts.lengths + backs.lengths + more
        self.fingerprint = encoder.digest(self._fronts, self._backs, self.labels)

    def __len__(self) -> int:
        return len(self._fronts)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Rows `indices` ([B]), each as one row of tokens for each fill (R = B·fills), padded to the longest.

        input_ids, attention_mask: int64 [R, T]. slots: int64 [R, K], the positions to read (in the decoder's ids for a
        text-to-text model; the last is repeated where a row has fewer). position_ids [R, T] where padding is at the
        left, decoder_input_ids [R, D] for a text-to-text model.
        """
        rows: list[Line] = []
        for i in indices:
            rows += self._encoder.rows(tuple(self._fronts[int(i)].tolist()), tuple(self._backs[int(i)].tolist()))
        return {name: torch.from_numpy(values) for name, values in self._encoder.batch(rows, self._slots).items()}


class EncodedAnswers:
    """Prompts of one split whose rows have choices or an answer of their own, or none yet: also `data.Encoded`'s.

    labels: int64 [N], the right choice. lengths: int64 [N], tokens of each row with its longest answer. tokens: int64
    [N], those of the first answer. lines: int64 [N], rows of tokens that each row of data becomes. wholes, cut,
    fingerprint: as of `EncodedPrompts`.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        fronts: Ragged,
        backs: Ragged,
        answers: Sequence[tuple[Ids, ...]],
        labels: list[int],
        wholes: np.ndarray,
        mean: bool,
    ) -> None:
        self._encoder, self._answers, self._mean = encoder, answers, mean
        self.wholes, self.cut = wholes, int((wholes > encoder.max_length).sum())
        self.max_length = encoder.max_length
        self._fronts, self._backs = fronts, backs
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.tokens = torch.tensor([len(each[0]) if each else 0 for each in answers], dtype=torch.int64)
        self.lines = np.array([max(1, len(each)) for each in answers], dtype=np.int64)
        longest = np.array([max(map(len, each), default=0) for each in answers], dtype=np.int64)
        self.lengths = fronts.lengths + backs.lengths + longest
        self.fingerprint = encoder.digest(self._fronts, self._backs, self.labels, answers, mean)

    def __len__(self) -> int:
        return len(self._fronts)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Rows `indices` ([B]), each as one row of tokens for each answer, in all R, padded to the longest.

        As of `EncodedPrompts`, with slots [R, K] where an answer's tokens are read; targets: int64 [R, K], its tokens;
        weights: float32 [R, K], 1 for each (or their share of the mean), 0 beyond the last. chosen: bool [B, C], which
        of its columns (those of the row with the most choices in the split) stand for the rows of tokens, in their
        order. Questions without an answer have none of these, and are padded at the left for a causal model.
        """
        encoder, rows, answers = self._encoder, [], []
        for i in indices:
            front, back = tuple(self._fronts[int(i)].tolist()), tuple(self._backs[int(i)].tolist())
            for answer in self._answers[int(i)] or ((),):
                rows.append(encoder.line(front, back, answer))
                answers.append(answer)
        if not any(answers):
            made = encoder.batch(rows, 0, "left" if encoder.family == "causal" else None)
            return {name: torch.from_numpy(values) for name, values in made.items()}
        longest = max(map(len, answers))
        targets = np.zeros((len(rows), longest), dtype=np.int64)
        weights = np.zeros((len(rows), longest), dtype=np.float32)
        for at, answer in enumerate(answers):
            targets[at, : len(answer)] = answer
            weights[at, : len(answer)] = 1 / len(answer) if self._mean else 1.0
        chosen = np.arange(self.lines.max()) < self.lines[np.asarray(indices, dtype=np.int64)][:, None]
        made = encoder.batch(rows, longest) | {"targets": targets, "weights": weights, "chosen": chosen}
        return {name: torch.from_numpy(values) for name, values in made.items()}


Pieces = tuple[tuple[str, "str | None"], ...]


def _sides(prompt: Prompt, family: str) -> tuple[Pieces, Pieces, str | None]:
    """The template in front of the slot and behind it, and the white space in front of the slot.

    The front ends without white space: that belongs to the label word. None stands for a template without a slot.
    """
    at = next((i for i, (_, field) in enumerate(prompt.pieces) if field in SLOTS), None)
    if at is None:
        if family == "masked":
            raise UserError(f"prompt: a masked prompt must have the slot {{mask}} in its text, got {prompt.text!r}")
        front: Pieces = prompt.pieces
        literal = front[-1][0] if front[-1][1] is None else ""
        rest = front[:-1] if front[-1][1] is None else front
        stripped = literal.rstrip()
        return (*rest, (stripped, None)), (), None if stripped == literal else literal[len(stripped) :]
    literal = prompt.pieces[at][0]
    front = (*prompt.pieces[:at], (literal.rstrip(), None))
    back = prompt.pieces[at + 1 :]
    if family != "masked" and "".join(text for text, _ in back).strip() + "".join(f or "" for _, f in back):
        raise UserError(f"prompt: the slot must stand at the end for a {family} model, got {prompt.text!r}")
    return front, back if family == "masked" else (), literal[len(literal.rstrip()) :]


def _render(pieces: Pieces, row: Mapping[str, str]) -> str:
    return "".join(literal + (row[field] if field else "") for literal, field in pieces)


def _shortened(text: str, ends: Sequence[tuple[int, int]], keep: int, side: str) -> str:
    """`text` with `keep` of its tokens at most, always shorter than it was. ends: of `PromptEncoder._ends`.

    Tokens may share a character (the bytes of one beyond ASCII): it goes with the first of them that goes.
    """
    if keep < 1:
        return ""
    if side == "right":
        return text[: min(ends[keep - 1][1], ends[keep][0])]
    return text[max(ends[-keep][0], ends[-keep - 1][1]) :]


def _shares(lengths: Mapping[str, int], excess: int) -> dict[str, int]:
    """How many tokens each text keeps when `excess` go: the longest is cut first, down to the next one's length."""
    budget, kept = sum(lengths.values()) - excess, {}
    for left, field in zip(range(len(lengths), 0, -1), sorted(lengths, key=lambda field: lengths[field]), strict=True):
        kept[field] = min(lengths[field], budget // left)
        budget -= kept[field]
    return kept


SEPARATOR = "\n\n"


def with_demonstrations(prompt: Prompt, family: str, examples: Sequence[Example], labels: Sequence[str]) -> Prompt:
    """`prompt` behind answered rows: in-context learning. Two line feeds stand between them.

    A row is said as the family's encoder would read it, its label word (or right choice, or answer) at the slot behind
    the white space that belongs to the word. labels: label names by class index.
    """
    front, back, joint = _sides(prompt, family)
    said = []
    for example in examples:
        row = {name: example.value(name) for name in prompt.fields}
        right = example.label if example.choices else 0
        word = prompt.words[labels[example.label]] if labels else prompt.says(example)[right]
        gap = word[: len(word) - len(word.lstrip())] or (" " if joint is None else joint)
        said.append(_render(front, row) + gap + word.strip() + _render(back, row) + SEPARATOR)
    literal = "".join(said).replace("{", "{{").replace("}", "}}")
    return replace(prompt, text=literal + prompt.text)
