"""The tree of an exact search proves its bound, and nothing that is put into one proves more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Status, SubsetProblem, VerificationError, solve
from solvers.certificates.inverses import Inverses
from solvers.certificates.tree_certificate import KEPT, REMOVED
from solvers.exact import frontier
from tests.solvers.test_perspective import random_problem

SLACK = 1e-12


@pytest.fixture(scope="module")
def solved():
    return solve(random_problem(5, 14, 1, 10, 7, spread=0.5), "branch_and_bound")


@pytest.fixture(scope="module")
def optimum(solved):
    return solve(solved.problem, "enumerate").loss


def planted(solved, **changes):
    return replace(solved, certificate=replace(solved.certificate, **changes))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 11),
    width=st.integers(1, 3),
    responses=st.sampled_from([1, 4, 40]),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.5, 3.0]),
    consumers=st.integers(1, 2),
    node_limit=st.sampled_from([1, 2, 5, 1000]),
)
@settings(max_examples=10, deadline=None)
def test_proves_what_the_search_claims_and_no_more_than_the_optimum(
    seed, n, width, responses, share, spread, consumers, node_limit
):
    problem = random_problem(
        seed, n, width, responses, 1 + round(share * (n - 1)), spread=spread, consumers=consumers
    )
    solution = solve(problem, "branch_and_bound", node_limit=node_limit)
    proved = solution.verify().lower_bound
    assert proved >= solution.lower_bound - 1e-9 * problem.scale
    assert proved <= solve(problem, "enumerate").loss + SLACK * problem.scale


@given(seed=st.integers(0, 2**31), field=st.sampled_from(["sides", "share", "point", "growth"]))
@settings(max_examples=25, deadline=None)
def test_whatever_a_tree_says_it_proves_nothing_false(solved, optimum, seed, field):
    generator = torch.Generator().manual_seed(seed)
    values = getattr(solved.certificate, field).clone()
    for place in torch.randint(len(values), (3,), generator=generator).tolist():
        if field == "sides":
            unit = int(torch.randint(values.shape[1], (1,), generator=generator))
            values[place, unit] = int(torch.randint(0, 3, (1,), generator=generator))
        else:
            values[place] *= float(4 * torch.rand(1, generator=generator))
    try:
        proved = replace(solved.certificate, **{field: values}).bound(solved.problem)
    except VerificationError:
        return
    assert proved <= optimum + SLACK * solved.problem.scale


@given(seed=st.integers(0, 2**31), some=st.integers(1, 30))
@settings(max_examples=8, deadline=None)
def test_a_tree_without_some_of_its_nodes_proves_nothing_false(solved, optimum, seed, some):
    """A subtree is cut off: what it closed is open again."""
    certificate = solved.certificate
    generator = torch.Generator().manual_seed(seed)
    stays = torch.ones(len(certificate.parent), dtype=torch.bool)
    stays[1 + torch.randint(len(stays) - 1, (some,), generator=generator)] = False
    for place, parent in enumerate(certificate.parent.tolist()):
        if place:
            stays[place] &= stays[parent]
    number = stays.cumsum(0) - 1
    rows = ("sides", "share", "point", "growth")
    parent = certificate.parent[stays]
    parent[1:] = number[parent[1:]]
    part = {name: getattr(certificate, name)[stays] for name in rows}
    proved = replace(certificate, parent=parent, **part).bound(solved.problem)
    assert proved <= optimum + SLACK * solved.problem.scale
    assert proved <= certificate.bound(solved.problem) + SLACK * solved.problem.scale


def test_a_node_proves_no_less_of_either_side_of_a_unit_than_of_all_supports(solved):
    inverses = Inverses.of(solved.problem)
    bounds = solved.certificate.root.linearization(inverses, solved.problem.keep)
    for side in (bounds.goes, bounds.stays):
        assert bool((side >= bounds.value).all())
        assert bool((side > bounds.value).any())


def test_what_a_parent_proves_of_a_unit_is_no_bound_where_that_is_free():
    """Two enumerated children leave a unit free whose stay alone would cost more than all."""
    generator = torch.Generator().manual_seed(0)
    X, W0 = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((60, 9), (9, 4))
    )
    W0[4] *= 0.1  # whose unit goes
    problem = SubsetProblem.from_gram(X.T @ X / 60, W0, keep=8)
    solution = solve(problem, "branch_and_bound")
    root = solution.certificate.root
    stays = root.linearization(Inverses.of(problem), problem.keep).stays[0]
    assert stays[4] == stays.max() > 1.5 * solution.loss
    sides = torch.zeros(3, 9, dtype=torch.int8)
    sides[1:, 5] = torch.tensor([REMOVED, KEPT], dtype=torch.int8)
    tree = replace(
        solution.certificate,
        sides=sides,
        parent=torch.tensor([-1, 0, 0]),
        growth=torch.tensor([1.0, 0.0, 0.0]),
        share=torch.full((3, 9), 0.5),
        point=torch.full((3, 9), 0.5),
    )
    assert tree.bound(problem) == pytest.approx(solution.loss)


def test_the_rounding_of_every_consumer_counts(solved):
    few = random_problem(1, 14, 1, 2, 7, spread=3.0)  # nearly singular
    both = replace(solved.problem, consumers=(*solved.problem.consumers, *few.consumers))
    one, other, found = (Inverses.of(x).rounding for x in (solved.problem, few, both))
    assert other.inverse > one.inverse
    assert found == one + other


def test_a_claim_beyond_the_tree_is_refused(solved):
    assert solved.status is Status.OPTIMAL
    few = solve(solved.problem, "branch_and_bound", node_limit=3)
    with pytest.raises(VerificationError, match=r"is claimed, its certificate proves"):
        replace(solved, certificate=few.certificate).verify()


def test_half_of_a_division_is_refused(solved):
    """Two children on the same side of the unit that should divide them."""
    certificate = solved.certificate
    one, other = next(
        pair
        for parent in range(len(certificate.parent))
        if len(pair := torch.nonzero(certificate.parent == parent).flatten().tolist()) == 2
        and not torch.isin(torch.tensor(pair), certificate.parent).any()
    )
    sides = certificate.sides.clone()
    sides[other] = sides[one]
    with pytest.raises(VerificationError, match="do not divide it"):
        planted(solved, sides=sides).verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda c: {"growth": c.growth[:-1]}, "growth must be"),
        (lambda c: {"growth": c.growth * math.nan}, "growth must be .* finite"),
        (lambda c: {"growth": c.growth * -1}, "no negative growth"),
        (lambda c: {"growth": c.growth * 0.5}, "does not dominate"),
        (lambda c: {"shape": -c.shape}, "positive shape"),
        (lambda c: {"parent": c.parent.flip(0)}, "must follow their parents"),
        (lambda c: {"parent": torch.cat([c.parent[:1], 0 * c.parent[1:]])}, "more than two"),
        (lambda c: {"sides": torch.full_like(c.sides, REMOVED)}, "must follow their parents"),
        (lambda c: {"sides": torch.cat([c.sides[:1], 0 * c.sides[1:] + KEPT])}, "too many units"),
        (lambda c: {"root": None, "growth": 0 * c.growth}, "is to be enumerated, 7 of 14"),
    ],
)
def test_what_is_no_tree_is_refused(solved, changes, message):
    with pytest.raises(VerificationError, match=message):
        planted(solved, **changes(solved.certificate)).verify()


def test_a_tree_that_grows_too_large_is_left_away(solved, monkeypatch):
    monkeypatch.setattr(frontier, "MOST_ENTRIES", 100)
    solution = solve(solved.problem, "branch_and_bound")
    assert solution.certificate is None
    assert solution.lower_bound == pytest.approx(solved.lower_bound)
    assert math.isnan(solution.verify().lower_bound)
