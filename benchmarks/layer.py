"""Loss, time and memory of the solvers on one layer, real or synthetic.

    python benchmarks/layer.py layer.safetensors --keep 0.5 --repeat 5 --json result.json

A layer file holds ``H`` (p x p, the undamped Gram matrix of the inputs) and ``W`` (p x m, dense
weights).  Without one, a layer with a heavy-tailed spectrum is drawn.  Runs of the backends take
turns, so that a slow spell of the machine meets all of them alike.  Memory is the peak resident
size of a fresh process, sampled every millisecond, above what it had after a small warm-up solve
with the problem already built, in units of p x p doubles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from solvers import SubsetProblem, solve

BACKENDS = ("local_search", "multistage", "greedy", "wanda", "magnitude", "random")
REFERENCE = "multistage"


def synthetic_layer(p: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a Gram matrix whose eigenvalues fall as 1/i, and Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(2 * p, p, generator=generator, dtype=torch.float64)
    mix = torch.randn(p, p, generator=generator, dtype=torch.float64) / p**0.5
    inputs = samples @ (mix * torch.arange(1, p + 1).double().rsqrt())
    inputs = inputs @ torch.linalg.qr(mix)[0] + 0.05 * samples
    weights = torch.randn(p, m, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs), weights


def build(arguments: argparse.Namespace) -> SubsetProblem:
    if arguments.layer:
        tensors = load_file(arguments.layer)
        H, W = tensors["H"], tensors["W"]
    else:
        H, W = synthetic_layer(*arguments.shape)
    units = arguments.units or len(H)
    keep = max(1, round(arguments.keep * units))
    return SubsetProblem.from_gram(H, W, keep=keep, units=units, damp=arguments.damp)


def time_in_turns(problem: SubsetProblem, repeat: int) -> dict[str, list]:
    """Solve with each backend in turn, `repeat` rounds after one that is not counted."""
    runs = {name: [] for name in BACKENDS}
    for round_ in range(repeat + 1):
        for name in BACKENDS:
            solution = solve(problem, name)
            if round_:
                runs[name].append(solution)
    return runs


def peak_memory(backend: str) -> float:
    """Return the peak of one solve in this argument list, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--probe", backend]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout)


def probe(arguments: argparse.Namespace) -> float:
    """Solve once; return the growth of the peak resident size in p x p doubles."""
    problem = build(arguments)
    # Thread pools and libraries are loaded by a small solve with the same backend.
    small = SubsetProblem.from_gram(*synthetic_layer(300, 64), keep=150)
    solve(small, arguments.probe)
    before, peaks, done = _resident(), [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peaks, done))
    watcher.start()
    solve(problem, arguments.probe)
    done.set()
    watcher.join()
    p = len(problem.consumers[0].H)
    return max(0.0, max(peaks) - before) / (8 * p * p)


def _watch(peaks: list[int], done: threading.Event) -> None:
    """Sample the resident size: the recorded peak of the process includes building the problem."""
    while not done.wait(0.001):
        peaks[0] = max(peaks[0], _resident())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def report(problem: SubsetProblem, runs: dict[str, list], memory: dict[str, float]) -> dict:
    seconds = {name: statistics.median(s.seconds for s in runs[name]) for name in BACKENDS}
    ratios = {
        name: statistics.median(
            s.seconds / r.seconds for s, r in zip(runs[name], runs[REFERENCE], strict=True)
        )
        for name in BACKENDS
    }
    rows = {
        name: {
            "relative_loss": runs[name][0].relative_loss,
            "status": runs[name][0].status.name,
            "seconds": seconds[name],
            "ratio": ratios[name],
            "memory": memory.get(name),
        }
        for name in BACKENDS
    }
    consumer = problem.consumers[0]
    shape = {"units": problem.units, "rows": len(consumer.H), "outputs": consumer.W0.shape[1]}
    return {"schema": 1, **shape, "keep": problem.keep, "threads": torch.get_num_threads()} | {
        "backends": rows
    }


def show(result: dict) -> None:
    print(
        f"{result['keep']} of {result['units']} units, {result['rows']} x {result['outputs']}, "
        f"{result['threads']} threads"
    )
    print(f"{'backend':<14}{'loss':>12}{'seconds':>10}{'ratio':>8}{'p^2 doubles':>13}")
    for name, row in result["backends"].items():
        memory = "" if row["memory"] is None else f"{row['memory']:.1f}"
        print(
            f"{name:<14}{row['relative_loss']:>12.6f}{row['seconds']:>10.3f}"
            f"{row['ratio']:>8.2f}{memory:>13}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layer", nargs="?", help="safetensors file with H and W")
    parser.add_argument("--shape", nargs=2, type=int, default=(1536, 576), metavar=("P", "M"))
    parser.add_argument("--units", type=int, help="units of equal width; by default one a row")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the units that stay")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="skip the memory probes")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--probe", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(probe(arguments))
        return
    problem = build(arguments)
    runs = time_in_turns(problem, arguments.repeat)
    memory = {} if arguments.no_memory else {name: peak_memory(name) for name in BACKENDS}
    result = report(problem, runs, memory)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
