"""Injection in small random models of each family: the same logits as with weights really moved."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from tiny_models import CONFIGS, SMALL

from gradientless.search.evaluators.inject import Inject
from gradientless.search.evaluators.injection import Injection, Unbatchable
from gradientless.search.evaluators.snapshot import Snapshot
from gradientless.search.noise import Noise
from gradientless.search.points import ALL, ORIGIN, Direction, point
from gradientless.search.space import Space

WORDS = 12
OPT = {
    "vocab_size": 12, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "bert": lambda: transformers.BertForSequenceClassification(CONFIGS["bert"]()),
    "bert, masked": lambda: transformers.BertForMaskedLM(CONFIGS["bert"]()),
    "roberta": lambda: transformers.RobertaForSequenceClassification(CONFIGS["roberta"]()),
    "roberta, masked": lambda: transformers.RobertaForMaskedLM(CONFIGS["roberta"]()),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(CONFIGS["distilbert"]()),
    "distilbert, masked": lambda: transformers.DistilBertForMaskedLM(CONFIGS["distilbert"]()),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(word_embed_proj_dim=16, **OPT)),
    "opt, embeddings of another width": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(word_embed_proj_dim=8, do_layer_norm_before=False, **OPT)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(CONFIGS["gpt2"]()),
    "llama": lambda: transformers.LlamaForCausalLM(CONFIGS["llama"]()),
    "llama, tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=12, max_position_embeddings=32, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=True, **SMALL,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5, gated and untied": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5)
    ),
}  # fmt: skip
FORMS = {  # of one batch of three rows
    "full": lambda ids, mask: {"input_ids": ids, "attention_mask": mask},
    "ids alone": lambda ids, mask: {"input_ids": ids},
}


@functools.cache
def trained(family: str):
    """A model whose tensors are none of them zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def make(family: str, form: str = "full", length: int = 5):
    """(the model, a batch, the names and tensors that an optimizer is given)."""
    noise = torch.Generator().manual_seed(2)
    ids = torch.randint(2, WORDS, (3, length), generator=noise)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    batch = FORMS[form](ids, mask)
    if family.startswith("t5"):
        batch["decoder_input_ids"] = torch.randint(2, WORDS, (3, 4), generator=noise)
    model = copy.deepcopy(trained(family))
    return model, batch, dict(model.named_parameters())


def times(batch, count: int):
    return {key: torch.cat([value] * count) for key, value in batch.items()}


def some_points(size: float = 2e-2):
    z, other = Direction(3, 0, ALL), Direction(3, 1, ALL)
    return [point(size, z), point(-size, z), ORIGIN, point(size, other) + point(-size, z)]


@torch.no_grad()
def moved(model, space, changes, batch):
    with space.at(changes):
        return model(**batch).logits.clone()


@torch.no_grad()
def injected(model, injection, changes, batch):
    def outputs(changes):
        with injection.at(changes):
            return model(**times(batch, len(changes))).logits.chunk(len(changes))

    if len(changes) > 1 and not injection.tried:
        refused = injection.try_together(lambda two: [float(one.square().mean()) for one in outputs(two)])
        if refused is not None:
            raise refused
    return outputs(changes)


def logits(family: str, form: str, rank: int, leave_out: str = ""):
    model, batch, tensors = make(family, form)
    tensors = {name: tensor for name, tensor in tensors.items() if not leave_out or leave_out not in name}
    space = Space(tensors, Noise(0, "gaussian"), rank=rank)
    changes = space.deltas(some_points())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [tensor._version for tensor in model.parameters()]
    injection = Injection(model, tensors)
    apart = [injected(model, injection, [mine], batch)[0] for mine in changes]
    ways = [apart]
    if leave_out or not family.startswith("t5"):
        other = Injection(model, tensors)  # whose first forward pass, the watched one, is batched
        ways += [injected(model, one, changes, batch) for one in (other, other, injection)]
    assert versions == [tensor._version for tensor in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.grad is None for tensor in model.parameters())
    with torch.no_grad():
        plain = model(**batch).logits
    wanted = [moved(model, space, mine, batch) for mine in changes]
    assert torch.equal(plain, wanted[2])
    return wanted, ways


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family(family, form, rank):
    """One point at a time, and (but for T5's relative positions) all points in one batch."""
    wanted, found = logits(family, form, rank)
    assert all((a - wanted[2]).abs().max() > 1e-2 for a in (wanted[0], wanted[1], wanted[3]))
    for way in found:
        for mine, expected in zip(way, wanted, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "t5, gated and untied"])
def test_t5_in_one_batch_without_its_relative_positions(family):
    wanted, found = logits(family, "full", 1, leave_out="relative_attention_bias")
    assert len(found) == 4
    for way in found:
        for mine, expected in zip(way, wanted, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [5, 12])
def test_t5_relative_positions_cannot_be_told_apart(length):
    """Not when their table has by chance as many rows as the batch, either."""
    model, batch, tensors = make("t5", length=length)
    space = Space(tensors, Noise(0, "gaussian"), rank=1)
    with pytest.raises(Unbatchable, match=r"'encoder\.block\.0\..*relative_attention_bias"):
        injected(model, Injection(model, tensors), space.deltas(some_points()), batch)


def test_tied_heads_change_in_both_places():
    model, batch, _ = make("gpt2")
    name = "transformer.wte.weight"
    space = Space({name: model.get_parameter(name)}, Noise(0, "gaussian"), rank=1)
    changes = space.deltas(some_points())
    found = injected(model, Injection(model, space.tensors), changes, batch)
    head = copy.deepcopy(model)
    head.lm_head.weight = torch.nn.Parameter(head.lm_head.weight.detach().clone())
    untied = [
        moved(head, Space({name: table}, Noise(0, "gaussian"), rank=1), changes[0], batch)
        for table in (head.lm_head.weight, head.transformer.wte.weight)
    ]
    torch.testing.assert_close(found[0], moved(model, space, changes[0], batch), rtol=1e-5, atol=1e-5)
    assert all((found[0] - one).abs().max() > 1e-2 for one in untied)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5, gated and untied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype):
    model, batch, tensors = make(family)
    space = Space(tensors, Noise(0, "rademacher"), rank=1)
    changes = space.deltas(some_points())
    wanted = [moved(model, space, mine, batch) for mine in changes]
    model = model.to(dtype)
    tensors = {name: model.get_parameter(name) for name in tensors}
    injection = Injection(model, tensors)
    if family == "t5":
        found = [injected(model, injection, [mine], batch)[0] for mine in changes]
    else:
        found = injected(model, injection, changes, batch)
    for mine, expected in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        error = (mine.float() - expected).norm() / expected.norm()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize("family", ["gpt2", "llama, tied", "opt"])
@torch.no_grad()
def test_generation_with_its_cache(family):
    model, batch, tensors = make(family, "ids alone")
    space = Space(tensors, Noise(0, "gaussian"), rank=1)
    changes = space.deltas(some_points(0.1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True, "output_logits": True,
               "return_dict_in_generate": True, "eos_token_id": None}  # fmt: skip
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    injection = Injection(model, tensors)

    def written(changes):
        with injection.at(changes):
            return model.generate(**times(batch, len(changes)), **options)

    def sizes(two):
        return [
            sum(float(step[3 * p : 3 * p + 3].square().mean()) for step in written(two).logits) for p in range(len(two))
        ]

    assert injection.try_together(sizes) is None
    together = written(changes)
    for p, mine in enumerate(changes):
        with injection.at([mine]):
            alone = model.generate(**batch, **options)
        with space.at(mine):
            wanted = model.generate(**batch, **options)
        for t, expected in enumerate(wanted.logits):
            torch.testing.assert_close(alone.logits[t], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(together.logits[t][3 * p : 3 * p + 3], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(alone.sequences, wanted.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_evaluator_takes_any_closure(family):
    model, batch, tensors = make(family)
    space = Space(tensors, Noise(0, "gaussian"), rank=1)

    def closure():
        return model(**batch).logits.float().logsumexp(-1).mean()

    points = some_points()
    wanted = Snapshot(space, closure).losses(points)
    assert Inject(space, closure, model).losses(points) == pytest.approx(wanted, rel=1e-5)
