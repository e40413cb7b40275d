"""The jobs of a study: one problem for one backend each, solved here, in processes, or elsewhere.

Whoever solves writes the answer into the study's directory as soon as it is known.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from multiprocessing import connection
from pathlib import Path

import torch

import solvers
from osscar.base.errors import FileError, JournalError
from osscar.base.files import digest, file_digest, write_json
from osscar.base.memory import available_memory
from osscar.base.process import handling
from osscar.study.answers import answered, claimed, save_certificate
from osscar.study.records import ProofBasis, Record, read_record

RECORDS = "records"
"""The part of a study's directory that holds one file a record, and the certificates."""

KILLED = (
    "a worker was killed, perhaps for want of memory; what was solved is kept: run the same "
    "command again, with fewer --jobs, or on machines with more memory"
)

_ASKED = ("instance", "kind", "file", "units", "width", "keep", "backend", "options")
"""The fields of a record that its task decides, and that do not change as a study is extended."""

_COPIES = 12
"""How many times the size of its file a problem takes, with what solvers make of it."""

_PROCESS_BYTES = 400 * 2**20
"""What a process takes before it has read a problem."""

_SMALL_UNITS = 16
"""Problems of so few units are solved sooner than other processes would have started."""


@dataclass(frozen=True)
class Task:
    """A job: a record in which nothing is answered yet, and where its problem and answer lie."""

    directory: Path
    """That of the study."""
    sha256: str
    """Of the problem's file."""
    asked: Record

    @cached_property
    def file(self) -> Path:
        """Where its record goes: the name depends on what the problem is, not only on its name."""
        asked = self.asked
        options = sorted(asked.options.items())
        key = (asked.instance, self.sha256, asked.keep, asked.backend, options)
        return self.directory / RECORDS / f"{digest(json.dumps(key))[:20]}.json"

    @property
    def certificate_file(self) -> Path:
        """Where the certificate of its bound goes."""
        return self.file.with_suffix(".safetensors")

    @property
    def memory(self) -> int:
        """How many bytes a process takes that solves it."""
        return _memory_of((self.directory / self.asked.file).stat().st_size)

    @property
    def problem(self) -> solvers.SubsetProblem:
        """What is to be solved; the file read last stays in memory, as jobs come by problem."""
        return load_problem(self.directory / self.asked.file, self.sha256).with_keep(
            self.asked.keep
        )

    def read(self) -> Record | None:
        """Return its record, or None where it has not been solved."""
        if not self.file.exists():
            return None
        record = read_record(self.file)
        for name in _ASKED:
            found, expected = getattr(record, name), getattr(self.asked, name)
            if found != expected:
                raise JournalError(
                    f"{self.file} is the record of another solve: {name} is {found!r}, not "
                    f"{expected!r}; delete it"
                )
        # The shares are those asked for today: the same `keep` may have come from another then.
        return dataclasses.replace(record, sparsities=self.asked.sparsities)


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
    """Solve all tasks in so many processes of this machine, and give the records as they come.

    This process solves for one job, and where all problems are small.

    Raises
    ------
    JournalError
        If a process was killed.
    """
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
    """Solve and verify one task and write its record; if it is there already, recompute it.

    What a backend cannot take is a record with an error.  So is what went wrong in a solve, but
    that record is not written: the next run tries again, perhaps with a licence, or with a defect
    mended.

    Of a record that was there, everything is true afterwards that can be told from the problem: its
    loss is that of its support, and its bound that of its certificate.  A bound without one stays
    as it was recorded, which the record then says; so do times and counts.
    """
    asked, problem, done = task.asked, task.problem, task.read()
    if done is not None and not done.error:
        try:
            solution = claimed(done, problem, task.certificate_file)
            return answered(asked, solution, done.certificate, ProofBasis.RECORDED)
        except (solvers.SolverError, JournalError, FileError) as error:
            raise JournalError(
                f"the solution in {task.file} is wrong: {error}; delete it"
            ) from error
    backend = solvers.make_backend(asked.backend, **asked.options)
    refusal = backend.capabilities.refusal(problem)
    if refusal is not None:
        record = dataclasses.replace(asked, error=f"{asked.backend} {refusal}")
    else:
        try:
            solution = solvers.solve(problem, asked.backend, options=dict(asked.options))
            certificate = save_certificate(task.certificate_file, solution)
            record = answered(asked, solution, certificate, ProofBasis.WORD)
        except solvers.ProblemError as error:
            record = dataclasses.replace(asked, error=str(error))
        except solvers.SolverError as error:
            return dataclasses.replace(asked, error=str(error))
    write_json(task.file, dataclasses.asdict(record), indent=1)
    return record


def load_problem(path: Path, sha256: str) -> solvers.SubsetProblem:
    """Read a problem of a study, whose file has that digest; the last one stays in memory."""
    try:
        state = path.stat()
        return _load(path, state.st_mtime_ns, state.st_size, sha256)
    except OSError as error:
        raise JournalError(f"cannot read the problem file {path}: {error.strerror}") from error


@lru_cache(maxsize=1)
def _load(path: Path, mtime_ns: int, size: int, sha256: str) -> solvers.SubsetProblem:
    """Read a problem file; time and size are there to tell when it has been replaced."""
    if file_digest(path) != sha256:
        raise JournalError(
            f"{path} is not the problem that the study was made with; put that file back, or "
            "start a new study in another --out"
        )
    return solvers.SubsetProblem.load(path)
