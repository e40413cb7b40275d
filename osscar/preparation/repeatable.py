"""Models whose outputs are not decided by their inputs alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from osscar.base.errors import ModelError
from osscar.network.model_state import model_state
from osscar.proof.equivalence import Inputs, call, comparable, distance, rounding

_ROUNDING = 1e-3
"""How far apart two passes may be, relative to the largest output: kernels that add up in no fixed
order round differently, and so do layers that were replaced in between."""


def check_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Run a model twice, and refuse it where the outputs differ; it is left as it was.

    Raises
    ------
    ModelError
        If they differ.
    EquivalenceError
        If it puts out no tensor.
    """
    with model_state(model) as state:
        with state.watching():
            first = comparable(call(model, inputs))
        state.put_back()
        second = comparable(call(model, inputs))
        state.put_back()
        refuse_chance(model, inputs, first, second)


def refuse_chance(
    model: nn.Module, inputs: Inputs, first: Sequence[Tensor], second: Sequence[Tensor]
) -> None:
    """Refuse a model of which two passes over the same inputs put out what differs.

    Where they do it runs twice more, as it may have been prepared in between: only passes of what
    it is now tell.

    Raises
    ------
    ModelError
        If they differ by more than rounding.
    """
    if _alike(first, second):
        return
    first, second = (comparable(call(model, inputs)) for _ in range(2))
    if _alike(first, second):
        return
    apart = distance(first, second)
    by = f" by {apart:.2g} of the largest output" if math.isfinite(apart) else ""
    raise ModelError(
        f"two passes of {type(model).__name__} over the same inputs differ{by}, so that what is "
        "measured of it is chance; let it draw random numbers in training alone, as "
        "F.dropout(x, p, training=self.training) does"
    )


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return distance(first, second) <= max(_ROUNDING, rounding(first))
