"""Quality at a given size, in one shot and recovered: this toolkit's default against baselines.

    python -m benchmarks.quality DIRECTORY --data DATA --tasks smollm2 --settings "of neurons"
    python -m benchmarks.quality DIRECTORY --data DATA --tasks resnet20 --steps 64

Each row is one pruned model.  It has a process of its own and is written to a file of its own in
DIRECTORY, its model beside it, so that the same command goes on where it was stopped.  With
`--steps`, each is then recovered: text on at most 256 windows of what calibrates, of which a step
has 4, with 8 more that are held out, and images on all that there are to train, without labels.
Ends with a table of all rows, for `python -m benchmarks.results`; give each source a DIRECTORY.

Baselines are uniform, on the paper's target: every group keeps the same share of its units, or the
largest one within a budget of FLOPs, and is refitted by least squares.  Whatever shares a budget
gets as much as uniform shares come to in whole units.  Seconds are those of the processor; give
OMP_NUM_THREADS=1 where others use the machine.

Takes two to fifteen minutes a row of SmolLM2, half a minute one of another model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import torch

import osscar
from benchmarks.case import Case, Form, Smaller
from benchmarks.measuring import Asked, markdown, read, rows_in
from benchmarks.page import DENSE, OURS
from benchmarks.page import told as quality_of
from benchmarks.tasks import (
    SOURCES,
    TASKS,
    Setting,
    Subject,
    Task,
    Text,
    both,
    flops,
    same_size,
)
from osscar.base.errors import first_line
from osscar.base.files import write_json
from osscar.base.timing import busy_clock, interleaved
from osscar.data.batches import as_inputs
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops

UNIFORM = {"allocation": "uniform", "target": "weights", "damp": 0.01}
NO_REFIT = 1e9
"""What damping leaves dense weights as they are."""

PAPER = "multistage (the paper's)"
BASELINES: dict[str, dict[str, Any]] = {
    OURS: {},
    PAPER: {**UNIFORM, "backend": "multistage"},
    "greedy (ZipLM's)": {**UNIFORM, "backend": "greedy"},
    "wanda": {**UNIFORM, "backend": "wanda"},
    "magnitude": {**UNIFORM, "backend": "magnitude"},
}
CHANGED: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "weights": {"target": "weights"},
    "correction weight 1": {"correction_weight": 1.0},
    "damp 0.01": {"damp": 0.01},
    "batch norm kept": {"batch_norm": "keep"},
}
"""The default but for one thing; only where it is named."""

EXPERTS: dict[str, dict[str, Any]] = {
    f"{name}{', not refitted' if damp else ''}": {"allocation": "uniform", "backend": name, **damp}
    for name in ("random", "frequency", "reap", "local_search")
    for damp in ({}, {"damp": NO_REFIT})
}

STEP, WINDOWS, DECIDING = 4, 256, 8
"""Windows in a step of recovery; those that train at most; those that are held out."""

IMAGES = 1000
"""All that there are to train."""

TURNS = 7
"""Of the forward passes that are timed."""

Method = Callable[[Case], Smaller]


@dataclass(frozen=True)
class Row(Asked):
    """One model, as a method made it, or trained for so many steps after that.

    `scored` are the windows and images on which.
    """

    task: str
    setting: str
    method: str
    source: str = "same form"
    samples: int | None = None
    seed: int = 0
    scored: tuple[int, int] = (40, 2000)
    steps: int = 0

    @property
    def dense(self) -> Row:
        """The row of the dense model that this one is compared with."""
        return dataclasses.replace(self, method=DENSE, source="same form", seed=0, steps=0)

    @property
    def words(self) -> dict[str, Any]:
        """What tells it from others, for its file."""
        names = ("task", "setting", "method", "seed", "samples", "steps")
        return {name: getattr(self, name) for name in names}


# ---- methods of this toolkit -------------------------------------------------------------


def run(case: Case, asked: Mapping[str, Any]) -> Smaller:
    """Prune with this toolkit, as fields of a request ask."""
    device = case.options.device
    result = osscar.prune(case.model, case.data, device=device, seed=case.seed, **asked)
    return Smaller(result.model, Form.OSSCAR, result)


def prune(case: Case, method: Mapping[str, Any]) -> Smaller:
    """Prune to equal shares as the setting has them, or to the size of these."""
    setting = case.setting
    if method.get("allocation") != "uniform":
        return run(case, {**setting.asked, **method, "sparsity": None, **case.size})
    if not setting.units:
        return run(case, {**setting.asked, **method})
    return run(case, {**setting.units, **method, "allocation": "measured"})


def baselines(task: str) -> dict[str, Method]:
    """Return the methods that there are for a task."""
    known = {OURS: {}, **EXPERTS} if task == "mixture" else {**BASELINES, **CHANGED}
    return {name: partial(prune, method=method) for name, method in known.items()}


# ---- as fast as asked --------------------------------------------------------------------

TRIES, NEAR = 7, 0.02
"""Sizes at which a method is tried to reach a speed, and how near it has to come."""


def at_speed(method: Method, case: Case, subject: Subject) -> Smaller:
    """Search the size at which a method's model is as fast as asked, and return the nearest one.

    The share that images' operations, or heads and neurons, keep is bisected.
    """
    wanted = 1 / case.size["speedup"]
    text = isinstance(subject, Text)
    low, high, share = 0.0, 1.0, wanted
    nearest: tuple[float, Smaller] | None = None
    for _ in range(TRIES):
        (setting,) = both(1 - share) if text else flops(share)
        size = same_size(case.model, case.data, setting)
        found = method(dataclasses.replace(case, setting=setting, size=size, counting=[]))
        times = measured(found.model, subject)["forward"]
        reached = times["model"] / times["dense"]
        off = abs(reached / wanted - 1)
        if nearest is None or off < nearest[0]:
            nearest = off, found
        if off <= NEAR:
            break
        low, high = (low, share) if reached > wanted else (share, high)
        share = (low + high) / 2
    assert nearest is not None
    return nearest[1]


# ---- rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What is compared: tasks, and the methods for each by its name."""

    tasks: Mapping[str, Task]
    methods: Callable[[str], Mapping[str, Method]]

    def parser(self, description: str) -> argparse.ArgumentParser:
        """Return a parser of the command line."""
        parser = argparse.ArgumentParser(description=description.splitlines()[0])
        known = list(dict.fromkeys(name for task in self.tasks for name in self.methods(task)))
        add = parser.add_argument
        add("directory", type=Path)
        add("--data", type=Path, required=True, help="directory of the files named")
        add("--tasks", nargs="*", choices=self.tasks, default=["resnet20", "demo"])
        add("--settings", nargs="*", default=[""], help="only those that hold one of these texts")
        standard = [name for name in known if name not in CHANGED]
        add("--methods", nargs="*", choices=known, default=standard)
        add("--source", choices=SOURCES, default="same form", help="of the text that calibrates")
        add("--samples", type=int, help="that calibrate: 256 images, or 32 windows")
        add("--seeds", nargs="*", type=int, default=[0])
        add("--steps", type=int, default=0, help="of a recovery; 0: one shot alone")
        add("--mobilenet", type=Path, help="weights of MobileNetV2")
        add("--mixture", type=Path, help="directory of a mixture")
        add("--official", type=Path, help="checkout of the paper's public code")
        add("--windows", type=int, default=40, help="score only the first N windows")
        add("--images", type=int, default=2000, help="score only N images")
        add("--device", default="auto")
        return parser

    def measure(self, arguments: argparse.Namespace) -> None:
        """Measure the rows that DIRECTORY does not have."""
        arguments.directory.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        for row in self.asked(arguments):
            file = arguments.directory / row.key
            if file.exists():
                continue
            context = multiprocessing.get_context("fork")
            process = context.Process(target=self.written, args=(row, arguments))
            process.start()
            process.join()
            if process.exitcode:
                failed = f"the process ended with status {process.exitcode}"
                if row.method == DENSE:
                    raise SystemExit(f"{row}: {failed}")
                write_json(file, {**row.words, "failed": failed})

    def asked(self, arguments: argparse.Namespace) -> Iterator[Row]:
        """Yield the rows asked for, the dense model first, then one seed after the other."""
        scored = (arguments.windows, arguments.images)
        for task in arguments.tasks:
            settings = [
                one.name
                for one in self.tasks[task].settings
                if any(text in one.name for text in arguments.settings)
            ]
            known = [name for name in arguments.methods if name in self.methods(task)]
            for setting in settings:
                yield Row(task, setting, DENSE, samples=arguments.samples, scored=scored)
            for seed, setting, method in itertools.product(arguments.seeds, settings, known):
                source, samples = arguments.source, arguments.samples
                row = Row(task, setting, method, source, samples, seed, scored)
                yield row
                if arguments.steps:
                    yield dataclasses.replace(row, steps=arguments.steps)

    def written(self, row: Row, arguments: argparse.Namespace) -> None:
        """Measure a row and write it, in a process that does nothing else."""
        torch.manual_seed(row.seed)
        subject = self.tasks[row.task].load(arguments)
        content = row.words
        try:
            work = self.dense if row.method == DENSE else recovered if row.steps else self.pruned
            content.update(work(row, subject, arguments))
        except Exception as error:  # what a peer raises is what the page has to tell
            if row.method == DENSE:
                raise
            content["failed"] = told(error)
        write_json(arguments.directory / row.key, content)
        print({name: value for name, value in content.items() if name != "forward"}, flush=True)

    def setting(self, row: Row) -> Setting:
        """Return what is removed."""
        return next(one for one in self.tasks[row.task].settings if one.name == row.setting)

    def dense(self, row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
        """Measure the dense model, and the size that all others are to have."""
        data = subject.calibration("same form", row.samples, 0)
        return {
            "size": same_size(subject.model, data, self.setting(row)),
            "quality": subject.dense,
            **measured(subject.model, subject),
        }

    def pruned(self, row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
        """Make a model smaller, score it, and save it."""
        size = read(arguments.directory / row.dense.key)["size"]
        data = subject.calibration(row.source, row.samples, row.seed)
        case = Case(subject.model, data, self.setting(row), size, row.seed, arguments)
        began = time.process_time()
        method = self.methods(row.task)[row.method]
        searched = "speedup" in size and row.method != OURS  # which is asked for a speed itself
        found = at_speed(method, case, subject) if searched else method(case)
        content = {
            "seconds": time.process_time() - began - sum(case.counting),
            "peak_bytes": peak(),
            "quality": subject.score(found.model),
            **measured(found.model, subject),
            "form": found.form.value,
            "proved": found.proved,
        }
        place = (arguments.directory / row.key).with_suffix("")
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped here
        found.form.write(found, place)
        return content


def recovered(row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model that was pruned and saved, and score it."""
    before = arguments.directory / dataclasses.replace(row, steps=0).key
    known = read(before)
    if "failed" in known:
        return {"failed": known["failed"]}
    smaller = Form(known["form"]).read(before.with_suffix(""), subject.model)
    text = isinstance(subject, Text)
    samples = min(STEP * row.steps, WINDOWS) + DECIDING if text else IMAGES
    data = subject.calibration("same form", samples, 0)
    began = time.process_time()
    recovery = osscar.recover(
        smaller, subject.model, data, steps=row.steps, seed=row.seed, device=arguments.device
    )
    content = {"seconds": time.process_time() - began, "peak_bytes": peak()}
    divergence = recovery.document()
    held_out = {name: divergence[name] for name in ("before", "after")}
    return {**content, "quality": subject.score(recovery.model), "held_out": held_out}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return quality and seconds as Markdown: a column a method, a mean over seeds a cell."""
    cells: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for row in (row for row in rows if "failed" not in row):
        asked = {"samples": row["samples"], "steps": row["steps"]}
        name = ", ".join([row["setting"], *(f"{n} {what}" for what, n in asked.items() if n)])
        measure, value = next(iter(row["quality"].items()))
        found = {name: (measure, 1.0 if value is None else value)}
        if "seconds" in row:
            found[f"seconds: {name}"] = ("seconds", row["seconds"])
        for line, one in found.items():
            cells.setdefault(line, {}).setdefault(row["method"], []).append(one)
    methods = list(
        dict.fromkeys([DENSE, *BASELINES, *(m for line in cells.values() for m in line)])
    )
    return markdown(
        [
            ["kept or removed", *methods],
            *([name, *(shown(cells[name].get(m, [])) for m in methods)] for name in sorted(cells)),
        ]
    )


def shown(values: Sequence[tuple[str, float]]) -> str:
    """Write what seeds came to, which have one measure."""
    if values and values[0][0] == "seconds":
        return f"{statistics.mean(value for _, value in values):.0f}"
    return quality_of(values[0][0], [value for _, value in values]) if values else ""


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error):.200}"


def peak() -> int:
    """Return the greatest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sample(subject: Subject) -> dict[str, torch.Tensor]:
    """Return what forward passes are timed on: 64 images, or one window."""
    text = isinstance(subject, Text)
    data = subject.calibration("same form", 1 if text else 64, 0)
    return as_inputs(subject.model, data).batches(64)[0]


@torch.no_grad()
def measured(model: Any, subject: Subject) -> dict[str, Any]:
    """Return size, operations a sample, and seconds of a forward pass beside the dense model's."""
    batch = sample(subject)
    timers = [Timer(partial(one, **batch), timer=busy_clock) for one in (model, subject.model)]
    seconds = dict(zip(("model", "dense"), interleaved(timers, TURNS, "timing"), strict=True))
    rows = len(next(iter(batch.values())))
    return {
        "parameters": count_parameters(model),
        "flops": count_flops(model, batch) / rows,
        "forward": {name: statistics.median(times) for name, times in seconds.items()},
    }


def main() -> None:
    bench = Bench(TASKS, baselines)
    arguments = bench.parser(__doc__).parse_args()
    bench.measure(arguments)
    print(*table(rows_in(arguments.directory)), sep="\n")


if __name__ == "__main__":
    main()
