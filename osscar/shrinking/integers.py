"""Numbers that modules keep under names that nobody knows: found by trial, accepted by proof.

A number that equals a size of a group which touches its module is a candidate.  Which candidates
follow is not guessed: a set of them is accepted only if the shrunk model then computes what the
masked one does.  Where that takes more numbers than are tried at once, those follow first that let
a forward pass come furthest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeAlias

from torch import nn
from torch.overrides import TorchFunctionMode

from graph.export import failing_module
from osscar.core.errors import EquivalenceError
from osscar.core.memory import let_shortage_pass
from osscar.shrinking.equivalence import ROWS_OF_16_BYTES, explained
from osscar.shrinking.follow import nearby
from osscar.shrinking.plan import GroupPlan, Integer, PruningPlan

_MOST_AT_ONCE = 3

_NEVER_COUNTS = (
    r"strides?|dilations?|kernel_sizes?|output_padding|(up|down)?scale_factor|.*_factor|"
    r"(start|end)_dim|(.*_)?(idx|index|token_id)|layer_(id|no)|(.*_)?eps|seed"
)
_OF_LAYERS = rf"{_NEVER_COUNTS}|paddings?|output_size|dim"
"""Names of numbers that never count units, in any module and in layers of torch (and what derives
from them).  Any other module may call `padding` what it adds to the channels."""


_Sizes: TypeAlias = int | tuple[int, ...]


@dataclass
class IntegerSearch:
    """Lets numbers of modules follow until a check of the shrunk model passes.

    Parameters
    ----------
    model
        Already sliced; changed in place.
    plan
        What was removed.
    check
        Proves the model, and returns how far it is off.
    """

    model: nn.Module
    plan: PruningPlan
    check: Callable[[], float]
    found: dict[tuple[str, str], _Sizes] = field(default_factory=dict)
    calls: int = 0
    """Of functions of torch in the last attempt, before it failed: how far it has come."""

    def __post_init__(self) -> None:
        self.refusal: Exception | None = None
        self.near: dict[str, list[GroupPlan]] = {}
        for group in self.plan.groups:
            for name in nearby(self.model, group):
                self.near.setdefault(name, []).append(group)

    def run(self) -> tuple[float, tuple[Integer, ...]]:
        """Prove, and as long as a module fails, let its numbers follow.

        Returns
        -------
        tuple of float and tuple of Integer
            What `check` returned in the end, and the numbers that had to be found.

        Raises
        ------
        EquivalenceError
            If no numbers help; `AdapterError` if a module cannot follow.
        """
        outcome = self._attempt()
        while not isinstance(outcome, float):
            outcome = self._mended(outcome, self.calls)
        return outcome, tuple(Integer(*place, value) for place, value in self.found.items())

    def _attempt(self) -> float | Exception:
        counted = _Calls()
        try:
            with counted:
                return self.check()
        except Exception as error:  # whatever the user's forward raises when sizes do not fit
            let_shortage_pass(error)
            return error
        finally:
            self.calls = counted.number

    def _mended(self, failure: Exception, calls: int) -> float | Exception:
        """Return the outcome of the first set of candidates that gets past a failure.

        If none does, that of the set which comes furthest.
        """
        if ROWS_OF_16_BYTES in str(failure):  # of numbers that did follow
            raise explained(failure, self.model) from failure
        culprit = self._culprit(failure)
        furthest: tuple[type[nn.Module], tuple[str, ...]] | None = None
        for kind, names in self._candidates(culprit):
            before = self._follow(kind, names)
            outcome = self._attempt()
            if isinstance(outcome, float) or self._is_past(outcome, culprit):
                self.refusal = None
                return outcome
            if culprit is not None and self.calls > calls:
                furthest, calls = (kind, names), self.calls
            for (name, attribute), value in before.items():
                setattr(self.model.get_submodule(name), attribute, value)
                del self.found[name, attribute]
        if self.refusal is None:  # what is said in the end, before numbers followed in vain
            blamed = isinstance(failure, EquivalenceError)
            self.refusal = failure if blamed else explained(failure, self.model)
        if furthest is None:
            raise self.refusal from failure
        self._follow(*furthest)
        return self._attempt()

    def _culprit(self, failure: Exception) -> str | None:
        """Return the name of the module that failed; None if only the outputs were wrong."""
        if isinstance(failure, EquivalenceError):
            return None
        return failing_module(failure.__traceback__, self.model)

    def _is_past(self, outcome: Exception, culprit: str | None) -> bool:
        """Whether another class fails now, and none whose numbers were changed."""
        later = self._culprit(outcome)
        if later is None or culprit is None:
            return False
        changed = {self._kind(name) for name, _ in self.found}
        return self._kind(later) not in changed | {self._kind(culprit)}

    def _kind(self, name: str) -> type[nn.Module]:
        return type(self.model.get_submodule(name))

    def _candidates(self, culprit: str | None) -> Iterator[tuple[type[nn.Module], tuple[str, ...]]]:
        """Yield classes with the names of numbers in them, the likeliest and fewest first."""
        places = dict.fromkeys((*_upwards(culprit), *self.near))
        names: dict[type[nn.Module], dict[str, None]] = {}
        for name in places:
            own = names.setdefault(self._kind(name), {})
            own.update(dict.fromkeys(self._following(name)))
        for kind, attributes in names.items():
            for count in range(1, _MOST_AT_ONCE + 1):
                for chosen in combinations(attributes, count):
                    yield kind, chosen

    def _following(self, name: str) -> dict[str, _Sizes]:
        """Return the numbers of a module that may follow, with what they would become.

        Modules without tensors, such as `torch.nn.Unflatten`, are near no group, so that any may
        be meant.
        """
        sizes: dict[int, int] = {}
        for group in self.near.get(name, self.plan.groups):
            sizes[group.units] = len(group.kept)
            for slot in group.slots:
                old = slot.units * slot.width
                sizes[old] = group.scaled(old)
        sizes = {**self._of_tensors(name), **sizes}
        return {
            key: new
            for key, value in vars(self.model.get_submodule(name)).items()
            if self._may_count(name, key) and (new := _resized(value, sizes)) is not None
        }

    def _of_tensors(self, name: str) -> dict[int, int]:
        """Return sizes of tensors near a module that have lost units, and what became of them.

        They may be those of several slots together, and may hold more than units.
        """
        cut: dict[tuple[str, int], tuple[int, int]] = {}
        for group in self.near.get(name, ()):
            for slot in group.slots:
                place = slot.tensor, slot.dim
                old, new = cut.get(place, (0, 0))
                cut[place] = old + slot.units * slot.width, new + len(group.kept) * slot.width
        sizes: dict[int, int] = {}
        for (tensor, dim), (old, new) in cut.items():
            now = self._shape(tensor)[dim]
            sizes |= {now - new + old: now, old: new}
        return sizes

    def _shape(self, tensor: str) -> tuple[int, ...]:
        module, _, attribute = tensor.rpartition(".")
        return tuple(getattr(self.model.get_submodule(module), attribute).shape)

    def _may_count(self, name: str, key: str) -> bool:
        """Whether a number may be one of units, and does not follow yet."""
        layer = any(
            kind is not nn.Module and kind.__module__.startswith("torch.nn.")
            for kind in self._kind(name).__mro__
        )
        never = _OF_LAYERS if layer else _NEVER_COUNTS
        return (name, key) not in self.found and not re.fullmatch(never, key)

    def _follow(
        self, kind: type[nn.Module], names: tuple[str, ...]
    ) -> dict[tuple[str, str], _Sizes]:
        """Let some numbers follow in every module of a class; return what they were."""
        before: dict[tuple[str, str], _Sizes] = {}
        for name, module in list(self.model.named_modules()):
            if type(module) is not kind:
                continue
            following = self._following(name)
            for key in names:
                if key in following:
                    before[name, key] = getattr(module, key)
                    setattr(module, key, following[key])
                    self.found[name, key] = following[key]
        return before


class _Calls(TorchFunctionMode):
    """Counts the calls of functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _upwards(name: str | None) -> Iterator[str]:
    """Yield the name of a module and of those around it, which may hand numbers down to it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    if name == "":
        yield name


def _resized(value: object, sizes: Mapping[int, int]) -> _Sizes | None:
    """Return a number, or a tuple of them, with what follows changed; None if nothing does."""
    if type(value) is int:
        return sizes.get(value)
    if not isinstance(value, tuple) or any(type(size) is not int for size in value):
        return None
    new = tuple(sizes.get(size, size) for size in value)
    return None if new == value else new
