"""Measure which architectures are pruned, how much of them, and what is skipped.

    python -m benchmarks.coverage run DIR                     # everything; goes on where it stopped
    python -m benchmarks.coverage run DIR --lists timm,nets --seconds 500
    python -m benchmarks.coverage run DIR --models resnet,llama --again
    python -m benchmarks.coverage run DIR --alone             # a quarter of the time
    python -m benchmarks.coverage page DIR                    # docs/results.md, coverage.csv

Each model has two processes of its own, one for OSSCAR and one for Torch-Pruning, with a limit of
time and one of memory; what came of it is a file of JSON in DIR.  Names in DIR that end in .json
and lie beside the lists' folders keep which variant of each family is the smallest.

Takes an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.coverage import peer, row
from benchmarks.coverage.case import Made, NotBuilt
from benchmarks.coverage.lists import DEFAULT, LISTS
from benchmarks.coverage.page import Entry, put_table, sheet

DOCS = Path(__file__).resolve().parents[2] / "docs"

SECONDS = 120
"""CPU time that either tool has for one model, after it is built, unless `--limit` says another."""

PATIENCE = 10
"""How many times as long the clock on the wall may take, where others use the machine, too."""

MEMORY = 5 * 2**30
"""Bytes of data that a process may have."""

_NO_MEMORY = 3
"""The exit status of a process that says so."""

Work = Callable[[Made], Any]


def measure(name: str, listed: str, alone: bool, known: Entry | None, limit: int) -> Entry:
    """Build a model for each tool whose answer is not known; or only for OSSCAR."""
    entry = known or _ours(name, listed, limit)
    if alone or entry.row is None:
        return entry
    theirs = _apart(listed, name, peer.outcome, limit)
    other = peer.Peer(failure=theirs["died"]) if "died" in theirs else peer.Peer(**theirs)
    return dataclasses.replace(entry, peer=other)


def _ours(name: str, listed: str, limit: int) -> Entry:
    ours = _apart(listed, name, row.measured, limit)
    if "not_built" in ours:
        return Entry(listed, name, not_built=ours["not_built"])
    found = row.Row(**ours) if "died" not in ours else _unfinished(ours)
    return Entry(listed, name, found)


def _unfinished(ended: dict[str, Any]) -> row.Row:
    return row.Row(ended["variant"], ended["parameters"], failure=ended["died"])


def _apart(listed: str, name: str, work: Work, limit: int) -> dict[str, Any]:
    """Do something with a model in a process of its own; say how that ended if it died."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=_child, args=(its, listed, name, work, limit))
    process.start()
    its.close()
    built: dict[str, Any] = {"variant": "", "parameters": 0}
    try:
        if mine.poll(limit * PATIENCE):
            built = mine.recv()
        if "not_built" in built:
            return built
        if mine.poll(limit * PATIENCE):
            found: dict[str, Any] = mine.recv()
            return found
        return {**built, "died": f"no answer within {limit * PATIENCE} s"}
    except EOFError:
        process.join()
        return {**built, "died": _last_words(process.exitcode, limit)}
    finally:
        process.kill()
        process.join()


def _last_words(code: int | None, limit: int) -> str:
    if code == -signal.SIGXCPU:
        return f"not done within {limit} s"
    if code == _NO_MEMORY:
        return "it needs more memory than there is"
    return f"the process died ({code})"


def _child(answer: Connection, listed: str, name: str, work: Work, limit: int) -> None:
    """Build a model, tell its size, and then what comes of it."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    built: dict[str, Any] = {}
    try:
        made = LISTS[listed].make(name)
        size = sum(p.numel() for p in made.model.parameters())
        built = {"variant": made.variant, "parameters": size}
        answer.send(built)
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + limit, used + limit + 5))
        torch.manual_seed(1)
        answer.send(dataclasses.asdict(work(made)))
    except NotBuilt as error:
        answer.send({"not_built": str(error)})
    except Exception as error:  # what no tool should raise is what the page has to tell
        if isinstance(error, MemoryError) or "memory" in str(error):
            os._exit(_NO_MEMORY)
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer.send(
            {
                "variant": "",
                "parameters": 0,
                **built,
                "died": f"{type(error).__name__}: {text:.200}",
            }
        )


# ---- the directory -----------------------------------------------------------------------


def missing(
    place: Path, lists: list[str], only: set[str], again: bool, alone: bool
) -> Iterator[tuple[str, str]]:
    """Yield what is not measured yet, a list and a name; what comes first is a fair sample."""
    for listed in lists:
        (place / listed).mkdir(parents=True, exist_ok=True)
        for name in sorted(LISTS[listed].names(place), key=_drawn):
            done = not again and _measured(_file(place, listed, name), alone)
            if not done and (not only or name in only):
                yield listed, name


def _measured(file: Path, alone: bool) -> bool:
    if alone or not file.exists():
        return file.exists()
    entry = _read(file)
    return entry.row is None or entry.peer is not None


def _read(file: Path) -> Entry:
    return Entry.from_json(json.loads(file.read_text()))


def _drawn(name: str) -> int:
    return zlib.crc32(name.encode())


def _file(place: Path, listed: str, name: str) -> Path:
    return place / listed / f"{name.replace('/', '_')}.json"


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, one file at a time."""
    place, end = Path(options.directory), time.monotonic() + options.seconds
    for name in ("BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        getattr(transformers, name)  # what is imported here, no other process has to
    only = set(filter(None, options.models.split(",")))
    part, parts = map(int, options.part.split("/"))
    todo = missing(place, options.lists.split(","), only, options.again, options.alone)
    for listed, name in todo:
        if _drawn(name) % parts != part - 1:
            continue
        if time.monotonic() > end:
            print("time is up; give the same command to go on")
            return
        file = _file(place, listed, name)
        known = None if options.again or not file.exists() else _read(file)
        entry = measure(name, listed, options.alone, known, options.limit)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(entry), indent=1))
        new.replace(file)
        print(entry.brief(), flush=True)


def write_page(options: argparse.Namespace) -> None:
    """Write what a directory holds as a table in docs/results.md and as docs/coverage.csv."""
    place = Path(options.directory)
    entries = [_read(file) for listed in LISTS for file in sorted((place / listed).glob("*.json"))]
    (DOCS / "coverage.csv").write_text(sheet(entries), encoding="utf-8")
    page = DOCS / "results.md"
    page.write_text(put_table(page.read_text(encoding="utf-8"), entries), encoding="utf-8")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure which architectures are covered.")
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run", help="measure, one file of JSON for each model")
    measuring.add_argument("directory")
    measuring.add_argument("--lists", default=",".join(DEFAULT))
    measuring.add_argument("--models", default="", help="only these names")
    measuring.add_argument("--seconds", type=float, default=float("inf"), help="begin no more then")
    measuring.add_argument("--part", default="1/1", help="2/3: the second of three at a time")
    measuring.add_argument("--limit", type=int, default=SECONDS, help="CPU seconds of each tool")
    measuring.add_argument("--again", action="store_true", help="also what is measured already")
    measuring.add_argument("--alone", action="store_true", help="without Torch-Pruning, for now")
    measuring.set_defaults(command=run)
    writing = commands.add_parser("page", help="write coverage.csv, and into results.md")
    writing.add_argument("directory")
    writing.set_defaults(command=write_page)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
