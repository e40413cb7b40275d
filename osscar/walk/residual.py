"""What is added to a consumer's output, and where it can be had before the consumer is called.

In a residual network a consumer's output is added to a stream that came past it.  That stream has
been read or put out by some module before (by the normalization of the same block, by the block
before), which tells it from all other tensors whatever the model's code looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from osscar.network.hooks import hooks
from osscar.network.modules import fresh

_ADDITIONS = frozenset(
    {
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.__iadd__,
    }
)

_RESHAPES = frozenset(
    {torch.reshape, Tensor.reshape, Tensor.view, torch.unflatten, Tensor.unflatten}
)
"""What mixtures of experts, which work on a matrix of tokens, do with their outputs."""


@dataclass(frozen=True)
class Place:
    """A tensor that passes a module: the n-th call of it, and which of what it reads or puts out.

    Parameters
    ----------
    module
        Its qualified name.
    call
        Counted from 0.
    key
        ``"in"`` or ``"out"``, and the position or name.
    """

    module: str
    call: int
    key: tuple[str, int | str]


def streams(
    model: nn.Module, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, tuple[Place, ...]]:
    """Return where the tensors pass that are added to what consumers put out.

    Parameters
    ----------
    model
        The model; it is run once.
    example
        Its inputs.
    names
        The consumers.

    Returns
    -------
    dict
        By consumer, only of those that are called once, and to whose output something is added
        that has passed a module before, unchanged since.  That may have other leading dimensions.
    """
    watch = _Watch(set(names))
    inner = [name for name, _ in model.named_modules() if name]
    with torch.no_grad(), hooks(model, inner, watch.before, watch.after), watch:
        model(**fresh(example))
    return {
        name: tuple(sum.added)
        for name, sum in watch.sums.items()
        if sum.added and watch.calls.get(name) == 1
    }


@dataclass(eq=False)
class _Sum:
    """What has been added to the output of a consumer so far."""

    before: int
    """How many tensors had been seen when it was called."""
    added: list[Place] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Sighting:
    place: Place
    number: int
    version: int


class _Watch(TorchFunctionMode):
    """Follows additions through one forward pass."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.calls = names, dict[str, int]()
        self.sums: dict[str, _Sum] = {}
        self._alive: list[Tensor] = []
        """Tensors are told apart by their addresses, which must not be used again."""
        self._seen: dict[int, _Sighting] = {}
        self._parts: dict[int, set[str]] = {}

    def before(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        for key, value in _inputs(args, kwargs):
            self._see(Place(name, self.calls.get(name, 0), key), value)
        if name in self.names:
            self.sums[name] = _Sum(len(self._alive))

    def after(self, name: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        for key, value in _outputs(result):
            self._see(Place(name, self.calls.get(name, 0), key), value)
        if name in self.names and isinstance(result, Tensor):
            self._parts.setdefault(id(result), set()).add(name)
        self.calls[name] = self.calls.get(name, 0) + 1

    def _see(self, place: Place, tensor: Tensor) -> None:
        known = self._seen.get(id(tensor))
        if not tensor.is_inference() and (known is None or known.version != tensor._version):
            self._seen[id(tensor)] = _Sighting(place, len(self._alive), tensor._version)
        self._alive.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        adding = func in _ADDITIONS and len(args) >= 2 and not (kwargs or {}).get("alpha")
        versions = [t._version for t in args[:2] if _plain(t)] if adding else []
        result = func(*args, **(kwargs or {}))
        if adding and len(versions) == 2 and isinstance(result, Tensor):
            self._alive += [result, *args[:2]]
            self._add(args[0], versions[0], args[1], result)
            self._add(args[1], versions[1], args[0], result)
        source = args[0] if args else (kwargs or {}).get("input")
        if (
            func in _RESHAPES
            and isinstance(source, Tensor)
            and id(source) in self._parts
            and result.shape[-1:] == source.shape[-1:]
        ):
            self._alive.append(result)
            self._parts.setdefault(id(result), set()).update(self._parts[id(source)])
        return result

    def _add(self, other: Tensor, version: int, own: Tensor, result: Tensor) -> None:
        """Note that `other` was added to what holds outputs of some consumers."""
        for name in self._parts.get(id(own), ()):
            known = self._seen.get(id(other))
            early = known is not None and known.number < self.sums[name].before
            if known and early and known.version == version and other.shape == own.shape:
                self.sums[name].added.append(known.place)
            self._parts.setdefault(id(result), set()).add(name)


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


_Named: TypeAlias = "list[tuple[tuple[str, int | str], Tensor]]"


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Named:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(("in", key), value) for key, value in named if isinstance(value, Tensor)]


def _outputs(result: Any) -> _Named:
    several = result if isinstance(result, tuple | list) else (result,)
    return [(("out", i), value) for i, value in enumerate(several) if isinstance(value, Tensor)]


class Keeper:
    """Keeps what passes the places of one forward pass until the consumers are called.

    Parameters
    ----------
    places
        As `streams` returns them.
    """

    def __init__(self, places: Mapping[str, tuple[Place, ...]]) -> None:
        self._places = places
        self._last = {place: name for name, some in places.items() for place in some}
        self._calls: dict[str, int] = {}
        self._kept: dict[Place, Tensor] = {}

    def note_inputs(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep what is wanted of what a module is called with."""
        self._note(name, _inputs(args, kwargs))

    def note_outputs(self, name: str, result: Any) -> None:
        """Keep what is wanted of what a module puts out; its call is over."""
        self._note(name, _outputs(result))
        self._calls[name] = self._calls.get(name, 0) + 1

    def _note(self, name: str, found: _Named) -> None:
        for key, value in found:
            place = Place(name, self._calls.get(name, 0), key)
            if place in self._last:
                self._kept[place] = value

    def take(self, consumer: str) -> Tensor | None:
        """Return the sum of what will be added to a consumer's output; None if nobody knows."""
        places = self._places.get(consumer, ())
        if not places or not all(place in self._kept for place in places):
            return None
        total = self._kept[places[0]]
        for place in places[1:]:
            total = total + self._kept[place].reshape(total.shape)
        for place in places:
            if self._last[place] == consumer:
                del self._kept[place]
        return total


def kept_streams(
    model: nn.Module, modules: Iterable[str], keeper: Callable[[], Keeper | None]
) -> AbstractContextManager[None]:
    """Show the keeper of the pass that is running what modules read and put out.

    Parameters
    ----------
    model
        The model.
    modules
        Which of its modules to watch.
    keeper
        Returns it; None if nobody keeps anything.
    """

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        own = keeper()
        if own is not None:
            own.note_inputs(name, args, kwargs)

    def after(name: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        own = keeper()
        if own is not None:
            own.note_outputs(name, result)

    return hooks(model, modules, before, after)
