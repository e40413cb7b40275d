"""Measure which architectures are pruned, how much of them, and what is skipped.

    python -m benchmarks.coverage run DIR                     # goes on where it was stopped
    python -m benchmarks.coverage run DIR --lists timm --models resnet10t,resnet18
    python -m benchmarks.coverage page DIR                    # docs/results.md, coverage.csv

Each model has two processes of its own, one for OSSCAR and one for Torch-Pruning, with a limit of
time and one of memory; what came of it, a row of coverage.csv, is a file of JSON in DIR.  Models of
torchvision and timm are those of the sheet, and whatever `--models` names.

Takes an hour.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import traceback
import warnings
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.coverage import peer, row
from benchmarks.coverage.lists import LISTS, SHEET
from benchmarks.coverage.page import put_table, sheet
from benchmarks.measuring import rows_in
from osscar.base.files import write_json
from tests.zoo.case import Made, NotBuilt

SECONDS = 120
"""CPU time that either tool has for one model."""

PATIENCE = 10
"""How many times as long the clock on the wall may take, where others use the machine, too."""

MEMORY = 5 * 2**30
"""Bytes of data that a process may have."""

_NO_MEMORY = 3
"""The exit status of a process that says so."""

Work = Callable[[Made], dict[str, Any]]


def measure(listed: str, name: str) -> dict[str, Any]:
    """Build a model for each tool, and return its row."""
    ours = _apart(row.measured, listed, name)
    if "died" in ours:
        ours = {"class": LISTS[listed].kind(name), "outcome": "not_traced", "missing": ours["died"]}
    if ours["outcome"] != "not_built":
        theirs = _apart(peer.outcome, listed, name)
        ours |= {"torch_pruning_failure": theirs["died"]} if "died" in theirs else theirs
    return {"list": listed, "model": name, **ours}


def _apart(work: Work, listed: str, name: str) -> dict[str, Any]:
    """Do something with a model in a process of its own; say how that ended if it died."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=_child, args=(its, work, listed, name))
    process.start()
    its.close()
    try:
        if mine.poll(SECONDS * PATIENCE):
            found: dict[str, Any] = mine.recv()
            return found
        return {"died": f"no answer within {SECONDS * PATIENCE} s"}
    except EOFError:
        process.join()
        told = {
            -signal.SIGXCPU: f"not done within {SECONDS} s",
            _NO_MEMORY: "it needs more memory than there is",
        }
        return {"died": told.get(process.exitcode, f"the process died ({process.exitcode})")}
    finally:
        process.kill()
        process.join()


def _child(answer: Connection, work: Work, listed: str, name: str) -> None:
    """Build a model, and tell what comes of it."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        made = LISTS[listed].make(name)
        torch.manual_seed(1)
        answer.send(work(made))
    except NotBuilt as error:
        answer.send({"outcome": "not_built", "missing": str(error)})
    except Exception as error:  # what no tool should raise is what the page has to tell
        if isinstance(error, MemoryError) or "memory" in str(error):
            os._exit(_NO_MEMORY)
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer.send({"died": f"{type(error).__name__}: {text:.200}"})


def run(options: argparse.Namespace) -> None:
    """Measure what is missing; what comes first is a fair sample."""
    for name in ("BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"):
        getattr(transformers, name)  # what is imported here, no other process has to
    for listed in options.lists.split(","):
        place: Path = options.directory / listed
        place.mkdir(parents=True, exist_ok=True)
        names = options.models.split(",") if options.models else LISTS[listed].names()
        for name in sorted(names, key=lambda name: zlib.crc32(name.encode())):
            file = place / f"{name.replace('/', '_')}.json"
            if not file.exists():
                found = measure(listed, name)
                write_json(file, found)
                print(found, flush=True)


def write_page(options: argparse.Namespace) -> None:
    """Write what a directory holds as a table in docs/results.md and as docs/coverage.csv."""
    rows = [row for listed in LISTS for row in rows_in(options.directory / listed)]
    SHEET.write_text(sheet(rows), encoding="utf-8")
    page = SHEET.with_name("results.md")
    text = put_table(page.read_text(encoding="utf-8"), SHEET.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run", help="measure, one file of JSON for each model")
    measuring.add_argument("directory", type=Path)
    measuring.add_argument("--lists", default=",".join(LISTS))
    measuring.add_argument("--models", default="", help="only these names")
    measuring.set_defaults(command=run)
    writing = commands.add_parser("page", help="write coverage.csv, and into results.md")
    writing.add_argument("directory", type=Path)
    writing.set_defaults(command=write_page)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
