"""What a model costs, in parameters, bytes or operations, as a function of the units it keeps.

A weight has as many entries as the product of its dimensions, each of which loses what units of
groups take along.  In a transformer no weight loses along two dimensions that a budget may touch,
so that costs add up over groups; channels of a convolution are read by the next one's filters,
whose size is a product of two groups' widths.  Where a layer reads the units that it makes, as in
a recurrent cell, the cost is a product of one group's width with itself: costs of groups still add
up, but a unit's depends on how many others stay.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray
from torch import Tensor, nn

from graph import CouplingGroup, UnitKind
from osscar.checkpoint.formats import Saving
from osscar.checkpoint.sizes import header_bytes, written_tensors
from osscar.core.on_disk import is_on_disk
from osscar.core.operations import operations
from osscar.data.batches import Batch
from osscar.shrinking.plan import Form


class Cost(enum.StrEnum):
    """What a budget is counted in."""

    PARAMETERS = "parameters"
    BYTES = "bytes"
    """Of the weights, as the model is saved."""
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

    def of(self, kept: Mapping[str, int], units: Mapping[str, int]) -> float:
        left = list(self.shape)
        for dim, name, width in self.taken:
            left[dim] -= width * (units[name] - kept.get(name, units[name]))
        return self.price * math.prod(left)

    def polynomial(
        self, name: str, kept: Mapping[str, int], units: Mapping[str, int]
    ) -> list[float]:
        """Return the cost as a polynomial in what one group keeps, the constant term first.

        A group that lies in two dimensions makes it quadratic.
        """
        left, each = list(self.shape), [0] * len(self.shape)
        for dim, taker, width in self.taken:
            stays = 0 if taker == name else kept.get(taker, units[taker])
            left[dim] -= width * (units[taker] - stays)
            each[dim] += width if taker == name else 0
        found = [self.price]
        for rest, slope in zip(left, each, strict=True):
            if slope:
                shifted = zip([*found, 0.0], [0.0, *found], strict=True)
                found = [rest * same + slope * lower for same, lower in shifted]
            else:
                found = [rest * same for same in found]
        return found


class CostModel(Protocol):
    """The cost of a model whose groups keep some of their units."""

    @property
    def dense(self) -> float:
        """The cost of the model as it is."""

    def of(self, kept: Mapping[str, int]) -> float:
        """Return the cost where groups keep so many units; those not named keep all."""

    def over(
        self, name: str, counts: NDArray[np.int64], kept: Mapping[str, int]
    ) -> NDArray[np.float64]:
        """Return the cost with each of some counts of one group, the others as they are kept.

        It is up to a constant: what does not depend on the group may be left out.
        """

    def separable(self, names: Iterable[str]) -> bool:
        """Whether the costs of these groups add up."""


@dataclass(frozen=True)
class CountedCost:
    """A cost that is counted, weight by weight.

    Parameters
    ----------
    weights
        Every tensor that groups own a part of.
    fixed
        What does not depend on them.
    each
        What one unit of a group costs besides, such as its attention scores.
    units
        How many each group has.
    """

    weights: tuple[_Weight, ...] = field(repr=False)
    fixed: float
    each: Mapping[str, float] = field(repr=False)
    units: Mapping[str, int] = field(repr=False)

    def of(self, kept: Mapping[str, int]) -> float:
        """Return the cost where groups keep so many units; those not named keep all."""
        each = (price * kept.get(name, self.units[name]) for name, price in self.each.items())
        return self.fixed + sum(each) + sum(w.of(kept, self.units) for w in self.weights)

    @property
    def dense(self) -> float:
        """The cost of the model as it is."""
        return self.of({})

    def over(
        self, name: str, counts: NDArray[np.int64], kept: Mapping[str, int]
    ) -> NDArray[np.float64]:
        """Return what so many units of a group cost while the others keep as many as they do."""
        parts = [[0.0, self.each.get(name, 0.0)]]
        parts += [w.polynomial(name, kept, self.units) for w in self._by_group.get(name, ())]
        whole = [sum(terms) for terms in zip_longest(*parts, fillvalue=0.0)]
        return np.asarray(polyval(counts.astype(np.float64), whole))

    @cached_property
    def _by_group(self) -> dict[str, list[_Weight]]:
        found: dict[str, list[_Weight]] = {}
        for weight in self.weights:
            for name in {name for _, name, _ in weight.taken}:
                found.setdefault(name, []).append(weight)
        return found

    def separable(self, names: Iterable[str]) -> bool:
        """Whether the costs of these groups add up: no weight loses by two, along two dimensions.

        One group may lose along two by itself, or two along the same.
        """
        chosen = set(names)

        def adds_up(weight: _Weight) -> bool:
            taken = [(dim, name) for dim, name, _ in weight.taken if name in chosen]
            return any(len(set(of)) == 1 for of in zip(*taken, strict=True)) or not taken

        return all(map(adds_up, self.weights))


def count(
    cost: Cost,
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    example: Batch,
    program: nn.Module | None = None,
) -> CountedCost:
    """Count what a model costs.

    Parameters
    ----------
    cost
        In what.
    model
        The dense model.
    groups
        All its groups.
    example
        Inputs to count the operations of.
    program
        Its exported program, on its own tensors, if that is what becomes smaller and is saved.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    names = {id(tensor): name for name, tensor in tensors.items()}
    taken = _taken(model, groups, names)
    prices, each, rest = dict.fromkeys(dict(model.named_parameters()), 1.0), dict[str, float](), 0.0
    if cost is Cost.BYTES:
        prices, rest = _stored_bytes(model, names, program)
    elif cost is Cost.FLOPS:
        multiplied, own, total = _operations(model, names, example)
        prices = _of_weights(model, names, multiplied, own)
        each = _of_attention(groups, own)
        units = {group.name: group.units for group in groups}
        counted = sum(price * tensors[name].numel() for name, price in prices.items())
        counted += sum(price * units[name] for name, price in each.items())
        rest = max(total - counted, 0.0)
    owned = {name: tuple(of) for name, of in taken.items() if name in prices}
    others = [name for name in prices if name not in owned]
    return CountedCost(
        tuple(_Weight(prices[n], tuple(tensors[n].shape), of) for n, of in owned.items()),
        fixed=rest + sum(prices[name] * tensors[name].numel() for name in others),
        each=each,
        units={group.name: group.units for group in groups},
    )


def _stored_bytes(
    model: nn.Module, names: Mapping[int, str], program: nn.Module | None
) -> tuple[dict[str, float], float]:
    """Return the bytes of an entry of each tensor as `save` writes it, and those of the rest.

    These are the numbers in the code of a program, and what the file says of tensors.
    """
    saving, saved = Saving.of(model), model if program is None else program
    written = [
        (t, saving.format_of(name, t).itemsize) for name, t in written_tensors(saved).items()
    ]
    prices = {names[id(t)]: float(size) for t, size in written if id(t) in names}
    rest = sum(t.numel() * size for t, size in written if id(t) not in names)
    form = Form.MODULE if program is None else Form.GRAPH
    return prices, float(rest + header_bytes(saved, form, saving))


def _taken(
    model: nn.Module, groups: Sequence[CouplingGroup], names: Mapping[int, str]
) -> dict[str, list[tuple[int, str, int]]]:
    """Return what units take along, by tensor."""
    taken: dict[str, list[tuple[int, str, int]]] = {}
    for group in groups:
        for slot in group.slots:
            name = names.get(id(_attribute(model, slot.tensor)))
            if name is not None:
                # Two slots along one dimension are two parts of it, as in a fused projection.
                taken.setdefault(name, []).append((slot.dim, group.name, slot.width))
    return taken


def _attribute(model: nn.Module, name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute, None)


# ---- operations --------------------------------------------------------------------------


def _operations(
    model: nn.Module, names: Mapping[int, str], example: Batch
) -> tuple[Counter[str], dict[str, float], int]:
    """Count the products with each weight, what each module does besides, and what all do.

    What a module does is without its children.  A product is one with a weight where that, or a
    view of it, is what the operator reads, whoever calls it; weights that were copied, gathered or
    cast before, or lie on disk, are told by the modules that they belong to.
    """
    weights = _by_storage(model, names)
    multiplied, told = Counter[str](), Counter[str]()

    def note(found: int, args: Sequence[object], modules: frozenset[str]) -> None:
        read = {weights.get(_storage(arg)) for arg in args if isinstance(arg, Tensor)} - {None}
        if len(read) == 1:
            multiplied.update({name: found for name in read if name is not None})
            told.update(dict.fromkeys(modules, found))

    counter = operations(model, example, note)
    counts, root = counter.get_flop_counts(), type(model).__name__

    def of(name: str) -> int:
        path = f"{root}.{name}" if name else root
        return sum(counts.get(path, {}).values()) - told[path]

    own = {
        name: float(
            of(name)
            - sum(of(f"{name}.{child}" if name else child) for child, _ in module.named_children())
        )
        for name, module in model.named_modules()
    }
    return multiplied, own, counter.get_total_flops()


def _by_storage(model: nn.Module, names: Mapping[int, str]) -> dict[int, str]:
    """Return the names of weights by where they lie, those that lie alone: biases are added."""
    if is_on_disk(model):
        return {}
    found: dict[int, list[str]] = {}
    for parameter in model.parameters():
        if parameter.ndim > 1:
            found.setdefault(_storage(parameter), []).append(names[id(parameter)])
    return {place: of[0] for place, of in found.items() if place and len(of) == 1}


def _storage(tensor: Tensor) -> int:
    """Return where a tensor lies; 0 if nowhere, or, as sparse ones, in several places."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _of_weights(
    model: nn.Module,
    names: Mapping[int, str],
    multiplied: Mapping[str, int],
    own: Mapping[str, float],
) -> dict[str, float]:
    """Return the operations of each entry of weights.

    What a module does besides the products that were seen is that of its other weights, if any.
    """
    every = {names[id(parameter)]: parameter for parameter in model.parameters()}
    prices = {name: found / every[name].numel() for name, found in multiplied.items()}
    for name, module in model.named_modules():
        known = (weight for weight in _matrices(module) if id(weight) in names)
        unseen = [weight for weight in known if names[id(weight)] not in multiplied]
        entries = sum(weight.numel() for weight in unseen)
        for weight in unseen if own[name] > 0 else ():
            owner = names[id(weight)]
            prices[owner] = prices.get(owner, 0.0) + own[name] / entries
    return prices


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return what a module multiplies with: its weight, or the matrices of several experts.

    All entries of the latter meet as many tokens, on average over the experts.
    """
    weight = module._parameters.get("weight")
    if weight is not None:
        return [weight] if weight.ndim > 1 else []
    return [p for p in module._parameters.values() if p is not None and p.ndim == 3]


def _of_attention(groups: Sequence[CouplingGroup], own: Mapping[str, float]) -> dict[str, float]:
    """Return what each head costs besides weights: scores and weighted sums, in its own module."""
    each: dict[str, float] = {}
    shared: dict[str, list[CouplingGroup]] = {}
    for group in groups:
        if group.kind is UnitKind.HEADS and group.consumers:
            module = group.consumers[0].module.rpartition(".")[0]
            shared.setdefault(module, []).append(group)
    for module, found in shared.items():
        for group in found:
            each[group.name] = max(own.get(module, 0.0), 0.0) / sum(g.units for g in found)
    return each
