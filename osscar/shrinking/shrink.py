"""Shrink and prove in one step; where a module keeps a number under an unknown name, find it.

A number that equals a size of a group which touches its module is a candidate.  Which candidates
follow is not guessed: a set of them is accepted only if the shrunk model then computes what the
masked one does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor, nn

from graph.export import failing_module
from osscar.core.errors import EquivalenceError, OsscarError
from osscar.core.modules import evaluating, restored, restored_on_error
from osscar.shrinking.equivalence import (
    ROWS_OF_16_BYTES,
    Inputs,
    cached_outputs,
    explained,
    proof_outputs,
    prove_equal,
)
from osscar.shrinking.follow import nearby, prepare
from osscar.shrinking.lineage import lineage_of, note
from osscar.shrinking.mask import masked
from osscar.shrinking.plan import GroupPlan, Integer, PruningPlan
from osscar.shrinking.slice import shrink

_MOST_AT_ONCE = 3

_NEVER_COUNTS = (
    r"strides?|dilations?|kernel_sizes?|output_padding|(up|down)?scale_factor|.*_factor|"
    r"(start|end)_dim|(.*_)?(idx|index|token_id)|layer_(id|no)|(.*_)?eps|seed"
)
_OF_LAYERS = rf"{_NEVER_COUNTS}|paddings?|output_size|dim"
"""Names of numbers that never count units, in any module and in layers of torch (and what derives
from them).  Any other module may call `padding` what it adds to the channels."""


@dataclass(frozen=True)
class Proof:
    """A model was shrunk, and this is how far it is from the masked one.

    Parameters
    ----------
    plan
        What was removed, with the numbers of modules that had to be found.
    error
        Largest difference between outputs, relative to the largest output.
    """

    plan: PruningPlan
    error: float


def shrink_proved(
    model: nn.Module,
    plan: PruningPlan,
    inputs: Sequence[Inputs],
    *,
    tolerance: float | None = None,
) -> Proof:
    """Remove units from a model, in place, and prove that nothing else has changed.

    Parameters
    ----------
    model
        Changed in place; as it was before if anything fails.
    plan
        What stays.
    inputs
        On which the shrunk model is compared with the masked one, best of more than one size: each
        a tuple of positional arguments or a dict of keyword arguments.
    tolerance
        Largest difference allowed, relative to the largest output; by default that of the number
        format.

    Raises
    ------
    ModelError
        If the plan does not fit the model.
    EquivalenceError
        If the outputs differ; `AdapterError` if a module cannot follow.
    """
    with evaluating(model), restored_on_error(model):
        proof = _Attempt(model, plan, inputs, tolerance)
        try:
            return proof.run()
        except EquivalenceError as error:
            guilty = _Guilty(model, inputs[:1], tolerance).among(plan)
            raise type(error)(f"{error}. {guilty}") from error


class _Attempt:
    """One shrinking of a model in evaluation mode, which is prepared for it and then as before."""

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        inputs: Sequence[Inputs],
        tolerance: float | None,
    ) -> None:
        self.model, self.plan, self.inputs, self.tolerance = model, plan, inputs, tolerance
        with masked(model, plan):  # as it came: whatever is done to it must not change this
            self.expected = proof_outputs(model, inputs)
            self.cached = _cached(model, inputs)
        prepare(model)
        prove_equal(self.expected, self.expected)  # that there is something to compare

    def run(self) -> Proof:
        """Shrink and prove; if that fails, the model is as it was when this was made."""
        with restored_on_error(self.model):
            shrink(self.model, self.plan)
            return _Search(self.model, self.plan, self._check).run()

    def _check(self) -> float:
        found = proof_outputs(self.model, self.inputs)
        error = prove_equal(self.expected, found, tolerance=self.tolerance)
        if not self.cached:
            return error
        found = cached_outputs(self.model, self.inputs[0])
        return max(error, prove_equal(self.cached, found, tolerance=self.tolerance))


def _cached(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Return what a model computes when it keeps keys and values, if it can."""
    try:
        return cached_outputs(model, inputs[0])
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the user's forward raises: it is not the shrunk model's fault
        return []


_MOST_TRIALS = 64
_MOST_SECONDS = 120.0
_MOST_NAMED = 8


class _Guilty:
    """Finds the groups of a refused plan that cannot go, by halving it.

    Each trial shrinks the model, which is in evaluation mode, and restores it.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Inputs], tolerance: float | None) -> None:
        self.model, self.inputs, self.tolerance = model, inputs, tolerance
        self.trials, self.deadline = _MOST_TRIALS, time.monotonic() + _MOST_SECONDS

    def among(self, plan: PruningPlan) -> str:
        """Say which groups they are, and what to do."""
        groups = plan.groups
        names = [group.name for group in (groups if len(groups) == 1 else self._halves(groups))]
        if not names:
            return (
                "No single group is to blame, only several together: leave some of the "
                f"{len(groups)} out of what is pruned (groups= in Python, --skip on the command "
                "line)"
            )
        shown = ", ".join(map(repr, names[:_MOST_NAMED]))
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        them = "them" if len(names) > 1 else "it"
        return (
            f"What fails is {'among ' if self._spent else ''}the pruning of {shown}{more}: leave "
            f"{them} out (a plan or groups= without {them} in Python, --skip {names[0]!r} on the "
            "command line)"
        )

    @property
    def _spent(self) -> bool:
        return self.trials <= 0 or time.monotonic() > self.deadline

    def _halves(self, groups: Sequence[GroupPlan]) -> list[GroupPlan]:
        middle = len(groups) // 2
        return [*self._failing(groups[:middle]), *self._failing(groups[middle:])]

    def _failing(self, groups: Sequence[GroupPlan]) -> list[GroupPlan]:
        if self._spent:
            return list(groups)  # not cleared
        self.trials -= 1
        try:
            with restored(self.model):
                plan = PruningPlan(tuple(groups))
                _Attempt(self.model, plan, self.inputs, self.tolerance).run()
        except OsscarError:
            return list(groups) if len(groups) == 1 else self._halves(groups)
        return []


_Sizes: TypeAlias = int | tuple[int, ...]


@dataclass
class _Search:
    model: nn.Module
    plan: PruningPlan
    check: Callable[[], float]
    found: dict[tuple[str, str], _Sizes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.near: dict[str, list[GroupPlan]] = {}
        for group in self.plan.groups:
            for name in nearby(self.model, group):
                self.near.setdefault(name, []).append(group)

    def run(self) -> Proof:
        """Prove, and as long as a module fails, let its numbers follow."""
        outcome = self._attempt()
        while not isinstance(outcome, float):
            outcome = self._mended(outcome)
        found = tuple(Integer(*place, value) for place, value in self.found.items())
        plan = replace(self.plan, integers=self.plan.integers + found)
        note(self.model, plans=(*lineage_of(self.model).plans[:-1], plan))
        return Proof(plan, outcome)

    def _attempt(self) -> float | Exception:
        try:
            return self.check()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's forward raises when sizes do not fit
            return error

    def _mended(self, failure: Exception) -> float | Exception:
        """Return the outcome of the first set of candidates that gets past a failure."""
        if ROWS_OF_16_BYTES in str(failure):  # of numbers that did follow
            raise explained(failure, self.model) from failure
        culprit = self._culprit(failure)
        for kind, names in self._candidates(culprit):
            before = self._follow(kind, names)
            outcome = self._attempt()
            if isinstance(outcome, float) or self._is_past(outcome, culprit):
                return outcome
            for (name, attribute), value in before.items():
                setattr(self.model.get_submodule(name), attribute, value)
                del self.found[name, attribute]
        if isinstance(failure, EquivalenceError):
            raise failure
        raise explained(failure, self.model) from failure

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
        return {
            key: new
            for key, value in vars(self.model.get_submodule(name)).items()
            if self._may_count(name, key) and (new := _resized(value, sizes)) is not None
        }

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
