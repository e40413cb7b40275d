"""Shrink and prove in one step; where a module keeps a number under an unknown name, find it.

A number that equals a size of a group which touches its module is a candidate.  Which candidates
follow is not guessed: a set of them is accepted only if the shrunk model then computes what the
masked one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeAlias

import torch
from torch import nn

from graph.export import failing_module
from osscar.adapters import nearby, prepare
from osscar.errors import EquivalenceError
from osscar.plan import GroupPlan, Integer, PruningPlan
from osscar.proof import Inputs, evaluating, explained, masked, proof_outputs, prove_equal
from osscar.slicing import HISTORY, restored_on_error, shrink

_MOST_AT_ONCE = 3


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
        prepare(model)
        with masked(model, plan):
            expected = proof_outputs(model, inputs)
        shrink(model, plan)
        search = _Search(
            model,
            plan,
            lambda: prove_equal(expected, proof_outputs(model, inputs), tolerance=tolerance),
        )
        return search.run()


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
        setattr(self.model, HISTORY, (*getattr(self.model, HISTORY)[:-1], plan))
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
            if (new := _resized(value, sizes)) is not None and (name, key) not in self.found
        }

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
