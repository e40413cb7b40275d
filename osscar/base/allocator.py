"""What the allocator of glibc does with memory that is freed; with another one, nothing happens."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What `mallopt` calls how much free memory is kept, from which size on a block is taken from the
system by itself, and how many such blocks there may be."""

_TRIM_USUALLY, _MMAP_USUALLY = 64 << 20, 1 << 16


@cache
def _glibc() -> tuple[ctypes.CDLL, ...]:
    """Return the library of C where it is glibc, else nothing."""
    try:
        found = ctypes.CDLL("libc.so.6")
    except OSError:
        return ()
    return (found,) if hasattr(found, "malloc_trim") and hasattr(found, "mallopt") else ()


def give_back() -> None:
    """Give memory that was freed back to the system."""
    for libc in _glibc():
        libc.malloc_trim(0)


def give_back_at_once() -> None:
    """Have tensors of 1 MB or more go back to the system whenever they are freed, from now on."""
    for libc in _glibc():
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Keep all memory that is freed, as allocators for servers do, while something is timed.

    Else the system maps the memory of large tensors anew, and fills it with zeros, in one pass and
    not in the next: the same convolution then takes 3 or 10 ms.
    """
    for libc in _glibc():
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for libc in _glibc():
            libc.mallopt(_MMAP_MAX, _MMAP_USUALLY)
            libc.mallopt(_TRIM_THRESHOLD, _TRIM_USUALLY)
        give_back()
