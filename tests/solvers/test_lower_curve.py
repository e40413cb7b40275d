"""Bounds for every number of units kept: below all supports, recomputable, and hard to forge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import ProblemError, VerificationError, lower_curve, refit_loss, solve
from solvers.certificates.certificate import EnumerationCertificate
from solvers.lower_curve import LowerCurve, MultiplierCurve
from tests.solvers.instances import INSTANCES
from tests.solvers.test_perspective import random_problem

SLACK = 1e-12


def true_curve(problem):
    """The least loss by units kept, from all supports, by refits."""
    losses = torch.full((problem.units + 1,), math.inf).double()
    for number in range(1 << problem.units):
        support = torch.tensor([j for j in range(problem.units) if number >> j & 1]).long()
        losses[len(support)] = min(float(losses[len(support)]), refit_loss(problem, support))
    return losses


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 2),
    responses=st.sampled_from([1, 5, 40]),
    consumers=st.integers(1, 2),
    rounds=st.integers(0, 3),
)
@settings(max_examples=6, deadline=None)
def test_never_above_any_support(seed, width, responses, consumers, rounds):
    problem = random_problem(seed, 11, width, responses, 5, spread=0.3, consumers=consumers)
    truth = EnumerationCertificate().curve(problem)
    curve = lower_curve(problem, [3, 7], rounds=rounds)
    proved = curve.verify()
    assert len(curve.certificates) == 2
    assert bool((curve.bounds <= proved + SLACK * problem.scale).all())
    assert bool((proved <= truth + SLACK * problem.scale).all())
    assert bool((curve.bounds.diff() <= 0).all())


FEW = [one for one in INSTANCES.values() if one.problem.units <= 8]


@pytest.mark.parametrize("instance", FEW[:4], ids=lambda one: one.name)
def test_few_units_are_enumerated(instance):
    problem = instance.problem
    curve = lower_curve(problem, [1])
    assert torch.allclose(curve.verify(), true_curve(problem), atol=1e-9 * problem.scale)
    assert curve.verify()[problem.keep] == pytest.approx(instance.optimum(), rel=1e-6)


def test_a_certificate_gives_its_own_bound_at_its_own_number_of_units():
    problem = random_problem(3, 12, 2, 6, 5, spread=0.3, consumers=2)
    solution = solve(problem, "perspective", rounds=2)
    alone = MultiplierCurve(solution.certificate, torch.zeros(0, 12).double())
    assert alone.curve(problem)[5] == pytest.approx(solution.verify().lower_bound, rel=1e-9)


def test_more_points_and_more_multipliers_bound_more():
    problem = random_problem(4, 40, 1, 8, 20, spread=0.3)
    one, two = lower_curve(problem, [20]), lower_curve(problem, [8, 20])
    (found,) = one.certificates
    alone = replace(found, points=found.points[:0]).curve(problem)
    assert bool((one.bounds >= alone * (1 - 1e-9)).all())
    assert float(one.bounds[8]) > 1.01 * float(alone[8])
    assert bool((two.bounds >= one.bounds * (1 - 1e-9)).all())
    assert float(two.bounds[8]) > float(one.bounds[8])


@pytest.fixture(scope="module")
def honest():
    problem = random_problem(129, 11, 1, 3, 4, spread=1.0)
    return lower_curve(problem, [4, 8], rounds=2), EnumerationCertificate().curve(problem)


def refused(curve, message):
    with pytest.raises(VerificationError, match=message):
        curve.verify()


def test_what_is_not_proved_is_refused(honest):
    curve, truth = honest
    between = curve.bounds.clone()
    between[4] = (between[4] + truth[4]) / 2
    refused(replace(curve, bounds=between), "of 4 units is claimed")
    refused(replace(curve, certificates=()), "prove 0")
    refused(replace(curve, certificates=curve.certificates[:1]), "is claimed")
    refused(replace(curve, certificates=[*curve.certificates]), "tuple of known certificates")
    refused(replace(curve, certificates=(None,)), "tuple of known certificates")
    refused(replace(curve, problem=None), "SubsetProblem")
    for bounds in (curve.bounds[1:], curve.bounds * math.nan, curve.bounds + math.inf, [1.0] * 12):
        refused(replace(curve, bounds=bounds), "bounds must be")


@pytest.mark.parametrize("of", [torch.Tensor.to_sparse, lambda b: b.to(torch.complex128)])
def test_other_tensors_than_dense_ones_of_real_numbers_are_refused(honest, of):
    curve, _ = honest
    one = curve.certificates[0]
    points = replace(curve, certificates=(replace(one, points=of(one.points)),))
    for forged in (replace(curve, bounds=of(curve.bounds)), points):
        refused(forged, "must be a dense tensor of real numbers")


def test_points_out_of_range_are_refused(honest):
    curve, _ = honest
    first, *others = curve.certificates

    def planted(**changes):
        return replace(curve, certificates=(replace(first, **changes), *others))

    for points in (first.points * 3, first.points - 1):
        refused(planted(points=points), r"in \[0, 1\]")
    for points in (None, first.points[:, 1:], first.points[0], first.points * math.nan):
        refused(planted(points=points), "points must be")
    refused(planted(multipliers=None), "MultiplierCertificate")
    lowered = replace(first.multipliers, q=first.multipliers.q / 100)
    refused(planted(multipliers=lowered), "does not dominate")
    refused(replace(curve, problem=random_problem(7, 30, 1, 2, 4), certificates=()), "31 finite")


def test_no_forgery_of_many_claims_what_is_false(honest):
    """Numbers of honest certificates changed at random: refused, or still true of all supports."""
    curve, truth = honest
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for trial in range(200):
        size = 10.0 ** -(trial % 9)

        def noisy(values, size=size):
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            return (values.double() * (1 + size * noise)).to(values.dtype)

        found = []
        for one in curve.certificates:
            changed = ("share", "shape", "correlation", "q", "point")[trial % 5]
            value = noisy(getattr(one.multipliers, changed))
            if changed in ("share", "point"):
                value = value.clamp(0, 1)
            multipliers = replace(one.multipliers, **{changed: value})
            found.append(MultiplierCurve(multipliers, noisy(one.points).clamp(0, 1)))
        forged = replace(curve, certificates=tuple(found), bounds=torch.zeros(12).double())
        try:
            proved = forged.verify()
        except VerificationError:
            continue
        accepted += 1
        assert bool((proved <= truth + SLACK * curve.problem.scale).all())
        higher = truth * (1 + 1e-6) + SLACK
        refused(replace(forged, bounds=higher), "is claimed")
    assert 20 < accepted < 200


def test_too_many_supports_are_not_enumerated():
    problem = random_problem(1, 15, 1, 1, 3)
    every = LowerCurve(problem, torch.zeros(16).double(), (EnumerationCertificate(),))
    refused(every, "32768 supports")


@pytest.mark.parametrize("keep", [0, 12, -1])
def test_numbers_of_units_that_leave_no_choice_are_refused(keep):
    with pytest.raises(ProblemError, match=f"keeps has {keep}"):
        lower_curve(random_problem(1, 12, 1, 1, 3), [4, keep])
