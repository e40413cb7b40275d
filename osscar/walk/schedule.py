"""The order in which a walk measures groups, and how often the batches set out for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from graph import CouplingGroup
from osscar.base.errors import ModelError

Call: TypeAlias = tuple[str, tuple[int, int]]
"""The name of a module, and what tells the tensor that it reads from others, and from itself after
a write."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """At which calls each group is measured.

    Parameters
    ----------
    calls
        The modules that are watched, in the order of their calls.
    measured
        By group, at which of the calls it is measured.
    rounds
        The groups that are measured together, in the order in which they are first read.
    same_tensor
        Of calls that read one tensor, of which the first alone is measured, that call.
    in_turn
        Whether each group is committed before the next is measured.
    """

    calls: tuple[str, ...]
    measured: Mapping[str, tuple[int, ...]]
    rounds: tuple[tuple[CouplingGroup, ...], ...]
    same_tensor: Mapping[int, int]
    in_turn: bool

    @classmethod
    def of(
        cls,
        groups: Sequence[CouplingGroup],
        consumers: Mapping[str, Collection[str]],
        calls: Sequence[Call],
        *,
        in_turn: bool,
        outputs: bool,
    ) -> Schedule:
        """Order the groups.

        Parameters
        ----------
        groups, consumers
            The groups, and the modules that read them, by group.
        calls
            Those of one batch.
        in_turn
            Whether each group is committed before the next is measured.
        outputs
            Whether what each consumer puts out is needed; if not, one call of several that read the
            same tensor tells all.

        Raises
        ------
        ModelError
            If a consumer is never called.
        """
        called = {name for name, _ in calls}
        for name in (name for names in consumers.values() for name in names):
            if name not in called:
                raise ModelError(
                    f"{name!r} was never called on the calibration data, so that it "
                    "cannot be refitted; give inputs that reach it"
                )
        measured: dict[str, tuple[int, ...]] = {}
        same_tensor: dict[int, int] = {}
        for group in groups:
            own = [i for i, (name, _) in enumerate(calls) if name in consumers[group.name]]
            names, tensors = ({calls[i][part] for i in own} for part in (0, 1))
            if not outputs and len(names) == len(own) > 1 and len(tensors) == 1:
                same_tensor.update(dict.fromkeys(own, own[0]))
                own = own[:1]
            measured[group.name] = tuple(own)
        order = tuple(sorted(groups, key=lambda group: measured[group.name][0]))
        rounds = tuple((group,) for group in order) if in_turn else (order,)
        return cls(tuple(name for name, _ in calls), measured, rounds, same_tensor, in_turn)

    @cached_property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """The first round of each pass, and the last call it reaches, should all be committed."""
        found: list[tuple[int, int]] = []
        at = len(self.calls)
        for index, groups in enumerate(self.rounds):
            own = sorted(call for group in groups for call in self.measured[group.name])
            first = index if own[0] < at else found.pop()[0]
            found.append((first, own[-1]))
            # Batches have passed the first of several calls through weights that are no longer.
            at = len(self.calls) if self.in_turn and len(own) > 1 else own[-1]
        return tuple(found)

    def sets_out_after(self, group: CouplingGroup) -> bool:
        """Whether the batches set out again after a group, should all be committed."""
        index = next(i for i, groups in enumerate(self.rounds) if group in groups)
        return self.passes[-1][0] > index
