"""Which groups are residual streams: summed from several producers, and read along the way."""

from __future__ import annotations

from itertools import combinations

import networkx as nx

from graph.dependency import DependencyGraph
from graph.errors import ArgumentError
from graph.groups import UnitKind


def residual_groups(traced: DependencyGraph) -> frozenset[str]:
    """Return the names of the groups whose units are sums of what several layers produce.

    Such units run through many blocks: removing one narrows them all.  The gates of squeeze and
    excitation multiply what another layer produced and make no residual stream.

    Parameters
    ----------
    traced
        A traced model.

    Raises
    ------
    ArgumentError
        If it is none.
    """
    if not isinstance(traced, DependencyGraph):
        raise ArgumentError(f"traced is a {type(traced).__name__}; give what graph.trace returns")
    network = traced.networkx()
    names = {operator.order: operator.name for operator in traced.operators}
    return frozenset(
        group.name
        for group in traced.groups
        if group.kind is UnitKind.HIDDEN
        or (
            group.kind is UnitKind.CHANNELS
            and _is_summed(
                network,
                {names[slot.order] for slot in group.producers},
                {names[slot.order] for slot in group.consumers},
            )
        )
    )


def _is_summed(network: nx.DiGraph[str], producers: set[str], consumers: set[str]) -> bool:
    """Tell whether an addition joins values of which each has a producer that the other lacks."""
    if len(producers) < 2:
        return False
    # What a producer reads, and what a consumer makes of the units, are other units.
    read = network.in_edges(producers)
    flow = nx.restricted_view(network, consumers - producers, read)
    reached = {name: {name} | nx.descendants(flow, name) for name in producers}
    for name in set().union(*reached.values()):
        if not network.nodes[name]["data"].target.startswith("aten.add"):
            continue
        sources = [
            {p for p in producers if value in reached[p]} for value in network.predecessors(name)
        ]
        if any(a - b and b - a for a, b in combinations(sources, 2)):
            return True
    return False
