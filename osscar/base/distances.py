"""How far a model is from the dense one, as a request says it: by a name, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from osscar.base.errors import OptionError
from osscar.base.files import digest
from osscar.base.inputs import Read

NATS, RELATIVE = "nats", "relative"


@dataclass(frozen=True)
class OwnDistance:
    """A distance that the caller's code measures; `source` is its name, with its file's digest.

    The function is called with what the smaller model returns for a batch, what the dense one
    does, and the batch, a dict of tensors by argument name.  It returns one number a sample,
    (samples,), at least 0, and 0 where both return the same; it is differentiable in the first for
    a recovery.
    """

    function: Callable[..., Any] = field(repr=False)
    source: str

    @classmethod
    def of(cls, function: Callable[..., Any], name: str = "") -> OwnDistance:
        """Name a function, after its file if it has one."""
        known = name or getattr(function, "__qualname__", type(function).__name__)
        try:
            file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
            content = file.read_bytes()
        except (TypeError, OSError):  # built in, an object, or typed into a prompt
            return cls(function, known)
        source = f"{file.name}:{known.rpartition(':')[2]} (sha256 {digest(content)[:16]})"
        return cls(function, source)

    def __str__(self) -> str:
        return self.source


def read_distance(value: Any) -> Any:
    """Read ``"nats"``, ``"relative"``, ``"file.py:function"``, or a function."""
    if isinstance(value, OwnDistance) or (isinstance(value, str) and value in (NATS, RELATIVE)):
        return value
    function, name = value, ""
    if isinstance(value, str) and ":" in value:
        from solvers.own_code import importable, imported  # loads torch

        with importable(value):
            function, name = imported(value, OptionError), value
    if not callable(function):
        raise ValueError(
            "give 'nats', 'relative', file.py:function, or a function of (outputs, dense outputs, "
            "batch) that returns one number a sample"
        )
    return OwnDistance.of(function, name)


AnyDistance: TypeAlias = str | Callable[..., Any] | OwnDistance | None
"""What `read_distance` takes, or nothing."""

DistanceOption: TypeAlias = Annotated[AnyDistance, Read(read_distance)]
