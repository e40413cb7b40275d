"""Models of any sort: checked, copied, counted, and put into evaluation mode."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from osscar.base.errors import ModelError, NonFiniteError, OptionError, first_line
from osscar.base.inputs import safe_repr
from osscar.base.memory import attempt
from osscar.base.printable import pluralize
from osscar.offload.on_disk import OnDisk, values_of
from osscar.offload.places import as_bytes

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

HALVES = (torch.bfloat16, torch.float16)


def check_finite_weights(
    model: nn.Module, remedy: str = "train the model anew, or load other weights"
) -> None:
    """Refuse a model whose weights are not all numbers, and say what to do (NonFiniteError).

    In buffers, infinity is a value like others: masks hold it, and observers of quantization that
    have seen nothing.  Statistics of normalizations are weights in all but their name.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = (buffer for module in norms for buffer in module.buffers(recurse=False))
    weights = {id(tensor) for tensor in (*model.parameters(), *statistics)}
    for name, tensor in named_tensors(model):
        real = tensor.is_floating_point() and tensor.layout is torch.strided
        if isinstance(tensor, OnDisk) or tensor.is_meta or not real or not tensor.numel():
            continue  # what lies on disk is checked when it is first read
        low, high = tensor.aminmax()  # NaN comes through; ten times faster than isfinite
        allowed = Tensor.isfinite if id(tensor) in weights else lambda values: ~values.isnan()
        if not (allowed(low) and allowed(high)):
            bad = tensor.numel() - int(allowed(tensor).sum())
            if tensor.dtype is torch.float16:
                remedy = f"float16 ends at 65,504: give bfloat16 or float32, else {remedy}"
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} values of {name!r} are NaN or infinite", remedy
            )


def identity_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common if they are the same values in memory or on disk."""
    if isinstance(tensor, OnDisk) or tensor.layout is not torch.strided:
        return (id(tensor),)  # what shares its memory cannot be told
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a model by the first of their names."""
    return [*model.named_parameters(), *model.named_buffers()]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what tells a model from others of its code: parameters, and what buffers store.

    Buffers of whole numbers, which passes may count up, and those that no file holds are left out.
    """
    state = model.state_dict(keep_vars=True).items()
    return {
        name: one
        for name, one in state
        if isinstance(one, Tensor) and one.layout is torch.strided
        if isinstance(one, nn.Parameter) or one.is_floating_point() or one.is_complex()
    }


def digest_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of all numbers of a model's weights, with their names and formats."""
    return sha256_of(weights_of(model).items())


def full_name(kind: type) -> str:
    """Return the name of a class by which users give one that they do not import."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_name(kind: type[nn.Module] | str, what: str) -> str:
    """Return the full name of a class of modules, given as a class or as that name."""
    if isinstance(kind, str):
        return kind
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return full_name(kind)
    raise OptionError(f"{what} {safe_repr(kind)}; give a class of modules, or its full name")


def known_of_class(module: nn.Module, known: Mapping[str, T]) -> T | None:
    """Return what is known of a module's class, by full name, or of the nearest one above it."""
    names = map(full_name, type(module).__mro__)
    return next((known[name] for name in names if name in known), None)


def check_module(model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; give a torch.nn.Module")


def check_usable(model: nn.Module) -> None:
    """Refuse what is no module, or has no parameters (ModelError)."""
    check_module(model)
    if not any(True for _ in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no parameters, so nothing can be pruned")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return a model whose modules run as before `torch.compile`; they are replaced in place."""
    while isinstance(before := getattr(model, "_orig_mod", None), nn.Module):
        model = before
    for module in list(model.modules()):
        module._compiled_call_impl = None  # of `module.compile()`
        for name, child in module._modules.items():
            while isinstance(before := getattr(child, "_orig_mod", None), nn.Module):
                child = module._modules[name] = before
    return model


def copied(model: M, instead: Mapping[int, Any] | None = None) -> M:
    """Return a deep copy, not compiled, in which activations that a module keeps are plain values.

    torch refuses to copy tensors that hang on a graph, which a pass with gradients may leave on
    modules.  `instead` says what the copy holds in place of objects, by their `id`.
    """
    memo: dict[int, Any] = dict(instead or {})
    for module in model.modules():
        for tensor in _on_graphs(vars(module), set()):
            memo[id(tensor)] = tensor.detach().clone()
    try:
        return uncompiled(copy.deepcopy(model, memo))  # type: ignore[return-value]
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; take what is no "
            "parameter, buffer or plain value out of its attributes"
        ) from error


def _on_graphs(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers that are the results of differentiable operations."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _on_graphs(member, seen)


def number_format(model: nn.Module) -> torch.dtype | None:
    """Return the number format of a model's weights, that of the first; None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are."""
    return next(model.parameters()).device


def graphics_cards(model: nn.Module) -> list[torch.device]:
    """Return the devices besides the CPU whose random numbers a model may draw."""
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


_LIBRARIES = frozenset(
    {"abc", "builtins", "osscar", "timm", "torch", "torchvision", "transformers", "typing"}
)


def own_classes(module: nn.Module) -> list[type]:
    """Return the classes of a user's own that a module is of."""
    kinds = type(module).__mro__
    return [kind for kind in kinds if kind.__module__.split(".")[0] not in _LIBRARIES]


def own_methods(model: nn.Module) -> tuple[str, ...]:
    """Return what a class of a user's own does besides `forward`, such as `generate`."""
    own = own_classes(model)
    names = (name for kind in own for name, one in vars(kind).items() if inspect.isfunction(one))
    return tuple(
        name
        for name in dict.fromkeys(names)
        if not name.startswith(("_", "init", "reset_")) and not hasattr(nn.Module, name)
    )


def check_merged(model: nn.Module) -> None:
    """Refuse adapters of peft beside their weights, whose ranks would be pruned (ModelError)."""
    adapters = [
        name
        for name, module in model.named_modules()
        if any(
            kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.")
            for kind in type(module).__mro__
        )
    ]
    if adapters:
        raise ModelError(
            f"{type(model).__name__} has {pluralize(len(adapters), 'adapter')} of peft, such as "
            f"{adapters[0]!r}; merge them first: `model = model.merge_and_unload()`"
        )


@contextmanager
def drawing_alike(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Let a model draw the same random numbers each time; the caller's random state stays."""
    cards = graphics_cards(model)
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(seed)
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(seed)
        yield


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in what is put into a module or comes out, however nested."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def fresh(inputs: T) -> T:
    """Return inputs of a forward pass that it may write to: their tensors are copies."""
    return pytree.tree_map_only(Tensor, Tensor.clone, inputs)  # type: ignore[no-any-return]


def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run a model once on keyword arguments, which it may write to; return what it returns."""
    return model(**fresh(batch))


def forward_in_bfloat16(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run a model in float32 as `forward` does, with products of bfloat16.

    Images are given channels last: convolutions of bfloat16 are twice as fast on these.
    """
    images = {name: x for name, x in batch.items() if x.ndim == 4}
    last = {name: x.contiguous(memory_format=torch.channels_last) for name, x in images.items()}
    with bfloat16_products(model):
        return forward(model, {**batch, **last})


def bfloat16_products(model: nn.Module) -> torch.autocast:
    """Return a context in which a model in float32 multiplies in bfloat16."""
    # A cache of weights would be a copy of the model.
    return torch.autocast(device_of(model).type, torch.bfloat16, cache_enabled=False)


def count_parameters(model: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def token_embeddings(model: nn.Module) -> Tensor | None:
    """Return the table of a model's tokens, (tokens, width); None where it tells of none."""
    table = None
    with attempt():  # the model may be anyone's code
        table = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return table if isinstance(table, Tensor) and table.ndim == 2 else None


def context_length(model: nn.Module) -> int | None:
    """Return the most tokens that a model takes at once, or None where its config tells nothing."""
    config = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None)
    # A class, not a checkpoint, that answers -1 takes any number (XLNet, Transformer-XL).
    own = isinstance(getattr(type(config), "max_position_embeddings", None), property)
    return length if isinstance(length, int) and not (own and length < 1) else None


def example_length(model: nn.Module) -> int:
    """Return how many tokens an example has: 16, or the most that the model takes at once."""
    return min(16, context_length(model) or 16)


def in_evaluation(model: M) -> M:
    """Set a model to evaluation mode, and return it; a ModelError if a normalization stays."""
    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training:
            raise ModelError(
                f"module {name or 'the model'!r} ({type(module).__name__}) stays in training mode "
                "after eval(), so its outputs depend on the rest of the batch; let "
                "train(False) of every module around it reach it"
            )
    return model


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and each module back to its own mode afterwards."""
    for model in models:
        check_module(model)
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            in_evaluation(model)
        yield
    finally:
        for module, training in flags:
            module.training = training


def sha256_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors: their names, formats, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(as_bytes(values_of(tensor).cpu().contiguous()))
    return found.hexdigest()
