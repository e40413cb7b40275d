"""What a pruning run is asked: one declaration, of which all else is made.

The fields of `PruningRequest`, with their types, ranges, choices and docstring, are the keywords of
`osscar.prune`, the options of the command line, and the settings of reports.
"""

import dataclasses
import enum
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
)

from annotated_types import Gt, Interval

from osscar.base.errors import OptionError, RequestError, check_onnx
from osscar.base.inputs import (
    PERCENT,
    DistanceOption,
    Read,
    bare,
    check_fields,
    count_from,
    from_percent,
    parse_size,
    safe_repr,
)

if TYPE_CHECKING:
    from torch import nn

    import solvers

P = ParamSpec("P")
R = TypeVar("R")
Q = TypeVar("Q")
R_co = TypeVar("R_co", covariant=True)

PRUNED_KINDS = ("heads", "neurons", "channels")
"""What a budget applies to."""

AUTO: Final = "auto"
"""Of experts: that a budget applies to them, too; of widths: as round as their number allows."""

ALL: Final = "all"
"""Of what to keep: every unit."""

BOUND_ROUNDS = 8
"""What `solvers.solve` takes by default as well; said here, where nothing has loaded torch."""

_BESIDE = (*PRUNED_KINDS, "residual", "groups")
"""What may be removed beside experts, a budget aside."""

_NUMBER = re.compile(
    r"\d{1,40}/0*[1-9]\d{0,39}|(\d{1,18}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,3})?"
)

SHARE = Interval(gt=0, lt=1)
DAMP = Interval(ge=0, le=1e9)
"""Refits are the dense weights to nine digits at its end; far beyond it products overflow."""

Keep = str | int | float | Fraction
"""A count of units (an int, or a string such as ``"512"``) or the fraction of them to keep."""

RoundTo = int | Literal["auto"]

METHODS = {
    "measured": "widths of least divergence, measured group by group; refits correct the errors of "
    "earlier layers",
    "uniform": "the same fraction of every group, the largest within the budget; refits correct "
    "the errors of earlier layers",
}
"""The methods of a sweep that are no baselines: how they share a budget."""

BASELINES = {
    "multistage": "the choice of OSSCAR (Meng et al., 2024)",
    "greedy": "the choice of ZipLM (Kurtic et al., 2023)",
    "wanda": "magnitude times the norm of the inputs (Sun et al., 2023)",
    "magnitude": "the norm of the weights",
}
"""Backends that prune uniform shares, each layer by itself, on the paper's target."""


class BudgetKind(enum.StrEnum):
    """A budget of a run, by the name of its field; all that are given hold."""

    SPARSITY = "sparsity"
    PARAMS = "params"
    SIZE = "size"
    MEMORY = "memory"
    FLOPS = "flops"
    SPEEDUP = "speedup"

    @property
    def examples(self) -> str:
        """A list of values, for messages."""
        return "1.2,1.5,2" if self is BudgetKind.SPEEDUP else "0.3,0.5,0.7"

    @property
    def dense(self) -> float:
        """The value of the dense model."""
        return 0.0 if self is BudgetKind.SPARSITY else 1.0


class TargetKind(enum.StrEnum):
    """The loss of quality that a target limits, by the name of its field."""

    DIVERGENCE = "max_divergence"
    PERPLEXITY = "max_perplexity_increase"
    TOP1 = "max_top1_drop"

    @property
    def option(self) -> str:
        """The field and the option of the command line."""
        return f"{self} (`--{self.replace('_', '-')}`)"


@dataclass(frozen=True)
class QualityTarget:
    """A loss of quality, and the most of it that is allowed."""

    kind: TargetKind
    most: float

    def __str__(self) -> str:
        """Write the target by its field."""
        nats = self.kind is TargetKind.DIVERGENCE
        amount = f"{self.most:g}" if nats else f"{100 * self.most:g}%"
        return f"{self.kind} {amount}"


@dataclass(frozen=True)
class Widths:
    """The widths that a group may have."""

    round_to: RoundTo = 1
    """Its width, units times rows a unit, is a multiple of this; of `round_width`, where auto."""
    at_least: Fraction | int | None = None
    """Fewest units that stay: a count, or a fraction of the group's."""

    def least(self, units: int) -> int:
        """Return the fewest units that stay of so many."""
        if self.at_least is None:
            return 1
        if isinstance(self.at_least, int):
            return min(self.at_least, units)
        return math.ceil(self.at_least * units)


def round_width(width: int) -> int:
    """Return of what a width is a multiple by default, as processors and cards are fast with."""
    return 16 if width > 64 else 8 if width > 16 else 1


def parse_keep(value: Keep) -> Fraction | int:
    """Read what to keep: 0.7, ``"70%"`` and ``"2/3"`` are fractions, 512 a count, ``"all"`` is all.

    A fraction of 1 that is not in per cent could mean one or all, and is refused.
    """
    try:
        text = str(value).strip()
    except ValueError:  # of more digits than Python writes
        text = ""
    number = text.removesuffix("%").rstrip()
    if text == ALL:
        return Fraction(1)
    if _NUMBER.fullmatch(number):  # of so few digits that anyone can compute with it
        if text.isdecimal() and not isinstance(value, Fraction):
            if count := int(text):
                return count
        elif 0 < (kept := Fraction(number) / (1 if number == text else 100)) <= 1:
            if kept == 1 and number == text:
                raise ValueError("give 1 to keep one, or 'all'")
            return kept
    raise ValueError(
        "give a fraction between 0 and 1, such as 0.7, 70% or 2/3, a count from 1, below 10^18, or "
        "'all'"
    )


def parse_size_kept(value: Keep) -> Fraction | int:
    """Read what weights may take: a fraction of the dense model's, or bytes, as in ``"200MB"``."""
    try:
        sized = isinstance(value, str) and value.strip()[-1:].isalpha()
        return parse_size(value) if sized else parse_keep(value)
    except (OptionError, ValueError) as error:
        raise ValueError(
            "give a fraction of the dense model's, between 0 and 1, such as 0.7 or 70%, or a size "
            "such as 200MB or 1.5GiB"
        ) from error


def _keep(value: Any) -> Any:
    parse_keep(value)
    return value


def _size(value: Any) -> Any:
    parse_size_kept(value)
    return value


def _experts(value: Any) -> Any:
    return value if isinstance(value, str) and value == AUTO else _keep(value)


def _round_to(value: Any) -> Any:
    text = str(value).strip()
    if text == AUTO or (text.isdecimal() and 1 <= int(text[:19]) < 2**63):
        return text if text == AUTO else int(text)
    raise ValueError("give a whole number from 1, or auto")


def _share_lost(value: Any) -> float:
    percent = str(value).strip().endswith("%")
    with suppress(ValueError):
        lost = float(from_percent(str(value)))
        if 0 < lost < (math.inf if percent else 1) and not isinstance(value, bool):
            return lost
    raise ValueError("give a percentage above zero, such as 5%, or a fraction, such as 0.05")


KeepOption = Annotated[Keep | None, Read(_keep)]
ShareLost = Annotated[str | float | None, Read(_share_lost)]


def is_keep(annotation: Any) -> bool:
    """Whether a field is what to keep: text then says whether a number is a count."""
    return bool(bare(annotation) == Keep | None)


@dataclass(frozen=True, kw_only=True)
class PruningRequest:
    """The options of a pruning run.

    Parameters
    ----------
    sparsity
        Fraction to remove: 0.3, or ``30%``, removes 30% of the parameters of heads, neurons and
        channels.  It may remove residual channels, too; their parameters, and those of all other
        tensors, do not count.
    params
        Parameters to keep, of all that the model has: a fraction such as 0.7, or a count.
    size
        Bytes that the weights of the smaller model may take: a fraction of the dense model's, such
        as 0.8, or a size such as ``200MB``.
    memory
        Memory that serving the smaller language model may take for its weights and its key/value
        cache: a fraction of the dense model's, or a size such as ``2GB``.  It needs `context`.
    context
        With `memory` or `timed` ``decode``: tokens of each sequence in the key/value cache.
    batch
        With `memory` or `timed` ``decode``: sequences that are served at the same time.
    flops
        Fraction of the floating-point operations to keep, such as 0.7 or ``70%``.
    speedup
        Speed of a forward pass to reach within 2 %, as a multiple of the dense model's, above 1.
        It is measured on this device; run nothing else there meanwhile.
    timed
        With a budget or target of time: what is timed.  ``prefill``: a forward pass over a
        batch of calibration data.  ``decode``: the next token of each of `batch` sequences of a
        language model, with a key/value cache of `context` positions.
    timed_in
        With a budget or target of time: the runtime, ``torch``, or ``onnxruntime`` on the CPU.
    max_divergence
        Largest `distance` of the outputs from the dense model's, such as 0.1 nats a prediction.
        OSSCAR prunes up to four times to find the smallest model within it and within all budgets.
        A quarter of the calibration samples, which the search does not use, tests that model: its
        distance is at most this with 95 % confidence.
    max_perplexity_increase
        Like `max_divergence`, for a language model: largest increase of its perplexity, such as
        ``5%``.
    max_top1_drop
        Like `max_divergence`, for labelled data: largest drop of the top-1 accuracy, in percentage
        points, such as ``1%``.
    smallest
        With a quality target: what to make as small as possible, ``params`` (the default),
        ``flops``, ``size`` in bytes, or ``time`` of a forward pass on this device, predicted from
        its operators.
    distance
        How outputs are compared with the dense model's, to choose widths: ``nats``, the divergence
        of class scores; ``relative``, the squared error of each output over its square, a mean over
        outputs; or a function of (outputs, dense outputs, batch) that returns one number for each
        sample, also as ``file.py:function``.  By default ``nats`` if an output is known to hold
        class scores, else ``relative``.
    allocation
        How the budgets are divided among layers.  ``measured`` chooses widths with which the
        model's outputs change least; ``uniform`` keeps the same fraction of every layer, as the
        paper does, and all residual channels.
    heads
        Heads to keep in each layer: a fraction such as ``2/3``, a count such as 4, or ``all``.
        Under grouped-query attention a head is a key-value head with its query heads.
    neurons
        Neurons to keep in each feed-forward layer: a fraction, a count, or ``all``.
    channels
        Channels to keep in each convolution: a fraction, a count, or ``all``.
    residual
        Channels to keep in each residual stream, the sum along shortcuts: a fraction, a count, or
        ``all``.  By default a budget decides, unless the allocation is ``uniform``.
    experts
        Experts to keep in each mixture: a fraction, a count, or ``all``, the default.  With
        ``auto``, a budget of parameters or bytes decides.
    groups
        What to keep of single groups, by name; takes precedence over the others.
    round_to
        Make the width of every pruned layer a multiple of this, such as 32 for llama.cpp; 1 allows
        any.  ``auto``, for speed: 8 or a multiple of 16 if the layer is more than 64 wide, 4 or a
        multiple of 8 if it is more than 16 wide.  Heads, and counts of units, are not rounded.
    at_least
        Fewest units that a budget leaves in each group: a fraction of the group's, or a count.
    skip
        Groups to leave as they are: names, or patterns such as ``h.0.*``.  ``osscar inspect`` lists
        the names.
    backend
        Solver that chooses the units: a registered name, ``file.py:Class`` of your own, or a
        backend object.  For experts, one that takes a `solvers.ExpertProblem`.
    backend_options
        Options of a solver that is given by name, such as ``{"max_swaps": 100}``.
    certify
        Compute a lower bound on each layer's loss, which limits how far its selection can be from
        optimal, and verify each solution.  The run takes several times as long.
    damp
        Ridge strength of the refit, relative to the diagonal of the Gram matrix: larger keeps
        refitted weights closer to the dense ones.  By default chosen for each layer on held-out
        calibration samples.
    target
        Outputs that a layer is refitted to.  ``weights``: those of its dense weights on its inputs
        in the pruned model, as in the paper.  ``residual``: the same, corrected for the errors of
        earlier layers.
    correction_weight
        With the target ``residual``: weight of its correction, from 0 (none) to 1 (full).  By
        default chosen for each layer on held-out calibration samples.
    batch_norm
        Running statistics of batch norm: ``correct`` adds the change that pruning causes on
        calibration data; ``keep`` leaves them as they are.
    device
        Device to run on: ``auto``, ``cpu`` or ``cuda``.
    batch_size
        Samples in a forward pass: by default 8 windows of text, or 64 of anything else, and fewer
        large samples on a CPU.
    seed
        Random seed of the calibration samples that a command draws, of their parts for a quality
        target, and of the inputs on which the pruned model is verified.
    form
        What is made smaller.  ``eager``: the model's modules.  ``exported``: its ``torch.export``
        program (`osscar.ProgramModule`), for code that fails with fewer units.  ``auto``:
        ``exported`` if more groups can be pruned so, but ``eager`` if the model generates text, is
        timed, or has methods of its own that can be kept.

    Raises
    ------
    OptionError
        If a value is out of range, or of a wrong type.
    RequestError
        If nothing is to be removed, or values contradict each other.
    BackendError
        If the backend does not exist, cannot run here, or has no such option.
    """

    sparsity: Annotated[float | None, SHARE, PERCENT] = None
    params: KeepOption = None
    size: Annotated[Keep | None, Read(_size)] = None
    memory: Annotated[Keep | None, Read(_size)] = None
    context: Annotated[int | None, count_from(1)] = None
    batch: Annotated[int, count_from(1)] = 1
    flops: Annotated[float | None, SHARE, PERCENT] = None
    speedup: Annotated[float | None, Gt(1)] = None
    timed: Literal["prefill", "decode"] = "prefill"
    timed_in: Literal["torch", "onnxruntime"] = "torch"
    max_divergence: Annotated[float | None, Gt(0)] = None
    max_perplexity_increase: ShareLost = None
    max_top1_drop: ShareLost = None
    smallest: Literal["params", "flops", "size", "time"] | None = None
    distance: DistanceOption = None
    allocation: Literal["measured", "uniform"] = "measured"
    heads: KeepOption = None
    neurons: KeepOption = None
    channels: KeepOption = None
    residual: KeepOption = None
    experts: Annotated[Keep | None, Read(_experts)] = None
    groups: Mapping[str, Annotated[Keep, Read(_keep)]] = field(default_factory=dict)
    round_to: Annotated[RoundTo, Read(_round_to)] = AUTO
    at_least: KeepOption = None
    skip: Sequence[str] = ()
    backend: "str | solvers.Backend" = "local_search"
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    certify: bool = False
    damp: Annotated[float | None, DAMP] = None
    target: Literal["weights", "residual"] = "residual"
    correction_weight: Annotated[float | None, Interval(ge=0, le=1), PERCENT] = None
    batch_norm: Literal["correct", "keep"] = "correct"
    device: Annotated[str, Read(str)] = "auto"
    batch_size: Annotated[int | None, count_from(1)] = None
    seed: Annotated[int, count_from(0)] = 0
    form: Literal["auto", "eager", "exported"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "skip", tuple(self.skip))
        for advice, wrong in self._contradictions().items():
            if wrong:
                raise RequestError(advice)
        if self.timed_in == "onnxruntime":
            check_onnx("timed_in onnxruntime (`--set timed_in=onnxruntime`)")
        if not self.experts_alone:
            self.chosen_backend()
        if self.routed:
            self.chosen_backend(experts=True)

    def _contradictions(self) -> dict[str, object]:
        """Return what to do about fields that contradict each other, and whether they do."""
        budgets, experts, timing = self.budgets, self.routed, self.timing
        targets = " and ".join(str(one) for one in TargetKind if getattr(self, one) is not None)
        shared, exported = budgets or targets, self.form == "exported"
        auto, decode = self.experts == AUTO, self.timed == "decode"
        cached = self.memory is not None or decode
        budget, cache = "a budget, such as params 0.7", "memory or timed decode"
        time = "a budget or target of time, such as speedup 1.5"
        needs = {
            f"{name} is {getattr(self, name)}, which needs {needed}; give one, or omit {name}": (
                getattr(self, name) != usual and not there
            )
            for name, usual, there, needed in (
                ("smallest", None, targets, "a quality target, such as max_divergence 0.1"),
                ("at_least", None, shared, budget),
                ("allocation", "measured", shared, budget),
                ("experts", None, shared or not auto, budget),
                ("context", None, cached, cache),
                ("batch", 1, cached, cache),
                ("timed", "prefill", timing, time),
                ("timed_in", "torch", timing, time),
            )
        }
        return {
            "nothing to prune: give a budget (`--sparsity`, `--params`, `--size`, `--memory`, "
            "`--flops` or `--speedup`), a quality target (`--max-divergence`, "
            "`--max-perplexity-increase` or `--max-top1-drop`), or what to keep (`--heads`, "
            "`--neurons`, `--channels`, `--residual` or `--experts`); in Python they are keywords, "
            "such as sparsity=0.3": not (
                experts or shared or any(getattr(self, name) for name in _BESIDE)
            ),
            f"{targets} are given, and a run takes one quality target; omit the others": " and "
            in targets,
            f"speedup does not go with {targets}, as every size that is tried would be timed; give "
            "flops in its place, or smallest time (`--set smallest=time`) for the fastest model "
            "within the target": targets and self.speedup is not None,
            f"allocation is {self.allocation}, and {targets} needs measured curves; omit "
            "allocation (`--set allocation`)": targets and self.allocation != "measured",
            f"{self.in_words(budgets) or targets} has nothing to prune: "
            f"{', '.join(self.shared_kinds)} say what to keep of every group that it prunes; omit "
            "one of these, or the budget or target": shared
            and all(getattr(self, kind) not in (None, AUTO) for kind in self.shared_kinds),
            f"{'timed decode' if self.memory is None else f'memory {self.memory}'} needs the "
            "length of the key/value cache; give the context, too (`--set context=4096`, or "
            "context=4096 in Python)": cached and self.context is None,
            **needs,
            "timed decode does not go with timed_in onnxruntime, as models are exported without a "
            "key/value cache; omit one of them": decode and self.timed_in == "onnxruntime",
            "memory does not go with form 'exported', as it needs a model that generates text; "
            "give size": exported and self.memory is not None,
            f"{timing} does not go with form 'exported', as modules are timed; give "
            f"{self.instead_of_time('flops')}": exported and timing,
            "experts does not go with form 'exported', as they are removed from modules only; "
            "give form 'eager' or 'auto'": exported and experts,
            f"{timing} does not go with experts, as it is timed on models with all their experts; "
            f"give {self.instead_of_time('params')}": timing and experts,
            f"backend is {safe_repr(self.backend)}, which chooses either experts or other units, "
            "and this run removes both; give the name of a backend of both, such as "
            "'local_search'": experts
            and not self.experts_alone
            and not isinstance(self.backend, str),
            "fewer experts save no flops, since each token is sent to as many as before; give "
            "params or size as the budget, or omit experts 'auto'": auto
            and {*budgets, *filter(None, [self.smallest])} == {BudgetKind.FLOPS},
            f"{'certify' if self.certify else 'round_to'} does not go with experts alone: no lower "
            "bound is known for a choice of experts, and their count is not rounded; omit it": (
                self.experts_alone
            )
            and (self.certify or self.round_to != AUTO),
        }

    def chosen_backend(self, experts: bool = False) -> "solvers.Backend":
        """Return the backend that chooses units, or whole experts, with its options."""
        if isinstance(self.backend, str):
            import solvers  # loads torch, which the command line does later

            group = solvers.EXPERT_BACKENDS if experts else solvers.BACKENDS
            return solvers.make_backend(self.backend, group, **self.backend_options)
        if not callable(getattr(type(self.backend), "select", None)):
            raise OptionError(
                f"backend is {safe_repr(self.backend)}; give a name, or an object with a method "
                "select"
            )
        if self.backend_options:
            raise OptionError("backend_options go with a name; this backend object has its own")
        return self.backend

    @property
    def timing(self) -> str:
        """What asks that the model be timed, as an option says it; empty where nothing does."""
        if self.speedup is not None:
            return "speedup"
        return "smallest time" if self.smallest == "time" else ""

    def instead_of_time(self, budget: str) -> str:
        """Return what to give in place of it, for messages."""
        if self.smallest == "time":
            return f"smallest {budget} (`--set smallest={budget}`)"
        return f"{budget} (`--{budget}`)"

    @property
    def holds_out(self) -> bool:
        """Whether samples are held out to choose the damping or the correction weight."""
        corrects = self.target != "weights" or self.routed
        return self.damp is None or (self.correction_weight is None and corrects)

    @property
    def shared_kinds(self) -> tuple[str, ...]:
        """The kinds of units that share a budget, unless the request says what they keep."""
        return (*PRUNED_KINDS, "experts") if self.experts == AUTO else PRUNED_KINDS

    @property
    def routed(self) -> bool:
        """Whether units that are routed may leave (`graph.UnitKind.routed`)."""
        return self.experts is not None

    @property
    def experts_alone(self) -> bool:
        """Whether experts are all that is to be removed."""
        others = self.has_budget or any(getattr(self, name) for name in _BESIDE)
        return self.routed and not others

    @property
    def widths(self) -> Widths:
        """The widths that groups that share a budget may have."""
        return Widths(self.round_to, None if self.at_least is None else parse_keep(self.at_least))

    @property
    def budgets(self) -> tuple[BudgetKind, ...]:
        """The budgets that are given."""
        return tuple(name for name in BudgetKind if getattr(self, name) is not None)

    @property
    def quality(self) -> QualityTarget | None:
        """The target of quality; None without one."""
        lost = ((kind, getattr(self, kind)) for kind in TargetKind)
        return next((QualityTarget(kind, most) for kind, most in lost if most is not None), None)

    @property
    def has_budget(self) -> bool:
        """Whether groups share a budget, given or found."""
        return bool(self.budgets) or self.quality is not None

    def in_words(self, budgets: Iterable[BudgetKind]) -> str:
        """Return budgets by their fields."""
        values = ((name, getattr(self, name)) for name in budgets)
        return " ".join(f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in values)

    @property
    def prunes_heads(self) -> bool:
        """Whether heads may leave."""
        return bool(self.groups) or self.has_budget or self.heads is not None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON-able data.

        A backend object is named after its class, and cannot be made of that name again.
        """
        data = {
            one.name: str(value) if is_keep(one.type) and value is not None else value
            for one in dataclasses.fields(self)
            for value in [getattr(self, one.name)]
        }
        data["groups"] = {name: str(keep) for name, keep in self.groups.items()}
        data["skip"] = list(self.skip)
        data["distance"] = None if self.distance is None else str(self.distance)
        options = self.backend_options
        if not isinstance(self.backend, str):
            data["backend"] = type(self.backend).__name__
            options = vars(self.backend) if dataclasses.is_dataclass(self.backend) else {}
            options = {name: repr(value) for name, value in options.items()}
        data["backend_options"] = {  # numbers of numpy have Python's own as their item
            name: value.item() if hasattr(value, "item") else value
            for name, value in options.items()
        }
        return data


class ArgumentsAlone(PruningRequest):
    """A request of which only that is checked which takes no backend, and so no torch."""

    def chosen_backend(self, experts: bool = False) -> Any:
        """Choose none."""


class _TakesRequest(Protocol[P, R_co]):
    """Prunes a model, given the fields of a request as keywords."""

    def __call__(
        self, model: "nn.Module", calibration: Any, *args: P.args, **asked: P.kwargs
    ) -> R_co: ...


class _TakesModels(Protocol[P, R_co]):
    """Recovers a smaller model of a dense one, given the fields of a request as keywords."""

    def __call__(
        self, smaller: Any, dense: "nn.Module", data: Any, *args: P.args, **asked: P.kwargs
    ) -> R_co: ...


@overload
def by_keywords(
    request: Callable[P, Q], run: Callable[["nn.Module", Any, Q], R]
) -> _TakesRequest[P, R]: ...
@overload
def by_keywords(
    request: Callable[P, Q], run: Callable[[Any, "nn.Module", Any, Q], R]
) -> _TakesModels[P, R]: ...
def by_keywords(request: Callable[..., Any], run: Callable[..., Any]) -> Any:
    """Return `run`, called ``..._as_asked``, with the fields of its request as keywords.

    What comes before the request has to be given.  Type checkers and `help` see the keywords; the
    docstring describes them in the request's words.
    """
    own = inspect.signature(run)
    first = list(itertools.takewhile(lambda one: one.name != "request", own.parameters.values()))
    fields = [
        one.replace(annotation=bare(one.annotation))
        for one in inspect.signature(request).parameters.values()
    ]
    signature = own.replace(parameters=[*first, *fields])

    def keywords(*args: Any, **asked: Any) -> Any:
        from osscar.base.devices import default_torch  # loads torch

        given = signature.bind(*args, **asked).arguments
        leading = [given.pop(one.name) for one in first]
        # Of what `torch.compile` has made, the model.
        leading = [getattr(one, "_orig_mod", one) for one in leading]
        with default_torch():
            return run(*leading, request(**given))

    keywords.__signature__ = signature  # type: ignore[attr-defined]
    keywords.__name__ = keywords.__qualname__ = run.__name__.removesuffix("_as_asked")
    keywords.__module__ = run.__module__
    parameters = r"Parameters\n-+\n(.*?)\n\n\w+\n---"
    words = "".join(re.findall(parameters, inspect.getdoc(request) or "", re.DOTALL))
    keywords.__doc__ = re.sub(
        r"(?<=\n)    request\n.*?(?=\n\n    Returns\n)",
        lambda _: textwrap.indent(words, "    "),
        run.__doc__ or "",
        flags=re.DOTALL,
    )
    return keywords
