"""What an adversary who has read the check would write to a file: each is refused, or is true.

A forgery that is accepted has to be harmless: what it claims holds in exact arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest
import torch

from solvers import (
    Solution,
    Status,
    SubsetProblem,
    VerificationError,
    WindowCertificate,
    refit,
    solve,
)
from solvers.certificates.certificate import EnumerationCertificate, MultiplierCertificate
from solvers.certificates.tree_certificate import FREE, KEPT, REMOVED, TreeCertificate
from tests.solvers.instances import INSTANCES, exact_optimum
from tests.solvers.test_perspective import random_problem


@cache
def problem() -> SubsetProblem:
    return random_problem(129, 7, 1, 3, 3, spread=1.0)


@cache
def honest(backend="branch_and_bound") -> Solution:
    return solve(problem(), backend)


@cache
def optimum() -> Fraction:
    return exact_optimum(problem())


@cache
def worse() -> Solution:
    """A swap optimum, which no exchange refutes, with seven times the loss of the optimum."""
    support = torch.tensor([1, 2, 6])
    weights, loss = refit(problem(), support)
    return Solution(
        problem=problem(),
        backend="forged",
        support=support,
        weights=weights,
        loss=loss,
        status=Status.FEASIBLE,
    )


def false(**claims) -> Solution:
    """A support that is not the best, called optimal at its own loss."""
    claims = {"status": Status.OPTIMAL, "lower_bound": worse().loss, **claims}
    return replace(worse(), **claims)


def test_the_forged_support_is_one_that_no_exchange_refutes():
    assert replace(worse(), status=Status.SWAP_OPTIMAL).verify().not_recomputed == ()
    assert worse().loss > 6 * float(optimum())
    word = false().verify()
    assert word.not_recomputed == ("lower_bound", "status")


def refused(solution: Solution, message: str = ".") -> None:
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


def huge_root(q=1e9) -> MultiplierCertificate:
    n = problem().units
    half = torch.full((n,), 0.5).double()
    none = torch.zeros(n * (n - 1) // 2)
    q = torch.full((n,), q).double()
    return MultiplierCertificate(half, torch.ones(n).double(), none, q, half)


# ---- trees --------------------------------------------------------------------------------------


def test_an_honest_tree_of_enumerated_nodes_is_accepted():
    """So that the forgeries below fail for what is forged in them."""
    divided = tree([-1, 0, 0], [node(), node(removed=[2]), node(kept=[2])], root=huge_root())
    report = replace(honest("enumerate"), certificate=divided).verify()
    assert report.lower_bound == pytest.approx(honest("enumerate").loss, rel=1e-9)


def test_sides_that_do_not_exist_cover_nothing():
    """Units at 2 and 3 count as opposed, and both keep the unit: its removal is never covered."""
    unit = int(honest("enumerate").removed[0])
    if unit in worse().support.tolist():
        unit = int(honest("enumerate").removed[1])
    one, other = node(kept=[unit]), node()
    for side in (-1, 3, 127, -128):
        other[unit] = side
        forged = tree([-1, 0, 0], [node(), one, other], root=huge_root())
        refused(false(certificate=forged), "side that does not exist")


@pytest.mark.parametrize(
    ("parent", "sides", "message"),
    [
        ([-1, 0], [node(), node()], "decides nothing that its parent does not"),
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
    ],
)
def test_nodes_that_are_no_tree(parent, sides, message):
    refused(false(certificate=tree(parent, sides, root=huge_root())), message)


def test_one_child_leaves_the_other_half_open():
    """Its sibling is left away: only what the parent proves of that side closes it."""
    for side in ({"removed": [0]}, {"kept": [0]}):
        forged = tree([-1, 0], [node(), node(**side)], root=huge_root())
        refused(false(certificate=forged), "its certificate proves")


def test_empty_and_misshapen_trees():
    whole = tree([-1], [node()])
    for sides in (whole.sides[:0], whole.sides[0], whole.sides[:, :0]):
        refused(false(certificate=replace(whole, sides=sides)), "must be a matrix|tree's")
    for name in ("shape", "parent", "share", "point", "growth"):
        for value in (torch.ones(0), torch.ones(1, 7, 7)):
            refused(false(certificate=replace(whole, **{name: value})), f"tree's {name}")
    refused(false(certificate=replace(whole, parent=torch.tensor([-1.0]))), "must not be of")
    refused(false(certificate=replace(whole, sides=whole.sides.double())), "must not be of")
    refused(false(certificate=replace(whole, growth=torch.zeros(1).long())), "must not be of")


def test_a_deep_chain_is_refused_before_it_costs_anything():
    """A path cannot be longer than there are units, as each node decides one."""
    depth = 100_000
    forged = tree([-1, *range(depth - 1)], [node()] * depth)
    refused(false(certificate=forged), "decides nothing that its parent does not")


def test_too_much_to_enumerate():
    wide = random_problem(0, 20, 1, 2, 10)
    solution = replace(
        solve(wide, "local_search", bound=True), certificate=tree([-1], [node(units=20)])
    )
    refused(solution, "is to be enumerated, 10 of 20")
    wide = random_problem(0, 24, 1, 2, 12)
    solution = solve(wide, "local_search", bound=True)
    refused(replace(solution, certificate=EnumerationCertificate()), "2704156 supports")


# ---- multipliers --------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e12, 1e16, 1e17, 3e17, 1e20, 1.7e308])
@pytest.mark.parametrize("point", [0.0, 1.0])
def test_huge_diagonals_prove_no_rounding(q, point):
    """Next to 1e17 a loss is rounding: neither the bound nor a slope may be made of it."""
    best = honest("perspective").certificate
    for unit in range(problem().units):
        diagonal, x = best.q.clone(), best.point.clone()
        diagonal[unit], x[unit] = q, point
        root = replace(best, q=diagonal, point=x)
        for side in (node(removed=[unit]), node(kept=[unit])):
            forged = tree([-1, 0], [node(), side], root=root)
            try:
                proved = forged.bound(problem())
            except VerificationError:
                continue
            assert Fraction(proved) <= optimum()
            refused(false(certificate=forged))


@pytest.mark.parametrize("value", [-1e-9, 1 + 1e-9, 1e200, math.nan])
def test_points_outside_of_the_cube(value):
    """Along a null direction of ``Diag(q) - Q`` a far point costs nothing but digits."""
    root = huge_root()
    for unit in range(problem().units):
        point = root.point.clone()
        point[unit] = value
        refused(false(certificate=replace(root, point=point)), "point must be")
        certificate = honest().certificate
        points = certificate.point.double()
        points[-1, unit] = value
        refused(false(certificate=replace(certificate, point=points)), "point must be")


@pytest.mark.parametrize("value", [0.0, -1.0, 5e-324, 1e-9, 1e9, 1e300, math.nan])
@pytest.mark.parametrize("field", ["share", "shape", "q"])
def test_multipliers_of_any_size(field, value):
    root = honest("perspective").certificate
    for unit in range(problem().units):
        numbers = getattr(root, field).clone()
        numbers[unit] = value
        refused(false(certificate=replace(root, **{field: numbers})))
        everywhere = replace(root, **{field: torch.full_like(numbers, value)})
        refused(false(certificate=everywhere))


@pytest.mark.parametrize("value", [1.5, -1.0, 1.0, 1e30, math.inf, math.nan])
def test_correlations_of_any_size(value):
    root = honest("perspective").certificate
    for place in range(len(root.correlation)):
        numbers = root.correlation.clone()
        numbers[place] = value
        refused(false(certificate=replace(root, correlation=numbers)))
    refused(false(certificate=replace(root, correlation=torch.full_like(numbers, value))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda c: {"correlation": c.correlation.double()}, "must be torch.float32"),
        (lambda c: {"correlation": c.correlation[:-1]}, "must be 21 finite numbers"),
        (lambda c: {"correlation": c.correlation[:, None]}, "must be 21 finite numbers"),
        (lambda c: {"correlation": c.correlation * 1e38}, r"must be in \[-1, 1\]|finite"),
        (lambda c: {"correlation": None}, "must be a tensor"),
        (lambda c: {"share": c.share.float()}, "must be torch.float64"),
        (lambda c: {"share": c.share * 0.999}, "does not sum up to 4"),
        (lambda c: {"share": c.share.flip(0) * 0 + 4 / 7, "correlation": c.correlation * 0 - 1},
         "no multipliers|not positive definite"),
    ],
)  # fmt: skip
def test_moments_that_are_none(changes, message):
    solution = honest("perspective")
    certificate = replace(solution.certificate, **changes(solution.certificate))
    with pytest.raises(VerificationError, match=message):
        certificate.limit(problem())
    refused(replace(solution, certificate=certificate))


@pytest.mark.parametrize("backend", ["perspective", "branch_and_bound", "window_search"])
def test_sparse_tensors(backend):
    solution = honest(backend)
    refused(replace(solution, support=solution.support.to_sparse()), "an int64 tensor")
    refused(replace(solution, weights=tuple(W.to_sparse() for W in solution.weights)), "weights")
    certificate = solution.certificate
    for field in dataclasses.fields(certificate) if certificate else ():
        value = getattr(certificate, field.name)
        if isinstance(value, torch.Tensor):
            forged = replace(certificate, **{field.name: value.to_sparse()})
            refused(replace(solution, certificate=forged), f"{field.name} must be a dense tensor")
    for window in solution.windows:
        refused(replace(solution, windows=(replace(window, units=window.units.to_sparse()),)))


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1e300, math.inf, math.nan, -0.5])
@pytest.mark.parametrize("field", ["shape", "share", "point", "growth"])
def test_numbers_of_any_size_in_a_tree(field, value):
    certificate = honest().certificate
    numbers = torch.full_like(getattr(certificate, field).double(), value)
    refused(false(certificate=replace(certificate, **{field: numbers})))


def test_evidence_for_another_problem():
    easier = SubsetProblem(random_problem(12, 7, 1, 3, 3).consumers, 3)
    for backend in ("branch_and_bound", "perspective"):
        other = solve(easier, backend)
        refused(false(certificate=other.certificate))
        fewer = solve(problem().with_keep(2), backend)
        refused(false(certificate=fewer.certificate, lower_bound=fewer.lower_bound))
    larger = solve(random_problem(12, 8, 1, 3, 3), "branch_and_bound").certificate
    refused(false(certificate=larger), "a tree of 7 units")


# ---- numbers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("loss", (math.nan, math.inf, -1.0, None, "0.5", 1)),
        ("gap_tolerance", (math.nan, math.inf, -1.0, 1.0, 1e300, math.nextafter(1.0, 2.0), None)),
        ("lower_bound", (math.nan, math.inf, -math.nan, None, "0.5")),
        ("seconds", (math.nan, -1.0)),
        ("iterations", (None, 2.0, -1)),
        ("history", ([1.0], (math.nan,), ("1",))),
        ("status", ("OPTIMAL", None)),
        ("support", (None, [0, 1, 2], torch.tensor([0.0, 1, 2]), torch.tensor([[0, 1, 2]]))),
        ("weights", (None, [], (torch.zeros(7),), (torch.zeros(7, 3),))),
        ("certificate", ("trust me",)),
        ("windows", ([], ("w",))),
        ("backend", (None,)),
        ("problem", (None,)),
    ],
)
def test_fields_of_another_type_or_range(field, values):
    for value in values:
        refused(replace(honest(), **{field: value}), f"{field} is .*; it must be")
    refused(replace(honest(), support=honest().support.flip(0)), "not sorted")


def test_a_loss_of_zero_with_a_bound_below_it():
    """No division by the loss, and no optimum within a tolerance of nothing."""
    silent = SubsetProblem.from_gram(torch.zeros(3, 3), torch.ones(3, 2), keep=1)
    best = solve(silent, "local_search")
    refused(
        replace(best, lower_bound=-1.0, status=Status.OPTIMAL), "with a gap of 1 at a loss of 0"
    )
    best = replace(best, lower_bound=0.0, status=Status.OPTIMAL)
    report = best.verify()
    assert (report.lower_bound, report.not_recomputed, best.gap) == (0.0, (), 0.0)


# ---- claims without evidence --------------------------------------------------------------------


def test_a_backends_word_is_named_as_such():
    report = replace(honest("enumerate"), certificate=None).verify()
    assert math.isnan(report.lower_bound)
    assert report.not_recomputed == ("lower_bound", "status")
    feasible = replace(honest("enumerate"), certificate=None, status=Status.TIME_LIMIT).verify()
    assert feasible.not_recomputed == ("lower_bound",)
    for backend in ("enumerate", "branch_and_bound", "perspective", "local_search", "greedy"):
        assert honest(backend).verify().not_recomputed == ()
    assert honest("greedy").record().recomputed_bound is None


def test_a_bound_that_needs_no_evidence():
    """Removing units never lowers the loss, so the loss with all of them bounds any other."""
    noisy = INSTANCES["target"].problem
    least = refit(noisy, torch.arange(noisy.units))[1]
    best = solve(noisy, "local_search")
    report = replace(best, lower_bound=least, status=Status.BOUNDED).verify()
    assert report.lower_bound == pytest.approx(least)
    assert report.not_recomputed == ()
    report = replace(best, lower_bound=least * 1.001, status=Status.BOUNDED).verify()
    assert report.not_recomputed == ("lower_bound", "status")


def test_weights_of_a_wrong_shape_or_value_or_number():
    (W,) = honest().weights
    for weights, message in [
        ((W[:-1],), "wrong shape or device, or are not finite"),
        ((torch.full_like(W, torch.nan),), "wrong shape or device, or are not finite"),
        ((W, W), "weights for 2 of 1 consumers"),
    ]:
        refused(replace(honest(), weights=weights), message)


def test_statuses_that_claim_a_bound():
    for status in (Status.BOUNDED, Status.OPTIMAL):
        refused(replace(honest("greedy"), status=status), "claimed")


def test_window_optima_need_their_windows():
    best = honest("window_search")
    assert best.status is Status.WINDOW_OPTIMAL
    (window,) = best.windows
    huge = torch.full((1,), 1e9).double()
    assert best.verify().not_recomputed == ()
    refused(replace(best, windows=()), "without a window")
    refused(replace(worse(), status=Status.WINDOW_OPTIMAL), "without a window")
    for forged, message in [
        (replace(window, units=window.units[:-1]), "a tree of 6 units"),
        (replace(window, units=window.units.double()), "an int64 tensor"),
        (replace(window, units=window.units * 0), "names a unit twice"),
        (replace(window, units=window.units + 1), "must name units from 0"),
        (replace(window, certificate=honest("perspective").certificate), "by a TreeCertificate"),
        (
            WindowCertificate(window.units, tree([-1], [node()], growth=huge)),
            "to 0 only|to .* only",
        ),
    ]:
        refused(replace(best, windows=(forged,)), message)
    taken = {"windows": best.windows, "gap_tolerance": best.gap_tolerance}
    refused(replace(worse(), status=Status.WINDOW_OPTIMAL, **taken), "proved to .* only")
