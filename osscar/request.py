"""What a pruning run is asked: one declaration, of which all else is made.

The fields of `PruningRequest`, with their types, ranges, choices and docstring, are the keywords of
`osscar.prune` and `osscar.estimate`, the options of the command line, and the settings of reports.
"""

import dataclasses
import difflib
import enum
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_origin,
    overload,
)

import lazy_loader

from osscar.base.errors import OptionError, OsscarError, RequestError
from osscar.base.inputs import parse_size, safe_repr

if TYPE_CHECKING:
    from torch import nn

    import solvers
    from graph import UnitKind
else:  # the command line reads this module before it loads torch
    solvers = lazy_loader.load("solvers")

P = ParamSpec("P")
R = TypeVar("R")
Q = TypeVar("Q")
R_co = TypeVar("R_co", covariant=True)

PRUNED_KINDS = ("heads", "neurons", "channels")
"""What a budget applies to, residual channels left out."""

AUTO = "auto"
"""Of experts: that a budget applies to them, too."""

BOUND_ROUNDS = 8
"""What `solvers.solve` takes by default as well; said here, where nothing has loaded torch."""

_BESIDE = (*PRUNED_KINDS, "residual", "groups")
"""What may be removed beside experts, a budget aside."""

_NUMBER = re.compile(
    r"[+-]?(\d{1,18}/\d{1,18}|(\d{1,18}\.?\d{0,18}|\.\d{1,18})([eE][+-]?\d{1,3})?)"
)
_LARGEST_COUNT = 10**18
_LARGEST = sys.float_info.max
_LARGEST_DAMP = 1e9
"""Refits are the dense weights to nine digits then, as FLAP leaves them; far beyond it products
overflow."""

Keep: TypeAlias = str | int | float | Fraction
"""A count of units (an int, or a string such as ``"512"``) or the fraction of them to keep."""

Allocation: TypeAlias = Literal["measured", "uniform"]
"""How a budget is shared out."""

METHODS = MappingProxyType(
    {
        "measured": "widths of least divergence, measured group by group; layers make up for one "
        "another's errors",
        "uniform": "the same share of every group, the largest within the budget; "
        "layers make up for one another's errors",
    }
)
"""What the request itself may be called, by how it shares a budget; all others are baselines."""

BASELINES = MappingProxyType(
    {
        "multistage": "the choice of OSSCAR (Meng et al., 2024)",
        "greedy": "the choice of ZipLM (Kurtic et al., 2023)",
        "wanda": "magnitude times the norm of the inputs (Sun et al., 2023)",
        "magnitude": "the norm of the weights",
    }
)
"""Backends with which uniform shares are pruned, each layer by itself, and what they stand for.

All are refitted in the same way, biases too, on the paper's target.
"""


class BudgetKind(enum.StrEnum):
    """What a run may be given as a budget: the name of the field."""

    SPARSITY = "sparsity"
    PARAMS = "params"
    SIZE = "size"
    FLOPS = "flops"
    SPEEDUP = "speedup"

    @property
    def examples(self) -> str:
        """A list of it, for messages."""
        return "1.2,1.5,2" if self is BudgetKind.SPEEDUP else "0.3,0.5,0.7"

    @property
    def dense(self) -> float:
        """Where the dense model lies on it."""
        return 0.0 if self is BudgetKind.SPARSITY else 1.0

    @property
    def rises(self) -> bool:
        """Whether more of it is a smaller model."""
        return self in (BudgetKind.SPARSITY, BudgetKind.SPEEDUP)


@dataclass(frozen=True)
class Widths:
    """What widths a group may have."""

    round_to: int = 1
    """Its width, units times rows a unit, is a multiple of this."""
    at_least: Fraction | int | None = None
    """How many of its units stay, or what share of them."""

    def least(self, units: int) -> int:
        """Return how many of so many units stay at least."""
        if self.at_least is None:
            return 1
        if isinstance(self.at_least, int):
            return min(self.at_least, units)
        return math.ceil(self.at_least * units)


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes, beside its type: stands in its annotation."""

    kind: type[float] | type[int]
    """What they are made: of numpy, or fractions, there are others."""
    takes: Callable[[Any], bool]
    """Whether one is within the range; NaN is in none."""
    advice: str
    """What to give instead."""
    error: type[OsscarError] = OptionError

    def __call__(self, name: str, value: Any) -> Any:
        """Return a value of the field; refuse what is out of range, or no number."""
        number = numbers.Integral if self.kind is int else numbers.Real
        if not (isinstance(value, number) and not isinstance(value, bool) and self.takes(value)):
            raise self.error(f"{name.replace('_', '-')} is {safe_repr(value)}; give {self.advice}")
        return self.kind(value)  # type: ignore[call-overload]


def count_from(least: int, error: type[OsscarError] = OptionError) -> Range:
    """Return the range of whole numbers that tensors can hold, from one on."""
    advice = f"a whole number from {least}, below 2^63"
    return Range(int, lambda count: least <= count < 2**63, advice, error)


def _share(verb: str) -> Range:
    advice = f"the share to {verb}, a number above 0 and below 1"
    return Range(float, lambda share: 0 < share < 1, advice, RequestError)


_DAMP = Range(
    float,
    lambda damp: 0 <= damp <= _LARGEST_DAMP,
    f"a number from 0 to {_LARGEST_DAMP:g}, such as 0.01 or 1",
)


def check_damp(damp: Any) -> None:
    """Refuse a damping that no refit can have, as `PruningRequest` does."""
    _DAMP("damp", damp)


def _keep(name: str, value: Any) -> Any:
    """Read what to keep, as `parse_keep` does, or a size."""
    if name == "experts" and value == AUTO:
        return value
    try:
        (parse_size_kept if name == "size" else parse_keep)(value)
    except RequestError as error:
        if name != "at_least":
            raise
        raise RequestError(f"at-least: {error}") from error
    return value


def _groups(name: str, value: Any) -> Any:
    """Read what to keep of groups by name."""
    if not isinstance(value, Mapping):
        raise RequestError(
            f"groups is {safe_repr(value)}; give a mapping of names to what to keep, such as "
            "{'h.0.neurons': 0.5}"
        )
    if not all(isinstance(group, str) for group in value):
        raise RequestError(f"groups is {safe_repr(value)}; its keys are names of groups")
    for keep in value.values():
        parse_keep(keep)
    return value


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """Read patterns for the names of groups."""
    if not isinstance(value, list | tuple) or not all(isinstance(p, str) and p for p in value):
        raise RequestError(
            f"skip is {safe_repr(value)}; give a list of patterns for names of groups, such as "
            "['h.0.*']"
        )
    return tuple(value)


def _mapping(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {safe_repr(value)}; give a mapping")
    return value


def as_text(name: str, value: Any) -> str:
    """Return what a field of text is given as text."""
    return str(value)  # such as a torch.device


def checked(request: Any) -> None:
    """Make each field of a dataclass what its annotation says, or refuse its value.

    An annotation has a function of name and value, such as a `Range`, or is a `Literal`.
    """
    for one in dataclasses.fields(request):
        value = getattr(request, one.name)
        if value is not None or one.default is not None:
            object.__setattr__(request, one.name, _read(one.type, one.name, value))


def _read(taken: Any, name: str, value: Any) -> Any:
    if get_origin(taken) is Annotated:
        read: Callable[[str, Any], Any] = get_args(taken)[1]
        return read(name, value)
    if get_origin(taken) is Literal:
        if not (isinstance(value, str) and value in get_args(taken)):
            choices = ", ".join(get_args(taken))
            raise OptionError(f"{name} is {safe_repr(value)}; give one of {choices}")
        return str(value)
    if taken is bool and not isinstance(value, bool):
        raise OptionError(f"{name} is {safe_repr(value)}; give True or False")
    return value


KeepOption: TypeAlias = Annotated[Keep | None, _keep]
"""What to keep, or None."""


@dataclass(frozen=True, kw_only=True)
class PruningRequest:
    """What a user asks of a pruning run.

    Parameters
    ----------
    sparsity
        Budget: the share to *remove*, in (0, 1), of the parameters that heads, neurons and channels
        own.
    params
        Budget: what to *keep* of the model's parameters, a fraction or a count.
    size
        Budget: what to *keep* of the bytes that the weights take on disk: a fraction, a size such
        as ``"200MB"``, or a number of bytes.  A fraction is of the dense model saved as modules,
        whatever the form.
    flops
        Budget: the share to *keep*, in (0, 1), of its floating-point operations on one sample.
    speedup
        Budget: the speed of a forward pass of one calibration batch, as a multiple of the dense
        model's, above 1.  It is timed on this device, where nothing else should run meanwhile.
    allocation
        How a budget is shared out.  ``measured`` prunes one group at a time, measures how far the
        model's outputs move, and chooses the widths of least predicted distance.  ``uniform`` keeps
        the same share of every group, the largest that the budget allows, as the paper does.
    heads, neurons, channels
        What every group of this kind *keeps*, whatever the budget: a fraction such as ``"2/3"``, or
        a count.  Without this and without a budget, groups of the kind keep all their units.
    residual
        What residual streams *keep*, such as the channels that shortcuts add up.  They run through
        many layers, and no other option removes any of them.
    experts
        What to *keep* of the experts of each mixture: a fraction, a count, or ``auto``, which lets
        experts share a budget of parameters or bytes.  Tokens are routed among the experts that
        stay; units of other kinds are removed after the experts.
    groups
        What to keep of single groups, by name; takes precedence over the others.
    round_to
        Each kept width (units times rows per unit) is rounded to a multiple of this.
    at_least
        What every group that shares a budget keeps at least: a fraction of its units, or a count.
    skip
        Names of groups that keep all their units, or patterns of `fnmatch` such as ``h.0.*``; each
        has to match a group.
    backend, backend_options
        A registered name, or ``file.py:Class`` of your own, with its options; or a backend object.
        Of experts, one that takes a `solvers.ExpertProblem`.
    certify
        Add a lower bound to every layer's solution, so that its gap is known, and verify each
        solution from its problem alone; takes several times as long as the search.  Up to 32 units
        the bound comes from branch and bound, which may take 10 seconds a group.
    bound_rounds
        With `certify`: rounds of the search for the bound of a larger group.  More rounds usually
        give a better bound, and never a worse one than no rounds; each takes about a third of the
        time of the bound without rounds.
    damp
        How strongly weights are pulled towards the dense ones: the weight of the proximal term,
        relative to each diagonal entry of the Gram matrix.  By default held-out calibration samples
        choose it for each layer.
    target
        What a layer is fitted to.  ``weights``: the output of its dense weights on the pruned
        inputs, as in the paper.  ``residual``: its output in the dense model, plus what earlier
        layers have lost of the residual stream that this output is added to.
    correction_weight
        Share, in [0, 1], of what the target ``residual`` adds to the target ``weights``.  By
        default held-out calibration samples choose it for each layer.
    batch_norm
        ``correct`` moves the dense model's running statistics by what pruning has changed; ``keep``
        leaves them as they are.
    device
        ``auto``, ``cpu`` or ``cuda``: where the model runs and the solver computes.
    batch_size
        Samples that run through the model at once; by default 8 windows, or 64 of anything else.
    seed
        Random seed for the inputs on which outputs of the smaller model are compared.
    form
        What becomes smaller: ``eager``, the model's own modules, whose code has to work with fewer
        units; ``exported``, its exported program, in which every size is known (see
        `osscar.ProgramModule`); ``auto``, the modules, and the program where more
        can follow there and some of that leaves, unless the model can generate text or is timed for
        a speedup.
    strict
        Refuse a model in which a group that is to be pruned cannot follow, such as one whose size
        is written in the code around it; by default such groups are skipped, and named.

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
    >>> from graph import UnitKind
    >>> PruningRequest(neurons="2/3").fraction_or_count(UnitKind.NEURONS)
    Fraction(2, 3)
    """

    sparsity: Annotated[float | None, _share("remove")] = None
    params: KeepOption = None
    size: KeepOption = None
    flops: Annotated[float | None, _share("keep")] = None
    speedup: Annotated[
        float | None,
        Range(float, lambda ratio: 1 < ratio <= _LARGEST, "a finite number above 1", RequestError),
    ] = None
    allocation: Allocation = "measured"
    heads: KeepOption = None
    neurons: KeepOption = None
    channels: KeepOption = None
    residual: KeepOption = None
    experts: KeepOption = None
    groups: Annotated[Mapping[str, Keep], _groups] = field(default_factory=dict)
    round_to: Annotated[int, count_from(1, RequestError)] = 1
    at_least: KeepOption = None
    skip: Annotated[Sequence[str], _patterns] = ()
    backend: "str | solvers.Backend | solvers.ExpertBackend" = "local_search"
    backend_options: Annotated[Mapping[str, Any], _mapping] = field(default_factory=dict)
    certify: bool = False
    bound_rounds: Annotated[int, count_from(0)] = BOUND_ROUNDS
    damp: Annotated[float | None, _DAMP] = None
    target: Literal["weights", "residual"] = "residual"
    correction_weight: Annotated[
        float | None, Range(float, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    ] = None
    batch_norm: Literal["correct", "keep"] = "correct"
    device: Annotated[str, as_text] = "auto"
    batch_size: Annotated[int | None, count_from(1)] = None
    seed: Annotated[int, count_from(0)] = 0
    form: Literal["auto", "eager", "exported"] = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        checked(self)
        self._check_what_to_keep()
        if not self.experts_alone:
            self.chosen_backend()
        if self.experts is not None:
            self.chosen_expert_backend()

    def _check_what_to_keep(self) -> None:
        """Refuse what each field may say, but not beside the others."""
        budgets = [name for name in BudgetKind if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise RequestError(
                f"{' and '.join(budgets)} are budgets, of which a run has one; give one of them"
            )
        named = (self.heads, self.neurons, self.channels, self.residual, self.experts)
        if self.experts is not None:
            self._check_experts()
        if not budgets and not self.groups and all(keep is None for keep in named):
            raise RequestError(
                "nothing to prune: give a budget (--sparsity, --params, --size, --flops or "
                "--speedup), or what to keep with --heads, --neurons, --channels, --residual or "
                "--experts"
            )
        if self.at_least is not None and not budgets:
            raise RequestError(
                f"at-least is {self.at_least}, which is for groups that share a budget, and no "
                "budget is given; give one, such as --sparsity"
            )
        if self.allocation != "measured" and not budgets:
            raise RequestError(
                f"allocation is {self.allocation}, which is for a budget, and none is given; give "
                "one, such as --sparsity, or leave --allocation away"
            )
        if self.form == "exported" and self.speedup is not None:
            raise RequestError(
                "a speedup is timed on modules, so that it does not go with form 'exported'; give "
                "flops, params or sparsity as the budget"
            )

    def _check_experts(self) -> None:
        """Refuse what does not go with experts that leave whole."""
        if self.speedup is not None:
            raise RequestError(
                "a speedup is timed on models that keep all their experts, so that it does not go "
                "with experts; give params or size as the budget"
            )
        if self.form == "exported":
            raise RequestError(
                "form 'exported' does not go with experts: whole experts are removed from modules "
                "only; give form 'eager' or 'auto'"
            )
        if not self.experts_alone and not isinstance(self.backend, str):
            raise RequestError(
                f"backend is {safe_repr(self.backend)}, which chooses either experts or units of "
                "layers, and this run removes both; give a name that stands for a backend of each, "
                "such as 'local_search'"
            )
        if self.experts == AUTO:
            self._check_auto()
        elif self.experts_alone and (self.certify or self.round_to != 1):
            given = "certify" if self.certify else "round_to"
            raise RequestError(
                f"{given} does not go with experts alone: no lower bound is known for a choice of "
                f"experts, and their count is not rounded; leave {given} away"
            )

    def _check_auto(self) -> None:
        """Refuse budgets of which experts can take no part."""
        if not self.has_budget:
            raise RequestError(
                "experts is 'auto', which needs a budget; give one, such as --params 0.75, or what "
                "each mixture keeps, such as --experts 0.75"
            )
        if self.flops is not None:
            raise RequestError(
                "fewer experts save no flops, since each token is sent to as many as before; give "
                "params or size as the budget, or leave experts 'auto' away"
            )

    def chosen_backend(self) -> "solvers.Backend":
        """Return the backend with its options."""
        return cast("solvers.Backend", self._chosen(solvers.BACKENDS))

    def chosen_expert_backend(self) -> "solvers.ExpertBackend":
        """Return the backend that chooses experts, with its options."""
        return cast("solvers.ExpertBackend", self._chosen(solvers.EXPERT_BACKENDS))

    def _chosen(self, group: str) -> Any:
        if isinstance(self.backend, str):
            return solvers.make_backend(self.backend, group, **dict(self.backend_options))
        if not callable(getattr(type(self.backend), "select", None)):
            raise OptionError(
                f"backend is {safe_repr(self.backend)}; give a name, or an object that selects"
            )
        if self.backend_options:
            raise OptionError("backend_options go with a name; this backend object has its own")
        return self.backend

    @property
    def holds_out(self) -> bool:
        """Whether samples that no weight is fitted to choose what refits are held back by."""
        corrects = self.target != "weights" or self.experts is not None
        return self.damp is None or (self.correction_weight is None and corrects)

    @property
    def shared_kinds(self) -> tuple[str, ...]:
        """The kinds of units that a budget takes where nothing else is said of them."""
        return (*PRUNED_KINDS, "experts") if self.experts == AUTO else PRUNED_KINDS

    @property
    def experts_alone(self) -> bool:
        """Whether experts are all that is to be removed."""
        others = self.has_budget or any(getattr(self, name) for name in _BESIDE)
        return self.experts is not None and not others

    def of_kind(self, kind: str) -> Keep | None:
        """Return what was asked for one kind by name."""
        if kind == "experts":
            return None if self.experts == AUTO else self.experts
        return getattr(self, kind) if kind in PRUNED_KINDS else None

    @property
    def widths(self) -> Widths:
        """What widths groups that share a budget may have."""
        return Widths(self.round_to, None if self.at_least is None else parse_keep(self.at_least))

    @property
    def has_budget(self) -> bool:
        """Whether groups share a budget."""
        return any(getattr(self, name) is not None for name in BudgetKind)

    @property
    def budget_in_words(self) -> str:
        """The budget as the command line has it."""
        return " ".join(
            f"--{n} {v:g}" if isinstance(v := getattr(self, n), float) else f"--{n} {v}"
            for n in BudgetKind
            if getattr(self, n) is not None
        )

    def reach(self, kind: "UnitKind") -> bool:
        """Tell whether groups of a kind may lose units."""
        budgeted = self.has_budget and kind in PRUNED_KINDS
        return bool(self.groups) or budgeted or self.fraction_or_count(kind) is not None

    def fraction_or_count(self, kind: "UnitKind", residual: bool = False) -> Fraction | int | None:
        """Return what is asked of a kind by name: a fraction, a count, or None."""
        own = self.residual if residual else self.of_kind(kind)
        return None if own is None else parse_keep(own)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data.

        A backend object is named after its class, and cannot be made of that name again.
        """
        data = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        for one in dataclasses.fields(self):
            if one.type == KeepOption and data[one.name] is not None:
                data[one.name] = str(data[one.name])
        data["groups"] = {name: str(keep) for name, keep in self.groups.items()}
        data["skip"] = list(self.skip)
        if isinstance(self.backend, str):
            data["backend_options"] = {k: _plain(v) for k, v in self.backend_options.items()}
        else:
            data["backend"] = type(self.backend).__name__
            known = dataclasses.is_dataclass(self.backend)
            data["backend_options"] = (
                {k: repr(v) for k, v in vars(self.backend).items()} if known else {}
            )
        return data


def _plain(value: Any) -> Any:
    """Return a number of another library as Python's own, which JSON knows."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return (
        float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value
    )


# ---- as keywords -------------------------------------------------------------------------


class _TakesRequest(Protocol[P, R_co]):
    """A function of a model and calibration data that takes the fields of a request as keywords."""

    def __call__(
        self, model: "nn.Module", calibration: Any, *args: P.args, **asked: P.kwargs
    ) -> R_co:
        """Make a request of the keywords, and run."""


class _TakesModels(Protocol[P, R_co]):
    """The same of a smaller model, its dense one, and data."""

    def __call__(
        self, smaller: Any, dense: "nn.Module", data: Any, *args: P.args, **asked: P.kwargs
    ) -> R_co:
        """Make a request of the keywords, and run."""


@overload
def by_keywords(
    request: Callable[P, Q], run: Callable[["nn.Module", Any, Q], R]
) -> _TakesRequest[P, R]: ...
@overload
def by_keywords(
    request: Callable[P, Q], run: Callable[[Any, "nn.Module", Any, Q], R]
) -> _TakesModels[P, R]: ...
def by_keywords(request: Callable[..., Any], run: Callable[..., Any]) -> Any:
    """Return a function that takes the fields of a request in the place of the request.

    Type checkers see its keywords, as `help` does, which describes them in the request's words.
    The name of `run` ends in ``_as_asked``, and its docstring describes the request, which comes
    after all that has to be given.
    """
    of_run = list(inspect.signature(run).parameters.values())
    first = of_run[: [one.name for one in of_run].index("request")]
    fields = []
    for one in inspect.signature(request).parameters.values():
        ranged = get_origin(one.annotation) is Annotated
        bare = get_args(one.annotation)[0] if ranged else one.annotation
        fields.append(one.replace(annotation=bare))
    signature = inspect.Signature([*first, *fields])

    def keywords(*args: Any, **asked: Any) -> Any:
        for unknown in asked.keys() - signature.parameters:
            alike = difflib.get_close_matches(unknown, signature.parameters, 1)
            name, more = keywords.__name__, f"; did you mean {alike[0]!r}?" if alike else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {unknown!r}{more}")
        given = signature.bind(*args, **asked).arguments
        leading = [given.pop(one.name) for one in first]
        return run(*leading, request(**given))

    keywords.__signature__ = signature  # type: ignore[attr-defined]
    keywords.__name__ = keywords.__qualname__ = run.__name__.removesuffix("_as_asked")
    keywords.__module__ = run.__module__
    keywords.__doc__ = re.sub(
        r"(?<=\n)    request\n.*?(?=\n\n    Returns\n)",
        lambda _: _described(inspect.getdoc(request) or ""),
        run.__doc__ or "",
        flags=re.DOTALL,
    )
    return keywords


def _described(doc: str) -> str:
    """Return the section of a numpydoc text that describes parameters, as in a function's text."""
    found = re.search(r"Parameters\n-+\n(.*?)\n\n\w+\n---", doc, re.DOTALL)
    lines = found[1].splitlines() if found else []
    return "\n".join(f"    {line}".rstrip() for line in lines)


def parse_keep(value: Keep) -> Fraction | int:
    """Read what to keep: ``"0.7"``, ``"2/3"`` and 0.7 are fractions, ``"512"`` and 512 counts."""
    unreadable = "as what to keep; give a fraction such as 0.7 or 2/3, or a count"
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        raise RequestError(f"cannot read {safe_repr(value)} {unreadable}")
    if isinstance(value, numbers.Real) and not abs(value) < _LARGEST_COUNT:
        raise RequestError(
            f"cannot read {safe_repr(value)} {unreadable} below {_LARGEST_COUNT:.0e}"
        )
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
    """Read what weights may take: a fraction of the dense model's, or bytes, as in ``"200MB"``."""
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        try:
            return parse_size(value)
        except OptionError as error:
            raise RequestError(
                f"cannot read {safe_repr(value)} as a size; give one such as 200MB or 1.5GiB, or a "
                "fraction of the dense model's"
            ) from error
    return parse_keep(value)
