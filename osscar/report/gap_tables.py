"""Tables of backends, and of the gaps that they leave."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from osscar.base.numbers import decimals, percent, share
from osscar.report.summary import HIT, Case, Summary
from osscar.report.tables import limit_cell, new_table
from osscar.study.records import WINDOW, Record

if TYPE_CHECKING:
    from solvers import BackendInfo, Capabilities, SubsetProblem


def cases_table(cases: Sequence[Case], prefix: str = "") -> Table:
    """Return one row for each problem and number of kept units.

    Names are shown without a prefix, here as in the tables below.
    """
    columns = ("problem", "removed >", "kept >", "loss >", "bound >", "gap >", "root gap >")
    return new_table(
        "best answers",
        *(*columns, "limit >", "found by", "proof"),
        rows=(
            (
                case.best.instance.removeprefix(prefix),
                ", ".join(map(share, case.sparsities)),
                _kept(case.best),
                decimals(case.best.relative_loss),
                decimals(case.relative_bound),
                percent(case.gap),
                percent(case.root_gap),
                limit_cell(case.limit_gap),
                case.best.backend,
                case.proof,
            )
            for case in cases
        ),
    )


def scores_table(summary: Summary) -> Table:
    """Return one row for each backend and kind of problems whose optimum is known."""
    pairs: dict[tuple[str, str], list[tuple[Record, Case]]] = {}
    for case in summary.closed:
        for record in case.answers:
            pairs.setdefault((record.kind, record.backend), []).append((record, case))

    def scores() -> Iterator[tuple[str, ...]]:
        for (kind, backend), mine in pairs.items():
            over = [max(0.0, case.excess(record)) for record, case in mine]
            hits = sum(value <= HIT for value in over)
            yield (
                backend,
                kind,
                str(len(mine)),
                f"{hits} ({hits / len(mine):.0%})",
                percent(statistics.fmean(over), 3),
                percent(max(over)),
                decimals(statistics.median(record.seconds or 0.0 for record, _ in mine), 3),
            )

    columns = ("backend", "problems", "solved >", "optimal >", "mean excess >", "worst >")
    title = "on problems with a proven optimum"
    return new_table(title, *columns, "median seconds >", rows=scores())


def overview_table(summary: Summary) -> Table:
    """Return one row for each kind of units and share removed; windows come last."""

    def overviews() -> Iterator[tuple[str, ...]]:
        kinds = dict.fromkeys(case.best.kind for case in summary.cases)
        for kind in sorted(kinds, key=lambda kind: kind == WINDOW):
            mine = [case for case in summary.cases if case.best.kind == kind]
            for sparsity in sorted({s for case in mine for s in case.sparsities}):
                cases = [case for case in mine if sparsity in case.sparsities]
                closed = [case.seconds for case in cases if case.closed]
                gaps = [c.gap for c in cases if not c.closed and c.gap is not None]
                yield (
                    *(kind, share(sparsity), str(len(cases)), str(len(closed))),
                    percent(statistics.median(gaps) if gaps else None),
                    percent(max(gaps, default=None)),
                    f"{max(closed):.2g}" if closed else "",
                )

    columns = ("units", "removed >", "problems >", "proved optimal >", "median gap of others >")
    return new_table("", *columns, "widest gap >", "slowest proof, s >", rows=overviews())


def open_table(cases: Sequence[Case], prefix: str = "") -> Table:
    """Return one row for each problem that could not be closed, with the reason."""
    rows = (
        (
            c.records[0].instance.removeprefix(prefix),
            *(_kept(c.records[0]), percent(c.gap), c.why_open),
        )
        for c in cases
    )
    return new_table("", "problem", "kept >", "gap >", "why", rows=rows)


def refused_table(records: Sequence[Record], prefix: str = "") -> Table:
    """Return one row for each solve without an answer."""
    rows = (
        (record.instance.removeprefix(prefix), _kept(record), record.backend, record.error)
        for record in records
    )
    return new_table("", "problem", "kept >", "backend", "reason", rows=rows)


def records_table(records: Sequence[Record], prefix: str = "") -> Table:
    """Return one row for each solve, with the command that makes it again."""
    columns = ("problem", "kept >", "backend", "status", "loss >", "bound >", "gap >")
    return new_table(
        "",
        *(*columns, "seconds >", "command"),
        rows=(
            (
                *(record.instance.removeprefix(prefix), _kept(record), record.backend),
                record.status.lower().replace("_", " "),
                decimals(record.relative_loss, 6),
                decimals(record.relative_bound, 6),
                percent(record.gap),
                decimals(record.seconds, 3),
                record.command,
            )
            for record in records
        ),
    )


def _kept(record: Record) -> str:
    return f"{record.keep} of {record.units}"


def backends_table(infos: Sequence[BackendInfo], title: str = "") -> Table:
    """Return one row for each registered backend."""
    table = new_table(title, "backend", "kind", "takes", "options", "what it does", "available")
    for info in infos:
        options = ", ".join(f"{key}={value}" for key, value in info.options.items())
        available = Text("yes", style="green") if info.unavailable is None else info.unavailable
        table.add_row(
            info.name, info.kind, _takes(info.capabilities), options, info.summary, available
        )
    return table


def _takes(capabilities: Capabilities) -> str:
    limits = [
        "" if capabilities.wide_units else "units of one row",
        "" if capabilities.several_consumers else "one consumer",
        f"up to {capabilities.max_units} units" if capabilities.max_units is not None else "",
        "" if "cuda" in capabilities.devices else "CPU only",
    ]
    return ", ".join(limit for limit in limits if limit) or "everything"


def takers_table(infos: Sequence[BackendInfo], problem: SubsetProblem) -> Table:
    """Return one row for each backend: whether it takes this problem, and if not why."""
    refusals = ((one, one.unavailable or one.capabilities.refusal(problem)) for one in infos)
    rows = ((info.name, info.kind, refusal or "yes") for info, refusal in refusals)
    return new_table("", "backend", "kind", "takes this problem", rows=rows)
