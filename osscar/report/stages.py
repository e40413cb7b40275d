"""Where the time of a run went: its stages, in a table and in a few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.table import Table

from osscar.base.numbers import share
from osscar.base.timing import OTHER, Stage
from osscar.report.tables import new_table

_TOLD = 3
"""Stages that a line tells of."""


def stages_table(stages: Mapping[str, float]) -> Table | None:
    """Return one row for each stage of a run, in its order; None where nothing is known."""
    total = sum(stages.values())
    if not total:
        return None
    rows = ((name, f"{seconds:.1f}", share(seconds / total, 2)) for name, seconds in stages.items())
    return new_table("", "stage", "seconds >", "share >", rows=rows)


def summed_stages(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the stages of several runs together, in the order in which they come."""
    sums: Counter[str] = Counter()
    for stages in runs:
        sums.update(stages)
    return {name: sums[name] for name in (*map(str, Stage), OTHER) if name in sums}


def longest_stages(stages: Mapping[str, float]) -> str:
    """Say which stages took longest, in parentheses; nothing where nothing is known."""
    longest = sorted(stages.items(), key=lambda stage: -stage[1])[:_TOLD]
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
    return f" ({told})" if told else ""
