"""The floating-point operations of a forward pass, counted by running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils.flop_counter import FlopCounterMode

from graph.tracing.preserve import without_cache
from osscar.network.modules import fresh


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Count the floating-point operations of one forward pass, by running it.

    Counted are matrix products and convolutions with the shapes that they have: linear layers,
    experts for the rows that are sent to them, and attention (full squares, whatever the mask).  A
    multiplication with its addition counts as two.
    """
    fast = mha.get_fastpath_enabled()
    # No layer of nn.TransformerEncoder or nn.MultiheadAttention is to run as one operator.
    mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), without_cache(model), flop_counter() as counter:
            model(**fresh(inputs))
    finally:
        mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which counts the products that it passes over, too."""
    counter = FlopCounterMode(display=False, custom_mapping=_passed_over())
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    return counter


def multiplies(function: Any) -> bool:
    """Whether an operator may be, or be made of, products that `flop_counter` counts."""
    if not isinstance(function, torch._ops.OpOverload):
        return False
    name: str = function.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return composite or function.overloadpacket in flop_counter().flop_registry


class _Untracked(nullcontext[None]):
    """In the place of what tells the counter of modules, which asks for gradients and may fail."""

    parents: ClassVar = {"Global"}


def _passed_over() -> dict[Any, Callable[..., int]]:
    """Return how to count products which torch's counter passes over, of loaded packages."""
    operators: Mapping[tuple[str, str], Callable[..., int]] = {
        ("aten", "_grouped_mm"): _grouped,
        ("transformers", "grouped_mm_fallback"): _grouped,
        ("torchvision", "deform_conv2d"): _deformed,
        ("aten", "mkldnn_rnn_layer"): _recurrent,
        **{("aten", f"_scaled_dot_product_{name}"): _attention for name in _ATTENTION},
    }
    found = {
        getattr(getattr(torch.ops, space), name, None): formula
        for (space, name), formula in operators.items()
    }
    return {packet: formula for packet, formula in found.items() if packet is not None}


_ATTENTION = ("flash_attention_for_cpu", "attention_math_for_mps", "fused_attention_overrideable")


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Count scores and weighted sums; heads of keys and values may serve several of queries."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _deformed(_: Sequence[int], weight: Sequence[int], *__: Any, out_shape: Any, **___: Any) -> int:
    """Count products of the filters with what they read, (out, in a group, *taps)."""
    return int(2 * math.prod(out_shape) * math.prod(weight[1:]))


def _recurrent(x: Sequence[int], *weights: Any, **__: Any) -> int:
    """Count products of each step, (steps, batch, in), with weights of inputs and of states."""
    entries: int = math.prod(weights[0]) + math.prod(weights[1])
    return 2 * math.prod(x[:-1]) * entries


def _grouped(first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    """Count products of rows with the matrix of their group: (rows, in) by (groups, in, out).

    With both in three dimensions, groups are multiplied one by one; with the second in two, its
    columns are what is divided among groups, and with both in two, what is summed over.
    """
    rows = first[0] * first[1] if len(first) == len(second) == 3 else first[-2]
    return 2 * rows * first[-1] * second[-1]
