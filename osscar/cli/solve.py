"""``osscar solve`` and ``osscar backends``: one problem file, one backend; and what there are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import solvers
from osscar.base.devices import resolve_device
from osscar.base.errors import OptionError
from osscar.base.printable import pluralize, share
from osscar.cli.common import check_files, document, say, show, write_json
from osscar.cli.opening import quiet
from osscar.cli.options import SolveOptions, parse_options
from osscar.report.sections import backends_table
from solvers import Solution, SubsetProblem, Verification


def list_backends(json: Path | None) -> None:
    """Show all backends."""
    units, experts = solvers.backends(), solvers.backends(solvers.EXPERT_BACKENDS)
    show(
        backends_table(units), backends_table(experts, "of whole experts (osscar prune --experts)")
    )
    rows = {
        key: [dataclasses.asdict(info) for info in infos]
        for key, infos in (("backends", units), ("expert_backends", experts))
    }
    write_json(json, document("backends", 1, rows))


def run(file: Path, options: SolveOptions) -> None:
    """Solve one problem, verify the answer from the problem alone, and show both."""
    check_files(options, file)
    target = resolve_device(options.device)
    problem = SubsetProblem.load(file)
    if options.keep is not None:
        problem = problem.with_keep(options.keep)
    if options.keep is None and problem.keep == problem.units:
        raise OptionError(
            f"{file} keeps all of its {pluralize(problem.units, 'unit')}, so that there is nothing "
            "to choose; say with --keep how many stay"
        )
    with quiet():
        solution = solvers.solve(
            problem,
            options.backend,
            device=target,
            bound=options.bound,
            bound_rounds=options.bound_rounds,
            options=parse_options(options.backend_options),
        )
        verification = solution.verify()
    _print_solution(solution, verification)
    numbers = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(verification).items()
    }
    content = {
        "file": str(file),
        "problem": describe(problem),
        **dataclasses.asdict(solution.record(verification)),
        "verification": numbers,
    }
    write_json(options.json, document("solve", 2, content))


def describe(problem: SubsetProblem) -> dict[str, Any]:
    """Return what a problem is, without its tensors."""
    return {
        "name": problem.name,
        "units": problem.units,
        "keep": problem.keep,
        "width": problem.width,
        "scale": problem.scale,
        "dead": problem.dead.tolist(),
        "consumers": [
            {
                "inputs": len(consumer.hessian),
                "outputs": consumer.W0.shape[1],
                "width": consumer.width,
                "damping": consumer.damping,
            }
            for consumer in problem.consumers
        ],
    }


def _print_solution(solution: Solution, verification: Verification) -> None:
    problem = solution.problem
    say(
        f"{problem.name}: {solution.backend} keeps {problem.keep} of "
        f"{pluralize(problem.units, 'unit')}, loss {verification.loss:.9g}, "
        f"{solution.relative_loss:.6f} of removing everything"
    )
    record = solution.record(verification)
    if record.lower_bound is not None and record.gap is not None:
        say(
            f"no support has a loss below {record.lower_bound:.9g}, so that the gap is "
            f"{share(record.gap, 2)} ({solution.bound_from})"
        )
    say(f"{solution.status.name}: {solution.status.value}")
    say(f"{solution.seconds:.2f} s, {pluralize(solution.iterations, 'iteration')}")
    say(
        "verified from the problem alone: support, refit, loss"
        + (", and the bound" if math.isfinite(verification.lower_bound) else "")
        + (", and every exchange" if math.isfinite(verification.swap_gain) else "")
    )
    if verification.not_recomputed:
        claims = " and ".join(verification.not_recomputed).replace("_", " ")
        say(f"claimed by the solver, and not recomputed: {claims}")
    fewer = "kept" if 2 * problem.keep <= problem.units else "removed"
    units = solution.support if fewer == "kept" else solution.removed
    say(f"{fewer}: {' '.join(map(str, units.tolist()))}")
