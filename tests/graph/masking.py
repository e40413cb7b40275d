"""A proof of coupling groups that does not shrink anything.

A group is right if, once what reads a unit is zeroed, nothing that computes the unit matters any
more, and if it mattered before.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch.utils import _pytree as pytree

from graph import CouplingGroup, Role, Slot

Inputs = tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor]


def outputs(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return all floating outputs of a model as one vector."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return torch.cat([t.double().flatten() for t in tensors if t.is_floating_point()])


def tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by name."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    assert isinstance(found, torch.Tensor)
    return found


def _fill(
    model: torch.nn.Module, slots: Iterable[Slot], units: Iterable[int], *, noise: float
) -> None:
    """Overwrite the slices of some units with zeros, or add noise to them."""
    generator = torch.Generator().manual_seed(3)
    for slot in slots:
        weight = tensor(model, slot.tensor).detach()
        index = torch.tensor(slot.indices(units))
        slices = weight.index_select(slot.dim, index)
        random = (torch.rand(slices.shape, generator=generator) * noise).to(slices.dtype)
        # Noise is added, not put in place, so that variances stay positive.
        weight.index_copy_(slot.dim, index, slices + random if noise else torch.zeros_like(slices))


def _units(group: CouplingGroup) -> list[int]:
    """Return some units, but not all: else no unit of another group could be mistaken for one."""
    return [0, group.units // 2] if group.units > 2 else [0]


def _computing(group: CouplingGroup) -> list[Slot]:
    return [slot for slot in group.slots if slot.role is not Role.CONSUMER]


def assert_used(model: torch.nn.Module, group: CouplingGroup, inputs: Inputs) -> None:
    """Show that disturbing what computes some units changes the outputs."""
    dense = outputs(model, inputs)
    disturbed = copy.deepcopy(model)
    _fill(disturbed, _computing(group), _units(group), noise=1.0)
    change = (outputs(disturbed, inputs) - dense).abs().max()
    assert change > 1e-4 * dense.abs().max(), f"{group.name}: the units are unused"


def assert_masked(model: torch.nn.Module, group: CouplingGroup, inputs: Inputs) -> None:
    """Show that it changes nothing once the consumers of these units are zero."""
    units = _units(group)
    masked = copy.deepcopy(model)
    _fill(masked, group.consumers, units, noise=0.0)
    reference = outputs(masked, inputs)
    _fill(masked, _computing(group), units, noise=1.0)
    # What is written by one dimension of a tensor and read by another was disturbed as well.
    _fill(masked, group.consumers, units, noise=0.0)
    difference = (outputs(masked, inputs) - reference).abs().max()
    scale = outputs(model, inputs).abs().max()
    assert difference <= 1e-6 * scale, f"{group.name}: masked units still matter ({difference})"


def assert_sound(model: torch.nn.Module, group: CouplingGroup, inputs: Inputs) -> None:
    """Prove a group on a model by masking some of its units."""
    assert_used(model, group, inputs)
    assert_masked(model, group, inputs)


def assert_sliced(model: torch.nn.Module, groups: Iterable[CouplingGroup], inputs: Inputs) -> None:
    """Show that cutting half of all units out equals masking what reads them.

    For models whose code bakes no size in, which is so for most convolutional networks.
    """
    removed = {group.name: range(0, group.units - 1, 2) for group in groups}
    masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
    cuts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for group in groups:
        _fill(masked, group.consumers, removed[group.name], noise=0.0)
        for slot in group.slots:
            cuts[slot.tensor, slot.dim].update(slot.indices(removed[group.name]))
    for (name, dim), indices in cuts.items():
        weight = tensor(sliced, name)
        kept = [index for index in range(weight.shape[dim]) if index not in indices]
        weight.data = weight.data.index_select(dim, torch.tensor(kept))
    for module in sliced.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.out_channels > 1:
            module.groups = module.weight.shape[0]
    expected, found = outputs(masked, inputs), outputs(sliced, inputs)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())
