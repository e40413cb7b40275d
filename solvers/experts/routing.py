"""How a router sends tokens to experts, and how it does so among those that stay.

Removing experts sets their router logits to minus infinity, and where the choice is made by other
scores than the weights, these as well.  Softmax, the choice and the sum that divides the weights
then run over those that stay.  That is what a router does that has only their rows.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import ProblemError


class RouterScores(enum.StrEnum):
    """How a router turns logits into scores."""

    SOFTMAX = "softmax"
    """Softmax over all logits, of which the largest are taken (Mixtral, Qwen2/3-MoE, OLMoE)."""

    SOFTMAX_OF_CHOSEN = "softmax of chosen"
    """The largest logits, and softmax over these (GPT-OSS, Granite-MoE)."""

    SIGMOID = "sigmoid"
    """The sigmoid of each logit (DeepSeek-V3, GLM-4-MoE)."""


class GroupScore(enum.StrEnum):
    """How a router scores groups of experts; the value says it."""

    MAX = "largest score"  # DeepSeek-V2
    TOP_TWO = "sum of the two largest scores"  # DeepSeek-V3

    @property
    def members(self) -> int:
        """How many experts of a group its score is made of."""
        return 1 if self is GroupScore.MAX else 2


class Denominator(enum.Enum):
    """Over which experts gate values are summed up to what divides them."""

    CHOSEN = enum.auto()
    KEPT = enum.auto()
    ONE = enum.auto()


@dataclass(frozen=True)
class RoutingRule:
    """How tokens are sent to experts, given the router's logits.

    Parameters
    ----------
    top_k
        To how many experts a token is sent.
    scores
        What the logits are made into.
    normalized
        Whether weights are divided by their sum.
    scale
        What weights are multiplied by, last.
    groups
        In how many groups of one size the experts lie, one after the other.
    open_groups
        To how many groups a token may be sent: those with the largest `group_score`.
    group_score
        By what groups are compared.

    Raises
    ------
    ProblemError
        If a number is not positive, or more groups are open than there are.
    """

    top_k: int
    scores: RouterScores
    normalized: bool = False
    scale: float = 1.0
    groups: int = 1
    open_groups: int = 1
    group_score: GroupScore = GroupScore.MAX

    def __post_init__(self) -> None:
        if (
            self.top_k < 1
            or not 1 <= self.open_groups <= self.groups
            or not 0 < self.scale < math.inf
        ):
            raise ProblemError(
                f"{self}: top_k and scale must be positive, and open_groups in 1 .. groups"
            )

    def route(
        self, logits: Tensor, kept: Sequence[int] | None = None, choice_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Send tokens to experts, the best first; of equal ones the first is taken.

        Parameters
        ----------
        logits
            Of the router, (tokens, experts).
        kept
            The experts that stay; by default all.
        choice_bias
            (experts,); added to the scores for the choice alone.

        Returns
        -------
        experts
            (tokens, top_k) int64, counted among all experts.
        weights
            (tokens, top_k), of the type of `logits`.
        """
        staying = self.check_kept(kept, logits.shape[-1]).to(logits.device)
        among = logits[:, staying]
        scores = self._scores(among)
        choice = scores if choice_bias is None else scores + choice_bias[staying]
        chosen = self.open_choice(choice).argsort(dim=1, descending=True, stable=True)[
            :, : self.top_k
        ]
        weights = scores.gather(1, chosen)
        if self.scores is RouterScores.SOFTMAX_OF_CHOSEN:
            weights = weights.softmax(1)
        if self.normalized:
            weights = weights / weights.sum(1, keepdim=True)
        return staying[chosen], weights * self.scale

    def check_kept(self, kept: Sequence[int] | None, experts: int) -> Tensor:
        """Return the experts that stay, sorted, (kept,) int64, if the router can choose among them.

        Raises ProblemError if they are none of the experts or named twice, are fewer than `top_k`,
        or are not as many in each group as in any other, and enough there for the choice.
        """
        staying = sorted(range(experts) if kept is None else (int(one) for one in kept))
        if len(set(staying)) != len(staying) or not set(staying) <= set(range(experts)):
            raise ProblemError(f"{staying} stay; name each of 0 .. {experts - 1} once at most")
        size = -(-experts // self.groups)
        counts = [sum(one // size == group for one in staying) for group in range(self.groups)]
        if experts % self.groups or len(set(counts)) != 1 or len(staying) < self.fewest:
            raise ProblemError(
                f"{counts} of {experts} experts stay in {self.groups} groups of one size; the "
                f"router needs {self.fewest} at least, as many in each group"
            )
        return torch.tensor(staying, dtype=torch.int64)

    @property
    def fewest(self) -> int:
        """The fewest experts among which the router can choose."""
        if self.groups == 1:
            return self.top_k
        in_group = max(-(-self.top_k // self.open_groups), self.group_score.members)
        return self.groups * in_group

    @property
    def denominator(self) -> Denominator:
        """What weights are divided by, made of `solvers.experts.problem.gate_values`."""
        if self.scores is RouterScores.SOFTMAX_OF_CHOSEN or self.normalized:
            return Denominator.CHOSEN
        return Denominator.KEPT if self.scores is RouterScores.SOFTMAX else Denominator.ONE

    def reorders(self, choice_bias: Tensor | None) -> bool:
        """Whether the order in which a token prefers experts depends on those that stay.

        A softmax grows as others leave, a bias does not.
        """
        return choice_bias is not None and self.scores is RouterScores.SOFTMAX

    def _scores(self, logits: Tensor) -> Tensor:
        """Return what the choice goes by, and the weights are made of, (tokens, experts)."""
        if self.scores is RouterScores.SOFTMAX:
            return logits.softmax(1)
        return logits.sigmoid() if self.scores is RouterScores.SIGMOID else logits

    def open_choice(self, choice: Tensor) -> Tensor:
        """Return scores for the choice, group after group, with closed groups at minus infinity."""
        if self.groups == 1:
            return choice
        grouped = choice.view(len(choice), self.groups, choice.shape[1] // self.groups)
        scores = grouped.topk(self.group_score.members, dim=2).values.sum(2)
        order = scores.argsort(dim=1, descending=True, stable=True)
        closed = torch.ones_like(scores, dtype=torch.bool)
        closed.scatter_(1, order[:, : self.open_groups], False)
        return grouped.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
