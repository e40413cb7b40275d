"""What all tests share: which cases always run, and that nothing is timed for long."""

import gc
import os
import signal
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.sampling import sample, values_of

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each core has a process of pytest-xdist
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on what a hub has
gc.disable()  # until all is imported


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked ``sampled(n)``, mark all cases as slow but n, and those that are named.

    So are examples of a docstring that two functions share.
    """
    named = {argument.rpartition("::")[2] for argument in config.args}
    cases = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and item.get_closest_marker("slow") is None:
            cases[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    shown = set()
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            examples = tuple(example.source for example in item.dtest.examples)
            if examples in shown and item.name not in named:
                item.add_marker("slow")
            shown.add(examples)
    for (_, count), found in cases.items():
        always = sample([values_of(item) for item in found], count)
        for place, item in enumerate(found):
            if place not in always and item.name not in named:
                item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def timed_briefly() -> Iterator[None]:
    """Take as few turns as can be: no test depends on how fast a machine is."""
    from osscar.evaluation.evaluate import compare, evaluate  # not where no test runs

    with pytest.MonkeyPatch.context() as patch:
        for function in (evaluate, compare):
            patch.setitem(function.__kwdefaults__, "repetitions", 1)
            patch.setitem(function.__kwdefaults__, "new_tokens", 4)
        patch.setattr("osscar.evaluation.speed._REPETITIONS", 2)
        patch.setattr("osscar.base.timing.WORTHWHILE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_program() -> Iterator[None]:
    """Prove for inputs of one size alone, but in the tests that are about sizes."""
    from osscar.proof import structural

    def of_one_size(trace, example):
        closed = dict.fromkeys(example, range(0))
        return closed, trace(closed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structural, "other_sizes", lambda program, example: ())
        patch.setattr(structural, "traced_as_open", of_one_size)
        yield


@pytest.fixture(scope="session", autouse=True)
def forked_readers() -> Iterator[None]:
    """Fork the new processes in which checkpoints are read back."""
    from tests.fresh import forked  # not where others run the tests: it imports transformers

    with forked():
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Hear of Ctrl+C in the background, too, where a shell has jobs ignore it: tests send it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_finish() -> None:
    """Look no more through what was imported, which stays: hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
