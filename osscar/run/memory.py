"""The memory that a run needs, estimated so that a limit that is too small is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from graph import CouplingGroup
from osscar.allocation.measured import compared_samples
from osscar.allocation.task import PruningTask
from osscar.base.errors import OptionError, RequestError
from osscar.base.memory import in_words, memory_of
from osscar.checkpoint.directory import weight_bytes
from osscar.distance.distance import MOST_BYTES
from osscar.network.modules import device_of, token_embeddings
from osscar.offload.on_disk import SMALL, WIDE, pass_bytes, suspended_bytes, weight_cache
from osscar.preparation.prepare import widest_output
from osscar.request import PruningRequest
from osscar.walk.gram import sum_bytes
from osscar.walk.targets import Target

_LEAN = frozenset({"random", "magnitude", "wanda", "greedy", "multistage", "local_search"})
"""Backends that hold few matrices."""

_TILES = 3 * 1024
"""Rows (p,) of float64 that products are made of."""

_PROVED = 256
"""Tokens in single precision that take as much as those of the proof, in double precision."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that a run needs at once, beside weights that are read from disk."""

    resident: int
    """Before the run begins."""
    batches: int
    """The hidden states of all batches, and the predictions of the dense model that are kept."""
    forward: int
    """Any forward pass."""
    matrices: int
    """The problem of the largest layer."""
    parts: Mapping[str, int]
    """What each part of the run needs beside `resident`."""

    @property
    def least(self) -> int:
        """What the whole run needs."""
        return self.resident + max(self.parts.values())

    @classmethod
    def from_task(cls, task: PruningTask) -> MemoryNeeds:
        """Estimate what a run needs."""
        prepared, request, keep = task.prepared, task.request, task.provisional
        model, streams = prepared.model, 2 if Target(request.target).needs_dense else 1
        pruned = (g for g in prepared.groups if keep.get(g.name, g.units) < g.units)
        layers = (_of_layer(task, group) for group in pruned)
        layer, inputs, problem, sums = max(
            layers, key=lambda found: found[2], default=("", 0, 0, 0)
        )
        matrices = problem + SMALL
        batches = prepared.batches()
        itemsize = max(model.parameters(), key=Tensor.numel).dtype.itemsize
        table = token_embeddings(model)
        if prepared.inputs.tokens and table is not None:
            vocabulary, width = table.shape
            sizes = {size for parameter in model.parameters() for size in parameter.shape}
            wide = max(sizes - {vocabulary})
            read, rows = inputs, [batch["input_ids"].numel() for batch in batches]
            window = prepared.inputs.settings["seqlen"]
        else:
            wide, window = widest_output(model, prepared.example), 1
            vocabulary, width = wide, wide // 2
            read, rows = 0, [len(next(iter(batch.values()))) for batch in batches]
        kept = max(1, task.samples_held_out), task.measures_curves * compared_samples(prepared)
        predictions = sum(min(MOST_BYTES, 4 * window * vocabulary * samples) for samples in kept)
        suspended = streams * suspended_bytes(sum(rows), width, read, itemsize) + predictions
        walk = itemsize * max(rows) * wide * WIDE * streams + SMALL
        outputs = pass_bytes(model, max(window, min(_PROVED, 4 * window)))
        cache = weight_cache(model)
        if cache is None:
            name, weight, read_weight = "two smaller models", weight_bytes(model), 0
            resident = _resident(model)
        else:
            largest, parameter = max(model.named_parameters(), key=lambda named: named[1].nbytes)
            name, weight = f"{largest!r} in double precision", parameter.nbytes
            read_weight, resident = weight, cache.memory.resident() - cache.resident_bytes
        through = suspended + walk + sums + read_weight
        parts = {
            f"the problem of {layer!r} with its {inputs} inputs": suspended + matrices,
            f"a batch on its way through {layer!r}": through,
            f"the predictions of one window, or the proof, and {name}": outputs + 2 * weight,
        }
        return cls(resident, suspended, max(walk, outputs), matrices, parts)


def _resident(model: nn.Module) -> int:
    """Return the bytes that are resident on the device of a model; or the most there were."""
    memory = memory_of(device_of(model))
    try:
        return memory.resident()
    except OptionError:
        return memory.peak()


def _of_layer(task: PruningTask, group: CouplingGroup) -> tuple[str, int, int, int]:
    """Return the widest layer of a group, its inputs, and the bytes of its matrices and sums.

    Matrices are of float64, for p inputs of which r stay, and m outputs; docs/streaming.md says
    where each number is from.
    """
    request, maps = task.request, task.prepared.linear_maps(group)
    lean = isinstance(request.backend, str) and request.backend in _LEAN and not request.certify
    corrected = Target(request.target).needs_dense
    numbers, sums = 0.0, 0
    for one in maps:
        p, m = one.rows, one.outputs
        r = one.fixed + (p - one.fixed) * task.provisional[group.name] / group.units
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
    """Say why a request needs the whole model in memory, and what to do."""
    if request.timing:
        return (
            f"{request.timing} (`--{request.timing}`) times the model in memory, and this one is "
            f"read from disk; give {request.instead_of_time('flops')}, or omit max_memory "
            "(`--max-memory`)"
        )
    if request.form == "exported":
        return (
            "the exported program of a model is shrunk in memory, and this model is read from "
            "disk; omit form exported (`--set form=exported`) or max_memory (`--max-memory`)"
        )
    return None


def check_can_stream(model: nn.Module, request: PruningRequest) -> None:
    """Refuse to prune a model that is read from disk but needed in memory as a whole."""
    reason = needs_memory(request)
    if reason is not None and weight_cache(model) is not None:
        raise RequestError(reason)


def matrix_bytes(task: PruningTask) -> int:
    """Return what a cache leaves to the problem of a layer, 0 without one (RequestError)."""
    check_can_stream(task.prepared.model, task.request)
    cache = weight_cache(task.prepared.model)
    if cache is None:
        return 0
    needs = MemoryNeeds.from_task(task)
    if needs.least > cache.ceiling:
        what, most = max(needs.parts.items(), key=lambda part: part[1])
        raise RequestError(
            f"max_memory (`--max-memory`) of {in_words(cache.ceiling)} "
            f"cannot hold {what}, which takes "
            f"{in_words(most)}, of which {in_words(needs.batches)} are the activations of all "
            f"batches, beside {in_words(needs.resident)} that are in use already; give at "
            f"least {in_words(needs.least)} or use fewer or shorter windows "
            "(`--samples`, `--seqlen`), or smaller batches (batch_size, `--batch-size`)"
        )
    cache.leave_free(needs.forward)  # also after the run, as what is saved runs once more
    return needs.matrices
