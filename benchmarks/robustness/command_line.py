"""Attacks on the command line: options, their values, and places to save to."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

import graph
import osscar
import solvers
from benchmarks.robustness.good import good, taken
from osscar.cli import main
from tests.osscar.families import tiny
from tests.osscar.networks import small_net


def command(line: list[str]) -> str | None:
    """Run a command in this process; whatever is no clean end is raised."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["osscar", *line]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        said = err.getvalue()
        if error.code in (None, 0):
            return None
        if error.code == 2 and "Traceback" not in said and len(said) < 8000:
            raise osscar.OsscarError(said[:300] or "usage") from None
        raise RuntimeError(f"{line} ended with {error.code}: {said[-300:]}") from error
    return None


WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1" * 400,
    "2**3",
    "0.5",
    "1/0",
    "3/2",
    "/dev/zero",
    "/dev/null",
    ".",
    "..",
    "/",
    "a b",
    "é",
    "\udc80",
    "{fifo}",
    "{dir}",
    "{loop}",
    "../foreign",
    "../foreign/a file",
    "x=1",
    "x=",
    "=",
    "time_limit=nan",
    "*",
    ",",
    "demo",
    "torchvision:",
    "torchvision:x",
    "os:system",
    "a.py:b",
    "\x1b[2J",
    "0x10",
    "１",
    "1_0",
    "None",
    "9" * 19,
    "-9" * 9,
    "{text}",
    "{images}",
    "{problem}",
    "{opt}",
    "{study}",
    "~nobody/x",
    "a\nb",
]

COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "prune": (
        [
            "demo",
            "--out",
            "out",
            "--sparsity",
            "0.5",
            "--backend",
            "magnitude",
            "--samples",
            "2",
            "--seqlen",
            "16",
        ],
        [
            "--out",
            "--sparsity",
            "--heads",
            "--neurons",
            "--channels",
            "--residual",
            "--round-to",
            "--skip",
            "--weights",
            "--dense",
            "--calibration",
            "--mean",
            "--std",
            "--image-size",
            "--samples",
            "--seqlen",
            "--seed",
            "--batch-size",
            "--backend",
            "--option",
            "--damp",
            "--batch-norm",
            "--device",
            "--dtype",
            "--json",
            "--overwrite",
            "0",
        ],
    ),
    "eval": (
        ["demo", "--windows", "1", "--seqlen", "16"],
        [
            "--text",
            "--images",
            "--mean",
            "--std",
            "--image-size",
            "--samples",
            "--dense",
            "--weights",
            "--windows",
            "--seqlen",
            "--batch-size",
            "--device",
            "--dtype",
            "--json",
            "0",
        ],
    ),
    "inspect": (["demo"], ["--svg", "--dense", "--json", "0"]),
    "solve": (
        ["{problem}", "--backend", "greedy"],
        ["--backend", "--keep", "--option", "--device", "--json", "0"],
    ),
    "gap": (
        ["{problem}", "--out", "gap", "--backends", "greedy", "--sparsity", "0.5"],
        [
            "--out",
            "--sparsity",
            "--backends",
            "--groups",
            "--exact-units",
            "--units",
            "--windows",
            "--time-limit",
            "--gap-tolerance",
            "--calibration",
            "--samples",
            "--seqlen",
            "--weights",
            "--seed",
            "--damp",
            "--jobs",
            "--device",
            "--json",
            "0",
        ],
    ),
    "backends": ([], ["--json", "x"]),
    "demo": (["--out", "out", "--backend", "magnitude"], ["--out", "--backend"]),
}
"""Of each command a line that works, and what is put wrong: an option, or an argument by place."""


def options(work: Path, choice: random.Random) -> str | None:
    name = choice.choice([*COMMANDS][:5] if choice.random() < 0.95 else [*COMMANDS])
    line, wrong = COMMANDS[name]
    os.mkfifo(work / "fifo")
    (work / "dir").mkdir()
    (work / "dir" / "mine").write_text("mine")
    (work / "loop").symlink_to("loop")
    names = {"fifo": "fifo", "dir": "dir", "loop": "loop", "text": good() / "text.txt",
             "images": good() / "images.npz", "problem": taken("problem.npz", work),
             "opt": taken("opt", work), "study": taken("study", work)}  # fmt: skip
    line = [name, *line]
    for _ in range(choice.choice([1, 1, 2])):
        which, word = choice.choice(wrong), choice.choice(WORDS)
        if which == "--overwrite":
            line += [which, "--out", word]
        elif which.startswith("--"):
            line += [which, word]
        elif len(line) > 1:
            line[1] = word
        else:
            line.append(word)
    line = [str(names.get(word.strip("{}"), word)) if word[:1] == "{" else word for word in line]
    problem_before = (work / "problem.npz").read_bytes()
    config_before = (work / "opt" / "config.json").read_bytes()
    try:
        return command(line)
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        if type(error).__module__ == "builtins":
            error.args = (f"{line}: {error}"[-200:],)
        raise
    finally:
        assert (work / "dir" / "mine").read_text() == "mine", f"{line} lost a file"
        assert (work / "problem.npz").read_bytes() == problem_before, f"{line} lost a problem"
        assert (work / "opt" / "config.json").read_bytes() == config_before, f"{line} lost a model"


def targets(work: Path, choice: random.Random) -> str | None:
    """Save to names and places that cannot be, or are somebody's."""
    name: Any = choice.choice(
        [
            "a\udc80",
            "a\0b",
            "\ud800",
            b"a\xff",
            b"ok",
            "",
            ".",
            "..",
            "/",
            "/dev/null",
            "/proc/x",
            "a" * 300,
            "x/" * 2000,
            "~nobody/x",
            "../foreign",
            "../foreign/a file",
            "link",
            "loop",
            "a\nb",
            "é",
            3,
            None,
            Path("a\udc80"),
            "-rf",
            " ",
            "fifo",
            "opt",
            "file",
        ]
    )
    (work / "link").symlink_to("../foreign")
    (work / "loop").symlink_to("loop")
    os.mkfifo(work / "fifo")
    (work / "file").write_text("mine")
    taken("opt", work)
    model = tiny("opt")
    how = choice.randrange(4)
    if how == 3 and name in ("file", "../foreign/a file"):
        return None  # a drawing takes the place of the file that is named
    before = unlisted(work)
    try:
        if how == 0:
            osscar.save(model, name, overwrite=choice.random() < 0.5)
        elif how == 1:
            tokens = torch.randint(0, 90, (4, 8))
            result = osscar.prune(model, tokens, sparsity=0.5, backend="magnitude")
            result.save(name, overwrite=choice.random() < 0.5)
        elif how == 2:
            held = solvers.SubsetProblem.load(good() / "problem.npz")
            held.save(f"{name}.npz" if isinstance(name, str) else name)
        else:
            traced = graph.trace(small_net(), {"x": torch.rand(2, 3, 12, 12)})
            traced.draw(name)
    finally:
        lost = before - unlisted(work)
        assert not lost, f"{name!r} lost {sorted(lost)[:3]}"
    if isinstance(name, str) and how < 2:
        osscar.load(name)
    return None


def unlisted(work: Path) -> set[str]:
    """Return what somebody owns there, but for the checkpoint that may be replaced."""
    return {f"{f}: {f.read_bytes()!r}" for f in (work / "file",) if f.is_file()}
