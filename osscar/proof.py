"""The proof that a shrunk model computes what it should: the masked model's outputs, and no others.

A model is *masked* when whatever reads the removed units is zero.  Units that nothing reads can
leave, so the shrunk model has to give the same outputs, up to rounding.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.export import failing_module
from osscar.attention import AnyHeads
from osscar.errors import AdapterError, EquivalenceError
from osscar.plan import PruningPlan

Inputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""Positional or keyword arguments of a model's forward pass."""

_FINER = {
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Relative to the largest output: rounding alone, since products are summed in another order.
Models round to float32 inside (normalization, rotary position) even when they run in float64, and
thirty pruned layers amplify that a thousandfold."""


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the logits, or the first output, of a model."""
    result = _call(model, inputs)
    output = result.logits if hasattr(result, "logits") else _floating(result)[0]
    assert isinstance(output, Tensor)
    return output


@torch.no_grad()
def _call(model: nn.Module, inputs: Inputs) -> Any:
    if not isinstance(inputs, Mapping):
        return model(*inputs)
    inputs = dict(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        # Keys and values lose their heads, so they differ in shape, as they should.
        inputs.setdefault("use_cache", False)
    return model(**inputs)


def _floating(result: Any) -> list[Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode, and each module back to its own mode afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def finer_precision(model: nn.Module) -> Iterator[None]:
    """Compute in the next finer number format, in which rounding cannot hide a wrong slice.

    A deep network that was pruned badly amplifies rounding a thousandfold.  Every tensor returns
    to its own format, with the same value.
    """
    formats = {name: tensor.dtype for name, tensor in _tensors(model)}
    for _, tensor in _tensors(model):
        tensor.data = tensor.data.to(_FINER.get(tensor.dtype, tensor.dtype))
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(formats.get(name, tensor.dtype))


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards."""
    before: list[tuple[Tensor, Tensor, int, Tensor]] = []
    try:
        for group in plan.groups:
            gone = set(range(group.units)) - set(group.kept)
            for slot in group.consumers:
                path, _, attribute = slot.tensor.rpartition(".")
                weight = getattr(model.get_submodule(path), attribute).detach()
                index = torch.tensor(slot.indices(gone), device=weight.device)
                before.append((weight, index, slot.dim, weight.index_select(slot.dim, index)))
                weight.index_fill_(slot.dim, index, 0.0)
        yield
    finally:
        for weight, index, dim, values in reversed(before):
            weight.index_copy_(dim, index, values)


def prove_equal(
    masked: Iterable[Tensor], shrunk: Iterable[Tensor], *, tolerance: float | None = None
) -> float:
    """Compare the outputs of the masked and of the shrunk model.

    Parameters
    ----------
    masked, shrunk
        Outputs on the same inputs.
    tolerance
        Largest difference allowed, relative to the largest output; by default that of the number
        format.

    Returns
    -------
    float
        Largest difference, relative to the largest output.

    Raises
    ------
    EquivalenceError
        If they differ by more than rounding.
    """
    worst = 0.0
    for a, b in zip(masked, shrunk, strict=True):
        if a.shape != b.shape:
            raise EquivalenceError(
                f"the shrunk model puts out {tuple(b.shape)}, the masked one {tuple(a.shape)}; "
                "a module keeps a size that did not follow: please report the architecture"
            )
        scale = float(a.double().abs().max()) or 1.0
        error = float((a.double() - b.double()).abs().max()) / scale
        allowed = _TOLERANCE.get(a.dtype, 1e-4) if tolerance is None else tolerance
        if not error <= allowed:
            raise EquivalenceError(
                f"the shrunk model's output differs from the masked one's by {error:.2e} of its "
                f"largest value (tolerance {allowed:.0e}); nothing was written: please report "
                "the architecture"
            )
        worst = max(worst, error)
    return worst


# ---- modules that cannot follow ----------------------------------------------------------


def explained(error: Exception, model: nn.Module) -> AdapterError:
    """Say which module of a shrunk model failed, in which line, and what it keeps.

    Parameters
    ----------
    error
        What the forward pass of the shrunk model raised.
    model
        That model.
    """
    name = failing_module(error.__traceback__, model)
    module = model.get_submodule(name)
    line = _failing_line(error.__traceback__, module)
    integers = {key: value for key, value in vars(module).items() if type(value) is int}
    named = {key: value for key, value in integers.items() if key in line} or integers
    kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, AnyHeads))
    kept = ", ".join(f"{key} = {value}" for key, value in named.items()) or "no number"
    return AdapterError(
        f"module {name or 'the model'!r} ({kind.__name__}) cannot follow its units: "
        f"{str(error).strip().partition(chr(10))[0]}, in `{line}`; it keeps {kept}. "
        "In code of your own, write -1 for that size or take it from a weight; elsewhere register "
        f'what has to change with @osscar.adapter("{kind.__module__}.{kind.__qualname__}"), '
        "or leave its groups out of what is pruned"
    )


def _failing_line(trace: TracebackType | None, module: nn.Module) -> str:
    """Return the innermost line of source that ran on behalf of a module."""
    found, inside = "", False
    while trace is not None:
        frame = trace.tb_frame
        inside = inside or frame.f_locals.get("self") is module
        if inside and "/torch/" not in frame.f_code.co_filename:
            line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno).strip()
            found = line or found
        trace = trace.tb_next
    return found or "forward"


def proof_outputs(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return every floating-point output on every input, one after another."""
    return [output for one in inputs for output in _floating(_call(model, one))]
