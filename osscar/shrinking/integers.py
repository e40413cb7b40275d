"""Numbers that modules keep under names that nobody knows: found by trial, accepted by proof.

A number that equals a size of a group which touches its module is a candidate.  Which candidates
follow is not guessed: a set of them is accepted only if the shrunk model then computes what the
masked one does.  Where that takes more numbers than are tried at once, those follow first that let
a forward pass come furthest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graph.tracing.export import failing_module
from osscar.base.errors import EquivalenceError
from osscar.base.memory import let_shortage_pass
from osscar.proof.equivalence import ROWS_OF_16_BYTES, Match, explained
from osscar.proof.plan import GroupPlan, Integer, PruningPlan
from osscar.shrinking.follow import is_list, nearby

_MOST_AT_ONCE = 2
_MOST_ATTEMPTS = 1000
"""Forward passes of one search: sets of many numbers are more than anyone would wait for."""
_MOST_STEPS = 8
"""In which numbers follow that do not suffice by themselves."""

_NEVER_COUNTS = (
    r"strides?|dilations?|kernel_sizes?|output_padding|(up|down)?scale_factor|.*_factor|"
    r"(start|end)_dim|(.*_)?(idx|index|token_id)|layer_(id|no)|(.*_)?eps|seed"
)
_OF_LAYERS = rf"{_NEVER_COUNTS}|paddings?|output_size|dim"
"""Names of numbers that never count units, in any module and in layers of torch (and what derives
from them).  Any other module may call `padding` what it adds to the channels."""


_Sizes: TypeAlias = int | tuple[int, ...]

_Number: TypeAlias = tuple[str, int | None]
"""The name of an attribute, and in a tuple the position."""


@dataclass
class IntegerSearch:
    """Lets numbers of modules follow until a check of the shrunk model passes.

    `check` proves the model, which is sliced already, and returns how far it is off.
    """

    model: nn.Module
    plan: PruningPlan
    check: Callable[[], Match]
    found: dict[tuple[str, str], _Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attempts = 0
        self.refusal: Exception | None = None
        self.near: dict[str, list[GroupPlan]] = {}
        for group in self.plan.groups:
            for name in nearby(self.model, group):
                self.near.setdefault(name, []).append(group)

    def run(self) -> tuple[Match, tuple[Integer, ...]]:
        """Prove, and as long as a module fails, let its numbers follow.

        Return what `check` returned in the end, and the numbers that had to be found.
        """
        outcome = self._attempt()
        for _ in range(_MOST_STEPS):
            if isinstance(outcome, Match):
                break
            outcome = self._mended(outcome)
        if not isinstance(outcome, Match):
            raise self._said(outcome)
        return outcome, tuple(Integer(*place, value) for place, value in self.found.items())

    def _attempt(self) -> Match | Exception:
        try:
            return self.check()
        except Exception as error:  # whatever the user's forward raises when sizes do not fit
            let_shortage_pass(error)
            return error

    def _counted(self) -> tuple[Match | Exception, int]:
        """Return the outcome of an attempt, and after how many calls of operators."""
        with _Calls() as calls:
            outcome = self._attempt()
        return outcome, calls.number

    def _mended(self, failure: Exception) -> Match | Exception:
        """Return the outcome of the first set of candidates that gets past a failure.

        If none does, that of the set which comes furthest.
        """
        if ROWS_OF_16_BYTES in str(failure):  # of numbers that did follow
            raise explained(failure, self.model) from failure
        culprit = self._culprit(failure)
        furthest: tuple[type[nn.Module], tuple[_Number, ...]] | None = None
        _, most = self._counted()
        for kind, names in self._candidates(culprit):
            self.attempts += 1
            if self.attempts > _MOST_ATTEMPTS:
                break
            before = self._follow(kind, names)
            outcome, calls = self._counted()
            if isinstance(outcome, Match) or self._is_past(outcome, culprit):
                self.refusal = None
                return self._attempt()  # as it runs when nobody counts
            if culprit is not None and calls > most:
                furthest, most = (kind, names), calls
            for (name, attribute), value in before.items():
                setattr(self.model.get_submodule(name), attribute, value)
                del self.found[name, attribute]
        said = self._said(failure)
        if furthest is None:
            raise said
        self._follow(*furthest)
        return self._attempt()

    def _said(self, failure: Exception) -> Exception:
        """Return what is said in the end: of the failure before numbers followed in vain."""
        if self.refusal is None:
            self.refusal = failure
            if not isinstance(failure, EquivalenceError):
                self.refusal = explained(failure, self.model)
                self.refusal.__cause__ = failure
        return self.refusal

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

    def _candidates(
        self, culprit: str | None
    ) -> Iterator[tuple[type[nn.Module], tuple[_Number, ...]]]:
        """Yield classes with the names of numbers in them, the likeliest and fewest first."""
        places = dict.fromkeys((*_upwards(culprit), *self.near))
        names: dict[type[nn.Module], dict[_Number, None]] = {}
        for name in places:
            own = names.setdefault(self._kind(name), {})
            own.update(dict.fromkeys(self._following(name)))
        for kind, attributes in names.items():
            for count in range(1, _MOST_AT_ONCE + 1):
                for chosen in combinations(attributes, count):
                    yield kind, chosen

    def _following(self, name: str) -> dict[_Number, int]:
        """Return the numbers of a module that may follow, with what they would become."""
        sizes: dict[int, int] = {}
        for group in self._groups_of(name):
            sizes[group.units] = len(group.kept)
            for slot in group.slots:
                old = slot.units * slot.width
                sizes[old] = group.scaled(old)
        sizes = {**self._of_tensors(name), **sizes}
        numbers = _numbers(self.model.get_submodule(name))
        return {
            number: sizes[value]
            for number, value in numbers.items()
            if value in sizes and self._may_count(name, number[0])
        }

    def _groups_of(self, name: str) -> Sequence[GroupPlan]:
        """Return the groups whose sizes a module may keep.

        Those near it, else those that lie in it; a module without any tensor, such as
        `torch.nn.Unflatten`, is near no group, so that any may be meant.
        """
        if name in self.near:
            return self.near[name]
        if next(self.model.get_submodule(name).parameters(), None) is None:
            return self.plan.groups
        within = f"{name}." if name else ""
        return [
            group
            for group in self.plan.groups
            if any(slot.tensor.startswith(within) for slot in group.slots)
        ]

    def _of_tensors(self, name: str) -> dict[int, int]:
        """Return sizes of tensors near a module that have lost units, and what became of them.

        They may be those of several slots together, and may hold more than units.
        """
        cut: dict[tuple[str, int], tuple[int, int]] = {}
        for group in self.near.get(name, ()):
            for slot in group.slots:
                if is_list(slot):
                    continue
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
        self, kind: type[nn.Module], numbers: tuple[_Number, ...]
    ) -> dict[tuple[str, str], _Sizes]:
        """Let some numbers follow in every module of a class; return what they were."""
        before: dict[tuple[str, str], _Sizes] = {}
        for name, module in list(self.model.named_modules()):
            if type(module) is not kind:
                continue
            following = self._following(name)
            for key, position in numbers:
                if (key, position) not in following:
                    continue
                old = getattr(module, key)
                new = _with(old, position, following[key, position])
                with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # it refuses
                    setattr(module, key, new)
                    before.setdefault((name, key), old)
                    self.found[name, key] = new
        return before


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of operators; layers take the path that they take without it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
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


def _numbers(module: nn.Module) -> dict[_Number, int]:
    """Return the whole numbers that are attributes of a module, or entries of tuples there."""
    found: dict[_Number, int] = {}
    for key, value in vars(module).items():
        if type(value) is int:
            found[key, None] = value
        elif type(value) in (tuple, torch.Size) and all(type(size) is int for size in value):
            found |= {(key, position): size for position, size in enumerate(value)}
    return found


def _with(value: Any, position: int | None, new: int) -> _Sizes:
    """Return a number, or a tuple with another one at a position."""
    return new if position is None else (*value[:position], new, *value[position + 1 :])
