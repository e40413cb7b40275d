"""A small network, and in place of smaller models the dense one with noise on its weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="adapters need the extra osscar[recover]"
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def numbers(count: int = 24, seed: int = 0) -> Tensor:
    """Return what `net` reads."""
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def perturbed(dense: nn.Module, share: float = 0.3, seed: int = 0) -> nn.Module:
    """Return a copy with noise on each weight, relative to its spread."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.numel() > 1:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.add_((share * noise * float(weight.double().std())).to(weight.dtype))
    return model


def bytes_of(model: nn.Module) -> Mapping[str, tuple[torch.dtype, bytes]]:
    """Return the number format and the bytes of each parameter and buffer, to be compared."""
    return {
        name: (tensor.dtype, raw(tensor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""
