"""`gradientless profile`: what it measures of a tiny model, what it refuses, and which batch fits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gradientless import cli
from gradientless.errors import UserError
from gradientless.run import profile
from gradientless.run.memory import PeakMemory, TensorBytes, give_back
from gradientless.run.profile import USUAL, Case, Figures, Fit, Measured, cases, measure, measured, read_size

SMALL = {"batch_size": 4, "data.max_length": 12, "device": "cpu"}


def in_process(case: Case, steps: int = 1, threads: int | None = None) -> Measured:
    """As `measured`, without a process."""
    if case.config is None:
        return Measured(case, None, case.why)
    asked = {"config": case.config.resolved(), "inference": case.optimizer is None, "steps": 1, "threads": None}
    answer = json.loads(json.dumps(profile._answer(asked)))
    return Measured(case, None, answer["why"]) if "why" in answer else Measured(case, Figures(**answer))


def figures(model, surface, optimizer, *settings, **flags) -> Figures:
    *_, case = cases([model], [surface], [optimizer], settings, SMALL | flags)
    return measure(case.config, steps=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4096), ("4 gib", 4096), ("512MiB", 512), ("1.5 GiB", 1536), ("8GB", 8e9 / 2**20), ("1048576B", 1)],
)
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["4 apples", "4", "GiB", "-4GiB", "0GiB", "4GiB more", "4iB", "", "1e9B"])
def test_what_is_no_size_is_one_line(text):
    with pytest.raises(UserError) as caught:
        read_size(text)
    assert str(caught.value) == f"--fits: must be a size of memory such as 4GiB or 800MB, got '{text}'"


def test_tensors_are_counted_while_they_live():
    with TensorBytes() as counter:
        a = torch.ones(1000)
        b = a * 2
        a.add_(b)
        view = b.view(10, 100)
        del b
        assert counter.peak == 8000
        del view
        torch.ones(500)
        assert counter.peak == 8000
        kept = torch.ones(1500)
        assert counter.peak == 10000
    assert kept.numel() == 1500


def test_a_peak_is_above_the_start_and_can_begin_again():
    memory = PeakMemory("cpu")
    block = torch.ones(20_000_000)
    first = memory.mib()
    assert 75 < first < 150
    del block
    give_back()
    memory.again()
    later = memory.mib()
    assert later <= first and (later < 30 or sys.platform != "linux")


def test_freed_memory_is_not_loaded_memory():
    """The C library keeps what lies between pieces in use; its next use is above the start."""
    pieces = [torch.ones(size) for size in (25_000, 10) * 1000]
    small = pieces[1::2]
    del pieces
    memory = PeakMemory("cpu")
    again = [torch.ones(25_000) for _ in range(1000)]
    assert 85 < memory.mib() < 150 and len(small) == len(again)


def test_parts_have_peaks_of_their_own():
    memory = PeakMemory("cpu")
    sizes = {"large": 20_000_000, "small": 1_000_000}
    for part in ("small", "large", "small"):
        block = torch.ones(sizes[part])
        del block
        memory.end(part)
    assert 75 < memory.peaks["large"] == memory.highest < 150
    assert memory.peaks["small"] < 30 or sys.platform != "linux"


class TestFigures:
    def test_what_backpropagation_keeps(self, tiny_model):
        """AdamW holds a gradient and two moments of every weight; MeZO, walking, none of them."""
        adamw = figures(tiny_model, "full", "adamw")
        mezo = figures(tiny_model, "full", "mezo", "optimizer.evaluator=walk")
        assert adamw.weights == mezo.weights > 0.02 and adamw.tensors > 3 * adamw.weights
        assert mezo.tensors < adamw.tensors - 2.9 * adamw.weights
        assert adamw.products > 0 == mezo.products and adamw.start is mezo.start is None
        assert adamw.tuned == mezo.tuned and adamw.share == mezo.share == 1
        assert 4 * adamw.tuned == pytest.approx(adamw.weights * 2**20, rel=0.02)  # and buffers of whole numbers
        assert adamw.seconds > 0 and adamw.loaded > adamw.weights and adamw.peak >= 0

    def test_the_figures_are_the_surfaces(self, tiny_model):
        from gradientless.language.surfaces.side_lora import SideLoraSurface

        found = figures(tiny_model, "side_lora", "adamw", "surface.rank=2")
        counted = SideLoraSurface.create(tiny_model, ("a", "b"), rank=2, max_length=12).products()
        assert (found.tuned, found.registered, found.share) == (counted.tuned, counted.registered, counted.share)
        assert (found.products, found.multiplies) == (counted.calls, counted.multiplies)
        assert found.touched == counted.touched >= found.tuned

    def test_what_is_done_before_the_first_step_stands_alone(self, tiny_model):
        assert figures(tiny_model, "lst", "adamw", "surface.reduction=4").start is not None
        assert figures(tiny_model, "lst", "adamw", "surface.reduction=4", "surface.init=random").start is None

    def test_features_are_computed_once(self, tiny_model, monkeypatch):
        from gradientless.language.surfaces.head import HeadSurface

        calls = []
        pooled = HeadSurface.pooled
        monkeypatch.setattr(HeadSurface, "pooled", lambda self, batch: calls.append(1) or pooled(self, batch))
        before = torch.get_num_threads()
        options = ("optimizer.candidates=2",)
        figures(tiny_model, "head", "gld", *options)
        once = len(calls)
        figures(tiny_model, "head", "gld", *options, "surface.recompute=true")
        assert len(calls) - once > once and torch.get_num_threads() == before


class TestCases:
    def test_without_names_the_usual_ones(self, tiny_model):
        found = cases([tiny_model, tiny_model], [], [])
        assert len(found) == 2 * (1 + len(USUAL)) and found[0].name == "inference" and found[0].optimizer is None
        assert found[1].name == "full + mezo" and all(case.config is not None for case in found)
        assert [case.name for case in cases([tiny_model], ["lora"], [])][1:] == ["lora + mezo", "lora + adamw"]
        assert [case.name for case in cases([tiny_model], [], ["gld"])][1:] == ["full + gld"]

    def test_settings_hold_where_there_is_such_an_option(self, tiny_model):
        found = cases(
            [tiny_model], ["lora", "lst"], ["mezo", "adamw"], ["surface.rank=3", "optimizer.eps=0.01", "loss=f1"]
        )
        by_name = {case.name: case for case in found}
        assert by_name["lora + mezo"].config.surface.rank == 3 and by_name["lst + mezo"].config.surface.rank is None
        assert by_name["lst + mezo"].config.optimizer.arguments == {"eps": 0.01}
        assert by_name["lora + adamw"].config is None
        assert by_name["lora + adamw"].why.startswith("loss: must be differentiable for adamw, got 'f1'")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"surfaces": ["loar"]}, "--surface: unknown surface 'loar'; did you mean 'lora'"),
            ({"optimizers": ["mzeo"]}, "--optimizer: unknown optimizer 'mzeo'; did you mean 'mezo'"),
            (
                {"settings": ["surface.rnk=3"]},
                "profile: unknown surface option of what is profiled 'rnk'; did you mean",
            ),
            ({"settings": ["optimizer.k=3"], "optimizers": ["mezo"]}, "unknown optimizer option of what is profiled"),
            ({"settings": ["surface.name=lora"]}, "surface.name: must be given as an option, --surface, got"),
        ],
    )
    def test_what_nothing_knows_is_refused(self, given, message, tiny_model):
        with pytest.raises(UserError, match=message):
            cases(**{"models": [tiny_model], "surfaces": [], "optimizers": [], **given})


class TestAProcessOfItsOwn:
    def test_answers_with_figures(self, tiny_model):
        *_, case = cases([tiny_model], ["bias"], ["adamw"], (), SMALL)
        found = measured(case, steps=1, threads=1)
        assert found.why == "" and found.figures.batch_size == 4 and found.figures.tuned < 1000

    @pytest.mark.parametrize(
        ("code", "stderr", "why"),
        [
            (-signal.SIGKILL, "", "out of memory: the system ended the process"),
            (1, "Traceback\n  line\nValueError: no such thing\n", "failed: ValueError: no such thing"),
            (3, "", "failed: exit code 3"),
        ],
    )
    def test_that_fails_is_a_row(self, code, stderr, why, tiny_model, monkeypatch):
        done = SimpleNamespace(returncode=code, stdout="", stderr=stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        assert measured(cases([tiny_model], [], [])[0]).why == why

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    def test_out_of_memory_is_said(self, error, tiny_model, monkeypatch):
        def fail(*_):
            raise error

        monkeypatch.setattr(profile, "measure", fail)
        assert in_process(cases([tiny_model], [], [])[0]).why == "out of memory"


def a_case(name: str = "lora") -> Case:
    return Case("m", name, "adamw", None)


FIGURES = Figures(
    batch_size=8, loaded=1000.0, peak=200.0, start=None, tensors=150.0, weights=400.0, seconds=0.5, tuned=10,
    registered=100, touched=50, share=0.1, products=4, multiplies=2_500_000,
)  # fmt: skip


class TestFits:
    """8 rows take 200 MiB, 16 take 280: 120 and 10 a row, over 1,000 of the model."""

    TWICE = replace(FIGURES, batch_size=16, peak=280.0)

    @pytest.mark.parametrize(
        ("limit", "largest"), [(1129.9, 0), (1130, 1), (1200, 8), (1209.9, 8), (1280, 16), (2120, 100), (11360, 1024)]
    )
    def test_the_line_through_two_batches(self, limit, largest):
        fit = Fit(a_case(), FIGURES, self.TWICE, limit)
        assert fit.a_row == 10 and fit.needed(100) == 2120 and fit.largest == largest
        assert fit.bounded == (largest < 1024)

    def test_the_start_counts(self):
        starting = [replace(each, start=500.0) for each in (FIGURES, self.TWICE)]
        assert Fit(a_case(), *starting, 1499).largest == 0
        assert Fit(a_case(), *starting, 1500).largest == 38

    def test_memory_that_does_not_grow_is_followed_no_further(self):
        fit = Fit(a_case(), FIGURES, replace(FIGURES, batch_size=16, peak=190.0), 1300)
        assert fit.a_row == 0 and fit.largest == 1024 and not fit.bounded

    def test_table(self):
        good = Fit(a_case(), FIGURES, self.TWICE, 1300)
        short = Fit(a_case("full"), FIGURES, self.TWICE, 1100)
        no = Fit(a_case("prefix"), None, None, 1300, "prefix: no")
        about = {"length": 8, "dtype": "float32", "device": "cpu"}
        cells = profile.Fits([good, short, no], 1300, about).cells()
        assert cells[0][3:5] == ["above at 8, MiB", "above at 16, MiB"]
        assert cells[1] == ["m", "lora + adamw", "1,000", "200", "280", "10.00", "1,130", "18", ""]
        assert cells[2][-2:] == ["none", ""] and cells[3][-1] == "prefix: no"


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        monkeypatch.setattr(profile, "measured", in_process)
        monkeypatch.setenv("COLUMNS", "200")

        def call(*arguments: str) -> tuple[int, str, str]:
            with pytest.raises(SystemExit) as ended:
                cli.main(["profile", "--batch-size", "4", "--length", "12", "--steps", "1", *arguments])
            told = capsys.readouterr()
            return ended.value.code or 0, told.out, told.err

        return call

    def test_one_table(self, run, tiny_model, tmp_path):
        code, out, _ = run("--model", tiny_model, "--surface", "bias,k_lst", "--optimizer", "adamw, mezo", "--out",
                           str(tmp_path / "p"))  # fmt: skip
        assert code == 0 and "k_lst: k must be from 1 to the model's 2 layers, got 3" in out
        kept = json.loads((tmp_path / "p" / "profile.json").read_text("utf-8"))
        assert [(row["surface"], row["optimizer"]) for row in kept["rows"]] == [
            ("full", None), ("bias", "adamw"), ("bias", "mezo"), ("k_lst", "adamw"), ("k_lst", "mezo"),
        ]  # fmt: skip
        inference, adamw, mezo, *failed = kept["rows"]
        assert inference["products"] == mezo["products"] == 0 < adamw["products"] and "why" in failed[0]
        assert kept["length"] == 12 and kept["batch_size"] == 4 and kept["device"] == "cpu"
        lines = (tmp_path / "p" / "profile.md").read_text("utf-8").split("\n")
        assert lines[0].startswith("| what | tuned | registered | touched | backward products | peak, MiB | ")
        assert lines[3].startswith("| bias + adamw | ") and f"| {adamw['products']}, " in lines[3]
        assert " none |" in lines[4] and lines[5].startswith("| k_lst + adamw |  |")

    @pytest.mark.parametrize("models", [[], ["starter:minilm", "a/folder/far/from/here/with/a/model"]])
    def test_a_narrow_terminal_hides_neither_names_nor_figures(self, models, capsys):
        head = [
            "what",
            "tuned",
            "registered",
            "touched",
            "backward products",
            "peak, MiB",
            "tensors, MiB",
            "start, MiB",
        ]
        rows = [["inference", "", "", "", "", "7.2", "2.1", "", "0.08"]]
        rows += [["lst + adamw", "319 k, 1.4%", "23 M", "319 k", "83, 2.49 M", "17.9", "9.3", "49.2", "0.126"]]
        head, rows = [*head, "s a step"], [[*models[:1], *row] for row in rows] + [[*models[1:], *row] for row in rows]
        for width in (60, 80, 120, 150):
            profile._show(Console(width=width), [["model", *head] if models else head, *rows])
            told = capsys.readouterr().out
            assert "…" not in told and all(
                word in told for row in rows for cell in row for word in cell.replace(",", " ").split()
            )
            longest = max(map(len, told.splitlines()))
            assert longest <= width or width < (150 if models else 80)
        assert "lst + adamw  319 k, 1.4%" in told

    def test_what_fits(self, run, tiny_model, tmp_path):
        code, out, _ = run("--model", tiny_model, "--surface", "bias", "--optimizer", "adamw", "--fits", "64GiB",
                           "--out", str(tmp_path))  # fmt: skip
        assert code == 0 and "512 or more" in out and "extended along the line through them" in " ".join(out.split())
        kept = json.loads((tmp_path / "profile.json").read_text("utf-8"))
        assert kept["limit_mib"] == 65536 and [m["batch_size"] for m in kept["fits"][1]["measured"]] == [4, 8]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--fits", "4 apples"), "--fits: must be a size of memory such as 4GiB or 800MB, got '4 apples'"),
            (("--model", "starter:minilmm"), "model: unknown starter model 'starter:minilmm'; did you mean"),
            (("--surface", "prefix", "--dtype", "float8"), "dtype: must be 'float32', 'bfloat16' or 'float16', got"),
            (("--device", "tpu"), "device: must be auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, message, run, tiny_model):
        model = () if "--model" in arguments else ("--model", tiny_model)
        code, out, err = run(*model, *arguments)
        assert code == 2 and err.startswith(message) and len(err.strip().split("\n")) == 1 and not out
