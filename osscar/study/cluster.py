"""A Ray cluster as an executor: its tasks are made elsewhere where a worker is lost."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from typing import Any

from osscar.base.errors import JournalError, MissingDependency
from osscar.base.signals import handling
from osscar.study.jobs import Task

_RETRIES = 3
"""How many workers a task may cost; one that takes more memory than there is would end them all."""

_PATIENCE = 5
"""Seconds that a machine has to answer at all; Ray itself tries for minutes."""


class RayExecutor(Executor):
    """A Ray cluster, to which this process is connected; see `connected`.

    A task has a core of its own, and the memory that its problem takes.
    """

    def __init__(self, ray: Any) -> None:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.workers = int(sum(resources.get("CPU", 0) for resources in alive))
        """How many cores it has."""
        self._memory = max((resources.get("memory", 0.0) for resources in alive), default=0.0)
        self._lost = ray.exceptions.RayError
        self._remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_outcome)

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **options: Any
    ) -> Future[Any]:
        """Hand out a call; its future is broken where it costs one worker after the other."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        needed = max((one.memory for one in arguments if isinstance(one, Task)), default=0)
        remote = self._remote.options(memory=min(needed, self._memory))
        called = remote.remote(function, arguments, options).future()
        called.add_done_callback(lambda done: self._settle(future, done))
        return future

    def _settle(self, future: Future[Any], done: Future[Any]) -> None:
        error = done.exception()
        found, raised = (None, error) if error is not None else done.result()
        if isinstance(raised, self._lost):
            raised = BrokenExecutor(f"{type(raised).__name__}, after {_RETRIES + 1} workers")
        if raised is not None:
            future.set_exception(raised)
        else:
            future.set_result(found)


def _outcome(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, Exception | None]:
    """Call a function on a worker; Ray would wrap what it raises in an exception of its own."""
    try:
        return function(*arguments, **options), None
    except Exception as error:
        return None, error


@contextmanager
def connected(address: str) -> Iterator[RayExecutor]:
    """Connect to a cluster while the block runs; what it has not done by then is stopped.

    The address is ``auto`` for the cluster that this machine belongs to, ``HOST:PORT``, or
    ``local`` for one of this machine alone that ends with the block.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingDependency("a cluster needs ray: python3 -m pip install 'osscar[ray]'")
    host = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d{1,5})", address)
    try:
        if host is not None:
            socket.create_connection((host[1], int(host[2])), _PATIENCE).close()
        ray = importlib.import_module("ray")
        # SIGTERM does what it did, which Ray would replace.
        with handling(signal.getsignal(signal.SIGTERM), (signal.SIGTERM,)):
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError, OverflowError) as error:
        raise JournalError(
            f"no Ray cluster answers at {address!r}: {error}; start one with `ray start --head`, "
            "or give its HOST:PORT"
        ) from error
    try:
        executor = RayExecutor(ray)
        if not executor.workers:
            raise JournalError(f"the Ray cluster at {address!r} has no core that is free for tasks")
        yield executor
    finally:
        ray.shutdown()
