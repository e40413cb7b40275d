"""Models that a user's own code builds: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from osscar.errors import CalibrationError, ModelError, ModelNotFound
from osscar.inputs import Batch, named_inputs


def is_code(name: str) -> bool:
    """Tell whether a model's name stands for a function; no id of a hub has a colon."""
    place, colon, function = name.rpartition(":")
    return bool(colon and place) and function.isidentifier() and not Path(name).exists()


def build(name: str) -> tuple[nn.Module, Batch | None]:
    """Import a function, call it, and return the model with the example inputs that it may give.

    Parameters
    ----------
    name
        ``package.module:function`` or ``path/file.py:function``.  The function takes no arguments
        and returns a model, or a model and example inputs (a tensor, a tuple, or a mapping).

    Raises
    ------
    ModelNotFound
        If there is no such file, module or function.
    ModelError
        If the code fails, or returns something else.
    """
    place, _, function = name.rpartition(":")
    found = getattr(_module(place), function, None)
    if not callable(found):
        raise ModelNotFound(f"{place!r} has no function {function!r}")
    try:
        built = found()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}") from error
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned a {type(model).__name__}; return a torch.nn.Module, or one with "
            "example inputs"
        )
    return model.eval(), None if example is None else _named(model, example, name)


def _named(model: nn.Module, example: Any, name: str) -> Batch:
    args = (example,) if isinstance(example, Tensor) else example
    tensors = list(args.values() if isinstance(args, Mapping) else args)
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ModelError(f"the example inputs of {name} are not all tensors")
    if isinstance(args, Mapping):
        return dict(args)
    try:
        return named_inputs(model, args)
    except CalibrationError as error:
        raise ModelError(f"the example inputs of {name} do not fit: {error}") from error


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ModelNotFound(
                f"cannot import {place!r}: {error}; give module:function or path/file.py:function"
            ) from error
    path = Path(place).expanduser()
    if not path.is_file():
        raise ModelNotFound(f"there is no file {place!r}")
    spec = importlib.util.spec_from_file_location(f"osscar_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{place} failed: {type(error).__name__}: {error}") from error
    return module
