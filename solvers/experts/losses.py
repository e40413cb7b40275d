"""Losses of sets of experts, of all removals and of all exchanges, as the searches ask for them.

With gate values u (`gate_values`), of a token that is sent to the experts J while S stay, the loss
is ``|Y|^2 + s (s q / z - 2 p) / z``, where s is the rule's scale and

    p = sum_J u_j c_j,     q = sum_J u_i u_j G_ij,     z = sum of u over J, or over S, or 1.

Where tokens prefer experts in one order, the next in line follows in place of r; an expert a that
enters drives out the last of J.  So an exchange of r for a changes p and q of the tokens that are
sent to r, or prefer a to the last of J.  Sums without a chosen member are summed without it, not
subtracted from: it can hold nearly all of the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.experts.problem import ExpertProblem, RoutedTokens, gate_values
from solvers.experts.routing import Denominator, RouterScores

_TOKENS = 4096
"""Tokens of which losses are computed at a time, where each prefers experts in one order."""

_ELEMENTS = 1 << 18
"""Tokens times exchanges at a time, where all weights of a token change with each: as many as stay
in the cache."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens, with what of them does not depend on the choice."""

    tokens: RoutedTokens
    order: Tensor
    """The candidates, (t, r) int64."""
    all_gates: Tensor
    """Gate values of all experts, (t, experts)."""
    gates: Tensor
    """Gate values of the candidates, (t, r)."""

    def __len__(self) -> int:
        return len(self.order)


def _value(p: Tensor, q: Tensor, z: Tensor | float, scale: float) -> Tensor:
    """Return what of a token's loss depends on the choice."""
    inverse = scale / z
    return (inverse * q - 2 * p) * inverse


class Losses(ABC):
    """Losses of sets of experts, given as masks, (experts,) bool, some tokens at a time."""

    def __init__(self, problem: ExpertProblem, size: int) -> None:
        self.problem, self.rule = problem, problem.rule
        self.chunks: list[Chunk] = []
        for block in problem.tokens:
            for start in range(0, len(block.logits), size):
                part = block.part(start, start + size)
                order, gates = problem.order(part), gate_values(problem.rule, part.logits)
                self.chunks.append(Chunk(part, order, gates, gates.gather(1, order)))

    @abstractmethod
    def values(self, chunk: Chunk, kept: Tensor) -> Tensor:
        """Return what of each token's loss depends on the choice, (t,)."""

    def loss(self, kept: Tensor) -> float:
        """Return the loss of a set of at least `keep` experts, in groups of any size."""
        parts = (float(self.values(chunk, kept).sum()) for chunk in self.chunks)
        return max(sum(parts, self.problem.scale), 0.0)

    @abstractmethod
    def removals(self, kept: Tensor) -> Tensor:
        """Return the losses of a set less each of its experts, (experts,); inf for the others."""

    @abstractmethod
    def exchanges(self, kept: Tensor) -> Tensor:
        """Return the losses with a in place of r, (experts r, experts a); else infinity."""


def losses_of(problem: ExpertProblem) -> Losses:
    """Return the losses of a problem's choices."""
    fixed = problem.rule.groups == 1 and not problem.rule.reorders(problem.choice_bias)
    return RankedLosses(problem) if fixed else ReroutedLosses(problem)


# ---- one order, whatever stays ------------------------------------------------------------------


class RankedLosses(Losses):
    """Losses where each token prefers experts in one order, whatever stays."""

    def __init__(self, problem: ExpertProblem) -> None:
        super().__init__(problem, _TOKENS)

    def values(self, chunk: Chunk, kept: Tensor) -> Tensor:
        """Sum up over the first of each token's experts that stay."""
        return _Dispatch(self.problem, chunk, kept).values()

    def removals(self, kept: Tensor) -> Tensor:
        """Sum up anew where the expert was chosen."""
        return self._table(kept, torch.zeros_like(kept))[:, 0]

    def exchanges(self, kept: Tensor) -> Tensor:
        """Sum up anew where either is chosen."""
        table = torch.full(
            (len(kept), len(kept)), torch.inf, dtype=torch.float64, device=kept.device
        )
        table[:, ~kept] = self._table(kept, ~kept)
        return table

    def _table(self, kept: Tensor, entering: Tensor) -> Tensor:
        """Return the losses without each expert and with each that enters, or with none."""
        leaving = torch.nonzero(kept).flatten()
        columns = max(1, int(entering.sum()))
        sums = torch.zeros(len(leaving), columns, dtype=torch.float64, device=kept.device)
        for chunk in self.chunks:
            _Exchanges(_Dispatch(self.problem, chunk, kept), kept, entering).add_to(sums)
        table = torch.full((len(kept), columns), torch.inf, dtype=torch.float64, device=kept.device)
        table[leaving] = sums + self.problem.scale
        return table


class _Dispatch:
    """Where a chunk's tokens are sent, and the sums over that."""

    def __init__(self, problem: ExpertProblem, chunk: Chunk, kept: Tensor) -> None:
        self.chunk, self.rule, k = chunk, problem.rule, problem.rule.top_k
        self.stays = kept[chunk.order]
        ranks = torch.arange(1, k + 2, device=kept.device).expand(len(chunk), -1).contiguous()
        place = torch.searchsorted(self.stays.cumsum(1), ranks)
        self.chosen, self.following = place[:, :k], place[:, k]
        """Ranks of the experts J, (t, k), and of the next in line, (t,); r where none is held."""
        self.u = chunk.gates.gather(1, self.chosen)
        self.uc = self.u * chunk.tokens.cross.gather(1, self.chosen)
        rows = torch.arange(len(chunk), device=kept.device)[:, None, None]
        gram = chunk.tokens.entries(rows, self.chosen[:, :, None], self.chosen[:, None, :])
        self.uGu = self.u[:, :, None] * gram * self.u[:, None, :]
        self.experts = chunk.order.gather(1, self.chosen)
        if self.rule.denominator is Denominator.KEPT:
            others = chunk.all_gates * kept
            self.rest = others.scatter(1, self.experts, 0.0).sum(1)
            """Sum of u over those that stay and are not chosen."""

    def denominators(self, of_chosen: Tensor, rest: Tensor | float = 0.0) -> Tensor | float:
        """Return z, given the sum over the chosen and that over the rest."""
        if self.rule.denominator is Denominator.ONE:
            return 1.0
        return of_chosen if self.rule.denominator is Denominator.CHOSEN else of_chosen + rest

    def values(self) -> Tensor:
        """Return what of each loss depends on the choice, (t,)."""
        z = self.denominators(self.u.sum(1), getattr(self, "rest", 0.0))
        return _value(self.uc.sum(1), self.uGu.sum((1, 2)), z, self.rule.scale)


class _Exchanges:
    """The sums over a chunk's tokens for each expert that leaves and each that enters."""

    def __init__(self, dispatch: _Dispatch, kept: Tensor, entering: Tensor) -> None:
        self.dispatch, self.rule, k = dispatch, dispatch.rule, dispatch.rule.top_k
        chunk, device = dispatch.chunk, kept.device
        apart = 1 - torch.eye(k, dtype=torch.float64, device=device)
        self._apart = apart
        # Without each of the chosen, (t, k).
        self.u, self.p = dispatch.u @ apart, dispatch.uc @ apart
        self.q = (apart * (dispatch.uGu @ apart)).sum(1)
        self.leaver = (kept.cumsum(0) - 1)[dispatch.experts]
        """Rows of the table that the chosen have."""
        self.apart_from = torch.ones(
            len(chunk), int(kept.sum()), dtype=torch.float64, device=device
        ).scatter_(1, self.leaver, 0.0)
        """One where an expert stays and is not chosen."""
        self.leaving, enters = torch.nonzero(kept).flatten(), bool(entering.any())
        self.gates_in = (
            chunk.all_gates[:, entering] if enters else chunk.gates.new_zeros(len(chunk), 1)
        )
        # Those that enter before the next in line, if one of the chosen leaves: tokens and ranks.
        ranks = torch.arange(chunk.order.shape[1], device=device)
        ahead = entering[chunk.order] & (ranks < dispatch.following[:, None])
        self.rows, self.rank = torch.nonzero(ahead, as_tuple=True)
        self.column = (entering.cumsum(0) - 1)[chunk.order[self.rows, self.rank]]
        self.drives = self.rank < dispatch.chosen[self.rows, -1]  # out the last, if none leaves

    def add_to(self, sums: Tensor) -> None:
        """Add what of the losses depends on the choice, (those that leave, those that enter)."""
        dispatch, chunk = self.dispatch, self.dispatch.chunk
        driven = self._marked(self.rows[self.drives], self.column[self.drives])
        ahead = self._marked(self.rows, self.column)
        follows = torch.nonzero(dispatch.following < chunk.order.shape[1]).flatten()
        p, q, u = self._with(follows, dispatch.following[follows])
        in_p, in_q, in_u = self._with(self.rows, self.rank)
        rows, column = self.rows[self.drives], self.column[self.drives]
        last_p, last_q, last_u = (of[self.drives, -1] for of in (in_p, in_q, in_u))
        if self.rule.denominator is Denominator.KEPT:
            leaving = chunk.all_gates[:, self.leaving]
            z = (dispatch.rest + dispatch.u.sum(1))[:, None] - leaving
            z = z.masked_fill(self.apart_from == 0, torch.inf)  # where nothing is to be added
            self._add_unmoved(sums, z, driven)
            gates_in = self.gates_in.masked_fill(ahead, torch.inf)[follows]
            z = (dispatch.rest[:, None] + self.u)[follows]
            moved = self._value(p[:, :, None], q[:, :, None], z[:, :, None] + gates_in[:, None, :])
            sums.index_add_(0, self.leaver[follows].flatten(), moved.flatten(0, 1))
            z = (dispatch.rest + dispatch.u.sum(1))[rows] + self.gates_in[rows, column]
            z = z[:, None] - leaving[rows]
            z = z.masked_fill(self.apart_from[rows] == 0, torch.inf)
            sums.T.index_add_(0, column, self._value(last_p[:, None], last_q[:, None], z))
        else:
            sums += (self.apart_from * dispatch.values()[:, None]).T @ (~driven).double()
            one = self._value(p, q, dispatch.denominators(u))
            moved = torch.zeros_like(self.apart_from)
            moved[follows] = moved[follows].scatter(1, self.leaver[follows], one)
            sums += moved.T @ (~ahead).double()
            entered = torch.zeros_like(self.gates_in)
            entered[rows, column] = self._value(last_p, last_q, dispatch.denominators(last_u))
            sums += self.apart_from.T @ entered
        rest = dispatch.rest[self.rows, None] if self.rule.denominator is Denominator.KEPT else 0.0
        both = self._value(in_p, in_q, dispatch.denominators(in_u, rest))
        place = self.leaver[self.rows] * sums.shape[1] + self.column[:, None]
        sums.view(-1).index_add_(0, place.flatten(), both.flatten())

    def _add_unmoved(self, sums: Tensor, z: Tensor, driven: Tensor) -> None:
        """Add the tokens that are sent where they were, with weights of another sum."""
        p, q = self.dispatch.uc.sum(1), self.dispatch.uGu.sum((1, 2))
        gates_in = self.gates_in.masked_fill(driven, torch.inf)
        size = max(1, _ELEMENTS // sums.numel())
        for start in range(0, len(z), size):
            some = slice(start, start + size)
            there = z[some, :, None] + gates_in[some, None, :]
            sums += self._value(p[some, None, None], q[some, None, None], there).sum(0)

    def _value(self, p: Tensor, q: Tensor, z: Tensor | float) -> Tensor:
        return _value(p, q, z, self.rule.scale)

    def _marked(self, rows: Tensor, columns: Tensor) -> Tensor:
        marks = torch.zeros_like(self.gates_in, dtype=torch.bool)
        marks[rows, columns] = True
        return marks

    def _with(self, rows: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, q and the sum of u of tokens without each of the chosen and with another."""
        dispatch, tokens = self.dispatch, self.dispatch.chunk.tokens
        u = dispatch.chunk.gates[rows, rank][:, None]
        c = tokens.cross[rows, rank][:, None]
        own = tokens.entries(rows, rank, rank)[:, None]
        gram = tokens.entries(rows[:, None], dispatch.chosen[rows], rank[:, None])
        beside = (dispatch.u[rows] * gram) @ self._apart
        return (
            self.p[rows] + u * c,
            self.q[rows] + 2 * u * beside + u.square() * own,
            self.u[rows] + u,
        )


# ---- any rule -----------------------------------------------------------------------------------


class ReroutedLosses(Losses):
    """Losses under any rule: tokens are sent anew.

    What a token prefers depends on who stays where experts lie in groups, which open by the scores
    of those that stay, and where a bias is added to a softmax.  Of an exchange, only the tokens are
    sent anew that it can touch.
    """

    def __init__(self, problem: ExpertProblem) -> None:
        super().__init__(problem, 1 << 15)
        self._reorders = self.rule.reorders(problem.choice_bias)

    def values(self, chunk: Chunk, kept: Tensor) -> Tensor:
        """Send all tokens."""
        rows = torch.arange(len(chunk), device=kept.device)
        return _value(*self._sums(chunk, kept, rows), self.rule.scale)

    def removals(self, kept: Tensor) -> Tensor:
        """Send anew the tokens that each expert has."""
        pairs = [(r, None) for r in torch.nonzero(kept).flatten().tolist()]
        return self._table(kept, pairs)[:, 0]

    def exchanges(self, kept: Tensor) -> Tensor:
        """Send anew the tokens that each exchange within a group can touch."""
        leaving, entering = (torch.nonzero(some).flatten().tolist() for some in (kept, ~kept))
        size = self.problem.size
        return self._table(
            kept, [(r, a) for r in leaving for a in entering if r // size == a // size]
        )

    def _table(self, kept: Tensor, pairs: Sequence[tuple[int, int | None]]) -> Tensor:
        sums = dict.fromkeys(pairs, self.problem.scale)
        for chunk in self.chunks:
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
                by_kept = self.rule.denominator is Denominator.KEPT
                other_z = z[still] + shift[still] if by_kept else z[still]
                left = _value(p[still], q[still], other_z, self.rule.scale)
                anew = self._sums(chunk, then, torch.nonzero(reached).flatten())
                sums[r, a] += float(left.sum() + _value(*anew, self.rule.scale).sum())
        shape = (len(kept), len(kept))
        table = torch.full(shape, torch.inf, dtype=torch.float64, device=kept.device)
        for (r, a), loss in sums.items():
            table[r, a or 0] = loss
        return table

    def _choice(self, chunk: Chunk, kept: Tensor, rows: Tensor) -> Tensor:
        """Return what the choice goes by, (rows, candidates); minus infinity where none stays."""
        problem, order = self.problem, chunk.order[rows]
        if self.rule.scores is RouterScores.SOFTMAX_OF_CHOSEN:
            choice = chunk.tokens.logits[rows].gather(1, order)
        else:
            choice = chunk.gates[rows]
        if self._reorders:
            choice = choice / (chunk.all_gates[rows] * kept).sum(1, keepdim=True)
        if problem.choice_bias is not None:
            choice = choice + problem.choice_bias[order]
        return choice.masked_fill(~kept[order], -torch.inf)

    def _chosen(self, choice: Tensor) -> Tensor:
        order = self.rule.open_choice(choice).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.rule.top_k]

    def _sums(self, chunk: Chunk, kept: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, q and z of some tokens (the text above)."""
        chosen = self._chosen(self._choice(chunk, kept, rows))
        u = chunk.gates[rows].gather(1, chosen)
        gram = chunk.tokens.entries(rows[:, None, None], chosen[:, :, None], chosen[:, None, :])
        p = (u * chunk.tokens.cross[rows].gather(1, chosen)).sum(1)
        q = (u[:, :, None] * gram * u[:, None, :]).sum((1, 2))
        if self.rule.denominator is Denominator.ONE:
            return p, q, torch.ones_like(p)
        over = u if self.rule.denominator is Denominator.CHOSEN else chunk.all_gates[rows] * kept
        return p, q, over.sum(1)

    def _touched(self, chunk: Chunk, kept: Tensor) -> Tensor:
        """Return which tokens may be sent elsewhere if an expert leaves or enters, (t, experts)."""
        if self._reorders:
            return torch.ones_like(chunk.all_gates, dtype=torch.bool)
        everything = torch.arange(len(chunk), device=kept.device)
        choice = self._choice(chunk, kept, everything)
        chosen = self._chosen(choice)
        last = choice.gather(1, chosen).amin(1, keepdim=True)
        reached = self._choice(chunk, torch.ones_like(kept), everything) >= last
        stays = kept[chunk.order].view(len(chunk), self.rule.groups, -1)
        before = stays.cumsum(2) - stays.long()
        reached |= (before < self.rule.group_score.members).flatten(1)
        return torch.zeros_like(chunk.all_gates, dtype=torch.bool).scatter(1, chunk.order, reached)
