"""The order in which a walk measures groups, and how often the batches set out for that."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from graph import CouplingGroup
from graph.tracing.patches import shapes_alone
from graph.tracing.preserve import caches_kept, preserved
from osscar.base.errors import ModelError
from osscar.base.memory import attempt
from osscar.consumers.layers import reads
from osscar.data.reader import Batch
from osscar.network.model_state import ModelState, PassState
from osscar.network.modules import forward
from osscar.preparation.failures import failures_named


@dataclass(frozen=True, eq=False)
class Schedule:
    """At which calls each group is measured."""

    calls: tuple[str, ...]
    """The modules that are watched, in the order of their calls."""
    measured: Mapping[str, tuple[int, ...]]
    """By group, at which of the calls it is measured."""
    rounds: tuple[tuple[CouplingGroup, ...], ...]
    """The groups that are measured together, in the order in which they are first read."""
    in_turn: bool
    """Whether each group is committed before the next is measured."""

    @classmethod
    def of(
        cls,
        groups: Sequence[CouplingGroup],
        consumers: Mapping[str, Collection[str]],
        calls: Sequence[str],
        *,
        in_turn: bool,
    ) -> Schedule:
        """Order the groups, given the modules that read each, and the calls of one batch.

        A `ModelError` is raised if a consumer is never called.
        """
        for name in itertools.chain(*consumers.values()):
            if name not in calls:
                raise ModelError(
                    f"{name!r} was never called on the calibration data, so that it "
                    "cannot be refitted; give inputs that reach it"
                )
        measured = {
            group.name: tuple(i for i, name in enumerate(calls) if name in consumers[group.name])
            for group in groups
        }
        order = tuple(sorted(groups, key=lambda group: measured[group.name][0]))
        rounds = tuple((group,) for group in order) if in_turn else (order,)
        return cls(tuple(calls), measured, rounds, in_turn)

    @cached_property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """The first round of each pass, and the last call it reaches, should all be committed."""
        found: list[tuple[int, int]] = []
        at = len(self.calls)
        for index, groups in enumerate(self.rounds):
            own = sorted(itertools.chain(*(self.measured[group.name] for group in groups)))
            first = index if own[0] < at else found.pop()[0]
            found.append((first, own[-1]))
            # Batches have passed the first of several calls through weights that are no longer.
            at = len(self.calls) if self.in_turn and len(own) > 1 else own[-1]
        return tuple(found)

    def sets_out_after(self, group: CouplingGroup) -> bool:
        """Whether the batches set out again after a group, should all be committed."""
        index = next(i for i, groups in enumerate(self.rounds) if group in groups)
        return self.passes[-1][0] > index


def learned_calls(
    model: nn.Module, example: Batch, batch: Batch, names: Collection[str]
) -> tuple[list[str], PassState]:
    """Return which of some modules a batch calls, in order, and what passes write on modules."""
    first = ModelState(model)
    with first.watching():
        _called(model, example, names)
    state = ModelState(model, first.written)
    # Tensors without values may be written, also where the example writes nothing.
    with state.watching(), preserved(model):
        seen = _called_on_shapes(model, batch, names)
    state.put_back()
    return seen, state.passing()


def _called_on_shapes(model: nn.Module, batch: Batch, names: Collection[str]) -> list[str]:
    """Return the calls on a batch of this shape, computing nothing where that is possible."""
    with failures_named(model, 0):
        with (
            attempt(),  # code that looks at values, or that has no shape function
            caches_kept(model),
            shapes_alone(FakeTensorMode(allow_non_fake_inputs=True)) as fake,
        ):
            return _called(model, {name: fake.from_tensor(x) for name, x in batch.items()}, names)
        return _called(model, batch, names)


def _called(model: nn.Module, batch: Batch, names: Collection[str]) -> list[str]:
    calls: list[str] = []

    def see(name: str, _: Any) -> None:
        calls.append(name)

    with torch.no_grad(), reads(model, names, see):
        forward(model, batch)
    return calls
