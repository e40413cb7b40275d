"""Operators that rearrange dimensions without touching the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graph.axes import ONE, Layout
from graph.call import Call, Origin, Shape, Value, aten, rule


def aligned_blocks(old: Shape, new: Shape) -> Iterator[tuple[slice, slice]]:
    """Yield the smallest runs of dimensions of two shapes that hold the same positions."""
    i = j = 0
    while i < len(old) and j < len(new):
        start_i, start_j = i, j
        m, n = old[i], new[j]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        yield slice(start_i, i), slice(start_j, j)
    # Only dimensions of size one can be left on either side.
    yield slice(i, len(old)), slice(j, len(new))


@rule(
    *aten(
        "view reshape _unsafe_view _reshape_alias view_as reshape_as flatten unflatten "
        "ravel squeeze unsqueeze"
    ),
    reads="self other size shape sizes dim start_dim end_dim",
)
def reshaped(call: Call) -> Value:
    """Factor and merge axes block by block; a block that does not align is frozen."""
    value, new = call.values()[0], call.shapes[0]
    old = tuple(call.axes.size(layout) for layout in value.dims)
    if 0 in old:
        return call.opaque("it is reshaped while empty")[0]
    dims: list[Layout] = []
    origins: list[Origin] = []
    inferred = _inferred(call)
    for before, after in aligned_blocks(old, new):
        regrouped = call.axes.regroup(value.dims[before], new[after])
        if regrouped is None:
            reason = "a reshape cuts it where it cannot be factored"
            call.freeze(value.dims[before], reason)
            regrouped = [call.unknown(size, reason) for size in new[after]]
        places = range(*after.indices(len(new)))
        if inferred in places:
            others = zip(places, regrouped, strict=True)
            call.record_written(layout for place, layout in others if place != inferred)
        dims.extend(regrouped)
        merged = tuple(pair for origin in value.origins[before] for pair in origin)
        origins.extend(merged for _ in regrouped if value.is_weight)
    return Value(tuple(dims), tuple(origins))


def _inferred(call: Call) -> int | None:
    """Return the dimension whose size the code leaves open, as in ``x.view(n, 2, -1)``."""
    sizes = call.integers("size", "shape", "sizes")
    if -1 not in sizes:
        return None
    first = call.integer("dim") % len(call.values()[0].dims) if "sizes" in call.arguments else 0
    return first + sizes.index(-1)


@rule("aten.view.dtype", reads="self")
def reinterpreted(call: Call) -> tuple[Value, ...]:
    """Freeze: the numbers are read as numbers of another width."""
    return call.opaque("its memory is read as another type")


def _reordered(value: Value, order: Sequence[int]) -> Value:
    origins = (value.origins[dim] for dim in order if value.is_weight)
    return Value(tuple(value.dims[dim] for dim in order), tuple(origins))


@rule("aten.permute", reads="self dims")
def permuted(call: Call) -> Value:
    """Reorder the dimensions."""
    value = call.value("self")
    return _reordered(value, call.integers("dims"))


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", reads="self dim0 dim1 axis0 axis1")
def transposed(call: Call) -> Value:
    """Swap two dimensions."""
    value = call.value("self")
    order = list(range(len(value.dims)))
    if order:
        i, j = call.integers("dim0", "axis0")[0], call.integers("dim1", "axis1")[0]
        order[i], order[j] = order[j], order[i]
    return _reordered(value, order)


@rule("aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint", reads="self")
def last_two_transposed(call: Call) -> Value:
    """Swap the last two dimensions (all of them for `numpy_T`, which equals it in rank two)."""
    value = call.value("self")
    order = range(len(value.dims))
    kept = 0 if "numpy_T" in call.operator else max(len(order) - 2, 0)
    return _reordered(value, (*order[:kept], *reversed(order[kept:])))


@rule("aten.movedim", "aten.moveaxis", reads="self source destination")
def moved(call: Call) -> Value:
    """Move some dimensions to new places, keeping the order of the others."""
    value = call.value("self")
    rank = len(value.dims)
    source = [dim % rank for dim in call.integers("source")]
    target = [dim % rank for dim in call.integers("destination")]
    others = iter(dim for dim in range(rank) if dim not in source)
    placed = dict(zip(target, source, strict=True))
    order = [placed[dim] if dim in placed else next(others) for dim in range(rank)]
    return _reordered(value, order)


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to", reads="self other size")
def expanded(call: Call) -> Value:
    """Give a new axis to each dimension of size one that is repeated."""
    value = call.values()[0]
    # Copies along a new axis are no rearrangement: masking the source cannot mask one copy.
    return Value(call.broadcast([value.dims], call.shapes[0]))


@rule("aten.repeat", "aten.tile", reads="self repeats dims")
def repeated(call: Call) -> Value:
    """Put a new axis of copies outside each repeated dimension."""
    value, repeats = call.value("self"), call.integers("repeats", "dims")
    rank = len(call.shapes[0])
    dims = (ONE,) * (rank - len(value.dims)) + value.dims
    repeats = (1,) * (rank - len(repeats)) + repeats
    pairs = zip(repeats, dims, strict=True)
    return Value(tuple(call.axes.product((call.axes.fresh(n), layout)) for n, layout in pairs))


@rule("aten.repeat_interleave.self_int", reads="self dim repeats output_size")
def repeated_inside(call: Call) -> Value:
    """Put a new axis of copies inside the repeated dimension."""
    value = call.value("self")
    if call.arguments["dim"] is None:
        return call.opaque("it is flattened and repeated")[0]
    dim = call.integer("dim") % len(value.dims)
    dims = list(value.dims)
    dims[dim] = call.axes.product((dims[dim], call.axes.fresh(call.integer("repeats"))))
    return Value(tuple(dims))
