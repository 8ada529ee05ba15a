"""What may happen to the bytes of the files that are read back, and what each of them is read by."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_run
from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.kept import kept
from gradientless.language.starter import MANIFEST, _sizes, _write_manifest
from gradientless.language.surfaces.saved import NOTE, read_note
from gradientless.run.compare import RESULT
from gradientless.run.evaluation import load_surface
from gradientless.run.lock import LOCK, locked
from gradientless.run.runfolder import RunFolder
from gradientless.run.sealed import write_sealed
from gradientless.schema import read_sealed
from gradientless.search.trajectory import Trajectory

Damage = Callable[[bytes], bytes]
ASSET = {"model.safetensors": 8, "vocab.txt": 3}


def make(place: Path) -> Path:
    """Puts into `place` an ended run, one that was stopped (its copy without an end), and one by AdamW."""
    files = tiny_run.make_model(place / "model"), tiny_run.write_table(place / "rows.csv", count=30)
    for name, optimizer, rate in (("ended", "gld", "optimizer.radius=0.1"), ("adamw", "adamw", "optimizer.lr=1e-2")):
        more = (rate, "checkpoint_every=4", "evaluate_every=4", "log_every=2")
        assert (
            tiny_run.gradientless(*tiny_run.arguments(*files, place / name, *more, steps=8, optimizer=optimizer)) == 0
        )
    for name, of in (("stopped", "ended"), ("adamw-stopped", "adamw")):
        shutil.copytree(place / of, place / name)
        (place / name / "summary.json").unlink()
    asset = place / "asset"
    asset.mkdir()
    for file, size in ASSET.items():
        (asset / file).write_bytes(bytes(size))
    _write_manifest(asset, ASSET)
    kept_array(place, lambda told: None)
    metrics = {"accuracy": 0.5, "f1": 0.25, "loss": 1.5}
    write_sealed(
        place / "mezo-seed1.json",
        {"method": "mezo", "options": {}, "config": {"seed": 1}, "metrics": metrics, "forward_passes": 8,
         "seconds": 1.5, "peak_memory_mib": 2.0, "texts_cut": 0},
    )  # fmt: skip
    return place


def kept_array(place: Path, damaged: Callable[[str], None]) -> np.ndarray[Any, Any]:
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, wanted)

    return np.array(kept(place / "features.npy", write, damaged, (3, 4)))


def records(place: Path) -> object:
    """Header, records and their check sum, which a summary and a checkpoint name; a torn end is told of in a line."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        log = Trajectory.read(place / "ended" / "trajectory.bin")
    if told:
        raise UserError(str(told[0].message))
    if log.check(len(log)) != read_sealed(place / "ended" / "summary.json", "run")["trajectory"]:
        raise UserError("replay: another check sum")
    return log.header, list(log)


def lines(place: Path, name: str) -> object:
    """A log of lines, as a resumed run reads it."""
    folder = RunFolder(place / "stopped")
    found = folder.load_checkpoint()
    assert found is not None
    before = (folder.path / name).read_bytes()
    try:
        folder.truncate_logs(found[2])
        folder.require_logs(found[1]["logs"])
        return (folder.path / name).read_bytes()
    finally:
        (folder.path / name).write_bytes(before)


def state(place: Path, kind: str) -> object:
    found = RunFolder(place / "stopped", say=lambda line: None).load_checkpoint(kind)
    assert found is not None
    return found[1:]


def weights(place: Path) -> object:
    found = RunFolder(place / "stopped", say=lambda line: None).load_checkpoint()
    assert found is not None
    return {name: tensor.tolist() for name, tensor in found[0].items()}


def model(place: Path) -> object:
    """What eval, predict and export open."""
    surface = load_surface(place / "ended", "cpu")
    return backbone.checksum(surface), backbone.settings(surface), surface.tokenizer.get_vocab()


def lock(place: Path) -> object:
    with locked(place / "stopped", lambda line: None):
        return (place / "stopped" / LOCK).read_text("utf-8")


SAVED = ("body/model.safetensors", "head.safetensors", "body/config.json", "body/tokenizer.json")
SAVED += ("body/tokenizer_config.json",)
FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.toml": ("ended/config.toml", lambda place: RunFolder(place / "ended").read_config().resolved()),
    "summary.json": ("ended/summary.json", lambda place: RunFolder(place / "ended").read_summary()),
    "trajectory.bin": ("ended/trajectory.bin", records),
    "metrics.jsonl": ("stopped/metrics.jsonl", lambda place: lines(place, "metrics.jsonl")),
    "timings.jsonl": ("stopped/timings.jsonl", lambda place: lines(place, "timings.jsonl")),
    "state.json": ("stopped/checkpoint-8/state.json", lambda place: state(place, "checkpoint")),
    "gradientless.json": (f"ended/model/{NOTE}", lambda place: read_note(place / "ended" / "model")),
    "asset.json": (f"asset/{MANIFEST}", lambda place: _sizes(place / "asset") or one_line_of("asset.json")),
    "tensors.safetensors": ("stopped/checkpoint-8/tensors.safetensors", weights),
    ".lock": (f"stopped/{LOCK}", lock),
    **{f"model/{name}": (f"ended/model/{name}", model) for name in SAVED},
    "features.npy": ("features.npy", lambda place: kept_array(place, lambda told: None).tolist()),
    "mezo-seed1.json": ("mezo-seed1.json", lambda place: read_sealed(place / "mezo-seed1.json", "--out", RESULT)),
}


def one_line_of(name: str) -> None:
    raise UserError(f"{name}: is made again")


def require_one_line(error: UserError) -> None:
    assert str(error) and "\n" not in str(error), str(error)


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What may happen to the bytes of a file: some are others, are lost, are put in, are doubled, or it ends early."""
    at, until = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    other = draw(st.binary(max_size=12))
    flip = draw(st.integers(1, 255))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "replace", "lose", "double", "empty"]))

    def damage(content: bytes) -> bytes:
        i, j = int(at * (len(content) - 1)), int(until * len(content))
        return {
            "flip": content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :],
            "cut": content[:i],
            "insert": content[:i] + other + content[i:],
            "replace": content[:i] + other + content[i + len(other) :],
            "lose": content[:i] + content[j:],
            "double": content[:j] + content[i:],
            "empty": b"",
        }[kind]

    return damage


def often(count: int) -> settings:
    """How often something is tried; the same things each time."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def tried(place: Path, name: str, count: int) -> Counter[str]:
    """Damage the file `name` of `make` so often. Returns how often it was read as it was, and how often one line was
    told; raises AssertionError, or whatever else was raised, where it was neither."""
    path, read = FILES[name]
    file = place / path
    content = file.read_bytes() if file.exists() else b"1 host"  # of a lock, which is there while one holds it
    truth = read(place)
    counted: Counter[str] = Counter()

    @often(count)
    @given(damages())
    def holds(damage: Damage) -> None:
        file.write_bytes(damage(content))
        try:
            assert read(place) == truth
            counted["read as it was"] += 1
        except UserError as error:
            require_one_line(error)
            counted["one line"] += 1

    try:
        holds()
    finally:
        file.write_bytes(content)
    return counted
