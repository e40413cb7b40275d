"""What a graphics card is worth: solver and pipeline on the CPU and on it, in one call.

    python -m benchmarks.gpu --device cuda --sizes 1024 4096 28672 --tasks demo smollm2 opt-6.7b

Problems are those of `benchmarks/scale.py`.  Prints Markdown tables of seconds on both, with their
ratios and whether both chose the same units; and what fits on the device, or can be done in an
hour, that the CPU cannot.  With `--device cpu` the CPU stands on both sides, and all ratios are
about 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import solvers
from benchmarks.scale import layer
from osscar.base.memory import available_memory
from osscar.base.timing import Stage, clock, profiled
from osscar.data.text import load_calibration
from osscar.models.load import load_model
from osscar.models.names import DEMO_CALIBRATION
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked

CPU = torch.device("cpu")

SQUARES = 2.2
"""Numbers of p x p in float64 that a solve holds at its peak (docs/scale.md)."""

HOUR = 3600.0


@dataclass(frozen=True)
class Solved:
    """One problem solved on one device.

    Parameters
    ----------
    seconds
        From the Gram matrix to the refitted weights.
    support
        The units kept.
    loss
        Relative to removing everything.
    peak_bytes
        Memory of the device; 0 on the CPU.
    """

    seconds: float
    support: frozenset[int] = field(repr=False)
    loss: float
    peak_bytes: int


def solved(p: int, device: torch.device, backend: str, seed: int = 0) -> Solved:
    """Solve one made-up layer of p inputs and p / 4 outputs, half of the inputs to go."""
    H, W0 = (matrix.to(device) for matrix in layer(p, max(1, p // 4), seed))
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)
    began = clock()
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    solution = solvers.solve(problem, backend)
    seconds = clock() - began
    peak = torch.cuda.max_memory_allocated(device) if on_card else 0
    support = frozenset(solution.support.tolist())
    return Solved(seconds, support, solution.relative_loss, peak)


def memory_of(device: torch.device) -> int:
    """Return the bytes that are free on a device, or for this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory() or 0


def largest(memory: int) -> int:
    """Return the most inputs of a layer that can be solved in so much memory."""
    return math.isqrt(int(memory / (8 * SQUARES)))


def predicted(p: int, found: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds for p inputs, told from two smaller sizes; None without these."""
    if len(found) < 2:
        return None
    size, seconds = found[-1]
    growth = max(p, size) / size
    ratio, less = found[-2][0] / size, found[-2][1]
    # a + b = seconds and a ratio^2 + b ratio^3 = less, for sizes relative to the larger one.
    b = min(max((seconds * ratio**2 - less) / (ratio**2 - ratio**3), 0.0), seconds)
    return (seconds - b) * growth**2 + b * growth**3


def in_an_hour(found: Sequence[tuple[int, float]]) -> int:
    """Return the most inputs of a layer that can be solved in an hour, from two sizes or more."""
    low, high = 1, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        told = predicted(middle, found)
        low, high = (middle, high) if told is not None and told <= HOUR else (low, middle)
    return low


# ---- the pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model to prune.

    Parameters
    ----------
    make
        Returns it, with its calibration data.
    asked
        Fields of the request.
    """

    make: Callable[[], tuple[nn.Module, Any]]
    asked: Mapping[str, Any]


def _known(name: str, samples: int, seqlen: int) -> tuple[nn.Module, Any]:
    loaded = load_model(name, device="cpu")
    return loaded.model, load_calibration(
        DEMO_CALIBRATION, loaded.tokenizer, samples=samples, seqlen=seqlen
    )


def opt_block(hidden: int, ffn: int, heads: int) -> tuple[nn.Module, Any]:
    """Return a language model of one block of OPT with random weights, and random windows."""
    config = AutoConfig.for_model(
        "opt",
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=ffn,
        num_attention_heads=heads,
        num_hidden_layers=1,
        vocab_size=1000,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, torch.randint(1000, (32, 512), generator=torch.Generator().manual_seed(0))


TASKS: Mapping[str, Task] = {
    "demo": Task(lambda: _known("demo", 32, 512), {"heads": "2/3", "neurons": 0.7}),
    "demo, budget": Task(lambda: _known("demo", 32, 512), {"sparsity": 0.3}),
    "smollm2": Task(lambda: _known("smollm2-135m", 8, 512), {"heads": "2/3", "neurons": 0.7}),
    "opt-6.7b": Task(lambda: opt_block(4096, 16384, 32), {"heads": "3/4", "neurons": "3/4"}),
}


@dataclass(frozen=True)
class Pruned:
    """One run on one device.

    Parameters
    ----------
    seconds
        By stage.
    supports
        The units kept, of each layer.
    """

    seconds: Mapping[Stage, float]
    supports: Sequence[Sequence[int]] = field(repr=False)

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def pruned(task: Task, device: torch.device) -> Pruned:
    """Run one task on one device."""
    model, data = task.make()
    request = PruningRequest(**task.asked, device=str(device))
    with profiled() as spent:
        result = prune_as_asked(model.to(device), data, request)
    return Pruned(spent.seconds, [layer.support for layer in result.layers])


# ---- tables --------------------------------------------------------------------------------------


def solver_table(
    sizes: Sequence[int], device: torch.device, backend: str, patience: float = HOUR
) -> list[str]:
    """Solve problems of growing size on both, as far as their memory goes; return Markdown.

    What would take longer than `patience`, in seconds, is told from smaller sizes, as `about`.
    """
    rows = [["p", "CPU, s", f"{device.type}, s", "ratio", "peak there, GB", "same units", "loss"]]
    known: dict[torch.device | str, list[tuple[int, float]]] = {"cpu": [], "device": []}
    for p in sizes:
        sides: dict[str, Solved] = {}
        cells: dict[str, str] = {}
        for name, place in (("cpu", CPU), ("device", device)):
            told = predicted(p, known[name])
            if p > largest(memory_of(place)):
                cells[name] = "no memory"
            elif told is not None and told > patience:
                cells[name] = f"about {told:.0f}"
            else:
                sides[name] = solved(p, place, backend)
                known[name].append((p, sides[name].seconds))
                cells[name] = f"{sides[name].seconds:.2f}"
        slow, fast = sides.get("cpu"), sides.get("device")
        both = slow is not None and fast is not None
        rows.append(
            [
                f"{p:,}",
                cells["cpu"],
                cells["device"],
                f"{slow.seconds / fast.seconds:.2f}" if slow and fast else "",
                "" if fast is None else f"{fast.peak_bytes / 1e9:.2f}",
                ("yes" if slow and fast and slow.support == fast.support else "no") if both else "",
                "" if fast is None else f"{fast.loss:.6f}",
            ]
        )
    return [*markdown(rows), "", *possible(known, device)]


def possible(known: Mapping[Any, Sequence[tuple[int, float]]], device: torch.device) -> list[str]:
    """Say what fits in the memory of each, and what takes an hour."""
    lines = []
    for name, place in (("cpu", CPU), ("device", device)):
        memory = memory_of(place)
        line = f"- {name} ({place.type}): {memory / 1e9:.0f} GB hold p = {largest(memory):,}"
        if len(known[name]) > 1:
            line += f"; an hour is enough for p = {in_an_hour(known[name]):,}"
        lines.append(line)
    return lines


def pipeline_table(names: Sequence[str], device: torch.device) -> list[str]:
    """Prune models on both; return Markdown, a row for each stage of each."""
    rows = [["model", "stage", "CPU, s", f"{device.type}, s", "ratio"]]
    for name in names:
        slow, fast = pruned(TASKS[name], CPU), pruned(TASKS[name], device)
        for stage in Stage:
            if stage in slow.seconds or stage in fast.seconds:
                pair = slow.seconds.get(stage, 0.0), fast.seconds.get(stage, 0.0)
                rows.append([name, str(stage), *_compared(*pair)])
        same = "the same units" if slow.supports == fast.supports else "other units"
        rows.append([name, f"all ({same})", *_compared(slow.total, fast.total)])
    return markdown(rows)


def _compared(slow: float, fast: float) -> tuple[str, str, str]:
    return f"{slow:.2f}", f"{fast:.2f}", f"{slow / fast:.2f}" if fast > 0 else ""


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table whose first row is its head."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{' ---: |' * len(rows[0])}", *rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu against itself")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 28672])
    parser.add_argument("--backend", default="local_search")
    parser.add_argument(
        "--patience", type=float, default=900, help="seconds; what would take longer is told"
    )
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; give --device cpu to try this out")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    if given.sizes:
        print(
            *solver_table(given.sizes, device, given.backend, given.patience),
            "",
            sep="\n",
            flush=True,
        )
    if given.tasks:
        print(*pipeline_table(given.tasks, device), sep="\n")


if __name__ == "__main__":
    main()
