"""Models whose outputs are not decided by their inputs alone, and the module where that begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError
from osscar.network.hooks import hooks
from osscar.network.model_state import model_state
from osscar.shrinking.equivalence import Inputs, call, comparable, distance, rounding

_ROUNDING = 1e-3
"""How far apart two passes may be, relative to the largest output: kernels that add up in no fixed
order round differently, and so do layers that were replaced in between."""


def check_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Run a model twice, and refuse it where the outputs differ; it is left as it was.

    Raises
    ------
    ModelError
        If they differ; names the module where that begins.
    EquivalenceError
        If it puts out no tensor.
    """
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
    """Refuse a model of which two passes over the same inputs put out what differs.

    It runs twice more then, to find the module; it may have been prepared in between, so that only
    these tell.

    Raises
    ------
    ModelError
        If they differ by more than rounding.
    """
    if _alike(first, second):
        return
    (calls, first), (calls_again, second) = (_watched(model, inputs) for _ in range(2))
    if _alike(first, second):
        return
    apart = distance(first, second)
    by = f" by {apart:.2g} of the largest output" if math.isfinite(apart) else ""
    where = _where_it_begins(calls, calls_again, model)
    raise ModelError(
        f"two passes of {type(model).__name__} over the same inputs differ{by}{where}, so that "
        "what is measured of it is chance; let it draw random numbers in training alone, as "
        "F.dropout(x, p, training=self.training) does"
    )


def _alike(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return distance(first, second) <= max(_ROUNDING, rounding(first))


# ---- where it begins ---------------------------------------------------------------------

_Call: TypeAlias = tuple[nn.Module, Sequence[Tensor], Sequence[Tensor]]
"""A module that was called, with what it read and what it put out."""


def _where_it_begins(first: Sequence[_Call], second: Sequence[_Call], model: nn.Module) -> str:
    """Name the innermost module that makes two things of the same inputs; nothing if none does."""
    names = {module: name for name, module in model.named_modules()}
    for (module, read, made), (other, read_again, made_again) in zip(first, second, strict=False):
        if module is not other:
            return ""
        if _alike(read, read_again) and not _alike(made, made_again):
            name = names[module]
            where = f"module {name!r}" if name else "the code of the model itself"
            return f", which begins in {where} ({type(module).__name__})"
    return ""


def _watched(model: nn.Module, inputs: Inputs) -> tuple[Sequence[_Call], list[Tensor]]:
    """Return the calls of all modules in a pass, as they end, and what the model puts out."""
    begun: list[Sequence[Tensor]] = []
    ended: list[_Call] = []

    def begin(_: str, __: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        begun.append(_copies((args, kwargs)))

    def end(_: str, module: nn.Module, __: Any, ___: Any, result: Any) -> None:
        ended.append((module, begun.pop(), _copies(result)))

    with hooks(model, before=begin, after=end):
        return ended, comparable(call(model, inputs))


def _copies(values: Any) -> list[Tensor]:
    """Return the tensors among values as they are now."""
    return [leaf.clone() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
