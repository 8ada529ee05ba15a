"""Surfaces and schedules of one's own: trained by the name of their file, opened again, refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny_run
from gradientless import MeZO, lr_scheduler
from gradientless.errors import UserError
from gradientless.language.surfaces import load
from gradientless.run.assemble import make_rates
from gradientless.run.config import RunConfig
from gradientless.run.named import blamed
from gradientless.run.runfolder import RunFolder
from pages import ROOT, blocks
from tiny_run import gradientless

FILES = {
    block.note: block.text for block in blocks(ROOT / "docs" / "api.md") if block.note in ("norms.py", "falling.py")
}
OWN = ("--surface", "norms.py:Norms", "surface.biases=false", "schedule.name=falling.py:falling")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, rows, the documented files, and a run by them."""
    place = tmp_path_factory.mktemp("own")
    tiny_run.make_model(place / "model")
    tiny_run.write_table(place / "rows.csv", count=40)
    for name, text in FILES.items():
        (place / name).write_text(text, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert gradientless(*training("run", *OWN)) == 0
    return place


def training(out: str, *more: str) -> list[str]:
    files = ["--data", "rows.csv", "--model", "model", "--max-length", "16", "--device", "cpu"]
    return ["train", *files, "--batch-size", "8", "--steps", "4", "--optimizer", "mezo", "--out", out, *more]


@pytest.fixture
def here(place, tmp_path, monkeypatch) -> Path:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys) -> Callable[..., str]:
    """The only line on standard error of a command that ends with code 2 and leaves no run."""

    def line(*arguments: str) -> str:
        capsys.readouterr()
        assert gradientless(*arguments) == 2
        told = capsys.readouterr().err.rstrip("\n").split("\n")
        assert not (here / "new").exists()
        told = [line for line in told if not line.startswith(("train  ", "validation ", "Writing model"))]
        return " ".join(told)

    return line


class TestSurface:
    def test_what_it_tunes_is_what_its_file_says(self, here):
        tuned = RunFolder(here / "run").load_checkpoint()[0]
        names = [name for name in tuned if "LayerNorm" in name]
        assert names and all(name.endswith("weight") for name in names)
        assert all("LayerNorm" in name or "classifier" in name or "pooler" in name for name in tuned)

    def test_its_folder_opens_where_the_file_is_trusted(self, here, capsys):
        rows = ["--data", "rows.csv"]
        for command in (
            ["predict", "run", "good"],
            ["eval", "run"],
            ["replay", "run", "--out", "replayed"],
            ["export", "run", "--out", "exported"],
            ["predict", "exported", "good"],
            ["eval", "exported", *rows],
            ["predict", "replayed", "good"],
            ["train", str(here / "run" / "config.toml"), "--out", "again", *rows],
        ):
            assert gradientless(*command) == 2
            told = capsys.readouterr().err
            assert told.startswith("code: must be named on this command line") and "'norms.py:Norms'" in told
            assert told.count("\n") == 1
            assert gradientless(*command, "--trust-code") == 0, capsys.readouterr().err
        weights = [(Path(each) / "base" / "model.safetensors").read_bytes() for each in ("run/model", "replayed")]
        assert weights[0] == weights[1]

    def test_the_answers_are_the_same_wherever_it_was_saved(self, here, capsys):
        assert gradientless("export", "run", "--out", "exported", "--trust-code") == 0
        capsys.readouterr()
        answers = []
        for folder in ("run", "exported"):
            assert gradientless("predict", folder, "a good film", "dull", "--trust-code") == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1]

    def test_the_last_lines_say_how(self, here, capsys):
        shutil.rmtree("run")
        assert gradientless(*training("run", *OWN)) == 0
        found = capsys.readouterr()
        told = " ".join(found.out.split())
        assert "cannot be opened again" not in " ".join(found.err.split())
        assert "gradientless predict run 'a text' --trust-code" in told
        assert "gradientless replay run --trust-code" in told

    def test_its_file_is_known_by_its_checksum(self, here, capsys):
        text = (here / "run" / "config.toml").read_text("utf-8")
        for name in ("norms.py:Norms", "falling.py:falling"):
            assert re.search(rf"^# sha256 of the code '{re.escape(name)}': [0-9a-f]{{64}}$", text, re.MULTILINE)
        (here / "norms.py").write_text((here / "norms.py").read_text("utf-8") + "\n# changed\n", "utf-8")
        for command in (["predict", "run", "good"], ["eval", "run"], ["export", "run", "--out", "exported"]):
            capsys.readouterr()
            assert gradientless(*command, "--trust-code") == 0
            told = capsys.readouterr().err
            assert told.count("other code  'norms.py:Norms' is not what it was when the run began\n") == 1, told

    def test_a_run_goes_on_with_the_same_file_alone(self, here, capsys):
        resumed = ["train", "--out", "run", "--resume", *OWN]
        (here / "run" / "summary.json").unlink()
        assert gradientless(*resumed) == 0
        (here / "run" / "summary.json").unlink()
        for name, key in (("falling.py", "falling"), ("norms.py", "Norms")):
            (here / name).write_text(FILES[name] + "\n# changed\n", "utf-8")
            assert gradientless(*resumed) == 2
            assert f"{name}:{key}" in capsys.readouterr().err.rstrip("\n").split("\n")[-1]
            (here / name).write_text(FILES[name], "utf-8")

    def test_in_python_its_own_load_opens_it(self, here):
        with pytest.raises(UserError, match=r"must be opened by the class that saved it, 'norms\.py:Norms', got none"):
            load(here / "run" / "model")

    def test_in_stages_and_compare(self, here):
        stages = '[[stages]]\nname = "a"\n[stages.surface]\nname = "norms.py:Norms"\nbiases = false\n'
        (here / "two.toml").write_text(stages + '[[stages]]\n[stages.surface]\nname = "full"\n', "utf-8")
        recipe = training("staged", "two.toml", "--trust-code")
        recipe.remove("two.toml")
        assert gradientless("train", "two.toml", *recipe[1:]) == 0
        assert gradientless("replay", "staged", "--trust-code") == 0
        compared = ["compare", "--methods", "mezo", "--forward-passes", "4", "mezo:surface.name=norms.py:Norms"]
        files = ["--data", "rows.csv", "--model", "model", "data.max_length=16", "data.subset=[20, 4]"]
        assert gradientless(*compared, *files, "--out", "compared") == 0

    def test_whose_save_writes_no_note(self, here, capsys):
        """And which stands under nothing of ours but `Surface`."""
        (here / "alone.py").write_text(ALONE, "utf-8")
        assert gradientless(*training("new", "--surface", "alone.py:Alone")) == 0, capsys.readouterr().err
        note = json.loads((here / "new" / "model" / "gradientless.json").read_text("utf-8"))
        assert note["labels"] == ["negative", "positive"] and note["class"]["name"] == "alone.py:Alone"
        for command in (["predict", "new", "a good film"], ["eval", "new"], ["replay", "new"]):
            assert gradientless(*command, "--trust-code") == 0, capsys.readouterr().err
        assert "bit-equal to the run yes" in " ".join(capsys.readouterr().out.split())


ALONE = '''
import torch
from torch import nn
from transformers import AutoTokenizer
from gradientless.language.data import Encoded
from gradientless.language.surfaces.base import Part, PreparedTokens, Surface
from gradientless.language.surfaces.products import measure
from gradientless.language import backbone


class Alone(Surface):
    """A bag of tokens."""

    def __init__(self, tokenizer, labels, max_length):
        super().__init__()
        self.model = nn.EmbeddingBag(len(tokenizer), len(labels))
        self.tokenizer, self.labels, self.max_length, self.dropout = tokenizer, tuple(labels), max_length, 0.0

    @classmethod
    def create(cls, model, labels, *, seed, device, dtype, max_length):
        made = cls(backbone.load_tokenizer(model, max_length), labels, max_length)
        made.model.weight.data.zero_()
        return made

    @property
    def device(self):
        return self.model.weight.device

    @property
    def dtype(self):
        return torch.float32

    @property
    def width(self):
        return 1

    def trainable(self):
        return {"weight": self.model.weight}

    def parts(self):
        return {"model": Part("a bag", self.trainable())}

    def encode(self, examples):
        return Encoded(self.tokenizer, examples, self.max_length, len(self.tokenizer))

    def prepare(self, batch):
        return PreparedTokens(batch)

    def repeated(self, prepared, times):
        return PreparedTokens({k: v.repeat(times, 1) for k, v in prepared.tensors.items()}, times)

    def logits(self, prepared, generator=None):
        return self.model(prepared.tensors["input_ids"])

    def products(self):
        return measure(self)

    def describe(self):
        return "a bag"

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        kept = {"weight": self.model.weight.data, "labels": self.labels, "most": self.max_length}
        torch.save(kept, folder / "bag.pt")

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        kept = torch.load(folder / "bag.pt", weights_only=True)
        made = cls(AutoTokenizer.from_pretrained(folder), kept["labels"], kept["most"])
        made.model.weight.data.copy_(kept["weight"])
        return made
'''

WRONG = """
from gradientless.language.surfaces import FullSurface, HeadSurface, Surface
class Plain:
    pass
class Lacks(Surface):
    def trainable(self):
        return {}
class Raises(HeadSurface):
    @classmethod
    def create(cls, model, labels, **more):
        return {}["what"]
class Later(FullSurface):
    def logits(self, prepared, generator=None):
        return super().logits(prepared, generator)[:, 10**6]
class Nothing(HeadSurface):
    @classmethod
    def create(cls, *args, **more):
        return None
class Frozen(FullSurface):
    @classmethod
    def create(cls, model, labels, **more):
        made = super().create(model, labels, **more)
        made.requires_grad_(False)
        return made
def f(progress, floor, cycles):
    return "much"
def falls(progress, floor, cycles):
    return float("nan") if progress > 0.5 else 1.0
def minus(progress, floor, cycles):
    return -1.0
def divides(progress, floor, cycles):
    return 1 / progress
def two(progress, floor):
    return 1.0
"""

ABSTRACT = "create, describe, device, dtype, encode, load, logits, parts, prepare, products, repeated, save, width"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("surface.name=wrong.py:Plain", "surface: 'wrong.py:Plain' must be a gradientless.language.surfaces.Surface, "),
        ("surface.name=wrong.py:Lacks", f"must have the methods of a Surface, got none called {ABSTRACT}"),
        ("surface.name=wrong.py:Raises", "'wrong.py:Raises' must be made without an error, got KeyError: 'what'"),
        ("surface.name=wrong.py:Nothing", "surface: create of 'wrong.py:Nothing' must return a Surface, got NoneType"),
        ("surface.name=wrong.py:Frozen", "must have tensors to tune, which require a gradient, got none"),
        ("surface.name=wrong.py:f", "surface: unknown class of wrong.py 'f'"),
        ("surface.name=nowhere.py:A", "surface: must name an existing file in 'file.py:Class', got 'nowhere.py:A'"),
        ("surface.name=neighbour.py:A", "could not be run (ModuleNotFoundError: No module named 'beside_it')"),
        ("surface.name=ends.py:A", "surface: ends.py could not be run (SystemExit: 3)"),
        ("surface.name=norms.py:Norms surface.bias=true", "option of norms.py:Norms 'bias'; did you mean 'biases'?"),
        ("surface.name=norms.py:Norms surface.biases=3", "surface.biases: must be true or false, got 3"),
        ("surface.name=norms.py:Norms surface.seed=3", "surface: unknown option of norms.py:Norms 'seed'"),
        ("surface.biases=true", "surface: unknown key 'biases'"),
        ("schedule.name=wrong.py:f", "schedule: 'f' must return a finite number >= 0, got 'much' at progress 0"),
        ("schedule.name=wrong.py:falls", "'falls' must return a finite number >= 0, got nan at progress 0."),
        ("schedule.name=wrong.py:minus", "schedule: 'minus' must return a finite number >= 0, got -1.0 at progress 0"),
        ("schedule.name=wrong.py:divides", "'divides' must return a finite number >= 0, got ZeroDivisionError: "),
        ("schedule.name=wrong.py:two", "schedule: 'two' must return a finite number >= 0, got TypeError: "),
        ("schedule.name=wrong.py:none", "schedule: unknown function of wrong.py 'none'"),
        ("tensors=[{pattern='*',schedule={name='wrong.py:f'}}]", "schedule: 'f' must return a finite number >= 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(setting, told, here, refused):
    (here / "wrong.py").write_text(WRONG, "utf-8")
    (here / "neighbour.py").write_text("import beside_it\nclass A: pass\n", "utf-8")
    (here / "beside_it.py").write_text("", "utf-8")
    (here / "ends.py").write_text("raise SystemExit(3)\n", "utf-8")
    line = refused(*training("new", *setting.split()))
    assert line.count(told) == 1


def test_what_it_raises_while_it_runs_is_one_line_with_its_place(here, refused):
    (here / "wrong.py").write_text(WRONG, "utf-8")
    line = refused(*training("new", "--surface", "wrong.py:Later"))
    number = 1 + WRONG.split("\n").index("        return super().logits(prepared, generator)[:, 10**6]")
    assert "code: must not raise, got IndexError: index 1000000 is out of bounds" in line
    assert line.endswith(f"in logits, line {number} of {here / 'wrong.py'}")


def test_an_error_of_ours_is_not_blamed_on_it():
    with pytest.raises(KeyError, match="ours"), blamed():
        raise KeyError("ours")


class TestSchedule:
    def test_in_a_loop_of_ones_own(self):
        optimizer = MeZO([("w", nn.Parameter(torch.zeros(3)))], lr=0.5)
        scheduler = lr_scheduler(optimizer, lambda progress, floor, cycles: 1 - progress / 2, total=4, warmup=2)
        rates = []
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step(lambda: 0.0)
            scheduler.step()
        assert rates == [0.25, 0.5, 0.5, 0.375]

    def test_moves_the_rates_of_a_run(self, here):
        own = ["schedule.name=falling.py:falling", "schedule.floor=0.5"]
        groups = SimpleNamespace(param_groups=[{"lr": 2.0}])
        rates = make_rates(RunConfig.load(None, own), groups, None, steps=4)  # type: ignore[arg-type]
        assert [rates(t)[0] for t in range(4)] == [2.0, 1.5625, 1.25, 1.0625]
