"""Times of operators add up to that of a pass, and are shown: on devices that are pretended."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import graph
from benchmarks import times as benchmark
from osscar.allocation import speedup, times
from osscar.allocation.costs import CountedCost, Table
from osscar.allocation.times import tabled
from osscar.run.times_page import GroupTimes, _by_group
from tests.graph.topologies import network
from tests.osscar.families import tokens
from tests.osscar.pretended_clock import PretendedClock, seconds_alone


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


# ---- `osscar inspect --times` ------------------------------------------------------------


GRID = np.array([1, 8, 9, 16])
STAIRS = np.array([1.0, 1.0, 2.0, 2.0])


def grouped(terms):
    names = dict.fromkeys(name for one in terms for name in one.names)
    cost = CountedCost(0.5, tuple(terms), dict.fromkeys(names, 16))
    shared = [SimpleNamespace(name=name, kind="neurons") for name in names]
    return list(_by_group(SimpleNamespace(streams=[], shared=shared), cost))


def test_groups_of_equal_blocks_are_one():
    """They are equal if they take the same; numbers that differ become a star."""
    names = [f"layers.{i}.blocks.8.mlp" for i in (0, 1, 3)]
    other, last = "layers.2.blocks.8.mlp", "layers.0.blocks.8.heads"
    terms = [Table((name,), (GRID,), STAIRS) for name in (*names, last)]
    terms.append(Table((other,), (GRID,), 2 * STAIRS))
    found = {one.name: one for one in grouped(terms)}
    assert [*found] == ["layers.*.blocks.8.mlp", last, other]
    assert sorted(found["layers.*.blocks.8.mlp"].groups) == sorted(names)
    assert found[other].seconds == (2, 2, 4, 4)


def test_stairs_are_where_time_rises_most():
    def stairs(*seconds):
        return GroupTimes("a", ("a",), "neurons", (1, 8, 9, 16, 17, 24), seconds).stairs

    assert stairs(1, 1, 2, 2, 6, 6) == [16, 8]
    assert stairs(1, 8, 9, 16, 17, 24) == []  # a straight line
    assert stairs(1, 1, 1.1, 1.1, 6, 6) == [16]  # too low
    assert stairs(1, 1, 1, 1, 1, 1) == []
    one = GroupTimes("a", ("a",), "neurons", (1, 9, 16), (1.0, 9.0, 9.0))
    assert (one.at(0.25), one.at(0.75), one.at(0.01)) == ((4, 4.0), (12, 9.0), (1, 1.0))


# ---- the benchmark -----------------------------------------------------------------------


def test_what_the_table_does_not_see_is_the_error(monkeypatch):
    """Layers take their weights, in the table and whole; whole smaller models a quarter more."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3))

    def of_model(one):
        weights = sum(layer.weight.numel() for layer in one.modules() if hasattr(layer, "weight"))
        return 1e-9 * weights * (1.25 if weights < 27 * 40 else 1.0)

    def clock_of(task):
        prepared = task.prepared
        return PretendedClock(prepared.model, prepared.traced, of_model, seconds_alone)

    monkeypatch.setattr(benchmark, "clock_of", clock_of)
    monkeypatch.setattr(speedup, "clock_of", clock_of)
    found = list(benchmark.compared(model, tokens(64, 24).float()))
    assert [one.share for one in found] == [*benchmark.SHARES]
    for one in found:
        assert one.predicted == pytest.approx(1 / one.share, rel=0.05)
        assert one.measured / one.predicted == pytest.approx(0.8, abs=0.01)
    name, *cells, error = benchmark.row("a model", found)
    assert (name, len(cells)) == ("a model", 5)
    assert cells[0] == f"{found[0].predicted:.2f}x, {found[0].measured:.2f}x"
    assert float(error.rstrip("%")) == pytest.approx(20, abs=1)
