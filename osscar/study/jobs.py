"""The jobs of a study: one problem for one backend each, solved here, in processes, or by Ray."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

import solvers
from osscar.base.errors import JournalError, optional
from osscar.base.files import atomic_write, digest
from osscar.base.memory import available_memory
from osscar.base.process import handling
from osscar.study.records import ProofBasis, Record
from solvers import Solution
from solvers.certificates.certificate import MultiplierCertificate

CERTIFICATES = "certificates"
"""The part of a study's directory that holds what proves its answers."""

KILLED = (
    "a worker was killed, perhaps for want of memory; what was solved is kept: run the same "
    "command again, with fewer jobs (`--jobs`), or on machines with more memory"
)

_COPIES = 12
"""How many times the size of its file a problem takes, with what solvers make of it."""

_PROCESS_BYTES = 400 * 2**20
"""What a process takes before it has read a problem."""

_SMALL_UNITS = 16
"""Problems of so few units are solved sooner than other processes would have started."""


@dataclass(frozen=True)
class Task:
    """A job: a record in which nothing is answered yet, and the directory of its study."""

    directory: Path
    asked: Record

    @property
    def certificate(self) -> str:
        """Where what proves its answer goes, relative to the directory."""
        return f"{CERTIFICATES}/{digest(self.asked.key)[:20]}.safetensors"

    @property
    def memory(self) -> int:
        """How many bytes a process takes that solves it."""
        return _memory_of((self.directory / self.asked.file).stat().st_size)

    @property
    def problem(self) -> solvers.SubsetProblem:
        """What is to be solved; the file read last stays in memory, as jobs come by problem."""
        path = self.directory / self.asked.file
        return _loaded(path, path.stat().st_mtime_ns).with_keep(self.asked.keep)


@lru_cache(maxsize=1)
def _loaded(path: Path, mtime_ns: int) -> solvers.SubsetProblem:
    return solvers.SubsetProblem.load(path)


def _memory_of(problem: int) -> int:
    return _PROCESS_BYTES + _COPIES * problem


def affordable_jobs(largest: int) -> int:
    """Return how many processes may solve at once: one a core, in half of the free memory at most.

    One thread each beats one process with all threads: most steps of a solve are too small to
    share, and on two cores a study took 0.55 of the time.  The largest problem file has so many
    bytes.
    """
    memory = available_memory() or 0
    return max(1, min(cores(), memory // 2 // _memory_of(largest)))


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- who solves --------------------------------------------------------------------------


def solve_here(tasks: Sequence[Task], jobs: int) -> Iterator[Record]:
    """Solve all tasks in so many processes, or in this one; yield the records (JournalError)."""
    if jobs == 1 or all(task.asked.units <= _SMALL_UNITS for task in tasks):
        yield from map(solve_task, tasks)
        return
    with _processes(min(jobs, len(tasks)), max(1, cores() // jobs)) as pool:
        try:
            with handling(signal.SIG_IGN, (signal.SIGINT,)):  # processes that start inherit it
                running = [pool.submit(solve_task, task) for task in tasks]
            for future in as_completed(running):
                yield future.result()
        except BrokenExecutor as error:
            raise JournalError(KILLED) from error


@contextmanager
def _processes(jobs: int, threads: int) -> Iterator[Executor]:
    """Give processes that end with the block, whatever they are at, and with this process."""
    context = multiprocessing.get_context("spawn")
    last_word, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        jobs, context, initializer=_start_worker, initargs=(threads, last_word)
    )
    try:
        yield pool
    finally:
        alive.close()
        pool.shutdown(cancel_futures=True)
        last_word.close()


def _start_worker(threads: int, last_word: connection.Connection) -> None:
    """Share out the cores, and end with the pool, even where the parent could not say goodbye."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel, last_word])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---- one solve ---------------------------------------------------------------------------


def solve_task(task: Task) -> Record:
    """Solve and verify one task, and write what proves it; a failure is a record with an error."""
    asked, problem = task.asked, task.problem
    refusal = solvers.make_backend(asked.backend, **asked.options).capabilities.refusal(problem)
    if refusal is not None:
        return dataclasses.replace(asked, error=f"{asked.backend} {refusal}")
    try:
        solution = solvers.solve(problem, asked.backend, options=dict(asked.options))
        return _answered(asked, solution, task.directory, task.certificate)
    except solvers.SolverError as error:
        return dataclasses.replace(asked, error=str(error))


def _answered(asked: Record, solution: Solution, directory: Path, certificate: str) -> Record:
    """Verify a solution, write what proves it to a file of the study, and return its record."""
    said = solution.record(solution.verify())
    fields = {field.name for field in dataclasses.fields(Record)}
    rests_on = ProofBasis.WORD if said.recomputed_bound is None else ProofBasis.RECOMPUTED
    with atomic_write(directory / certificate) as partial:
        proved = solvers.save_certificate(partial, solution)
    return dataclasses.replace(
        asked,
        **{name: value for name, value in vars(said).items() if name in fields},
        proof=ProofBasis.NONE if said.lower_bound is None else rests_on,
        bound_limit=_limit(solution),
        certificate=certificate if proved else "",
    )


def _limit(solution: Solution) -> float | None:
    """Return what no bound of that kind can exceed; None where the certificate does not tell."""
    if not isinstance(solution.certificate, MultiplierCertificate):
        return None
    try:
        return solution.certificate.limit(solution.problem)
    except solvers.VerificationError:  # rounded, they are no moments
        return None


_RETRIES = 3
"""How many workers a task may cost; one that takes more memory than there is would end them all."""

_PATIENCE = 5
"""Seconds that a machine has to answer at all; Ray itself tries for minutes."""


class RayCluster:
    """A Ray cluster, to which this process is connected; see `connected`."""

    def __init__(self, ray: Any) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.workers = int(sum(resources.get("CPU", 0) for resources in alive))
        """How many cores it has."""
        self._memory = max((resources.get("memory", 0.0) for resources in alive), default=0.0)
        self._ray = ray

    def solve(self, tasks: Sequence[Task]) -> Iterator[Record]:
        """Solve all tasks, each with a core and its memory (JournalError if workers die)."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(solve_task)
        running = [
            remote.options(memory=min(task.memory, self._memory)).remote(task) for task in tasks
        ]
        while running:
            done, running = ray.wait(running)
            try:
                records: list[Record] = ray.get(done)
            except ray.exceptions.RayTaskError as error:  # Ray wraps what a task raises
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise JournalError(KILLED) from error
            yield from records


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """Connect to a cluster while the block runs; what it has not done by then is stopped."""
    ray = optional("ray", "ray", "a cluster")
    host = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d{1,5})", address)
    try:
        if host is not None:
            socket.create_connection((host[1], int(host[2])), _PATIENCE).close()
        # SIGTERM does what it did, which Ray would replace.
        with handling(signal.getsignal(signal.SIGTERM), (signal.SIGTERM,)):
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
        raise JournalError(
            f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, "
            "or give its HOST:PORT"
        ) from error
    try:
        yield RayCluster(ray)
    finally:
        ray.shutdown()
