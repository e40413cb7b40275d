"""A consumer as a matrix: what a weight is multiplied with, and the weight.

Every consumer is seen as ``Y = X W``: rows of X are positions, columns of X and rows of W are the
inputs that belong to one coupling group, ordered as they lie in the weight tensor.  A convolution
has one row of W for each channel and tap of its kernel.  X is made by `osscar.consumers.layers`,
`products`, or `mixtures`.

Inputs beside these, as of ``cat([x, units])``, are *fixed*: they stay, whatever leaves the group,
and can be refitted with the units that stay.  Their rows then come before those of the units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from osscar.base.errors import NonFiniteError
from osscar.consumers.layers import layer_of, positions
from osscar.consumers.mixtures import Mixture
from osscar.consumers.products import Contraction, Taken
from osscar.offload.on_disk import written
from osscar.routing.routed import Routed

MOST_ROWS = 4096
"""Rows of a consumer whose fixed inputs are refitted: with more, these keep their weights."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One consumer of a coupling group."""

    name: str
    """The module, or the weight of products (`Station`), that is observed."""
    module: nn.Module
    """The module that has the weight."""
    weight: str
    """The name of the weight in the module."""
    bias: str | None
    """The name of the bias; None without one, or where other modules share it."""
    dim: int
    """The dimension of the weight in which inputs lie."""
    form: Contraction
    owned: Sequence[Sequence[int]]
    """The input features or channels that each unit of the group owns; of a convolution in groups,
    counted inside of a group."""
    part: int = 0
    """Which group of a convolution, or direction of a recurrent layer.  Outputs of one group depend
    on no other group's inputs, so that each is a linear map of its own."""

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.name

    @property
    def holder(self) -> str:
        """What holds the tensors that are refitted, by the name of `products.holder`."""
        return self.name

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of what a refit writes to."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def taps(self) -> int:
        """How many rows of W one input owns."""
        return math.prod(self._others)

    @property
    def _others(self) -> tuple[int, ...]:
        """The sizes of what is summed over beside inputs, such as the kernel of a convolution."""
        shape = self._weight.shape
        return tuple(shape[dim] for dim in self.form.summed if dim != self.dim)

    @cached_property
    def beside(self) -> tuple[int, ...]:
        """The inputs that no unit owns, in ascending order."""
        owned = {index for unit in self.owned for index in unit}
        return tuple(index for index in range(self._shape[0]) if index not in owned)

    @cached_property
    def inputs(self) -> Tensor:
        """The inputs that are refitted, int64, in order: fixed ones, then those that units own."""
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
        """The shape of `_view`; a weight that lies on disk is not read for it."""
        return self._view(torch.empty(self._weight.shape, device="meta")).shape

    @cached_property
    def unit_rows(self) -> Tensor:
        """The rows of `read_weight` that each unit owns, (units, rows) int64."""
        first = self.fixed // self.taps
        places = first + torch.searchsorted(self.inputs[first:], torch.tensor(self.owned))
        return (places[:, :, None] * self.taps + torch.arange(self.taps)).flatten(1)

    # ---- what it reads -------------------------------------------------------------------

    def read_inputs(self, x: Any) -> Iterator[Tensor]:
        """Yield X, (positions, p), piece by piece, from what the module is called with."""
        if isinstance(x, Taken):
            picking = self._picking().to(x.multiplied)
            for some in x.split(self.rows):
                yield self._columns(some.picked(picking), self.rows)
            return
        layer = layer_of(self.module)
        assert layer is not None
        whole = not self.beside and self.form.groups == 1
        inputs = None if whole else self.inputs + self.part % self.form.groups * self._shape[0]
        yield from layer.read(self.module, x, inputs)

    def read_corrections(self, D: Tensor, x: Any) -> Tensor:
        """Return the corrections of Y, (positions, m), given those of the module's outputs."""
        return self._columns(D, self.outputs)

    def passed_over(self, x: Any) -> int:
        """Return at how many further positions of a call it reads nothing and adds nothing."""
        return 0

    def _columns(self, y: Tensor, count: int) -> Tensor:
        """Return so many numbers that this part returns, (positions, count)."""
        if not y.is_nested:
            places = self.form.places
            y = y.movedim(places, tuple(range(-len(places), 0))).flatten(-len(places))
        return positions(y).narrow(1, self.part * count, count)

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

    # ---- its weight ----------------------------------------------------------------------

    def _view(self, weight: Tensor) -> Tensor:
        """Return a view of the weight, (all inputs, m) or (all inputs, m, *kernel)."""
        made, others = self.form.made, [dim for dim in self.form.summed if dim != self.dim]
        own = self._of_group(weight)
        return own.permute(self.dim, *made, *others).flatten(1, len(made))

    def _of_group(self, tensor: Tensor) -> Tensor:
        """Return a view of what the group of a convolution has of the weight or the bias."""
        if self.form.groups == 1:
            return tensor
        count = len(tensor) // self.form.groups
        return tensor.narrow(0, self.part * count, count)

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        view = self._view(self._weight)
        part = view[self.inputs.to(view.device)].double()
        return self._ordered(part.flatten(2).mT.flatten(0, 1) if part.ndim > 2 else part)

    def read_unit_weight(self) -> Tensor:
        """Return W with zeros for fixed rows, which count by how much they change."""
        W = self.read_weight()
        W[: self.fixed] = 0
        return W

    @property
    def vacant(self) -> Tensor:
        """The fixed rows, (p,) bool, that are to stay zero: those of units that have left."""
        found = ~self.read_weight().any(1)
        found[self.fixed :] = False
        return found

    def write_weight(self, W: Tensor) -> None:
        """Replace what is refitted of the weight by W, (p, m)."""
        with written(self.module, self.weight) as weight:
            view = self._view(weight)
            W = self._fitting(self._ordered(W), view, "weights")
            if view.ndim > 2:
                W = W.view(-1, self.taps, W.shape[1]).mT.reshape(-1, *view.shape[1:])
            view[self.inputs.to(view.device)] = W

    def _ordered(self, W: Tensor) -> Tensor:
        """Turn taps round where the weight has them in the other order than X."""
        if not self.form.flipped:
            return W
        return W.view(-1, self.taps, W.shape[1]).flip(1).flatten(0, 1)

    def read_bias(self) -> Tensor:
        """Return the bias of the outputs, (m,), a float64 copy."""
        assert self.bias is not None
        bias: Tensor = getattr(self.module, self.bias)
        return self._of_group(bias.detach()).to(torch.float64, copy=True)

    def write_bias(self, bias: Tensor) -> None:
        """Replace the bias of the outputs, (m,), as `write_weight` does the weight."""
        assert self.bias is not None
        with written(self.module, self.bias) as whole:
            view = self._of_group(whole)
            view.copy_(self._fitting(bias, view, "bias"))

    def _fitting(self, values: Tensor, like: Tensor, what: str) -> Tensor:
        values = values.to(like)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"the refitted {what} of {self.label!r} overflow {like.dtype}; "
                "use dtype float32 (`--dtype float32`) or bfloat16, or raise damp (`--set damp=1`)"
            )
        return values

    def read(self) -> list[Tensor]:
        """Return copies of the weight and the bias, if any, in the number format of the weight."""
        read = [self.read_weight(), *([] if self.bias is None else [self.read_bias()])]
        return [tensor.to(self._weight.dtype) for tensor in read]

    def write(self, tensors: Iterator[Tensor]) -> None:
        """Replace what `read` returns, by the next of some tensors."""
        self.write_weight(next(tensors).double())
        if self.bias is not None:
            self.write_bias(next(tensors).double())

    @property
    def _weight(self) -> Tensor:
        """The weight itself, outside of autograd."""
        weight: Tensor = getattr(self.module, self.weight)
        return weight.detach()


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertMap(LinearMap):
    """What one expert adds to the output of a mixture, which is called with what is `Routed`.

    Its inputs are multiplied with the weight of the token at this expert, so that what it returns
    is its term of the mixture's sum.  `dim` and `form` are of the matrix of one expert.
    """

    mixture: Mixture
    expert: int

    @property
    def label(self) -> str:
        """The module and the expert."""
        return f"{self.name}[{self.expert}]"

    @property
    def holder(self) -> str:
        """What holds the matrix of this expert."""
        return self.mixture.holder(self.expert)

    def read_inputs(self, x: Routed) -> Iterator[Tensor]:
        """Yield the tokens that are sent to this expert."""
        X = self.mixture.visits(x).X[self._here(x)]
        yield X[:, self.inputs.to(X.device)] if self.beside else X

    def read_corrections(self, D: Tensor, x: Routed) -> Tensor:
        """Return the part of the corrections for these tokens that falls to this expert."""
        visits, here = self.mixture.visits(x), self._here(x)
        return D.detach()[visits.token[here]].double() * visits.share[here, None]

    def passed_over(self, x: Routed) -> int:
        """Return how many tokens are sent to others."""
        return len(x.hidden) - len(set(self.mixture.visits(x).token[self._here(x)].tolist()))

    def _here(self, x: Routed) -> Tensor:
        return self.mixture.visits(x).expert == self.expert

    def _view(self, weight: Tensor) -> Tensor:
        return super()._view(weight[self.expert] if weight.ndim == 3 else weight)
