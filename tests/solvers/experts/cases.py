"""Rules, the definition of routing in plain Python, and small mixtures whose outputs are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from solvers import (
    ExpertProblem,
    GroupScore,
    RoutedTokens,
    RouterScores,
    RoutingRule,
    expert_candidates,
)

EXPERTS = 12
RULES = {
    "softmax": RoutingRule(3, RouterScores.SOFTMAX),
    "normalized": RoutingRule(3, RouterScores.SOFTMAX, normalized=True),
    "of chosen": RoutingRule(3, RouterScores.SOFTMAX_OF_CHOSEN),
    "sigmoid": RoutingRule(3, RouterScores.SIGMOID),
    "normalized sigmoid": RoutingRule(3, RouterScores.SIGMOID, normalized=True, scale=2.5),
    "groups": RoutingRule(3, RouterScores.SOFTMAX, groups=3, open_groups=2),
    "groups of two": RoutingRule(
        3, RouterScores.SIGMOID, True, 2.5, 3, 2, group_score=GroupScore.TOP_TWO
    ),
}


def masked(rule, logits, kept, bias):
    """Send one token after the other by the definition: what left has minus infinity."""
    for token in logits.tolist():
        gone = [j not in kept for j in range(EXPERTS)]
        raised = [0.0 if g else math.exp(x) for g, x in zip(gone, token, strict=True)]
        score = {
            RouterScores.SOFTMAX: [x / sum(raised) for x in raised],
            RouterScores.SOFTMAX_OF_CHOSEN: token,
            RouterScores.SIGMOID: [1 / (1 + math.exp(-x)) for x in token],
        }[rule.scores]
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        choice = [-math.inf if g else s for g, s in zip(gone, biased, strict=True)]
        size = EXPERTS // rule.groups
        groups = [range(g * size, (g + 1) * size) for g in range(rule.groups)]
        best = [sorted((choice[j] for j in group), reverse=True) for group in groups]
        order = sorted(groups, key=lambda g: -sum(best[g[0] // size][: rule.group_score.members]))
        allowed = sorted(j for group in order[: rule.open_groups] for j in group)
        chosen = sorted(allowed, key=lambda j: -choice[j])[: rule.top_k]
        if rule.scores is RouterScores.SOFTMAX_OF_CHOSEN:
            total, score = sum(raised[j] for j in chosen), raised
        else:
            total = sum(score[j] for j in chosen) if rule.normalized else 1.0
        yield chosen, [rule.scale * score[j] / total for j in chosen]


@dataclass(frozen=True, eq=False)
class Mixture:
    """What a mixture computes for some tokens."""

    rule: RoutingRule
    keep: int
    logits: torch.Tensor
    outputs: torch.Tensor
    """Of all experts, (tokens, experts, dim)."""
    target: torch.Tensor
    bias: torch.Tensor | None

    def loss(self, kept) -> float:
        """The loss of a set from the definition."""
        bias = torch.zeros(EXPERTS) if self.bias is None else self.bias
        total = 0.0
        sent = masked(self.rule, self.logits, set(kept), bias)
        for t, (experts, weights) in enumerate(sent):
            y = sum(w * self.outputs[t, j] for j, w in zip(experts, weights, strict=True))
            total += float((self.target[t] - y).square().sum())
        return total

    @cached_property
    def problem(self) -> ExpertProblem:
        """The problem, in two blocks of unequal sizes."""
        return problem_of(self, 17)


def problem_of(mixture: Mixture, block: int = 100) -> ExpertProblem:
    """Pose the problem of a mixture, with its tokens in blocks."""
    blocks = []
    for start in range(0, len(mixture.logits), block):
        some = slice(start, start + block)
        logits, outputs = mixture.logits[some], mixture.outputs[some]
        reached = expert_candidates(mixture.rule, logits, mixture.keep, mixture.bias)
        picked = outputs.gather(1, reached[:, :, None].expand(-1, -1, outputs.shape[2]))
        blocks.append(RoutedTokens.from_outputs(logits, picked, mixture.target[some]))
    return ExpertProblem(mixture.rule, tuple(blocks), mixture.keep, mixture.bias)


def mixture_of(rule, *, biased=False, keep=None, tokens=30, seed=0) -> Mixture:
    """Return a random mixture whose target is nearly what it gives with all experts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits, outputs = 2 * draw(tokens, EXPERTS), draw(tokens, EXPERTS, 4)
    bias = 0.3 * draw(EXPERTS) if biased else None
    experts, weights = rule.route(logits, None, bias)
    rows = torch.arange(tokens)[:, None]
    target = (weights[:, :, None] * outputs[rows, experts]).sum(1) + 0.05 * draw(tokens, 4)
    keep = (9 if rule.groups > 1 else 7) if keep is None else keep
    return Mixture(rule, keep, logits, outputs, target, bias)


CASES = {
    f"{name}{' with bias' * biased}": mixture_of(rule, biased=biased)
    for name, rule in RULES.items()
    for biased in (False, True)
}
