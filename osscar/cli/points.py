"""What the options of a sweep ask for.  Nothing here loads torch."""

from __future__ import annotations

from typing import TypeVar

from osscar.base.errors import OptionError
from osscar.base.inputs import from_percent
from osscar.cli.options import SweepOptions, request_of
from osscar.request import BudgetKind, Keep, PruningRequest
from osscar.run.jobs import SweepJob, jobs

R = TypeVar("R", bound=PruningRequest)


def asked_points(options: SweepOptions, request: type[R]) -> tuple[R, tuple[SweepJob, ...]]:
    """Return the request at the first point, and all points; what one cannot ask for is refused.

    The request may be an `osscar.request.ArgumentsAlone`.
    """
    budget, values, fixed = _asked(options)
    method = vars(options)["allocation"]
    points = jobs(budget, values, baselines=options.baselines, allocation=method)
    base = request_of(options, request, **{**fixed, str(budget): points[0].value})
    for job in points:
        job.request(base)
    return base, points


def _asked(
    options: SweepOptions,
) -> tuple[BudgetKind, tuple[float | int, ...], dict[str, Keep | None]]:
    """Return the one budget that is given a list, what is in that, and the other budgets.

    A single value is a list where nothing else is given.
    """
    given = {kind: text for kind in BudgetKind if (text := getattr(options, kind)) is not None}
    lists = {kind: text for kind, text in given.items() if "," in text or len(given) == 1}
    if len(lists) != 1:
        named = " and ".join(f"--{kind}" for kind in lists or given or BudgetKind)
        raise OptionError(
            f"{named}: a sweep goes over one of the budgets; give a list for one of them, such as "
            f"--sparsity {BudgetKind.SPARSITY.examples}, and single values for others"
        )
    ((budget, text),) = lists.items()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        counts = budget is BudgetKind.PARAMS and all(part.isdecimal() for part in parts)
        values = tuple(int(part) if counts else float(from_percent(part)) for part in parts)
    except ValueError:
        raise OptionError(
            f"--{budget} {text!r:.80} is not a list such as {budget.examples}"
        ) from None
    return budget, values, {str(kind): given.get(kind) for kind in BudgetKind}
