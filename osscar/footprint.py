"""How large a model is: parameters, floating-point operations, memory, and bytes on disk."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Footprint:
    """The size of a model.

    Attributes
    ----------
    parameters
        Number of parameters, tied ones counted once.
    parameter_bytes
        Memory that they take, in bytes.
    flops_per_token
        As in :func:`count_flops`, over the number of tokens in the window.
    peak_memory_bytes
        Most memory in use while the model was scored, its weights included: allocated by PyTorch
        on a GPU; resident in this process, with all else that it holds, on a CPU. None where the
        system does not tell.
    disk_bytes
        Size of its safetensors files, or None if it has none.
    """

    parameters: int
    parameter_bytes: int
    flops_per_token: float
    peak_memory_bytes: int | None
    disk_bytes: int | None


def count_parameters(model: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_parameter_bytes(model: nn.Module) -> int:
    """Count the bytes of parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def count_flops(model: nn.Module, window: Tensor) -> int:
    """Count the floating-point operations of one forward pass, by running it.

    Counted are the matrix products and convolutions with the shapes that they really have: linear
    layers, the output layer at every position, and attention (scores and weighted sums, as full
    squares: a causal mask is not discounted). A multiplication with its addition counts as two.
    Look-ups, normalization and other element-wise work are not counted.

    Parameters
    ----------
    model
        A language model.
    window
        Token ids, (batch, tokens) int64, on the model's device.
    """
    # fused attention kernels hide their products from the counter; the plain one does not
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(input_ids=window, use_cache=False)
    return int(counter.get_total_flops())


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # refused in some containers: the peak is then that of the whole life of the process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def read_peak_memory(device: torch.device) -> int | None:
    """Read the peak memory in bytes, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_disk_bytes(path: Path | None) -> int | None:
    """Sum the sizes of the safetensors files in a directory, or give None if there are none."""
    files = list(path.glob("*.safetensors")) if path is not None else []
    return sum(file.stat().st_size for file in files) if files else None
