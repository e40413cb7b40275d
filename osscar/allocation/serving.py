"""What serving a language model takes: its weights, and the keys and values that it keeps.

How many numbers each layer keeps is read off the cache of transformers itself, which the model
fills in a pass: layers may share keys and values, keep none, or keep a window of positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graph import CouplingGroup, DependencyGraph, UnitKind
from osscar.allocation.costs import CountedCost, Product
from osscar.base.errors import RequestError
from osscar.data.batches import Batch
from osscar.network.hooks import running_modules
from osscar.network.modules import context_length, fresh
from osscar.proof.equivalence import cache_name, takes
from osscar.proof.lineage import stored_dtype


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
    A `RequestError` is raised if the model keeps no keys and values, or something else besides, or
    reads fewer positions.
    """
    longest = context_length(model)
    if longest is not None and context > longest:
        raise RequestError(
            f"context (`--context`) is {context}, and the model reads {longest:,} positions at "
            f"most; give "
            "no more"
        )
    seen, dtype = _first_states(model, example), stored_dtype(model)
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


def _first_states(model: nn.Module, example: Batch) -> dict[int, tuple[str, Tensor, Tensor]]:
    """Run a model once; return by layer of its cache the module, a first key and a first value."""
    if (
        not isinstance(model, PreTrainedModel)
        or not (model.can_generate() and takes(model, "use_cache"))
        or model.config.is_encoder_decoder
    ):
        raise RequestError(
            f"memory (`--memory`) counts the keys and values that a decoder of transformers "
            f"keeps as it "
            f"generates text, and {type(model).__name__} keeps none; give size (`--size`)"
        )
    seen: dict[int, tuple[str, Tensor, Tensor]] = {}
    cache = DynamicCache(config=model.config)
    plain = cache.update
    with running_modules(model) as running, torch.no_grad():

        def noted(keys: Tensor, values: Tensor, layer: int, *more: Any, **by: Any) -> Any:
            seen[layer] = running[-1], keys[:1, :, :1], values[:1, :, :1]
            return plain(keys, values, layer, *more, **by)

        cache.update = noted
        model(**{**fresh(example), cache_name(model): cache, "use_cache": True})
    others = {
        type(layer).__name__
        for index, layer in enumerate(cache.layers)
        if index not in seen or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if others or not seen:
        raise RequestError(
            f"memory (`--memory`) counts keys and values, and {type(model).__name__} keeps "
            f"{' and '.join(sorted(others)) or 'none'}; give size (`--size`)"
        )
    return seen
