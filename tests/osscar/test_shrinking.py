"""Shrinking in place: what follows, what cannot, and a model that is never left half changed."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import AdapterError, EquivalenceError, ModelError
from osscar.proof.equivalence import proof_outputs
from osscar.proof.lineage import lineage_of
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.follow import adapter
from osscar.shrinking.shrink import shrink
from tests.coverage.measure import half_of, shrink_by_half
from tests.graph.masking import assert_sound
from tests.graph.topologies import PRUNABLE, randomized
from tests.zoo import SMALL, Inputs, torchvision_case, transformers_case

_TORCHVISION = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="needs the extra osscar[vision]"
)


def state(model: nn.Module) -> dict[str, object]:
    """Everything that shrinking may touch: tensors by identity, classes, and numbers."""
    found: dict[str, object] = {name: id(p) for name, p in model.named_parameters()}
    found |= {name: id(b) for name, b in model.named_buffers()}
    for name, module in model.named_modules():
        found[f"{name} class"] = type(module)
        found |= {f"{name}.{k}": v for k, v in vars(module).items() if isinstance(v, int | tuple)}
    return found


def assert_refused(
    model: nn.Module, plan: PruningPlan, inputs: list[Inputs], error: type[Exception], match: str
) -> None:
    """Show that shrinking fails, and changes nothing."""
    before, outputs = state(model), proof_outputs(model, inputs)
    with pytest.raises(error, match=match):
        shrink(model, plan, inputs)
    assert state(model) == before
    assert all(map(torch.equal, proof_outputs(model, inputs), outputs))


# ---- hand-written networks ---------------------------------------------------------------

_LITERALS = {"padded": r"F\.pad", "einsum": "view", "independent-halves": "split"}
"""Networks whose code holds numbers that no module keeps, and the call that fails."""


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", [name for name in PRUNABLE if name not in _LITERALS])
def test_hand_written_networks_shrink(name: str) -> None:
    _, proof, effect = shrink_by_half(SMALL[name].build(), SMALL[name].make_inputs())
    assert effect > 1e-3
    assert not proof.plan.integers


def test_filters_without_a_channel_leave_no_group_behind() -> None:
    model, inputs = SMALL["grouped"].build(), SMALL["grouped"].make_inputs()
    _, proof, _ = shrink_by_half(model, inputs)
    assert (model.grouped.groups, model.grouped.out_channels) == (2, 4)
    assert not proof.plan.integers


@pytest.mark.parametrize("name", _LITERALS)
def test_numbers_in_the_code_are_named(name: str) -> None:
    model, inputs = SMALL[name].build(), SMALL[name].make_inputs()[0]
    plan = half_of(graph.trace(model, inputs).prunable)
    match = rf"{type(model).__name__}.*cannot.*`.*{_LITERALS[name]}"
    assert_refused(model, plan, [inputs], AdapterError, match)


class Layers(nn.Module):
    """One layer of each sort that shows its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.enter = nn.Conv1d(8, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm1d(12)
        self.up = nn.ConvTranspose1d(12, 6, 2, groups=2)
        self.act = nn.PReLU(6)
        self.plain = nn.BatchNorm1d(6, affine=False)
        self.flat = nn.Conv1d(6, 8, 1)
        self.grouped = nn.GroupNorm(4, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = self.act(self.up(self.norm(self.enter(x))))
        x = self.grouped(self.flat(self.plain(x)))
        return self.leave(x.transpose(1, 2))


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


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_heads_whose_scores_are_gathered_leave(family: str) -> None:
    model = transformers_case(family).build().double()
    inputs = transformers_case(family).make_inputs()
    groups = graph.trace(model, inputs[0]).prunable
    assert [group.name.rpartition(".")[2] for group in groups] == ["heads", "neurons"] * 2
    for group in groups:
        assert_sound(model, group, inputs[0])
    plan, masked = half_of(groups), copy.deepcopy(model)
    for group in plan.groups:
        gone = sorted(set(range(group.units)) - set(group.kept))
        for slot in group.consumers:
            index = torch.tensor(slot.indices(gone))
            masked.get_parameter(slot.tensor).data.index_fill_(slot.dim, index, 0.0)
    shrink(model, plan, inputs)
    for found, expected in zip(
        proof_outputs(model, inputs), proof_outputs(masked, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- attention under other names ---------------------------------------------------------


class Attention(nn.Module):
    """As many heads as each is wide, under names that no one else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.nheads, self.each, self.span = 4, 4, 16
        self.qkv = nn.Linear(10, 3 * self.span)
        self.out = nn.Linear(self.span, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.nheads, self.span)

    def attend(self, x: Tensor, heads: int, span: int) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            part.view(n, length, heads, self.each).transpose(1, 2)
            for part in self.qkv(x).split(span, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, length, span))


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def _attentions() -> tuple[nn.Module, list[Inputs]]:
    return randomized(TwoAttentions()), [(torch.randn(2, 5, 10),), (torch.randn(3, 6, 10),)]


def test_numbers_under_unknown_names_are_found_by_trial() -> None:
    model, inputs = _attentions()
    dense = copy.deepcopy(model)
    _, proof, _ = shrink_by_half(model, inputs)
    assert {(n.module, n.attribute, n.value) for n in proof.plan.integers} == {
        (f"blocks.{block}", name, value)
        for block in "01"
        for name, value in (("nheads", 2), ("span", 8))
    }
    # What was found is part of the plan, which works without inputs from then on.
    osscar.slice_units(dense, PruningPlan.from_json(json.loads(json.dumps(proof.plan.to_json()))))
    dense.load_state_dict(model.state_dict())
    assert all(map(torch.equal, proof_outputs(dense, inputs), proof_outputs(model, inputs)))


class FourNumbers(nn.Module):
    """Gated heads whose code keeps four numbers that have to follow."""

    def __init__(self, heads: int = 6, width: int = 5, rest: int = 7) -> None:
        super().__init__()
        self.sections, self.per, self.all = heads, width, heads * width
        self.joint, self.doubled, self.rest = heads * width + rest, 2 * heads * width, rest
        self.put_in = nn.Linear(9, 2 * self.all + rest)
        self.scale = nn.Parameter(torch.rand(self.joint) + 0.5)
        self.put_out = nn.Linear(self.all, 4)

    def forward(self, x: Tensor) -> Tensor:
        both, extra = self.put_in(x).split([self.doubled, self.rest], dim=-1)
        value, gate = both.split([self.all, self.all], dim=-1)
        scaled = torch.cat((value, extra), -1) * self.scale
        scaled = scaled.view(*x.shape[:-1], self.joint)
        value, extra = scaled.split([self.all, self.rest], dim=-1)
        value = value.view(*value.shape[:-1], self.sections, self.per).softmax(-1)
        gate = gate.view(*gate.shape[:-1], self.sections, self.per).sigmoid()
        mixed = (value * gate).view(*x.shape[:-1], self.all)
        return self.put_out(torch.relu(mixed)) + extra.sum(-1, keepdim=True)


def test_more_numbers_than_two_follow_all_together() -> None:
    torch.manual_seed(0)
    net, data = FourNumbers(), torch.randn(64, 9)
    result = osscar.prune(net, data, sparsity=0.5, form="eager", strict=True, damp=0.01)
    found = {n.attribute: n.value for n in result.plan.integers}
    (layer,) = result.layers
    kept = layer.kept
    assert found == {"sections": kept, "all": 5 * kept, "joint": 5 * kept + 7, "doubled": 10 * kept}
    assert result.certificate.error < 1e-12


class OfConfig(nn.Module):
    """Reads the number of its neurons from a config that others read, too."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.both = nn.Linear(6, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).split([self.config.intermediate_size] * 2, dim=-1)
        return x + self.down(gate.sigmoid() * up)


def test_a_number_that_code_reads_from_a_shared_config_follows_in_one_of_its_own() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(intermediate_size=10, name="shared")
    net = nn.Sequential(OfConfig(config), OfConfig(config))
    keep = {"0.neurons": 4, "1.neurons": 7}
    result = osscar.prune(net, torch.randn(64, 6), groups=keep, form="eager", strict=True)
    assert result.certificate.error < 1e-12
    first, second = result.model
    assert (first.config.intermediate_size, second.config.intermediate_size) == (4, 7)
    assert config.intermediate_size == 10
    assert first.config.name == "shared"


@dataclass(frozen=True)
class Frozen:
    intermediate_size: int = 10


class Shared:
    intermediate_size = 10


@pytest.mark.parametrize("config", [Frozen(), Shared], ids=["frozen", "class"])
def test_a_config_that_cannot_be_changed_stays_and_a_program_follows(config: Any) -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(OfConfig(config)), torch.randn(64, 6)
    before = net(data)
    with pytest.raises(AdapterError, match=r"nothing was pruned|cannot follow"):
        osscar.prune(net, data, neurons=0.5, form="eager", strict=True)
    result = osscar.prune(net, data, neurons=0.5, strict=True)
    assert str(result.form) == "exported"
    assert config.intermediate_size == 10
    assert torch.equal(net(data), before)


class Literal(nn.Module):
    """A block that keeps the number of its neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.z = nn.Linear(16, 32), nn.Linear(32, 16), 32

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)).view(*x.shape[:-1], self.z))


def test_a_block_that_keeps_its_units_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Literal(), Literal(), Literal())
    asked = {"sparsity": 0.5, "skip": ["0.*"], "form": "eager", "strict": True}
    result = osscar.prune(net, torch.randn(64, 16), **asked)
    numbers = [block.z for block in result.model]
    assert numbers[0] == 32 > max(numbers[1:])


class Limited(nn.Module):
    """Its tuple holds the longest sequence beside the number of neurons, which is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.sizes = nn.Linear(6, 32), nn.Linear(32, 6), (32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, -self.sizes[0] :]
        return self.down(torch.relu(self.up(x)).view(*x.shape[:2], self.sizes[1]))


def test_only_the_entry_of_a_tuple_that_has_to_follow_does() -> None:
    torch.manual_seed(0)
    result = osscar.prune(Limited(), torch.randn(16, 6, 6), neurons=0.5, form="eager")
    assert result.model.sizes == (32, 16)
    assert result.model(torch.randn(2, 40, 6)).shape == (2, 32, 6)


class BeforeEncoder(nn.Module):
    """A block before an encoder of torch, whose fused path leaves zeros at padded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, 4:] = True
        found: Tensor = self.encoder(self.block(x), src_key_padding_mask=padding)
        return found


def test_a_proof_takes_the_path_that_the_model_takes() -> None:
    torch.manual_seed(0)
    model, x = BeforeEncoder().eval(), torch.randn(2, 6, 8)
    group = next(g for g in graph.trace(model, (x,)).prunable if g.name.startswith("block"))
    plan = PruningPlan((GroupPlan.of(group, tuple(range(12))),))
    assert shrink(model, plan, [(x,)]).certificate.error < 1e-6


class Decoder(nn.Module):
    """Features that become an image by a module without a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 6 * 4),
            nn.ReLU(),
            nn.Unflatten(1, (6, 2, 2)),
            nn.ConvTranspose2d(6, 4, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_sizes_in_a_tuple_follow() -> None:
    model = randomized(Decoder())
    dense = copy.deepcopy(model)
    _, proof, _ = shrink_by_half(model, [(torch.randn(2, 5),), (torch.randn(3, 5),)])
    assert model.layers[2].unflattened_size == (3, 2, 2)
    osscar.slice_units(dense, PruningPlan.from_json(json.loads(json.dumps(proof.plan.to_json()))))
    assert dense.layers[2].unflattened_size == (3, 2, 2)


class Padded(nn.Module):
    """A shortcut without weights that pads channels, as in residual networks for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 16, 1)
        self.leave = nn.Conv2d(16, 5, 1)
        self.padding = 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        sides = (0, 0, 0, 0, self.padding, self.padding)
        return self.leave(torch.relu(self.wide(x) + F.pad(x, sides)))


def test_zero_padded_shortcuts_follow() -> None:
    model = randomized(Padded())
    shrink_by_half(model, [(torch.randn(2, 3, 4, 4),), (torch.randn(1, 3, 6, 6),)])
    assert (model.enter.out_channels, model.wide.out_channels, model.padding) == (4, 8, 2)


class Stubborn(Attention):
    """Keeps its number of heads where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"heads": self.nheads, "span": self.span}
        del self.nheads, self.span

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.sizes["heads"], self.sizes["span"])


class Remembering(nn.Module):
    """Keeps what it makes of a parameter until it is converted, as position biases often are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.kept: dict[str, Tensor] = {}

    def _apply(self, *args: object, **kwargs: object) -> nn.Module:
        self.kept = {}
        return super()._apply(*args, **kwargs)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept.setdefault(str(x.device), torch.tanh(self.gain.detach()))
        return x * kept


def test_what_modules_remember_of_their_parameters_is_made_anew() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 12), Remembering(12), nn.ReLU(), nn.Linear(12, 3)).eval()
    data = torch.randn(64, 5)
    net(data)  # so that it remembers
    result = osscar.prune(net, data, neurons=0.5, form="eager", strict=True)
    assert result.certificate.error < 1e-12  # in float64, although it remembered float32
    pruned = result.model
    with torch.no_grad():
        found = pruned(data)
        assert found.dtype == torch.float32
        assert found.shape == (64, 3)
        assert pruned[1].gain.shape == (6,)
        pruned[1].kept = {}
        assert torch.equal(pruned(data), found)


def test_a_module_that_cannot_follow_is_named_until_it_has_an_adapter() -> None:
    model, inputs = randomized(Stubborn()), [(torch.randn(2, 5, 10),)]
    plan = half_of(graph.trace(model, inputs[0]).prunable)
    assert_refused(model, plan, inputs, AdapterError, r"Stubborn\) cannot follow.*osscar\.adapter")

    @adapter(Stubborn)
    def follow(module: Stubborn, group: GroupPlan) -> None:
        module.sizes = {name: group.scaled(size) for name, size in module.sizes.items()}

    assert shrink(model, plan, inputs).certificate.error < 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 7}], ids=str)
def test_multihead_attention_of_torch(batch_first: bool, options: dict[str, int]) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=batch_first, **options)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Tensor) -> object:
            shown = self.attention(q, k, v, key_padding_mask=padding, attn_mask=mask)
            return shown[0], self.attention(q, k, v, need_weights=False)[0]

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
    model = Cross().eval()
    dependencies, _, effect = shrink_by_half(model, [inputs(2, 5), inputs(3, 4)])
    assert [group.kind for group in dependencies.prunable] == ["heads"]
    assert effect > 1e-3


def test_an_encoder_layer_of_torch_takes_no_fused_path_of_full_width() -> None:
    model, inputs = _encoder(), [(torch.randn(2, 5, 12),), (torch.randn(3, 4, 12),)]
    first, _, _ = shrink_by_half(model, inputs)
    kinds = [group.kind for group in first.prunable]
    assert sorted(kinds) == ["heads", "heads", "neurons", "neurons"]
    again, _, _ = shrink_by_half(model, inputs)
    assert removable(again) < removable(first)
    assert model.layers[0].self_attn.num_heads == 1


class TwoInOne(nn.Module):
    """A block that keeps one number for both of its attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = nn.MultiheadAttention(16, 4, batch_first=True)
        self.num_heads = 4

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(x.shape[0] * self.num_heads, x.shape[1], x.shape[1])
        x = self.first(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.second(x, x, x, attn_mask=mask, need_weights=False)[0]


def test_a_number_of_a_block_is_not_divided_twice() -> None:
    torch.manual_seed(0)
    model = TwoInOne().eval()
    _, proof, _ = shrink_by_half(model, [(torch.randn(2, 5, 16),), (torch.randn(3, 4, 16),)])
    assert model.num_heads == model.first.num_heads == model.second.num_heads == 2
    assert [(i.attribute, i.value) for i in proof.plan.integers] == [("num_heads", 2)]


def test_bias_keys_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, add_bias_kv=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    plain = nn.MultiheadAttention(12, 4, batch_first=True)
    model, x = Odd().eval(), torch.randn(2, 5, 12)
    groups = graph.trace(plain, (x, x, x)).groups
    heads = next(group for group in groups if group.kind == "heads")
    moved = tuple(
        graph.Slot(**{**vars(s), "tensor": f"attention.{s.tensor}", "module": "attention"})
        for s in heads.slots
    )
    plan = PruningPlan((GroupPlan(heads.name, heads.kind, 4, (0, 1), moved),))
    assert_refused(model, plan, [(x,)], ModelError, "add_bias_kv")


# ---- twice, and on -----------------------------------------------------------------------

_TWICE = [
    *map(transformers_case, ("llama-multi-query", "phi3", "t5")),
    pytest.param(torchvision_case("resnet18"), marks=_TORCHVISION),
    pytest.param(torchvision_case("regnet_x_400mf"), marks=_TORCHVISION),
]


def removable(dependencies: graph.DependencyGraph) -> int:
    """Return how many parameters would leave if every prunable unit could."""
    return sum(group.units * group.removable for group in dependencies.prunable)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", _TWICE, ids=lambda case: case.name)
def test_a_shrunk_model_can_be_pruned_again(case) -> None:
    model = case.build()
    inputs = case.make_inputs()
    first, _, _ = shrink_by_half(model, inputs)
    again, _, effect = shrink_by_half(model, inputs)
    assert effect > 1e-4
    assert removable(again) < removable(first)
    assert len(lineage_of(model).plans) == 2


def test_gradients_flow_through_a_shrunk_model() -> None:
    case = transformers_case("llama")
    model = case.build()
    still = {name for name, p in model.named_parameters() if ".q_proj." in name}
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    shrink_by_half(model, case.make_inputs())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == still
    model.requires_grad_()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss = model(**case.make_inputs()[0]).logits.square().mean()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.shape == p.shape and torch.isfinite(p.grad).all()
        for p in model.parameters()
    )
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Logits(nn.Module):
    """A language model as a function of tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def _shrunk(name: str) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    if name == "encoder":
        model, inputs = _encoder(), [(torch.randn(2, 5, 12),), (torch.randn(3, 4, 12),)]
        shrink_by_half(model, inputs)
        return model, inputs
    case = transformers_case(name)
    model, inputs = case.build(), case.make_inputs()
    shrink_by_half(model, inputs)
    return Logits(model).eval(), [(i["input_ids"],) for i in inputs]


_EXPORTED = ["encoder", "llama"]


@pytest.mark.slow
@pytest.mark.parametrize("name", _EXPORTED)
def test_a_shrunk_model_compiles(name: str) -> None:
    model, inputs = _shrunk(name)
    # Without code generation, which takes half a minute; it changes nothing about shapes.
    compiled = torch.compile(model, backend="aot_eager")
    for one, expected in zip(inputs, proof_outputs(model, inputs), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*one), expected, rtol=1e-4, atol=1e-4)


_COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(_COMPILER is None, reason="torch.compile with inductor needs a C++ compiler")
@pytest.mark.slow
def test_a_shrunk_model_compiles_to_machine_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, inputs = _shrunk("encoder")
    compiled = torch.compile(model, backend="inductor")
    (expected,) = proof_outputs(model, inputs[:1])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("onnxscript") is None or find_spec("onnx") is None,
    reason="the export to ONNX needs onnx and onnxscript: pip install 'osscar[onnx]'",
)
@pytest.mark.parametrize("name", _EXPORTED)
@pytest.mark.filterwarnings("ignore")
def test_a_shrunk_model_is_exported_to_onnx(name: str) -> None:
    reference = importlib.import_module("onnx.reference")
    model, inputs = _shrunk(name)
    exported = torch.onnx.export(model, inputs[0], dynamo=True, verbose=False).model_proto
    feed = {exported.graph.input[0].name: inputs[0][0].numpy()}
    (found,) = reference.ReferenceEvaluator(exported).run(None, feed)
    (expected,) = proof_outputs(model, inputs[:1])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


# ---- refusals ----------------------------------------------------------------------------


def test_a_wrong_plan_is_caught_by_the_proof() -> None:
    """A plan that forgets a producer's bias still runs here, but computes something else."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 8)
            self.leave = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(torch.relu(F.linear(x, self.enter.weight)) + self.enter.bias.mean())

    model = randomized(Halves())
    slots = (
        graph.Slot("enter.weight", 0, graph.Role.PRODUCER, "enter", 8),
        graph.Slot("leave.weight", 1, graph.Role.CONSUMER, "leave", 8),
        graph.Slot("enter.bias", 0, graph.Role.PASS_THROUGH, "enter", 8),
    )
    plan = PruningPlan((GroupPlan("neurons", graph.UnitKind.NEURONS, 8, (0, 1, 2, 3), slots),))
    assert_refused(model, plan, [(torch.randn(2, 4),)], EquivalenceError, "differs from the masked")


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
def test_tied_tensors_stay_tied(shared_memory: bool) -> None:
    model = TiedPair(shared_memory=shared_memory).eval()
    assert model.one.weight.data_ptr() == model.two.weight.data_ptr()
    shrink_by_half(model, [(torch.randn(3, 4),)])
    assert model.one.weight is model.two.weight
    assert model.one.weight.shape == (5, 3)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_tied_tensors_are_not_cut_in_two_ways(shared_memory: bool) -> None:
    model = TiedPair(shared_memory=shared_memory).eval()
    inputs = [(torch.randn(3, 4),)]
    slots = (graph.Slot("enter.weight", 0, graph.Role.PRODUCER, "enter", 6),)
    one = graph.Slot("one.weight", 1, graph.Role.CONSUMER, "one", 6)
    two = graph.Slot("two.weight", 1, graph.Role.CONSUMER, "two", 6)
    plan = PruningPlan(
        (
            GroupPlan("first", graph.UnitKind.NEURONS, 6, (0, 1, 2), (*slots, one)),
            GroupPlan("second", graph.UnitKind.NEURONS, 6, (3, 4, 5), (two,)),
        )
    )
    assert_refused(model, plan, inputs, ModelError, "tied to it, in different ways")


def test_a_scale_derived_from_the_head_width_keeps_its_value() -> None:
    model = transformers_case("llama").build()
    scaling = model.model.layers[0].self_attn.scaling
    shrink_by_half(model, transformers_case("llama").make_inputs())
    assert model.model.layers[0].self_attn.scaling == scaling == 8**-0.5


def test_a_model_on_meta_shrinks() -> None:
    model = transformers_case("llama").build().to("meta")
    groups = graph.trace(model, {"input_ids": torch.zeros(2, 7, dtype=torch.int64)}).prunable
    osscar.slice_units(model, half_of(groups))
    assert model.model.layers[1].mlp.down_proj.weight.shape == (48, 20)
