"""Times of operators add up to that of a pass, at any widths: on devices that are pretended."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

import graph
from osscar.allocation import times
from osscar.allocation.times import Table, tabled
from tests.graph.topologies import network
from tests.osscar.pretended_clock import PretendedClock


class Device:
    """Takes seconds for each operator by its shapes, and for a pass all of them."""

    overhead = 5e-4
    warm = 1.0
    """Of its seconds, what an operator takes that ran just before."""

    def __init__(self, model, inputs, step=8):
        self.traced = graph.trace(model, inputs)
        self.units = {group.name: group.units for group in self.traced.groups}
        self.step, self.calls = step, []

    def __call__(self, operator, size):
        warm = self.warm if self.calls[-1:] == [operator] else 1.0
        self.calls.append(operator)
        return warm * self.seconds(operator, size)

    def seconds(self, operator, size):
        """Multiplications take time in steps, all else next to none."""
        given = operator.arguments_at(size, lambda shape, dtype: shape)
        if "weight" not in given or len(given["weight"]) < 2:
            return 1e-12
        rows, columns = (-(-n // self.step) * self.step for n in given["weight"][:2])
        return 1e-6 * rows * columns

    def whole(self, kept):
        widths = {**self.units, **kept}
        return self.overhead + sum(
            self.seconds(one, lambda size: size.at(widths))
            for one in self.traced.operators
            if one.outputs and one.arguments
        )

    def table(self, ranges):
        clock = PretendedClock(None, self.traced, lambda model: self.whole({}), self)
        return tabled(clock, ranges)


def chain(*widths):
    layers = [
        nn.Conv2d(a, b, 3, padding=1) if i % 2 == 0 else nn.ReLU()
        for (a, b) in itertools.pairwise(widths)
        for i in range(2)
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 5))


@network(stem=(3, 8, 1), inner=(8, 12, 1), outer=(12, 16, 1), last=(16, 6, 1))
def added(net, x):
    """A stream that is padded before it is added to: channels of three groups in one dimension."""
    x = net.stem(x)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 4, 4))
    x = padded + net.outer(torch.relu(net.inner(x)))
    return net.last(torch.relu(x)).mean((2, 3))


IMAGES = (torch.randn(2, 3, 4, 4),)


def test_a_table_has_all_stairs_of_small_layers():
    device = Device(chain(3, 32, 24), IMAGES)
    first, second = (group.name for group in device.traced.groups if group.prunable)
    cost = device.table({first: (1, 32), second: (1, 24)})
    assert cost.coupled == {frozenset({first, second})}
    points = [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32]
    for a, b in itertools.product(points, points[:9]):
        kept = {first: a, second: b}
        assert cost.of(kept) == pytest.approx(device.whole(kept))
        over = cost.over(first, np.array(points), kept)
        true = [device.whole({**kept, first: n}) for n in points]
        np.testing.assert_allclose(over - over[0], np.array(true) - true[0], atol=1e-12)


def test_a_width_that_groups_add_up_to_is_a_straight_line():
    device = Device(added(), IMAGES, step=1)
    ranges = {g.name: (1, g.units) for g in device.traced.groups if g.prunable}
    cost, rng = device.table(ranges), random.Random(1)
    assert len(ranges) > 3
    assert max(map(len, cost.coupled)) == 2
    for _ in range(20):
        kept = {name: rng.randint(*ends) for name, ends in ranges.items()}
        assert cost.of(kept) == pytest.approx(device.whole(kept))


@pytest.mark.parametrize("blocks", [1, 6])
def test_equal_shapes_are_timed_once(blocks):
    """However many blocks there are."""
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 12)) for _ in range(blocks))
    )
    device = Device(model, (torch.randn(2, 12),))
    inner = [g.name for g in device.traced.groups if g.prunable and g.units == 40]
    cost = device.table(dict.fromkeys(inner, (1, 40)))
    assert len(inner) == len(cost.terms) == blocks
    grid = cost.terms[0].grids[0]
    rounds = times._ROUNDS + times._MOST_ROUNDS
    assert len(device.calls) <= 3 * len(grid) * rounds
    assert cost.of(dict.fromkeys(inner, 8)) == pytest.approx(device.whole(dict.fromkeys(inner, 8)))


def test_an_operator_is_timed_after_others_as_in_a_pass():
    device = Device(chain(3, 32, 24, 16, 40, 24, 32), IMAGES)
    device.warm = 0.5
    ranges = {g.name: (1, g.units) for g in device.traced.groups if g.prunable}
    cost = device.table(ranges)
    half = {name: most // 2 for name, (_, most) in ranges.items()}
    assert cost.of(half) == pytest.approx(device.whole(half), rel=0.1)


def test_between_widths_times_lie_on_straight_lines():
    grids = np.array([2, 4, 10]), np.array([1, 3])
    table = Table(("a", "b"), grids, np.array([[0.0, 2.0], [4.0, 6.0], [7.0, 21.0]]))
    assert table.at({"a": 4, "b": 3}) == 6
    assert table.at({"a": 3, "b": 2}) == 3
    np.testing.assert_allclose(table.at({"a": np.array([1, 2, 7, 12]), "b": 3}), [2, 2, 13.5, 21])
    np.testing.assert_allclose(table.at({"a": 10, "b": np.array([1, 2, 3])}), [7, 14, 21])
