"""The rows of an optimality-gap study: one solve each, as a file, a CSV line, and a command."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osscar.errors import StudyError

WINDOW = "window"
"""The kind of a problem that is a part of a larger one."""


@dataclass(frozen=True)
class Instance:
    """A problem file of a study.

    Parameters
    ----------
    name
        What the problem is called: the coupling group, with the window in brackets.
    kind
        Heads, neurons, channels, or `WINDOW`.
    file
        Where it lies, relative to the study's directory.
    units, width
        How many units there are, and the rows of the widest.
    """

    name: str
    kind: str
    file: str
    units: int
    width: int


@dataclass(frozen=True)
class Row:
    """One solve: what was asked, and what came back.

    Parameters
    ----------
    instance, kind, file, units, width
        As in `Instance`.
    keep, sparsity
        How many units stay, and the share to remove that this came from.
    backend, options
        Who solved it, and how.
    status
        Name of a `solvers.Status`; empty where there is no answer.
    loss, relative_loss
        Recomputed by `solvers.Solution.verify`; None where there is no answer.
    lower_bound, relative_bound, bound_from, gap
        What this solve proved; None where it proved nothing.
    iterations, seconds
        What the backend counts, and its wall time with the refit.
    support
        The units that stay.
    error
        Why there is no answer: what the backend cannot take, or what went wrong.
    """

    instance: str
    kind: str
    file: str
    units: int
    width: int
    keep: int
    sparsity: float
    backend: str
    options: dict[str, Any]
    status: str = ""
    loss: float | None = None
    relative_loss: float | None = None
    lower_bound: float | None = None
    relative_bound: float | None = None
    bound_from: str = ""
    gap: float | None = None
    iterations: int = 0
    seconds: float | None = None
    support: tuple[int, ...] = ()
    error: str = ""

    @property
    def command(self) -> str:
        """The command that solves it again, to be given in the study's directory."""
        options = "".join(f" --option {key}={value}" for key, value in self.options.items())
        return f"osscar solve {self.file} --keep {self.keep} --backend {self.backend}{options}"


def window_name(layer: str, keep: int, units: int, seed: int, index: int) -> str:
    """Return what a window is called: its layer, what the layer keeps, and which draw it is."""
    return f"{layer}[keep {keep}, {units} units, seed {seed}, window {index}]"


def window_layer(name: str) -> tuple[str, int]:
    """Return the layer that a window belongs to, and how many units that layer keeps.

    Raises
    ------
    StudyError
        If it is not the name of a window.
    """
    match = re.fullmatch(r"(.*)\[keep (\d+), .*\]", name)
    if match is None:
        raise StudyError(f"{name!r} is not the name of a window")
    return match[1], int(match[2])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line a row, with the command that solves it again; whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    names = [f.name for f in dataclasses.fields(Row)]
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "command"])
        for row in rows:
            values = dataclasses.asdict(row)
            values["support"] = " ".join(map(str, row.support))
            values["options"] = json.dumps(row.options)
            writer.writerow([*(values[name] for name in names), row.command])
    partial.replace(path)


def read_row(file: Path) -> Row:
    """Read one row.

    Raises
    ------
    StudyError
        If the file is not a row.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Row(**{**fields, "support": tuple(fields["support"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{file} is not a row of a study: {error}; delete it") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content`; the file appears whole or not at all.

    Raises
    ------
    StudyError
        If it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StudyError(f"cannot write {path}: {error.strerror}") from error
