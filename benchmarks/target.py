"""Targets of quality: the size that is found, and what fresh samples then say.

    python -m benchmarks.target DIRECTORY --data DATA --tasks resnet20 demo --seeds 0 1 2 3

Each row is one search, written to a file of its own in DIRECTORY, so that the same command goes on
where it was stopped.  A pool of samples, the test images or all windows of a text, is drawn from
anew with each seed; what is left of it is fresh, and is measured as the search measures.  Ends with
a Markdown table.  Seconds are those of the processor.

Takes 3 minutes a search of ResNet-20 or the demo, a quarter of an hour one of another model.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import osscar
from benchmarks.measuring import markdown, rows_in
from benchmarks.tasks import cifar10
from osscar.base.files import write_json
from osscar.data.batches import as_inputs
from osscar.data.parts import rows_of
from osscar.evaluation.confidence import Judge
from osscar.models.names import DEMO_CALIBRATION
from osscar.request import TargetKind


@dataclass(frozen=True)
class Task:
    """A model, how many samples are drawn for a search, tokens of a window of text, and targets.

    Of what is left, `fresh` samples are measured at most.
    """

    model: str
    samples: int
    targets: tuple[tuple[TargetKind, float], ...]
    seqlen: int | None = None
    own_labels: bool = False
    """Whether images are labelled with the class that the dense model puts first."""
    fresh: int = 1000


DIVERGENCE, PERPLEXITY, TOP1 = TargetKind.DIVERGENCE, TargetKind.PERPLEXITY, TargetKind.TOP1
TASKS = {
    "resnet20": Task(
        f"{Path(__file__).parent / 'resnet20.py'}:build",
        768,
        ((DIVERGENCE, 0.05), (DIVERGENCE, 0.2), (TOP1, 0.03)),
    ),
    "mobilenet": Task(
        "torchvision:mobilenet_v2", 384, ((TOP1, 0.05), (TOP1, 0.1), (DIVERGENCE, 0.2)), None, True
    ),
    "demo": Task("demo", 128, ((DIVERGENCE, 0.03), (DIVERGENCE, 0.1), (PERPLEXITY, 0.05)), 64),
    "smollm2": Task(
        "smollm2-135m",
        128,
        ((DIVERGENCE, 0.1), (DIVERGENCE, 0.3), (PERPLEXITY, 0.1)),
        256,
        fresh=128,
    ),
}


@dataclass(frozen=True)
class Row:
    """One search."""

    task: str
    target: str
    most: float
    seed: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.task}-{self.target}-{self.most:g}-{self.seed}.json"


def main() -> None:
    arguments = parse_arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for name in arguments.tasks:
        rows = [
            row for row in asked(name, arguments) if not (arguments.directory / row.file).exists()
        ]
        if rows:
            loaded, pool = opened(TASKS[name], arguments)
            for row in rows:
                measure(row, loaded, pool, arguments)
    print(*table(arguments.directory), sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="directory of the files named")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["resnet20", "demo"])
    parser.add_argument("--mobilenet", type=Path, help="weights of MobileNetV2")
    parser.add_argument("--targets", nargs="*", type=float, help="only those of these values")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def asked(name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that are asked for, all targets of a seed before the next."""
    for seed in arguments.seeds:
        for kind, most in TASKS[name].targets:
            if not arguments.targets or most in arguments.targets:
                yield Row(name, kind, most, seed)


def opened(task: Task, arguments: argparse.Namespace) -> tuple[osscar.LoadedModel, Any]:
    """Open a model, and all samples that there are for it, none of which overlap."""
    data = arguments.data
    if task.seqlen is None:
        weights = arguments.mobilenet if task.own_labels else data / "resnet20-cifar10.safetensors"
        loaded = osscar.load_model(task.model, weights=weights)
        images = cifar10(loaded, data, "test")
        if task.own_labels:
            labels = first_classes(loaded.model, images)
            images = dataclasses.replace(images, labels=labels, classes=())
        return loaded, images
    loaded = osscar.load_model(task.model)
    text = DEMO_CALIBRATION if task.model == "demo" else data / "wikitext2-raw-test.txt"
    return loaded, osscar.load_calibration(
        text, loaded.tokenizer, samples=10**5, seqlen=task.seqlen, overlapping=False
    )


@torch.no_grad()
def first_classes(model: Any, images: Any) -> torch.Tensor:
    """Return the class that a model puts first, for each image."""
    batches = as_inputs(model, images).batches(50)
    return torch.cat([model(**batch).argmax(1) for batch in batches])


def measure(row: Row, loaded: osscar.LoadedModel, pool: Any, arguments: argparse.Namespace) -> None:
    """Search, score on what is left of the pool, and write what was found."""
    task, kind, model = TASKS[row.task], TargetKind(row.target), loaded.model
    samples = len(pool.tokens) if task.seqlen else len(pool)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(row.seed))
    chosen, rest = order[: task.samples], order[task.samples :][: task.fresh]
    data, fresh = rows_of(pool, chosen), rows_of(pool, rest)
    began, found = time.process_time(), dataclasses.asdict(row)
    asked: dict[str, Any] = {kind: row.most}
    try:
        result = osscar.prune(model, data, seed=row.seed, device=arguments.device, **asked)
    except osscar.OsscarError as error:
        found["refused"] = str(error)
    else:
        assert result.target is not None
        found |= {**result.target.to_json(), "seconds": time.process_time() - began}
        judge = Judge.of(kind, model, fresh)
        found["fresh"] = dataclasses.asdict(judge.measure(result.model))
        found["kept"] = result.parameters_after / result.parameters_before
    write_json(arguments.directory / row.file, found)
    print(row, found.get("refused") or f"keeps {found['kept']:.1%}", flush=True)


def table(directory: Path) -> list[str]:
    """Return a Markdown table of the rows in a directory, one for each task and target."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows_in(directory):
        cell = (row["task"], f"{row['target']} {row['most']:g}")
        cells.setdefault(cell, []).append(row)
    head = ["model", "target", "tries", "refused", "parameters kept", "fresh value, mean"]
    end = ["fresh within the target", "fresh within the reported bound", "attempts", "seconds"]
    lines: list[list[str]] = [[*head, *end]]
    for cell, tries in cells.items():
        own = [row for row in tries if "refused" not in row]
        counts = [*cell, str(len(tries)), str(len(tries) - len(own))]
        if not own:
            lines.append([*counts, *[""] * 6])
            continue
        fresh = [row["fresh"]["value"] for row in own]
        bound = sum(row["fresh"]["value"] <= row["reported"]["bound"] for row in own)
        within = [sum(row["fresh"]["value"] <= row["most"] for row in own), bound]
        attempts = np.mean([len(row["attempts"]) for row in own])
        kept, seconds = (np.mean([row[name] for row in own]) for name in ("kept", "seconds"))
        sizes = [f"{kept:.1%}", f"{np.mean(fresh):.4f}"]
        lines.append([*counts, *sizes, *map(str, within), f"{attempts:.1f}", f"{seconds:.0f}"])
    return markdown(lines, 2)


if __name__ == "__main__":
    main()
