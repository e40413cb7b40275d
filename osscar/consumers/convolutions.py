"""Convolutions unfolded: the windows that a kernel reads, never all of them in memory at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

UNFOLDED_BYTES = 64 * 2**20
"""The most memory, in float64, of windows that are unfolded at once.  A single row of output
positions is unfolded whole, should it take more than that."""


def unfolded(module: _ConvNd, x: Tensor) -> Iterator[Tensor]:
    """Yield the windows of x, (batch, channels, *space), as (positions, channels * taps)."""
    windows = _windows(module, x)
    row = math.prod(windows.shape[2:]) * 8
    rows = windows.shape[1]
    images = max(1, UNFOLDED_BYTES // (row * rows))
    step = max(1, min(rows, UNFOLDED_BYTES // row))
    columns = x.shape[1] * math.prod(module.kernel_size)
    for some in torch.split(windows, images):
        for piece in torch.split(some, step, dim=1):
            yield piece.reshape(-1, columns)


def _windows(module: _ConvNd, x: Tensor) -> Tensor:
    """Return all windows without copying them: (batch, *positions, channels, *kernel).

    A transposed convolution is a plain one, with reversed taps and stride 1, over an input between
    whose positions ``stride - 1`` zeros are inserted (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", 2016, section 4).
    """
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padding, mode = module._reversed_padding_repeated_twice, module.padding_mode
    if isinstance(module, _ConvTransposeNd):
        assert not isinstance(module.padding, str)
        spaces = zip(x.shape[2:], stride, strict=True)
        spread = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in spaces))
        spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
        x, stride = spread, (1,) * len(kernel)
        sides = zip(kernel, dilation, module.padding, module.output_padding, strict=True)
        around = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in sides]
        padding = [side for pair in reversed(around) for side in pair]  # negative cuts off
    if any(padding):
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    sizes = zip(kernel, stride, dilation, strict=True)
    for dim, (taps, step, apart) in enumerate(sizes, start=2):
        x = x.unfold(dim, apart * (taps - 1) + 1, step)[..., ::apart]
    return x.movedim(1, 1 + len(kernel))
