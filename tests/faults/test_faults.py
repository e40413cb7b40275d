"""Faults that were planted in the source, room by room, are each found by the test named beside it.

A test that is the only one to find a fault stays.  `faults.txt` has them as changes of lines.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.planted import ROOT, Copy, Fault, read_faults

FAULTS = read_faults(Path(__file__).with_name("faults.txt").read_text(encoding="utf-8"))


def test_each_fault_changes_what_stands_once_in_the_source_and_its_test_is_there():
    for fault in FAULTS:
        source = (ROOT / fault.file).read_text(encoding="utf-8")
        assert source.count(fault.stands) == 1, fault
        ast.parse(fault.planted(source))
        file, _, name = fault.test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), fault


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    made = Copy(tmp_path_factory.mktemp("faults"))
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", FAULTS, ids=[f"{number}-{Path(one.file).stem}" for number, one in enumerate(FAULTS)]
)
def test_a_fault_is_found(fault: Fault, copy: Copy) -> None:
    with copy.planted(fault):
        status, said = copy.run(fault.test)
    assert status == 1, said  # else it was not found, or the test did not run
