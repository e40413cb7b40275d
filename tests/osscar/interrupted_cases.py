"""Commands that are interrupted, small ones, and what they make when they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

import osscar
import solvers
from osscar.base.files import PARTIAL
from osscar.checkpoint.manifest import REPORT_FILE
from tests.osscar.families import CALIBRATION
from tests.osscar.interruptions import Ended, Plan, content, hidden, run


@dataclass(frozen=True)
class Case:
    """A command, what it makes without interruption, and what may lie where its output goes."""

    arguments: tuple[str, ...]
    result: dict[str, object]
    events: int
    writes: int
    before: Path | None = None
    shown: tuple[str, ...] = ("out", "out.run", "out.recover", "said.json")

    def begin(self, root: Path) -> None:
        root.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, root / "out")

    def run(self, root: Path, plan: Plan | None = None) -> Ended:
        return run(root, [*self.arguments, *outputs(root)], plan)

    @property
    def keeps_old(self) -> bool:
        """Whether the output appears at once; a study grows where it lies."""
        return self.arguments[0] != "gap"

    def is_done(self, root: Path) -> bool:
        """Whether the output is what was asked for; a study is once all of its files are there."""
        if not (root / "out").exists():
            return False
        found = content(root / "out")
        if not self.keeps_old:
            return found == self.result
        return _unmeasured(found) == _unmeasured(self.result)

    def is_whole(self, root: Path) -> bool:
        """Whether the output is what was there before, or what was asked for; or a study grows."""
        out, replaced = root / "out", root / ".out.osscar-replaced"
        if not self.keeps_old or self.is_done(root):
            return True
        # Where it has no name between two renames, the next start gives it one.
        found = out if out.exists() else replaced
        if self.before is None or not found.exists():
            return self.before is None and not found.exists()
        return content(found) == content(self.before)

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


def _case(place: Path, arguments: tuple[str, ...], before: Path | None = None) -> Case:
    """Run a command as a whole, which tells what it makes and how many events there are."""
    root = place / "root"
    begun = Case(arguments, {}, 0, 0, before)
    begun.begin(root)
    ended = begun.run(root)
    assert ended.status == 0, ended.err
    return Case(arguments, content(root / "out"), ended.events, ended.writes, before)


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


def _plan(model: Path, place: Path) -> Case:
    """Prune so that the output holds plans, where nothing was before."""
    return _case(place, pruning(model, "--sparsity", "0.5", "--allocation", "uniform"))


def _stock(model: Path, place: Path) -> Case:
    """Prune so that the output is a checkpoint of transformers, and replaces another."""
    more = pruning(model, "--neurons", "0.5", "--overwrite")
    return _case(place, more, _pruned(model, place))


def _both(model: Path, place: Path) -> Case:
    """Prune and recover in one run."""
    return _case(place, pruning(model, "--sparsity", "0.5", "--recover", "--recover-steps", "4"))


def _recovery(model: Path, place: Path) -> Case:
    """Recover a pruned model, so that the output replaces another."""
    smaller = _pruned(model, place)
    command = (
        *("recover", str(smaller), "--dense", str(model), "--text", str(CALIBRATION)),
        *("--samples", "6", "--seqlen", "32", "--steps", "4", "--batch-size", "2"),
        *("--device", "cpu", "--overwrite"),
    )
    return _case(place, command, smaller)


def _pruned(model: Path, place: Path) -> Path:
    """Prune a model; return where it is."""
    (place / "before").mkdir()
    command = [*pruning(model, "--neurons", "0.75"), *outputs(place / "before")]
    ended = run(place / "before", command)
    assert ended.status == 0, ended.err
    return place / "before" / "out"


def _study(_: Path, place: Path) -> Case:
    """Study two problems."""
    files = [place / f"p{units}.safetensors" for units in (18, 20)]
    for units, file in zip((18, 20), files, strict=True):
        problem(units).save(file)
    command = (
        *("gap", *map(str, files), "--sparsity", "0.4,0.6", "--jobs", "1"),
        *("--backends", "greedy,local_search,perspective,branch_and_bound"),
        *("--window-units", "8", "--windows", "1", "--exact-units", "18"),
    )
    return _case(place, command)


CASES: Mapping[str, Callable[[Path, Path], Case]] = {
    "plan": _plan,
    "stock": _stock,
    "both": _both,
    "recovery": _recovery,
    "study": _study,
}
"""By name, what makes a case of a dense model and of a place to run it."""
