"""What a graphics card is worth: the solver, and whole runs, on the CPU and on it.

    python -m benchmarks.gpu DIRECTORY --device cuda
    python -m benchmarks.gpu DIRECTORY --device cpu --sizes 128 256 --tasks tiny

Problems are those of `benchmarks/scale.py`.  Each row, one problem or model on both devices, is
written to a file of its own in DIRECTORY, so that the same command goes on where it was stopped.
Ends with a table: seconds on both with their ratio, whether both chose the same units, the loss,
and the most memory that tensors took on the card.  Each device is warmed up first.

Takes at most 25 minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import osscar
import solvers
from benchmarks.measuring import markdown, read
from benchmarks.random_models import SHAPES
from benchmarks.scale import layer
from osscar.base.devices import this_device
from osscar.base.files import write_json
from osscar.base.timing import Stage, clock, profiled
from osscar.models.names import DEMO_CALIBRATION

Found = tuple[Mapping[str, float], list[Any], float]
"""Seconds by stage, the units kept, and the loss: relative, of a model the sum over its layers."""


def solved(p: int, device: torch.device) -> Found:
    """Solve one made-up layer of p inputs and p / 4 outputs, half of the inputs to go."""
    H, W0 = (matrix.to(device) for matrix in layer(p, max(1, p // 4), 0))
    began = clock()
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    solution = solvers.solve(problem, "local_search")
    seconds = {str(Stage.SOLVER): clock() - began}
    return seconds, solution.support.tolist(), solution.relative_loss


# ---- whole runs --------------------------------------------------------------------------


def known(name: str, samples: int, seqlen: int) -> tuple[nn.Module, Any]:
    """Return a model by name, and windows of the demo's text."""
    loaded = osscar.load_model(name, device="cpu")
    asked = {"samples": samples, "seqlen": seqlen}
    return loaded.model, osscar.load_calibration(DEMO_CALIBRATION, loaded.tokenizer, **asked)


def block(
    name: str, samples: int, seqlen: int, dtype: torch.dtype, **changed: int
) -> tuple[nn.Module, Any]:
    """Return a model of one block of a shape with random weights, and random windows."""
    shape = {**SHAPES[name], "num_hidden_layers": 1, "vocab_size": 1000, **changed}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(1000, (samples, seqlen), generator=generator)


SMALL = {"hidden_size": 64, "intermediate_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
HALF: Mapping[str, Any] = {"heads": 0.5, "neurons": 0.5}
THIRD: Mapping[str, Any] = {"heads": "2/3", "neurons": 0.7}
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
TASKS: Mapping[str, tuple[Callable[[], tuple[nn.Module, Any]], Mapping[str, Any]]] = {
    "tiny": (partial(block, "llama-2-7b", 8, 64, FLOAT32, **SMALL), HALF),
    "demo": (partial(known, "demo", 32, 512), THIRD),
    "demo, budget": (partial(known, "demo", 32, 512), {"sparsity": 0.3}),
    "smollm2": (partial(known, "smollm2-135m", 8, 512), THIRD),
    "opt-6.7b": (partial(block, "opt-6.7b", 32, 512, FLOAT32), HALF),
    "llama-2-7b": (partial(block, "llama-2-7b", 32, 2048, BFLOAT16), {**HALF, "batch_size": 1}),
}
"""What makes a model with its calibration data, and fields of the request."""

ON_CARD_ALONE = ("opt-6.7b", "llama-2-7b")
"""Of which the CPU would take an hour."""


def pruned(name: str, device: torch.device) -> Found:
    """Run one task on one device."""
    make, asked = TASKS[name]
    model, data = make()
    with profiled() as spent:
        result = osscar.prune(model.to(device), data, device=str(device), **asked)
    seconds = {str(stage): spent.seconds[stage] for stage in Stage if stage in spent.seconds}
    loss = sum(layer.relative_loss for layer in result.layers)
    return seconds, [list(layer.support) for layer in result.layers], loss


# ---- rows --------------------------------------------------------------------------------


def measured(work: Callable[[torch.device], Found], devices: list[torch.device]) -> dict[str, Any]:
    """Do some work on each device, and say what it took."""
    found = [work(device) for device in devices]
    card = devices[-1].type == "cuda"
    return {
        "seconds": [seconds for seconds, _, _ in found],
        "same": found[0][1] == found[-1][1] if len(found) > 1 else None,
        "loss": found[-1][2],
        "peak_bytes": torch.cuda.max_memory_allocated(devices[-1]) if card else 0,
    }


def lines(name: str, row: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a row: of a whole run also those of its stages."""
    stages = [stage for stage in map(str, Stage) if any(stage in one for one in row["seconds"])]
    parts = [(s, [one.get(s, 0.0) for one in row["seconds"]]) for s in stages if stages[1:]]
    told = []
    for part, times in (*parts, ("all", [sum(one.values()) for one in row["seconds"]])):
        cells = [*([""] * (len(times) < 2)), *(f"{x:.2f}" for x in times)]
        ratio = f"{times[0] / times[-1]:.2f}" if len(times) > 1 and times[-1] else ""
        told.append([name, part, *cells, ratio])
    same = {True: "the same", False: "others", None: ""}[row["same"]]
    whole = [f"{row['peak_bytes'] / 1e9:.2f}", same, f"{row['loss']:.6f}"]
    return [*([*cells, "", "", ""] for cells in told[:-1]), [*told[-1], *whole]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu against itself")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 2048, 4096, 8192])
    tasks = [name for name in TASKS if name != "tiny"]
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=tasks)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    cpu, device = torch.device("cpu"), torch.device(given.device)
    works = {f"p = {p:,}": partial(solved, p) for p in given.sizes}
    works |= {name: partial(pruned, name) for name in given.tasks}
    for place in (cpu, device):
        solved(256, place)
        pruned("tiny", place)
    rows = [["model", "stage", "CPU, s", f"{device.type}, s", "ratio", "peak, GB", "units", "loss"]]
    for name, work in works.items():
        file = given.directory / f"{name}.json"
        if not file.exists():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            write_json(file, measured(work, [device] if name in ON_CARD_ALONE else [cpu, device]))
        rows += lines(name, read(file))
    print(f"torch {torch.__version__}", *(this_device(one)["device"] for one in (cpu, device)))
    print(*markdown(rows, 2), sep="\n")


if __name__ == "__main__":
    main()
