"""Tokens in pieces, with what of them does not depend on the choice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.experts.problem import ExpertProblem, RoutedTokens, raw_weights


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tokens, with what does not depend on the choice."""

    tokens: RoutedTokens
    order: Tensor
    """The candidates, (t, r) int64."""
    all_raw: Tensor
    """Raw weights of all experts, (t, experts)."""
    raw: Tensor
    """Raw weights of the candidates, (t, r)."""

    def __len__(self) -> int:
        return len(self.order)


def pieces_of(problem: ExpertProblem, size: int) -> list[Piece]:
    """Return the tokens of a problem in pieces of at most `size`."""
    pieces = []
    for block in problem.tokens:
        for start in range(0, len(block.logits), size):
            part = block.part(start, start + size)
            order, raw = problem.order(part), raw_weights(problem.rule, part.logits)
            pieces.append(Piece(part, order, raw, raw.gather(1, order)))
    return pieces


def value(p: Tensor, q: Tensor, z: Tensor | float, scale: float) -> Tensor:
    """Return what of a token's loss depends on the choice."""
    inverse = scale / z
    return (inverse * q - 2 * p) * inverse
