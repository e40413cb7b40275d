"""What a graphics card is worth: solver and pipeline on the CPU and on it.

    python -m benchmarks.gpu DIRECTORY --device cuda
    python -m benchmarks.gpu DIRECTORY --device cpu --sizes 128 256 --tasks tiny

Problems are those of `benchmarks/scale.py`.  Each row, one problem or model on one device, is
written to a file of its own in DIRECTORY, and not measured again: the same command goes on where it
was stopped.  No row is begun after `--minutes`.  In the end, DIRECTORY/page.md has the tables:
seconds on both with their ratios, whether both chose the same units, the most memory that tensors
took on the card, and what fits on it, or can be done in an hour.  Each device is warmed up first,
by a small problem and a small model.

Takes at most 25 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import solvers
from benchmarks.measuring import markdown, read
from benchmarks.random_models import SHAPES
from benchmarks.scale import layer
from osscar.base.devices import this_device
from osscar.base.files import write_json
from osscar.base.memory import available_memory
from osscar.base.timing import Stage, clock, profiled
from osscar.data.text import load_calibration
from osscar.models.load import load_model
from osscar.models.names import DEMO_CALIBRATION
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked

CPU = torch.device("cpu")

SQUARES = 2.2
"""Numbers of p x p in float64 that a solve holds at its peak."""

HOUR = 3600.0

BACKEND = "local_search"

PATIENCE = 120.0
"""Seconds of the CPU: what would take longer is told from smaller sizes."""


@dataclass(frozen=True)
class Row:
    """One problem solved, or one model pruned, on one device."""

    name: str
    """The number of inputs, or the name of the task."""
    device: str
    """Where, in words."""
    seconds: Mapping[str, float]
    """By stage."""
    units: str
    """A digest of the units kept."""
    loss: float
    """Relative to removing everything; of a model the sum over its layers."""
    peak_bytes: int
    """The most that tensors took on a card; 0 on the CPU."""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def measured(
    name: str, device: torch.device, work: Callable[[], tuple[Mapping[str, float], Any, float]]
) -> Row:
    """Return the row of some work, which returns seconds by stage, the units kept, and the loss."""
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, units, loss = work()
    peak = torch.cuda.max_memory_allocated(device) if on_card else 0
    digest = hashlib.sha256(repr(units).encode()).hexdigest()[:12]
    return Row(name, this_device(device)["device"], seconds, digest, loss, peak)


def solved(p: int, device: torch.device) -> tuple[Mapping[str, float], Any, float]:
    """Solve one made-up layer of p inputs and p / 4 outputs, half of the inputs to go."""
    H, W0 = (matrix.to(device) for matrix in layer(p, max(1, p // 4), 0))
    began = clock()
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    solution = solvers.solve(problem, BACKEND)
    seconds = clock() - began
    return {str(Stage.SOLVER): seconds}, solution.support.tolist(), solution.relative_loss


def free_bytes(device: torch.device) -> int:
    """Return what is free on a device, what torch keeps of freed memory included."""
    if device.type != "cuda":
        return available_memory() or 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def largest(memory: int) -> int:
    """Return the most inputs of a layer that can be solved in so much memory."""
    return math.isqrt(int(memory / (8 * SQUARES)))


def power(found: Sequence[tuple[int, float]]) -> float:
    """Return the power of p by which seconds grow between the last two sizes: 2 to 3."""
    (small, less), (large, more) = found[-2:]
    return min(max(math.log(more / less) / math.log(large / small), 2.0), 3.0)


def predicted(p: int, found: Sequence[tuple[int, float]]) -> float:
    """Return the seconds for p inputs, told from two smaller sizes; 0 without these."""
    if len(found) < 2:
        return 0.0
    size, seconds = found[-1]
    return float(seconds * (p / size) ** power(found))


# ---- the pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model with its calibration data, fields of the request, and if the CPU takes minutes."""

    make: Callable[[], tuple[nn.Module, Any]]
    asked: Mapping[str, Any]
    on_cpu: bool = True


def _known(name: str, samples: int, seqlen: int) -> tuple[nn.Module, Any]:
    loaded = load_model(name, device="cpu")
    return loaded.model, load_calibration(
        DEMO_CALIBRATION, loaded.tokenizer, samples=samples, seqlen=seqlen
    )


def block(
    name: str, samples: int, seqlen: int, dtype: torch.dtype, **changed: int
) -> tuple[nn.Module, Any]:
    """Return a model of one block of a shape with random weights, and random windows."""
    shape = {**SHAPES[name], "num_hidden_layers": 1, "vocab_size": 1000, **changed}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(1000, (samples, seqlen), generator=generator)


_SMALL = {"hidden_size": 64, "intermediate_size": 96}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
_HALF: Mapping[str, Any] = {"heads": 0.5, "neurons": 0.5}

TASKS: Mapping[str, Task] = {
    "tiny": Task(partial(block, "llama-2-7b", 8, 64, torch.float32, **_SMALL), _HALF),
    "demo": Task(partial(_known, "demo", 32, 512), {"heads": "2/3", "neurons": 0.7}),
    "demo, budget": Task(partial(_known, "demo", 32, 512), {"sparsity": 0.3}),
    "smollm2": Task(partial(_known, "smollm2-135m", 8, 512), {"heads": "2/3", "neurons": 0.7}),
    "opt-6.7b": Task(partial(block, "opt-6.7b", 32, 512, torch.float32), _HALF, on_cpu=False),
    "llama-2-7b": Task(
        partial(block, "llama-2-7b", 32, 2048, torch.bfloat16),
        {**_HALF, "batch_size": 1},
        on_cpu=False,
    ),
}


def pruned(name: str, device: torch.device) -> tuple[Mapping[str, float], Any, float]:
    """Run one task on one device."""
    model, data = TASKS[name].make()
    request = PruningRequest(**TASKS[name].asked, device=str(device))
    with profiled() as spent:
        result = prune_as_asked(model.to(device), data, request)
    seconds = {str(stage): spent.seconds[stage] for stage in Stage if stage in spent.seconds}
    return seconds, [list(layer.support) for layer in result.layers], result.loss


# ---- rows and tables -----------------------------------------------------------------------------


@dataclass
class Bench:
    """Measures rows that DIRECTORY does not have yet, and makes the tables of all."""

    directory: Path
    device: torch.device
    """What is set against the CPU."""
    minutes: float
    """After which no row is begun."""
    late: int = 0
    """Rows that are left to the next call."""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._began = clock()
        self._warm: set[str] = set()

    @property
    def sides(self) -> tuple[tuple[str, torch.device], ...]:
        """Both devices, by the names of their rows."""
        return ("cpu", CPU), ("device", self.device)

    def row(
        self, kind: str, name: str, side: str, work: Callable[[torch.device], Any]
    ) -> Row | None:
        """Return a row that is there, or is measured now; None if there is no time left."""
        file = self.directory / f"{kind} {name} {side}.json"
        if file.exists():
            return Row(**read(file))
        if clock() - self._began > 60 * self.minutes:
            self.late += 1
            return None
        device = dict(self.sides)[side]
        if side not in self._warm:
            solved(256, device)
            pruned("tiny", device)
            self._warm.add(side)
        found = measured(name, device, lambda: work(device))
        write_json(file, dataclasses.asdict(found))
        return found

    def solver_table(self, sizes: Sequence[int]) -> list[str]:
        """Solve problems of growing size on both, as far as memory goes; return Markdown."""
        rows = [["p", "CPU, s", f"{self.device.type}, s", "ratio", "peak, GB", "units", "loss"]]
        known: dict[str, list[tuple[int, float]]] = {"cpu": [], "device": []}
        for p in sizes:
            found: dict[str, Row | None] = {}
            cells: dict[str, str] = {}
            for side, place in self.sides:
                told = predicted(p, known[side])
                if p > largest(free_bytes(place)):
                    cells[side] = "no memory"
                elif side == "cpu" and told > PATIENCE:
                    cells[side] = f"about {told:.0f}"
                else:
                    found[side] = row = self.row(BACKEND, str(p), side, partial(solved, p))
                    cells[side] = f"{row.total:.2f}" if row else "not yet"
                    known[side] += [(p, row.total)] if row else []
            pair = found.get("cpu"), found.get("device")
            rows.append([f"{p:,}", cells["cpu"], cells["device"], *compared(*pair)])
        return [*markdown(rows, 0), "", *self.possible(known)]

    def possible(self, known: Mapping[str, Sequence[tuple[int, float]]]) -> list[str]:
        """Say what fits in the memory of each, and what takes an hour."""
        lines = []
        for side, place in self.sides:
            memory = free_bytes(place)
            line = f"- {side} ({place.type}): {memory / 1e9:.0f} GB hold p = {largest(memory):,}"
            if len(known[side]) > 1:
                size, seconds = known[side][-1]
                most = size * (HOUR / seconds) ** (1 / power(known[side]))
                line += f"; an hour is enough for p = {int(most):,}"
            lines.append(line)
        return lines

    def pipeline_table(self, names: Sequence[str]) -> list[str]:
        """Prune models on both; return Markdown, a row for each stage of each."""
        head = ["model", "stage", "CPU, s", f"{self.device.type}, s"]
        rows = [[*head, "ratio", "peak, GB", "units", "loss"]]
        for name in names:
            slow, fast = (
                self.row("prune", name, side, partial(pruned, name))
                if side == "device" or TASKS[name].on_cpu
                else None
                for side, _ in self.sides
            )
            for stage in map(str, Stage):
                pair = [one.seconds.get(stage) if one else None for one in (slow, fast)]
                if any(pair):
                    cells = ["" if one is None else f"{one:.2f}" for one in pair]
                    rows.append([name, stage, *cells, ratio(*pair), "", "", ""])
            cells = [f"{one.total:.2f}" if one else "" for one in (slow, fast)]
            rows.append([name, "all", *cells, *compared(slow, fast)])
        return markdown(rows, 0)


def ratio(slow: float | None, fast: float | None) -> str:
    """Return how many times as long one takes as another, where both are known."""
    return f"{slow / fast:.2f}" if slow and fast else ""


def compared(slow: Row | None, fast: Row | None) -> list[str]:
    """Return cells: the ratio, the peak on the device, whether units are the same, and the loss."""
    if fast is None:
        return [""] * 4
    same = "" if slow is None else "the same" if slow.units == fast.units else "others"
    of_both = ratio(slow.total if slow else None, fast.total)
    return [of_both, f"{fast.peak_bytes / 1e9:.2f}", same, f"{fast.loss:.6f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="of the rows, and of the page")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu against itself")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 28672])
    parser.add_argument("--minutes", type=float, default=25, help="no row is begun after them")
    tasks = [name for name in TASKS if name != "tiny"]
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=tasks)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; give --device cpu to try this out")
    bench = Bench(given.directory, device, given.minutes)
    names = [this_device(place)["device"] for _, place in bench.sides]
    page = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {' and '.join(names)}"]
    if given.sizes:
        page += ["", *bench.solver_table(given.sizes)]
    if given.tasks:
        page += ["", *bench.pipeline_table(given.tasks)]
    if bench.late:
        page += ["", f"{bench.late} rows are not measured yet: the same command goes on."]
    (given.directory / "page.md").write_text("\n".join([*page, ""]))
    print(*page, sep="\n")


if __name__ == "__main__":
    main()
