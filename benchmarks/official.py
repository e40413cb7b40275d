"""Losses and times of the paper's public code on instances of the library, beside this toolkit's.

    git clone https://github.com/mazumder-lab/OSSCAR CHECKOUT
    python -m benchmarks.official CHECKOUT [PATTERN...] --repeat 3

Its functions in ``prune_algo.py`` are called as they are, on the CPU and in float64, with what its
command line gives them by default: 10 units leave at a time (2 heads), and local search exchanges
10 at a time (5 heads), or as many as there are; besides, with one at a time.  They take one linear
map, so that only instances of one consumer are run.  Weights start from the least-squares optimum,
which the functions presume.  Losses are of this toolkit's refit on the support that comes back,
relative to the best known one; seconds are of the processor, one thread, the least of all rounds,
in which the searches take turns.

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

BATCH, HEADS_BATCH = 10, 2
"""Units that leave at a time."""

SWAPS, HEADS_SWAPS = 10, 5
"""Units that are exchanged at a time."""

ITERATIONS = 30

OWN = ("multistage", "local_search")
NAMES = ("batches", "batches, swaps", "one by one", "one by one, swaps", *OWN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(options.checkout))
    code = importlib.import_module("prune_algo")
    known = library()
    print(f"| instance | best known | {' | '.join(NAMES)} |")
    for name in known.chosen(options.patterns or ["*"]):
        one = known.instances[name]
        if known.sources[one.source].consumers > 1:
            continue
        problem, heads = known.problem(name), "heads" in one.source
        swaps = min(HEADS_SWAPS if heads else SWAPS, one.keep - 1, problem.units - one.keep)
        cells = measured(
            problem, searches(code, heads, swaps, problem), one.best.loss, options.repeat
        )
        print(f"| `{name}` | {one.best.loss:.8f} | {' | '.join(cells)} |", flush=True)


def searches(
    code: ModuleType, heads: bool, swaps: int, problem: SubsetProblem
) -> list[Callable[[], Tensor]]:
    """Return what gives the support of a problem, in the order of the names.

    swaps: Units that are exchanged at a time.
    """
    batch, blocks = HEADS_BATCH if heads else BATCH, in_blocks(problem)
    public = [
        partial(official, code, *asked, problem, *blocks)
        for asked in ((batch, 0), (batch, swaps), (1, 0), (1, 1))
    ]
    return [*public, *(partial(supported, name, problem) for name in OWN)]


def supported(backend: str, problem: SubsetProblem) -> Tensor:
    """Return the support that a backend of this toolkit chooses."""
    return solve(problem, backend).support


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
    problem: SubsetProblem, searches: list[Callable[[], Tensor]], best: float, repeat: int
) -> list[str]:
    """Return what each search finds, relative to the best known loss, and its least seconds."""
    seconds = [float("inf")] * len(searches)
    supports = [torch.empty(0)] * len(searches)
    for _ in range(repeat):
        for i, search in enumerate(searches):
            began = time.process_time()
            supports[i] = search()
            seconds[i] = min(seconds[i], time.process_time() - began)
    found = zip(supports, seconds, strict=True)
    return [told(problem, support, best, took) for support, took in found]


def told(problem: SubsetProblem, support: Tensor, best: float, seconds: float) -> str:
    if len(support) != problem.keep:
        return f"keeps {len(support)} ({seconds:.3f})"
    above = refit(problem, support)[1] / problem.scale / best - 1
    return f"{'best' if abs(above) < 1e-6 else f'{above:+.2%}'} ({seconds:.3f})"


if __name__ == "__main__":
    main()
