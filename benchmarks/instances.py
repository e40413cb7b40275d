"""Look for better values of the instances of the library.

    python -m benchmarks.instances best [PATTERN...] --time 60
    python -m benchmarks.instances search [PATTERN...]

``best`` runs backends, and writes what is better into the index, with the certificates that are
small enough to ship.  ``search`` measures what lies beyond the swap optimum.

Takes hours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from fnmatch import fnmatchcase

import torch

from osscar.base.files import write_text
from osscar.study.answers import save_certificate
from osscar.study.library import (
    CERTIFICATES,
    DIRECTORY,
    INDEX,
    PROVED,
    TOLERANCE,
    Best,
    Library,
    library,
)
from solvers import (
    BackendError,
    Solution,
    SolutionRecord,
    SubsetProblem,
    backend_class,
    refit,
    solve,
)
from solvers.bounds.perspective import Perspective
from solvers.closed_forms.windows import borderline_window
from solvers.exact.window_search import WindowSearch
from solvers.heuristics.incumbent import Incumbent
from solvers.heuristics.local_search import LocalSearch

LARGEST_CERTIFICATE = 60_000
"""Bytes of a certificate that the package ships."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    finding = commands.add_parser("best")
    finding.add_argument("patterns", nargs="*")
    finding.add_argument("--time", type=float, default=60.0)
    finding.add_argument("--rounds", type=int, default=8, help="of perspective")
    finding.add_argument("--backends", default="perspective,window_search,branch_and_bound")
    searching = commands.add_parser("search")
    searching.add_argument("patterns", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "search":
        compare_searches(options.patterns)
    else:
        improve(options.patterns, options.backends.split(","), options.time, options.rounds)


def improve(patterns: list[str], backends: list[str], seconds: float, rounds: int) -> None:
    """Run backends on instances, and keep what is better than the index has."""
    (DIRECTORY / CERTIFICATES).mkdir(exist_ok=True)
    for name in library().instances:
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        problem = library().problem(name)
        best = library().instances[name].best
        for backend in backends:
            try:
                more = {"rounds": rounds} if backend == "perspective" else {}
                found = solve(problem, backend, options=limited(backend, seconds) | more)
            except BackendError as error:
                print(f"{name}: {error}")
                continue
            said = found.record(found.verify())
            label = f"{backend}, rounds={rounds}" if more and rounds != 8 else backend
            new = better(best, dataclasses.replace(said, backend=label))
            if new.bound > best.bound:
                new = dataclasses.replace(new, certificate=certified(name, found))
            gap = f"{said.gap:.4%}" if said.gap is not None else "-"
            print(
                f"{name:36} {backend:17} {said.status:15} {said.relative_loss:.9f} gap {gap} "
                f"{said.seconds:.1f} s{' *' if new != best else ''}",
                flush=True,
            )
            best = new
            if best.proved:
                break
        keep_best(name, best)


def limited(backend: str, seconds: float) -> dict[str, float]:
    """Return the options with which a backend ends in about that time; none where it has no limit.

    That of `window_search` is for one window.
    """
    options = {one.name: one.default for one in dataclasses.fields(backend_class(backend))}
    if "time_limit" not in options:
        return {}
    return {"time_limit": seconds / max(options.get("windows", 1), 1)}


def better(best: Best, found: SolutionRecord) -> Best:
    """Return the best that is known once a verified solution was found."""
    loss, took, by = found.relative_loss, round(found.seconds, 3), found.backend
    if loss < best.loss * (1 - TOLERANCE):
        best = dataclasses.replace(
            best, support=found.support, loss=loss, found_by=by, found_in=took
        )
    if found.recomputed_bound is not None and found.relative_bound is not None:
        bound = min(found.relative_bound, best.loss)
        if bound > best.bound * (1 + TOLERANCE):
            best = dataclasses.replace(
                best, bound=bound, bound_by=by, bound_in=took, certificate=""
            )
    return dataclasses.replace(best, proved=best.gap <= PROVED)


def keep_best(name: str, best: Best) -> None:
    """Write the best of an instance into the index, which another process may have changed."""
    library.cache_clear()
    known = library()
    changed = dataclasses.replace(known.instances[name], best=best)
    save(dataclasses.replace(known, instances={**known.instances, name: changed}))


def save(known: Library) -> None:
    """Write the index with a line for each source and each instance, as differences are read."""
    whole = dataclasses.asdict(known)
    parts = [f'"format": {json.dumps(known.format)}']
    for key in ("sources", "instances"):
        lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in whole[key].items())
        parts.append(f'"{key}": {{\n' + ",\n".join(lines) + "\n}")
    write_text(INDEX, "{\n" + ",\n".join(parts) + "\n}\n")


def certified(name: str, found: Solution) -> str:
    """Keep what proves a bound in the package, where it is small; return its digest."""
    path = DIRECTORY / CERTIFICATES / f"{name}.safetensors"
    digest = save_certificate(path, dataclasses.replace(found, windows=()))
    if digest and path.stat().st_size > LARGEST_CERTIFICATE:
        path.unlink()
        return ""
    return digest


KICKS, KICKED = 20, 0.05
"""Restarts from perturbed optima, and the share of the kept units that are exchanged in each."""


def compare_searches(patterns: list[str]) -> None:
    """Print by how much each search is better than the swap optimum, and in what time.

    What improves a best known value goes into the index.
    """
    for name in library().chosen(patterns or ["*"]):
        problem = library().problem(name)
        base = solve(problem)
        rivals = {
            "rounding, no rounds": lambda p: Perspective(rounds=0).select(p).support,
            "rounding, 8 rounds": lambda p: Perspective().select(p).support,
            "windows of 24": lambda p: WindowSearch(time_limit=5.0).select(p).support,
            "restarts": lambda p, found=base.support: restarted(p, found),
        }
        told = [f"swaps {base.relative_loss:.8f} in {base.seconds:.1f} s"]
        for words, search in rivals.items():
            began = time.perf_counter()
            support = search(problem)
            loss, seconds = refit(problem, support)[1], time.perf_counter() - began
            told.append(f"{words} {1 - loss / base.loss:+.4%} in {seconds:.1f} s")
            relative, best = loss / problem.scale, library().instances[name].best
            if relative < best.loss * (1 - TOLERANCE):
                units = tuple(support.sort().values.tolist())
                found = {"found_by": words, "found_in": round(seconds, 3)}
                keep_best(name, dataclasses.replace(best, support=units, loss=relative, **found))
        print(f"{name}: {'; '.join(told)}", flush=True)


def restarted(problem: SubsetProblem, support: torch.Tensor) -> torch.Tensor:
    """Return the best of swap optima that start from exchanges of the best at random.

    The units exchanged are drawn from those closest to changing sides.
    """
    generator = torch.Generator().manual_seed(0)
    best = Incumbent(problem, support)
    count = max(2, round(KICKED * min(problem.keep, problem.units - problem.keep)))
    for _ in range(KICKS):
        near = borderline_window(problem, best.support, min(8 * count, problem.units))
        near = near[torch.randperm(len(near), generator=generator)]
        kept = torch.isin(near, best.support)
        leave, enter = near[kept][:count], near[~kept][:count]
        size = min(len(leave), len(enter))
        stays = best.support[~torch.isin(best.support, leave[:size])]
        start = torch.cat([stays, enter[:size]]).tolist()
        best.offer(LocalSearch(start=tuple(start)).support(problem))
    return best.support


if __name__ == "__main__":
    main()
