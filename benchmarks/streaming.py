"""What `osscar prune` takes for language models of random weights: time by phase, memory, disk.

    python -m benchmarks.streaming DIRECTORY qwen2-0.6b -- --neurons 0.7 --max-memory 5GB
    python -m benchmarks.streaming DIRECTORY opt-6.7b --layers 2 --dtype bfloat16 -- --neurons 0.5

Each row is one run in a process of its own, whose greatest resident size the operating system tells
once it has ended; it is written to a file of its own in DIRECTORY, so that the same command goes on
where it was stopped, and prints all rows there as a table.  The models are written to DIRECTORY,
too, tensor by tensor, once for each shape.

`--forward` runs the calibration data once through the blocks of the model in the place of pruning
it, within the same memory: what a walk is to be compared with.

Takes two minutes to two hours a row.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import osscar
from benchmarks.measuring import Clock, measured
from benchmarks.random_models import SHAPES, write_model
from osscar.base.files import write_json
from osscar.data.batches import as_inputs
from osscar.models.names import DEMO_CALIBRATION

PHASES = (
    ("osscar.offload.places", "Place.read", "input"),
    ("osscar.offload.places", "Scratch.append", "output"),
    ("osscar.checkpoint.directory", "write_tensors", "output"),
    ("osscar.run.run_log", "RunLog.append", "output"),
    ("osscar.walk.gram", "GramAccumulator.add", "gram"),
    ("osscar.walk.layer_step", "LayerStep.regularization", "damping"),
    ("osscar.walk.layer_step", "LayerStep.problem", "problem"),
    ("osscar.walk.walk", "Walk._measure", "forward"),
    ("solvers", "solve", "solver"),
    ("osscar.models.load", "load_language_model", "opening"),
    ("graph", "trace", "opening"),
    ("osscar.proof.equivalence", "outputs_or_none", "opening"),
    ("osscar.preparation.prepare", "refuse_chance", "opening"),
    ("osscar.walk.walk", "learned_calls", "opening"),
    ("osscar.run.chain", "feasible_groups", "trial"),
    ("osscar.allocation.divergence", "Reference.of", "predictions"),
    ("osscar.allocation.divergence", "Reference.divergence", "predictions"),
    ("osscar.run.chain", "shrunk", "proof"),
    ("osscar.run.result", "PruningResult.save", "saving"),
)
"""Module, name in it, and phase; the names are those under which callers find them."""


@dataclass(frozen=True)
class Row:
    """One run.

    Parameters
    ----------
    shape, layers, dtype
        The model; None: all of its layers.
    options
        Of `osscar prune`.
    forward
        Whether the calibration data only run through the model.
    """

    shape: str
    layers: int | None
    dtype: str
    options: tuple[str, ...]
    forward: bool = False

    @property
    def model(self) -> str:
        """The name of the model's directory."""
        return f"{self.shape}-{self.layers or 'all'}-{self.dtype}"

    @property
    def key(self) -> str:
        """The name of the row's file."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16] + ".json"

    def option(self, name: str, default: str) -> str:
        """Return what an option is given."""
        at = self.options.index(name) if name in self.options else None
        return default if at is None else self.options[at + 1]


def main() -> None:
    own, _, rest = "\0".join(sys.argv[1:]).partition("\0--\0")
    arguments = parse_arguments([word for word in own.split("\0") if word])
    if arguments.row is not None:
        words = json.loads(arguments.row)
        row = Row(**{**words, "options": tuple(words["options"])})
        print("\n" + json.dumps((run_forward if row.forward else prune)(row, arguments.directory)))
        return
    if arguments.write is not None:
        shape = {**SHAPES[arguments.shape]}
        if arguments.layers is not None:
            shape["num_hidden_layers"] = arguments.layers
        write_model(arguments.write, shape, arguments.dtype)
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.shape is not None:
        options = tuple(word for word in rest.split("\0") if word)
        row = Row(
            arguments.shape, arguments.layers, arguments.dtype, options, forward=arguments.forward
        )
        if not (arguments.directory / row.key).exists():
            measure(row, arguments.directory)
    print(*table(arguments.directory), sep="\n")


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("shape", choices=SHAPES, nargs="?")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(row: Row, directory: Path) -> None:
    """Run one row in a process of its own, and write what it took."""
    this = [sys.executable, "-m", "benchmarks.streaming", str(directory)]
    if not (directory / row.model).exists():
        new = directory / f"{row.model}.new"
        shutil.rmtree(new, ignore_errors=True)
        layers = [] if row.layers is None else ["--layers", str(row.layers)]
        written = measured([*this, row.shape, *layers, "--dtype", row.dtype, "--write", str(new)])
        if written.status:
            raise SystemExit(f"{row.model} was not written: status {written.status}")
        new.rename(directory / row.model)
    found = measured([*this, "--row", json.dumps(asdict(row))])
    if found.status:
        raise SystemExit(f"{row} failed with status {found.status}:\n{found.output}")
    content = {
        **asdict(row),
        **json.loads(found.output.splitlines()[-1]),
        "weights": (directory / row.model / "model.safetensors").stat().st_size,
        "threads": torch.get_num_threads(),
        "peak_bytes": found.peak,
        "seconds": found.cpu_seconds,
        "wall_seconds": found.seconds,
    }
    write_json(directory / row.key, content)
    print(json.dumps(content), flush=True)


# ---- in a process of its own -------------------------------------------------------------


def watching() -> Clock:
    """Return a clock that runs from now on."""
    clock = Clock()
    for entry in PHASES:
        clock.watch(*entry)
    clock.watch("osscar.offload.places", "Slice.read", "input", lambda one, *_: one.nbytes)
    clock.watch("osscar.offload.places", "Slice.read_rows", "input", _bytes_of_rows)
    return clock


def _bytes_of_rows(one: Any, rows: torch.Tensor, *_: Any) -> int:
    return len(rows) * one.nbytes // one.shape[0]


def prune(row: Row, directory: Path) -> dict[str, Any]:
    """Prune a model as the command does."""
    from osscar.cli import main as command

    clock = watching()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        out, report = Path(scratch) / "out", Path(scratch) / "report.json"
        sys.argv = ["osscar", "prune", str(directory / row.model), "--out", str(out)]
        sys.argv += ["--json", str(report), *row.options]
        with contextlib.suppress(SystemExit), clock.phase("rest"):
            command()
        content = json.loads(report.read_text())
    return {
        **accounts(clock),
        "layers_solved": len(content["layers"]),
        "statuses": sorted({one["status"] for one in content["layers"]}),
        "parameters": content["parameters_before"],
        "relative_loss": content["summed_relative_loss"],
        "divergence": content["divergence"],
        "saved_bytes": content["saved"]["bytes"],
    }


def run_forward(row: Row, directory: Path) -> dict[str, Any]:
    """Run the calibration data through a model's blocks, batch by batch."""
    memory = row.option("--max-memory", "") or None
    loaded = osscar.load_model(directory / row.model, max_memory=memory, device="cpu")
    samples, seqlen = int(row.option("--samples", "64")), int(row.option("--seqlen", "512"))
    data = osscar.load_calibration(
        DEMO_CALIBRATION, loaded.tokenizer, samples=samples, seqlen=seqlen
    )
    clock = watching()
    model: Any = loaded.model
    with torch.no_grad(), clock.phase("forward"):
        for batch in as_inputs(model, data).batches(model, int(row.option("--batch-size", "8"))):
            model.base_model(**batch, use_cache=False)
    return accounts(clock)


def accounts(clock: Clock) -> dict[str, Any]:
    """Return what a clock has counted, and what the system says of blocks of the disk."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "phases": clock.phases,
        "read_bytes": clock.bytes,
        "disk_read": usage.ru_inblock * 512,
        "disk_written": usage.ru_oublock * 512,
    }


# ---- tables --------------------------------------------------------------------------------------

COLUMNS = {
    "forward": ("forward",),
    "Gram": ("gram",),
    "damping": ("damping",),
    "solver": ("problem", "solver"),
    "input, output": ("input", "output"),
    "trial, proof": ("opening", "trial", "proof", "predictions", "saving"),
}
"""Columns of the table, and the phases that each adds up."""


def table(directory: Path) -> list[str]:
    """Return all rows of a directory as Markdown."""
    rows = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    head = ["model", "options", *COLUMNS, "rest", "processor, s", "peak, GB", "weights, GB"]
    lines = [[*head, "read, times"], ["---"] * 2 + ["---:"] * (len(head) - 1)]
    for row in sorted(rows, key=lambda row: (row["weights"], row["options"])):
        spent = {name: part[0] for name, part in row["phases"].items()}
        parts = [sum(spent.get(name, 0.0) for name in names) for names in COLUMNS.values()]
        rest = row["seconds"] - sum(parts)
        read = sum(row["read_bytes"].values())
        options = "one forward pass" if row["forward"] else " ".join(row["options"])
        lines.append(
            [
                f"{row['shape']}, {row['layers'] or 'all'} layers, {row['dtype']}",
                f"`{options}`",
                *(f"{seconds:.1f}" for seconds in (*parts, rest)),
                *(f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}"),
                *(f"{row['weights'] / 1e9:.2f}", f"{read / row['weights']:.1f}"),
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
