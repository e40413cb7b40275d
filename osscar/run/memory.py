"""How much memory a run needs, forecast before it begins.

Nothing here is exact: a limit that is too small is to be refused in the beginning, with the layer
that needs most, and not after hours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph import CouplingGroup
from osscar.allocation.allocate import provisional
from osscar.allocation.divergence import MOST_BYTES
from osscar.allocation.measured import compared_samples
from osscar.base.errors import OptionError, RequestError
from osscar.base.memory import in_words, memory_of
from osscar.checkpoint.directory import weight_bytes
from osscar.network.hooks import hooks
from osscar.network.modules import device_of, forward
from osscar.offload.on_disk import SMALL, WIDE, pass_bytes, suspended_bytes, weight_cache
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest
from osscar.walk.sums import sum_bytes
from osscar.walk.targets import Target

_LEAN = frozenset({"random", "magnitude", "wanda", "greedy", "multistage", "local_search"})
"""Backends of which it is known what they hold."""

_TILES = 3 * 1024
"""Rows of float64, (p,), that products are made of on the way."""

_PROVED = 256
"""Tokens in single precision that take as much as those of the proof, in double precision."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a run needs at once, beside weights that are read again when they are needed.

    Parameters
    ----------
    held
        What is held before it begins.
    batches
        The hidden states of all batches, and the predictions of the dense model that are kept.
    forward
        Any forward pass.
    matrices
        The problem of the layer that needs most.
    parts
        What each part of the run needs beside `held`.
    """

    held: int
    batches: int
    forward: int
    matrices: int
    parts: Mapping[str, int]

    @property
    def least(self) -> int:
        """What the whole run needs."""
        return self.held + max(self.parts.values())

    @classmethod
    def of(cls, prepared: Prepared, request: PruningRequest, held_out: int) -> MemoryNeeds:
        """Forecast what a run needs that holds out so many samples."""
        model, streams = prepared.model, 2 if Target(request.target).needs_dense else 1
        keep = provisional(prepared, request)
        layer, inputs, matrices, sums = max(
            (
                _of_layer(prepared, group, keep[group.name], request)
                for group in prepared.groups
                if keep.get(group.name, group.units) < group.units
            ),
            key=lambda found: found[2],
            default=("", 0, 0, 0),
        )
        batches = prepared.batches()
        itemsize = max(model.parameters(), key=Tensor.numel).dtype.itemsize
        if prepared.inputs.tokens:
            vocabulary, width = model.get_input_embeddings().weight.shape  # type: ignore[operator]
            sizes = {size for parameter in model.parameters() for size in parameter.shape}
            wide = max(sizes - {vocabulary})
            read, rows = inputs, [batch["input_ids"].numel() for batch in batches]
            window = prepared.inputs.settings["seqlen"]
        else:
            wide, window = _widest_output(prepared), 1
            vocabulary, width = wide, wide // 2
            read, rows = 0, [len(next(iter(batch.values()))) for batch in batches]
        measured = request.has_budget and request.allocation != "uniform"
        compared = compared_samples(prepared) if measured else 0
        kept = (4 * window * vocabulary * samples for samples in (held_out, compared))
        predictions = sum(min(MOST_BYTES, numbers) for numbers in kept)
        suspended = suspended_bytes(sum(rows), width, read, itemsize)
        held_batches = suspended * streams + predictions
        walk = itemsize * max(rows) * wide * WIDE * streams + SMALL
        outputs = pass_bytes(model, max(window, min(_PROVED, 4 * window)))
        cache = weight_cache(model)
        if cache is None:
            name, weight, held = "two smaller models", weight_bytes(model), _held(model)
        else:
            name, parameter = max(model.named_parameters(), key=lambda named: named[1].nbytes)
            name, weight = f"{name!r} in double precision", parameter.nbytes
            held = cache.memory.held() - cache.held_bytes
        return cls(
            held=held,
            batches=held_batches,
            forward=max(walk, outputs),
            matrices=matrices + SMALL,
            parts={
                f"the problem of {layer!r} with its {inputs} inputs": held_batches
                + matrices
                + SMALL,
                f"a batch on its way through {layer!r}": held_batches
                + walk
                + sums
                + (0 if cache is None else weight),
                f"the predictions of one window, or the proof, and {name}": outputs + 2 * weight,
            },
        )


def _held(model: nn.Module) -> int:
    """Return the bytes that are held where a model runs; or the most there were."""
    memory = memory_of(device_of(model))
    try:
        return memory.held()
    except OptionError:
        return memory.peak() or 0


def _widest_output(prepared: Prepared) -> int:
    """Return how many numbers a sample the innermost modules put out at most."""
    sizes = [0]

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        leaves = pytree.tree_leaves(result)
        sizes.append(sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)))

    leaves = [name for name, module in prepared.model.named_modules() if not any(module.children())]
    with torch.no_grad(), hooks(prepared.model, leaves, after=see):
        forward(prepared.model, prepared.example)
    return max(sizes) // len(next(iter(prepared.example.values())))


def _of_layer(
    prepared: Prepared, group: CouplingGroup, keep: int, request: PruningRequest
) -> tuple[str, int, int, int]:
    """Return the layer of a group that reads most, how much, and bytes of matrices and of sums.

    Matrices are counted in float64, for p inputs of which r stay, and m outputs; docs/streaming.md
    says where each number is from.
    """
    maps = prepared.linear_maps(group)
    lean = isinstance(request.backend, str) and request.backend in _LEAN and not request.certify
    corrected = Target(request.target).needs_dense
    numbers, sums = 0.0, 0
    for one in maps:
        p, m = one.rows, one.outputs
        r = one.fixed + (p - one.fixed) * keep / group.units
        solving = 1.25 * p * p + 3.5 * p * m if lean else 11 * p * p + 6 * p * m
        committing = 0.5 * p * p + 6 * p * m
        most = max(solving, committing)
        if request.holds_out:  # whose sums stay until a refit has been judged by them
            damping = p * p + 1.5 * r * r + (4 if corrected else 2) * p * m
            most = max(most + 0.5 * p * p + (p * m if corrected else 0), damping)
        numbers += most + _TILES * p
        sums += (1 + request.holds_out) * sum_bytes(one, corrections=corrected)
    largest = max(maps, key=lambda one: one.rows)
    return largest.name, largest.rows, int(8 * numbers), sums


def needs_memory(request: PruningRequest) -> str | None:
    """Say why a request needs the whole model in memory, and what to do; None if it does not."""
    if request.speedup is not None:
        return (
            "--speedup times the model in memory, and this one is read from disk; give another "
            "budget, or omit --max-memory"
        )
    if request.form == "exported":
        return (
            "the exported program of a model is shrunk in memory, and this model is read from "
            "disk; omit --form exported or --max-memory"
        )
    return None


def check_can_stream(model: nn.Module, request: PruningRequest) -> None:
    """Refuse to prune a model that is read from disk where it is needed in memory as a whole."""
    reason = None if weight_cache(model) is None else needs_memory(request)
    if reason is not None:
        raise RequestError(reason)


def forecast(prepared: Prepared, request: PruningRequest, held_out: int) -> MemoryNeeds:
    """Return what a run needs that holds out so many samples, for which room is left from now on.

    Raises
    ------
    RequestError
        If the model is read from disk, and the run needs it in memory, or more than its limit.
    """
    check_can_stream(prepared.model, request)
    needs = MemoryNeeds.of(prepared, request, held_out)
    cache = weight_cache(prepared.model)
    if cache is not None:
        if needs.least > cache.ceiling:
            what, most = max(needs.parts.items(), key=lambda part: part[1])
            raise RequestError(
                f"--max-memory {in_words(cache.ceiling)} cannot hold {what}, which takes "
                f"{in_words(most)}, of which {in_words(needs.batches)} are the activations of all "
                f"batches, beside {in_words(needs.held)} for {cache.memory.other_holders}; give at "
                f"least {in_words(needs.least)} or use fewer or shorter windows (--samples, "
                "--seqlen), or smaller batches (--batch-size)"
            )
        # Also after the run: what is saved runs once more, beside what is read back.
        cache.leave_free(needs.forward)
    return needs
