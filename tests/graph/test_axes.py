"""The axis algebra, against what layouts mean position by position."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.axes import ONE, Axes, concat
from graph.groups import Freeze


def positions(axes, layout):
    """Spell a layout out: the (axis, coordinate) pairs that own each of its positions."""
    return [owner for segment in axes.resolve(layout) for owner in _product(axes, segment)]


def _product(axes, segment):
    owners = [frozenset()]
    for axis in segment:
        bound = axes.parts(axis)
        if bound is None:
            inner = [frozenset({(axis, i)}) for i in range(axes.axis_size(axis))]
        else:
            inner = positions(axes, bound)
        owners = [outer | position for outer in owners for position in inner]
    return owners


def _ordered_factors(size):
    divisors = [d for d in range(2, size + 1) if size % d == 0]
    return [[d, *rest] for d in divisors for rest in _ordered_factors(size // d)] or [[]]


def factorizations(size):
    """Ordered factors of a size, with or without a one at the end."""
    choices = [[*factors, *ones] for factors in _ordered_factors(size) for ones in ([], [1])]
    return st.sampled_from([factors for factors in choices if factors])


@st.composite
def layouts(draw, axes, size, depth=2):
    """A layout of some size: a fresh axis, a product, or a concatenation."""
    kind = draw(st.sampled_from(["axis", "product", "concat"])) if depth else "axis"
    if kind == "product":
        factors = draw(factorizations(size))
        return axes.product([draw(layouts(axes, factor, depth - 1)) for factor in factors])
    if kind == "concat" and size > 1:
        first = draw(st.integers(1, size - 1))
        return concat(draw(layouts(axes, part, depth - 1)) for part in (first, size - first))
    return axes.fresh(size)


def of_some_size(test):
    """Run a test on axes and a size, with draws of its own."""

    @settings(max_examples=60, deadline=None)
    @given(st.data(), st.sampled_from([1, 2, 4, 6, 8, 12, 24, 36]))
    def run(data, size):
        test(data.draw, Axes(), size)

    run.__name__ = test.__name__
    return run


@of_some_size
def test_views_keep_positions(draw, axes, size):
    old = [draw(layouts(axes, n)) for n in draw(factorizations(size))]
    assert len(positions(axes, axes.product(old))) == size
    new_sizes = draw(factorizations(size))
    new = axes.regroup(old, new_sizes)
    if new is not None:
        assert [axes.size(layout) for layout in new] == new_sizes
        assert positions(axes, axes.product(new)) == positions(axes, axes.product(old))


@of_some_size
def test_views_of_plain_dimensions_come_back(draw, axes, size):
    old = [axes.fresh(n) for n in draw(factorizations(size))]
    new = axes.regroup(old, draw(factorizations(size)))
    assert new is not None or len(old) > 1
    if new is not None:
        back = axes.regroup(new, [axes.size(layout) for layout in old])
        assert back == [axes.resolve(layout) for layout in old]


@of_some_size
def test_unification_spreads_to_everything_that_shares_an_axis(draw, axes, size):
    first, *others = (draw(layouts(axes, size)) for _ in range(4))
    related = [axes.unify(first, other) for other in others]
    for other, done in zip(others, related, strict=True):
        if done:
            assert positions(axes, other) == positions(axes, first)


@of_some_size
def test_a_cut_separates_positions(draw, axes, size):
    layout = draw(layouts(axes, size))
    pieces = axes.cut(layout, draw(st.integers(0, size)))
    if pieces is not None:
        assert positions(axes, pieces[0]) + positions(axes, pieces[1]) == positions(axes, layout)


@of_some_size
def test_what_is_frozen_stays_frozen_in_all_its_parts(draw, axes, size):
    layout, freeze = axes.fresh(size), Freeze("it is an input", "placeholder", "")
    axes.freeze(layout, freeze)
    other = draw(layouts(axes, size))
    axes.unify(*((layout, other) if draw(st.booleans()) else (other, layout)))
    assert all(axes.freezes(axis) == (freeze,) for axis in axes.leaves(layout))


@pytest.mark.parametrize(("first", "second"), [((3, 4), (4, 3)), ((4, 6), (6, 4))])
def test_a_view_across_factors_is_refused(first, second):
    axes = Axes()
    layout = axes.fresh(math.prod(first))
    assert axes.regroup([layout], first) is not None
    assert axes.regroup([layout], second) is None


def test_a_cut_inside_an_interleaved_product_is_refused():
    axes = Axes()
    layout = axes.product((axes.fresh(4), axes.fresh(6)))
    assert axes.cut(layout, 7) is None
    assert axes.cut(layout, 12) is not None


def test_empty_dimensions_have_no_axis():
    axes = Axes()
    assert (axes.fresh(0), axes.fresh(1)) == ((), ONE)
    assert axes.regroup([()], [0]) is None
