"""How tests run: the whole suite on every core, a few tests in this process; in CI none skips."""

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

Report = pytest.TestReport | pytest.CollectReport

# Before torch is imported: workers must not take more threads than there are cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes is the machine's affair.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

MAY_SKIP_IN_CI = {
    "tests/docs/test_python.py::test_the_python_of_a_page_runs[docs/howto/yolo.md]": "ultralytics "
    "is AGPL-3.0, brings OpenCV, and takes over a minute; `pip install ultralytics` has it run",
}
"""Tests that are skipped where CI=true, and why; any other fails there."""


def _failed_if_skipped(report: Report) -> Report:
    if report.skipped and os.environ.get("CI") and report.nodeid not in MAY_SKIP_IN_CI:
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr}: MAY_SKIP_IN_CI in {__file__} gives no reason"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Report, Report]:
    """Fail in CI what is skipped without a reason that is listed."""
    return _failed_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Report, Report]:
    """Do so with a whole file."""
    return _failed_if_skipped((yield))


_MOST_WORKERS = 8
"""Each holds torch, transformers and a few small models: about 1 GB."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Count the processes of ``-n auto``: none where tests were picked by path."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)
