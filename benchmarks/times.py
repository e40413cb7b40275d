"""Times of whole models as the table of times predicts them, against measured ones.

    python -m benchmarks.times DIRECTORY --data DATA --tasks resnet20 demo

Each model keeps the first units of every group but residual streams, five shares of them, without
any refit: only how fast it is matters.  The prediction is that of the table by which `--speedup`
chooses widths; each model is then timed in turns with the dense one.  Prints a table for
docs/budget.md, with the median error of a model.

Takes a minute for ResNet-20 and the demo, more for MobileNetV2 (`--mobilenet WEIGHTS`), and half an
hour for SmolLM2, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.measuring import markdown
from benchmarks.tasks import TASKS
from osscar.allocation.clocks import clock_of
from osscar.allocation.speedup import WholeModels
from osscar.allocation.task import PruningTask
from osscar.allocation.times import time_operators
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest

SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)
"""Of the units of each group that stay."""


class Compared(NamedTuple):
    """How many times as fast as the dense model one is, predicted and measured."""

    share: float
    predicted: float
    measured: float


def compared(model: nn.Module, data: Any) -> Iterator[Compared]:
    """Predict and time a model at some shares of its units."""
    with prepare(model, data) as prepared:
        request = PruningRequest(speedup=1.5, round_to=1)
        task = PruningTask(prepared, request)
        table = time_operators(task, clock_of(task))
        for share in SHARES:
            kept = {}
            for group in task.shared:
                some = task.options[group.name].tolist()
                kept[group.name] = min(some, key=lambda n: abs(n - share * group.units))
            predicted = table.dense / table.of(kept)
            near = dataclasses.replace(
                task, request=dataclasses.replace(request, speedup=max(predicted, 1.01))
            )
            yield Compared(share, predicted, WholeModels(near).speedup(kept))


def row(name: str, found: Sequence[Compared]) -> list[str]:
    """Return the cells of a model: predicted and measured at each share, and the median error."""
    cells = [f"{one.predicted:.2f}x, {one.measured:.2f}x" for one in found]
    error = statistics.median(abs(one.measured / one.predicted - 1) for one in found)
    return [name, *cells, f"{error:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("directory", type=Path, help="for texts that calibrate")
    add("--data", type=Path, required=True, help="directory of the files named")
    names = [name for name in TASKS if name != "mixture"]
    add("--tasks", nargs="*", choices=names, default=["resnet20", "demo"])
    add("--mobilenet", type=Path, help="weights of MobileNetV2")
    add("--windows", type=int, default=1, help="of text that are read")
    add("--images", type=int, default=64, help="that are read")
    add("--device", default="auto")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    head = ["model", *(f"{share:.0%} of units" for share in SHARES), "median error"]
    table = [head]
    for name in arguments.tasks:
        subject = TASKS[name].load(arguments)
        data = subject.calibration("same form", None, 0)
        table.append(row(name, list(compared(subject.model, data))))
        print(*markdown([head, table[-1]]), sep="\n", flush=True)
    print(*markdown(table), sep="\n")


if __name__ == "__main__":
    main()
