"""What a run is made of, told in its log and its checkpoints; a run goes on, and is replayed, as what it was.

config    the configuration, but for what says where and how it is computed
code      versions of the packages that decide the numbers, and checksums of the sources of this one and of the
          user's own
labels    the names of the classes, in their order
data      a checksum of the rows as they were read: texts, labels, and their order
tokens    a checksum of the rows as the tokenizer and the prompt encoded them
model     a checksum of the model's settings
base      a checksum of the weights that the run starts from
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gradientless
from gradientless.errors import UserError
from gradientless.language.tasks import Example, Splits
from gradientless.run.config import RunConfig
from gradientless.run.named import file_of, is_own
from gradientless.schema import POSITIVE, Maybe

PACKAGES = ("torch", "numpy", "numba", "transformers", "tokenizers", "peft")
SPECTATORS = (  # sources that decide no number of a run
    *("cli", "integrations", "terminal", "__main__"),
    *(f"run/{name}" for name in ("compare", "diagnose", "predict", "profile", "report", "untuned")),
)
SHORT = 16  # characters of a checksum that stands for a file of code
UNKNOWN = "a version that did not note it"

ORIGIN = {  # what a log and a checkpoint hold of it
    **dict.fromkeys(("data", "tokens", "model", "base"), Maybe(str)),
    "config": Maybe(dict),
    "code": Maybe({str: str}),
    "labels": Maybe([str]),
}
HEADER = {"rows": Maybe(POSITIVE), "scheduled_steps": Maybe(POSITIVE), "origin": Maybe(ORIGIN)}  # of a run's log
_MEANT = {
    "labels": "the labels must be those that the run began with, in their order",
    "data": "the rows must be those that the run began with: their texts, their labels and their order",
    "tokens": "the tokenizer and the prompt must encode the rows as when the run began",
    "model": "the model's settings must be those that the run began with",
    "base": "the base model's weights must be those that the run began with",
}
_OF_CODE = ("code", "model")  # another version of a library may tell a model's settings otherwise


class Origin:
    """The parts, stated one after the other as they become known, and compared with what the run's files say.

    before: what those say, the newest first; none for a run that begins. owner: who refuses what does not fit.
    other_code: whether code may be another. say: is told of what was let pass.
    """

    def __init__(
        self,
        before: Sequence[Mapping[str, Any]] = (),
        owner: str = "--resume",
        other_code: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        self.before, self.owner, self.other_code, self.say = before, owner, other_code, say
        self.parts: dict[str, Any] = {}

    def state(self, part: str, value: Any) -> None:
        """Raises `UserError` where the run's files say otherwise."""
        self.parts[part] = value
        for then in self.before[:1] if part == "code" else self.before:  # the newest file tells whose numbers go on
            if part in then and (line := self._difference(part, then[part], value)):
                if not (self.other_code and part in _OF_CODE):
                    raise UserError(f"{self.owner}: {line}")
                if part == "code":
                    self.say(f"other code  {line.partition(', got ')[2].partition(';')[0]}")

    def _difference(self, part: str, then: Any, now: Any) -> str | None:
        if then == now:
            return None
        if part == "config":
            mine = RunConfig.model_validate(now)
            lines = mine.differences(RunConfig.stated(self.owner, then, mine, "the run's log or checkpoint"))
            told = "; ".join(lines)
            return f"the configuration must be what the run began with, got {told}" if lines else None
        if part == "code":
            return f"the code must be what the run began with, got {differing(then, now)}; --other-code goes on with it"
        return f"{_MEANT[part]}, got others"


def differing(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of two codes differs, for people."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{name} {now.get(name, 'not there')} here, {then.get(name, 'not there')} there" for name in names)


def code_of(config: RunConfig) -> dict[str, str]:
    """Names and versions or checksums of all code that decides the numbers of a run."""
    found = {"gradientless": gradientless.__version__, "its sources": _sources()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # so it decides nothing
            continue
    schedules = (config.schedule, *(tensor.schedule for tensor in config.tensors))
    own = (config.optimizer.name, config.surface.name, config.loss, config.reward)
    for name in (*own, *(schedule.name for schedule in schedules if schedule is not None)):
        if name is None or not is_own(name):
            continue
        file = file_of(name.rpartition(":")[0])
        if file is not None:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:SHORT]
    return found


@cache
def _sources() -> str:
    root = Path(inspect.getfile(gradientless)).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.removesuffix(".py").startswith(SPECTATORS):
            digest.update(f"{name}\0".encode() + file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:SHORT]


def data_of(splits: Splits) -> str:
    """A checksum of the rows to train and to validate on, as they were read."""
    digest = hashlib.sha256()
    for rows in (splits.train, splits.validation):
        digest.update(f"{len(rows)}\0".encode())
        for row in rows:
            digest.update(_as_bytes(row))
    return digest.hexdigest()


def _as_bytes(row: Example) -> bytes:
    fields = sorted(row.fields.items())
    return (
        repr((row.text, row.label, row.text_pair, fields, row.choices, row.answers, row.group)).encode(
            "utf-8", "surrogatepass"
        )
        + b"\0"
    )


def tokens_of(fingerprints: Iterable[str]) -> str:
    """A checksum of rows of which each encoding has one."""
    return hashlib.sha256("\0".join(fingerprints).encode()).hexdigest()
