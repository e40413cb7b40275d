"""The algebra of axes: which positions of which tensor dimensions are the same thing.

A tensor dimension is described by a *layout*: a concatenation of segments, each an ordered
(row-major) product of axes.  ``((1, 2), (3,))`` is a dimension whose first ``|1| * |2|`` positions
run over axis 1 and, inside it, axis 2, and whose remaining ``|3|`` positions run over axis 3.

Axes are variables.  Two layouts that must be equal are *unified*, as types are in type inference:
an axis is merged with another one, factored into a product, or cut into a concatenation, and
every dimension that mentions it follows.  What cannot be unified exactly is reported, never
guessed: matching sizes alone never make two axes equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from networkx.utils import UnionFind

from graph.groups import Freeze

Segment: TypeAlias = tuple[int, ...]
Layout: TypeAlias = tuple[Segment, ...]

ONE: Layout = ((),)
"""The layout of a dimension of size one: it has a single position and no axis."""


def concat(layouts: Iterable[Layout]) -> Layout:
    """Return the layout of a concatenation, its parts in the given order."""
    return tuple(segment for layout in layouts for segment in layout)


class Axes:
    """Axes that can be merged, factored and cut.

    An axis is *free*, merged into another one, or *bound* to the layout that it was found to be
    (a product, a concatenation, or a mixture).
    """

    def __init__(self) -> None:
        self._merged: UnionFind[int] = UnionFind()
        self._size: list[int] = []
        self._bound: dict[int, Layout] = {}
        self._frozen: dict[int, dict[tuple[str, str], Freeze]] = {}

    # ---- reading -------------------------------------------------------------------------

    def size(self, layout: Layout) -> int:
        """Return how many positions a layout has."""
        return sum(self._length(segment) for segment in layout)

    def axis_size(self, axis: int) -> int:
        """Return how many positions an axis has."""
        return self._size[axis]

    def resolve(self, layout: Layout) -> Layout:
        """Rewrite a layout in terms of what is known by now about its axes.

        Products are written out, and so is a concatenation in the leading position of a segment,
        because ``(a + b) x c`` is ``a x c + b x c``.  A concatenation further inside stays one
        (bound) axis: ``c x (a + b)`` interleaves its parts.
        """
        return tuple(part for segment in layout for part in self._expand(segment))

    def parts(self, axis: int) -> Layout | None:
        """Return the layout that an axis is bound to, or None if it is free."""
        root = self._merged[axis]
        bound = self._bound.get(root)
        if bound is None:
            return None
        self._bound[root] = bound = self.resolve(bound)
        return bound

    def leaves(self, layout: Layout) -> frozenset[int]:
        """Return the free axes that a layout mentions, at any depth."""
        found: set[int] = set()
        for segment in self.resolve(layout):
            for axis in segment:
                bound = self.parts(axis)
                found.update((axis,) if bound is None else self.leaves(bound))
        return frozenset(found)

    def freezes(self, axis: int) -> tuple[Freeze, ...]:
        """Return why an axis must not be pruned, in the order of discovery."""
        return tuple(self._frozen.get(self._merged[axis], {}).values())

    # ---- making --------------------------------------------------------------------------

    def fresh(self, size: int) -> Layout:
        """Return a new free axis as a layout; sizes zero and one need no axis."""
        return ONE[:size] if size < 2 else ((self._new(size),),)

    def product(self, layouts: Sequence[Layout]) -> Layout:
        """Return the row-major product of layouts, the first one slowest."""
        return (tuple(axis for layout in layouts for axis in self._factors(layout)),)

    def freeze(self, layout: Layout, freeze: Freeze) -> None:
        """Forbid pruning along every axis of a layout; the first module of a reason is kept."""
        for axis in self.leaves(layout):
            self._frozen.setdefault(axis, {}).setdefault((freeze.reason, freeze.operator), freeze)

    # ---- relating ------------------------------------------------------------------------

    def unify(self, a: Layout, b: Layout) -> bool:
        """Make two layouts equal, position by position; False if they do not align.

        Some of their axes may have been related by then, so the caller should freeze both.
        """
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return True
        if self.size(a) != self.size(b):
            return False
        for one, other in ((a, b), (b, a)):
            axis = self._free_axis(one)
            if axis is not None:
                self._bind(axis, other)
                return True
        if len(a) == len(b) == 1:
            return self._unify_segments(a[0], b[0])
        return self._unify_concats(a, b)

    def regroup(self, layouts: Sequence[Layout], sizes: Sequence[int]) -> list[Layout] | None:
        """Return the layouts of dimensions of given sizes over the same row-major positions.

        Axes are factored where a boundary of the new shape falls inside them; None if that fails.
        """
        rest = self.product(layouts)[0]
        if 0 in sizes or self._length(rest) != math.prod(sizes):
            return None
        regrouped: list[Layout] = []
        for size in sizes:
            split = self._split_segment(rest, size)
            if split is None:
                return None
            head, rest = split
            regrouped.append(self.resolve((head,)))
        return regrouped

    def cut(self, layout: Layout, position: int) -> tuple[Layout, Layout] | None:
        """Cut a layout after so many positions; None if that is inside an interleaved product."""
        before: list[Segment] = []
        after = list(self.resolve(layout))
        while position > 0:
            if not after:
                return None
            segment = after.pop(0)
            length = self._length(segment)
            if length > position:
                pieces = self._cut_segment(segment, position)
                if pieces is None:
                    return None
                segment, remainder = pieces
                after.insert(0, remainder)
                length = position
            before.append(segment)
            position -= length
        return tuple(before), tuple(after)

    # ---- merging and binding -------------------------------------------------------------

    def _new(self, size: int) -> int:
        self._size.append(size)
        return len(self._size) - 1

    def _length(self, segment: Segment) -> int:
        return math.prod(self._size[axis] for axis in segment)

    def _free_axis(self, layout: Layout) -> int | None:
        """Return the axis of a resolved layout that is one free axis, else None."""
        if len(layout) == 1 and len(layout[0]) == 1 and layout[0][0] not in self._bound:
            return layout[0][0]
        return None

    def _bind(self, axis: int, layout: Layout) -> None:
        """Say what a free root axis is; what froze it freezes all that it consists of."""
        other = self._free_axis(layout)
        freezes = self._frozen.pop(axis, {})
        if other is None:
            self._bound[axis] = layout
        else:
            freezes = self._frozen.pop(other, {}) | freezes
            self._merged.union(axis, other)
        for freeze in freezes.values():
            self.freeze(layout, freeze)

    def _expand(self, segment: Segment) -> list[Segment]:
        factors: list[int] = []
        for position, axis in enumerate(segment):
            bound = self.parts(axis)
            if bound is None:
                factors.append(self._merged[axis])
            elif len(bound) == 1:
                factors.extend(bound[0])
            elif factors:
                factors.append(self._merged[axis])
            else:
                rest = segment[position + 1 :]
                return [part for lead in bound for part in self._expand(lead + rest)]
        return [tuple(factors)]

    def _factors(self, layout: Layout) -> Segment:
        """Return a layout as one segment; a concatenation becomes a bound axis."""
        layout = self.resolve(layout)
        if len(layout) == 1:
            return layout[0]
        axis = self._new(self.size(layout))
        self._bound[axis] = layout
        return (axis,)

    # ---- factoring and cutting -----------------------------------------------------------

    def _split_segment(self, segment: Segment, outer: int) -> tuple[Segment, Segment] | None:
        """Split a product into a leading part of size `outer` and the rest."""
        head: list[int] = []
        queue = list(segment)
        while outer > 1:
            if not queue:
                return None
            axis = queue.pop(0)
            size = self._size[axis]
            if outer % size == 0:
                head.append(axis)
                outer //= size
            elif size % outer == 0:
                split = self._split_axis(axis, outer)
                if split is None:
                    return None
                head.extend(split[0])
                queue[:0] = split[1]
                outer = 1
            else:
                return None
        return tuple(head), tuple(queue)

    def _split_axis(self, axis: int, outer: int) -> tuple[Segment, Segment] | None:
        """Factor one axis into a leading part of size `outer` and the rest."""
        bound = self.parts(axis)
        if bound is None:
            root = self._merged[axis]
            head, tail = self.fresh(outer)[0], self.fresh(self._size[root] // outer)[0]
            self._bind(root, (head + tail,))
            return head, tail
        if len(bound) == 1:
            return self._split_segment(bound[0], outer)
        inner = self._size[axis] // outer
        return self._split_concat(bound, inner) or self._split_repeats(bound, outer, inner)

    def _split_concat(self, layout: Layout, inner: int) -> tuple[Segment, Segment] | None:
        """Factor a concatenation as (concatenation of heads) x (one common tail)."""
        heads: list[Segment] = []
        tail: Segment | None = None
        for segment in layout:
            length = self._length(segment)
            split = self._split_segment(segment, length // inner) if length % inner == 0 else None
            if split is None:
                return None
            heads.append(split[0])
            if tail is not None and not self.unify((tail,), (split[1],)):
                return None
            tail = split[1]
        return None if tail is None else (self._factors(tuple(heads)), tail)

    def _split_repeats(
        self, layout: Layout, outer: int, inner: int
    ) -> tuple[Segment, Segment] | None:
        """Factor a concatenation of `outer` runs as so many copies of one run."""
        if len(layout) < outer:
            return None
        runs: list[Layout] = []
        rest = layout
        for _ in range(outer):
            pieces = self.cut(rest, inner)
            if pieces is None or (runs and not self.unify(runs[0], pieces[0])):
                return None
            runs.append(pieces[0])
            rest = pieces[1]
        return self._factors(ONE * outer), self._factors(runs[0])

    def _cut_segment(self, segment: Segment, position: int) -> tuple[Segment, Segment] | None:
        """Cut a resolved product in two; only its leading axis can be cut."""
        lead, rest = segment[0], segment[1:]
        count, remainder = divmod(position, self._length(rest))
        if remainder or lead in self._bound:
            return None
        before, after = self.fresh(count)[0], self.fresh(self._size[lead] - count)[0]
        self._bind(lead, (before, after))
        return before + rest, after + rest

    # ---- unification ---------------------------------------------------------------------

    def _unify_segments(self, a: Segment, b: Segment) -> bool:
        left, right = list(a), list(b)
        while left and right:
            i, j = left.pop(0), right.pop(0)
            m, n = self._size[i], self._size[j]
            if m == n:
                if not self._unify_axes(i, j):
                    return False
                continue
            wide, narrow, queue = (i, n, left) if m > n else (j, m, right)
            split = self._split_axis(wide, narrow) if max(m, n) % narrow == 0 else None
            if split is None:
                return False
            (right if queue is left else left).insert(0, j if queue is left else i)
            queue[:0] = split[0] + split[1]
        return not left and not right

    def _unify_axes(self, i: int, j: int) -> bool:
        bound_i, bound_j = self.parts(i), self.parts(j)
        i, j = self._merged[i], self._merged[j]
        if i == j:
            return True
        if bound_i is None:
            self._bind(i, ((j,),) if bound_j is None else bound_j)
            return True
        if bound_j is None:
            self._bind(j, bound_i)
            return True
        return self.unify(bound_i, bound_j)

    def _unify_concats(self, a: Layout, b: Layout) -> bool:
        left, right = list(a), list(b)
        while left and right:
            # Earlier steps may have cut what is still queued.
            left[:1], right[:1] = self._expand(left[0]), self._expand(right[0])
            x, y = left.pop(0), right.pop(0)
            m, n = self._length(x), self._length(y)
            if m == n:
                if not self.unify((x,), (y,)):
                    return False
                continue
            long, short, queue = (x, n, left) if m > n else (y, m, right)
            pieces = self._cut_segment(long, short)
            if pieces is None:
                return False
            (right if queue is left else left).insert(0, y if queue is left else x)
            queue[:0] = pieces
        return not left and not right
