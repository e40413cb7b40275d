"""``osscar instances``: a library of problems for solvers, and what is known of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict

import solvers
from osscar.base.errors import OptionError
from osscar.base.files import atomic_write, make_directory, write_json, write_text
from osscar.base.json_files import STRICT, read_json
from osscar.base.numbers import decimals, percent
from osscar.cli.common import check_json_path, document, out, say, way_back
from osscar.cli.common import write_json as write_document
from osscar.cli.opening import quiet
from osscar.report.race_page import race_page
from osscar.report.tables import new_table
from osscar.study.jobs import RECORDS
from osscar.study.library import Best, library
from osscar.study.race import TOLERANCE, best_known, race, race_study, without_refuted
from osscar.study.records import Record
from solvers import SubsetProblem

REPORT_FILE = "race.html"


@dataclasses.dataclass(frozen=True)
class SolutionFile:
    """What somebody found for an instance of the library."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    instance: str
    support: tuple[int, ...]
    """The units that stay."""
    lower_bound: float | None = None
    """No support has a lower loss, its finder says; divided by the loss of removing everything."""
    by: str = ""
    """Who found it, and how."""


def list_instances(json: Path | None) -> None:
    """Show all instances, and the best that is known of each."""
    check_json_path(json)
    known = library()
    columns = ("instance", "keep >", "of >", "rows >", "damp >", "loss >", "gap >", "proved by")
    rows = []
    for name, one in known.instances.items():
        source, best = known.sources[one.source], one.best
        rows.append(
            (
                *(name, str(one.keep), str(source.units), str(source.rows), f"{one.damp:g}"),
                *(decimals(best.loss, 6), percent(best.gap) if best.bound_by else ""),
                *(best.bound_by if best.proved else "", "made" if source.recipe else "shipped"),
            )
        )
    out.print(new_table("", *columns, "file", rows=rows))
    proved = sum(one.best.proved for one in known.instances.values())
    say(f"{len(rows)} instances, {proved} of them proved; gaps are of the best known values")
    write_document(json, document("instances", 1, dataclasses.asdict(known)))


def make(names: Sequence[str], directory: Path, json: Path | None) -> None:
    """Write instances as problem files, their sources made where they have to be."""
    check_json_path(json, written=(directory,))
    if not names:
        raise OptionError("name instances, or give '*' for all, of which some take minutes to make")
    known = library()
    chosen = known.matching(names)
    make_directory(directory)
    for name in chosen:
        path = directory / f"{name}.safetensors"
        with quiet(), atomic_write(path) as partial:
            known.problem(name).save(partial)
        say(f"{path}: keep {known.instances[name].keep}")
    say("each is for `osscar solve FILE`, or for any solver: docs/instances.md has the format")
    made = [{"instance": name, "file": str(directory / f"{name}.safetensors")} for name in chosen]
    write_document(json, document("instance_files", 1, {"files": made}))


def check(file: Path, json: Path | None) -> None:
    """Recompute a solution, and compare it with the best that is known."""
    check_json_path(json, inputs=(file,))
    answer, known = read_json(file, SolutionFile), library()
    if answer.instance not in known.instances:
        raise OptionError(
            f"{file}: there is no instance {answer.instance!r}; `osscar instances list` has them"
        )
    problem, best = known.problem(answer.instance), known.instances[answer.instance].best
    loss = relative_loss(problem, answer.support)
    bound = answer.lower_bound
    if bound is not None and bound > min(loss, best.loss) * (1 + TOLERANCE):
        raise OptionError(
            f"{file}: lower_bound is {bound:.9g}, and a support of relative loss "
            f"{min(loss, best.loss):.9g} is known: the bound is wrong"
        )
    say(f"{answer.instance}: relative loss {loss:.9g}; the best known is {best.loss:.9g}")
    say(_compared(loss, best.loss, best.proved))
    if bound is not None and bound > best.bound * (1 + TOLERANCE):
        say(
            f"the lower bound {bound:.9g} would be better than the best known, {best.bound:.9g}; "
            "it is taken on your word here: docs/instances.md says what proves it"
        )
    content = {"instance": answer.instance, "loss": loss, "best_known": best.loss}
    write_document(json, document("instance_check", 1, {**content, "lower_bound": bound}))


def relative_loss(problem: SubsetProblem, support: Sequence[int]) -> float:
    """Return the loss of the refit on a support, a share of that of removing everything.

    Raises
    ------
    OptionError
        If it is no choice of as many units as stay.
    """
    units = sorted(set(support))
    feasible = len(units) == len(support) == problem.keep
    if not feasible or units[0] < 0 or units[-1] >= problem.units:
        raise OptionError(
            f"the support names {len(support)} units, {len(units)} of them distinct; it must name "
            f"{problem.keep} distinct ones from 0 to {problem.units - 1}"
        )
    return solvers.refit(problem, torch.tensor(units))[1] / problem.scale


def _compared(loss: float, best: float, proved: bool) -> str:
    if loss < best * (1 - TOLERANCE):
        return f"improves the best known value by {1 - loss / best:.4%}: please send it"
    if loss <= best * (1 + TOLERANCE):
        return "as good as the best known" + (", which is proved optimal" if proved else "")
    return f"{loss / best - 1:.4%} above the best known"


def run_race(
    names: Sequence[str], backends: str, seconds: float, directory: Path, json: Path | None
) -> None:
    """Run backends on instances, and write the page."""
    check_json_path(json, written=(directory,))
    if not 0 < seconds < 1e6:
        raise OptionError(f"--time is {seconds}; give seconds above 0")
    entrants = list(dict.fromkeys(part.strip() for part in backends.split(",") if part.strip()))
    if not entrants:
        raise OptionError("--backends is empty; give names, separated by commas")
    known = library()
    # What is to be made first takes minutes: only where it was asked for by name.
    chosen = known.matching(names, shipped=not names)
    study = race_study(directory, known, chosen)
    path, done = directory / REPORT_FILE, list[Record]()
    with way_back(lambda: study.kept), quiet():
        for records in race(study, known, entrants, seconds, _tell):
            best = best_known(known, records)
            records = without_refuted(records, best, _tell)
            for name, one in best.items():
                _keep_improvement(name, known.instances[name].best, one, directory)
            done += records
            write_text(path, race_page(known, chosen, entrants, done, seconds))
    say(f"report: {path}")
    content = {"seconds": seconds, "records": [dataclasses.asdict(record) for record in done]}
    write_document(json, document("race", 1, content))


def _tell(record: Record) -> None:
    if record.error:
        say(f"{record.instance}: {record.backend}: {record.error}")
        return
    loss, bound = record.relative_loss, record.relative_bound
    below = "" if bound is None else f", bound {bound:.6f}"
    say(f"{record.instance}: {record.backend}: loss {loss:.6f}{below}, {record.seconds:.2f} s")


def _keep_improvement(name: str, before: Best, now: Best, directory: Path) -> None:
    """Say that a best known value was improved, if it was, and write the solution to be sent."""
    told, by, bound = [], [], None
    if now.loss < before.loss:
        by.append(now.found_by)
        told.append(
            f"{now.found_by} improves the best known loss of {name}: {now.loss:.9g} instead of "
            f"{before.loss:.9g}"
        )
    if now.bound > before.bound and not before.proved:
        by.append(now.bound_by)
        bound = now.bound
        told.append(
            f"{now.bound_by} improves the best known bound of {name}: {bound:.9g} instead of "
            f"{before.bound:.9g}, by a certificate in {directory / RECORDS}"
        )
    if told:
        path = directory / f"{name}.json"
        found = SolutionFile(name, now.support, bound, " and ".join(dict.fromkeys(by)))
        write_json(path, dataclasses.asdict(found))
        say(f"{'; '.join(told)}; {path} is the solution to send")
