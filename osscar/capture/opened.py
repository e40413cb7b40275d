"""A model made ready for the walk: copied, prepared, traced, tried out; once, for every command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import graph
from graph import CouplingGroup
from osscar.capture.linear_maps import expose_attention, freeze_unreadable
from osscar.core.errors import CalibrationError
from osscar.core.modules import check_finite_weights, check_usable, copied, without_cache
from osscar.data.batches import Batch, ModelInputs, as_inputs
from osscar.shrinking.follow import prepare


@dataclass(frozen=True, eq=False)
class Opened:
    """A model with its calibration data, ready to be walked through.

    Parameters
    ----------
    model
        A copy in evaluation mode, on its device; it computes what the user's model does.
    inputs
        The calibration data in the form that it reads.
    traced
        Its dependency graph.
    groups
        The coupling groups; those that cannot be refitted are frozen and say why.
    example
        Small inputs with which it was traced.
    batch_size
        Samples in a batch.
    """

    model: nn.Module
    inputs: ModelInputs
    traced: graph.DependencyGraph
    groups: tuple[CouplingGroup, ...]
    example: Batch = field(repr=False)
    batch_size: int

    @property
    def residual(self) -> frozenset[str]:
        """Names of the groups that are residual streams."""
        return graph.residual_groups(self.traced)

    def batches(self) -> list[Batch]:
        """Return the calibration data, keyword arguments of the model, on its device."""
        return self.inputs.batches(self.model, self.batch_size)


@contextmanager
def opened(
    model: nn.Module,
    calibration: Any,
    *,
    device: torch.device | None = None,
    batch_size: int | None = None,
    heads: bool = True,
) -> Iterator[Opened]:
    """Open a model for pruning, for a study, or to be looked at; without gradients meanwhile.

    Parameters
    ----------
    model
        Any model; not changed.
    calibration
        As `osscar.prune` takes it.
    device
        Where it is to run; by default where it is.
    batch_size
        Samples in a batch; by default 8 windows of tokens, or 64 of anything else.
    heads
        Whether fused attention is to call its output layer as a module, so that heads can be
        refitted.

    Raises
    ------
    ModelError
        If the model has no weights or cannot be copied.
    NonFiniteError
        If a weight is not finite.
    CalibrationError
        If the model cannot read the calibration data.
    graph.GraphError
        If it cannot be traced.
    """
    check_usable(model)
    check_finite_weights(model)
    inputs = as_inputs(model, calibration)
    work = copied(model)
    if device is not None:
        work = work.to(device)
    work.eval()
    with without_cache(work), torch.no_grad():
        prepare(work)
        if heads:
            expose_attention(work)
        example = inputs.example(work)
        traced = graph.trace(work, example)
        _check_runs(work, example)
        yield Opened(
            model=work,
            inputs=inputs,
            traced=traced,
            groups=freeze_unreadable(work, traced.groups),
            example=example,
            batch_size=inputs.batch_size if batch_size is None else batch_size,
        )


def _check_runs(model: nn.Module, example: Mapping[str, Any]) -> None:
    """Run the model once: tracing looks at shapes, and lets through what kernels refuse."""
    try:
        model(**example)
    except Exception as error:  # the model may be anyone's code
        forms = ", ".join(f"{n} {t.dtype} {tuple(t.shape)}" for n, t in example.items())
        raise CalibrationError(
            f"{type(model).__name__} fails on the calibration data ({forms}): "
            f"{type(error).__name__}: {error}; give data of the form and type that it reads"
        ) from error
