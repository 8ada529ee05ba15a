"""RunFolder: every file that a run reads or writes, its name, its schema, and how it is written.

A run may be killed at any moment. Whole files are written beside their place, flushed to the disk and renamed into it;
logs are append-only, and a resumed run cuts them back to its checkpoint, so that it ends with the bytes of a run that
was never stopped.

    config.toml           the resolved configuration; a folder that has one holds a run
    environment.json      versions, platform, device, threads
    trajectory.bin        the losses measured (gradientless.search.trajectory)
    metrics.jsonl         one object a line: step, split ("train" | "validation"), forward_passes, loss, accuracy, f1, …
                          no wall clock, and floats in full, so that equal runs have equal bytes
    timings.jsonl         one object a line: step, seconds, …; not reproducible
    tensorboard/          event files
    checkpoint-STEP/      tensors.safetensors, state.json (format, step, sha256 of the tensors file, state)
    best-STEP/            the same, of the best evaluation
    model/                the tuned model as the surface saves it
    summary.json          metrics (accuracy and f1 as fractions), forward_passes, steps, seconds, seconds_a_step (the
                          median of the process that ended the run), peak_memory_mib, parameters (tuned, registered,
                          touched by the backward pass, total, share), backward_products (over a row of one word; 0
                          where there is no backward pass), …
    plot.png              validation accuracy and loss against forward passes
    replayed/             the model that `gradientless replay` made, where nobody named another place
    .lock                 while a process writes into the folder: its id and host (gradientless.run.lock)

A run of several stages has a config.toml, model/, summary.json and plot.png of its own, and below them

    stages/NUMBER-NAME/   the folder of each stage, as above; config.toml is the stage's
        merged/           a plain model with the stage's adapter in its weights, that the next stage starts from
        speaking/         the stage's model with an output layer again, where the next stage needs one
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradientless.errors import UserError
from gradientless.inputs import read_text, toml
from gradientless.run.lock import LOCK, locked
from gradientless.run.named import TRUST, sums_of
from gradientless.run.sealed import (
    code_in_toml,
    finite,
    require_toml,
    sealed_toml,
    write_json,
    write_sealed,
)
from gradientless.schema import (
    COUNT,
    POSITIVE,
    Maybe,
    Nullable,
    Schema,
    fits,
    read_json,
    read_sealed,
    sealed,
    sha256_of,
    unsealed,
)
from gradientless.terminal import say_on_stderr
from gradientless.writing import (
    append,
    is_temporary,
    remove,
    replacing,
    require_no_links,
    sync,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gradientless.run.config import RunConfig
    from gradientless.run.events import Events

_METRICS = {str: Nullable(float)}  # null is one that ran away
LEAVES = {
    "model": Nullable(str),
    "prompted": bool,
    "parts": {str: {"means": str, "tensors": {str: [COUNT]}}},
}
BY_CLASS = {  # `metrics.by_class`
    "majority": Maybe({"label": str, "share": float}),
    "classes": Maybe(
        {str: {**dict.fromkeys(("rows", "predicted"), COUNT), **dict.fromkeys(("precision", "recall", "f1"), float)}}
    ),
    "confusion": Maybe([[COUNT]]),
}
_NEEDED = {  # of summary.json by whoever reads it
    "metrics": _METRICS,
    **dict.fromkeys(("steps", "forward_passes", "model_step"), COUNT),
    **dict.fromkeys(("seconds", "peak_memory_mib"), float),
}
_LATER = {  # which early ones lack
    **dict.fromkeys(("wall_seconds", "features_seconds"), float),
    "last": _METRICS,
    "texts_cut": {str: COUNT},
    "chosen_among": COUNT,
    **dict.fromkeys(("metrics_of", "accuracy_means", "f1_means", "ended"), str),
}
_OFTEN = {
    **BY_CLASS,
    "before": Maybe(_METRICS),
    "answers": Maybe(
        {
            **dict.fromkeys(("asked", "changed", "right", "wrong"), COUNT),
            "first": [dict.fromkeys(("before", "after", "right", "text"), str)],
        }
    ),
    "remarks": Maybe([str]),
    "scheduled_steps": Maybe(POSITIVE),
    "trajectory": Maybe(str),
    "leaves": Maybe(LEAVES),
}
_ENDED = {**_NEEDED, **{key: Maybe(schema) for key, schema in _LATER.items()}, **_OFTEN}
SUMMARY = {**_ENDED, "stages": Maybe({str: _ENDED})}
OF_STAGE = {**_NEEDED, **_LATER, **_OFTEN, "leaves": LEAVES}
OF_RESULT = {
    "metrics": _METRICS,
    "forward_passes": COUNT,
    **dict.fromkeys(("seconds", "features_seconds", "peak_memory_mib"), float),
    "texts_cut": {str: COUNT},
}
METRICS_LINE = {
    "step": COUNT,
    "split": Maybe(str),
    "forward_passes": Maybe(COUNT),
    **dict.fromkeys(("loss", "accuracy", "f1"), Maybe(Nullable(float))),
}
TIMINGS_LINE = {"step": COUNT, "seconds": float}
CHECKPOINT, BEST = "checkpoint", "best"
FORMAT = 2  # the first one had no checksum of state.json itself
PACKAGES = ("gradientless", "torch", "numpy", "numba", "scipy", "transformers", "tokenizers", "safetensors", "datasets")


class RunFolder:
    """The folder of one run. `create` starts one, `open` opens one that exists."""

    def __init__(self, path: Path, say: Callable[[str], None] = say_on_stderr) -> None:
        self.path = path
        self.say = say
        self._held = False
        self.config = path / "config.toml"
        self.environment = path / "environment.json"
        self.trajectory = path / "trajectory.bin"
        self.metrics = path / "metrics.jsonl"
        self.timings = path / "timings.jsonl"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model"
        self.summary = path / "summary.json"
        self.plot = path / "plot.png"
        self.stages = path / "stages"
        self.merged = path / "merged"
        self.replayed = path / "replayed"
        self.speaking = path / "speaking"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | Path, config_toml: str, resume: bool = False, say: Callable[[str], None] = say_on_stderr
    ) -> RunFolder:
        """The folder of a new run, with its config.toml written; with `resume`, one that holds this run is kept.

        Raises UserError for a folder that cannot be written or that is not empty (with `resume`: not empty, but
        without a run).
        """
        folder = cls(Path(path), say)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(probe := folder.path / ".probe.partial", b"")
            probe.unlink()
            names = (entry.name for entry in folder.path.iterdir())
            present = sorted(name for name in names if name != LOCK and not is_temporary(name))
        except OSError as error:
            raise UserError(f"out: must be a folder that can be written, got '{path}' ({error.strerror})") from None
        if folder.holds_run():
            if not resume:
                raise UserError(
                    f"out: must be a new or empty folder, got '{path}', which holds a run; --resume continues it"
                )
        elif present:
            raise UserError(f"out: must be a new or empty folder, got '{path}', which holds '{present[0]}'")
        else:
            folder.write_config(config_toml)
        return folder

    @classmethod
    def open(cls, path: str | Path, say: Callable[[str], None] = say_on_stderr) -> RunFolder:
        """The folder of an existing run. Raises UserError when there is none."""
        folder = cls(Path(path), say)
        if not folder.path.is_dir():
            raise UserError(f"run: folder not found, got '{path}'")
        if not folder.holds_run():
            raise UserError(f"run: must be a run folder with a {folder.config.name}, got '{path}'")
        return folder

    def write_config(self, config_toml: str) -> None:
        write_atomically(self.config, sealed_toml(config_toml, sums_of(toml(config_toml, "config"))).encode())

    def read_config(
        self,
        code: Iterable[str] | None = (),
        overrides: Iterable[str] = (),
        flags: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        """The run's configuration, under overrides and flags. code: of the names of code in it those that may be run,
        None for all; see `RunConfig.load`. Raises UserError for a file that is not as the run wrote it."""
        from gradientless.run.config import RunConfig

        require_toml(self.config)
        return RunConfig.load(self.config, overrides, flags, code, code_in_toml(self.config), written=True)

    @property
    def task(self) -> str | None:
        """The task of the run's configuration, read without anything else that it names. Raises UserError for a file
        that is not as the run wrote it."""
        require_toml(self.config)
        return toml(read_text(self.config, "run"), "run").get("task")

    @property
    def asks_for_trust(self) -> str:
        """What a command on this run needs behind it where the configuration names code of the user's own."""
        return f" {TRUST}" if code_in_toml(self.config) else ""

    def holds_run(self) -> bool:
        return self.config.is_file()

    def stage(self, name: str) -> RunFolder:
        """The folder of a stage, there or not."""
        return RunFolder(self.stages / name, self.say)

    def stage_folders(self) -> list[RunFolder]:
        """Those of the stages that have begun, in their order."""
        found = [place for place in self.stages.glob("*-*") if RunFolder(place).holds_run()]
        return [self.stage(place.name) for place in sorted(found, key=lambda p: int(p.name.partition("-")[0]))]

    @property
    def whole(self) -> RunFolder | None:
        """The run that this is a stage of, if it is one."""
        run = RunFolder(self.path.absolute().parent.parent, self.say)
        return run if self.path.absolute().parent == run.stages and run.holds_run() else None

    def withdraw(self) -> None:
        """Take a run back that failed before its first step was done, so that its folder may be used again."""
        from gradientless.search.trajectory import Trajectory

        for stage in self.stage_folders():
            stage.withdraw()
        if self.stage_folders():
            return
        remove(self.stages)
        log = Trajectory.read(self.trajectory) if self.trajectory.exists() else None
        if log or any(record["step"] for record in self.read_metrics()) or self._saved(CHECKPOINT):
            return
        for place in (self.environment, self.trajectory, self.metrics, self.timings, self.tensorboard):
            remove(place)
        for place in self._saved(BEST):
            remove(place)
        self.sweep()
        remove(self.config)  # last: while it is there, what is left is a run that can be gone on with
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While open, this process alone writes into the folder; again within it, nothing happens.

        Raises `Busy` where another process does, and UserError for a folder that holds links, which are not written
        through."""
        if self._held:
            yield
            return
        if self.holds_run():  # any other folder must be empty to become one
            require_no_links(self.path)
        with locked((self.whole or self).path, self.say):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    # --- logs ------------------------------------------------------------------------------------------------------

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a record with "step" to metrics.jsonl; numbers that are not finite become null."""
        _append_line(self.metrics, record)

    def append_timings(self, record: Mapping[str, Any]) -> None:
        """Append a record with "step" to timings.jsonl."""
        _append_line(self.timings, record)

    def truncate_logs(self, step: int) -> None:
        """Forget what metrics.jsonl and timings.jsonl say of later steps than `step`, and a torn last line."""
        for log, read in ((self.metrics, self.read_metrics), (self.timings, self.read_timings)):
            if log.exists():
                write_atomically(log, b"".join(_line(record) for record in read() if record["step"] <= step))

    def log_sums(self) -> dict[str, str]:
        """Checksums of metrics.jsonl and timings.jsonl as they stand, by name."""
        return {log.name: sha256_of(log) for log in (self.metrics, self.timings) if log.exists()}

    def require_logs(self, sums: Mapping[str, str]) -> None:
        """Raises UserError for a log that is not as it was when `log_sums` gave `sums`."""
        for log in (self.metrics, self.timings):
            if log.name in sums and (not log.exists() or sha256_of(log) != sums[log.name]):
                raise UserError(f"run: {log.name} must hold what the run wrote, got a changed file in '{self.path}'")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl; a torn last line is left out, with a word."""
        return _read_lines(self.metrics, METRICS_LINE, self.say) if self.metrics.exists() else []

    def read_timings(self) -> list[dict[str, Any]]:
        """All records of timings.jsonl; a torn last line is left out, with a word."""
        return _read_lines(self.timings, TIMINGS_LINE, self.say) if self.timings.exists() else []

    def events(self, resumed_at: int | None = None) -> Events:
        """A new file in tensorboard/. resumed_at: the last step to keep of earlier ones."""
        from gradientless.run.events import Events

        return Events(self.tensorboard, resumed_at)

    # --- whole files -----------------------------------------------------------------------------------------------

    def write_environment(self, device: str) -> None:
        """environment.json: what a reader needs to judge numbers; no name of host, user or path."""
        import torch

        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        record = {
            "versions": versions,
            "system": platform.system(),
            "machine": platform.machine(),
            "device": device,
            "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        write_json(self.environment, record)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_sealed(self.summary, summary)

    def read_summary(self, schema: Schema = SUMMARY) -> dict[str, Any]:
        """summary.json. Raises UserError when the run has not ended, or the file is not as it was written."""
        if not self.summary.exists():
            raise UserError(f"run: must have ended, got '{self.path}' without {self.summary.name}")
        return read_sealed(self.summary, "run", schema)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], step: int, kind: str = CHECKPOINT
    ) -> Path:
        """Write checkpoint-`step`/ (best-`step`/ for kind BEST) whole; then remove the older ones of its kind.

        tensors: any names. state: JSON-able.
        """
        from safetensors.torch import save_file

        for log in (self.trajectory, self.metrics, self.timings):
            if log.exists():
                sync(log)  # a checkpoint must not be older on the disk than what it is resumed with
        place = self.path / f"{kind}-{step}"
        with replacing(place) as temporary:
            file = temporary / "tensors.safetensors"
            save_file(_own_storage(tensors), file)
            record = {"format": FORMAT, "step": step, "tensors": sha256_of(file), "state": state}
            (temporary / "state.json").write_text(json.dumps(sealed(json.loads(json.dumps(record))), indent=1), "utf-8")
        for other in self._saved(kind):
            if other != place:
                remove(other)
        return place

    def drop_older(self, step: int, kind: str = CHECKPOINT) -> None:
        """Remove checkpoints of earlier steps, which a run that was killed before it removed them left."""
        for other in self._saved(kind):
            if _step_of(other) < step:
                remove(other)

    def load_checkpoint(self, kind: str = CHECKPOINT, device: str = "cpu") -> Saved | None:
        """(tensors, state, step) of the newest good checkpoint, or None when the run has none yet.

        Tensors are read one by one, as they are asked for.
        A corrupted one is passed over, with a word; when all are corrupted, a UserError says so.
        """
        from safetensors import SafetensorError

        failures, places = [], self._saved(kind)
        for place in places:
            try:
                record = _state(place / "state.json")
                if record["step"] != _step_of(place):
                    raise ValueError(f"state.json is of step {record['step']}")
                if sha256_of(place / "tensors.safetensors") != record["tensors"]:
                    raise ValueError("tensors.safetensors does not match its checksum")
                tensors = SavedTensors(place / "tensors.safetensors", device)
                loaded = tensors, record["state"], record["step"]
            except (OSError, ValueError, SafetensorError) as error:
                failures.append(f"checkpoint {place}: corrupted ({_reason(error)})")
                continue
            for failure in failures:
                self.say(f"{failure}; continuing from {place.name}")
            return loaded
        if self._saved(kind) != places:  # whoever writes the run has gone on meanwhile
            return self.load_checkpoint(kind, device)
        if failures:
            raise UserError("\n".join(f"{line}; must be whole, or be deleted to start anew" for line in failures))
        return None

    def _saved(self, kind: str) -> list[Path]:
        """The checkpoints of a kind, newest first; one that a kill left half replaced comes after its successor."""
        found = []
        for place in self.path.iterdir():
            if match := re.fullmatch(rf"{kind}-(\d+)(-superseded)?", place.name):
                found.append((int(match[1]), match[2] is None, place))
        return [place for _, _, place in sorted(found, reverse=True)]

    def sweep(self) -> None:
        """Remove what a killed writer left behind under temporary names."""
        for place in self.path.iterdir():
            if is_temporary(place.name):
                remove(place)


Saved = tuple[Mapping[str, "Tensor"], dict[str, Any], int]
"""Tensors, state and step of a checkpoint."""


class SavedTensors(Mapping[str, "Tensor"]):
    """The tensors of a file, each read when it is asked for and not kept: a model's worth of them takes no memory."""

    def __init__(self, file: Path, device: str = "cpu"):
        self._file, self._device = file, device
        with self._open() as opened:
            self._names = tuple(opened.keys())

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self._file, framework="pt", device=self._device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with self._open() as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def short_name(name: str, most: int = 120) -> str:
    """`name` as that of a folder, which systems allow 255 bytes: the end of a longer one is a checksum."""
    if len(name.encode()) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: most - 9].decode(errors='ignore')}-{digest}"


def free_name(path: Path) -> Path:
    """`path`, or path-2, path-3, … : the first that does not exist."""
    return next(
        p
        for p in itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
        if not p.exists()
    )


def newest_of_name(path: Path) -> Path:
    """The last of path, path-2, path-3, … that exists; `path` when none does."""
    newest = path
    for n in itertools.count(2):
        if not path.with_name(f"{path.name}-{n}").exists():
            return newest
        newest = path.with_name(f"{path.name}-{n}")
    raise AssertionError("count() does not end")


def _state(file: Path) -> dict[str, Any]:
    """What state.json holds; ValueError where it was changed."""
    record = read_json(file, "run", {"format": COUNT, "sha256": str})
    if record["format"] == 1 and "tensors" not in record:
        record = {**record, "tensors": record["sha256"]}
    elif record["format"] != FORMAT:
        raise ValueError(f"state.json is not of format {FORMAT}")
    else:
        try:
            record = unsealed("run", record, file)
        except UserError:
            raise ValueError("state.json does not match its checksum") from None
    fits("state.json", record, {"step": COUNT, "tensors": str, "state": dict})
    return dict(record)


def _step_of(place: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(place.name.removesuffix("-superseded").rpartition("-")[2])


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies where safetensors needs them: it refuses tensors that share memory."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return own


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    return " ".join(str(error).split())


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(record), allow_nan=False, separators=(", ", ": ")) + "\n").encode()


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    if "step" not in record:
        raise ValueError(f"{path.name}: a record must have 'step', got {sorted(record)}")
    append(path, _line(record))


def _read_lines(path: Path, schema: Schema, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The records of a log. The last line may be torn by a kill; any other that cannot be read is a UserError."""
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            fits(path.name, record, schema)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"run: {path.name} must hold one JSON object a line, got line {number}") from None
            say(f"{path.name}: the last line was torn and is left out (line {number})")
            break
        records.append(record)
    return records


def processor() -> str:
    """The processor's model, where the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
