"""Several processes that work on one model, each on its share of the data: ranks, as of torchrun.

Every rank runs the same code, and meets the others before anything is exchanged: it tells rank 0
where it stands, or what has failed, and rank 0 answers whether all are at the same place and go on.
So no rank waits for another that will not come, and one that was killed is known by its closed
connection.  (Until all have come together, the launcher ends the others if one fails.)

A single process is the only rank, for which all methods do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from osscar.base.errors import NonFiniteError, OsscarError, RanksError, first_line
from osscar.base.printable import pluralize
from osscar.base.process import launched, neighbours

T = TypeVar("T")

_Failure: TypeAlias = str | NonFiniteError | None
"""What has ended a rank, in words, or has overflown on it."""

_Said: TypeAlias = tuple[str, _Failure, Any]
"""What one rank sends another: where it stands, what has failed if something has, and a value."""

_MEETING = timedelta(days=2)
"""Others may solve, or measure, for long; whoever is killed is known at once."""

_ADDING = timedelta(minutes=10)
"""All ranks begin to add up at the same time."""


class _OnAllRanks(NonFiniteError):
    """An overflow that all ranks have heard of."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen by one of them.

    All methods that exchange something take a `place`: what that is, in words, by which ranks know
    that they are at the same.  All raise `RanksError` if another rank has failed, was killed, or is
    elsewhere.
    """

    rank: int = 0
    """Which this is.  Rank 0 alone solves, decides, writes and prints."""
    size: int = 1
    """How many there are."""
    _meeting: Any = field(default=None, repr=False)
    """The process group whose members may wait for long."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def share(self, costs: Sequence[float]) -> list[int]:
        """Return which pieces of work are this rank's; the most costly go to whoever has least."""
        loads = [0.0] * self.size
        mine = []
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = min(range(self.size), key=loads.__getitem__)
            loads[rank] += costs[piece]
            if rank == self.rank:
                mine.append(piece)
        return sorted(mine)

    def all_reduce(self, place: str, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of the same shapes and number formats on all ranks, by their sums."""
        if self.alone:
            return
        forms = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        self._meet(f"{place} ({forms})")
        try:
            for tensor in tensors:
                dist.all_reduce(tensor)
        except RuntimeError as error:
            raise _lost("another rank", error) from error

    def broadcast(self, place: str, make: Callable[[], T]) -> T:
        """Return, on every rank, what rank 0 makes; `make` is called on rank 0 alone."""
        made: Any = make() if self.first else None
        found: T = made if self.alone else self._meet(place, made)[0]
        return found

    def all_gather(self, place: str, mine: T) -> list[T]:
        """Return, on every rank, what each has to tell, in the order of the ranks."""
        return [mine] if self.alone else self._meet(place, mine)

    @contextmanager
    def alike(self, place: str) -> Iterator[None]:
        """Let all ranks, which have to enter, leave a block by a `NonFiniteError` of one."""
        try:
            yield
            self.all_gather(place, None)
        except NonFiniteError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _OnAllRanks):
                cause = cause.__cause__
            if cause is None and not self.alone:  # the others are on their way to a meeting
                self._meet(place, failed=error)
            raise

    def _meet(self, place: str, mine: Any = None, failed: _Failure = None) -> list[Any]:
        """Let rank 0 hear all ranks and answer; return what each tells, tensors on the CPU."""
        if self.first:
            others = range(1, self.size)
            said = [(place, failed, mine), *map(self._receive, others)]
            failed = _failure(said)
            told = [] if failed else [value for _, _, value in said]
            for rank in others:
                self._send(rank, (place, failed, told))
        else:
            self._send(0, (place, failed, mine))
            _, failed, told = self._receive(0)
        if isinstance(failed, NonFiniteError):
            raise _OnAllRanks(str(failed))
        if failed:
            raise RanksError(failed)
        return told

    def report(self, error: Exception) -> None:
        """Tell rank 0, which has the last word, what has failed here, and wait for its end."""
        if self.first or isinstance(error, RanksError):
            return
        kind = "" if isinstance(error, OsscarError) else f"{type(error).__name__}: "
        with suppress(RanksError):
            self._send(0, ("a failure", f"{kind}{first_line(error)}", None))
            for _ in range(2):  # what all are told; then it says nothing any more
                self._receive(0)

    def _send(self, to: int, said: _Said) -> None:
        try:
            dist.send_object_list([said], to, self._meeting)
        except RuntimeError as error:
            raise _lost(f"rank {to}", error) from error

    def _receive(self, source: int) -> _Said:
        said: list[Any] = [None]
        try:
            dist.recv_object_list(said, source, self._meeting)
        except RuntimeError as error:
            raise _lost(f"rank {source}", error) from error
        found: _Said = said[0]
        return found


ALONE = Ranks()
"""A single process."""


def _failure(said: Sequence[_Said]) -> _Failure:
    """Return what has failed on a rank, or that not all are at the same place."""
    failures = [(rank, failed) for rank, (_, failed, _) in enumerate(said) if failed is not None]
    for rank, failed in failures:
        if isinstance(failed, str):
            return f"rank {rank}: {failed}"
    if failures:
        return failures[0][1]
    for rank, (there, _, _) in enumerate(said):
        if there != said[0][0]:
            return (
                f"rank {rank} is at {there!r} and rank 0 at {said[0][0]!r}: they do not run alike, "
                "perhaps as the model's code depends on the data or on chance"
            )
    return None


def _lost(who: str, error: RuntimeError) -> RanksError:
    return RanksError(
        f"{who} stopped without an error message (perhaps killed, as memory ran out), or cannot be "
        f"reached ({first_line(error):.120})"
    )


# ---- how they come together --------------------------------------------------------------


@contextmanager
def together() -> Iterator[Ranks]:
    """Join the other ranks of this launch while the block runs; a process by itself joins none.

    Each rank has a GPU of its own where the machine has as many. If the block fails on any, it
    fails on all, with that rank's message on rank 0. Ranks that do not come together are a
    RanksError.
    """
    rank, size = launched()
    if size == 1:
        yield ALONE
        return
    try:
        dist.init_process_group(_backends(), timeout=_ADDING)
        ranks = Ranks(rank, size, dist.new_group(backend="gloo", timeout=_MEETING))
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"rank {rank} cannot reach the {pluralize(size - 1, 'other')} at "
            f"{os.environ['MASTER_ADDR']}: {first_line(error)}; launch all with "
            "torchrun, on machines that see each other"
        ) from error
    # A rank comes out of new_group while others still ask rank 0's store who is there: if rank 0
    # failed now, they would say that they could not reach it.
    ranks.all_gather("the beginning", None)
    try:
        yield ranks
    except Exception as error:
        ranks.report(error)
        raise  # and stay connected until this process ends: the others wait for that
    dist.destroy_process_group()


def _backends() -> str:
    """Return how to add up, by the sort of device, and take this rank's GPU."""
    if not torch.cuda.is_available():
        return "gloo"
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    torch.cuda.set_device(local % count)
    shared = neighbours() > count  # which NCCL refuses
    return f"cpu:gloo,cuda:{'gloo' if shared else 'nccl'}"
