"""ForwardTrainer: the Trainer's loop with steps of forward passes."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import CONFIGS
from tiny_trainer import make_arguments, make_model, make_rows, make_trainer
from torch.nn.functional import cross_entropy

import gradientless
from gradientless import GLD, STP, MeZO, UserError
from gradientless.integrations.transformers import _Batch
from gradientless.search.fingerprint import fingerprint
from gradientless.search.optim import OPTIMIZERS
from gradientless.search.trajectory import Trajectory
from pages import ROOT

METHODS = {
    "mezo": ("mezo", {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1, "samples": 2}),
    "mezo walking": ("mezo", {"lr": 0.02, "eps": 1e-3, "noise": "rademacher", "evaluator": "walk"}),
    "mezo injecting": ("mezo", {"lr": 0.02, "eps": 1e-3, "rank": 1, "evaluator": "inject"}),
    "mezoadam": ("mezoadam", {"lr": 0.01, "eps": 1e-3}),
    "stp": ("stp", {"radius": 0.02}),
    "gld with options": ("gld", {"radius": 0.1, "candidates": 3, "entries": 6, "options": (2, 2)}),
    "gld with momentum": ("gld", {"radius": 0.1, "candidates": 3, "momentum": 0.4, "momentum_weighted": True}),
    "gld by magnitude": ("gld", {"radius": 0.1, "entries": 12, "selection": "magnitude", "reselect_every": 5}),
    "smtp": ("smtp", {"radius": 0.02}),
}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watch(transformers.TrainerCallback):
    """Which events came, with the weights and mode that they saw."""

    def __init__(self):
        self.events: list[tuple[str, int, int]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.events.append(("before", state.global_step, fingerprint(dict(model.named_parameters()))))
        assert not model.training

    def on_optimizer_step(self, args, state, control, model=None, **others):
        self.events.append(("after", state.global_step, fingerprint(dict(model.named_parameters()))))
        assert all(parameter.grad is None for parameter in model.parameters())

    def on_substep_end(self, args, state, control, model=None, **others):
        self.events.append(("substep", state.global_step, fingerprint(dict(model.named_parameters()))))


@pytest.mark.parametrize(("method", "options", "points"), [("stp", {"radius": 0.02}, 3), (*METHODS["mezo"], 4)])
def test_it_learns_logs_evaluates_and_saves(method, options, points, tmp_path):
    watch = Watch()
    trainer = make_trainer(
        tmp_path,
        method,
        options,
        trainer={"callbacks": [watch], "compute_metrics": lambda p: {"accuracy": (p[0].argmax(-1) == p[1]).mean()}},
        max_steps=12, save_steps=6, eval_strategy="steps", eval_steps=6, gradient_accumulation_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    history = trainer.state.log_history
    logged = [line for line in history if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6, 8, 10, 12]
    assert "grad_norm" not in logged[0]
    assert [line["forward_passes"] for line in logged] == [2 + points * line["step"] for line in logged]
    assert logged[-1]["learning_rate"] < logged[0]["learning_rate"]
    assert trainer.evaluate()["eval_loss"] < before
    assert "eval_accuracy" in next(line for line in history if "eval_loss" in line)
    assert result.global_step == 12 and result.training_loss < before
    assert {"checkpoint-6", "checkpoint-12", "trajectory.bin"} <= {path.name for path in tmp_path.iterdir()}
    assert [name for name, _, _ in watch.events[:6]] == ["substep", "before", "after"] * 2
    assert watch.events[0][2] == watch.events[1][2], "a micro-batch alone moves nothing"
    moved = [after[2] != before[2] for before, after in zip(watch.events[1::3], watch.events[2::3], strict=True)]
    assert sum(moved) > 3


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_ends_with_the_same_bits_and_replays(kind, tmp_path):
    method, options = METHODS[kind]
    how = {"warmup_steps": 2, "lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": 3}
    straight = make_trainer(tmp_path / "straight", method, options, make_model(frozen=True), **how)
    straight.train()
    stopped = make_trainer(tmp_path / "stopped", method, options, make_model(frozen=True), **how)
    stopped.add_callback(Stop(5))  # one step after the checkpoint: the log runs ahead of it
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", method, options, make_model(seed=9, frozen=True), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))

    assert straight.state.global_step == resumed.state.global_step == 8
    assert equal(weights(straight.model), weights(resumed.model))
    for folder in ("straight", "stopped"):
        model = make_model(frozen=True)
        again = OPTIMIZERS[method](model.named_parameters(), **options, seed=1)
        again.replay(tmp_path / folder / "trajectory.bin")
        assert equal(weights(model), weights(straight.model)), folder
        other = OPTIMIZERS[method](make_model(seed=9, frozen=True).named_parameters(), **options, seed=1)
        with pytest.raises(UserError, match="parameters must be those that the log starts from"):
            other.replay(tmp_path / folder / "trajectory.bin")


@pytest.mark.parametrize(("stop", "split"), [(12, 1), (16, 1), (19, 2)])
def test_a_run_stopped_within_a_later_shuffled_epoch_goes_on_with_the_same_rows(stop, split, tmp_path):
    """Epochs of 8 steps: within the second, at its end, within the third, whose steps are of two micro-batches."""
    how = {"max_steps": 20, "save_steps": stop, "logging_steps": 1, "per_device_train_batch_size": 8 // split}
    how["gradient_accumulation_steps"] = split
    straight = make_trainer(tmp_path / "straight", **how)
    straight.train()
    stopped = make_trainer(tmp_path / "stopped", **how)
    stopped.add_callback(Stop(stop))
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", model=make_model(seed=9), **how)
    resumed.train(resume_from_checkpoint=True)
    wanted, found = (
        [(line["step"], line["loss"]) for line in t.state.log_history if "loss" in line] for t in (straight, resumed)
    )
    assert len(wanted) == 20 and found == wanted
    logs = [(tmp_path / folder / "trajectory.bin").read_bytes() for folder in ("straight", "stopped")]
    assert logs[0] == logs[1] and equal(weights(straight.model), weights(resumed.model))
    assert len({loss for _, loss in wanted[:8]}) == 8, "the rows of a step show in its loss"


@pytest.mark.parametrize("ready", [False, True])
def test_directions_of_low_rank_of_a_large_model(ready, tmp_path, monkeypatch):
    """Probes inside the modules, as the log says: were the model small, copies would be made."""
    monkeypatch.setattr("gradientless.search.evaluators.SMALL", 0)
    options, model = {"lr": 1e-3, "eps": 1e-3, "rank": 1, "seed": 1}, make_model()
    named = MeZO(model.named_parameters(), **options)
    trainer = make_trainer(tmp_path, "mezo", options, model, {"optimizers": (named, None)} if ready else None)
    trainer.train()
    assert trainer.state.global_step == 8 and (named.t == 8) is ready
    again = make_model()
    MeZO(again.named_parameters(), **options).replay(tmp_path / "trajectory.bin")
    assert equal(weights(again), weights(trainer.model)) and not equal(weights(again), weights(make_model()))


class Stop(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("budget", "steps"), [(21, 4), (22, 5), (1000, 8)])  # steps of four passes behind two
def test_the_shorter_of_steps_and_forward_passes_ends_training(budget, steps, tmp_path):
    method, options = METHODS["mezo"]
    how = {"trainer": {"forward_passes": budget}, "max_steps": 8, "save_steps": 3}
    trainer = make_trainer(tmp_path, method, options, **how)
    assert trainer.train().global_step == steps
    assert trainer._forward.forward_passes == 2 + 4 * steps
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0  # at the end of its schedule
    again = make_trainer(tmp_path, method, options, make_model(seed=9), **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == steps and equal(weights(trainer.model), weights(again.model))
    for one in (again, make_trainer(tmp_path, method, options, make_model(seed=9), **how)):  # from the end, too
        one.train(resume_from_checkpoint=True)
        assert one.state.max_steps == steps and one._forward.forward_passes == 2 + 4 * steps
        assert equal(weights(trainer.model), weights(one.model))


@pytest.mark.parametrize("budget", [7.5, "100", True, 0])
def test_a_budget_that_is_no_number_of_passes_is_refused(budget, tmp_path):
    with pytest.raises(UserError, match=r"^ForwardTrainer: forward_passes must be (a whole number|>= 1), got "):
        make_trainer(tmp_path, *METHODS["mezo"], trainer={"forward_passes": budget})


def test_a_budget_below_one_step_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, *METHODS["mezo"], trainer={"forward_passes": 3})
    with pytest.raises(UserError, match=r"forward_passes: must pay for one step \(6 passes\), got 3"):
        trainer.train()


def test_a_run_resumes_from_its_end(tmp_path):
    make_trainer(tmp_path).train()
    longer = make_trainer(tmp_path, max_steps=12, lr_scheduler_type="linear")
    longer.train(resume_from_checkpoint=True)  # the schedule had come to zero
    assert longer.state.global_step == 12


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mezo", {"clip": 0.5}, "MeZO: clip must be None, as the state says, got 0.5"),
        ("mezo", {"samples": 3}, "MeZO: samples must be 2, as the state says, got 3"),
        ("mezo", {"rank": 1}, "MeZO: rank must be None, as the state says, got 1"),
        ("mezo", {"noise": "rademacher"}, "MeZO: noise must be 'gaussian', as the state says, got 'rademacher'"),
        ("mezosign", {}, "MeZOSign: optimizer must be 'MeZO', as the state says, got 'MeZOSign'"),
        ("stp", {}, "STP: optimizer must be 'MeZO', as the state says, got 'STP'"),
    ],
)
def test_a_run_is_resumed_by_the_same_optimizer_alone(method, options, message, tmp_path):
    own = {"eps": 1e-3, "samples": 2, "evaluator": "snapshot"}
    make_trainer(tmp_path, "mezo", own, save_steps=4, max_steps=4).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    theirs = {**(own if method != "stp" else {"evaluator": "snapshot"}), **options}
    other = make_trainer(tmp_path, method, theirs, make_model(seed=9), save_steps=4)
    with pytest.raises(UserError, match=f"^{message}"):
        other.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.bin")}.items() <= before.items()


def test_a_log_that_is_not_the_checkpoints_is_refused(tmp_path):
    make_trainer(tmp_path, *METHODS["mezo"], save_steps=4, max_steps=4).train()
    log = Trajectory.open(tmp_path / "checkpoint-4" / "trajectory.bin")
    log.truncate(3)
    log.close()
    with pytest.raises(UserError, match=r"^MeZO: the log must end at step 4, as the optimizer stands, got 3"):
        make_trainer(tmp_path, *METHODS["mezo"], save_steps=4).train(resume_from_checkpoint=True)


def test_the_state_loads_without_unpickling(tmp_path):
    make_trainer(tmp_path, *METHODS["gld with momentum"], make_model(frozen=True)).train()
    state = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert state["search"]["t"] == 4 and state["search"]["buffers"]
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert set(weights(make_model())) <= set(saved)


def test_micro_batches_are_one_batch_weighted_by_labels(tmp_path):
    """A decoder's labels shift by one and may be ignored, so the parts count unequal numbers of them."""
    model = make_model(kind="llama").double()
    trainer = make_trainer(tmp_path, model=model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 12, (6, 9), generator=generator)
    labels = ids.clone()
    labels[:2, 2:] = -100  # few in the first part
    labels[4:] = -100  # none in the last
    labels[2:4, 0] = -100
    parts = [{"input_ids": ids[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2, 4)]
    assert [trainer.labels_in(part) for part in parts] == [2, 16, 0]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
        wanted = float(cross_entropy(logits, labels[:, 1:].flatten()))
        assert _Batch(trainer, parts, None)() == pytest.approx(wanted, rel=1e-6)
        assert _Batch(trainer, parts[2:], None)() != _Batch(trainer, parts[2:], None)(), "no label: not a number"


def test_a_loss_function_of_the_users_gets_the_count(tmp_path):
    counts = []

    def loss(outputs, labels, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    how = {"gradient_accumulation_steps": 2, "max_steps": 2}
    own = make_trainer(tmp_path / "own", trainer={"compute_loss_func": loss}, **how)
    own.train()
    plain = make_trainer(tmp_path / "plain", **how)
    plain.train()
    assert set(counts) == {16}
    mine, other = ([line["loss"] for line in t.state.log_history if "loss" in line] for t in (own, plain))
    assert mine == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision(precision, tmp_path):
    model = make_model()
    if precision == "weights":
        model = model.to(torch.bfloat16)
    before = weights(model)
    trainer = make_trainer(tmp_path, model=model, bf16=precision == "autocast")
    trainer.train()
    assert next(model.parameters()).dtype == (torch.bfloat16 if precision == "weights" else torch.float32)
    assert not equal(before, weights(trainer.model))
    assert trainer.accelerator.scaler is None


def test_a_ready_optimizer_and_scheduler(tmp_path):
    model = make_model()
    optimizer = STP(model.named_parameters(), radius=0.02, seed=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(tmp_path, model=model, trainer={"optimizers": (optimizer, scheduler)}, max_steps=4)
    trainer.train()
    assert optimizer.t == 4 and optimizer.param_groups[0]["lr"] == 0.02 / 16
    trainer.args.max_steps = 6
    trainer.train()  # goes on with the same optimizer and the same log
    assert len(gradientless.Trajectory.open(tmp_path / "trajectory.bin")) == optimizer.t == 10


def test_options_still_pending_are_taken_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, *METHODS["gld with options"], make_model(frozen=True))
    trainer.train()
    last = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert not all(torch.equal(last[name], tensor) for name, tensor in weights(trainer.model).items())
    model = make_model(frozen=True)
    GLD(model.named_parameters(), **METHODS["gld with options"][1], seed=1).replay(tmp_path / "trajectory.bin")
    assert equal(weights(model), weights(trainer.model))


def test_operations_count_forward_passes_only(tmp_path):
    trainer = make_trainer(tmp_path, trainer={"train_dataset": make_rows(8)}, max_steps=1)
    trainer.train()
    both_ways = transformers.Trainer.floating_point_ops(trainer, trainer.data_collator(make_rows(8)))
    assert both_ways > 0 and trainer.state.total_flos == pytest.approx(5 * both_ways / 3)


def test_the_named_method_takes_rate_decay_and_seed_from_the_arguments(tmp_path):
    trainer = make_trainer(tmp_path, "mezo", {"eps": 1e-2}, learning_rate=3e-4, weight_decay=0.2, seed=7)
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (3e-4, 0.2, 1e-2)
    assert optimizer.state_dict()["search"]["seed"] == 7
    assert set(group["names"]) == set(weights(trainer.model))


def test_weight_decay_leaves_normalisations_of_any_shape_alone(tmp_path):
    model = make_model()
    norm = model.bert.embeddings.LayerNorm
    norm.weight = torch.nn.Parameter(norm.weight.detach().unsqueeze(0))  # of two dimensions, as some models have it
    trainer = make_trainer(tmp_path, "mezo", {"lr": 1e-2}, model, weight_decay=0.2)
    decayed = trainer.create_optimizer().decay()
    kinds = {type(module) for name, module in model.named_modules() for key in decayed if key == f"{name}.weight"}
    assert kinds == {torch.nn.Linear, torch.nn.Embedding}


def adamw(model):
    return torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("ForwardTrainer: optimizers must give a ForwardOptimizer, got AdamW", {"trainer": {"optimizers": adamw}}),
        ("ForwardTrainer: unknown forward_optimizer 'stq'; did you mean 'stp'?", {"method": "stq"}),
        ("ForwardTrainer: unknown option of STP 'radios'; did you mean 'radius'?", {"options": {"radios": 1.0}}),
        ("ForwardTrainer: weight_decay must be 0 for STP, got 0.1", {"weight_decay": 0.1}),
        ("ForwardTrainer: neftune_noise_alpha must be off, got 5.0", {"neftune_noise_alpha": 5.0}),
    ],
)
def test_what_cannot_be_meant_is_refused(message, more, tmp_path):
    model = make_model()
    more = {key: dict(value) if isinstance(value, dict) else value for key, value in more.items()}
    if "optimizers" in more.get("trainer", {}):
        more["trainer"]["optimizers"] = (more["trainer"]["optimizers"](model), None)
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path, model=model, **more).train()
    assert str(caught.value).startswith(message)


def test_a_checkpoint_without_optimizer_state_is_refused(tmp_path):
    make_trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(UserError, match=r"must hold optimizer.pt, got '.*checkpoint-8' without"):
        make_trainer(tmp_path, max_steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_two_processes_hold_the_same_bits_as_one(tmp_path):
    """Two processes of 8 rows each are one process with two micro-batches of the same rows."""
    from two_processes import METHODS as methods

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    both = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    for method, options in methods.items():
        one = make_trainer(tmp_path / "one" / method, method, options, gradient_accumulation_steps=2)
        before = fingerprint(dict(one.model.named_parameters()))
        one.train()
        first, second = (seen[method] for seen in both)
        assert first["processes"] == 2 and first["backend"] == "gloo" and not first["wrapped"]
        assert first["logs"] and not second["logs"]
        assert first["fingerprint"] == second["fingerprint"] == fingerprint(dict(one.model.named_parameters())), method
        assert first["fingerprint"] != before
        assert first["losses"] == [line["loss"] for line in one.state.log_history if "loss" in line]
        model = make_model()
        again = OPTIMIZERS[method](model.named_parameters(), **options, seed=1)
        again.replay(tmp_path / method / "trajectory.bin")
        assert fingerprint(dict(model.named_parameters())) == first["fingerprint"], "one log of both processes"
    for seen in both:
        assert seen["error"].startswith("ForwardTrainer: processes must hold equal weights, got ")
        assert seen["error"].endswith("at step 4")


def test_the_example_runs(tmp_path):
    from tiny_run import make_model as save_body
    from tiny_run import write_table

    place = importlib.util.spec_from_file_location("example_trainer", ROOT / "examples" / "trainer.py")
    example = importlib.util.module_from_spec(place)
    place.loader.exec_module(example)
    model, table = save_body(tmp_path / "model"), write_table(tmp_path / "rows.csv", 60)
    out = tmp_path / "out"
    found = example.main(["--model", model, "--data", table, "--out", str(out), "--steps", "4", "--batch-size", "8"])
    assert 0 <= found["eval_accuracy"] <= 1
    transformers.AutoModelForSequenceClassification.from_pretrained(out)


def test_the_example_is_a_plain_script_but_for_two_lines():
    """Without them it is one that `transformers.Trainer` itself runs."""
    source = (ROOT / "examples" / "trainer.py").read_text("utf-8")
    plain, changed = [], 0
    for line in source.splitlines():
        if "ForwardTrainer" in line and "# was: " in line:
            plain.append(line.partition("# was: ")[2])
        elif "optimizer_options=" not in line:
            plain.append(line)
            continue
        changed += 1
    assert changed == 2
    tree = ast.parse("\n".join(plain))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
    names = {alias.name for node in imports for alias in node.names}
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Trainer"]
    given = {keyword.arg for keyword in call.keywords}
    assert "Trainer" in names and given <= set(inspect.signature(transformers.Trainer).parameters)
    assert not any("forward" in node.id.lower() for node in ast.walk(tree) if isinstance(node, ast.Name))


def test_the_rows_and_models_are_what_the_tests_take_them_for(tmp_path):
    assert CONFIGS["bert"]().hidden_dropout_prob > 0, "only a model with dropout shows that it is off"
    assert make_arguments(tmp_path).gradient_accumulation_steps == 1
