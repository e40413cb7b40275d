"""Compare this toolkit with its peers: the same models, data and size, in one run.

    python -m benchmarks.peers DIRECTORY --data DATA
    python -m benchmarks.peers DIRECTORY --data DATA --tasks smollm2 --settings "30% of heads"
    python -m benchmarks.peers DIRECTORY --data DATA --official CHECKOUT --steps 64

Models and data are those of `benchmarks/quality.py`, but for the model that is shipped, which has
text of its own.  Each row has a process of its own and is written to a file of its own in
DIRECTORY, its model beside it, so that the same command goes on where it was stopped.  With
`--steps`, each model that was pruned is then trained by `osscar.recover`, whoever made it smaller.
What fails is a row, too, with the exception.  Ends with a page, `peers.md`, and its figure, of all
rows there.

Seconds are those of the processor; give OMP_NUM_THREADS=1 where others use the machine.

Takes a minute a row, and several for SmolLM2.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import osscar
from benchmarks import quality
from benchmarks.peers import backends, depgraph
from benchmarks.peers.case import Case, Form, Smaller, first_line
from benchmarks.peers.decoders import flap, short_gpt, slice_gpt
from benchmarks.peers.page import DENSE, write_page
from benchmarks.quality import Subject, Task, Text
from benchmarks.recovery import training_data
from osscar.base.files import write_json
from osscar.data.batches import as_inputs
from osscar.models.names import DEMO_CALIBRATION, DEMO_HELD_OUT
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops


class Shipped(Text):
    """The model that is shipped, on its own text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.loaded = osscar.load_model("demo", device=arguments.device)
        self.model = self.loaded.model
        self.first = self.shifted = DEMO_CALIBRATION
        self.scored = osscar.load_text(
            DEMO_HELD_OUT, self.loaded.tokenizer, windows=arguments.windows
        )


SETTINGS = quality.both(0.3, 0.5)
TASKS = {
    "resnet20": Task(quality.resnet20, quality.flops(0.7, 0.5, 0.3)),
    "mobilenet": Task(quality.mobilenet, quality.flops(0.66)),
    "demo": Task(Shipped, SETTINGS),
    "smollm2": Task(lambda arguments: Text("smollm2-135m", arguments), SETTINGS),
}
TEXTS = ("demo", "smollm2")

TURNS = 7
"""Of the forward passes that are timed."""


@dataclass(frozen=True)
class Row(quality.Row):
    """One model, as a method made it, or trained for so many steps after that."""

    steps: int = 0


def methods(text: bool) -> dict[str, Callable[[Case], Smaller]]:
    """Return all that make a model of text, or of images, smaller.

    FLAP with equal shares is left out for text, as FLAP itself is there.
    """
    theirs = depgraph.TEXT if text else depgraph.IMAGES
    prune = depgraph.prune_text if text else depgraph.prune_images
    return {
        **{
            name: partial(backends.prune, name=name)
            for name in backends.METHODS
            if not (text and name == backends.FLAP)
        },
        "the paper's public code": backends.public_code,
        **{f"Torch-Pruning, {name}": partial(prune, name=name) for name in theirs},
        **({"FLAP": flap, "SliceGPT": slice_gpt, "ShortGPT": short_gpt} if text else {}),
    }


def main() -> None:
    arguments = parse_arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for row in asked(arguments):
        file = arguments.directory / row.key
        if not file.exists():
            process = multiprocessing.get_context("fork").Process(
                target=written, args=(row, arguments)
            )
            process.start()
            process.join()
            if process.exitcode and row.method == DENSE:
                raise SystemExit(f"{row} ended with status {process.exitcode}")
            if process.exitcode:
                failed = f"the process ended with status {process.exitcode}"
                write_json(file, {**words(row), "failed": failed})
    print(write_page(arguments.directory))


def parse_arguments() -> argparse.Namespace:
    parser = quality.parser_of(__doc__)
    known = list({**methods(False), **methods(True)})
    (chosen,) = (action for action in parser._actions if action.dest == "methods")
    chosen.choices, chosen.default = known, known
    parser.set_defaults(tasks=["resnet20", "demo"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="that calibrate: 256 images, or 32 windows")
    parser.add_argument("--steps", type=int, default=0, help="of a recovery; 0: one shot alone")
    parser.add_argument("--official", type=Path, help="checkout of the paper's public code")
    return parser.parse_args()


def asked(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that are asked for, the dense model first, then one seed after the other."""
    scored = (arguments.windows, arguments.images)
    for task in arguments.tasks:
        settings = [one.name for one in quality.wanted_settings(TASKS[task], arguments)]
        known = [name for name in arguments.methods if name in methods(task in TEXTS)]
        for setting in settings:
            yield Row(task, setting, DENSE, samples=arguments.samples, scored=scored)
        for seed, setting, method in itertools.product(arguments.seeds, settings, known):
            row = Row(task, setting, method, "same form", arguments.samples, seed, scored)
            yield row
            if arguments.steps:
                yield dataclasses.replace(row, steps=arguments.steps)


def words(row: Row) -> dict[str, Any]:
    """Return what tells a row from others, for its file."""
    names = ("task", "setting", "method", "seed", "samples", "steps")
    return {name: getattr(row, name) for name in names}


def written(row: Row, arguments: argparse.Namespace) -> None:
    """Measure a row and write it, in a process that does nothing else."""
    torch.manual_seed(row.seed)
    subject = TASKS[row.task].load(arguments)
    content = words(row)
    try:
        work = dense if row.method == DENSE else recovered if row.steps else pruned
        content.update(work(row, subject, arguments))
    except Exception as error:  # what a peer raises is what the page has to tell
        if row.method == DENSE:
            raise
        content["failed"] = first_line(error)
    write_json(arguments.directory / row.key, content)
    told = {name: value for name, value in content.items() if name != "forward"}
    print(told, flush=True)


def dense(row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the dense model, and the size that all others are to have."""
    (setting,) = [one for one in TASKS[row.task].settings if one.name == row.setting]
    data = subject.calibration("same form", row.samples, 0)
    return {
        "size": quality.same_size(subject.model, data, setting),
        "quality": subject.dense,
        **measured(subject.model, subject),
    }


def pruned(row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a model smaller, save it, read it back, and score it."""
    base = dataclasses.replace(row, method=DENSE, seed=0, steps=0)
    size = quality.read(arguments.directory / base.key)["size"]
    (setting,) = [one for one in TASKS[row.task].settings if one.name == row.setting]
    data = subject.calibration("same form", row.samples, row.seed)
    case = Case(subject.model, data, setting, size, row.seed, arguments)
    began = time.process_time()
    found = methods(isinstance(subject, Text))[row.method](case)
    seconds = time.process_time() - began - sum(case.counting)
    content = {"seconds": seconds, "peak_bytes": peak()}
    content.update(
        quality=subject.score(found.model),
        **measured(found.model, subject),
        form=found.form.value,
        proved=found.proved,
    )
    place = (arguments.directory / row.key).with_suffix("")
    shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped here
    try:
        found.form.write(found, place)
        again = found.form.read(place, subject.model)
        content["read_back"] = "equal" if same(found.model, again, subject) else "outputs differ"
    except Exception as error:
        content["read_back"] = first_line(error)
    return content


def recovered(row: Row, subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model that was pruned and saved, and score it."""
    before = dataclasses.replace(row, steps=0)
    known = quality.read(arguments.directory / before.key)
    if "failed" in known:
        return {"failed": known["failed"]}
    place = (arguments.directory / before.key).with_suffix("")
    smaller = Form(known["form"]).read(place, subject.model)
    data = training_data(row, subject)
    began = time.process_time()
    recovery = osscar.recover(
        smaller, subject.model, data, steps=row.steps, seed=row.seed, device=arguments.device
    )
    content = {"seconds": time.process_time() - began, "peak_bytes": peak()}
    return {**content, "quality": subject.score(recovery.model)}


def peak() -> int:
    """Return the greatest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sample(subject: Subject) -> dict[str, torch.Tensor]:
    """Return what forward passes are timed on: 64 images, or one window."""
    text = isinstance(subject, Text)
    data = subject.calibration("same form", 1 if text else 64, 0)
    return as_inputs(subject.model, data).batches(subject.model, 64)[0]


@torch.no_grad()
def measured(model: Any, subject: Subject) -> dict[str, Any]:
    """Return size, operations a sample, and seconds of a forward pass beside the dense model's."""
    batch = sample(subject)
    seconds: dict[str, list[float]] = {"model": [], "dense": []}
    for _ in range(TURNS):
        for name, one in (("model", model), ("dense", subject.model)):
            began = time.process_time()
            one(**batch)
            seconds[name].append(time.process_time() - began)
    rows = len(next(iter(batch.values())))
    return {
        "parameters": count_parameters(model),
        "flops": count_flops(model, batch) / rows,
        "forward": {name: statistics.median(times) for name, times in seconds.items()},
    }


@torch.no_grad()
def same(model: Any, again: Any, subject: Subject) -> bool:
    """Tell whether two models put out the same."""
    outputs = [one(**sample(subject)) for one in (model, again)]
    first, second = (getattr(one, "logits", one) for one in outputs)
    return torch.equal(first, second)


if __name__ == "__main__":
    main()
