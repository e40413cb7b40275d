"""Physical removal: slice what the units own, and mend the integers that modules keep.

That the result is right is proved, not assumed: `outputs` of the shrunk model are compared with
those of the model whose removed units are zero at their consumers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graph.groups import Kind, Slot
from osscar.errors import EquivalenceError, ModelError
from osscar.plan import GroupPlan, PruningPlan

HISTORY = "osscar_plans"
"""The attribute of a shrunk model that lists the plans applied to it, oldest first."""

_FINER = {
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Relative to the largest output: rounding alone, since products are summed in another order.
Models round to float32 inside (normalization, rotary position) even when they run in float64, and
thirty pruned layers amplify that a thousandfold."""


@dataclass(frozen=True)
class _Adapter:
    """An integer that a module keeps and that follows the units of a group.

    Parameters
    ----------
    attribute
        Its name.
    value
        The new value, from the old one and the group's plan.
    """

    attribute: str
    value: Callable[[int, GroupPlan], int]


def _scaled(old: int, group: GroupPlan) -> int:
    return old * len(group.kept) // group.units


def _shared_keys(old: int, group: GroupPlan) -> int:
    """Scale the query heads of a key head, where the units are query heads that share one."""
    keys_are_cut = any(slot.tensor.endswith("k_proj.weight") for slot in group.slots)
    return old if keys_are_cut else _scaled(old, group)


_QUERIES_OF_A_KEY = (_Adapter("num_key_value_groups", _shared_keys),)

_ADAPTERS: dict[tuple[str, Kind], tuple[_Adapter, ...]] = {
    ("OPTAttention", Kind.HEADS): (_Adapter("num_heads", _scaled),),
    ("GPT2Attention", Kind.HEADS): (
        _Adapter("num_heads", _scaled),
        _Adapter("split_size", _scaled),
    ),
    ("LlamaAttention", Kind.HEADS): _QUERIES_OF_A_KEY,
    ("MistralAttention", Kind.HEADS): _QUERIES_OF_A_KEY,
    ("Qwen2Attention", Kind.HEADS): _QUERIES_OF_A_KEY,
    ("Qwen3Attention", Kind.HEADS): _QUERIES_OF_A_KEY,
    ("LlamaMLP", Kind.NEURONS): (_Adapter("intermediate_size", _scaled),),
    ("MistralMLP", Kind.NEURONS): (_Adapter("intermediate_size", _scaled),),
    ("Qwen2MLP", Kind.NEURONS): (_Adapter("intermediate_size", _scaled),),
    ("Qwen3MLP", Kind.NEURONS): (_Adapter("intermediate_size", _scaled),),
}
"""By class name of the module around a group.  An attention that takes its head count from the
tensors (``view(..., -1, head_dim)``) needs no entry."""


def shrink(model: nn.Module, plan: PruningPlan) -> None:
    """Remove from `model`, in place, every unit that the plan does not keep.

    Tied parameters stay tied.

    Parameters
    ----------
    model
        The model, on any device, also on ``meta``.
    plan
        What stays.

    Raises
    ------
    ModelError
        If a tensor of the plan does not exist or has another size; nothing is changed then.
    """
    cuts = [(slot, group) for group in plan.groups for slot in group.slots]
    _check_cuts(model, cuts)
    for (tensor, dim), keep in _kept_indices(model, cuts).items():
        _slice(model, tensor, dim, keep)
    for group in plan.groups:
        for name in _enclosing(group):
            module = model.get_submodule(name)
            for adapter in _ADAPTERS.get((type(module).__name__, group.kind), ()):
                old = getattr(module, adapter.attribute)
                setattr(module, adapter.attribute, adapter.value(old, group))
    for module in model.modules():
        _refresh_sizes(module)
    setattr(model, HISTORY, (*getattr(model, HISTORY, ()), plan))


def context_length(model: nn.Module) -> int | None:
    """Return the most tokens that a model takes at once, or None where its config tells nothing."""
    length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _check_cuts(model: nn.Module, cuts: Iterable[tuple[Slot, GroupPlan]]) -> None:
    for slot, group in cuts:
        try:
            size = _tensor(model, slot.tensor).shape[slot.dim]
        except (AttributeError, IndexError) as error:
            raise ModelError(
                f"group {group.name!r}: no {slot.tensor!r} of {slot.dim + 1} "
                "dimensions in this model; the plan is for another"
            ) from error
        last = slot.offset + slot.outer * slot.units * slot.inner
        if slot.units != group.units or last > size:
            raise ModelError(
                f"group {group.name!r}: {slot.tensor!r} has {size} entries along dimension "
                f"{slot.dim} and the plan needs {last}; the plan is for another model"
            )


def _kept_indices(
    model: nn.Module, cuts: Iterable[tuple[Slot, GroupPlan]]
) -> dict[tuple[str, int], list[int]]:
    """Return, for each tensor dimension that is cut, the indices that stay."""
    removed: dict[tuple[str, int], set[int]] = {}
    for slot, group in cuts:
        gone = set(range(group.units)) - set(group.kept)
        removed.setdefault((slot.tensor, slot.dim), set()).update(slot.indices(gone))
    return {
        (tensor, dim): [i for i in range(_tensor(model, tensor).shape[dim]) if i not in gone]
        for (tensor, dim), gone in removed.items()
    }


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), attribute)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{name} is not a tensor")
    return tensor


def _slice(model: nn.Module, name: str, dim: int, keep: list[int]) -> None:
    old = _tensor(model, name)
    cut = old.detach().index_select(dim, torch.tensor(keep, device=old.device)).contiguous()
    new = nn.Parameter(cut, requires_grad=old.requires_grad) if _is_parameter(old) else cut
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for attribute, tensor in store.items():
                if tensor is old:
                    store[attribute] = new  # type: ignore[assignment]


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _enclosing(group: GroupPlan) -> list[str]:
    """Return the modules that hold the group's layers directly, such as the attention or MLP."""
    parents = dict.fromkeys(slot.module.rpartition(".")[0] for slot in group.slots)
    return list(parents)


def _refresh_sizes(module: nn.Module) -> None:
    """Set the sizes that a stock layer shows to those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (or the first output) of a model on proof inputs."""
    result = model(**inputs)
    logits = result.logits if hasattr(result, "logits") else result
    output = logits if isinstance(logits, Tensor) else logits[0]
    assert isinstance(output, Tensor)
    return output


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
            tensor.data = tensor.data.to(formats[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def prove_equal(masked: Iterable[Tensor], shrunk: Iterable[Tensor]) -> float:
    """Compare the outputs of the masked and of the shrunk model.

    Parameters
    ----------
    masked, shrunk
        Outputs on the same inputs.

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
        tolerance = _TOLERANCE.get(a.dtype, 1e-4)
        if not error <= tolerance:
            raise EquivalenceError(
                f"the shrunk model's output differs from the masked one's by {error:.2e} of its "
                f"largest value (tolerance {tolerance:.0e}); nothing was written: please report "
                "the architecture"
            )
        worst = max(worst, error)
    return worst
