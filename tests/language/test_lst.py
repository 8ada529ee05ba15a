"""`lst` and `k_lst`: side networks beside small random models of every family."""

from __future__ import annotations

import copy
import math
import shutil
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from families import FAMILIES, LABELS, prompt_of
from tiny_models import EXAMPLES

from gradientless.errors import UserError
from gradientless.language import backbone, reading
from gradientless.language.features import keep_states
from gradientless.language.surfaces.ladder import FAMILIES as KNOWN
from gradientless.language.surfaces.ladder import ChannelPool, window
from gradientless.language.surfaces.lst import KLstSurface, LstSurface
from gradientless.language.surfaces.pruning import best, fishers, magnitudes
from gradientless.language.tasks import Prompt
from gradientless.search.optim import OPTIMIZERS

READOUTS = ("prompt", "classifier")
K_LST = {
    "trailing": {"k": 3},
    "centred": {"k": 2, "window": "centred", "sharing": "shared"},
    "all": {"window": "all", "sharing": "rung", "down": "low-rank", "rank": 2},
    "mean of pooled": {"k": 3, "combine": "mean", "down": "pool", "layers": [1, 3]},
    "unfrozen": {"k": 2, "unfrozen": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made: dict[str, str] = {}

    def of(kind: str) -> str:
        if kind not in made:
            made[kind] = families.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def make(kind, folder, surface=LstSurface, readout="prompt", **options):
    options = {"reduction": 4, "max_length": 16, "seed": 3, **options}
    return surface.create(folder(kind), LABELS, readout=readout, prompt=prompt_of(kind), **options)


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


def bits(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


CASES = [(kind, readout, "lst") for kind in FAMILIES for readout in READOUTS]
CASES += [(FAMILIES[(i + j) % 6], READOUTS[(i + j) % 2], name) for i, name in enumerate(K_LST) for j in (0, 2, 5)]


@pytest.mark.parametrize(("kind", "readout", "name"), CASES)
def test_trains_beside_a_frozen_backbone_and_is_saved(kind, readout, name, folder, tmp_path):
    surface = make(kind, folder, KLstSurface if name != "lst" else LstSurface, readout, **K_LST.get(name, {}))
    assert "Fisher scores of 5 rows" in surface.begin(surface.encode(EXAMPLES))
    start = logits(surface)
    assert start.shape == (4, 2) and start.dtype == torch.float32
    names = set(surface.trainable())
    frozen = bits((n, t) for n, t in surface.model.state_dict().items() if n not in names)
    tuned = bits(surface.trainable().items())
    train(surface)
    for tensor_name, tensor in surface.model.named_parameters():
        assert (tensor.grad is not None) == (tensor_name in names), tensor_name
    state = surface.model.state_dict()
    assert all(torch.equal(state[n], tensor) for n, tensor in frozen.items())
    assert all(not torch.equal(state[n], tensor) for n, tensor in tuned.items() if tensor.numel() > 8)
    surface.save(tmp_path / "saved")
    again = type(surface).load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(surface)) and not torch.equal(logits(again), start)
    assert again.options == surface.options and again.begin(again.encode(EXAMPLES)) is None


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_side_network_of_full_width_with_closed_gates_is_the_backbone(kind, readout, folder):
    """Every tensor of every family finds its place, masks, positions and cross-attention included."""
    surface = make(kind, folder, readout=readout, reduction=1, init="magnitude")
    tensors = surface._tensors(batch_of(surface)[0])
    with torch.no_grad():
        for ladder in surface._ladders().values():
            ladder.gates.fill_(-1e4)
        expected = surface._backbone_logits(tensors)
        torch.testing.assert_close(logits(surface), expected, atol=2e-5, rtol=1e-5)
        surface.model.side["up"].weight.zero_()
        assert not torch.allclose(logits(surface), expected, atol=1e-3)


def test_the_ladder_is_the_papers(folder):
    """s_i = layer_i(μ D_i h_i + (1 - μ) s_{i-1}), written out over the library's own hidden states."""
    surface = train(make("bert", folder, readout="classifier"))
    batch, _ = batch_of(surface)
    side = surface.model.side
    ladder = side["stack"]
    with torch.no_grad():
        output = surface.body(**batch, output_hidden_states=True)
        mask = (1.0 - batch["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
        s = ladder.first(output.hidden_states[0])
        for i, layer in enumerate(ladder.stack.encoder.layer):
            mu = torch.sigmoid(ladder.gates[i] / 0.1)
            mixed = mu * ladder.downs[str(i)](output.hidden_states[i + 1]) + (1 - mu) * s
            s = layer(mixed, attention_mask=mask)
            s = s[0] if isinstance(s, tuple) else s
        pooled = (side["up"](s) * batch["attention_mask"][..., None]).sum(1) / batch["attention_mask"].sum(1)[:, None]
        torch.testing.assert_close(logits(surface), surface.model.head(pooled))


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_k_of_one_is_lst(kind, folder):
    one, lst = make(kind, folder, KLstSurface, k=1), make(kind, folder)
    assert list(one.trainable()) == list(lst.trainable())
    assert torch.equal(logits(one), logits(lst))
    train(one), train(lst)
    assert torch.equal(logits(one), logits(lst))
    centred = make(kind, folder, KLstSurface, k=1, window="centred", combine="mean")
    assert torch.equal(logits(train(centred)), logits(lst))
    assert not torch.equal(logits(train(make(kind, folder, KLstSurface, k=2))), logits(lst))


def test_windows():
    assert [[layer for layer, _ in window(i, 3, 5, "trailing")] for i in range(5)] == [
        [0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4],
    ]  # fmt: skip
    assert [[layer for layer, _ in window(i, 3, 5, "centred")] for i in range(5)] == [
        [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4],
    ]  # fmt: skip
    assert window(2, 4, 5, "centred") == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert window(0, 4, 5, "centred") == [(0, 2), (1, 3)]
    assert window(0, 3, 5, "trailing") == [(0, 2)]
    assert window(3, 1, 5, "all") == [(i, i) for i in range(5)]


@pytest.mark.parametrize(("placement", "rung"), [("trailing", 1), ("centred", 3), ("all", 2), ("trailing", 3)])
def test_a_window_is_combined_by_attention(placement, rung, folder):
    """Held to a float64 NumPy transcription, a window at the edge included."""
    surface = make("bert", folder, KLstSurface, k=3, window=placement)
    ladder = surface.model.side["stack"]
    with torch.no_grad():
        ladder.positions.normal_()
        ladder.queries[str(rung)].weight.normal_()
    generator = torch.Generator().manual_seed(1)
    seen = window(rung, 3, 4, placement)
    values = [torch.randn(2, 5, 4, generator=generator) for _ in seen]
    state = torch.randn(2, 5, 4, generator=generator)
    with torch.no_grad():
        found = ladder._combined(rung, state, values)
    weight = ladder.queries[str(rung)].weight.detach().double().numpy()
    places = ladder.positions.detach().double().numpy()
    for b in range(2):
        for t in range(5):
            query = weight @ state[b, t].double().numpy()
            v = [value[b, t].double().numpy() for value in values]
            score = np.array([query @ (v[n] + places[p]) / math.sqrt(4) for n, (_, p) in enumerate(seen)])
            share = np.exp(score - score.max())
            share /= share.sum()
            expected = sum(w * x for w, x in zip(share, v, strict=True))
            np.testing.assert_allclose(found[b, t].numpy(), expected, atol=1e-5)


def test_all_features_are_pooled(folder):
    """Every ladder reads every layer, whatever k is, and `mean` is their mean."""
    surface = make("bert", folder, KLstSurface, k=9, window="all", combine="mean")
    ladder = surface.model.side["stack"]
    assert not ladder.queries and not hasattr(ladder, "positions")
    generator = torch.Generator().manual_seed(1)
    state, *values = (torch.randn(2, 5, 4, generator=generator) for _ in range(5))
    for rung, seen in enumerate(ladder.windows):
        assert [layer for layer, _ in seen] == [0, 1, 2, 3]
        mean = np.mean([value.double().numpy() for value in values], axis=0)
        np.testing.assert_allclose(ladder._combined(rung, state, values).numpy(), mean, atol=1e-6)
    assert make("bert", folder, KLstSurface, k=9, window="all").describe()


@pytest.mark.parametrize(
    ("down", "sharing", "placement"),
    [("low-rank", "feature", "trailing"), ("low-rank", "shared", "all"), ("linear", "shared", "centred"),
     ("linear", "rung", "trailing"), ("pool", "feature", "all")],
)  # fmt: skip
def test_the_ladder_with_windows_is_written_out(down, sharing, placement, folder):
    """s_i = layer_i(μ mean_j D h_j + (1 - μ) s_{i-1}), with every D as plain matrices, which one as `sharing` says."""
    options = {"down": down, "sharing": sharing, "window": placement, "k": 2, "rank": 2, "combine": "mean"}
    surface = train(make("bert", folder, KLstSurface, "classifier", **options))
    batch, _ = batch_of(surface)
    side, ladder = surface.model.side, surface.model.side["stack"]

    def lowered(rung, layer, states):
        if down == "pool":
            return torch.stack([states[..., 4 * i : 4 * i + 4].sum(-1) / 4 for i in range(4)], dim=-1)
        module = ladder.downs[{"feature": str(layer), "rung": str(rung), "shared": "all"}[sharing]]
        if down == "low-rank":
            first, second = module
            return states @ first.weight.T @ second.weight.T + second.bias
        return states @ module.weight.T + module.bias

    with torch.no_grad():
        hidden = surface.body(**batch, output_hidden_states=True).hidden_states
        mask = (1.0 - batch["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
        s = ladder.first(hidden[0])
        for i, layer in enumerate(ladder.stack.encoder.layer):
            seen = {"trailing": range(max(0, i - 1), i + 1), "centred": range(max(0, i - 1), i + 1), "all": range(4)}
            read = [lowered(i, j, hidden[j + 1]) for j in seen[placement]]
            mu = torch.sigmoid(ladder.gates[i] / 0.1)
            s = layer(mu * sum(read) / len(read) + (1 - mu) * s, attention_mask=mask)
            s = s[0] if isinstance(s, tuple) else s
        pooled = (side["up"](s) * batch["attention_mask"][..., None]).sum(1) / batch["attention_mask"].sum(1)[:, None]
        torch.testing.assert_close(logits(surface), surface.model.head(pooled), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_last_layers_are_unfrozen(kind, folder):
    """The backbone's last n layers move (an encoder-decoder's decoder's), and no other tensor of it."""
    surface = make(kind, folder, KLstSurface, "classifier", k=2, unfrozen=2)
    before = bits(surface.model.backbone.state_dict().items())
    train(surface)
    after = surface.model.backbone.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    last = (".block.2.", ".block.3.") if kind == "t5" else (".2.", ".3.")
    assert moved and moved == {
        f"{n}".removeprefix("backbone.") for n in surface.trainable() if n.startswith("backbone.")
    }
    assert all(any(part in name for part in last) and not name.startswith("encoder.block") for name in moved)
    assert any(last[0] in name for name in moved) and any(last[1] in name for name in moved)


def test_down_sampling_and_its_sharing(folder):
    states = torch.arange(8.0).reshape(1, 1, 8)
    assert ChannelPool(2)(states).tolist() == [[[1.5, 5.5]]]
    ladders = {s: make("bert", folder, KLstSurface, k=3, sharing=s).model.side["stack"] for s in ("feature", "rung")}
    assert list(ladders["feature"].downs) == ["0", "1", "2", "3"]
    # A layer that two ladders read goes through one projection, or through each ladder's own.
    assert ladders["feature"]._down_key(2, 1) == ladders["feature"]._down_key(3, 1)
    assert ladders["rung"]._down_key(2, 1) != ladders["rung"]._down_key(3, 1)
    shared = make("bert", folder, KLstSurface, k=3, sharing="shared").model.side["stack"]
    assert list(shared.downs) == ["all"]
    low = make("bert", folder, KLstSurface, k=2, down="low-rank", rank=2).model.side["stack"].downs["0"]
    assert [tuple(p.shape) for p in low.parameters()] == [(2, 16), (4, 2), (4,)]


def test_layers_are_dropped(folder):
    surface = make("bert", folder, layers=2)
    ladder = surface.model.side["stack"]
    assert ladder.rungs == (1, 3) and ladder.features_read == (0, 2, 4) and len(ladder.layers()) == 2
    prepared = surface.prepare(batch_of(surface)[0])
    assert sorted(prepared.features["stack"]) == [0, 2, 4]
    assert make("bert", folder, layers=[0, 2]).model.side["stack"].rungs == (0, 2)
    # Relative positions stand in a T5's first layer alone: they are kept though it has no side layer.
    five = make("t5", folder, layers=2, init="magnitude")
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    bias = five.model.side["encoder"].layers()[0].get_parameter(name)
    assert torch.equal(bias, five.body.encoder.block[0].get_parameter(name))
    # Windows still count all of the backbone's layers.
    wide = make("bert", folder, KLstSurface, layers=[3], k=2).model.side["stack"]
    assert wide.windows == [[(2, 0), (3, 1)]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_backward_pass_stays_beside_the_backbone(kind, folder):
    surface = make(kind, folder, readout="classifier")
    counted = surface.products()
    assert all(name.startswith(("side.", "head.")) for name in counted.names)
    assert counted.tuned == counted.touched == sum(t.numel() for t in surface.trainable().values())
    assert counted.registered == sum(p.numel() for p in surface.model.parameters()) == counted.total
    assert f"{counted.tuned:,} of {counted.total:,} parameters tuned" in surface.describe()
    open_ended = make(kind, folder, KLstSurface, "classifier", k=2, unfrozen=1).products()
    through = {name for name in open_ended.names if name.startswith("backbone.")}
    assert through and all(".3." in name for name in through), through
    assert open_ended.calls > counted.calls and open_ended.touched > counted.touched


def test_features_are_computed_once(folder, monkeypatch):
    surface = make("opt", folder)
    prepared = surface.prepare(batch_of(surface)[0])
    expected = logits(surface)
    kept = {tower: {n: t.clone() for n, t in states.items()} for tower, states in prepared.features.items()}
    assert not any(t.requires_grad for states in kept.values() for t in states.values())
    for layer in surface.body.decoder.layers:
        monkeypatch.setattr(layer, "forward", None)  # whoever calls the backbone now fails
    for _ in range(2):
        assert torch.equal(surface.logits(prepared), expected)
    assert torch.equal(surface.logits(copy.deepcopy(prepared)), expected)
    twice = surface.logits(surface.repeated(prepared, 2))
    torch.testing.assert_close(twice, torch.cat([expected, expected]))


def test_connection_dropout(folder):
    surface = make("bert", folder, KLstSurface, "classifier", k=2, connection_dropout=0.5, init="random")
    prepared = surface.prepare(batch_of(surface)[0])
    quiet = surface.logits(prepared)
    assert torch.equal(surface.logits(prepared, torch.Generator().manual_seed(0)), quiet)
    surface.train()
    state = torch.random.get_rng_state()
    drawn = [surface.logits(prepared, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    ladder = surface.model.side["stack"]
    values = ladder._dropped(torch.ones(2000, 3, 4), torch.Generator().manual_seed(0))
    assert set(values.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(values, values[:, :1, :1].expand_as(values))  # a row's connection is there or not
    assert abs(float(values.mean()) - 1) < 0.1
    assert not surface.model.backbone.training


def test_dropout_in_the_side_layers(folder):
    surface = make("bert", folder, readout="classifier", dropout=0.5, init="random")
    prepared = surface.prepare(batch_of(surface)[0])
    quiet = surface.logits(prepared)
    surface.train()
    drawn = [surface.logits(prepared, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], quiet)


class TestPruning:
    def test_the_highest_in_order_and_the_lower_among_equals(self):
        assert best(torch.tensor([1.0, 4.0, 3.0, 5.0]), 2).tolist() == [1, 3]
        assert best(torch.tensor([5.0, 1.0, 5.0, 5.0]), 2).tolist() == [0, 2]
        assert best(torch.tensor([[2.0, 2.0, 1.0], [0.0, 1.0, 1.0]]), 1).tolist() == [[0], [1]]

    def test_bert_by_hand(self, folder):
        """Scores of one on the wanted rows and columns: those are cut out, of every tensor."""
        surface = make("bert", folder, readout="classifier", init="random")
        scores = {name: torch.zeros_like(m) for name, m in surface.body.named_parameters() if m.ndim == 2}
        width, inner, heads = [2, 3, 11, 14], [0, 7, 8, 20, 21, 22, 30, 31], [5, 6, 9, 15]  # two of each head's eight
        for name, score in scores.items():
            if "attention.self" in name:
                score[heads] += 1.0
                score[:, width] += 100.0
            elif "attention.output.dense" in name:
                score[:, heads] += 1.0
            elif "intermediate" in name:
                score[inner] += 1.0
        surface.initialise(scores)
        source, side = surface.body.encoder.layer, surface.model.side["stack"].stack.encoder.layer
        for i in range(4):
            whole, cut = dict(source[i].named_parameters()), dict(side[i].named_parameters())
            for what in ("query", "key", "value"):
                name = f"attention.self.{what}"
                assert torch.equal(cut[f"{name}.weight"], whole[f"{name}.weight"][heads][:, width])
                assert torch.equal(cut[f"{name}.bias"], whole[f"{name}.bias"][heads])
            name = "attention.output.dense"
            assert torch.equal(cut[f"{name}.weight"], whole[f"{name}.weight"][width][:, heads])
            assert torch.equal(cut["intermediate.dense.weight"], whole["intermediate.dense.weight"][inner][:, width])
            assert torch.equal(cut["output.dense.weight"], whole["output.dense.weight"][width][:, inner])
            for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
                assert torch.equal(cut[f"{norm}.weight"], whole[f"{norm}.weight"][width])
        states = torch.randn(3, 16)
        assert torch.equal(surface.model.side["stack"].first(states), states[:, width])
        assert torch.equal(surface.model.side["stack"].downs["2"](states), states[:, width])
        lifted = surface.model.side["up"](states[:, width])
        assert torch.equal(lifted[:, width], states[:, width]) and int((lifted != 0).sum()) == 12

    def test_llama_keeps_rotary_pairs_and_their_frequencies(self, folder):
        """Heads of four entries in two groups, r = 2: one pair (j, j + 2) of queries and keys, two values a group."""
        surface = make("llama", folder, readout="classifier", init="random", reduction=2)
        scores = {name: torch.zeros_like(m) for name, m in surface.body.named_parameters() if m.ndim == 2}
        for name, score in scores.items():
            if "k_proj" in name:
                score[[1, 5]] += 1.0  # entry 1 of both groups' heads: pair (1, 3)
            if "v_proj" in name:
                score[[0, 3, 5, 6]] += 1.0
        surface.initialise(scores)
        source, stack = surface.body.layers[2].self_attn, surface.model.side["stack"].stack
        side, width = stack.layers[2].self_attn, list(range(8))
        keys, queries = [1, 3, 5, 7], [1, 3, 5, 7, 9, 11, 13, 15]
        assert torch.equal(side.k_proj.weight, source.k_proj.weight[keys][:, width])
        assert torch.equal(side.q_proj.weight, source.q_proj.weight[queries][:, width])
        assert torch.equal(side.v_proj.weight, source.v_proj.weight[[0, 3, 5, 6]][:, width])
        # Heads 0 and 1 read the values of group 0, heads 2 and 3 those of group 1.
        assert torch.equal(side.o_proj.weight, source.o_proj.weight[width][:, [0, 3, 4, 7, 9, 10, 13, 14]])
        assert torch.equal(stack.rotary_emb.inv_freq, surface.body.rotary_emb.inv_freq[[1]])

    def test_heads_are_cut_anew_where_their_number_does_not_divide_the_width(self, folder):
        surface = make("distilbert", folder, readout="classifier", init="magnitude", reduction=16)
        assert surface.model.side["stack"].layers()[0].attention.q_lin.weight.shape == (1, 1)
        assert torch.isfinite(logits(surface)).all()

    def test_magnitude_scores_are_absolute_values(self, folder):
        surface = make("bert", folder)
        for name, found in magnitudes(surface.body, surface.body.config, "lst").items():
            weight = surface.body.get_parameter(name).detach().abs()
            torch.testing.assert_close(found[0], weight.sum(1), check_dtype=False)
            torch.testing.assert_close(found[1], weight.sum(0), check_dtype=False)

    def test_fisher_scores_are_mean_squared_gradients(self, folder):
        surface = make("opt", folder)
        encoded = surface.encode(EXAMPLES)

        def losses():
            for row in range(3):
                tensors = surface._tensors(encoded.batch([row]))
                yield torch.nn.functional.cross_entropy(surface._backbone_logits(tensors), encoded.labels[[row]])

        before = {name: (p.requires_grad, p.grad) for name, p in surface.body.named_parameters()}
        found = fishers(surface.body, surface.body.config, losses(), "lst")
        assert before == {name: (p.requires_grad, p.grad) for name, p in surface.body.named_parameters()}
        name = "decoder.layers.1.fc1.weight"
        weight = surface.body.get_parameter(name).requires_grad_(True)
        squares = sum(torch.autograd.grad(loss, weight)[0].square() for loss in losses()) / 3
        weight.requires_grad_(False)
        torch.testing.assert_close(found[name][0], squares.sum(1))
        torch.testing.assert_close(found[name][1], squares.sum(0))
        assert len(found) == 4 * 6

    def test_scores_of_any_kind(self, folder):
        """`begin` is `initialise` with Fisher scores; magnitudes are what a network stands as before."""
        one, two = make("t5", folder, init="fisher"), make("t5", folder, init="magnitude")
        assert torch.equal(logits(one), logits(two))
        two.initialise(magnitudes(two.body, two.body.config, "lst"))
        assert torch.equal(logits(one), logits(two))
        one.begin(one.encode(EXAMPLES))
        assert not torch.equal(logits(one), logits(two)) and two.begin(two.encode(EXAMPLES)) is None
        again = make("t5", folder, init="fisher")
        again.begin(again.encode(EXAMPLES))
        assert torch.equal(logits(one), logits(again))
        with pytest.raises(UserError, match=r"lst: scores must cover every matrix .*, got none for encoder.block.0"):
            one.initialise({})

    def test_random_is_the_seeds(self, folder):
        state = torch.random.get_rng_state()
        one, two, three = (make("bert", folder, init="random", seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(logits(one), logits(two)) and not torch.equal(logits(one), logits(three))


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_of_all_tokens(kind, folder):
    """What pretraining on text needs; at the slots of the label words they are the class scores."""
    surface = make(kind, folder)
    prepared = surface.prepare(batch_of(surface)[0])
    with torch.no_grad():
        whole = surface.token_logits(prepared)
        words = surface.encoder.words
        read = whole[torch.arange(4), prepared.tensors["slots"][:, 0]][:, words.tokens[words.token[:, 0]]]
        torch.testing.assert_close(read, surface.logits(prepared), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="scores of tokens need the readout 'prompt' or 'tokens', got 'classifier'"):
        make(kind, folder, readout="classifier").token_logits(prepared)


@pytest.mark.parametrize("name", ["gld", "stp"])
@pytest.mark.parametrize("kind", ["distilbert", "t5"])
def test_forward_only_steps(kind, name, folder):
    surface = make(kind, folder, KLstSurface, k=2)
    batch, labels = batch_of(surface)
    prepared = surface.prepare(batch)
    frozen = backbone.checksum(surface.model.backbone)
    few = {"candidates": 2} if name == "gld" else {}
    optimizer = OPTIMIZERS[name](surface.trainable().items(), radius=0.05, seed=1, **few)

    @torch.no_grad()
    def closure():
        return torch.nn.functional.cross_entropy(surface.logits(prepared), labels)

    before = float(closure())
    for _ in range(4 if name == "stp" else 1):
        optimizer.step(closure)
    assert float(closure()) < before
    assert all(p.grad is None for p in surface.model.parameters())
    assert backbone.checksum(surface.model.backbone) == frozen


def test_half_precision_backbone(folder):
    surface = make("bert", folder, dtype="bfloat16")
    assert surface.dtype == torch.bfloat16 and {t.dtype for t in surface.trainable().values()} == {torch.float32}
    assert surface.prepare(batch_of(surface)[0]).features["stack"][1].dtype == torch.bfloat16
    assert logits(train(surface)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 32}, "k_lst: reduction must divide the model's width 16, got 32"),
        ({"reduction": 3}, "reduction must divide the model's width 16, got 3"),
        ({"k": 5}, "k_lst: k must be from 1 to the model's 4 layers, got 5"),
        ({"k": 0}, "k must be from 1"),
        ({"window": "centered"}, "k_lst: unknown window 'centered'; did you mean 'centred'"),
        ({"down": "lowrank"}, "unknown kind of down-sampling 'lowrank'; did you mean 'low-rank'"),
        ({"combine": "max"}, "unknown way to combine 'max'"),
        ({"sharing": "layer"}, "unknown sharing 'layer'"),
        ({"down": "low-rank", "rank": 9}, "rank must be from 1 to the side network's width 4, got 9"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"layers": 9}, "layers must be from 1 to the model's 4, got 9"),
        ({"layers": [0, 4]}, r"layers must be rising numbers from 0 to 3, got \[0, 4\]"),
        ({"init": "fischer"}, "unknown init 'fischer'; did you mean 'fisher'"),
        ({"fisher_rows": 0}, "fisher_rows must be >= 1, got 0"),
        ({"unfrozen": 5}, "unfrozen must be from 0 to the model's 4 layers, got 5"),
        ({"connection_dropout": 1.0}, "connection_dropout must be >= 0 and < 1, got 1.0"),
        ({"readout": "haed"}, "unknown readout 'haed'"),
        ({"pooling": "max"}, "unknown pooling 'max'"),
        ({"max_length": 100}, "max_length must be from 1 to 32"),
        ({"reduction": 2.0}, "^k_lst: reduction must be a whole number, got 2.0$"),
        ({"k": 1.5}, "^k_lst: k must be a whole number, got 1.5$"),
        ({"layers": [1.0]}, r"^k_lst: layers must be a whole number or a list of whole numbers, got \[1.0\]$"),
        ({"layers": "12"}, "^k_lst: layers must be a whole number or a list of whole numbers, got '12'$"),
        ({"layers": True}, "^k_lst: layers must be a whole number or a list of whole numbers, got True$"),
        ({"layers": []}, r"^k_lst: layers must be rising numbers from 0 to 3, got \[\]$"),
        ({"fisher_rows": 1.5}, "^k_lst: fisher_rows must be a whole number, got 1.5$"),
        ({"unfrozen": 1.0}, "^k_lst: unfrozen must be a whole number, got 1.0$"),
        (
            {"layers": [0], "k": 1, "unfrozen": 1},
            "^k_lst: unfrozen needs a ladder that reads the model's last layer, 3, got none behind layer 0: ",
        ),
    ],
)
def test_errors(options, message, folder):
    with pytest.raises(UserError, match=message):
        make("bert", folder, KLstSurface, **options)


def test_more_errors(folder, models, tmp_path):
    with pytest.raises(UserError, match=r"lst: unknown architecture with a ladder 'gpt2'.*bert"):
        LstSurface.create(models("gpt2"), LABELS, max_length=16)
    with pytest.raises(UserError, match="readout 'prompt' needs a prompt, got none"):
        LstSurface.create(folder("bert"), LABELS, readout="prompt", max_length=16)
    with pytest.raises(UserError, match="two labels or more that differ are needed, got a, a"):
        LstSurface.create(folder("bert"), ("a", "a"), max_length=16)
    make("bert", folder, KLstSurface, k=2).save(tmp_path / "saved")
    with pytest.raises(UserError, match="must be of a model of surface 'lst', got 'k_lst'"):
        LstSurface.load(tmp_path / "saved")
    (tmp_path / "saved" / "side.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"side.safetensors: must hold the side network, got none or damaged"):
        KLstSurface.load(tmp_path / "saved")


def test_every_family_is_tried():
    assert {"bert", "distilbert", "roberta", "opt", "llama", "t5"} <= set(KNOWN)
    assert set(KNOWN) - set(FAMILIES) == {"camembert", "mistral", "qwen2", "xlm-roberta"}  # same layers as one of those


@pytest.mark.parametrize("kind", ["bert", "roberta", "opt", "llama"])
@pytest.mark.parametrize("in_front", [True, False])
def test_padding_in_front_of_texts_changes_no_score(kind, in_front, folder, monkeypatch):
    """in_front: whether the model reads such rows rightly; else they are read with padding behind."""
    if not in_front:
        monkeypatch.setattr(reading, "padded_left", lambda *_: None)
    scores = []
    for padding in ("right", "left"):
        surface = make(kind, folder, init="magnitude", padding=padding)
        with torch.no_grad():
            scores.append(surface.logits(surface.prepare(batch_of(surface)[0])))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


class TestKeptStates:
    """The backbone's states of a whole split, computed once (`features.keep_states`)."""

    @pytest.mark.parametrize("readout", READOUTS)
    @pytest.mark.parametrize("kind", FAMILIES)
    def test_scores_and_gradients_are_those_without(self, kind, readout, folder, tmp_path, monkeypatch):
        for options in ({}, {"padding": "left"}, {"layers": [1, 3]}) if kind in ("llama", "opt") else ({},):
            surface = make(kind, folder, readout=readout, init="magnitude", **options)
            train(surface)
            encoded = surface.encode(EXAMPLES)
            kept = keep_states(surface, encoded, 2, tmp_path, show=False)
            rows = [4, 1, 3]
            expected = surface.logits(surface.prepare(encoded.batch(rows)))
            gradients = torch.autograd.grad(expected.square().sum(), list(surface.trainable().values()))
            monkeypatch.setattr(type(surface), "_features", None)  # the backbone does not run again
            found = surface.logits(surface.prepare(kept.batch(rows)))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            again = torch.autograd.grad(found.square().sum(), list(surface.trainable().values()))
            torch.testing.assert_close(again, gradients, atol=1e-4, rtol=1e-4)
            monkeypatch.undo()

    def test_words_of_several_tokens_have_rows_of_their_own(self, language_models, tmp_path):
        prompt = Prompt("{text} It was {mask}.", {"bad": "terrible", "good": "great film"})
        surface = LstSurface.create(
            language_models("bert", 0), LABELS, prompt=prompt, reduction=4, init="magnitude", max_length=32
        )
        encoded = surface.encode(EXAMPLES)
        kept = keep_states(surface, encoded, 2, tmp_path, show=False)
        assert len(kept.batch([1, 0])["input_ids"]) > 2 == len(kept.batch([1, 0])["states"])
        with torch.no_grad():
            expected = surface.logits(surface.prepare(encoded.batch([1, 0])))
            found = surface.logits(surface.prepare(kept.batch([1, 0])))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_half_precision_is_kept_to_the_bit(self, dtype, folder, tmp_path):
        surface = make("bert", folder, readout="classifier", init="magnitude", dtype=dtype)
        encoded = surface.encode(EXAMPLES)
        kept = keep_states(surface, encoded, 1, tmp_path, show=False)
        (file,) = tmp_path.iterdir()
        assert np.load(file, mmap_mode="r").itemsize == torch.empty(0, dtype=surface.dtype).element_size()
        for row in range(5):
            plain = surface.prepare(encoded.batch([row])).features["stack"]
            brought = surface.prepare(kept.batch([row])).features["stack"]
            assert all(torch.equal(brought[n], states) and states.dtype == surface.dtype for n, states in plain.items())

    def test_files_are_found_again_and_told_apart(self, folder, tmp_path, monkeypatch):
        surface = make("bert", folder, readout="classifier", init="random")
        encoded = surface.encode(EXAMPLES)
        keep_states(surface, encoded, 2, tmp_path, show=False)
        keep_states(
            make("bert", folder, readout="classifier", init="random", layers=1), encoded, 2, tmp_path, show=False
        )
        keep_states(surface, surface.encode(EXAMPLES[:3]), 2, tmp_path, show=False)
        assert len(list(tmp_path.iterdir())) == 3
        other = make("bert", folder, readout="classifier", init="magnitude", reduction=2)  # reads the same states
        monkeypatch.setattr(type(other), "states_of_rows", None)
        keep_states(other, encoded, 2, tmp_path, show=False)

    def test_a_full_disk_is_one_line(self, folder, tmp_path, monkeypatch):
        surface = make("bert", folder, readout="classifier", init="random")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"surface.cache: the backbone's states take 0.0 GiB, got 0.0 GiB free in"):
            keep_states(surface, surface.encode(EXAMPLES), 2, tmp_path / "absent", show=False)
        assert not (tmp_path / "absent").exists()
