"""Convolutions unfolded: the windows that a kernel reads, never all of them in memory at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNFOLDED_BYTES = 64 * 2**20
"""The most memory, in float64, of windows that are unfolded at once.  A single row of output
positions is unfolded whole, should it take more than that."""

_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Windows:
    """How a convolution walks over space.

    A transposed convolution is a plain one, with reversed taps and stride 1, over an input between
    whose positions ``stride - 1`` zeros are inserted (Dumoulin and Visin, "A guide to convolution
    arithmetic for deep learning", 2016, section 4).

    Parameters
    ----------
    kernel, stride, dilation
        In each dimension of space.
    padding
        As `torch.nn.functional.pad` takes it: last dimension first, before and after; negative
        where positions are cut off.
    mode
        The mode of that function.
    upsampling
        Distance of the input's positions once zeros are inserted.
    transposed
        Whether this describes a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str = "constant"
    upsampling: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def taps(self) -> int:
        """Positions in the kernel."""
        return math.prod(self.kernel)

    def unfolded(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the windows of x, (positions, channels * taps), piece by piece.

        Parameters
        ----------
        x
            (batch, channels, *space).
        """
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
        space = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        positions = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in space]
        batch, channel, *steps = x.stride()
        strides = [
            batch,
            *(a * s for a, s in zip(steps, self.stride, strict=True)),
            channel,
            *(a * d for a, d in zip(steps, self.dilation, strict=True)),
        ]
        return x.as_strided((len(x), *positions, x.shape[1], *self.kernel), strides)


def windows_of(module: nn.Module) -> Windows | None:
    """Describe how a convolution walks; None for any other module."""
    if isinstance(module, _TRANSPOSED):
        return _transposed(module)
    if not isinstance(module, _PLAIN):
        return None
    return Windows(
        kernel=_sizes(module.kernel_size),
        stride=_sizes(module.stride),
        dilation=_sizes(module.dilation),
        padding=_sizes(module._reversed_padding_repeated_twice),
        mode=_MODES[module.padding_mode],
    )


def _transposed(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) -> Windows:
    kernel, dilation = _sizes(module.kernel_size), _sizes(module.dilation)
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
        transposed=True,
    )


def _sizes(sizes: object) -> tuple[int, ...]:
    assert isinstance(sizes, tuple | list)
    return tuple(int(size) for size in sizes)


def _spread(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Insert zeros between positions."""
    space = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], steps, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *space)
    places = spread
    for dim, step in enumerate(steps, start=2):
        places = places.movedim(dim, 0)[::step].movedim(0, dim)
    places.copy_(x)
    return spread
