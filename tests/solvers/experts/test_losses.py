"""Routing and losses of sets of experts are those of the definition, by brute force."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from solvers import ExpertProblem, ProblemError, RouterScores, RoutingRule
from solvers.experts import losses as expert_losses
from solvers.experts.losses import ReroutedLosses, losses_of
from tests.solvers.experts.cases import CASES, EXPERTS, RULES, masked, mixture_of, problem_of

cases = pytest.mark.parametrize("mixture", CASES.values(), ids=CASES.keys())


# ---- routing among those that stay ---------------------------------------------------------------


@cases
@pytest.mark.parametrize("kept", [range(EXPERTS), (0, 2, 3, 5, 6, 7, 9, 10, 11)[::-1]])
def test_routing_is_that_of_masked_logits(mixture, kept):
    rule, logits, bias = mixture.rule, mixture.logits, mixture.bias
    experts, weights = rule.route(logits, kept, bias)
    none = torch.zeros(EXPERTS) if bias is None else bias
    expected = list(masked(rule, logits, set(kept), none))
    assert experts.tolist() == [chosen for chosen, _ in expected]
    assert torch.allclose(weights, torch.tensor([w for _, w in expected], dtype=torch.float64))
    # A router that has only the rows of those that stay does the same.
    staying = torch.tensor(sorted(kept))
    own = None if bias is None else bias[staying]
    local, same = rule.route(logits[:, staying], None, own)
    assert torch.equal(staying[local], experts)
    assert torch.equal(same, weights)


# ---- losses --------------------------------------------------------------------------------------


def mask(kept):
    """Return a set of experts as the searches have it."""
    return torch.tensor([j in kept for j in range(EXPERTS)])


def some_set(mixture):
    """Return experts that stay, as many in each group."""
    return [0, 1, 3, 4, 6, 7, 8, 10, 11] if mixture.rule.groups > 1 else [0, 2, 3, 5, 7, 8, 11]


@cases
def test_losses_are_those_of_the_definition(mixture):
    problem, kept = mixture.problem, some_set(mixture)
    loss = pytest.approx(mixture.loss(kept), rel=1e-10)
    assert problem.loss(kept[::-1]) == loss
    every = {losses_of(problem), ReroutedLosses(problem)}
    tables = [losses.exchanges(mask(kept)) for losses in every]
    assert all(losses.loss(mask(kept)) == loss for losses in every)
    # One of those that stay with every other, and every one with one: brute force takes long.
    pairs = [(kept[1], a) for a in range(EXPERTS)] + [(r, 9) for r in range(EXPERTS)]
    for r, a in pairs:
        allowed = r in kept and a not in kept and r // problem.size == a // problem.size
        expected = mixture.loss({*kept, a} - {r}) if allowed else math.inf
        for table in tables:
            assert float(table[r, a]) == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(*tables, rtol=1e-10)
    # Removals also while groups are of unequal sizes, as a greedy search has them on its way.
    kept = list(range(1, EXPERTS))
    for losses in every:
        after = losses.removals(mask(kept))
        assert float(after[0]) == math.inf
        for r in (1, 5, 11):
            assert float(after[r]) == pytest.approx(mixture.loss(set(kept) - {r}), rel=1e-10)


@pytest.mark.parametrize("name", ["softmax", "normalized", "groups"])
def test_an_expert_with_nearly_all_of_the_weight_can_leave(name):
    """Sums without it are not what is left of sums with it."""
    mixture = mixture_of(RULES[name])
    mixture.logits[:, 4] += 60
    mixture = dataclasses.replace(mixture, target=torch.zeros_like(mixture.target) + 1.0)
    losses, kept = losses_of(problem_of(mixture)), set(some_set(mixture)) | {4}
    entering = next(a for a in (5, 6, 7) if a not in kept)
    expected = mixture.loss(kept - {4} | {entering})
    found = losses.exchanges(mask(kept))[4, entering]
    assert float(found) == pytest.approx(expected, rel=1e-12)
    all_but_one = mixture.loss(set(range(EXPERTS)) - {4})
    after = losses.removals(torch.ones(EXPERTS, dtype=torch.bool))
    assert float(after[4]) == pytest.approx(all_but_one, rel=1e-12)


@pytest.mark.parametrize("name", ["softmax", "normalized"])
@pytest.mark.parametrize("keep", [3, EXPERTS])
def test_as_few_may_stay_as_a_token_is_sent_to(name, keep, monkeypatch):
    monkeypatch.setattr(expert_losses, "_TOKENS", 7)
    monkeypatch.setattr(expert_losses, "_ELEMENTS", 100)
    mixture = mixture_of(RULES[name], keep=keep)
    kept = range(keep)
    assert mixture.problem.loss(kept) == pytest.approx(mixture.loss(kept), rel=1e-10)
    table = losses_of(mixture.problem).exchanges(mask(kept))
    if keep < EXPERTS:
        assert float(table[0, 9]) == pytest.approx(mixture.loss([1, 2, 9]), rel=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_equal_scores_are_sent_as_the_router_sends_them(name):
    """Logits in half precision are often equal."""
    mixture = mixture_of(RULES[name], tokens=60)
    mixture = dataclasses.replace(mixture, logits=mixture.logits.round())
    problem, kept = problem_of(mixture), some_set(mixture)
    exchanged = mixture.loss({*kept, 9} - {11})
    for losses in (losses_of(problem), ReroutedLosses(problem)):
        assert losses.loss(mask(kept)) == pytest.approx(mixture.loss(kept), rel=1e-10)
        table = losses.exchanges(mask(kept))
        assert float(table[11, 9]) == pytest.approx(exchanged, rel=1e-10)


def test_a_problem_does_not_depend_on_its_blocks():
    mixture = CASES["normalized"]
    whole, single = problem_of(mixture, 1000), problem_of(mixture, 1)
    assert len(whole.tokens) == 1
    assert whole.loss(range(7)) == pytest.approx(single.loss(range(7)), rel=1e-14)
    assert whole.scale == pytest.approx(float(mixture.target.square().sum()))
    assert whole.with_keep(9).loss(range(9)) == pytest.approx(mixture.loss(range(9)))
    held = sum(tensor.nbytes for tensor in vars(whole.tokens[0]).values())
    assert held < ExpertProblem.memory(whole.rule, EXPERTS, 7, 30) < 2.5 * held


def test_problems_and_rules_that_are_none_are_refused():
    mixture = CASES["normalized"]
    problem, two = mixture.problem, RULES["groups of two"]
    # As many have to stay of a group as it is scored by.
    assert dataclasses.replace(two, top_k=1, open_groups=1).fewest == 6
    block = problem.tokens[0]
    far = dataclasses.replace(mixture, logits=500 * mixture.logits)

    def route(rule, kept):
        return lambda: RULES[rule].route(torch.zeros(1, EXPERTS), kept)

    for make, message in [
        (route("softmax", (0, 1)), "needs 3 at least"),
        (route("groups", (0, 1, 4, 5, 8)), "as many in each group"),
        (
            lambda: dataclasses.replace(block, cross=block.cross * math.nan),
            "cross has entries of nan",
        ),
        (lambda: dataclasses.replace(problem, keep=2), "needs 3"),
        (lambda: dataclasses.replace(problem, keep=4), "11 can be reached"),
        (lambda: problem_of(far), "far apart"),
        (lambda: RoutingRule(1, RouterScores.SOFTMAX, scale=math.nan), "scale must be positive"),
    ]:
        with pytest.raises(ProblemError, match=message):
            make()
