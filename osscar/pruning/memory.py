"""What a run takes beside the weights, where those are read from disk; refused if there is no room.

Nothing here is exact: a limit that is too small is to be refused in the beginning, with the layer
that needs most, and not after hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from graph import CouplingGroup
from osscar.capture.linear_maps import linear_maps
from osscar.capture.opened import Opened
from osscar.capture.targets import Target
from osscar.core.errors import RequestError
from osscar.core.memory import in_words, resident_memory
from osscar.core.on_disk import shelf_of
from osscar.pruning.allocation import provisional
from osscar.pruning.divergence import MOST_BYTES
from osscar.pruning.request import Allocation, FormChoice, PruningRequest

_MATRICES = 11
"""Matrices of float64, (p, p), that measuring, solving and committing one layer hold at once."""

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


@dataclass(frozen=True)
class Room:
    """Bytes that parts of a run need beside the weights.

    Parameters
    ----------
    batches
        The hidden states of all batches, and the predictions of the dense model that are kept.
    forward
        One batch on its way through a block.
    matrices
        The problem of the layer that reads most.
    logits
        The predictions of one window, compared.
    proof
        Those of the proof, in double precision.
    layer, inputs
        The name of that layer, and how many inputs it reads.
    waiting_on_disk
        Whether only one batch at a time has its hidden states in memory.
    """

    batches: int
    forward: int
    matrices: int
    logits: int
    proof: int
    layer: str
    inputs: int
    waiting_on_disk: bool

    @property
    def largest_pass(self) -> int:
        """Bytes that any forward pass needs."""
        return max(self.forward, self.logits, self.proof)

    @classmethod
    def of(
        cls, ready: Opened, request: PruningRequest, held_out: int, *, waiting_on_disk: bool = False
    ) -> Room:
        """Estimate what a run needs.

        Parameters
        ----------
        ready, request
            The model with its data, and what is asked for.
        held_out
            How many windows the predictions of the dense model are kept of.
        waiting_on_disk
            Whether hidden states of batches that wait are in files.

        Raises
        ------
        RequestError, FrozenGroupError
            If what to keep makes no sense for this model.
        """
        keep = provisional(ready, request)
        groups = [g for g in ready.groups if keep.get(g.name, g.units) < g.units]
        layer, inputs, matrices = max(
            (_matrices(ready.model, group) for group in groups),
            key=lambda found: found[2],
            default=("", 0, 0),
        )
        rows = [int(math.prod(batch["input_ids"].shape)) for batch in ready.batches()]
        width, vocabulary = _widths(ready.model)
        wide = max(
            size
            for parameter in ready.model.parameters()
            for size in parameter.shape
            if size != vocabulary
        )
        streams = 2 if Target(request.target).needs_dense else 1
        window = ready.inputs.settings["seqlen"]
        kept = min(MOST_BYTES, 4 * held_out * window * vocabulary)
        present = max(rows) if waiting_on_disk else sum(rows)
        return cls(
            batches=4 * present * (_SUSPENDED * width + inputs) * streams + kept,
            forward=4 * max(rows) * wide * _ACTIVATIONS * streams + _LEAST,
            matrices=matrices * _MATRICES + _LEAST,
            logits=4 * window * vocabulary * _LOGITS + _LEAST,
            proof=8 * min(_PROOF_TOKENS, 2 * window) * vocabulary * _PROVED + _LEAST,
            layer=layer,
            inputs=inputs,
            waiting_on_disk=waiting_on_disk,
        )


def _matrices(model: nn.Module, group: CouplingGroup) -> tuple[str, int, int]:
    """Return the layer of a group that reads most, how much that is, and bytes of all matrices."""
    maps = linear_maps(model, group)
    most = max(maps, key=lambda found: found.rows)
    return most.name, most.rows, sum(8 * found.rows**2 for found in maps)


def _widths(model: nn.Module) -> tuple[int, int]:
    """Return the width of a language model, and the size of its vocabulary."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    return int(table.shape[1]), int(table.shape[0])


def needs_memory(request: PruningRequest) -> str | None:
    """Say why a request needs the whole model in memory, and what to do; None if it does not."""
    if request.speedup is not None:
        return (
            "--speedup times the model in memory, and this one is read from disk; give another "
            "budget, or leave --max-memory away"
        )
    if request.has_budget and request.allocation is Allocation.CURVATURE:
        return (
            "a budget that is shared by curvature needs a backward pass through the dense model, "
            "and this one is read from disk; give --allocation uniform or fluctuation, or --heads "
            "and --neurons, or leave --max-memory away"
        )
    if request.form == FormChoice.GRAPH:
        return (
            "the exported program of a model is shrunk in memory, and this model is read from "
            "disk; leave --form graph or --max-memory away"
        )
    return None


def check_streamed(ready: Opened, request: PruningRequest, held_out: int) -> Room | None:
    """Refuse what a model that is read from disk cannot do, or not within its memory.

    Parameters
    ----------
    ready, request
        The model with its data, and what is asked for.
    held_out
        How many windows the predictions of the dense model are kept of.

    Returns
    -------
    Room or None
        What is to be left free; None for a model in memory.

    Raises
    ------
    RequestError
        If the run needs the whole model in memory, or the limit is too small.
    """
    shelf = shelf_of(ready.model)
    if shelf is None:
        return None
    reason = needs_memory(request)
    if reason is not None:
        raise RequestError(reason)
    base = resident_memory() - shelf.held_bytes
    for waiting_on_disk in (False, True):
        room = Room.of(ready, request, held_out, waiting_on_disk=waiting_on_disk)
        what, most = max(_needs(ready.model, room).items(), key=lambda need: need[1])
        if base + most <= shelf.ceiling:
            break
    else:
        raise RequestError(
            f"--max-memory {in_words(shelf.ceiling)} cannot hold {what}, which takes "
            f"{in_words(most)}, beside {in_words(base)} for the program; at least "
            f"{in_words(base + most)} would do, or less with shorter windows (--seqlen) or smaller "
            "batches (--batch-size)"
        )
    # Also after the run: what is saved runs once more, beside what is read back.
    shelf.leave_free(room.largest_pass)
    return room


def _needs(model: nn.Module, room: Room) -> dict[str, int]:
    """Return the bytes that each part of a run needs, with the largest weight where it runs."""
    name, weight = max(model.named_parameters(), key=lambda named: named[1].nbytes)
    return {
        f"the problem of {room.layer!r} with its {room.inputs} inputs": room.batches
        + room.matrices,
        f"a batch on its way through {room.layer!r}": room.batches + room.forward + weight.nbytes,
        f"the predictions of one window, and {name!r}": room.logits + weight.nbytes,
        f"the proof, with {name!r} in double precision": room.proof + 2 * weight.nbytes,
    }
