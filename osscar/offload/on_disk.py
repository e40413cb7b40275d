"""Parameters whose values lie in files, and are on a device only while an operator reads them.

A model that is larger than memory has its structure, and an `OnDisk` in the place of each
parameter.  Where an operator of torch meets one, it gets the values: read from the file, which
must not have changed since it was opened, moved to the device, changed as pruning says
(`osscar.offload.places`), and kept in a `WeightCache` there for the next batch as long as there is
room.  Whatever runs the model need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graph.tracing.patches import computes_shapes_alone
from graph.tracing.preserve import asked_of_to, preserved
from osscar.base.errors import ModelError
from osscar.offload.places import Place, WeightCache

# ---- parameters --------------------------------------------------------------------------


class OnDisk(nn.Parameter):
    """A parameter that is read whenever an operator needs its values.

    To the code of a model it is a parameter on the device of its cache.  `detach`, `clone`, `to`,
    `index_select` and the like read nothing; nothing may write to it in place (see `written`).
    """

    place: Place
    """Where its values are; assigning it gives the parameter other ones."""
    cache: WeightCache
    """Which keeps them, on the device that operators find them on."""

    def __new__(cls, place: Place, cache: WeightCache) -> OnDisk:
        """Make a tensor that has a shape and a number format, and no memory."""
        made: OnDisk = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, dtype=place.dtype, device=cache.device
        )
        made.place, made.cache = place, cache
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Do nothing: torch calls this with arguments of its own."""

    def values(self) -> Tensor:
        """Return the values, for reading; without values where shapes are all that counts."""
        if computes_shapes_alone():
            return torch.empty(self.place.shape, dtype=self.place.dtype, device=self.cache.device)
        return self.cache.values(self.place)

    def like(self, place: Place) -> OnDisk:
        """Return another parameter with values of the same cache."""
        return OnDisk(place, self.cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDisk:
        copy: OnDisk = memo.setdefault(id(self), self.like(self.place))
        return copy

    def __reduce_ex__(self, _: Any) -> Any:
        raise ModelError(f"{self.place.stored.name!r} lies on disk, and cannot be pickled")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        lazy = _LAZY.get(func)
        if lazy is not None and isinstance(args[0], OnDisk):
            return lazy(*args, **options)
        if func is F.embedding and _reads_rows(*args, **options):
            return _embedding(args[0], args[1])
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if _writes_to(func, args, options):
            name = getattr(func, "__name__", func)
            raise ModelError(
                f"code of the model writes to a weight ({name!r}), which is read from disk; omit "
                "max_memory (`--max-memory`)"
            )
        return func(*_with_values(args), **_with_values(options))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*_with_values(args), **_with_values(dict(kwargs or {})))


def _reads_rows(
    tokens: Any, table: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> bool:
    """Whether looking tokens up reads some rows of a table, and changes none."""
    return isinstance(table, OnDisk) and max_norm is None and not computes_shapes_alone()


def _embedding(tokens: Tensor, table: OnDisk) -> Tensor:
    """Look tokens up in a table of which only their rows are read."""
    rows, places = torch.unique(tokens, return_inverse=True)
    if not (len(rows) and int(rows[0]) >= 0 and int(rows[-1]) < len(table)):
        return F.embedding(tokens, table.values())  # which says so
    return F.embedding(places, table.cache.rows(table.place, rows))


def _with_values(tree: Any) -> Any:
    return pytree.tree_map_only(OnDisk, lambda tensor: tensor.values(), tree)


def _writes_to(func: Any, args: Any, options: Mapping[str, Any]) -> bool:
    """Whether a function would change a parameter itself, not the values that are read of it."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in (
        "__set__",
        "__setitem__",
        *(f"__i{operator}__" for operator in ("add", "sub", "mul", "truediv", "and", "or", "xor")),
    )
    out = pytree.tree_leaves(options.get("out"))
    return (in_place and isinstance(args[0], OnDisk)) or any(isinstance(t, OnDisk) for t in out)


# ---- what needs no values ----------------------------------------------------------------


def _same(tensor: OnDisk, *_: Any, **__: Any) -> OnDisk:
    return tensor.like(tensor.place)


def _to(tensor: OnDisk, *args: Any, **options: Any) -> OnDisk:
    device, dtype, _ = asked_of_to(*args, **options)
    place = tensor.place if dtype is None else tensor.place.cast(dtype)
    return OnDisk(place, tensor.cache if device is None else tensor.cache.on(device))


def _assign(tensor: OnDisk, data: Tensor) -> None:
    if isinstance(data, OnDisk):
        tensor.place, tensor.cache = data.place, data.cache
    else:
        tensor.place = tensor.cache.put(data, tensor.place.stored.name)


_LAZY: Mapping[Any, Callable[..., Any]] = {
    Tensor.detach: _same,
    Tensor.clone: _same,
    Tensor.contiguous: lambda tensor, *_, **__: tensor,
    Tensor.cpu: lambda tensor, *_, **__: _to(tensor, "cpu"),
    Tensor.cuda: lambda tensor, device="cuda", *_, **__: _to(
        tensor, torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
    ),
    Tensor.requires_grad_: lambda tensor, *_, **__: tensor,
    Tensor.requires_grad.__set__: lambda *_: None,  # type: ignore[attr-defined]
    Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    Tensor.data.__set__: _assign,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type: lambda *tensors: all(
        isinstance(tensor, OnDisk) for tensor in tensors
    ),
    Tensor.to: _to,
    Tensor.index_select: lambda tensor, dim, index: tensor.like(tensor.place.selected(dim, index)),
    Tensor.float: lambda tensor: _to(tensor, torch.float32),
    Tensor.double: lambda tensor: _to(tensor, torch.float64),
    Tensor.half: lambda tensor: _to(tensor, torch.float16),
    Tensor.bfloat16: lambda tensor: _to(tensor, torch.bfloat16),
    # What it was made with may be another number format and device than it has now.
    Tensor.device.__get__: lambda tensor: tensor.cache.device,
    Tensor.is_cpu.__get__: lambda tensor: tensor.cache.device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda tensor: tensor.cache.device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor: -1 if tensor.is_cpu else tensor.cache.device.index,
    Tensor.dtype.__get__: lambda tensor: tensor.place.dtype,  # type: ignore[attr-defined]
    Tensor.element_size: lambda tensor: tensor.place.dtype.itemsize,
    Tensor.itemsize.__get__: lambda tensor: tensor.place.dtype.itemsize,  # type: ignore[attr-defined]
    Tensor.nbytes.__get__: lambda tensor: tensor.place.nbytes,  # type: ignore[attr-defined]
}

_DESCRIBING = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in (
                *("shape", "layout", "ndim", "is_leaf", "requires_grad"),
                *("grad", "_grad", "grad_fn", "_version", "_base", "is_nested", "is_sparse"),
                *("is_meta", "is_quantized", "is_mkldnn", "is_sparse_csr"),
                "_backward_hooks",
            )
        ),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.__len__),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_inference),
        *(Tensor.storage_offset, Tensor.__hash__, Tensor.untyped_storage),
        *(torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference),
    }
)


# ---- models ------------------------------------------------------------------------------


def is_on_disk(model: nn.Module) -> bool:
    """Whether parameters of a model are read from disk."""
    return any(isinstance(parameter, OnDisk) for parameter in model.parameters())


def weight_cache(model: nn.Module) -> WeightCache | None:
    """Return what keeps the values of a model's parameters, or None if they are in memory."""
    return next((p.cache for p in model.parameters() if isinstance(p, OnDisk)), None)


def values_of(tensor: Tensor) -> Tensor:
    """Return the values of any tensor outside of autograd, for reading, on its device."""
    return tensor.values() if isinstance(tensor, OnDisk) else tensor.detach()


def room_for(
    model: nn.Module, needed: int, *, beside: bool = False
) -> AbstractContextManager[None]:
    """Leave room for other things than weights while the block runs, if these lie on disk."""
    cache = weight_cache(model)
    if cache is None:
        return nullcontext()
    return cache.leaving(needed + (cache.left_free if beside else 0))


WIDE = 5
"""Tensors, as wide as the widest layer, that a forward pass holds at once."""

_SUSPENDED = 6
"""Tensors as wide as the model that a suspended batch holds, besides what the consumer reads."""

SMALL = 128 << 20
"""Bytes for all else."""


def pass_bytes(model: nn.Module, positions: int) -> int:
    """Return what a forward pass of so many positions needs; its logits are widest, most often."""
    widest = max((size for p in model.parameters() for size in p.shape), default=0)
    return 4 * WIDE * positions * widest + SMALL


def suspended_bytes(positions: int, width: int, inputs: int, itemsize: int) -> int:
    """Return what so many positions hold where they are suspended before a consumer of the walk.

    width: Of the model.
    inputs: What the consumer reads.
    itemsize: Bytes of an activation; the consumer's outputs, which are compared, are in float32.
    """
    return positions * (((_SUSPENDED - 1) * width + inputs) * itemsize + 4 * width)


def room_for_pass(model: nn.Module, positions: int) -> AbstractContextManager[None]:
    """Leave room for a forward pass of so many positions, as `room_for` does."""
    return room_for(model, pass_bytes(model, positions))


@contextmanager
def written(module: nn.Module, name: str) -> Iterator[Tensor]:
    """Yield a parameter to be written to in place; one on disk is read, and written back."""
    parameter = getattr(module, name)
    on_disk = isinstance(parameter, OnDisk)
    values = parameter.cache.read(parameter.place) if on_disk else parameter.detach()
    yield values
    if on_disk:
        parameter.data = values


def put_back(module: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Give parameters the values again of which these are copies.

    Of one that lies on disk, a copy is the place of its values, and nothing is read or written.
    """
    for name, values in copies.items():
        parameter = getattr(module, name)
        if isinstance(parameter, OnDisk):
            parameter.data = values
        else:
            parameter.detach().copy_(values)


@contextmanager
def shapes_only(model: nn.Module, example: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Put plain parameters of the same shapes in the place of those on disk, for tracing.

    They lie on the CPU, as does the example that is yielded: nobody reads or writes them there.
    """
    if not is_on_disk(model):
        yield dict(example)
        return
    plain: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        on_disk = isinstance(tensor, OnDisk)
        there = torch.empty(tensor.shape, dtype=tensor.dtype) if on_disk else tensor.detach().cpu()
        if isinstance(tensor, nn.Parameter):
            there = nn.Parameter(there, on_disk or tensor.requires_grad)
        plain[id(tensor)] = there
    with preserved(model):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                table.update({n: plain[id(t)] for n, t in table.items() if t is not None})
        yield {name: tensor.cpu() for name, tensor in example.items()}
