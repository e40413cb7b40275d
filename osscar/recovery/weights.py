"""The copy of a model that is trained, and how it becomes a model like the one that came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from graph.tracing.preserve import forget_derived
from osscar.base.errors import OptionError
from osscar.network.modules import copied, device_of, in_evaluation
from osscar.proof.program.program import ProgramModule
from osscar.recovery.adapters import adaptable, add_adapters
from osscar.recovery.request import RecoveryRequest


def shared_weights(model: nn.Module, dense: nn.Module) -> frozenset[str]:
    """Return the names of the weights that pruning has left as they are in the dense model."""
    others = dict(dense.named_parameters())
    return frozenset(
        name
        for name, weight in model.named_parameters()
        if name in others
        and others[name].dtype == weight.dtype
        and torch.equal(others[name], weight.to(others[name].device))
    )


def trainable(
    model: nn.Module,
    dense: nn.Module,
    alike: frozenset[str],
    device: torch.device,
    request: RecoveryRequest,
) -> nn.Module:
    """Return a copy in which gradients flow to what is trained, in a format for small steps.

    What is not trained, and `alike`, are the dense model's tensors.
    """
    others = dict(dense.named_parameters())
    trained = _trained(model, others, request)
    program = isinstance(model, ProgramModule)  # whose number formats are in its code

    def moved(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16) and not program
        return tensor.detach().to(device, torch.float32 if half else tensor.dtype, copy=True)

    instead: dict[int, Tensor] = {id(one): moved(one) for one in model.buffers()}
    for name, weight in model.named_parameters():
        same = name in alike - trained and (program or weight.dtype == torch.float32)
        values = others[name].detach() if same else moved(weight)
        instead[id(weight)] = nn.Parameter(values, requires_grad=name in trained)
    work = in_evaluation(copied(model, instead))
    if request.lora is not None:
        add_adapters(work, adaptable(model), request.lora, request.seed)
    elif not trained:
        raise OptionError(f"train is {request.train!r}, and the model has no such weights")
    return work


def _trained(
    model: nn.Module, others: Mapping[str, Tensor], request: RecoveryRequest
) -> frozenset[str]:
    """Return the names of the weights that are trained themselves."""
    chosen: Callable[[str, Tensor], bool] = {
        "all": lambda name, weight: request.lora is None,
        "pruned": lambda name, weight: name not in others or others[name].shape != weight.shape,
        "norms": lambda name, weight: weight.ndim <= 1,
    }[request.train]
    weights = dict(model.named_parameters())
    learning = {name for name, weight in weights.items() if weight.requires_grad} or set(weights)
    return frozenset(
        name
        for name in learning
        if weights[name].is_floating_point() and chosen(name, weights[name])
    )


def formats(work: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats in which a copy comes back; adapters have their own."""
    due = {name: tensor.dtype for name, tensor in _tensors(model)}
    return {n: due.get(n.replace(".base_layer.", "."), one.dtype) for n, one in _tensors(work)}


def give_own_weights(model: nn.Module, dense: nn.Module) -> None:
    """Copy the weights that a model shares with the dense one."""
    others = {weight.data_ptr() for weight in dense.parameters()}
    for weight in model.parameters():
        if weight.data_ptr() in others:
            weight.data = weight.data.clone()


def as_it_came(model: nn.Module, before: nn.Module) -> nn.Module:
    """Give a model the number formats, flags, modes and place of the one that it was made of."""
    model.to(device_of(before))
    for (_, mine), (_, other) in zip(_tensors(model), _tensors(before), strict=True):
        mine.data = mine.data.to(other.dtype)
        mine.requires_grad_(other.requires_grad)
        mine.grad = None
    for module, first in zip(model.modules(), before.modules(), strict=True):
        module.training = first.training
    forget_derived(model)
    return model


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
