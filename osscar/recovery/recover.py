"""Recovery in one run: split the samples, find a rate, train, keep the best, and say how it went.

What is minimized is the divergence of the smaller model's predictions from the dense one's
(distillation: Hinton, Vinyals and Dean, 2015, at temperature 1), over the weights that pruning has
left; widths, plan and form of the model stay as they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graph.tracing.preserve import forget_derived
from osscar import __version__
from osscar.base.devices import resolve_device
from osscar.base.errors import DataError, ModelError, NonFiniteError, OptionError
from osscar.base.memory import FOR_BATCHES, memory_for
from osscar.base.printable import are, pluralize
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.data.images import ImageSet
from osscar.data.samples import named_generator
from osscar.network.model_state import ModelState, model_state
from osscar.network.modules import (
    check_finite_weights,
    check_usable,
    copied,
    device_of,
    in_evaluation,
)
from osscar.offload.on_disk import is_on_disk
from osscar.preparation.fingerprint import Fingerprint, JournalManifest, sha256_of
from osscar.recovery.adapters import adaptable, add_adapters, merge_adapters
from osscar.recovery.log import WAY, Point, RecoveryLog, Standing
from osscar.recovery.memory import CHOSEN, Memory, fitting, needed, room
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.target import HeldOut, Measure, Target, joined
from osscar.recovery.training import Training, kept_point
from osscar.request import by_keywords
from osscar.shrinking.lineage import data_record, may_come_from, note_calibration
from osscar.shrinking.program.program import ProgramModule

_STEP = {True: 4, False: 64}
_DECIDING = {True: 8, False: 128}
"""Windows, or samples of anything else, in a step, and those that decide at most, by default."""

_SHIFT = 8
"""Images are shifted by a share of their width of at most one over this."""

_OVERLAP = 4
"""So many tokens with which one window ends and another begins are taken for an overlap."""

_SPECIAL = 4
"""The most tokens that a tokenizer puts around a text on either side."""


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
        _give_own_weights(training.model, training.dense)
        if way.lora is not None:
            merge_adapters(training.model)
        work = _as_it_came(training.model, model)
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


def windows_for(request: RecoveryRequest) -> int:
    """Return how many windows of text a request takes if each of them trains once, or decides."""
    size, deciding = request.batch_size or _STEP[True], request.held_out or _DECIDING[True]
    return request.steps * size + deciding


def check_enough(dense: nn.Module, data: Any, request: RecoveryRequest) -> None:
    """Refuse data that are too few (DataError), for whoever does other work before a recovery."""
    _split(as_inputs(dense, data), dense, request)


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
    samples, deciding = _split(inputs, teacher, request)
    size = request.batch_size or min(_STEP[inputs.tokens], len(samples))
    # On a CPU several windows at once are no faster than one after the other, and take more memory.
    usual = 1 if inputs.tokens and device.type == "cpu" else size
    at_once = 1 if inputs.apart else request.micro_batch_size or usual
    target = Target.of(teacher, inputs, joined(deciding, at_once), request.loss)
    alike = _alike(model, teacher)
    shifts = request.augment != "none" and isinstance(data, ImageSet)

    @lru_cache(maxsize=1)
    def held_out(together: int) -> HeldOut:
        return HeldOut.of(target, teacher, joined(deciding, together), ranks)

    def setup(way: RecoveryRequest) -> Training:
        together = way.micro_batch_size or at_once
        work = _trainable(model, teacher, alike, device, way)
        state = ModelState(work)
        with state.watching():
            target.check_alike(work, teacher, joined(deciding[:together], together)[0])
        state.put_back()
        return Training(
            model=work,
            state=state,
            formats=_formats(work, model),
            dense=teacher,
            samples=samples,
            held=held_out(together),
            ranks=ranks,
            size=size,
            at_once=together,
            precision=torch.bfloat16 if request.mixed_precision == "bf16" else None,
            seed=request.seed,
            augmented=partial(_shifted, seed=request.seed) if shifts else lambda sample, _: sample,
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


def _alike(model: nn.Module, dense: nn.Module) -> frozenset[str]:
    """Return the names of the weights that pruning has left as they are in the dense model."""
    others = dict(dense.named_parameters())
    return frozenset(
        name
        for name, weight in model.named_parameters()
        if name in others
        and others[name].dtype == weight.dtype
        and torch.equal(others[name], weight.to(others[name].device))
    )


def _trainable(
    model: nn.Module,
    dense: nn.Module,
    alike: frozenset[str],
    device: torch.device,
    request: RecoveryRequest,
) -> nn.Module:
    """Return a copy in which gradients flow to what is trained, in a format for small steps.

    What is not trained, and `alike`, are the dense model's tensors.
    """
    others = dict(dense.named_parameters())
    trained = _trained(model, others, request)
    program = isinstance(model, ProgramModule)  # whose number formats are in its code

    def moved(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16) and not program
        return tensor.detach().to(device, torch.float32 if half else tensor.dtype, copy=True)

    instead: dict[int, Tensor] = {id(one): moved(one) for one in model.buffers()}
    for name, weight in model.named_parameters():
        same = name in alike - trained and (program or weight.dtype == torch.float32)
        values = others[name].detach() if same else moved(weight)
        instead[id(weight)] = nn.Parameter(values, requires_grad=name in trained)
    work = in_evaluation(copied(model, instead))
    if request.lora is not None:
        add_adapters(work, adaptable(model), request.lora, request.seed)
    elif not trained:
        raise OptionError(f"train is {request.train!r}, and the model has no such weights")
    return work


def _trained(
    model: nn.Module, others: Mapping[str, Tensor], request: RecoveryRequest
) -> frozenset[str]:
    """Return the names of the weights that are trained themselves."""
    chosen: Callable[[str, Tensor], bool] = {
        "all": lambda name, weight: request.lora is None,
        "pruned": lambda name, weight: name not in others or others[name].shape != weight.shape,
        "norms": lambda name, weight: weight.ndim <= 1,
    }[request.train]
    weights = dict(model.named_parameters())
    learning = {name for name, weight in weights.items() if weight.requires_grad} or set(weights)
    return frozenset(
        name
        for name in learning
        if weights[name].is_floating_point() and chosen(name, weights[name])
    )


def _formats(work: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats in which a copy comes back; adapters have their own."""
    due = {name: tensor.dtype for name, tensor in _tensors(model)}
    return {n: due.get(n.replace(".base_layer.", "."), one.dtype) for n, one in _tensors(work)}


def _give_own_weights(model: nn.Module, dense: nn.Module) -> None:
    """Copy the weights that a model shares with the dense one."""
    others = {weight.data_ptr() for weight in dense.parameters()}
    for weight in model.parameters():
        if weight.data_ptr() in others:
            weight.data = weight.data.clone()


def _as_it_came(model: nn.Module, before: nn.Module) -> nn.Module:
    """Give a model the number formats, flags, modes and place of the one that it was made of."""
    model.to(device_of(before))
    for (_, mine), (_, other) in zip(_tensors(model), _tensors(before), strict=True):
        mine.data = mine.data.to(other.dtype)
        mine.requires_grad_(other.requires_grad)
        mine.grad = None
    for module, first in zip(model.modules(), before.modules(), strict=True):
        module.training = first.training
    forget_derived(model)
    return model


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _split(
    inputs: ModelInputs, model: nn.Module, request: RecoveryRequest
) -> tuple[list[Batch], list[Batch]]:
    """Return the samples that train, and those that decide.

    Those that decide are of windows the last ones, none of whose text is in a window that trains,
    and of anything else drawn at random.
    """
    samples = inputs.batches(model, 1)
    deciding = request.held_out or min(_DECIDING[inputs.tokens], max(1, len(samples) // 8))
    order = list(range(len(samples)))
    if not inputs.tokens:
        drawn = named_generator("held out", request.seed)
        order = torch.randperm(len(samples), generator=drawn).tolist()
    trained = max(0, len(samples) - deciding)
    held = [samples[index] for index in sorted(order[trained:])]
    training = [samples[index] for index in sorted(order[:trained])]
    if inputs.tokens:
        text = _text_of(samples)
        apart = [text[index] for index in order[trained:]]
        known = [any(_share(text[index], one) for one in apart) for index in order[:trained]]
        training = [one for one, shared in zip(training, known, strict=True) if not shared]
    size = request.batch_size or 1
    if len(training) < size:
        raise DataError(
            f"{pluralize(len(samples), 'sample')} {are(len(samples))} too few: to decide what is "
            f"kept takes {deciding}, {len(training)} share nothing with those, and a step has "
            f"{size}; give more, or a smaller --batch-size or --held-out"
        )
    return training, held


def _text_of(samples: Sequence[Batch]) -> Tensor:
    """Return the tokens of windows without the special ones, with which all begin and end."""
    windows = torch.cat([one["input_ids"] for one in samples])
    same, length = (windows == windows[0]).all(0).int(), windows.shape[1]
    most = min(_SPECIAL, (length - 1) // 2)
    before, after = (int(side[:most].cumprod(0).sum()) for side in (same, same.flip(0)))
    return windows[:, before : length - after]


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether two windows share text: of one length, one of them ends as the other begins."""
    return _begins_in(one, other) or _begins_in(other, one)


def _begins_in(second: Tensor, first: Tensor) -> bool:
    least = min(_OVERLAP, len(first))
    starts = (first.unfold(0, least, 1) == second[:least]).all(1).nonzero().flatten()
    return any(torch.equal(first[at:], second[: len(first) - at]) for at in starts.tolist())


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


def _shifted(sample: Batch, turn: int, seed: int) -> Batch:
    """Mirror and shift an image as chance has it in this turn."""
    generator = named_generator(f"image {turn}", seed)
    ((name, image),) = sample.items()
    height, width = image.shape[-2:]
    most = max(1, width // _SHIFT)
    down, right = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    padded = nn.functional.pad(image, (most,) * 4)
    return {name: padded[..., down : down + height, right : right + width]}
