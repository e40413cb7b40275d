"""One fixed input of a model, and a few numbers of what it returns: whether it is still the same.

The input is made from its form alone, by a formula, so that every machine makes the same one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from osscar.base.devices import NUMBERS

_GOLDEN = (math.sqrt(5) - 1) / 2

_MOST = 2**26
"""The most that an input has."""

_VALUES, _OUTPUTS = 32, 16
"""How many numbers of an output are recorded, and of how many outputs: 10 kB at most."""

_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Root mean square of differences, relative to that of the output, in the format that is computed
in; 5e-3 in float32 and float64, where kernels of two machines differ by 1e-6 for most networks, and
by 1e-3 for those of many layers."""


@dataclass(frozen=True)
class Drawn:
    """A tensor that an input consists of: number k of n is ``low + (high - low) frac(k phi)``.

    Whole numbers are rounded down, and `high` is among them.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float

    @classmethod
    def like(cls, tensor: Tensor) -> Drawn:
        """Return the form of a tensor: its shape, number format and range."""
        values = tensor.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, float(values.min()), float(values.max()))

    def tensor(self) -> Tensor:
        """Make it."""
        kind = NUMBERS[self.dtype]
        whole = not kind.is_floating_point
        count = torch.arange(1, math.prod(self.shape) + 1, dtype=torch.float64)
        share = (count * _GOLDEN).frac()
        values = self.low + (self.high - self.low + whole) * share
        return (values.floor() if whole else values).to(kind).reshape(self.shape)


@dataclass(frozen=True)
class Output:
    """A few numbers of an output: at even distances, with None for what is infinite or NaN.

    `size` is the root mean square of all that are finite.
    """

    shape: tuple[int, ...]
    size: float
    values: tuple[float | None, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """Look at an output."""
        flat = tensor.detach().flatten()
        flat = (flat.abs() if flat.is_complex() else flat).to("cpu", torch.float64)
        finite = flat[flat.isfinite()]
        size = float(finite.square().mean().sqrt()) if len(finite) else 0.0
        places = torch.linspace(0, max(0, len(flat) - 1), min(_VALUES, len(flat))).long()
        numbers = flat[places].tolist()
        # Seven digits are what float32 has.
        return cls(
            tuple(tensor.shape),
            float(f"{size:.7g}"),
            tuple(float(f"{x:.7g}") if math.isfinite(x) else None for x in numbers),
        )

    def distance(self, other: Output) -> float:
        """Return the root mean square of differences over the larger size, or infinity."""
        finite = [[x is not None for x in one.values] for one in (self, other)]
        if self.shape != other.shape or finite[0] != finite[1]:
            return math.inf
        pairs = zip(self.values, other.values, strict=True)
        gaps = [x - y for x, y in pairs if x is not None and y is not None]
        size = max(self.size, other.size)
        return math.hypot(*gaps) / (math.sqrt(len(gaps)) * size) if gaps and size else 0.0


Argument: TypeAlias = Drawn | bool | int | float | None


@dataclass(frozen=True)
class Sample:
    """An input by the names of the arguments, and what a model returned on it when it was saved."""

    inputs: Mapping[str, Argument]
    outputs: tuple[Output, ...] = ()

    @classmethod
    def like(cls, inputs: Mapping[str, Any]) -> Sample | None:
        """Return the form of inputs; None if some are neither tensors nor numbers."""
        known: dict[str, Argument] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                plain = value.layout is torch.strided and not value.is_meta
                if kind not in NUMBERS or not plain or not 0 < value.numel() <= _MOST:
                    return None
                known[name] = Drawn.like(value)
            elif isinstance(value, bool | int | float | None):
                known[name] = value
            else:
                return None
        return cls(known)

    def drawn(self) -> dict[str, Any]:
        """Make the input, on the CPU."""
        return {n: x.tensor() if isinstance(x, Drawn) else x for n, x in self.inputs.items()}

    def with_outputs(self, outputs: Sequence[Tensor]) -> Sample:
        """Record what a model returns on it; nothing if none of it is finite."""
        found = tuple(map(Output.of, outputs[:_OUTPUTS]))
        some = any(x is not None for one in found for x in one.values)
        return dataclasses.replace(self, outputs=found if some else ())

    def distance(self, outputs: Sequence[Tensor]) -> float:
        """Return the largest `Output.distance` of outputs from those recorded."""
        found = tuple(map(Output.of, outputs[:_OUTPUTS]))
        if len(found) != len(self.outputs):
            return math.inf
        return max(map(Output.distance, self.outputs, found), default=0.0)


def tolerance(dtype: torch.dtype | None) -> float:
    """Return how far outputs may be apart that are computed in a number format."""
    return _TOLERANCE.get(dtype or torch.float32, 5e-3)
