"""A consumer as a matrix: what a module reads, and the weights it reads it with.

Every consumer is seen as ``Y = X W``: rows of X are positions, columns of X and rows of W are the
inputs that belong to one coupling group, ordered as they lie in the weight tensor.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graph.groups import Slot
from osscar.base.errors import NonFiniteError
from osscar.offload.on_disk import written


@dataclass(frozen=True, eq=False)
class LinearMap(abc.ABC):
    """One consumer of a coupling group.

    Parameters
    ----------
    name
        Qualified name of the module.
    module
        The module whose inputs are observed.
    slots
        The slots of the group in the module's weight.
    inputs
        The input features or channels, int64 in ascending order, that the group owns.
    has_bias
        Whether it has a bias that it shares with no other module.
    """

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    inputs: Tensor
    has_bias: bool

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.name

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        return "weight", "bias"

    @property
    def taps(self) -> int:
        """How many rows of W one input owns."""
        return 1

    @property
    def rows(self) -> int:
        """The number p of rows of W."""
        return len(self.inputs) * self.taps

    @property
    def outputs(self) -> int:
        """The number m of columns of W."""
        return int(self._view(self._weight).shape[1])

    @property
    def unit_rows(self) -> list[list[int]]:
        """The rows of `read_weight` that each unit owns."""
        position = {feature: row for row, feature in enumerate(self.inputs.tolist())}
        return [
            [
                position[i] * self.taps + tap
                for slot in self.slots
                for i in self._own(slot.indices([unit]))
                for tap in range(self.taps)
            ]
            for unit in range(self.slots[0].units)
        ]

    def _own(self, indices: Sequence[int]) -> list[int]:
        """Return which inputs stand behind indices along the slots' dimension."""
        return list(indices)

    @abc.abstractmethod
    def read_inputs(self, x: Any) -> Iterator[Tensor]:
        """Yield X, (positions, p), piece by piece, from what the module is called with."""

    @abc.abstractmethod
    def read_outputs(self, y: Tensor, x: Any) -> Tensor:
        """Return Y, (positions, m), of all positions in the order of `read_inputs`.

        Parameters
        ----------
        y
            In the shape in which the module puts it out.
        x
            What the module is called with.
        """

    def read_corrections(self, D: Tensor, x: Any) -> Tensor:
        """Return by how much Y is to change, (positions, m), for the module's output to do so.

        Parameters
        ----------
        D
            In the shape in which the module puts it out.
        x
            What the module is called with.
        """
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

    def write_weight(self, W: Tensor) -> None:
        """Replace the group's part of the weight by W, (p, m)."""
        with written(self.module, self.parameters[0]) as weight:
            view = self._view(weight)
            W = W.to(view)
            if not bool(torch.isfinite(W).all()):
                raise NonFiniteError(
                    f"the refitted weights of {self.label!r} overflow {view.dtype}; "
                    "use --dtype float32 or bfloat16, or raise --damp"
                )
            if view.ndim > 2:
                W = W.view(-1, self.taps, W.shape[1]).mT.reshape(-1, *view.shape[1:])
            view[self.inputs.to(view.device)] = W

    def read_bias(self) -> Tensor:
        """Return the bias of the outputs, (m,), a float64 copy; only where it `has_bias`."""
        bias = getattr(self.module, self.parameters[1])
        assert isinstance(bias, Tensor)
        return self._bias_view(bias.detach()).to(torch.float64, copy=True)

    def write_bias(self, bias: Tensor) -> None:
        """Replace the bias of the outputs, (m,).

        Raises
        ------
        NonFiniteError
            If it overflows the module's number format.
        """
        with written(self.module, self.parameters[1]) as whole:
            view = self._bias_view(whole)
            bias = bias.to(view)
            if not bool(torch.isfinite(bias).all()):
                raise NonFiniteError(
                    f"the refitted bias of {self.label!r} overflows {view.dtype}; "
                    "use --dtype float32 or bfloat16, or raise --damp"
                )
            view.copy_(bias)

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
