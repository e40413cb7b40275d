"""The solves of a study on a Ray cluster, which makes them elsewhere where a worker is lost.

A worker gets a problem's file as bytes and what is asked as JSON; it solves and verifies as a
process of this machine would, in a directory of its own, and sends back the files that it wrote
there, which are read here as any others are.  Ray pickles what it moves between its own processes;
text and bytes are all that it gets to move, and they are those of safetensors and JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict

import solvers
from osscar.base.errors import MissingDependency, OsscarError, StudyError
from osscar.base.files import atomic_write, file_digest
from osscar.base.json_files import STRICT, parse_json
from osscar.base.version import VERSION
from osscar.study.jobs import RECORDS, Task, check_asked, memory_of, solve_task
from osscar.study.records import Instance, Options, Record

_RETRIES = 3
"""How many workers a solve may cost; one that takes more than there is would end them all."""

_AHEAD = 2
"""Tasks that are handed out for each core of the cluster, so that none waits for the next."""


@dataclass(frozen=True)
class _Asked:
    """A task as it travels, and with which versions it is to be solved."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    instance: Instance
    keep: int
    sparsities: tuple[float, ...]
    backend: str
    options: Options
    versions: dict[str, str]

    @classmethod
    def of(cls, task: Task) -> _Asked:
        names = [f.name for f in dataclasses.fields(cls) if f.name != "versions"]
        return cls(**{name: getattr(task, name) for name in names}, versions=_versions())

    def task(self, directory: Path) -> Task:
        return Task(
            directory, self.instance, self.keep, self.sparsities, self.backend, self.options
        )


@dataclass(frozen=True)
class _Answer:
    """What a worker has to say: a record, or why there is none."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    record: Record | None = None
    error: str = ""
    of_backend: bool = False


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"osscar": VERSION, **packages}


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster, to which this process is connected; see `connected`.

    Parameters
    ----------
    workers
        How many cores it has.
    memory
        Bytes that the largest of its machines has for tasks.
    """

    workers: int
    memory: float
    _ray: Any = field(repr=False)

    def solve_all(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Record]]:
        """Solve all tasks and give the records as they come, each written by then.

        Raises
        ------
        StudyError
            If a solve costs one worker after the other, none has the memory for a problem, their
            versions differ from those here, or an answer is not one.
        BackendError
            If a backend cannot run there.
        """
        solve = self._ray.remote(num_cpus=1, max_retries=_RETRIES, num_returns=3)(_solve)
        running: dict[Any, tuple[Task, tuple[Any, ...]]] = {}
        problems = _Problems(self)
        try:
            for task in tasks:
                if len(running) >= _AHEAD * self.workers:
                    yield self._next(running)
                problem, needed = problems.of(task)
                asked = json.dumps(_Asked.of(task), default=dataclasses.asdict)
                files = (_bytes(task.file), _bytes(task.certificate_file))
                parts = tuple(solve.options(memory=needed).remote(asked, problem, *files))
                running[parts[0]] = (task, parts)
            while running:
                yield self._next(running)
        finally:
            for _, parts in running.values():
                self._ray.cancel(parts[0], force=True)

    def _next(self, running: dict[Any, tuple[Task, tuple[Any, ...]]]) -> tuple[Task, Record]:
        """Wait for one of those that run, and write what it brought."""
        [done], _ = self._ray.wait(list(running), num_returns=1)
        task, parts = running.pop(done)
        try:
            text, written, certificate = self._ray.get(list(parts))
        except self._ray.exceptions.RayError as error:
            raise StudyError(
                f"{task.instance.name!r} with {task.backend} was lost with {_RETRIES + 1} workers, "
                f"perhaps for want of memory, or the cluster with it ({type(error).__name__}); "
                "what was solved is kept: give the same command again"
            ) from error
        return task, _kept(task, str(text), bytes(written), bytes(certificate))


class _Problems:
    """Problem files in the cluster's memory; the last one, since tasks come problem by problem."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster, self._sha256, self._found = cluster, "", (None, 0)

    def of(self, task: Task) -> tuple[Any, int]:
        """Return a reference to a task's problem, and the bytes that solving it takes.

        Raises
        ------
        StudyError
            If it is not the file that the study was made with, or too large for the cluster.
        """
        file = task.directory / task.instance.file
        if self._sha256 != task.instance.sha256:
            data = _bytes(file)
            needed = memory_of(len(data))
            if needed > self._cluster.memory:
                raise StudyError(
                    f"{task.instance.name!r} takes {needed / 1e9:.1f} GB to solve, and the largest "
                    f"machine of the cluster has {self._cluster.memory / 1e9:.1f} GB; add a larger "
                    "one, or solve it here, without --ray"
                )
            self._found = (self._cluster._ray.put(data), needed)
            self._sha256 = task.instance.sha256
        return self._found


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StudyError(f"cannot read {file}: {error.strerror}") from error


def _kept(task: Task, text: str, written: bytes, certificate: bytes) -> Record:
    """Write what a worker has written into the study, and return the record."""
    answer: _Answer = parse_json(text, _Answer, f"the answer for {task.file}")
    if answer.record is None:
        raise (solvers.BackendError if answer.of_backend else StudyError)(answer.error)
    check_asked(task, answer.record)
    for file, data in ((task.certificate_file, certificate), (task.file, written)):
        if data:
            with atomic_write(file) as partial:
                partial.write_bytes(data)
    if written:
        task.read()  # which refuses what is no record
    if (
        answer.record.certificate
        and file_digest(task.certificate_file) != answer.record.certificate
    ):
        raise StudyError(f"{task.certificate_file} is not the certificate of its record; delete it")
    return answer.record


# ---- on a worker -------------------------------------------------------------------------


def _solve(
    asked: str, problem: bytes, record: bytes, certificate: bytes
) -> tuple[str, bytes, bytes]:
    """Solve a task, and return the answer, and the files of record and certificate if they are new.

    Parameters
    ----------
    asked
        The task.
    problem
        The problem's file.
    record, certificate
        Files of an earlier run, which are recomputed; empty where there are none.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="osscar-") as place:
        there: _Asked = parse_json(asked, _Asked, "a task")
        task = there.task(Path(place))
        before = {task.file: record, task.certificate_file: certificate}
        files = {task.directory / task.instance.file: problem, **before}
        (task.directory / RECORDS).mkdir()
        for file, data in files.items():
            file.parent.mkdir(exist_ok=True)
            if data:
                file.write_bytes(data)
        answer = _answer(task, there.versions)
        new = [_bytes(file) if _bytes(file) != data else b"" for file, data in before.items()]
    return json.dumps(answer, default=dataclasses.asdict), new[0], new[1]


def _answer(task: Task, versions: Mapping[str, str]) -> _Answer:
    for name, here in _versions().items():
        if versions.get(name) != here:
            return _Answer(
                error=f"a worker has {name} {here}, and {versions.get(name)} asks; install the "
                "same on all machines"
            )
    try:
        return _Answer(solve_task(task))
    except (OsscarError, solvers.SolverError) as error:
        return _Answer(error=str(error), of_backend=isinstance(error, solvers.BackendError))


# ---- the cluster -------------------------------------------------------------------------


@contextmanager
def connected(address: str) -> Iterator[RayCluster]:
    """Connect to a cluster while the block runs.

    Parameters
    ----------
    address
        ``auto`` for the cluster that this machine belongs to, ``HOST:PORT``, or ``local`` for one
        of this machine alone that ends with the block.

    Raises
    ------
    MissingDependency
        If Ray is not installed.
    StudyError
        If there is no cluster, or it has no core.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependency("a cluster needs ray: python3 -m pip install 'osscar[ray]'")
    _check_answer(address)
    import ray

    with _signals_are_ours():
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise StudyError(
                f"no Ray cluster answers at {address!r}: {error}; start one with `ray start "
                "--head`, or give its HOST:PORT"
            ) from error
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = int(sum(resources.get("CPU", 0) for resources in alive))
        if not cores:
            raise StudyError(f"the Ray cluster at {address!r} has no core that is free for tasks")
        yield RayCluster(cores, max(resources.get("memory", 0.0) for resources in alive), ray)
    finally:
        ray.shutdown()


_PATIENCE = 5
"""Seconds that a machine has to answer at all; Ray itself tries for minutes."""


def _check_answer(address: str) -> None:
    """Refuse an address of a port at which nothing answers.

    Raises
    ------
    StudyError
        If nothing does.
    """
    found = re.fullmatch(r"(?:ray://)?\[?(?P<host>[^/\]]+?)\]?:(?P<port>\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise StudyError(
            f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, "
            "or give its HOST:PORT"
        ) from error


@contextmanager
def _signals_are_ours() -> Iterator[None]:
    """Keep what SIGTERM does, which Ray would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
