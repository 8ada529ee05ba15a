"""Adapters and parts of a model: side_lora, lora, ia3, prefix, prompt, bias, layers, in models of every family."""

from __future__ import annotations

import itertools
import json

import families
import numpy as np
import peft
import pytest
import torch
import transformers
from families import FAMILIES, LABELS, prompt_of
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language.surfaces.adapter import BASE, block_linears
from gradientless.language.surfaces.full import FullSurface
from gradientless.language.surfaces.lora import Ia3Surface, LoraSurface
from gradientless.language.surfaces.part import BiasSurface, LayersSurface
from gradientless.language.surfaces.prefix import NAME, NETWORK, PrefixSurface, PromptSurface
from gradientless.language.surfaces.products import Watch, measure
from gradientless.language.surfaces.side_lora import SideLinear, SideLoraSurface
from gradientless.search.optim import OPTIMIZERS

SURFACES = {
    "side_lora": (SideLoraSurface, {"rank": 2}),
    "lora": (LoraSurface, {"rank": 2}),
    "ia3": (Ia3Surface, {}),
    "bias": (BiasSurface, {}),
    "prefix": (PrefixSurface, {"tokens": 3}),
    "prompt": (PromptSurface, {"tokens": 3}),
    "layers": (LayersSurface, {"pattern": [r"\.1\.", "[nN]orm"]}),
}
MODELS = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "text-to-text": "AutoModelForSeq2SeqLM"}
PEFT = ("side_lora", "lora", "ia3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = families.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def make(name, kind, folder, readout="prompt", **options):
    surface, standing = SURFACES[name]
    prompt = prompt_of(kind) if readout == "prompt" else None
    return surface.create(
        folder(kind), LABELS, readout=readout, prompt=prompt, max_length=16, **{"seed": 3, **standing, **options}
    )


def full(kind, folder, readout="prompt"):
    prompt = prompt_of(kind) if readout == "prompt" else None
    return FullSurface.create(folder(kind), LABELS, readout=readout, prompt=prompt, max_length=16, seed=3)


def batch_of(surface, rows=(0, 1, 2, 4)):
    encoded = surface.encode(EXAMPLES)
    return encoded.batch(rows), encoded.labels[list(rows)]


def train(surface, steps=3):
    batch, labels = batch_of(surface)
    optimizer = torch.optim.AdamW(surface.trainable().values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(surface.logits(surface.prepare(batch)), labels).backward()
        optimizer.step()
    return surface


def logits(surface):
    with torch.no_grad():
        return surface.logits(surface.prepare(batch_of(surface)[0]))


FIT = dict.fromkeys(SURFACES, FAMILIES) | {
    "bias": ("bert", "distilbert", "roberta", "opt"),
    "prefix": ("bert", "roberta", "opt", "llama"),
    "prompt": ("bert", "distilbert", "roberta", "opt", "llama"),
}
CASES = [(name, kind, "prompt") for name in SURFACES for kind in FIT[name]]


@pytest.mark.parametrize(("name", "kind", "readout"), CASES)
def test_trains_a_part_and_is_saved(name, kind, readout, folder, tmp_path):
    surface = make(name, kind, folder, readout)
    same = torch.equal(logits(surface), logits(full(kind, folder, readout)))
    assert same == (name not in ("prefix", "prompt"))  # the others start as the model itself
    names = set(surface.trainable())
    frozen = {n: t.clone() for n, t in surface.model.state_dict(keep_vars=True).items() if not t.requires_grad}
    counted = surface.products()
    assert counted.tuned == sum(t.numel() for t in surface.trainable().values()) <= counted.touched <= counted.total
    train(surface)
    for tensor_name, tensor in surface.model.named_parameters():
        assert (tensor.grad is not None) == (tensor_name in names), tensor_name
    state = surface.model.state_dict()
    assert frozen and all(torch.equal(state[n], tensor) for n, tensor in frozen.items())
    moved = logits(surface)
    assert not torch.equal(moved, logits(full(kind, folder, readout)))
    surface.save(tmp_path / "saved")
    assert torch.equal(logits(surface), moved)
    again = type(surface).load(tmp_path / "saved")
    assert torch.equal(logits(again), moved) and set(again.trainable()) == names
    assert again.options == surface.options


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", PEFT)
def test_peft_opens_what_is_saved(name, kind, folder, tmp_path):
    surface = train(make(name, kind, folder))
    surface.save(tmp_path)
    kind = getattr(transformers, MODELS[surface.reading.encoder.family])
    base, loaded = kind.from_pretrained(tmp_path / BASE, output_loading_info=True)
    assert not loaded["unexpected_keys"] and not base.eval().training, "the plain model's tensors and no others"
    tokens = {n: t for n, t in batch_of(surface)[0].items() if n != "slots"}
    with torch.no_grad():
        plain = base(**tokens).logits
        opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
        found = opened(**tokens).logits
        assert torch.equal(found, surface.model(**tokens).logits)
    assert not torch.equal(found, plain)
    merged = opened.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, found, atol=1e-4, rtol=1e-4)


def test_a_tuned_head_stands_in_the_base(folder, tmp_path):
    surface = make("side_lora", "distilbert", folder, "head")
    head = {name: tensor.detach().clone() for name, tensor in surface.head_tensors().items()}
    assert len(head) == 4 and set(head) < set(surface.trainable())
    train(surface)
    assert all(not torch.equal(tensor, surface.trainable()[name]) for name, tensor in head.items())
    surface.save(tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / BASE)
    opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        batch = {n: t for n, t in batch_of(surface)[0].items() if n != "token_type_ids"}
        assert torch.equal(opened(**batch).logits, logits(surface))


def test_a_saved_part_opens_with_transformers(folder, tmp_path):
    surface = train(make("layers", "bert", folder))
    surface.save(tmp_path)
    opened = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / BASE)
    state = surface.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.state_dict().items())


class TestVirtualTokens:
    @pytest.mark.parametrize(("name", "kind"), [(n, k) for n in ("prefix", "prompt") for k in FIT[n]])
    def test_they_start_as_real_tokens(self, name, kind, folder):
        """The model answers as if as many tokens, drawn by the seed, stood in front of the text; a prefix, as if these
        were blind to the text."""
        surface = make(name, kind, folder)
        first = int(kind == "roberta")  # its positions start behind its padding index
        ids = torch.randint(surface.core.config.vocab_size, (1, 3), generator=torch.Generator().manual_seed(3))
        tokens = {n: t for n, t in batch_of(surface)[0].items() if n in ("input_ids", "attention_mask")}
        longer = {
            "input_ids": torch.cat([ids.expand(4, -1), tokens["input_ids"]], dim=1),
            "attention_mask": torch.cat([torch.ones(4, 3, dtype=torch.int64), tokens["attention_mask"]], dim=1),
        }
        if kind not in ("opt", "llama"):
            length = longer["input_ids"].shape[1]
            longer["position_ids"] = torch.arange(first, first + length).expand(4, -1)
            if name == "prefix":
                seen = longer["attention_mask"].bool()[:, None, None, :].repeat(1, 1, length, 1)
                seen[:, :, :3, 3:] = False
                longer["attention_mask"] = seen
        with torch.no_grad():
            expected = full(kind, folder).model(**longer).logits[:, 3:]
            found = surface.model(**tokens).logits
        written = tokens["attention_mask"].bool()
        torch.testing.assert_close(found[written], expected[written], atol=1e-5, rtol=1e-5)
        random = make(name, kind, folder, start="random")
        assert random.virtual.shape == surface.virtual.shape and float(random.virtual.detach().std()) < 0.03
        assert list(surface.trainable()) == [NAME] and "(tokens 3" in surface.describe()

    def test_padding_at_the_left(self, folder):
        for name, kind in (("prefix", "llama"), ("prompt", "llama"), ("prefix", "opt"), ("prompt", "opt")):
            left = make(name, kind, folder, padding="left")
            torch.testing.assert_close(logits(left), logits(make(name, kind, folder)), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [*itertools.product(["prefix", "prompt"], ["opt", "llama"])]
        + [("prefix", "bert"), ("prefix", "roberta")]
        + [("prompt", kind) for kind in ("bert", "distilbert", "roberta")],
    )
    def test_peft_opens_them(self, name, kind, folder, tmp_path):
        surface = train(make(name, kind, folder))
        surface.save(tmp_path)
        masked = kind not in ("opt", "llama")
        base = (transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM).from_pretrained(
            tmp_path / BASE
        )
        opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
        tokens = {n: t for n, t in batch_of(surface)[0].items() if n in ("input_ids", "attention_mask")}
        written = tokens["attention_mask"].bool()
        with torch.no_grad():
            found = opened(**tokens).logits[:, -written.shape[1] :]
            assert torch.equal(found[written], surface.model(**tokens).logits[written])


class TestReparameterised:
    """A prefix that the network of Li and Liang makes."""

    @pytest.mark.parametrize("kind", ["opt", "llama", "roberta"])
    def test_starts_as_the_plain_one_trains_and_is_saved(self, kind, folder, tmp_path):
        plain, surface = make("prefix", kind, folder), make("prefix", kind, folder, reparameterise=True)
        torch.testing.assert_close(surface.virtual, plain.virtual, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits(surface), logits(plain), atol=1e-4, rtol=1e-4)
        names = set(surface.trainable())
        assert {name.rpartition(".")[0] for name in names} == {NETWORK} and len(names) == 5
        frozen = {n: t.clone() for n, t in surface.model.state_dict().items() if n not in names}
        start = {n: t.detach().clone() for n, t in surface.trainable().items()}
        moved = logits(train(surface))
        state = surface.model.state_dict()
        assert all(torch.equal(state[n], tensor) for n, tensor in frozen.items())
        assert all(not torch.equal(state[n], tensor) for n, tensor in start.items())
        surface.save(tmp_path)
        assert torch.equal(logits(surface), moved)
        again = PrefixSurface.load(tmp_path)
        assert torch.equal(logits(again), moved) and set(again.trainable()) == names
        assert again.options == surface.options and "reparameterise True" in again.describe()

        base = getattr(transformers, MODELS[surface.reading.encoder.family]).from_pretrained(tmp_path / BASE)
        opened = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
        tokens = {n: t for n, t in batch_of(surface)[0].items() if n in ("input_ids", "attention_mask")}
        written = tokens["attention_mask"].bool()
        with torch.no_grad():
            assert torch.equal(opened(**tokens).logits[written], surface.model(**tokens).logits[written])
        (tmp_path / "prefix_network.safetensors").write_bytes(b"no")
        with pytest.raises(UserError, match=r"prefix_network.safetensors: must hold the prefix's network, got none or"):
            PrefixSurface.load(tmp_path)

    def test_the_network_is_the_papers(self, folder):
        """tanh between two layers, in float64 NumPy; d is the width of a layer's keys."""
        surface = make("prefix", "llama", folder, reparameterise=True, start="random")
        E, W1, b1, W2, b2 = (t.detach().double().numpy() for t in surface.network.parameters())
        width = 2 * 4  # two heads of keys, of four entries
        assert E.shape == (3, width) and W1.shape == (width, width) and W2.shape == (4 * 2 * width, width)
        np.testing.assert_allclose(
            surface.virtual.detach().numpy(), np.tanh(E @ W1.T + b1) @ W2.T + b2, rtol=1e-5, atol=1e-6
        )
        plain = make("prefix", "llama", folder, start="random")
        assert surface.virtual.shape == plain.virtual.shape
        other = make("prefix", "llama", folder, reparameterise=True, start="random", seed=4)
        assert not torch.equal(surface.virtual, other.virtual)

    def test_more_tokens_than_it_is_wide(self, folder):
        """Then "real" is as near as the network gets: nearer than their mean."""
        plain = make("prefix", "llama", folder, tokens=12)
        surface = make("prefix", "llama", folder, tokens=12, reparameterise=True)
        rest = (surface.virtual - plain.virtual).square().sum()
        mean = (plain.virtual.mean(dim=0) - plain.virtual).square().sum()
        assert 1e-6 < rest < 0.9 * mean


class TestSideLora:
    def test_forward_and_backward_by_hand(self):
        """The three products of its docstring, in float64 NumPy; dy W is not among them."""
        generator = torch.Generator().manual_seed(0)
        linear = torch.nn.Linear(5, 4).double()
        side = SideLinear(linear, 2, 3.0, generator).double()
        torch.nn.init.normal_(side.lora_B.weight, generator=generator)
        x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
        dy = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
        y = side(x)
        y.backward(dy)
        W, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        A, B = side.lora_A.weight.detach().numpy(), side.lora_B.weight.detach().numpy()
        flat, dflat = x.detach().numpy().reshape(6, 5), dy.numpy().reshape(6, 4)
        np.testing.assert_allclose(y.detach().numpy().reshape(6, 4), flat @ W.T + b + 3 * flat @ A.T @ B.T)
        np.testing.assert_allclose(side.lora_B.weight.grad.numpy(), 3 * dflat.T @ (flat @ A.T))
        np.testing.assert_allclose(side.lora_A.weight.grad.numpy(), (3 * dflat @ B).T @ flat)
        np.testing.assert_allclose(x.grad.numpy().reshape(6, 5), 3 * dflat @ B @ A)
        assert not side.plain().weight.requires_grad
        assert {n for n, _ in side.named_parameters()} == {"lora_A.weight", "lora_B.weight"}

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_the_pretrained_products_are_skipped(self, kind, folder):
        """Of the backward pass, and nothing else: LoRA's has one product more for each of its pretrained layers that a
        gradient passes, of the size of dy W."""
        side, lora = make("side_lora", kind, folder), make("lora", kind, folder)
        pretrained = {f"{name}.weight" for name, m in side.core.named_modules() if isinstance(m, SideLinear)}
        assert len(pretrained) == len(block_linears(full(kind, folder).model))
        batch = batch_of(side)[0]
        ours, theirs = measure(side, batch), measure(lora, batch)
        passed = {name.replace(".base_layer", "") for name in theirs.names} & pretrained
        assert not ours.names & pretrained and len(passed) > len(pretrained) / 2
        assert theirs.calls - ours.calls == len(passed)
        states = batch["input_ids"].numel(), batch.get("decoder_input_ids", batch["input_ids"]).numel()
        work = 0
        for name in passed:  # a decoder's layers read its own tokens, but for keys and values of the encoder's
            decodes = name.startswith("decoder") and not any(
                p in name for p in ("EncDecAttention.k", "EncDecAttention.v")
            )
            work += states[int(decodes)] * side.core.get_buffer(name).numel()
        assert theirs.multiplies - ours.multiplies == work
        assert ours.tuned == theirs.tuned and ours.total == theirs.total
        buffers = sum(t.numel() for m in side.core.modules() if isinstance(m, SideLinear) for t in m.buffers())
        assert ours.registered == theirs.registered - buffers and ours.touched < theirs.touched

    def test_lora_computes_no_weight_gradient_either(self, folder):
        lora = make("lora", "bert", folder)
        watch = Watch(dict(lora.model.named_parameters()))
        loss = lora.logits(lora.prepare(batch_of(lora)[0])).sum()
        with watch:
            loss.backward()
        assert watch.calls == measure(lora, batch_of(lora)[0]).calls and watch.multiplies > 0

    @pytest.mark.parametrize("kind", FAMILIES)
    def test_forward_equals_lora(self, kind, folder):
        side, lora = make("side_lora", kind, folder), make("lora", kind, folder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in side.branched:
                for part in ("lora_A", "lora_B"):
                    tensor = side.core.get_parameter(f"{name}.{part}.weight")
                    tensor.normal_(0, 0.2, generator=generator)
                    lora.core.get_parameter(f"{name}.{part}.default.weight").copy_(tensor)
        assert torch.equal(logits(side), logits(lora))
        assert not torch.equal(logits(side), logits(full(kind, folder)))

    def test_residual_paths_alone_carry_the_gradient_at_the_start(self, folder):
        """B of what writes to the residual stream has a gradient at once, in every block; the rest from then on."""
        surface = make("side_lora", "bert", folder)
        batch, labels = batch_of(surface)

        def moved():
            for tensor in surface.trainable().values():
                tensor.grad = None
            torch.nn.functional.cross_entropy(surface.logits(surface.prepare(batch)), labels).backward()
            return {n.removesuffix(".weight") for n, t in surface.trainable().items() if t.grad.abs().sum() > 0}

        blocks = [f"bert.encoder.layer.{i}." for i in range(4)]
        assert moved() == {b + w + ".lora_B" for b in blocks for w in ("attention.output.dense", "output.dense")}
        with torch.no_grad():
            for tensor in surface.trainable().values():
                tensor.sub_(0.1 * tensor.grad)
        assert {b + w + ".lora_B" for b in blocks for w in ("attention.self.value", "intermediate.dense")} <= moved()

    def test_a_layer_without_a_branch_passes_no_gradient(self, folder):
        for readout in ("prompt", "head"):
            with pytest.raises(
                UserError, match=r"residual path too, got none behind .*layer.0.attention.self.query.lora_A"
            ):
                make("side_lora", "bert", folder, readout, targets=["query", r".*\.layer\.0\..*value"])
        surface = make("side_lora", "bert", folder, targets=["value", "attention.output.dense"])
        assert surface.branched[0] == "bert.encoder.layer.0.attention.self.value" and len(surface.branched) == 8
        surface = train(surface)
        assert all(tensor.grad.any() for tensor in surface.trainable().values())
        some = make("lora", "bert", folder, targets=[r".*\.layer\.0\..*value"]).trainable()
        assert len(some) == 2 and all(".layer.0." in name for name in some)

    def test_seeds_and_peft_config(self, folder, tmp_path):
        state = torch.random.get_rng_state()
        one, two, other = (make("side_lora", "bert", folder, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), state)
        first = one.branched[0] + ".lora_A.weight"
        assert torch.equal(one.core.get_parameter(first), two.core.get_parameter(first))
        assert not torch.equal(one.core.get_parameter(first), other.core.get_parameter(first))
        one.save(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 16.0)


@pytest.mark.parametrize("optimizer_name", ["gld", "stp"])
@pytest.mark.parametrize("name", ["side_lora", "lora", "ia3", "prompt"])
def test_forward_only_steps(name, optimizer_name, folder):
    surface = train(make(name, "bert", folder), 1)
    for tensor in surface.trainable().values():
        tensor.grad = None
    batch, labels = batch_of(surface)
    prepared = surface.prepare(batch)
    few = {"candidates": 2} if optimizer_name == "gld" else {}
    optimizer = OPTIMIZERS[optimizer_name](surface.trainable().items(), radius=0.02, seed=1, **few)

    @torch.no_grad()
    def closure():
        return torch.nn.functional.cross_entropy(surface.logits(prepared), labels)

    before = float(closure())
    for _ in range(6 if optimizer_name == "stp" else 1):
        optimizer.step(closure)
    assert float(closure()) < before and all(p.grad is None for p in surface.model.parameters())


def test_what_is_tuned(folder):
    bias = make("bias", "bert", folder, "head")
    head = set(bias.head_tensors())
    assert head and all(n.endswith("bias") or n in head for n in bias.trainable()) and len(bias.trainable()) > len(head)
    part = make("layers", "opt", folder, pattern="layers.3.fc")
    assert {n.split("decoder.")[1] for n in part.trainable()} == {
        f"layers.3.{n}.{t}" for n in ("fc1", "fc2") for t in ("weight", "bias")
    }
    ia3 = {
        n.split("layers.")[1].split(".", 1)[1].removesuffix(".ia3_l.default")
        for n in make("ia3", "opt", folder).trainable()
    }
    assert ia3 == {"self_attn.k_proj", "self_attn.v_proj", "fc2"}
    assert "lora (rank 2, alpha 16.0" in make("lora", "bert", folder).describe()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("side_lora", {"targets": ["quary"]}, "side_lora: unknown target 'quary'; did you mean 'query'"),
        ("lora", {"targets": ["valeu"]}, "lora: unknown target 'valeu'; did you mean 'value'"),
        ("side_lora", {"targets": ["("]}, r"side_lora: targets must be names or regular expressions, got '\('"),
        ("side_lora", {"rank": 17}, "side_lora: rank must be from 1 to 16, the widest layer's, got 17"),
        ("lora", {"rank": 0}, "lora: rank must be from 1 to 16"),
        ("side_lora", {"alpha": 0.0}, "side_lora: alpha must be > 0, got 0.0"),
        ("lora", {"alpha": -1.0}, "lora: alpha must be > 0, got -1.0"),
        ("layers", {"pattern": "atention"}, "layers: unknown pattern 'atention'; did you mean 'attention'"),
        ("prompt", {"tokens": 17}, "prompt: tokens must be from 1 to 16, what max_length leaves, got 17"),
        ("prompt", {"tokens": 0}, "prompt: tokens must be from 1"),
        ("prompt", {"start": "reel"}, "prompt: unknown start 'reel'; did you mean 'real'"),
        ("layers", {"pattern": "["}, r"layers: pattern must be a regular expression, got '\['"),
        ("lora", {"targets": []}, r"^lora: targets must be one pattern or a list of at least one, got \[\]$"),
        ("side_lora", {"targets": ()}, r"^side_lora: targets must be one pattern or a list of at least one, got \[\]$"),
        ("lora", {"targets": [1]}, r"^lora: targets must be one pattern or a list of at least one, got \[1\]$"),
        ("lora", {"targets": 1.5}, "^lora: targets must be one pattern or a list of at least one, got 1.5$"),
        ("layers", {"pattern": []}, r"^layers: pattern must be one pattern or a list of at least one, got \[\]$"),
        ("lora", {"rank": 1.5}, "^lora: rank must be a whole number, got 1.5$"),
        ("side_lora", {"rank": True}, "^side_lora: rank must be a whole number, got True$"),
        ("prompt", {"tokens": 2.0}, "^prompt: tokens must be a whole number, got 2.0$"),
    ],
)
def test_errors(name, options, message, folder):
    with pytest.raises(UserError, match=message):
        make(name, "bert", folder, **options)


def test_one_text_is_one_pattern(folder):
    for name in ("lora", "side_lora"):
        several = {"targets": ["value", "attention.output.dense"]}
        assert make(name, "bert", folder, **several).trainable().keys() == {
            n for n in make(name, "bert", folder).trainable() if ".value." in n or "attention.output.dense." in n
        }
        both = "|".join(f".*[.]{target}" for target in several["targets"])
        assert make(name, "bert", folder, targets=both).options["targets"] == [both]


def test_a_pooler_that_no_score_depends_on_is_not_tuned(tmp_path):
    transformers.BertModel(families.config_of("bert")).save_pretrained(tmp_path)  # a pooler with it
    families.make_tokenizer(True).save_pretrained(tmp_path)

    def models(_):
        return str(tmp_path)

    line = "^layers: pattern must match a tensor that is learned and that the scores depend on, got 'pooler', which "
    with pytest.raises(UserError, match=line):
        make("layers", "bert", models, "head", pattern="pooler", head="linear")
    surface = make("layers", "bert", models, "head", pattern="dense", head="linear")
    assert "model.pooler.dense.weight" in dict(surface.model.named_parameters())
    assert not [name for name in surface.trainable() if "pooler" in name]
    assert all(tensor.grad is not None for tensor in train(surface, 1).trainable().values())


def test_more_errors(folder, models, tmp_path):
    with pytest.raises(UserError, match="bias: the model must have biases, got none"):
        make("bias", "llama", folder)
    with pytest.raises(UserError, match="side_lora: the model must have linear layers in its blocks, got none"):
        SideLoraSurface.create(models("gpt2"), LABELS, max_length=16, readout="head")
    with pytest.raises(UserError, match="ia3: the model must have linear layers in its blocks, got none"):
        Ia3Surface.create(models("gpt2"), LABELS, max_length=16, readout="head")
    surface = make("side_lora", "bert", folder)
    surface.save(tmp_path)
    with pytest.raises(UserError, match="must be of a model of surface 'lora', got 'side_lora'"):
        LoraSurface.load(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: must hold the branches, got none or damaged"):
        SideLoraSurface.load(tmp_path)


def test_half_precision(folder):
    """Branches and virtual tokens are float32 in a model of bfloat16."""
    for name, kind in (("side_lora", "bert"), ("lora", "bert"), ("prompt", "llama"), ("prefix", "llama")):
        surface = make(name, kind, folder, dtype="bfloat16")
        assert surface.dtype == torch.bfloat16 and {t.dtype for t in surface.trainable().values()} == {torch.float32}
        start = logits(surface)
        assert start.dtype == torch.float32 and not torch.equal(logits(train(surface)), start)
