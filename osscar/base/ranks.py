"""Several processes that work on one model, each on its share of the data: ranks, as of torchrun.

Every rank runs the same code, and meets the others wherever something is added up or told.  To
meet is to say to rank 0 where one stands, or what has failed, and to hear from it whether all go
on: a rank that fails anywhere is heard of at the next meeting, and only ranks that are all at the
same place ever start to exchange anything.  None can wait for another that will not come; one that
was killed is known by its closed connection.  (Once all have come together: of one that ends
before, the launcher knows, which ends the others.)

What is exchanged is JSON and safetensors: nothing is pickled.  A single process is the only rank,
for which all of this does nothing, so that nobody has to ask.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from osscar.base.errors import OsscarError, RanksError, first_line
from osscar.base.json_files import parse_json
from osscar.base.launch import launched, neighbours
from osscar.base.printable import counted

T = TypeVar("T")

_MEETING = timedelta(days=2)
"""Others may solve, or measure, for long; whoever is killed is known at once."""

_ADDING = timedelta(minutes=10)
"""All ranks begin to add up at the same time."""


@dataclass(frozen=True)
class Message:
    """What a rank tells: words, and tensors by name."""

    text: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _Word:
    """The part of a message that is no tensor.

    Parameters
    ----------
    place
        Where in the code it is sent, by which ranks know that they are at the same.
    failed
        What has failed, if something has; nothing else counts then.
    text
        The words.
    """

    place: str
    failed: str | None = None
    text: str = ""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen by one of them.

    Parameters
    ----------
    rank
        Which this is, from 0.  Rank 0 alone solves, decides, writes and prints.
    size
        How many there are.
    """

    rank: int = 0
    size: int = 1
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
        """Return which of several pieces of work are this rank's, in ascending order.

        Parameters
        ----------
        costs
            Of each piece: the largest go first, each to the rank that has least to do.
        """
        loads = [0.0] * self.size
        mine = []
        for piece in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = min(range(self.size), key=loads.__getitem__)
            loads[rank] += costs[piece]
            if rank == self.rank:
                mine.append(piece)
        return sorted(mine)

    def add_up(self, place: str, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks.

        Parameters
        ----------
        place
            What they are, in words.
        tensors
            Of the same shapes and number formats on all ranks.

        Raises
        ------
        RanksError
            As all methods here do: if another rank has failed, was killed, or is elsewhere.
        """
        if self.alone:
            return
        forms = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        self._meet(f"{place} ({forms})", Message(), lambda _: Message())
        try:
            for tensor in tensors:
                dist.all_reduce(tensor)
        except RuntimeError as error:
            self._lost(None, error)

    def any(self, place: str, mine: bool) -> bool:
        """Tell whether it is so on any rank."""
        count = torch.tensor(float(mine))
        self.add_up(place, [count])
        return bool(count > 0)

    def from_first(self, place: str, make: Callable[[], Message]) -> Message:
        """Return, on every rank, what rank 0 makes.

        Parameters
        ----------
        place
            What it is, in words.
        make
            Called on rank 0 alone.
        """
        made = make() if self.first else Message()
        return made if self.alone else self._meet(place, Message(), lambda _: made)

    def from_all(self, place: str, mine: Message) -> list[Message]:
        """Return, on every rank, what each has to tell, in the order of the ranks."""
        if self.alone:
            return [mine]
        told = self._meet(place, mine, _joined)
        texts = parse_json(told.text, list[str], place)
        return [Message(text, _part(told.tensors, f"{i}/")) for i, text in enumerate(texts)]

    def decided(self, place: str, decide: Callable[[], T], schema: Any) -> T:
        """Return, on every rank, what rank 0 decides.

        Parameters
        ----------
        place
            What it is, in words.
        decide
            Called on rank 0 alone.
        schema
            Its type, of which JSON can be read.
        """
        made: list[T] = []

        def make() -> Message:
            made.append(decide())
            return Message("" if self.alone else _json(made[0]))

        told = self.from_first(place, make)
        return made[0] if made else parse_json(told.text, schema, place)

    # ---- meetings ------------------------------------------------------------------------

    def _meet(
        self, place: str, mine: Message, answer: Callable[[Sequence[Message]], Message]
    ) -> Message:
        """Let rank 0 hear all, and return what it answers."""
        if not self.first:
            self._send(0, _Word(place, text=mine.text), mine.tensors)
            return self._heard()
        brought = [mine]
        failed = None
        for rank in range(1, self.size):
            word, message = self._receive(rank)
            brought.append(message)
            failed = failed or _failure(rank, word, place)
        told = Message() if failed else answer(brought)
        for rank in range(1, self.size):
            self._send(rank, _Word(place, failed, told.text), told.tensors)
        if failed:
            raise RanksError(failed)
        return told

    def _heard(self) -> Message:
        word, message = self._receive(0)
        if word.failed is not None:
            raise RanksError(word.failed)
        return message

    def report(self, error: Exception) -> None:
        """Tell rank 0 what has failed here, and wait until it has ended.

        It has the last word: a launcher that sees a process fail ends all others at once.  Where
        rank 0 fails itself, the others know by its closed connection.
        """
        if self.first or isinstance(error, RanksError):
            return
        kind = "" if isinstance(error, OsscarError) else f"{type(error).__name__}: "
        try:
            self._send(0, _Word("a failure", failed=f"{kind}{first_line(error)}"), {})
            for _ in range(2):  # what all are told; then it says nothing any more
                self._receive(0)
        except RanksError:
            return

    def _send(self, to: int, word: _Word, tensors: Mapping[str, Tensor]) -> None:
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        parts = [_json(word).encode(), safetensors.torch.save(plain) if plain else b""]
        try:
            dist.send(torch.tensor([len(part) for part in parts]), to, group=self._meeting)
            for part in filter(None, parts):
                dist.send(torch.frombuffer(bytearray(part), dtype=torch.uint8), to, self._meeting)
        except RuntimeError as error:
            self._lost(to, error)

    def _receive(self, source: int) -> tuple[_Word, Message]:
        lengths = torch.zeros(2, dtype=torch.int64)
        try:
            dist.recv(lengths, source, group=self._meeting)
            parts = [torch.empty(int(length), dtype=torch.uint8) for length in lengths]
            for part in parts:
                if len(part):
                    dist.recv(part, source, group=self._meeting)
        except RuntimeError as error:
            self._lost(source, error)
        text, data = (part.numpy().tobytes() for part in parts)
        word: _Word = parse_json(text.decode(), _Word, f"what rank {source} says")
        return word, Message(word.text, safetensors.torch.load(data) if data else {})

    def _lost(self, rank: int | None, error: RuntimeError) -> NoReturn:
        who = "another rank" if rank is None else f"rank {rank}"
        raise RanksError(
            f"{who} has ended without a word, perhaps killed for want of memory, or cannot be "
            f"reached ({first_line(error):.120})"
        ) from error


ALONE = Ranks()
"""A single process."""


def _json(value: Any) -> str:
    return json.dumps(value, default=dataclasses.asdict, allow_nan=False)


def _failure(rank: int, word: _Word, place: str) -> str | None:
    if word.failed is not None:
        return f"rank {rank}: {word.failed}"
    if word.place != place:
        return (
            f"rank {rank} is at {word.place!r} and rank 0 at {place!r}: they do not run alike, "
            "perhaps as the model's code depends on the data or on chance"
        )
    return None


def _joined(messages: Sequence[Message]) -> Message:
    return Message(
        json.dumps([message.text for message in messages]),
        {f"{i}/{name}": x for i, m in enumerate(messages) for name, x in m.tensors.items()},
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


# ---- how they come together --------------------------------------------------------------


@contextmanager
def together() -> Iterator[Ranks]:
    """Join the other ranks of this launch while the block runs; a process by itself joins none.

    Each rank has a GPU of its own where the machine has as many.  If the block fails on any, it
    fails on all, with that rank's message on rank 0.

    Raises
    ------
    RanksError
        If they do not come together, or another of them fails.
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
            f"rank {rank} cannot reach the {counted(size - 1, 'other')} at "
            f"{os.environ['MASTER_ADDR']}: {first_line(error)}; launch all with "
            "torchrun, on machines that see each other"
        ) from error
    # A rank comes out of new_group while others still ask rank 0's store who is there: if rank 0
    # failed now, they would say that they could not reach it.
    ranks.from_first("the beginning", Message)
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
