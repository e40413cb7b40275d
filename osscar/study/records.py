"""What a study solves, and its records: one solve each, with the command that makes it again."""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeAlias

from annotated_types import Interval, MinLen
from pydantic import with_config

import solvers
from osscar.base.files import digest
from osscar.base.inputs import PERCENT, check_fields, count_from
from osscar.base.json_files import STRICT
from osscar.base.printable import command_line, decimals, percent
from osscar.preparation.journal import own_code
from osscar.report.shown import Column
from osscar.request import BOUND_ROUNDS, SHARE
from solvers import Status

WINDOW = "window"
"""The kind of a problem that is a part of a larger one."""

ROOT_BOUND = "perspective"
"""The backend that bounds problems of any size, and knows what such bounds cannot exceed."""

INCUMBENT = "local_search"
"""Whose answer the units outside a window are held at."""

_REFUTED = 1e-6
"""Share of a loss by which a bound has to lie above it to be wrong."""

Options: TypeAlias = Mapping[str, int | float | str | bool | None]


class ProofBasis(enum.StrEnum):
    """What a lower bound rests on."""

    NONE = ""
    RECOMPUTED = "recomputed"
    """It was computed from the problem and the certificate alone."""
    WORD = "the solver's word"
    """The solver leaves no certificate."""


@with_config(STRICT)
@dataclass(frozen=True)
class Instance:
    """A problem file of a study."""

    name: str
    """The coupling group, with the window in brackets."""
    kind: str
    """Heads, neurons, channels, or `WINDOW`."""
    file: str
    """Where it lies, relative to the study's directory."""
    units: int
    keep: int
    """How many units stay, as the problem itself says; all where it does not say."""
    width: int
    """The rows of the widest unit."""

    def asked(
        self, keep: int, sparsities: tuple[float, ...], backend: str, options: Options
    ) -> "Record":
        """Return the record of a solve, in which nothing is answered yet."""
        problem = (self.name, self.kind, self.file, self.units, self.width)
        files = own_code(backend)
        code = digest(json.dumps(files))[:16] if files else ""
        return Record(*problem, keep, sparsities, backend, options, code)


def _kept(record: Mapping[str, Any]) -> str:
    return f"{record['keep']} of {record['units']}"


_precise = partial(decimals, digits=6)


@with_config(STRICT)
@dataclass(frozen=True)
class Record:
    """One solve of a study: the problem, the solver and its solution.

    Parameters
    ----------
    instance, kind, file, units, width
        Of the problem: its name, the kind of its units, its file, how many units there are, and the
        rows of the widest.
    keep, sparsities
        How many units stay, and all shares to remove that come to this number; of three units, a
        half and two thirds both leave one.
    backend, options, code
        Who solved it, and how; of a backend of one's own, also a digest of its files.
    status, loss, ..., support, recomputed_bound
        As of a `solvers.SolutionRecord` that was verified; None or empty where there is no answer.
    error
        Why there is no answer: what the backend cannot take, or what went wrong.
    proof
        What `lower_bound` rests on.
    bound_limit
        What no bound of the kind of `lower_bound` can exceed, however long it is searched for; None
        where nothing is known.
    certificate
        The file of the study that proves the answer; empty where there is none.
    """

    instance: Annotated[str, Column("problem")]
    kind: str
    file: str
    units: int
    width: int
    keep: Annotated[int, Column("kept >", row=_kept)]
    sparsities: tuple[float, ...]
    backend: Annotated[str, Column("backend")]
    options: Options
    code: str = ""
    status: Annotated[str, Column("status", lambda name: name.lower().replace("_", " "))] = ""
    loss: float | None = None
    relative_loss: Annotated[float | None, Column("loss >", _precise)] = None
    lower_bound: float | None = None
    relative_bound: Annotated[float | None, Column("bound >", _precise)] = None
    bound_from: str = ""
    gap: Annotated[float | None, Column("gap >", percent)] = None
    bound_limit: float | None = None
    iterations: int = 0
    seconds: Annotated[float | None, Column("seconds >", "{:.3f}".format)] = None
    support: tuple[int, ...] = ()
    error: Annotated[str, Column("no answer, or bound, since")] = ""
    recomputed_bound: float | None = None
    proof: Annotated[ProofBasis, Column("bound is")] = ProofBasis.NONE
    certificate: str = ""

    @property
    def key(self) -> str:
        """What tells this solve from all others of a study."""
        options = sorted(self.options.items())
        return json.dumps((self.instance, self.keep, self.backend, options, self.code))

    @property
    def command(self) -> str:
        """The command that solves it again, to be given in the study's directory."""
        options = {
            "keep": self.keep,
            "backend": self.backend,
            "option": [
                f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, value in self.options.items()
            ],
            "device": "cpu",  # where studies solve, and where all backends can
        }
        return command_line("osscar", "solve", self.file, options=options)


def without_refuted(records: Sequence[Record]) -> list[Record]:
    """Return the records, without the bounds that lie above a loss that another one has.

    A bound without a certificate is its backend's word, which its own answer cannot refute.
    """
    least: dict[tuple[str, int], float] = {}
    for record in records:
        if record.loss is not None:
            posed = record.instance, record.keep
            least[posed] = min(record.loss, least.get(posed, record.loss))
    found = []
    for record in records:
        bound, loss = record.lower_bound, least.get((record.instance, record.keep))
        if bound is not None and loss is not None and bound > loss * (1 + _REFUTED):
            record = dataclasses.replace(
                record,
                lower_bound=None,
                relative_bound=None,
                recomputed_bound=None,
                gap=None,
                status=Status.FEASIBLE.name,
                proof=ProofBasis.NONE,
                error=f"its bound {bound:.9g} is wrong: a support of loss {loss:.9g} is known",
            )
        found.append(record)
    return found


def window_name(layer: str, keep: int, units: int, seed: int, index: int) -> str:
    """Return what a window is called: its layer, what the layer keeps, and which draw it is."""
    return f"{layer}[keep {keep}, {units} units, seed {seed}, window {index}]"


def window_layer(name: str) -> tuple[str, int]:
    """Return the layer that a window belongs to, and how many units that layer keeps."""
    layer, _, more = name.rpartition("[keep ")
    return layer, int(more.partition(",")[0])


HEURISTICS = ("magnitude", "wanda", "greedy", "multistage", "local_search")
SPARSITIES = (0.25, 0.5, 0.75)
DEFAULT_BACKENDS = (*HEURISTICS, "perspective", "branch_and_bound")

Sparsity: TypeAlias = Annotated[float, SHARE, PERCENT]


@dataclass(frozen=True)
class StudyDesign:
    """What a study solves.

    Parameters
    ----------
    sparsities
        Shares of the units to remove, each above 0 and below 1; None solves a problem that says how
        many units stay as it says, and others at `SPARSITIES`.
    backends
        Registered names, or ``file.py:Class`` of your own; those that prove optimality run only on
        problems of `exact_units` units or fewer.
    exact_units
        The most units of a problem that is given to an exact backend.
    window_units, windows
        Draw this many windows of that many units from every larger problem, at every sparsity;
        no windows if `window_units` is None.
    bound_rounds
        How long the `perspective` bound is searched for.
    time_limit, gap_tolerance
        Seconds for one exact solve, and the relative gap at which it may stop.
    seed
        Of the windows.

    Raises
    ------
    OptionError
        If a number makes no sense.
    BackendError
        If a backend does not exist.
    """

    sparsities: Annotated[tuple[Sparsity, ...], MinLen(1)] | None = None
    backends: Annotated[tuple[str, ...], MinLen(1)] = DEFAULT_BACKENDS
    exact_units: Annotated[int, count_from(1)] = 64
    window_units: Annotated[int | None, count_from(2)] = None
    windows: Annotated[int, count_from(1)] = 3
    bound_rounds: Annotated[int, count_from(0)] = BOUND_ROUNDS
    time_limit: Annotated[float, Interval(gt=0, le=1e9)] = 60.0
    gap_tolerance: Annotated[float, Interval(ge=0, lt=1)] = 1e-6
    seed: Annotated[int, count_from(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("sparsities", "backends"):
            values = getattr(self, name)
            object.__setattr__(self, name, values and tuple(dict.fromkeys(values)))
        for backend in self.backends:  # before anything is solved that the last one cannot
            solvers.make_backend(backend)

    def keeps(self, instance: Instance) -> dict[int, tuple[float, ...]]:
        """Return the numbers of units that stay, each with the sparsities that come to it.

        At least one unit stays, and at least one goes.
        """
        units, found = instance.units, dict[int, tuple[float, ...]]()
        if self.sparsities is None and instance.keep < units:
            return {instance.keep: (1 - instance.keep / units,)}
        for sparsity in self.sparsities or SPARSITIES:
            keep = max(1, min(units - 1, units - round(sparsity * units)))
            found[keep] = (*found.get(keep, ()), sparsity)
        return found
