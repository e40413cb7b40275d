"""The dependency graph as a whole: names, drawing, networkx, and a model left alone."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
import torch
import transformers
from torch import Tensor, nn

import graph
from graph import CouplingGroup, DependencyGraph, UnitKind
from graph.draw import coupling_graph
from graph.groups import Role, Slot
from graph.tracing.export import run_export
from tests.zoo import SMALL, transformers_case


def traced(family: str, attention: str | None = None) -> DependencyGraph:
    case = transformers_case(family, attention)
    return graph.trace(case.build(), case.make_inputs()[0])


@pytest.fixture(scope="module")
def llama() -> DependencyGraph:
    return traced("llama")


def test_groups_of_a_language_model(llama: DependencyGraph) -> None:
    names = [group.name for group in llama.groups]
    assert len(set(names)) == len(names)
    assert llama.group("model.layers.1.mlp.neurons").units == 40
    with pytest.raises(graph.UnknownGroupError, match=r"layers\.1\.mlp\.neurons") as caught:
        llama.group("model.layers.1.mlp.neuron")
    assert isinstance(caught.value, KeyError)
    # Groups and slots follow execution.
    starts = [group.slots[0].order for group in llama.groups]
    assert starts == sorted(starts)
    for group in llama.groups:
        orders = [slot.order for slot in group.slots]
        assert orders == sorted(orders)
    # Prunable groups never overlap.
    owned: set[tuple[str, int, int]] = set()
    for group in llama.prunable:
        mine = {
            (s.tensor, s.dim, index) for s in group.slots for index in s.indices(range(s.units))
        }
        assert owned.isdisjoint(mine)
        owned |= mine
    # The hidden axis is frozen by its norm.
    hidden = llama.group("hidden")
    assert hidden.kind is graph.UnitKind.HIDDEN
    assert not hidden.prunable
    assert hidden.frozen[0].module == "model.layers.0.input_layernorm"


class Labelled(nn.Module):
    """A layer to which an embedding is added, and nothing is written back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.label, self.down = nn.Linear(6, 12), nn.Embedding(5, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.down((self.up(x) + self.label(label)).relu())  # type: ignore[no-any-return]


class Gated(nn.Module):
    """Channels times a gate, in the way that code multiplies heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.last = nn.Conv2d(3, 8, 3), nn.Linear(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((2, 3))).sigmoid()
        return self.last(torch.einsum("bchw,bc->bchw", self.body(x), gate))  # type: ignore[no-any-return]


def test_kinds_are_those_of_what_computes_the_units() -> None:
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    (neurons,) = graph.trace(Labelled(), (torch.zeros(2, 6), labels)).prunable
    assert (neurons.name, neurons.kind) == ("neurons", graph.UnitKind.NEURONS)
    (channels,) = graph.trace(Gated(), (images,)).prunable
    assert channels.kind is graph.UnitKind.CHANNELS


def test_networkx_joins_slots_groups_and_operators(llama: DependencyGraph) -> None:
    network = llama.networkx()
    kinds = nx.get_node_attributes(network, "kind")
    assert set(kinds.values()) == {"operator", "slot", "group"}
    group = llama.group("model.layers.0.mlp.neurons")
    makers = {network.nodes[name]["data"].tensor for name in network.predecessors(group.name)}
    readers = {network.nodes[name]["data"].tensor for name in network.successors(group.name)}
    assert makers == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")}
    assert readers == {"model.layers.0.mlp.down_proj.weight"}
    operators = network.subgraph(name for name, kind in kinds.items() if kind == "operator")
    assert nx.is_directed_acyclic_graph(operators)


def test_drawing_is_svg_with_every_group(llama: DependencyGraph, tmp_path: Path) -> None:
    path = llama.draw(tmp_path / "groups.svg")
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    text = [element.text for element in root.iter() if element.tag.endswith("text")]
    names = {re.sub(r"\.\d+\.", ".N.", group.name, count=1) for group in llama.groups}
    assert names <= set(text)
    assert any(line and line.startswith("frozen: ") for line in text)
    assert llama.draw(tmp_path / "groups.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(graph.GraphError, match="cannot write"):
        llama.draw(tmp_path / "nowhere" / "groups.svg")


def test_a_drawing_says_what_it_shows_and_draws_layers_alike_once() -> None:
    def group(layer: int, units: int) -> CouplingGroup:
        owned = [
            f"layers.{layer}.up.weight",
            f"layers.{layer}.up.bias",
            f"layers.{layer}.down.weight",
        ]
        roles = (Role.PRODUCER, Role.PASS_THROUGH, Role.CONSUMER)
        slots = tuple(
            Slot(tensor, 0, role, tensor.rpartition(".")[0], units)
            for tensor, role in zip(owned, roles, strict=True)
        )
        return CouplingGroup(f"layers.{layer}.neurons", UnitKind.NEURONS, units, slots, 7)

    groups = [group(layer, 8 if layer != 4 else 6) for layer in (0, 1, 2, 4, 5, 11)]
    network = coupling_graph(groups)
    labels = nx.get_node_attributes(network, "label")
    assert len(network) == 8
    assert all(labels[name].startswith("layers.N.neurons\n") for name in ("0", "1"))
    assert [labels[name].splitlines()[-1] for name in ("0", "1")] == [
        "N = 0 to 2, 5, 11",
        "6 neurons, 7 parameters each",
    ]
    assert labels["0 consumer"] == labels["1 consumer"] == "layers.N.down.weight [0] x1"
    assert set(network.edges("0")) == {("0", "0 consumer")}
    assert set(network.predecessors("0")) == {"0 producer", "0 pass-through"}


def _without_order(groups: tuple[CouplingGroup, ...]) -> list[CouplingGroup]:
    """The same groups, whatever else is computed between their operators."""
    return [
        replace(group, slots=tuple(replace(slot, order=0) for slot in group.slots))
        for group in groups
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_meta_tensors_give_the_same_groups(family: str) -> None:
    case = transformers_case(family)
    model, inputs = case.build(), case.make_inputs()[0]
    with torch.device("meta"):
        shapes = type(model)(model.config).eval()
    real, meta = graph.trace(model, inputs), graph.trace(shapes, inputs)
    assert _without_order(meta.groups) == _without_order(real.groups)


def test_groups_do_not_depend_on_the_size_of_the_inputs() -> None:
    model = transformers_case("llama", "eager").build()
    # Sizes equal to the number of heads, of key heads, of their width, and one.
    groups, *others = (
        _without_order(graph.trace(model, {"input_ids": torch.zeros(size).long()}).groups)
        for size in ((3, 7), (6, 6), (2, 2), (1, 8))
    )
    assert all(other == groups for other in others)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model.train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph.trace(model, (torch.randn(3, 4),))
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.skipif(
    not hasattr(torch.fx.config, "do_not_emit_stack_traces"), reason="an older torch notes them"
)
@pytest.mark.parametrize("asked", [False, True])
def test_no_lines_of_python_are_noted_and_torch_is_left_as_it_was(asked, monkeypatch) -> None:
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", asked)
    inputs = {"input": torch.randn(3, 4)}
    exported = run_export(nn.Linear(4, 5), (), inputs)
    assert not any("stack_trace" in node.meta for node in exported.graph.nodes)
    with pytest.raises(graph.TraceError):
        run_export(nn.Linear(5, 5), (), inputs)
    assert torch.fx.config.do_not_emit_stack_traces is asked


class _Keeping(nn.Module):
    """Holds containers of its own and one that others hold too."""

    def __init__(self, shared: dict[str, list[int]]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shared = shared
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shared["calls"].append(1)
        return self.linear(x)


def test_containers_that_modules_hold_are_neither_copied_nor_changed() -> None:
    calls: list[int] = []
    shared = {"calls": calls}
    model = nn.Sequential(_Keeping(shared), _Keeping(shared))
    seen = model[0].seen
    model[0].register_forward_hook(lambda module, args, output: module.seen.append(output))
    graph.trace(model, (torch.randn(3, 4),))
    assert model[0].seen is seen
    assert seen == []
    assert model[0].shared is model[1].shared is shared
    assert shared["calls"] is calls
    assert calls == []


def test_tied_embeddings_are_one_tensor_with_two_roles() -> None:
    hidden = traced("gpt2").group("hidden")
    embedding = [slot for slot in hidden.slots if slot.tensor == "transformer.wte.weight"]
    assert {slot.role for slot in embedding} == {graph.Role.PRODUCER, graph.Role.CONSUMER}
    assert {slot.module for slot in embedding} == {"transformer.wte", "lm_head"}
    assert not [slot for slot in hidden.slots if slot.tensor == "lm_head.weight"]


def test_removable_parameters_are_what_slicing_removes() -> None:
    for case in (case for case in SMALL.values() if "always" in case.tags):
        model, inputs = case.build(), case.make_inputs()[0]
        sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for group in graph.trace(model, inputs).prunable:
            kept = {name: [set(range(n)) for n in shape] for name, shape in sizes.items()}
            for slot in group.slots:
                if slot.tensor in kept:
                    kept[slot.tensor][slot.dim] -= set(slot.indices([0]))
            left = sum(torch.Size(map(len, dims)).numel() for dims in kept.values())
            assert group.removable == sum(shape.numel() for shape in sizes.values()) - left


def test_a_deep_model_on_meta_is_traced_in_linear_time() -> None:
    def operators(layers: int) -> int:
        config = transformers.OPTConfig(
            hidden_size=7168,
            ffn_dim=28672,
            num_hidden_layers=layers,
            num_attention_heads=56,
            word_embed_proj_dim=7168,
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        dependencies = graph.trace(model, {"input_ids": torch.zeros(2, 7).long()})
        assert len(dependencies.prunable) == 2 * layers
        return len(dependencies.operators)

    two, four, eight = (operators(layers) for layers in (2, 4, 8))
    assert eight - four == 2 * (four - two)
