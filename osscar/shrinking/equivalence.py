"""The proof that a shrunk model computes what it should: the masked model's outputs, and no others.

A model is *masked* when whatever reads the removed units is zero.  Units that nothing reads can
leave, so the shrunk model has to give the same outputs, up to rounding.
"""

from __future__ import annotations

import inspect
import linecache
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from graph.tracing.export import failing_module
from graph.tracing.preserve import forget_derived
from osscar.base.errors import AdapterError, EquivalenceError, FileError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.network.modules import fresh, graphics_cards, number_format
from osscar.network.predictions import known_prediction
from osscar.offload.interleaved import run_interleaved
from osscar.shrinking.attention import AnyHeads

Inputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
"""Positional or keyword arguments of a model's forward pass."""

_FINER = {
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Relative to the largest output: rounding alone, since products are summed in another order.
Models round to float32 inside (normalization, rotary position) even when they run in float64, and
thirty pruned layers amplify that a thousandfold."""

_PIECE = 1 << 20
"""Numbers that are compared at once."""

ROWS_OF_16_BYTES = "strides should be multiple of 16 bytes"
"""How torch's multiplication of all experts at once refuses a width."""


@torch.no_grad()
def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model returns, without the keys and values that it may keep."""
    if not isinstance(inputs, Mapping):
        return model(*fresh(inputs))
    inputs = dict(fresh(inputs))
    if has_cache(model):
        # Keys and values lose their heads, so they differ in shape, as they should.
        inputs.setdefault("use_cache", False)
    if _takes(model, "output_router_logits"):
        inputs.setdefault("output_router_logits", False)  # of which there are as many as experts
    return model(**inputs)


def has_cache(model: nn.Module) -> bool:
    """Whether a model can be told to keep keys and values."""
    return _takes(model, "use_cache")


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def comparable(result: Any) -> list[Tensor]:
    """Return the outputs that are real or complex numbers; where there are none, all of them."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    if not tensors:
        raise EquivalenceError(
            f"nothing can be compared: the model returned a {type(result).__name__} without a "
            "tensor; let its forward return one, or a tuple or dict of them"
        )
    return [tensor for tensor in tensors if _is_number(tensor)] or tensors


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def finer_precision(model: nn.Module, example: Inputs | None = None) -> Iterator[None]:
    """Compute in the next finer number format, in which rounding cannot hide a wrong slice.

    A deep network that was pruned badly amplifies rounding a thousandfold. Every tensor returns to
    its own format, with the same value. A model whose code or kernels know only its own format
    keeps that, if an `example` to try it on is given.
    """
    formats = {name: tensor.dtype for name, tensor in _tensors(model)}
    own = number_format(model)
    # What a model in half precision keeps in float32, such as frequencies, is as fine already.
    done = {_FINER.get(own, own)} if own is not None else set()
    try:
        for _, tensor in _tensors(model):
            if tensor.dtype not in done:
                tensor.data = tensor.data.to(_FINER.get(tensor.dtype, tensor.dtype))
        forget_derived(model)
        if example is not None and not runs(model, in_format_of(example, model)):
            _return_to(model, formats)
        yield
    finally:
        _return_to(model, formats)


def _return_to(model: nn.Module, formats: Mapping[str, torch.dtype]) -> None:
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(formats.get(name, tensor.dtype))
    forget_derived(model)


_I = TypeVar("_I", bound=Inputs)


def in_format_of(inputs: _I, model: nn.Module) -> _I:
    """Return inputs whose fractions have the number format of a model's weights."""
    kind = number_format(model)
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda t: t.to(kind) if kind and t.is_floating_point() else t, inputs
    )


def runs(model: nn.Module, example: Inputs) -> bool:
    """Whether a model can be called."""
    try:
        call(model, example)
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        return False
    return True


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


_NAMES = ("the masked one", "the shrunk model")


def prove_equal(
    masked: Iterable[Tensor],
    shrunk: Iterable[Tensor],
    *,
    tolerance: float | None = None,
    names: tuple[str, str] = _NAMES,
) -> float:
    """Compare the outputs of two models, mostly of the masked and of the shrunk one.

    Return the largest difference, relative to the largest output; by default the tolerance is that
    of the number format, and `names` are what both are in an error.
    """
    worst, compared = 0.0, False
    one, other = names
    for a, b in zip(masked, shrunk, strict=True):
        if a.shape != b.shape:
            raise EquivalenceError(
                f"{other} puts out {tuple(b.shape)}, {one} {tuple(a.shape)}, so that a size is "
                "kept that did not follow"
            )
        allowed = _TOLERANCE.get(a.dtype, 1e-4) if tolerance is None else tolerance
        error = _difference(a, b, names)
        if error is None:
            continue
        if not error <= allowed:
            raise EquivalenceError(
                f"{other}'s output differs from {one}'s by {error:.2e} of its largest value "
                f"(tolerance {allowed:.0e})"
            )
        worst, compared = max(worst, error), True
    if not compared:
        raise EquivalenceError(
            "nothing can be compared: every output of the model is empty, or nowhere finite; "
            "prove it on other inputs"
        )
    return worst


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return how far two passes are apart, relative to the largest output of each kind.

    It is infinite where shapes, whole numbers, or the places of infinities differ.
    """
    if [one.shape for one in first] != [one.shape for one in second]:
        return math.inf
    try:
        found = [_difference(a, b) for a, b in zip(first, second, strict=True)]
    except EquivalenceError:
        return math.inf
    return max((error for error in found if error is not None), default=0.0)


def rounding(outputs: Sequence[Tensor]) -> float:
    """Return how far two passes may be apart by rounding alone, in the coarsest format of them."""
    kinds = {one.dtype for one in outputs if _is_number(one)}
    return max((torch.finfo(kind).eps ** 0.5 for kind in kinds), default=0.0)


def _difference(a: Tensor, b: Tensor, names: tuple[str, str] = _NAMES) -> float | None:
    """Return the largest difference, relative to the largest value; None if there is no value."""
    one, other = names
    if not a.numel():
        return None
    if not _is_number(a):
        if not torch.equal(a, b):
            share = float((a != b).double().mean())
            raise EquivalenceError(
                f"{other}'s output is another one than {one}'s at {share:.1%} of its {a.dtype} "
                "entries, which have to be equal"
            )
        return 0.0
    worst = largest = 0.0
    some = False
    # In pieces, since logits are large, and each step of the comparison copies them.
    for x, y in zip(*(torch.split(t.flatten(), _PIECE) for t in (a, b)), strict=True):
        x, y = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, y))
        finite = torch.isfinite(x)
        # Masks put out infinity on purpose: it has to stay where it is, and its sign, too.
        same = torch.equal(finite, torch.isfinite(y))
        if not same or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
            raise EquivalenceError(
                f"{other}'s output is infinite, or not a number, at other places than {one}'s"
            )
        if bool(finite.any()):
            x, y, some = x[finite], y[finite], True
            worst = max(worst, float((x - y).abs().max()))
            largest = max(largest, float(x.abs().max()))
    return worst / (largest or 1.0) if some else None


# ---- modules that cannot follow ----------------------------------------------------------


def explained(error: Exception, model: nn.Module) -> AdapterError:
    """Say which module of a shrunk model failed, in which line, and what it keeps."""
    name = failing_module(error.__traceback__, model)
    while name and _is_stock_layer(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    module = model.get_submodule(name)
    kind = _kind(module)
    line = _failing_line(error.__traceback__, module)
    integers = {key: value for key, value in vars(module).items() if type(value) is int}
    named = {key: value for key, value in integers.items() if key in line} or integers
    kept = ", ".join(f"{key} = {value}" for key, value in named.items()) or "no number"
    reason = first_line(error)
    start = f"module {name or 'the model'!r} ({kind.__name__}) cannot follow its units: {reason}"
    if ROWS_OF_16_BYTES in reason:
        return AdapterError(
            f"{start}; it multiplies all experts at once, which takes only rows of whole 16 bytes: "
            "keep a multiple of 4 units, of 8 in half precision (round_to=4 or 8)"
        )
    if _is_stock_layer(module):
        return AdapterError(f"{start}, in `{line}`")
    return AdapterError(
        f"{start}, in `{line}`; it keeps {kept}. "
        "In code of your own, write -1 for that size or take it from a weight; elsewhere register "
        f'what has to change with @osscar.adapter("{kind.__module__}.{kind.__qualname__}")'
    )


def _kind(module: nn.Module) -> type:
    """Return the class that a module had before its forward pass was replaced."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, AnyHeads))


def _is_stock_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that many share: what calls it has the wrong number."""
    kind = _kind(module)
    return kind is Conv1D or kind.__module__.startswith("torch.nn.")


def _failing_line(trace: TracebackType | None, module: nn.Module) -> str:
    """Return the innermost line of source that ran on behalf of a module."""
    found, inside = "", False
    while trace is not None:
        frame = trace.tb_frame
        inside = inside or frame.f_locals.get("self") is module
        code = frame.f_code
        if inside and "/torch/" not in code.co_filename and code.co_name != "__torch_dispatch__":
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            found = line or found
        trace = trace.tb_next
    return found or "forward"


# ---- what is compared --------------------------------------------------------------------


def proof_outputs(
    model: nn.Module, inputs: Sequence[Inputs], *, keeping: bool = False
) -> list[Tensor]:
    """Return every output that can be compared, on every input, one after another.

    These are those of floating-point or complex numbers, and where a model has none, all. A model
    that draws random numbers draws the same ones each time. With `keeping`, the logits on the first
    input come last, of a pass that keeps keys and values, or a state, and has just begun: of models
    that keep some, and whose inputs do not say so themselves. What is kept is no output: it changes
    with the heads, as it should.
    """
    first = inputs[0] if inputs else ()
    once_more = (
        [{**first, "use_cache": True}]
        if keeping and isinstance(first, Mapping) and "use_cache" not in first and has_cache(model)
        else []
    )
    passes = [partial(call, model, one) for one in (*inputs, *once_more)]

    def run() -> list[Tensor]:
        found = run_interleaved(model, passes)
        outputs = [output for one in found[: len(inputs)] for output in comparable(one)]
        return [*outputs, *map(_first, found[len(inputs) :])]

    return _without_chance(model, run)


def outputs_or_none(model: nn.Module, example: Inputs) -> list[Tensor]:
    """Return what a model puts out, nothing if it fails; one that puts out no tensor is refused."""
    try:
        return proof_outputs(model, [example])
    except (FileError, EquivalenceError):
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        return []


def computes(model: nn.Module, example: Inputs, expected: Sequence[Tensor]) -> bool:
    """Whether a model puts out what is expected, which is something."""
    found = outputs_or_none(model, example)
    try:
        return len(expected) == len(found) and math.isfinite(prove_equal(expected, found))
    except EquivalenceError:
        return False


@contextmanager
def proved_unchanged(model: nn.Module, example: Inputs, names: tuple[str, str]) -> Iterator[None]:
    """Prove that a model which runs computes after the block what it did before.

    In a coarse number format, sums in another order would differ.
    """
    with finer_precision(model, example):
        finer = in_format_of(example, model)
        before = outputs_or_none(model, finer)
        yield
        if before:
            prove_equal(before, outputs_or_none(model, finer), names=names)


def _first(result: Any) -> Tensor:
    known = known_prediction(result)
    return comparable(result)[0] if known is None else known


def _without_chance(model: nn.Module, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run with a random generator of its own, and with noise that fits any width."""
    devices = graphics_cards(model)
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        before = _generators(devices)
        found = run()
        if all(map(torch.equal, before, _generators(devices))):
            return found
        torch.manual_seed(0)
        with _SteadyNoise():
            return run()


def _generators(devices: Iterable[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


_ONES_AND_ZEROS = frozenset({"bernoulli", "bernoulli_"})
_ALIKE = frozenset(
    {
        *("rand", "randn", "rand_like", "randn_like", "normal_", "uniform_"),
        *("cauchy_", "exponential_", "geometric_", "log_normal_", "random_"),
    }
)


class _SteadyNoise(TorchDispatchMode):
    """Draw each random tensor anew, and give all of its elements the same value.

    A shrunk model draws fewer numbers than the masked one, and so others for the units that stay.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **options)
        self.drawn += 1
        torch.manual_seed(self.drawn)
        name, found = func.overloadpacket.__name__, func(*args, **options)
        if name in _ONES_AND_ZEROS and found.is_floating_point():
            # Their mean: a mask of dropout that happens to be zero would hide what comes before it.
            default = args[0] if name == "bernoulli" else 0.5
            mean = args[1] if len(args) > 1 else options.get("p", default)
            return found.copy_(mean) if isinstance(mean, Tensor) else found.fill_(mean)
        if name in _ALIKE:
            like, *others = args
            one = like.new_empty(1) if isinstance(like, Tensor) else [1]
            torch.manual_seed(self.drawn)
            return found.fill_(func(one, *others, **options).item())
        return found
