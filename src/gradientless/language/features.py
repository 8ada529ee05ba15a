"""Features of a whole split, or all states of a frozen backbone, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradientless.errors import UserError
from gradientless.language.data import EncodedRows
from gradientless.language.kept import kept
from gradientless.language.starter import cache_folder
from gradientless.terminal import Console, Counter

VERSION = 1  # raise it when the same key would mean other numbers


class FeatureSurface(Protocol):
    """What a surface needs for its features to be cached."""

    @property
    def width(self) -> int: ...
    @property
    def pooling(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def body_checksum(self) -> str: ...
    def features(self, batch: dict[str, Tensor]) -> Tensor: ...


def key(surface: FeatureSurface, encoded: EncodedRows) -> str:
    """The cache key: sha256 in hex of all that the features depend on."""
    return _key(surface, encoded, surface.pooling)


def states_key(surface: StateSurface, encoded: EncodedRows) -> str:
    """As `key`, of the backbone's states."""
    return _key(surface, encoded, surface.states_read())


def _key(surface: FeatureSurface | StateSurface, encoded: EncodedRows, read: str) -> str:
    parts = (VERSION, surface.body_checksum(), encoded.fingerprint, encoded.max_length, read, surface.dtype)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def compute(
    surface: FeatureSurface,
    encoded: EncodedRows,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    show: bool = True,
    title: str = "features",
) -> np.ndarray[Any, Any]:
    """The features of every row, float32 [N, width], memory-mapped for reading, in the rows' order.

    They are computed in batches of rows of like length, or taken from the cache folder (by default
    `cache_folder()/features`), where each file ends in its own sha256: a file that is damaged or cut short is computed
    again. show: tell progress on stderr.
    """
    path = _folder(cache_dir) / f"{key(surface, encoded)}.npy"

    def fill(file: np.ndarray, rows: np.ndarray) -> None:
        values = surface.features(encoded.batch(rows))
        _require_finite(values, surface.dtype)
        file[rows] = values.cpu().numpy()

    return _kept(path, (len(encoded), surface.width), np.dtype(np.float32), fill, encoded, batch_size, show, title)


class StateSurface(Protocol):
    """What a surface needs for all states of its backbone to be kept: `states_of_rows` are those of each row of a batch
    as vectors [count, width], `state_counts` how many there are, `states_read` which they are."""

    @property
    def width(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def body_checksum(self) -> str: ...
    def states_read(self) -> str: ...
    def state_counts(self, batch: dict[str, Tensor]) -> list[int]: ...
    def states_of_rows(self, batch: dict[str, Tensor]) -> list[Tensor]: ...


class WithStates:
    """Rows (`EncodedRows`) whose batches bring the backbone's states along, under "states"."""

    def __init__(self, encoded: EncodedRows, vectors: np.ndarray, ends: np.ndarray, dtype: torch.dtype) -> None:
        self._encoded, self._vectors, self._ends, self._dtype = encoded, vectors, ends, dtype
        self.labels, self.lengths, self.max_length = encoded.labels, encoded.lengths, encoded.max_length
        self.fingerprint, self.wholes = encoded.fingerprint, encoded.wholes

    def __len__(self) -> int:
        return len(self._encoded)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """As the rows' own, and "states": for each row the vectors [count, width] that were kept of it."""
        states = []
        for row in indices:
            begin = int(self._ends[row - 1]) if row else 0
            found = torch.from_numpy(np.array(self._vectors[begin : int(self._ends[row])]))
            states.append(found.view(self._dtype))
        return {**self._encoded.batch(indices), "states": states}


def keep_states(
    surface: StateSurface,
    encoded: EncodedRows,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    show: bool = True,
    title: str = "states",
) -> WithStates:
    """The rows with all states that the surface reads of its frozen backbone, memory-mapped, in the backbone's dtype.

    Kept as `compute` keeps features. They are as large as the tokens: one vector for each state of each token. Raises
    `UserError` where the disk has no room for them.
    """
    dtype = surface.dtype
    counts = np.concatenate([_of_rows(surface.state_counts(encoded.batch(rows)), rows) for rows in _blocks(encoded)])
    ends = np.cumsum(counts, dtype=np.int64)
    path = _folder(cache_dir) / f"{states_key(surface, encoded)}.npy"
    kind = np.dtype({torch.float32: np.float32, torch.float16: np.float16}.get(dtype, np.uint16))  # bfloat16 as bits
    shape = (int(ends[-1]), surface.width)
    if not path.exists():
        _require_room(path.parent, shape[0] * shape[1] * kind.itemsize)

    def fill(file: np.ndarray, rows: np.ndarray) -> None:
        found = surface.states_of_rows(encoded.batch(rows))
        times = len(found) // len(rows)  # a prompt may be several rows of tokens
        for at, row in enumerate(rows):
            vectors = torch.cat(found[at * times : (at + 1) * times]).cpu()
            _require_finite(vectors, dtype)
            bits = vectors.view(torch.uint16) if kind == np.uint16 else vectors
            file[ends[row] - counts[row] : ends[row]] = bits.numpy()

    made = _kept(path, shape, kind, fill, encoded, batch_size, show, title)
    return WithStates(encoded, np.asarray(made), ends, dtype)


def _blocks(encoded: EncodedRows) -> list[np.ndarray]:
    return np.array_split(np.arange(len(encoded)), -(-len(encoded) // 1024))


def _of_rows(counts: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """Counts of rows of tokens, of which a row of data has one or several, summed for each row of data."""
    return np.asarray(counts, dtype=np.int64).reshape(len(rows), -1).sum(axis=1)


def _folder(cache_dir: Path | None) -> Path:
    return cache_folder() / "features" if cache_dir is None else Path(cache_dir)


def _require_finite(values: Tensor, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"features: the model's outputs must be finite, got inf or nan in {dtype}; use dtype float32 or bfloat16"
        )


def _require_room(folder: Path, size: int) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if size > 0.95 * free:
        raise UserError(
            f"surface.cache: the backbone's states take {size / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free in "
            f"{folder}; leave surface.cache out, or set GRADIENTLESS_CACHE to another disk"
        )


Fill = Callable[[np.ndarray, np.ndarray], None]


def _kept(
    path: Path,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    fill: Fill,
    encoded: EncodedRows,
    batch_size: int,
    show: bool,
    title: str,
) -> np.ndarray[Any, Any]:
    """The array of the file, or one that `fill` makes: given the array and the numbers of some rows of like length."""
    console = Console(stderr=True, quiet=not show)

    def write(partial: Path) -> None:
        _fill(fill, encoded, batch_size, partial, shape, dtype, console, title)

    return kept(path, write, lambda line: console.print(f"{title}: {line}", highlight=False), shape)


def _fill(
    fill: Fill,
    encoded: EncodedRows,
    batch_size: int,
    partial: Path,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    console: Console,
    title: str,
) -> None:
    order = np.argsort(encoded.lengths, kind="stable")
    try:
        file = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        with Counter(console, title, len(order)) as counter:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                fill(file, rows)
                counter.advance(len(rows))
        file.flush()
    except OSError as error:
        need = shape[0] * shape[1] * dtype.itemsize / 2**20
        raise UserError(
            f"features: {need:.0f} MiB must fit into the cache folder {partial.parent}, got {error.strerror or error}"
        ) from None
