"""What a run says of its model: whether it reads padding, and whether what was saved is what was tuned."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLES, make_tokenizer

import tiny_run
from gradientless import cli
from gradientless.language.surfaces import SURFACES, HeadSurface
from gradientless.language.surfaces.saved import note_files
from gradientless.run.evaluation import reads_padding, saved_otherwise

LABELS = ("bad", "good")
SMALL = {"vocab_size": 14, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": t.BertConfig(max_position_embeddings=32, **SMALL),
    "roberta": t.RobertaConfig(max_position_embeddings=34, pad_token_id=0, type_vocab_size=2, **SMALL),
    "gpt2": t.GPT2Config(vocab_size=14, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "fnet": t.FNetConfig(max_position_embeddings=32, **SMALL),
    "convbert": t.ConvBertConfig(max_position_embeddings=32, embedding_size=16, **SMALL),
    "nystromformer": t.NystromformerConfig(
        max_position_embeddings=32, num_landmarks=32, segment_means_seq_len=32, **SMALL
    ),
    "mobilebert": t.MobileBertConfig(
        max_position_embeddings=32, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16, **SMALL
    ),
}  # fmt: skip
READ = ("fnet", "convbert", "nystromformer", "mobilebert")


@pytest.fixture
def make(tmp_path):
    def surface(kind: str, name: str = "head", **options):
        folder = tmp_path / kind
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = t.AutoModel.from_config(CONFIGS[kind])
                for tensor in model.parameters():
                    if tensor.ndim > 1:
                        torch.nn.init.normal_(tensor, 0, 0.3)
            model.save_pretrained(folder)
            make_tokenizer(True).save_pretrained(folder)
        more = {} if name == "head" else {"readout": "head"}
        return SURFACES[name].create(str(folder), LABELS, max_length=20, **more, **options)

    return surface


class TestPadding:
    @pytest.mark.parametrize("kind", CONFIGS)
    @pytest.mark.parametrize("surface", ["head", "full"])
    def test_is_told_where_it_is_read(self, kind, surface, make):
        told = reads_padding(make(kind, surface), EXAMPLES, "classification")
        if kind in READ:
            assert told.startswith("a row's scores change with the length of those beside it, here by ")
        else:
            assert told is None

    def test_is_told_once_by_a_run(self, make, tmp_path, capsys):
        rows = tiny_run.write_table(tmp_path / "rows.csv")
        for kind in ("bert", "fnet"):
            make(kind)
            with pytest.raises(SystemExit):
                cli.main(["train", "--data", rows, "--model", str(tmp_path / kind), "--steps", "2", "--max-length",
                          "20", "--out", str(tmp_path / f"run-{kind}")])  # fmt: skip
            assert capsys.readouterr().err.count("\npadding ") == (kind == "fnet")


class TestSaved:
    @pytest.mark.parametrize("name", ["head", "full", "lora", "bias"])
    def test_as_it_was_tuned(self, name, make, tmp_path):
        surface = make("bert", name)
        with torch.no_grad():
            for tensor in surface.trainable().values():
                tensor.add_(0.1)
        surface.save(tmp_path / "saved")
        assert saved_otherwise(surface, tmp_path / "saved", EXAMPLES, "classification") is None
        assert not any(tensor.numel() for tensor in surface.parameters()), "there is never a second copy"

    @pytest.mark.parametrize("name", ["head", "full", "lora", "bias"])
    def test_otherwise_is_told(self, name, make, tmp_path):
        surface = make("bert", name)
        surface.save(tmp_path / "saved")
        with torch.no_grad():
            for tensor in surface.trainable().values():
                tensor.mul_(1.1).add_(0.01)
        told = saved_otherwise(surface, tmp_path / "saved", EXAMPLES, "classification")
        assert told.startswith("gives other scores than were found when it was saved, by up to ")

    def test_what_cannot_be_opened_is_told(self, make, tmp_path):
        surface = make("bert")
        surface.save(tmp_path / "saved")
        (tmp_path / "saved" / "gradientless.json").write_text("{", encoding="utf-8")
        told = saved_otherwise(surface, tmp_path / "saved", EXAMPLES, "classification")
        assert told.startswith("cannot be opened again: ")

    def test_a_run_says_so(self, make, tmp_path, capsys, monkeypatch):
        rows, save = tiny_run.write_table(tmp_path / "rows.csv"), HeadSurface.save
        make("bert")

        def rounding(surface, folder, *more):
            save(surface, folder, *more)
            tensors = load_file(folder / "model.safetensors")
            name = "classifier.weight"
            save_file(tensors | {name: (tensors[name] * 8).round() / 8}, folder / "model.safetensors", {"format": "pt"})
            note_files(folder)

        for name in ("well", "rounded"):
            if name == "rounded":
                monkeypatch.setattr(HeadSurface, "save", rounding)
            with pytest.raises(SystemExit) as ended:
                cli.main(["train", "--data", rows, "--model", str(tmp_path / "bert"), "--steps", "2", "--max-length",
                          "20", "--out", str(tmp_path / name)])  # fmt: skip
            assert not ended.value.code
            told = " ".join(capsys.readouterr().err.split())
            assert ("gives other scores than were found when it was saved" in told) == (name == "rounded")
