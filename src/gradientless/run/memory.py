"""Peak memory above a loaded model, measured; and the batch that fits when memory runs out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gradientless.errors import UserError


class PeakMemory:
    """Peak since this object was made, above what was in use then: MiB.

    On CUDA the allocator's own count. On a CPU the resident memory of the process: on Linux its high-water mark is
    reset at the start; elsewhere the mark of the whole process so far is all there is, so the figure is an upper bound.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._device = device
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
            self._start = float(torch.cuda.memory_allocated(device))
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: then the mark is not reset
            Path("/proc/self/clear_refs").write_text("5")
        now = _status("VmRSS")
        self._start = _resident_peak() if now is None else now

    def mib(self) -> float:
        peak = float(torch.cuda.max_memory_allocated(self._device)) if self._cuda else _resident_peak()
        return max(0.0, peak - self._start) / 2**20


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
