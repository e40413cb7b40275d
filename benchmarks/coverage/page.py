"""The table of families in docs/results.md, and docs/coverage.csv with a row for each model."""

from __future__ import annotations

import csv
import enum
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.coverage.lists import LISTS
from benchmarks.coverage.peer import Peer
from benchmarks.coverage.row import Row


class Outcome(enum.IntEnum):
    """What came of a model, worst first."""

    FAILED = 0
    NOT_TRACED = 1
    SOME_LEFT = 2
    NOTHING = 3
    WHOLE = 4


_KINDS = (
    ("Image|Video|Segmentation|Depth|Detection", "images and video"),
    ("MaskedLM", "masked language models"),
    ("ConditionalGeneration|TextToText", "sequence to sequence"),
    ("CausalLM|LMHead|Decoder", "language models"),
    ("", "other"),
)
"""What a model of transformers does, by what its class's name contains."""


@dataclass(frozen=True)
class Entry:
    """What was measured of one architecture.

    listed, name: The list and its name there.
    row: What OSSCAR makes of it; None if it was not built.
    peer: What Torch-Pruning makes of it; None if it was not run.
    not_built: Why there is no model.
    """

    listed: str
    name: str
    row: Row | None = None
    peer: Peer | None = None
    not_built: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Read what `dataclasses.asdict` has made."""
        row, peer = data["row"], data["peer"]
        return cls(
            data["listed"],
            data["name"],
            None if row is None else Row(**row),
            None if peer is None else Peer(**peer),
            data["not_built"],
        )

    @property
    def outcome(self) -> Outcome:
        """What came of it."""
        assert self.row is not None
        if not self.row.traced:
            return Outcome.NOT_TRACED
        if self.row.failure:
            return Outcome.FAILED
        if self.row.left:
            return Outcome.SOME_LEFT
        return Outcome.WHOLE if self.row.parameters_after is not None else Outcome.NOTHING

    @property
    def family(self) -> str:
        """The row of the table that counts the model."""
        title = LISTS[self.listed].title
        if self.listed != "transformers" or self.row is None:
            return title
        kinds = (kind for pattern, kind in _KINDS if re.search(pattern, self.row.variant))
        return f"{title}: {next(kinds)}"

    def brief(self) -> str:
        """Return a line for the terminal."""
        if self.row is None:
            return f"{self.listed} {self.name}: not built: {self.not_built}"
        row, other = self.row, self.peer or Peer()
        return (
            f"{self.listed} {self.name} ({row.variant}): {self.outcome.name} "
            f"{row.prunable}/{row.groups} {row.share:.0%} {row.form} {row.parameters_after} "
            f"{row.compared} {row.seconds:.0f}s {row.failure[:150]} {list(row.left)[:1]} | "
            f"{other.parameters_after} {other.failure[:80]} {other.seconds:.0f}s"
        )


_COLUMNS = (
    "family",
    *("models", "traced", "every group halved", "some groups skipped", "nothing prunable"),
    *("failed", "proved", "compared", "Torch-Pruning runs"),
)
_MARKS = ("<!-- coverage -->", "<!-- end of coverage -->")
_MOST_REASONS = 3
_LEAST_EFFECT = 1e-4
"""Of masking, as a share of the largest output."""


def put_table(text: str, entries: Iterable[Entry]) -> str:
    """Return a page with the table of families between its two marks.

    text: The page.
    entries: What was measured.
    """
    before, _, rest = text.partition(_MARKS[0])
    return "".join(
        (before, _MARKS[0], "\n\n", table(entries), _MARKS[1], rest.partition(_MARKS[1])[2])
    )


def table(entries: Iterable[Entry]) -> str:
    """Return a row for each family, and the names of the models that something is missing of."""
    built = [entry for entry in entries if entry.row]
    families: dict[str, list[Entry]] = {}
    for entry in built:
        families.setdefault(entry.family, []).append(entry)
    lines = [_line(_COLUMNS), _line(("---", *("---:" for _ in _COLUMNS[1:])))]
    lines += [_summed(*family) for family in (*families.items(), ("**all**", built))]
    for words, outcome in (
        ("Not traced", Outcome.NOT_TRACED),
        ("Failed", Outcome.FAILED),
        ("Some groups skipped", Outcome.SOME_LEFT),
    ):
        names = [f"`{entry.name}`" for entry in built if entry.outcome is outcome]
        lines += ["", f"{words}: {', '.join(names)}."] if names else []
    return "\n".join((*lines, ""))


def sheet(entries: Iterable[Entry]) -> str:
    """Return a row for each model, as CSV."""
    text = io.StringIO()
    rows = [_cells(entry) for entry in entries]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def models_by_list(file: Path) -> dict[str, set[str]]:
    """Return the names of the models in a CSV file, by list."""
    found: dict[str, set[str]] = {}
    with file.open(newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            found.setdefault(row["list"], set()).add(row["model"])
    return found


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _summed(title: str, entries: Sequence[Entry]) -> str:
    count = Counter(entry.outcome for entry in entries)
    rows = [entry.row for entry in entries if entry.row]
    peers = [entry.peer for entry in entries if entry.peer]
    return _line(
        (
            title,
            len(entries),
            sum(row.traced for row in rows),
            count[Outcome.WHOLE],
            count[Outcome.SOME_LEFT],
            count[Outcome.NOTHING],
            count[Outcome.FAILED],
            sum(row.proved is not None for row in rows),
            sum(bool(row.unproved) for row in rows),
            f"{sum(p.parameters_after is not None for p in peers)} of {len(peers)}",
        )
    )


def _cells(entry: Entry) -> dict[str, object]:
    row, peer = entry.row or Row(), entry.peer or Peer()
    program = "proved" if row.proved is not None else "compared" if row.unproved else ""
    return {
        "list": entry.listed,
        "model": entry.name,
        "class": row.variant,
        "outcome": entry.outcome.name.lower() if entry.row else "not_built",
        "parameters": row.parameters or "",
        "parameters_after": row.parameters_after or "",
        "groups": row.groups,
        "prunable": row.prunable,
        "prunable_share": f"{row.share:.4f}",
        "form": row.form,
        "program": program,
        "difference": "" if row.compared is None else f"{row.compared:.1e}",
        "precision": row.precision,
        "seconds": f"{row.seconds:.1f}",
        "shrink_seconds": f"{row.shrink_seconds:.1f}",
        "torch_pruning_after": peer.parameters_after or "",
        "torch_pruning_failure": " ".join(peer.failure.split())[:150],
        "missing": " ".join("; ".join(_missing(row)).split()) or entry.not_built,
    }


def _missing(row: Row) -> list[str]:
    idle = row.effect is not None and row.effect < _LEAST_EFFECT
    told = (
        (row.failure, row.failure),
        (row.unproved, f"compared, not proved: {row.unproved}"),
        (idle, "masking moves the outputs too little for the comparison to tell"),
        (row.left, f"skipped: {_times(row.left)}"),
        (row.unrefitted, f"not refitted by osscar.prune: {_times(row.unrefitted)}"),
        (row.frozen, _times(row.frozen)),
        (row.unread, f"not run in evaluation mode: {', '.join(row.unread)}"),
    )
    return [words for there, words in told if there]


def _times(reasons: Mapping[str, int]) -> str:
    most = sorted(reasons.items(), key=lambda item: -item[1])
    told = [f"{count} x {reason}" for reason, count in most[:_MOST_REASONS]]
    rest = sum(count for _, count in most[_MOST_REASONS:])
    return "; ".join([*told, *([f"{rest} more"] if rest else [])])
