"""What only code for training reads: auxiliary heads follow the units that they read."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graph
import graph.tracing.export as graph_export
from graph import Role


class Auxiliary(nn.Module):
    """A network that has a second output in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 10, 3, padding=1)
        self.head = nn.Linear(10, 4)
        self.scale = nn.BatchNorm2d(6)
        self.side = nn.Linear(6, 4)
        self.more = nn.Conv2d(5, 10, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        units = self.stem(x).relu()
        output = self.head(self.body(units).relu().mean((2, 3)))
        return (output, self.aside(units)) if self.training else output

    def aside(self, units: Tensor) -> Tensor:
        units = nn.functional.dropout(self.scale(units), 0.5, self.training)
        return self.side(units.mean((2, 3)))  # type: ignore[no-any-return]


class Stuck(Auxiliary):
    """Its second output mixes what it reads in a way that no unit can leave."""

    def aside(self, units: Tensor) -> Tensor:
        return self.side(units.mean((2, 3)).cumsum(1))  # type: ignore[no-any-return]


class Shared(Auxiliary):
    """Its second output reads the units of two groups by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        units = self.stem(x).relu()
        deep = self.body(units).relu()
        output = self.head(deep.mean((2, 3)))
        return (output, self.aside(units) + self.aside(deep)) if self.training else output


class Regrouped(Auxiliary):
    """Its second output counts the same channels in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(3, 4)

    def aside(self, units: Tensor) -> Tensor:
        return self.side(units.mean((2, 3)).reshape(-1, 2, 3).mean(1))  # type: ignore[no-any-return]


class Drawn(Auxiliary):
    """Its code for training cannot be traced."""

    def aside(self, units: Tensor) -> Tensor:
        if float(units.sum()) > random.random():
            return units
        return super().aside(units)


class Never(Auxiliary):
    """It does not look whether it is in training."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))


class Paired(Auxiliary):
    """Its second output reads pairs of units."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(3, 4)

    def aside(self, units: Tensor) -> Tensor:
        one, other = units.mean((2, 3)).chunk(2, 1)
        return self.side(one * other)  # type: ignore[no-any-return]


class Joint(nn.Module):
    """Two groups whose units its second output adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 6), nn.Linear(5, 6)
        self.read, self.read_too, self.side = (nn.Linear(6, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        one, other = self.one(x).relu(), self.other(x).tanh()
        output = self.read(one) + self.read_too(other)
        return (output, self.side(one + other)) if self.training else output


class Asking(nn.Module):
    """Whether it is in training is asked in one of many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        units = self.up(x).relu()
        return (self.down(units), *([self.side(units)] if self.asked() else []))

    def asked(self) -> bool:
        return False


class ByProperty(Asking):
    """In a property."""

    @property
    def busy(self) -> bool:
        return self.training

    def asked(self) -> bool:
        return self.busy


class ByName(Asking):
    """By its name."""

    def asked(self) -> bool:
        return bool(getattr(self, "training"))  # noqa: B009


class Inside(Asking):
    """In a function inside a function."""

    def asked(self) -> bool:
        return (lambda: self.training)()


class Wrapped(Asking):
    """In a function that another one wraps."""

    @functools.wraps(lambda self: self.training)
    def asked(self) -> bool:  # type: ignore[override]
        return Wrapped.asked.__wrapped__(self)  # type: ignore[no-any-return]


IMAGES = (torch.zeros(2, 3, 8, 8),)


def traced(model: nn.Module) -> tuple[graph.DependencyGraph, dict[str, graph.CouplingGroup]]:
    found = graph.trace(model.eval(), IMAGES)
    return found, {group.name: group for group in found.prunable}


def test_what_training_reads_belongs_to_the_units() -> None:
    found, groups = traced(Auxiliary())
    roles = {(slot.tensor, slot.dim): slot.role for slot in groups["stem.channels"].slots}
    assert roles["body.weight", 1] is Role.CONSUMER
    assert roles["side.weight", 1] is Role.ASIDE
    assert roles["scale.weight", 0] is roles["scale.running_var", 0] is Role.PASS_THROUGH
    assert [slot.tensor for slot in groups["stem.channels"].consumers] == ["body.weight"]
    # 28 of the stem, 90 of the body, 2 of the norm, 4 of the auxiliary head.
    assert groups["stem.channels"].removable == 28 + 90 + 2 + 4
    assert found.unread == ("more.bias", "more.weight")
    assert "side.weight [1] x1, in training" in graph.draw.render(found.groups)


def test_a_model_in_training_stays_so_and_is_traced_alike() -> None:
    model = Auxiliary().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = graph.trace(model, IMAGES)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert found.groups == traced(model)[0].groups


@pytest.mark.parametrize("kind", [Stuck, Shared, Regrouped, Paired, Drawn, Never])
def test_what_cannot_be_known_to_follow_is_named(kind: type[Auxiliary]) -> None:
    found, groups = traced(kind())
    assert all(slot.role is not Role.ASIDE for group in groups.values() for slot in group.slots)
    assert {"side.weight", "more.weight"} <= set(found.unread)
    known = kind not in (Drawn, Never)  # that code for training reads it
    assert ("side.weight" in found.stuck) == known
    assert "more.weight" not in found.stuck


class Dropping(Auxiliary):
    """It leaves its second output away by chance, and its code for training is decorated."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        units = self.stem(x).relu()
        output = self.head(self.body(units).relu().mean((2, 3)))
        if self.training and random.random() + np.random.rand() > 0.5:
            return output, self.aside(units)
        return output


def test_what_code_for_training_draws_changes_nothing() -> None:
    model, found = Dropping(), []
    for seed in range(4):
        random.seed(seed)
        np.random.seed(seed)
        found.append(traced(model)[0].groups)
        draws = random.random(), np.random.rand()
        random.seed(seed)
        np.random.seed(seed)
        assert draws == (random.random(), np.random.rand())
    assert found[0] == found[1] == found[2] == found[3]
    assert any(slot.role is Role.ASIDE for group in found[0] for slot in group.slots)


def test_counters_that_nothing_reads_are_no_reason_to_trace_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[bool] = []
    export = graph_export.run_export

    def counted(*args: Any, training: bool = False) -> Any:
        modes.append(training)
        return export(*args, training=training)

    monkeypatch.setattr(graph_export, "run_export", counted)
    model = Auxiliary()
    traced(model)
    assert modes == [False, True]
    del modes[:], model.side, model.more, model.scale
    model.body = nn.Sequential(model.body, nn.BatchNorm2d(10))  # type: ignore[assignment]
    assert "body.1.num_batches_tracked" in model.state_dict()
    assert traced(model)[0].unread == ()
    assert modes == [False]


def test_no_operator_uses_what_training_alone_reads() -> None:
    network = traced(Auxiliary())[0].networkx()
    (aside,) = (name for name in network if name.startswith("side.weight[1]"))
    assert list(network.predecessors(aside)) == ["stem.channels"]
    assert list(network.successors(aside)) == []


def test_what_reads_units_of_two_groups_at_once_follows_neither() -> None:
    found = graph.trace(Joint().eval(), (torch.zeros(2, 5),))
    assert {"one.neurons", "other.neurons"} <= {group.name for group in found.prunable}
    assert all(slot.tensor != "side.weight" for group in found.groups for slot in group.slots)
    assert found.unread == ("side.weight",)


@pytest.mark.parametrize("kind", [ByProperty, ByName, Inside, Wrapped])
def test_code_may_ask_in_many_ways_whether_it_is_in_training(kind: type[Asking]) -> None:
    found = graph.trace(kind().eval(), (torch.zeros(2, 5),))
    (group,) = found.prunable
    assert Role.ASIDE in {slot.role for slot in group.slots if slot.tensor == "side.weight"}
