"""What a propagation rule sees: an operator's call, with layouts for tensors; and the table."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, cast

from graph.axes import ONE, Axes, Layout
from graph.groups import Freeze, Role

Shape: TypeAlias = tuple[int, ...]
Origin: TypeAlias = tuple[tuple[str, int], ...]
"""Tensor dimensions, each a tensor's name and a dimension of it."""


@dataclass(frozen=True)
class Value:
    """The layouts of a traced tensor.

    Parameters
    ----------
    dims
        One layout for each dimension.
    origins
        If this tensor is a mere rearrangement of parameters and buffers (a transpose, a view, a
        scaled copy), the tensor dimensions from which each of its dimensions comes; empty
        otherwise.  Zeros in an origin are zeros here, which is what lets a unit be removed by
        masking its consumers.
    constant
        The numbers in it, if it is a short list of integers written in the model's code.
    """

    dims: tuple[Layout, ...]
    origins: tuple[Origin, ...] = ()
    constant: tuple[int, ...] = ()

    @property
    def is_weight(self) -> bool:
        """Whether this is a rearrangement of parameters and buffers."""
        return bool(self.origins)


@dataclass(frozen=True)
class Use:
    """One role that a tensor dimension was seen in, along the axes of a layout."""

    tensor: str
    dim: int
    layout: Layout
    role: Role
    module: str
    order: int


@dataclass
class Findings:
    """What the rules report besides layouts; each of `heads` has the module of the attention."""

    uses: list[Use] = field(default_factory=list)
    heads: list[tuple[Layout, str]] = field(default_factory=list)
    written: list[Layout] = field(default_factory=list)


def _tensors_in(arguments: Iterable[object]) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors_in(argument)


@dataclass(frozen=True)
class Call:
    """One call of an operator, as a rule sees it.

    Parameters
    ----------
    operator
        Full name, such as ``aten.add.Tensor``.
    module
        Qualified name of the module in which it was called.
    order
        Position in execution order.
    arguments
        Arguments by schema name, defaults filled in, a `Value` (or a list of them) in place of
        each tensor.
    shapes
        Shape of each output tensor.
    axes
        The store of all axes.
    findings
        Where roles and head axes are recorded.
    used
        Whether any output of the model depends on the result.
    """

    operator: str
    module: str
    order: int
    arguments: Mapping[str, object]
    shapes: tuple[Shape, ...]
    axes: Axes
    findings: Findings
    used: bool = True

    # ---- arguments -----------------------------------------------------------------------

    def value(self, name: str) -> Value:
        """Return a tensor argument."""
        argument = self.arguments.get(name)
        if not isinstance(argument, Value):
            raise TypeError(f"{self.operator} has no tensor {name!r}, but {[*self.arguments]}")
        return argument

    def optional(self, name: str) -> Value | None:
        """Return a tensor argument, or None if it is absent or not a tensor."""
        argument = self.arguments.get(name)
        return argument if isinstance(argument, Value) else None

    def values(self) -> list[Value]:
        """Return every tensor argument, those inside lists too, in order."""
        return list(_tensors_in(self.arguments.values()))

    def integer(self, name: str) -> int:
        """Return an integer argument."""
        return cast(int, self.arguments[name])

    def along(self, name: str = "dim", value: str = "self") -> tuple[Value, int]:
        """Return a tensor argument, and the dimension of it that another one names."""
        found = self.value(value)
        return found, self.integer(name) % len(found.dims)

    def flag(self, name: str) -> bool:
        """Return a boolean argument; absent means False."""
        return bool(self.arguments.get(name, False))

    def integers(self, *names: str) -> tuple[int, ...]:
        """Return the first present argument of several names as a tuple of integers."""
        for name in names:
            argument = self.arguments.get(name)
            if isinstance(argument, int):
                return (argument,)
            if argument is not None:
                return tuple(cast(Sequence[int], argument))
        return ()

    # ---- relating ------------------------------------------------------------------------

    def freeze(self, layouts: Iterable[Layout], reason: str) -> None:
        """Forbid pruning along the axes of the given layouts, because of this call."""
        freeze = Freeze(reason=reason, operator=self.operator, module=self.module)
        for layout in layouts:
            self.axes.freeze(layout, freeze)

    def unify(self, a: Layout, b: Layout) -> Layout:
        """Make two layouts equal, or freeze both if their boundaries do not align."""
        if not self.axes.unify(a, b):
            self.freeze((a, b), "the layouts of its operands do not align")
        return self.axes.resolve(a)

    def broadcast(self, operands: Sequence[Sequence[Layout]], shape: Shape) -> tuple[Layout, ...]:
        """Unify the dimensions of operands that broadcast to `shape`, aligned at the end."""
        dims: list[Layout] = []
        for back in range(len(shape), 0, -1):
            size = shape[-back]
            present = [dims[-back] for dims in operands if len(dims) >= back]
            full = [layout for layout in present if self.axes.size(layout) == size != 1]
            merged = full[0] if full else self.axes.fresh(size)
            for layout in full[1:]:
                merged = self.unify(merged, layout)
            dims.append(merged)
        return tuple(dims)

    def record(
        self, value: Value, role: Role, dim: int | None = None, layout: Layout | None = None
    ) -> None:
        """Note the role in which the tensors behind a value take part.

        Parameters
        ----------
        value
            Nothing is noted unless it is a weight.
        role
            The role.
        dim
            The dimension of `value` concerned; all if None.
        layout
            The part of that dimension concerned; all of it if None.
        """
        for index, origin in enumerate(value.origins):
            if dim is None or index == dim % len(value.dims):
                along = value.dims[index] if layout is None else layout
                self.findings.uses.extend(
                    Use(tensor, tensor_dim, along, role, self.module, self.order)
                    for tensor, tensor_dim in origin
                )

    def record_heads(self, layouts: Iterable[Layout]) -> None:
        """Note that an attention runs side by side over the axes of some layouts."""
        self.findings.heads.extend((layout, self.module) for layout in layouts if layout != ONE)

    def record_written(self, layouts: Iterable[Layout]) -> None:
        """Note that the code writes down the sizes of some layouts and infers that of another."""
        self.findings.written.extend(layouts)

    # ---- results -------------------------------------------------------------------------

    def unknown(self, size: int, reason: str) -> Layout:
        """Return a new frozen layout, for a dimension about which nothing is known."""
        layout = self.axes.fresh(size)
        self.freeze((layout,), reason)
        return layout

    def unknowns(self, shapes: Iterable[Shape], reason: str) -> tuple[Value, ...]:
        """Return new frozen tensors of some shapes, about which nothing is known."""
        return tuple(Value(tuple(self.unknown(n, reason) for n in shape)) for shape in shapes)

    def opaque(self, reason: str) -> tuple[Value, ...]:
        """Freeze every input and return frozen outputs: the safe answer to anything."""
        for value in self.values():
            self.freeze(value.dims, reason)
        return self.unknowns(self.shapes, reason)


Result: TypeAlias = Value | Sequence[Value]


# ---- the table ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What an operator does to layouts, and the arguments for every value of which this holds."""

    function: Callable[[Call], Result]
    reads: frozenset[str]


_Function = TypeVar("_Function", bound=Callable[[Call], Result])


class RuleTable(ChainMap[str, Rule]):
    """Rules by operator name, such as ``aten.add``.

    A name without overload covers every overload and the in-place variant (``aten.add_``); a
    name with overload (``aten.add.Tensor``) is more specific and wins.
    """

    def rule(self, *operators: str, reads: str) -> Callable[[_Function], _Function]:
        """Register the decorated function as the rule of some operators.

        Parameters
        ----------
        operators
            Names, such as ``aten.add``.
        reads
            The arguments, by schema name and separated by spaces, for every value of which the rule
            is right.  A call is frozen if another argument is not at its schema's default, or if
            the operator writes to a tensor other than ``self``.
        """

        def register(function: _Function) -> _Function:
            self.update(dict.fromkeys(operators, Rule(function, frozenset(reads.split()))))
            return function

        return register

    def find(self, operator: str) -> Rule | None:
        """Return the rule of an operator given by full name, most specific first, or None."""
        packet = ".".join(operator.split(".")[:2])
        for name in (operator, packet, packet.removesuffix("_")):
            if name in self:
                return self[name]
        return None

    def extended(self) -> RuleTable:
        """Return an empty table on top of this one, which stays as it is."""
        return self.new_child()


def aten(words: str) -> tuple[str, ...]:
    """Return the full names of ATen operators listed in a text."""
    return tuple(f"aten.{word}" for word in words.split())


DEFAULT = RuleTable()
"""The rules that `graph.trace` uses unless it is given a table of its own."""

PROGRAM = DEFAULT.extended()
"""The rules where numbers that the code makes can be cut like weights, since the traced program is
what loses units and not the code."""

CONSTANT = "constant"
"""The name of the rule for tensors that are written in the code."""

rule = DEFAULT.rule
