"""A Ray cluster that solves the jobs of a study; those of a lost worker are solved again."""

from __future__ import annotations

import logging
import re
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from osscar.base.errors import JournalError, optional
from osscar.base.process import handling
from osscar.study.jobs import KILLED, Task, solve_task
from osscar.study.records import Record

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
