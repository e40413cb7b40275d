"""Numbers that modules keep under names that nobody knows: found by trial, accepted by proof.

Candidates equal a size of a group which touches their module.  A set of them is accepted only if
the shrunk model then computes what the masked one does, or if its modules run on until one of
another class fails.  Tried are single numbers of a class of modules, pairs, and all of them.
"""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from operator import attrgetter
from types import TracebackType
from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graph.tracing.export import failing_module
from osscar.base.errors import AdapterError, EquivalenceError, first_line
from osscar.base.memory import attempt
from osscar.network.attention import AnyHeads
from osscar.proof.equivalence import Match
from osscar.proof.plan import GroupPlan, Integer, PruningPlan
from osscar.shrinking.slice import is_list, nearby

_MOST_ATTEMPTS = 1000
"""Forward passes of one search: more than anyone would wait for."""

_NEVER_COUNTS = (
    r"strides?|dilations?|kernel_sizes?|output_padding|(up|down)?scale_factor|.*_factor|"
    r"(start|end)_dim|(.*_)?(idx|index|token_id)|layer_(id|no)|(.*_)?eps|seed"
)
_OF_LAYERS = rf"{_NEVER_COUNTS}|paddings?|output_size|dim"
"""Names of numbers that never count units, in any module and in layers of torch (and what derives
from them).  Any other module may call `padding` what it adds to the channels."""

ROWS_OF_16_BYTES = "strides should be multiple of 16 bytes"
"""How torch's multiplication of all experts at once refuses a width."""

_Sizes: TypeAlias = int | tuple[int, ...]

_Number: TypeAlias = tuple[str, int | None]
"""The name of an attribute, and in a tuple the position."""


class IntegerSearch:
    """Lets numbers of modules follow until a check of the shrunk model passes."""

    def __init__(self, model: nn.Module, plan: PruningPlan, check: Callable[[], Match]) -> None:
        self.model, self.plan, self.check = model, plan, check
        self.found: dict[tuple[str, str], _Sizes] = {}
        self.attempts = 0
        self.near: dict[str, list[GroupPlan]] = {}
        for group in plan.groups:
            for name in nearby(model, group):
                self.near.setdefault(name, []).append(group)

    def run(self) -> tuple[Match, tuple[Integer, ...]]:
        """Prove, and as long as a module fails, let its numbers follow."""
        outcome = self._attempt()
        while not isinstance(outcome, Match):
            outcome = self._mended(outcome)
        return outcome, tuple(Integer(*place, value) for place, value in self.found.items())

    def _attempt(self) -> Match | Exception:
        self.attempts += 1
        with attempt() as tried:  # whatever the user's forward raises when sizes do not fit
            return self.check()
        return tried.error

    def _mended(self, failure: Exception) -> Match | Exception:
        """Return the outcome of the first set of candidates that gets past a failure."""
        culprit = self._culprit(failure)
        if ROWS_OF_16_BYTES not in str(failure):  # of numbers that did follow
            for kind, names in self._candidates(culprit):
                if self.attempts > _MOST_ATTEMPTS:
                    break
                before = self._follow(kind, names)
                outcome = self._attempt()
                if isinstance(outcome, Match) or self._is_past(outcome, culprit):
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

    def _candidates(
        self, culprit: str | None
    ) -> Iterator[tuple[type[nn.Module], tuple[_Number, ...]]]:
        """Yield classes with the names of numbers in them, the likeliest and fewest first."""
        around = [] if culprit is None else culprit.split(".")
        upwards = [".".join(around[:length]) for length in range(len(around), 0, -1)]
        names: dict[type[nn.Module], dict[_Number, None]] = {}
        for name in dict.fromkeys((*upwards, *([] if culprit is None else [""]), *self.near)):
            names.setdefault(self._kind(name), {}).update(dict.fromkeys(self._following(name)))
        for kind, numbers in names.items():
            for count in sorted({1, 2, len(numbers)} - {0}):
                for chosen in combinations(numbers, count):
                    yield kind, chosen

    def _following(self, name: str) -> dict[_Number, int]:
        """Return the numbers of a module that may follow, with what they would become."""
        sizes = self._of_tensors(name)
        for group in self._groups_of(name):
            sizes[group.units] = len(group.kept)
            for slot in group.slots:
                old = slot.units * slot.width
                sizes[old] = group.scaled(old)
        module = self.model.get_submodule(name)
        is_layer = any(
            kind is not nn.Module and kind.__module__.startswith("torch.nn.")
            for kind in type(module).__mro__
        )
        never = _OF_LAYERS if is_layer else _NEVER_COUNTS
        return {
            (key, position): sizes[value]
            for (key, position), value in _numbers(module).items()
            if value in sizes and (name, key) not in self.found and not re.fullmatch(never, key)
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
        """Return sizes of tensors near a module that have lost units, and what became of them."""
        cut: dict[tuple[str, int], tuple[int, int]] = {}
        for group in self.near.get(name, ()):
            for slot in group.slots:
                if not is_list(slot):
                    old, new = cut.get((slot.tensor, slot.dim), (0, 0))
                    old, new = old + slot.units * slot.width, new + len(group.kept) * slot.width
                    cut[slot.tensor, slot.dim] = old, new
        sizes: dict[int, int] = {}
        for (tensor, dim), (old, new) in cut.items():
            now = attrgetter(tensor)(self.model).shape[dim]
            sizes |= {now - new + old: now, old: new}
        return sizes

    def _follow(
        self, kind: type[nn.Module], numbers: tuple[_Number, ...]
    ) -> dict[tuple[str, str], _Sizes]:
        """Let some numbers follow in every module of a class; return what they were."""
        before: dict[tuple[str, str], _Sizes] = {}
        for name, module in list(self.model.named_modules()):
            if type(module) is not kind:
                continue
            following = self._following(name)
            for key, at in (number for number in numbers if number in following):
                old, size = getattr(module, key), following[key, at]
                new = size if at is None else (*old[:at], size, *old[at + 1 :])
                with suppress(AttributeError, TypeError, ValueError, RuntimeError):  # it refuses
                    setattr(module, key, new)
                    before.setdefault((name, key), old)
                    self.found[name, key] = new
        return before


def _numbers(module: nn.Module) -> dict[_Number, int]:
    """Return the whole numbers that are attributes of a module, or entries of tuples there."""
    found: dict[_Number, int] = {}
    for key, value in vars(module).items():
        if type(value) is int:
            found[key, None] = value
        elif type(value) in (tuple, torch.Size) and all(type(size) is int for size in value):
            found |= {(key, position): size for position, size in enumerate(value)}
    return found


# ---- modules that cannot follow ----------------------------------------------------------


def explained(error: Exception, model: nn.Module) -> AdapterError:
    """Say which module of a shrunk model failed, in which line, and what it keeps."""
    name = failing_module(error.__traceback__, model)
    while name and _is_stock_layer(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    module = model.get_submodule(name)
    kind = kind_of(module)
    line, place = _failing_line(error.__traceback__, module)
    integers = {key: value for key, value in vars(module).items() if type(value) is int}
    named = {key: value for key, value in integers.items() if key in line} or integers
    kept = ", ".join(f"{key} = {value}" for key, value in named.items()) or "no number"
    reason = first_line(error)
    start = f"{kind.__name__} fails with fewer units"
    if ROWS_OF_16_BYTES in reason:
        return AdapterError(
            f"{start}: it multiplies all experts at once, which takes only rows of whole 16 bytes; "
            "keep a multiple of 4 units, of 8 in half precision (round_to, `--set round_to=8`)"
        )
    # Numbers in what a kernel says are sizes of this trial, of which the line says what they are.
    start += f", in `{line}` ({place})" if line else ""
    start += "" if line and re.search(r"\b\d", reason) else f": {reason}"
    if _is_stock_layer(module):
        return AdapterError(start)
    return AdapterError(
        f"{start}; its attributes hold {kept}. "
        "In code of your own, write -1 for that size or take it from a weight; for other code "
        f'register an adapter with @osscar.adapter("{kind.__module__}.{kind.__qualname__}")'
    )


def kind_of(module: nn.Module) -> type:
    """Return the class that a module had before its forward pass was replaced."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, AnyHeads))


def _is_stock_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that many share: what calls it has the wrong number."""
    kind = kind_of(module)
    return kind is Conv1D or kind.__module__.startswith("torch.nn.")


def _failing_line(trace: TracebackType | None, module: nn.Module) -> tuple[str, str]:
    """Return the innermost line of source that ran on behalf of a module, and where it stands."""
    found, place, inside = "", "", False
    for frame, number in traceback.walk_tb(trace):
        inside = inside or frame.f_locals.get("self") is module
        code = frame.f_code
        if inside and "/torch/" not in code.co_filename and code.co_name != "__torch_dispatch__":
            line = linecache.getline(code.co_filename, number).strip()
            where = f"{os.path.basename(code.co_filename)}, line {number}"
            found, place = (line, where) if line else (found, place)
    return found, place
