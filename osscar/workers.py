"""The solves of a study, in this process or in several, each written as soon as it is known."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

import solvers
from osscar.errors import StudyError
from osscar.rows import Instance, Row, read_row, write_json

ROWS = "rows"
"""The part of a study's directory that holds one file a row."""


@dataclass(frozen=True)
class Task:
    """One solve that is to be made.

    Parameters
    ----------
    directory
        The study's directory.
    instance
        The problem.
    keep, sparsity
        How many units stay, and the share to remove that this came from.
    backend, options
        Who is to solve it, and how.
    """

    directory: Path
    instance: Instance
    keep: int
    sparsity: float
    backend: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where its row goes."""
        key = (self.instance.name, self.keep, self.backend, sorted(self.options.items()))
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
        return self.directory / ROWS / f"{digest}.json"


def solve_all(tasks: Sequence[Task], jobs: int) -> Iterator[Row]:
    """Solve all tasks and give the rows as they come.

    Parameters
    ----------
    tasks
        What to solve.
    jobs
        Processes at once; 1 is this one. The cores are shared out evenly.

    Raises
    ------
    StudyError
        If a worker was killed.
    """
    if jobs == 1:
        yield from map(solve_task, tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(threads,))
    try:
        futures: list[Future[Row]] = [pool.submit(solve_task, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise StudyError(
            "a worker was killed, perhaps for want of memory; what it had solved is kept: "
            "give the same command again, with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    """Share out the cores, and end with the parent even where it could not say goodbye."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def solve_task(task: Task) -> Row:
    """Solve, verify and write one row, unless it is there already.

    What a backend refuses, or cannot do, is a row with an error.
    """
    if task.file.exists():
        return read_row(task.file)
    instance = task.instance
    asked = Row(
        instance=instance.name,
        kind=instance.kind,
        file=instance.file,
        units=instance.units,
        width=instance.width,
        keep=task.keep,
        sparsity=task.sparsity,
        backend=task.backend,
        options=task.options,
    )
    problem = load_problem(task.directory / instance.file).with_keep(task.keep)
    try:
        solution = solvers.solve(problem, task.backend, **task.options)
        row = _answered(asked, solution)
    except solvers.SolverError as error:
        row = dataclasses.replace(asked, error=str(error))
    write_json(task.file, dataclasses.asdict(row))
    return row


def _answered(asked: Row, solution: solvers.Solution) -> Row:
    verified = solution.verify()
    scale = solution.problem.scale or 1.0
    bound = solution.lower_bound if math.isfinite(solution.lower_bound) else None
    return dataclasses.replace(
        asked,
        status=solution.status.name,
        loss=verified.loss,
        relative_loss=verified.loss / scale,
        lower_bound=bound,
        relative_bound=None if bound is None else bound / scale,
        bound_from=solution.bound_from,
        gap=None if bound is None else solution.gap,
        iterations=solution.iterations,
        seconds=solution.seconds,
        support=tuple(solution.support.tolist()),
    )


@lru_cache(maxsize=1)
def load_problem(path: Path) -> solvers.SubsetProblem:
    """Read a problem file; the last one stays in memory, since rows come problem by problem."""
    return solvers.SubsetProblem.load(path)
