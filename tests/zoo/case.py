"""What is covered: a model with random weights that all matter, and inputs of two sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


class NotBuilt(Exception):
    """There is no model to cover: what was to build it does not, or it does not run."""

    @classmethod
    def of(cls, error: Exception) -> NotBuilt:
        """Say in a line what was raised."""
        text = " ".join(str(error).split()) or "no reason given"
        return cls(f"{type(error).__name__}: {text:.200}")


@dataclass(frozen=True, eq=False)
class Made:
    """A model in evaluation mode, two inputs that it runs on, and which of its family it is.

    The second inputs differ in batch, and in length or resolution where the model allows.
    """

    model: nn.Module
    inputs: list[Inputs]
    variant: str = ""


def alive(model: nn.Module) -> None:
    """Let every weight matter, and every output depend on it: nothing zero, nothing tiny."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
            else:
                parameter.mul_(4)


def first_that_runs(model: nn.Module, candidates: Iterable[list[Inputs]]) -> list[Inputs]:
    """Return the first inputs on which a model runs and puts out finite numbers.

    Raises NotBuilt if it runs on none, with what the first have raised.
    """
    first: NotBuilt | None = None
    for inputs in candidates:
        try:
            for one in inputs:
                _check_finite(_called(model, one))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a candidate that does not fit, of code of any library
            first = first or NotBuilt.of(error)
        else:
            return inputs
    raise first or NotBuilt("there are no inputs to try")


def _called(model: nn.Module, inputs: Inputs) -> object:
    with torch.no_grad():
        if not isinstance(inputs, dict):
            return model(*inputs)
        has_cache = "use_cache" in inspect.signature(model.forward).parameters
        return model(**inputs, **({"use_cache": False} if has_cache else {}))


def _check_finite(outputs: object) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not tensors or not bool(tensors[0].isfinite().any()):
        raise NotBuilt("it puts out no finite number")


LARGEST = 60_000_000
"""Parameters that a model may have; larger ones take too long for what they show."""


def check_size(model: nn.Module, largest: int = LARGEST) -> None:
    """Refuse a model that is too large."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > largest:
        raise NotBuilt(f"it has {count:,} parameters, more than the {largest:,} that are tried")
