"""Attacks on the Python API: arguments of other types, sizes and values."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import graph
import osscar
import solvers
from benchmarks.robustness.damage import VALUES
from benchmarks.robustness.good import DESIGN, SOURCE, good, taken
from osscar.data.images import load_images
from osscar.data.text import read_text
from osscar.models.load import load_model
from osscar.models.weights import read_state
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from tests.osscar.families import tiny
from tests.osscar.networks import IMAGENET, plain, small_net


class Odd:
    """An object whose attributes are odd, and whose texts fail."""

    name = 3
    kind = "x"
    summary = None
    capabilities = 7
    shape = "y"

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __repr__(self) -> str:
        raise ValueError("no text")

    __str__ = __repr__

    def __len__(self) -> int:
        return -1


class OddBackend:
    """What calls itself a backend, and gives nonsense."""

    name = "odd"

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def select(self, problem: Any) -> Any:
        return self.answer


ARGUMENTS: list[Callable[[], Any]] = [
    *(partial(copy.deepcopy, value) for value in VALUES),
    *(partial(copy.deepcopy, value) for value in (b"x", (), set(), 1j, int, print, Ellipsis)),
    object, Odd, OddBackend, lambda: OddBackend(7), lambda: Path("/dev/zero"), lambda: Path("."),
    lambda: torch.ones(2), lambda: torch.ones(0), lambda: torch.tensor(float("nan")),
    lambda: np.ones(3), lambda: np.float64("nan"), lambda: nn.Linear(2, 2), nn.Identity,
    lambda: iter([]), lambda: (x for x in [1]), lambda: {"a": Odd()}, lambda: [Odd()],
    lambda: torch.complex64, lambda: torch.int8, lambda: torch.device("meta"), small_net,
]  # fmt: skip


def run_study(design: Any, jobs: Any) -> Any:
    """Go on with a study that is at hand."""
    return Study(taken("study", Path()), SOURCE).run(design, jobs)


@cache
def honest_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Give all public functions, each with arguments with which it works."""
    text = {"model": tiny("opt"), "calibration": torch.randint(0, 90, (4, 8))}
    tokens = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    net, images = small_net(), torch.rand(8, 3, 12, 12)
    pixels = load_images(good() / "images.npz", plain(12))
    known = load_model("demo", device="cpu")
    traced = graph.trace(net, {"x": images[:2]})
    group = next(iter(traced.prunable))
    plan = osscar.PruningPlan(())
    words = (good() / "text.txt").read_text()
    scored = osscar.TextSet.of(known.tokenizer, words, windows=1, seqlen=8)
    small = {"batch_size": 2, "new_tokens": 2, "repetitions": 1, "path": None}
    held = solvers.SubsetProblem.load(good() / "problem.npz")
    magnitude = {"sparsity": 0.5, "backend": "magnitude", "device": "cpu"}
    return {
        "load": (osscar.load, {"directory": good() / "opt", "dtype": None, "dense": None}),
        "load_model": (
            load_model,
            {"name": "demo", "dtype": None, "device": "cpu", "trust_remote_code": False},
        ),
        "load_model of torchvision": (
            osscar.load_model,
            {
                "name": "torchvision:resnet18",
                "weights": None,
                "pretrained": False,
                "dense": None,
                "dtype": None,
                "device": "cpu",
            },
        ),
        "save": (
            osscar.save,
            {
                "model": tiny("opt"),
                "directory": Path("out"),
                "tokenizer": None,
                "report": None,
                "dtype": None,
                "overwrite": False,
                "example_inputs": None,
            },
        ),
        "load_images": (
            load_images,
            {"spec": good() / "images.npz", "preprocessing": IMAGENET},
        ),
        "load_calibration": (
            osscar.load_calibration,
            {"spec": None, "tokenizer": known.tokenizer, "samples": 2, "seqlen": 8, "seed": 0},
        ),
        "load_text": (
            osscar.load_text,
            {"spec": good() / "text.txt", "tokenizer": known.tokenizer, "windows": 1, "seqlen": 8},
        ),
        "text_windows": (
            osscar.text_windows,
            {
                "tokenizer": known.tokenizer,
                "text": words,
                "samples": 2,
                "seqlen": 8,
                "seed": 0,
                "source": "x",
            },
        ),
        "evaluate": (
            osscar.evaluate,
            {"model": known.model, "data": scored, **small},
        ),
        "compare": (
            osscar.compare,
            {"model": known.model, "dense": known.model, "data": scored, **small},
        ),
        "evaluate images": (
            osscar.evaluate,
            {"model": net, "data": pixels, "classes": (), **small},
        ),
        "prune": (
            osscar.prune,
            {
                **text,
                **magnitude,
                "heads": None,
                "round_to": 1,
                "skip": (),
                "groups": {},
                "backend_options": {},
                "certify": False,
                "damp": 0.01,
                "batch_norm": "keep",
                "batch_size": 2,
                "seed": 0,
            },
        ),
        "prune images": (osscar.prune, {"model": net, "calibration": images, **magnitude}),
        "PruningRequest": (
            osscar.PruningRequest,
            {
                "sparsity": 0.5,
                "heads": None,
                "neurons": None,
                "channels": None,
                "residual": None,
                "groups": {},
                "round_to": 1,
                "skip": (),
                "backend": "greedy",
                "backend_options": {},
                "certify": False,
                "damp": 0.01,
                "batch_norm": "keep",
                "device": "cpu",
                "batch_size": None,
                "seed": 0,
            },
        ),
        "shrink": (
            osscar.shrink,
            {"model": net, "plan": plan, "inputs": [(images,)]},
        ),
        "slice_units": (osscar.slice_units, {"model": net, "plan": plan}),
        "adapter": (
            lambda classes: osscar.adapter(classes)(lambda module, group: None),
            {"classes": "a.B"},
        ),
        "PruningPlan.from_json": (
            osscar.PruningPlan.from_json,
            {"data": {"groups": [], "integers": []}},
        ),
        "StudyDesign": (
            StudyDesign,
            {
                "sparsities": (0.5,),
                "backends": ("greedy",),
                "exact_units": 8,
                "window_units": None,
                "windows": 1,
                "time_limit": 1.0,
                "gap_tolerance": 0.1,
                "seed": 0,
            },
        ),
        "Study": (Study, {"directory": Path("new"), "source": {"a": 1}}),
        "Study.run": (run_study, {"design": DESIGN, "jobs": 1}),
        "trace": (graph.trace, {"model": net, "example_inputs": {"x": images[:2]}}),
        "trace text": (graph.trace, {"model": tiny("opt"), "example_inputs": tokens}),
        "group": (traced.group, {"name": group.name}),
        "residual_groups": (graph.residual_groups, {"traced": traced}),
        "draw": (traced.draw, {"path": Path("a.svg")}),
        "solve": (
            solvers.solve,
            {"problem": held, "backend": "greedy", "device": "cpu", "bound": False, "options": {}},
        ),
        "problem.load": (solvers.SubsetProblem.load, {"path": good() / "problem.npz"}),
        "problem.save": (held.save, {"path": Path("p.npz")}),
        "with_keep": (held.with_keep, {"keep": 2}),
        "read_state": (read_state, {"path": good() / "state.pt"}),
        "read_text": (read_text, {"path": good() / "text.txt"}),
    }


def arguments(work: Path, choice: random.Random) -> str | None:
    """Call a public function with one wrong argument."""
    torch.manual_seed(0)
    name, (function, given) = choice.choice(list(honest_calls().items()))
    wrong = choice.choice(list(given))
    value = choice.choice(ARGUMENTS)()
    global last
    last = f"{name}({wrong}=...)"
    try:
        function(**{**given, wrong: value})
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        if type(error).__module__ == "builtins":
            shown = type(value).__name__ if isinstance(value, Odd) else repr(value)[:60]
            error.args = (f"{last} {shown}: {error}"[:200],)
        raise
    return None


last = ""
