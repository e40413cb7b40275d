"""The axis algebra, against what layouts mean position by position."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.axes import ONE, Axes, Layout, Segment, concat
from graph.groups import Freeze

Position = frozenset[tuple[int, int]]
"""The (axis, coordinate) pairs that own a position."""


def positions(axes: Axes, layout: Layout) -> list[Position]:
    """Spell a layout out: who owns each of its positions."""
    return [owner for segment in axes.resolve(layout) for owner in _product(axes, segment)]


def _product(axes: Axes, segment: Segment) -> list[Position]:
    owners: list[Position] = [frozenset()]
    for axis in segment:
        bound = axes.parts(axis)
        if bound is None:
            inner = [frozenset({(axis, i)}) for i in range(axes.axis_size(axis))]
        else:
            inner = positions(axes, bound)
        owners = [outer | position for outer in owners for position in inner]
    return owners


def _ordered_factors(size: int) -> list[list[int]]:
    if size == 1:
        return [[]]
    divisors = [d for d in range(2, size + 1) if size % d == 0]
    return [[d, *rest] for d in divisors for rest in _ordered_factors(size // d)]


def factorizations(size: int) -> st.SearchStrategy[list[int]]:
    """Ordered factors of a size, with or without a one at the end."""
    choices = [[*factors, *ones] for factors in _ordered_factors(size) for ones in ([], [1])]
    return st.sampled_from([factors for factors in choices if factors])


_FEW = settings(max_examples=60, deadline=None)

SIZES = st.sampled_from([1, 2, 4, 6, 8, 12, 24, 36])


@st.composite
def layouts(draw: st.DrawFn, axes: Axes, size: int, depth: int = 2) -> Layout:
    """A layout of some size: a fresh axis, a product, or a concatenation."""
    kind = draw(st.sampled_from(["axis", "product", "concat"])) if depth else "axis"
    if kind == "product":
        factors = draw(factorizations(size))
        return axes.product([draw(layouts(axes, factor, depth - 1)) for factor in factors])
    if kind == "concat" and size > 1:
        first = draw(st.integers(1, size - 1))
        return concat(draw(layouts(axes, part, depth - 1)) for part in (first, size - first))
    return axes.fresh(size)


@_FEW
@given(st.data())
def test_views_keep_positions(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    old = [data.draw(layouts(axes, n)) for n in data.draw(factorizations(size))]
    assert len(positions(axes, axes.product(old))) == size
    new_sizes = data.draw(factorizations(size))
    new = axes.regroup(old, new_sizes)
    if new is None:
        return
    assert [axes.size(layout) for layout in new] == new_sizes
    assert positions(axes, axes.product(new)) == positions(axes, axes.product(old))


@_FEW
@given(st.data())
def test_views_of_plain_dimensions_come_back(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    old = [axes.fresh(n) for n in data.draw(factorizations(size))]
    new = axes.regroup(old, data.draw(factorizations(size)))
    if new is not None:
        back = axes.regroup(new, [axes.size(layout) for layout in old])
        assert back == [axes.resolve(layout) for layout in old]


@_FEW
@given(st.data())
def test_an_axis_can_be_viewed_in_any_one_way(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    layout = axes.fresh(size)
    sizes = data.draw(factorizations(size))
    parts = axes.regroup([layout], sizes)
    assert parts is not None
    assert axes.regroup(parts, [size]) == [axes.resolve(layout)]


@_FEW
@given(st.data())
def test_unified_layouts_are_equal_position_by_position(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    a, b = (data.draw(layouts(axes, size)) for _ in range(2))
    if axes.unify(a, b):
        assert positions(axes, a) == positions(axes, b)
        assert axes.leaves(a) == axes.leaves(b)


@_FEW
@given(st.data())
def test_unification_spreads_to_everything_that_shares_an_axis(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    shared = [data.draw(layouts(axes, size)) for _ in range(4)]
    related = [axes.unify(shared[0], other) for other in shared[1:]]
    for other, done in zip(shared[1:], related, strict=True):
        if done:
            assert positions(axes, other) == positions(axes, shared[0])


@_FEW
@given(st.data())
def test_a_cut_separates_positions(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    layout = data.draw(layouts(axes, size))
    pieces = axes.cut(layout, data.draw(st.integers(0, size)))
    if pieces is not None:
        assert positions(axes, pieces[0]) + positions(axes, pieces[1]) == positions(axes, layout)


@_FEW
@given(st.data())
def test_what_is_frozen_stays_frozen_in_all_its_parts(data: st.DataObject) -> None:
    axes = Axes()
    size = data.draw(SIZES)
    layout = axes.fresh(size)
    freeze = Freeze("it is an input", "placeholder", "")
    axes.freeze(layout, freeze)
    axes.unify(layout, data.draw(layouts(axes, size)))
    assert all(axes.freezes(axis) == (freeze,) for axis in axes.leaves(layout))


def test_equal_sizes_do_not_make_axes_equal() -> None:
    axes = Axes()
    batch, heads = axes.fresh(2), axes.fresh(2)
    parts = axes.regroup([batch, heads, axes.fresh(3)], [4, 3])
    assert parts is not None
    assert axes.leaves(batch).isdisjoint(axes.leaves(heads))
    assert axes.leaves(parts[0]) == axes.leaves(batch) | axes.leaves(heads)


@pytest.mark.parametrize(("first", "second"), [((3, 4), (4, 3)), ((4, 6), (6, 4))])
def test_a_view_across_factors_is_refused(first: tuple[int, int], second: tuple[int, int]) -> None:
    axes = Axes()
    layout = axes.fresh(math.prod(first))
    assert axes.regroup([layout], first) is not None
    assert axes.regroup([layout], second) is None


def test_a_cut_inside_an_interleaved_product_is_refused() -> None:
    axes = Axes()
    layout = axes.product((axes.fresh(4), axes.fresh(6)))
    assert axes.cut(layout, 7) is None
    assert axes.cut(layout, 12) is not None


def test_concatenated_heads_share_their_width() -> None:
    axes = Axes()
    layout = concat((axes.fresh(12), axes.fresh(6)))
    heads, width = axes.regroup([layout], [6, 3]) or (ONE, ONE)
    assert [axes.size((segment,)) for segment in heads] == [4, 2]
    assert len(axes.leaves(width)) == 1
    assert [axes.size((segment,)) for segment in axes.resolve(layout)] == [12, 6]


def test_runs_of_a_concatenation_share_what_lies_inside_them() -> None:
    axes = Axes()
    a, b = axes.fresh(6), axes.fresh(12)
    regrouped = axes.regroup((concat((a, b)),), (6, 3))
    assert regrouped is not None
    assert axes.leaves(regrouped[1]) <= axes.leaves(a) & axes.leaves(b)


def test_empty_dimensions_have_no_axis() -> None:
    axes = Axes()
    assert axes.fresh(0) == ()
    assert axes.fresh(1) == ONE
    assert axes.regroup([()], [0]) is None
