"""Coupling groups of hand-written networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graph
from graph import Role, UnitKind
from tests.zoo import SMALL, Case

from .blocks import AddedProducts
from .masking import assert_sliced, assert_sound
from .topologies import FROZEN, Concat, Depthwise, GatedHalves, Residual, Tied, randomized


def cases(*tags: str) -> pytest.MarkDecorator:
    """Parametrize over small networks with some tags; those that are not always tested are slow."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=() if "always" in case.tags else pytest.mark.slow)
            for name, case in SMALL.items()
            if case.tags.issuperset(tags)
        ],
    )


@cases()
def test_groups_are_found_and_sound(case: Case) -> None:
    model, inputs = case.build(), case.make_inputs()[0]
    groups = graph.trace(model, inputs).prunable
    assert {group.name: group.units for group in groups} == case.groups
    for group in groups:
        assert_sound(model, group, inputs)


@cases("cuts")
def test_slots_are_all_there_is_to_cut(case: Case) -> None:
    model, inputs = case.build(), case.make_inputs()[0]
    assert_sliced(model, graph.trace(model, inputs).prunable, inputs)


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_understood_is_frozen_and_named(name: str) -> None:
    network, operator = FROZEN[name]
    dependencies = graph.trace(network(), (torch.randn(3, 4),))
    assert not dependencies.prunable
    hidden = [
        group for group in dependencies.groups if any(s.module == "enter" for s in group.producers)
    ]
    assert any(f.operator == operator for group in hidden for f in group.frozen)


def _places(group: graph.CouplingGroup, role: Role) -> list[tuple[str, int, int, int, int]]:
    return [(s.tensor, s.dim, s.outer, s.inner, s.offset) for s in group.slots if s.role is role]


def test_a_residual_stream_has_many_producers_and_consumers() -> None:
    group = graph.trace(Residual(), (torch.randn(2, 3, 4, 4),)).group("stem.channels")
    assert group.kind is UnitKind.CHANNELS
    assert [slot.tensor for slot in group.producers] == ["stem.weight", "two.weight"]
    assert [slot.tensor for slot in group.consumers] == ["one.weight", "head.weight"]
    normalization = {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    assert {slot.tensor for slot in group.pass_through} == normalization | {"stem.bias", "two.bias"}
    # A row and a bias of each producer, a column of each consumer, a scale and a shift.
    assert group.removable == (27 + 1) + (72 + 1) + 72 + 5 + 2


def test_concatenated_groups_keep_their_offsets() -> None:
    dependencies = graph.trace(Concat(), (torch.randn(2, 3, 4, 4),))
    left, right = dependencies.group("left.channels"), dependencies.group("right.channels")
    assert _places(left, Role.CONSUMER) == [("head.weight", 1, 1, 16, 0)]
    assert _places(right, Role.CONSUMER) == [("head.weight", 1, 1, 16, 64)]
    assert ("norm.running_mean", 0, 1, 1, 4) in _places(right, Role.PASS_THROUGH)


def test_a_depthwise_filter_is_passed_through() -> None:
    group = graph.trace(Depthwise(), (torch.randn(2, 3, 4, 4),)).group("expand.channels")
    assert ("depth.weight", 0, 1, 1, 0) in _places(group, Role.PASS_THROUGH)
    assert _places(group, Role.CONSUMER) == [("project.weight", 1, 1, 1, 0)]


class ByGroup(nn.Module):
    """A matrix for each of three groups of features."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).unflatten(1, (3, 2))
        return self.leave(torch.einsum("ngi,gij->ngj", x, self.weight).flatten(1))


def test_what_has_a_matrix_for_each_unit_passes_through() -> None:
    groups = graph.trace(ByGroup(), (torch.randn(3, 4),)).groups
    (group,) = (g for g in groups if ("weight", 0) in {(s.tensor, s.dim) for s in g.slots})
    assert _places(group, Role.PASS_THROUGH) == [
        ("enter.bias", 0, 1, 2, 0),
        ("weight", 0, 1, 1, 0),
    ]


def test_gated_halves_are_two_slots_of_one_dimension() -> None:
    group = graph.trace(GatedHalves(), (torch.randn(3, 4),)).group("neurons")
    assert _places(group, Role.PRODUCER) == [
        ("enter.weight", 0, 1, 1, 0),
        ("enter.weight", 0, 1, 1, 7),
    ]
    assert group.removable == 2 * (4 + 1) + 5


def test_tied_weights_are_named_once_and_cut_on_both_sides() -> None:
    group = graph.trace(Tied(), (torch.randn(3, 4),)).group("hidden")
    names = {slot.tensor for slot in group.slots}
    assert "first.weight" in names
    assert "second.weight" not in names
    dims = {slot.dim for slot in group.slots if slot.tensor == "first.weight"}
    assert dims == {0, 1}
    assert group.removable == 2 * 6 - 1 + 2 + (4 + 1) + 5


def test_slots_name_the_module_that_uses_a_tensor() -> None:
    """A bias that another layer adds is passed through there, not where it is held."""
    groups = graph.trace(AddedProducts(), (torch.randn(3, 4),)).groups
    (slot,) = (slot for group in groups for slot in group.slots if slot.tensor == "down.bias")
    assert (slot.role, slot.module) == (Role.PASS_THROUGH, "")


def test_inputs_and_outputs_are_frozen() -> None:
    dependencies = graph.trace(nn.Linear(4, 5), (torch.randn(3, 4),))
    reasons = {group.name: group.frozen[0].reason for group in dependencies.groups}
    assert "input of the model" in reasons["inputs"]
    assert "output of the model" in reasons["outputs"]


def test_a_user_rule_unfreezes_an_operator() -> None:
    network, _ = FROZEN["unknown-operator"]
    rules = graph.DEFAULT_RULES.extended()

    @rules.rule("aten.fft_fft", "aten.real")
    def passed_on(call: graph.Call) -> graph.Value:
        return call.value("self")

    dependencies = graph.trace(network(), (torch.randn(3, 4),), rules=rules)
    assert [group.name for group in dependencies.prunable] == ["neurons"]
    assert not graph.trace(network(), (torch.randn(3, 4),)).prunable


@pytest.mark.parametrize("opaque", ["norm", nn.BatchNorm2d])
def test_an_opaque_module_is_left_whole(opaque: str | type[nn.Module]) -> None:
    case = SMALL["residual"]
    dependencies = graph.trace(case.build(), case.make_inputs()[0], opaque=[opaque])
    assert [group.name for group in dependencies.prunable] == ["one.channels"]
    assert "declared opaque" in dependencies.group("stem.channels").frozen[0].reason


def test_an_opaque_module_must_exist() -> None:
    case = SMALL["called-twice"]
    with pytest.raises(graph.ExampleInputError, match="near it: block"):
        graph.trace(case.build(), case.make_inputs()[0], opaque=["blocks"])


def test_a_rule_that_returns_other_shapes_is_refused() -> None:
    rules = graph.DEFAULT_RULES.extended()
    rules.rule("aten.linear")(lambda call: call.value("input"))
    with pytest.raises(graph.RuleError, match=r"aten\.linear.*shapes"):
        graph.trace(nn.Linear(4, 5), (torch.randn(3, 4),), rules=rules)


def test_a_rule_that_fails_names_operator_and_module() -> None:
    rules = graph.DEFAULT_RULES.extended()
    rules.rule("aten.linear")(lambda call: call.value("no such argument"))
    with pytest.raises(graph.RuleError, match=r"aten\.linear.*'0'"):
        graph.trace(nn.Sequential(nn.Linear(4, 5)), (torch.randn(3, 4),), rules=rules)


class Numbered(nn.Module):
    """Neurons that meet numbers made and listed by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).tanh() * torch.arange(6)
        return self.leave(x + torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]))


def test_numbers_of_the_code_hold_modules_and_not_programs() -> None:
    model, example = randomized(Numbered()), (torch.randn(2, 4),)
    (group,) = (g for g in graph.trace(model, example).groups if g.units == 6)
    reasons = [freeze.reason for freeze in group.frozen]
    assert any("numbers that the code makes" in reason for reason in reasons)
    assert any("constant of the code" in reason for reason in reasons)
    (group,) = graph.trace(model, example, rules=graph.PROGRAM_RULES).prunable
    assert group.name == "neurons"
    assert_sound(model, group, example)
