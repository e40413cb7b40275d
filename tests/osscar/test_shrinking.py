"""Shrinking in place: what follows, what cannot, and a model that is never left half changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graph
import osscar
from graph.groups import Role, Slot, UnitKind
from osscar.base.errors import EquivalenceError, ModelError
from osscar.proof.equivalence import masked, proof_outputs
from osscar.proof.lineage import lineage_of
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import Proof, shrink
from osscar.shrinking.slice import counts
from tests.coverage.measure import half_of, shrink_by_half
from tests.graph.topologies import PRUNABLE, network, randomized
from tests.zoo import SMALL, Inputs, transformers_case


def assert_refused(
    model: nn.Module, plan: PruningPlan, inputs: list[Inputs], error: type[Exception], match: str
) -> str:
    """Show that shrinking fails, and changes nothing; return what it says."""

    def state() -> dict[str, object]:
        found: dict[str, object] = {
            name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
        }
        for name, module in model.named_modules():
            found[f"{name} class"] = type(module)
            numbers = {k: v for k, v in vars(module).items() if isinstance(v, int | tuple)}
            found |= {f"{name}.{key}": value for key, value in numbers.items()}
        return found

    before, outputs = state(), proof_outputs(model, inputs)
    with pytest.raises(error, match=match) as caught:
        shrink(model, plan, inputs)
    assert state() == before
    assert all(map(torch.equal, proof_outputs(model, inputs), outputs))
    return str(caught.value)


def shrunk(model: nn.Module, *inputs: Tensor, **keep: int) -> Proof:
    """Keep the first units of some groups, by the layer that they begin in, and prove it."""
    groups = graph.trace(model, inputs[:1]).prunable
    plans = [
        GroupPlan.of(group, tuple(range(keep[first])))
        for group in groups
        if (first := group.slots[0].module.replace(".", "_")) in keep
    ]
    assert len(plans) == len(keep)
    return shrink(model, PruningPlan(tuple(plans)), [(x,) for x in inputs])


def neurons_of_two_layers(first: str = "enter", second: str = "leave", units: int = 8) -> GroupPlan:
    """Plan by hand to keep the first half of the neurons between two linear layers."""
    slots = (
        graph.Slot(f"{first}.weight", 0, graph.Role.PRODUCER, first, units),
        graph.Slot(f"{first}.bias", 0, graph.Role.PASS_THROUGH, first, units),
        graph.Slot(f"{second}.weight", 1, graph.Role.CONSUMER, second, units),
    )
    return GroupPlan("neurons", graph.UnitKind.NEURONS, units, tuple(range(units // 2)), slots)


# ---- layers ------------------------------------------------------------------------------


_WRITTEN = {"padded", "einsum", "independent-halves"}
"""Networks whose code holds numbers that no module keeps."""


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [name for name in PRUNABLE if name not in _WRITTEN])
def test_hand_written_networks_shrink(name: str) -> None:
    _, proof, effect = shrink_by_half(SMALL[name].build(), SMALL[name].make_inputs())
    assert effect > 1e-3
    assert not proof.plan.integers


@network(
    embed=lambda: nn.Embedding(10, 8),
    enter=lambda: nn.Conv1d(8, 12, 3, padding=1, groups=4),
    norm=lambda: nn.BatchNorm1d(12),
    up=lambda: nn.ConvTranspose1d(12, 6, 2, groups=2),
    act=lambda: nn.PReLU(6),
    plain=lambda: nn.BatchNorm1d(6, affine=False),
    flat=lambda: nn.Conv1d(6, 8, 1),
    grouped=lambda: nn.GroupNorm(4, 8),
    leave=(8, 3),
)
def Layers(net: Any, ids: Tensor) -> Tensor:
    """One layer of each sort that shows its sizes."""
    x = net.embed(ids).transpose(1, 2)
    x = net.act(net.up(net.norm(net.enter(x))))
    x = net.grouped(net.flat(net.plain(x)))
    return net.leave(x.transpose(1, 2))


class Stacked(nn.Linear):
    """Has one more dimension in its weight than the class that it inherits from."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(self.weight.detach()[None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[0], self.bias)


def test_layers_show_their_new_sizes() -> None:
    model = randomized(Layers())
    ids = torch.randint(10, (2, 7))
    shrink_by_half(model, [(ids,), (torch.randint(10, (3, 4)),)])
    for layer in model.children():
        for weight in layer.parameters(recurse=False):
            assert weight.shape[0] in vars(layer).values()
    assert (model.enter.groups, model.enter.in_channels) == (4, model.embed.embedding_dim)
    assert model.enter.weight.shape[1] * 4 == model.embed.embedding_dim
    assert model.plain.num_features == model.act.num_parameters == model.up.out_channels
    assert (model.grouped.num_groups, model.grouped.num_channels) == (2, 4)

    stacked = randomized(nn.Sequential(Stacked(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    shrink_by_half(stacked, [(torch.randn(2, 6),)])
    assert stacked[0].weight.shape == (1, 4, 6)

    filters = SMALL["grouped"].build()
    shrink_by_half(filters, SMALL["grouped"].make_inputs())
    assert (filters.grouped.groups, filters.grouped.out_channels) == (2, 4)


class Counting(nn.Module):
    """Counts its passes; its code may make a number of the width that is pruned."""

    def __init__(self, *, divides: bool) -> None:
        super().__init__()
        self.enter, self.leave, self.divides = nn.Linear(4, 8), nn.Linear(8, 3), divides
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes.add_(1)
        x = torch.relu(self.enter(x))
        return self.leave(x / len(self.enter.weight) if self.divides else x)


def test_passes_leave_nothing_behind_whether_a_model_can_follow_or_not() -> None:
    model, x = Counting(divides=True).eval(), torch.randn(5, 4)
    plan = PruningPlan((neurons_of_two_layers(),))
    with pytest.raises(EquivalenceError, match="prune without those of 'neurons'"):
        shrink(model, plan, [(x,)])
    assert model.passes == 0
    program = osscar.shrink_program(model, plan, [(x,)], {"x": x}).model
    assert model.passes == program.passes == 0
    data = torch.randn(64, 4)
    pruned = osscar.prune(model, data, neurons=0.5, form="exported", device="cpu").model
    assert pruned.passes == 0
    pruned(x)
    assert pruned.passes == 1


def test_what_is_trained_stays_trained_and_what_is_not_does_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].requires_grad_(False)
    shrink_by_half(model.eval(), [(torch.randn(3, 4),)])
    assert [p.requires_grad for p in model.parameters()] == [True] * 2 + [False] * 2 + [True] * 2
    model.train()(torch.randn(3, 4)).square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) == 4


class TiedPair(nn.Module):
    """Two names for one tensor, or two tensors in one memory."""

    def __init__(self, *, shared_memory: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.one = nn.Linear(6, 5)
        self.two = nn.Linear(6, 5)
        weight = self.one.weight
        self.two.weight = nn.Parameter(weight.data) if shared_memory else weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        return self.one(x) + torch.tanh(self.two(x))


@pytest.mark.parametrize("shared_memory", [False, True])
def test_tied_tensors_stay_tied_and_are_not_cut_in_two_ways(shared_memory: bool) -> None:
    model, inputs = TiedPair(shared_memory=shared_memory).eval(), [(torch.randn(3, 4),)]
    assert model.one.weight.data_ptr() == model.two.weight.data_ptr()
    first = neurons_of_two_layers("enter", "one", 6)
    kind, (*_, two) = first.kind, neurons_of_two_layers("enter", "two", 6).slots
    for kept in ((3, 4, 5), (0, 1, 3)):
        plan = PruningPlan((first, GroupPlan("second", kind, 6, kept, (two,))))
        assert_refused(model, plan, inputs, ModelError, "tied to it, in different ways")
    shrink_by_half(model, inputs)
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape == (5, 3)


def test_a_language_model_on_meta_keeps_the_scale_of_its_attention_and_how_keys_are_shared() -> (
    None
):
    for family, heads in (("llama", 8), ("llama", 4), ("llama-multi-query", 8)):
        sizes = {"num_attention_heads": heads, "head_dim": 8}
        model = transformers_case(family, **sizes).build().to("meta")
        groups = graph.trace(model, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}).prunable
        osscar.slice_units(model, half_of(groups))
        assert model.model.layers[1].mlp.down_proj.weight.shape == (64, 40)
        attention = model.model.layers[0].self_attn
        assert attention.scaling == 8**-0.5
        assert attention.q_proj.out_features == 8 * heads // 2
        shared = attention.q_proj.out_features // attention.k_proj.out_features
        assert attention.num_key_value_groups == shared


@pytest.mark.parametrize(
    ("made", "read", "follows"),
    [
        pytest.param({"q": [16]}, 16, True, id="units are queries, which share one key"),
        pytest.param({"q": [16, 16]}, 32, True, id="units are pairs of queries"),
        pytest.param({"q": [32], "k": [16], "v": [16]}, 32, False, id="units are keys"),
        pytest.param({"q": [64], "k": [16], "v": [16]}, 32, False, id="queries have gates"),
        pytest.param({"qkv": [64]}, 32, False, id="in one layer, key by key"),
        pytest.param({"qkv": [32, 16, 16]}, 32, False, id="in one layer, one after another"),
    ],
)
def test_how_many_queries_share_a_key_changes_where_units_are_queries(
    made: dict[str, list[int]], read: int, follows: bool
) -> None:
    slots = [
        Slot(name, 0, Role.PRODUCER, "at", 2, inner=width)
        for name, widths in made.items()
        for width in widths
    ]
    out = Slot("out", 1, Role.CONSUMER, "at", 2, inner=read)
    group = GroupPlan("heads", UnitKind.HEADS, 2, (0,), (*slots, out))
    shared = {"num_key_value_groups": 2}
    assert counts(shared, group) == ({"num_key_value_groups": 1} if follows else {})


# ---- attention of torch ------------------------------------------------------------------


class Cross(nn.Module):
    """Attention with both masks, whose weights are returned or not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, **options)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Tensor) -> object:
        shown = self.attention(q, k, v, key_padding_mask=padding, attn_mask=mask)
        return shown[0], self.attention(q, k, v, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_torch(batch_first: bool) -> None:
    options = {"kdim": 6, "vdim": 7} if batch_first else {"bias": False}

    def inputs(batch: int, length: int) -> Inputs:
        sizes = (12, options.get("kdim", 12), options.get("vdim", 12))
        tensors = [torch.randn(batch, length, size) for size in sizes]
        mask = -1.5 * torch.ones(length, length).triu(1)
        padding = torch.zeros(batch, length)
        padding[0, -1] = -100.0
        if not batch_first:
            mask, padding = mask < 0, padding < 0
        swap = [t if batch_first else t.transpose(0, 1) for t in tensors]
        return (*swap, mask, padding)

    torch.manual_seed(0)
    model = Cross(batch_first=batch_first, **options).eval()
    dependencies, _, effect = shrink_by_half(model, [inputs(2, 5), inputs(3, 4)])
    assert [group.kind for group in dependencies.prunable] == ["heads"]
    assert effect > 1e-3


class Encoder(nn.Module):
    """A block before an encoder, whose fused path leaves zeros at padded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.leave = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.leave(self.encoder(self.block(x), src_key_padding_mask=padding))


@pytest.mark.parametrize("proved_with_padding", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_encoders_of_torch_lose_heads_twice_and_pack_no_longer(proved_with_padding: bool) -> None:
    model, x = randomized(Encoder()), torch.randn(2, 5, 16)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = (x, padding) if proved_with_padding else (x,)
    groups = graph.trace(model, inputs).prunable
    kept = [group for group in groups if group.kind != "heads"]
    assert len(kept) == 2 == len(groups) - 1
    assert shrink(model, half_of(kept), [inputs]).certificate.error < 1e-6
    assert model.encoder.use_nested_tensor  # as long as it keeps its heads
    for left in (2, 1):
        plan = half_of(graph.trace(model, inputs).prunable)
        with masked(model, plan), torch.no_grad():
            expected = model(x, padding)
        shrink(model, plan, [inputs])
        with torch.no_grad():
            found = model(x, padding)
        zeros = slice(None) if proved_with_padding else ~padding
        torch.testing.assert_close(found[zeros], expected[zeros], rtol=1e-4, atol=1e-5)
        assert model.encoder.layers[0].self_attn.num_heads == left
    assert len(lineage_of(model).plans) == 3
