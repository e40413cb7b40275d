"""Layers that can be refitted: how each class multiplies what it reads, and observing that.

`LAYERS` has a row for each forward pass, so that a class that inherits one needs none.  A layer
whose forward pass changes its weight needs a row, and nothing else: ``docs/howto/module.md`` adds
one.  Weights that code only multiplies by need none: see `osscar.consumers.products`.  Modules are
observed where they are called, products where they are taken (`reads`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from osscar.consumers.products import (
    UNFOLDED_BYTES,
    Contraction,
    Taken,
    is_station,
    watched_products,
)
from osscar.network.hooks import hooks
from osscar.network.modules import HALVES
from osscar.routing.routed import Routed


@dataclass(frozen=True)
class Layer:
    """How a layer, the first argument of each function, makes its output without bias: Y = X W."""

    form: Callable[[Any], Contraction]
    """Tells which dimensions of the weight are inputs and outputs."""
    read: Callable[[Any, Tensor, Tensor | None], Iterator[Tensor]]
    """Given what the layer is called with, and the numbers of inputs, (inputs,) int64, or None for
    all: yields X, (positions, inputs times taps of a kernel), in pieces."""
    weights: Callable[[Any], Sequence[tuple[str, str]]] = lambda _: [("weight", "bias")]
    """Names the weights that multiply what the layer reads, each with its bias."""
    output: Callable[[Any, Tensor], Tensor] | None = None
    """Given what the layer is called with: Y with the bias.  None where the layer puts that out."""


ROWS = Contraction((1,), (0,), (-1,))
"""A weight, (outputs, inputs), as of `torch.nn.Linear`."""


def layer_of(module: nn.Module) -> Layer | None:
    """Return the row of `LAYERS` for a module; None where it runs other code than those."""
    code: Any = type(module).forward
    name = f"{code.__module__}.{getattr(code, '__qualname__', '')}"
    return None if "forward" in vars(module) else LAYERS.get(code, LAYERS.get(name))


# ---- what layers read --------------------------------------------------------------------


def features(layer: nn.Module, x: Tensor, inputs: Tensor | None) -> Iterator[Tensor]:
    """Yield inputs of the last dimension at all positions at once."""
    rows = positions(x)
    yield rows if inputs is None else rows[:, inputs.to(x.device)]


def positions(x: Tensor) -> Tensor:
    """Return all positions, (positions, features); of packed sequences without the padding."""
    if not x.is_nested:
        return x.detach().reshape(-1, x.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.detach().unbind()])


def _channels(layer: Any, x: Tensor, inputs: Tensor | None) -> Iterator[Tensor]:
    """Yield the unfolded windows of channels, as many at once as `UNFOLDED_BYTES` allows."""
    x = x.detach().reshape(-1, *x.shape[-len(layer.kernel_size) - 1 :])
    return _unfolded(layer, x if inputs is None else x[:, inputs.to(x.device)])


def _unfolded(module: _ConvNd, x: Tensor) -> Iterator[Tensor]:
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


def _filters(layer: Any) -> Contraction:
    dims = layer.weight.ndim
    return Contraction(tuple(range(1, dims)), (0,), (1 - dims,), int(layer.groups))


def _transposed(layer: Any) -> Contraction:
    """Return the form of a weight that writes where that of a plain convolution reads."""
    dims = layer.weight.ndim
    return Contraction((0, *range(2, dims)), (1,), (1 - dims,), int(layer.groups), flipped=True)


# ---- recurrent layers --------------------------------------------------------------------

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def _gates(module: nn.Module) -> list[tuple[str, str]]:
    """Return the weights and biases that read inputs, one each for a direction."""
    ends = [""]
    if isinstance(module, nn.RNNBase):
        ends = ["_l0", "_l0_reverse"] if module.bidirectional else ["_l0"]
    return [(f"weight_ih{end}", f"bias_ih{end}") for end in ends]


def input_gates(module: nn.Module, x: Tensor) -> Tensor:
    """Return what the gates of all directions take from the inputs, (..., directions x gates).

    The first layer of an LSTM, a GRU or a plain RNN adds what it makes of its states to that; no
    module puts it out.
    """
    names = _gates(module)
    parts = [F.linear(x, getattr(module, w), getattr(module, b, None)) for w, b in names]
    return torch.cat(parts, -1)


# ---- the table ---------------------------------------------------------------------------

_LINEAR = Layer(lambda _: ROWS, features)
_CONVOLUTION = Layer(_filters, _channels)
_TRANSPOSED = Layer(_transposed, _channels)
_RECURRENT = Layer(lambda _: ROWS, features, _gates, input_gates)

LAYERS: dict[Callable[..., Any] | str, Layer] = {
    nn.Linear.forward: _LINEAR,
    Conv1D.forward: Layer(lambda _: Contraction((0,), (1,), (-1,)), features),
    **{kind.forward: _CONVOLUTION for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    nn.ConvTranspose1d.forward: _TRANSPOSED,
    nn.ConvTranspose2d.forward: _TRANSPOSED,
    nn.ConvTranspose3d.forward: _TRANSPOSED,
    **{kind.forward: _RECURRENT for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{kind.forward: _RECURRENT for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "timm.layers.linear.Linear.forward": _LINEAR,
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": _LINEAR,
}
"""By the function of the forward pass; by its full name where a library may not be installed."""


# ---- observed ------------------------------------------------------------------------------


def argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module reads: `Routed`, or its argument, the first beside states."""
    if len(args) + len(kwargs) > 1:
        routed = Routed.of(module, args, kwargs)
        if routed is not None:
            return routed
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


def _ignore(*_: Any) -> None:
    pass


@contextmanager
def reads(
    model: nn.Module,
    names: Collection[str],
    before: Callable[[str, Any], Any] = _ignore,
    after: Callable[[str, Any, Any], Any] = _ignore,
) -> Iterator[None]:
    """Show what some modules and products read while the block runs.

    That of a module is what `argument` has, that of a product what is `Taken`.  `before` is told
    the name and what is read, and may return what is `Routed`, which is read instead; `after` is
    told also what is returned, and what it gives back, if anything, goes on instead.
    """
    products = {name for name in names if is_station(name)}

    def reading(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        instead = before(name, argument(module, args, kwargs))
        return None if instead is None else (instead.tensors, {})

    def read(name: str, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        return after(name, argument(module, args, kwargs), y)

    modules = [name for name in names if name not in products]
    with hooks(model, modules, reading, read), watched_products(model, products, before, after):
        yield


def output_of(module: nn.Module, x: Any) -> Any:
    """Return what a module returns on its `argument`, without its hooks."""
    if isinstance(x, Routed | Taken):
        return x.output(module)
    layer = layer_of(module)
    if layer is None or layer.output is None:
        return module.forward(x)
    return layer.output(module, x)


def exact_output(module: nn.Module, x: Any, y: Any = None) -> Any:
    """Return `output_of`, in float32 where a module or a product computes in half precision.

    Outputs of two streams differ by little, which half precision would round away.  Mixtures keep
    their format: all their experts in float32 would be a copy at every batch; and so does what runs
    under autocast, which would round what is finer.  `y` is what was returned already, if known.
    """
    read = x.multiplied if isinstance(x, Taken) else x
    half = isinstance(read, Tensor) and read.dtype in HALVES
    if not half or torch.is_autocast_enabled(read.device.type):
        layer = layer_of(module)
        put_out = layer is None or layer.output is None
        return y if y is not None and put_out else output_of(module, x)
    if isinstance(x, Taken):
        return x.finer().output()
    before = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.float()
        return output_of(module, x.float())
    finally:
        for parameter, data in before:
            parameter.data = data


def afresh(x: Any) -> Any:
    """Return an `argument` as it came: what is read of it lives as long as what is returned."""
    return dataclasses.replace(x, read={}) if isinstance(x, Routed) else x
