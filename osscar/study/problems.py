"""The problems of a model's groups, posed on the dense model as `osscar.prune` poses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from torch import nn

from graph import CouplingGroup
from osscar.base.errors import RequestError
from osscar.base.inputs import checked
from osscar.base.progress import progress_bar
from osscar.preparation.prepare import prepare
from osscar.request import DAMP
from osscar.walk.walk import Walk
from solvers import SubsetProblem


def model_problems(
    model: nn.Module,
    calibration: Any,
    *,
    damp: float = 0.01,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[CouplingGroup, SubsetProblem]]:
    """Pose the problem of every prunable group on the dense model's own activations.

    This is the walk of `osscar.prune`, by its default seed, with nothing committed, so that
    problems do not depend on each other's answers.  Each keeps all units until
    `SubsetProblem.with_keep` says otherwise.
    """
    checked("damp", Annotated[float, DAMP], damp)
    with prepare(model, calibration, seed=0) as prepared:
        groups = [group for group in prepared.groups if group.prunable and wanted(group.name)]
        if not groups:
            raise RequestError("no prunable group has such a name; `osscar inspect` lists them")
        with progress_bar("measuring", total=len(groups)) as bar:
            for step in Walk(prepared, groups, in_turn=False):
                yield step.group, step.problem(step.group.units, damp)
                bar.advance()
