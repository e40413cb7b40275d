"""Small problems that every backend must handle, each with the raw data that it came from.

The reference answers are computed here with numpy from the data alone, sharing no code with the
package: least squares on the augmented system ``[X/sqrt(N); sqrt(lambda) I]``, and enumeration.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations

import numpy as np
import torch

from solvers import Consumer, SubsetProblem
from solvers.problem import NO_ROW


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs (N, p), targets (N, m) and dense weights (p, m) of one consumer."""

    X: np.ndarray
    Y: np.ndarray
    W0: np.ndarray


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

    def optimum(self) -> float:
        """Lowest loss of any support, by enumeration."""
        return _optimum(self.name)


@cache
def _optimum(name: str) -> float:
    instance = INSTANCES[name]
    supports = combinations(range(instance.problem.units), instance.problem.keep)
    return min(instance.loss(support) for support in supports)


def exact_loss(problem: SubsetProblem, support) -> Fraction:
    """Loss on a support in exact arithmetic, by elimination in fractions; for small problems."""
    return sum((_exact_loss(c, sorted(support)) for c in problem.consumers), Fraction(0))


def exact_optimum(problem: SubsetProblem) -> Fraction:
    """Lowest loss of any support, in exact arithmetic; zero where e lost its last digit."""
    supports = combinations(range(problem.units), problem.keep)
    return max(min(exact_loss(problem, support) for support in supports), Fraction(0))


def _exact_loss(consumer: Consumer, support) -> Fraction:
    rows = [row for unit in support for row in unit_rows(consumer, unit)]
    table = torch.cat([consumer.H[rows][:, rows], consumer.G[rows]], 1).tolist()
    table = [[Fraction(entry) for entry in row] for row in table]
    explained = Fraction(0)
    for i, pivot in enumerate(table):
        for row in table[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
        explained += sum(entry**2 for entry in pivot[len(rows) :]) / pivot[i]
    return Fraction(consumer.e) - explained


def unit_rows(consumer: Consumer, unit: int) -> list[int]:
    """Rows that a unit owns."""
    return [row for row in consumer.rows[unit].tolist() if row != NO_ROW]


def _augmented_loss(data: Data, consumer: Consumer, support: list[int]) -> float:
    samples, p = data.X.shape
    root = np.sqrt(consumer.damping)
    design = np.vstack([data.X / np.sqrt(samples), root * np.eye(p)])
    target = np.vstack([data.Y / np.sqrt(samples), root * data.W0])
    columns = [row for unit in support for row in unit_rows(consumer, unit)]
    fitted, *_ = np.linalg.lstsq(design[:, columns], target, rcond=None)
    return float(np.square(target - design[:, columns] @ fitted).sum())


def build(name, data, keep, units=None, damp=0.01, variances=False) -> Instance:
    """Make an instance; `units` is one description a consumer, `variances` says to give them."""
    units = units or [None] * len(data)
    consumers = tuple(
        Consumer.from_gram(
            torch.from_numpy(d.X.T @ d.X / len(d.X)),
            torch.from_numpy(d.W0),
            G=torch.from_numpy(d.X.T @ d.Y / len(d.X)),
            e=float(np.square(d.Y).sum() / len(d.X)),
            units=u,
            damp=damp,
            variance=torch.from_numpy(d.X.var(0)) if variances else None,
        )
        for d, u in zip(data, units, strict=True)
    )
    return Instance(name, SubsetProblem(consumers, keep, name), tuple(data))


def random_data(seed, p, m, samples=60, noise=0.0, mix=None) -> Data:
    """Gaussian inputs, mixed by a (p, p) matrix if given, with targets ``X W0`` plus noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(samples, p)) @ (np.eye(p) if mix is None else mix)
    W0 = rng.normal(size=(p, m))
    return Data(X, X @ W0 + noise * rng.normal(size=(samples, m)), W0)


def shuffled_units(seed, widths):
    """Units of the given widths whose rows lie anywhere."""
    rows = np.random.default_rng(seed).permutation(sum(widths)).tolist()
    ends = np.cumsum(widths).tolist()
    return [rows[end - width : end] for end, width in zip(ends, widths, strict=True)]


def _correlated() -> Instance:
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(10, 3)) @ rng.normal(size=(3, 10)) + 0.2 * np.eye(10)
    return build("correlated", [random_data(4, 10, 5, mix=mix)], keep=5)


def _nearly_singular() -> Instance:
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(8, 4)) @ rng.normal(size=(4, 8)) + 1e-3 * np.eye(8)
    return build("nearly_singular", [random_data(6, 8, 4, mix=mix)], keep=3, damp=1e-7)


def _ties() -> Instance:
    data = random_data(7, 8, 3)
    X, W0 = np.repeat(data.X[:, :4], 2, axis=1), np.repeat(data.W0[:4], 2, axis=0)
    return build("ties", [Data(X, X @ W0, W0)], keep=4)


def _dead() -> Instance:
    data = random_data(8, 9, 4)
    X, W0 = data.X.copy(), data.W0.copy()
    X[:, [1, 6]] = 0
    W0[[1, 6]] = 0
    return build("dead", [Data(X, X @ W0, W0)], keep=5)


def _uncentred() -> Instance:
    """Two consumers of six units, with variances that H does not tell."""
    first, second = random_data(23, 6, 3), random_data(24, 12, 2)
    X, Z = first.X + 2 * np.arange(6), second.X - 1
    data = [Data(X, X @ first.W0, first.W0), Data(Z, Z @ second.W0, second.W0)]
    return build("uncentred", data, keep=3, units=[None, 6], variances=True)


def _sparse() -> Instance:
    """Two consumers of five units: the first has no row of one, the second none of three."""
    units = [[[3], [0, 4], [], [1], [2]], [[], [1], [], [0, 2], []]]
    data = [random_data(21, 5, 3, noise=0.4), random_data(22, 3, 4)]
    return build("sparse", data, keep=3, units=units)


def _all() -> list[Instance]:
    blocks = [list(range(3 * j, 3 * j + 3)) for j in range(6)]
    widths = [1, 3, 2, 4, 1, 2]
    two = [random_data(10, 7, 3), random_data(11, 14, 5, noise=0.5)]
    uneven = [random_data(12, 13, 3), random_data(13, 6, 8)]
    return [
        build("scalar", [random_data(0, 9, 4)], keep=4),
        build("target", [random_data(1, 9, 4, noise=1.0)], keep=4),
        build("wide_output", [random_data(2, 6, 20, noise=0.3)], keep=3),
        _correlated(),
        _nearly_singular(),
        _ties(),
        _dead(),
        build("keep_1", [random_data(14, 7, 3)], keep=1),
        build("all_but_1", [random_data(15, 7, 3)], keep=6),
        build("keep_all", [random_data(16, 5, 3, noise=0.2)], keep=5),
        build("blocks", [random_data(17, 18, 4)], keep=3, units=[blocks]),
        build("blocks_keep_1", [random_data(18, 8, 3)], keep=1, units=[4]),
        build("permuted", [random_data(19, 12, 4)], keep=3, units=[shuffled_units(1, [2] * 6)]),
        build("ragged", [random_data(20, 13, 3)], keep=3, units=[shuffled_units(2, widths)]),
        build("two_consumers", two, keep=3, units=[None, 7]),
        build(
            "ragged_consumers", uneven, keep=4, units=[shuffled_units(3, widths), None], damp=0.1
        ),
        _sparse(),
        _uncentred(),
    ]


INSTANCES = {instance.name: instance for instance in _all()}
