"""Losses and times of the paper's public code on instances of the library, beside this toolkit's.

    git clone https://github.com/mazumder-lab/OSSCAR CHECKOUT
    python -m benchmarks.official CHECKOUT [PATTERN...]

Its functions in ``prune_algo.py`` are called as they are, in float64, with what its command line
gives them: 10 units leave at a time (2 heads), and 10 are exchanged (5 heads); and with one at a
time.  They take one linear map, so that only instances of one consumer are run.  Weights start from
the least-squares optimum, which the functions presume.  Losses are of this toolkit's refit on the
support that comes back, relative to the best known one; seconds are of the processor, one thread,
the least of three rounds in which the searches take turns.

Takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from osscar.study.library import library
from solvers import SubsetProblem, refit, solve

ITERATIONS = 30

NAMES = ("batches", "batches, swaps", "one by one", "one by one, swaps")
OWN = ("multistage", "local_search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("patterns", nargs="*", default=["*"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    code, known = public_code(options.checkout), library()
    print(f"| instance | best known | {' | '.join((*NAMES, *OWN))} |")
    for name in known.chosen(options.patterns):
        one = known.instances[name]
        if known.sources[one.source].consumers > 1:
            continue
        problem = known.problem(name)
        cells = measured(problem, searches(code, problem), one.best.loss)
        print(f"| `{name}` | {one.best.loss:.8f} | {' | '.join(cells)} |", flush=True)


def public_code(checkout: Path) -> ModuleType:
    """Import it."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("prune_algo")


def at_a_time(problem: SubsetProblem) -> tuple[int, int]:
    """Return how many units leave at a time by its command line, and how many are exchanged.

    Units of more than nine rows are heads.
    """
    batch, swaps = (2, 5) if problem.consumers[0].rows.shape[1] > 9 else (10, 10)
    return batch, min(swaps, problem.keep - 1, problem.units - problem.keep)


def searches(code: ModuleType, problem: SubsetProblem) -> list[Callable[[], Tensor]]:
    """Return what gives the support of a problem, in the order of the names."""
    (batch, swaps), blocks = at_a_time(problem), in_blocks(problem)
    public = [
        partial(official, code, *asked, problem, *blocks)
        for asked in ((batch, 0), (batch, swaps), (1, 0), (1, 1))
    ]
    return [*public, *(lambda name=name: solve(problem, name).support for name in OWN)]


def in_blocks(problem: SubsetProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights of least loss, H and G, with each unit a block of rows, as is read there."""
    (one,) = problem.consumers
    order = one.rows.flatten()
    H, G = one.H[order][:, order], one.G[order]
    return torch.linalg.solve(H, G), H, G


def official(
    code: ModuleType,
    batch: int,
    swaps: int,
    problem: SubsetProblem,
    W: Tensor,
    H: Tensor,
    G: Tensor,
) -> Tensor:
    """Return the support that the public code chooses, which writes to none of the tensors."""
    W = W.clone()
    with contextlib.redirect_stdout(io.StringIO()):
        W, _ = code.OSSCAR_fastprune(W, H, G, problem.units, problem.keep, batch)
        if swaps:
            W, _ = code.OSSCAR_local_search(W, H, G, problem.units, ITERATIONS, swaps)
    return W.reshape(problem.units, -1).any(1).nonzero().flatten()


def measured(
    problem: SubsetProblem, searches: list[Callable[[], Tensor]], best: float
) -> list[str]:
    """Return what each search finds, relative to the best known loss, and its least seconds."""
    seconds = [float("inf")] * len(searches)
    supports = [torch.empty(0)] * len(searches)
    for _ in range(3):
        for i, search in enumerate(searches):
            began = time.process_time()
            supports[i] = search()
            seconds[i] = min(seconds[i], time.process_time() - began)
    cells = []
    for support, took in zip(supports, seconds, strict=True):
        found = f"keeps {len(support)}"
        if len(support) == problem.keep:
            above = refit(problem, support)[1] / problem.scale / best - 1
            found = "best" if abs(above) < 1e-6 else f"{above:+.2%}"
        cells.append(f"{found} ({took:.3f})")
    return cells


if __name__ == "__main__":
    main()
