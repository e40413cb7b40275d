"""Drawing the coupling graph: groups, and the tensors whose slices they own."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

import networkx as nx
from matplotlib.figure import Figure

from graph.groups import CouplingGroup, Role, UnitKind

_COLOURS = {
    UnitKind.HEADS: "#3b6fb6",
    UnitKind.NEURONS: "#c2702d",
    UnitKind.CHANNELS: "#3f8f5f",
    UnitKind.HIDDEN: "#7d5aa6",
    UnitKind.EXPERTS: "#b0557f",
    UnitKind.OTHER: "#6b7280",
}
_COLUMNS = {Role.PRODUCER: 0, Role.PASS_THROUGH: 1, None: 2, Role.CONSUMER: 3}
"""Where tensors stand by their role, and groups, which have none."""

_PALE = "#d1d5db"
_TITLES = ("producers", "pass-through", "groups (white: frozen)", "consumers")
_SHOWN = 6
"""How many tensors of one role are drawn; the rest is counted."""

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


def coupling_graph(groups: Sequence[CouplingGroup]) -> nx.DiGraph[str]:
    """Return a graph from producers and pass-through tensors to groups, and on to consumers.

    Groups that differ in the number of their layer alone are one node.  Nodes carry a ``label`` of
    several lines, a ``column`` and, of groups, the first of them as ``data``.
    """
    alike: dict[tuple[object, ...], list[CouplingGroup]] = {}
    for group in groups:
        labels = (_label(group), *(_listed(group, role) for role in Role))
        alike.setdefault(labels, []).append(group)
    network: nx.DiGraph[str] = nx.DiGraph()
    for row, same in enumerate(alike.values()):
        first, key = same[0], str(row)
        network.add_node(key, label=_label(first), data=first, column=_COLUMNS[None])
        if len(same) > 1:
            network.nodes[key]["label"] += f"\nN = {_spans(same)}"
        for role in Role:
            if label := _listed(first, role):
                tensors = f"{row} {role.value}"
                network.add_node(tensors, label=label, column=_COLUMNS[role])
                network.add_edge(*((key, tensors) if role is Role.CONSUMER else (tensors, key)))
    return network


def _printable(text: str) -> str:
    """Return a text as XML can hold it: what is not printable in a name is an escape."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def _label(group: CouplingGroup) -> str:
    reasons = [f"frozen: {freeze.reason}" for freeze in group.frozen[:1]]
    size = f"{group.units} {group.kind.value}, {group.removable} parameters each"
    return "\n".join(
        (_anonymous(group.name), size, *(s for r in reasons for s in textwrap.wrap(r, 48)))
    )


def _listed(group: CouplingGroup, role: Role) -> str:
    slots = [slot for slot in group.slots if slot.role is role]
    lines = [f"{_anonymous(s.tensor)} [{s.dim}] x{s.width}" for s in slots[:_SHOWN]]
    return "\n".join(lines + [f"and {len(slots) - _SHOWN} more"] * (len(slots) > _SHOWN))


def drawn(groups: Sequence[CouplingGroup]) -> Figure:
    """Return a drawing with a row for each group, or for several whose layers are alike."""
    network = coupling_graph(groups)
    labels: dict[str, str] = nx.get_node_attributes(network, "label")
    rows = [list(names) for _, names in groupby(network, key=lambda name: name.split()[0])]
    heights = [max(labels[name].count("\n") for name in names) + 2.2 for names in rows]
    places: dict[str, tuple[float, float]] = {}
    for index, names in enumerate(rows):
        middle = -sum(heights[:index]) - heights[index] / 2
        places |= {name: (network.nodes[name]["column"], middle) for name in names}
    height = 0.14 * sum(heights) + 0.6
    figure = Figure(figsize=(18, min(height, 600)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.5, len(_TITLES) - 0.5)
    axes.set_ylim(-sum(heights) - 0.5, 0.6 / 0.14)
    axes.set_axis_off()
    for column, title in enumerate(_TITLES):
        axes.text(column, 1.5, title, ha="center", weight="bold")
    nx.draw_networkx_edges(network, places, ax=axes, node_size=0, edge_color=_PALE)
    for names in rows:
        group: CouplingGroup = network.nodes[names[0]]["data"]
        for name in names:
            filled = name == names[0] and group.prunable
            edge = _COLOURS[group.kind] if group.prunable else _PALE
            axes.text(
                *places[name],
                _printable(labels[name]).replace("$", r"\$"),
                color="white" if filled else "black",
                bbox={"boxstyle": "round", "ec": edge, "fc": edge if filled else "white"},
                fontsize=7,
                family="monospace",
                ha="center",
                va="center",
            )
    return figure


def _anonymous(name: str) -> str:
    """Return a name with N in place of the number of its layer."""
    return _NUMBER.sub("N", name, count=1)


def _spans(groups: Iterable[CouplingGroup]) -> str:
    """Return the numbers of the layers of groups, such as ``0 to 3, 7``."""
    found = sorted(int(m[0]) for g in groups if (m := _NUMBER.search(g.name)))
    runs = [
        [n for _, n in run] for _, run in groupby(enumerate(found), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
