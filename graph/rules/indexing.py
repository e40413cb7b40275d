"""Operators that take parts of tensors, put parts together, and write to parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from graph.axes import ONE, Layout, concat
from graph.call import Call, Origin, Value, aten, rule
from graph.groups import Role

_PICKED = "positions along it are picked by number"
_WRITTEN = "positions along it are written to by number"


def _with_dim(value: Value, dim: int, layout: Layout) -> Value:
    dims = list(value.dims)
    dims[dim] = layout
    return replace(value, dims=tuple(dims))


def _cut(call: Call, layout: Layout, sizes: Iterable[int]) -> list[Layout]:
    """Cut a layout into consecutive parts, or freeze it if it cannot be cut there."""
    parts: list[Layout] = []
    rest, sizes = layout, list(sizes)
    for size in sizes:
        pieces = call.axes.cut(rest, size)
        if pieces is None:
            reason = "it is cut where it cannot be separated"
            call.freeze((layout,), reason)
            return [call.unknown(size, reason) for size in sizes]
        part, rest = pieces
        parts.append(part)
    return parts


@rule("aten.slice", "aten.narrow", reads="self dim start end length step")
def sliced(call: Call) -> Value:
    """Keep a consecutive part of a dimension, or every n-th position of it."""
    value, dim = call.along()
    layout, kept = value.dims[dim], call.shapes[0][dim]
    size = call.axes.size(layout)
    start = call.integers("start")[0] if call.arguments.get("start") is not None else 0
    start = min(start + size if start < 0 else start, size)
    step = call.integers("step")[0] if call.arguments.get("step") else 1
    if step == 1:
        return _with_dim(value, dim, _cut(call, layout, (start, kept, size - start - kept))[1])
    groups = call.axes.regroup((layout,), (size // step, step)) if size % step == 0 else None
    if groups is None or kept != size // step:
        call.freeze((layout,), _PICKED)
        return _with_dim(value, dim, call.unknown(kept, _PICKED))
    call.freeze((groups[1],), _PICKED)
    return _with_dim(value, dim, groups[0])


@rule("aten.select", reads="self dim index")
def selected(call: Call) -> Value:
    """Take one position along a dimension, which is frozen: its number is in the code."""
    value, dim = call.along()
    call.freeze((value.dims[dim],), _PICKED)
    return Value(
        value.dims[:dim] + value.dims[dim + 1 :], value.origins[:dim] + value.origins[dim + 1 :]
    )


@rule("aten.unbind", reads="self dim")
def unbound(call: Call) -> list[Value]:
    """Take every position along a dimension apart."""
    return [selected(call)] * len(call.shapes)


@rule(
    *aten(
        "split chunk split_with_sizes tensor_split unsafe_split unsafe_chunk "
        "unsafe_split_with_sizes"
    ),
    reads="self dim chunks sections indices split_size split_sizes",
)
def split(call: Call) -> list[Value]:
    """Cut a dimension into parts; parts that the code makes equal stay equal.

    Where only their size or their number is given and the last ones are smaller, the places of the
    cuts follow from the whole, so that no part can change alone.
    """
    value, dim = call.along()
    sizes = [shape[dim] for shape in call.shapes]
    parts = _cut(call, value.dims[dim], sizes)
    if call.operator.endswith(("sizes.default", ".sizes", ".indices")):
        return [_with_dim(value, dim, part) for part in parts]
    if len(set(sizes)) > 1:
        call.freeze(parts, "it is cut into parts of one size and a smaller rest")
    else:
        for part in parts[1:]:
            call.unify(parts[0], part)
    return [_with_dim(value, dim, part) for part in parts]


def _shared_origins(values: Sequence[Value]) -> tuple[Origin, ...]:
    """Return the origins of a combination, provided that each of its parts is a weight."""
    if not all(value.is_weight for value in values):
        return ()
    by_dim = zip(*(value.origins for value in values), strict=True)
    return tuple(tuple(dict.fromkeys(pair for o in origins for pair in o)) for origins in by_dim)


@rule("aten.cat", "aten.concat", "aten.concatenate", reads="tensors dim")
def concatenated(call: Call) -> Value:
    """Append the segments of one dimension, unify the others."""
    rank = len(call.shapes[0])
    # An empty one-dimensional tensor is allowed anywhere, and adds nothing.
    values = [value for value in call.values() if len(value.dims) == rank]
    dim = call.integer("dim") % rank
    shape = list(call.shapes[0])
    shape[dim] = 1
    operands = [(*value.dims[:dim], ONE, *value.dims[dim + 1 :]) for value in values]
    dims = list(call.broadcast(operands, tuple(shape)))
    dims[dim] = concat(value.dims[dim] for value in values)
    return Value(tuple(dims), _shared_origins(values))


@rule("aten.stack", reads="tensors dim")
def stacked(call: Call) -> Value:
    """Put tensors side by side along a new dimension, whose positions are told apart by code."""
    values = call.values()
    shape = call.shapes[0]
    dim = call.integer("dim") % len(shape)
    inner = shape[:dim] + shape[dim + 1 :]
    dims = list(call.broadcast([value.dims for value in values], inner))
    dims.insert(dim, concat([ONE] * len(values)))
    origins = _shared_origins(values)
    return Value(tuple(dims), origins and (*origins[:dim], (), *origins[dim:]))


@rule("aten.constant_pad_nd", "aten.pad", reads="self pad mode value")
def padded(call: Call) -> Value:
    """Surround a dimension with constants, which are segments of their own."""
    value, pad = call.value("self"), call.integers("pad")
    constant = call.arguments.get("mode", "constant") == "constant"
    dims = list(value.dims)
    for pair in range(len(pad) // 2):
        before, after = pad[2 * pair], pad[2 * pair + 1]
        if before == after == 0:
            continue
        dim = len(dims) - 1 - pair
        dims[dim] = _pad(call, dims[dim], before, after, constant)
    return Value(tuple(dims))


def _pad(call: Call, layout: Layout, before: int, after: int, constant: bool) -> Layout:
    size = call.axes.size(layout)
    if not constant:
        reason = "it is padded with copies of its own positions"
        call.freeze((layout,), reason)
        return call.unknown(size + before + after, reason)
    crop = (max(-before, 0), size - max(-before, 0) - max(-after, 0), max(-after, 0))
    kept = _cut(call, layout, crop)[1] if crop[0] or crop[2] else layout
    return concat((call.axes.fresh(max(before, 0)), kept, call.axes.fresh(max(after, 0))))


@rule("aten.roll", "aten.flip", reads="self shifts dims")
def shuffled(call: Call) -> Value:
    """Freeze the dimensions whose positions change places."""
    value = call.value("self")
    dims = [dim % len(value.dims) for dim in call.integers("dims")] or range(len(value.dims))
    reason = "its positions change places"
    call.freeze((value.dims[dim] for dim in dims), reason)
    moved = {dim: call.unknown(call.shapes[0][dim], reason) for dim in dims}
    return Value(tuple(moved.get(dim, layout) for dim, layout in enumerate(value.dims)))


@rule("aten.index_select", reads="self dim index")
def index_selected(call: Call) -> Value:
    """Look positions of one dimension up by index."""
    value, dim = call.along()
    index = call.value("index")
    call.freeze((value.dims[dim],), _PICKED)
    call.record(index, Role.PASS_THROUGH)
    # An entry of the index that leaves takes along the position that it looked up.
    return _with_dim(Value(value.dims), dim, index.dims[0] if index.dims else ONE)


@rule("aten.index", reads="self indices")
def indexed(call: Call) -> Value:
    """Look positions up by index tensors; the dimensions without one pass through."""
    value = call.value("self")
    indices = cast(Sequence[Value | None], call.arguments["indices"])
    run = _constant_run(call, value, indices)
    if run is not None:
        return run
    places = [dim for dim, index in enumerate(indices) if index is not None]
    looked_up = {dim: value.dims[dim] for dim in places}
    call.freeze(looked_up.values(), _PICKED)
    kept = [layout for dim, layout in enumerate(value.dims) if dim not in looked_up]
    present = [index for index in indices if index is not None]
    rank = max(len(index.dims) for index in present)
    if rank + len(kept) != len(call.shapes[0]):
        return call.opaque("it is indexed by a mask")[0]
    consecutive = places == list(range(places[0], places[-1] + 1))
    first = places[0] if consecutive else 0
    # An entry of the indices that leaves takes along the position that it looked up.
    shape = call.shapes[0][first : first + rank]
    new = call.broadcast([index.dims for index in present], shape)
    for index in present:
        call.record(index, Role.PASS_THROUGH)
    for dim in range(len(value.dims)):
        if dim not in looked_up:
            call.record(value, Role.PRODUCER, dim)
    return Value((*kept[:first], *new, *kept[first:]))


@rule("aten.gather", reads="self dim index sparse_grad")
def gathered(call: Call) -> Value:
    """Look positions of one dimension up, each by an index of its own.

    In every other dimension position i of the index reads position i of the tensor, so that both
    are the same where they are equally long.  A shorter index leaves the last positions out.
    """
    value, index = call.value("self"), call.value("index")
    if not value.dims or len(value.dims) != len(index.dims):
        return call.opaque("a single number is looked up")[0]
    looked_up = call.integer("dim") % len(value.dims)
    call.freeze((value.dims[looked_up],), _PICKED)
    call.record(index, Role.PASS_THROUGH)
    dims: list[Layout] = []
    for dim, (layout, picking) in enumerate(zip(value.dims, index.dims, strict=True)):
        if dim == looked_up:
            # An entry of the index that leaves takes along the position that it looked up.
            dims.append(picking)
            continue
        call.record(value, Role.PRODUCER, dim)
        if call.axes.size(layout) == call.axes.size(picking):
            dims.append(call.unify(layout, picking))
        else:
            call.freeze((layout, picking), "an index that is shorter than it is looks it up")
            dims.append(picking)
    return Value(tuple(dims))


def _constant_run(call: Call, value: Value, indices: Sequence[Value | None]) -> Value | None:
    """Treat the one index ``[2, 3, 4]``, written in the code, as the slice that it is."""
    present = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(present) != 1 or not present[0][1].constant:
        return None
    dim, index = present[0]
    size, kept = call.axes.size(value.dims[dim]), len(index.constant)
    start = index.constant[0] % size
    if [i % size for i in index.constant] != list(range(start, start + kept)):
        return None
    parts = _cut(call, value.dims[dim], (start, kept, size - start - kept))
    return _with_dim(value, dim, parts[1])


@rule("aten.embedding", reads="weight indices padding_idx scale_grad_by_freq sparse")
def embedded(call: Call) -> Value:
    """Look rows of a table up: its rows are frozen, its columns are produced."""
    weight, indices = call.value("weight"), call.value("indices")
    call.freeze(weight.dims[:1], "its positions are the entries of a look-up table")
    call.record(weight, Role.PRODUCER, 1)
    return Value((*indices.dims, *weight.dims[1:]))


@rule("aten.unfold", reads="self dimension size step")
def windowed(call: Call) -> Value:
    """Cut a dimension into windows, whose positions become a last dimension."""
    reason = "windows slide over it"
    value, dim = call.along("dimension")
    call.freeze((value.dims[dim],), reason)
    dims = list(value.dims)
    dims[dim] = call.unknown(call.shapes[0][dim], reason)
    return Value((*dims, call.unknown(call.shapes[0][-1], reason)))


# ---- writing ------------------------------------------------------------------------------


@rule(
    *aten("index_add index_copy index_reduce index_fill"),
    reads="self dim index source value alpha reduce include_self",
)
def written_by_index(call: Call) -> Value:
    """Write to positions of one dimension; in the others, position i goes to position i."""
    value, source = call.value("self"), call.optional("source")
    if not value.dims:
        return call.opaque("a single number is written to")[0]
    dim = call.integer("dim") % len(value.dims)
    call.freeze((value.dims[dim], *call.value("index").dims), _WRITTEN)
    dims = list(value.dims)
    if source is not None and len(source.dims) == len(dims):
        call.record(source, Role.PASS_THROUGH)
        call.freeze((source.dims[dim],), _WRITTEN)
        for other in set(range(len(dims))) - {dim}:
            dims[other] = call.unify(dims[other], source.dims[other])
    call.record(value, Role.PASS_THROUGH)
    return Value(tuple(dims))


@rule(
    *aten("scatter scatter_add scatter_reduce"),
    reads="self dim index src value reduce include_self",
)
def written_each(call: Call) -> Value:
    """Write each entry to a position of one dimension that an index of its own names.

    In every other dimension position i of the source and of the index goes to position i, so that
    all are the same where they are equally long.  Shorter ones leave the last positions alone.
    """
    value = call.value("self")
    others = [other for other in call.values()[1:] if other.dims]
    if not value.dims or any(len(other.dims) != len(value.dims) for other in others):
        return call.opaque("a single number is written to")[0]
    written = call.integer("dim") % len(value.dims)
    dims = list(value.dims)
    for other in others:
        call.record(other, Role.PASS_THROUGH)
        for dim, layout in enumerate(other.dims):
            if dim == written:
                call.freeze((dims[dim], layout), _WRITTEN)
            elif call.axes.size(layout) == call.axes.size(dims[dim]):
                dims[dim] = call.unify(dims[dim], layout)
            else:
                call.freeze((dims[dim], layout), "fewer positions than it has are written to")
    call.record(value, Role.PASS_THROUGH)
    return Value(tuple(dims))
