"""Tokens in chunks, with what of them does not depend on the choice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.experts.problem import ExpertProblem, RoutedTokens, gate_values


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens, with what does not depend on the choice."""

    tokens: RoutedTokens
    order: Tensor
    """The candidates, (t, r) int64."""
    all_gates: Tensor
    """Gate values of all experts, (t, experts)."""
    gates: Tensor
    """Gate values of the candidates, (t, r)."""

    def __len__(self) -> int:
        return len(self.order)


def chunks_of(problem: ExpertProblem, size: int) -> list[Chunk]:
    """Return the tokens of a problem in chunks of at most `size`."""
    chunks = []
    for block in problem.tokens:
        for start in range(0, len(block.logits), size):
            part = block.part(start, start + size)
            order, gates = problem.order(part), gate_values(problem.rule, part.logits)
            chunks.append(Chunk(part, order, gates, gates.gather(1, order)))
    return chunks


def value(p: Tensor, q: Tensor, z: Tensor | float, scale: float) -> Tensor:
    """Return what of a token's loss depends on the choice."""
    inverse = scale / z
    return (inverse * q - 2 * p) * inverse
