"""Commands that are interrupted, small ones, and what they make when they are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

import osscar
import solvers
from osscar.base.files import PARTIAL
from osscar.checkpoint.files import REPORT_FILE
from tests.osscar.families import CALIBRATION
from tests.osscar.interruptions import Ended, Plan, content, hidden, run


@dataclass(frozen=True)
class Case:
    """A command, and what it makes without interruption, by how many events and writes."""

    arguments: tuple[str, ...]
    result: dict[str, Any]
    events: int
    writes: int

    def run(self, root: Path, plan: Plan | None = None) -> Ended:
        return run(root, [*self.arguments, *outputs(root)], plan)

    def is_whole(self, root: Path) -> bool:
        """Whether the output appears at once, but for a study, which grows where it lies."""
        if self.arguments[0] == "gap" or not (root / "out").exists():
            return True
        return _unmeasured(content(root / "out")) == _unmeasured(self.result)

    def wrong(self, root: Path) -> list[str]:
        """Return what is not as an uninterrupted command makes it, and what should be gone."""
        found = content(root / "out")
        names = [name for name in found | self.result if found.get(name) != self.result.get(name)]
        return names + hidden(root, ("out", "said.json"))


def _unmeasured(files: dict[str, Any]) -> dict[str, Any]:
    """Return files of a checkpoint without what is measured, or written again, after its save."""
    report = {k: v for k, v in files[REPORT_FILE].items() if k not in ("forward", "unmeasured")}
    whole = {name: text for name, text in files.items() if PARTIAL not in name}
    return {**whole, REPORT_FILE: report}


def outputs(root: Path) -> tuple[str, ...]:
    return ("--out", str(root / "out"), "--json", str(root / "said.json"))


def tiny_model(place: Path, ffn_dim: int = 24) -> Path:
    """Write a language model of two small layers that ``from_pretrained`` reads."""
    demo = osscar.load_model("demo")
    size = {"num_hidden_layers": 2, "hidden_size": 16, "word_embed_proj_dim": 16}
    config = {**demo.model.config.to_dict(), **size, "num_attention_heads": 4, "ffn_dim": ffn_dim}
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(**config)).save_pretrained(place)
    demo.tokenizer.save_pretrained(place)
    return place


def pruning(model: Path, *more: str) -> tuple[str, ...]:
    usual = {
        **{"--samples": "8", "--seqlen": "32", "--backend": "wanda", "--device": "cpu"},
        "--calibration": str(CALIBRATION),
    }
    own = (word for name in usual if name not in more for word in (name, usual[name]))
    return ("prune", str(model), *own, *more)


def problem(units: int) -> solvers.SubsetProblem:
    generator = torch.Generator().manual_seed(units)
    X = torch.randn(200, units, generator=generator, dtype=torch.float64)
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64) / units**0.5
    X = X @ (mix + torch.eye(units))
    W0 = torch.randn(units, 3, generator=generator, dtype=torch.float64)
    return solvers.SubsetProblem.from_gram(X.T @ X / 200, W0, units=units, keep=2, name=f"p{units}")


def _pruned(model: Path, place: Path) -> tuple[str, ...]:
    return pruning(model, "--sparsity", "0.5", "--set", "allocation=uniform")


def _recovered(model: Path, place: Path) -> tuple[str, ...]:
    return pruning(model, "--sparsity", "0.5", "--recover", "--set", "recovery.steps=4")


def _study(_: Path, place: Path) -> tuple[str, ...]:
    """Study two problems."""
    files = [place / f"p{units}.safetensors" for units in (18, 20)]
    for units, file in zip((18, 20), files, strict=True):
        problem(units).save(file)
    return (
        *("gap", *map(str, files), "--sparsity", "0.4,0.6", "--jobs", "1"),
        *("--backends", "greedy,local_search,perspective,branch_and_bound"),
        *("--window-units", "8", "--windows", "1", "--exact-units", "18"),
    )


CASES = {"prune": _pruned, "recover": _recovered, "study": _study}


def case(name: str, model: Path, place: Path) -> Case:
    """Run a command as a whole, which tells what it makes and how many events there are."""
    arguments, root = CASES[name](model, place), place / "root"
    root.mkdir()
    ended = run(root, [*arguments, *outputs(root)])
    assert ended.status == 0, ended.err
    return Case(arguments, content(root / "out"), ended.events, ended.writes)
