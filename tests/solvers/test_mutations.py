"""Honest solutions with one field changed, thousands of times: refused, or the claim is still true.

What is true is found by numpy and enumeration (`tests.solvers.instances`), not by the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from solvers import Solution, Status, SubsetProblem, VerificationError, solve
from solvers.certificates.certificate import MultiplierCertificate
from solvers.certificates.tree_certificate import TreeCertificate
from tests.solvers.test_perspective import random_problem

CHANGES = 120
"""Of each solution; there are twenty."""


@dataclass(frozen=True)
class Truth:
    """Losses of all supports of a problem, by a least-squares fit in numpy."""

    losses: dict[tuple[int, ...], float]

    @classmethod
    def of(cls, problem: SubsetProblem) -> Truth:
        supports = combinations(range(problem.units), problem.keep)
        return cls({support: _loss(problem, support) for support in supports})

    @property
    def optimum(self) -> float:
        return min(self.losses.values())

    def exchanged(self, support: tuple[int, ...]) -> float:
        """Least loss of the supports that differ from one in one unit."""
        kept = set(support)
        return min(loss for other, loss in self.losses.items() if len(kept - set(other)) <= 1)

    def within(self, support: tuple[int, ...], window: list[int]) -> float:
        """Least loss of the supports that agree with one outside of a window."""
        outside = set(support) - set(window)
        return min(
            loss for other, loss in self.losses.items() if set(other) - set(window) == outside
        )


def _loss(problem: SubsetProblem, support) -> float:
    total = 0.0
    for c in problem.consumers:
        rows = [row for unit in support for row in c.rows[unit].tolist() if row >= 0]
        H, G = c.H.numpy()[np.ix_(rows, rows)], c.G.numpy()[rows]
        total += c.e - float((G * np.linalg.solve(H, G)).sum())
    return total


def problems():
    return {
        "scalar": random_problem(129, 7, 1, 3, 3, spread=1.0),
        "wide": random_problem(4, 6, 2, 5, 3, spread=0.5, consumers=2),
    }


@cache
def truths() -> dict[str, Truth]:
    return {name: Truth.of(problem) for name, problem in problems().items()}


@cache
def honest() -> dict[str, tuple[str, Solution]]:
    """Solutions of all statuses, by a name; with each, that of its problem."""
    found = {}
    for name, problem in problems().items():
        for status, backend, options in [
            (Status.FEASIBLE, "greedy", {}),
            (Status.SWAP_OPTIMAL, "local_search", {}),
            (Status.SWAP_OPTIMAL, "local_search", {"start": (1, 2, 5 + (name == "scalar"))}),
            (Status.WINDOW_OPTIMAL, "window_search", {"units": 5, "windows": 3}),
            (Status.OPTIMAL, "enumerate", {}),
            (Status.OPTIMAL, "branch_and_bound", {}),
            (Status.NODE_LIMIT, "branch_and_bound", {"node_limit": 1}),
            (Status.TIME_LIMIT, "branch_and_bound", {"time_limit": 0.0}),
            (Status.ITERATION_LIMIT, "local_search", {"start": (0, 1, 2), "max_swaps": 0}),
            (Status.BOUNDED, "perspective", {}),
        ]:
            solution = solve(problem, backend, options=options)
            label = f"{name} {backend} {status.name} {options}"
            found[label] = name, solution
    return found


def test_the_honest_solutions_are_of_all_statuses_but_that_of_lost_digits():
    assert len(honest()) == 20
    statuses = {solution.status for _, solution in honest().values()}
    assert statuses >= set(Status) - {Status.PRECISION_LIMIT}
    for _, solution in honest().values():
        solution.verify()


# ---- what is changed ----------------------------------------------------------------------------


def changed_number(value: float, draw: np.random.Generator) -> float:
    factor = draw.choice(
        [0.0, -1.0, 0.5, 0.9, 1.1, 2.0, 1e-12, 1e12, math.nan, math.inf, -math.inf]
    )
    small = value * (1 + float(draw.choice([-1, 1])) * 10.0 ** draw.uniform(-16, 0))
    scaled = math.nan if value == 0 else value * float(factor)
    return float(draw.choice([scaled, small, draw.uniform(0, 2) * (abs(value) or 1.0)]))


def changed_tensor(value: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    changed = value.clone()
    if not changed.numel():
        return changed
    place = tuple(int(draw.integers(size)) for size in changed.shape)
    kind = draw.integers(6)
    if kind == 5:
        return changed.to_sparse()
    if kind == 0:
        return changed[:-1]
    if kind == 1:
        return changed.flip(0)
    if not changed.is_floating_point():
        changed[place] = int(draw.integers(-2, 9))
    elif kind == 2:
        changed *= float(draw.choice([0.5, 0.99, 1.01, 2.0]))
    else:
        largest = torch.finfo(changed.dtype).max
        number = changed_number(float(changed[place]), draw)
        changed[place] = min(number, largest) if math.isfinite(number) else number
    return changed


def changed_certificate(certificate, draw: np.random.Generator):
    """One field of a certificate changed; of a tree also nodes dropped, doubled or reordered."""
    names = [field.name for field in dataclasses.fields(certificate)]
    if not names:
        return None
    if isinstance(certificate, TreeCertificate):
        if certificate.root is not None and draw.integers(6) == 0:
            return replace(certificate, root=changed_certificate(certificate.root, draw))
        if draw.integers(4) == 0:
            t = len(certificate.parent)
            places = torch.from_numpy(np.sort(draw.integers(0, t, t)))
            rows = ("parent", "sides", "share", "point", "growth")
            return replace(certificate, **{k: getattr(certificate, k)[places] for k in rows})
        names.remove("root")
    name = str(draw.choice(names))
    return replace(certificate, **{name: changed_tensor(getattr(certificate, name), draw)})


def mutant(solution: Solution, draw: np.random.Generator) -> tuple[str, Solution]:
    """One or two fields changed."""
    fields = ["support", "weights", "loss", "status", "lower_bound", "gap_tolerance", "windows"]
    fields += ["status and bound", "certificate", "certificate and bound", "consistent"]
    field = str(draw.choice(fields))
    statuses = list(Status)
    status = statuses[draw.integers(len(statuses))]
    bound = changed_number(solution.loss, draw)
    certificate = solution.certificate
    if certificate is not None and "certificate" in field:
        certificate = changed_certificate(certificate, draw)
    match field:
        case "support":
            changes = {"support": changed_tensor(solution.support, draw)}
        case "weights":
            changes = {"weights": tuple(changed_tensor(W, draw) for W in solution.weights)}
        case "loss" | "gap_tolerance" | "lower_bound":
            changes = {field: changed_number(getattr(solution, field), draw)}
        case "status":
            changes = {"status": status}
        case "status and bound":
            changes = {"status": status, "lower_bound": bound}
        case "windows":
            windows = tuple(
                replace(w, units=changed_tensor(w.units, draw))
                if draw.integers(2)
                else replace(w, certificate=changed_certificate(w.certificate, draw))
                for w in solution.windows
            )
            changes = {"windows": windows[: int(draw.integers(4))], "status": Status.WINDOW_OPTIMAL}
        case "certificate":
            changes = {"certificate": certificate}
        case "certificate and bound":
            changes = {"certificate": certificate, "lower_bound": bound}
        case _:
            # A refit on any support, and whatever is said of it.
            units = torch.from_numpy(
                np.sort(draw.permutation(solution.problem.units)[: solution.problem.keep])
            )
            start = {"start": tuple(units.tolist()), "max_swaps": 0}
            other = solve(solution.problem, "local_search", options=start)
            changes = {"support": other.support, "weights": other.weights, "loss": other.loss}
            if draw.integers(2):
                changes["status"] = status
            if draw.integers(2):
                changes["lower_bound"] = other.loss * float(draw.choice([1.0, 1 - 1e-5, 0.9]))
    return field, replace(solution, **changes)


# ---- what is true -------------------------------------------------------------------------------


def untrue(solution: Solution, report, truth: Truth) -> str | None:
    """Return what is false of a solution that was accepted, or None; and of what was said of it."""
    support = tuple(solution.support.tolist())
    slack = 1e-9 * solution.problem.scale
    loss = truth.losses.get(support)
    if loss is None or abs(loss - solution.loss) > slack:
        return "loss"
    if math.isfinite(report.lower_bound) and not report.lower_bound <= truth.optimum + slack:
        return "recomputed bound"
    recomputed = set(report.not_recomputed).isdisjoint
    if not solution.lower_bound <= truth.optimum + slack and recomputed({"lower_bound"}):
        return "bound"
    tolerance = solution.gap_tolerance * loss + slack
    if solution.status is Status.OPTIMAL and recomputed({"status"}):
        return "optimality" if not loss <= truth.optimum + tolerance else None
    if solution.status is Status.SWAP_OPTIMAL and not loss <= truth.exchanged(support) * 1.00001:
        return "swap optimality"
    if solution.status is Status.WINDOW_OPTIMAL:
        windows = [window.units.tolist() for window in solution.windows]
        within = min((truth.within(support, w) for w in windows), default=-math.inf)
        return "window optimality" if not loss <= within + tolerance else None
    return None


@pytest.mark.sampled(5)
@pytest.mark.parametrize("number", range(20))
def test_a_changed_solution_is_refused_or_true(number):
    label, (name, solution) = list(honest().items())[number]
    draw = np.random.default_rng(sum(map(ord, label)))
    outcomes = Counter()
    for _ in range(CHANGES):
        field, changed = mutant(solution, draw)
        try:
            # Nothing but a VerificationError may come out of it.
            report = changed.verify()
        except VerificationError:
            outcomes["refused"] += 1
            continue
        outcomes["accepted"] += 1
        wrong = untrue(changed, report, truths()[name])
        assert wrong is None, f"{field}: a false {wrong} was accepted"
    assert outcomes["refused"] > CHANGES / 10
    assert outcomes["accepted"] > 0, "nothing harmless was among the changes: they prove little"


def test_multipliers_at_random_prove_nothing_false():
    for name, problem in problems().items():
        draw = np.random.default_rng(3)
        optimum, proved = truths()[name].optimum, 0
        base = solve(problem, "perspective").certificate
        for _ in range(120):
            n = problem.units
            factors = np.exp(draw.normal(size=(3, n)) * draw.choice([1e-9, 1e-3, 0.1, 1, 10]))
            share, shape, q = (torch.from_numpy(f) for f in factors)
            certificate = MultiplierCertificate(
                (base.share * share).clamp(max=1.0),
                base.shape * shape,
                (base.correlation * float(factors[0, 0])).clamp(-1, 1),
                base.q * q,
                torch.from_numpy(draw.uniform(size=n) ** draw.choice([0.01, 1, 100])),
            )
            try:
                bound = certificate.bound(problem)
            except VerificationError:
                continue
            proved += 1
            assert bound <= optimum * (1 + 1e-12)
        assert proved > 12
