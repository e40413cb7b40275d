"""A consumer as a matrix: what a module reads, and the weights it reads it with.

Every consumer is seen as ``Y = X W``: rows of X are positions, columns of X and rows of W are the
inputs that belong to one coupling group, ordered as they lie in the weight tensor.  A convolution
has one row of W for each channel and tap of its kernel (`osscar.consumers.convolutions`).

What a consumer reads beside them, as of ``cat([x, units])``, is *fixed*: it stays, whatever leaves
the group, and can be refitted with what stays of that.  Its rows then come before the units'.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from graph.groups import Slot
from osscar.base.errors import NonFiniteError
from osscar.consumers.convolutions import Windows, windows_of
from osscar.consumers.products import (
    Form,
    Product,
    Taken,
    deformed_form,
    holder,
    is_station,
    station,
)
from osscar.consumers.recurrent import BIAS, RECURRENT, WEIGHT, directions
from osscar.consumers.routing import Mixture, Routed
from osscar.network.modules import is_deformable
from osscar.offload.on_disk import written

MOST_ROWS = 4096
"""Rows of a consumer whose fixed inputs are refitted: with more, these keep their weights."""


@dataclass(frozen=True, eq=False)
class LinearMap(abc.ABC):
    """One consumer of a coupling group."""

    name: str
    """Of the module whose inputs are observed."""
    module: nn.Module
    dim: int
    """The dimension of the weight in which inputs lie."""
    owned: Sequence[Sequence[int]]
    """The input features or channels that each unit of the group owns."""
    has_bias: bool
    """Whether it has a bias that it shares with no other module."""

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.name

    @property
    def holder(self) -> str:
        """What holds the tensors that are refitted, by the name of `products.holder`."""
        return self.name

    @property
    def tied(self) -> bool:
        """Whether its weight is read in another way, too, so that only rows of units may change."""
        return False

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        return "weight", "bias"

    @property
    def taps(self) -> int:
        """How many rows of W one input owns."""
        return 1

    @cached_property
    def beside(self) -> tuple[int, ...]:
        """The inputs that no unit owns, in ascending order."""
        owned = {index for unit in self.owned for index in unit}
        return tuple(index for index in range(self._shape[0]) if index not in owned)

    @cached_property
    def inputs(self) -> Tensor:
        """The inputs that are refitted, int64: fixed ones, and those that units own.

        Both are in ascending order.
        """
        fixed = self.beside if self.fixed else ()
        return torch.tensor([*fixed, *sorted(index for unit in self.owned for index in unit)])

    @property
    def fixed(self) -> int:
        """The number of rows of W, the first ones, that no unit owns."""
        fits = self._shape[0] * self.taps <= MOST_ROWS
        return len(self.beside) * self.taps if fits else 0

    @property
    def fixed_inputs(self) -> tuple[int, int]:
        """How many inputs that no unit owns are refitted, and how many keep their weights."""
        refitted = self.fixed // self.taps
        return refitted, len(self.beside) - refitted

    @property
    def rows(self) -> int:
        """The number p of rows of W."""
        return len(self.inputs) * self.taps

    @property
    def outputs(self) -> int:
        """The number m of columns of W."""
        return self._shape[1]

    @cached_property
    def _shape(self) -> torch.Size:
        """Of `_view`; nothing is read for it of a weight that lies on disk."""
        return self._view(torch.empty(self._weight.shape, device="meta")).shape

    @cached_property
    def unit_rows(self) -> list[list[int]]:
        """The rows of `read_weight` that each unit owns."""
        first = {index: row * self.taps for row, index in enumerate(self.inputs.tolist())}
        return [
            [first[index] + tap for index in unit for tap in range(self.taps)]
            for unit in self.owned
        ]

    @abc.abstractmethod
    def read_inputs(self, x: Any) -> Iterator[Tensor]:
        """Yield X, (positions, p), piece by piece, from what the module is called with."""

    @abc.abstractmethod
    def read_outputs(self, y: Tensor, x: Any) -> Tensor:
        """Return Y, (positions, m), of all positions in the order of `read_inputs`.

        Given are what the module puts out, in its shape, and what it is called with.
        """

    def read_corrections(self, D: Tensor, x: Any) -> Tensor:
        """Return by how much Y is to change for the module's output to do so, as `read_outputs`."""
        return self.read_outputs(D, x)

    def passed_over(self, x: Any) -> int:
        """Return at how many further positions of a call it reads nothing and adds nothing."""
        return 0

    @abc.abstractmethod
    def _view(self, weight: Tensor) -> Tensor:
        """Return a view of the weight, (all inputs, m) or (all inputs, m, *kernel)."""

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        view = self._view(self._weight)
        part = view[self.inputs.to(view.device)].double()
        return part.flatten(2).mT.flatten(0, 1) if part.ndim > 2 else part

    def read_unit_weight(self) -> Tensor:
        """Return W with zeros for fixed rows, which count by how much they change."""
        W = self.read_weight()
        W[: self.fixed] = 0
        return W

    @property
    def vacant(self) -> Tensor:
        """The fixed rows, (p,) bool, that have no weight but zero and are to have none.

        Such are those of a unit of another group that has left.
        """
        found = ~self.read_weight().any(1)
        found[self.fixed :] = False
        return found

    def write_weight(self, W: Tensor) -> None:
        """Replace what is refitted of the weight by W, (p, m)."""
        with written(self.module, self.parameters[0]) as weight:
            view = self._view(weight)
            W = self._fitting(W, view, "weights")
            if view.ndim > 2:
                W = W.view(-1, self.taps, W.shape[1]).mT.reshape(-1, *view.shape[1:])
            view[self.inputs.to(view.device)] = W

    def read_bias(self) -> Tensor:
        """Return the bias of the outputs, (m,), a float64 copy; only where it `has_bias`."""
        bias = getattr(self.module, self.parameters[1])
        assert isinstance(bias, Tensor)
        return self._bias_view(bias.detach()).to(torch.float64, copy=True)

    def write_bias(self, bias: Tensor) -> None:
        """Replace the bias of the outputs, (m,), as `write_weight` does the weight."""
        with written(self.module, self.parameters[1]) as whole:
            view = self._bias_view(whole)
            view.copy_(self._fitting(bias, view, "bias"))

    def _fitting(self, values: Tensor, like: Tensor, what: str) -> Tensor:
        values = values.to(like)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the refitted {what} of {self.label!r} overflow {like.dtype}; "
                "use --dtype float32 or bfloat16, or raise --damp"
            )
        return values

    def read(self) -> list[Tensor]:
        """Return the weight and, where it `has_bias`, the bias, float64 copies."""
        return [self.read_weight(), *([self.read_bias()] if self.has_bias else [])]

    def write(self, tensors: Sequence[Tensor]) -> None:
        """Replace what `read` returns."""
        self.write_weight(tensors[0].double())
        if self.has_bias:
            self.write_bias(tensors[1].double())

    def _bias_view(self, bias: Tensor) -> Tensor:
        """Return a view of the part of a bias that belongs to the outputs."""
        return bias

    @property
    def number_format(self) -> torch.dtype:
        """In which the module keeps its weight."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The weight itself, outside of autograd."""
        weight = getattr(self.module, self.parameters[0])
        assert isinstance(weight, Tensor)
        return weight.detach()


class _Measured(Protocol):
    """What is known of a consumer after it has been read."""

    linear_map: LinearMap

    @property
    def rows(self) -> int:
        """At how many positions it read anything."""


_M = TypeVar("_M", bound=_Measured)


def without_idle(measured: Sequence[_M]) -> tuple[_M, ...]:
    """Leave out the experts to which no token was sent, where some were sent to others."""
    read = {one.linear_map.name for one in measured if one.rows}
    return tuple(one for one in measured if one.rows or one.linear_map.name not in read)


class _FeatureMap(LinearMap):
    """A `torch.nn.Linear` or transformers' `Conv1D`, which reads the last dimension."""

    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield all positions at once."""
        x = _positions(x)
        yield x[:, self.inputs.to(x.device)] if self.beside else x

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return all positions."""
        return _positions(y)

    def _view(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0)


def _positions(x: Tensor) -> Tensor:
    """Return all positions, (positions, features); of packed sequences without the padding."""
    if not x.is_nested:
        return x.detach().reshape(-1, x.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.detach().unbind()])


@dataclass(frozen=True, eq=False)
class _RecurrentMap(_FeatureMap):
    """The gates of a recurrent layer in one direction, which read the last dimension."""

    direction: int
    """Which of `osscar.consumers.recurrent.directions`."""

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        end = directions(self.module)[self.direction]
        return WEIGHT + end, BIAS + end

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the gates' inputs of this direction, of those that `input_gates` makes."""
        return _positions(y).chunk(len(directions(self.module)), 1)[self.direction]


@dataclass(frozen=True, eq=False)
class _ConvolutionMap(LinearMap):
    """The channels that one group of a convolution reads, with all taps of the kernel.

    A dense convolution has one group.  Of a grouped one, each group is a linear map of its own: its
    outputs depend on no other group's inputs, so that the whole Gram matrix would be block-diagonal
    with these blocks, and a unit of the coupling group owns rows in each of them.
    """

    windows: Windows
    part: int
    """Which group of the convolution; channels are counted inside of it."""

    @property
    def taps(self) -> int:
        """Positions in the kernel."""
        return self.windows.taps

    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the unfolded windows, as many at once as `convolutions` allows."""
        x = x.detach().reshape(-1, *x.shape[-len(self.windows.kernel) - 1 :])
        channels = self._of_part(torch.arange(x.shape[1]))[self.inputs]
        if self.beside or len(channels) < x.shape[1]:
            x = x[:, channels.to(x.device)]
        yield from self.windows.unfolded(x)

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the channels that this group of the convolution puts out, at each position."""
        y = y.detach().reshape(-1, *y.shape[-len(self.windows.kernel) - 1 :])
        return self._of_part(y, 1).movedim(1, -1).flatten(0, -2)

    def _of_part(self, channels: Tensor, dim: int = 0) -> Tensor:
        """Return a view of what this group of the convolution has in a dimension."""
        count = channels.shape[dim] // int(self.module.groups)  # type: ignore[arg-type]
        return channels.narrow(dim, self.part * count, count)

    def _bias_view(self, bias: Tensor) -> Tensor:
        return self._of_part(bias)

    def _view(self, weight: Tensor) -> Tensor:
        view = self._of_part(weight)
        return view if self.windows.transposed else view.transpose(0, 1)

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        return self._ordered(super().read_weight())

    def write_weight(self, W: Tensor) -> None:
        """Replace what is refitted of the weight by W, (p, m)."""
        super().write_weight(self._ordered(W))

    def _ordered(self, W: Tensor) -> Tensor:
        """Turn taps round: a transposed convolution writes where a plain one reads."""
        if not self.windows.transposed:
            return W
        return W.view(-1, self.taps, W.shape[1]).flip(1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class ExpertMap(LinearMap):
    """What one expert adds to the output of a mixture, which is called with what is `Routed`.

    Its inputs are multiplied with the weight of the token at this expert, so that what it puts out
    is its term of the mixture's sum.  For tokens that are not sent to it, both are zero.
    """

    mixture: Mixture
    expert: int

    @property
    def label(self) -> str:
        """The module and the expert."""
        return f"{self.name}[{self.expert}]"

    @property
    def parameters(self) -> tuple[str, str]:
        """The parameter with the last matrix of every expert; biases stay."""
        return self.mixture.parameter, ""

    def read_inputs(self, x: Routed) -> Iterator[Tensor]:
        """Yield the tokens that are sent to this expert."""
        X = self.mixture.visits(x).X[self._here(x)]
        yield X[:, self.inputs.to(X.device)] if self.beside else X

    def read_outputs(self, y: Tensor, x: Routed) -> Tensor:
        """Return what the mixture puts out for these tokens."""
        return y.detach()[self.mixture.visits(x).token[self._here(x)]]

    def read_corrections(self, D: Tensor, x: Routed) -> Tensor:
        """Return the part of the corrections that falls to this expert."""
        share = self.mixture.visits(x).share[self._here(x), None]
        return self.read_outputs(D, x).double() * share

    def passed_over(self, x: Routed) -> int:
        """Return how many tokens are sent to others."""
        return len(x.hidden) - len(set(self.mixture.visits(x).token[self._here(x)].tolist()))

    def _here(self, x: Routed) -> Tensor:
        return self.mixture.visits(x).expert == self.expert

    def _view(self, weight: Tensor) -> Tensor:
        return weight[self.expert].movedim(self.mixture.dim - 1, 0)


@dataclass(frozen=True, eq=False)
class _ProductMap(LinearMap):
    """The products of one form that code takes with a weight, observed where it takes them."""

    product: Product
    form: Form
    part: int
    """Which group of a convolution; inputs are counted inside of it."""

    @property
    def holder(self) -> str:
        """The module, or the weight, whatever the products."""
        return station(self.product.tensor, ()) if is_station(self.name) else self.name

    @property
    def tied(self) -> bool:
        """Whether there are products of other forms."""
        return len(self.product.forms) > 1

    @property
    def parameters(self) -> tuple[str, str]:
        """The weight, and a bias that every product adds."""
        bias = (self.product.forms[self.form] or "").rpartition(".")[2]
        return self.product.tensor.rpartition(".")[2], bias

    @property
    def taps(self) -> int:
        """Positions in the other dimensions that are summed over."""
        return math.prod(self._others)

    @property
    def _others(self) -> tuple[int, ...]:
        shape = self._weight.shape
        return tuple(shape[dim] for dim in self.form.summed if dim != self.dim)

    def read_inputs(self, x: Taken) -> Iterator[Tensor]:
        """Yield what is multiplied with each row of W, some samples at once."""
        picking = self._picking().to(x.multiplied)
        for some in x.split(self.rows):
            yield self._rows(some.picked(picking))

    def read_outputs(self, y: Tensor, x: Taken) -> Tensor:
        """Return all positions."""
        return self._rows(y)

    def _rows(self, y: Tensor) -> Tensor:
        """Return what a product of this part puts out, (positions, columns)."""
        places = self.form.places
        rows = y.detach().movedim(places, tuple(range(-len(places), 0))).flatten(-len(places))
        return self._of_part(rows.reshape(-1, rows.shape[-1]), 1)

    def _of_part(self, tensor: Tensor, dim: int) -> Tensor:
        count = tensor.shape[dim] // self.form.groups
        return tensor.narrow(dim, self.part * count, count)

    def _picking(self) -> Tensor:
        """Return a weight whose products are the inputs, in the order of the rows of W."""
        shape = list(self._weight.shape)
        for dim in self.form.made:
            shape[dim] = 1
        shape[self.form.made[0]] = self.rows * self.form.groups
        weight, row = torch.zeros(shape), torch.arange(self.rows)
        taps = torch.unravel_index(row % self.taps, self._others) if self._others else ()
        self._view(weight)[(self.inputs[row // self.taps], row, *taps)] = 1
        return weight

    def _view(self, weight: Tensor) -> Tensor:
        made, others = self.form.made, [d for d in self.form.summed if d != self.dim]
        own = self._of_part(weight, made[0])
        return own.permute(self.dim, *made, *others).flatten(1, len(made))

    def _bias_view(self, bias: Tensor) -> Tensor:
        return self._of_part(bias, 0)


def is_matrix(weight: Tensor, product: Product, dim: int) -> bool:
    """Whether products that sum over a dimension of a weight are linear maps with a view of it."""
    form = product.form(dim)
    if form is None or (form.groups > 1 and dim != 1):
        return False
    columns = weight.permute(*form.made, *form.summed).flatten(0, len(form.made) - 1)
    return columns.data_ptr() == weight.data_ptr()


def product_maps(
    model: nn.Module, slots: tuple[Slot, ...], product: Product
) -> Iterator[LinearMap]:
    """Yield what one weight reads of a group in products, given the slots of it."""
    form = product.form(slots[0].dim)
    assert form is not None
    yield from _product_maps(model, station(product.tensor, form.summed), slots, product, form)


def _product_maps(
    model: nn.Module, name: str, slots: tuple[Slot, ...], product: Product, form: Form
) -> Iterator[LinearMap]:
    for part in range(form.groups):
        yield _ProductMap(
            name,
            holder(model, name),
            slots[0].dim,
            _owned(slots),
            product.forms[form] is not None,
            product,
            form,
            part,
        )


def _owned(slots: tuple[Slot, ...]) -> list[list[int]]:
    """Return what each unit owns of the dimension of some slots."""
    units = range(slots[0].units)
    return [[i for slot in slots for i in slot.indices([unit])] for unit in units]


def maps_of(
    model: nn.Module, slots: tuple[Slot, ...], mixture: Mixture | None
) -> Iterator[LinearMap]:
    """Yield the consumers that one tensor holds, given the slots of it that a group has."""
    name, dim, owned = slots[0].module, slots[0].dim, _owned(slots)
    module = model.get_submodule(name)
    if mixture is not None:
        for expert in range(len(mixture.weight)):
            yield ExpertMap(name, module, dim, owned, False, mixture, expert)
        return
    if isinstance(module, RECURRENT):
        end = slots[0].tensor.rpartition(".")[2].removeprefix(WEIGHT)
        has_bias, direction = _has_bias(model, module, BIAS + end), directions(module).index(end)
        yield _RecurrentMap(name, module, dim, owned, has_bias, direction)
        return
    windows, has_bias = windows_of(module), _has_bias(model, module, "bias")
    if is_deformable(module):
        form = deformed_form(module)
        product = Product(slots[0].tensor, {form: f"{name}.bias" if has_bias else None})
        yield from _product_maps(model, name, slots, product, form)
        return
    if windows is None:
        yield _FeatureMap(name, module, dim, owned, has_bias)
        return
    groups = int(module.groups)  # type: ignore[arg-type]
    channels = int(module.in_channels) // groups  # type: ignore[arg-type]
    for part in range(groups):
        # Dimension 1 of a plain filter counts channels inside a group; dimension 0 of a transposed
        # one counts all of them.
        own = owned
        if dim == 0:
            own = [[i - part * channels for i in u if i // channels == part] for u in owned]
        if any(own):
            yield _ConvolutionMap(name, module, dim, own, has_bias, windows, part)


def _has_bias(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a bias can be written to: nothing computes it, and no other module has it."""
    bias = getattr(module, name, None)
    owners = (p for other in model.modules() for p in other.parameters(recurse=False))
    return isinstance(bias, nn.Parameter) and sum(p is bias for p in owners) == 1
