"""What kind a group is, and the name by which people know it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from graph.groups import Role, Slot, UnitKind
from graph.propagate import Propagation

Factor = tuple[int, bool]
"""How an axis stands to the prunable one with which it makes up a dimension: that one, and whether
its units lie inside this axis, not the other way round."""


class Naming:
    """Names for all groups at once, so that each is unique.

    A group is called after the innermost module that holds all of it (``mlp.neurons``).  Where
    several groups would get the same name, each is called after the owner of its first producer.

    propagation: Tells which axes attention runs over, and which operators were called.
    slots: The slots of each group, by axis.
    factors: How an axis stands to another one that was preferred to it.
    """

    def __init__(
        self,
        propagation: Propagation,
        slots: Mapping[int, Sequence[Slot]],
        factors: Mapping[int, Factor],
    ) -> None:
        self._slots = slots
        self._factors = factors
        self._targets = {operator.order: operator.target for operator in propagation.operators}
        self._heads: dict[int, str] = {}
        for layout, module in propagation.findings.heads:
            for axis in propagation.axes.leaves(layout):
                self._heads.setdefault(axis, module)
        self._producing: dict[str, set[tuple[int, int]]] = {}
        for axis, own in slots.items():
            for slot in own:
                if slot.role is Role.PRODUCER:
                    self._producing.setdefault(slot.tensor, set()).add((slot.dim, axis))
        self.kinds = {axis: self._kind(axis) for axis in slots}
        self.names = self._unique()

    def _kind(self, axis: int) -> UnitKind:
        slots = self._slots[axis]
        produced = [slot.order for slot in slots if slot.role is Role.PRODUCER]
        consumed = [slot.order for slot in slots if slot.role is Role.CONSUMER]
        if axis in self._factors or not produced or not consumed:
            return UnitKind.OTHER
        # A head of one row is a gate that code multiplies by as if it were one.
        beside = self._made_beside(axis)
        if axis in self._heads and (beside or any(slot.width > 1 for slot in slots)):
            return UnitKind.HEADS
        if any(other in self._heads for other in beside):
            return UnitKind.OTHER
        if any("conv" in self._targets[slot.order] for slot in slots):
            return UnitKind.CHANNELS
        # What is read and then written again is a residual stream.
        embedded = all("embedding" in self._targets[order] for order in produced)
        if embedded or min(consumed) <= max(produced):
            return UnitKind.HIDDEN
        return UnitKind.NEURONS

    def _made_beside(self, axis: int) -> set[int]:
        """Return the axes that the same tensors produce in other dimensions.

        These are heads and their width, where a weight has a dimension for each.
        """
        places = {(s.tensor, s.dim) for s in self._slots[axis] if s.role is Role.PRODUCER}
        tensors = {tensor for tensor, _ in places}
        return {
            other
            for tensor in tensors
            for dim, other in self._producing.get(tensor, ())
            if (tensor, dim) not in places
        }

    def _unique(self) -> dict[int, str]:
        preferred = {axis: self._name(axis, self._home(axis)) for axis in self._slots}
        shared = Counter(preferred.values())
        taken: Counter[str] = Counter()
        names: dict[int, str] = {}
        for axis, name in preferred.items():
            if shared[name] > 1 and axis not in self._factors:
                name = self._name(axis, self._first(axis))
            taken[name] += 1
            names[axis] = name if taken[name] == 1 else f"{name}.{taken[name]}"
        return names

    def _name(self, axis: int, module: str) -> str:
        return ".".join(part for part in (module, self._word(axis)) if part)

    def _word(self, axis: int) -> str:
        """Return the last part of a name."""
        if self.kinds[axis] is not UnitKind.OTHER:
            return self.kinds[axis].value
        factor = self._factors.get(axis)
        if factor is not None:
            lead, outer = factor
            return f"{self._word(lead)}.{'outer' if outer else 'inner'}"
        produced = any(slot.role is Role.PRODUCER for slot in self._slots[axis])
        return "outputs" if produced else "inputs"

    def _home(self, axis: int) -> str:
        """Find the module that a group is preferably called after."""
        axis = self._factors[axis][0] if axis in self._factors else axis
        if self.kinds[axis] is UnitKind.HEADS:
            return self._heads[axis]
        if self.kinds[axis] in (UnitKind.NEURONS, UnitKind.HIDDEN):
            return _common(slot.module for slot in self._slots[axis])
        return self._first(axis)

    def _first(self, axis: int) -> str:
        """Find the owner of the first producer, or of the first slot if there is none."""
        slots = self._slots[axis]
        slot = next((slot for slot in slots if slot.role is Role.PRODUCER), slots[0])
        return slot.tensor.rpartition(".")[0]


def _common(modules: Iterable[str]) -> str:
    """Find the innermost module that contains all the given ones."""
    paths = [module.split(".") for module in modules]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
