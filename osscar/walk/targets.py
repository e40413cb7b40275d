"""What a consumer is asked to reproduce, and what is added to its output.

With X the inputs in the pruned stream and W0 the dense weights, each target is ``Y = X W0 + D``:
what the dense weights make of these inputs, and a correction D of what earlier layers have already
changed.

In a residual network a consumer's output is added to a stream that came past it.  That stream has
been read or returned by some module before (by the normalization of the same block, by the block
before), which tells it from all other tensors whatever the model's code looks like.
"""

from __future__ import annotations

import abc
import enum
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from osscar.network.hooks import hooks
from osscar.network.modules import forward


class Target(enum.StrEnum):
    """What the targets are corrected for."""

    WEIGHTS = "weights"
    """Nothing: what the dense weights make of the pruned inputs, which is the paper's target."""
    RESIDUAL = "residual"
    """What the dense model returns at the same place, and what the residual stream lacks, to which
    the consumer's output is added."""

    @property
    def needs_dense(self) -> bool:
        """Whether batches have to run through the dense weights, too."""
        return self is Target.RESIDUAL


def correction(
    dense: Tensor,
    pruned: Tensor,
    dense_stream: Tensor | None = None,
    pruned_stream: Tensor | None = None,
) -> Tensor:
    """Return D, given what a consumer with dense weights returns in each stream, in its shape."""
    finer = torch.promote_types(dense.dtype, torch.float32)
    D = dense.to(finer) - pruned.to(finer)
    if dense_stream is not None and pruned_stream is not None:
        change = dense_stream.to(finer) - pruned_stream.to(finer)
        D = D + (change if D.is_nested else change.reshape(D.shape))
    return D


# ---- what is added to an output ----------------------------------------------------------

_ADDITIONS = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)
_RESHAPES = frozenset(
    {torch.reshape, Tensor.reshape, Tensor.view, torch.unflatten, Tensor.unflatten}
)
"""What mixtures of experts, which work on a matrix of tokens, do with their outputs."""

_Passage: TypeAlias = tuple[str, int, str, int | str]
"""A tensor that passes a module: its name, which of its calls, counted from 0, whether it is read
(``"in"``) or return (``"out"``), and its position or name there."""


class _Passing:
    """Shows all tensors that modules read and return, in their order, to `see`."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)

    def read(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take what a module is called with."""
        self._see_all(name, "in", [*enumerate(args), *kwargs.items()])

    def put_out(self, name: str, result: Any) -> None:
        """Take what a module returns; its call is over."""
        several = result if isinstance(result, tuple | list) else (result,)
        self._see_all(name, "out", enumerate(several))
        self.calls[name] += 1

    def _see_all(self, name: str, side: str, values: Iterable[tuple[int | str, Any]]) -> None:
        for key, value in values:
            if isinstance(value, Tensor):
                self.see((name, self.calls[name], side, key), value)

    @abc.abstractmethod
    def see(self, passage: _Passage, tensor: Tensor) -> None:
        """Take one of them."""


def streams(
    model: nn.Module, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, tuple[_Passage, ...]]:
    """Run a model once; return where the tensors pass that are added to what consumers return.

    Returned by name are the consumers that are called once, and to whose output something is added
    that has passed a module before, unchanged since.  It may have other leading dimensions.
    """
    watch = _StreamWatch(set(names))
    inner = [name for name, _ in model.named_modules() if name]
    with torch.no_grad(), hooks(model, inner, watch.before, watch.after), watch:
        forward(model, example)
    return {
        name: tuple(added)
        for name, added in watch.added.items()
        if added and watch.calls[name] == 1
    }


class _StreamWatch(_Passing, TorchFunctionMode):
    """Follows additions through one forward pass."""

    def __init__(self, names: set[str]) -> None:
        TorchFunctionMode.__init__(self)
        _Passing.__init__(self)
        self.names = names
        self.added: dict[str, list[_Passage]] = {}
        """What has been added to the output of each consumer so far."""
        self._begun: dict[str, int] = {}
        """How many tensors had been seen when it was called."""
        self._alive: list[Tensor] = []
        """All tensors, so that no address is used twice."""
        self._seen: dict[int, tuple[_Passage, int, int]] = {}
        """By address: where it was first seen, after how many tensors, and in which version."""
        self._parts: dict[int, set[str]] = defaultdict(set)
        """The consumers whose outputs a tensor holds, by address."""

    def before(self, name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.read(name, args, kwargs)
        if name in self.names:
            self.added[name], self._begun[name] = [], len(self._alive)

    def after(self, name: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        self.put_out(name, result)
        if name in self.names and isinstance(result, Tensor):
            self._parts[id(result)].add(name)

    def see(self, passage: _Passage, tensor: Tensor) -> None:
        known = self._seen.get(id(tensor))
        if not tensor.is_inference() and (known is None or known[2] != tensor._version):
            self._seen[id(tensor)] = passage, len(self._alive), tensor._version
        self._alive.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        adding = func in _ADDITIONS and len(args) >= 2 and not (kwargs or {}).get("alpha")
        versions = [
            t._version
            for t in (args[:2] if adding else ())
            if isinstance(t, Tensor) and not t.is_inference()
        ]
        result = func(*args, **(kwargs or {}))
        if len(versions) == 2 and isinstance(result, Tensor):
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
            self._parts[id(result)] |= self._parts[id(source)]
        return result

    def _add(self, other: Tensor, version: int, own: Tensor, result: Tensor) -> None:
        """Note that `other` was added to what holds outputs of some consumers."""
        if id(own) not in self._parts:
            return
        passage, number, known = self._seen.get(id(other), (None, 0, 0))
        for name in self._parts[id(own)]:
            early = number < self._begun[name]
            if passage is not None and early and known == version and other.shape == own.shape:
                self.added[name].append(passage)
        self._parts[id(result)] |= self._parts[id(own)]


class Keeper(_Passing):
    """Keeps what is wanted of one forward pass until the consumers are called."""

    def __init__(self, passages: Mapping[str, tuple[_Passage, ...]]) -> None:
        super().__init__()
        self._passages = passages
        self._last = {passage: name for name, some in passages.items() for passage in some}
        self._kept: dict[_Passage, Tensor] = {}

    def see(self, passage: _Passage, tensor: Tensor) -> None:
        """Keep what is wanted."""
        if passage in self._last:
            self._kept[passage] = tensor

    def take(self, consumer: str) -> Tensor | None:
        """Return the sum of what will be added to a consumer's output; None if nobody knows."""
        passages = self._passages.get(consumer, ())
        if not passages or not all(passage in self._kept for passage in passages):
            return None
        total = self._kept[passages[0]]
        for passage in passages[1:]:
            total = total + self._kept[passage].reshape(total.shape)
        for passage in dict.fromkeys(passages):  # a stream may be added twice
            if self._last[passage] == consumer:
                del self._kept[passage]
        return total
