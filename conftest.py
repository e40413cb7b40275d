"""How the tests run: the whole suite on every core, a few tests in this process."""

import os

import pytest
from hypothesis import settings

# Before torch is imported: workers must not take more threads than there are cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_MOST_WORKERS = 8
"""Each holds torch, transformers and a few small models: about 1 GB."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Count the processes of ``-n auto``: none where tests were picked by path."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)
