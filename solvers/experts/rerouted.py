"""Losses where what a token prefers depends on who stays: tokens are sent anew.

That is so where experts lie in groups, which open by the scores of those that stay, and where a
bias is added to a softmax.  Of an exchange, only the tokens are sent anew that it can touch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.experts.chunks import Chunk, chunks_of, value
from solvers.experts.problem import ExpertProblem
from solvers.experts.routing import Denominator, RouterScores

_TOKENS = 1 << 15


class ReroutedLosses:
    """Losses under any rule."""

    def __init__(self, problem: ExpertProblem) -> None:
        self._problem, self._rule = problem, problem.rule
        self._reorders = self._rule.reorders(problem.choice_bias)
        self._chunks = chunks_of(problem, _TOKENS)

    def loss(self, kept: Tensor) -> float:
        """Return the loss of a set."""
        total = self._problem.scale
        for chunk in self._chunks:
            rows = torch.arange(len(chunk), device=kept.device)
            total += float(value(*self._sums(chunk, kept, rows), self._rule.scale).sum())
        return max(total, 0.0)

    def removals(self, kept: Tensor) -> Tensor:
        """Return the losses of a set less each of its experts."""
        pairs = [(r, None) for r in torch.nonzero(kept).flatten().tolist()]
        return self._table(kept, pairs)[:, 0]

    def exchanges(self, kept: Tensor) -> Tensor:
        """Return the losses of all exchanges within groups."""
        leaving, entering = (torch.nonzero(some).flatten().tolist() for some in (kept, ~kept))
        size = self._problem.size
        return self._table(
            kept, [(r, a) for r in leaving for a in entering if r // size == a // size]
        )

    def _table(self, kept: Tensor, pairs: Sequence[tuple[int, int | None]]) -> Tensor:
        sums = dict.fromkeys(pairs, self._problem.scale)
        for chunk in self._chunks:
            rows = torch.arange(len(chunk), device=kept.device)
            p, q, z = self._sums(chunk, kept, rows)
            touched = self._touched(chunk, kept)
            for r, a in pairs:
                then = kept.clone()
                then[r], reached, shift = False, touched[:, r], -chunk.all_gates[:, r]
                if a is not None:
                    then[a], reached = True, reached | touched[:, a]
                    shift = shift + chunk.all_gates[:, a]
                still = torch.nonzero(~reached).flatten()
                by_kept = self._rule.denominator is Denominator.KEPT
                other_z = z[still] + shift[still] if by_kept else z[still]
                left = value(p[still], q[still], other_z, self._rule.scale)
                anew = self._sums(chunk, then, torch.nonzero(reached).flatten())
                sums[r, a] += float(left.sum() + value(*anew, self._rule.scale).sum())
        shape = (len(kept), len(kept))
        table = torch.full(shape, torch.inf, dtype=torch.float64, device=kept.device)
        for (r, a), loss in sums.items():
            table[r, a or 0] = loss
        return table

    def _choice(self, chunk: Chunk, kept: Tensor, rows: Tensor) -> Tensor:
        """Return what the choice goes by, (rows, candidates); minus infinity where none stays."""
        problem, order = self._problem, chunk.order[rows]
        if self._rule.scores is RouterScores.SOFTMAX_OF_CHOSEN:
            choice = chunk.tokens.logits[rows].gather(1, order)
        else:
            choice = chunk.gates[rows]
        if self._reorders:
            choice = choice / (chunk.all_gates[rows] * kept).sum(1, keepdim=True)
        if problem.choice_bias is not None:
            choice = choice + problem.choice_bias[order]
        return choice.masked_fill(~kept[order], -torch.inf)

    def _chosen(self, choice: Tensor) -> Tensor:
        order = self._rule.open_choice(choice).argsort(dim=1, descending=True, stable=True)
        return order[:, : self._rule.top_k]

    def _sums(self, chunk: Chunk, kept: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, q and z of some tokens (`solvers.experts.ranked`)."""
        chosen = self._chosen(self._choice(chunk, kept, rows))
        u = chunk.gates[rows].gather(1, chosen)
        gram = chunk.tokens.entries(rows[:, None, None], chosen[:, :, None], chosen[:, None, :])
        p = (u * chunk.tokens.cross[rows].gather(1, chosen)).sum(1)
        q = (u[:, :, None] * gram * u[:, None, :]).sum((1, 2))
        if self._rule.denominator is Denominator.KEPT:
            return p, q, (chunk.all_gates[rows] * kept).sum(1)
        return (
            p,
            q,
            u.sum(1) if self._rule.denominator is Denominator.CHOSEN else torch.ones_like(p),
        )

    def _touched(self, chunk: Chunk, kept: Tensor) -> Tensor:
        """Return which tokens may be sent elsewhere if an expert leaves or enters, (t, experts).

        Those that are sent to it, or would be if its group were open, and those of whose groups'
        scores it is a part, or would be.
        """
        if self._reorders:
            return torch.ones_like(chunk.all_gates, dtype=torch.bool)
        everything = torch.arange(len(chunk), device=kept.device)
        choice = self._choice(chunk, kept, everything)
        chosen = self._chosen(choice)
        last = choice.gather(1, chosen).amin(1, keepdim=True)
        reached = self._choice(chunk, torch.ones_like(kept), everything) >= last
        stays = kept[chunk.order].view(len(chunk), self._rule.groups, -1)
        before = stays.cumsum(2) - stays.long()
        reached |= (before < self._rule.group_score.members).flatten(1)
        return torch.zeros_like(chunk.all_gates, dtype=torch.bool).scatter(1, chunk.order, reached)
