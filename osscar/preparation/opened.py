"""A model made ready for the walk: copied, prepared, traced, tried out; once, for every command."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import graph
from graph import CouplingGroup
from graph.tracing.preserve import without_cache
from osscar.base.errors import EquivalenceError, FileError
from osscar.base.memory import let_shortage_pass
from osscar.base.ranks import ALONE, Ranks
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.network.kernels import followed_mixtures
from osscar.network.model_state import ModelState
from osscar.network.modules import (
    check_finite_weights,
    check_usable,
    copied,
    graphics_cards,
    in_evaluation,
)
from osscar.offload.on_disk import shapes_only
from osscar.preparation.failures import failures_named
from osscar.preparation.linear_maps import freeze_unreadable, mixtures_of
from osscar.preparation.readers import weights_read_elsewhere
from osscar.preparation.repeatable import refuse_chance
from osscar.preparation.routing import sound_mixtures
from osscar.shrinking.alibi import PREPARED
from osscar.shrinking.attention import changed, expose_attention, exposed
from osscar.shrinking.equivalence import (
    call,
    comparable,
    finer_precision,
    in_format_of,
    proof_outputs,
    prove_equal,
)
from osscar.shrinking.fold import Folded, fold
from osscar.shrinking.follow import prepare
from osscar.shrinking.structure import remember_structure


@dataclass(frozen=True, eq=False)
class Opened:
    """A model with its calibration data, ready to be walked through.

    Parameters
    ----------
    model
        A copy in evaluation mode, on its device; it computes what the user's model does.  Where a
        prunable group has a part of a weight that is normalized at every call, the weight is a
        plain one; see `osscar.shrinking.fold`.
    inputs
        The calibration data in the form that it reads.
    traced
        Its dependency graph.
    groups
        The coupling groups; those that cannot be refitted are frozen and say why.
    example
        Small inputs with which it was traced.
    batch_size
        Samples in a batch.
    untouched
        What its modules held before it ran.
    in_programs
        Of the prunable groups, those that only the exported program can lose units of, by name,
        and why: their units meet numbers that the code makes.
    ranks
        The processes among which work on the data is shared out; all of them hold all data.
    """

    model: nn.Module
    inputs: ModelInputs
    traced: graph.DependencyGraph
    groups: tuple[CouplingGroup, ...]
    example: Batch = field(repr=False)
    batch_size: int
    untouched: ModelState = field(repr=False)
    in_programs: Mapping[str, str] = field(default_factory=dict)
    ranks: Ranks = ALONE

    @cached_property
    def residual(self) -> frozenset[str]:
        """Names of the groups that are residual streams."""
        return graph.residual_groups(self.traced)

    @property
    def sample(self) -> Batch:
        """The first sample of the calibration data."""
        return self.inputs.batches(self.model, 1)[0]

    def batches(self) -> list[Batch]:
        """Return the calibration data, keyword arguments of the model, on its device."""
        return self.inputs.batches(self.model, self.batch_size)


@contextmanager
def opened(
    model: nn.Module,
    calibration: Any,
    *,
    device: torch.device | None = None,
    batch_size: int | None = None,
    heads: bool = True,
    copy: bool = True,
    programs: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Opened]:
    """Open a model for pruning, for a study, or to be looked at; without gradients meanwhile.

    Parameters
    ----------
    model
        Any model; not changed, unless it is not copied.
    calibration
        Windows of tokens, images or tensors, in any of the forms that `osscar.prune` takes.
    device
        Where it is to run; by default where it is.
    batch_size
        Samples in a batch; by default 8 windows of tokens, or 64 of anything else.
    heads
        Whether fused attention is to call its output layer as a module, so that heads can be
        refitted.
    copy
        Whether to work on a copy; a model that nobody else needs spares the memory.
    programs
        Whether it may become an exported program, which can lose more units than modules can.
    ranks
        The processes that have opened the same, and share out the work.

    Raises
    ------
    ModelError
        If the model has no weights, cannot be copied, or two passes over the same inputs differ.
    NonFiniteError
        If a weight is not finite.
    CalibrationError
        If the model cannot read the calibration data.
    EquivalenceError
        If it puts out no tensor.
    graph.GraphError
        If it cannot be traced.
    """
    check_usable(model)
    check_finite_weights(model)
    inputs = as_inputs(model, calibration)
    work = copied(model) if copy else model
    if device is not None:
        work = work.to(device)
    in_evaluation(work)
    untouched = ModelState(work)
    # What a model draws at random is nobody else's matter.
    with torch.random.fork_rng(graphics_cards(work)), without_cache(work), torch.no_grad():
        example = inputs.example(work)
        remember_structure(work, example)
        with untouched.watching():
            expected = _outputs(work, example)
        folded = _prepare(work, example, expected, heads)
        # What passes keep for the next would be traced as numbers of the code.
        untouched.put_back()
        with shapes_only(work, example) as small, followed_mixtures(work):
            traced, in_programs = _traced(work, small, programs)
        with weights_read_elsewhere(work) as elsewhere, untouched.watching():
            _check_runs(work, example, expected)
        with untouched.watching():
            mixtures = sound_mixtures(work, example, mixtures_of(work, traced.groups))
        groups = freeze_unreadable(work, traced.groups, elsewhere, mixtures)
        _unfold_whole(folded, groups)
        yield Opened(
            model=work,
            inputs=inputs,
            traced=traced,
            groups=groups,
            example=example,
            batch_size=inputs.batch_size if batch_size is None else batch_size,
            untouched=untouched,
            in_programs=in_programs,
            ranks=ranks,
        )


def _traced(
    model: nn.Module, example: Batch, programs: bool
) -> tuple[graph.DependencyGraph, dict[str, str]]:
    """Find the groups, and those that only a program can lose units of, by name with the reason."""
    traced = graph.trace(model, example)
    wide, narrow = graph.PROGRAM_RULES, graph.DEFAULT_RULES
    frozen = (freeze for group in traced.groups for freeze in group.frozen)
    made = [f for f in frozen if wide.find(f.operator) is not narrow.find(f.operator)]
    if not programs or not made:
        return traced, {}
    wider = graph.trace(model, example, rules=wide)
    in_modules = {_places(group): group for group in traced.groups}
    known = {places for places, group in in_modules.items() if group.prunable}
    only = {_places(group): group.name for group in wider.prunable}
    if not only.keys() > known:  # modules would lose what they can
        return traced, {}
    reasons = {
        name: next(iter(in_modules[places].frozen if places in in_modules else made)).reason
        for places, name in only.items()
        if places not in known
    }
    return wider, reasons


def _places(group: CouplingGroup) -> frozenset[tuple[str, int, int, int, int]]:
    """Return where a group's units lie."""
    return frozenset((s.tensor, s.dim, s.offset, s.outer, s.inner) for s in group.slots)


def _prepare(model: nn.Module, example: Batch, expected: list[Tensor], heads: bool) -> list[Folded]:
    """Replace code that cannot be followed, and prove that the model computes what it did.

    Parameters
    ----------
    model, example
        The model, and what it is run on.
    expected
        What it puts out.
    heads
        Whether fused attention is to call its output layer as a module.

    Returns
    -------
    list of Folded
        The modules whose normalized weight is a plain one now.

    Raises
    ------
    EquivalenceError
        If it computes something else.
    """
    folded = _fold(model, example, expected)
    new = [*changed(model, PREPARED), *(exposed(model) if heads else ())]
    # In a coarse number format, sums in another order would differ.
    with finer_precision(model, example) if new else nullcontext():
        finer = in_format_of(example, model)
        as_before = _outputs(model, finer) if new and expected else []
        prepare(model)
        if heads:
            expose_attention(model)
        if as_before:
            _check_rewritten(as_before, _outputs(model, finer), new)
    return folded


def _check_rewritten(expected: list[Tensor], found: list[Tensor], new: Sequence[str]) -> None:
    """Refuse modules that compute something else with forward passes that can be followed."""
    try:
        prove_equal(expected, found, names=("the model", "the model with forward passes of OSSCAR"))
    except EquivalenceError as error:
        more = f" and {len(new) - _MOST_NAMED} more" if len(new) > _MOST_NAMED else ""
        raise EquivalenceError(
            f"{error}: {', '.join(map(repr, new[:_MOST_NAMED]))}{more} cannot be followed; leave "
            "heads out of what is asked (neurons= or channels= alone), or give these modules a "
            "class with a forward of its own, which stays as it is"
        ) from error


_MOST_NAMED = 4


def _fold(model: nn.Module, example: Batch, expected: list[Tensor]) -> list[Folded]:
    """Fold normalized weights, unless code of the model's own reads what they are computed from."""
    folded = fold(model)
    if folded and not _same(expected, _outputs(model, example)):
        for one in folded:
            one.undo()
        return []
    return folded


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether there are outputs, and those found are the expected ones."""
    try:
        return len(expected) == len(found) and math.isfinite(prove_equal(expected, found))
    except EquivalenceError:
        return False


def _unfold_whole(folded: Sequence[Folded], groups: Sequence[CouplingGroup]) -> None:
    """Give those weights their normalization back of which no group can take a part.

    The model's own class may apply it, and reads a checkpoint only with it.
    """
    cut = {slot.tensor for group in groups if group.prunable for slot in group.slots}
    for one in folded:
        if one.tensor not in cut:
            one.undo()


def _outputs(model: nn.Module, example: Batch) -> list[Tensor]:
    """Return what a model puts out; nothing if it fails, which is reported once it is traced.

    Raises
    ------
    EquivalenceError
        If it puts out no tensor.
    """
    try:
        return proof_outputs(model, [example])
    except (FileError, EquivalenceError):
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        return []


def _check_runs(model: nn.Module, example: Batch, expected: list[Tensor]) -> None:
    """Run the model once more: tracing looks at shapes, and lets through what kernels refuse."""
    with failures_named(model, example):
        found = comparable(call(model, example))
    if expected:
        refuse_chance(model, example, expected, found)
