"""Honest solutions with a field changed, hundreds of times: refused, or the claim is still true.

What is true is found by numpy and enumeration, not by the package.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from solvers import Status, VerificationError, solve
from solvers.certificates.tree_certificate import TreeCertificate
from tests.solvers.instances import random_problem, unit_rows

CHANGES = 50
"""Of each solution."""

PROBLEMS = {
    "scalar": random_problem(129, 7, 1, 3, 3, spread=1.0),
    "wide": random_problem(4, 6, 2, 5, 3, spread=0.5, consumers=2),
}
HONEST = [
    ("scalar", "local_search", {"start": (1, 2, 6)}),
    ("scalar", "local_search", {"start": (0, 1, 2), "max_swaps": 0}),
    ("scalar", "enumerate", {}),
    ("scalar", "branch_and_bound", {}),
    ("scalar", "perspective", {}),
    ("wide", "local_search", {}),
    ("wide", "branch_and_bound", {}),
    ("wide", "branch_and_bound", {"node_limit": 1}),
    ("wide", "perspective", {}),
]


def changed(value, draw):
    """Return something else of the same type: a number, a tensor, or one field of a record."""
    if isinstance(value, Status):
        return list(Status)[draw.integers(len(Status))]
    if isinstance(value, float):
        factors = [0.0, -1.0, 0.5, 0.9, 1.1, 2.0, 1e-12, 1e12, math.nan, math.inf, -math.inf]
        small = 1 + float(draw.choice([-1, 1])) * 10.0 ** draw.uniform(-16, 0)
        return (value or 1.0) * float(
            draw.choice([draw.choice(factors), small, draw.uniform(0, 2)])
        )
    if isinstance(value, tuple):
        return tuple(changed(one, draw) for one in value)[: int(draw.integers(1, 4))]
    if isinstance(value, TreeCertificate) and draw.integers(4) == 0:
        t = len(value.parent)  # nodes dropped, doubled or reordered
        places = torch.from_numpy(np.sort(draw.integers(0, t, t)))
        rows = ("parent", "sides", "share", "point", "growth")
        return replace(value, **{name: getattr(value, name)[places] for name in rows})
    if is_dataclass(value) and fields(value):
        name = str(draw.choice([field.name for field in fields(value)]))
        return replace(value, **{name: changed(getattr(value, name), draw)})
    if not isinstance(value, torch.Tensor) or not value.numel():
        return None
    other, kind = value.clone(), draw.integers(5)
    place = tuple(int(draw.integers(size)) for size in other.shape)
    if kind < 2:
        return other[:-1] if kind else other.flip(0)
    if not other.is_floating_point():
        other[place] = int(draw.integers(-2, 9))
    elif kind == 2:
        other *= float(draw.choice([0.5, 0.99, 1.01, 2.0]))
    else:
        number, largest = changed(float(other[place]), draw), torch.finfo(other.dtype).max
        other[place] = min(number, largest) if math.isfinite(number) else number
    return other


def mutant(solution, draw):
    """One or two fields changed; or a refit on any support, of which the same is said."""
    names = ["support", "weights", "loss", "status", "lower_bound", "gap_tolerance"]
    names += ["certificate"] * 3
    if draw.integers(3) == 0:
        order = draw.permutation(solution.problem.units)[: solution.problem.keep]
        start = {"start": tuple(map(int, order)), "max_swaps": 0}
        other = solve(solution.problem, "local_search", options=start)
        moved = {"support": other.support, "weights": other.weights, "loss": other.loss}
        solution, names = replace(solution, **moved), ["status", "lower_bound", "certificate"]
    chosen = set(map(str, draw.choice(names, int(draw.integers(1, 3)))))
    return replace(solution, **{name: changed(getattr(solution, name), draw) for name in chosen})


@cache
def losses_of(name):
    """Losses of all supports of a problem, by numpy."""
    found = {}
    for support in combinations(range(PROBLEMS[name].units), PROBLEMS[name].keep):
        found[support] = 0.0
        for c in PROBLEMS[name].consumers:
            rows = unit_rows(c, support)
            H, G = c.H.numpy()[np.ix_(rows, rows)], c.G.numpy()[rows]
            found[support] += c.e - float((G * np.linalg.solve(H, G)).sum())
    return found


def assert_true(solution, report, losses):
    """Whatever was accepted of a solution, and was not called the backend's word, is true."""
    kept = set(solution.support.tolist())
    loss, optimum = losses[tuple(solution.support.tolist())], min(losses.values())
    slack = 1e-9 * solution.problem.scale
    assert solution.loss == pytest.approx(loss, abs=slack)
    tolerance = solution.gap_tolerance * loss + slack
    assert not report.lower_bound > optimum + slack
    if "lower_bound" not in report.not_recomputed:
        assert solution.lower_bound <= optimum + slack
    if solution.status is Status.OPTIMAL and "status" not in report.not_recomputed:
        assert loss <= optimum + tolerance
    if solution.status is Status.SWAP_OPTIMAL:
        near = [other for support, other in losses.items() if len(kept - {*support}) <= 1]
        assert loss <= min(near) * 1.00001


@pytest.mark.sampled(5)
@pytest.mark.parametrize("number", range(len(HONEST)))
def test_a_changed_solution_is_refused_or_true(number):
    name, backend, options = HONEST[number]
    solution = solve(PROBLEMS[name], backend, options=options)
    assert_true(solution, solution.verify(), losses_of(name))
    draw, outcomes = np.random.default_rng(number), Counter()
    for _ in range(CHANGES):
        forged = mutant(solution, draw)
        try:
            report = forged.verify()  # nothing but a VerificationError may come out of it
        except VerificationError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
            assert_true(forged, report, losses_of(name))
    assert outcomes["refused"] > CHANGES / 10
    assert outcomes["accepted"] > 0, "nothing harmless was among the changes: they prove little"
