"""What a run takes beside the weights; refused if these lie on disk and there is no room.

Nothing here is exact: a limit that is too small is to be refused in the beginning, with the layer
that needs most, and not after hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph import CouplingGroup
from osscar.allocation.allocate import provisional
from osscar.allocation.divergence import MOST_BYTES
from osscar.allocation.measured import compared_samples
from osscar.base.errors import RequestError
from osscar.base.memory import in_words
from osscar.network.hooks import hooks
from osscar.network.modules import forward
from osscar.offload.on_disk import weight_cache
from osscar.offload.weight_cache import WeightCache
from osscar.preparation.prepare import Prepared
from osscar.request import PruningRequest
from osscar.walk.targets import Target

_SOLVING = (1.25, 0.0, 3.5)
"""Numbers of float64 that solving one layer holds at once, in p^2, r^2 and p m: p inputs of which r
stay, and m outputs.  The problem is 0.5 and 2 of them; docs/scale.md has the rest."""

_COMMITTING = (0.5, 0.0, 6.0)
"""The same while a refit is on its way to the model: beside the problem."""

_DAMPING = (1.0, 1.5, 2.0)
"""The same while damping is chosen by samples that are held out: halves of matrices."""

_CORRECTIONS = 2.0
"""Sums of corrections, in p m, if targets have some: of what is held out, and of the rest."""

_OTHERWISE = (11.0, 0.0, 6.0)
"""The same of backends of which nothing is known, and where bounds are asked for."""

_LEAN = frozenset({"random", "magnitude", "wanda", "greedy", "multistage", "local_search"})
"""Backends that hold no more than `_SOLVING`."""

_TILES = 3 * 1024
"""Rows of float64, (p,), that products are made of on the way."""

_ACTIVATIONS = 5
"""Tensors of a batch, as wide as the widest layer, that a forward pass holds at once."""

_SUSPENDED = 6
"""Tensors as wide as the model that a suspended batch holds, besides what the consumer reads."""

_LOGITS = 5
"""Copies of a window's logits that are compared at once."""

_PROVED = 5
"""The same of the proof, which keeps those of the masked model on all inputs."""

_PROOF_TOKENS = 128
"""Tokens of the proof, whose outputs are in float64."""

_LEAST = 128 << 20
"""Bytes for all that is small."""


class _Flow(NamedTuple):
    """How many numbers pass through a model on its calibration data.

    `rows` are the positions of each batch, tokens or samples of anything else, and `window` those
    of one sample.  A position has `width` numbers from layer to layer, `wide` where a layer puts
    out most of them, and `outputs` in the end.
    """

    rows: tuple[int, ...]
    width: int
    wide: int
    window: int
    outputs: int


def _flow(prepared: Prepared) -> _Flow:
    """Look at the sizes of a model; one that reads no tokens runs on its small example."""
    if not prepared.inputs.tokens:
        sizes, outputs = put_out(prepared)
        rows = tuple(len(next(iter(batch.values()))) for batch in prepared.batches())
        wide = max(sizes, default=0)
        return _Flow(rows, wide // 2, wide, 1, outputs)
    table = prepared.model.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary, width = map(int, table.shape)
    sizes = [size for parameter in prepared.model.parameters() for size in parameter.shape]
    rows = tuple(int(math.prod(batch["input_ids"].shape)) for batch in prepared.batches())
    wide = max(size for size in sizes if size != vocabulary)
    return _Flow(rows, width, wide, prepared.inputs.settings["seqlen"], vocabulary)


def put_out(prepared: Prepared) -> tuple[list[int], int]:
    """Return how many numbers a position the innermost modules put out, and the whole model."""
    sizes: list[int] = []

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        sizes.append(_numbers(result))

    leaves = [name for name, module in prepared.model.named_modules() if not any(module.children())]
    with torch.no_grad(), hooks(prepared.model, leaves, after=see):
        result = forward(prepared.model, prepared.example)
    first = next(iter(prepared.example.values()))
    tokens = prepared.inputs.tokens
    positions = max(1, first.numel() if tokens else len(first))
    return [size // positions for size in sizes], _numbers(result) // positions


def _numbers(result: Any) -> int:
    return sum(leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Room:
    """Bytes that parts of a run need beside the weights.

    `batches` are the hidden states of all batches, and the predictions of the dense model that are
    kept; `forward` is one batch on its way through a
    block; `sums` and `matrices` are those of the layer that reads most, while batches pass, and of
    its problem; `logits` and `proof` the predictions that are compared, of one window and in double
    precision.
    """

    batches: int
    forward: int
    sums: int
    matrices: int
    logits: int
    proof: int
    layer: str
    inputs: int

    @property
    def largest_pass(self) -> int:
        """Bytes that any forward pass needs."""
        return max(self.forward, self.logits, self.proof)

    @classmethod
    def of(cls, prepared: Prepared, request: PruningRequest, held_out: int) -> Room:
        """Estimate what a run needs."""
        keep = provisional(prepared, request)
        groups = [g for g in prepared.groups if keep.get(g.name, g.units) < g.units]
        layer, inputs, matrices, sums = max(
            (_matrices(prepared, group, keep[group.name], request) for group in groups),
            key=lambda found: found[2],
            default=("", 0, 0, 0),
        )
        flow = _flow(prepared)
        streams = 2 if Target(request.target).needs_dense else 1
        measured = request.has_budget and request.allocation != "uniform"
        compared = compared_samples(prepared) if measured else 0
        kept = sum(
            min(MOST_BYTES, 4 * samples * flow.window * flow.outputs)
            for samples in (held_out, compared)
        )
        tokens = prepared.inputs.tokens
        suspended = _SUSPENDED * flow.width + (inputs if tokens else 0)
        proved = min(_PROOF_TOKENS, 2 * flow.window) * flow.outputs
        return cls(
            batches=4 * sum(flow.rows) * suspended * streams + kept,
            forward=4 * max(flow.rows) * flow.wide * _ACTIVATIONS * streams + _LEAST,
            sums=sums,
            matrices=matrices + _LEAST,
            logits=4 * flow.window * flow.outputs * _LOGITS + _LEAST,
            proof=8 * proved * _PROVED + _LEAST,
            layer=layer,
            inputs=inputs,
        )


def _matrices(
    prepared: Prepared, group: CouplingGroup, keep: int, request: PruningRequest
) -> tuple[str, int, int, int]:
    """Return the layer of a group that reads most, how much, and bytes of matrices and of sums."""
    maps = prepared.linear_maps(group)
    most = max(maps, key=lambda found: found.rows)
    numbers, sums = 0.0, 0.0
    copies = 2 if request.holds_out else 1
    corrected = Target(request.target).needs_dense
    for found in maps:
        p, m = found.rows, found.outputs
        r = found.fixed + (p - found.fixed) * keep / group.units
        peaks = (a * p**2 + b * r**2 + c * p * m for a, b, c in _peaks(request))
        numbers += max(peaks) + _TILES * p
        sums += copies * (0.5 * p**2 + (p * m if corrected else 0))
    return most.name, most.rows, int(8 * numbers), int(8 * sums)


def _peaks(request: PruningRequest) -> list[tuple[float, float, float]]:
    """Return what is held at the moments at which a layer takes most."""
    lean = isinstance(request.backend, str) and request.backend in _LEAN and not request.certify
    peaks = [_SOLVING if lean else _OTHERWISE, _COMMITTING]
    if request.holds_out:
        corrections = _CORRECTIONS if Target(request.target).needs_dense else 0.0
        squares, parts, sides = _DAMPING
        # Sums of what is held out stay until a refit has been judged by them.
        peaks = [(a + 0.5, b, c + corrections / 2) for a, b, c in peaks]
        peaks.append((squares, parts, sides + corrections))
    return peaks


def needs_memory(request: PruningRequest) -> str | None:
    """Say why a request needs the whole model in memory, and what to do; None if it does not."""
    if request.speedup is not None:
        return (
            "--speedup times the model in memory, and this one is read from disk; give another "
            "budget, or leave --max-memory away"
        )
    if request.form == "exported":
        return (
            "the exported program of a model is shrunk in memory, and this model is read from "
            "disk; leave --form exported or --max-memory away"
        )
    return None


def check_can_stream(model: nn.Module, request: PruningRequest) -> None:
    """Refuse to prune a model that is read from disk where it is needed in memory as a whole."""
    reason = None if weight_cache(model) is None else needs_memory(request)
    if reason is not None:
        raise RequestError(reason)


def check_streamed(prepared: Prepared, request: PruningRequest, held_out: int) -> Room | None:
    """Refuse what a model that is read from disk cannot do, or not within its memory.

    The predictions of the dense model are kept of so many windows that are held out.  Returned is
    what is to be left free; None for a model in memory.
    """
    cache = weight_cache(prepared.model)
    if cache is None:
        return None
    check_can_stream(prepared.model, request)
    base = _base(cache)
    room = Room.of(prepared, request, held_out)
    what, most = _most_needed(prepared.model, room)
    if base + most > cache.ceiling:
        raise RequestError(
            f"--max-memory {in_words(cache.ceiling)} cannot hold {what}, which takes "
            f"{in_words(most)}, of which {in_words(room.batches)} are the activations of all "
            f"batches, beside {in_words(base)} for {cache.memory.other_holders}; give at least "
            f"{in_words(base + most)} or, with fewer or shorter windows (--samples, --seqlen) or "
            "smaller batches (--batch-size), less"
        )
    # Also after the run: what is saved runs once more, beside what is read back.
    cache.leave_free(room.largest_pass)
    return room


def least_memory(model: nn.Module, room: Room) -> int:
    """Return the least limit within which a model that lies on disk can be pruned, in bytes."""
    cache = weight_cache(model)
    assert cache is not None
    return _base(cache) + _most_needed(model, room)[1]


def _base(cache: WeightCache) -> int:
    """Return the bytes that are held where a limit counts, without weights that can go."""
    return cache.memory.held() - cache.held_bytes


def _most_needed(model: nn.Module, room: Room) -> tuple[str, int]:
    """Return which part of a run needs most, with the largest weight where it runs, in bytes."""
    name, weight = max(model.named_parameters(), key=lambda named: named[1].nbytes)
    needs = {
        f"the problem of {room.layer!r} with its {room.inputs} inputs": room.batches
        + room.matrices,
        f"a batch on its way through {room.layer!r}": room.batches
        + room.forward
        + room.sums
        + weight.nbytes,
        f"the predictions of one window, and {name!r}": room.logits + weight.nbytes,
        f"the proof, with {name!r} in double precision": room.proof + 2 * weight.nbytes,
    }
    return max(needs.items(), key=lambda need: need[1])
