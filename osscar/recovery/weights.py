"""The copy of a model that is trained, with adapters or checkpoints or without, and what is saved.

Adapters (LoRA: Hu et al., 2021) are peft's; once merged, nothing of them is left but other values.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from graph.tracing.preserve import forget_derived
from osscar.base.errors import OptionError, optional
from osscar.network.hooks import other_forwards
from osscar.network.modules import (
    copied,
    device_of,
    drawing_alike,
    in_evaluation,
    named_tensors,
    tensors_in,
)
from osscar.proof.program import ProgramModule
from osscar.recovery.request import RecoveryRequest

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of those inside them, and do not always call these."""


def trainable(model: nn.Module, dense: nn.Module, request: RecoveryRequest) -> nn.Module:
    """Return a copy for small steps on the dense device, which shares what is not trained."""
    device, free = device_of(dense), _not_frozen(model)
    program = isinstance(model, ProgramModule)  # whose number formats are in its code

    def moved(tensor: Tensor, copy: bool) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16) and not program
        return tensor.detach().to(device, torch.float32 if half else tensor.dtype, copy=copy)

    instead: dict[int, Tensor] = {id(one): moved(one, True) for one in model.buffers()}
    for weight in model.parameters():
        mine = request.lora is None and id(weight) in free and weight.is_floating_point()
        instead[id(weight)] = nn.Parameter(moved(weight, mine), requires_grad=mine)
    work = in_evaluation(copied(model, instead))
    if request.lora is not None:
        add_adapters(work, adaptable(model), request.lora, request.seed)
    return work


def _not_frozen(model: nn.Module) -> set[int]:
    """Return the parameters that take gradients, by `id`; all if the model freezes everything."""
    weights = list(model.parameters())
    return {id(one) for one in weights if one.requires_grad} or set(map(id, weights))


def as_it_came(work: nn.Module, model: nn.Module) -> nn.Module:
    """Make a trained copy, adapters merged, a model like the one that it was made of."""
    for name, layer in _adapted(work).items():
        _merge(layer)
        work.set_submodule(name, layer.get_base_layer())
    if hasattr(work, "peft_config"):
        del work.peft_config
    work.to(device_of(model))
    for (_, mine), (_, other) in zip(named_tensors(work), named_tensors(model), strict=True):
        mine.data = mine.data.to(other.dtype, copy=mine.data_ptr() == other.data_ptr())
        mine.requires_grad_(other.requires_grad)
        mine.grad = None
    for module, first in zip(work.modules(), model.modules(), strict=True):
        module.training = first.training
    forget_derived(work)
    return work


def formats(work: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats in which tensors of a trained copy are saved, by name."""
    due = {name: tensor.dtype for name, tensor in named_tensors(model)}
    return {n: due.get(n.replace(".base_layer.", "."), one.dtype) for n, one in named_tensors(work)}


@contextmanager
def as_saved(work: nn.Module, formats: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Let a trained copy be what is saved of it in the block: adapters merged, numbers rounded."""
    named = named_tensors(work)
    before = [(tensor, tensor.data) for _, tensor in named]
    layers = _adapted(work).values()
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


# ---- adapters ----------------------------------------------------------------------------


def adaptable(model: nn.Module) -> list[str]:
    """Return the names of modules for adapters: of matrices that are neither shared nor frozen."""
    free = _not_frozen(model)
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
    """Whether a module is a linear map, or a convolution of a kind that peft supports."""
    if type(module) in _CONVOLUTIONS:
        ones = {module.groups, *module.dilation}  # type: ignore[misc]
        return ones == {1} and module.padding_mode == "zeros"
    return type(module) in (nn.Linear, Conv1D)


def add_adapters(model: nn.Module, names: list[str], rank: int, seed: int) -> None:
    """Add adapters to modules, in place; nothing else takes gradients then."""
    if not names:
        raise OptionError(
            f"lora is {rank}, and {type(model).__name__} has no modules to which adapters could be "
            "added; omit it"
        )
    peft = optional("peft", "recover", "a training of adapters")
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules="|".join(map(re.escape, names))
    )
    with drawing_alike(model, seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft sets it right
        peft.inject_adapter_in_model(config, model)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the modules of a model that have adapters, by name."""
    adapted = hasattr(model, "peft_config")
    return {n: one for n, one in model.named_modules() if adapted and hasattr(one, "lora_A")}


def _merge(layer: Any) -> None:
    """Add an adapter's product to a copy of its matrix, which another model may share."""
    weight = layer.get_base_layer().weight
    weight.data = weight.data.clone()
    layer.merge()


# ---- activations that are computed again -------------------------------------------------


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model: transformers' own, or of one class in a list."""
    found = {one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)}
    if not found:
        for holder in model.modules():
            if isinstance(holder, nn.ModuleList | nn.Sequential):
                classes = Counter(map(type, holder))
                found |= {one for one in holder if classes[type(one)] > 1 and any(one.children())}
    inner = {below for one in found for below in one.modules() if below is not one}
    return [one for one in model.modules() if one in found - inner]


def checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """Let each block keep only its inputs for the backward pass (Chen et al., 2016)."""
    repeated = blocks(model)
    if not repeated:
        raise OptionError(
            f"checkpointing needs repeated blocks, and {type(model).__name__} has none; omit it"
        )
    return other_forwards([(block, _checkpointed(block)) for block in repeated])


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        result = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if [tensor._version for tensor in inputs] != versions:
            raise OptionError(
                f"{type(block).__name__} writes to its inputs, so that its activations cannot be "
                "computed again; omit checkpointing"
            )
        return result

    return call
