"""The floating-point operations of a forward pass, counted by running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from graph.tracing.preserve import without_cache
from osscar.network.hooks import running_modules
from osscar.network.modules import fresh, tensors_in
from osscar.offload.on_disk import OnDisk

aten = torch.ops.aten


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Count the floating-point operations of one forward pass, by running it.

    Counted are the matrix products and convolutions with the shapes that they really have: linear
    layers, experts for the rows that are sent to them, and attention (scores and weighted sums, as
    full squares: a causal mask is not discounted).  A multiplication with its addition counts as
    two.  Look-ups, normalization and other element-wise work are not counted.
    """
    return sum(product.operations for product in products(model, {}, inputs))


def _counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_passed_over())
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter


class _Untracked(nullcontext[None]):
    """In the place of what tells the counter of modules.

    That asks for gradients of what a module reads, and fails where it is given a parameter while
    there are none.
    """

    parents: ClassVar = {"Global"}


def _passed_over() -> dict[Any, Callable[..., int]]:
    """Return how to count the products which torch's counter passes over.

    These are the products of all experts at once, by torch or by transformers where torch does not
    take a number format, deformable convolutions, and attention by a kernel of a processor other
    than CUDA's.  Operators of other packages exist once these are imported.
    """
    operators: Mapping[tuple[str, str], Callable[..., int]] = {
        ("aten", "_grouped_mm"): _grouped,
        ("transformers", "grouped_mm_fallback"): _grouped,
        ("torchvision", "deform_conv2d"): _deformed,
        **{("aten", f"_scaled_dot_product_{name}"): _attention for name in _ATTENTION},
    }
    found = {
        getattr(getattr(torch.ops, space), name, None): formula
        for (space, name), formula in operators.items()
    }
    return {packet: formula for packet, formula in found.items() if packet is not None}


_ATTENTION = (
    "flash_attention_for_cpu",
    "attention_math_for_mps",
    "fused_attention_overrideable",
)


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count scores and weighted sums; heads of keys and values may serve several of queries."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _deformed(_: Sequence[int], weight: Sequence[int], *__: Any, out_shape: Any, **___: Any) -> int:
    """Count products of the filters with what they read, (out, in a group, *taps)."""
    return int(2 * math.prod(out_shape) * math.prod(weight[1:]))


def _grouped(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Count products of rows with the matrix of their group: (rows, in) by (groups, in, out).

    With both in three dimensions, groups are multiplied one by one; with the second in two, its
    columns are what is divided among groups, and with both in two, what is summed over.
    """
    rows = first[0] * first[1] if len(first) == len(second) == 3 else first[-2]
    return 2 * rows * first[-1] * second[-1]


# ---- what is multiplied with what --------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A matrix product or convolution of a forward pass."""

    operations: int
    module: str
    """The innermost module that was running."""
    weights: frozenset[str]
    """The tensors of the model that one of its factors is, is a part of, or was copied from."""
    constant: bool
    """Whether a factor depends on nothing that the model reads, whatever it was made from."""


def products(
    model: nn.Module, names: Mapping[int, str], inputs: Mapping[str, Tensor]
) -> list[_Product]:
    """Return all products of one forward pass, which `count_flops` adds up.

    They tell of the tensors of the model that are named, by their `id`.
    """
    found: list[_Product] = []
    given = fresh(inputs)
    origins, counter = _Origins(model, names, given.values()), _counter()
    with running_modules(model) as running:

        def noting(packet: Any, formula: Callable[..., int]) -> Callable[..., int]:
            factors = slice(0) if packet in _FUSED else _FACTORS.get(packet, slice(2))

            def noted(*args: Any, **kwargs: Any) -> int:
                taken = formula(*args, **kwargs)
                module = running[-1] if running else ""
                found.append(_Product(taken, module, *origins.weights(args[factors], module)))
                return taken

            return noted

        counter.flop_registry = {op: noting(op, f) for op, f in counter.flop_registry.items()}
        fast = mha.get_fastpath_enabled()
        # No layer of nn.TransformerEncoder or nn.MultiheadAttention is to run as one operator.
        mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), without_cache(model), origins, counter:
                model(**given)
        finally:
            mha.set_fastpath_enabled(fast)
    return found


_FACTORS = {aten.addmm: slice(1, 3), aten.baddbmm: slice(1, 3)}
"""Which arguments are multiplied, where they are not the first two."""

_FUSED = frozenset(op for op in _counter().flop_registry if "scaled_dot_product" in str(op))
"""Attention in one operator, whose factors are no weights but what was made with them."""

_JOINING = (aten.cat, aten.stack)
"""Operators whose output is as large as all that they read together."""

_PICKING = (aten.index, aten.index_select, aten.gather)
"""Operators that pick, by numbers that may depend on inputs, such as the matrices of experts."""

_MATRICES = 3
"""Dimensions of a stack of them: what is picked from fewer are rows, such as of tokens."""

_Origin = frozenset[str] | None
"""The tensors of the model that values were copied from; None where they depend on its inputs."""

_CONSTANT: frozenset[str] = frozenset()


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which values are a model's own, by where they lie, until a product takes them.

    Whatever memory an operator writes is noted again, so that what is freed misleads nobody.
    """

    def __init__(
        self, model: nn.Module, names: Mapping[int, str], inputs: Iterable[Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[int, _Origin] = {}
        tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) in names]
        self._parameters = {names[id(p)] for p in model.parameters() if id(p) in names}
        self._owned = {
            name: {names[id(t)] for t in module._parameters.values() if id(t) in names}
            for name, module in model.named_modules()
        }
        for tensor in tensors:
            before = self._found.get(_storage(tensor)) or _CONSTANT
            self._note(tensor, before | {names[id(tensor)]})
        for tensor in inputs:
            self._note(tensor, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        origin = self._of_output(getattr(func, "overloadpacket", func), args, kwargs or {})
        for tensor in tensors_in(out):
            self._note(tensor, origin)
        return out

    def _of_output(self, packet: Any, args: Any, kwargs: Mapping[str, Any]) -> _Origin:
        read = tensors_in((args, kwargs))
        if packet in _PICKING and read and read[0].ndim >= _MATRICES:
            read = read[:1]
        origins = [self._of(tensor) for tensor in read]
        if packet in _PRODUCTS or packet is aten.embedding or None in origins:
            return None
        most = max((tensor.numel() for tensor in read), default=0)
        return _CONSTANT.union(
            *(
                origin
                for tensor, origin in zip(read, origins, strict=True)
                # What is smaller is applied to the others, such as a scale.
                if origin and (packet in _JOINING or tensor.numel() == most)
            )
        )

    def _of(self, tensor: Tensor) -> _Origin:
        return self._found.get(_storage(tensor), _CONSTANT)

    def _note(self, tensor: Tensor, origin: _Origin) -> None:
        place = _storage(tensor)
        if place:
            self._found[place] = origin

    def weights(self, factors: Sequence[Any], module: str) -> tuple[frozenset[str], bool]:
        """Return which weights a product takes, and whether a factor is constant.

        Of two that are, the weights are what the running module owns, or else parameters, or else
        the second.
        """
        origins = [self._of(factor) for factor in factors if isinstance(factor, Tensor)]
        known = [origin for origin in origins if origin is not None]
        owned = self._owned.get(module, set())
        known.sort(key=lambda o: (bool(o & owned), bool(o & self._parameters), bool(o)))
        return known[-1] if known else _CONSTANT, bool(known)


_PRODUCTS = frozenset(_counter().flop_registry)


def _storage(tensor: Tensor) -> int:
    """Return where in memory a tensor lies; 0 if it does not, or, as sparse ones, in several."""
    if isinstance(tensor, OnDisk) or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()
