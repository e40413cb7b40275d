"""Attacks with files and arguments on everything that reads any, thousands of them.

    python -m benchmarks.robustness                        # the table
    python -m benchmarks.robustness.hostile --kind config  # what came of one kind, in words

Good files are damaged at random: bytes changed, cut off or inserted; values of JSON at any depth
replaced by ones that make no sense; and what is known to hurt is put in.  Each attack runs in a
process of its own, with a limit on time and memory, beside files that belong to somebody else.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import solvers
from benchmarks.robustness.api import arguments, honest_calls
from benchmarks.robustness.arena import Act, Attack, End, Outcome, fight
from benchmarks.robustness.checkpoints import (
    companions,
    config,
    header,
    index,
    manifest,
    tokenizer,
    weights,
)
from benchmarks.robustness.command_line import options, targets
from benchmarks.robustness.files import pictures, problem, states, study, texts, wheels
from benchmarks.robustness.good import good
from benchmarks.robustness.row import Row

ROOT = Path(__file__).resolve().parents[2]

ATTEMPTS = 180
"""Of each kind, unless asked otherwise."""

KINDS: dict[str, tuple[str, Act]] = {
    "config": ("config.json of a checkpoint", config),
    "companions": ("other JSON and pickles of a checkpoint", companions),
    "tokenizer": ("tokenizer.json", tokenizer),
    "header": ("header of safetensors", header),
    "weights": ("tensors of other shapes and numbers", weights),
    "index": ("index of several weight files", index),
    "manifest": ("osscar.json and plans", manifest),
    "study": ("directories of studies", study),
    "problem": ("problem files", problem),
    "pictures": ("images and .npz", pictures),
    "texts": ("calibration and evaluation text", texts),
    "states": ("state dicts (--weights)", states),
    "wheels": ("wheels of packaged models", wheels),
    "arguments": ("arguments of the Python API", arguments),
    "options": ("options of the command line", options),
    "targets": ("places to save to", targets),
}
"""By name, what is attacked, and how."""


def outcomes(kind: str, seed: int, attempts: int) -> Iterator[Outcome]:
    """Attack one kind."""
    good()
    if kind == "arguments":
        honest_calls()
    act = KINDS[kind][1]
    first = int(hashlib.sha256(f"{kind}/{seed}".encode()).hexdigest()[:12], 16)
    yield from fight(Attack(f"{kind} {n}", first + n, act) for n in range(attempts))


def row(kind: str, seed: int, attempts: int) -> Row:
    """Attack one kind, and count."""
    ends = collections.Counter(outcome.end for outcome in outcomes(kind, seed, attempts))
    return Row(
        kind=KINDS[kind][0],
        attempts=ends.total(),
        clear_errors=ends[End.CLEAR],
        tracebacks=ends[End.TRACEBACK] + ends[End.CRASH] + ends[End.HANG],
        silent_wrong=ends[End.WRONG],
        lost_data=ends[End.LOST],
        command=f"python -m benchmarks.robustness.hostile --kind {kind} --seed {seed} "
        f"--attempts {attempts}",
    )


def rows(*, seed: int = 0, attempts: int | None = None) -> list[Row]:
    """Attack everything, and count; forged solutions and certificates, too."""
    return [*(row(kind, seed, attempts or ATTEMPTS) for kind in KINDS), *forged()]


def forged() -> list[Row]:
    """Count the forged solutions and certificates of the tests: refused, or true all the same."""
    from tests.solvers import test_mutations

    return [changed_solutions(test_mutations), forgeries()]


def changed_solutions(tests: Any) -> Row:
    """Change honest solutions as `tests/solvers/test_mutations.py` does, with its own seeds."""
    ends: collections.Counter[str] = collections.Counter()
    for label, (name, solution) in tests.honest().items():
        draw = np.random.default_rng(sum(map(ord, label)))
        for _ in range(tests.CHANGES):
            _, changed = tests.mutant(solution, draw)
            try:
                said = changed.verify()
            except solvers.VerificationError:
                ends["clear"] += 1
            except Exception:
                ends["traceback"] += 1
            else:
                ends["wrong" if tests.untrue(changed, said, tests.truths()[name]) else "right"] += 1
    command = "python -m pytest -m '' tests/solvers/test_mutations.py"
    return Row("solutions with changed fields", ends.total(), ends["clear"], ends["traceback"],
               ends["wrong"], 0, command)  # fmt: skip


def forgeries() -> Row:
    """Run `tests/solvers/test_forgeries.py`, each test of which is a forgery that is refused."""
    line = ["-m", "pytest", "-q", "-n0", "-o", "addopts=--import-mode=importlib",
            "tests/solvers/test_forgeries.py"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
    passed, failed = counts.get("passed", 0), counts.get("failed", 0)
    return Row("forged certificates", passed + failed, passed, 0, failed, 0,
               "python -m pytest tests/solvers/test_forgeries.py")  # fmt: skip


def show() -> None:
    """Attack, and say in words what came of it, the like together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument("--clear", action="store_true", help="also what was refused clearly")
    asked = parser.parse_args()
    for kind in asked.kind or KINDS:
        ends: collections.Counter[End] = collections.Counter()
        for outcome in outcomes(kind, asked.seed, asked.attempts):
            ends[outcome.end] += 1
            if outcome.end not in (End.CLEAR, End.RIGHT) or (asked.clear and outcome.words):
                print(f"{outcome.end.value}: {outcome.attack.label}: {outcome.words}", flush=True)
        print(kind, {end.value: count for end, count in ends.items()}, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    show()
