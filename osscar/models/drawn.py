"""Whether code that builds a model loads its weights, or leaves them as they are drawn."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from osscar.base.errors import ModelError
from osscar.models import user_code


def drawn_share(name: str, model: nn.Module) -> float:
    """Return the share of a model's parameters that its code draws, from 0 to 1; warn of any.

    The code is called once more: what it loads is the same again, and what it draws is not.

    Parameters
    ----------
    name
        Of the code, as `osscar.models.user_code.build` takes it.
    model
        What it has returned.
    """
    try:
        with _draws_restored():
            share = _differing(model, user_code.build(name)[0])
    except ModelError as error:
        warnings.warn(
            f"whether {name} loads its weights cannot be told, since it cannot be called again: "
            f"{error}",
            stacklevel=3,
        )
        return 0.0
    if share:
        warnings.warn(
            f"{name} returns freshly initialized weights: {_percent(share)} of its parameters "
            "differ from one call to the next; give --weights FILE (weights= in Python), or load "
            "them in the function",
            stacklevel=3,
        )
    return share


def _differing(model: nn.Module, other: nn.Module) -> float:
    """Return the share of a model's parameters that another has not, or not with that value."""
    theirs = dict(other.named_parameters())
    total = differing = 0
    for name, mine in model.named_parameters():
        tensor = theirs.get(name)
        total += mine.numel()
        if tensor is None or tensor.shape != mine.shape:
            differing += mine.numel()
        else:
            differing += int(torch.ne(mine, tensor).sum())
    return differing / total if total else 0.0


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


@contextmanager
def _draws_restored() -> Iterator[None]:
    """Leave the generators of this process as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
