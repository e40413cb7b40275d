"""Models that a user's own code builds: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import random
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from osscar.base.errors import DataError, ModelError, OptionError, warn
from osscar.data.batches import Batch, named_example
from osscar.data.preprocessing import AnyPreprocessing, as_preprocessing
from osscar.models.preprocessing import image_of
from osscar.network.modules import in_evaluation, uncompiled
from solvers.own_code import blamed, importable, imported

_Built: TypeAlias = tuple[nn.Module, Batch | None, AnyPreprocessing | None]
"""A model in evaluation mode; its example inputs, and what is done to an image, if code says so."""

_RETURNS = (
    "return a torch.nn.Module, or (model, example inputs), or (model, example inputs, transform)"
)


def build(name: str) -> _Built:
    """Import a function, call it, and return the model with what else it may give.

    The function of ``package.module:function`` or ``path/file.py:function`` takes no arguments and
    returns a model; or a model and example inputs (a tensor, a tuple, or a mapping); or these and
    what is done to an image (see `as_preprocessing`), where the example inputs may be None.  What
    was compiled runs as before.
    """
    with importable(name):
        found = imported(name, ModelError)
        if not callable(found):
            place, _, function = name.rpartition(":")
            raise ModelError(f"{place!r} has no function {function!r}")
        with blamed(name, ModelError):
            built = found()
    several = isinstance(built, tuple) and len(built) in (2, 3)
    model, example, transform = (*built, None, None)[:3] if several else (built, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; {_RETURNS}")
    try:
        named = None if example is None else named_example(model, example)
        image = None if named is None else image_of(named)
        channels = 3 if image is None else image.shape[1]
        known = None if transform is None else as_preprocessing(transform, name, channels)
    except (DataError, OptionError) as error:
        raise ModelError(f"{name} returned what does not fit: {error}; {_RETURNS}") from error
    return in_evaluation(uncompiled(model)), named, known


# ---- whether it loads its weights --------------------------------------------------------


def drawn_share(name: str, model: nn.Module) -> float:
    """Return the share of a model's parameters that its code draws, from 0 to 1; warn of any.

    The code is called once more: what it loads is the same again, and what it draws is not.  The
    generators of this process stay as they were.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        others = dict(build(name)[0].named_parameters())
    except (ModelError, RuntimeError, MemoryError) as error:  # there may be room for one alone
        warn(
            f"whether {name} loads its weights cannot be told, since it cannot be called again: "
            f"{error}"
        )
        return 0.0
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    total = drawn = 0
    for key, mine in model.named_parameters():
        other, number = others.get(key), mine.numel()
        alike = other is not None and other.shape == mine.shape
        total += number
        drawn += int(torch.ne(mine, other).sum()) if alike and other is not None else number
    share = drawn / total if total else 0.0
    if share:
        percent = f"{share:.0%}" if share >= 0.01 else "less than 1%"
        warn(
            f"{name} returns freshly initialized weights: {percent} of its parameters "
            "differ from one call to the next; give a file (weights, `--weights FILE`), or "
            "load them in the function"
        )
    return share
