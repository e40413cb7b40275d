"""What all tests share: nothing is timed for long, and collecting garbage takes little."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def timed_briefly() -> Iterator[None]:
    """Take no more turns than are asked for: no test depends on how fast a machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osscar.core.timing.WORTHWHILE_SECONDS", 0.0)
        patch.setattr("osscar.evaluation.forward._SECONDS", 0.0)
        yield


def pytest_collection_finish() -> None:
    """Look no more through what was imported, which stays: hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
