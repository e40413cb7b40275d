"""A proof of coupling groups that does not shrink anything.

A group is right if, once what reads a unit is zeroed, nothing that computes the unit matters any
more, and if it mattered before.
"""

from __future__ import annotations

import copy

import torch
from torch.utils import _pytree as pytree

from graph import Role


def outputs(model, inputs):
    """Return all floating outputs of a model as one vector."""
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return torch.cat([t.double().flatten() for t in tensors if t.is_floating_point()])


def _tensor(model, name):
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _fill(model, slots, units, noise):
    """Overwrite the slices of some units with zeros, or add noise, so that variances stay above."""
    generator = torch.Generator().manual_seed(3)
    for slot in slots:
        weight = _tensor(model, slot.tensor).detach()
        index = torch.tensor(slot.indices(units))
        slices = weight.index_select(slot.dim, index)
        random = (torch.rand(slices.shape, generator=generator) * noise).to(slices.dtype)
        weight.index_copy_(slot.dim, index, slices + random if noise else torch.zeros_like(slices))


def assert_masked(model, group, inputs, *, used=False):
    """Show that what computes some units changes nothing once their consumers are zero.

    used: Whether it has to change something before.
    """
    # Not all units: else no unit of another group could be mistaken for one.
    units = [0, group.units // 2] if group.units > 2 else [0]
    computing = [slot for slot in group.slots if slot.role is not Role.CONSUMER]
    dense, disturbed, masked = outputs(model, inputs), copy.deepcopy(model), copy.deepcopy(model)
    scale = dense.abs().max()
    if used:
        _fill(disturbed, computing, units, noise=1.0)
        change = (outputs(disturbed, inputs) - dense).abs().max()
        assert change > 1e-4 * scale, f"{group.name}: the units are unused"
    _fill(masked, group.consumers, units, noise=0.0)
    reference = outputs(masked, inputs)
    _fill(masked, computing, units, noise=1.0)
    # What is written by one dimension of a tensor and read by another was disturbed as well.
    _fill(masked, group.consumers, units, noise=0.0)
    difference = (outputs(masked, inputs) - reference).abs().max()
    assert difference <= 1e-6 * scale, f"{group.name}: masked units still matter ({difference})"


def assert_sound(model, group, inputs):
    """Prove a group on a model by masking some of its units."""
    assert_masked(model, group, inputs, used=True)
