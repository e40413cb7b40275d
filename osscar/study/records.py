"""The rows of an optimality-gap study: one solve each, as a file, a CSV line, and a command."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast

from osscar.core.errors import StudyError

T = TypeVar("T")

WINDOW = "window"
"""The kind of a problem that is a part of a larger one."""

PARTIAL = ".partial"
"""How the names of files end that are being written."""

_IN_JSON: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "dict[str, Any]": (dict,),
    "tuple[int, ...]": (list,),
    "tuple[float, ...]": (list,),
}
"""What the types of fields, as they are written below, are in a JSON file."""


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
    sha256
        Of the file, so that no other problem is ever taken for this one.
    """

    name: str
    kind: str
    file: str
    units: int
    width: int
    sha256: str


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
    sparsities
        All shares that come to this `keep`; of three units, a half and two thirds both leave one.
    recomputed_bound
        What `solvers.Solution.verify` recomputed from the certificate of `lower_bound`; None where
        there is none, so that the bound is the solver's word.
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
    sparsities: tuple[float, ...] = ()
    recomputed_bound: float | None = None

    @property
    def command(self) -> str:
        """The command that solves it again, to be given in the study's directory."""
        options = "".join(f" --option {key}={value}" for key, value in self.options.items())
        return (
            f"osscar solve {self.file} --keep {self.keep} --backend {self.backend}{options} "
            "--device cpu"  # where studies solve, and where all backends can
        )


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
    match = re.fullmatch(r"(.*)\[keep (\d+), .*\]", name, re.DOTALL)
    if match is None:
        raise StudyError(f"{name!r} is not the name of a window")
    return match[1], int(match[2])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line a row, with the command that solves it again; whole or not at all.

    Raises
    ------
    StudyError
        If it cannot be written.
    """
    names = [f.name for f in dataclasses.fields(Row)]
    try:
        with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "command"])
            for row in rows:
                values = dataclasses.asdict(row)
                values["support"] = " ".join(map(str, row.support))
                values["sparsities"] = " ".join(map(str, row.sparsities))
                values["options"] = json.dumps(row.options)
                writer.writerow([*(values[name] for name in names), row.command])
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror}") from error


def read_row(file: Path) -> Row:
    """Read one row.

    Raises
    ------
    StudyError
        If the file is not a row.
    """
    try:
        row = from_json(Row, read_json(file))
        if (row.loss is None) != bool(row.error):
            raise ValueError("it has neither a loss nor an error, or both")
        return row
    except (OSError, ValueError) as error:
        raise StudyError(f"{file} is not a row of a study: {error}; delete it") from error


def read_json(file: Path) -> Any:
    """Read what `write_json` wrote.

    Raises
    ------
    OSError, ValueError
        If the file cannot be read, is not JSON, or holds numbers that are not finite.
    """
    try:
        return json.loads(
            file.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def from_json(cls: type[T], entry: object) -> T:
    """Return an `Instance` or a `Row` from what was read of a file.

    Raises
    ------
    ValueError
        If it is not one: the message names the field.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(cast(Any, cls))}
    if not isinstance(entry, Mapping) or set(entry) != set(fields):
        raise ValueError(f"its fields are not {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        value = values[name] = entry[name]
        if not isinstance(value, _IN_JSON[kind]) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, list):
            item = _IN_JSON[kind.removeprefix("tuple[").removesuffix(", ...]")]
            if not all(isinstance(part, item) for part in value):
                raise ValueError(f"{name} is {value!r}")
            values[name] = tuple(value)
    return cls(**values)


def write_json(path: Path, content: Any) -> None:
    """Write `content`; the file appears whole or not at all.

    Raises
    ------
    StudyError
        If it cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to; once the block has ended, it becomes `path`.

    It bears the number of the process, so that two never write to the same.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
