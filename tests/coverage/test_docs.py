"""The page that lists what is covered, and what it is made of."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.coverage.lists import LISTS
from benchmarks.coverage.page import Entry, Outcome, models_by_title, page
from benchmarks.coverage.peer import Peer
from benchmarks.coverage.row import Row

from .zoo import FAMILIES

_PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

_SOUND = Row(parameters=100, traced=True, groups=4, prunable=2, share=0.9, form="module")
_ROWS = {
    "whole": dataclasses.replace(_SOUND, parameters_after=50, compared=3e-16, seconds=1.0),
    "low": dataclasses.replace(_SOUND, parameters_after=80, compared=0.0, share=0.2),
    "left": dataclasses.replace(_SOUND, parameters_after=70, compared=0.0, left={"a | b": 3}),
    "frozen": Row(parameters=100, traced=True, groups=4, frozen={"cause (`aten.x`)": 4}),
    "wrong": dataclasses.replace(_SOUND, parameters_after=50, compared=1.0, failure="it <differs>"),
    "untraced": Row(parameters=100, failure="TraceError: no"),
}


def _entries() -> list[Entry]:
    peers = {"whole": Peer(30), "low": Peer(failure="RuntimeError: no")}
    rows = [Entry("nets", name, row, peers.get(name, Peer())) for name, row in _ROWS.items()]
    return [*rows, Entry("nets", "absent", not_built="ValueError: no")]


def test_what_is_missing_comes_first() -> None:
    text = page(_entries(), {"nets": 9})
    named = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert named == ["wrong", "untraced", "left", "frozen", "low", "whole"]
    assert "- `absent`: ValueError: no" in text
    assert "a / b" in text
    assert "it &lt;differs>" in text
    assert all(line.count("|") == 11 for line in text.splitlines() if line[:3] == "| `")


def test_the_summary_counts_each_model_once() -> None:
    (line,) = re.findall(
        r"^\| hand-written networks \| (.*) \|$", page(_entries(), {"nets": 9}), re.MULTILINE
    )
    assert line.split(" | ") == ["9", "6", "5", "2", "1", "1", "1", "1", "1 of 6"]


def test_a_row_is_read_as_it_was_written() -> None:
    for entry in _entries():
        assert Entry.from_json(json.loads(json.dumps(dataclasses.asdict(entry)))) == entry


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("wrong", Outcome.FAILED),
        ("untraced", Outcome.NOT_TRACED),
        ("left", Outcome.SOME_LEFT),
        ("frozen", Outcome.NOTHING),
        ("whole", Outcome.WHOLE),
    ],
)
def test_outcomes(name: str, outcome: Outcome) -> None:
    assert Entry("nets", name, _ROWS[name]).outcome is outcome


def test_the_page_knows_every_architecture_of_the_tests() -> None:
    assert models_by_title(_PAGE.read_text())["transformers, sizes chosen by hand"] == set(FAMILIES)


def test_the_page_tells_of_no_network_that_is_gone() -> None:
    assert models_by_title(_PAGE.read_text())["hand-written networks"] <= set(
        LISTS["nets"].names(None)
    )
