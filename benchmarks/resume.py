"""What a run costs that was killed and goes on: seconds by stage, beside an uninterrupted run.

For example, with a calibration text at hand:

    python benchmarks/resume.py smollm2-135m --calibration wikitext2-valid.txt --samples 16

Runs ``osscar prune`` once as a whole; then, for each share, kills it with SIGKILL when so many of
its groups are committed, and gives the same command again.  Prints the seconds of each stage, how
the resumed run compares with the whole one, and whether every file but the report has the same
bytes.  What belongs to no stage is mostly fingerprints, records, and weights that are written into
the model.  Seconds are those of the processor, so that others on the machine do not count.
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
    """Run the command in a process of its own; return the seconds of its stages."""
    asked = ["prune", arguments.model, "--sparsity", arguments.sparsity, *rest, "--out", str(out)]
    stages = out.with_name(f"{out.name}-stages.json")
    part = json.dumps({"arguments": asked, "kill_at": kill_at, "stages": str(stages)})
    before = used()
    ended = subprocess.run(
        [sys.executable, __file__], env={**os.environ, _PART: part}, check=False,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = used() - before
    if ended.returncode != (-signal.SIGKILL if kill_at else 0):
        raise SystemExit(f"the command ended with {ended.returncode}")
    return (
        {"seconds": seconds} if kill_at else {"seconds": seconds, **json.loads(stages.read_text())}
    )


def used() -> float:
    """Return the processor's seconds that all runs have taken so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def content(directory: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name in ("osscar_report.json", "report.html"):  # they tell seconds
        files.pop(name)
    return files


def print_row(name: str, row: dict[str, Any], whole: dict[str, Any]) -> None:
    stages = "  ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["stages"].items())
    share = f"{row['seconds'] / whole['seconds']:.2f} of the whole"
    same = "" if "same_bytes" not in row else f"  same bytes: {row['same_bytes']}"
    print(f"{name}: {row['seconds']:.1f} s ({share})  {stages}{same}", flush=True)


# ---- the command, with a watch on its stages -------------------------------------------------


def command(arguments: list[str], kill_at: int, stages: str) -> None:
    """Run the command in this process, and end it when so many groups are committed."""
    from osscar.base.timing import profiled
    from osscar.cli import main as osscar_main
    from osscar.run.run_log import RunLog

    append, committed = RunLog.append, [-1]

    def recorded(log: RunLog, index: int, record: Any) -> None:
        append(log, index, record)
        committed.append(index)
        if index + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.append = recorded
    sys.argv = ["osscar", *arguments]
    began = time.process_time()
    with profiled(time.process_time) as profile:
        try:
            osscar_main()
        except SystemExit as ended:
            if ended.code:
                raise
    rest = time.process_time() - began - sum(profile.seconds.values())
    found = {"stages": {**profile.seconds, "no stage": rest}, "groups": committed[-1] + 1}
    Path(stages).write_text(json.dumps(found))


if __name__ == "__main__":
    if _PART in os.environ:
        command(**json.loads(os.environ[_PART]))
    else:
        main()
