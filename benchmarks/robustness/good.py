"""Good files of every kind, which attacks copy and damage."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import osscar
import solvers
from benchmarks.robustness.arena import CANARY
from osscar.models.language import DEMO_DIRECTORY
from osscar.study.design import StudyDesign
from osscar.study.directory import Study
from tests.osscar.families import tiny
from tests.osscar.networks import small_net
from tests.solvers.test_perspective import random_problem


class Evil:
    """What writes the canary when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch ${CANARY}",)


EVIL_CODE = f"import os, pathlib\npathlib.Path(os.environ[{CANARY!r}]).touch()\n"


@cache
def good() -> Path:
    """Make one good thing of every kind, and give the directory that holds them."""
    place = Path(tempfile.mkdtemp(prefix="hostile-good-"))
    for family in ("opt", "gpt2", "llama-gqa"):
        tiny(family).save_pretrained(place / family)
        for file in DEMO_DIRECTORY.glob("tokenizer*"):
            shutil.copy(file, place / family)
        (place / family / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    images = torch.rand(60, 3, 12, 12)
    pruned = osscar.prune(small_net(), images, sparsity=0.5, device="cpu")
    pruned.save(place / "planned", report={"calibration": {"source": "x"}, "classes": []})
    text = torch.randint(0, 90, (8, 16))
    keep = {"groups": {"model.decoder.layers.0.neurons": 10}}
    pruned = osscar.prune(tiny("opt"), text, **keep, device="cpu", backend="magnitude")
    pruned.save(place / "planned-opt")
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, place / "planned-opt")
    problem = random_problem(129, 7, 1, 3, 3, spread=1.0)
    for suffix in ("npz", "safetensors"):
        problem.save(place / f"problem.{suffix}")
    study = Study(place / "study", SOURCE)
    study.capture([("neurons", solvers.SubsetProblem.load(place / "problem.npz"))])
    study.run(DESIGN)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    np.savez(place / "images.npz", images=pixels, labels=np.arange(4))
    torch.save({"a.weight": torch.ones(2, 3)}, place / "state.pt")
    safetensors.torch.save_file({"a.weight": torch.ones(2, 3)}, place / "state.safetensors")
    (place / "text.txt").write_text("Some plain text, of a few words. " * 400)
    return place


SOURCE = {"problem": "x"}
DESIGN = StudyDesign(sparsities=(0.5,), backends=("greedy", "enumerate", "perspective"))


def taken(name: str, work: Path) -> Path:
    """Copy a good thing into the directory of an attack."""
    here = good() / name
    if here.is_dir():
        return Path(shutil.copytree(here, work / name))
    return Path(shutil.copy(here, work / name))
