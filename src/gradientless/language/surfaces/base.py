"""Surface: what of a model is tuned, and the shortest way from a batch to class scores.

This is all that the run wing uses of a surface. A surface never sees an optimizer or a point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gradientless.errors import UserError
from gradientless.language.data import EncodedRows
from gradientless.language.prompting import EncodedAnswers
from gradientless.language.tasks.base import Example

if TYPE_CHECKING:
    from gradientless.language.surfaces.products import Products


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the frozen body made of a batch: pooled features, float32 [B, width], without a graph."""

    features: Tensor


@dataclass(frozen=True, eq=False)
class PreparedTokens:
    """A batch of tokens on the surface's device, where no part of the model is frozen.

    copies: how often the batch stands in it, one after the other (`Surface.repeated`).
    """

    tensors: dict[str, Tensor]
    copies: int = 1


@dataclass(frozen=True, eq=False)
class Part:
    """Tuned tensors that belong together, by their names in `trainable()`.

    means: what decides what they compute, beside their shapes, in words; parts that are alike in all of this may take
    each other's place.
    """

    means: str
    tensors: dict[str, nn.Parameter]


class Surface(nn.Module, ABC):
    """What every surface offers.

    cacheable: whether `prepare` does all of the frozen part's work, so that it can be done once a data set
        (`features(batch)` and `body_checksum()` are there then).
    keeps_states: whether `prepare` can take a frozen backbone's states as `features.keep_states` kept them.
    labels: label names by class index. model: the module whose parameters are tuned; `trainable()` names them as its
        `named_parameters()` does. dropout: probability (the largest, where there are several), used in training mode
        only.
    session: many small changes at once on one prepared batch, where the surface can; else None.
    mergeable: whether `save_merged` puts what is tuned into the model's own weights.
    """

    cacheable: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    keeps_states: ClassVar[bool] = False
    session: Callable[[Any], Any] | None = None

    model: nn.Module
    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int
    dropout: float

    @classmethod
    @abstractmethod
    def create(cls, *args: Any, **options: Any) -> Any:
        """`create(model, labels, *, seed, device, dtype, max_length, dropout, **options)`: the surface at
        its base. Raises `UserError` for anything unknown or not possible."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model stands."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The body's dtype."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Entries of a hidden state of the body, which recipes count in ("3*width")."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The tuned tensors by name; tensors that are tied stand there once, under their first name."""

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """The tuned tensors by what they are: "model" (the model's own), "adapter" (put into it), "side" (a side
        network), "head" (a classification head)."""

    @property
    def prompted(self) -> bool:
        """Whether scores are a language model's of label words, so that what is saved has its output layer."""
        return False

    @property
    def says_tokens(self) -> bool:
        """Whether scores are of the rows' own tokens (`data.EncodedTexts`), not of classes."""
        return False

    @property
    def plain(self) -> str | None:
        """Where in what `save` wrote a plain model stands with all that was tuned of its own weights, for another
        surface to be made of; None where none of these are tuned, or an adapter is to be merged first."""
        return None

    @property
    def merged(self) -> str:
        """Where a plain model stands in what `save_merged` wrote."""
        return "."

    def save_merged(self, folder: Path) -> None:
        """Write a plain model with the adapter in its weights into `folder`, and its head, as `full` saves them."""
        raise AssertionError("a surface that is mergeable states it")

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> EncodedRows:
        """Rows as token ids. Raises `UserError` for rows that the surface cannot read."""

    def encode_answers(self, examples: Sequence[Example]) -> EncodedAnswers:
        """Rows with their right answer alone, whose log-likelihood `logits` then gives: [B, 1]. Raises `UserError`."""
        raise self._speechless("answers are scored")

    def encode_questions(self, examples: Sequence[Example]) -> EncodedAnswers:
        """Rows that `texts` answers. Raises `UserError` where the surface cannot."""
        raise self._speechless("texts are written")

    def texts(self, prepared: Any) -> list[str]:
        """What the model writes about each row of `encode_questions`."""
        raise self._speechless("texts are written")

    def blank(self) -> Example:
        """A row of one word."""
        return Example("a", 0, "a")

    def _speechless(self, what: str) -> UserError:
        return UserError(f"surface: {what} by a language model behind a prompt, got {type(self).__name__} without one")

    @property
    def needs_rows(self) -> bool:
        """Whether `begin` takes anything from the rows; else it does nothing, and a replay needs no data."""
        return False

    def begin(self, encoded: EncodedRows, show: bool = True) -> str | None:
        """What the surface takes from the training rows before the first step; a line to say about it, if any.

        Deterministic in (model, seed, rows). It changes tuned weights, so it belongs before the base's checksum.
        """
        return None

    @abstractmethod
    def prepare(self, batch: Any) -> Any:
        """The frozen part of a batch (`EncodedRows.batch`), without a graph."""

    @abstractmethod
    def repeated(self, prepared: Any, times: int) -> Any:
        """`times` copies of a prepared batch one after the other: rows 0…B-1, then again 0…B-1, and so on.

        Every tensor that the model sees then has its rows in `times` blocks of one size, in this order.
        """

    @abstractmethod
    def logits(self, prepared: Any, generator: torch.Generator | None = None) -> Tensor:
        """Class scores [B, C], float32, differentiable in the tuned tensors. generator: of the dropout masks."""

    def touched(self, prepared: Any) -> dict[str, Tensor]:
        """Tuned tensors of which `logits` reads some rows alone, and which rows: int64, distinct."""
        return {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Class scores [B, C] of a batch of tokens."""
        return self.logits(self.prepare(batch))

    @abstractmethod
    def products(self) -> Products:
        """Entries tuned, registered and touched by the backward pass, and its products over a row of one word."""

    @abstractmethod
    def describe(self) -> str:
        """What is tuned, in one line: how many parameters, their share of the model, how many the backward pass
        touches."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the whole model into `folder` (made if absent); docs/saved-models.md says what opens it."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> Surface:
        """What `save` wrote; by default in the dtype it was saved in."""
