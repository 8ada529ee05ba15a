"""Runs of several stages: the recipes of docs/stages.md on tiny models, stopped, killed, resumed, replayed; refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from pathlib import Path

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import make_tokenizer

import tiny_run
from gradientless import cli
from gradientless.errors import UserError
from gradientless.language import backbone
from gradientless.language.data import EncodedSpans
from gradientless.language.surfaces import SURFACES, FullSurface
from gradientless.language.tasks import Example
from gradientless.run import train as training
from gradientless.run.assemble import make_surface
from gradientless.run.config import RunConfig
from gradientless.run.profile import measure
from gradientless.run.runfolder import RunFolder
from gradientless.run.train import Run
from pages import ROOT, blocks
from tiny_run import gradientless

RECIPES = {block.text.partition("\n")[0].lstrip("# "): block.text for block in blocks(ROOT / "docs" / "stages.md")
           if block.language == "toml"}  # fmt: skip
ANSWERS = ("prompt.text={text} the film was", 'prompt.words.negative=" bad"', 'prompt.words.positive=" good"')
SHORT = ("data.few_shot=default", "data.max_length=16", "batch_size=8", "evaluate_every=3", "checkpoint_every=2",
         "log_every=2", "device=cpu")  # fmt: skip
OWN = {  # recipe -> model, further settings
    "MeZO on the whole": ("llama", (*ANSWERS, "stages.2.surface.reduction=4")),
    "a ladder pretrained": (
        "masked",
        (
            "surface.reduction=4",
            "schedule.warmup=1",
            "stages.1.optimizer.name=gld",
            "stages.1.optimizer.radius=0.1",
            "stages.1.optimizer.candidates=2",
            "stages.1.optimizer.pool=true",
        ),
    ),
    "a head by": ("bert", ("stages.1.optimizer.radius=0.1", "stages.2.surface.rank=2", "stages.2.batch_size=8")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    masked = families.save("bert", folder / "masked")
    for part in (transformers.AutoModel, transformers.AutoTokenizer):
        part.from_pretrained(masked).save_pretrained(folder / "headless")
    return {
        "bert": tiny_run.make_model(folder / "bert"),
        "llama": families.save("llama", folder / "llama"),
        "headless": str(folder / "headless"),
        "masked": masked,
        "opt": families.save("opt", folder / "opt"),
        "t5": families.save("t5", folder / "t5"),
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    return tiny_run.write_table(tmp_path_factory.mktemp("rows") / "rows.csv", 40)


@pytest.fixture
def command(models, rows, tmp_path):
    """command(recipe's text, model, settings, …) -> the arguments of a run into the folder `name`."""

    def build(text: str, model: str, *more: str, name: str = "run") -> list[str]:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(text, "utf-8")
        settings = (*SHORT, f"data.path={rows}", f"model={models[model]}", *more)
        return ["train", str(recipe), *settings, "--out", str(tmp_path / name)]

    return build


def saved(run: Path) -> dict[str, bytes]:
    """The files that two equal runs have alike."""
    names = ("*.safetensors", "metrics.jsonl", "trajectory.bin")
    files = sorted(file for name in names for file in run.rglob(name))
    return {str(file.relative_to(run)): file.read_bytes() for file in files if "replayed" not in file.parts}


class Killed(BaseException):
    pass


def killing(monkeypatch, owner, name: str, at=lambda *_: True, after: bool = False):
    """Once: die before (or after) the first call of `owner.name` whose arguments `at` chooses."""
    whole, done = getattr(owner, name), []

    def dying(*arguments, **options):
        if done or not at(*arguments):
            return whole(*arguments, **options)
        done.append(True)
        if after:
            whole(*arguments, **options)
        raise Killed

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("title", OWN)
def test_recipes_run_stop_resume_and_replay(title, command, tmp_path, monkeypatch, capsys):
    (text,) = (text for name, text in RECIPES.items() if name.startswith(title))
    model, more = OWN[title]
    more = (*more, "stages.1.steps=4", "stages.2.steps=5", "stages.2.evaluate_every=3")
    assert gradientless(*command(text, model, *more)) == 0
    run, told = tmp_path / "run", capsys.readouterr()
    first, second = sorted((run / "stages").iterdir())
    assert f"from stage {first.name}: its " in " ".join(told.err.split())
    assert re.search(rf"{first.name} +[\d.]+% after \d+ passes", told.out) and (run / "plot.png").exists()
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert list(summary["stages"]) == [first.name, second.name] and summary["steps"] == 9
    assert summary["forward_passes"] == sum(each["forward_passes"] for each in summary["stages"].values())
    assert summary["metrics"] == summary["stages"][second.name]["metrics"]

    step = Run.step

    def stopping(self, t, logged):
        if t == 2 and self.folder.path.name == second.name:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, t, logged)

    monkeypatch.setattr(Run, "step", stopping)
    assert gradientless(*command(text, model, *more, name="stopped")) == cli.STOPPED
    assert f"saved at step 3 of stage {second.name}; continue with: " in capsys.readouterr().err
    monkeypatch.setattr(Run, "step", step)
    assert gradientless("train", "--out", str(tmp_path / "stopped"), "--resume") == 0
    assert saved(tmp_path / "stopped") == saved(run)

    capsys.readouterr()
    assert gradientless("replay", str(run)) == 0
    replayed = capsys.readouterr().out
    for place in (first, second):
        logged = (place / "trajectory.bin").exists()
        assert logged == ("adamw" not in (place / "config.toml").read_text("utf-8"))
        assert re.search(rf"{place.name}(: bit-equal to the run +yes| +not replayed: adamw)", replayed)[1][0] == (
            ":" if logged else " "
        )
    assert gradientless("eval", str(run), "--json") == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["metrics"]["loss"], rel=1e-5)
    assert gradientless("predict", str(run), "a good film") == 0
    assert gradientless("train", "--out", str(first), "--resume") == 2
    assert capsys.readouterr().err.lstrip().startswith("out: must be a run, got a stage of")


@pytest.mark.parametrize("readout", ["classifier", "masked"])
@pytest.mark.parametrize("ladder", ["lst", "k_lst"])
def test_mezo_then_a_ladder(ladder, readout, command, tmp_path):
    """Of an encoder, as a classifier and as a masked language model: the ladder stands beside what MeZO tuned."""
    text = f"""
        steps = 2
        [[stages]]
        surface.name = "full"
        optimizer = {{name = "mezo", lr = 1e-3}}
        [[stages]]
        surface = {{name = "{ladder}", reduction = 4}}
        optimizer = {{name = "adamw", lr = 1e-2}}
    """
    masked = ("prompt.text={text} film {mask}", "prompt.words.negative=bad", "prompt.words.positive=good")
    read = ("surface.readout=head",) if readout == "classifier" else ("surface.readout=prompt", *masked)
    windows = ("stages.2.surface.k=2",) if ladder == "k_lst" else ()
    assert gradientless(*command(text, "masked", *read, *windows)) == 0
    run = tmp_path / "run"
    first, second = json.loads((run / "summary.json").read_text("utf-8"))["stages"].values()
    assert first["leaves"]["model"] == "model" and (first["leaves"]["prompted"]) == (readout == "masked")
    tuned = backbone.load_backbone(str(run / "stages" / "1-mezo-full" / "model")).state_dict()
    made = SURFACES[ladder].load(run / "model")
    assert made.prompted == (readout == "masked") and second["parameters"]["tuned"] < second["parameters"]["total"]
    own = made.body.state_dict()
    same = [name for name in own if not name.startswith("pooler.")]
    assert same and all(torch.equal(own[name], tuned[name]) for name in same)


def test_memory_is_that_of_each_stage_alone(command, tmp_path):
    """A stage like the one before takes what that one took, and its steps what `profile` says of them."""
    wide = transformers.BertConfig(
        vocab_size=14, hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=2048,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(wide).save_pretrained(tmp_path / "wide")
    make_tokenizer(True).save_pretrained(tmp_path / "wide")
    text = 'optimizer = {name = "adamw", lr = 1e-5}\nsurface.name = "full"\nsteps = 2\n[[stages]]\n[[stages]]\n'
    arguments = [f"model={tmp_path / 'wide'}" if a.startswith("model=") else a for a in command(text, "bert")]
    assert gradientless(*arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    first, second = summary["stages"].values()
    for key in ("peak_memory_mib", "step_peak_memory_mib", "evaluation_peak_memory_mib"):
        assert second[key] == pytest.approx(first[key], rel=0.3), key
        assert summary[key] == max(first[key], second[key])
    assert summary["step_peak_memory_mib"] > 90  # 25 MiB of weights, their gradients and two moments
    for key in ("parameters", "backward_products", "seconds_a_step"):
        assert list(summary[key].values()) == [first[key], second[key]]
    config = RunConfig.load(tmp_path / "run" / "stages" / "1-adamw-full" / "config.toml")
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": None}), "task": "sst2"})
    assert measure(config, steps=1).peak == pytest.approx(second["step_peak_memory_mib"], rel=0.3)


def test_killed_between_stages(command, tmp_path, monkeypatch):
    text = """
        optimizer = {name = "adamw", lr = 1e-2}
        steps = 3
        [[stages]]
        surface = {name = "lora", rank = 2}
        [[stages]]
        surface.name = "bias"
        [[stages]]
        surface = {name = "lst", reduction = 4}
    """
    straight, out = command(text, "bert"), command(text, "bert", name="killed")
    assert gradientless(*straight) == 0

    def within(number: str):
        return lambda folder, *_: folder.path.name.startswith(number)

    for owner, name, at, after in (
        (RunFolder, "write_summary", within("1-"), False),
        (RunFolder, "write_summary", within("1-"), True),
        (RunFolder, "write_config", within("2-"), False),
        (training, "_end", lambda run, *_: run.folder.path.name.startswith("3-"), True),
        (RunFolder, "write_summary", within("killed"), False),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, owner, name, at, after)
            cli.main([*out, "--resume"])
    assert gradientless(*out, "--resume") == 0
    assert saved(tmp_path / "killed") == saved(tmp_path / "run")
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 3


def test_a_stage_starts_where_the_one_before_ended(command, tmp_path):
    """Stages of no learning rate leave what they took up: an adapter kept, then merged; the head with it."""
    text = """
        steps = 3
        optimizer = {name = "adamw", lr = 0.0}
        [[stages]]
        surface = {name = "side_lora", rank = 2}
        optimizer.lr = 0.1
        [[stages]]
        surface = {name = "side_lora", rank = 2}
        seed = 7
        [[stages]]
        surface = {name = "lora", rank = 2}
        [[stages]]
        surface = {name = "full"}
    """
    assert gradientless(*command(text, "bert")) == 0
    run = tmp_path / "run"
    losses = [
        each["metrics"]["loss"] for each in json.loads((run / "summary.json").read_text("utf-8"))["stages"].values()
    ]
    assert losses[1] == losses[0] and losses[2:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    adapters = [load_file(run / "stages" / name / "model" / "adapter_model.safetensors") for name in
                ("1-adamw-side_lora", "2-adamw-side_lora")]  # fmt: skip
    assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())
    assert any(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)
    plain = load_file(run / "stages" / "3-adamw-lora" / "model" / "base" / "model.safetensors")
    before = load_file(run / "stages" / "1-adamw-side_lora" / "model" / "base" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    assert not torch.equal(plain[name], before[name])


SPOKEN = """
    steps = 3
    optimizer = {name = "adamw", lr = 1e-2}
    [[stages]]
    name = "classifier"
    surface = {name = "full", readout = "head"}
    [[stages]]
    name = "more"
    surface = {name = "bias", readout = "head"}
    [[stages]]
    name = "spoken"
    surface = {name = "lora", rank = 2, readout = "prompt"}
    [[stages]]
    name = "beside"
    surface = {name = "lst", reduction = 4, readout = "prompt"}
"""
MASKED = ("prompt.text={text} film {mask}", "prompt.words.negative=bad", "prompt.words.positive=good")


@pytest.mark.parametrize(("kind", "prompt"), [("masked", MASKED), ("opt", ANSWERS)])
def test_a_prompt_behind_a_classifier(kind, prompt, command, models, tmp_path, monkeypatch, capsys):
    """The body is the tuned one, with the output layer of the base, whose embeddings are the tuned ones where they are
    tied; killed while that is written, and resumed."""
    evaluate = Run.evaluate  # later is better: what is handed on is tuned
    monkeypatch.setattr(Run, "evaluate", lambda run: {**evaluate(run), "accuracy": run.done.step / 10})
    assert gradientless(*command(SPOKEN, kind, *prompt)) == 0
    run, *_ = tmp_path / "run", capsys.readouterr()
    base = transformers.AutoModelForMaskedLM if kind == "masked" else transformers.AutoModelForCausalLM
    made = base.from_pretrained(run / "stages" / "2-more" / "speaking").state_dict()
    place = run / "stages" / "2-more" / "model" / "base" / ("." if kind == "masked" else "body")
    tuned = transformers.AutoModel.from_pretrained(place).state_dict()
    first = base.from_pretrained(models[kind]).state_dict()
    body = [name for name in tuned if not name.startswith("pooler.")]
    prefix = "bert." if kind == "masked" else "model."
    assert all(torch.equal(made[prefix + name], tuned[name]) for name in body)
    assert any(not torch.equal(made[prefix + name], first[prefix + name]) for name in body)
    head = {"masked": "cls.predictions.decoder.weight", "opt": "lm_head.weight"}[kind]
    table = {"masked": "embeddings.word_embeddings.weight", "opt": "decoder.embed_tokens.weight"}[kind]
    assert torch.equal(made[head], tuned[table])
    rest = [name for name in first if not name.startswith(prefix) and name != head]
    assert (len(rest) >= 5) == (kind == "masked") and all(torch.equal(made[name], first[name]) for name in rest)
    assert not (run / "stages" / "1-classifier" / "speaking").exists()
    assert not (run / "stages" / "3-spoken" / "speaking").exists()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, backbone, "save_speaking", after=True)
        cli.main(command(SPOKEN, kind, *prompt, name="killed"))
    assert not (tmp_path / "killed" / "stages" / "2-more" / "speaking").exists()
    for at in (("3-spoken", "write_config"), ("4-beside", "write_config")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killing(patch, RunFolder, at[1], lambda folder, *_, at=at: folder.path.name == at[0])
            cli.main(["train", "--out", str(tmp_path / "killed"), "--resume"])
    assert gradientless("train", "--out", str(tmp_path / "killed"), "--resume") == 0
    assert saved(tmp_path / "killed") == saved(run)


@pytest.mark.parametrize("surface", ["ia3", "lora", "side_lora"])
def test_merged_is_the_same_model(surface, models, tmp_path):
    tuned = SURFACES[surface].create(models["bert"], ("negative", "positive"), max_length=16)
    with torch.no_grad():
        for tensor in tuned.trainable().values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    encoded = tuned.encode([Example("a good film", 1), Example("the dull plot", 0)])
    before = tuned.logits(tuned.prepare(encoded.batch([0, 1])))
    tuned.save_merged(tmp_path)
    merged = FullSurface.load(tmp_path)
    torch.testing.assert_close(merged.logits(merged.prepare(encoded.batch([0, 1]))), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(tuned.logits(tuned.prepare(encoded.batch([0, 1]))), before)
    fresh = FullSurface.create(models["bert"], ("negative", "positive"), max_length=16)
    assert not torch.allclose(fresh.logits(fresh.prepare(encoded.batch([0, 1]))), before)


def test_the_head_of_a_starter_model_is_its_own_wherever_the_model_lies(models):
    config = RunConfig(model="starter:minilm", data={"max_length": 16})
    assert make_surface(config, ("negative", "positive"), "cpu", models["bert"]).kind == "two-layer"


ADAMW = 'optimizer = {name = "adamw", lr = 1e-3}\nsteps = 2\n'
REFUSALS = [
    (
        "bert",
        "[[stages]]\nsurface.name = 'head'\n[[stages]]\nsurface = {name = 'lora', rank = 40}\n",
        ["stages[2]: lora: rank must be from 1 to 16, the widest layer's, got 40"],
    ),
    (
        "bert",
        "[[stages]]\nsurface = {name = 'lst', reduction = 4, start = 'previous'}\n"
        "[[stages]]\nsurface = {name = 'lst', reduction = 8}\n[[stages]]\nsurface.name = 'head'\n",
        [
            "stages[1].surface.start: 'previous' needs a stage before, got the first",
            "stages[2]: needs a place for what stages[1] tuned, side network (reduction 4); got side network "
            "(reduction 8), linear classifier on mean pooling",
            "stages[3]: needs a place for what stages[2] tuned, side network (reduction 8), linear classifier on mean "
            "pooling; got library head on cls pooling, 16 -> 16 (tanh) -> 2",
        ],
    ),
    (
        "bert",
        "[[stages]]\nsurface.name = 'full'\n[[stages]]\nsurface = {name = 'lst', reduction = 4, start = 'previous'}\n",
        [
            "stages[2].surface.start: 'previous' needs side network (reduction 4) or linear classifier on mean "
            "pooling of stages[1], got weights of the model, library head on cls pooling, 16 -> 16 (tanh) -> 2"
        ],
    ),
    (
        "bert",
        "[[stages]]\nsurface.name = 'head'\n[[stages]]\nsurface = {name = 'lora', rank = 2, head = 'linear'}\n",
        [
            "stages[2]: needs a place for what stages[1] tuned, library head on cls pooling, 16 -> 16 (tanh) -> 2; got "
            "lora (rank 2, alpha 16.0, targets None), linear head on mean pooling, 16 -> 2"
        ],
    ),
    (
        "headless",
        "prompt.text = '{text} film {mask}'\nprompt.words = {negative = 'bad', positive = 'good'}\n"
        "[[stages]]\nsurface = {name = 'full', readout = 'head'}\n"
        "[[stages]]\nsurface = {name = 'lst', reduction = 4, readout = 'prompt'}\n",
        ["stages[2].model: the checkpoint of '"],
    ),
    (
        "bert",
        "[[stages]]\nsteps = 2\n[[stages]]\nepochs = 0.2\nschedule = {name = 'linear', warmup = 50}\n"
        "[[stages]]\nforward_passes = 1\n",
        [
            "stages[2].schedule: warmup must be in [0, ",
            "stages[3].forward_passes: must pay for one step (3 passes), got 1",
        ],
    ),
    (
        "bert",
        "[[stages]]\nsurface.name = 'head'\n[[stages]]\nsurface = {name = 'lora', rank = 2}\n"
        "optimizer = {name = 'mezo', evaluator = 'inject'}\n",
        ["stages[2]: inject: directions must be low-rank, got a dense change of "],
    ),
    (
        "bert",
        "[[stages]]\nsurface.name = 'full'\nmodel = 'x'\nsteps = 0\n[[stages]]\nname = 'a/b'\noptimizer.lrr = 1\n",
        [
            "stages[1].model: must stand above the stages, got 'x'",
            "stages[1].steps: must be >= 1, got 0",
            "stages[2].name: must be letters, digits, - and _, got 'a/b'",
            "stages[2].optimizer: unknown option of adamw 'lrr'; did you mean 'lr'?",
        ],
    ),
]


@pytest.mark.parametrize(("model", "text", "lines"), REFUSALS, ids=range(len(REFUSALS)))
def test_refused_before_anything_runs(model, text, lines, command, tmp_path, capsys):
    assert gradientless(*command(ADAMW + text, model)) == 2
    told = [line for line in capsys.readouterr().err.rstrip("\n").split("\n") if line.startswith("stages")]
    assert len(told) == len(lines) and all(map(str.startswith, told, lines)), told
    assert not (tmp_path / "run").exists()


class TestTokens:
    """`readout = "tokens"`: a side network says the texts' own tokens."""

    EXAMPLES = (Example("a good film", 1), Example("the plot was very dull", 0, None))

    @pytest.fixture(params=["bert", "distilbert", "llama", "opt", "roberta", "t5"])
    def surface(self, request, tmp_path):
        model = families.save(request.param, tmp_path / "model")
        if request.param == "t5":
            families.add_sentinels(model, 3)
        return SURFACES["k_lst"].create(model, (), k=2, reduction=4, readout="tokens", max_length=16)

    def test_scores_are_the_models_own(self, surface, tmp_path):
        """The output layer reads the states of what is said: the side network's; for Fisher scores the model's."""
        encoded = surface.encode(self.EXAMPLES)
        rows = [1, 0, len(encoded) - 1]
        prepared = surface.prepare(encoded.batch(rows))
        said = prepared.tensors["said"]
        scores = surface.logits(prepared)
        assert len(scores) == len(encoded.expected(rows)) == int(said.sum()) >= 3
        torch.testing.assert_close(scores, surface.token_logits(prepared)[said])
        known = {name: tensor for name, tensor in prepared.tensors.items() if name != "said"}
        whole = surface.model.backbone(**known).logits
        torch.testing.assert_close(surface._backbone_logits(prepared.tensors), whole[said])
        assert surface.begin(encoded)  # Fisher scores of saying tokens
        surface.save(tmp_path / "saved")
        again = SURFACES["k_lst"].load(tmp_path / "saved")
        torch.testing.assert_close(again.logits(again.prepare(encoded.batch(rows))), surface.logits(prepared))

    def test_masks(self, surface):
        encoded, plain = surface.encode(self.EXAMPLES), surface.tokenizer([e.text for e in self.EXAMPLES])["input_ids"]
        assert encoded.texts == 2
        if isinstance(encoded, EncodedSpans):
            return  # see test_spans
        if surface.tokenizer.mask_token is None:
            assert len(encoded) == 2
            assert encoded.expected([1, 0]).tolist() == plain[1][1:] + plain[0][1:]
            assert encoded.batch([1])["input_ids"].tolist() == [plain[1]]
            return
        assert len(encoded) == 20
        drawn = set()
        for row in range(20):
            batch, told = encoded.batch([row]), encoded.expected([row])
            whole = batch["input_ids"].clone()
            assert (whole[batch["said"]] == surface.tokenizer.mask_token_id).all()
            whole[batch["said"]] = told
            assert whole.tolist() == [plain[row % 2]] and batch["said"].sum() == 1
            assert not set(told.tolist()) & set(surface.tokenizer.all_special_ids)
            drawn.add((row % 2, *batch["said"][0].nonzero().flatten().tolist()))
            assert torch.equal(encoded.batch([row])["said"], batch["said"])
        assert len(drawn) > 4

    def test_a_table_without_labels(self, command, tmp_path, capsys):
        texts = tmp_path / "texts.csv"
        texts.write_text("body\n" + "the plot was dull\na good film\n" * 10, "utf-8")
        text = (
            ADAMW
            + """
            surface = {name = "lst", reduction = 4}
            [[stages]]
            surface.readout = "tokens"
            [[stages]]
            surface.readout = "head"
        """
        )
        own = (f"stages.1.data.path={texts}", "stages.1.data.text_column=body", "stages.2.optimizer.lr=0.0")
        assert gradientless(*command(text, "masked", *own)) == 0
        run, told = tmp_path / "run", capsys.readouterr().err
        assert "train       18 rows\n" in told and "its side network" in told
        first = json.loads((run / "summary.json").read_text("utf-8"))["stages"]["1-adamw-lst"]
        assert first["f1_means"] == "f1 (macro, over the tokens)"
        before, after = (
            load_file(run / "stages" / name / "model" / "side.safetensors") for name in ("1-adamw-lst", "2-adamw-lst")
        )
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # not pruned anew
        for name in ("eval", "predict"):
            more = () if name == "eval" else ("a good film",)
            assert gradientless(name, str(run), *more) == 0
            capsys.readouterr()
            assert gradientless(name, str(run / "stages" / "1-adamw-lst"), *more) == 2
            line = "model: must have classes, got a side network that was pretrained on texts alone\n"
            assert capsys.readouterr().err == line
        assert gradientless(*command(text, "masked", f"stages.2.data.path={texts}", name="other")) == 2
        assert capsys.readouterr().err.startswith("stages[2].data: must stand above the stages, got ")

    def test_the_best_is_that_of_the_least_loss(self, command, tmp_path, monkeypatch):
        evaluate = Run.evaluate

        def told(self):
            return {**evaluate(self), "accuracy": 1 - self.done.step / 100, "loss": 1 - self.done.step / 10}

        monkeypatch.setattr(Run, "evaluate", told)
        for readout, best in (("tokens", 6), ("head", 0)):
            settings = (f"surface.readout={readout}", "surface.name=lst", "surface.reduction=4", "steps=6")
            assert gradientless(*command(ADAMW, "masked", *settings, name=readout)) == 0
            assert json.loads((tmp_path / readout / "summary.json").read_text("utf-8"))["model_step"] == best

    def test_spans(self, tmp_path):
        """T5's objective: put back what the decoder says for each sentinel, and the text is whole."""
        model = families.save("t5", tmp_path / "t5")
        families.add_sentinels(model, 4)
        surface = SURFACES["lst"].create(model, (), readout="tokens", reduction=4, max_length=64)
        first, start, end = surface.tokenizer.convert_tokens_to_ids("<extra_id_0>"), 0, 3
        texts = ["bright", "a strange film", "the plot was very dull " * 8, "a good film was bright " * 100]
        encoded = surface.encode([Example(text, 1) for text in texts])
        drawn: dict[int, set[tuple[int, ...]]] = {}
        for row in range(len(encoded)):
            batch, target = encoded.batch([row]), encoded.expected([row]).tolist()
            text = surface.tokenizer(texts[row % 4], truncation=True, max_length=64)["input_ids"]
            assert target[-1] == end and batch["decoder_input_ids"].tolist() == [[start, *target[:-1]]]
            assert batch["said"].all() and batch["attention_mask"].all() and "token_type_ids" not in batch
            left, dropped, whole = batch["input_ids"][0].tolist(), {}, []
            for token in target[:-1]:
                if token >= first:
                    spoken = dropped.setdefault(token, [])
                else:
                    spoken.append(token)
            for token in left:
                whole += dropped[token] if token >= first else [token]
            assert whole == text
            sentinels = [token for token in left if token >= first]
            # In order, one last one behind them, and never two beside each other: each stands for a span of its own.
            assert sentinels == list(range(first, first + len(sentinels))) == list(dropped)[:-1]
            assert list(dropped)[-1] == first + len(sentinels) and dropped[first + len(sentinels)] == []
            assert not any(a >= first and b >= first for a, b in itertools.pairwise(left))
            count = len(text) - 2  # the tokenizer's own first and last
            assert sum(map(len, dropped.values())) == max(1, round(0.15 * count)) and all(map(dropped.get, sentinels))
            assert len(sentinels) == min(3, max(1, round(0.15 * count / 3)))  # the fourth sentinel is the last
            assert torch.equal(encoded.batch([row])["input_ids"], batch["input_ids"])
            drawn.setdefault(row % 4, set()).add(tuple(left))
        assert [len(found) for _, found in sorted(drawn.items())] == [1, 3, 10, 10]
        ends = {left[-2] >= first for left in drawn[2]}
        assert ends == {True, False}  # the end of a text is dropped at times
        rows = encoded.batch([1, 2])
        assert rows["decoder_input_ids"][0, int(rows["said"][0].sum()) :].unique().tolist() == [0]

    def test_a_text_to_text_model_without_sentinels_is_refused(self, tmp_path):
        surface = SURFACES["lst"].create(families.save("t5", tmp_path / "t5"), (), readout="tokens", reduction=4)
        with pytest.raises(UserError, match=r"^lst: readout 'tokens' needs a tokenizer with sentinel tokens, got none"):
            surface.encode(self.EXAMPLES)

    def test_text_to_text_pretraining_lowers_its_loss(self, command, tmp_path, models):
        families.add_sentinels(models["t5"], 3)
        settings = ("surface.readout=tokens", "surface.name=lst", "surface.reduction=2", "optimizer.lr=1e-2")
        assert gradientless(*command(ADAMW, "t5", *settings, "steps=12", "schedule.name=constant")) == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = [each["loss"] for each in map(json.loads, lines) if "accuracy" in each]
        assert len(losses) > 2 and losses[-1] < losses[0]


class TestConfiguration:
    def test_what_a_stage_does_not_say_is_as_above(self, tmp_path):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPES[next(iter(RECIPES))], "utf-8")
        config = RunConfig.load(recipe, ["stages.ladder.steps=7", "stages.1.seed=3", "surface.recompute=true"])
        first, second = (stage.config for stage in config.staged)
        assert [stage.folder for stage in config.staged] == ["1-mezo-full", "2-ladder"]
        assert (first.seed, second.seed, first.steps, second.steps) == (3, 42, 4000, 7)
        assert first.optimizer.arguments == {"lr": 1e-6} and second.optimizer.arguments == {"lr": 1e-3}
        assert second.surface.readout == "prompt" and second.surface.recompute and second.data.few_shot == 16
        recipe.write_text(config.toml(), "utf-8")
        again = RunConfig.load(recipe)
        assert again == config and again.staged == config.staged
        other = RunConfig.load(recipe, ["stages.2.steps=8"])
        assert other.differences(config) == ["stages[2].steps: 8 here, 7 there"]

    def test_options_of_another_surface_stay_behind(self, tmp_path):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(
            "surface = {name = 'lora', rank = 2, pooling = 'mean'}\n[[stages]]\n[[stages]]\nsurface.name = 'head'\n"
        )
        first, second = (stage.config.surface for stage in RunConfig.load(recipe).staged)
        assert first.rank == 2 and second.rank is None and second.pooling == "mean"

    @pytest.mark.parametrize(
        ("setting", "line"),
        [
            ("stages=3", "stages: must be a list of tables, got 3"),
            ("stages.3.steps=1", "stages: unknown stage '3'. Known: 1, 2, ladder"),
            ("stages.1=3", "stages.1: must be a table, got 3"),
        ],
    )
    def test_no_such_stage(self, setting, line, tmp_path):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPES[next(iter(RECIPES))], "utf-8")
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            RunConfig.load(recipe, [setting])

    def test_a_start_without_a_stage_before(self, command, tmp_path, capsys):
        assert gradientless(*command(ADAMW, "bert", "surface.start=previous")) == 2
        line = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert line == "surface.start: 'previous' needs a stage before, got a run without one"
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("program", [("diagnose",), ("compare", "--methods", "mezo", "--forward-passes", "10")])
    def test_programs_of_one_surface_refuse_stages(self, program, command, capsys):
        recipe, *settings = command("[[stages]]\n", "bert")[1:-2]
        name, *more = program
        assert gradientless(name, recipe, *settings, *more) == 2
        assert capsys.readouterr().err.startswith("stages: must not stand in a recipe to ")
