"""Gram matrices of what consumers read, accumulated while the calibration data flow through."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osscar.errors import ModelError, NonFiniteError
from osscar.linear_maps import LinearMap
from solvers import Consumer


class GramAccumulator:
    """``X'X`` of one consumer over all positions seen so far, in float64.

    Parameters
    ----------
    linear_map
        The consumer.
    """

    def __init__(self, linear_map: LinearMap) -> None:
        self.linear_map = linear_map
        self.positions = 0
        p = linear_map.rows
        device = next(linear_map.module.parameters()).device
        self._gram = torch.zeros(p, p, dtype=torch.float64, device=device)

    def add(self, X: Tensor) -> None:
        """Add the products of X, (positions, p).

        Raises
        ------
        NonFiniteError
            If X has NaN or infinite entries.
        """
        if not bool(torch.isfinite(X).all()):
            raise NonFiniteError(
                f"the inputs of {self.linear_map.name!r} have NaN or infinite entries; check the "
                "weights before it, or use --dtype float32"
            )
        X = X.double()
        self._gram.addmm_(X.T, X)
        self.positions += len(X)

    def consumer(self, damp: float) -> Consumer:
        """Return the quadratic terms, with the dense weights on these inputs as the target.

        Parameters
        ----------
        damp
            Weight of the proximal term, relative to the mean of the diagonal.

        Raises
        ------
        ModelError
            If the consumer was never called.

        Warns
        -----
        UserWarning
            If there were fewer positions than inputs, so that only the damping makes the problem
            well posed.
        """
        p = self.linear_map.rows
        if not self.positions:
            raise ModelError(
                f"{self.linear_map.name!r} was never called on the calibration data, so that it "
                "cannot be refitted; give inputs that reach it"
            )
        if self.positions < p:
            warnings.warn(
                f"{self.linear_map.name}: {self.positions} calibration positions for {p} inputs; "
                "the Gram matrix is rank-deficient and only damping makes up for it. "
                "Use more samples or larger ones.",
                stacklevel=2,
            )
        return Consumer.from_gram(
            self._gram / self.positions,
            self.linear_map.read_weight(),
            units=self.linear_map.unit_rows,
            damp=damp,
        )


class _AllMeasured(Exception):
    """Ends a forward pass as soon as everything that is measured has been seen."""


@contextmanager
def observe(accumulators: Sequence[GramAccumulator]) -> Iterator[Callable[..., bool]]:
    """Accumulate while modules run.

    Yields
    ------
    callable
        Calls a module with arguments, stopping once the last of the consumers was reached;
        returns whether it was stopped.  How often a module calls its consumers is learned from the
        first call, which runs to its end.
    """
    expected: Counter[int] = Counter()
    seen: Counter[int] = Counter()

    def hook(index: int) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def measure(_: nn.Module, args: tuple[object, ...]) -> None:
            accumulator = accumulators[index]
            for X in accumulator.linear_map.read_inputs(args):
                accumulator.add(X)
            seen[index] += 1
            if seen == expected:
                raise _AllMeasured

        return measure

    def run(module: nn.Module, *args: object, **kwargs: object) -> bool:
        seen.clear()
        try:
            module(*args, **kwargs)
        except _AllMeasured:
            return True
        expected.update(seen if not expected else ())
        return False

    handles = [
        accumulator.linear_map.module.register_forward_pre_hook(hook(index))
        for index, accumulator in enumerate(accumulators)
    ]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
