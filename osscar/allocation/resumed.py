"""A forward pass that goes on where changed weights are first read: what comes before is the same.

The dense model runs once while its operators are noted, each with what it reads.  A model of which
a few weights have changed runs the same operators on the same numbers up to the first one that
reads any of these; from there on they run again.  The results are those of the whole pass, bit by
bit, where no operator is chosen by a value that weights change: else there is no recording.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from osscar.base.memory import let_shortage_pass
from osscar.data.batches import Batch

HELD_BYTES = 128 << 20
"""Most memory of the values that are held for passes to be resumed where a weight is first read;
where they would take more, a pass is resumed from an earlier step."""

_aten = torch.ops.aten
_BY_INDEX = (_aten.index.Tensor, _aten.masked_select.default)
"""Operators of which an index, and not the values, says how large the result is."""

_DRAWING = ("dropout_p", "dropout", "p", "train", "training")
"""Arguments without which an operator that may draw random numbers draws none."""

_PAST_OPERATORS = ("tolist", "numpy", "__array__", "__dlpack__", "data_ptr")
"""What gives values to other code than operators."""


class _Value(NamedTuple):
    """A result of an operator, by its number."""

    number: int


@dataclass(frozen=True, eq=False)
class _Step:
    """A call of an operator: its arguments, and the numbers of its results' leaves."""

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: Sequence[int | None]
    last_read: Sequence[int]
    """The values that no later call reads."""


class _Unsound(Exception):
    """The pass does something of which its operators do not tell, or by the values of weights."""


class Recording:
    """The operators of a forward pass of the dense model, and the values where it stands."""

    def __init__(self, recorder: _Recorder, result: Any, most_bytes: int) -> None:
        leaves, self._form = pytree.tree_flatten(result)
        plain = (Tensor, int, float, str, type(None))
        if not all(isinstance(leaf, plain) for leaf in leaves):
            raise _Unsound
        self._leaves = recorder.named(leaves)
        self._steps, self._cuts = recorder.finished(self._leaves, most_bytes)
        self._first_read = recorder.first_read
        self._at, self._held = 0, dict[int, Tensor]()

    @torch.no_grad()
    def resumed(self, changed: Iterable[Tensor]) -> Any:
        """Return what the model puts out with changed values of some parameters."""
        count = len(self._steps)
        first = min((self._first_read.get(_memory(one), count) for one in changed), default=count)
        cut = self._cuts[bisect_right(self._cuts, first) - 1]
        at, held = (0, {}) if cut < self._at else (self._at, self._held)
        self._at, self._held = 0, {}  # should it fail
        self._run(at, cut, held)
        self._at, self._held = cut, held
        values = dict(held)
        self._run(cut, count, values)
        leaves = [values[one.number] if isinstance(one, _Value) else one for one in self._leaves]
        return pytree.tree_unflatten(leaves, self._form)

    def _run(self, start: int, stop: int, values: dict[int, Tensor]) -> None:
        for step in self._steps[start:stop]:
            kwargs = {name: _filled(one, values) for name, one in step.kwargs.items()}
            result = step.operator(*_filled(step.args, values), **kwargs)
            found = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
            values |= {n: one for n, one in zip(step.results, found, strict=True) if n is not None}
            for number in step.last_read:
                values.pop(number, None)


def _filled(argument: Any, values: Mapping[int, Tensor]) -> Any:
    """Return an argument, such as a tensor or a list of tensors, with values for their numbers."""
    if isinstance(argument, _Value):
        return values[argument.number]
    if isinstance(argument, list | tuple):
        return type(argument)(_filled(one, values) for one in argument)
    return argument


def recorded(
    run: Callable[[nn.Module, Batch], Any],
    model: nn.Module,
    batch: Batch,
    most_bytes: int = HELD_BYTES,
) -> tuple[Any, Recording | None]:
    """Return what `run` does for a model and a batch, with a recording if it can be resumed.

    The values that it holds to be resumed from take at most `most_bytes`.
    """
    try:
        recorder = _Recorder(model, batch)
        with recorder, _NoNumbers(recorder):
            result = run(model, batch)
    except Exception as error:  # of operators and kinds of tensors that no mode sees
        let_shortage_pass(error)
        return run(model, batch), None
    recording = None
    if recorder.sound:
        with suppress(_Unsound):
            recording = Recording(recorder, result, most_bytes)
    return result, recording


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operator of a forward pass."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sound = True
        self.first_read: dict[int, int] = {}
        """Where a tensor that was there before the pass is first read, by its memory."""
        self._parameters = {_memory(one) for one in model.parameters()}
        kept = (one for module in model.modules() for one in vars(module).values())
        there = (*kept, *model.buffers(), *batch.values())
        self._there = {_memory(one) for one in there if isinstance(one, Tensor)} | self._parameters
        """Memory of tensors that were there before."""
        self._calls: list[tuple[OpOverload, list[Any], pytree.TreeSpec, list[int | None]]] = []
        self._numbers: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._made: list[int] = []
        """For each value, the call that made the memory that it lies in."""
        self._bytes: dict[int, int] = {}
        """Of the memory that calls have made."""
        self._maker: dict[int, int] = {}
        """The call that made a piece of memory."""
        self._varying: set[int] = set()
        """Values that depend on parameters."""
        self._written: list[tuple[int, int]] = []
        """Calls that write to memory, with that which made it."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs or {}))
        try:
            if func is _aten.lift_fresh.default and args[0] not in self._numbers:
                self._there.add(_memory(args[0]))  # numbers that are written in the code
                self._maker.pop(_memory(args[0]), None)
            named = self.named(leaves) if self.sound else []
        except _Unsound:
            self.sound = False
        result = func(*args, **(kwargs or {}))
        if self.sound:
            try:
                self._note(func, args, kwargs or {}, leaves, named, form, result)
            except _Unsound:
                self.sound = False
        return result

    def named(self, leaves: Iterable[Any]) -> list[Any]:
        """Return arguments with the number of each value in its place."""
        named: list[Any] = []
        for leaf in leaves:
            number = self._numbers.get(leaf) if isinstance(leaf, Tensor) else None
            named.append(leaf if number is None else _Value(number))
            if isinstance(leaf, Tensor) and number is None:
                if type(leaf) not in (Tensor, nn.Parameter) or _memory(leaf) not in self._there:
                    raise _Unsound  # something else than an operator has made it
                self.first_read.setdefault(_memory(leaf), len(self._calls))
        return named

    def varies(self, tensors: Iterable[Any]) -> bool:
        """Whether any of some arguments depends on parameters."""
        return any(
            self._numbers.get(one) in self._varying or _memory(one) in self._parameters
            for one in tensors
            if isinstance(one, Tensor)
        )

    def _note(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        leaves: Sequence[Any],
        named: list[Any],
        form: pytree.TreeSpec,
        result: Any,
    ) -> None:
        here, found = len(self._calls), pytree.tree_leaves(result)
        varying = self.varies(leaves)
        sized = leaves if func not in _BY_INDEX else pytree.tree_leaves(args[1:])
        by_values = torch.Tag.dynamic_output_shape in func.tags and self.varies(sized)
        plain = all(isinstance(one, Tensor | None) for one in found)
        if varying and (by_values or not plain or func.namespace != "aten"):
            raise _Unsound
        given = {one.name: one.default_value for one in func._schema.arguments}
        given |= {**dict(zip(given, args, strict=False)), **kwargs}
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and all(given[name] for name in _DRAWING if name in given):
            raise _Unsound  # seeds are set past all operators
        written = [given[argument.name] for argument in func._schema.arguments if argument.is_write]
        for tensor in pytree.tree_leaves(written):
            maker = self._maker.get(_memory(tensor))
            if maker is None:
                raise _Unsound  # it outlives the pass
            self._written.append((maker, here))
            if varying:  # so is all that lies in this memory
                self._varying |= {n for n, made in enumerate(self._made) if made == maker}
        read = {_memory(one) for one in leaves if isinstance(one, Tensor)}
        numbers: list[int | None] = []
        for one in found:
            number = self._numbers.get(one) if isinstance(one, Tensor) else None
            if number is None and isinstance(one, Tensor):
                number, memory = len(self._made), _memory(one)
                if memory not in read:
                    self._maker[memory] = here
                    size = one.untyped_storage().nbytes()
                    self._bytes[here] = self._bytes.get(here, 0) + size
                self._numbers[one] = number
                self._made.append(self._maker.get(memory, -1))
            if varying and number is not None:
                self._varying.add(number)
            numbers.append(number)
        self._calls.append((func, named, form, numbers))

    def finished(self, outputs: Sequence[Any], most_bytes: int) -> tuple[list[_Step], list[int]]:
        """Return the steps, and before which of them the pass can go on, the first among them.

        `outputs` are what it returns.  It does not go on between the call that makes a piece of
        memory and one that writes to it, which would write to what is held.
        """
        count = len(self._calls)
        last = dict[int, int]()
        for here, (_, named, _, results) in enumerate(self._calls):
            last |= dict.fromkeys((one for one in results if one is not None), here)
            last |= {one.number: here for one in named if isinstance(one, _Value)}
        last |= {one.number: count for one in outputs if isinstance(one, _Value)}
        done: list[list[int]] = [[] for _ in range(count + 1)]
        until = dict[int, int]()
        for number, here in last.items():
            done[here].append(number)
            until[self._made[number]] = max(until.get(self._made[number], 0), here)
        held, banned = [0] * (count + 2), [0] * (count + 2)
        for maker, here in until.items():
            held[maker + 1] += self._bytes.get(maker, 0)
            held[here + 1] -= self._bytes.get(maker, 0)
        for maker, here in self._written:
            banned[maker + 1] += 1
            banned[here + 1] -= 1
        steps = []
        for (func, named, form, results), gone in zip(self._calls, done[:count], strict=True):
            args, kwargs = pytree.tree_unflatten(named, form)
            steps.append(_Step(func, args, kwargs, results, gone))
        cuts, live, inside = [0], 0, 0
        for place in range(1, count + 1):
            live, inside = live + held[place], inside + banned[place]
            if not inside and live <= most_bytes:
                cuts.append(place)
        return steps, cuts


class _NoNumbers(TorchFunctionMode):
    """Gives a recording up where code reads values that weights change past all operators."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        reads = getattr(func, "__name__", "") in _PAST_OPERATORS
        if reads and self.recorder.varies(args):
            self.recorder.sound = False
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    """Return what tensors have in common that share their memory."""
    return int(tensor.untyped_storage()._cdata)
