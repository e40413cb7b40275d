"""Routing among those that stay is what a smaller router does, and what masked logits give."""

from __future__ import annotations

import pytest
import torch

from solvers import ProblemError, RouterScores, RoutingRule
from tests.solvers.experts.cases import EXPERTS, RULES, masked

BIASED = [(rule, biased) for rule in RULES.values() for biased in (False, True)]
IDS = [f"{name}{' with bias' * biased}" for name in RULES for biased in (False, True)]


@pytest.mark.parametrize(("rule", "biased"), BIASED, ids=IDS)
@pytest.mark.parametrize("kept", [range(EXPERTS), (0, 2, 3, 5, 6, 7, 9, 10, 11)[::-1]])
def test_routing_is_that_of_masked_logits(rule, biased, kept):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50, EXPERTS, generator=generator, dtype=torch.float64)
    bias = biased * torch.randn(EXPERTS, generator=generator, dtype=torch.float64)
    experts, weights = rule.route(logits, kept, bias if biased else None)
    expected = list(masked(rule, logits, set(kept), bias))
    assert experts.tolist() == [chosen for chosen, _ in expected]
    assert torch.allclose(weights, torch.tensor([w for _, w in expected], dtype=torch.float64))
    # A router that has only the rows of those that stay does the same.
    staying = torch.tensor(sorted(kept))
    local, same = rule.route(logits[:, staying], None, bias[staying] if biased else None)
    assert torch.equal(staying[local], experts)
    assert torch.equal(same, weights)


@pytest.mark.parametrize(
    ("rule", "kept", "message"),
    [
        ("softmax", (0, 1), "needs 3 at least"),
        ("softmax", (0, 0, 1, 2), "once at most"),
        ("softmax", (0, 1, 12), "once at most"),
        ("groups", (0, 1, 4, 5, 8), "as many must in each"),
        ("groups", (0, 4, 8), "needs 6 at least"),
        ("groups of two", (0, 4, 8), "needs 6 at least"),
    ],
)
def test_a_choice_that_a_router_cannot_make_is_refused(rule, kept, message):
    with pytest.raises(ProblemError, match=message):
        RULES[rule].route(torch.zeros(1, EXPERTS), kept)


def test_rules_that_none_follows_are_refused():
    with pytest.raises(ProblemError, match="top_k"):
        RoutingRule(0, RouterScores.SOFTMAX)
    with pytest.raises(ProblemError, match="groups of one size"):
        RoutingRule(1, RouterScores.SOFTMAX, groups=2).route(torch.zeros(1, 5))
