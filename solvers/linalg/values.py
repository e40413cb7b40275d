"""Numbers that callers hand over: read from any type, and refused where they are none of use."""

from __future__ import annotations

import math
import operator
import reprlib
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import ProblemError

_LARGEST, _SMALLEST = 1e100, 1e-100
"""Products of two numbers within these stay far from overflow and from underflow."""


def as_tensor(name: str, value: Any) -> Tensor:
    """Return numbers as a dense tensor without gradient; arrays are copied, tensors are not.

    Raises ProblemError if they are no numbers, are complex, or are on a device that holds none.
    """
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.array(value, order="C"))
        except (TypeError, ValueError) as error:
            kind = getattr(value, "dtype", type(value).__name__)
            raise ProblemError(f"{name} must be a tensor of numbers, not of {kind}") from error
    if value.is_complex() or value.is_meta or value.is_quantized or value.is_nested:
        raise ProblemError(f"{name} must hold real numbers, not {value.dtype} on {value.device}")
    tensor: Tensor = value.detach()
    return (tensor if tensor.layout is torch.strided else tensor.to_dense()).as_subclass(Tensor)


def as_owned_tensor(name: str, value: Any) -> Tensor:
    """Return numbers as `as_tensor` does, in memory that nobody else can write to."""
    tensor = as_tensor(name, value)
    shared = isinstance(value, Tensor) and value.layout is torch.strided
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor


def as_number(name: str, value: Any) -> float:
    """Return a real number, also of an array or tensor without dimensions, as a float.

    Raises ProblemError if it is none.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ProblemError(f"{name} is {reprlib.repr(value)}; it must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ProblemError(f"{name} has more digits than a number may have: {error}") from error


def as_integer(value: Any) -> int | None:
    """Return a whole number of any type but bool as an int, or None if it is none."""
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, Tensor) and value.dtype is torch.bool
    ):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_entries(name: str, matrix: Tensor) -> None:
    """Refuse entries that are not finite, or whose products would not be."""
    # One pass without a copy; NaN comes out of it as NaN.
    low, high = (float(end) for end in torch.aminmax(matrix))
    largest = max(abs(low), abs(high))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ProblemError(f"{name} has NaN or infinite entries; check weights and activations")
    if largest > _LARGEST:
        raise ProblemError(
            f"{name} has entries up to {largest:.3g}, whose products overflow; scale the data"
        )


def check_energy(e: float) -> None:
    """Refuse a mean squared norm that cannot be one."""
    if not math.isfinite(e) or e < 0:
        raise ProblemError(f"e is {e}; a mean squared norm is finite and not negative")
    if e > _LARGEST or 0 < e < _SMALLEST:
        raise ProblemError(f"e is {e:.3g}, whose products overflow or vanish; scale the data")


def check_diagonal(diagonal: Tensor) -> None:
    """Refuse a diagonal of H, (p,), that is not positive."""
    least = float(diagonal.min())
    if least < _SMALLEST:
        raise ProblemError(
            f"H has {least:.3g} on its diagonal (row {int(diagonal.argmin())}) and must be "
            f"positive definite, with no less than {_SMALLEST:g} there: build it with from_gram "
            "and damp > 0, or scale the data"
        )
