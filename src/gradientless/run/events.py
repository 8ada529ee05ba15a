"""What TensorBoard shows of a run: its event files, written as they are said.

TensorBoard's own writer hands everything to a thread, which fails alone when the disk does: it prints a traceback, and
the run hears of it later or not at all. Here a scalar is one write, and whoever says it meets what is wrong with it.
"""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from gradientless.writing import append


class Events:
    """A new event file in `folder`. resumed_at: the last step that is kept of earlier files'."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        folder.mkdir(exist_ok=True)
        earlier = len(list(folder.iterdir()))  # TensorBoard reads the files in the order of their names
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{earlier:06d}"
        self._records = RecordWriter(self)
        self._add(Event(file_version="brain.Event:2"))
        if resumed_at is not None:
            self._add(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        """For `RecordWriter`, which frames a record and hands it over whole."""
        append(self._path, record)
