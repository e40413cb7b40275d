"""What the options of a sweep ask for.  Nothing here loads torch."""

from __future__ import annotations

from typing import TypeVar

from osscar.base.errors import OptionError
from osscar.cli.options import SweepOptions, request_of
from osscar.request import BudgetKind, PruningRequest
from osscar.run.jobs import SweepJob, jobs

R = TypeVar("R", bound=PruningRequest)


def asked_points(options: SweepOptions, request: type[R]) -> tuple[R, tuple[SweepJob, ...]]:
    """Return the request (or its `ArgumentsAlone`) at the first point, and all points."""
    given = {kind: text for kind in BudgetKind if (text := getattr(options, kind)) is not None}
    lists = {kind: text for kind, text in given.items() if "," in text or len(given) == 1}
    if len(lists) != 1:
        named = " and ".join(f"--{kind}" for kind in lists or given or BudgetKind)
        raise OptionError(
            f"{named}: a sweep goes over one of the budgets; give a list for one of them, such as "
            f"--sparsity {BudgetKind.SPARSITY.examples}, and single values for others"
        )
    ((budget, text),) = lists.items()
    values = tuple(part.strip() for part in text.split(",") if part.strip())
    method = vars(options)["allocation"]
    points = jobs(budget, values, baselines=options.baselines, allocation=method)
    fixed = {str(kind): given.get(kind) for kind in BudgetKind}
    base = request_of(options, request, **{**fixed, str(budget): points[0].value})
    for job in points:
        job.request(base)
    return base, points
