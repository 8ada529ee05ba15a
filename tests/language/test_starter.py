"""The starter assets without a network: a wheel made by hand stands where pip would have put it."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gradientless.errors import UserError
from gradientless.language import backbone, starter

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
    assert sorted(starter.ASSETS) == ["minilm", "movie-reviews", "smollm2"]
    for asset in starter.ASSETS.values():
        assert len(asset.sha256) == 64 and asset.kind in ("model", "data")
        assert dataclasses.replace(asset) == asset


# --- models that are made of an asset once ----------------------------------------------------------------------------


def test_a_model_is_converted_once_and_again_when_damaged(shop, tmp_path, monkeypatch, capsys):
    toy = shop(GOOD)
    monkeypatch.setattr(starter, "ASSETS", {"toy": dataclasses.replace(toy, converted=5)})
    made = []

    def convert(entry: Path, folder: Path) -> None:
        made.append(entry)
        (folder / "model.safetensors").write_bytes(b"large")

    folder = starter.converted("toy", convert)
    assert "turning data.csv into float32 weights" in " ".join(capsys.readouterr().err.split())
    assert made[0].read_bytes() == GOOD["toy/data.csv"] and folder.is_relative_to(tmp_path / "cache")
    assert starter.converted("toy", convert) == folder and len(made) == 1
    assert starter.status()[0].size == sum(map(len, GOOD.values())) + 5
    (folder / "model.safetensors").write_bytes(b"cut")
    assert starter.converted("toy", convert) == folder and len(made) == 2 and len(shop.calls) == 1
    assert "is damaged and is made again" in " ".join(capsys.readouterr().err.split())


def test_a_conversion_that_fails_leaves_nothing(shop, tmp_path, monkeypatch):
    toy = shop(GOOD)
    monkeypatch.setattr(starter, "ASSETS", {"toy": dataclasses.replace(toy, converted=5)})

    def convert(entry: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise UserError("toy: broken")

    with pytest.raises(UserError, match="toy: broken"):
        starter.converted("toy", convert, show=False)
    assert not list((tmp_path / "cache" / "models").iterdir())


def tiny_gguf(path: Path, begins: bool | None = None) -> dict[str, np.ndarray]:
    """A Llama of one layer in 4 bits, with a byte-level tokenizer; the weights as they stand in the file."""
    import gguf
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "go", "od"]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["g o", "o d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    if begins is not None:
        writer.add_add_bos_token(begins)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,)}
    layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
    layer |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "ffn_norm": (32,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    generator, stored = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(values, kind)
        stored[name] = gguf.quants.dequantize(packed, kind).reshape(shape)
        writer.add_tensor(name + ".weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.mark.parametrize(("begins", "tokens"), [(None, []), (False, []), (True, ["<end>"])])
def test_a_text_begins_with_a_token_where_the_file_says_so(begins, tokens, tmp_path):
    tiny_gguf(tmp_path / "tiny.gguf", begins)
    (tmp_path / "made").mkdir()
    backbone._dequantise(tmp_path / "tiny.gguf", tmp_path / "made")
    tokenizer = backbone.load_tokenizer(str(tmp_path / "made"), 64)
    assert tokenizer.convert_ids_to_tokens(tokenizer("good")["input_ids"]) == [*tokens, "go", "od"]


def test_a_4_bit_model_becomes_a_plain_folder(tmp_path):
    stored = tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "made").mkdir()
    state = torch.get_rng_state()
    backbone._dequantise(tmp_path / "tiny.gguf", tmp_path / "made")
    assert torch.equal(state, torch.get_rng_state())
    for dtype in ("float32", "bfloat16"):
        model = backbone.load_language_model(str(tmp_path / "made"), "causal", dtype)
        assert {str(tensor.dtype) for tensor in model.parameters()} == {f"torch.{dtype}"}
        embedding = torch.from_numpy(stored["token_embd"]).to(backbone.dtype_of(dtype))
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        down = model.model.layers[0].mlp.down_proj.weight
        assert torch.equal(down, torch.from_numpy(stored["blk.0.ffn_down"]).to(down.dtype))
    assert not hasattr(model.config, "quantization_config")
    tokenizer = backbone.load_tokenizer(str(tmp_path / "made"), 64)
    assert tokenizer.convert_ids_to_tokens(tokenizer("good")["input_ids"]) == ["go", "od"]
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model: tiny\.gguf could not be read") as caught:
        backbone._dequantise(tmp_path / "tiny.gguf", tmp_path / "made")
    assert "\n" not in str(caught.value)


def test_the_starter_language_model_resolves_to_its_folder(shop, tmp_path, monkeypatch):
    toy = shop({"toy/data.csv": b"gguf"})
    monkeypatch.setattr(starter, "ASSETS", {"toy": dataclasses.replace(toy, kind="model", converted=5)})
    monkeypatch.setattr(backbone, "_dequantise", lambda entry, folder: (folder / "config.json").write_text("{}"))
    folder = Path(backbone.resolve("starter:toy"))
    assert (folder / "config.json").read_text() == "{}" and folder.is_relative_to(tmp_path / "cache")
