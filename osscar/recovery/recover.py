"""Recovery in one run: split the samples, train, keep the best weights, and say how it went.

What is minimized is the divergence of the smaller model's predictions from the dense one's
(distillation: Hinton, Vinyals and Dean, 2015, at temperature 1), over the weights that pruning has
left; widths, plan and form of the model stay as they are.

A step is tried first: if it takes too much memory, micro-batches are halved until it fits.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from osscar import __version__
from osscar.base.devices import default_torch, multiplies_bfloat16
from osscar.base.errors import (
    ModelError,
    NoMemoryError,
    NonFiniteError,
    OsscarError,
)
from osscar.base.inputs import parse_size
from osscar.base.memory import (
    FOR_BATCHES,
    DeviceMemory,
    in_words,
    is_shortage,
    memory_for,
    memory_of,
    shortage,
)
from osscar.base.printable import pluralize
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, profiled, timed
from osscar.data.loaders import read_once
from osscar.distance.distance import Compared
from osscar.network.model_state import model_state
from osscar.network.modules import (
    check_finite_weights,
    check_usable,
    device_of,
    named_tensors,
    sha256_of,
)
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.journal import Fingerprint, JournalManifest, own_code
from osscar.proof.lineage import (
    are_swapped,
    check_dense,
    data_record,
    lineage_of,
    note_calibration,
)
from osscar.recovery.page import sections
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import Setup, samples_for
from osscar.recovery.training import Check, Progress, RecoveryLog, Training, nearest
from osscar.recovery.weights import as_it_came, trainable
from osscar.report.sections import Section
from osscar.report.shown import Shown
from osscar.request import by_keywords


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Shown):
    """A smaller model that was trained towards the dense one, and how that went.

    Parameters
    ----------
    model
        Of the same widths as before.
    points
        The checks on a part of the held-out samples; the first is the model as it came.
    kept
        The step whose weights the model has; 0 are those that it came with.
    before, after
        Distance from the dense model on all held-out samples, of the model as it came, and of this.
    distance
        What a distance is, of which outputs, and why.
    samples, held_out
        How many samples trained, and how many were held out.
    trained
        How many parameters were trained.
    seconds
        Wall time.
    stages
        The same by stage; ``other`` is what no stage counts.
    request
        What was asked for.
    chosen
        How it was trained where the request leaves that open: fields of a request.
    data
        What reports say of the samples.
    """

    model: nn.Module
    points: tuple[Check, ...]
    kept: int
    before: float
    after: float
    distance: Compared
    samples: int
    held_out: int
    trained: int
    seconds: float
    stages: Mapping[str, float]
    request: RecoveryRequest
    chosen: Mapping[str, Any]
    data: Mapping[str, Any]

    def __repr__(self) -> str:
        held, unit = pluralize(self.held_out, "held-out sample"), self.distance.measure
        return (
            f"Recovery({unit} from the dense model: {self.before:.4g} -> {self.after:.4g} "
            f"on {held}; step {self.kept} of {self.points[-1].step} kept; {self.seconds:.1f} s)"
        )

    def sections(self) -> Iterator[Section]:
        """Return what a page shows of it."""
        return sections(self.document())

    def document(self) -> dict[str, Any]:
        """Return what is known of it, as ``docs/json.md`` describes it."""
        told = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        del told["model"], told["request"]
        return {
            **told,
            "distance": dataclasses.asdict(self.distance),
            "settings": self.request.to_json(),
            "points": [dataclasses.asdict(point) for point in self.points],
        }


def recover_as_asked(
    smaller: Any,
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
        The model that it was pruned from; another one, such as a larger teacher, with
        `other_dense`.
    data
        In any of the forms that `osscar.prune` takes, without labels.  A part of it is held out.
        Of a loader or a data set as many samples are read, and kept in memory, as the steps need;
        if it has fewer, they are used again.
    request
        What is asked for.  `osscar.recover` takes its fields as keywords: `RecoveryRequest`
        describes them.
    log
        Keeps the state of the training, so that a run which was killed goes on; of several ranks,
        the first has it.
    ranks
        The processes that are asked for the same, and share out the samples of each step.
    tell
        Is called with a line if less memory had to be used than was asked for.

    Returns
    -------
    Recovery
        With a model of the same shapes, never worse on the held-out samples.

    Raises
    ------
    ModelError, NonFiniteError
        If the model was pruned from another dense one, or weights stay on disk; or weights are not
        finite, or outputs on the held-out samples.
    DataError, OptionError
        If the models cannot read the data, or there are too few of them; or the model has no blocks
        to checkpoint, or no matrices for adapters.
    NoMemoryError
        If no training options fit into memory.
    JournalError
        If the log is of another recovery.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> text = loaded.calibration(samples=9, seqlen=32)
    >>> pruned = osscar.prune(loaded.model, text, sparsity=0.9)
    >>> recovery = osscar.recover(pruned, loaded.model, text, steps=4, learning_rate=5e-4)
    >>> recovery.after <= recovery.before
    True
    """
    start = time.perf_counter()
    model: Any = smaller if isinstance(smaller, nn.Module) else getattr(smaller, "model", smaller)
    for one in (model, dense):
        check_trainable(one)
    if are_swapped(model, dense) and not request.other_dense:
        raise ModelError(
            f"the smaller model was not pruned from this {type(dense).__name__}: the second model "
            "is the smaller one, or was pruned more often; give the smaller one first, and then "
            "the dense model that it came from"
        )
    check_dense(model, dense, other=request.other_dense)
    windows, samples = (samples_for(request, windows=kind) for kind in (True, False))
    data = read_once(dense, data, windows=windows, samples=samples)
    with (
        default_torch(),
        torch.enable_grad(),
        memory_for(f"{type(model).__name__} and its training", FOR_BATCHES),
        model_state(dense),
        profiled() as spent,
    ):
        with timed(Stage.TEACHER):
            setup = Setup(model, dense, data, request)
            training = _training(setup, log, ranks, tell)
            before = training.distance(training.held_out)
        if before is None:
            raise NonFiniteError(
                "the distance of the two models is not finite on the held-out samples, before any "
                "training"
            )
        with _begun(log, setup, training.options, ranks) as known:
            points = training.run(log, known)
        work, kept, after = training.model, nearest(points).step, before
        if kept:
            found = training.distance(training.held_out)
            if found is None or found > before:  # which the part of them did not tell
                work, kept = trainable(model, setup.dense, training.options), 0
            else:
                after = found
        work = as_it_came(work, model)
    note_calibration(work, data)
    seconds = time.perf_counter() - start
    return Recovery(
        model=work,
        points=points,
        kept=kept,
        before=before,
        after=after,
        distance=setup.distance.compared,
        samples=len(setup.samples),
        held_out=len(setup.held_out),
        trained=sum(weight.numel() for weight in training.weights.values()),
        seconds=seconds,
        stages=spent.of(seconds),
        request=request,
        chosen={**_chosen(training.options), "augment": "flip-shift" if setup.shifts else "none"},
        data={**setup.inputs.settings, **data_record(data)},
    )


recover = by_keywords(RecoveryRequest, recover_as_asked)


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that cannot be trained, or trained towards."""
    check_usable(model)
    if is_on_disk(model):
        raise ModelError(
            f"{type(model).__name__} has weights that stay on disk, and training needs all of "
            "them at every step; load it into memory, without max_memory (`--max-memory`)"
        )
    check_finite_weights(model)


def _training(
    setup: Setup, log: RecoveryLog | None, ranks: Ranks, tell: Callable[[str], None]
) -> Training:
    """Set up the training with what its log chose, or what fits on the first rank."""
    manifest = None if log is None else log.manifest()
    if manifest is None and ranks.alone:
        return training_that_fits(setup, tell)

    def choose() -> Any:
        if manifest is not None:
            return manifest.asked["chosen"]
        return _chosen(training_that_fits(setup, tell).options)

    options = dataclasses.replace(setup.request, **ranks.broadcast("how to train", choose))
    return Training(setup, options, ranks)


# ---- micro-batches that fit into memory -----------------------------------------------------

CHOSEN = ("micro_batch_size", "mixed_precision")
"""The fields of a request that are chosen here unless they are given."""

_USED = 0.9
"""The share of free memory that a step may take: other processes may take some, and memory is
looked at after each operator, which has made its result by then."""


def training_that_fits(setup: Setup, tell: Callable[[str], None]) -> Training:
    """Return a training of which a step was tried, in micro-batches that fit into memory."""
    asked, memory = setup.request, memory_of(device_of(setup.dense))
    memory.give_back()
    if asked.max_memory is not None:
        memory.give_back_at_once()
        limit: int | None = parse_size(asked.max_memory)
    else:
        free = memory.available()
        limit = None if free is None else memory.resident() + int(_USED * free)
    half = multiplies_bfloat16(device_of(setup.dense))
    precision = asked.mixed_precision or ("bf16" if half else "no")
    size, short = _at_once(setup, precision), False
    while True:
        options = dataclasses.replace(asked, mixed_precision=precision, micro_batch_size=size)
        try:
            with nullcontext() if limit is None else _Limit(memory, limit):
                training = Training(setup, options)
                training.try_step()
            if short:
                tell(f"memory: trains with micro-batches of {size}, as more does not fit")
            return training
        except (RuntimeError, MemoryError, OsscarError) as error:
            if is_shortage(error):
                if size == 1 or asked.micro_batch_size is not None:
                    raise shortage(
                        error,
                        f"a step of the recovery of {type(setup.model).__name__}, with "
                        f"micro-batches of {size}",
                        "pass checkpointing (`--set checkpointing=true`), lora=16 "
                        "(`--set lora=16`) to train adapters in place of the weights, or a smaller "
                        "micro_batch_size (`--set micro_batch_size=1`); or give more memory "
                        "(max_memory, `--max-memory`, of the whole process), or shorter or smaller "
                        "samples",
                    ) from error
                size, short = size // 2, True
            elif precision == "bf16" and asked.mixed_precision is None:
                precision = "no"
                size, short = _at_once(setup, precision), False
            else:
                raise
        gc.collect()
        memory.give_back()


def _at_once(setup: Setup, precision: str) -> int:
    """Return how many samples of a step run at once, if they fit into memory."""
    # A CPU multiplies several windows in float32 no faster than one after the other.
    cpu = device_of(setup.dense).type == "cpu" and precision == "no"
    if setup.inputs.alone:
        return 1
    return setup.request.micro_batch_size or (1 if setup.inputs.tokens and cpu else setup.size)


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ends a pass after the first operator that leaves a device with more than a limit in use."""

    def __init__(self, memory: DeviceMemory, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self._limit = memory, limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and look at what is in use."""
        result = func(*args, **(kwargs or {}))
        if self._memory.excess(0, self._limit) > 0:
            raise NoMemoryError(f"it takes more than {in_words(self._limit)} in all")
        return result


def _chosen(options: RecoveryRequest) -> dict[str, Any]:
    return {name: getattr(options, name) for name in CHOSEN}


@contextmanager
def _begun(
    log: RecoveryLog | None, setup: Setup, options: RecoveryRequest, ranks: Ranks
) -> Iterator[tuple[Progress, Mapping[str, Tensor]] | None]:
    """Begin a recovery, or go on with one, on all ranks; yield its last state."""
    if log is None and ranks.alone:
        yield None
        return
    versions = {name: version(name) for name in ("torch", "transformers")}
    asked: dict[str, Any] = {**setup.request.to_json(), **versions, "osscar": __version__}
    del asked["max_memory"]  # what it has led to is chosen
    asked |= {"chosen": _chosen(options), "dense": sha256_of(named_tensors(setup.dense))}
    asked |= own_code(lineage_of(setup.dense).source, *vars(setup.request).values())
    manifest = JournalManifest(
        "osscar.recovery-log/2", asked, Fingerprint.of(setup.model, setup.inputs)
    )
    manifest.check_alike(ranks)
    with nullcontext() if log is None else log.locked():
        if log is not None:
            log.begin(manifest)
        last = None if log is None else log.last()
        yield ranks.broadcast("where the recovery stands", lambda: last)
