"""Modules whose code the graph cannot follow, replaced by some that compute the same."""

from __future__ import annotations

from torch import Tensor, nn

from osscar.base.errors import EquivalenceError
from osscar.base.printable import listed
from osscar.data.batches import Batch
from osscar.shrinking.alibi import PREPARED
from osscar.shrinking.attention import changed, expose_attention, exposed
from osscar.shrinking.equivalence import computes, proved_unchanged
from osscar.shrinking.fold import Folded, fold, unfold
from osscar.shrinking.follow import prepare as replace_modules


def make_followable(
    model: nn.Module, example: Batch, expected: list[Tensor], *, heads: bool
) -> list[Folded]:
    """Replace code that cannot be followed, and prove that the model computes what it did.

    `expected` is what it puts out; nothing if it fails, which is reported once it is traced.  With
    `heads`, fused attention is to call its output layer as a module.  Return the modules whose
    normalized weight is a plain one now.
    """
    folded = fold(model)
    if folded and not computes(model, example, expected):
        unfold(folded)  # code of the model's own reads what a weight is computed from
        folded = []
    new = [*changed(model, PREPARED), *(exposed(model) if heads else ())]
    if not new:
        return folded
    names = ("the model", "the model with forward passes of OSSCAR")
    try:
        with proved_unchanged(model, example, names):
            replace_modules(model)
            if heads:
                expose_attention(model)
    except EquivalenceError as error:
        raise EquivalenceError(
            f"{error}: {listed([*map(repr, new)])} cannot be followed; leave "
            "heads out of what is asked (neurons= or channels= alone), or give these modules a "
            "class with a forward of its own, which stays as it is"
        ) from error
    return folded
