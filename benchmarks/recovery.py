"""Recovery: what some minutes of training towards the dense model give back.

    python -m benchmarks.recovery DIRECTORY --data DATA --tasks smollm2 --steps 8 16 32 64 128
    python -m benchmarks.recovery DIRECTORY --data DATA --tasks resnet20 --lora 0 16
    python -m benchmarks.recovery DIRECTORY --data DATA --tasks resnet20 --steptime

Models, data and methods are those of `benchmarks/quality.py`.  Each pruned model is kept in
DIRECTORY, and each row, a recovery of one of them, is written to a file of its own there, so that
the same command goes on where it was stopped.  Ends with a Markdown table of all rows there.

Text is calibrated and recovered on the first half of `wikitext2-raw-test.txt`, and scored on the
second: a step has 4 windows of 512 tokens, of at most 256, and 8 more are held out.  Images are
recovered on all that there are to train, without their labels.

Each row has a process of its own, whose greatest resident size the operating system tells once it
has ended; seconds are those of the processor.  What is left of the excess over the dense model is
given as a share of what the paper's method has in one shot, where a row of it is there.

`--steptime` compares wall seconds of a step with those of the dense model's forward pass and the
smaller one's, forward and backward, in plain PyTorch, in turns.

Takes ten to twenty minutes a row of text, and one of images.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import osscar
from benchmarks import quality
from benchmarks.measuring import Clock, measured
from benchmarks.quality import TASKS, Subject, Text
from osscar.base.files import write_json
from osscar.data.batches import as_inputs
from osscar.recovery.training import Training

STEP, WINDOWS, DECIDING = 4, 256, 8
"""Windows in a step; those that train at most; those that are held out."""

IMAGES, STEP_IMAGES = 1000, 64
"""All that there are to train, and those of a step."""

SAMPLES = {"smollm2": 64}
"""Samples that calibrate, where they are not as many as in `benchmarks/quality.py`."""

PAPER = "multistage (the paper's)"

TURNS = 5
"""Of the steps that are timed."""


@dataclass(frozen=True)
class Row:
    """One recovery: of which pruned model, and what is asked of it."""

    pruned: quality.Row
    steps: int
    lora: int
    """Rank of adapters; 0: all weights."""
    learning_rate: float | None
    mixed_precision: str | None

    @property
    def key(self) -> str:
        """The name of its file."""
        words = repr(dataclasses.astuple(self))
        return hashlib.sha256(words.encode()).hexdigest()[:16] + ".json"

    @property
    def asked(self) -> dict[str, Any]:
        """Fields of the request."""
        fields = {key: value for key, value in vars(self).items() if key != "pruned"}
        return {**fields, "lora": self.lora or None}

    @property
    def words(self) -> dict[str, Any]:
        """What tells it from others, for its file."""
        model = {key: getattr(self.pruned, key) for key in ("task", "setting", "method")}
        return {**model, **self.asked, "lora": self.lora}


def main() -> None:
    arguments = parse_arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if arguments.row is not None:
        (row,) = [row for row in asked(arguments) if row.key == arguments.row]
        subject = TASKS[row.pruned.task].load(arguments)
        if arguments.prune:
            prune(row.pruned, subject, arguments)
        else:
            print(json.dumps(measure(row, subject, arguments)))
        return
    for row in asked(arguments):
        if arguments.steptime:
            print(json.dumps({**row.words, **step_times(row, arguments)}), flush=True)
        elif not (arguments.directory / row.key).exists():
            content = apart(row, arguments)
            write_json(arguments.directory / row.key, content)
            print(line(cells(content, None)), flush=True)
    print(*table(arguments.directory), sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = quality.parser_of(__doc__)
    parser.set_defaults(methods=["default", PAPER])
    parser.add_argument("--steps", nargs="*", type=int, default=[64])
    parser.add_argument("--lora", nargs="*", type=int, default=[0])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--mixed-precision")
    parser.add_argument("--steptime", action="store_true", help="only compare seconds a step")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--prune", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def asked(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that are asked for."""
    told = argparse.Namespace(**{**vars(arguments), "sources": ["same form"], "seeds": [0]})
    for name in arguments.tasks:
        told.samples = [SAMPLES.get(name)]
        models = quality.asked(name, TASKS[name], told)
        for model, steps, lora in itertools.product(models, arguments.steps, arguments.lora):
            yield Row(model, steps, lora, arguments.learning_rate, arguments.mixed_precision)


def apart(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a row comes to in a process of its own, and the memory that this has had."""
    command = [sys.executable, "-m", "benchmarks.recovery", *sys.argv[1:], "--row", row.key]
    if not place(row.pruned, arguments).exists():
        subprocess.run([*command, "--prune"], check=True)
    found = measured(command)
    if found.status:
        raise SystemExit(f"{row} ended with status {found.status}")
    return {**json.loads(found.output), "peak_bytes": found.peak}


def place(row: quality.Row, arguments: argparse.Namespace) -> Path:
    """Where a pruned model is kept."""
    return Path(arguments.directory / row.key).with_suffix("")


def prune(row: quality.Row, subject: Subject, arguments: argparse.Namespace) -> None:
    """Prune a model as `benchmarks/quality.py` does, and keep it."""
    result = quality.pruned(row, TASKS[row.task], subject, arguments.device)
    result.save(place(row, arguments))


def measure(row: Row, subject: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Recover one model, and score it before and after."""
    smaller = osscar.load(place(row.pruned, arguments), dense=subject.model)
    data = training_data(row, subject)
    began = time.process_time()
    recovery = osscar.recover(smaller, subject.model, data, device=arguments.device, **row.asked)
    seconds = time.process_time() - began
    found = recovery.document()
    del found["data"]  # it names each image
    return {
        **row.words,
        "dense": subject.dense,
        "before": subject.score(smaller),
        "after": subject.score(recovery.model),
        "cpu_seconds": seconds,
        "recovery": found,
    }


def training_data(row: Row, subject: Subject) -> Any:
    """Return what a model is recovered on, which is never what it is scored on."""
    text = isinstance(subject, Text)
    samples = min(STEP * row.steps, WINDOWS) + DECIDING if text else IMAGES
    return subject.calibration("same form", samples, 0)


def step_times(row: Row, arguments: argparse.Namespace) -> dict[str, float]:
    """Return what a step of a recovery takes beside its passes alone, medians of wall seconds.

    The passes are those of as many samples at once as in the recovery.
    """
    subject: Any = TASKS[row.pruned.task].load(arguments)
    if not place(row.pruned, arguments).exists():
        prune(row.pruned, subject, arguments)
    smaller = osscar.load(place(row.pruned, arguments), dense=subject.model)
    data, text = training_data(row, subject), isinstance(subject, Text)
    samples = as_inputs(subject.model, data).batches(subject.model, 1 if text else STEP_IMAGES)
    passes = samples[: STEP if text else 1]
    asked = {**row.asked, "steps": 1, "learning_rate": 1e-5, "held_out": 1}
    clock = Clock()
    clock.watch("osscar.recovery.training", "Training.step", "step")
    found: dict[str, list[float]] = {"step": [], "dense": [], "smaller": []}
    for _ in range(TURNS):
        clock.phases.clear()
        with mock.patch.object(Training, "try_step"):  # whose steps are not asked for here
            recovery = osscar.recover(
                smaller, subject.model, data, device=arguments.device, **asked
            )
        for batch in passes:
            plain_passes(recovery.model, subject.model, batch, clock)
        for name, times in found.items():
            times.append(clock.phases[name][1])
    step, *alone = map(statistics.median, found.values())
    return {
        "step": step,
        **dict(zip(("dense", "smaller"), alone, strict=True)),
        "ratio": step / sum(alone),
    }


def plain_passes(
    smaller: nn.Module, dense: nn.Module, batch: Mapping[str, Tensor], clock: Clock
) -> None:
    """Run the dense model forward, and the smaller one forward and backward."""
    with clock.phase("dense"), torch.no_grad():
        expected = logits(dense(**batch))
    with clock.phase("smaller"):
        found = logits(smaller(**batch))
        loss = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True)
        loss.backward()
        smaller.zero_grad()


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def table(directory: Path) -> list[str]:
    """Return all rows of a directory as a Markdown table."""
    rows = [json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))]
    order = {s.name: i for t in TASKS.values() for i, s in enumerate(t.settings)}
    methods = list(quality.METHODS)
    rows.sort(
        key=lambda r: (
            *(r["task"], order[r["setting"]], methods.index(r["method"])),
            *(r["lora"], r["steps"]),
        )
    )
    theirs = {removed(row): excess(row, "before") for row in rows if row["method"] == PAPER}
    names = ("model", "removed or kept", "method", "trained", "steps", "rate", "kept")
    numbers = ("one shot", "recovered", "of the paper's excess", "held out", "seconds", "memory")
    lines = [[*names, *numbers], ["---"] * 4 + ["---:"] * 9]
    return [line(one) for one in (*lines, *(cells(row, theirs.get(removed(row))) for row in rows))]


def removed(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return what rows to be compared have in common."""
    return row["task"], row["setting"]


def excess(row: Mapping[str, Any], when: str) -> float:
    """Return how far a model is from the dense one, by the first measure."""
    name = next(iter(row[when]))
    dense = row["dense"][name]
    # The dense model agrees with itself, where labels are unknown.
    return abs(row[when][name] - (1.0 if dense is None else dense))


def cells(row: Mapping[str, Any], theirs: float | None) -> list[str]:
    """Return a row of the table, given the excess of the paper's method in one shot."""
    found, name = row["recovery"], next(iter(row["after"]))
    form = "{:.2f}" if name == "perplexity" else "{:.1%}"
    trained = f"rank {row['lora']}" if row["lora"] else "all"
    return [
        *(row["task"], row["setting"], row["method"], trained),
        *(str(found["points"][-1]["step"]), f"{found['learning_rate']:g}", str(found["kept"])),
        *(form.format(row["before"][name]), form.format(row["after"][name])),
        "" if theirs is None else f"{excess(row, 'after') / theirs:.0%}",
        f"{found['before']:.3f} to {found['after']:.3f}",
        *(f"{row['cpu_seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.2f} GB"),
    ]


def line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


if __name__ == "__main__":
    main()
