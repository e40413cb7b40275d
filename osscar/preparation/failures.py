"""Passes of calibration batches, and where one fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from graph.tracing.export import CAPTURE_HINT, failing_module, first_lines, is_of_capture
from osscar.base.errors import CalibrationError, ModelError, OsscarError
from osscar.base.memory import FOR_BATCHES, is_shortage, let_shortage_pass, shortage


@contextmanager
def batch_named(model: nn.Module, batch: int) -> Iterator[None]:
    """Say in which batch and in which module the block has failed.

    Raises
    ------
    CalibrationError
        If it has.
    ModelError
        If the model's code cannot be run here, whatever the data are.
    NoMemoryError
        If that was for want of memory.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        name = failing_module(error.__traceback__, model) or "the model"
        if is_shortage(error):
            what = f"calibration batch {batch} in {name!r}"
            raise shortage(error, what, FOR_BATCHES) from error
        refuse_capture(error, model)
        raise CalibrationError(
            f"calibration batch {batch} fails in {name!r}: "
            f"{type(error).__name__}: {error}; leave it out, or mend the model"
        ) from error


@contextmanager
def failures_named(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Say so where a model fails on its data in the block.

    Raises
    ------
    CalibrationError
        If it does.
    ModelError
        If the model's code cannot be run here, whatever the data are.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        refuse_capture(error, model)
        forms = ", ".join(f"{n} {t.dtype} {tuple(t.shape)}" for n, t in batch.items())
        raise CalibrationError(
            f"{type(model).__name__} fails on the calibration data ({forms}): "
            f"{type(error).__name__}: {error}; give data of the form and type that it reads"
        ) from error


def refuse_capture(error: Exception, model: nn.Module) -> None:
    """Say so where it is no fault of the data that a model fails.

    What `torch.cond` and the like call is captured, and modules cannot be watched in there.

    Raises
    ------
    ModelError
        If that is why.
    """
    if is_of_capture(error):
        raise ModelError(
            f"{type(model).__name__} cannot be measured: {first_lines(error)}. {CAPTURE_HINT}"
        ) from error
