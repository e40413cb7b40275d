"""``osscar sweep``: quality against speed, over budgets."""

from __future__ import annotations

from osscar.base.errors import OptionError
from osscar.base.inputs import from_percent
from osscar.cli.common import check_files, say, say_verdict, show, way_back, write_json
from osscar.cli.opening import limit_of, opened, quiet
from osscar.cli.options import SweepOptions, recovery_of, request_of
from osscar.report.run_tables import skipped_table
from osscar.request import BudgetKind, Keep, PruningRequest
from osscar.run.points import SweepDirectory, jobs
from osscar.run.sweep import PAGE_FILE, Sweep
from osscar.run.sweep_page import sweep_table, sweep_verdict


def run(model: str, options: SweepOptions) -> None:
    """Prune to several budgets, and show quality against speed."""
    check_files(options, model)
    budget, values, fixed = _asked(options)
    points = jobs(
        budget, values, baselines=options.baselines, allocation=vars(options)["allocation"]
    )
    base = request_of(options, PruningRequest, **{**fixed, str(budget): points[0].value})
    recover = recovery_of(options, base)
    place = SweepDirectory(options.out)
    with way_back(lambda: place.kept), quiet():
        loaded, data = opened(
            model,
            options,
            base.seed,
            lambda loaded: Sweep(place, base, points, None, recover=recover).check(loaded.model),
            device=base.device,
            max_memory=limit_of(model, options, base),
        )
        score = loaded.held_out(
            text=options.text,
            images=options.images,
            inputs=options.inputs,
            windows=options.windows,
            seqlen=options.seqlen,
        )
        swept = Sweep(place, base, points, score, loaded.classes, recover, say)
        document = swept.run(loaded.model, data, source=loaded.source)
    show(sweep_table(document), skipped_table(document["skipped"]))
    say_verdict(sweep_verdict(document))
    say(f"report: {options.out / PAGE_FILE}")
    write_json(options.json, document)


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
