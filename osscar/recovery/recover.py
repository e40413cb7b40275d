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
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import nn

from osscar import __version__
from osscar.allocation.divergence import Measure
from osscar.base.errors import ModelError
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.printable import pluralize
from osscar.base.ranks import ALONE, Ranks
from osscar.base.shown import Shown
from osscar.base.timing import Stage, profiled, timed
from osscar.data.loaders import read_once
from osscar.network.model_state import model_state
from osscar.network.modules import (
    check_finite_weights,
    check_usable,
    device_of,
    named_tensors,
    sha256_of,
)
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.fingerprint import Fingerprint, JournalManifest
from osscar.proof.lineage import data_record, may_come_from, note_calibration
from osscar.recovery.log import WAY, Point, RecoveryLog, Standing
from osscar.recovery.memory import CHOSEN, way_in_words, way_that_fits
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import samples_for
from osscar.recovery.setup import Setup
from osscar.recovery.training import Training, kept_point
from osscar.recovery.weights import as_it_came
from osscar.request import by_keywords


class _Pruned(Protocol):
    """What `osscar.prune` returns."""

    @property
    def model(self) -> nn.Module:
        """The smaller model."""


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Shown):
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
    stages
        The same by stage; ``other`` is what no stage counts.
    request
        What was asked for.
    chosen
        The way to train that was chosen, and what was done to samples: fields of a request.
    data
        What reports say of the samples.
    """

    model: nn.Module
    points: tuple[Point, ...]
    learning_rate: float
    measure: Measure
    samples: int
    held_out: int
    trained: int
    seconds: float
    stages: Mapping[str, float]
    request: RecoveryRequest
    chosen: Mapping[str, Any]
    data: Mapping[str, Any]

    def __repr__(self) -> str:
        held = pluralize(self.held_out, "held-out sample")
        return (
            f"Recovery({self.measure} from the dense model: {self.before:.4g} -> {self.after:.4g} "
            f"on {held}; step {self.kept} of {self.points[-1].step} kept; {self.seconds:.1f} s)"
        )

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
        told = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        del told["model"], told["request"]
        return {
            **told,
            "settings": self.request.to_json(),
            "points": [dataclasses.asdict(point) for point in self.points],
            **{name: getattr(self, name) for name in ("kept", "before", "after")},
        }


def recover_as_asked(
    smaller: nn.Module | _Pruned,
    dense: nn.Module,
    data: Any,
    request: RecoveryRequest,
    log: RecoveryLog | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] = lambda line: None,
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
        and decides.  Of a loader or a data set as many samples are read, and kept, as let each step
        have others; all of them, and again, where there are fewer.
    request
        What is asked for.  `osscar.recover` takes its fields as keywords: `RecoveryRequest`
        describes them.
    log
        Keeps where it stands, so that a run which was killed goes on where it stopped; of several
        ranks, the first has it.
    ranks
        The processes that are asked for the same, and share out the samples of each step.
    tell
        Hears of it, in a line, where another way to train than was asked for had to be chosen.

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
        If the model has no blocks to checkpoint, or no matrices that adapters could stand beside.
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
    windows, samples = (samples_for(request, windows=kind) for kind in (True, False))
    data = read_once(dense, data, windows=windows, samples=samples)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        memory_for(f"{type(model).__name__} and its training", FOR_BATCHES),
        model_state(dense),
        profiled() as spent,
    ):
        with timed(Stage.TEACHER):
            setup = Setup.of(model, dense, data, request, ranks)
            way = _way(setup, log, tell)
            training = Training.of(setup, way)
            before = training.first_distance()
        with _begun(log, setup, way) as known:
            rate = request.learning_rate if known is None else known.progress.rate
            rate = training.found_rate() if rate is None else rate
            points = training.run(before, rate, log, known)
        trained = sum(weight.numel() for weight in training.weights.values())
        work = as_it_came(training.model, model)
    note_calibration(work, data, setup.inputs.settings)
    seconds = time.perf_counter() - start
    return Recovery(
        model=work,
        points=points,
        learning_rate=rate,
        measure=setup.distance.measure,
        samples=len(setup.samples),
        held_out=len(setup.deciding),
        trained=trained,
        seconds=seconds,
        stages=spent.of(seconds),
        request=request,
        chosen={**_chosen(way), "augment": "flip-shift" if setup.shifts else "none"},
        data={**setup.inputs.settings, **data_record(data)},
    )


recover = by_keywords(RecoveryRequest, recover_as_asked)


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


def _way(setup: Setup, log: RecoveryLog | None, tell: Callable[[str], None]) -> RecoveryRequest:
    """Return the way to train, on all ranks as the first decides.

    It is the one that was chosen before, whatever is free by now, so that a run which goes on ends
    with the same bytes.
    """
    request, alone = setup.request, dataclasses.replace(setup, ranks=ALONE)

    def decided() -> Mapping[str, Any]:
        before = None if log is None else log.way()
        if before is not None:
            return before
        way = way_that_fits(
            *(request, setup.model, setup.at_once, device_of(setup.dense)),
            lambda way: Training.of(alone, way).try_steps(),
        )
        if way != dataclasses.replace(request, micro_batch_size=setup.at_once):
            tell(f"memory: there is none for more than {way_in_words(way)}")
        return _chosen(way)

    return dataclasses.replace(request, **setup.ranks.broadcast("the way to train", decided))


def _chosen(way: RecoveryRequest) -> dict[str, Any]:
    return {name: getattr(way, name) for name in CHOSEN}


@contextmanager
def _begun(
    log: RecoveryLog | None, setup: Setup, way: RecoveryRequest
) -> Iterator[Standing | None]:
    """Begin a recovery, or go on with one, on all ranks; yield where it stands."""
    ranks, dense = setup.ranks, setup.dense
    if log is None and ranks.alone:
        yield None
        return
    versions = {name: version(name) for name in ("torch", "transformers")}
    asked: dict[str, Any] = {**setup.request.to_json(), **versions, "osscar": __version__}
    del asked["max_memory"]  # what it has led to is the way
    asked |= {WAY: _chosen(way), "dense": sha256_of(named_tensors(dense))}
    manifest = JournalManifest(
        "osscar.recovery-log/1", asked, Fingerprint.of(setup.model, setup.inputs, 1)
    )
    manifest.check_alike(ranks)
    with nullcontext() if log is None else log.held():
        if log is not None:
            log.begin(manifest)
        last = None if log is None else log.last()
        yield ranks.broadcast("where the recovery stands", lambda: last)
