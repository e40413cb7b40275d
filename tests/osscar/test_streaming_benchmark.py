"""What `benchmarks/streaming.py` times is found under the names that it lists."""

from __future__ import annotations

import importlib
from operator import attrgetter

import pytest

from benchmarks.streaming import PHASES


@pytest.mark.parametrize(("module", "name", "phase"), PHASES)
def test_what_is_timed_exists(module, name, phase):
    assert callable(attrgetter(name)(importlib.import_module(module)))
