"""Quality at a given size: this toolkit's default against the paper's method and other baselines.

    python benchmarks/quality.py DIRECTORY --tasks smollm2-neurons --data DATA

Each row is one pruned model, written to a file of its own in DIRECTORY as soon as it is scored, so
that the same command goes on where it was stopped.  Ends with a Markdown table of all rows there.

Text is calibrated on the first half of `wikitext2-raw-test.txt` and scored on the second (same
form), or calibrated on `wikitext2-valid.txt` (shifted: another tokenization of the same source), on
the built-in text, on code (modules of Python), or on as many windows of the same form and of code
(mixed).
Baselines are uniform, on the paper's target: every group keeps the same share of its units, as if
asked for by --heads and --neurons, or the largest one within a budget of FLOPs; all of
them refit by least squares, but for FLAP's compensation, which leaves weights as they are and makes
up by biases, where there are any.  Whatever shares a budget gets as much as
uniform shares come to in whole units.
Seconds are those of the processor, so that others on the machine do not count; give
OMP_NUM_THREADS=1 where there are any, as threads that wait for each other count, too.

Takes two to fifteen minutes a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count
from osscar.base.files import write_json
from osscar.data.text import CalibrationSet, load_calibration
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.models.names import DEMO_CALIBRATION
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest

UNIFORM = {"allocation": "uniform", "target": "weights", "damp": 0.01}
FLAP = {**UNIFORM, "backend": "flap"}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "multistage (the paper's)": {**UNIFORM, "backend": "multistage"},
    "greedy (ZipLM's)": {**UNIFORM, "backend": "greedy"},
    "wanda": {**UNIFORM, "backend": "wanda"},
    "magnitude": {**UNIFORM, "backend": "magnitude"},
    "flap, refitted": FLAP,
    "flap's compensation": {**FLAP, "damp": 1e9},
    # One thing at a time, from the paper's method to the default and back.
    "multistage, damping chosen": {**UNIFORM, "backend": "multistage", "damp": None},
    "uniform": {"allocation": "uniform"},
    "weights": {"target": "weights"},
    "correction weight 1": {"correction_weight": 1.0},
    "damp 0.01": {"damp": 0.01},
    "damp 0.1": {"damp": 0.1},
    "wanda, default otherwise": {"backend": "wanda"},
}
BASELINES = tuple(METHODS)[:7]


@dataclass(frozen=True)
class Setting:
    """What is removed, and how it is asked for.

    Parameters
    ----------
    name
        In the table.
    asked
        Fields of the request that every method has.
    units
        Fields in their place where every group keeps the same share of its units; without, equal
        shares meet the budget as all others do.
    """

    name: str
    asked: Mapping[str, Any]
    units: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A model with its data, and what is to be removed of it."""

    load: Callable[[argparse.Namespace], Subject]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...] = (0,)
    sources: tuple[str, ...] = ("same form",)


class Subject(Protocol):
    """A dense model that can be calibrated and scored."""

    model: Any

    @functools.cached_property
    def dense(self) -> dict[str, float]:
        """Quality of the dense model, by name of its measure."""
        return self.score(self.model)

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        """Return calibration data."""

    def score(self, model: Any) -> dict[str, float]:
        """Return quality by name of its measure."""


class Text(Subject):
    """A language model on WikiText-2."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.loaded = osscar.load_model(name, device=arguments.device)
        self.model = self.loaded.model
        whole = (arguments.data / arguments.text).read_text(encoding="utf-8")
        half = whole.rfind("\n", 0, len(whole) // 2)
        self.first = arguments.directory / "first-half.txt"
        self.first.write_text(whole[:half], encoding="utf-8")
        second = whole[half:]
        self.scored = osscar.load_text([second], self.loaded.tokenizer, windows=arguments.windows)
        self.shifted = arguments.data / "wikitext2-valid.txt"

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        samples = samples or 32
        length = min(512, self.model.config.max_position_embeddings)
        asked = {"samples": samples, "seqlen": length, "seed": seed}
        if source == "code":
            found = load_calibration([python_code()], self.loaded.tokenizer, **asked)
            return dataclasses.replace(found, source=source)
        if source == "mixed":
            parts = [self.calibration(one, samples, seed).tokens for one in ("same form", "code")]
            tokens = torch.cat([part[at::2] for at, part in enumerate(parts)])
            return CalibrationSet(tokens, source, seed)
        file = {"same form": self.first, "shifted": self.shifted, "built-in": DEMO_CALIBRATION}[
            source
        ]
        return osscar.load_calibration(file, self.loaded.tokenizer, **asked)

    def score(self, model: Any) -> dict[str, float]:
        return {"perplexity": score([model], self.scored)[0].perplexity}


def python_code() -> str:
    """Return the source of some modules of this Python."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return "\n".join(module.read_text(encoding="utf-8", errors="ignore") for module in modules)


class Images(Subject):
    """A classifier of images."""

    def __init__(
        self,
        model: str,
        weights: Path | None,
        train: str,
        test: str,
        arguments: argparse.Namespace,
        labels: bool = True,
    ) -> None:
        self.loaded = load_model(model, weights=weights, device=arguments.device)
        self.model, self.train = self.loaded.model, train
        images = self.loaded.images(test).sample(arguments.images, 0)
        self.images = images if labels else dataclasses.replace(images, labels=None)

    def calibration(self, source: str, samples: int | None, seed: int) -> Any:
        if source != "same form":
            raise SystemExit(f"--sources {source!r} is of text; omit it for images")
        return self.loaded.calibration(self.train, samples=samples or 256, seqlen=None, seed=seed)

    def score(self, model: Any) -> dict[str, float]:
        (found,) = score([model], self.images, dense=self.model, classes=self.loaded.classes)
        top1 = {} if found.top1 is None else {"top1": found.top1}
        return {**top1, "agreement": found.agreement, "kl": found.kl}


def resnet20(arguments: argparse.Namespace) -> Subject:
    """Load the CIFAR-10 ResNet-20 of He et al."""
    return Images(
        f"{Path(__file__).parent / 'resnet20.py'}:build",
        arguments.data / "resnet20-cifar10.safetensors",
        f"{arguments.data / 'cifar10-subset.npz'}:train",
        f"{arguments.data / 'cifar10-subset.npz'}:test",
        arguments,
    )


def mobilenet(arguments: argparse.Namespace) -> Subject:
    """Load MobileNetV2 with ImageNet weights, for CIFAR images: agreement with the dense model."""
    return Images(
        "torchvision:mobilenet_v2",
        arguments.mobilenet,
        f"{arguments.data / 'cifar10-subset.npz'}:train",
        f"{arguments.data / 'cifar10-subset.npz'}:test",
        arguments,
        labels=False,
    )


def neurons(*shares: float) -> tuple[Setting, ...]:
    """Remove shares of the parameters of neurons."""
    return tuple(
        Setting(
            f"{s:.0%} of neurons",
            {"sparsity": s, "heads": 1.0},
            {"neurons": round(1 - s, 3), "heads": 1.0},
        )
        for s in shares
    )


def both(*shares: float) -> tuple[Setting, ...]:
    """Remove shares of the parameters of heads and neurons."""
    return tuple(
        Setting(
            f"{s:.0%} of heads and neurons",
            {"sparsity": s},
            dict.fromkeys(("heads", "neurons"), round(1 - s, 3)),
        )
        for s in shares
    )


def flops(*shares: float, residual: bool = False) -> tuple[Setting, ...]:
    """Keep shares of the operations; with residual channels, half of the way by these."""
    extra = {s: {"residual": round(math.sqrt(s), 3)} if residual else {} for s in shares}
    name = " with residual channels" if residual else ""
    return tuple(Setting(f"{s} of FLOPs{name}", {"flops": s, **extra[s]}) for s in shares)


SHARES = (0.2, 0.3, 0.4, 0.5)
SOURCES = ("same form", "shifted", "built-in", "code", "mixed")
TASKS = {
    "smollm2": Task(
        lambda a: Text("smollm2-135m", a),
        (*neurons(*SHARES), *both(*SHARES)),
        sources=("same form", "shifted"),
    ),
    "demo": Task(lambda a: Text("demo", a), (*neurons(*SHARES), *both(*SHARES)), seeds=(0, 1, 2)),
    "resnet20": Task(resnet20, (*flops(0.7, 0.5, 0.3), *flops(0.7, 0.5, 0.3, residual=True))),
    "mobilenet": Task(mobilenet, flops(0.66)),
}


@dataclass(frozen=True)
class Row:
    """One pruned model."""

    task: str
    setting: str
    method: str
    source: str = "same form"
    samples: int | None = None
    seed: int = 0
    scored: tuple[int, int] = (40, 2000)
    """Windows and images that are scored."""

    @property
    def key(self) -> str:
        """The name of its file."""
        words = dataclasses.astuple(self)
        return hashlib.sha256(repr(words).encode()).hexdigest()[:16] + ".json"


def main() -> None:
    arguments = parse_arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name in arguments.tasks:
        task = TASKS[name]
        rows = [row for row in asked(name, task, arguments) if not done(row, arguments)]
        if rows:
            subject = task.load(arguments)
            for row in rows:
                measure(row, task, subject, arguments)
    print(*table(arguments.directory), sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--sources", nargs="*", choices=SOURCES)
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--samples", nargs="*", type=int, default=[None])
    return parser.parse_args()


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of rows is told."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="*", help="only those that hold one of these texts")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=BASELINES)
    parser.add_argument("--data", type=Path, required=True, help="directory of the files named")
    parser.add_argument(
        "--text",
        default="wikitext2-raw-test.txt",
        help="file of DATA: half of it calibrates, half is scored; takes its own DIRECTORY",
    )
    parser.add_argument("--mobilenet", type=Path, help="weights of MobileNetV2")
    parser.add_argument("--windows", type=int, default=40, help="score only the first N windows")
    parser.add_argument("--images", type=int, default=2000, help="score only N images")
    parser.add_argument("--device", default="auto")
    return parser


def asked(name: str, task: Task, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows that are asked for."""
    scored = (arguments.windows, arguments.images)
    for setting, source, seed, samples, method in itertools.product(
        wanted_settings(task, arguments),
        arguments.sources or task.sources,
        arguments.seeds or task.seeds,
        arguments.samples,
        arguments.methods,
    ):
        yield Row(name, setting.name, method, source, samples, seed, scored)


def wanted_settings(task: Task, arguments: argparse.Namespace) -> list[Setting]:
    """Return the settings whose name holds one of the texts of --settings; without any, all."""
    wanted = arguments.settings or [""]
    return [one for one in task.settings if any(text in one.name for text in wanted)]


def done(row: Row, arguments: argparse.Namespace) -> bool:
    return (arguments.directory / row.key).exists()


def pruned(row: Row, task: Task, subject: Any, device: str) -> osscar.PruningResult:
    """Prune one model as its row says."""
    (setting,) = [s for s in task.settings if s.name == row.setting]
    data = subject.calibration(row.source, row.samples, row.seed)
    request = request_of(
        setting, METHODS[row.method], lambda: same_size(subject.model, data, setting)
    )
    return osscar.prune(subject.model, data, device=device, seed=row.seed, **request)


def request_of(
    setting: Setting, method: Mapping[str, Any], size: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return fields of a request: equal shares as the setting has them, or the size of these."""
    if method.get("allocation") != "uniform":
        return {**setting.asked, **method, "sparsity": None, **size()}
    if not setting.units:
        return {**setting.asked, **method}
    return {**setting.units, **method, "allocation": "measured"}


def measure(row: Row, task: Task, subject: Any, arguments: argparse.Namespace) -> None:
    """Prune and score one model, and write what was found."""
    began = time.process_time()
    result = pruned(row, task, subject, arguments.device)
    seconds = time.process_time() - began
    budget = result.budget
    content = {
        **{key: getattr(row, key) for key in ("task", "setting", "method", "source", "seed")},
        "samples": result.calibration["samples"],
        "dense": subject.dense,
        "quality": subject.score(result.model),
        "seconds": seconds,
        "solve_seconds": result.solve_seconds,
        "parameters": result.parameters_after,
        "dense_parameters": result.parameters_before,
        "reached": None if budget is None else budget.tightest.reached / budget.tightest.dense,
        "predicted": None if budget is None else budget.predicted,
        "divergence": result.divergence,
        "kept": {layer.name: layer.kept for layer in result.layers},
        "correction_weights": {layer.name: layer.correction_weight for layer in result.layers},
    }
    write_json(arguments.directory / row.key, content)
    print(
        json.dumps({k: v for k, v in content.items() if k not in {"kept", "correction_weights"}}),
        flush=True,
    )


def same_size(model: Any, data: Any, setting: Setting) -> dict[str, Any]:
    """Return the budget that equal shares, whose counts are rounded, really come to."""
    asked = setting.units or {**setting.asked, "allocation": "uniform"}
    with prepare(model, data) as prepared:
        allocated = allocate(prepared, PruningRequest(**asked))
        if setting.units:
            cost = count(Cost.PARAMETERS, prepared.model, prepared.groups, prepared.sample)
            return {"params": int(cost.of(allocated.keep))}
    budget = allocated.budget
    assert budget is not None
    return {"flops": budget.tightest.reached / budget.tightest.dense}


def read(file: Path) -> dict[str, Any]:
    """Return the row in a file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def table(directory: Path) -> list[str]:
    """Return all rows of a directory as a Markdown table."""
    rows = [read(file) for file in sorted(directory.glob("*.json"))]
    methods = list(METHODS)
    order = {s.name: i for t in TASKS.values() for i, s in enumerate(t.settings)}
    rows.sort(
        key=lambda r: (
            *(r["task"], order[r["setting"]], r["source"], r["samples"], r["seed"]),
            methods.index(r["method"]),
        )
    )
    head = ["model", "removed or kept", "calibration", "method", "quality", "excess", "seconds"]
    lines = [head, ["---"] * 4 + ["---:"] * 3]
    for row in rows:
        measure, value = next(iter(row["quality"].items()))
        dense = row["dense"][measure]
        if measure == "perplexity":
            worse = f"{value / dense - 1:+.1%}"
        else:  # the dense model agrees with itself, where labels are unknown
            worse = f"{100 * (value - (1.0 if dense is None else dense)):+.1f} points"
        data = f"{row['source']}, {row['samples']} samples, seed {row['seed']}"
        quality = f"{value:.2f}" if measure == "perplexity" else f"{value:.1%}"
        seconds = f"{row['seconds']:.0f}"
        lines.append([row["task"], row["setting"], data, row["method"], quality, worse, seconds])
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    main()
