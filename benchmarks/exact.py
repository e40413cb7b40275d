"""The largest problems that exact backends close within a time limit, on random and real layers.

    python benchmarks/exact.py [LAYER.safetensors...] --problems heads.safetensors --time-limit 60

Three sorts of problems, at several shares of removed units:

- ``random``: Gaussian inputs, mixed, with ten noisy responses; nothing is small about any unit, so
  these are as hard as problems of their size get;
- windows of a layer file (``H``, the undamped Gram matrix of its inputs, and ``W``, its weights):
  the units closest to changing sides, all others held as the local search leaves them;
- problem files, such as attention heads, as they are.

Of the first two, n grows until a backend fails to close one within the limit.  Prints a row a
solve, then the largest n that each backend closed at every share.

Takes minutes to an hour.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from solvers import BackendError, Status, SubsetProblem, solve
from solvers.closed_forms.windows import borderline_window, window_problem

SIZES = (12, 16, 20, 24, 28, 32, 36, 40, 42, 44, 48, 52, 56, 64, 72, 80, 96)
BACKENDS = ("enumerate", "branch_and_bound", "highs", "gurobi")


def random_problem(n: int, removed: float, seed: int = 1, responses: int = 10) -> SubsetProblem:
    """Return a problem of correlated inputs and noisy targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = draw(2 * n, n) @ (torch.eye(n, dtype=torch.float64) + 0.3 * draw(n, n))
    W0 = draw(n, responses)
    Y = X @ W0 + draw(2 * n, responses)
    return SubsetProblem.from_gram(
        X.T @ X / len(X),
        W0,
        G=X.T @ Y / len(X),
        e=float(Y.square().sum()) / len(X),
        keep=n - round(removed * n),
        name=f"random {n}",
    )


class Windows:
    """Windows of one layer around its swap optimum."""

    def __init__(self, path: Path, damp: float) -> None:
        tensors = safetensors.torch.load_file(path)
        p = len(tensors["H"])
        self.name = path.stem
        self._whole = SubsetProblem.from_gram(tensors["H"], tensors["W"], keep=p, damp=damp)
        self._supports: dict[float, torch.Tensor] = {}

    def __call__(self, n: int, removed: float) -> SubsetProblem:
        units = self._whole.units
        problem = self._whole.with_keep(units - round(removed * units))
        if removed not in self._supports:
            self._supports[removed] = solve(problem).support
        support = self._supports[removed]
        return window_problem(problem, support, borderline_window(problem, support, n))


def row(source: str, problem: SubsetProblem, removed: float, backend: str, limit: float) -> dict:
    """Solve and verify once."""
    options = {} if backend == "enumerate" else {"time_limit": limit, "gap_tolerance": 1e-4}
    start = time.process_time()
    solution = solve(problem, backend, **options)
    spent = time.process_time() - start
    proved = solution.verify().lower_bound
    return {
        "source": source,
        "units": problem.units,
        "width": problem.width,
        "removed": removed,
        "backend": backend,
        "status": solution.status.name,
        "loss": solution.relative_loss,
        "gap": solution.gap,
        "recomputed": proved == proved,
        "iterations": solution.iterations,
        "seconds": solution.seconds,
        "of the processor": spent,
    }


def growing(options: argparse.Namespace) -> Iterator[dict]:
    """Let n grow for each source, share and backend until one is not closed."""
    sources = {"random": random_problem}
    for path in options.layers:
        windows = Windows(path, options.damp)
        sources[windows.name] = windows
    for source, make in sources.items():
        for removed in options.removed:
            running = list(options.backends)
            for n in options.sizes:
                for backend in list(running):
                    try:
                        found = row(source, make(n, removed), removed, backend, options.time_limit)
                    except BackendError as refusal:
                        print(f"{source} n = {n}: {refusal}")
                        running.remove(backend)
                        continue
                    yield found
                    late = found["seconds"] > options.time_limit
                    if late or found["status"] != Status.OPTIMAL.name:
                        running.remove(backend)


def fixed(options: argparse.Namespace) -> Iterator[dict]:
    """Solve problem files at every share."""
    for path in options.problems:
        whole = SubsetProblem.load(path)
        for removed in options.removed:
            problem = whole.with_keep(whole.units - round(removed * whole.units))
            for backend in options.backends:
                try:
                    yield row(path.stem, problem, removed, backend, options.problem_limit)
                except BackendError as refusal:
                    print(f"{path.stem}: {refusal}")


def largest(rows: list[dict], limit: float) -> list[str]:
    """Return, as a Markdown table, the largest n closed at every share."""
    sources = list(dict.fromkeys(r["source"] for r in rows))
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    lines = [f"| largest n closed | {' | '.join(sources)} |", "| --- |" + " ---: |" * len(sources)]
    for backend in backends:
        cells = []
        for source in sources:
            mine = [r for r in rows if r["source"] == source and r["backend"] == backend]
            best = []
            for removed in dict.fromkeys(r["removed"] for r in mine):
                closed = [
                    r["units"]
                    for r in mine
                    if r["removed"] == removed
                    and r["status"] == Status.OPTIMAL.name
                    and r["seconds"] <= limit
                ]
                best.append(max(closed, default=0))
            cells.append(str(min(best, default=0)))
        lines.append(f"| `{backend}` | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", nargs="*", type=Path)
    parser.add_argument("--problems", nargs="*", type=Path, default=[])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--problem-limit", type=float, default=600.0)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    grown, files = [], []
    for rows, found in ((grown, growing(options)), (files, fixed(options))):
        for one in found:
            rows.append(one)
            numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in one.items()}
            print(*(f"{key} {value}" for key, value in numbers.items()), sep="  ", flush=True)
            if options.json:
                options.json.write_text(json.dumps(grown + files, indent=1) + "\n")
    if grown:
        print(*largest(grown, options.time_limit), sep="\n")


if __name__ == "__main__":
    main()
