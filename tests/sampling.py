"""Which cases of a long matrix always run."""

from __future__ import annotations

from collections.abc import Sequence, Set

import pytest


def values_of(item: pytest.Item) -> Set[tuple[str, int]]:
    """Return which value each parameter of a case has, as the object that it is."""
    call = getattr(item, "callspec", None)
    return set() if call is None else {(name, id(value)) for name, value in call.params.items()}


def sample(cases: Sequence[Set[tuple[str, int]]], count: int) -> list[int]:
    """Return the places of some cases, in which as many values as can be are met.

    Of those that meet as many new values, the one that is farthest from the others.
    """
    chosen: list[int] = []
    met: set[tuple[str, int]] = set()
    for _ in range(min(count, len(cases))):
        best = max(
            (place for place in range(len(cases)) if place not in chosen),
            key=lambda i: (len(cases[i] - met), min((abs(i - j) for j in chosen), default=-i), -i),
        )
        chosen.append(best)
        met |= cases[best]
    return chosen
