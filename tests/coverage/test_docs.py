"""The table and the sheet of what is covered, and what they are made of."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

from benchmarks.coverage.lists import LISTS
from benchmarks.coverage.page import Entry, Outcome, models_by_list, put_table, sheet
from benchmarks.coverage.peer import Peer
from benchmarks.coverage.row import Row
from tests.zoo import FAMILIES

_SHEET = Path(__file__).parents[2] / "docs" / "coverage.csv"

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


def test_a_table_and_a_sheet() -> None:
    text = put_table("above\n<!-- coverage -->\nold\n<!-- end of coverage -->\nbelow\n", _entries())
    assert text.startswith("above\n")
    assert text.endswith("<!-- end of coverage -->\nbelow\n")
    assert "old" not in text
    (line,) = (one for one in text.splitlines() if one.startswith("| hand-written networks |"))
    assert line.split(" | ")[1:] == [*"652111", *"11", "1 of 6 |"]
    assert {"Not traced: `untraced`.", "Failed: `wrong`.", "Some groups skipped: `left`."} <= set(
        text.splitlines()
    )
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(sheet(_entries())))}
    assert rows["absent"]["missing"] == "ValueError: no"
    assert rows["left"]["missing"] == "skipped: 3 x a | b"
    assert rows["low"]["missing"] == "compared, not proved: no program"
    assert (rows["whole"]["parameters_after"], rows["whole"]["torch_pruning_after"]) == ("50", "30")
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


def test_the_sheet_knows_the_architectures_of_the_tests() -> None:
    found = models_by_list(_SHEET)
    assert found["families"] == set(FAMILIES)
    assert found["nets"] <= set(LISTS["nets"].names(None))
