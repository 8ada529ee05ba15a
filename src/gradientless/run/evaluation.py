"""A surface over a split: logits, loss and metrics; and the same for the model of a run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import NotFinite, UserError, one_line
from gradientless.language.data import EncodedTexts, load_rows, load_table
from gradientless.language.metrics import METRICS, by_class, chosen_right, exact_match, highest, token_f1
from gradientless.language.prompting import EncodedAnswers
from gradientless.language.splits import few_shot, subset
from gradientless.language.surfaces import Surface
from gradientless.language.surfaces import load as load_saved
from gradientless.language.surfaces.base import EncodedRows
from gradientless.language.surfaces.saved import NOTE, class_of, note_class, note_made, note_rows
from gradientless.language.tables import BadRows
from gradientless.language.tasks import TASKS, Example, Splits, find_task
from gradientless.run.config import surface_class
from gradientless.run.losses import chosen
from gradientless.run.memory import is_out_of_memory
from gradientless.run.named import is_own, only, sums_of
from gradientless.run.runfolder import RunFolder

if TYPE_CHECKING:
    from gradientless.run.config import RunConfig

SPLITS = ("validation", "test", "train")


def load_splits(config: RunConfig, bad: BadRows | None = None) -> Splits:
    """The rows that a configuration names: its task's, or the user's own table; as many as it asks for.

    bad: takes up what is left out; by default as the configuration has it. Raises UserError.
    """
    data = config.data
    seed = config.seed if data.split_seed is None else data.split_seed
    bad = BadRows(data.skip_bad_rows) if bad is None else bad
    splits = _all_rows(config, seed, bad)
    if data.few_shot is not None:
        splits = few_shot(splits, data.few_shot, seed)
    elif data.subset is not None:
        train, validation, *test = data.subset
        splits = subset(splits, train, validation, test[0] if test else None, seed)
    if data.test is None:
        return splits
    return replace(splits, test=rows_of_file(config, data.test, splits.labels, bad)[0])


def rows_of_file(
    config: RunConfig, file: str | Path, labels: tuple[str, ...] | None, bad: BadRows | None = None
) -> tuple[list[Example], tuple[str, ...]]:
    """All rows of one file, read as the configuration reads its own, by its task or by its columns; and the names of
    their labels. labels: that those of a table must be of; None where it says itself. Raises UserError."""
    path, data = Path(file).expanduser(), config.data
    if config.task is not None:
        task = find_task(config.task)
        return task.load_rows(path, bad), task.labels
    return load_rows(path, data.text_column, data.text_pair_column, data.label_column, labels, bad)


def _all_rows(config: RunConfig, seed: int, bad: BadRows) -> Splits:
    data = config.data
    path = None if data.path is None else Path(data.path).expanduser()
    if config.task is not None:
        return find_task(config.task).load(path, bad)
    if path is None:
        raise UserError("data.path: must be given where no task is, got nothing")
    validation = None if data.validation is None else Path(data.validation).expanduser()
    columns = data.text_column, data.text_pair_column, data.label_column
    return load_table(path, *columns, validation, seed, labelled=config.surface.readout != "tokens", bad=bad)


def reads(config: RunConfig, pairs: bool) -> dict[str, Any]:
    """How rows are read, for `saved.note_rows`."""
    data = config.data
    if config.task is not None:
        return {"task": config.task if config.task in TASKS else None, "pairs": pairs}
    columns = "text_column", "text_pair_column", "label_column"
    return {**{key: getattr(data, key) for key in columns}, "pairs": pairs}


def model_folder(run_or_model: str | Path) -> Path:
    """The folder of the saved model: model/ of a run folder, or the folder itself. Raises UserError."""
    path = Path(run_or_model)
    if not path.is_dir():
        raise UserError(f"model: folder not found, got '{run_or_model}'")
    folder = RunFolder(path)
    if not folder.holds_run():
        return path
    if not folder.model.is_dir():
        raise UserError(f"model: the run must have ended, got '{run_or_model}' without {folder.model.name}/")
    return folder.model


def load_surface(
    run_or_model: str | Path,
    device: str = "auto",
    code: Iterable[str] | None = (),
    sums: Mapping[str, str] | None = None,
) -> Surface:
    """The surface saved in a run folder or model folder, in evaluation mode. Raises UserError.

    code: whose names of classes the folder may name and have run, None for any. sums: of their files, when the model
    was saved; as the folder notes them, by default."""
    folder = model_folder(run_or_model)
    if sums is None:
        named = class_of(folder)
        sums = {named["name"]: named["sha256"]} if "sha256" in named else {}
    with only(code, str(folder / NOTE), sums):
        surface = load_saved(folder, pick_device(device), own=surface_class)
    surface.eval()
    return surface


def save_model(
    surface: Surface, folder: Path, rows: Mapping[str, Any], name: str, made: Mapping[str, Any] | None = None
) -> None:
    """Save the surface `name` into `folder`, with what is noted beside it: how rows were read and how the model was
    made, where that is known, and which class of the user's own opens it, if one does."""
    surface.save(folder)
    if is_own(name):
        note_class(folder, name, sums_of([name]).get(name), surface.labels)
    if rows:
        note_rows(folder, rows)
    if made:
        note_made(folder, made)


def require_finite(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises NotFinite for weights that are not finite, which learn and tell nothing."""
    for name, tensor in tensors.items():
        if not bool(torch.stack(tensor.detach().aminmax()).isfinite().all()):
            raise NotFinite(f"{owner}: weights must be finite in {tensor.dtype}, got others in '{name}'")


def require_classes(surface: Surface) -> None:
    """Raises UserError for a surface that has none."""
    if surface.says_tokens:
        raise UserError("model: must have classes, got a side network that was pretrained on texts alone")


def pick_device(device: str) -> str:
    """ "auto" is the first of cuda, mps, cpu that this machine has; another that it lacks is a UserError."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if present[name])
    kind, _, index = device.partition(":")
    if not present.get(kind, False) or (index and int(index) >= torch.cuda.device_count()):
        have = ", ".join(name for name, there in present.items() if there)
        raise UserError(f"device: must be one that this machine has ({have}), got '{device}'")
    return device


def reads_padding(surface: Surface, examples: Sequence[Example], kind: str) -> str | None:
    """A line where the scores of the shortest of `examples` change when it stands beside the longest; else None."""
    encoded = _encoded(surface, examples, kind)
    short, long = int(encoded.lengths.argmin()), int(encoded.lengths.argmax())
    alone, beside = _scores(surface, encoded, [short]), _scores(surface, encoded, [short, long])
    apart = _apart(alone, beside[: len(alone)], surface.dtype)
    return None if apart is None else f"a row's scores change with the length of those beside it, here by {apart:.2g}"


def saved_otherwise(surface: Surface, folder: Path, examples: Sequence[Example], kind: str) -> str | None:
    """What is wrong with the model in `folder`, where it does not give `examples` the scores of `surface`, which was
    saved there; else None. The surface is empty afterwards, so that there is never a second copy of the model."""
    rows, device, dtype = range(len(examples)), surface.device, surface.dtype
    said = _scores(surface, _encoded(surface, examples, kind), rows)
    for tensor in (*surface.parameters(), *surface.buffers()):
        tensor.data = tensor.new_empty(0)
    try:
        opened = load_saved(folder, device, own=lambda _: type(surface))
        apart = _apart(said, _scores(opened, _encoded(opened, examples, kind), rows), dtype)
    except Exception as error:  # noqa: BLE001 (the run has ended and is saved, whatever fails here)
        return f"cannot be opened again: {one_line(error)}"
    return None if apart is None else f"gives other scores than were found when it was saved, by up to {apart:.2g}"


def _apart(scores: Tensor, others: Tensor, dtype: torch.dtype) -> float | None:
    """By how much scores differ, where that is more than rounding in a model of this dtype; else None."""
    there = scores.isfinite()
    if scores.shape != others.shape or not torch.equal(there, others.isfinite()):
        return math.inf
    if not there.any():
        return None
    apart, size = float((scores - others)[there].abs().max()), float(scores[there].abs().max())
    return apart if apart > (1e-4 if dtype == torch.float32 else 5e-2) * max(1e-3, size) else None


def _encoded(surface: Surface, examples: Sequence[Example], kind: str) -> Any:
    return surface.encode_answers(examples) if kind == "generation" else surface.encode(examples)


@torch.no_grad()
def _scores(surface: Surface, encoded: Any, rows: Sequence[int]) -> Tensor:
    surface.eval()
    return surface.logits(surface.prepare(encoded.batch(np.asarray(rows)))).float().cpu()


@torch.no_grad()
def logits_of(surface: Surface, encoded: EncodedRows, batch_size: int | None = None) -> Tensor:
    """Logits of every row of `encoded`, in its order: float32 [N, C] on the CPU. batch_size: see `in_batches`."""
    found = []

    def read(rows: np.ndarray) -> Tensor:
        return surface.logits(surface.prepare(encoded.batch(rows))).float().cpu()

    for rows, logits in in_batches(encoded, batch_size, surface.device.type, read):
        found.append((torch.from_numpy(rows), logits))
    answer = torch.empty(len(encoded), *found[0][1].shape[1:])
    for at, logits in found:
        answer[at] = logits
    return answer


@torch.no_grad()
def texts_of(surface: Surface, encoded: EncodedAnswers, batch_size: int | None = None) -> list[str]:
    """What the surface's model writes about every row of `encoded`, in its order. batch_size: see `in_batches`."""
    found = [""] * len(encoded)

    def read(rows: np.ndarray) -> list[str]:
        return surface.texts(surface.prepare(encoded.batch(rows)))

    for rows, texts in in_batches(encoded, batch_size, surface.device.type, read):
        for row, text in zip(rows, texts, strict=True):
            found[row] = text
    return found


class Limited(Protocol):
    """Encoded rows; see `EncodedRows`."""

    wholes: np.ndarray
    max_length: int


@dataclass(frozen=True)
class Cut:
    """Texts that were cut: `rows` of `of` to `length` tokens, where the longest had `whole`."""

    rows: int
    of: int
    length: int
    whole: int

    @classmethod
    def among(cls, encoded: Limited) -> Cut:
        wholes, length = encoded.wholes, encoded.max_length
        return cls(int((wholes > length).sum()), len(wholes), length, int(wholes.max()))

    def __add__(self, other: Cut) -> Cut:
        return Cut(self.rows + other.rows, self.of + other.of, self.length, max(self.whole, other.whole))

    def of_settings(self) -> str | None:
        """The line for people who may allow more; None where nothing was cut."""
        return self._line(f"; data.max_length={self.whole} keeps them whole")

    def of_model(self) -> str | None:
        """The line about a model that was tuned with texts of this length."""
        return self._line(f", as the model was tuned; the longest has {self.whole}")

    def _line(self, rest: str) -> str | None:
        return f"texts cut   {self.rows:,} of {self.of:,} rows to {self.length} tokens{rest}" if self.rows else None


Say = Callable[[str], object]


def say_cut(cut: Cut, say: Say | None) -> None:
    if say is not None and (line := cut.of_model()):
        say(line)


T = TypeVar("T")
TOKENS = {"cpu": 1 << 10}  # of a batch that is only read; more only pad more, where a processor computes
MORE_TOKENS = 1 << 16  # of one on an accelerator, which may not hold them


def in_batches(
    encoded: EncodedRows, batch_size: int | None, device: str, read: Callable[[np.ndarray], T], count: int | None = None
) -> Iterator[tuple[np.ndarray, T]]:
    """What `read` makes of the first `count` (all) rows of `encoded`, and which rows those are, batch by batch.

    Rows of one length share a batch, so that there is little padding. batch_size: how many rows of tokens are read at a
    time (a row of data is several where it has choices); None is as many as `TOKENS` hold with their padding. A batch
    that the memory of `device` does not hold is read in halves, and so are those after it.
    """
    lines = getattr(encoded, "lines", np.ones(len(encoded), dtype=np.int64))
    order = np.argsort(encoded.lengths[:count], kind="stable")
    room = TOKENS.get(device, MORE_TOKENS) if batch_size is None else batch_size
    while len(order):
        taken = np.cumsum(lines[order]) * (encoded.lengths[order] if batch_size is None else 1)
        size = max(1, int(np.searchsorted(taken, room, side="right")))
        try:
            made = read(order[:size])
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what did not fit
            room = int(taken[size - 1]) // 2
            continue
        yield order[:size], made
        order = order[size:]


class TextRows:
    """Rows with choices or answers of their own, encoded once to be scored.

    wholes, max_length: as of `EncodedRows`; of rows with an answer, or with the room to write one.
    """

    def __init__(self, surface: Surface, examples: Sequence[Example], kind: str, batch_size: int | None = None) -> None:
        self.surface, self.examples, self.kind, self._size = surface, examples, kind, batch_size
        self._scored: Any = surface.encode(examples) if kind == "choice" else surface.encode_answers(examples)
        self._asked = None if kind == "choice" else surface.encode_questions(examples)
        self.max_length: int = self._scored.max_length
        self.fingerprint = "\0".join(each.fingerprint for each in (self._scored, self._asked) if each is not None)
        self.wholes: np.ndarray = self._scored.wholes
        if self._asked is not None:
            self.wholes = np.maximum(self.wholes, self._asked.wholes)

    @property
    def tokens(self) -> int:
        """Those of the right answers."""
        return int(self._scored.tokens.sum())

    def read(self) -> tuple[list[str], float]:
        """The text chosen or written for each row; and the loss: the mean cross-entropy over the choices, or the mean
        negative log-likelihood of a token of the right answers."""
        scores = logits_of(self.surface, self._scored, self._size).double()
        if self._asked is not None:
            loss = -float(scores.sum()) / self.tokens
            return texts_of(self.surface, self._asked, self._size), loss
        loss = float(torch.nn.functional.cross_entropy(scores, self._scored.labels))
        return chosen(scores, self.examples, ()), loss


def score_texts(texts: Sequence[str], examples: Sequence[Example], kind: str, loss: float) -> dict[str, float]:
    """As `score`: "accuracy" is that of the choices, or exact match; "f1" is token F1 (see `accuracy_name`)."""
    answers = [example.answers for example in examples]
    return {"loss": loss, "accuracy": share_right(texts, answers, kind), "f1": token_f1(texts, answers)}


def share_right(texts: Sequence[str], answers: Sequence[Sequence[str]], kind: str) -> float:
    """Share of the texts that are one of the right answers, as tasks of that kind count them."""
    return (exact_match if kind == "generation" else chosen_right)(texts, answers)


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy as "loss", and every metric as a fraction. logits: [N, C]. labels: int64 [N].

    Raises NotFinite for scores that are not."""
    predicted, classes = highest(logits).numpy(), logits.shape[1]
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    values = {name: float(metric(predicted, labels.numpy(), classes)) for name, metric in METRICS.items()}
    return {"loss": float(loss), **values}


@torch.no_grad()
def score_tokens(surface: Surface, encoded: EncodedTexts, batch_size: int | None = None) -> dict[str, float]:
    """As `score`, over the tokens that are to be said of each text once."""
    total, said, wanted = 0.0, [], []

    def read(rows: np.ndarray) -> Tensor:
        return surface.logits(surface.prepare(encoded.batch(rows))).float().cpu()

    for rows, logits in in_batches(encoded, batch_size, surface.device.type, read, encoded.texts):
        tokens = encoded.expected(rows)
        total += float(torch.nn.functional.cross_entropy(logits.double(), tokens, reduction="sum"))
        said.append(highest(logits))
        wanted.append(tokens)
    predicted, gold = torch.cat(said).numpy(), torch.cat(wanted).numpy()
    values = {name: float(metric(predicted, gold, logits.shape[1])) for name, metric in METRICS.items()}
    return {"loss": total / len(gold), **values}


def evaluate_folder(
    run_or_model: str | Path,
    splits: Splits,
    split: str = "validation",
    *,
    batch_size: int | None = None,
    device: str = "auto",
    say: Say | None = None,
    code: Iterable[str] | None = (),
    sums: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """loss, metrics, rows and texts_cut of the saved model on one split of `splits`; of classes what `by_class` tells,
    too. Raises UserError.

    Rows are matched by the name of their label, so that data with another order of labels is scored rightly.
    say: is told when texts are cut. code, sums: see `load_surface`.
    """
    if split not in SPLITS:
        raise UserError(f"split: must be one of {', '.join(SPLITS)}, got '{split}'")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: must be >= 1, got {batch_size}")
    examples = getattr(splits, split)
    if not examples:
        have = ", ".join(f"{name} ({len(getattr(splits, name))} rows)" for name in SPLITS if getattr(splits, name))
        raise UserError(f"split: must be one with labelled rows, which are {have}, got '{split}'")
    surface = load_surface(run_or_model, device, code, sums)
    require_classes(surface)
    return {"split": split, **evaluate_rows(surface, examples, splits.labels, splits.kind, batch_size, say)}


def evaluate_rows(
    surface: Surface,
    examples: Sequence[Example],
    labels: Sequence[str],
    kind: str,
    batch_size: int | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """As `evaluate_folder`, of rows whose labels are those of `labels`, by a surface in evaluation mode."""
    if kind != "classification":
        if surface.labels:
            known = ", ".join(surface.labels)
            raise UserError(f"data: rows must be of the model's classes ({known}), got a task of kind {kind}")
        rows = TextRows(surface, examples, kind, batch_size)
        cut = Cut.among(rows)
        say_cut(cut, say)
        texts, loss = rows.read()
        return {"rows": len(examples), "texts_cut": cut.rows, **score_texts(texts, examples, kind, loss)}
    strange = sorted({labels[e.label] for e in examples} - set(surface.labels))
    if strange:
        known = ", ".join(surface.labels) or "none"
        raise UserError(f"data: labels must be those of the model ({known}), got {', '.join(map(repr, strange))}")
    encoded = surface.encode(examples)
    cut = Cut.among(encoded)
    say_cut(cut, say)
    gold = torch.tensor([surface.labels.index(labels[e.label]) for e in examples])
    logits = logits_of(surface, encoded, batch_size)
    found = score(logits, gold) | by_class(highest(logits).numpy(), gold.numpy(), surface.labels)
    return {"rows": len(examples), "texts_cut": cut.rows, **found}
