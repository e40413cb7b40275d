"""What a run costs that was killed and goes on: seconds by phase, beside an uninterrupted run.

For example, with a calibration text at hand:

    python benchmarks/resume.py smollm2-135m --calibration wikitext2-valid.txt --samples 16

Runs ``osscar prune`` once as a whole; then, for each share, kills it with SIGKILL when so many of
its groups are committed, and gives the same command again.  Prints the seconds of each phase, how
the resumed run compares with the whole one, and whether every file but the report has the same
bytes.  Seconds are those of the processor, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES = ("opening", "tracing", "replay", "walk", "solve", "commit", "proof", "save")
"""In order: read the model and the calibration data; find its groups; fingerprint both, read the
log and write its weights; run the model and measure; solve; record; shrink and compare; save."""

_PART = "OSSCAR_RESUME_PART"


def main() -> None:
    arguments, rest = parse_arguments()
    with tempfile.TemporaryDirectory() as place:
        whole = run(Path(place) / "whole", arguments, rest)
        print_row("whole", whole, whole)
        rows = {"whole": whole}
        for share in arguments.shares:
            out = Path(place) / f"{share}"
            kill_at = math.ceil(share * whole["groups"])
            run(out, arguments, rest, kill_at=kill_at)
            again = run(out, arguments, rest)
            again["committed_before"] = kill_at
            again["same_bytes"] = content(out) == content(Path(place) / "whole")
            rows[f"killed at {kill_at} of {whole['groups']}"] = again
            print_row(f"killed at {kill_at} of {whole['groups']}", again, whole)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return what is for this script, and what is for ``osscar prune``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.95])
    parser.add_argument("--sparsity", default="0.3")
    parser.add_argument("--json", type=Path)
    return parser.parse_known_args()


def run(
    out: Path, arguments: argparse.Namespace, rest: list[str], kill_at: int = 0
) -> dict[str, Any]:
    """Run the command in a process of its own; return the seconds of its phases."""
    asked = ["prune", arguments.model, "--sparsity", arguments.sparsity, *rest, "--out", str(out)]
    phases = out.with_name(f"{out.name}-phases.json")
    part = json.dumps({"arguments": asked, "kill_at": kill_at, "phases": str(phases)})
    before = used()
    ended = subprocess.run(
        [sys.executable, __file__], env={**os.environ, _PART: part}, check=False,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = used() - before
    if ended.returncode != (-signal.SIGKILL if kill_at else 0):
        raise SystemExit(f"the command ended with {ended.returncode}")
    return (
        {"seconds": seconds} if kill_at else {"seconds": seconds, **json.loads(phases.read_text())}
    )


def used() -> float:
    """Return the processor's seconds that all runs have taken so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def content(directory: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files.pop("osscar_report.json")  # it tells seconds
    return files


def print_row(name: str, row: dict[str, Any], whole: dict[str, Any]) -> None:
    phases = "  ".join(f"{phase} {row[phase]:.1f}" for phase in PHASES)
    share = f"{row['seconds'] / whole['seconds']:.2f} of the whole"
    same = "" if "same_bytes" not in row else f"  same bytes: {row['same_bytes']}"
    print(f"{name}: {row['seconds']:.1f} s ({share})  {phases}{same}", flush=True)


# ---- the command, with a watch on its phases -------------------------------------------------


def command(arguments: list[str], kill_at: int, phases: str) -> None:
    from osscar.cli import main as osscar_main
    from osscar.pruning import prune
    from osscar.pruning.result import PruningResult
    from osscar.pruning.run_log import RunLog, RunManifest

    spent = dict.fromkeys((*PHASES, "pruning"), 0.0)

    def timed(owner: Any, name: str, phase: str) -> None:
        """Add the time in a function to a phase."""
        function = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            start = time.process_time()
            try:
                return function(*given, **options)
            finally:
                spent[phase] += time.process_time() - start

        setattr(owner, name, staticmethod(call) if name == "of" else call)

    def ending(owner: Any, name: str, phase: str) -> None:
        """Let a phase end where a function begins, and no other before it has been counted."""
        function = getattr(owner, name)

        def call(*given: Any, **options: Any) -> Any:
            spent[phase] = time.process_time() - spent["opening"]
            return function(*given, **options)

        setattr(owner, name, call)

    def records(log: RunLog) -> Any:
        start = time.process_time()
        found = tuple(read(log))
        spent["replay"] += time.process_time() - start
        return found

    append, committed = RunLog.append, [-1]

    def recorded(log: RunLog, index: int, record: Any) -> None:
        start = time.process_time()
        append(log, index, record)
        spent["commit"] += time.process_time() - start
        committed.append(index)
        if index + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    read, RunLog._records = RunLog._records, records
    RunLog.append = recorded
    timed(prune, "_prune_groups", "pruning")
    ending(prune, "opened", "opening")
    ending(prune, "_prune_groups", "tracing")
    timed(RunManifest, "of", "replay")
    timed(prune, "_replay", "replay")
    timed(prune.solvers, "solve", "solve")
    timed(prune, "shrink", "proof")
    timed(PruningResult, "save", "save")
    sys.argv = ["osscar", *arguments]
    try:
        osscar_main()
    except SystemExit as ended:
        if ended.code:
            raise
    inside = sum(spent[phase] for phase in ("replay", "solve", "commit"))
    spent["walk"] = spent.pop("pruning") - inside
    Path(phases).write_text(json.dumps({**spent, "groups": committed[-1] + 1}))


if __name__ == "__main__":
    if _PART in os.environ:
        command(**json.loads(os.environ[_PART]))
    else:
        main()
