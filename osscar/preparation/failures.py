"""Models that fail on their data, or whose outputs these do not decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from graph.tracing.export import CAPTURE_HINT, failing_module, first_lines, is_of_capture
from osscar.base.errors import DataError, ModelError, OsscarError
from osscar.base.memory import FOR_BATCHES, is_shortage, shortage
from osscar.network.model_state import model_state
from osscar.proof.equivalence import Inputs, call, comparable, distance, rounding

_ROUNDING = 1e-3
"""How far apart two passes may be, relative to the largest output: kernels that add up in no fixed
order round differently, and so do layers that were replaced in between."""


@contextmanager
def failures_named(model: nn.Module, data: Mapping[str, Tensor] | int) -> Iterator[None]:
    """Name the failure of a model in the block on `data`: its arguments, or the number of a batch.

    Raises a DataError; a ModelError where `torch.cond` and the like capture what they call, as no
    modules can be watched in there; a NoMemoryError where memory for a batch is missing.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        found = f"{type(error).__name__}: {error}"
        if isinstance(data, int):
            where = f"calibration batch {data}"
            module = failing_module(error.__traceback__, model) or "the model"
            if is_shortage(error):
                raise shortage(error, f"{where} in {module!r}", FOR_BATCHES) from error
            found = f"{where} fails in {module!r}: {found}; leave it out, or mend the model"
        elif is_shortage(error):
            raise
        else:
            forms = ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in data.items())
            found = (
                f"{type(model).__name__} fails on the data ({forms}): {found}; give data of the "
                "form and type that it reads"
            )
        if is_of_capture(error):
            raise ModelError(
                f"{type(model).__name__} cannot be measured: {first_lines(error)}. {CAPTURE_HINT}"
            ) from error
        raise DataError(found) from error


def check_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Run a model twice, and refuse it where outputs differ (ModelError); it is left as it was."""
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
    """Refuse a model of which two passes over the same inputs differ beyond rounding (ModelError).

    Where they do, two more decide, as it may have been prepared in between.
    """
    if _alike(first, second):
        return
    first, second = (comparable(call(model, inputs)) for _ in range(2))
    if _alike(first, second):
        return
    apart = distance(first, second)
    by = f" by {apart:.2g} of the largest output" if math.isfinite(apart) else ""
    raise ModelError(
        f"two passes of {type(model).__name__} over the same inputs differ{by}, so it "
        "cannot be measured; let it draw random numbers only in training, as "
        "F.dropout(x, p, training=self.training) does"
    )


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return distance(first, second) <= max(_ROUNDING, rounding(first))
