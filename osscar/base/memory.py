"""How much memory there is, how much of it a run has, and what is said where there is none left.

What counts is the memory of the process for a run on the CPU, else that of the card (`memory_of`).
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import solvers.errors
from osscar.base.errors import NoMemoryError, OptionError, first_line
from osscar.base.process import give_back, give_back_at_once, neighbours

_CGROUP = Path("/sys/fs/cgroup")


def in_words(size: int) -> str:
    """Return a size in words, rounded up, such as `parse_size` reads it."""
    if size < 10**6:
        return f"{size}B"  # to two digits of a GB it would be another one than was given
    return f"{-(-size // 10**7) / 100:.2f}GB"


def system_value(file: str, name: str) -> str | None:
    """Return the value of a name in a file such as ``/proc/meminfo``, or None if it has none."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def available_memory() -> int | None:
    """Return how many bytes this process may take, or None where the system does not tell."""
    free = system_value("/proc/meminfo", "MemAvailable")
    found = [] if free is None else [int(free.split()[0]) * 1024]
    for group, limit, usage in (
        (_CGROUP, "memory.max", "memory.current"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = (int((group / file).read_text()) for file in (limit, usage))
            # Of what files are cached, a group is given back as much as it needs.
            cached = re.findall(
                r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.M
            )
            found.append(max(0, most - used + sum(map(int, cached))))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found, default=None)


# ---- the memory of a device ---------------------------------------------------------------


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a limit is about: that of the process, for what runs on the CPU."""

    def resident(self) -> int:
        """Return how many bytes this process has (OptionError if nothing tells)."""
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:
            raise OptionError(
                "this system does not report the memory of a process, so it cannot be limited; "
                "omit max_memory (`--max-memory`)"
            ) from None

    def peak(self) -> int:
        """Return the most bytes it has had."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    def available(self) -> int | None:
        """Return this process's share of the free memory, or None where nothing tells."""
        found = available_memory()
        return None if found is None else found // neighbours()

    def excess(self, needed: int, ceiling: int) -> int:
        """Return by how many bytes so many more exceed a limit; below 0 if they fit."""
        return self.resident() + needed - ceiling

    def give_back(self) -> None:
        """Give memory that was freed back, where the allocator keeps it."""
        give_back()

    def give_back_at_once(self) -> None:
        """Have large tensors go back to the system whenever they are freed, from now on."""
        give_back_at_once()


@dataclass(frozen=True)
class _CardMemory(DeviceMemory):
    """What torch has reserved on a card, without the hundreds of MB that CUDA itself takes."""

    device: torch.device
    """With its number."""

    def resident(self) -> int:
        """Return how many bytes torch has reserved, without what it keeps for later."""
        self.give_back()
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        """Return the most that torch has reserved."""
        return torch.cuda.max_memory_reserved(self.device)

    def available(self) -> int | None:
        """Return its share of what is free on the card, with what it has reserved itself."""
        found = torch.cuda.memory_reserved(self.device) + self._free()
        return found // -(-neighbours() // max(1, torch.cuda.device_count()))

    def excess(self, needed: int, ceiling: int) -> int:
        """Return by how many bytes a limit, or what is free, would be exceeded."""
        if needed > self._room(ceiling):
            self.give_back()
        return needed - self._room(ceiling)

    def give_back(self) -> None:
        """Give back what torch keeps of what was freed."""
        torch.cuda.empty_cache()

    def give_back_at_once(self) -> None:
        """Do nothing: what torch keeps is given back before anything has to go."""

    def _room(self, ceiling: int) -> int:
        """Return how many bytes may be reserved yet: others may use the card, too."""
        return min(ceiling - torch.cuda.memory_reserved(self.device), self._free())

    def _free(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free


def memory_of(device: torch.device) -> DeviceMemory:
    """Return the memory that counts for what runs on a device."""
    if device.type == "cpu":
        return DeviceMemory()
    return _CardMemory(numbered(device))


def numbered(device: torch.device) -> torch.device:
    """Return a device as tensors name it that lie there: a card has a number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# ---- memory that is not there ------------------------------------------------------------

FOR_BATCHES = (
    "give smaller batches, shorter or fewer samples, a machine or a card with more memory, or "
    "max_memory (`--max-memory`), with which weights stay on disk (where they do already, a "
    "smaller one keeps fewer of them in memory)"
)
"""What helps where data run through a model."""

FOR_MODELS = (
    "free some, or take a machine or a card with more; of a language model that is pruned, weights "
    "stay on disk with max_memory (`--max-memory`)"
)
"""What helps where a model is read."""

FOR_MATRICES = (
    "fewer samples do not help: give device cpu (`--device cpu`) if that has more memory, "
    "max_memory (`--max-memory`), with "
    "which weights stay on disk, or skip the group (skip, `--skip`)"
)
"""What helps where a layer is measured and solved."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, NoMemoryError) or solvers.errors.is_shortage(error)


@dataclass
class Caught:
    """What `attempt` has caught."""

    error: Any = None
    """What the block has raised, if anything."""

    @property
    def failed(self) -> bool:
        """Whether the block has raised anything."""
        return self.error is not None


@contextmanager
def attempt(*passing: type[Exception]) -> Iterator[Caught]:
    """Catch whatever a block raises, which may be anyone's code; what follows it knows the error.

    A shortage of memory goes on, since the block is not at fault, and so do an interrupt and errors
    of the classes that are given.  An error holds on to the frames that it came through.
    """
    caught = Caught()
    try:
        yield caught
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of libraries in Rust
        ours = isinstance(error, Exception) or panic
        if not ours or isinstance(error, passing) or is_shortage(error):
            raise
        caught.error = error


def shortage(error: BaseException, what: str, advice: str) -> NoMemoryError:
    """Return the error that says what there was no memory for, and what helps."""
    return NoMemoryError(f"there is no memory for {what} ({first_line(error):.200}); {advice}")


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Say what there was no memory for in the block, and what helps, as a NoMemoryError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise shortage(error, what, advice) from error
