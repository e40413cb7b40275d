"""The sizes of inputs that a program takes: those that it was traced with, or any.

A trace leaves a size open as long as the code computes with it as a tensor would.  What makes a
number of it, such as `int`, `math.sqrt` or a loop, writes that number into the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from graph.tracing.standalone import Sizes
from osscar.base.errors import ModelError

Shapes: TypeAlias = Mapping[str, Sequence[int | None]]
"""By the names of the inputs, their sizes; None for one that may be any."""

_OTHERWISE = (
    "give inputs of such sizes; where the dense model takes others, so do its modules "
    "(--form eager)"
)


class InputSizes(nn.Module):
    """Refuses inputs of sizes that a program does not take, before it computes anything."""

    _is_impure = True
    """Lets torch keep it in a graph in which nobody reads what it returns."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, *inputs: Tensor) -> None:
        """Check the inputs of the program."""
        given = dict(zip(self.sizes.shapes, inputs, strict=True))
        wrong = self.sizes.misfit(given)
        if wrong is not None:
            raise ModelError(
                f"{wrong} is of {_written(given[wrong].shape)}, and the exported program takes "
                f"{_written(self.sizes.shapes[wrong])}, since it was traced with these sizes; "
                f"{_OTHERWISE}"
            )
        condition = self.sizes.broken(given)
        if condition is not None:
            sizes = ", ".join(f"{name} of {_written(one.shape)}" for name, one in given.items())
            raise ModelError(
                f"the exported program does not hold for {sizes}, but where {condition}; "
                f"{_OTHERWISE}"
            )


def _written(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def sizes_given_up(
    shapes: Shapes,
    example: Mapping[str, Tensor],
    runs: Callable[[Mapping[str, Sequence[int]]], bool],
) -> dict[str, tuple[int, ...]]:
    """Return the dimensions of which a model takes other sizes, and its program does not.

    They are by the names of the inputs; `example` is what the program was traced with, and `runs`
    tells whether the model takes inputs of some shapes.  Dimensions of one size may have to be
    alike, so that all of them are tried together, and then each alone.
    """
    sizes: dict[int, list[tuple[str, int]]] = {}
    for name, shape in shapes.items():
        for dim, size in enumerate(shape):
            if dim and size is not None:
                sizes.setdefault(size, []).append((name, dim))
    found: set[tuple[str, int]] = set()
    for size, dims in sizes.items():
        for some in (dims, *([dim] for dim in dims)):
            for other in (2 * size, size // 2) if size > 3 else (2 * size,):
                tried = {
                    name: [other if (name, d) in some else n for d, n in enumerate(t.shape)]
                    for name, t in example.items()
                }
                if not found.issuperset(some) and runs(tried):
                    found.update(some)
    return {
        name: those
        for name in shapes
        if (those := tuple(sorted(dim for of, dim in found if of == name)))
    }


def fixed_in_words(traced: Iterable[Mapping[str, Any]]) -> str:
    """Say which sizes a program takes no others of; nothing if it takes all that its model does.

    `traced` are the fields of each `TracedInput`.
    """
    dims: dict[int, list[str]] = {}
    for given in traced:
        for dim in given["fixed"]:
            dims.setdefault(given["shape"][dim], []).append(f"dimension {dim} of {given['name']}")
    said = [f"{size} alone along {' and '.join(where)}" for size, where in dims.items()]
    if not said:
        return ""
    return f"the exported program takes {', '.join(said)}, where the dense model takes other sizes"
