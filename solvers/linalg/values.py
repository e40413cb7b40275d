"""Numbers that callers hand over, and refusals of those that no problem can be made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import ProblemError

_LARGEST, _SMALLEST = 1e100, 1e-100
"""Products of two numbers within these stay far from overflow and from underflow."""


def as_tensor(value: Any) -> Tensor:
    """Return an array, a list or a tensor as a tensor without gradient, copied or not."""
    # Lists of numbers are float64 to numpy, and float32 to torch.
    return (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).detach()


def as_owned(value: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers of one type in memory that nobody else can write to."""
    return as_tensor(value).to(dtype, copy=True).contiguous()


def check_entries(name: str, matrix: Tensor) -> None:
    """Refuse entries that are not finite, or whose products would not be."""
    # One pass without a copy; NaN comes out of it as NaN.
    largest = max(abs(float(end)) for end in torch.aminmax(matrix))
    if not largest <= _LARGEST:
        raise ProblemError(
            f"{name} has entries of {largest:.3g}; they must be finite and at most {_LARGEST:g}: "
            "check weights and activations, or scale the data"
        )


def check_energy(e: float) -> None:
    """Refuse a mean squared norm that cannot be one."""
    if not (e == 0 or _SMALLEST <= e <= _LARGEST):
        raise ProblemError(
            f"e is {e:.6g}; a mean squared norm is 0, or between {_SMALLEST:g} and {_LARGEST:g}: "
            "scale the data"
        )


def check_diagonal(diagonal: Tensor) -> None:
    """Refuse a diagonal of H, (p,), that is not positive."""
    least = float(diagonal.min())
    if least < _SMALLEST:
        raise ProblemError(
            f"H has {least:.3g} on its diagonal (row {int(diagonal.argmin())}) and must be "
            f"positive definite, with no less than {_SMALLEST:g} there: build it with from_gram "
            "and damp > 0, or scale the data"
        )
