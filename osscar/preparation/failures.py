"""Models that fail on their data, whose outputs these do not decide, or not sample by sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from graph.tracing.export import CAPTURE_HINT, failing_module, first_lines, is_of_capture
from osscar.base.errors import DataError, ModelError, OsscarError
from osscar.base.memory import FOR_BATCHES, is_shortage, shortage
from osscar.data.batches import INDICES, ModelInputs
from osscar.data.reader import Batch
from osscar.network.model_state import model_state
from osscar.proof.equivalence import (
    Inputs,
    call,
    comparable,
    computes,
    distance,
    outputs_or_none,
    rounding,
)

_ROUNDING = 1e-3
"""How far apart two passes may be, relative to the largest output: kernels that add up in no fixed
order round differently, and so do layers that were replaced in between."""


@contextmanager
def failures_named(
    model: nn.Module, data: Mapping[str, Tensor] | int, source: str = "the data"
) -> Iterator[None]:
    """Name the failure of a model in the block on `data`: its arguments, or the number of a batch.

    Arguments are of all samples or of some; `source` says where they come from.  Raises a
    DataError; a ModelError where `torch.cond` and the like capture what they call, as no modules
    can be watched in there; a NoMemoryError where memory for a batch is missing.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        name, kind = failing_module(error.__traceback__, model), type(model).__name__
        where = f"calibration batch {data} in {name or 'the model'!r}"
        if is_shortage(error):
            if isinstance(data, int):
                raise shortage(error, where, FOR_BATCHES) from error
            raise
        if is_of_capture(error):
            raise ModelError(
                f"{kind} cannot be measured: {first_lines(error)}. {CAPTURE_HINT}"
            ) from error
        why = f"{type(error).__name__}: {first_lines(error).removesuffix('.')}"
        if isinstance(data, int):
            where = f"calibration batch {data} fails in {name or 'the model'!r}"
            raise DataError(f"{where}: {why}; leave it out, or mend the model") from error
        forms = ", ".join(f"{argument} ({_form(tensor)})" for argument, tensor in data.items())
        module = model.get_submodule(name)
        layer = type(module).__name__ if any(module.children()) else f"{module!r:.80}"
        place = f" in {name!r} ({layer})" if name else ""
        raise DataError(
            f"{source}: {kind} fails on {forms}{place}: {why}; give data of the form, type and "
            "range that it reads"
        ) from error


def _form(tensor: Tensor) -> str:
    """Return number format and shape, and the range of what may be an index."""
    form = f"{str(tensor.dtype).removeprefix('torch.')}, {' x '.join(map(str, tensor.shape))}"
    if tensor.dtype in INDICES:
        form += f", {int(tensor.min())} to {int(tensor.max())}"
    return form


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


# ---- samples that run together -----------------------------------------------------------


def together(model: nn.Module, inputs: ModelInputs) -> ModelInputs:
    """Let samples of sizes of their own run together where their shapes are equal.

    They can where the first dimension of each tensor of theirs has one entry, the sample, and the
    model returns for two of them what it does for each alone.  It is left as it was.
    """
    if not all(len(x) == 1 for one in inputs.apart for x in one.values()):
        return inputs
    joined = dataclasses.replace(inputs, together=bool(inputs.apart))
    return joined if joined.together and computes_alone(model, joined.two()) else inputs


def computes_alone(model: nn.Module, pair: Batch) -> bool:
    """Whether a model returns for each of two samples by itself what it does for both together."""
    with model_state(model):
        both = outputs_or_none(model, pair)
        rows = [slice(0, 1), slice(1, 2)]
        return all(
            computes(
                model,
                {name: x[row] for name, x in pair.items()},
                [x[row] if x.ndim else x for x in both],
            )
            for row in rows
        )
