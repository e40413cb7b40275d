"""The sheet of what is covered, and the table on the page that is made of it."""

from __future__ import annotations

import csv
import io

from benchmarks.coverage.lists import LISTS, SHEET, known_rows
from benchmarks.coverage.page import put_table, sheet
from tests.zoo import FAMILIES

_NET = {"list": "nets", "class": "", "program": "", "torch_pruning_failure": "RuntimeError: no"}
_ROWS = [
    {**_NET, "model": "whole", "outcome": "whole", "program": "proved", "torch_pruning_after": 30},
    {**_NET, "model": "low", "outcome": "whole", "program": "compared"},
    {**_NET, "model": "left", "outcome": "some_left", "program": "proved", "missing": "3 x a | b"},
    {**_NET, "model": "frozen", "outcome": "nothing"},
    {**_NET, "model": "wrong", "outcome": "failed", "program": "proved"},
    {**_NET, "model": "untraced", "outcome": "not_traced", "torch_pruning_failure": ""},
    {"list": "nets", "model": "absent", "outcome": "not_built", "missing": "ValueError: no"},
]
_ROWS[0]["torch_pruning_failure"] = ""


def test_a_table_and_a_sheet() -> None:
    rows = list(csv.DictReader(io.StringIO(sheet(_ROWS))))
    assert [row["model"] for row in rows] == [row["model"] for row in _ROWS]
    assert rows[-1]["missing"] == "ValueError: no"
    text = put_table("above\n<!-- coverage -->\nold\n<!-- end of coverage -->\nbelow\n", rows)
    assert text.startswith("above\n<!-- coverage -->\n\n| family |")
    assert text.endswith("\n<!-- end of coverage -->\nbelow\n")
    assert "old" not in text
    (line,) = (one for one in text.splitlines() if one.startswith("| hand-written networks |"))
    assert line.split(" | ")[1:] == [*"65211131", "1 of 5 |"]
    told = {"Not traced: `untraced`.", "Failed: `wrong`.", "Some groups skipped: `left`."}
    assert told <= set(text.splitlines())


def test_the_page_has_the_table_of_the_sheet() -> None:
    page = SHEET.with_name("results.md").read_text(encoding="utf-8")
    assert put_table(page, known_rows()) == page


def test_the_sheet_knows_the_architectures_of_the_tests() -> None:
    found = {(row["list"], row["model"]) for row in known_rows()}
    assert {name for listed, name in found if listed == "families"} == set(FAMILIES)
    assert {name for listed, name in found if listed == "nets"} <= set(LISTS["nets"].names())
