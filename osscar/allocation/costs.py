"""What a model costs, in parameters, bytes or operations, as a function of the units it keeps.

A weight has as many entries as the product of its dimensions, each of which loses what units of
groups take along.  In a transformer no weight loses along two dimensions that a budget may touch,
so that costs add up over groups; channels of a convolution are read by the next one's filters,
whose size is a product of two groups' widths, and experts times their neurons are one, too.  Where
a layer reads the units that it makes, as in a recurrent cell, the cost is a product of one group's
width with itself: costs of groups still add up, but a unit's depends on how many others stay.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from networkx.utils import UnionFind
from numpy.typing import NDArray
from torch import Tensor, nn

from graph import CouplingGroup, Role, UnitKind
from osscar.checkpoint.formats import saved_format, written_tensors
from osscar.data.batches import Batch
from osscar.network.modules import named_tensors
from osscar.network.operations import products
from osscar.offload.on_disk import OnDisk
from osscar.shrinking.follow import is_list


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


ROUNDING = 1e-12
"""Of costs, relative: sums of operations are no whole numbers, parameters and bytes are."""


@dataclass(frozen=True)
class _Weight:
    """One tensor: its cost is `price` times the product of its dimensions that are left."""

    price: float
    shape: tuple[int, ...]
    taken: tuple[tuple[int, str, int], ...]
    """Dimension, group, and how many indices along it one unit takes along."""

    def of(self, kept: Mapping[str, Any], units: Mapping[str, int]) -> Any:
        """Return the cost where groups keep some units: numbers, or an array for one of them."""
        left: list[Any] = list(self.shape)
        for dim, name, width in self.taken:
            left[dim] = left[dim] - width * (units[name] - kept.get(name, units[name]))
        return self.price * math.prod(left)


@dataclass(frozen=True)
class CountedCost:
    """A cost that is counted, over every tensor that groups own a part of.

    `fixed` does not depend on them, and `each` is what a unit of a group costs besides, such as its
    attention scores.  `assumed` is what was taken for granted, in words.
    """

    weights: tuple[_Weight, ...] = field(repr=False)
    fixed: float
    each: Mapping[str, float] = field(repr=False)
    units: Mapping[str, int] = field(repr=False)
    assumed: str = ""

    def of(self, kept: Mapping[str, float]) -> float:
        """Return the cost where groups keep so many units; those not named keep all."""
        each = sum(price * kept.get(name, self.units[name]) for name, price in self.each.items())
        return float(self.fixed + each + sum(w.of(kept, self.units) for w in self.weights))

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
        several = {**kept, name: counts}
        each = self.each.get(name, 0.0) * counts
        parts = (w.of(several, self.units) for w in self._by_group.get(name, ()))
        return np.asarray(sum(parts, start=each), dtype=np.float64)

    @cached_property
    def _by_group(self) -> dict[str, list[_Weight]]:
        found: dict[str, list[_Weight]] = {}
        for weight in self.weights:
            for name in {name for _, name, _ in weight.taken}:
                found.setdefault(name, []).append(weight)
        return found


def additive_classes(
    costs: Iterable[CountedCost], names: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """Return groups in classes over which all of the costs add up, in the order of the names.

    Two are in one class where a weight loses by both, along two dimensions.  One group may lose
    along two by itself, or two along the same.
    """
    classes: UnionFind[str] = UnionFind(names)
    for weight in (weight for cost in costs for weight in cost.weights):
        taken = [(dim, name) for dim, name, _ in weight.taken if name in names]
        if all(len(set(some)) > 1 for some in zip(*taken, strict=True)):
            classes.union(*(name for _, name in taken))
    return tuple(tuple(name for name in names if name in one) for one in classes.to_sets())


def count(
    cost: Cost,
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    example: Batch,
    program: nn.Module | None = None,
) -> CountedCost:
    """Count what a model costs, its operations on an example.

    `program` is its exported program, on the model's tensors, if that is what becomes smaller.
    """
    tensors = dict(named_tensors(model))
    names = {id(tensor): name for name, tensor in tensors.items()}
    taken, lists = _owned(model, groups, names, cost)
    prices: Mapping[str, float] = dict.fromkeys(dict(model.named_parameters()), 1.0)
    each: Mapping[str, float] = {}
    fixed = 0.0
    if cost is Cost.BYTES:
        format_of, saved = saved_format(model), model if program is None else program
        written = [(t, format_of(name, t).itemsize) for name, t in written_tensors(saved).items()]
        prices = {names[id(t)]: float(size) for t, size in written if id(t) in names}
        # Other tensors are the numbers in the code of a program.
        fixed = float(sum(t.numel() * size for t, size in written if id(t) not in names))
    elif cost is Cost.FLOPS:
        prices, each, fixed = _operations(model, tensors, groups, example)
    weights = []
    for name, price in prices.items():
        shape, own, experts = tuple(tensors[name].shape), taken.get(name, []), lists.get(name)
        if experts is not None:
            shape = (experts.units, *shape)
            own = [(0, experts.name, 1), *((dim + 1, group, width) for dim, group, width in own)]
        if experts is not None or (own and name not in lists):
            weights.append(_Weight(price, shape, tuple(own)))
        elif name not in lists:
            fixed += price * tensors[name].numel()
    units = {group.name: group.units for group in groups}
    return CountedCost(tuple(weights), fixed, each, units)


def _owned(
    model: nn.Module, groups: Sequence[CouplingGroup], names: Mapping[int, str], cost: Cost
) -> tuple[dict[str, list[tuple[int, str, int]]], dict[str, CouplingGroup | None]]:
    """Return what units take along, by tensor, and groups of experts that are a list of modules.

    The latter are by the tensors of the experts, and None for all but the first expert, with which
    the others are counted: they are alike.  A buffer that several have does not leave with any.
    Matrices of an expert take no operations along: its tokens are sent to others.
    """
    taken: dict[str, list[tuple[int, str, int]]] = {}
    lists: dict[str, CouplingGroup | None] = {}
    for group, slot in ((one, slot) for one in groups for slot in one.slots):
        resent = cost is Cost.FLOPS and group.kind.routed
        if is_list(slot) and not resent:
            members = model.get_submodule(slot.module).children()
            own = [[*member.parameters(), *member.buffers()] for member in members]
            holders = Counter(id(tensor) for tensors in own for tensor in tensors)
            lists |= {
                names[id(tensor)]: None if index else group
                for index, tensors in enumerate(own)
                for tensor in tensors
                if holders[id(tensor)] == 1
            }
        elif not is_list(slot) and not (resent and slot.role is Role.CONSUMER):
            module, _, attribute = slot.tensor.rpartition(".")
            name = names.get(id(getattr(model.get_submodule(module), attribute, None)))
            if name is not None:
                # Two slots along one dimension are two parts of it, as in a fused projection.
                taken.setdefault(name, []).append((slot.dim, group.name, slot.width))
    return taken, lists


def _operations(
    model: nn.Module, tensors: Mapping[str, Tensor], groups: Sequence[CouplingGroup], example: Batch
) -> tuple[Counter[str], Counter[str], float]:
    """Share out each product of a pass among the weights that it takes, or the heads it is of.

    Returned are the operations of each entry of weights, by name, of each unit of a group, and the
    rest.  A product with an unknown weight on disk is shared by all those of the running module.
    """
    names = {id(tensor): name for name, tensor in tensors.items() if tensor.ndim > 1}
    heads = heads_by_module(groups)
    prices: Counter[str] = Counter()
    each: Counter[str] = Counter()
    fixed = 0.0
    for product in products(model, names, example):
        weights = product.weights
        if product.constant and not weights:
            own = model.get_submodule(product.module)._parameters.values()
            on_disk = (p for p in own if isinstance(p, OnDisk) and id(p) in names)
            weights = frozenset(names[id(p)] for p in on_disk)
        if weights:
            entries = sum(tensors[name].numel() for name in weights)
            prices.update(dict.fromkeys(weights, product.operations / entries))
            continue
        several = nearest(heads, product.module)
        units = sum(group.units for group in several)
        each.update({group.name: product.operations / units for group in several})
        fixed += 0 if several else product.operations
    return prices, each, fixed


def heads_by_module(groups: Sequence[CouplingGroup]) -> dict[str, list[CouplingGroup]]:
    """Return the groups of heads by the modules around the layers that make or read them."""
    found: dict[str, list[CouplingGroup]] = {}
    for group in groups:
        if group.kind is UnitKind.HEADS:
            for module in {slot.module.rpartition(".")[0] for slot in group.slots}:
                found.setdefault(module, []).append(group)
    return found


def nearest(heads: Mapping[str, list[CouplingGroup]], module: str) -> list[CouplingGroup]:
    """Return the groups of heads whose scores a module may take: its own, or those around it."""
    while module and module not in heads:
        module = module.rpartition(".")[0]
    return heads.get(module, [])
