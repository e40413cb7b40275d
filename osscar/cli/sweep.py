"""``osscar sweep``: quality against speed, over budgets."""

from __future__ import annotations

from osscar.cli.commands import asked_points
from osscar.cli.common import check_files, say, show, way_back, write_json
from osscar.cli.opening import held_out, limit_of, opened, quiet
from osscar.cli.options import SweepOptions
from osscar.report.run_tables import skipped_table
from osscar.request import PruningRequest
from osscar.run.sweep import PAGE_FILE, Sweep, SweepDirectory
from osscar.run.sweep_page import sweep_table


def run(model: str, options: SweepOptions) -> None:
    """Prune to several budgets, and show quality against speed."""
    check_files(options, model)
    base, points = asked_points(options, PruningRequest)
    place = SweepDirectory(options.out)
    with way_back(lambda: place.kept), quiet():
        loaded, data = opened(
            model,
            options,
            base.seed,
            lambda loaded: Sweep(place, base, points, None).check(loaded.model),
            device=base.device,
            max_memory=limit_of(model, options, base),
        )
        score = held_out(loaded, options)
        swept = Sweep(place, base, points, score, loaded.classes, say)
        document = swept.run(loaded.model, data, source=loaded.source)
    show(sweep_table(document), skipped_table(document["skipped"]))
    say(f"report: {options.out / PAGE_FILE}")
    write_json(options.json, document)
