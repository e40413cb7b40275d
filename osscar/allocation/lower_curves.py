"""What no choice of units of a group is predicted to be below, for every number of them.

A curve (`osscar.allocation.curves`) is of the units that are left as they leave one by one, each of
which costs least when it does: other choices of as many may be predicted to do better.  How much,
is bounded: what is predicted of a choice is its loss in a `solvers.SubsetProblem`, and
`solvers.lower_curve` bounds those of all choices at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from graph import CouplingGroup
from osscar.allocation.curvature import GroupCurvature
from osscar.allocation.curves import Prediction, measure_curvatures
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.progress import stage
from osscar.base.timing import Stage, timed
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest
from solvers import lower_curve

_LEAST_REMOVED = 1 / 8
"""Share of the units of a group that keeps all of them, near which its bound is to be good."""


def lower_curves(
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    keep: Mapping[str, int],
    request: PruningRequest,
) -> dict[str, NDArray[np.float64]]:
    """Return what is predicted at least of any k units of each group, (units + 1,).

    The dense model is run once more; ranks share out the groups.  Each curve was recomputed from
    its problem and its certificates alone.  `keep` is where it should be good.
    """
    ranks = prepared.ranks
    mine = [groups[i] for i in ranks.share([group.units**3 for group in groups])]
    own: dict[str, NDArray[np.float64]] = {}
    with stage("bounding all widths", total=len(mine)) as bar:
        for found in measure_curvatures(prepared, mine, seed=request.seed) if mine else ():
            name = found.group.name
            with timed(Stage.BOUND), memory_for(f"the bound of {name!r}", FOR_MATRICES):
                own[name] = least_predicted(found, keep[name], request)
            bar.advance()
    told = ranks.all_gather("bounds", own)
    return {name: curve for some in told for name, curve in some.items()}


def least_predicted(
    found: GroupCurvature, kept: int, request: PruningRequest
) -> NDArray[np.float64]:
    """Return what is predicted at least of any k units of one group, (units + 1,).

    Raises VerificationError if what was found is not confirmed.
    """
    predicted, units = Prediction.of(found, request.damp), found.group.units
    # Elsewhere the bound need not be as good: there a knapsack of curves that lie below those by
    # which widths were chosen has more to lose than it is off by.
    near = min(kept, units - max(1, round(_LEAST_REMOVED * units)))
    curve = lower_curve(predicted.problem, [near], rounds=request.bound_rounds)
    proved: NDArray[np.float64] = curve.verify().cpu().numpy()
    return predicted.factor * proved
