"""Coupling groups of hand-written networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graph
from graph import Role, UnitKind
from tests.zoo import SMALL

from .blocks import BLOCKS
from .masking import assert_sound
from .topologies import FROZEN, PRUNABLE, network, randomized


def traced(name, **options):
    kind, example, _ = {**PRUNABLE, **BLOCKS}[name]
    return graph.trace(kind(), example, **options)


def passing(group):
    """The slots applied element-wise to the units."""
    return [slot for slot in group.slots if slot.role is Role.PASS_THROUGH]


def left_by_slicing(model, group):
    """How many parameters are left where the first unit is cut out of every slot."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    kept = {name: [set(range(n)) for n in shape] for name, shape in sizes.items()}
    for slot in group.slots:
        if slot.tensor in kept:
            kept[slot.tensor][slot.dim] -= set(slot.indices([0]))
    return sum(torch.Size(map(len, dims)).numel() for dims in kept.values())


_ALWAYS = {
    *PRUNABLE,
    *("multi-query", "enable-gqa", "rms-norm", "addmm", "stack", "recurrent", "unflatten"),
    *("pixel-shuffle", "messages", "fourier", "patches", "experts"),
    "uneven-parts",
}
"""What the default suite tests."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in _ALWAYS else pytest.mark.slow)
        for name, case in SMALL.items()
    ],
)
def test_groups_are_found_and_sound(case):
    model, inputs = case.build(), case.make_inputs()[0]
    groups = graph.trace(model, inputs).prunable
    assert {group.name: group.units for group in groups} == case.groups
    size = sum(parameter.numel() for parameter in model.parameters())
    for group in groups:
        assert_sound(model, group, inputs)
        assert group.removable == size - left_by_slicing(model, group)
        other = {(s.tensor, s.dim, s.offset) for s in (*group.producers, *group.consumers)}
        assert other.isdisjoint((s.tensor, s.dim, s.offset) for s in passing(group))


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_understood_is_frozen_and_named(name):
    kind, operator = FROZEN[name]
    dependencies = graph.trace(kind(), (torch.randn(3, 4),))
    assert not dependencies.prunable
    hidden = [
        group for group in dependencies.groups if any(s.module == "enter" for s in group.producers)
    ]
    assert any(f.operator == operator for group in hidden for f in group.frozen)


@pytest.mark.parametrize(
    ("name", "group", "role", "places"),
    [
        ("residual", "stem.channels", Role.PRODUCER, {"stem.weight": [0], "two.weight": [0]}),
        ("residual", "stem.channels", Role.CONSUMER, {"one.weight": [0], "head.weight": [0]}),
        ("concat", "left.channels", Role.CONSUMER, {"head.weight": [0]}),
        ("concat", "right.channels", Role.CONSUMER, {"head.weight": [64]}),
        ("depthwise", "expand.channels", Role.CONSUMER, {"project.weight": [0]}),
        (
            "depthwise",
            "expand.channels",
            Role.PASS_THROUGH,
            {"expand.bias": [0], "depth.weight": [0], "depth.bias": [0]},
        ),
        ("gated-halves", "neurons", Role.PRODUCER, {"enter.weight": [0, 7]}),
        # One name of a tied weight, which is cut on both sides.
        ("tied", "hidden", Role.CONSUMER, {"first.weight": [0], "leave.weight": [0]}),
    ],
)
def test_slots_lie_where_units_do(name, group, role, places):
    found = {}
    for slot in traced(name).group(group).slots:
        if slot.role is role:
            found.setdefault(slot.tensor, []).append(slot.offset)
    assert found == places


def test_inputs_and_outputs_are_frozen():
    dependencies = graph.trace(nn.Linear(4, 5), (torch.randn(3, 4),))
    reasons = {group.name: group.frozen[0].reason for group in dependencies.groups}
    assert "input of the model" in reasons["inputs"]
    assert "output of the model" in reasons["outputs"]


@network(up=(6, 12), label=lambda: nn.Embedding(5, 12), down=(12, 4))
def labelled(net, x):
    """A layer to which an embedding is added, and nothing is written back."""
    return net.down((net.up(x) + net.label(x[:, 0].long())).relu())


@network(body=(3, 8, 3), gate=(3, 8), last=(8, 4, 1))
def gated(net, x):
    """Channels times a gate, in the way that code multiplies heads."""
    gate = net.gate(x.mean((2, 3))).sigmoid()
    return net.last(torch.einsum("bchw,bc->bchw", net.body(x), gate))


def test_kinds_are_those_of_what_computes_the_units():
    (neurons,) = graph.trace(labelled(), (torch.zeros(2, 6),)).prunable
    assert (neurons.name, neurons.kind) == ("neurons", UnitKind.NEURONS)
    (channels,) = graph.trace(gated(), (torch.zeros(2, 3, 8, 8),)).prunable
    assert channels.kind is UnitKind.CHANNELS


# ---- rules of one's own, and modules left whole --------------------------------------------------


def test_a_user_rule_unfreezes_an_operator():
    kind, _ = FROZEN["unknown-operator"]
    rules = graph.DEFAULT_RULES.extended()
    rules.rule("aten.fft_fft", "aten.real", reads="self")(lambda call: call.value("self"))
    (group,) = graph.trace(kind(), (torch.randn(3, 4),), rules=rules).prunable
    assert group.name == "neurons"
    assert not graph.trace(kind(), (torch.randn(3, 4),)).prunable


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda call: call.value("input"), r"aten\.linear.*'0' returned .* shapes"),
        (lambda call: call.value("self"), r"aten\.linear.*'0'.*no tensor 'self', but \['bias',"),
        (lambda call: call.value("input").dims, r"failed on aten\.linear.* in module '0'"),
    ],
)
def test_a_rule_that_is_wrong_is_named_with_operator_and_module(rule, message):
    rules = graph.DEFAULT_RULES.extended()
    rules.rule("aten.linear", reads="input weight bias")(rule)
    with pytest.raises(graph.RuleError, match=message):
        graph.trace(nn.Sequential(nn.Linear(4, 5)), (torch.randn(3, 4),), rules=rules)


@pytest.mark.parametrize("opaque", ["norm", nn.BatchNorm2d])
def test_an_opaque_module_is_left_whole(opaque):
    dependencies = traced("residual", opaque=[opaque])
    assert [group.name for group in dependencies.prunable] == ["one.channels"]
    assert "declared opaque" in dependencies.group("stem.channels").frozen[0].reason


@network(enter=(4, 6), leave=(6, 3))
def numbered(net, x):
    """Neurons that meet numbers made and listed by the code."""
    x = net.enter(x).tanh() * torch.arange(6)
    return net.leave(x + torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]))


def test_numbers_of_the_code_hold_modules_and_not_programs():
    model, example = randomized(numbered()), (torch.randn(2, 4),)
    (group,) = (g for g in graph.trace(model, example).groups if g.units == 6)
    reasons = " ".join(freeze.reason for freeze in group.frozen)
    assert "numbers that the code makes" in reasons
    assert "constant of the code" in reasons
    (group,) = graph.trace(model, example, rules=graph.PROGRAM_RULES).prunable
    assert group.name == "neurons"
    assert_sound(model, group, example)


# ---- residual streams: what shortcuts add up, and nothing else -----------------------------------


def shortcuts(blocks):
    """Make a network with shortcuts around blocks whose inner channels are summed nowhere."""

    @network(
        stem=(3, 8, 3),
        up=lambda: nn.ModuleList(nn.Conv2d(8, 12, 1) for _ in range(blocks)),
        down=lambda: nn.ModuleList(nn.Conv2d(12, 8, 1) for _ in range(blocks)),
        head=(8, 2, 1),
    )
    def made(net, x):
        x = net.stem(x)
        for up, down in zip(net.up, net.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return net.head(x)

    return made


def joined(join):
    """Make a network of two convolutions of one input, joined, and read by a third."""
    layers = {"left": (3, 6, 1), "right": (3, 6, 1), "last": (6, 4, 1)}
    return network(**layers)(lambda net, x: net.last(join(net.left(x), net.right(x))))


@network(left=(3, 6, 1), right=(3, 6, 1), one=(6, 4, 1), two=(6, 4, 1), both=(6, 4, 1))
def read_apart(net, x):
    """Channels that a product couples, read by layers whose outputs are added up."""
    a, b = net.left(x), net.right(x)
    return net.one(a) + net.two(b) + net.both(a * b)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (joined(lambda a, b: a + b), {"left.channels"}),
        (joined(lambda a, b: torch.relu(a).add(b)), {"left.channels"}),
        (joined(lambda a, b: a * torch.sigmoid(b)), set()),
        (joined(lambda a, b: a * b + b * a), set()),
        (joined(lambda a, b: torch.cat([a, b])), set()),
        (shortcuts(3), {"stem.channels"}),
        (shortcuts(0), set()),
        (read_apart, set()),
    ],
)
def test_sums_of_two_producers_are_residual(kind, names):
    assert graph.residual_groups(graph.trace(kind(), (torch.zeros(2, 3, 5, 5),))) == names
