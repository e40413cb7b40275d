"""Consumers as matrices: what a module reads, and the weights it reads it with.

Every consumer is seen as ``Y = X W``: rows of X are positions, columns of X and rows of W are the
inputs that belong to one coupling group, ordered as they lie in the weight tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graph.groups import CouplingGroup, Slot
from osscar.errors import ModelError, NonFiniteError


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One consumer of a coupling group.

    Parameters
    ----------
    name
        Qualified name of the module.
    module
        A `torch.nn.Linear` or transformers' `Conv1D`.
    slots
        The slots of the group in the module's weight.
    inputs
        The input features, (p,) int64 in ascending order, that the group owns.
    """

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    inputs: Tensor

    @property
    def unit_rows(self) -> list[list[int]]:
        """The rows of `read_weight` that each unit owns."""
        position = {feature: row for row, feature in enumerate(self.inputs.tolist())}
        return [
            [position[i] for slot in self.slots for i in slot.indices([unit])]
            for unit in range(self.slots[0].units)
        ]

    def read_inputs(self, args: tuple[object, ...]) -> Tensor:
        """Return X, (positions, p), from what the module is called with."""
        x = args[0]
        assert isinstance(x, Tensor)
        x = x.detach().reshape(-1, x.shape[-1])
        return x if len(self.inputs) == x.shape[1] else x[:, self.inputs.to(x.device)]

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        weight = self._weight
        return weight.movedim(self.slots[0].dim, 0)[self.inputs.to(weight.device)].double()

    def write_weight(self, W: Tensor) -> None:
        """Replace the group's part of the weight by W, (p, m)."""
        weight = self._weight
        W = W.to(weight)
        if not bool(torch.isfinite(W).all()):
            raise NonFiniteError(
                f"the refitted weights of {self.name!r} overflow {weight.dtype}; "
                "use --dtype float32 or bfloat16, or raise --damp"
            )
        weight.movedim(self.slots[0].dim, 0)[self.inputs.to(weight.device)] = W

    @property
    def _weight(self) -> Tensor:
        """The weight itself, outside of autograd."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


def linear_maps(model: nn.Module, group: CouplingGroup) -> tuple[LinearMap, ...]:
    """Return the consumers of a group, in execution order.

    Raises
    ------
    ModelError
        If a consumer is not a module whose inputs can be observed, or shares its weight with
        another module, so that a refit would change both.
    """
    by_tensor: dict[str, list[Slot]] = {}
    for slot in group.consumers:
        by_tensor.setdefault(slot.tensor, []).append(slot)
    return tuple(_linear_map(model, group, tuple(slots)) for slots in by_tensor.values())


def _linear_map(model: nn.Module, group: CouplingGroup, slots: tuple[Slot, ...]) -> LinearMap:
    name = slots[0].module
    module = model.get_submodule(name)
    weight = model.get_parameter(slots[0].tensor)
    if not isinstance(module, nn.Linear | Conv1D) or module.weight is not weight:
        raise ModelError(
            f"group {group.name!r} is read by {slots[0].tensor!r} in {name!r}, a "
            f"{type(module).__name__}; only Linear and Conv1D layers can be refitted"
        )
    users = [
        user
        for user, other in model.named_modules()
        for parameter in other.parameters(recurse=False)
        if parameter is weight
    ]
    if len(users) > 1:
        raise ModelError(
            f"group {group.name!r} is read by {slots[0].tensor!r}, which {' and '.join(users)} "
            "share; a refit would change them all"
        )
    features = sorted(i for slot in slots for i in slot.indices(range(slot.units)))
    return LinearMap(name, module, slots, torch.tensor(features))
