"""What must hold of every architecture on every surface, each shown beside plain transformers or by plain arithmetic.

A check returns nothing where all is well. It raises `Wrong` for a result that is not the right one, and `Limit` where
plain transformers itself, tried here in the same way, has the same trouble. Of an `Outcome`, `word` is one of `WORDS`.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from tiny_architectures import VOCABULARY, Architecture
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language.surfaces import SURFACES, load
from gradientless.language.tasks import Example, Prompt
from gradientless.run.objective import Objective
from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import Injection
from gradientless.search.evaluators.walk import Walk
from gradientless.search.noise import Noise
from gradientless.search.points import ALL, ORIGIN, Direction, combined, point
from gradientless.search.space import Space

OK, ALONE, REFUSED, LIMIT, FAULT = WORDS = ("ok", "one at a time", "refused", "the library's limit", "FAULT")
LABELS = ("negative", "positive")
TEMPLATES = {
    "masked": ("It was", "{text} It was {mask}."),
    "causal": ("Sentiment:", "Review: {text}\nSentiment:"),
    "text-to-text": ("", "Review: {text}\nSentiment:"),
}
MAX_LENGTH = 56
VIRTUAL = 4  # tokens of the surfaces prompt and prefix
TRIED: dict[str, tuple[str, dict[str, Any]]] = {  # the table's columns: surface and its options
    "head": ("head", {"readout": "head"}),
    "full": ("full", {}),
    "full, head": ("full", {"readout": "head"}),
    "lora": ("lora", {"rank": 2}),
    "prompt": ("prompt", {"tokens": VIRTUAL}),
    "prefix": ("prefix", {"tokens": VIRTUAL}),
    "bias": ("bias", {}),
    "lst": ("lst", {"reduction": 2, "init": "magnitude"}),
}


class Wrong(Exception):
    """A result is not the right one."""


class Limit(Exception):
    """Plain transformers has the same trouble."""


class Outcome(NamedTuple):
    word: str
    line: str = ""


def text_of(words: int, number: int = 0) -> str:
    return " ".join(VOCABULARY[(number + 3 * i + i * i) % len(VOCABULARY)] for i in range(words))


MIXED = [Example(text_of(words, words), words % 2) for words in (4, 1, 12, 7, 2)]


def apart(found: Tensor, wanted: Tensor) -> float:
    """By how much two tensors differ, in parts of what rounding explains: above 1 they are not the same."""
    if found.shape != wanted.shape:
        raise Wrong(f"shape {list(found.shape)} for {list(wanted.shape)}")
    if not bool(torch.isfinite(wanted).all()):
        raise Wrong("the check is blind: the library's own scores are not finite")
    gap = (found.float() - wanted.float()).abs().max()
    return float(torch.nan_to_num(gap, nan=torch.inf) / (2e-4 * (1 + wanted.abs().max())))


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    if apart(found, wanted) > 1:
        raise Wrong(f"{what} differ by {float((found - wanted).abs().max()):.2g}")


@dataclass
class Subject:
    """One architecture, its models in a temporary folder, and what the checks share."""

    architecture: Architecture
    folder: Path
    saved: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return "masked" if self.architecture.kind == "without words" else self.architecture.kind

    def model(self, **rates: float) -> str:
        """A folder with the model, `rates` in its configuration."""
        key = json.dumps(rates, sort_keys=True)
        if key not in self.saved:
            self.saved[key] = self.architecture.save(self.folder / f"model{len(self.saved)}", **rates)
        return self.saved[key]

    @cached_property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.model())

    @cached_property
    def plain(self) -> Any:
        return getattr(transformers, self.architecture.auto).from_pretrained(self.model()).eval()

    @property
    def start(self) -> list[int]:
        """What the decoder of a text-to-text model begins with."""
        return [int(self.plain.config.decoder_start_token_id)] if self.family == "text-to-text" else []

    # What the library is given, made by hand ----------------------------------------------------------------------

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        whole, (alone,) = self.tokenizer("a")["input_ids"], [self.ids("a")]
        at = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        return whole[:at], whole[at + len(alone) :]

    def said(self, word: str) -> list[int]:
        """The tokens that a label word adds to the template."""
        context, _ = TEMPLATES[self.family]
        before = self.ids(context) if context else []
        return self.ids(f"{context} {word}" if context else word)[len(before) :]

    @cached_property
    def words(self) -> dict[str, tuple[str, str]]:
        """Label words of one token; of two each, which no row is padded for; and one of several beside one of fewer."""
        candidates = ("good", "great", "film", "bad", "terrible", "a", "b", "was", "very", "bright", "dull")
        short = [word for word in candidates if len(self.said(word)) == 1 and self.tokenizer.unk_token_id not in
                 self.said(word)]  # fmt: skip
        long = "very good" if len(self.said("very good")) < 5 else "good"
        found = {"one token": (short[0], short[1]), "several tokens": (long, short[1])}
        pair = [f"very {word}" for word in ("good", "dull")]
        return found | ({"two tokens": (pair[0], pair[1])} if all(len(self.said(word)) == 2 for word in pair) else {})

    def prompt(self, tokens: str = "one token") -> Prompt:
        _, template = TEMPLATES[self.family]
        return Prompt(template, dict(zip(LABELS, self.words[tokens], strict=True)))

    def surface(self, tried: str, model: str | None = None, **options: Any) -> Any:
        name, own = TRIED[tried]
        longest = 200 if "bytes" in self.architecture.name else MAX_LENGTH
        options = {"max_length": longest, **own, **options}
        if options.get("readout") != "head":
            options = {"readout": "prompt", "prompt": self.prompt(), **options}
        if name == "head":
            del options["readout"]
        labels = options.pop("labels", LABELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SURFACES[name].create(model or self.model(), labels, **options)

    def moved(self, tried: str) -> Any:
        """The surface away from its base, so that all that is tuned matters. Shared: checks leave it as it was."""
        if tried not in self.made:
            self.made[tried] = self.surface(tried)
            nudge(self.made[tried])
        return self.made[tried]


def nudge(surface: Any, seed: int = 1) -> None:
    """Move all that is tuned a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def scores_of(surface: Any, examples: Sequence[Example] = MIXED) -> Tensor:
    """All rows in one batch."""
    return surface.logits(surface.prepare(surface.encode(examples).batch(range(len(examples)))))


def one_by_one(surface: Any, examples: Sequence[Example] = MIXED) -> Tensor:
    return torch.cat([scores_of(surface, [example]) for example in examples])


def takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def logits_of(model: Any, ids: Sequence[int], decoder: Sequence[int] = ()) -> Tensor:
    """The library's own logits [T, V] of one row without padding, nothing kept."""
    row = torch.tensor([list(ids)])
    more = {"decoder_input_ids": torch.tensor([list(decoder)])} if len(decoder) else {}
    if takes(model, "use_cache"):
        more["use_cache"] = False
    out = model(input_ids=row, attention_mask=torch.ones_like(row), **more)
    return (out.logits if hasattr(out, "logits") else out[0])[0].float()


def likelihoods(subject: Subject, model: Any, front: str, back: str, word: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(logits, log-probabilities) [len(word)] of the tokens of `word` between two texts, by the library alone."""
    before, after = subject.around
    ahead, behind, tokens = [*before, *subject.ids(front)], subject.ids(back) if back else [], list(word)
    if subject.family == "masked":
        row = [*ahead, *[subject.tokenizer.mask_token_id] * len(tokens), *behind, *after]
        logits = logits_of(model, row)[len(ahead) : len(ahead) + len(tokens)]
    elif subject.family == "causal":
        logits = logits_of(model, [*ahead, *tokens[:-1]])[len(ahead) - 1 :]
    else:
        logits = logits_of(model, [*ahead, *after], [*subject.start, *tokens[:-1]])
    read = torch.arange(len(tokens)), torch.tensor(tokens)
    return logits[read], logits.log_softmax(-1)[read]


def plain_scores(subject: Subject, model: Any, tokens: str, examples: Sequence[Example] = MIXED) -> Tensor:
    _, template = TEMPLATES[subject.family]
    front, _, back = template.partition(" {mask}")
    rows = []
    for example in examples:
        found = [
            likelihoods(subject, model, front.format(text=example.text), back, subject.said(word))
            for word in subject.words[tokens]
        ]
        rows.append(torch.stack([logits.sum() if tokens == "one token" else logs.sum() for logits, logs in found]))
    return torch.stack(rows)


def reads_both_ways(subject: Subject) -> bool:
    """Whether what the library's model says at a token depends on those behind it."""
    ids = subject.ids(text_of(8))
    others = [*ids[:4], *subject.ids(text_of(8, 5))[4:]]
    ours, theirs = (logits_of(subject.plain, row) for row in (ids, others))
    return apart(ours[:4], theirs[:4]) > 1


def counts_tokens(subject: Subject) -> bool:
    """Whether what the library's model says at a token depends on how many there are behind it, whichever they are."""
    ids = subject.ids(text_of(8))
    if subject.family == "text-to-text":
        long, short = (logits_of(subject.plain, ids, [*subject.start, *ids[:n]]) for n in (7, 3))
    else:
        long, short = (logits_of(subject.plain, ids[:n]) for n in (8, 4))
    return subject.family != "masked" and apart(long[:4], short) > 1


def deaf(subject: Subject) -> bool:
    """Whether what the library's model says at a token depends on no other (as where it has no kernel but a GPU's)."""
    ids = subject.ids(text_of(6))
    others = [*ids[:2], *subject.ids(text_of(8, 5))[2:4], *ids[4:]]
    found, wanted = (logits_of(subject.plain, row, subject.start)[-1] for row in (others, ids))
    return apart(found, wanted) < 1


# The checks ----------------------------------------------------------------------------------------------------------


def scores(subject: Subject, tried: str) -> None:
    """Scores are what plain transformers computes; rows differ."""
    if tried in ("head", "full, head"):
        surface = subject.surface(tried)
        found, wanted = scores_of(surface, MIXED[:1]), plain_head(subject, surface, MIXED[:1])
        same(found, wanted, "scores under the head and those of plain transformers' states")
        every = one_by_one(surface)
        same(every, plain_head(subject, surface), "scores under the head and those of plain transformers' states")
        if apart(every, every[:1].expand_as(every)) < 1:
            raise Wrong("texts that differ have the same features")
        return
    if subject.family == "causal" and reads_both_ways(subject):
        scores_of(subject.surface(tried))
        raise Wrong("a model that reads both ways is scored as a causal one")
    for tokens in subject.words:
        surface, model = speaking(subject, tried, prompt=subject.prompt(tokens))
        wanted = plain_scores(subject, model, tokens)
        if apart(wanted, wanted[:1].expand_as(wanted)) < 20:
            raise Wrong("the check is blind: all rows have the same scores")
        found, what = one_by_one(surface), f"scores of words of {tokens}"
        if apart(found, wanted) > 1 and tokens == "several tokens" and padding_moves(subject, surface, tried):
            raise Limit(f"{what} differ, whose rows are padded: plain transformers' own logits then do")
        if apart(found, wanted) > 1 and tokens != "one token" and counts_tokens(subject):
            raise Limit(f"{what} differ: plain transformers' own depend on how many tokens stand behind")
        same(found, wanted, what)


def plain_head(subject: Subject, surface: Any, examples: Sequence[Example] = MIXED) -> Tensor:
    """The head's scores on the library's last states, each row alone; of a library head its classifier's."""
    head = getattr(surface, "reading", None).head if hasattr(surface, "reading") else surface
    before, after = subject.around
    rows = [[*before, *subject.ids(example.text), *after] for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        surface.save(Path(folder))
        if head.kind == "library":
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
            return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
        body = transformers.AutoModel.from_pretrained(f"{folder}/body").eval()
        tensors = load_file(f"{folder}/head.safetensors")
    found = []
    for row in rows:
        more = {}
        if body.config.is_encoder_decoder:
            more = {"decoder_input_ids": torch.tensor([[body.config.decoder_start_token_id]])}
        ids = torch.tensor([row])
        states = body(input_ids=ids, attention_mask=torch.ones_like(ids), **more).last_hidden_state[0]
        pooled = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[head.pooling]
        if "dense.weight" in tensors:
            pooled = torch.relu(pooled @ tensors["dense.weight"].T + tensors["dense.bias"])
        found.append(pooled @ tensors["out.weight"].T + tensors["out.bias"])
    return torch.stack(found)


def padding(subject: Subject, tried: str) -> None:
    """Rows of a padded batch have the scores that they have alone."""
    sides = ("right", "left") if tried == "full" else ("right",)
    for side in sides:
        surface = subject.moved(tried) if side == "right" else subject.surface(tried, padding=side)
        together, alone = scores_of(surface), one_by_one(surface)
        if apart(together, alone) <= 1:
            continue
        gap = f"padded at the {side}, scores differ by {float((together - alone).abs().max()):.2g}"
        if tried == "full":  # then they are at least what the library gives for the padded batch
            base = subject.surface(tried, padding=side)
            same(scores_of(base), plain_padded(subject, base), f"padded at the {side}, scores and plain transformers'")
        if padding_moves(subject, surface, tried):
            raise Limit(f"{gap}, as plain transformers' own do")
        raise Wrong(gap)


def plain_padded(subject: Subject, surface: Any) -> Tensor:
    """The library's own logits of the words of one token, of a padded batch."""
    batch = surface.encode(MIXED).batch(range(len(MIXED)))
    slots = batch.pop("slots")[:, 0]
    given = {name: x for name, x in batch.items() if name != "position_ids" or takes(subject.plain, name)}
    words = [subject.said(word)[0] for word in subject.words["one token"]]
    return subject.plain(**given).logits[torch.arange(len(slots)), slots][:, words].float()


def padding_moves(
    subject: Subject, surface: Any, tried: str, examples: Sequence[Example] = MIXED, encoded: Any = None
) -> bool:
    """Whether the library's own states or logits of a row change when the row is padded, given a mask."""
    batch = (encoded or surface.encode(examples)).batch(range(len(examples)))
    names = [n for n in ("input_ids", "attention_mask", "position_ids", "decoder_input_ids") if n in batch]
    model = subject.plain
    if tried in ("head", "full, head"):
        model = transformers.AutoModel.from_pretrained(subject.model()).eval()
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
            names = [*dict.fromkeys((*names, "decoder_input_ids"))]
    given = {name: batch[name] for name in names if name != "position_ids" or takes(model, name)}

    def said(inputs: dict[str, Tensor]) -> Tensor:
        out = model(**inputs)
        return (out.logits if hasattr(out, "logits") else out[0]).float()

    together = said(given)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        cut = {n: x[row : row + 1] if n == "decoder_input_ids" else x[row : row + 1, mask] for n, x in given.items()}
        alone = said(cut)[0]
        mine = together[row] if "decoder_input_ids" in given else together[row][mask[-together.shape[1] :]]
        if apart(mine, alone) > 1:
            return True
    return False


# Points --------------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A batch of so many rows and tokens, and the points to be measured on it."""

    objective: Objective
    points: list[Any]


def probes(surface: Any, eps: float, virtual: int) -> list[Probe]:
    """Batches of several shapes: rows of mixed lengths, one row, and as many tokens (the `virtual` ones with them) as
    there are points times rows."""
    rows = [Example(text_of(words, number), number % 2) for words in range(1, 25) for number in range(8)]
    encoded = surface.encode(rows)
    one, other = Direction(0, 0, ALL), Direction(0, 1, ALL)
    pair = [point(eps, one), point(-eps, one)]
    several = [ORIGIN, point(eps, other), combined(point(eps, one), point(-eps / 2, other)), point(-eps, one)]

    def probe(chosen: Sequence[int], points: list[Any]) -> Probe:
        prepared = surface.prepare(encoded.batch(chosen))
        return Probe(Objective(surface, [(prepared, encoded.labels[list(chosen)])], Noise(0, "gaussian")), points)

    found = [probe([3, 20, 90, 41, 66, 7, 55], pair), probe([50], pair)]
    for total in (16, 24, 32):
        alike = [int(i) for i in (encoded.lengths == total - virtual).nonzero()[0]]
        if len(alike) >= 8:  # not so where words are many tokens
            found.append(probe(alike[: total // 4], several))
            found.append(probe(alike[: total // 2], pair) if total == 16 else probe(alike[:8], several[1:]))
            break
    return found


def at_copies(surface: Any, space: Space, probe: Probe) -> list[float]:
    """The losses with every point's weights in place, one after the other."""
    kept, found = {name: tensor.detach().clone() for name, tensor in space.tensors.items()}, []
    for changes in space.deltas(probe.points):
        for change in changes:
            change.add_to(space.tensors[change.name])
        found.append(float(probe.objective()))
        for name, tensor in space.tensors.items():
            tensor.copy_(kept[name])
    return found


def losses_agree(
    subject: Subject, tried: str, rank: int | None, ways: int, measure: Callable[[Space, Probe, int], list[float]]
) -> None:
    """ways: in how many ways each batch is measured."""
    surface = subject.moved(tried)
    tensors = surface.trainable()
    for eps in (0.05, 0.5, 2.0):
        batches = probes(surface, eps, TRIED[tried][1].get("tokens", 0))
        space = Space(tensors, Noise(0, "gaussian"), rank=rank)
        wanted = [at_copies(surface, space, probe) for probe in batches]
        spread = max(max(each) - min(each) for each in wanted)
        if spread > 2e-3:
            break
    else:
        raise Wrong("what is tuned has no effect: losses at all points are the same")
    for probe, each in zip(batches, wanted, strict=True):
        for way in range(ways):
            found = measure(space, probe, way)
            gap = max(abs(a - b) / (1 + abs(b)) for a, b in zip(found, each, strict=True))
            if not gap < 1e-4 * max(1, spread):  # not a number is no agreement
                rows = len(probe.objective.parts[0][1])
                raise Wrong(f"losses of {len(probe.points)} points on {rows} rows differ by {gap:.2g} of {spread:.2g}")


def walk(subject: Subject, tried: str) -> None:
    """Losses at points by walking are those with the weights in place."""

    def measure(space: Space, probe: Probe, way: int) -> list[float]:
        kept = {name: tensor.detach().clone() for name, tensor in space.tensors.items()}
        found = Walk(Space(space.tensors, Noise(0, "gaussian")), probe.objective).losses(probe.points)
        for name, tensor in space.tensors.items():
            tensor.copy_(kept[name])
        return found

    losses_agree(subject, tried, None, 1, measure)


def inject(subject: Subject, tried: str) -> Outcome | None:
    """Losses at points by injection are those with the weights in place."""
    made: list[Injection] = []

    def measure(space: Space, probe: Probe, way: int) -> list[float]:
        if way == 1 or not made:  # the batch is the first of a run; else one that follows others
            made.append(Injection(probe.objective.model, space.tensors))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = Inject(space, probe.objective, made[-way]).losses(probe.points)
        return found

    losses_agree(subject, tried, 1, 2, measure)
    return Outcome(ALONE) if any(injection.one_by_one for injection in made) else None


# Saved ---------------------------------------------------------------------------------------------------------------


def saved(subject: Subject, tried: str) -> None:
    """What is saved gives the same scores when it is loaded, and when plain transformers (or peft) opens it."""
    surface, folder = subject.moved(tried), subject.folder / f"saved {tried}"
    before = one_by_one(surface)
    surface.save(folder)
    same(one_by_one(load(folder)), before, "scores of the tuned and of the loaded model")
    if tried in ("head", "full, head"):
        same(plain_head(subject, surface), before, "scores of the tuned model and of what plain transformers opens")
    elif tried in ("full", "bias"):
        there = folder if tried == "full" else folder / "base"
        model = getattr(transformers, subject.architecture.auto).from_pretrained(there).eval()
        same(plain_scores(subject, model, "one token"), before, "scores of the tuned and of the opened model")
    elif tried in ("lora", "prompt", "prefix"):
        with_peft(subject, tried, folder, before)


def with_peft(subject: Subject, tried: str, folder: Path, before: Tensor) -> None:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = getattr(transformers, subject.architecture.auto).from_pretrained(folder / "base").eval()
            model = PeftModel.from_pretrained(base, str(folder)).eval()
            found = plain_scores(subject, FromTheEnd(model, subject), "one token")
    except Exception as error:  # noqa: BLE001 (whatever peft raises is peft's)
        raise Limit(f"peft: {told(error)}") from None
    if tried == "prompt" and apart(found, before) > 1 and not reads_embeddings(subject):
        raise Limit("peft gives a model embeddings for its tokens, of which the library's own makes something else")
    if tried == "prefix" and apart(found, before) > 1 and apart(found, plain_scores(subject, base, "one token")) <= 1:
        raise Limit("peft does not give this model the virtual tokens that it opens")
    same(found, before, "scores of the tuned model and of what peft opens")


def reads_embeddings(subject: Subject) -> bool:
    """Whether the library's model says the same of tokens and of their embeddings."""
    row = torch.tensor([subject.ids(text_of(6))])
    given = {"inputs_embeds": subject.plain.get_input_embeddings()(row), "attention_mask": torch.ones_like(row)}
    return apart(subject.plain(**given).logits[0], logits_of(subject.plain, row[0].tolist())) <= 1


class FromTheEnd:
    """A model of peft's whose logits are those of the text alone, without the virtual tokens in front."""

    def __init__(self, model: Any, subject: Subject) -> None:
        self.model, self.config, self.subject = model, model.config, subject
        self.forward = subject.plain.forward

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        read = inputs.get("decoder_input_ids", inputs["input_ids"])
        return transformers.modeling_outputs.CausalLMOutput(logits=out.logits[:, -read.shape[1] :])


# Choices, texts, dropout ---------------------------------------------------------------------------------------------

CHOICES = (("very good", "dull", "a film"), ("bad", "the plot was bright"))


class Ladder:
    """A model behind a side network, called as the library's are: with tokens, for the logits at every position."""

    def __init__(self, surface: Any) -> None:
        self.surface, self.config = surface, surface.model.backbone.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> None: ...

    def __call__(self, **inputs: Any) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.surface.token_logits(self.surface.prepare(inputs))
        )


def speaking(subject: Subject, tried: str, **options: Any) -> tuple[Any, Any]:
    """(surface, a model of which the library's own call says the same): plain transformers' own where nothing is put
    into it, else the surface's, of which `saved` shows that peft opens the same."""
    surface = subject.surface(tried, **options)
    if tried in ("full", "bias"):
        return surface, subject.plain
    nudge(surface)
    return surface, Ladder(surface) if tried == "lst" else surface.model


def choices(subject: Subject, tried: str) -> None:
    """A choice's score is the sum of its tokens' log-probabilities by the whole logits, read alone."""
    template = "{text} so it was" + (" {mask}." if subject.family == "masked" else "")
    surface, model = speaking(subject, tried, labels=(), prompt=Prompt(template, {}))
    rows = [Example(e.text, 0, choices=CHOICES[n % 2]) for n, e in enumerate(MIXED)]
    found = scores_of(surface, rows)
    wanted = torch.full_like(found, -torch.inf)
    for n, row in enumerate(rows):
        front, back = f"{row.text} so it was", "." if subject.family == "masked" else ""
        for c, choice in enumerate(row.choices):
            behind = subject.ids(f"{front} {choice}")[len(subject.ids(front)) :]
            word = subject.ids(choice) if subject.family == "text-to-text" else behind
            wanted[n, c] = likelihoods(subject, model, front, back, word)[1].sum()
    if not torch.equal(found.isinf(), wanted.isinf()):
        raise Wrong("choices that are there and those that are not are taken for each other")
    if apart(found.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0)) <= 1:
        return
    alone = torch.full_like(found, -torch.inf)
    for n, row in enumerate(rows):
        for c, choice in enumerate(row.choices):
            alone[n, c] = scores_of(surface, [Example(row.text, 0, choices=(choice,))])[0, 0]
    if counts_tokens(subject):
        raise Limit("log-likelihoods of choices differ: plain transformers' own depend on how many tokens stand behind")
    same(alone.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0), "log-likelihoods of choices, one by one,")
    if padding_moves(subject, surface, tried, rows):
        raise Limit("padded, log-likelihoods of choices differ, as plain transformers' own do")
    same(found.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0), "log-likelihoods of choices")


def texts(subject: Subject, tried: str) -> None:
    """What is written about each row of a batch is what the model says token by token, nothing kept, about it alone."""
    limit = 6
    prompt = Prompt("{text} so", {}, "sum", " {answer}")
    surface, model = speaking(subject, tried, labels=(), prompt=prompt, max_new_tokens=limit)
    rows = [Example(example.text, 0, answers=("x",)) for example in MIXED]
    for seed in range(2, 10):
        wanted = [written(subject, model, f"{row.text} so", limit) for row in rows]
        if len(set(wanted)) > 1 or model is subject.plain:
            break
        nudge(surface, seed)  # until something else is written about other rows
    if len(set(wanted)) < 2:
        raise Wrong(f"the check is blind: it writes {sorted(set(wanted))}")
    encoded = surface.encode_questions(rows)
    found = surface.texts(surface.prepare(encoded.batch(range(len(rows)))))
    if found == wanted:
        return
    number = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    alone = surface.texts(surface.prepare(encoded.batch([number])))[0]
    if alone == wanted[number] and padding_moves(subject, surface, tried, rows, encoded):
        raise Limit("padded, other texts are written, as plain transformers' own logits differ")
    raise Wrong(f"{found[number]!r} is written for {wanted[number]!r}")


def written(subject: Subject, model: Any, front: str, limit: int) -> str:
    before, after = subject.around
    said: list[int] = []
    tokenizer = subject.tokenizer
    while len(said) < limit:
        if subject.family == "text-to-text":
            logits = logits_of(model, [*before, *subject.ids(front), *after], [*subject.start, *said])
        else:
            logits = logits_of(model, [*before, *subject.ids(front), *said])
        said.append(int(logits[-1].argmax()))
        if said[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(said[-1:]):
            break
    return tokenizer.decode(said, skip_special_tokens=True).partition("\n")[0].strip()


def dropout(subject: Subject, tried: str) -> None:
    """The rate that is asked for acts, whatever the configuration's own are; none asked is none."""
    rates = [n for n, v in subject.plain.config.to_dict().items() if "drop" in n and isinstance(v, int | float)
             and not isinstance(v, bool)]  # fmt: skip

    try:
        folders = {rate: subject.model(**dict.fromkeys(rates, rate)) for rate in (0.0, 0.9)}
    except ValueError as error:
        raise Limit(f"the library's own model cannot be made with a rate of dropout: {told(error)}") from None

    def trained(rate: float, asked: float) -> tuple[Tensor, Tensor]:
        surface = subject.surface(tried, folders[rate], dropout=asked)
        nudge(surface)
        prepared = surface.prepare(surface.encode(MIXED).batch(range(len(MIXED))))
        still = surface.logits(prepared)
        surface.train()
        return still, surface.logits(prepared, torch.Generator().manual_seed(0))

    still, moving = trained(0.9, 0.0)
    same(moving, still, "no dropout is asked for: scores in training and otherwise")
    still, first = trained(0.0, 0.5)
    other, second = trained(0.9, 0.5)
    same(other, still, "the check is blind: models that differ in their rates alone")
    same(second, first, "with rates of 0.0 and 0.9 in the configuration, scores of a dropout of 0.5")
    if apart(first, still) < 1:
        raise Wrong("dropout 0.5 is asked for and none acts")


CHECKS: dict[str, Callable[[Subject, str], Outcome | None]] = {
    "scores": scores, "padding": padding, "walk": walk, "inject": inject, "saved": saved, "choices": choices,
    "texts": texts, "dropout": dropout,
}  # fmt: skip


def applies(architecture: Architecture, tried: str, check: str) -> bool:
    """Whether there is such a cell: a classification head says no words, and a masked model writes no texts."""
    if check in ("choices", "texts") and tried in ("head", "full, head"):
        return False
    return check != "texts" or architecture.kind in ("causal", "text-to-text")


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@torch.no_grad()
def outcomes(subject: Subject, tried: str, checks: Sequence[str]) -> dict[str, Outcome]:
    """Checks of one surface. Where it cannot be made, or the library's model is deaf, none of them is tried."""

    def begin() -> None:
        try:
            spoken = logits_of(subject.plain, subject.ids(text_of(6)), subject.start)
        except Exception as error:  # noqa: BLE001 (whatever the library raises)
            raise Limit(f"the library's own model cannot be made, opened or called: {told(error)}") from None
        if not bool(torch.isfinite(spoken).all()):
            raise Wrong("the check is blind: the library's own scores are not finite")
        if deaf(subject):
            raise Limit("on this machine the library's own model reads each token by itself")
        subject.moved(tried)

    made = attempt(subject, begin)
    if made.word != OK:
        return dict.fromkeys(checks, made)
    return {check: attempt(subject, lambda check=check: CHECKS[check](subject, tried)) for check in checks}


def attempt(subject: Subject, check: Callable[[], Outcome | None]) -> Outcome:
    """What comes of a check; refusals and crashes are outcomes too."""
    try:
        return check() or Outcome(OK)
    except Limit as limit:
        return Outcome(LIMIT, str(limit))
    except Wrong as wrong:
        return Outcome(FAULT, str(wrong))
    except UserError as refusal:
        return Outcome(REFUSED, "; ".join(str(refusal).replace(str(subject.folder), "").split("\n")))
    except Exception as error:  # noqa: BLE001 (a crash is what is looked for)
        return Outcome(FAULT, told(error))
