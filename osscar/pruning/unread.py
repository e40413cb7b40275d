"""Weights that the calibration data do not reach, and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from graph import CouplingGroup, DependencyGraph
from osscar.base.printable import listed


def warn_of_unread(
    model: nn.Module,
    traced: DependencyGraph,
    groups: Sequence[CouplingGroup],
    pruned: Sequence[CouplingGroup],
) -> None:
    """Warn of weights that nothing reads and that may read what is pruned, by their width.

    They belong to another way through the model, such as one that an optional input takes.  Nobody
    can know whether units reach them there.  A width that other layers have, too, is no sign of it,
    nor is one that weights on that way make themselves, such as a tower for images.  What code for
    training reads is tried, and not guessed here.

    Parameters
    ----------
    model
        The dense model.
    traced
        Its dependency graph, with the parameters that the example does not reach.
    groups
        All its groups.
    pruned
        Those that lose units.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    chosen = {group.name for group in pruned}
    of_pruned = _widths(shapes, pruned)
    of_others = _widths(shapes, [group for group in groups if group.name not in chosen])
    unread = (name for name in traced.unread if name not in traced.stuck)
    matrices = {name: shapes[name] for name in unread if len(shapes[name]) > 1}
    made_there = {made for made, *_ in matrices.values()}
    telling = of_pruned - of_others - made_there
    found = [
        name for name, (_, read, *_) in matrices.items() if read in telling or name in traced.stuck
    ]
    if not found:
        return
    warnings.warn(
        f"the calibration data do not reach {listed([*map(repr, found)])}, which may read layers "
        "that are pruned: kept as it is, this may not fit calls that do reach it; leave the layers "
        "before it out (--skip), or give data that take that way",
        stacklevel=2,
    )


def _widths(shapes: dict[str, tuple[int, ...]], groups: Sequence[CouplingGroup]) -> set[int]:
    """Return the sizes of all dimensions in which units of some groups lie."""
    slots = (slot for group in groups for slot in group.slots if slot.tensor in shapes)
    return {shapes[slot.tensor][slot.dim] for slot in slots}
