"""Certificates prove no more than is true, whatever an adversary who has read the check writes.

A forgery that is accepted has to be harmless: what it claims holds in exact arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import Solution, Status, SubsetProblem, VerificationError, solve
from solvers.certificates import certificate
from solvers.certificates.certificate import EnumerationCertificate, Inverses, MultiplierCertificate
from solvers.certificates.tree_certificate import FREE, KEPT, REMOVED, TreeCertificate
from solvers.exact import branch_and_bound
from tests.solvers.instances import exact_optimum, random_problem

SLACK = 1e-12
PROBLEM = random_problem(129, 7, 1, 3, 3, spread=1.0)


@cache
def honest(backend="branch_and_bound") -> Solution:
    return solve(PROBLEM, backend)


@cache
def optimum():
    return exact_optimum(PROBLEM)


@cache
def worse() -> Solution:
    """A swap optimum, which no exchange refutes, with seven times the loss of the optimum."""
    return solve(PROBLEM, "local_search", start=(1, 2, 6))


def false(**claims) -> Solution:
    """A support that is not the best, called optimal at its own loss."""
    claims = {"status": Status.OPTIMAL, "lower_bound": worse().loss, **claims}
    return replace(worse(), **claims)


def refused(solution, message=".") -> None:
    with pytest.raises(VerificationError, match=message):
        solution.verify()


def node(*, removed=(), kept=(), units=7):
    side = torch.full((units,), FREE, dtype=torch.int8)
    side[list(removed)], side[list(kept)] = REMOVED, KEPT
    return side


def tree(parent, sides, *, root=None, **fields) -> TreeCertificate:
    """A tree whose nodes are enumerated, but for fields that say otherwise."""
    t, n = len(parent), sides[0].shape[0]
    made = {
        "root": root,
        "shape": torch.ones(n).double(),
        "parent": torch.tensor(parent),
        "sides": torch.stack(list(sides)),
        "share": torch.full((t, n), 0.5).double(),
        "point": torch.full((t, n), 0.5).double(),
        "growth": torch.zeros(t).double(),
    }
    return TreeCertificate(**{**made, **fields})


def huge_root() -> MultiplierCertificate:
    half, q = torch.full((7,), 0.5).double(), torch.full((7,), 1e9).double()
    return MultiplierCertificate(half, torch.ones(7).double(), torch.zeros(21), q, half)


# ---- trees --------------------------------------------------------------------------------------


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
@settings(max_examples=6, deadline=None)
def test_a_tree_proves_what_the_search_claims_and_no_more_than_the_optimum(
    seed, n, width, responses, share, spread, consumers, node_limit
):
    keep = 1 + round(share * (n - 1))
    problem = random_problem(seed, n, width, responses, keep, spread=spread, consumers=consumers)
    solution = solve(problem, "branch_and_bound", node_limit=node_limit)
    best, proved = solve(problem, "enumerate").loss, solution.verify().lower_bound
    assert solution.lower_bound - 1e-9 * problem.scale <= proved <= best + SLACK * problem.scale
    if node_limit == 1000:
        assert solution.status is Status.OPTIMAL
        assert solution.loss == pytest.approx(best, rel=1e-4, abs=1e-10 * problem.scale)


def test_the_forged_support_is_one_that_no_exchange_refutes():
    """And an honest tree is accepted, so that forgeries fail for what is forged in them."""
    assert worse().status is Status.SWAP_OPTIMAL
    assert worse().verify().not_recomputed == ()
    assert worse().loss > 6 * float(optimum())
    assert false().verify().not_recomputed == ("lower_bound", "status")
    divided = tree([-1, 0, 0], [node(), node(removed=[2]), node(kept=[2])], root=huge_root())
    report = replace(honest("enumerate"), certificate=divided).verify()
    assert report.lower_bound == pytest.approx(honest("enumerate").loss, rel=1e-9)


def test_sides_that_do_not_exist_cover_nothing():
    """Units at 2 and 3 count as opposed, and both keep the unit: its removal is never covered."""
    kept = worse().support.tolist()
    unit = next(u for u in honest("enumerate").removed.tolist() if u not in kept)
    one, other = node(kept=[unit]), node()
    for side in (-1, 3, 127):
        other[unit] = side
        forged = tree([-1, 0, 0], [node(), one, other], root=huge_root())
        refused(false(certificate=forged), "side that does not exist")


@pytest.mark.parametrize(
    ("parent", "sides", "message"),
    [
        ([-1, 0], [node(), node()], "decides nothing that its parent does not"),
        # A path cannot be longer than there are units, which costs nothing to refuse.
        ([-1, *range(99_999)], [node()] * 100_000, "decides nothing that its parent does not"),
        ([-1, 0, 0], [node(), node(removed=[0]), node(removed=[0])], "do not divide it"),
        ([-1, 0, 0], [node(), node(removed=[0]), node(kept=[1])], "do not divide it"),
        ([-1, 0, 0], [node(), node(removed=[0, 1]), node(kept=[0])], "do not divide it"),
        ([-1, 0, 0], [node(), node(removed=[0, 1]), node(kept=[0, 1])], "do not divide it"),
        ([-1, 0, 0, 0], [node(), *[node(removed=[0])] * 2, node(kept=[0])], "more than two"),
        ([-1, 0, 1], [node(), node(removed=[0]), node(kept=[0])], "forgets what its parent"),
        ([-1, 1, 0], [node(), node(removed=[0]), node(kept=[0])], "must follow their parents"),
        ([-1, -1], [node(), node(removed=[0])], "must follow their parents"),
        ([-1, 5], [node(), node(removed=[0])], "must follow their parents"),
        ([0], [node()], "must follow their parents"),
        ([-1], [node(kept=[0])], "must follow their parents"),
        ([-1, 0], [node(), node(kept=[0, 1, 2, 3])], "removes or keeps too many"),
        ([-1, 0], [node(), node(removed=[0, 1, 2, 3, 4])], "removes or keeps too many"),
        # Only what the parent proves of the side that is left away closes it.
        ([-1, 0], [node(), node(removed=[0])], "its certificate proves"),
        ([-1, 0], [node(), node(kept=[0])], "its certificate proves"),
    ],
)
def test_nodes_that_are_no_tree(parent, sides, message):
    refused(false(certificate=tree(parent, sides, root=huge_root())), message)


def test_too_much_to_enumerate():
    wide = random_problem(0, 24, 1, 2, 12)
    solution = solve(wide, "greedy", bound=True)
    forged = tree([-1], [node(units=24)])
    refused(replace(solution, certificate=forged), "is to be enumerated, 12 of 24")
    refused(replace(solution, certificate=EnumerationCertificate()), "2704156 supports")


@pytest.mark.parametrize("unit", [0, 6])
def test_a_loss_that_is_not_a_number_is_in_no_least_loss(unit, monkeypatch):
    """Also where it is in the first, or the last, of many batches of supports."""
    monkeypatch.setattr(certificate, "_BATCH_ELEMENTS", 1)
    inverses = Inverses.of(PROBLEM)
    (A, W, width), *others = inverses.consumers
    W = W.clone()
    W[unit * width] = math.nan
    broken = replace(inverses, consumers=((A, W, width), *others))
    assert math.isnan(certificate._least_loss(broken, 4))
    with pytest.raises(VerificationError, match="no bound"):
        broken.proved(math.nan)


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
    bounds = root.linearization(Inverses.of(problem), problem.keep)
    assert bounds.stays[0, 4] == bounds.stays.max() > 1.5 * solution.loss
    for side in (bounds.goes, bounds.stays):
        assert bool((side >= bounds.value).all())
        assert bool((side > bounds.value).any())
    sides = [node(units=9), node(removed=[5], units=9), node(kept=[5], units=9)]
    divided = tree([-1, 0, 0], sides, root=root, growth=torch.tensor([1.0, 0.0, 0.0]))
    assert divided.bound(problem) == pytest.approx(solution.loss)


def test_the_rounding_of_every_consumer_counts():
    good, bad = (
        random_problem(5, 14, 1, 10, 7, spread=0.5),
        random_problem(1, 14, 1, 2, 7, spread=3),
    )
    both = replace(good, consumers=(*good.consumers, *bad.consumers))
    one, other, found = (Inverses.of(x).rounding for x in (good, bad, both))
    assert other.inverse > one.inverse  # nearly singular
    assert found == one + other
    assert min(one.refit, other.refit) > 0
    assert found.refit == pytest.approx(math.hypot(one.refit, other.refit))


def test_a_tree_that_grows_too_large_is_left_away(monkeypatch):
    monkeypatch.setattr(branch_and_bound, "MOST_ENTRIES", 20)
    solution = solve(random_problem(5, 14, 1, 10, 7, spread=0.5), "branch_and_bound")
    assert solution.certificate is None
    assert math.isnan(solution.verify().lower_bound)


# ---- multipliers --------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e12, 3e17, 1.7e308])
def test_huge_diagonals_prove_no_rounding(q):
    """Next to 1e17 a loss is rounding: neither the bound nor a slope may be made of it."""
    best = honest("perspective").certificate
    for unit in range(0, PROBLEM.units, 2):
        diagonal, x = best.q.clone(), best.point.clone()
        diagonal[unit], x[unit] = q, unit % 2
        root = replace(best, q=diagonal, point=x)
        for side in (node(removed=[unit]), node(kept=[unit])):
            forged = tree([-1, 0], [node(), side], root=root)
            with pytest.raises(VerificationError):
                false(certificate=forged).verify()
            try:
                assert forged.bound(PROBLEM) <= optimum()
            except VerificationError:
                continue


def of(value):
    """Change all numbers of a tensor."""
    return lambda numbers: torch.full_like(numbers.double(), value)


def at(value):
    """Change the last number of a tensor."""

    def changed(numbers):
        numbers = numbers.clone()
        numbers.view(-1)[-1] = value
        return numbers

    return changed


TREE = [
    ("sides", lambda sides: sides[:0], "must be a matrix"),
    ("sides", lambda sides: sides[0], "must be a matrix"),
    ("sides", lambda sides: sides[:, :0], "tree's"),
    ("sides", torch.Tensor.double, "must not be of"),
    ("parent", torch.Tensor.float, "must not be of"),
    ("growth", torch.Tensor.long, "must not be of"),
    ("root", lambda root: replace(root, q=root.q * 0.5), "does not dominate"),
    ("growth", of(1e-3), "does not dominate|without a choice"),
    ("growth", of(math.nan), "growth must be .* finite"),
    ("growth", of(-0.5), "growth must not"),
    ("shape", of(-0.5), "positive numbers"),
    *(("point", at(x), "point must be") for x in (-1e-3, 1.001, 1e30)),
    *(
        (name, of(x), ".")
        for name in ("shape", "share", "point", "growth")
        for x in (1e-310, 1e300)
    ),
    *(
        (name, lambda _, value=value: value, f"tree's {name}")
        for name in ("shape", "parent", "share", "point", "growth")
        for value in (None, torch.ones(0), torch.ones(1, 7, 7))
    ),
]
MULTIPLIERS = [
    ("correlation", torch.Tensor.double, "must be torch.float32"),
    ("correlation", lambda correlation: correlation[:-1], "must be 21 finite numbers"),
    ("correlation", torch.Tensor.to_sparse, "correlation must be a dense tensor"),
    ("share", torch.Tensor.float, "must be torch.float64"),
    # Along a null direction of ``Diag(q) - Q`` a far point costs nothing but digits.
    *(("point", at(x), "point must be") for x in (-1e-9, 1 + 1e-9, 1e200)),
    *(
        (name, change(x), ".")
        for name in ("share", "shape", "q")
        for x in (0.0, -1.0, 5e-324, 1e9, math.nan)
        for change in (at, of)
    ),
    *(("correlation", at(x), r"\[-1, 1\]|finite") for x in (1.5, 1e30, math.nan)),
    ("correlation", lambda correlation: 0 * correlation - 1, "."),
]


@pytest.mark.parametrize(
    ("backend", "changes"), [("branch_and_bound", TREE), ("perspective", MULTIPLIERS)]
)
def test_numbers_of_any_size_and_form(backend, changes):
    certificate = honest(backend).certificate
    for field, change, message in changes:
        forged = replace(certificate, **{field: change(getattr(certificate, field))})
        refused(false(certificate=forged), message)


def test_moments_that_are_none_have_no_limit():
    certificate = honest("perspective").certificate
    for changes, message in [
        ({"share": certificate.share * 0.999}, "does not sum up to 4"),
        ({"share": certificate.share * 0 + 4 / 7, "correlation": certificate.correlation * 0 - 1},
         "not positive definite"),
    ]:  # fmt: skip
        with pytest.raises(VerificationError, match=message):
            replace(certificate, **changes).limit(PROBLEM)


def test_evidence_for_another_problem():
    easier = SubsetProblem(random_problem(12, 7, 1, 3, 3).consumers, 3)
    for backend in ("branch_and_bound", "perspective"):
        refused(false(certificate=solve(easier, backend).certificate))
        fewer = solve(PROBLEM.with_keep(2), backend)
        refused(false(certificate=fewer.certificate, lower_bound=fewer.lower_bound))
