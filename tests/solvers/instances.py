"""Small problems that every backend must handle, each with the raw data that it came from.

The reference answers are computed here with numpy from the data alone, sharing no code with the
package: least squares on the augmented system ``[X/sqrt(N); sqrt(lambda) I]``, and enumeration; or
in fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations

import numpy as np
import torch

from solvers import Consumer, SubsetProblem


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs (N, p), targets (N, m) and dense weights (p, m) of one consumer."""

    X: np.ndarray
    Y: np.ndarray
    W0: np.ndarray

    def tensors(self):
        """Return ``X'X/N``, ``X'Y/N``, ``|Y|^2/N`` and W0."""
        X, Y, N = torch.from_numpy(self.X), torch.from_numpy(self.Y), len(self.X)
        return X.T @ X / N, X.T @ Y / N, float(Y.square().sum() / N), torch.from_numpy(self.W0)


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem and the data behind each of its consumers."""

    name: str
    problem: SubsetProblem
    data: tuple[Data, ...]

    def loss(self, support) -> float:
        """Loss on a support by an independent least-squares fit."""
        return sum(
            _augmented_loss(data, consumer, sorted(int(unit) for unit in support))
            for data, consumer in zip(self.data, self.problem.consumers, strict=True)
        )

    @cached_property
    def optimum(self) -> float:
        """Lowest loss of any support, by enumeration."""
        supports = combinations(range(self.problem.units), self.problem.keep)
        return min(map(self.loss, supports))

    @cached_property
    def exact_optimum(self) -> Fraction:
        return exact_optimum(self.problem)


def _augmented_loss(data, consumer, support):
    samples, p = data.X.shape
    root = np.sqrt(consumer.damping)
    design = np.vstack([data.X / np.sqrt(samples), root * np.eye(p)])
    target = np.vstack([data.Y / np.sqrt(samples), root * data.W0])
    columns = unit_rows(consumer, support)
    fitted, *_ = np.linalg.lstsq(design[:, columns], target, rcond=None)
    return float(np.square(target - design[:, columns] @ fitted).sum())


def exact_loss(problem, support) -> Fraction:
    """Loss on a support in exact arithmetic; for small problems."""
    total = Fraction(0)
    for c in problem.consumers:
        rows = unit_rows(c, sorted(support))
        total += Fraction(c.e) - explained(c.H[rows][:, rows], c.G[rows])
    return total


def exact_optimum(problem) -> Fraction:
    """Lowest loss of any support, in exact arithmetic; zero where e lost its last digit."""
    supports = combinations(range(problem.units), problem.keep)
    return max(min(exact_loss(problem, support) for support in supports), Fraction(0))


def explained(H, G) -> Fraction:
    """``tr(G' inv(H) G)`` by elimination in fractions."""
    table = [[Fraction(entry) for entry in row] for row in torch.cat([H, G], 1).tolist()]
    total = Fraction(0)
    for i, pivot in enumerate(table):
        for row in table[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
        total += sum(entry**2 for entry in pivot[len(H) :]) / pivot[i]
    return total


def unit_rows(consumer, units) -> list[int]:
    """Rows that some units own, one unit after the other."""
    return [row for unit in units for row in consumer.rows[unit].tolist()]


def build(name, data, keep, units=None, damp=0.01, *, given=True) -> Instance:
    """Make an instance; `units` is one description a consumer.

    given: Whether to give the targets, which are otherwise those of the dense weights.
    """
    consumers = []
    for d, own in zip(data, units or [None] * len(data), strict=True):
        H, G, e, W0 = d.tensors()
        targets = {"G": G, "e": e} if given else {}
        consumers.append(Consumer.from_gram(H, W0, **targets, units=own, damp=damp))
    return Instance(name, SubsetProblem(tuple(consumers), keep, name), tuple(data))


def random_data(seed, p, m, samples=60, noise=0.0, mix=None) -> Data:
    """Gaussian inputs, mixed by a (p, p) matrix if given, with targets ``X W0`` plus noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(samples, p)) @ (np.eye(p) if mix is None else mix)
    W0 = rng.normal(size=(p, m))
    return Data(X, X @ W0 + noise * rng.normal(size=(samples, m)), W0)


def random_problem(seed, n, width, responses, keep, *, spread=1.0, damp=0.01, consumers=1):
    """A problem with correlated inputs; the rows of all consumers belong to the same units."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(consumers):
        p = n * width
        mix = torch.eye(p).double() + spread * torch.randn(p, p, generator=generator).double()
        X = torch.randn(2 * p, p, generator=generator).double() @ mix
        W0 = torch.randn(p, responses, generator=generator).double()
        Y = X @ W0 + torch.randn(2 * p, responses, generator=generator).double()
        G, e = X.T @ Y / len(X), float(Y.square().sum()) / len(X)
        parts.append(Consumer.from_gram(X.T @ X / len(X), W0, G=G, e=e, units=n, damp=damp))
    return SubsetProblem(tuple(parts), keep)


def shuffled_units(seed, units, width):
    """Units whose rows lie anywhere."""
    return np.random.default_rng(seed).permutation(units * width).reshape(units, width).tolist()


def mixed(seed, p, rank, level):
    """A matrix that mixes inputs such that all but `rank` directions are faint."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(p, rank)) @ rng.normal(size=(rank, p)) + level * np.eye(p)


def _changed(data, change) -> Data:
    """Inputs and weights that a function changes, and the targets that they give."""
    X, W0 = change(data.X.copy(), data.W0.copy())
    return Data(X, X @ W0, W0)


def _twice(X, W0):
    return np.repeat(X[:, :4], 2, axis=1), np.repeat(W0[:4], 2, axis=0)


def _dead(X, W0):
    X[:, [1, 6]], W0[[1, 6]] = 0, 0
    return X, W0


_UNCENTRED = [
    _changed(random_data(23, 6, 3), lambda X, W0: (X + 2 * np.arange(6), W0)),
    _changed(random_data(24, 12, 2), lambda X, W0: (X - 1, W0)),
]
_ALL = [
    build("scalar", [random_data(0, 9, 4)], 4),
    build("target", [random_data(1, 9, 4, noise=1.0)], 4),
    build("wide_output", [random_data(2, 6, 20, noise=0.3)], 3),
    build("correlated", [random_data(4, 10, 5, mix=mixed(3, 10, 3, 0.2))], 5),
    build("nearly_singular", [random_data(6, 8, 4, mix=mixed(5, 8, 4, 1e-3))], 3, damp=1e-7),
    build("ties", [_changed(random_data(7, 8, 3), _twice)], 4),
    build("dead", [_changed(random_data(8, 9, 4), _dead)], 5),
    build("keep_1", [random_data(14, 7, 3)], 1),
    build("all_but_1", [random_data(15, 7, 3)], 6),
    build("keep_all", [random_data(16, 5, 3, noise=0.2)], 5),
    build("blocks", [random_data(17, 18, 4)], 3, [6]),
    build("permuted", [random_data(19, 12, 4)], 3, [shuffled_units(1, 6, 2)]),
    build(
        "two_consumers", [random_data(10, 7, 3), random_data(11, 14, 5, noise=0.5)], 3, [None, 7]
    ),
    build(
        "shuffled_consumers",
        [random_data(12, 18, 3), random_data(13, 6, 8)],
        4,
        [shuffled_units(3, 6, 3), None],
        damp=0.1,
    ),
    build("uncentred", _UNCENTRED, 3, [None, 6]),
]
INSTANCES = {instance.name: instance for instance in _ALL}
