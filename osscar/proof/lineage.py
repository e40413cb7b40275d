"""What a model knows: where it comes from, what was done to it, and what it returns on one input.

That input is made from its form alone, by a formula, so that every machine makes the same one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Interval, Predicate
from pydantic import AfterValidator, StringConstraints, with_config
from torch import Tensor, nn

from graph.tracing.preserve import forget_cached
from osscar.base.devices import FLOATS, NUMBERS
from osscar.base.errors import ModelError, first_line
from osscar.base.json_files import MOST_NUMBERS, STRICT
from osscar.base.memory import attempt
from osscar.base.printable import pluralize, published
from osscar.network.model_state import model_state
from osscar.network.modules import (
    copied,
    count_parameters,
    device_of,
    number_format,
    sha256_of,
    weights_of,
)
from osscar.offload.on_disk import OnDisk, is_on_disk, values_of
from osscar.proof.equivalence import Inputs, by_name, outputs_or_none, proof_outputs, to_device
from osscar.proof.plan import Certificate, PruningPlan
from osscar.proof.seen import Calibration

_GOLDEN = (math.sqrt(5) - 1) / 2

_VALUES, _OUTPUTS = 32, 16
"""How many numbers of an output are recorded, and of how many outputs: 10 kB at most."""

_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Root mean square of differences, relative to that of the output, in the format that is computed
in; 5e-3 in float32 and float64, where kernels of two machines differ by 1e-6 for most networks, and
by 1e-3 for those of many layers."""


_Count: TypeAlias = Annotated[int, Interval(ge=1, le=MOST_NUMBERS)]


@dataclass(frozen=True)
class Drawn:
    """A tensor that an input consists of: number k of n is ``low + (high - low) frac(k phi)``.

    Whole numbers are rounded down, and `high` is among them.
    """

    shape: tuple[_Count, ...]
    dtype: Annotated[str, Predicate(NUMBERS.__contains__)]
    low: float
    high: float

    @classmethod
    def like(cls, tensor: Tensor) -> Drawn:
        """Return the form of a tensor: its shape, number format and range."""
        values = tensor.detach().to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, float(values.min()), float(values.max()))

    def tensor(self) -> Tensor:
        """Make it."""
        kind = NUMBERS[self.dtype]
        whole = not kind.is_floating_point
        count = torch.arange(1, math.prod(self.shape) + 1, dtype=torch.float64)
        share = (count * _GOLDEN).frac()
        values = self.low + (self.high - self.low + whole) * share
        return (values.floor() if whole else values).to(kind).reshape(self.shape)


@dataclass(frozen=True)
class Output:
    """A few numbers of an output: at even distances, with None for what is infinite or NaN.

    `size` is the root mean square of all that are finite.
    """

    shape: tuple[int, ...]
    size: float
    values: tuple[float | None, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """Look at an output."""
        flat = tensor.detach().flatten()
        flat = (flat.abs() if flat.is_complex() else flat).to("cpu", torch.float64)
        finite = flat[flat.isfinite()]
        size = float(finite.square().mean().sqrt()) if len(finite) else 0.0
        places = torch.linspace(0, max(0, len(flat) - 1), min(_VALUES, len(flat))).long()
        numbers = flat[places].tolist()
        # Seven digits are what float32 has.
        return cls(
            tuple(tensor.shape),
            float(f"{size:.7g}"),
            tuple(float(f"{x:.7g}") if math.isfinite(x) else None for x in numbers),
        )

    def distance(self, other: Output) -> float:
        """Return the root mean square of differences over the larger size, or infinity."""
        finite = [[x is not None for x in one.values] for one in (self, other)]
        if self.shape != other.shape or finite[0] != finite[1]:
            return math.inf
        pairs = zip(self.values, other.values, strict=True)
        gaps = [x - y for x, y in pairs if x is not None and y is not None]
        size = max(self.size, other.size)
        return math.hypot(*gaps) / (math.sqrt(len(gaps)) * size) if gaps and size else 0.0


Argument: TypeAlias = Drawn | bool | int | float | None


def _fits(inputs: Mapping[str, Argument]) -> bool:
    """Whether an input may be drawn; a number in it counts, as code may make a size of it."""
    sizes = (math.prod(x.shape) if isinstance(x, Drawn) else x for x in inputs.values())
    return sum(abs(size) for size in sizes if isinstance(size, int)) <= MOST_NUMBERS


def _checked(inputs: Mapping[str, Argument]) -> Mapping[str, Argument]:
    if not _fits(inputs):
        raise ValueError(f"an input has at most {MOST_NUMBERS:,} numbers")
    return inputs


@dataclass(frozen=True)
class Sample:
    """An input by the names of the arguments, and what a model returned on it when it was saved."""

    inputs: Annotated[Mapping[str, Argument], AfterValidator(_checked)]
    outputs: tuple[Output, ...] = ()

    @classmethod
    def like(cls, inputs: Mapping[str, Any]) -> Sample | None:
        """Return the form of inputs; None if some are neither tensors nor numbers, or too large."""
        known: dict[str, Argument] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                kind = str(value.dtype).removeprefix("torch.")
                plain = value.layout is torch.strided and not value.is_meta
                if kind not in NUMBERS or not plain or not 0 < value.numel() <= MOST_NUMBERS:
                    return None
                known[name] = Drawn.like(value)
            elif isinstance(value, bool | int | float | None):
                known[name] = value
            else:
                return None
        return cls(known) if _fits(known) else None

    def drawn(self) -> dict[str, Any]:
        """Make the input, on the CPU."""
        return {n: x.tensor() if isinstance(x, Drawn) else x for n, x in self.inputs.items()}

    def with_outputs(self, outputs: Sequence[Tensor]) -> Sample:
        """Record what a model returns on it; nothing if none of it is finite."""
        found = tuple(map(Output.of, outputs[:_OUTPUTS]))
        some = any(x is not None for one in found for x in one.values)
        return dataclasses.replace(self, outputs=found if some else ())

    def distance(self, outputs: Sequence[Tensor]) -> float:
        """Return the largest `Output.distance` of outputs from those recorded."""
        found = tuple(map(Output.of, outputs[:_OUTPUTS]))
        if len(found) != len(self.outputs):
            return math.inf
        return max(map(Output.distance, self.outputs, found), default=0.0)


def tolerance(dtype: torch.dtype | None) -> float:
    """Return how far outputs may be apart that are computed in a number format."""
    return _TOLERANCE.get(dtype or torch.float32, 5e-3)


# ---- where a model comes from -------------------------------------------------------------


LINEAGE = "osscar_lineage"
"""The attribute of a model that holds its `Lineage`."""


Library: TypeAlias = Literal["transformers", "torchvision", "timm"]

_Option: TypeAlias = Annotated[
    str, StringConstraints(pattern="^(num_classes|transform_input|aux_logits|init_weights)$")
]
"""All that a model is built with beside its name; others of the libraries read files."""


@dataclass(frozen=True)
class Origin:
    """What builds the dense model, without any code from a checkpoint."""

    library: Library
    name: str = ""
    options: Mapping[_Option, bool | _Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Dense:
    """A model that another was pruned from.

    weights: Their `weights_digest`.
    computed: The number format in which it ran on the sample.
    sample: A fixed input, with what it returns on that.
    """

    weights: str
    computed: str
    sample: Sample | None


@with_config(STRICT)
@dataclass(frozen=True)
class Lineage:
    """Everything that has to be known of a model to write it, read it again, and judge it.

    plans: What was removed, the oldest first; empty where a stock config says it.
    certificates: How the smaller model of each plan is known to be right, the oldest first.
    listed: How many of these, the oldest first, are in the shapes that the config lists.
    origin: What builds the dense model; None for code of a user's own.
    source: Where the dense model comes from, in words.
    classes: The names of its classes; empty where they are not known.
    preprocessing: What is done to an image before the model sees it, as far as it is stated; see
        `osscar.data.preprocessing`.
    stored_dtype: Number format of the dense model's weights on disk, such as ``bfloat16``.
    calibration: All that it was calibrated or recovered on, the oldest first, each set once.
    dense: The models that it was pruned from, the oldest first.
    sample: An input of the form that it was pruned with; in a checkpoint, with what it returns on
        that.
    """

    plans: tuple[PruningPlan, ...] = ()
    certificates: tuple[Certificate, ...] = ()
    listed: int = 0
    origin: Origin | None = None
    source: str = ""
    classes: tuple[str, ...] = ()
    preprocessing: Mapping[str, int | float | str | tuple[int | float, ...]] | None = None
    stored_dtype: str | None = None
    calibration: tuple[Calibration, ...] = ()
    dense: tuple[Dense, ...] = ()
    sample: Sample | None = None

    @property
    def replayed(self) -> tuple[PruningPlan, ...]:
        """The plans that make the model of what its config says."""
        return self.plans[self.listed :]


def lineage_of(model: nn.Module) -> Lineage:
    """Return what is known of a model: nothing, if nobody has noted anything."""
    found = getattr(model, LINEAGE, None)
    return found if isinstance(found, Lineage) else Lineage()


def note(model: nn.Module, **known: Any) -> None:
    """Note something of a model; `known` are fields of `Lineage`."""
    setattr(model, LINEAGE, dataclasses.replace(lineage_of(model), **known))


def data_record(calibration: Any) -> dict[str, Any]:
    """Return what reports say of a set of calibration data; nothing of plain tensors."""
    if not hasattr(calibration, "describe"):
        return {}
    told = calibration.describe()
    return {**told, "source": published(told["source"])}


def note_calibration(model: nn.Module, calibration: Any) -> None:
    """Note what a model has seen, where that can be recognized."""
    told, known = data_record(calibration), lineage_of(model)
    if told:
        seen = tuple(dict.fromkeys((*known.calibration, Calibration.of(told))))
        pixels = told.get("preprocessing") or known.preprocessing
        note(model, calibration=seen, preprocessing=pixels)


def note_dense(model: nn.Module, dense: nn.Module) -> None:
    """Note which model a copy is going to be pruned from; the copy still computes what that does.

    It may run elsewhere, and have plain weights where the dense model has normalized ones.
    """
    known = lineage_of(model)
    sample = known.sample
    if sample is not None:
        with model_state(model):
            sample = sample.with_outputs(outputs_or_none(model, to_device(sample.drawn(), model)))
    computed = str(number_format(model)).removeprefix("torch.")
    note(model, dense=(*known.dense, Dense(weights_digest(dense), computed, sample)))


def why_not_dense(model: nn.Module, dense: nn.Module) -> str | None:
    """Say what tells that a model was not pruned from another; None if it may have been."""
    why = None
    for one in lineage_of(model).dense:
        computed = FLOATS.get(one.computed)
        found = weights_digest(dense, computed)
        if "" in (found, one.weights) or found == one.weights:
            strays = None if one.sample is None else strays_from(one.sample, dense, computed)
            if strays is None:
                return None
            why = strays
        why = why or _differing(dense, found, one.weights)
    return why


def _differing(dense: nn.Module, weights: str, recorded: str) -> str:
    """Say which weights of a model differ from those that were recorded, by two digests."""
    names = [*weights_of(dense)]
    mine, theirs = (re.findall(f".{{{_DIGITS}}}", one) for one in (weights, recorded))
    if len(mine) != len(theirs):
        return (
            f"it has {pluralize(len(mine), 'tensor')} of weights, and {len(theirs)} were recorded"
        )
    differ = [n for n, a, b in zip(names, mine, theirs, strict=True) if a != b]
    return (
        f"{len(differ)} of {pluralize(len(names), 'tensor')} of its weights differ from those "
        f"recorded at pruning, such as {differ[0]!r}"
    )


def check_dense(model: nn.Module, dense: nn.Module, *, other: bool = False) -> None:
    """Refuse a dense model that another was not pruned from, unless an `other` is meant.

    Whoever takes a dense model for its weights calls this.  `osscar.load` and `osscar.prove` take
    it for its code alone: what they make of that is compared with what was recorded.
    """
    why = None if other else why_not_dense(model, dense)
    if why is not None:
        raise ModelError(
            f"the smaller model was not pruned from this {type(dense).__name__}: {why}; give the "
            "dense model that it came from, with the same code and weights (`--weights`, where "
            "code builds it), or say that another one is meant (other_dense, `--other-dense`)"
        )


def strays_from(sample: Sample, model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Say how far a model is from a sample's outputs, computed in `dtype`; None if it is not."""
    if not sample.outputs:
        return None
    with attempt() as tried, model_state(model):  # the model may be anyone's code
        found = proof_outputs(model, [to_device(sample.drawn(), model)])
    if tried.failed:
        return f"it fails on the recorded input: {first_line(tried.error):.300}"
    distance = sample.distance(found)
    if distance <= max(tolerance(dtype), tolerance(number_format(model))):
        return None
    far = f"are {distance:.2g} of their size off" if isfinite(distance) else "have other shapes"
    return f"its outputs on the recorded input {far}"


def are_swapped(model: nn.Module, dense: nn.Module) -> bool:
    """Whether the two were swapped: the model given as dense is the smaller one."""
    often = [len(lineage_of(one).certificates) for one in (model, dense)]
    return often[1] > often[0] or count_parameters(dense) < count_parameters(model)


_DIGITS = 8
"""Of the digest of one tensor."""

_FEW, _COLUMNS = 4096, 64
"""Numbers of a tensor that its digest reads, and in how many columns at most."""


def weights_digest(model: nn.Module, computed: torch.dtype | None = None) -> str:
    """Return what tells a model's weights from others, whatever format and device they are in.

    It has eight digits for each tensor (`weights_of`), which depend on its shape and on 4,096 of
    its numbers at even distances, or all of a smaller one: so it takes hundredths of a second, and
    of what lies on disk a part is read.  A change of a share p of a large tensor is not seen with
    probability (1 - p)^4096; what the model returns is compared as well.  It is that of the weights
    in the format that a model is `computed` in, and empty where they were rounded to a coarser one.
    """
    stored = stored_dtype(model)
    own = number_format(model)
    if own is None or own not in (torch.promote_types(stored, torch.float32), stored):
        return ""
    computed = computed or own
    if torch.promote_types(own, computed) != own:
        return ""
    finer = torch.promote_types(computed, torch.float32)
    digests = list[str]()
    for one in weights_of(model).values():
        few = _few(one)
        if one.is_floating_point():
            few = (few if computed == own else few.to(computed)).to(finer)
        digests.append(sha256_of([(str(tuple(one.shape)), few)])[:_DIGITS])
    return "".join(digests)


def _few(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that its digest reads."""
    if tensor.numel() <= _FEW:
        return values_of(tensor)
    length, *rest = tensor.shape
    width = math.prod(rest)
    columns = torch.arange(min(width, _COLUMNS)) * width // min(width, _COLUMNS)
    count = min(length, _FEW // len(columns))
    rows = torch.arange(count) * length // count
    if isinstance(tensor, OnDisk):
        tensor, rows = tensor.cache.rows(tensor.place, rows), torch.arange(count)
    at = (rows[:, None], *(torch.unravel_index(columns, tuple(rest)) if rest else ()))
    return tensor.detach()[tuple(index.to(tensor.device) for index in at)]


def stored_dtype(model: nn.Module) -> torch.dtype:
    """Return the number format that a model is saved in: that in which it was read."""
    read = FLOATS.get(lineage_of(model).stored_dtype or "")
    return read or number_format(model) or torch.float32


@dataclass(frozen=True)
class Computed:
    """In which number format a model computes, and by which kernels of attention.

    dtype: Number format in which it computes.
    stored_dtype: That of the weights on disk.
    attention: The implementation that transformers chose; None for other models.
    """

    dtype: str
    stored_dtype: str
    device: str
    attention: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Computed:
        """Look at a model."""
        stored = stored_dtype(model)
        formats = number_format(model) or stored, stored
        own, disk = (str(kind).removeprefix("torch.") for kind in formats)
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        return cls(own, disk, str(device_of(model)), attention)

    def sentence(self) -> str:
        """Say it."""
        stored = "" if self.stored_dtype == self.dtype else f" (stored as {self.stored_dtype})"
        attention = "" if self.attention is None else f", {self.attention} attention"
        return f"{self.dtype} on {self.device}{stored}{attention}"


_STRUCTURE = "osscar_structure"
"""The attribute of a model that holds its `_DenseStructure`."""


@dataclass(frozen=True, eq=False)
class _DenseStructure:
    """A dense model with parameters on 'meta', which is no module of the model that knows it."""

    model: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> _DenseStructure:
        return self  # nobody changes it


def remember_structure(model: nn.Module, inputs: Inputs | None = None) -> None:
    """Note the structure of a dense model before it is changed, and the form of its inputs.

    A model from which units were removed already is left with what is known of it; so is one that
    cannot be copied, and one on disk, whose library builds it.
    """
    is_dense = not lineage_of(model).plans and any(True for _ in model.parameters())
    if structure_of(model) is None and is_dense and not is_on_disk(model):
        with suppress(ModelError):
            dense = with_zeros(model, torch.device("meta"))
            forget_cached(dense)
            setattr(model, _STRUCTURE, _DenseStructure(dense))
    before = lineage_of(model).sample
    if inputs is not None and (before is None or before.outputs):  # which are of another model
        note(model, sample=Sample.like(by_name(model, inputs)) or before)


def structure_of(model: nn.Module) -> nn.Module | None:
    """Return the structure of the dense model that a model was made of, if it is known."""
    found = getattr(model, _STRUCTURE, None)
    return found.model if isinstance(found, _DenseStructure) else None


def hand_on(model: nn.Module, made: nn.Module) -> None:
    """Give a model that was made from another the lineage and the dense structure of that one."""
    setattr(made, LINEAGE, lineage_of(model))
    setattr(made, _STRUCTURE, getattr(model, _STRUCTURE, None))


def with_zeros(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model with parameters of zeros on a device; tied ones stay tied."""
    zeros = {
        id(p): nn.Parameter(torch.zeros_like(p, device=device), p.requires_grad)
        for p in model.parameters()
    }
    return copied(model, zeros)
