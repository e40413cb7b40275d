"""What one large problem takes: time by phase, resident memory, and how both grow.

    python -m benchmarks.scale DIRECTORY --tasks solver --sizes 4096 8192 --plot growth.svg

Each row is one run in a process of its own, whose largest resident set the operating system tells
once it has ended; it is written to a file of its own in DIRECTORY, so that the same command goes on
where it was stopped.  Ends with Markdown tables of all rows there, and slopes on log axes.

Seconds are those of the processor (all threads) and of the wall; others on the machine count in the
second only.  Give OMP_NUM_THREADS.

Takes a minute up to 8,192 inputs, and half an hour for 28,672.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import solvers
from benchmarks.measuring import Clock, measured
from osscar.base.files import write_json
from solvers.linalg.symmetric import Symmetric

Report = dict[str, Any]


# ---- one layer -----------------------------------------------------------------------------------

PHASES = (
    ("solvers.problem", "Consumer.from_gram", "problem"),
    ("solvers.heuristics.local_search", "eliminate", "elimination"),
    ("solvers.heuristics.greedy", "eliminate", "elimination"),
    ("solvers.closed_forms.pivot", "PivotState.on_support", "factorization"),
    ("solvers.closed_forms.pivot", "PivotState.sweep", "sweeps"),
    ("solvers.heuristics.local_search", "candidates", "exchanges"),
    ("solvers.closed_forms.pivot", "PivotState.hold_products", "exchanges"),
    ("solvers.heuristics.local_search", "possible_gain", "proof"),
    ("solvers.heuristics.local_search", "refit_loss", "refit"),
    ("solvers.heuristics.local_search", "refit_loss_and_rounding", "refit"),
    ("solvers.closed_forms.pivot", "PivotState.loss", "refit"),
    ("solvers.heuristics.incumbent", "refit_loss", "refit"),
    ("solvers.solve", "refit", "refit"),
    ("solvers.solution", "verify", "verification"),
)
"""Module, name in it, and phase; the names are those under which callers find them."""


def layer(p: int, m: int, seed: int) -> tuple[Symmetric, torch.Tensor]:
    """Return half of the Gram matrix, and the weights, of a made-up feed-forward layer.

    Inputs of very different power, correlated through p / 8 common factors that decay by a power
    law, as activations do; drawn through their covariance, since p tokens or more would take longer
    than the solver.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(1, p // 8)
    factors = torch.randn(p, count, generator=generator)
    factors *= torch.arange(1, count + 1).pow(-0.25)
    factors *= (0.7 / factors.square().sum(1)).sqrt()[:, None]
    scale = torch.randn(p, generator=generator).mul_(0.5).exp_()
    factors *= scale[:, None]
    H = Symmetric.empty(p, scale.double())
    for start, panel in H.spans():
        stop = start + len(panel)
        panel.copy_(factors[start:stop] @ factors[:stop].T)
    H.add_diagonal(0.3 * scale.double().square())
    return H, torch.randn(p, m, generator=generator).double().div_(math.sqrt(p))


def solver(row: Row) -> Report:
    """Solve one layer, half of its inputs to go, and perhaps verify the answer."""
    clock = Clock()
    for entry in PHASES:
        clock.watch(*entry)
    with clock.phase("data"):
        H, W0 = layer(row.p, row.m, row.seed)
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=row.p // 2, overwrite=True)
    del H, W0
    with clock.phase("rest"):
        solution = solvers.solve(problem, row.backend, options=dict(row.options))
    if row.verify:
        solution.verify()
    return {
        "phases": clock.phases,
        "status": solution.status.name,
        "iterations": solution.iterations,
        "relative_loss": solution.relative_loss,
    }


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run.

    Parameters
    ----------
    task
        What is measured.
    p, m
        Inputs and outputs of the layer.
    backend, options
        What solves it.
    verify
        Whether the answer is verified.
    seed
        Of the data.
    """

    task: str
    p: int
    m: int
    backend: str
    options: tuple[tuple[str, float], ...] = ()
    verify: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of its file."""
        words = dataclasses.astuple(self)
        return hashlib.sha256(repr(words).encode()).hexdigest()[:16] + ".json"


TASKS: dict[str, Callable[[Row], Report]] = {"solver": solver}


def main() -> None:
    arguments = parse_arguments()
    if arguments.row is not None:
        words = json.loads(arguments.row)
        row = Row(**{**words, "options": tuple(map(tuple, words["options"]))})
        print(json.dumps(TASKS[row.task](row)))
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    options = tuple((name, float(value)) for name, value in arguments.options)
    for task in arguments.tasks:
        for p in arguments.sizes:
            row = Row(task, p, p // 4, arguments.backend, options, arguments.verify)
            if not (arguments.directory / row.key).exists():
                measure(row, arguments.directory)
    print(*tables(arguments.directory), sep="\n")
    if arguments.plot is not None:
        draw(growth(arguments.directory, arguments.backend), arguments.plot)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sizes", nargs="*", type=int, default=[4096, 8192], help="inputs p")
    parser.add_argument("--backend", default="local_search")
    parser.add_argument(
        "--options",
        nargs="*",
        type=lambda text: tuple(text.split("=", 1)),
        default=[],
        help="of the backend, as NAME=NUMBER",
    )
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--plot", type=Path, help="file for a picture of what local_search takes")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(row: Row, directory: Path) -> None:
    """Run one row in a process of its own, and write what it took."""
    this = [sys.executable, "-m", "benchmarks.scale", str(directory)]
    found = measured([*this, "--row", json.dumps(asdict(row))])
    if found.status:
        raise SystemExit(f"{row} failed with status {found.status}")
    content = {
        **asdict(row),
        **json.loads(found.output.splitlines()[-1]),
        "threads": torch.get_num_threads(),
        "peak_bytes": found.peak,
        "seconds": found.cpu_seconds,
    }
    write_json(directory / row.key, content)
    print(json.dumps(content), flush=True)


# ---- tables --------------------------------------------------------------------------------------


def tables(directory: Path) -> list[str]:
    """Return all rows of a directory as Markdown, a table for each way to solve."""
    rows = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    found: dict[tuple[str, ...], list[Report]] = {}
    for row in sorted(rows, key=lambda row: row["p"]):
        shares = ", ".join(f"{name}={value:g}" for name, value in row["options"])
        found.setdefault((row["task"], row["backend"], shares), []).append(row)
    lines: list[str] = []
    for name, group in sorted(found.items()):
        lines += ["", f"{': '.join(filter(None, name))}", "", *table(group)]
    return lines


def table(rows: list[Report]) -> list[str]:
    """Return rows of growing size, with the slope of each time on log axes."""
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    head = ["p", "m", *phases, "processor, s", "wall, s", "peak, GB", "peak / p^2", "status"]
    lines = [[*head, "loss"], ["---:"] * (len(head) + 1)]
    for row in rows:
        spent = [row["phases"].get(name, [0, 0, 0]) for name in phases]
        times = [f"{seconds:.1f}" for seconds, _, _ in spent]
        wall, peak = sum(part[1] for part in spent), row["peak_bytes"]
        share = peak / (8 * row["p"] ** 2)
        status = f"{row['status']}, {row['iterations']} steps"
        lines.append(
            [
                *(str(row["p"]), str(row["m"]), *times, f"{row['seconds']:.0f}", f"{wall:.0f}"),
                *(f"{peak / 1e9:.2f}", f"{share:.2f}", status, f"{row['relative_loss']:.6f}"),
            ]
        )
    if len(rows) > 1:
        sizes = [row["p"] for row in rows]
        spent = [[row["phases"].get(name, [0])[0] for row in rows] for name in phases]
        growth = [slope(sizes, times) for times in (*spent, [row["seconds"] for row in rows])]
        lines.append(["slope", "", *growth, "", "", "", "", ""])
    return [f"| {' | '.join(line)} |" for line in lines]


def slope(sizes: list[int], values: list[float]) -> str:
    """Return the least-squares slope of some values over p on log axes."""
    pairs = zip(sizes, values, strict=True)
    points = [(math.log(size), math.log(value)) for size, value in pairs if value > 0]
    if len({x for x, _ in points}) < 2:
        return ""
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return f"{sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points):.2f}"


# ---- a picture -----------------------------------------------------------------------------------

_HELD = 2.0
"""Numbers of eight bytes that are held at once, in p^2."""


def growth(directory: Path, backend: str) -> list[Report]:
    """Return the rows of one backend, as it is by default, by size."""
    rows = [json.loads(file.read_text()) for file in directory.glob("*.json")]
    chosen = [row for row in rows if row["backend"] == backend and not row["options"]]
    return sorted(chosen, key=lambda row: row["p"])


def draw(rows: list[Report], path: Path) -> None:
    """Draw seconds by phase and resident memory over p, both on log axes."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    sizes = [row["p"] for row in rows]
    for phase in ("problem", "elimination", "factorization", "refit", "exchanges", "proof"):
        spent = [row["phases"].get(phase, [math.nan])[0] for row in rows]
        time.loglog(sizes, spent, marker=".", linewidth=1, label=phase)
    whole = [sum(part[0] for part in row["phases"].values()) for row in rows]
    time.loglog(sizes, whole, marker="o", color="black", label=f"all, slope {slope(sizes, whole)}")
    time.set(xlabel="inputs p", ylabel="seconds of one core")
    peaks = [row["peak_bytes"] / 1e9 for row in rows]
    memory.loglog(sizes, peaks, marker="o", color="black", label="resident peak")
    held = [_HELD * 8 * p**2 / 1e9 for p in sizes]
    memory.loglog(sizes, held, linestyle="--", color="gray", label=f"{_HELD} p² numbers")
    memory.set(xlabel="inputs p", ylabel="GB")
    for axes in (time, memory):
        axes.set_xticks(sizes, [f"{p:,}" for p in sizes], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    with rc_context({"svg.hashsalt": "osscar"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
