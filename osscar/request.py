"""What a pruning run is asked: one value, made by keywords, by the command line, by a report."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import solvers
from graph import UnitKind
from osscar.base.errors import OptionError, RequestError
from osscar.base.inputs import shown
from osscar.base.memory import parse_size
from osscar.walk.batch_norm import BatchNormMode
from osscar.walk.regularization import check_damp
from osscar.walk.targets import Target

PRUNED_KINDS = (UnitKind.HEADS, UnitKind.NEURONS, UnitKind.CHANNELS)
"""What a budget applies to, residual channels left out."""

_BUDGETS = ("sparsity", "params", "size", "flops", "speedup")

_NUMBER = re.compile(
    r"[+-]?(\d{1,18}/\d{1,18}|(\d{1,18}\.?\d{0,18}|\.\d{1,18})([eE][+-]?\d{1,3})?)"
)
_LARGEST_COUNT = 10**18
_LARGEST = sys.float_info.max


class Allocation(enum.StrEnum):
    """How a budget is shared out."""

    CURVATURE = "curvature"
    UNIFORM = "uniform"
    FLUCTUATION = "fluctuation"


class FormChoice(enum.StrEnum):
    """What of a model may be shrunk."""

    AUTO = "auto"
    """Its modules; where code cannot follow, its exported program if more follows there."""
    MODULE = "module"
    GRAPH = "graph"


_CHOICES: Mapping[str, type[enum.StrEnum]] = {
    "allocation": Allocation,
    "batch_norm": BatchNormMode,
    "form": FormChoice,
    "target": Target,
}

Keep: TypeAlias = str | int | float | Fraction
"""A count of units (an int, or a string such as ``"512"``) or the fraction of them to keep."""


@dataclass(frozen=True)
class Widths:
    """What widths a group may have.

    Parameters
    ----------
    round_to
        Its width, units times rows a unit, is a multiple of this.
    at_least
        How many of its units stay, or what share of them.
    """

    round_to: int = 1
    at_least: Fraction | int | None = None

    def least(self, units: int) -> int:
        """Return how many of so many units stay at least."""
        if self.at_least is None:
            return 1
        if isinstance(self.at_least, int):
            return min(self.at_least, units)
        return math.ceil(self.at_least * units)


@dataclass(frozen=True)
class PruningRequest:
    """What a user asks of a pruning run.

    Parameters
    ----------
    sparsity
        A budget: the share to remove, in (0, 1), of the parameters that heads, neurons and channels
        own.
    params
        Another budget: what to keep of the model's parameters, a fraction or a count.
    size
        Another one: what the weights of the model take on disk, as it is saved: a fraction of what
        those of the dense model would as modules, whatever the form, a size such as ``"200MB"``, or
        a number of bytes.
    flops
        Another one: the share to keep, in (0, 1), of its floating-point operations on one sample.
    speedup
        Another one: how many times as fast as the dense model, above 1, a forward pass of a
        calibration batch shall be; timed on this device, where nothing else should run meanwhile.
    allocation
        How a budget is shared out; another than ``curvature`` is refused where there is none.
        ``curvature`` chooses the widths with the least predicted divergence of the model's outputs;
        ``uniform`` keeps the same share of the units of every group, as the paper does, the largest
        within the budget; ``fluctuation`` keeps the units with the highest of FLAP's scores
        anywhere.
    heads, neurons, channels
        What to keep of each group of a kind, whatever the budget: a fraction such as ``"2/3"``, or
        a count.  A kind that neither this nor a budget reaches is left alone.
    residual
        What to keep of residual streams, such as the channels that shortcuts add up.  They run
        through many layers, and nothing else touches them.
    groups
        What to keep of single groups, by name; takes precedence over the others.
    round_to
        Kept width (units times rows a unit) is rounded to a multiple of this.
    at_least
        What every group that shares a budget keeps at least: a fraction of its units, or a count.
    skip
        Patterns, as of `fnmatch`, for the names of groups that are left alone whatever else is
        asked; each has to match one.
    backend, backend_options
        A registered name with its options, or a backend object.
    certify
        Add a lower bound to every layer's solution, so that its gap is known, and verify each
        solution from its problem alone; takes several times as long as the search.  Up to 32 units
        the bound comes from branch and bound, which may take 10 seconds a group.
    damp
        Weight of the proximal term, relative to each entry on the Gram matrix's diagonal; by
        default it is chosen for each layer by calibration samples that no weight is fitted to.
    target
        What a layer is to reproduce: ``weights``, what its dense weights make of the pruned inputs
        (the paper's); ``outputs``, what it puts out in the dense model; ``residual``, also what
        the residual stream, to which that is added, has lost.
    blend
        Share of what a target adds to that of ``weights``, in [0, 1]; by default it is chosen like
        `damp`.
    batch_norm
        Where running statistics come from afterwards: ``correct`` those of the dense model by what
        pruning changed, ``estimate`` them from the calibration data, or ``keep`` them.
    device
        ``auto``, ``cpu`` or ``cuda``: where the model runs and the solver computes.
    batch_size
        Samples that run through the model at once; by default 8 windows, or 64 of anything else.
    seed
        Of the random inputs of the equivalence proof.
    form
        What becomes smaller: ``module``, the model's own modules, whose code has to work with fewer
        units; ``graph``, its exported program, in which every size is known (see
        `osscar.ProgramModule`); ``auto``, the modules, and the program where more
        can follow there, unless the model can generate text or is timed for a speedup.
    strict
        Refuse a model in which a group that is to be pruned cannot follow, such as one whose size
        is written in the code around it; by default such groups are left alone, and named.

    Raises
    ------
    RequestError
        If nothing is to be removed, or what to keep makes no sense.
    OptionError
        If a number that steers the run is out of range, or of a wrong type.
    BackendError
        If the backend does not exist, cannot run here, or has no such option.

    Examples
    --------
    >>> PruningRequest(neurons="2/3").fraction_or_count(UnitKind.NEURONS)
    Fraction(2, 3)
    """

    sparsity: float | None = None
    params: Keep | None = None
    size: Keep | None = None
    flops: float | None = None
    speedup: float | None = None
    allocation: str = "curvature"
    heads: Keep | None = None
    neurons: Keep | None = None
    channels: Keep | None = None
    residual: Keep | None = None
    groups: Mapping[str, Keep] = field(default_factory=dict)
    round_to: int = 1
    at_least: Keep | None = None
    skip: Sequence[str] = ()
    backend: str | solvers.Backend = "local_search"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    certify: bool = False
    damp: float | None = None
    target: str = Target.RESIDUAL
    blend: float | None = None
    batch_norm: str = BatchNormMode.CORRECT
    device: str = "auto"
    batch_size: int | None = None
    seed: int = 0
    form: str = FormChoice.AUTO
    strict: bool = False

    def __post_init__(self) -> None:
        self._check_what_to_keep()
        self._check_names()
        self._check_numbers()
        self._check_form()
        self.chosen_backend()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in list(choices):
                raise OptionError(f"{name} is {shown(value)}; give one of {', '.join(choices)}")
            object.__setattr__(self, name, choices(value))
        if self.allocation != Allocation.CURVATURE and not self.has_budget:
            raise RequestError(
                f"allocation {self.allocation} says how a budget is shared out, and there is none; "
                "give one, such as --sparsity, or leave --allocation away"
            )

    def _check_what_to_keep(self) -> None:
        sparsity, round_to = self.sparsity, self.round_to
        if sparsity is not None and not (_is(sparsity, numbers.Real) and 0 < sparsity < 1):
            raise RequestError(
                f"sparsity is {shown(sparsity)}; give the share to remove, a number above 0 and "
                "below 1"
            )
        if not (_is(round_to, numbers.Integral) and round_to >= 1):
            raise RequestError(f"round-to is {shown(round_to)}; give a whole number from 1")
        if not isinstance(self.groups, Mapping):
            raise RequestError(
                f"groups is {shown(self.groups)}; give a mapping of names to what to keep, such as "
                "{'h.0.neurons': 0.5}"
            )
        flops = self.flops
        if flops is not None and not (_is(flops, numbers.Real) and 0 < flops < 1):
            raise RequestError(
                f"flops is {shown(flops)}; give the share to keep, a number above 0 and below 1"
            )
        speedup = self.speedup
        if speedup is not None and not (_is(speedup, numbers.Real) and 1 < speedup <= _LARGEST):
            raise RequestError(f"speedup is {shown(speedup)}; give a finite number above 1")
        budgets = [n for n in _BUDGETS if getattr(self, n) is not None]
        if len(budgets) > 1:
            raise RequestError(
                f"{' and '.join(budgets)} are budgets, of which a run has one; give one of them"
            )
        asked = [keep for keep in (*self._asked, self.params) if keep is not None]
        if not budgets and not asked and not self.groups:
            raise RequestError(
                "nothing to prune: give a budget (--sparsity, --params, --size, --flops or "
                "--speedup), or what to keep with --heads, --neurons, --channels or --residual"
            )
        for keep in (*asked, *self.groups.values()):
            parse_keep(keep)
        if self.size is not None:
            parse_size_kept(self.size)
        if self.at_least is not None:
            try:
                parse_keep(self.at_least)
            except RequestError as error:
                raise RequestError(f"at-least: {error}") from error
            if not budgets:
                raise RequestError(
                    f"at least {self.at_least} of each group stays within a budget, and there is "
                    "none; give one, such as --sparsity"
                )

    def _check_names(self) -> None:
        skip = self.skip
        if not isinstance(skip, list | tuple) or not all(isinstance(p, str) and p for p in skip):
            raise RequestError(
                f"skip is {shown(self.skip)}; give a list of patterns for names of groups, such as "
                "['h.0.*']"
            )
        if not all(isinstance(name, str) for name in self.groups):
            raise RequestError(f"groups is {shown(self.groups)}; its keys are names of groups")
        object.__setattr__(self, "skip", tuple(skip))

    def _check_numbers(self) -> None:
        size, damp, seed, blend = self.batch_size, self.damp, self.seed, self.blend
        if blend is not None and not (_is(blend, numbers.Real) and 0 <= blend <= 1):
            raise OptionError(f"blend is {shown(blend)}; give a share from 0 to 1")
        if size is not None and not (_is(size, numbers.Integral) and 1 <= size < 2**63):
            raise OptionError(f"batch size is {shown(size)}; give a whole number, at least 1")
        if damp is not None:
            check_damp(damp)
        if not (_is(seed, numbers.Integral) and 0 <= seed < 2**63):
            raise OptionError(f"seed is {shown(seed)}; give a whole number from 0 to 2^63 - 1")
        for name, kind in (
            ("sparsity", float),
            ("flops", float),
            ("speedup", float),
            ("damp", float),
            ("blend", float),
            ("round_to", int),
            ("batch_size", int),
            ("seed", int),
        ):  # of numpy, or fractions
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else kind(value))
        for name in ("certify", "strict"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise OptionError(f"{name} is {shown(value)}; give True or False")
        if not isinstance(self.device, str):
            object.__setattr__(self, "device", str(self.device))  # such as a torch.device

    @property
    def _asked(self) -> tuple[Keep | None, ...]:
        return self.heads, self.neurons, self.channels, self.residual

    def _check_form(self) -> None:
        if self.form == FormChoice.GRAPH and self.speedup is not None:
            raise RequestError(
                "a speedup is timed on modules, so that it does not go with form 'graph': give "
                "flops, params or sparsity as the budget"
            )

    def chosen_backend(self) -> solvers.Backend:
        """Return the backend with its options.

        Raises
        ------
        OptionError
            If it is neither a name nor a backend, or options come with an object.
        BackendError
            If there is none of that name, or it has no such option.
        """
        if not isinstance(self.backend_options, Mapping):
            raise OptionError(f"backend_options is {shown(self.backend_options)}; give a mapping")
        if isinstance(self.backend, str):
            return solvers.make_backend(self.backend, **dict(self.backend_options))
        if not _has_method(self.backend, "select"):
            raise OptionError(
                f"backend is {shown(self.backend)}; give a name, or an object that selects"
            )
        if self.backend_options:
            raise OptionError("backend_options go with a name; this backend object has its own")
        return self.backend

    @property
    def holds_out(self) -> bool:
        """Whether samples that no weight is fitted to choose what refits are held back by."""
        return self.damp is None or (self.blend is None and Target(self.target).needs_dense)

    def of_kind(self, kind: UnitKind) -> Keep | None:
        """Return what was asked for one kind by name."""
        named = {
            UnitKind.HEADS: self.heads,
            UnitKind.NEURONS: self.neurons,
            UnitKind.CHANNELS: self.channels,
        }
        return named.get(kind)

    @property
    def widths(self) -> Widths:
        """What widths groups that share a budget may have."""
        return Widths(self.round_to, None if self.at_least is None else parse_keep(self.at_least))

    @property
    def has_budget(self) -> bool:
        """Whether groups share a budget."""
        return any(getattr(self, name) is not None for name in _BUDGETS)

    @property
    def budget_in_words(self) -> str:
        """The budget as the command line has it."""
        return " ".join(
            f"--{n} {v:g}" if isinstance(v := getattr(self, n), float) else f"--{n} {v}"
            for n in _BUDGETS
            if getattr(self, n) is not None
        )

    def reach(self, kind: UnitKind) -> bool:
        """Tell whether groups of a kind may lose units."""
        budgeted = self.has_budget and kind in PRUNED_KINDS
        return bool(self.groups) or budgeted or self.fraction_or_count(kind) is not None

    def fraction_or_count(self, kind: UnitKind, residual: bool = False) -> Fraction | int | None:
        """Return what is asked of a kind by name: a fraction, a count, or None."""
        own = self.residual if residual else self.of_kind(kind)
        return None if own is None else parse_keep(own)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data.

        A backend object is named after its class, and cannot be made of that name again.
        """
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("params", "size", "at_least", "heads", "neurons", "channels", "residual"):
            data[name] = None if data[name] is None else str(data[name])
        data["groups"] = {name: str(keep) for name, keep in self.groups.items()}
        data["skip"] = list(self.skip)
        for name in _CHOICES:
            data[name] = str(data[name])
        if isinstance(self.backend, str):
            data["backend_options"] = dict(self.backend_options)
        else:
            data["backend"] = type(self.backend).__name__
            known = dataclasses.is_dataclass(self.backend)
            data["backend_options"] = (
                {k: repr(v) for k, v in vars(self.backend).items()} if known else {}
            )
        return data

    @classmethod
    def from_json(cls, data: object) -> PruningRequest:
        """Read what `to_json` returned, such as the settings of a saved report.

        Raises
        ------
        OptionError
            If it has other fields; or as the constructor does.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            odd = sorted(map(str, set(data) - known)) if isinstance(data, Mapping) else data
            raise OptionError(f"these are no settings of a pruning run: {odd!r}")
        return cls(**data)


def _has_method(value: object, name: str) -> bool:
    try:
        return callable(getattr(value, name, None))
    except Exception:  # anyone's code may run here
        return False


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def parse_keep(value: Keep) -> Fraction | int:
    """Read what to keep: ``"0.7"``, ``"2/3"`` and ``0.7`` are fractions, ``"512"`` and 512 counts.

    Raises
    ------
    RequestError
        If it is neither, or outside of what a fraction or a count can be.
    """
    unreadable = "as what to keep; give a fraction such as 0.7 or 2/3, or a count"
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise RequestError(f"cannot read {shown(value)} {unreadable}")
    if isinstance(value, numbers.Real) and not abs(value) < _LARGEST_COUNT:
        raise RequestError(f"cannot read {shown(value)} {unreadable} below {_LARGEST_COUNT:.0e}")
    text = str(value).strip()
    # Digits are counted before anyone computes with them: 1e-99999999 takes hours.
    if not isinstance(value, numbers.Real) and not _NUMBER.fullmatch(text):
        raise RequestError(f"cannot read {text[:60]!r} {unreadable}")
    if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise RequestError(f"cannot keep {text} units; keep at least 1")
        return int(text)
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"cannot read {text!r} {unreadable}") from None
    if not 0 < fraction <= 1:
        raise RequestError(f"cannot keep the fraction {text}; give one above 0 and at most 1")
    return fraction


def parse_size_kept(value: Keep) -> Fraction | int:
    """Read what weights may take: a fraction of the dense model's, or bytes, as in ``"200MB"``.

    Raises
    ------
    RequestError
        If it is neither.
    """
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        try:
            return parse_size(value)
        except OptionError as error:
            raise RequestError(
                f"cannot read {shown(value)} as a size; give one such as 200MB or 1.5GiB, or a "
                "fraction of the dense model's"
            ) from error
    return parse_keep(value)
