"""Every command that README, docs and --help print runs as it is printed, on stand-ins for models and data.

What would take longer than a minute is shortened by `SHORTER`: the same option with a smaller number, else one more.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import SMALL, TOKENIZERS, byte_level, language
from typer.main import get_command

from gradientless import cli
from gradientless.language import backbone, starter
from gradientless.language.tasks import TASKS
from gradientless.run import profile
from pages import ROOT, blocks
from task_cases import TASKS as CASES

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORTER = {
    "train": {"--steps": "2", "--batch-size": "4", "data.subset=": "[3,1]"},
    "compare": {
        "--forward-passes": "32",
        "--seeds": "13",
        "batch_size=": "4",
        "data.subset=": "[24, 8, 8]",
        "data.few_shot=": "4",
        "icl:k=": "2",
    },
    "diagnose": {"--draws": "4", "--batch-size": "4"},
    # What fits is found by trying ever larger batches.
    "profile": {"--batch-size": "2", "--length": "8", "--steps": "1"},
    "profile --fits": {"--fits": "1MiB", "--length": "8", "--steps": "1"},
}
ENCODERS = ("starter:minilm", "distilbert-base-cased", "models/distilbert", "FacebookAI/roberta-large")
TREC = TASKS["trec"].labels
PROGRAMS = ("gradientless ", "python -m gradientless ")


def commands_of(text: str) -> list[str]:
    """The commands in a text, one line each, without what stands behind them."""
    lines = re.sub(r"\\+\n\s*", "", text).split("\n")
    return [line.strip() for line in lines if line.strip().startswith(PROGRAMS) and "..." not in line]


def printed() -> dict[str, str]:
    """Where a command stands -> the command."""
    found = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("sh", "bash", "console"):
                for number, command in enumerate(commands_of(block.text), 1):
                    found[f"{page.name}:{block.line}, {number}"] = command
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for number, line in enumerate(commands_of(command.help or ""), 1):
            found[f"{name} --help, {number}"] = line
    return found


COMMANDS = printed()


def shortened(arguments: list[str]) -> list[str]:
    kind = "profile --fits" if "--fits" in arguments else arguments[0]
    for key, value in SHORTER.get(kind, {}).items():
        if key.endswith("="):
            arguments = [key + value if argument.startswith(key) else argument for argument in arguments]
        elif key in arguments:
            arguments[arguments.index(key) + 1] = value
        else:
            arguments = [*arguments, key, value]
    if arguments[:2] == ["train", "demo"]:  # whose recipe names more rows than the stand-in has
        arguments.append("data.subset=[3,1]")
    return arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """What the commands speak of: tables, folders of tasks, models, a file with an optimizer, a recipe, tuned runs."""
    place = tmp_path_factory.mktemp("world")
    rows = [f"{text},{stars}" for stars in (1, 5) for text in ("a film", "the plot", "very good", "dull", "bright")] * 4
    (place / "reviews.csv").write_text("review,stars\n" + "\n".join(rows) + "\n", "utf-8")
    films = [f"film {i},{i % 2},rotten_tomatoes" for i in range(40)]
    (place / "films.csv").write_text("text,label,source\n" + "\n".join(films) + "\n", "utf-8")
    more = [f"film {i},film {i},{'positive' if i % 3 else 'negative'}" for i in range(20)]
    (place / "more.csv").write_text("sentence,review,label\n" + "\n".join(more) + "\n", "utf-8")
    (place / "new.txt").write_text("a good film\nthe plot was dull\n", "utf-8")
    (place / "my.toml").write_text("steps = 2\nbatch_size = 4\n[optimizer]\nname = 'gld'\nradius = 1e-2\n", "utf-8")
    glue = [f"{text} {i}\t{i % 2}" for i, text in enumerate(("a film", "the plot", "so dull", "very good") * 40)]
    for name in ("SST-2", "sst2", "path/to/SST-2"):
        (place / name).mkdir(parents=True)
        for file, part in (("train.tsv", glue[:120]), ("dev.tsv", glue[120:])):
            (place / name / file).write_text("sentence\tlabel\n" + "\n".join(part) + "\n", "utf-8")
    for key in (key for key in CASES if key not in ("sst2", "rotten-tomatoes", "imdb")):
        (place / key).mkdir()
        for file, text in CASES[key].good.items():
            (place / key / file).write_text(text, "utf-8")
    kinds = [f"Why {n} ?\t{label}\t{kind}\tx" for n in range(40) for label, kind in enumerate(TREC)]
    for file in ("train.tsv", "test.tsv"):
        (place / "trec" / file).write_text("question\tlabel\tcoarse\tfine\n" + "\n".join(kinds) + "\n", "utf-8")
    (place / "SQuAD").symlink_to(place / "squad")
    lines = (place / "squad" / "train.jsonl").read_text("utf-8")
    (place / "questions.jsonl").write_text(lines, "utf-8")
    for name, kind in (("encoder", "bert"), ("writer", "llama")):
        with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(3)
            patch.setitem(SMALL, "num_hidden_layers", 4)  # for windows of several layers
            tokenizer = TOKENIZERS.get(kind, byte_level)()
            language(kind, len(tokenizer), 512).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for block in (block for page in PAGES for block in blocks(page) if block.note.endswith(".py")):
        (place / block.note).write_text(block.text + ("\nMine = BestOfK\n" if block.note == "mine.py" else ""), "utf-8")
    (place / "models").mkdir()
    (place / "models" / "distilbert").symlink_to(place / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        at_home(patch, place)
        patch.chdir(place)
        quick = ["--steps", "2", "--batch-size", "4"]
        for name, more_of_it in (
            ("thesis", ["thesis", "data.path=sst2/"]),
            ("mine", []),
            ("mezo", ["--surface", "full", "--model", "starter:smollm2"]),
            ("norms", ["--surface", "norms.py:Norms", "--optimizer", "mezo"]),
            ("squad", ["task=squad", "data.path=SQuAD/", "--surface", "full", "--model", "starter:smollm2"]),
        ):
            assert run(["train", *more_of_it, *quick, "--out", f"runs/{name}"]) == 0
        assert run(["export", "runs/thesis", "--out", "tuned"]) == 0
        yield place


def at_home(patch: pytest.MonkeyPatch, world: Path) -> None:
    """Hub and starter assets are the stand-ins of `world`."""
    patch.setattr(profile, "measured", measured)
    resolve = backbone.resolve
    patch.setattr(backbone, "resolve", lambda model: resolve(stand_in(model, world)))
    files = {"movie-reviews": "films.csv", "minilm": "encoder", "smollm2": "writer"}
    patch.setattr(starter, "ensure", lambda name, *_, **__: world / files[name])
    for kind in set(TASKS.values()):
        if kind.key not in ("rotten-tomatoes", "imdb"):
            own = kind.load
            patch.setattr(
                kind, "load", lambda self, path=None, *more, own=own: own(self, path or world / self.key, *more)
            )


def measured(case: profile.Case, *_: object, **__: object) -> profile.Measured:
    """In place of `profile.measured`: no process for each case, and each is as the first that was measured."""
    if case.config is None:
        return profile.Measured(case, None, case.why)
    if not FIGURES:
        FIGURES.append(profile.measure(case.config, steps=1))
    return profile.Measured(case, replace(FIGURES[0], batch_size=case.config.batch_size))


FIGURES: list[profile.Figures] = []


def stand_in(model: str, world: Path) -> str:
    if Path(model).is_dir():
        return model
    return str(world / ("encoder" if model in ENCODERS else "writer"))


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
        raise SystemExit(0)
    return int(ended.value.code or 0)


def test_there_are_commands_of_every_kind():
    kinds = {shlex.split(command, comments=True)[1] for command in COMMANDS.values()}
    assert kinds == set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("place", COMMANDS)
def test_it_runs_as_printed(place, world, tmp_path, monkeypatch, capsys):
    for each in world.iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "runs").unlink()
    shutil.copytree(world / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(COMMANDS[place], comments=True)
    arguments = shortened(arguments[arguments.index("gradientless") + 1 :])
    if arguments[0] in ("train", "export") and "--out" in arguments and "--resume" not in arguments:  # a new folder
        place = Path(arguments[arguments.index("--out") + 1])
        place.unlink() if place.is_symlink() else shutil.rmtree(place, ignore_errors=True)
    code = run(arguments)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert told.out or told.err or "--out" in arguments
