"""Passes of calibration batches, and where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from graph.tracing.export import CAPTURE_HINT, failing_module, first_lines, is_of_capture
from osscar.base.errors import DataError, ModelError, OsscarError
from osscar.base.memory import FOR_BATCHES, is_shortage, let_shortage_pass, shortage


def batch_named(model: nn.Module, batch: int) -> AbstractContextManager[None]:
    """Say in which batch and in which module the block has failed.

    Raises
    ------
    DataError
        If it has.
    ModelError
        If the model's code cannot be run here, whatever the data are.
    NoMemoryError
        If that was for want of memory.
    """

    def said(error: Exception) -> str:
        name = failing_module(error.__traceback__, model) or "the model"
        if is_shortage(error):
            what = f"calibration batch {batch} in {name!r}"
            raise shortage(error, what, FOR_BATCHES) from error
        return (
            f"calibration batch {batch} fails in {name!r}: "
            f"{type(error).__name__}: {error}; leave it out, or mend the model"
        )

    return _failing(model, said)


def failures_named(model: nn.Module, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Say so where a model fails on its data in the block.

    Raises
    ------
    DataError
        If it does.
    ModelError
        If the model's code cannot be run here, whatever the data are.
    """

    def said(error: Exception) -> str:
        let_shortage_pass(error)
        forms = ", ".join(f"{n} {t.dtype} {tuple(t.shape)}" for n, t in batch.items())
        return (
            f"{type(model).__name__} fails on the data ({forms}): "
            f"{type(error).__name__}: {error}; give data of the form and type that it reads"
        )

    return _failing(model, said)


@contextmanager
def _failing(model: nn.Module, said: Callable[[Exception], str]) -> Iterator[None]:
    """Raise what is said of a failure, but where it is no fault of the data.

    What `torch.cond` and the like call is captured, and modules cannot be watched in there.
    """
    try:
        yield
    except OsscarError:
        raise
    except Exception as error:  # the model may be anyone's code
        message = said(error)
        if is_of_capture(error):
            raise ModelError(
                f"{type(model).__name__} cannot be measured: {first_lines(error)}. {CAPTURE_HINT}"
            ) from error
        raise DataError(message) from error
