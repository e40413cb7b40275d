"""Which groups are residual streams: summed from several producers, and read along the way."""

from __future__ import annotations

from graph.dependency import DependencyGraph
from graph.groups import CouplingGroup, UnitKind
from graph.propagate import Operator


def residual_groups(traced: DependencyGraph) -> frozenset[str]:
    """Return the names of the groups whose units are sums of what several layers produce.

    Such units run through many blocks: removing one narrows them all.  The gates of squeeze and
    excitation multiply what another layer produced and make no residual stream.

    Parameters
    ----------
    traced
        A traced model.
    """
    return frozenset(
        group.name
        for group in traced.groups
        if group.kind is UnitKind.HIDDEN
        or (group.kind is UnitKind.CHANNELS and _is_summed(group, traced.operators))
    )


def _is_summed(group: CouplingGroup, operators: tuple[Operator, ...]) -> bool:
    """Tell whether an addition joins values of which each has a producer that the other lacks."""
    producers = {slot.order for slot in group.producers}
    consumers = {slot.order for slot in group.consumers}
    if len(producers) < 2:
        return False
    sources: dict[str, frozenset[int]] = {}
    for operator in operators:
        read = [sources.get(name, frozenset()) for name in operator.inputs]
        if operator.target.startswith("aten.add") and any(
            a - b and b - a for a in read for b in read
        ):
            return True
        if operator.order in producers:
            sources[operator.name] = frozenset({operator.order})
        elif operator.order not in consumers:
            sources[operator.name] = frozenset().union(*read)
    return False
