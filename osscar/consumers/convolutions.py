"""Convolutions unfolded: the windows that a kernel reads, never all of them in memory at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

UNFOLDED_BYTES = 64 * 2**20
"""The most memory, in float64, of windows that are unfolded at once.  A single row of output
positions is unfolded whole, should it take more than that."""


@dataclass(frozen=True)
class Windows:
    """How a convolution walks over space; sizes are those of each dimension of space.

    A transposed convolution is a plain one, with reversed taps and stride 1, over an input between
    whose positions ``stride - 1`` zeros are inserted (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", 2016, section 4).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """As `torch.nn.functional.pad` takes it: last dimension first, before and after; negative where
    positions are cut off."""
    mode: str = "constant"
    """Of that function."""
    upsampling: tuple[int, ...] = ()
    """Distance of the input's positions once zeros are inserted."""

    @property
    def taps(self) -> int:
        """Positions in the kernel."""
        return math.prod(self.kernel)

    def unfolded(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the windows of x, (batch, channels, *space), as (positions, channels * taps)."""
        windows = self.view(x)
        row = math.prod(windows.shape[2:]) * 8
        rows = windows.shape[1]
        images = max(1, UNFOLDED_BYTES // (row * rows))
        step = max(1, min(rows, UNFOLDED_BYTES // row))
        columns = x.shape[1] * self.taps
        for some in torch.split(windows, images):
            for piece in torch.split(some, step, dim=1):
                yield piece.reshape(-1, columns)

    def view(self, x: Tensor) -> Tensor:
        """Return all windows without copying them: (batch, *positions, channels, *kernel)."""
        if self.upsampling:
            x = _spread(x, self.upsampling)
        if any(self.padding):
            x = nn.functional.pad(x, self.padding, mode=self.mode)
        space = len(self.kernel)
        sizes = zip(self.kernel, self.stride, self.dilation, strict=True)
        for dim, (taps, stride, dilation) in enumerate(sizes, start=2):
            x = x.unfold(dim, dilation * (taps - 1) + 1, stride)[..., ::dilation]
        return x.movedim(1, 1 + space)


def windows_of(module: _ConvNd) -> Windows:
    """Describe how a convolution walks; taps of a transposed one are in reversed order."""
    kernel, dilation = _sizes(module.kernel_size), _sizes(module.dilation)
    if not isinstance(module, _ConvTransposeNd):
        return Windows(
            kernel=kernel,
            stride=_sizes(module.stride),
            dilation=dilation,
            padding=_sizes(module._reversed_padding_repeated_twice),
            mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
        )
    assert not isinstance(module.padding, str)
    sizes = zip(
        kernel, dilation, _sizes(module.padding), _sizes(module.output_padding), strict=True
    )
    around = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in sizes]
    return Windows(
        kernel=kernel,
        stride=(1,) * len(kernel),
        dilation=dilation,
        padding=tuple(side for pair in reversed(around) for side in pair),
        upsampling=_sizes(module.stride),
    )


def _sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)


def _spread(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Insert zeros between positions."""
    space = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], steps, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *space)
    there = (slice(None), slice(None), *(slice(None, None, step) for step in steps))
    spread[there] = x
    return spread
