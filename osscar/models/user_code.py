"""Models that a user's own code builds: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from osscar.base.errors import ModelError, of_part
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
    """Import and call a function; return its model, with example inputs and transform if any."""
    with importable(name):
        found = imported(name, ModelError)
        with blamed(name, ModelError):
            built = found()
    several = isinstance(built, tuple) and len(built) in (2, 3)
    model, example, transform = (*built, None, None)[:3] if several else (built, None, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned a {type(model).__name__}; {_RETURNS}")
    with of_part(f"what {name} returned"):
        named = None if example is None else named_example(model, example)
    image = None if named is None else image_of(named)
    channels = 3 if image is None else image.shape[1]
    known = None if transform is None else as_preprocessing(transform, name, channels)
    return in_evaluation(uncompiled(model)), named, known
