"""How large a model is: parameters, floating-point operations, memory, and bytes on disk."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from graph.groups import CouplingGroup
from osscar.base.memory import DeviceMemory, system_value


@dataclass(frozen=True)
class Footprint:
    """The size of a model: parameters, tied ones counted once, and bytes.

    Operations are those of one token or sample, as `osscar.network.operations.count_flops` counts
    them.  The peak is the most memory in use while the model was scored, its weights included:
    allocated by PyTorch on a GPU; resident in this process, with all else that it holds, on a CPU.
    `disk_bytes` are of its safetensors files, None if it has none.
    """

    parameters: int
    parameter_bytes: int
    flops: float
    peak_memory_bytes: int
    disk_bytes: int | None


def count_parameter_bytes(model: nn.Module) -> int:
    """Count the bytes of parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def count_owned(model: nn.Module, groups: Iterable[CouplingGroup]) -> int:
    """Count the parameters that lie in units of some prunable group, each once."""
    owned: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        for slot in group.slots if group.prunable else ():
            indices = slot.indices(range(slot.units))
            owned.setdefault((slot.tensor, slot.dim), set()).update(indices)
    lists = tuple(f"{name}." for name, _ in owned)  # of modules: slots name no tensor there
    count = 0
    for name, parameter in model.named_parameters():
        if name.startswith(lists):
            count += parameter.numel()
            continue
        outside = [n - len(owned.get((name, dim), ())) for dim, n in enumerate(parameter.shape)]
        count += parameter.numel() - math.prod(outside)
    return count


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # refused in some containers: the peak is then that of the whole life of the process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def read_peak_memory(device: torch.device) -> int:
    """Read the peak memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What getrusage tells may be older than the last reset.
    peak = system_value("/proc/self/status", "VmHWM")
    return DeviceMemory().peak() if peak is None else int(peak.split()[0]) * 1024


def count_disk_bytes(path: str | Path | None) -> int | None:
    """Sum the sizes of the safetensors files in a directory, or give None if there are none."""
    if path is None:
        return None
    files = list(Path(path).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None
