"""Consumers as matrices: what a module reads, and the weights it reads it with.

Every consumer is seen as ``Y = X W``: rows of X are positions, columns of X and rows of W are the
inputs that belong to one coupling group, ordered as they lie in the weight tensor.  A convolution
has one row of W for each channel and tap of its kernel (see `osscar.capture.convolutions`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graph.groups import CouplingGroup, Freeze, Slot
from osscar.capture.convolutions import Windows, windows_of
from osscar.capture.recurrent import BIAS, RECURRENT, WEIGHT, directions
from osscar.core.errors import ModelError, NonFiniteError
from osscar.core.on_disk import written
from osscar.shrinking.attention import REWRITTEN, rewritten

_READ_ELSEWHERE = (
    "is read by {!r}, which other code than that of {!r} reads, too, or its bias, on inputs that "
    "nobody measures"
)


def argument_read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a layer reads: its only argument, or that of this name beside states."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


@dataclass(frozen=True, eq=False)
class LinearMap(abc.ABC):
    """One consumer of a coupling group.

    Parameters
    ----------
    name
        Qualified name of the module.
    module
        The module whose inputs are observed.
    slots
        The slots of the group in the module's weight.
    inputs
        The input features or channels, int64 in ascending order, that the group owns.
    has_bias
        Whether it has a bias that it shares with no other module.
    """

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    inputs: Tensor
    has_bias: bool

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        return "weight", "bias"

    @property
    def taps(self) -> int:
        """How many rows of W one input owns."""
        return 1

    @property
    def rows(self) -> int:
        """The number p of rows of W."""
        return len(self.inputs) * self.taps

    @property
    def unit_rows(self) -> list[list[int]]:
        """The rows of `read_weight` that each unit owns."""
        position = {feature: row for row, feature in enumerate(self.inputs.tolist())}
        return [
            [
                position[i] * self.taps + tap
                for slot in self.slots
                for i in self._own(slot.indices([unit]))
                for tap in range(self.taps)
            ]
            for unit in range(self.slots[0].units)
        ]

    def _own(self, indices: Sequence[int]) -> list[int]:
        """Return which inputs stand behind indices along the slots' dimension."""
        return list(indices)

    @abc.abstractmethod
    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield X, (positions, p), piece by piece, from what the module is called with."""

    @abc.abstractmethod
    def read_outputs(self, y: Tensor) -> Tensor:
        """Return Y, (positions, m), of all positions in the order of `read_inputs`.

        Parameters
        ----------
        y
            In the shape in which the module puts it out.
        """

    @abc.abstractmethod
    def _view(self, weight: Tensor) -> Tensor:
        """Return a view of the weight, (all inputs, m) or (all inputs, m, *kernel)."""

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        view = self._view(self._weight)
        part = view[self.inputs.to(view.device)].double()
        return part.flatten(2).mT.flatten(0, 1) if part.ndim > 2 else part

    def write_weight(self, W: Tensor) -> None:
        """Replace the group's part of the weight by W, (p, m)."""
        with written(self.module, self.parameters[0]) as weight:
            view = self._view(weight)
            W = W.to(view)
            if not bool(torch.isfinite(W).all()):
                raise NonFiniteError(
                    f"the refitted weights of {self.name!r} overflow {view.dtype}; "
                    "use --dtype float32 or bfloat16, or raise --damp"
                )
            if view.ndim > 2:
                W = W.view(-1, self.taps, W.shape[1]).mT.reshape(-1, *view.shape[1:])
            view[self.inputs.to(view.device)] = W

    def read_bias(self) -> Tensor:
        """Return the bias of the outputs, (m,), a float64 copy; only where it `has_bias`."""
        bias = getattr(self.module, self.parameters[1])
        assert isinstance(bias, Tensor)
        return self._bias_view(bias.detach()).to(torch.float64, copy=True)

    def write_bias(self, bias: Tensor) -> None:
        """Replace the bias of the outputs, (m,).

        Raises
        ------
        NonFiniteError
            If it overflows the module's number format.
        """
        with written(self.module, self.parameters[1]) as whole:
            view = self._bias_view(whole)
            bias = bias.to(view)
            if not bool(torch.isfinite(bias).all()):
                raise NonFiniteError(
                    f"the refitted bias of {self.name!r} overflows {view.dtype}; "
                    "use --dtype float32 or bfloat16, or raise --damp"
                )
            view.copy_(bias)

    def _bias_view(self, bias: Tensor) -> Tensor:
        """Return a view of the part of a bias that belongs to the outputs."""
        return bias

    @property
    def number_format(self) -> torch.dtype:
        """In which the module keeps its weight."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The weight itself, outside of autograd."""
        weight = getattr(self.module, self.parameters[0])
        assert isinstance(weight, Tensor)
        return weight.detach()


@dataclass(frozen=True, eq=False)
class FeatureMap(LinearMap):
    """A `torch.nn.Linear` or transformers' `Conv1D`, which reads the last dimension."""

    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield all positions at once."""
        x = _positions(x)
        yield x if len(self.inputs) == x.shape[1] else x[:, self.inputs.to(x.device)]

    def read_outputs(self, y: Tensor) -> Tensor:
        """Return all positions."""
        return _positions(y)

    def _view(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.slots[0].dim, 0)


def _positions(x: Tensor) -> Tensor:
    """Return all positions, (positions, features); of packed sequences without the padding."""
    if not x.is_nested:
        return x.detach().reshape(-1, x.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.detach().unbind()])


@dataclass(frozen=True, eq=False)
class RecurrentMap(FeatureMap):
    """The gates of a recurrent layer in one direction, which read the last dimension.

    Parameters
    ----------
    direction
        Which of `osscar.capture.recurrent.directions`.
    """

    direction: int

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        end = directions(self.module)[self.direction]
        return WEIGHT + end, BIAS + end

    def read_outputs(self, y: Tensor) -> Tensor:
        """Return the gates' inputs of this direction, of those that `input_gates` makes."""
        return _positions(y).chunk(len(directions(self.module)), 1)[self.direction]


@dataclass(frozen=True, eq=False)
class ConvolutionMap(LinearMap):
    """The channels that one group of a convolution reads, with all taps of the kernel.

    A dense convolution has one group.  Of a grouped one, each group is a linear map of its own: its
    outputs depend on no other group's inputs, so that the whole Gram matrix would be block-diagonal
    with these blocks, and a unit of the coupling group owns rows in each of them.

    Parameters
    ----------
    windows
        How the convolution walks over space.
    part
        Which group of the convolution.
    """

    windows: Windows
    part: int

    @property
    def taps(self) -> int:
        """Positions in the kernel."""
        return self.windows.taps

    def _own(self, indices: Sequence[int]) -> list[int]:
        return _channels_of_part(self.slots[0], self._channels, self.part, indices)

    @property
    def _channels(self) -> int:
        """Input channels of one group of the convolution."""
        return int(self.module.in_channels) // int(self.module.groups)  # type: ignore[arg-type]

    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the unfolded windows, as many at once as `osscar.capture.convolutions` allows."""
        space = len(self.windows.kernel)
        x = x.detach().reshape(-1, *x.shape[-space - 1 :])
        channels = self.inputs + self.part * self._channels
        if len(channels) < x.shape[1]:
            x = x[:, channels.to(x.device)]
        yield from self.windows.unfolded(x)

    def read_outputs(self, y: Tensor) -> Tensor:
        """Return the channels that this group of the convolution puts out, at each position."""
        y = y.detach().reshape(-1, *y.shape[-len(self.windows.kernel) - 1 :])
        made = y.shape[1] // int(self.module.groups)  # type: ignore[arg-type]
        return y[:, self.part * made :][:, :made].movedim(1, -1).flatten(0, -2)

    def _bias_view(self, bias: Tensor) -> Tensor:
        made = len(bias) // int(self.module.groups)  # type: ignore[arg-type]
        return bias[self.part * made :][:made]

    def _view(self, weight: Tensor) -> Tensor:
        if self.windows.transposed:
            view = weight[self.part * self._channels :][: self._channels]
        else:
            made = len(weight) // int(self.module.groups)  # type: ignore[arg-type]
            view = weight[self.part * made :][:made].transpose(0, 1)
        return view

    def read_weight(self) -> Tensor:
        """Return W, (p, m), a float64 copy."""
        W = super().read_weight()
        return self._reversed(W) if self.windows.transposed else W

    def write_weight(self, W: Tensor) -> None:
        """Replace the group's part of the weight by W, (p, m)."""
        super().write_weight(self._reversed(W) if self.windows.transposed else W)

    def _reversed(self, W: Tensor) -> Tensor:
        """Turn taps round: a transposed convolution writes where a plain one reads."""
        return W.view(-1, self.taps, W.shape[1]).flip(1).flatten(0, 1)


def linear_maps(model: nn.Module, group: CouplingGroup) -> tuple[LinearMap, ...]:
    """Return the consumers of a group, in execution order.

    Raises
    ------
    ModelError
        If a consumer is not a module whose inputs can be observed, or shares its weight with
        another module, so that a refit would change both.
    """
    found: list[LinearMap] = []
    for slots in _by_tensor(group):
        reason = _unreadable(model, slots)
        if reason is not None:
            raise ModelError(f"group {group.name!r} {reason}")
        module = model.get_submodule(slots[0].module)
        found += _maps(model, module, slots)
    return tuple(found)


def expose_attention(model: nn.Module) -> None:
    """Let fused attention call its output layer as a module, so that what it reads can be observed.

    Parameters
    ----------
    model
        Changed in place; what it computes stays the same.
    """
    for module in model.modules():
        extended = isinstance(module, nn.MultiheadAttention) and (
            module.bias_k is not None or module.add_zero_attn
        )
        if not extended:  # those cannot lose heads
            rewritten(module, REWRITTEN)


def freeze_unreadable(
    model: nn.Module, groups: Sequence[CouplingGroup], elsewhere: Collection[str] = ()
) -> tuple[CouplingGroup, ...]:
    """Freeze the groups whose consumers cannot be refitted, and say why.

    Parameters
    ----------
    model
        The traced model.
    groups
        Its groups; the frozen ones stay as they are.
    elsewhere
        Modules whose weights other code than their own reads, too.
    """
    return tuple(_frozen_if_unreadable(model, group, elsewhere) for group in groups)


def _frozen_if_unreadable(
    model: nn.Module, group: CouplingGroup, elsewhere: Collection[str]
) -> CouplingGroup:
    if group.frozen:
        return group
    reasons = (
        (
            slots,
            _READ_ELSEWHERE.format(*(slots[0].tensor, slots[0].module))
            if slots[0].module in elsewhere
            else _unreadable(model, slots),
        )
        for slots in _by_tensor(group)
    )
    freezes = tuple(
        Freeze(reason, "refit", slots[0].module) for slots, reason in reasons if reason is not None
    )
    return dataclasses.replace(group, frozen=freezes)


def _by_tensor(group: CouplingGroup) -> tuple[tuple[Slot, ...], ...]:
    by_tensor: dict[str, list[Slot]] = {}
    for slot in group.consumers:
        by_tensor.setdefault(slot.tensor, []).append(slot)
    return tuple(tuple(slots) for slots in by_tensor.values())


def _unreadable(model: nn.Module, slots: tuple[Slot, ...]) -> str | None:
    """Return why a consumer cannot be refitted, or None."""
    tensor, module = slots[0].tensor, model.get_submodule(slots[0].module)
    weight = _tensor(model, tensor)
    if not isinstance(weight, nn.Parameter):
        return f"is read by a buffer, which is not refitted: {tensor!r}"
    if not weight.is_floating_point():
        return (
            f"is read by {tensor!r} of {weight.dtype}, and only real weights are refitted: a least-"
            "squares problem over complex numbers is another one"
        )
    if not any(getattr(module, name) is weight for name in _weights(module)):
        return (
            f"is read by {tensor!r} in {slots[0].module!r}, a {type(module).__name__}; only "
            "Linear, Conv1D, convolution and recurrent layers can be refitted"
        )
    if not _is_what_it_seems(module):
        return (
            f"is read by {tensor!r} in {slots[0].module!r}, whose forward pass is not that of a "
            "plain layer; what it computes cannot be refitted"
        )
    users = [
        user
        for user, other in model.named_modules()
        for parameter in other.parameters(recurse=False)
        if parameter is weight
    ]
    if len(users) > 1:
        return f"is read by {tensor!r}, which {' and '.join(users)} share; a refit changes them all"
    return None


_PLAIN_FORWARDS = frozenset(
    kind.forward
    for kind in (
        *(nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
    )
)


_PLAIN_ELSEWHERE = (
    "timm.layers.linear.Linear.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
)
"""Forward passes of other libraries that compute what those do."""


def _is_what_it_seems(module: nn.Module) -> bool:
    """Whether a layer runs the code of the class whose weight it has, and no code of its own."""
    forward = type(module).forward
    name = f"{forward.__module__}.{forward.__qualname__}"
    plain = forward in _PLAIN_FORWARDS or name in _PLAIN_ELSEWHERE
    return plain and "forward" not in vars(module)


def _tensor(model: nn.Module, name: str) -> object:
    """Return a parameter, buffer or plain attribute by its qualified name."""
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def _weights(module: nn.Module) -> list[str]:
    """Return under which names a layer has weights that can be refitted."""
    if isinstance(module, RECURRENT):
        return [WEIGHT + end for end in directions(module)]
    known = isinstance(module, nn.Linear | Conv1D) or windows_of(module) is not None
    return ["weight"] if known else []


def _has_bias(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a bias can be written to: nothing computes it, and no other module has it."""
    bias = getattr(module, name, None)
    owners = (p for other in model.modules() for p in other.parameters(recurse=False))
    return isinstance(bias, nn.Parameter) and sum(p is bias for p in owners) == 1


def _maps(model: nn.Module, module: nn.Module, slots: tuple[Slot, ...]) -> Iterator[LinearMap]:
    name = slots[0].module
    indices = sorted(i for slot in slots for i in slot.indices(range(slot.units)))
    if isinstance(module, RECURRENT):
        end = slots[0].tensor.rpartition(".")[2].removeprefix(WEIGHT)
        has_bias = _has_bias(model, module, BIAS + end)
        place = directions(module).index(end)
        yield RecurrentMap(name, module, slots, torch.tensor(indices), has_bias, place)
        return
    windows, has_bias = windows_of(module), _has_bias(model, module, "bias")
    if windows is None:
        yield FeatureMap(name, module, slots, torch.tensor(indices), has_bias)
        return
    channels = int(module.in_channels) // int(module.groups)  # type: ignore[arg-type]
    for part in range(int(module.groups)):  # type: ignore[arg-type]
        own = _channels_of_part(slots[0], channels, part, indices)
        if own:
            yield ConvolutionMap(name, module, slots, torch.tensor(own), has_bias, windows, part)


def _channels_of_part(slot: Slot, channels: int, part: int, indices: Sequence[int]) -> list[int]:
    """Return which channels of one group of a convolution stand behind weight indices.

    Dimension 1 of a plain filter counts channels inside a group; dimension 0 of a transposed one
    counts all of them.
    """
    if slot.dim == 1:
        return list(indices)
    return [i - part * channels for i in indices if i // channels == part]
