"""Every loss that a search asks for is that of the definition, by brute force."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from solvers import ExpertProblem, ProblemError, RouterScores, RoutingRule
from solvers.experts import losses as expert_losses
from solvers.experts.losses import ReroutedLosses, losses_of
from tests.solvers.experts.cases import CASES, EXPERTS, RULES, mixture_of, problem_of

cases = pytest.mark.parametrize("mixture", CASES.values(), ids=CASES.keys())


def mask(kept):
    """Return a set of experts as the searches have it."""
    return torch.tensor([j in kept for j in range(EXPERTS)])


def some_set(mixture):
    """Return experts that stay, as many in each group."""
    return [0, 1, 3, 4, 6, 7, 8, 10, 11] if mixture.rule.groups > 1 else [0, 2, 3, 5, 7, 8, 11]


@cases
def test_losses_of_sets_and_exchanges_are_those_of_the_definition(mixture):
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


@cases
def test_losses_of_removals_are_those_of_the_definition(mixture):
    """Also while groups are of unequal sizes, as a greedy search has them on its way."""
    problem, kept = mixture.problem, list(range(1, EXPERTS))
    for losses in {losses_of(problem), ReroutedLosses(problem)}:
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
    problem, kept = problem_of(mixture), set(some_set(mixture)) | {4}
    table = losses_of(problem).exchanges(mask(kept))
    entering = next(a for a in (5, 6, 7) if a not in kept)
    expected = mixture.loss(kept - {4} | {entering})
    assert float(table[4, entering]) == pytest.approx(expected, rel=1e-12)
    all_but_one = mixture.loss(set(range(EXPERTS)) - {4})
    after = losses_of(problem).removals(torch.ones(EXPERTS, dtype=torch.bool))
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
    for losses in (losses_of(problem), ReroutedLosses(problem)):
        assert losses.loss(mask(kept)) == pytest.approx(mixture.loss(kept), rel=1e-10)
        exchanged = {*kept, 9} - {11}
        assert float(losses.exchanges(mask(kept))[11, 9]) == pytest.approx(
            mixture.loss(exchanged), rel=1e-10
        )


def test_a_problem_does_not_depend_on_its_blocks():
    mixture = CASES["normalized"]
    whole, single = problem_of(mixture, 1000), problem_of(mixture, 1)
    assert len(whole.tokens) == 1
    assert whole.loss(range(7)) == pytest.approx(single.loss(range(7)), rel=1e-14)
    assert whole.scale == pytest.approx(float(mixture.target.square().sum()))
    more = whole.with_keep(9)
    assert more.loss(range(9)) == pytest.approx(mixture.loss(range(9)))


def test_memory_is_that_of_the_tensors():
    problem = CASES["normalized"].problem
    held = sum(
        tensor.numel() * tensor.element_size()
        for block in problem.tokens
        for tensor in (block.logits, block.gram, block.cross, block.energy)
    )
    told = ExpertProblem.memory(problem.rule, EXPERTS, 7, 30)
    assert held < told < 2.5 * held


def test_tokens_that_are_none_are_refused():
    block = CASES["normalized"].problem.tokens[0]
    for name in ("logits", "gram", "cross", "energy"):
        broken = getattr(block, name).clone()
        broken[-1] = math.nan
        with pytest.raises(ProblemError, match=f"{name} has NaN"):
            dataclasses.replace(block, **{name: broken})


def test_problems_that_are_none_are_refused():
    mixture = CASES["normalized"]
    problem = mixture.problem
    for changes, message in [
        ({"keep": 0}, "in 1 .. 12"),
        ({"keep": 2}, "needs 3"),
        ({"keep": 4}, "11 can be reached"),
        ({"choice_bias": torch.full((EXPERTS,), math.inf).double()}, "choice_bias has NaN or inf"),
    ]:
        with pytest.raises(ProblemError, match=message):
            dataclasses.replace(problem, **changes)
    with pytest.raises(ProblemError, match="multiple of 3"):
        CASES["groups"].problem.with_keep(10)
    with pytest.raises(ProblemError, match="7 or more"):
        problem.loss(range(6))
    far = dataclasses.replace(mixture, logits=500 * mixture.logits)
    with pytest.raises(ProblemError, match="far apart"):
        problem_of(far)
    with pytest.raises(ProblemError, match="scale must be positive"):
        RoutingRule(1, RouterScores.SOFTMAX, scale=math.nan)
