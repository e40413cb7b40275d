"""``osscar instances``: a library of problems for solvers, and what is known of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import with_config

import solvers
from osscar.base.errors import OptionError
from osscar.base.files import atomic_write, make_directory
from osscar.base.json_files import STRICT, read_json
from osscar.base.printable import decimals, percent
from osscar.cli.common import document, say, show, write_json
from osscar.cli.opening import quiet
from osscar.report.sections import table
from osscar.study.library import TOLERANCE, library
from osscar.study.records import Record
from solvers import SubsetProblem


@with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class SolutionFile:
    """What somebody found for an instance of the library."""

    instance: str
    support: tuple[int, ...]
    """The units that stay."""
    lower_bound: float | None = None
    """No support has a lower loss, its finder says; divided by the loss of removing everything."""
    by: str = ""
    """Who found it, and how."""


def list_instances(json: Path | None) -> None:
    """Show all instances, and the best that is known of each."""
    known = library()
    show(
        table(
            "",
            {
                "instance": lambda item: item[0],
                "keep >": lambda item: str(item[1].keep),
                "of >": lambda item: str(known.sources[item[1].source].units),
                "rows >": lambda item: str(known.sources[item[1].source].rows),
                "damp >": lambda item: f"{item[1].damp:g}",
                "loss >": lambda item: decimals(item[1].best.loss, 6),
                "gap >": lambda item: percent(item[1].best.gap) if item[1].best.bound_by else "",
                "proved by": lambda item: item[1].best.bound_by if item[1].best.proved else "",
            },
            known.instances.items(),
        )
    )
    proved = sum(one.best.proved for one in known.instances.values())
    count = len(known.instances)
    say(f"{count} instances, {proved} of them proved; gaps are of the best known values")
    write_json(json, document("instances", 1, dataclasses.asdict(known)))


def make(names: Sequence[str], directory: Path) -> None:
    """Write instances as problem files."""
    known = library()
    chosen = known.chosen(names or ("*",))
    make_directory(directory)
    for name in chosen:
        path = directory / f"{name}.safetensors"
        with quiet(), atomic_write(path) as partial:
            known.problem(name).save(partial)
        say(f"{path}: keep {known.instances[name].keep}")
    say("each is for `osscar solve FILE`, or for any solver: docs/instances.md has the format")


def check(file: Path) -> None:
    """Recompute a solution, and compare it with the best that is known."""
    answer, known = read_json(file, SolutionFile), library()
    problem, best = known.problem(answer.instance), known.instances[answer.instance].best
    loss = relative_loss(problem, answer.support)
    bound = answer.lower_bound
    if bound is not None and bound > min(loss, best.loss) * (1 + TOLERANCE):
        raise OptionError(
            f"{file}: lower_bound {bound:.9g} is wrong: a support of relative loss "
            f"{min(loss, best.loss):.9g} is known"
        )
    say(f"{answer.instance}: relative loss {loss:.9g}; the best known is {best.loss:.9g}")
    say(f"it {best.compared(loss)}")
    if bound is not None and bound > best.bound * (1 + TOLERANCE):
        say(
            f"the lower bound {bound:.9g} would be better than the best known, {best.bound:.9g}; "
            "it is not verified here: docs/instances.md says what proves it"
        )


def relative_loss(problem: SubsetProblem, support: Sequence[int]) -> float:
    """Return the loss of the refit on a support, a share of that of removing everything."""
    units = sorted(set(support))
    feasible = len(units) == len(support) == problem.keep
    if not feasible or units[0] < 0 or units[-1] >= problem.units:
        raise OptionError(
            f"the support names {len(support)} units, {len(units)} of them distinct; it must name "
            f"{problem.keep} distinct ones from 0 to {problem.units - 1}"
        )
    return solvers.refit(problem, torch.tensor(units))[1] / problem.scale


def tell_known(records: Sequence[Record]) -> None:
    """Say how the best answer to an instance compares with the best known."""
    name, one = records[0].instance, library().instances[records[0].instance]
    answers = [(r.relative_loss, r.backend) for r in records if r.relative_loss is not None]
    if answers and records[0].keep == one.keep:
        loss, backend = min(answers)
        say(f"{name}: {backend} {one.best.compared(loss)}")
