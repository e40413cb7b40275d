"""Which experts of a mixture stay, as a problem whose loss is exact for every choice.

A mixture sends token t to experts j with weights ``w_tj(S)``, which depend on the set S of experts
that stay (`solvers.experts.routing`).  With their outputs ``o_tj`` and a target ``Y_t``,

    E(S) = sum_t |Y_t - sum_j w_tj(S) o_tj|^2
         = sum_t |Y_t|^2 - 2 w_t(S)'c_t + w_t(S)'G_t w_t(S),   c_tj = o_tj'Y_t,  G_tij = o_ti'o_tj

is to be minimized over the sets of `keep` experts among which the router can choose.  That is no
quadratic function of S, but it needs few numbers: an expert that leaves hands its tokens to the
next in line, so that of E experts the first ``E - keep + top_k`` in a token's order can be reached.
Only these have a row in its Gram matrix; the outputs themselves are not held.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from solvers.errors import ProblemError
from solvers.experts.routing import RouterScores, RoutingRule
from solvers.linalg.gram import check_entries

_SMALLEST = 1e-130
"""Raw weights below this have squares that vanish."""


def expert_candidates(
    rule: RoutingRule, logits: Tensor, keep: int, choice_bias: Tensor | None = None
) -> Tensor:
    """Return the experts to which each token can be sent when any `keep` of them stay.

    Parameters
    ----------
    rule, logits, choice_bias
        As of `RoutingRule.route`; logits are (tokens, experts).
    keep
        How many experts stay.

    Returns
    -------
    Tensor
        (tokens, candidates) int64, the best first; where experts lie in groups, the candidates of
        one group after those of the other, as many of each.
    """
    count = candidate_count(rule, logits.shape[1], keep, choice_bias)
    return _in_order(rule, logits.double(), choice_bias, count)


def candidate_count(
    rule: RoutingRule, experts: int, keep: int, choice_bias: Tensor | None = None
) -> int:
    """Return to how many experts each token can be sent when any `keep` of them stay."""
    if rule.reorders(choice_bias):
        return experts
    size, stay = experts // rule.groups, keep // rule.groups
    needed = rule.top_k if rule.groups == 1 else max(rule.top_k, rule.group_score.members)
    return rule.groups * min(size, size - stay + needed)


def _in_order(rule: RoutingRule, logits: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Return the first experts of each group in each token's order, (tokens, count) int64."""
    if rule.reorders(bias):
        return torch.arange(count, device=logits.device).expand(len(logits), -1)
    raw = logits.sigmoid() if rule.scores is RouterScores.SIGMOID else logits
    choice = raw if bias is None else raw + bias
    size = logits.shape[1] // rule.groups
    grouped = choice.view(len(logits), rule.groups, size)
    order = grouped.argsort(dim=2, descending=True, stable=True)[:, :, : count // rule.groups]
    first = torch.arange(0, logits.shape[1], size, device=logits.device)
    return (order + first[:, None]).flatten(1)


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """What some tokens say of the experts to which they can be sent; nothing is copied.

    Parameters
    ----------
    logits
        Of the router, (tokens, experts) float64.
    gram
        Inner products of the candidates' outputs (`expert_candidates`), the lower triangle row by
        row, (tokens, r (r + 1) / 2) float64.
    cross
        Inner products of the candidates' outputs with the target, (tokens, r) float64.
    energy
        Squared norm of the target, (tokens,) float64.

    Raises
    ------
    ProblemError
        If an entry is not finite.
    """

    logits: Tensor
    gram: Tensor
    cross: Tensor
    energy: Tensor

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            check_entries(name, tensor)

    @classmethod
    def from_outputs(cls, logits: Tensor, outputs: Tensor, target: Tensor) -> RoutedTokens:
        """Take the inner products of some tokens' outputs, in float64.

        Parameters
        ----------
        logits
            Of the router, (tokens, experts).
        outputs
            Of the experts in the order of `expert_candidates`, unweighted, (tokens, candidates,
            dim).
        target
            What the mixture is to give, (tokens, dim).
        """
        o, y = outputs.double(), target.double()
        lower = torch.ones(2 * o.shape[1:2], dtype=torch.bool, device=o.device).tril()
        gram = torch.empty(len(o), int(lower.sum()), dtype=torch.float64, device=o.device)
        for some, packed in zip(torch.split(o, 64), torch.split(gram, 64), strict=True):
            packed.copy_((some @ some.mT)[:, lower])
        cross = (o @ y[:, :, None]).squeeze(2)
        return cls(logits.double(), gram, cross, y.square().sum(1))

    @classmethod
    def joined(cls, blocks: Sequence[RoutedTokens]) -> RoutedTokens:
        """Return the tokens of several blocks as one; copied."""
        return cls(*map(torch.cat, zip(*(vars(block).values() for block in blocks), strict=True)))

    def entries(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Return entries of the Gram matrices of tokens, of indices that broadcast."""
        high, low = torch.maximum(i, j), torch.minimum(i, j)
        place = rows * self.gram.shape[1] + (high * (high + 1) >> 1) + low
        return self.gram.reshape(-1)[place]

    def part(self, start: int, end: int) -> RoutedTokens:
        """Return some of the tokens, as views."""
        made = object.__new__(RoutedTokens)
        vars(made).update({name: tensor[start:end] for name, tensor in vars(self).items()})
        return made


@dataclass(frozen=True, eq=False)
class ExpertProblem:
    """Choose which `keep` of the experts of a mixture stay, so that its output changes least.

    Parameters
    ----------
    rule
        How the router sends tokens.
    tokens
        What it is called with, in as many blocks as one likes.
    keep
        How many experts stay.
    choice_bias
        Added to the scores for the choice alone, (experts,) float64.
    name
        What the problem is called in reports.

    Raises
    ------
    ProblemError
        If blocks hold fewer candidates than can be reached, or have logits so far apart that their
        softmax vanishes, or if no `keep` experts are a choice for the router.
    """

    rule: RoutingRule
    tokens: tuple[RoutedTokens, ...]
    keep: int
    choice_bias: Tensor | None = None
    name: str = ""

    def __post_init__(self) -> None:
        keep, blocks = operator.index(self.keep), tuple(self.tokens)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "tokens", blocks)
        if not 0 < keep <= self.experts or keep % self.rule.groups:
            raise ProblemError(
                f"keep is {self.keep}; it must be in 1 .. {self.experts}, and a multiple of "
                f"{self.rule.groups}, the number of groups"
            )
        if self.choice_bias is not None:
            check_entries("choice_bias", self.choice_bias)
        stay = keep // self.rule.groups
        self.rule.check_kept([e for e in range(self.experts) if e % self.size < stay], self.experts)
        needed = candidate_count(self.rule, self.experts, keep, self.choice_bias)
        found = self.candidates
        if found < needed or found % self.rule.groups:
            raise ProblemError(f"{found} candidates for each token; {needed} can be reached")
        if not min(float(gate_values(self.rule, b.logits).min()) for b in blocks) >= _SMALLEST:
            raise ProblemError("router logits are so far apart that weights vanish; check them")

    @staticmethod
    def memory(
        rule: RoutingRule, experts: int, keep: int, tokens: int, choice_bias: Tensor | None = None
    ) -> int:
        """Return the bytes that a problem takes, with what its searches keep beside it."""
        count = candidate_count(rule, experts, keep, choice_bias)
        return 8 * tokens * (count * (count + 1) // 2 + 4 * count + 2 * experts + 1)

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.tokens[0].logits.shape[1]

    @property
    def units(self) -> int:
        """The number of experts, by the name that all problems have for what may leave."""
        return self.experts

    @property
    def size(self) -> int:
        """The number of experts in a group."""
        return self.experts // self.rule.groups

    @property
    def candidates(self) -> int:
        """The number of experts that each token can reach, as held."""
        return self.tokens[0].cross.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens[0].logits.device

    @cached_property
    def scale(self) -> float:
        """What losses are relative to: the squared norm of the target."""
        return sum(float(block.energy.sum()) for block in self.tokens)

    @cached_property
    def load(self) -> Tensor:
        """The load of each expert, (experts,) int64: tokens that are sent to it while all stay."""
        counts = torch.zeros(self.experts, dtype=torch.int64, device=self.device)
        for block in self.tokens:
            chosen, _ = self.rule.route(block.logits, None, self.choice_bias)
            counts += torch.bincount(chosen.flatten(), minlength=self.experts)
        return counts

    def highest(self, scores: Tensor) -> Tensor:
        """Return the `keep` experts with the highest scores, as many in each group; (experts,)."""
        order = scores.view(self.rule.groups, -1).argsort(dim=1, descending=True, stable=True)
        first = torch.arange(0, self.experts, self.size, device=self.device)
        return (order + first[:, None])[:, : self.keep // self.rule.groups].flatten()

    def loss(self, support: Sequence[int] | Tensor) -> float:
        """Return E(S), by the router's own rule (ProblemError if it cannot choose among these)."""
        kept = [int(expert) for expert in support]
        total = 0.0
        for block in self.tokens:
            chosen, _, weights = self.routed(block, kept)
            rows = torch.arange(len(chosen), device=chosen.device)[:, None, None]
            gram = block.entries(rows, chosen[:, :, None], chosen[:, None, :])
            explained = (weights * block.cross.gather(1, chosen)).sum(1)
            lost = torch.einsum("ti,tij,tj->t", weights, gram, weights) - 2 * explained
            total += float((block.energy + lost).sum())
        return max(total, 0.0)  # where nothing is lost, rounding can be negative

    def routed(
        self, block: RoutedTokens, kept: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send the tokens of a block, by the router's own rule.

        Returns which of a token's candidates are chosen, (tokens, top_k) int64, and experts and
        weights as of `RoutingRule.route`.
        """
        experts, weights = self.rule.route(block.logits, kept, self.choice_bias)
        order = self.order(block)
        ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
        place = torch.zeros_like(block.logits, dtype=torch.int64).scatter_(1, order, ranks)
        return place.gather(1, experts), experts, weights

    def order(self, block: RoutedTokens) -> Tensor:
        """Return the candidates of the tokens of a block, (tokens, candidates) int64."""
        return _in_order(self.rule, block.logits, self.choice_bias, self.candidates)

    def with_keep(self, keep: int) -> ExpertProblem:
        """Return the same problem with another number of experts to keep, if it holds enough."""
        return replace(self, keep=keep)


def gate_values(rule: RoutingRule, logits: Tensor) -> Tensor:
    """Return gate values, (tokens, experts): what weights are proportional to."""
    if rule.scores is RouterScores.SIGMOID:
        return logits.sigmoid()
    return (logits - logits.amax(1, keepdim=True)).exp()
