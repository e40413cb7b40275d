"""The dependency graph as a whole: names, drawing, and what it does not depend on."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

import graph
from graph import Role, UnitKind
from tests.zoo import transformers_case


def traced(family):
    case = transformers_case(family)
    return graph.trace(case.build(), case.make_inputs()[0])


@pytest.fixture(scope="module")
def llama():
    return traced("llama")


def test_groups_of_a_language_model(llama):
    names = [group.name for group in llama.groups]
    assert len(set(names)) == len(names)
    with pytest.raises(graph.UnknownGroupError, match=r"layers\.1\.mlp\.neurons"):
        llama.group("model.layers.1.mlp.neuron")
    # Groups and slots follow execution.
    orders = [[slot.order for slot in group.slots] for group in llama.groups]
    assert [own[0] for own in orders] == sorted(own[0] for own in orders)
    assert all(own == sorted(own) for own in orders)
    # Prunable groups never overlap.
    owned = [
        (s.tensor, s.dim, index)
        for group in llama.prunable
        for s in group.slots
        for index in s.indices(range(s.units))
    ]
    assert len(set(owned)) == len(owned)
    # The hidden axis is frozen by its norm.
    hidden = llama.group("hidden")
    assert (hidden.kind, hidden.prunable) == (UnitKind.HIDDEN, False)
    assert hidden.frozen[0].module == "model.layers.0.input_layernorm"


def layers():
    return torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)


def test_a_drawing_is_xml_whatever_names_hold(tmp_path):
    net = torch.nn.Sequential()
    names = ("a\x1b[31m", "b\u202e", "c$x$ $y_{", 'd<&>"', "e\ud800", "\ufffe")
    for name in names:
        net.add_module(name, torch.nn.Sequential(*layers()))
    file = graph.trace(net, (torch.zeros(2, 4),)).draw(tmp_path / "groups.svg")
    text = {element.text for element in ET.parse(file).getroot().iter()}
    shown = (r"a\x1b[31m", r"b\u202e", "c$x$ $y_{", 'd<&>"', r"e\ud800", r"\ufffe")
    # what the last one returns is the model's output
    assert {f"{name}.neurons" for name in shown} <= text
    assert {f"{name}.N.weight [0] x1" for name in shown} <= text
    assert all(c.isprintable() or c in "\n\t" for c in file.read_text())


def _without_order(groups):
    """The same groups, whatever else is computed between their operators."""
    return [
        replace(group, slots=tuple(replace(slot, order=0) for slot in group.slots))
        for group in groups
    ]


def test_meta_tensors_give_the_same_groups(llama):
    case = transformers_case("llama")
    model = case.build()
    with torch.device("meta"):
        shapes = type(model)(model.config).eval()
    meta = graph.trace(shapes, case.make_inputs()[0])
    assert _without_order(meta.groups) == _without_order(llama.groups)


def test_groups_do_not_depend_on_the_size_of_the_inputs():
    model = transformers_case("llama", "eager", num_hidden_layers=1).build()
    # Sizes equal to the number of heads, of key heads, of their width, and one.
    groups, *others = (
        _without_order(graph.trace(model, {"input_ids": torch.zeros(size).long()}).groups)
        for size in ((3, 7), (4, 4), (2, 2), (1, 16))
    )
    assert all(other == groups for other in others)


def test_tied_embeddings_are_one_tensor_with_two_roles():
    hidden = traced("gpt2").group("hidden")
    embedding = [slot for slot in hidden.slots if slot.tensor == "transformer.wte.weight"]
    assert {slot.role for slot in embedding} == {Role.PRODUCER, Role.CONSUMER}
    assert {slot.module for slot in embedding} == {"transformer.wte", "lm_head"}
    assert not [slot for slot in hidden.slots if slot.tensor == "lm_head.weight"]
