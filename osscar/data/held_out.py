"""How many samples are held out: no weight is fitted to them, and choices are made on them.

Pruning chooses the damping of each layer on the last of its samples, and reports the divergence
there; a recovery chooses the step that it keeps.
"""

from __future__ import annotations

_ONE_IN = 8
_FEWEST = 4
"""With fewer samples, all are needed for the fit."""


def held_out(samples: int, most: int | None = None) -> int:
    """Return how many samples are held out: one in eight, at least one; none of fewer than four."""
    if samples < _FEWEST:
        return 0
    share = max(1, samples // _ONE_IN)
    return share if most is None else min(share, most)
