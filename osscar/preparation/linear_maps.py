"""The consumers of a model: layers, groups of convolutions, and experts; which can be refitted.

A convolution has one row of W for each channel and tap of its kernel (see
`osscar.preparation.convolutions`).  Of a mixture of experts each expert is a consumer of its own
(see `osscar.preparation.routing`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graph.groups import CouplingGroup, Freeze, Slot
from osscar.base.errors import ModelError
from osscar.preparation.consumer import LinearMap
from osscar.preparation.convolutions import Windows, windows_of
from osscar.preparation.recurrent import BIAS, RECURRENT, WEIGHT, directions
from osscar.preparation.routing import Mixture, Routed

_READ_ELSEWHERE = (
    "is read by {!r}, which other code than that of {!r} reads, too, or its bias, on inputs that "
    "nobody measures"
)
_NO_MIXTURE = (
    "is read by {!r} in {!r}, a {}, which is not called with tokens, their experts and weights, or "
    "does not put out the weighted sum over experts; only such a mixture can be refitted"
)
_INSIDE = (
    "is read by {!r} inside of {!r}, a mixture whose experts are refitted: these are read by "
    "running it again and again, on inputs that are not those of the calibration data"
)
_TOO_NARROW = (
    "is read by kernels for all experts at once, which take widths that are multiples of {}, and "
    "has no more units than that"
)
_KERNEL_BYTES = 16


@dataclass(frozen=True, eq=False)
class FeatureMap(LinearMap):
    """A `torch.nn.Linear` or transformers' `Conv1D`, which reads the last dimension."""

    def read_inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Yield all positions at once."""
        x = _positions(x)
        yield x if len(self.inputs) == x.shape[1] else x[:, self.inputs.to(x.device)]

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
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
class _RecurrentMap(FeatureMap):
    """The gates of a recurrent layer in one direction, which read the last dimension.

    Parameters
    ----------
    direction
        Which of `osscar.preparation.recurrent.directions`.
    """

    direction: int

    @property
    def parameters(self) -> tuple[str, str]:
        """Under which names the module has weight and bias."""
        end = directions(self.module)[self.direction]
        return WEIGHT + end, BIAS + end

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the gates' inputs of this direction, of those that `input_gates` makes."""
        return _positions(y).chunk(len(directions(self.module)), 1)[self.direction]


@dataclass(frozen=True, eq=False)
class _ConvolutionMap(LinearMap):
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
        """Yield the unfolded windows, as many at once as `convolutions` allows."""
        space = len(self.windows.kernel)
        x = x.detach().reshape(-1, *x.shape[-space - 1 :])
        channels = self.inputs + self.part * self._channels
        if len(channels) < x.shape[1]:
            x = x[:, channels.to(x.device)]
        yield from self.windows.unfolded(x)

    def read_outputs(self, y: Tensor, x: Tensor) -> Tensor:
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


@dataclass(frozen=True, eq=False)
class _ExpertMap(LinearMap):
    """What one expert adds to the output of a mixture.

    Its inputs are multiplied with the weight of the token at this expert, so that what it puts out
    is its term of the mixture's sum.  For tokens that are not sent to it, both are zero.

    Parameters
    ----------
    mixture
        The module, which is called with what is `Routed`.
    expert
        Which of its experts.
    """

    mixture: Mixture
    expert: int

    @property
    def label(self) -> str:
        """The module and the expert."""
        return f"{self.name}[{self.expert}]"

    @property
    def parameters(self) -> tuple[str, str]:
        """The parameter with the last matrix of every expert; biases stay."""
        return self.mixture.parameter, ""

    def read_inputs(self, x: Routed) -> Iterator[Tensor]:
        """Yield the tokens that are sent to this expert."""
        visits = self.mixture.visits(x)
        X = visits.X[visits.expert == self.expert]
        yield X if len(self.inputs) == X.shape[1] else X[:, self.inputs.to(X.device)]

    def read_outputs(self, y: Tensor, x: Routed) -> Tensor:
        """Return what the mixture puts out for these tokens."""
        visits = self.mixture.visits(x)
        return y.detach()[visits.token[visits.expert == self.expert]]

    def read_corrections(self, D: Tensor, x: Routed) -> Tensor:
        """Return the part of the corrections that falls to this expert."""
        visits = self.mixture.visits(x)
        here = visits.expert == self.expert
        return D.detach()[visits.token[here]].double() * visits.share[here, None]

    def passed_over(self, x: Routed) -> int:
        """Return how many tokens are sent to others."""
        visits = self.mixture.visits(x)
        return len(x.hidden) - len(set(visits.token[visits.expert == self.expert].tolist()))

    def _view(self, weight: Tensor) -> Tensor:
        return weight[self.expert].movedim(self.mixture.dim - 1, 0)


def mixture_of(model: nn.Module, slots: Sequence[Slot]) -> Mixture | None:
    """Return the module with the matrices of several experts that reads a group, if one does.

    Parameters
    ----------
    model
        The model.
    slots
        Of one tensor.
    """
    name, _, parameter = slots[0].tensor.rpartition(".")
    weight = _tensor(model, slots[0].tensor)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3 or slots[0].dim == 0:
        return None
    module = model.get_submodule(slots[0].module)
    plain = name != slots[0].module or windows_of(module) is not None
    return None if plain else Mixture(name, module, parameter, slots[0].dim)


def mixtures_of(model: nn.Module, groups: Sequence[CouplingGroup]) -> dict[str, Mixture]:
    """Return what reads prunable groups and may be a mixture of experts, by name of the tensor."""
    found = {
        slots[0].tensor: mixture_of(model, slots)
        for group in groups
        if not group.frozen
        for slots in _by_tensor(group)
    }
    return {name: mixture for name, mixture in found.items() if mixture is not None}


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
        module, mixture = model.get_submodule(slots[0].module), mixture_of(model, slots)
        if mixture is not None:
            found += _experts(mixture, slots)
        else:
            found += _maps(model, module, slots)
    return tuple(found)


def freeze_unreadable(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    elsewhere: Collection[str] = (),
    mixtures: Collection[str] = (),
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
    mixtures
        Tensors that were seen to be the last matrices of a mixture of experts.
    """
    outer = {name.rpartition(".")[0] for name in mixtures}

    def reason(slots: tuple[Slot, ...]) -> str | None:
        tensor, module = slots[0].tensor, slots[0].module
        if module in elsewhere:
            return _READ_ELSEWHERE.format(tensor, module)
        if mixture_of(model, slots) is not None and tensor not in mixtures:
            kind = type(model.get_submodule(module)).__name__
            return _NO_MIXTURE.format(tensor, module, kind)
        around = next((name for name in outer if module.startswith(f"{name}.")), None)
        if around is not None:
            return _INSIDE.format(tensor, around)
        return _unreadable(model, slots)

    return tuple(
        group if group.frozen else _with_steps(model, _frozen(group, reason)) for group in groups
    )


def _frozen(
    group: CouplingGroup, reason: Callable[[tuple[Slot, ...]], str | None]
) -> CouplingGroup:
    reasons = ((slots[0].module, reason(slots)) for slots in _by_tensor(group))
    freezes = tuple(Freeze(said, "refit", module) for module, said in reasons if said is not None)
    return dataclasses.replace(group, frozen=freezes)


def _with_steps(model: nn.Module, group: CouplingGroup) -> CouplingGroup:
    """Note which widths kernels take that multiply all experts at once: rows of 16 bytes.

    The model may run another kernel now, and what is saved of it is run by any.
    """
    found = {} if group.frozen else mixtures_of(model, [group])
    if not found:
        return group
    step = max(_KERNEL_BYTES // one.weight.element_size() for one in found.values())
    if step >= group.units:
        module = next(iter(found.values())).name
        return dataclasses.replace(
            group, frozen=(Freeze(_TOO_NARROW.format(step), "refit", module),)
        )
    return dataclasses.replace(group, step=step)


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
    if mixture_of(model, slots) is None:
        if not any(getattr(module, name) is weight for name in _weights(module)):
            return (
                f"is read by {tensor!r} in {slots[0].module!r}, a {type(module).__name__}; only "
                "Linear, Conv1D, convolution and recurrent layers and mixtures of experts can be "
                "refitted"
            )
        if not _is_what_it_seems(module):
            return (
                f"is read by {tensor!r} in {slots[0].module!r}, whose forward pass is not that of "
                "a plain layer; what it computes cannot be refitted"
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
        yield _RecurrentMap(name, module, slots, torch.tensor(indices), has_bias, place)
        return
    windows, has_bias = windows_of(module), _has_bias(model, module, "bias")
    if windows is None:
        yield FeatureMap(name, module, slots, torch.tensor(indices), has_bias)
        return
    channels = int(module.in_channels) // int(module.groups)  # type: ignore[arg-type]
    for part in range(int(module.groups)):  # type: ignore[arg-type]
        own = _channels_of_part(slots[0], channels, part, indices)
        if own:
            yield _ConvolutionMap(name, module, slots, torch.tensor(own), has_bias, windows, part)


def _experts(mixture: Mixture, slots: tuple[Slot, ...]) -> Iterator[LinearMap]:
    indices = sorted(i for slot in slots for i in slot.indices(range(slot.units)))
    for expert in range(len(mixture.weight)):
        yield _ExpertMap(
            slots[0].module, mixture.module, slots, torch.tensor(indices), False, mixture, expert
        )


def _channels_of_part(slot: Slot, channels: int, part: int, indices: Sequence[int]) -> list[int]:
    """Return which channels of one group of a convolution stand behind weight indices.

    Dimension 1 of a plain filter counts channels inside a group; dimension 0 of a transposed one
    counts all of them.
    """
    if slot.dim == 1:
        return list(indices)
    return [i - part * channels for i in indices if i // channels == part]
