"""What `gradientless export` writes can be opened by somebody who has the folder alone, as its card says."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import families
import huggingface_hub
import pytest
import torch
import transformers
import yaml
from families import LABELS, prompt_of

import tiny_run
from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.surfaces import SURFACES
from gradientless.language.surfaces.saved import note_made, note_rows, read_note, write_note
from gradientless.language.tasks import Example, Prompt
from gradientless.run.card import code_span, quoted
from gradientless.run.predict import predict_labels
from gradientless.run.replay_run import export_run
from tiny_run import gradientless

TEXT = "a text to classify"  # what the cards classify
LONG = {"bad": "bad film", "good": "very good"}  # words of two tokens
BRANCHES = ("lora", "ia3", "side_lora")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = families.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def tuned(name: str, model: str, readout: str | None = None, prompt: Prompt | None = None, **options):
    """A surface away from where it starts."""
    standing = {"lora": {"rank": 2}, "side_lora": {"rank": 2}, "prefix": {"tokens": 3}, "prompt": {"tokens": 3}}
    standing |= {"layers": {"pattern": r"\.1\."}, "lst": {"reduction": 4, "init": "random"}}
    standing |= {"k_lst": {"reduction": 4, "k": 2, "init": "random"}}
    more = {} if name == "head" else {"readout": readout or ("head" if prompt is None else "prompt"), "prompt": prompt}
    surface = SURFACES[name].create(model, LABELS, max_length=16, **more, **{**standing.get(name, {}), **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in surface.trainable().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return surface.eval()


def exported(surface, folder: Path, pairs: bool = False, **options) -> Path:
    """The folder that is exported from one that the surface saved; what it was saved in is gone."""
    surface.save(folder / "saved")
    note_rows(folder / "saved", {"text_column": "text", "pairs": pairs})
    export_run(folder / "saved", folder / "bert-tuned", **options)
    shutil.rmtree(folder / "saved")
    return folder / "bert-tuned"  # a name by which the library would guess an architecture


def code_of(card: Path) -> str | None:
    found = re.search(r"^```python\n(.*?)^```", card.read_text("utf-8"), flags=re.S | re.M)
    return found and found[1]


def said(code: str, place: Path) -> dict[str, float]:
    """The probabilities that the code of a card prints."""
    with _chdir(place), contextlib.redirect_stdout(printed := io.StringIO()):
        exec(code, {})
    found = ast.literal_eval(printed.getvalue().strip().split("\n")[-1])
    return found if isinstance(found, dict) else {each["label"]: each["score"] for each in found}


@contextlib.contextmanager
def _chdir(place: Path):
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def predicted(place: Path, row: Example) -> dict[str, float]:
    labels, _, shares = predict_labels(place, [row])
    return dict(zip(labels, shares[0].tolist(), strict=True))


def checked(surface, place: Path, row: Example | None = None) -> None:
    """The card's code gives the probabilities of `predict`, and these are the surface's."""
    row = row or Example(TEXT, 0)
    shares = predicted(place, row)
    with torch.no_grad():
        own = surface.logits(surface.prepare(surface.encode([row]).batch([0]))).softmax(-1)[0]
    torch.testing.assert_close(torch.tensor(list(shares.values())), own, atol=1e-5, rtol=1e-4)
    code = code_of(place / "README.md")
    assert code is not None
    assert said(code, place) == pytest.approx(shares, abs=1e-5)


HEADS = [
    ("bert", {"head": "library"}),
    ("distilbert", {"head": "library"}),  # whose tokenizer makes segment ids that it does not take
    ("roberta", {"head": "library"}),
    ("bert", {"head": "two-layer"}),
    ("distilbert", {"head": "two-layer", "pooling": "cls", "activation": "tanh"}),
    ("roberta", {"head": "linear", "pooling": "last"}),
    ("llama", {"head": "two-layer", "activation": "gelu", "pooling": "last"}),
    ("t5", {}),
]


@pytest.mark.parametrize("name", ["head", "full"])
@pytest.mark.parametrize(("kind", "options"), HEADS)
def test_a_head_opens_as_its_card_says(name, kind, options, model, tmp_path):
    surface = tuned(name, model(kind), **options)
    place = exported(surface, tmp_path)
    checked(surface, place)
    if options.get("head") == "library":
        found = transformers.pipeline("text-classification", model=str(place))
        assert {found.model.config.id2label[i] for i in (0, 1)} == set(LABELS)
    else:
        assert "transformers.pipeline does not" in (place / "README.md").read_text("utf-8")
        for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModel):
            with pytest.raises((OSError, ValueError)):
                auto.from_pretrained(place)
        with pytest.raises((OSError, ValueError)):
            transformers.pipeline("text-classification", model=str(place))


@pytest.mark.parametrize("words", ["one token", "several", "their mean"])
@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "t5"])
def test_a_prompted_model_opens_as_its_card_says(kind, words, model, tmp_path):
    prompt = prompt_of(kind)
    if words != "one token":
        prompt = Prompt(prompt.text, LONG, "mean" if words == "their mean" else "sum")
    surface = tuned("full", model(kind), prompt=prompt)
    place = exported(surface, tmp_path)
    checked(surface, place)
    tag = {"llama": "text-generation", "t5": None}.get(kind, "fill-mask")
    assert huggingface_hub.ModelCard.load(place / "README.md").data.to_dict().get("pipeline_tag") == tag


@pytest.mark.parametrize("readout", ["prompt", "library", "two-layer"])
@pytest.mark.parametrize("name", [*BRANCHES, "bias", "layers", "prefix", "prompt", "lst", "k_lst"])
@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_every_surface_opens_as_its_card_says(name, kind, readout, model, tmp_path):
    if kind == "opt" and readout == "library":
        readout = "linear"  # the library's heads are encoders'
    if readout == "prompt":
        surface = tuned(name, model(kind), prompt=prompt_of(kind))
    elif name in ("lst", "k_lst"):
        surface = tuned(name, model(kind), "classifier")
    else:
        surface = tuned(name, model(kind), head=readout)
    place = exported(surface, tmp_path)
    checked(surface, place)
    if name in BRANCHES or name in ("prefix", "prompt"):
        settings = json.loads((place / "adapter_config.json").read_text("utf-8"))
        assert settings["base_model_name_or_path"] == "the folder base beside this file"
    if name in ("lst", "k_lst") or (readout in ("two-layer", "linear") and name in ("bias", "layers")):
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForSequenceClassification.from_pretrained(place)
    if name in ("bias", "layers") and readout == "library":
        found = transformers.pipeline("text-classification", model=str(place))(TEXT, top_k=None)
        assert {e["label"]: e["score"] for e in found} == pytest.approx(predicted(place, Example(TEXT, 0)), abs=1e-5)


@pytest.mark.parametrize("readout", ["prompt", "library", "two-layer"])
@pytest.mark.parametrize("name", BRANCHES)
def test_an_adapter_is_put_into_the_weights_where_one_asks(name, readout, model, tmp_path):
    more = {"prompt": prompt_of("bert")} if readout == "prompt" else {"head": readout}
    surface = tuned(name, model("bert"), **more)
    place = exported(surface, tmp_path, merge=True)
    assert not (place / "adapter_config.json").exists() and not (place / "base").exists()
    checked(surface, place)


def test_what_cannot_be_merged_is_refused(model, tmp_path):
    for name in ("full", "prefix"):
        with pytest.raises(UserError, match=rf"--merge needs an adapter of lora, ia3 or side_lora, got surface {name}"):
            exported(tuned(name, model("bert"), head="library"), tmp_path / name, merge=True)
        assert not (tmp_path / name / "bert-tuned").exists()


@pytest.mark.parametrize("head", ["library", "two-layer"])
@pytest.mark.parametrize("name", ["head", "lora", "prefix", "prompt"])
def test_two_texts_open_as_the_card_says(name, head, model, tmp_path):
    surface = tuned(name, model("bert"), head=head)
    place = exported(surface, tmp_path, pairs=True)
    checked(surface, place, Example(TEXT, 0, "another text, text_pair"))
    assert f"gradientless predict . '{TEXT}' 'its second text'" in (place / "README.md").read_text("utf-8")


def test_an_adapters_base_is_the_hubs_name_where_that_is_all(model, tmp_path):
    """Behind a prompt alone: under a head, what the hub has lacks it."""
    for name, made, expected in (
        ("prompted", {"base": "owner/model", "unchanged": True}, "owner/model"),
        ("changed", {"base": "owner/model", "unchanged": False}, "the folder base beside this file"),
        ("unknown", {"base": None, "unchanged": True}, "the folder base beside this file"),
        ("headed", {"base": "owner/model", "unchanged": True}, "the folder base beside this file"),
    ):
        more = {"head": "two-layer"} if name == "headed" else {"prompt": prompt_of("bert")}
        surface = tuned("lora", model("bert"), **more)
        surface.save(tmp_path / name)
        note_made(tmp_path / name, made)
        export_run(tmp_path / name, tmp_path / f"{name}-out")
        settings = json.loads((tmp_path / f"{name}-out" / "adapter_config.json").read_text("utf-8"))
        assert settings["base_model_name_or_path"] == expected, name
        checked(surface, tmp_path / f"{name}-out")
        card = huggingface_hub.ModelCard.load(tmp_path / f"{name}-out" / "README.md")
        assert card.data.base_model == made["base"] and card.data.library_name == "peft"


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_of_half_the_precision(kind, model, tmp_path):
    """To rounding: what the code reads is rounded as what `predict` reads."""
    surface = tuned("lora", model(kind), prompt=prompt_of(kind)) if kind == "opt" else tuned("head", model(kind))
    place = exported(surface, tmp_path, dtype="bfloat16")
    expected = predicted(place, Example(TEXT, 0))
    assert said(code_of(place / "README.md"), place) == pytest.approx(expected, abs=0.02)


def test_a_classifier_of_several_labels_a_text_becomes_one_of_one(model, tmp_path):
    base = shutil.copytree(model("bert"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text("utf-8"))
    told = json.dumps({**config, "problem_type": "multi_label_classification"})
    (base / "config.json").write_text(told, "utf-8")
    surface = tuned("head", str(base), head="library")
    checked(surface, exported(surface, tmp_path))


def test_a_folder_of_an_early_version_opens(model, tmp_path):
    """It kept the model of a head, or of a side network, at the top, and no checksums of files."""
    for name, more in (("head", {"head": "two-layer"}), ("lst", {"readout": "classifier"})):
        surface = tuned(name, model("bert"), **more)
        surface.save(tmp_path / name)
        expected = predicted(tmp_path / name, Example(TEXT, 0))
        for file in (tmp_path / name / "body").iterdir():
            file.rename(tmp_path / name / file.name)
        (tmp_path / name / "body").rmdir()
        note = {key: value for key, value in read_note(tmp_path / name).items() if key != "format"}
        write_note(tmp_path / name, {**note, "files": {}})
        assert predicted(tmp_path / name, Example(TEXT, 0)) == expected


def test_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert backbone.hub_name("owner/model") == "owner/model" and backbone.hub_name("gpt2") == "gpt2"
    assert backbone.hub_name("starter:minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    (tmp_path / "gpt2").mkdir()
    for own in ("starter:smollm2", "gpt2", "./gpt2", "~/gpt2", str(tmp_path), "a/b/c", r"c:\models"):
        assert backbone.hub_name(own) is None


# --- the card of a run -----------------------------------------------------------------------------------------------

ODD = {"positive": 'up: "yes" | `a``b` <b>\u202e\x1b[31m\n---\n```', "negative": "no: #{x}\\"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run by a table with odd labels, a test file and a model, which are gone; it was moved itself."""
    import csv

    place = tmp_path_factory.mktemp("place")
    base = tiny_run.make_model(place / "encoder")
    (place / "tables").mkdir()
    for file, count in (("tables/rows.csv", 60), ("held.csv", 20)):
        with open(place / file, "w", encoding="utf-8", newline="") as opened:
            csv.writer(opened).writerows(
                [("a | text", "label"), *((text, ODD[label]) for text, label in tiny_run.rows(count))]
            )
    with _chdir(place):
        command = tiny_run.arguments(
            base, "tables/rows.csv", Path("run"), "--text-column", "a | text", "--test", "held.csv"
        )
        assert gradientless(*command) == 0
    shutil.rmtree(place / "tables")
    (place / "held.csv").unlink()
    shutil.rmtree(place / "encoder")
    shutil.move(place / "run", place / "moved")
    return place / "moved"


def test_the_card_of_a_run(run, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert gradientless("export", str(run), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    text = (out / "README.md").read_text("utf-8")
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "gradientless" and "pipeline_tag" not in header and "base_model" not in header
    results = header["model-index"][0]["results"]
    assert [each["dataset"]["split"] for each in results] == ["validation", "test"]
    for each, key in zip(results, ("metrics", "test"), strict=True):
        assert each["dataset"]["name"] == "rows.csv"
        assert {m["type"]: m["value"] for m in each["metrics"]} == {
            name: round(summary[key][name], 4) for name in ("accuracy", "f1")
        }
    assert huggingface_hub.ModelCard.load(out / "README.md").data.eval_results
    for told in ("`encoder`, not on the hub", "`gld (", "Seed: `42`", f"Forward passes: {summary['forward_passes']:,}",
                 "The validation rows also chose the weights", "The test rows chose nothing.",
                 "columns `a | text` and `label`", "gradientless `"):  # fmt: skip
        assert told in text, told
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text), "nothing that moves a cursor"
    assert text.count("\n```") == 4 and text.count("\n---\n") == 1, "labels open and close nothing"
    assert not any(path in text for path in (str(tmp_path), str(run.parent), str(Path.home()), "tables/"))
    # The command prints the same lines, for the folder as it was named, and what to do next.
    code = code_of(out / "README.md")
    assert code is not None and code.replace("folder = '.'", f"folder = {str(out)!r}") in printed
    assert printed.rstrip("\n").split("\n")[-1] == f"predict  gradientless predict {out} '{TEXT}'"
    shares = said(code, out)
    assert set(shares) == set(ODD.values()) and shares == pytest.approx(predicted(out, Example(TEXT, 0)), abs=1e-5)


def test_the_printed_lines_in_a_process_elsewhere(run, tmp_path, capsys):
    assert gradientless("export", str(run), "--out", str(tmp_path / "tuned")) == 0
    code = re.search(r"\n\n(import torch.*?)\n\n*predict ", capsys.readouterr().out, flags=re.S)[1]
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "cwd": tmp_path.parent}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"HF_HUB_OFFLINE": "1"}, **options)
    assert done.returncode == 0, done.stderr
    expected = predicted(tmp_path / "tuned", Example(TEXT, 0))
    assert ast.literal_eval(done.stdout.strip().split("\n")[-1]) == pytest.approx(expected, abs=1e-5)


def test_of_what_is_exported_again_the_card_stays(run, tmp_path):
    export_run(run, tmp_path / "one")
    export_run(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "README.md").read_bytes() == (tmp_path / "two" / "README.md").read_bytes()
    export_run(run / "model", tmp_path / "bare")
    assert "Not known: no figures came with the model." in (tmp_path / "bare" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("command", ["eval", "predict", "export", "replay", "eval exported", "predict exported"])
def test_from_any_directory_without_the_runs_files(command, run, tmp_path, monkeypatch, capsys):
    rows = "".join(f'"{text}","{ODD[label]}"\n'.replace('"yes"', '""yes""') for text, label in tiny_run.rows(20))
    (tmp_path / "later.csv").write_text("a | text,label\n" + rows, "utf-8")
    monkeypatch.chdir(tmp_path)
    place = os.path.relpath(run, tmp_path)
    if command.endswith("exported"):
        assert gradientless("export", place, "--out", "tuned") == 0
        place = "tuned"
    if command == "replay":  # the base model is gone as well, and lies elsewhere now
        base = tiny_run.make_model(tmp_path / "again")
        assert gradientless("replay", place, "--base", base) == 0
        assert re.search(r"bit-equal to the run +yes", capsys.readouterr().out)
        return
    more = {"eval": ["--data", "later.csv", "--json"], "predict": ["a good film"], "export": ["--out", "tuned"]}
    capsys.readouterr()
    assert gradientless(command.split()[0], place, *more[command.split()[0]]) == 0
    told = capsys.readouterr().out
    if command.startswith("eval"):
        assert json.loads(told)["rows"] == 20


def test_texts_of_others_in_the_card():
    for text in ("plain", "`", "``a`", " a ", "", 'a"b\\c', "x\ny", "\u202e\x00", "---", "é 中 😀", "a: #b"):
        assert yaml.safe_load(f"key: {quoted(text)}") == {"key": text}
        assert "\n" not in quoted(text) + code_span(text)
        inner = re.fullmatch(r"(`+)(.*?)\1", code_span(text), flags=re.S)
        assert inner is not None and inner[1] not in re.findall("`+", inner[2])
    assert yaml.safe_load(quoted("\ud800")) == "\ufffd"
