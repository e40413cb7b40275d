"""How this process was launched: by itself, or with others, as torchrun does.

Nothing here needs torch, which takes a second to import, so that the command line can ask.
"""

from __future__ import annotations

import os

from osscar.base.errors import RanksError

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and launchers like it, say to each process."""

_MOST = 2**31
"""No launch has as many processes."""


def launched() -> tuple[int, int]:
    """Return which rank this process was launched as, and how many there are: (0, 1) if none.

    What a launcher says that is no such thing is a RanksError.
    """
    if any(name not in os.environ for name in _LAUNCHED):
        return 0, 1
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        rank = size = -1
    if not 0 <= rank < size < _MOST:
        raise RanksError(
            f"RANK is {os.environ['RANK']!r} and WORLD_SIZE {os.environ['WORLD_SIZE']!r}; launch "
            "with torchrun, or unset them"
        )
    return rank, size


def neighbours() -> int:
    """Return how many processes of this launch share this machine, this one among them."""
    size = launched()[1]
    try:
        return min(max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))), size)
    except ValueError:
        return 1
