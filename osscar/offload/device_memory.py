"""Where memory counts: in the process for what runs on the CPU, on the card for what runs there.

Whoever keeps to a limit of memory, or tells what a run takes, asks the memory of the device that
the run is on, and need not know which it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from osscar.base import memory
from osscar.base.errors import OptionError
from osscar.base.process import neighbours


@dataclass(frozen=True)
class DeviceMemory:
    """The memory that a limit is about: that of the process, for what runs on the CPU."""

    @property
    def other_holders(self) -> str:
        """What has memory there besides the run's weights, in words that follow "for"."""
        return "the program"

    def held(self) -> int:
        """Return how many bytes this process has, or raise an error where nobody tells."""
        return memory.resident_memory()

    def peak(self) -> int | None:
        """Return the most bytes it has had; None where the system does not tell."""
        return memory.peak_memory()

    def available(self) -> int | None:
        """Return how many bytes are there for this process, or None where the system does not tell.

        What is free is shared out among the processes of this launch that use the same memory.
        """
        found = memory.available_memory()
        return None if found is None else found // neighbours()

    def excess(self, needed: int, ceiling: int) -> int:
        """Return by how many bytes so many more exceed a limit; below 0 if they fit."""
        return self.held() + needed - ceiling

    def give_back(self) -> None:
        """Give memory that was freed back, where the allocator keeps it."""
        memory.give_back()

    def give_back_at_once(self) -> None:
        """Have what is freed go back from now on, as far as the allocator can."""
        memory.give_back_at_once()


@dataclass(frozen=True)
class _CardMemory(DeviceMemory):
    """That of a graphics card, as far as this process has reserved it.

    What CUDA itself takes for a process, some hundred MB, is not reserved by torch, nor counted.
    """

    device: torch.device
    """With its number."""

    @property
    def other_holders(self) -> str:
        """Buffers and batches, above all."""
        return "what is on the card already"

    def held(self) -> int:
        """Return how many bytes torch has reserved, without what it keeps for later."""
        self.give_back()
        return torch.cuda.memory_reserved(self.device)

    def peak(self) -> int | None:
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
    """Return the memory that counts for what runs on a device.

    Raises
    ------
    OptionError
        If nothing is known of such a device.
    """
    if device.type == "cpu":
        return DeviceMemory()
    if device.type == "cuda":
        return _CardMemory(numbered(device))
    raise OptionError(
        f"how much memory {str(device)!r} has is not known; give --device cpu or cuda, or omit "
        "--max-memory"
    )


def numbered(device: torch.device) -> torch.device:
    """Return a device as tensors name it that lie there: a card has a number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
