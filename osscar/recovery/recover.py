"""Recovery in one run: split the samples, find a rate, train, keep the best, and say how it went.

What is minimized is the divergence of the smaller model's predictions from the dense one's
(distillation: Hinton, Vinyals and Dean, 2015, at temperature 1), over the weights that pruning has
left; widths, plan and form of the model stay as they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import nn

from osscar import __version__
from osscar.base.devices import resolve_device
from osscar.base.errors import ModelError, NonFiniteError
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import ModelInputs, as_inputs
from osscar.data.images import ImageSet
from osscar.network.model_state import ModelState, model_state
from osscar.network.modules import (
    check_finite_weights,
    check_usable,
    copied,
    device_of,
)
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.fingerprint import Fingerprint, JournalManifest, sha256_of
from osscar.recovery.adapters import merge_adapters
from osscar.recovery.log import WAY, Point, RecoveryLog, Standing
from osscar.recovery.memory import CHOSEN, Memory, fitting, needed, room
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import shifted, split, step_size
from osscar.recovery.target import HeldOut, Measure, Target, joined
from osscar.recovery.training import Training, kept_point
from osscar.recovery.weights import as_it_came, formats, give_own_weights, shared_weights, trainable
from osscar.request import by_keywords
from osscar.shrinking.lineage import data_record, may_come_from, note_calibration
from osscar.shrinking.program.program import ProgramModule


class _Pruned(Protocol):
    """What `osscar.prune` returns."""

    @property
    def model(self) -> nn.Module:
        """The smaller model."""


@dataclass(frozen=True, eq=False)
class Recovery:
    """A smaller model that was trained towards the dense one, and how that went.

    Parameters
    ----------
    model
        Of the same widths as before; with the weights that it came with where nothing was better.
    points
        The model as it came, and each look at the held-out samples.
    learning_rate
        At its height.
    measure
        What `Point.held_out` is: ``nats`` a prediction, a ``relative`` squared error, or a ``loss``
        of the caller's.
    samples, held_out
        How many samples trained, and how many decided.
    trained
        How many parameters were trained.
    seconds
        Wall time.
    memory
        What it was told to need.
    request
        What was asked for, with the way to train that fitted.
    data
        What reports say of the samples.
    """

    model: nn.Module = field(repr=False)
    points: tuple[Point, ...]
    learning_rate: float
    measure: Measure
    samples: int
    held_out: int
    trained: int
    seconds: float
    memory: Memory
    request: RecoveryRequest
    data: Mapping[str, Any]

    @property
    def kept(self) -> int:
        """The step whose weights the model has; 0 are those that it came with."""
        return kept_point(self.points).step

    @property
    def before(self) -> float:
        """The distance from the dense model on held-out samples, of the model as it came."""
        return self.points[0].held_out or 0.0

    @property
    def after(self) -> float:
        """The same of the model that was kept."""
        return kept_point(self.points).held_out or 0.0

    def document(self) -> dict[str, Any]:
        """Return what is known of it, as ``docs/json.md`` describes it."""
        return {
            "settings": self.request.to_json(),
            "data": dict(self.data),
            "measure": self.measure,
            "points": [dataclasses.asdict(point) for point in self.points],
            "kept": self.kept,
            "before": self.before,
            "after": self.after,
            "learning_rate": self.learning_rate,
            "samples": self.samples,
            "held_out": self.held_out,
            "trained": self.trained,
            "seconds": self.seconds,
            "memory_bytes": self.memory.total,
        }


def recover_as_asked(
    smaller: nn.Module | _Pruned,
    dense: nn.Module,
    data: Any,
    request: RecoveryRequest,
    log: RecoveryLog | None = None,
    ranks: Ranks = ALONE,
    told: Callable[[Memory, RecoveryRequest], None] = lambda memory, way: None,
) -> Recovery:
    """Train a smaller model towards its dense one; neither is changed.

    Parameters
    ----------
    smaller
        What `osscar.prune` returned, or its model, or what `osscar.load` read.
    dense
        The model that it was pruned from.
    data
        In any of the forms that `osscar.prune` takes, without labels.  A part of it trains nothing,
        and decides.
    request
        What is asked for.  `osscar.recover` takes its fields as keywords: `RecoveryRequest`
        describes them.
    log
        Keeps where it stands, so that a run which was killed goes on where it stopped; of several
        ranks, the first has it.
    ranks
        The processes that are asked for the same, and share out the samples of each step.
    told
        Told what memory is needed, and in which way it is trained, before that begins.

    Returns
    -------
    Recovery
        With a model of the same shapes, never worse on the held-out samples.

    Raises
    ------
    ModelError
        If the model was pruned from another dense one, or weights stay on disk.
    DataError
        If the models cannot read the data, or there are too few of them.
    NonFiniteError
        If weights are not finite, or what a model puts out on the held-out samples.
    MissingDependency
        If peft is needed, and not installed.
    NoMemoryError
        If it needs more memory than it may take, in whatever way it is trained.
    OptionError
        If the model has no blocks to checkpoint, or no such weights as are to be trained.
    JournalError
        If the log is of another recovery.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> text = osscar.load_calibration(None, loaded.tokenizer, samples=9, seqlen=32)
    >>> pruned = osscar.prune(loaded.model, text, sparsity=0.9)
    >>> recovery = osscar.recover(pruned, loaded.model, text, steps=4, learning_rate=5e-4)
    >>> recovery.after <= recovery.before
    True
    """
    start = time.perf_counter()
    model: Any = smaller if isinstance(smaller, nn.Module) else getattr(smaller, "model", smaller)
    _check(model, dense)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        memory_for(f"{type(model).__name__} and its training", FOR_BATCHES),
        model_state(dense),
    ):
        inputs = as_inputs(dense, data)
        if not isinstance(model, ProgramModule):  # which cannot be asked for a vocabulary
            as_inputs(model, data)
        prepared = _prepared(model, dense, data, inputs, request, ranks, log)
        training, deciding, way, memory = prepared
        told(memory, way)
        with _begun(log, model, dense, inputs, request, way, ranks) as known:
            rate = request.learning_rate if known is None else known.rate
            rate = training.found_rate() if rate is None else rate
            points = training.run(request.steps, rate, log, known)
        trained = sum(weight.numel() for weight in training.weights().values())
        give_own_weights(training.model, training.dense)
        if way.lora is not None:
            merge_adapters(training.model)
        work = as_it_came(training.model, model)
    note_calibration(work, data, inputs.settings)
    return Recovery(
        model=work,
        points=points,
        learning_rate=rate,
        measure=training.held.target.measure,
        samples=len(training.samples),
        held_out=deciding,
        trained=trained,
        seconds=time.perf_counter() - start,
        memory=memory,
        request=way,
        data={**inputs.settings, **data_record(data)},
    )


recover = by_keywords(RecoveryRequest, recover_as_asked)


def _prepared(
    model: nn.Module,
    dense: nn.Module,
    data: Any,
    inputs: ModelInputs,
    request: RecoveryRequest,
    ranks: Ranks,
    log: RecoveryLog | None,
) -> tuple[Training, int, RecoveryRequest, Memory]:
    """Set up the training of a copy of a model, in a way that fits into the memory there is.

    With it come how many samples decide, the way to train, and what that needs.
    """
    device = torch.empty(0, device=resolve_device(request.device)).device  # with its number
    teacher = dense if device_of(dense) == device else copied(dense).to(device)
    samples, deciding = split(inputs, teacher, request)
    size = step_size(inputs, len(samples), request)
    # On a CPU several windows at once are no faster than one after the other, and take more memory.
    usual = 1 if inputs.tokens and device.type == "cpu" else size
    at_once = 1 if inputs.apart else request.micro_batch_size or usual
    target = Target.of(teacher, inputs, joined(deciding, at_once), request.loss)
    alike = shared_weights(model, teacher)
    shifts = request.augment != "none" and isinstance(data, ImageSet)

    @lru_cache(maxsize=1)
    def held_out(together: int) -> HeldOut:
        return HeldOut.of(target, teacher, joined(deciding, together), ranks)

    def setup(way: RecoveryRequest) -> Training:
        together = way.micro_batch_size or at_once
        work = trainable(model, teacher, alike, device, way)
        state = ModelState(work)
        with state.watching():
            target.check_alike(work, teacher, joined(deciding[:together], together)[0])
        state.put_back()
        return Training(
            model=work,
            state=state,
            formats=formats(work, model),
            dense=teacher,
            samples=samples,
            held=held_out(together),
            ranks=ranks,
            size=size,
            at_once=together,
            precision=torch.bfloat16 if request.mixed_precision == "bf16" else None,
            seed=request.seed,
            augmented=partial(shifted, seed=request.seed) if shifts else lambda sample, _: sample,
            checkpointing=way.checkpointing,
        )

    def chosen() -> tuple[dict[str, Any], Memory]:
        before = None if log is None else log.way()
        if before is not None:  # whatever is free by now: it goes on to the same bytes
            known: dict[str, Any] = {name: before.get(name) for name in CHOSEN}
            return known, needed(setup(replace(request, **known)))
        space = room(device, request.max_memory)
        way, memory = fitting(request, model, at_once, space, setup)
        return {name: getattr(way, name) for name in CHOSEN}, memory

    changed, memory = ranks.broadcast("the way to train", chosen)
    way = replace(request, **changed)
    training = setup(way)
    if training.distance() is None:
        if request.loss is not None:
            raise NonFiniteError(
                "the loss is not finite on the held-out samples, before any training; let it "
                "return a finite number"
            )
        which = "smaller" if training.held.distance(teacher) is not None else "dense"
        raise NonFiniteError(f"the {which} model's outputs on held-out samples are not finite")
    return training, len(deciding), way, memory


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that cannot be trained, or trained towards."""
    check_usable(model)
    if is_on_disk(model):
        raise ModelError(
            f"{type(model).__name__} has weights that stay on disk, and training needs all of "
            "them at every step; load it into memory, without --max-memory"
        )
    check_finite_weights(model)


def _check(model: nn.Module, dense: nn.Module) -> None:
    """Refuse models that cannot be trained, or that do not belong together."""
    for one in (model, dense):
        check_trainable(one)
    if not may_come_from(model, dense):
        raise ModelError(
            f"the smaller model was not pruned from this {type(dense).__name__}: its weights are "
            "others; give the dense model that it came from"
        )


@contextmanager
def _begun(
    log: RecoveryLog | None,
    model: nn.Module,
    dense: nn.Module,
    inputs: ModelInputs,
    request: RecoveryRequest,
    way: RecoveryRequest,
    ranks: Ranks,
) -> Iterator[Standing | None]:
    """Begin a recovery, or go on with one, on all ranks; yield where it stands."""
    if log is None and ranks.alone:
        yield None
        return
    versions = {name: version(name) for name in ("torch", "transformers")}
    tensors = (*dense.named_parameters(), *dense.named_buffers())
    asked: dict[str, Any] = {**request.to_json(), **versions, "osscar": __version__}
    del asked["max_memory"]  # what it has led to is the way
    asked[WAY] = {name: getattr(way, name) for name in CHOSEN}
    asked["dense"] = sha256_of(tensors)
    made = Fingerprint.of(model, inputs, 1)
    manifest = JournalManifest("osscar.recovery-log/1", asked, made)
    manifest.check_alike(ranks)
    with nullcontext() if log is None else log.begun(manifest):
        last = None if log is None else log.last()
        yield ranks.broadcast("where the recovery stands", lambda: last)
