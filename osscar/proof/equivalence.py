"""Outputs of two models are compared: of the masked and of the smaller one, mostly.

A model is *masked* when whatever reads the removed units is zero.  Units that nothing reads can
leave, so the smaller model has to give the same outputs, up to rounding.  That its code does so for
all inputs is what programs prove (`osscar.proof.structural`); outputs are a check of kernels.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph.tracing.export import failing_module
from graph.tracing.preserve import forget_derived
from osscar.base.errors import EquivalenceError, FileError, ModelError, OsscarError, first_line
from osscar.base.memory import attempt
from osscar.network.modules import (
    device_of,
    drawing_alike,
    fresh,
    identity_of,
    named_tensors,
    number_format,
    tensors_in,
)
from osscar.network.predictions import known_output
from osscar.offload.on_disk import OnDisk
from osscar.proof.plan import PruningPlan
from osscar.routing.routers import without_experts

Inputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""Positional or keyword arguments of a model's forward pass."""

_FINER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


class _Rounding(NamedTuple):
    """What rounding alone may do to outputs of a number format.

    Products are summed in another order, models round to float32 inside (normalization, rotary
    position) even when they run in float64, and thirty pruned layers amplify that a thousandfold.

    tolerance: Largest difference within a column, relative to the largest value of the column.
    least: A column counts as having values at least so large, relative to the whole output.
    ties: Share of whole numbers that may differ, as the fractions that they are rounded from or
        chosen by are equal up to rounding.
    """

    tolerance: float
    least: float
    ties: float


_ROUNDING = {
    torch.float64: _Rounding(1e-4, 1e-4, 1e-5),
    torch.float32: _Rounding(1e-3, 1e-1, 1e-3),
    torch.float16: _Rounding(1e-2, 1.0, 1e-2),
    torch.bfloat16: _Rounding(5e-2, 1.0, 5e-2),
}


class Match(NamedTuple):
    """How outputs of two models are alike.

    error: Largest difference, relative to the largest value of its column.
    ties: Whole numbers that differ, as what they come from is equal up to rounding.
    """

    error: float
    ties: int


_PIECE = 1 << 20
"""Numbers that are compared at once."""


@torch.no_grad()
def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model returns, without the keys and values that it may keep."""
    if not isinstance(inputs, Mapping):
        return model(*fresh(inputs))
    inputs = dict(fresh(inputs))
    if takes(model, "use_cache"):
        # Keys and values lose their heads, so they differ in shape, as they should.
        inputs.setdefault("use_cache", False)
    if takes(model, "output_router_logits"):
        inputs.setdefault("output_router_logits", False)  # of which there are as many as experts
    return model(**inputs)


def cache_name(model: nn.Module) -> str:
    """Return what a model of transformers calls its cache, by an older or a newer name."""
    return "cache" if takes(model, "cache") else "past_key_values"


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of a model has an argument of a name."""
    return argument in inspect.signature(model.forward).parameters


def comparable(result: Any) -> list[Tensor]:
    """Return the outputs that are real or complex numbers; where there are none, all of them."""
    tensors = all_outputs(result)
    return [tensor for tensor in tensors if _is_number(tensor)] or tensors


def all_outputs(result: Any) -> list[Tensor]:
    """Return the tensors that a model returns, of which there has to be one."""
    tensors = tensors_in(result)
    if not tensors:
        raise EquivalenceError(
            f"nothing can be compared: the model returned a {type(result).__name__} without a "
            "tensor; let its forward return one, or a tuple or dict of them"
        )
    return tensors


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def finer_precision(model: nn.Module, example: Inputs | None = None) -> Iterator[None]:
    """Compute in the next finer number format, in which rounding cannot hide a wrong slice.

    A deep network that was pruned badly amplifies rounding a thousandfold.  A model whose code or
    kernels know only its own format keeps that, if an `example` to try it on is given.
    """
    tensors = named_tensors(model)
    formats = {name: tensor.dtype for name, tensor in tensors}
    memory = {id(tensor): identity_of(tensor)[0] for _, tensor in tensors}
    holders = Counter(memory.values())
    shared = {id(one): one.data for _, one in tensors if holders[memory[id(one)]] > 1}
    own = number_format(model)
    # What a model in half precision keeps in float32, such as frequencies, is as fine already.
    done = None if own is None else _FINER.get(own, own)

    def put_back() -> None:
        for name, tensor in named_tensors(model):
            data = shared.get(id(tensor))
            tensor.data = tensor.data.to(formats.get(name, tensor.dtype)) if data is None else data
        forget_derived(model)

    try:
        for _, tensor in tensors:
            if tensor.dtype is not done:
                tensor.data = tensor.data.to(_FINER.get(tensor.dtype, tensor.dtype))
        forget_derived(model)
        if example is not None and not runs(model, in_format_of(example, model)):
            put_back()
        yield
    finally:
        put_back()


_I = TypeVar("_I", bound=Inputs)


def in_format_of(inputs: _I, model: nn.Module) -> _I:
    """Return inputs whose fractions have the number format of a model's weights."""
    kind = number_format(model)
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda t: t.to(kind) if kind and t.is_floating_point() else t, inputs
    )


def to_device(inputs: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return inputs on a model's device, with fractions in the number format of its weights."""
    device = device_of(model)
    return in_format_of(pytree.tree_map_only(Tensor, lambda x: x.to(device), dict(inputs)), model)


def by_name(model: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
    """Return inputs by the names of a model's arguments."""
    if isinstance(inputs, Mapping):
        return inputs
    return inspect.signature(model.forward).bind(*inputs).arguments


_NAMES = ("the masked one", "the shrunk model")


def prove_equal(
    masked: Iterable[Tensor], shrunk: Iterable[Tensor], names: tuple[str, str] = _NAMES
) -> Match:
    """Compare the outputs of two models, mostly of the masked and of the shrunk one.

    Each column of an output (an entry of its last dimension, or of its second) is compared relative
    to its own size, by the tolerance of its number format.  `names` are what errors call both.
    """
    worst, ties, compared = 0.0, 0, False
    one, other = names
    pairs = list(zip_longest(masked, shrunk))
    kinds = [a.dtype for a, _ in pairs if a is not None and a.numel() and _is_number(a)]
    for a, b in pairs:
        if a is None or b is None:
            fewer, more = names if a is None else names[::-1]
            raise EquivalenceError(
                f"{fewer} returns fewer tensors than {more}; let forward return as many at every "
                "width"
            )
        if a.shape != b.shape:
            raise EquivalenceError(
                f"{other} returns {tuple(b.shape)}, and {one} {tuple(a.shape)}: the code has a "
                "fixed size that did not change"
            )
        if not a.numel():
            continue
        if not _is_number(a):
            differing = int((a != b).sum())
            coarsest = max((_rounding_of(kind).ties for kind in kinds), default=0.0)
            if differing > max(1.0 if kinds else 0.0, coarsest * a.numel()):
                raise EquivalenceError(
                    f"{other}'s output differs from {one}'s at {differing / a.numel():.1%} "
                    f"of its {a.dtype} entries, which have to be equal"
                )
            ties, compared = ties + differing, True
            continue
        error = _difference(a, b, names)
        if error is None:
            continue
        allowed = _rounding_of(a.dtype).tolerance
        if not error <= allowed:
            raise EquivalenceError(
                f"{other}'s output differs from {one}'s by {error:.2e} of the largest value of a "
                f"column (tolerance {allowed:.0e})"
            )
        worst, compared = max(worst, error), True
    if not compared:
        raise EquivalenceError(
            "nothing can be compared: every output of the model is empty, or nowhere finite; "
            "prove it on other inputs"
        )
    return Match(worst, ties)


def _rounding_of(kind: torch.dtype) -> _Rounding:
    return _ROUNDING.get(kind, _ROUNDING[torch.float64])


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return how far two passes are apart, as `prove_equal` measures it.

    It is infinite where shapes, whole numbers, or the places of infinities differ.
    """
    if [one.shape for one in first] != [one.shape for one in second]:
        return math.inf
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.numel()]
    if not all(torch.equal(a, b) for a, b in pairs if not _is_number(a)):
        return math.inf
    try:
        found = [_difference(a, b) for a, b in pairs if _is_number(a)]
    except EquivalenceError:
        return math.inf
    return max((error for error in found if error is not None), default=0.0)


def rounding(outputs: Sequence[Tensor]) -> float:
    """Return how far two passes may be apart by rounding alone, in the coarsest format of them."""
    kinds = {one.dtype for one in outputs if _is_number(one)}
    return max((torch.finfo(kind).eps ** 0.5 for kind in kinds), default=0.0)


def _difference(a: Tensor, b: Tensor, names: tuple[str, str] = _NAMES) -> float | None:
    """Return the largest difference, relative to the largest value of its column.

    None if no value is finite.
    """
    a, b = (t.reshape(len(t) if t.dim() > 1 else 1, -1, *t.shape[2:][-1:]) for t in (a, b))
    apart: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    largest, some = 0.0, False
    # In pieces, since logits are large, and each step of the comparison copies them.
    rows = max(1, _PIECE // a[0].numel())
    for x, y in zip(*(torch.split(t, rows) for t in (a, b)), strict=True):
        x, y = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        finite = torch.isfinite(x)
        # Masks contain infinity on purpose: it has to stay where it is, and its sign, too.
        same = torch.equal(finite, torch.isfinite(y))
        if not same or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
            one, other = names
            raise EquivalenceError(
                f"{other}'s output is infinite, or not a number, at other places than {one}'s"
            )
        some = some or bool(finite.any())
        size, gap = (t.abs().where(finite, 0.0) for t in (x, x - y))
        largest = max(largest, float(size.max()))
        for dim in range(1, x.dim()):
            others = [d for d in range(x.dim()) if d != dim]
            for found, values in ((apart, gap), (sizes, size)):
                most = values.amax(others)
                found[dim] = torch.maximum(found.get(dim, most), most)
    least = _rounding_of(a.dtype).least * largest
    errors = [(apart[dim] / sizes[dim].clamp_min(least or 1.0)).max() for dim in apart]
    return float(max(errors)) if some else None


# ---- what is compared --------------------------------------------------------------------


def proof_outputs(
    model: nn.Module, inputs: Sequence[Inputs], *, keeping: bool = False
) -> list[Tensor]:
    """Return every tensor that a model returns, on every input, one after another.

    A model that draws random numbers draws the same ones each time.  With `keeping`, the logits on
    the first input come last: of a pass that keeps keys and values, or a state, and of one that
    goes on from it.  What is kept is no output: it changes with the heads, as it should.
    """
    with drawing_alike(model):
        outputs = [output for one in inputs for output in all_outputs(call(model, one))]
        return outputs + (_kept_outputs(model, inputs[0]) if keeping else [])


def _kept_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the logits of a pass that keeps its state, and of one that goes on from it, if any."""
    if not isinstance(inputs, Mapping) or "use_cache" in inputs or not takes(model, "use_cache"):
        return []
    begun, name = call(model, {**inputs, "use_cache": True}), cache_name(model)
    kept = getattr(begun, name, None)
    if kept is None or set(inputs) != {"input_ids"}:
        return [_first(begun)]
    step = {"input_ids": inputs["input_ids"][:, -1:], name: kept, "use_cache": True}
    return [_first(begun), _first(call(model, step))]


def outputs_or_none(model: nn.Module, example: Inputs) -> list[Tensor]:
    """Return what a model returns, nothing if it fails; one that returns no tensor is refused."""
    with attempt(FileError, EquivalenceError):  # the model may be anyone's code
        return proof_outputs(model, [example])
    return []


def runs(model: nn.Module, example: Inputs) -> bool:
    """Whether a model can be called."""
    return bool(outputs_or_none(model, example))


def computes(model: nn.Module, example: Inputs, expected: Sequence[Tensor]) -> bool:
    """Whether a model returns what is expected, which is something."""
    found = outputs_or_none(model, example)
    try:
        prove_equal(expected, found)
    except EquivalenceError:
        return False
    return True


@contextmanager
def proved_unchanged(model: nn.Module, example: Inputs, names: tuple[str, str]) -> Iterator[None]:
    """Prove that a model which runs computes after the block what it did before."""
    with finer_precision(model, example):
        finer = in_format_of(example, model)
        before = outputs_or_none(model, finer)
        yield
        if before:
            prove_equal(before, outputs_or_none(model, finer), names=names)


def _first(result: Any) -> Tensor:
    known = known_output(result)[1]
    return comparable(result)[0] if known is None else known


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Zero what reads the units that a plan removes, and put it back afterwards.

    Units that are routed compute what they did, and no token is sent to those that are removed.
    """
    routed = [group for group in plan.groups if group.kind.routed]
    with ExitStack() as undo:
        for group in (group for group in plan.groups if not group.kind.routed):
            for slot in group.consumers:
                weight = attrgetter(slot.tensor)(model)
                index = torch.tensor(slot.indices(group.gone), device=weight.device)
                if isinstance(weight, OnDisk):
                    undo.callback(setattr, weight, "place", weight.place)
                    weight.place = weight.place.zeroed(slot.dim, index)
                    continue
                weight = weight.detach()
                before = weight.index_select(slot.dim, index)
                undo.callback(weight.index_copy_, slot.dim, index, before)
                weight.index_fill_(slot.dim, index, 0.0)
        undo.enter_context(without_experts(model, [(one.slots, one.kept) for one in routed]))
        yield


def distance_from_masked(
    model: nn.Module, plan: PruningPlan, inputs: Sequence[Inputs], *, keeping: bool
) -> Callable[[nn.Module], Match]:
    """Run a model without the units that a plan removes; return a function that compares others.

    With `keeping`, a pass that keeps its state is compared, too, if the model can run one.
    """
    given = [in_format_of(one, model) for one in inputs]
    with masked(model, plan):
        outputs = list[Tensor]()
        with attempt():  # of the user's forward: not the shrunk model's fault
            outputs = proof_outputs(model, given, keeping=keeping)
        if not outputs:
            keeping, outputs = False, outputs_before(model, given)
    prove_equal(outputs, outputs)  # that there is something to compare

    def distance(smaller: nn.Module) -> Match:
        return prove_equal(outputs, proof_outputs(smaller, given, keeping=keeping))

    return distance


def outputs_before(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return what a model returns before anything is done to it."""
    with attempt(OsscarError) as tried:  # the model may be anyone's code
        return proof_outputs(model, inputs)
    name = failing_module(tried.error.__traceback__, model)
    raise ModelError(
        f"module {name or 'the model'!r} ({type(model.get_submodule(name)).__name__}) fails on "
        f"the inputs of the proof, before anything is removed: {first_line(tried.error):.300}"
    ) from tried.error
