"""The figure of a study: the gaps of its problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from osscar.base.printable import share
from osscar.report.figures import legend, new_figure, shares
from osscar.study.cases import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


_LONGEST_NAME = 40


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def gaps_figure(cases: Sequence[Case]) -> Drawing:
    """Draw the gap of each problem as bars, solid what is open, hollow what the root bound left."""
    names = list(dict.fromkeys(case.best.instance for case in cases))
    sparsities = sorted({sparsity for case in cases for sparsity in case.sparsities})
    step = 0.8 / len(sparsities)
    figure, (axes,) = new_figure(width=max(4.4, 0.26 * len(names) + 2), height=3.8)
    for index, sparsity in enumerate(sparsities):
        offset = (index - (len(sparsities) - 1) / 2) * step
        mine = [case for case in cases if sparsity in case.sparsities]
        x = [names.index(case.best.instance) + offset for case in mine]
        axes.bar(x, [case.root_gap or 0.0 for case in mine], step * 0.9, facecolor="none",
                 edgecolor=f"C{index}", linewidth=0.7)  # fmt: skip
        axes.bar(x, [0.0 if case.closed else case.gap or 0.0 for case in mine], step * 0.9,
                 color=f"C{index}", label=f"{share(sparsity)} removed")  # fmt: skip
    axes.set_xticks(range(len(names)), list(map(_short, names)), rotation=90, fontsize=7,
                    parse_math=False)  # fmt: skip
    axes.yaxis.set_major_formatter(shares)
    axes.set_ylabel("gap to the lower bound")
    axes.grid(axis="x", visible=False)
    legend(figure)
    return figure
