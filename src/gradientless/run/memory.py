"""Peak memory above a loaded model, measured; bytes of tensors, counted; the batch that fits when memory runs out."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gradientless.errors import UserError
from gradientless.search.optim import MeZO


class PeakMemory:
    """Peak since this object was made, above what was in use then: MiB.

    On CUDA the allocator's own count. On a CPU the resident memory of the process: on Linux its high-water mark is
    reset at the start; elsewhere the mark of the whole process so far is all there is, so the figure is an upper bound.
    What the C library keeps of freed memory is handed back first: what takes its place later would not be seen.
    `give_back` before, where something large was in use before that may stand in circles.

    peaks: of the parts that have ended (`end`).
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device
        self.peaks: dict[str, float] = {}
        trim()
        self.again()
        if self._cuda:
            self.start = float(torch.cuda.memory_allocated(device))
        else:
            now = _status("VmRSS")
            self.start = _resident_peak() if now is None else now

    def again(self) -> None:
        """From now on the peak is that of what comes, above the same start."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: then the mark is not reset
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        peak = float(torch.cuda.max_memory_allocated(self._device)) if self._cuda else _resident_peak()
        return max(0.0, peak - self.start) / 2**20

    def end(self, part: str) -> None:
        """What was in use since the last call was of `part`, whose highest peak is kept; a new part begins."""
        self.peaks[part] = max(self.peaks.get(part, 0.0), self.mib())
        trim()  # or the next part would stand on what this one freed
        self.again()

    @property
    def highest(self) -> float:
        """Of all parts and of what is going on, MiB."""
        return max(self.mib(), *self.peaks.values(), 0.0)


def loaded(module: nn.Module, searches: bool) -> None:
    """Make what is in use a loaded model and no less, before a peak above it is measured.

    Reads the weights, which may still lie in a file that is read as they are used, and does, once a process, a small
    step that loads and compiles what any first step does. searches: whether steps are to be forward passes alone.
    """
    for tensor in {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values():
        tensor.sum()
    _first_step(searches)


@functools.cache
def _first_step(searches: bool) -> None:
    import gradientless.run.events  # noqa: F401 (loaded by the first run's log)

    weight = nn.Parameter(torch.zeros(4, 4))

    def loss() -> torch.Tensor:
        states = nn.functional.layer_norm(torch.ones(1, 2, 4) @ weight, (4,))
        states = nn.functional.scaled_dot_product_attention(states, states, states)
        return nn.functional.cross_entropy(nn.functional.gelu(states)[0], torch.tensor([0, 1]))

    if searches:
        MeZO([("weight", weight)], lr=1e-3, seed=0).step(loss)
    else:
        loss().backward()
        torch.optim.AdamW([weight]).step()


class TensorBytes(TorchDispatchMode):
    """While open, counts the tensors that are made: `peak` is the most bytes they held at one time.

    What libraries take inside an operation, and arrays that are no tensors, are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in old | self._known:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)

        def gone() -> None:
            self._known.discard(key)
            self._live -= size

        weakref.finalize(storage, gone)


def give_back() -> None:
    """Free what nobody uses any more, and hand it back to the system, where its allocator would keep it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Hand what was freed of the processor's memory back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> float | None:
    """A size of this process in bytes, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return float(line.split()[1]) * 1024
    return None


def _resident_peak() -> float:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return 0.0  # no portable count without another package
    import resource

    size = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return size if sys.platform == "darwin" else size * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def batch_that_fits(attempt: Callable[[int], object], size: int, device: object) -> UserError:
    """The answer to running out of memory at `size` rows at a time. attempt: does the work with that many rows."""
    fits = fitting(attempt, size)
    if fits is None:
        return UserError(f"memory: one example must fit on {device}, got out of memory; use a smaller model or dtype")
    return UserError(
        f"memory: a batch of {size} must fit on {device}, got out of memory; "
        f"{fits} at a time fit: add --micro-batch-size {fits} (the same losses), and --resume to continue"
    )


def fitting(attempt: Callable[[int], object], too_large: int) -> int | None:
    """The largest of too_large/2, too_large/4, … for which `attempt` does not run out of memory; None if none does."""
    size = too_large // 2
    while size >= 1:
        try:
            attempt(size)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    return None
