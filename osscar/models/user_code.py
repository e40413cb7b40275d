"""Models that a user's own code builds: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from osscar.base.errors import CalibrationError, ModelError, ModelNotFound, OptionError
from osscar.data.batches import Batch, named_example
from osscar.data.preprocessing import AnyPreprocessing, as_preprocessing
from osscar.network.modules import in_evaluation


class _Built(NamedTuple):
    """What a user's function returned.

    Attributes
    ----------
    model
        In evaluation mode.
    example
        Its example inputs by name; None if there are none.
    preprocessing
        What is done to an image before the model sees it; None if the code does not say.
    """

    model: nn.Module
    example: Batch | None
    preprocessing: AnyPreprocessing | None


_RETURNS = (
    "return a torch.nn.Module, or (model, example inputs), or (model, example inputs, transform)"
)


def build(name: str) -> _Built:
    """Import a function, call it, and return the model with what else it may give.

    Parameters
    ----------
    name
        ``package.module:function`` or ``path/file.py:function``.  The function takes no arguments
        and returns a model; or a model and example inputs (a tensor, a tuple, or a mapping); or
        these and what is done to an image (see `osscar.data.preprocessing.as_preprocessing`), where
        the example inputs may be None.

    Raises
    ------
    ModelNotFound
        If there is no such file, module or function.
    ModelError
        If the code fails, or returns something else.
    """
    place, _, function = name.rpartition(":")
    with _importable(place):
        found = getattr(_module(place, function), function, None)
        if not callable(found):
            raise ModelNotFound(f"{place!r} has no function {function!r}")
        with _user_code(name):
            built = found()
    several = isinstance(built, tuple) and len(built) in (2, 3)
    model, example, transform = (*built, None, None)[:3] if several else (built, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; {_RETURNS}")
    try:
        preprocessing = None if transform is None else as_preprocessing(transform, name)
    except OptionError as error:
        raise ModelError(str(error)) from error
    return _Built(
        in_evaluation(model),
        None if example is None else _named(model, example, name),
        preprocessing,
    )


def _named(model: nn.Module, example: Any, name: str) -> Batch:
    try:
        return named_example(model, example)
    except CalibrationError as error:
        raise ModelError(
            f"{name} returned example inputs that do not fit: {error} (what is done to an image is "
            "its third value)"
        ) from error


def _module(place: str, function: str) -> ModuleType:
    if not place.endswith(".py"):
        return _installed(place, function)
    path = Path(place).expanduser()
    if not path.is_file():
        raise ModelNotFound(f"there is no file {place!r}")
    spec = importlib.util.spec_from_file_location(f"osscar_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _user_code(place):
        spec.loader.exec_module(module)
    return module


def _installed(place: str, function: str) -> ModuleType:
    """Import a module by name."""
    if not all(part.isidentifier() for part in place.split(".")):
        file = f"{place}.py" if "/" in place else f"{place.lstrip('.')}.py"
        raise ModelNotFound(
            f"{place!r} is not the name of a module; for a file give {file}:{function}"
        )
    try:
        with _user_code(place):
            return importlib.import_module(place)
    except ModelError as error:
        cause = error.__cause__
        # What its own code fails to import is another matter than the module itself.
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise ModelNotFound(
                f"cannot import {place!r}: {cause}; give module:function or path/file.py:function"
            ) from cause
        raise


@contextmanager
def _importable(place: str) -> Iterator[None]:
    """Let code find what lies in the current directory and beside its file, as Python would."""
    added = [str(Path.cwd())]
    if place.endswith(".py"):
        added.insert(0, str(Path(place).expanduser().absolute().parent))
    before = list(sys.path)
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _user_code(name: str) -> Iterator[None]:
    """Turn whatever the user's code raises into an error that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:  # it may raise anything, and scripts like to exit
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{name} failed: {reason}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """Return the line of the user's own code that an error comes from."""
    if isinstance(error, SyntaxError):
        return ""  # its message has the line
    libraries = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename
    ]
    return f" (line {own[-1].lineno} of {own[-1].filename}: {own[-1].line})" if own else ""
