"""What a process does with memory that is freed, as the allocator of glibc tells it."""

import ctypes
import sys

import pytest
import torch

from osscar.base import process
from osscar.base.process import _glibc, give_back_at_once, memory_kept
from tests.osscar.forked import forked


class _Allocated(ctypes.Structure):
    """What `mallinfo2` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def from_the_system(megabytes):
    """Whether tensors of that size, a gigabyte in all, are blocks that the system gives."""
    [libc] = _glibc()
    libc.mallinfo2.restype = _Allocated
    before = libc.mallinfo2().hblks
    blocks = [torch.empty(megabytes << 20, dtype=torch.uint8) for _ in range(1024 // megabytes)]
    return libc.mallinfo2().hblks - before > len(blocks) // 2  # others fit in what was freed


def kept():
    with memory_kept():
        assert not from_the_system(64)


def at_once():
    give_back_at_once()
    kept()


@pytest.mark.skipif(
    not any(hasattr(one, "mallinfo2") for one in _glibc()), reason="needs glibc 2.33 or later"
)
@pytest.mark.parametrize(("timed", "given"), [(kept, [False, True]), (at_once, [True, True])])
def test_after_a_timing_blocks_are_kept_as_glibc_does_or_given_back_as_before(
    timed, given, tmp_path
):
    def run():
        process._large = 32 << 20  # whatever an earlier test has asked of this process
        timed()
        sys.exit([from_the_system(megabytes) for megabytes in (16, 64)] != given)

    child = forked(run, tmp_path)
    assert child.wait() == 0, child.stderr
