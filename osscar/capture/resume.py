"""Forward passes that start in the middle of a model.

In a chain of blocks only one tensor is alive between one block and the next.  Where that is so, a
pass can begin after a module whose output is at hand: what comes before it is skipped.  Whether it
is so is tried out, not assumed: a module is a *cut* if the model gives the same outputs when all
modules that ended before it return NaN.  The traced operators say where it is worth a trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph import Operator

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Timeline:
    """When modules run.

    Parameters
    ----------
    starts
        For each module by name, when it is called first.
    ends
        The same for its end, of those modules that are called once and return one tensor.
    cuts
        Modules after which a pass can begin, in the order in which they end.
    """

    starts: Mapping[str, int]
    ends: Mapping[str, int]
    cuts: tuple[str, ...]

    def last_cut_before(self, modules: Iterator[str] | tuple[str, ...]) -> str | None:
        """Return the last cut that ends before any of the modules is called."""
        first = min(self.starts[module] for module in modules)
        before = [cut for cut in self.cuts if self.ends[cut] < first]
        return before[-1] if before else None


@dataclass(eq=False)
class Passed:
    """What is known of one batch at a cut.

    Parameters
    ----------
    output
        What the module at the cut returned; None at the start of the model.
    shapes
        Shapes of what modules before the cut returned.
    """

    output: Tensor | None = field(default=None, repr=False)
    shapes: dict[str, torch.Size] = field(default_factory=dict)


def find_cuts(model: nn.Module, batch: Batch, operators: Sequence[Operator]) -> Timeline:
    """Try out after which modules a pass can begin.

    Parameters
    ----------
    model
        A model in evaluation mode; not changed.
    batch
        A small batch, as keyword arguments of the model.
    operators
        Of the traced model.
    """
    clock: list[str] = []
    calls: Counter[str] = Counter()
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    returned: dict[str, Tensor] = {}

    def before(name: str) -> None:
        calls[name] += 1
        starts.setdefault(name, len(clock))
        clock.append(name)

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            returned[name] = output.clone()
            ends[name] = len(clock)
        clock.append(name)

    with torch.no_grad(), _watched(model, before, after):
        expected = model(**batch)
    once = [name for name in sorted(ends, key=ends.__getitem__) if calls[name] == 1]
    likely = _narrows(operators)
    cuts = []
    for position, name in enumerate(once):
        if name not in likely:
            continue
        passed = Passed(returned[name], {n: returned[n].shape for n in once[:position]})
        if _gives_the_same(model, batch, name, passed, expected):
            cuts.append(name)
    return Timeline(starts, {name: ends[name] for name in once}, tuple(cuts))


def _narrows(operators: Sequence[Operator]) -> set[str]:
    """Return the modules after whose last operator one value is read that was computed before."""
    last_read = {name: at for at, operator in enumerate(operators) for name in operator.inputs}
    ends: dict[str, int] = {}
    for at, operator in enumerate(operators):
        parts = operator.module.split(".")
        ends.update({".".join(parts[:depth]): at for depth in range(1, len(parts) + 1)})
    alive: set[str] = set()
    narrow: set[int] = set()
    for at, operator in enumerate(operators):
        alive = {name for name in (*alive, operator.name) if last_read.get(name, -1) > at}
        if len(alive) == 1:
            narrow.add(at)
    return {module for module, at in ends.items() if at in narrow}


def _gives_the_same(
    model: nn.Module, batch: Batch, cut: str, passed: Passed, expected: Any
) -> bool:
    try:
        outputs = resume(model, batch, cut, passed, fill=torch.nan)
    except Exception:  # whatever the code between modules makes of NaN: it needs more than the cut
        return False
    found, wanted = _tensors(outputs), _tensors(expected)
    same = (torch.equal(a, b) for a, b in zip(found, wanted, strict=False))
    return 0 < len(found) == len(wanted) and all(same)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@torch.no_grad()
def resume(
    model: nn.Module, batch: Batch, cut: str | None, passed: Passed, fill: float = 0.0
) -> Any:
    """Run a model from a cut on.

    Parameters
    ----------
    model
        The model.
    batch
        Its arguments.
    cut
        The module after which the pass begins; None runs all of it.
    passed
        What is known of this batch at the cut.
    fill
        What skipped modules return; nobody reads it.
    """
    if cut is None:
        return model(**batch)
    reference = passed.output
    assert reference is not None
    stubs: dict[str, Callable[[], Tensor]] = {
        name: lambda shape=shape: reference.new_full(shape, fill)  # type: ignore[misc]
        for name, shape in passed.shapes.items()
    }
    # A copy, as the next module may work in place.
    stubs[cut] = reference.clone
    with _replaced(model, stubs):
        return model(**batch)


class _Reached(Exception):
    """Ends a pass at the next cut."""


def advance(
    model: nn.Module, batch: Batch, cut: str | None, passed: Passed, timeline: Timeline, to: str
) -> Passed:
    """Run from a cut to a later one, and return what is known there.

    Parameters
    ----------
    model, batch, cut, passed
        As in `resume`.
    timeline
        Of the model.
    to
        The later cut.
    """
    following = Passed(None, dict(passed.shapes))

    def after(name: str, output: Any) -> None:
        if name == to:
            following.output = output.clone()
            raise _Reached
        if name in timeline.ends:
            following.shapes[name] = output.shape

    try:
        with _watched(model, lambda name: None, after):
            resume(model, batch, cut, passed)
    except _Reached:
        pass
    assert following.output is not None
    return following


@contextmanager
def _watched(
    model: nn.Module, before: Callable[[str], None], after: Callable[[str, Any], None]
) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        if not name:
            continue
        handles.append(module.register_forward_pre_hook(lambda _, __, name=name: before(name)))
        handles.append(
            module.register_forward_hook(lambda _, __, output, name=name: after(name, output))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(model: nn.Module, stubs: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Let modules return what their stubs do, whatever they are called with."""
    modules = [(model.get_submodule(name), stub) for name, stub in stubs.items()]
    own = [vars(module).get("forward") for module, _ in modules]
    try:
        for module, stub in modules:
            vars(module)["forward"] = lambda *_, stub=stub, **__: stub()
        yield
    finally:
        for (module, _), before in zip(modules, own, strict=True):
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before
