"""What a model costs, in parameters, bytes or operations, as a function of the units it keeps.

A cost is a sum over tensors, or over operators of the traced program, of products of sizes, each
of which is a sum over groups' widths (`graph.Size`).  Channels of a convolution are read by the
next one's filters, so that the widths of two groups multiply; so do those of experts and of their
neurons.  Where a layer reads the units that it makes, as in a recurrent cell, a width is squared.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property, partial
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PlainValidator, with_config
from torch import nn
from torch.utils import _pytree as pytree

import graph
from graph import CouplingGroup, Operand, Operator, Role, Size
from osscar.base.errors import RequestError
from osscar.base.json_files import STRICT
from osscar.checkpoint.builders import saved_format, written_tensors
from osscar.data.reader import Batch
from osscar.network.modules import named_tensors
from osscar.network.operations import count_flops, flop_counter, multiplies
from osscar.preparation.prepare import Prepared
from osscar.shrinking.slice import is_list


class Cost(enum.StrEnum):
    """What a budget is counted in."""

    PARAMETERS = "parameters"
    BYTES = "bytes"
    """Of the weights, as the model is saved."""
    MEMORY = "serving bytes"
    """Of the weights, as the model is saved, and of the keys and values that it keeps."""
    FLOPS = "flops"
    TIME = "time"
    """Of a forward pass, relative to the dense model's."""


ONE = Size((((), 1),))

ROUNDING = 1e-12
"""Of costs, relative: sums of operations are no whole numbers, parameters and bytes are."""


def _read(number: type[np.generic]) -> PlainValidator:
    """Let an array be read from lists of numbers."""
    return PlainValidator(partial(np.array, dtype=number))


@with_config(STRICT)
@dataclass(frozen=True)
class Product:
    """A price times the widths of groups, one of which is named twice where it is squared."""

    price: float
    names: tuple[str, ...]

    def at(self, widths: Mapping[str, Any]) -> Any:
        """Return the cost at the widths of all groups: numbers, or an array for one of them."""
        return self.price * math.prod(widths[name] for name in self.names)


@with_config(STRICT)
@dataclass(frozen=True, eq=False)
class Table:
    """Seconds by the widths of one or two groups, on straight lines between those of a grid."""

    names: tuple[str, ...]
    grids: tuple[Annotated[NDArray[np.int64], _read(np.int64)], ...] = field(repr=False)
    """Of each group, two widths at least, ascending."""
    seconds: Annotated[NDArray[np.float64], _read(np.float64)] = field(repr=False)
    """At each width, or pair of widths."""

    def at(self, widths: Mapping[str, Any]) -> Any:
        """Return the seconds at the widths of all groups: numbers, or an array for one of them."""
        pairs = zip(self.names, self.grids, strict=True)
        corners = [_around(widths[name], grid) for name, grid in pairs]
        return sum(
            math.prod(share for _, share in corner) * self.seconds[tuple(i for i, _ in corner)]
            for corner in itertools.product(*corners)
        )


def _around(width: Any, grid: NDArray[np.int64]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return the places of a grid around a width, and how much each counts there."""
    below = np.clip(np.searchsorted(grid, width, side="right") - 1, 0, len(grid) - 2)
    part = np.clip((width - grid[below]) / (grid[below + 1] - grid[below]), 0.0, 1.0)
    return (below, 1 - part), (below + 1, part)


Term: TypeAlias = Product | Table
"""A part of a cost that depends on the widths of few groups."""


@with_config(STRICT)
@dataclass(frozen=True)
class CountedCost:
    """A cost of the whole model: a constant, and terms that depend on the widths of few groups.

    `units` are the widths of the dense model.  `assumed` is what was taken for granted, in words.
    """

    fixed: float
    terms: tuple[Term, ...] = field(repr=False)
    units: Mapping[str, int] = field(repr=False)
    assumed: str = ""

    @classmethod
    def summed(
        cls, sizes: Mapping[Size, float], units: Mapping[str, int], fixed: float = 0.0
    ) -> CountedCost:
        """Return the cost of sizes, each at its price."""
        terms: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for size, price in sizes.items():
            for names, number in size.terms:
                terms[names] += price * number
        fixed += terms.pop((), 0.0)
        return cls(float(fixed), tuple(Product(p, names) for names, p in terms.items()), units)

    def of(self, kept: Mapping[str, float]) -> float:
        """Return the cost where groups keep so many units; those not named keep all."""
        widths = {**self.units, **kept}
        return float(self.fixed + sum(term.at(widths) for term in self.terms))

    @property
    def dense(self) -> float:
        """The cost of the model as it is."""
        return self.of({})

    def over(
        self, name: str, counts: NDArray[np.int64], kept: Mapping[str, int]
    ) -> NDArray[np.float64]:
        """Return the cost with each of some counts of one group, the others as they are kept.

        What does not depend on the group is left out.
        """
        widths = {**self.units, **kept, name: counts.astype(np.float64)}
        terms = (term.at(widths) for term in self._by_group.get(name, ()))
        return np.asarray(sum(terms, start=np.zeros(len(counts))), dtype=np.float64)

    @cached_property
    def coupled(self) -> frozenset[frozenset[str]]:
        """The groups, two or more, whose widths multiply, so that costs do not add up over them."""
        return frozenset(names for term in self.terms if len(names := frozenset(term.names)) > 1)

    @cached_property
    def _by_group(self) -> dict[str, list[Term]]:
        found: dict[str, list[Term]] = defaultdict(list)
        for term in self.terms:
            for name in set(term.names):
                found[name].append(term)
        return found


def count(
    cost: Cost,
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    program: nn.Module | None = None,
) -> CountedCost:
    """Count what a model costs by the widths of some groups, its operations on the first sample.

    `program` is its exported program, on the model's tensors, if that is what becomes smaller.

    A `RequestError` is raised where operations cannot be counted, since the model cannot be traced
    on the sample.
    """
    if cost is Cost.FLOPS:
        traced = traced_alike(
            prepared,
            groups,
            prepared.sample,
            "operations cannot be counted",
            "give params (`--params`)",
        )
        return operations(prepared.model, traced, groups, prepared.sample)
    return weights(cost, prepared.model, prepared.traced, groups, program)


# ---- tensors -----------------------------------------------------------------------------


def weights(
    cost: Cost,
    model: nn.Module,
    traced: graph.DependencyGraph,
    groups: Sequence[CouplingGroup],
    program: nn.Module | None = None,
) -> CountedCost:
    """Add up the entries, or bytes, of all tensors, each once; arguments are those of `count`."""
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    prices: Mapping[str, float] = dict.fromkeys(dict(model.named_parameters()), 1.0)
    fixed = 0.0
    if cost is Cost.BYTES:
        format_of, saved = saved_format(model), model if program is None else program
        written = [(t, format_of(name, t).itemsize) for name, t in written_tensors(saved).items()]
        prices = {names[id(t)]: float(size) for t, size in written if id(t) in names}
        # Other tensors are the numbers in the code of a program.
        fixed = float(sum(t.numel() * size for t, size in written if id(t) not in names))
    units = {group.name: group.units for group in groups}
    sizes: defaultdict[Size, float] = defaultdict(float)
    for name, dims in _dimensions(model, traced, groups, units).items():
        sizes[math.prod(dims, start=ONE)] += prices.get(name, 0.0)
    return CountedCost.summed(sizes, units, fixed)


def _dimensions(
    model: nn.Module,
    traced: graph.DependencyGraph,
    groups: Sequence[CouplingGroup],
    units: Mapping[str, int],
) -> dict[str, tuple[Size, ...]]:
    """Return the dimensions of every tensor of the model, by name.

    Of experts that are a list of modules, which are alike, the first has as many as there are, and
    the others none; a buffer that several have does not leave with any.
    """
    resolved = _resolved(_closed(traced, groups))
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    found = {
        name: tuple(map(resolved, traced.tensors[name]))
        if name in traced.tensors
        else tuple(Size((((), n),)) for n in tensor.shape)
        for name, tensor in named_tensors(model)
    }
    for group, slot in ((one, slot) for one in groups if one.kind.routed for slot in one.slots):
        if is_list(slot):
            members = model.get_submodule(slot.module).children()
            own = [[*member.parameters(), *member.buffers()] for member in members]
            holders = Counter(id(tensor) for tensors in own for tensor in tensors)
            for index, tensor in ((i, t) for i, tensors in enumerate(own) for t in tensors):
                if holders[id(tensor)] == 1:
                    copies = Size(()) if index else Size((((group.name,), 1),))
                    found[names[id(tensor)]] += (copies,)
            continue
        module, _, attribute = slot.tensor.rpartition(".")
        name = names.get(id(getattr(model.get_submodule(module), attribute, None)), "")
        if name:
            dims = list(found[name])
            other = dims[slot.dim].at(units) - slot.width * slot.units
            dims[slot.dim] = Size.summed({(group.name,): slot.width, (): other})
            found[name] = tuple(dims)
    return found


def _closed(traced: graph.DependencyGraph, groups: Sequence[CouplingGroup]) -> dict[str, int]:
    """Return the widths of what is traced and is none of the groups that may lose units."""
    names = {group.name for group in groups if group.prunable}
    return {group.name: group.units for group in traced.groups if group.name not in names}


Resolved = Callable[[Size], Size]
"""Returns a size with some groups at a width, or under another name."""


def _resolved(given: Mapping[str, int | str]) -> Resolved:
    return cache(lambda size: size.given(given))


# ---- operations --------------------------------------------------------------------------


def operations(
    model: nn.Module,
    traced: graph.DependencyGraph,
    groups: Sequence[CouplingGroup],
    sample: Batch,
) -> CountedCost:
    """Add up the operations of what is traced; what is left of a whole pass is a constant.

    `traced` is the model as it was traced on the sample.
    """
    units = {group.name: group.units for group in groups}
    places = {(s.tensor, s.dim): g.name for g in traced.groups for s in g.slots}
    # No trace finds experts, but the rows of a router are a group of it.
    routed = {
        places[slot.tensor, slot.dim]: group.name
        for group in groups
        for slot in group.slots
        if group.kind.routed and slot.role is Role.PRODUCER and (slot.tensor, slot.dim) in places
    }
    formulas = _Formulas(_resolved({**_closed(traced, groups), **routed}), units)
    sizes = Counter(formula for one in traced.operators if (formula := formulas.of(one)).terms)
    found = CountedCost.summed(sizes, units)
    whole = count_flops(model, sample)
    return CountedCost.summed(sizes, units, whole - found.dense)


def traced_alike(
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    batch: Batch,
    refused: str,
    advice: str,
    what: str = "a pass",
) -> graph.DependencyGraph:
    """Trace the model on a batch, and find the same groups; `what` is that of `traced_on`.

    A `RequestError` says what is refused if it cannot be traced or has others, and what to do.
    """
    shapes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in batch.items())
    refused = f"{refused} on a sample of {shapes}: "
    try:
        traced = prepared.traced_on(batch, what)
    except graph.GraphError as error:
        raise RequestError(f"{refused}{error}; {advice}") from error
    known = {group.name: {s.location for s in group.slots} for group in traced.groups}
    for group in groups:
        places = {slot.location for slot in group.slots}
        if group.prunable and not group.kind.routed and known.get(group.name) != places:
            raise RequestError(
                f"{refused}the trace finds other units there for {group.name!r}; {advice}"
            )
    return traced


_NODES = (2, 3, 4, 5)
"""Sizes at which operations are counted: they are polynomials of degree three at most in each size
that an operator has.  Of size one, products may be computed by element, which is not counted."""


def _monomials() -> NDArray[Any]:
    """Return what polynomials that are one at a node and zero at the others consist of, exactly."""
    rows = []
    for node in _NODES:
        row = [Fraction(1)]
        for other in (n for n in _NODES if n != node):
            longer = [Fraction(0), *row], [*row, Fraction(0)]
            row = [(a - other * b) / (node - other) for a, b in zip(*longer, strict=True)]
        rows.append(row)
    return np.array(rows, dtype=object)


class _Formulas:
    """Operations of operators by torch's formulas, as polynomials of groups' widths.

    An operator's sizes are multiples of some that differ, each of which is a variable: it is called
    on tensors without memory, and counted.
    """

    def __init__(self, resolved: Resolved, units: Mapping[str, int]) -> None:
        self._resolved, self._units = resolved, units
        self._known: dict[tuple[Any, str], dict[tuple[int, ...], int]] = {}
        self._basis = _monomials()

    def of(self, operator: Operator) -> Size:
        """Return the operations of an operator; none if they depend on no group."""
        factors = [one for one in operator.reads if one.dtype.is_floating_point]
        if len(factors) < 2 or not multiplies(operator.function):
            return Size(())
        variables: dict[Size, int] = {}

        def seen(operand: Operand) -> Any:
            dims = (_primitive(self._resolved(size)) for size in operand.dims)
            return operand.dtype, *((n, variables.setdefault(p, len(variables))) for n, p in dims)

        variables[ONE] = 0
        key = operator.function, str(pytree.tree_map_only(Operand, seen, operator.arguments))
        several = [size for size in variables if size != ONE]
        if not several:
            return Size(())
        if key not in self._known:
            self._known[key] = self._powers(operator, several)
        total: Counter[tuple[str, ...]] = Counter()
        for powers, number in self._known[key].items():
            sizes = (
                size for size, power in zip(several, powers, strict=True) for _ in range(power)
            )
            for names, n in math.prod(sizes, start=ONE).terms:
                total[names] += n * number
        return Size.summed(total)

    def _powers(self, operator: Operator, variables: Sequence[Size]) -> dict[tuple[int, ...], int]:
        """Return the polynomial of an operator, numbers by the powers of variables."""
        dense = [size.at(self._units) for size in variables]
        if not self._counted(operator, dict(zip(variables, dense, strict=True))):
            return {}
        values = np.empty((len(_NODES),) * len(variables), dtype=object)
        for index in itertools.product(range(len(_NODES)), repeat=len(variables)):
            at = {size: _NODES[i] for size, i in zip(variables, index, strict=True)}
            values[index] = Fraction(self._counted(operator, at))
        for _ in variables:
            values = np.tensordot(values, self._basis, axes=(0, 0))
        return {powers: int(number) for powers, number in np.ndenumerate(values) if number}

    def _counted(self, operator: Operator, values: Mapping[Size, int]) -> int:
        def size(one: Size) -> int:
            number, primitive = _primitive(self._resolved(one))
            return number * values.get(primitive, 1)

        with torch.no_grad(), flop_counter() as counter:
            operator.function(**operator.arguments_at(size, empty))
        return int(counter.get_total_flops())


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _primitive(size: Size) -> tuple[int, Size]:
    """Return a size as a multiple of one of which it is the least multiple."""
    number = math.gcd(*(n for _, n in size.terms)) or 1
    return number, Size(tuple((names, n // number) for names, n in size.terms))
