"""The copy of a model that is trained, and how it becomes a model like the one that came in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graph.tracing.preserve import forget_derived
from osscar.network.modules import copied, device_of, in_evaluation, named_tensors
from osscar.proof.program.program import ProgramModule
from osscar.recovery.adapters import adaptable, add_adapters, merge_adapters
from osscar.recovery.request import RecoveryRequest


def trainable(model: nn.Module, dense: nn.Module, request: RecoveryRequest) -> nn.Module:
    """Return a copy in which gradients flow to what is trained, in a format for small steps.

    It lies where the dense model does.  What is not trained are the tensors of the model itself, if
    these are there, too.
    """
    device = device_of(dense)
    trained = _trained(model) if request.lora is None else frozenset[str]()
    program = isinstance(model, ProgramModule)  # whose number formats are in its code

    def moved(tensor: Tensor, copy: bool) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16) and not program
        return tensor.detach().to(device, torch.float32 if half else tensor.dtype, copy=copy)

    instead: dict[int, Tensor] = {id(one): moved(one, True) for one in model.buffers()}
    for name, weight in model.named_parameters():
        mine = name in trained
        instead[id(weight)] = nn.Parameter(moved(weight, mine), requires_grad=mine)
    work = in_evaluation(copied(model, instead))
    if request.lora is not None:
        add_adapters(work, adaptable(model), request.lora, request.seed)
    return work


def _trained(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that can be trained, of those that the model lets learn."""
    weights = dict(model.named_parameters())
    learning = {name for name, weight in weights.items() if weight.requires_grad} or set(weights)
    return frozenset(name for name in learning if weights[name].is_floating_point())


def formats(work: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats in which a copy comes back; adapters have their own."""
    due = {name: tensor.dtype for name, tensor in named_tensors(model)}
    return {n: due.get(n.replace(".base_layer.", "."), one.dtype) for n, one in named_tensors(work)}


def as_it_came(work: nn.Module, model: nn.Module) -> nn.Module:
    """Make a trained copy a model like the one that it was made of, with weights of its own.

    Adapters are merged; number formats, flags, modes and place are as they were.
    """
    merge_adapters(work)
    work.to(device_of(model))
    for (_, mine), (_, other) in zip(named_tensors(work), named_tensors(model), strict=True):
        mine.data = mine.data.to(other.dtype, copy=mine.data_ptr() == other.data_ptr())
        mine.requires_grad_(other.requires_grad)
        mine.grad = None
    for module, first in zip(work.modules(), model.modules(), strict=True):
        module.training = first.training
    forget_derived(work)
    return work
