"""docs/coverage.csv, with a row for each model, and the table of families in docs/results.md."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.coverage.lists import LISTS
from benchmarks.measuring import markdown

COLUMNS = (
    *("list", "model", "class", "outcome", "parameters", "parameters_after", "groups", "prunable"),
    *("prunable_share", "form", "program", "difference", "precision", "seconds", "shrink_seconds"),
    *("torch_pruning_after", "torch_pruning_failure", "missing"),
)

_KINDS = (
    ("Image|Video|Segmentation|Depth|Detection", "images and video"),
    ("MaskedLM", "masked language models"),
    ("ConditionalGeneration|TextToText", "sequence to sequence"),
    ("CausalLM|LMHead|Decoder", "language models"),
    ("", "other"),
)
"""What a model of transformers does, by what its class's name contains."""

_HEAD = (
    *("family", "models", "traced", "every group halved", "some groups skipped"),
    *("nothing prunable", "failed", "proved", "compared", "Torch-Pruning runs"),
)
_OUTCOMES = ("whole", "some_left", "nothing", "failed")
_MARKS = ("<!-- coverage -->", "<!-- end of coverage -->")


def family(row: Mapping[str, Any]) -> str:
    """Return the row of the table that counts a model."""
    title = LISTS[row["list"]].title
    if row["list"] != "transformers":
        return title
    kinds = (kind for pattern, kind in _KINDS if re.search(pattern, row["class"]))
    return f"{title}: {next(kinds)}"


def put_table(text: str, sheet: str) -> str:
    """Return a page with the table of families, of a sheet as CSV, between its two marks."""
    rows = csv.DictReader(io.StringIO(sheet))
    before, _, rest = text.partition(_MARKS[0])
    end = rest.partition(_MARKS[1])[2]
    return "".join((before, _MARKS[0], "\n\n", *table(rows), _MARKS[1], end))


def table(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield a row for each family."""
    built = [row for row in rows if row["outcome"] != "not_built"]
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in built:
        families.setdefault(family(row), []).append(row)
    summed = [_summed(*one) for one in (*families.items(), ("**all**", built))]
    yield from (f"{line}\n" for line in markdown([_HEAD, *summed]))


def _summed(title: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[object]:
    outcomes = [row["outcome"] for row in rows]
    programs = [row["program"] for row in rows]
    after = sum(bool(row["torch_pruning_after"]) for row in rows)
    run = after + sum(bool(row["torch_pruning_failure"]) for row in rows)
    return (
        *(title, len(rows), len(rows) - outcomes.count("not_traced")),
        *map(outcomes.count, _OUTCOMES),
        *map(programs.count, ("proved", "compared")),
        f"{after} of {run}",
    )


def sheet(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a row for each model, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
