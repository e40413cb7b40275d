"""Timing side by side.

Other work on a machine slows it down for seconds at a time. What is to be compared therefore takes
turns within every repetition, in an order that is reversed from one to the next, and medians are
taken. A ratio of two medians then says more about what is timed than about the moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from osscar.base.progress import stage

WORTHWHILE_SECONDS = 2.0
"""Fast models are timed more often than asked, for so long."""


def take_turns(
    timings: Sequence[Callable[[], list[float]]],
    repetitions: int,
    description: str,
    *,
    worthwhile: float | None = None,
) -> list[list[float]]:
    """Collect the seconds that each timing reports, over as many repetitions as are worth it.

    Parameters
    ----------
    timings
        Each runs one model once and returns the seconds of the steps that it took.
    repetitions
        The least number of turns.
    description
        What a progress bar says.
    worthwhile
        Seconds over which turns are taken at the least; by default `WORTHWHILE_SECONDS`.

    Returns
    -------
    list of list of float
        Seconds, in the order of the timings.
    """
    seconds: list[list[float]] = [[] for _ in timings]
    for timing in timings:
        timing()  # warm-up: allocations, thread pools, kernels chosen at first use
    least = WORTHWHILE_SECONDS if worthwhile is None else worthwhile
    order = list(range(len(timings)))
    began, done = time.perf_counter(), 0
    with stage(description) as bar:
        while done < repetitions or time.perf_counter() - began < least:
            for turn in order:
                seconds[turn] += timings[turn]()
            order.reverse()
            done += 1
            bar.advance()
    return seconds
