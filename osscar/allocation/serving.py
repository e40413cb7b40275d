"""What serving a language model takes: its weights, and the keys and values that it keeps.

How many numbers each layer keeps is read off the cache of transformers itself, which the model
fills in a pass: layers may share keys and values, keep none, or keep a window of positions.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graph import CouplingGroup, DependencyGraph, UnitKind
from osscar.allocation.costs import CountedCost, Product
from osscar.base.errors import RequestError
from osscar.data.reader import Batch
from osscar.network.hooks import hooks, running_modules
from osscar.network.modules import context_length, fresh
from osscar.network.predictions import named_logits
from osscar.proof.equivalence import cache_name, takes
from osscar.proof.lineage import stored_dtype
from osscar.request import PruningRequest


def serving_memory(
    weights: CountedCost,
    model: nn.Module,
    traced: DependencyGraph,
    groups: Sequence[CouplingGroup],
    example: Batch,
    context: int,
    batch: int,
) -> CountedCost:
    """Add to the bytes of the weights those of keys and values, in the format that is saved.

    `context` are the positions of each sequence in the cache, and `batch` is the number of these.
    A `RequestError` is raised if the model keeps something else besides keys and values.
    """
    seen, dtype = _first_states(model, example, MEMORY), stored_dtype(model)
    heads = {group.name: group.units for group in groups if group.kind is UnitKind.HEADS}
    terms, fixed = list(weights.terms), weights.fixed
    # The cache itself says how many positions it holds, of states that take no memory.
    filled, short = DynamicCache(config=model.config), Counter[int]()
    for index, (module, *states) in sorted(seen.items()):
        keys, values = (one.to("meta").expand(-1, -1, context, -1) for one in states)
        filled.update(keys, values, index)
        held = filled.layers[index]
        size = (held.keys.numel() + held.values.numel()) * dtype.itemsize * batch
        owners = heads.keys() & traced.names_in(module)
        units = math.prod(heads[name] for name in owners)
        if len(owners) == 1 and keys.shape[1] % units == 0:
            terms.append(Product(size / units, tuple(owners)))
        else:  # one head of keys and values that serves all queries
            fixed += size
        if held.keys.shape[-2] < context:
            short[held.keys.shape[-2]] += 1
    fewer = "".join(f", {n} of {len(seen)} layers {at:,}" for at, n in sorted(short.items()))
    assumed = (
        f"weights as saved, and keys and values in {str(dtype).removeprefix('torch.')} as "
        f"transformers caches them: {context:,} positions{fewer}, {batch:,} "
        f"sequence{'s' if batch > 1 else ''}"
    )
    return replace(weights, terms=tuple(terms), fixed=fixed, assumed=assumed)


# ---- keys and values -----------------------------------------------------------------------


class Caching(NamedTuple):
    """What asks for the keys and values of a model, by its option, and what to do without."""

    option: str
    instead: str


MEMORY = Caching("memory (`--memory`)", "give size (`--size`)")
DECODE = Caching("timed decode (`--set timed=decode`)", "omit it, and a forward pass is timed")

_KEPT = {DynamicLayer, DynamicSlidingWindowLayer}


def check_served(model: nn.Module, request: PruningRequest) -> None:
    """Raise a `RequestError` if a request is about keys and values that a model does not keep.

    A request of them has a context.
    """
    if request.context is None:
        return
    asked = DECODE if request.memory is None else MEMORY
    if (
        not isinstance(model, PreTrainedModel)
        or not (model.can_generate() and takes(model, "use_cache"))
        or model.config.is_encoder_decoder
    ):
        raise RequestError(
            f"{asked.option} needs a decoder of transformers with a key/value cache, and "
            f"{type(model).__name__} has none; {asked.instead}"
        )
    if others := {type(layer) for layer in DynamicCache(config=model.config).layers} - _KEPT:
        raise _keeps_others(model, others, asked)
    longest = context_length(model)
    if longest is not None and request.context > longest:
        raise RequestError(
            f"context (`--set context`) is {request.context}, and the model reads {longest:,} "
            "positions at most; give no more"
        )


def _keeps_others(model: nn.Module, kinds: Iterable[type], asked: Caching) -> RequestError:
    named = " and ".join(sorted(kind.__name__ for kind in kinds)) or "none"
    return RequestError(
        f"{asked.option} needs a key/value cache, and {type(model).__name__} keeps {named}; "
        f"{asked.instead}"
    )


def _first_states(
    model: nn.Module, example: Batch, asked: Caching
) -> dict[int, tuple[str, Tensor, Tensor]]:
    """Run a model once; return by layer of its cache the module, a first key and a first value."""
    seen: dict[int, tuple[str, Tensor, Tensor]] = {}
    cache = DynamicCache(config=model.config)
    plain = cache.update
    with running_modules(model) as running, torch.no_grad():

        def noted(keys: Tensor, values: Tensor, layer: int, *more: Any, **by: Any) -> Any:
            seen[layer] = running[-1], keys[:1, :, :1], values[:1, :, :1]
            return plain(keys, values, layer, *more, **by)

        cache.update = noted
        model(**{**fresh(example), cache_name(model): cache, "use_cache": True})
    others = {type(layer) for index, layer in enumerate(cache.layers) if index not in seen}
    if others or not seen:
        raise _keeps_others(model, others, asked)
    return seen


# ---- one token ---------------------------------------------------------------------------


def filled_cache(model: nn.Module, example: Batch, positions: int, batch: int) -> DynamicCache:
    """Return a cache of so many positions in each sequence, all of them the example's first."""
    filled = DynamicCache(config=model.config)
    for index, (_, *states) in sorted(_first_states(model, example, DECODE).items()):
        filled.update(*(one.repeat(batch, 1, positions, 1) for one in states), index)
    return filled


def token_step(model: nn.Module, cache: DynamicCache, batch: Batch) -> Callable[[], Any]:
    """Return what reads the next token of each sequence; the cache stays as it is."""
    name = cache_name(model)
    return lambda: model(**{**fresh(batch), name: _copied(cache), "use_cache": True})


def token_step_traced(model: nn.Module, cache: DynamicCache) -> AbstractContextManager[None]:
    """Let a model, while it is traced, read the next token of each sequence.

    What the cache holds is then repeated from the token's own keys and values, which says whose
    heads they are; logits alone are returned.
    """

    def before(_: str, __: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        step = _copied(cache)
        for layer in step.layers:
            layer.update = partial(_update_repeated, layer)
        return args, {**kwargs, cache_name(model): step, "use_cache": True}

    def after(_: str, __: nn.Module, ___: Any, ____: Any, result: Any) -> Tensor | None:
        return named_logits(result)

    return hooks(model, [""], before, after)


def _copied(cache: DynamicCache) -> DynamicCache:
    """Return a cache of the same tensors, to which positions are added apart."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made


def _update_repeated(
    layer: DynamicLayer, keys: Tensor, values: Tensor, *more: Any, **by: Any
) -> Any:
    held = layer.keys.shape[-2]
    layer.keys, layer.values = (one.expand(-1, -1, held, -1) for one in (keys, values))
    return type(layer).update(layer, keys, values, *more, **by)
