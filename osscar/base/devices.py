"""Where models run and in which number format."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from osscar.base.errors import OptionError
from osscar.base.inputs import safe_repr
from osscar.base.memory import system_value

NUMBERS: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "bfloat16", "float16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
"""Number formats of tensors by name."""

FLOATS = {name: kind for name, kind in NUMBERS.items() if kind.is_floating_point}
"""Those of weights."""

_RUN = ("float32", "bfloat16", "float16")
"""Those in which models run."""


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"``, ``"cpu"`` or ``"cuda"`` (or ``"cuda:1"``) into a device that exists."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError, TypeError):
        found = torch.device(device)
        there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(found.type, 0)
        if (found.index or 0) < there:
            return found
    raise OptionError(
        f"cannot run on {safe_repr(device)} (PyTorch sees {torch.cuda.device_count()} CUDA "
        "devices); give 'auto', 'cpu' or one of those"
    )


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device | None = None
) -> torch.dtype | None:
    """Turn the name of a number format into a dtype; None stands for "as stored".

    It is ``"float32"``, ``"bfloat16"``, ``"float16"``, one of these dtypes, or ``"auto"`` (also
    None): as stored on a GPU, float32 on a CPU (the default), where half precision is slow and
    inexact.
    """
    if dtype is None or dtype == "auto":
        return torch.float32 if device is None or device.type == "cpu" else None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str | torch.dtype) else ""
    if name not in _RUN:
        raise OptionError(f"unknown number format {safe_repr(dtype)}; give auto, {', '.join(_RUN)}")
    return NUMBERS[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is known to multiply bfloat16; of processors, those of x86."""
    found: bool
    if device.type == "cuda":
        found = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return found


def this_device(device: torch.device) -> dict[str, str]:
    """Return what decides how fast kernels run here, and how they round, besides their inputs."""
    on_card = device.type == "cuda"
    named = system_value("/proc/cpuinfo", "model name")  # which Python does not know on Linux
    return {
        "device": torch.cuda.get_device_name(device)
        if on_card
        else named or platform.processor() or platform.machine(),
        "threads": "" if on_card else str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


@contextmanager
def default_torch() -> Iterator[None]:
    """Run as torch does by default, whatever the caller has set.

    Tensors are made on the CPU, models run in their own number format, and gradients can be
    computed.  The caller's default number format, deterministic kernels and precision of products
    hold.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
