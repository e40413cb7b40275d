"""The page of a race of backends on the library of instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from osscar.base.numbers import decimals, percent
from osscar.base.printable import listed, pluralize
from osscar.report.figures import COLORS, SHARES, picture, tall_figure
from osscar.report.page import Settings, render
from osscar.report.tables import new_table
from osscar.study.library import Best, Library
from osscar.study.race import (
    TOLERANCE,
    Curves,
    anytime,
    best_known,
    gap_below,
    on_its_word,
    profile,
    proved,
    times,
)
from osscar.study.records import ProofBasis, Record

_CAPTIONS = {
    "profiles": "Performance profiles: the share of all instances that a backend has done within "
    "so many times the seconds of the fastest. Above, done is to have found the best known loss; "
    "below, to have proved one by a bound that was recomputed from its certificate.",
    "anytime": "What is known by when, on average over all instances. Above, the excess over the "
    "best known loss; below, how far the recomputed lower bound lies under it. Both are 100 % "
    "before there is an answer. Each mark is the end of a run with a limit of its own.",
}


def race_page(
    known: Library,
    names: Sequence[str],
    backends: Sequence[str],
    records: Sequence[Record],
    seconds: float,
) -> str:
    """Return the page.

    Parameters
    ----------
    known, names, backends, seconds
        What was asked.
    records
        What came of it so far: of instances on which all backends have run.
    """
    best = best_known(known, records)

    def hit(record: Record) -> bool:
        loss = record.relative_loss
        return loss is not None and loss <= best[record.instance].loss * (1 + TOLERANCE)

    def excess(record: Record) -> float:
        assert record.relative_loss is not None
        return min(1.0, _excess(record.relative_loss, best[record.instance]))

    def below(record: Record) -> float:
        recomputed = record.proof is ProofBasis.RECOMPUTED
        return gap_below(best[record.instance].loss, record) if recomputed else 1.0

    count = len(best)
    found, closed, said = (times(records, done) for done in (hit, proved, on_its_word))
    profiles = (profile(found, count), profile(closed, count))
    curves = (anytime(records, excess, count), anytime(records, below, count))
    pictures = [
        _picture("profiles", profiles, ("loss found", "proved"), "times the fastest"),
        _picture("anytime", curves, ("mean excess", "mean gap of the bound"), "seconds", "o"),
    ]
    return render(
        "race.html.j2",
        answer=_answer(backends, found, closed, count, seconds),
        instances=pluralize(count, "instance"),
        left=len(names) - count,
        pictures=pictures,
        scores=_scores(backends, found, closed, said, count, seconds),
        records=_records_table(records, best),
        late=any((record.seconds or 0.0) > seconds for record in records),
        seconds=seconds,
        settings=Settings(
            {"backends": list(backends), "seconds": seconds, "instances": list(names)}
        ),
    )


def _answer(
    backends: Sequence[str],
    found: dict[str, dict[str, float]],
    closed: dict[str, dict[str, float]],
    count: int,
    limit: float,
) -> str:
    """Say who found the best known loss most often, and who proved most."""

    def most(done: dict[str, dict[str, float]], what: str) -> str:
        high = max(map(len, done.values()), default=0)
        first = [
            f"{backend} ({_counted(done[backend], count, limit)})"
            for backend in backends
            if high and len(done.get(backend, {})) == high
        ]
        return f"{what}: {listed(first) or 'none'}"

    often, proofs = "Found the best known loss most often", "proved the most"
    return f"{most(found, often)}; {most(closed, proofs)}."


def _excess(loss: float, best: Best) -> float:
    """Return how far a loss lies above the best one, relative to that."""
    return max(0.0, loss / best.loss - 1) if best.loss > 0 else 0.0


def _scores(
    backends: Sequence[str],
    found: dict[str, dict[str, float]],
    closed: dict[str, dict[str, float]],
    said: dict[str, dict[str, float]],
    count: int,
    limit: float,
) -> Table:
    rows = []
    for backend in backends:
        hits, proofs = found.get(backend, {}), closed.get(backend, {})
        word = {name: took for name, took in said.get(backend, {}).items() if name not in proofs}
        known = [_counted(done, count, limit) for done in (hits, proofs, word)]
        told = (known[0], _total(hits), known[1], _total(proofs))
        rows.append((backend, *told, known[2] if word else ""))
    columns = ("backend", "best known loss found >", "seconds to find >", "proved >")
    return new_table("", *columns, "seconds to prove >", "by its word alone >", rows=rows)


def _counted(done: dict[str, float], count: int, limit: float) -> str:
    late = sum(took > limit for took in done.values())
    return f"{len(done)} of {count}{f', {late} late' if late else ''}"


def _total(times: dict[str, float]) -> str:
    return decimals(sum(times.values()), 3) if times else ""


def _records_table(records: Sequence[Record], best: Mapping[str, Best]) -> Table:
    rows = []
    for record in records:
        loss, bound = record.relative_loss, record.relative_bound
        above = None if loss is None else _excess(loss, best[record.instance])
        gap = None if loss is None or bound is None else gap_below(loss, record)
        rows.append(
            (
                *(record.instance, record.backend, decimals(loss, 6)),
                "" if above is None else percent(above, 3),
                decimals(bound, 6),
                "" if gap is None else percent(gap),
                record.error or str(record.proof),
                decimals(record.seconds, 3),
            )
        )
    columns = ("instance", "backend", "loss >", "above the best >", "bound >", "gap >")
    return new_table("", *columns, "bound is", "seconds >", rows=rows)


def _picture(
    name: str,
    panels: tuple[Curves, Curves],
    labels: tuple[str, str],
    across: str,
    marker: str = "",
) -> dict[str, object]:
    figure, axes = tall_figure()
    look: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.2, "markersize": 3}
    for one, curves, label in zip(axes, panels, labels, strict=True):
        for index, (backend, curve) in enumerate(curves.items()):
            x, y = zip(*curve, strict=True) if curve else ((), ())
            color = COLORS[index % len(COLORS)]
            one.plot(x, y, color=color, label=backend, marker=marker, **look)
        one.set_xscale("log")
        one.set_ylim(-0.03, 1.03)
        one.yaxis.set_major_formatter(SHARES)
        one.set_ylabel(label)
    axes[1].set_xlabel(across)
    _legend(figure, axes[0])
    return picture(name, _CAPTIONS[name], figure)


def _legend(figure: Figure, axes: Axes) -> None:
    """Name each backend once: both panels show the same."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
