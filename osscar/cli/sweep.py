"""``osscar sweep``: quality against speed, over budgets."""

from __future__ import annotations

from typing import Any

from osscar.base.errors import OptionError
from osscar.cli.common import check_json_path, say, say_verdict, show, way_back, write_json
from osscar.cli.opening import limit_of, opened, quiet, tell_dense
from osscar.cli.options import SweepOptions, asked_with, recovery_asked_with
from osscar.report.run_tables import skipped_table
from osscar.request import BudgetKind
from osscar.run.points import SweepDirectory, jobs
from osscar.run.sweep import PAGE_FILE, Sweep
from osscar.run.sweep_page import sweep_table, sweep_verdict


def run(model: str, options: SweepOptions, shared: Any) -> None:
    """Prune to several budgets, and show quality against speed."""
    read = (model, options.calibration, options.weights, options.text, options.images)
    check_json_path(options.json, inputs=(*read, options.inputs), written=(options.out,))
    budget, values = _asked(options)
    points = jobs(budget, values, baselines=options.baselines, allocation=shared.allocation)
    base = asked_with(shared, **{str(budget): points[0].value})
    recover = recovery_asked_with(options, base)
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
        document = swept.run(
            loaded.model,
            data,
            source=loaded.source,
            scored_dense=lambda: tell_dense(loaded, data),
        )
    show(sweep_table(document), skipped_table(document["skipped"]))
    say_verdict(sweep_verdict(document))
    say(f"report: {options.out / PAGE_FILE}")
    write_json(options.json, document)


def _asked(options: SweepOptions) -> tuple[BudgetKind, tuple[float | int, ...]]:
    """Return the one budget that is given a list, and what is in that.

    Raises
    ------
    OptionError
        If there is none or another, or it is no list of numbers.
    """
    lists = {budget: getattr(options, budget) for budget in BudgetKind}
    given = {budget: text for budget, text in lists.items() if text is not None}
    if len(given) != 1:
        named = [f"--{budget}" for budget in given or BudgetKind]
        raise OptionError(
            f"{' and '.join(named)} are budgets, of which a sweep has one sort; give a list "
            "for one of them"
        )
    ((budget, text),) = given.items()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        counts = budget is BudgetKind.PARAMS and all(part.isdecimal() for part in parts)
        return budget, tuple(map(int if counts else float, parts))
    except ValueError:
        raise OptionError(
            f"--{budget} {text!r:.80} is not a list such as {budget.examples}"
        ) from None
