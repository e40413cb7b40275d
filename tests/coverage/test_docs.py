"""The page that lists what is covered, and what it is made of."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from benchmarks.coverage.lists import LISTS
from benchmarks.coverage.page import Entry, Outcome, models_by_title, page
from benchmarks.coverage.peer import Peer
from benchmarks.coverage.row import Row
from tests.zoo import FAMILIES

_PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

_SOUND = Row(parameters=100, traced=True, groups=4, prunable=2, share=0.9, form="eager")
_ROWS = {
    "whole": dataclasses.replace(
        _SOUND, parameters_after=50, proved=12, compared=3e-16, seconds=1.0
    ),
    "low": dataclasses.replace(
        _SOUND, parameters_after=80, unproved="no program", compared=0.0, share=0.2
    ),
    "left": dataclasses.replace(_SOUND, parameters_after=70, compared=0.0, left={"a | b": 3}),
    "frozen": Row(parameters=100, traced=True, groups=4, frozen={"cause (`aten.x`)": 4}),
    "wrong": dataclasses.replace(_SOUND, parameters_after=50, compared=1.0, failure="it <differs>"),
    "untraced": Row(parameters=100, failure="TraceError: no"),
}


def _entries() -> list[Entry]:
    peers = {"whole": Peer(30), "low": Peer(failure="RuntimeError: no")}
    rows = [Entry("nets", name, row, peers.get(name, Peer())) for name, row in _ROWS.items()]
    return [*rows, Entry("nets", "absent", not_built="ValueError: no")]


def test_a_page() -> None:
    text = page(_entries(), {"nets": 9})
    named = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert named == ["wrong", "untraced", "left", "frozen", "low", "whole"]
    assert "- `absent`: ValueError: no" in text
    assert "a / b" in text
    assert "it &lt;differs>" in text
    assert "**compared, not proved**: no program" in text
    assert all(line.count("|") == 13 for line in text.splitlines() if line[:3] == "| `")
    (line,) = re.findall(r"^\| hand-written networks \| (.*) \|$", text, re.MULTILINE)
    assert line.split(" | ") == ["9", "6", "5", "2", "1", "1", "1", "1", "1", "1", "1 of 6"]
    for entry in _entries():
        assert Entry.from_json(json.loads(json.dumps(dataclasses.asdict(entry)))) == entry
    outcomes = {entry.name: entry.outcome for entry in _entries() if entry.row}
    assert outcomes == {
        "whole": Outcome.WHOLE,
        "low": Outcome.WHOLE,
        "left": Outcome.SOME_LEFT,
        "frozen": Outcome.NOTHING,
        "wrong": Outcome.FAILED,
        "untraced": Outcome.NOT_TRACED,
    }


def test_the_page_knows_the_architectures_of_the_tests() -> None:
    found = models_by_title(_PAGE.read_text())
    assert found["transformers, sizes chosen by hand"] == set(FAMILIES)
    assert found["hand-written networks"] <= set(LISTS["nets"].names(None))
