"""The operators of a traced program, and the shapes that they have at other widths."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Size:
    """A size that depends on how many units groups keep.

    Parameters
    ----------
    terms
        It is a sum of products, each of a number and of the widths of groups, a name of which
        occurs twice where it is squared.  A constant has no names.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @classmethod
    def summed(cls, terms: Mapping[tuple[str, ...], int]) -> Size:
        """Return the sum of some products: the number of each, by the names of its groups."""
        return cls(tuple(sorted((names, number) for names, number in terms.items() if number)))

    def at(self, kept: Mapping[str, int]) -> int:
        """Return the size where groups keep so many units; all that it depends on are named."""
        return sum(n * math.prod(kept[name] for name in names) for names, n in self.terms)

    def given(self, kept: Mapping[str, int | str]) -> Size:
        """Return it with some groups at a width, or under another name."""
        total: Counter[tuple[str, ...]] = Counter()
        for names, number in self.terms:
            values = [kept.get(name, name) for name in names]
            left = tuple(sorted(value for value in values if isinstance(value, str)))
            total[left] += number * math.prod(v for v in values if isinstance(v, int))
        return Size.summed(total)

    def __mul__(self, other: Size) -> Size:
        product: Counter[tuple[str, ...]] = Counter()
        for (a, m), (b, n) in itertools.product(self.terms, other.terms):
            product[tuple(sorted(a + b))] += m * n
        return Size.summed(product)


ONE = Size((((), 1),))


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads or writes.

    Parameters
    ----------
    dims
        The sizes of its dimensions.
    dtype
        Its number format.
    tensor
        The name of the parameter or buffer that it is; empty for any other.
    """

    dims: tuple[Size, ...]
    dtype: torch.dtype
    tensor: str = ""


@dataclass(frozen=True)
class Operator:
    """A node of the traced graph.

    Parameters
    ----------
    name
        Unique name of the node.
    target
        Operator, such as ``aten.linear.default``.
    module
        Qualified name of the module in which it was called.
    order
        Position in execution order.
    inputs
        Names of the nodes that it reads.
    tensors
        Names of the parameters and buffers that it reads.
    function
        What the node calls, such as ``torch.ops.aten.linear.default``.
    arguments
        Its arguments by name, defaults filled in, an `Operand` in place of each tensor.
    outputs
        The tensors that it returns.
    """

    name: str
    target: str
    module: str
    order: int
    inputs: tuple[str, ...]
    tensors: tuple[str, ...]
    function: Callable[..., Any] = field(repr=False)
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    outputs: tuple[Operand, ...] = field(default=(), repr=False)

    @property
    def reads(self) -> tuple[Operand, ...]:
        """The tensors among its arguments, those in lists, too."""
        leaves = pytree.tree_leaves(self.arguments)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Operand))

    def arguments_at(
        self, size: Callable[[Size], int], tensor: Callable[[tuple[int, ...], torch.dtype], Any]
    ) -> dict[str, Any]:
        """Return arguments with which it can be called at other widths.

        `size` returns the value of a size, such as ``lambda size: size.at(kept)``, and `tensor`
        what stands for a tensor of a shape and number format.
        """

        def shape(operand: Operand) -> tuple[int, ...]:
            return tuple(map(size, operand.dims))

        found: dict[str, Any] = pytree.tree_map_only(
            Operand, lambda one: tensor(shape(one), one.dtype), self.arguments
        )
        for name in _LITERALS.keys() & found.keys():
            found[name] = _LITERALS[name](self, found[name], shape)
        if self.target == "aten.slice.Tensor":
            found["start"], found["end"] = _sliced(self, shape)
        return found


# ---- numbers that follow widths ----------------------------------------------------------

Shape = Callable[[Operand], tuple[int, ...]]


def _groups(operator: Operator, value: int, shape: Shape) -> int:
    """Return the groups of a convolution: what its weight has are the channels of each."""
    weight = operator.arguments["weight"]
    transposed = "transpose" in operator.target or operator.arguments.get("transposed", False)
    around = operator.outputs[0] if transposed else operator.arguments["input"]
    return shape(around)[1 - len(weight.dims)] // shape(weight)[1]


def _groups_of_norm(operator: Operator, value: int, shape: Shape) -> int:
    """Return as many groups as there were, or else the most that divide the channels."""
    return math.gcd(value, shape(operator.arguments["input"])[1])


def _output_shape(operator: Operator, value: Any, shape: Shape) -> Any:
    return list(shape(operator.outputs[0]))


def _last_dims(operator: Operator, value: Sequence[int], shape: Shape) -> list[int]:
    return list(shape(operator.arguments["input"])[-len(value) :])


def _lengths(operator: Operator, value: Sequence[int], shape: Shape) -> list[int]:
    return [shape(output)[operator.arguments["dim"]] for output in operator.outputs]


def _length(operator: Operator, value: int, shape: Shape) -> int:
    dim: int = operator.arguments["dim"]
    return shape(operator.outputs[0])[dim]


def _sliced(operator: Operator, shape: Shape) -> tuple[int, int]:
    """Return start and end of a slice: one that does not begin at zero ends with the tensor."""
    given = operator.arguments
    reach: int = _length(operator, 0, shape) * given["step"]
    whole: int = shape(given["self"])[given["dim"]]
    return (whole - reach, whole) if given["start"] else (0, reach)


_LITERALS: Mapping[str, Callable[[Operator, Any, Shape], Any]] = {
    "groups": _groups,
    "num_groups": _groups_of_norm,
    "size": _output_shape,
    "shape": _output_shape,
    "normalized_shape": _last_dims,
    "split_sizes": _lengths,
    "split_size": _length,
}
"""What becomes of numbers in the code, by the name of the argument."""
