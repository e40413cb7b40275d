"""What a consumer is asked to reproduce on the inputs that pruning has left it.

A target is Y in ``|X W - Y|^2``.  With X the inputs in the pruned stream and W0 the dense weights,
each target here is ``Y = X W0 + D``: what the dense weights make of these inputs, and a correction
D of what earlier layers have already changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from osscar.core.errors import OptionError


@dataclass(frozen=True)
class Target:
    """A blend of what the dense weights compute and of what the dense model computes.

    Parameters
    ----------
    outputs
        Share of the dense model's own outputs, in [0, 1].  0 asks for what the dense weights make
        of the pruned stream, which is the paper's target; 1 asks for what the dense model puts out
        at the same place, so that errors of earlier layers are corrected.

    Raises
    ------
    OptionError
        If it is no such share.
    """

    outputs: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.outputs <= 1:
            raise OptionError(f"outputs is {self.outputs!r}; give a share from 0 to 1")

    @property
    def needs_dense(self) -> bool:
        """Whether batches have to run through the dense weights, too."""
        return self.outputs > 0

    def correction(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """Return D in the shape of a consumer's output.

        Parameters
        ----------
        dense, pruned
            What the consumer puts out with its dense weights, in either stream.
        """
        return (dense - pruned) * self.outputs


WEIGHTS = Target()
"""The paper's target."""
