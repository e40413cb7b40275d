"""How much memory there is, and how much of it this process has."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import solvers.errors
from osscar.base.errors import NoMemoryError, OptionError, first_line

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def in_words(size: int) -> str:
    """Return a size in words, rounded up, such as `parse_size` reads it."""
    if size < 10**6:
        return f"{size}B"  # to two digits of a GB it would be another one than was given
    return f"{-(-size // 10**7) / 100:.2f}GB"


def resident_memory() -> int:
    """Return how many bytes this process has in memory (OptionError if nothing tells)."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        raise OptionError(
            "this system does not tell how much memory a process has, so that no limit can be "
            "kept; omit --max-memory"
        ) from None


def peak_memory() -> int | None:
    """Return the most bytes this process has had in memory; None where the system does not tell."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def available_memory() -> int | None:
    """Return how many bytes this process may take, or None where the system does not tell."""
    found = []
    try:
        line = next(x for x in _MEMINFO.read_text().splitlines() if x.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError, StopIteration):
        pass
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


_MMAP_THRESHOLD = -3
"""What `mallopt` of glibc calls the size from which a block is taken from the system by itself."""


def give_back() -> None:
    """Give memory that was freed back to the system, where the allocator keeps it."""
    for libc in _glibc():
        libc.malloc_trim(0)


def give_back_at_once() -> None:
    """Let tensors of 1 MB or more go back to the system whenever they are freed, from now on.

    The allocator of glibc else learns to keep blocks of up to 32 MB: hidden states and weights of a
    layer, of which some hundred MB then lie between what is still in use.
    """
    for libc in _glibc():
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


@cache
def _glibc() -> tuple[ctypes.CDLL, ...]:
    """Return the library of C where it is glibc, else nothing."""
    try:
        found = ctypes.CDLL("libc.so.6")
    except OSError:
        return ()
    return (found,) if hasattr(found, "malloc_trim") and hasattr(found, "mallopt") else ()


# ---- memory that is not there ------------------------------------------------------------

_ON_DISK = "(where they do already, a smaller one keeps fewer of them in memory)"

FOR_BATCHES = (
    "give smaller batches, shorter or fewer samples, a machine or a card with more memory, or "
    f"`osscar prune --max-memory`, with which weights stay on disk {_ON_DISK}"
)
"""What helps where data run through a model."""

FOR_MODELS = (
    "free some, or take a machine or a card with more; `osscar prune --max-memory` and "
    "`osscar sweep --max-memory` prune a language model whose weights stay on disk"
)
"""What helps where a model is read."""

FOR_MATRICES = (
    "that depends on the layer alone: give --device cpu where that has more memory, --max-memory, "
    "with which weights stay on disk and need not be beside it, or leave the group alone (--skip)"
)
"""What helps where a layer is measured and solved."""

FOR_WEIGHTS = (
    "give a smaller --max-memory, so that fewer others are kept beside it, smaller batches "
    "(--batch-size), or --device cpu where that has more memory"
)
"""What helps where a weight is read that lies on disk."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, NoMemoryError) or solvers.errors.is_shortage(error)


def let_shortage_pass(error: BaseException) -> None:
    """Raise an error again that says so, which is no fault of the code that met it."""
    if is_shortage(error):
        raise error


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
