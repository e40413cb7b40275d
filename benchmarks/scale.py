"""What one large layer takes, and what models larger than memory take: seconds, and memory.

    python -m benchmarks.scale DIRECTORY --sizes 1024 2048 4096 8192
    python -m benchmarks.scale DIRECTORY --model opt-350m -- --heads 0.5 --max-memory 1.4GB
    python -m benchmarks.scale DIRECTORY --model opt-6.7b --layers 2 -- --neurons 0.5

A layer is made up, with so many inputs; half of them leave by local search.  A model has random
weights, and is written to DIRECTORY once for each shape; `osscar prune` gets the options behind
``--``, and the demo's text to calibrate on.  Each row is one run in a process of its own, whose
seconds of the processor and whose greatest resident size the operating system tells once it has
ended.  It is written to a file of its own in DIRECTORY, so that the same command goes on where it
was stopped.  Ends with tables of all rows there.

Takes a minute up to 8,192 inputs, half an hour for 28,672; two minutes to two hours a model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import solvers
from benchmarks.measuring import Asked, Measured, markdown, measured, read, rows_in
from benchmarks.random_models import SHAPES, write_model
from osscar.base.files import write_json
from osscar.models.names import DEMO_CALIBRATION
from solvers.linalg.symmetric import Symmetric


@dataclass(frozen=True)
class Layer(Asked):
    """One layer of `inputs` inputs, and a quarter as many outputs."""

    inputs: int


@dataclass(frozen=True)
class Model(Asked):
    """A shape of `SHAPES`, how many of its layers, and the options of `osscar prune`."""

    shape: str
    layers: int | None
    dtype: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.layers or 'all'}-{self.dtype}"


def main() -> None:
    words = [*sys.argv[1:], "--"]
    own, options = words[: words.index("--")], words[words.index("--") + 1 : -1]
    arguments = parse_arguments(own)
    if arguments.solve is not None:
        print(json.dumps(solved(arguments.solve)))
        return
    place: Path = arguments.directory
    place.mkdir(parents=True, exist_ok=True)
    rows: list[Layer | Model] = [Layer(size) for size in arguments.sizes]
    if arguments.model is not None:
        rows.append(Model(arguments.model, arguments.layers, arguments.dtype, tuple(options)))
    for row in rows:
        if not (place / row.key).exists():
            work = layer_row if isinstance(row, Layer) else model_row
            write_json(place / row.key, {**asdict(row), **work(row, place)})
            print(read(place / row.key), flush=True)
    print(*tables(place), sep="\n")


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="inputs of layers")
    parser.add_argument("--model", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--solve", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


# ---- one layer ---------------------------------------------------------------------------


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


def solved(p: int) -> dict[str, Any]:
    """Solve one layer in this process."""
    H, W0 = layer(p, p // 4, 0)
    began = time.process_time()
    problem = solvers.SubsetProblem.from_gram(H, W0, keep=p // 2, overwrite=True)
    del H, W0
    solution = solvers.solve(problem, "local_search")
    return {
        "seconds": time.process_time() - began,
        "status": solution.status.name,
        "relative_loss": solution.relative_loss,
    }


def layer_row(row: Layer, place: Path) -> dict[str, Any]:
    words = ["-m", "benchmarks.scale", str(place), "--solve", str(row.inputs)]
    found = successful([sys.executable, *words])
    return {**json.loads(found.output), "peak_bytes": found.peak}


def successful(command: list[str]) -> Measured:
    found = measured(command)
    if found.status:
        raise SystemExit(f"{' '.join(command)} ended with {found.status}:\n{found.output}")
    return found


# ---- a model -----------------------------------------------------------------------------


def model_row(row: Model, place: Path) -> dict[str, Any]:
    """Prune a model as the command does."""
    if not (place / row.name).exists():
        new = place / f"{row.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        fewer = {} if row.layers is None else {"num_hidden_layers": row.layers}
        write_model(new, {**SHAPES[row.shape], **fewer}, row.dtype)
        new.rename(place / row.name)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        out, report = Path(scratch) / "out", Path(scratch) / "report.json"
        command = [sys.executable, "-m", "osscar", "prune", str(place / row.name)]
        command += ["--calibration", str(DEMO_CALIBRATION), "--out", str(out)]
        found = successful([*command, "--json", str(report), *row.options])
        content = read(report)
    return {
        "weights": sum(file.stat().st_size for file in (place / row.name).glob("*.safetensors")),
        "layers_solved": len(content["layers"]),
        "relative_loss": sum(one["relative_loss"] for one in content["layers"]),
        "peak_bytes": found.peak,
        "cpu_seconds": found.cpu_seconds,
    }


# ---- tables ------------------------------------------------------------------------------


def tables(place: Path) -> list[str]:
    """Return all rows of a directory as Markdown."""
    rows = rows_in(place)
    layers = sorted((r for r in rows if "inputs" in r), key=lambda r: r["inputs"])
    lines: list[list[str]] = [["p", "CPU s", "peak, GB", "relative loss", "status"]]
    for row in layers:
        took = [f"{row['seconds']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        lines.append([f"{row['inputs']:,}", *took, f"{row['relative_loss']:.6f}", row["status"]])
    told = markdown(lines, 0) if layers else []
    if len(layers) > 1:
        sizes, seconds = ([row[name] for row in layers] for name in ("inputs", "seconds"))
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        told += ["", f"Time grows as p to the power {slope:.2f}.", ""]
    lines = [["model", "options", "weights, GB", "peak, GB", "CPU s", "summed loss"]]
    for row in (row for row in rows if "shape" in row):
        name = f"{row['shape']}, {row['layers'] or 'all'} layers, {row['dtype']}"
        sizes = [f"{row[size] / 1e9:.2f}" for size in ("weights", "peak_bytes")]
        loss = f"{row['relative_loss']:.6f}"
        lines.append([name, " ".join(row["options"]), *sizes, f"{row['cpu_seconds']:.0f}", loss])
    return [*told, *(markdown(lines, 2) if len(lines) > 1 else [])]


if __name__ == "__main__":
    main()
