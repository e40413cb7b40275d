"""Passes in which only shapes are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import FakeTensorMode

from graph.tracing.patches import shapes_alone


@contextmanager
def on_shapes(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Compute shapes alone while the block runs.

    What an operator refuses is raised; torch's logger, which prints the traceback besides, is
    silent.

    Parameters
    ----------
    mode
        The mode to be in; by default a new one.
    """
    with shapes_alone(mode or FakeTensorMode(allow_non_fake_inputs=True)) as fake:
        yield fake
