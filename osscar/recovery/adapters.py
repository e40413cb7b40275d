"""Adapters of low rank, which are trained in the place of matrices (LoRA: Hu et al., 2021).

They are peft's; once merged, nothing of them is left in a model but other values.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from osscar.base.errors import MissingDependency, OptionError
from osscar.network.modules import graphics_cards, named_tensors

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of those inside them, and do not always call these."""


def adaptable(model: nn.Module) -> list[str]:
    """Return the names of the modules whose matrices adapters can stand beside.

    A matrix that several modules share is none, as a head is that is tied to an embedding, and none
    that the model freezes, unless it freezes everything.
    """
    weights = list(model.parameters())
    free = {id(one) for one in weights if one.requires_grad} or set(map(id, weights))
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    read = {
        inner for one in model.modules() if isinstance(one, _READERS) for inner in one.modules()
    }
    return [
        name
        for name, module in model.named_modules()
        if name and module not in read and _is_plain(module)
        if uses[id(module.weight)] == 1 and id(module.weight) in free
    ]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is the product that it seems; peft has no other convolutions."""
    if type(module) in _CONVOLUTIONS:
        ones = {module.groups, *module.dilation}  # type: ignore[misc]
        return ones == {1} and module.padding_mode == "zeros"
    return type(module) in (nn.Linear, Conv1D)


def has_peft() -> bool:
    """Whether the package is installed that makes adapters."""
    return importlib.util.find_spec("peft") is not None


def add_adapters(model: nn.Module, names: Sequence[str], rank: int, seed: int) -> None:
    """Put adapters beside the matrices of modules, in place; nothing else takes gradients then.

    Raises
    ------
    MissingDependency
        If peft is not installed.
    OptionError
        If there is no such matrix.
    """
    if not names:
        raise OptionError(
            f"lora is {rank}, and {type(model).__name__} has no modules with matrices that "
            "adapters could stand beside; omit it"
        )
    if not has_peft():
        raise MissingDependency("adapters need peft: python3 -m pip install 'osscar[recover]'")
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names))
    )
    with torch.random.fork_rng(graphics_cards(model)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft sets it right
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the modules of a model that have adapters, by name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: one for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)}


@contextmanager
def as_saved(model: nn.Module, formats: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Let a model be what is saved of it while the block runs: adapters merged, numbers rounded.

    Parameters
    ----------
    model
        Gets its tensors back after the block.
    formats
        The number formats in which parameters and buffers are saved, by name.
    """
    named = named_tensors(model)
    before = [(tensor, tensor.data) for _, tensor in named]
    layers = _adapted(model).values()
    try:
        for layer in layers:
            _merge(layer)
        for name, tensor in named:
            tensor.data = tensor.data.to(formats[name])
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for tensor, data in before:
            tensor.data = data


def merge_adapters(model: nn.Module) -> None:
    """Add what adapters have learned to the matrices, in place, and take the adapters away."""
    for name, layer in _adapted(model).items():
        _merge(layer)
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _merge(layer: Any) -> None:
    """Add what an adapter has learned to a copy of its matrix, which another model may share."""
    weight = layer.get_base_layer().weight
    weight.data = weight.data.clone()
    layer.merge()
