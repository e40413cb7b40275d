"""Print the table of attacks: ``python -m benchmarks.robustness``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import sys

from benchmarks.robustness.row import Row

MODULES = ("interruptions", "hostile")
"""Each has ``rows(*, seed, attempts)``."""


def table(rows: list[Row]) -> str:
    """Return rows as a table in Markdown."""
    heads = [field.name for field in dataclasses.fields(Row)]
    lines = [heads, ["---", *["---:"] * 5, "---"]]
    lines += [[str(value) for value in dataclasses.astuple(row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Attack, print, and say with the status whether anything held that should not have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, help="of each kind; by default what each says")
    options = parser.parse_args()
    rows = []
    for name in MODULES:
        module = f"benchmarks.robustness.{name}"
        if importlib.util.find_spec(module) is not None:
            rows += importlib.import_module(module).rows(**vars(options))
    print(table(rows))
    return int(any(row.tracebacks or row.silent_wrong or row.lost_data for row in rows))


if __name__ == "__main__":
    sys.exit(main())
