"""`osscar inspect --times`: what groups take, by the table of times that speed-ups use."""

from types import SimpleNamespace

import numpy as np

from osscar.allocation.costs import CountedCost
from osscar.allocation.times import Table
from osscar.run.times_page import GroupTimes, _by_group

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
