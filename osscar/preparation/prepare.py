"""A model prepared for a run: copied, folded, adapted, traced, frozen; once, for every command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import graph
from graph import CouplingGroup
from graph.tracing.preserve import forget_cached, without_cache
from osscar.base.devices import default_torch, multiplies_bfloat16
from osscar.base.errors import EquivalenceError, warn
from osscar.base.memory import attempt
from osscar.base.printable import listed
from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import Stage, timed
from osscar.consumers.consumer import ExpertMap, LinearMap
from osscar.consumers.linear_maps import last_matrices, linear_maps, refittable, refittable_mixtures
from osscar.consumers.products import Product, weights_read_elsewhere
from osscar.data.batches import ModelInputs, as_inputs
from osscar.data.parts import shuffled
from osscar.data.reader import Batch
from osscar.data.samples import shapes_of
from osscar.data.sequences import padded_without_mask
from osscar.network.attention import expose_attention, exposed
from osscar.network.hooks import followed_mixtures, hooks, record_layers
from osscar.network.model_state import ModelState
from osscar.network.modules import (
    check_finite_weights,
    check_merged,
    check_usable,
    copied,
    count_parameters,
    device_of,
    forward,
    forward_in_bfloat16,
    graphics_cards,
    in_evaluation,
    tensors_in,
)
from osscar.offload.on_disk import is_on_disk, shapes_only
from osscar.preparation.failures import computes_alone, failures_named, refuse_chance, together
from osscar.proof.equivalence import call, comparable, computes, outputs_or_none, proved_unchanged
from osscar.proof.lineage import remember_structure
from osscar.proof.structural import DensePrograms, dense_programs
from osscar.routing.declared import traced_around
from osscar.routing.find import ExpertMixture, WholeMixture, mixtures_in
from osscar.shrinking.fold import Folded, fold, unfold

T = TypeVar("T")

_OUTPUT_BYTES = 16 << 20
"""Memory of what a module returns for the samples that run at once on a processor.

glibc takes memory of 32 MiB or more from the system anew each time, and to page it in takes three
times as long as to compute what it holds.
"""

_LARGE_MODEL, _LARGE_OUTPUT = 1 << 26, 1 << 16
"""Parameters of a language model, or numbers that a module of another returns for a sample, from
which on the seconds that bfloat16 saves are worth its rounding."""

_TRIED, _ROUNDED = 4, 5e-3
"""Samples, other than windows of text, that are tried in bfloat16, and the most of the variance of
outputs that rounding may come to: 2e-4 for SmolLM2, 3e-3 for MobileNetV2."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model with its calibration data, prepared for a run."""

    model: nn.Module
    """A copy in evaluation mode, on its device; it computes what the user's model does.  Where a
    prunable group has a part of a weight that is computed at every call, the weight is a plain
    one; see `osscar.shrinking.fold`."""
    inputs: ModelInputs
    traced: graph.DependencyGraph
    groups: tuple[CouplingGroup, ...]
    """Those that cannot be refitted are frozen and say why."""
    example: Batch = field(repr=False)
    """Small inputs with which it was traced."""
    batch_size: int
    untouched: ModelState = field(repr=False)
    """What its modules held before it ran."""
    in_programs: Mapping[str, str] = field(default_factory=dict)
    """Of the prunable groups, those that only the exported program can lose units of, by name, and
    why: their units meet numbers that the code makes."""
    folded: tuple[str, ...] = ()
    """Names of the weights that the user's model computes at every call, and that are plain."""
    products: Mapping[str, Product] = field(default_factory=dict, repr=False)
    """The weights, by name, that are observed where code multiplies by them."""
    made: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What `once` has made."""
    idle: frozenset[str] = frozenset()
    """Consumers, by their labels, to which no token is sent any more: they are not refitted."""
    ranks: Ranks = ALONE
    """The processes among which work on the data is shared out; all of them hold all data."""

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what is made once, for this and for all that is made of it with other data."""
        if key not in self.made:
            self.made[key] = make()
        found: T = self.made[key]
        return found

    @property
    def experts(self) -> tuple[ExpertMixture | WholeMixture, ...]:
        """Its mixtures of experts in order; trial passes find them when first asked for."""
        model, known = self.untouched.model, (self.groups, self.products)
        return self.once(
            "experts", lambda: refittable_mixtures(model, mixtures_in(model, self.example), *known)
        )

    @property
    def mixtures(self) -> dict[str, ExpertMixture]:
        """Those of which experts may leave, by the name of the group."""
        return {one.group.name: one for one in self.experts if isinstance(one, ExpertMixture)}

    @cached_property
    def residual(self) -> frozenset[str]:
        """Names of the groups that are residual streams."""
        return graph.residual_groups(self.traced)

    @property
    def programs(self) -> DensePrograms:
        """The programs of the model as before any pass; to be asked for before units leave."""
        for model in (self.model, self.untouched.model):
            self.untouched.put_back(model)
        return self.once("programs", lambda: dense_programs(self.untouched.model, self.example))

    def traced_on(self, batch: Batch, what: str = "a pass") -> graph.DependencyGraph:
        """Trace the model once more, on larger inputs: operators have shapes of these.

        This is done once for inputs of one shape and `what` hooks do, and before any unit leaves.
        """

        def trace() -> graph.DependencyGraph:
            self.untouched.put_back()
            rules = graph.PROGRAM_RULES if self.in_programs else graph.DEFAULT_RULES
            with shapes_only(self.model, batch) as small, followed_mixtures(self.model):
                return _traced_around(self.model, batch, small, rules)[0]

        return self.once(("a trace", what, *shapes_of(batch)), trace)

    @property
    def bfloat16(self) -> bool:
        """Whether the model is a large one in float32 that nearly computes the same in bfloat16."""
        return self.once(
            "bfloat16", lambda: all(self.ranks.all_gather("a number format", _in_bfloat16(self)))
        )

    @property
    def every_group(self) -> tuple[CouplingGroup, ...]:
        """Its groups, those that no trace finds last."""
        return (*self.groups, *(one.group for one in self.experts))

    def linear_maps(self, group: CouplingGroup) -> tuple[LinearMap, ...]:
        """Return the consumers of a group, in execution order, but for those that are `idle`."""
        if group.kind.routed:
            mixture = self.mixtures[group.name]
            every = last_matrices(self.model, mixture, self.groups, self.products)
        else:
            every = linear_maps(self.model, group, self.products)
        return tuple(one for one in every if one.label not in self.idle)

    @property
    def sample(self) -> Batch:
        """The first sample of the calibration data."""
        return self.inputs.first()

    def batches(self, start: int = 0, stop: int | None = None) -> list[Batch]:
        """Return some samples of the calibration data, as batches on the model's device."""
        return self.inputs.part(start, stop).batches(self.batch_size)


@contextmanager
def prepare(
    model: nn.Module,
    calibration: Any,
    *,
    device: torch.device | None = None,
    batch_size: int | None = None,
    heads: bool = True,
    copy: bool = True,
    programs: bool = False,
    seed: int | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Prepared]:
    """Prepare a model for pruning, for a study, or to be looked at; without gradients meanwhile.

    Model and calibration data are any that `osscar.prune` takes.  The model is not changed, unless
    it is not copied: one that nobody else needs spares the memory.

    batch_size: Samples in a batch; by default 8 windows of tokens, or 64 of anything else, on a
        processor fewer of large samples.
    heads: Whether fused attention is to call its output layer as a module, to be refitted.
    programs: Whether it may become an exported program, which can lose more units.
    seed: By which samples are shuffled before anything divides them; None where nothing does.
    ranks: The processes that have prepared the same, and share out the work.

    Raises ModelError for a model without weights, with adapters that are not merged, that cannot be
    copied, or of which two passes differ; NonFiniteError for its weights; DataError if it cannot
    read the data; EquivalenceError if it returns no tensor; graph.GraphError if it is not traced.
    """
    with default_torch():
        check_usable(model)
        check_merged(model)
        check_finite_weights(model)
        inputs = as_inputs(model, calibration)
        if seed is not None:
            inputs = shuffled(inputs, seed)
        padded = padded_without_mask(inputs)
        if padded:
            warn(
                f"{padded} of {inputs.samples} samples have padding at an end, which counts, since "
                "no mask hides it; give attention_mask, too"
            )
        work = in_evaluation(copied(model) if copy else model)
        forget_cached(work)
        if device is not None:
            work = work.to(device)
        record_layers(work)
        # What a model draws at random is nobody else's matter.
        with (
            torch.compiler.set_stance("force_eager"),  # else it is compiled with each new hook
            torch.random.fork_rng(graphics_cards(work)),
            without_cache(work),
            torch.no_grad(),
        ):
            with timed(Stage.OPEN):
                prepared = _prepared(work, inputs, batch_size, heads, programs, ranks)
            yield prepared


def _prepared(
    model: nn.Module,
    inputs: ModelInputs,
    batch_size: int | None,
    heads: bool,
    programs: bool,
    ranks: Ranks,
) -> Prepared:
    """Prepare a model in evaluation mode, in place."""
    inputs = together(model, inputs.on(model))
    untouched, example = ModelState(model), inputs.example()
    remember_structure(model, inputs.sample())
    with untouched.watching():
        expected = outputs_or_none(model, example)
        _try_data(model, inputs, example, bool(expected))
    folded = _followable(model, example, expected, heads=heads)
    # What passes keep for the next would be traced as numbers of the code.
    untouched.put_back()
    with shapes_only(model, example) as small, followed_mixtures(model):
        traced, in_programs, untraced = _traced(model, example, small, programs)
    with untouched.watching():
        # Once more: tracing looks at shapes, and lets through what kernels refuse.
        with (
            weights_read_elsewhere(model) as elsewhere,
            failures_named(model, example, inputs.source),
        ):
            found = comparable(call(model, example))
        if expected:
            refuse_chance(model, example, expected, found)
        groups, products = refittable(model, example, traced.groups, elsewhere)
    groups += untraced
    plain = unfold(folded, groups)
    return Prepared(
        model=model,
        inputs=inputs,
        traced=traced,
        groups=groups,
        example=example,
        batch_size=_at_once(model, inputs, example) if batch_size is None else batch_size,
        untouched=untouched,
        in_programs=in_programs,
        folded=plain,
        products=products,
        ranks=ranks,
    )


def _try_data(model: nn.Module, inputs: ModelInputs, example: Batch, runs: bool) -> None:
    """Refuse data on which a model fails (DataError), before minutes of work."""
    batches = [] if runs else [example]
    if not inputs.tokens:  # alone: two rows of a sample may pass for one, of two channels
        batches.append(inputs.first())
    batches += inputs.extremes().batches(inputs.batch_size)
    for batch in batches:
        with failures_named(model, batch if inputs.apart else inputs.tensors, inputs.source):
            call(model, batch)


def _in_bfloat16(prepared: Prepared) -> bool:
    """Return `Prepared.bfloat16`.  In a mixture, tokens would go to other experts."""
    model, inputs = prepared.model, prepared.inputs
    groups = (group for group in prepared.groups if group.prunable)
    consumers = (one for group in groups for one in prepared.linear_maps(group))
    routed = any(isinstance(one, ExpertMap) for one in consumers)
    single = all(one.dtype is torch.float32 for one in model.parameters())
    if routed or not single or is_on_disk(model) or not multiplies_bfloat16(device_of(model)):
        return False
    few = inputs.part(0, 1 if inputs.tokens else _TRIED)
    [sample, *_] = few.batches(_TRIED)
    state = ModelState(model)
    with state.watching(), torch.no_grad():
        if inputs.tokens:
            large = count_parameters(model) >= _LARGE_MODEL
        else:
            large = widest_output(model, sample) >= _LARGE_OUTPUT
        close = large and _close_in_bfloat16(model, sample)
    state.put_back()
    return close


def _close_in_bfloat16(model: nn.Module, sample: Batch) -> bool:
    """Whether a model returns nearly the same in bfloat16, for what outputs vary about a mean."""
    with attempt():  # the model may be anyone's code
        due, found = (comparable(run(model, sample)) for run in (forward, forward_in_bfloat16))
        return all(
            bool((b.to(a) - a).abs().square().sum() <= _ROUNDED * a.numel() * a.var(correction=0))
            for a, b in zip(due, found, strict=True)
        )
    return False


def _at_once(model: nn.Module, inputs: ModelInputs, example: Batch) -> int:
    """Return how many samples run at once unless the caller says otherwise."""
    if inputs.tokens or inputs.alone or device_of(model).type != "cpu":
        return inputs.batch_size
    fits = max(1, _OUTPUT_BYTES // (4 * max(1, widest_output(model, example))))
    if fits >= inputs.batch_size or not computes_alone(model, example):
        return inputs.batch_size
    return fits


def widest_output(model: nn.Module, example: Batch) -> int:
    """Return the most numbers that an innermost module returns for one sample."""
    sizes = [0]

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        sizes.append(sum(map(Tensor.numel, tensors_in(result))))

    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    with torch.no_grad(), hooks(model, leaves, after=see):
        forward(model, example)
    return max(sizes) // len(next(iter(example.values())))


def _followable(model: nn.Module, example: Batch, expected: list[Tensor], *, heads: bool) -> Folded:
    """Replace code that cannot be followed, and prove that the model computes what is `expected`.

    With `heads`, fused attention is to call its output layer as a module.  Returns what was folded.
    """
    folded = fold(model)
    if folded and not computes(model, example, expected):
        unfold(folded)  # code of the model's own reads what a weight is computed from
        folded = {}
    new = exposed(model) if heads else []
    if not new:
        return folded
    names = ("the model", "the model with forward passes of OSSCAR")
    try:
        with proved_unchanged(model, example, names):
            expose_attention(model)
    except EquivalenceError as error:
        raise EquivalenceError(
            f"{error}: the attention of {listed([*map(repr, new)])} cannot be replaced by an equal "
            "forward pass; prune neurons or channels alone (`--neurons`, `--channels`), or write a "
            "class with a forward of its own for these modules"
        ) from error
    return folded


def _traced(
    model: nn.Module, example: Batch, small: Batch, programs: bool
) -> tuple[graph.DependencyGraph, dict[str, str], tuple[CouplingGroup, ...]]:
    """Find the groups, those that only programs lose units of with reasons, and untraced ones."""
    traced, untraced = _traced_around(model, example, small)
    wide, narrow = graph.PROGRAM_RULES, graph.DEFAULT_RULES
    frozen = (freeze for group in traced.groups for freeze in group.frozen)
    made = [f for f in frozen if wide.find(f.operator) is not narrow.find(f.operator)]
    if not programs or not made or untraced:
        return traced, {}, untraced
    wider = graph.trace(model, small, rules=wide)
    in_modules = {_places(group): group for group in traced.groups}
    known = {places for places, group in in_modules.items() if group.prunable}
    only = {_places(group): group.name for group in wider.prunable}
    if not only.keys() > known:  # modules would lose what they can
        return traced, {}, ()
    reasons = {
        name: next(iter(in_modules[places].frozen if places in in_modules else made)).reason
        for places, name in only.items()
        if places not in known
    }
    return wider, reasons, ()


def _traced_around(
    model: nn.Module, example: Batch, small: Batch, rules: graph.RuleTable = graph.DEFAULT_RULES
) -> tuple[graph.DependencyGraph, tuple[CouplingGroup, ...]]:
    """Trace a model, if need be around mixtures; groups in these come second, frozen."""
    try:
        return graph.trace(model, small, rules=rules), ()
    except graph.TraceError as error:
        return traced_around(model, example, small, error)


def _places(group: CouplingGroup) -> frozenset[tuple[str, int, int, int, int]]:
    """Return where a group's units lie."""
    return frozenset((s.tensor, s.dim, s.offset, s.outer, s.inner) for s in group.slots)
