"""Seconds that follow from what was measured at smaller sizes, and how far they may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scaled:
    """Seconds that follow from a probe, and between which they are.

    Parameters
    ----------
    seconds, low, high
        What is expected, and how far it may be off; `high` is infinite where nothing bounds it.
    """

    seconds: float
    low: float
    high: float

    def plus(self, other: Scaled) -> Scaled:
        """Return what both take together."""
        seconds = self.seconds + other.seconds
        return Scaled(seconds, self.low + other.low, self.high + other.high)

    def times(self, count: float) -> Scaled:
        """Return what so many times as much takes."""
        return Scaled(self.seconds * count, self.low * count, self.high * count)

    @classmethod
    def certain(cls, seconds: float, spread: float = 0.1) -> Scaled:
        """Return what was measured as it comes."""
        return cls(seconds, seconds * (1 - spread), seconds * (1 + spread))

    @classmethod
    def along(cls, rows: int, found: Sequence[tuple[int, float]], spread: float) -> Scaled:
        """Return the seconds for p rows of what was measured at one or two smaller sizes.

        Parameters
        ----------
        rows
            p.
        found
            Pairs of sizes and seconds, ascending; the last may be p itself.
        spread
            Share by which what was measured may be off, since no two layers are alike.
        """
        size, seconds = found[-1]
        growth = rows / size
        low, high = seconds * growth**2, seconds * growth**3
        expected = low
        if len(found) > 1 and growth > 1:
            t, ratio = found[0][1], found[0][0] / size
            # a + b = seconds and a ratio^2 + b ratio^3 = t, for sizes relative to the larger one.
            b = (seconds * ratio**2 - t) / (ratio**2 - ratio**3) if ratio < 1 else 0.0
            b = min(max(b, 0.0), seconds)
            expected = (seconds - b) * growth**2 + b * growth**3
        return cls(expected, low * (1 - spread), high * (1 + spread))
