"""Modules whose code the graph cannot follow, replaced by some that compute the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor, nn

from graph import CouplingGroup
from osscar.base.errors import EquivalenceError, FileError
from osscar.base.memory import let_shortage_pass
from osscar.base.printable import listed
from osscar.data.batches import Batch
from osscar.shrinking.alibi import PREPARED
from osscar.shrinking.attention import changed, expose_attention, exposed
from osscar.shrinking.equivalence import finer_precision, in_format_of, proof_outputs, prove_equal
from osscar.shrinking.fold import Folded, fold
from osscar.shrinking.follow import prepare as replace_modules


def outputs_or_none(model: nn.Module, example: Batch) -> list[Tensor]:
    """Return what a model puts out; nothing if it fails, which is reported once it is traced."""
    try:
        return proof_outputs(model, [example])
    except (FileError, EquivalenceError):
        raise
    except Exception as error:  # the model may be anyone's code
        let_shortage_pass(error)
        return []


def make_followable(
    model: nn.Module, example: Batch, expected: list[Tensor], *, heads: bool
) -> list[Folded]:
    """Replace code that cannot be followed, and prove that the model computes what is expected.

    With `heads`, fused attention is to call its output layer as a module.  Returned are the modules
    whose normalized weight is a plain one now.

    Raises
    ------
    EquivalenceError
        If it computes something else.
    """
    folded = fold(model)
    if folded and not _same(expected, outputs_or_none(model, example)):
        unfold(folded)  # code of the model's own reads what a weight is computed from
        folded = []
    new = [*changed(model, PREPARED), *(exposed(model) if heads else ())]
    # In a coarse number format, sums in another order would differ.
    with finer_precision(model, example) if new else nullcontext():
        finer = in_format_of(example, model)
        before = outputs_or_none(model, finer) if new and expected else []
        replace_modules(model)
        if heads:
            expose_attention(model)
        if before:
            _check_replaced(before, outputs_or_none(model, finer), new)
    return folded


def unfold(folded: Sequence[Folded], groups: Sequence[CouplingGroup] = ()) -> None:
    """Give weights their normalization back, but those of which a group may take a part.

    The model's own class may apply it, and reads a checkpoint only with it.
    """
    cut = {slot.tensor for group in groups if group.prunable for slot in group.slots}
    for one in folded:
        if one.tensor not in cut:
            one.undo()


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether there are outputs, and those found are the expected ones."""
    try:
        return len(expected) == len(found) and math.isfinite(prove_equal(expected, found))
    except EquivalenceError:
        return False


def _check_replaced(expected: list[Tensor], found: list[Tensor], new: Sequence[str]) -> None:
    """Refuse modules that compute something else with forward passes that can be followed."""
    try:
        prove_equal(expected, found, names=("the model", "the model with forward passes of OSSCAR"))
    except EquivalenceError as error:
        raise EquivalenceError(
            f"{error}: {listed([*map(repr, new)])} cannot be followed; leave "
            "heads out of what is asked (neurons= or channels= alone), or give these modules a "
            "class with a forward of its own, which stays as it is"
        ) from error
