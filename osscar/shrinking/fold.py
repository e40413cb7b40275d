"""Weights that are computed from others at every call, such as by weight normalization, folded.

In evaluation mode such a weight is a constant, and only a constant can be sliced and refitted: the
length of a row is taken over all of its inputs, so none of them could leave alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    remove_spectral_norm,
)
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from graph.groups import CouplingGroup
from graph.tracing.preserve import Contents
from osscar.network.modules import evaluating

_PARTS = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig", "_u", "_v")}
"""What the hooks of `torch.nn.utils` compute a weight from, by the ends of their names."""


Folded: TypeAlias = Mapping[str, Contents]
"""The weights that have become plain ones, by name, with what their modules were before."""


def fold(model: nn.Module, tensors: Collection[str] | None = None) -> Folded:
    """Replace, in place, weights that are computed at every call by what they are.

    Known are parametrizations, whatever they compute, and the hooks of weight and spectral
    normalization of `torch.nn.utils`, of a tensor called ``weight``, as it is in evaluation mode.
    Where the tensors that it is computed from belong to several modules, or another tensor of the
    module is computed, too, it stays. `tensors` names the weights to fold, by default all.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{path}.weight".removeprefix("."))
    owners = Counter(id(tensor) for module in names for tensor in module.parameters(recurse=False))
    return {
        own[0]: _folded(module)
        for module, own in names.items()
        if (tensors is None or any(name in tensors for name in own))
        and (parts := list(_parts(module)))
        and all(owners[id(part)] <= 1 for part in parts)
    }


def unfold(folded: Folded, groups: Sequence[CouplingGroup] = ()) -> tuple[str, ...]:
    """Let folded weights be computed again; name those that stay, as a group may take a part."""
    cut = {slot.tensor for group in groups if group.prunable for slot in group.slots}
    for name, before in folded.items():
        if name not in cut:
            before.restore()
    return tuple(name for name in folded if name in cut)


def is_foldable(module: nn.Module) -> bool:
    """Whether a module has a weight that `fold` knows."""
    return any(True for _ in _parts(module))


def _parts(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a computed weight comes from; none if `fold` does not know it."""
    if is_parametrized(module):
        found = module.parametrizations
        assert isinstance(found, nn.ModuleDict)
        chain = found["weight"] if list(found) == ["weight"] else None
        if isinstance(chain, ParametrizationList):
            yield from chain.parameters()
        return
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook) in _PARTS]
    if len(hooks) == 1 and hooks[0].name == "weight":  # type: ignore[attr-defined]
        for end in _PARTS[type(hooks[0])]:
            yield getattr(module, f"weight{end}")


def _folded(module: nn.Module) -> Contents:
    before = Contents.of(module)
    learns = any(part.requires_grad for part in _parts(module))
    if is_parametrized(module):
        # By hand: torch would take the weight off the class, which copies of the module share.
        assert isinstance(module.parametrizations, nn.ModuleDict)
        with torch.no_grad(), evaluating(module.parametrizations):
            weight = cast(Tensor, module.weight).detach().clone()
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        module.register_parameter("weight", nn.Parameter(weight))
    elif any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        remove_weight_norm(module)
    else:
        remove_spectral_norm(module)
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):  # which torch leaves behind
            if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                del hooks[key]
    module.get_parameter("weight").requires_grad_(learns)
    return before
