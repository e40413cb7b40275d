"""What happened to one group of a run: every number that tables, pages and JSON tell of it.

A field that is annotated with a `Column` is a column of the table of layers, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from osscar.base.printable import decimals
from osscar.report.shown import Column
from osscar.walk.layer_step import GROWN
from solvers import SolutionRecord

_LOSS = (
    "squared error of the layers that read the units, relative to that of removing all units; for "
    "experts that of the mixture's output before the refit, relative to this output"
)


def _certificate(layer: Mapping[str, Any]) -> str:
    if layer["lower_bound"] is None:
        return ""
    known = "optimal" if layer["proved_optimal"] else "bounded"
    return known if layer["recomputed_bound"] is None else f"{known}, recomputed"


def _bound(bound: float) -> str:
    return decimals(max(0.0, bound))


def _growth(times: float) -> str:
    return f"{times:,.3g}x" if times > GROWN else ""


def _count(count: int) -> str:
    return str(count or "")


@dataclass(frozen=True, repr=False)
class LayerReport(SolutionRecord):
    """What happened to one coupling group: its solution's record, and what else is known.

    `loss` is the mean squared change of what the consumer computes, with the proximal term, after
    the refit; if several layers read the group, the sum over them, each relative to its own scale.

    Parameters
    ----------
    name, kind, units, kept
        The group, and how many of its units stayed.
    dead
        Units whose inputs were zero on all calibration data.
    damp
        Weight of the proximal term.
    correction_weight
        How much of what the target adds to that of ``weights`` counts.
    positions
        Positions of the calibration data at which its weights were fitted, at the consumer with the
        fewest.
    unread
        Consumers that read nothing at any position: experts to which no token was sent.  They keep
        the weights of the units that stay.
    held_out
        Held-out positions at which its refit was compared with the dense weights of the units that
        stay, at the consumer with the fewest.
    unrefitted
        The consumers that keep those, since the refit did worse there; `loss` is that of the refit.
    fixed
        Inputs of its consumers that no unit owns, and that were refitted, too.
    fixed_dense
        Those that keep their weights, since the consumer has too many rows.
    growth
        The largest refitted weight over the largest dense one, at the consumer that grew most.
    measure_seconds, solve_seconds
        Wall time of the walk to this group with its Gram matrices, and of the solver with the
        refit and, if asked for, the verification.
    refitted_loss
        Of experts: the error of the mixture's output after the refit, relative to the squared norm
        of the target on all tokens that weights are fitted to, as `relative_loss` is before it.
    choosing
        Of experts: the number of tokens by which they were chosen, which `loss` is about.
    """

    name: Annotated[str, Column("group")]
    kind: str
    units: int
    kept: Annotated[int, Column("kept >", row="{0[kept]} of {0[units]}".format)]
    relative_loss: Annotated[float, Column("loss >", decimals, note=_LOSS)]
    refitted_loss: Annotated[
        float | None, Column("refitted >", decimals, note="loss of experts after the refit")
    ]
    relative_bound: Annotated[
        float | None, Column("bound >", _bound, note="no choice of as many units has a lower loss")
    ]
    gap: Annotated[float | None, Column("gap >", "{:.1%}".format)]
    recomputed_bound: Annotated[float | None, Column("certificate", row=_certificate)]
    status: Annotated[str, Column("status", lambda name: name.lower().replace("_", " "))]
    solve_seconds: Annotated[float, Column("seconds >", "{:.2f}".format)]
    measure_seconds: float
    dead: Annotated[
        int,
        Column("dead >", _count, note="units that are zero on all calibration data"),
    ]
    damp: float
    correction_weight: float
    positions: int
    unread: int
    held_out: int
    fixed: Annotated[int, Column("fixed >", _count, note="inputs that no unit owns, refitted too")]
    fixed_dense: Annotated[
        int,
        Column(
            "fixed, dense >",
            _count,
            note="inputs that no unit owns, with dense weights, as there are too many rows",
        ),
    ]
    unrefitted: Annotated[
        tuple[str, ...],
        Column(
            "unrefitted",
            ", ".join,
            note="layers whose dense weights did better than a refit on held-out samples",
        ),
    ]
    growth: Annotated[
        float,
        Column(
            "growth >", _growth, note="largest weight after the refit over the largest dense one"
        ),
    ]
    choosing: int | None

    def __repr__(self) -> str:
        return (
            f"LayerReport({self.name!r}, {self.kept} of {self.units} {self.kind}, "
            f"relative loss {self.relative_loss:.4g}, {self.status})"
        )
