"""What a consumer is asked to reproduce on the inputs that pruning has left it.

A target is Y in ``|X W - Y|^2``.  With X the inputs in the pruned stream and W0 the dense weights,
each target here is ``Y = X W0 + D``: what the dense weights make of these inputs, and a correction
D of what earlier layers have already changed.
"""

from __future__ import annotations

import enum

from torch import Tensor


class Target(enum.StrEnum):
    """What the targets are corrected for."""

    WEIGHTS = "weights"
    """Nothing: what the dense weights make of the pruned inputs, which is the paper's target."""
    RESIDUAL = "residual"
    """What the dense model puts out at the same place, and what the residual stream lacks, to which
    the consumer's output is added."""

    @property
    def needs_dense(self) -> bool:
        """Whether batches have to run through the dense weights, too."""
        return self is Target.RESIDUAL


def correction(
    dense: Tensor,
    pruned: Tensor,
    dense_stream: Tensor | None = None,
    pruned_stream: Tensor | None = None,
) -> Tensor:
    """Return D, given what a consumer with dense weights puts out in each stream, in its shape.

    What is added to it, where that is known, may lie in other leading dimensions.
    """
    D = dense - pruned
    if dense_stream is not None and pruned_stream is not None:
        change = dense_stream.to(D.dtype) - pruned_stream.to(D.dtype)
        D = D + (change if D.is_nested else change.reshape(D.shape))
    return D
