"""A model run block by block, so that each part sees what was pruned before it.

A *stage* is a module whose calibration inputs are at hand.  The repeated blocks of a transformer
form a chain: what one returns is what the next reads, and whatever else they are called with
(masks, position embeddings) does not depend on it.  Any other model is run as a whole, from the
last module on after which a pass can begin (see `osscar.capture.resume`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graph import CouplingGroup, Operator
from osscar.capture.resume import Batch, Passed, Timeline, advance, find_cuts, resume
from osscar.core.errors import ModelError
from osscar.core.progress import track


@dataclass(frozen=True, eq=False)
class Stage:
    """A module and the groups inside it, in execution order.

    Parameters
    ----------
    name, module
        The module, and its qualified name ("" is the model itself).
    groups
        The groups that are pruned in it.
    """

    name: str
    module: Callable[..., Any]
    groups: tuple[CouplingGroup, ...]


class Stream(Protocol):
    """The calibration data on their way through the stages."""

    def arguments(self, stage: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of a stage, one pair a batch."""

    def advance(self, stage: int, module: Callable[..., Any]) -> None:
        """Let the data pass through a stage."""


@dataclass(eq=False)
class Call:
    """What a stage is called with for one batch, apart from the hidden states.

    Parameters
    ----------
    args, kwargs
        The arguments; ``args[0]`` or ``kwargs["hidden_states"]`` is None and filled in.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the hidden states in their place."""
        if self.args:
            return (hidden, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, "hidden_states": hidden}


@dataclass(eq=False)
class BlockStream:
    """Data that pass from block to block.

    Parameters
    ----------
    hidden
        What the next stage reads, one tensor a batch.
    calls
        For each stage, one call a batch.
    """

    hidden: list[Any]
    calls: list[list[Call]] = field(repr=False)

    def arguments(self, stage: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of a stage, one pair a batch."""
        return [
            call.with_hidden(hidden)
            for call, hidden in zip(self.calls[stage], self.hidden, strict=True)
        ]

    def advance(self, stage: int, module: Callable[..., Any]) -> None:
        """Let the data pass through a stage."""
        self.hidden = [_first(module(*args, **kwargs)) for args, kwargs in self.arguments(stage)]


@dataclass(frozen=True, eq=False)
class Rest:
    """A model from a cut on, as the module of a stage.

    Parameters
    ----------
    model
        The model.
    cut
        After which module a pass begins; None stands for the start.
    timeline
        Of the model.
    """

    model: nn.Module
    cut: str | None
    timeline: Timeline

    def __call__(self, batch: Batch, passed: Passed) -> Any:
        """Run it."""
        return resume(self.model, batch, self.cut, passed)


@dataclass(eq=False)
class CutStream:
    """Data that pass from cut to cut.

    Parameters
    ----------
    stages
        What is left of the model at each cut.
    batches
        Keyword arguments of the model.
    passed
        What is known at the cut of the next stage, for each batch.
    """

    stages: Sequence[Rest]
    batches: Sequence[Batch]
    passed: list[Passed]

    def arguments(self, stage: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of a stage, one pair a batch."""
        return [((b, p), {}) for b, p in zip(self.batches, self.passed, strict=True)]

    def advance(self, stage: int, module: Callable[..., Any]) -> None:
        """Let the data pass on to the cut of the next stage."""
        here, to = self.stages[stage], self.stages[stage + 1].cut
        assert to is not None
        for index, batch in enumerate(self.batches):  # in place: two cuts never are in memory
            passed = self.passed[index]
            self.passed[index] = advance(here.model, batch, here.cut, passed, here.timeline, to)


def find_stages(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    example: Batch | None = None,
    operators: Sequence[Operator] = (),
) -> tuple[Stage, ...]:
    """Split a model into stages.

    Parameters
    ----------
    model
        The model.
    groups
        The groups that are to be pruned, in the order in which they are first read.
    example
        A small batch, as keyword arguments, to find out where the model can be cut.
    operators
        Of the traced model, which tell where that is worth a trial.

    Returns
    -------
    tuple of Stage
        All blocks of the chain; without one, what is left of the model at each cut that comes
        before a group; without an example, the whole model as one stage.
    """
    owners = [_block_of(model, group) for group in groups]
    chains = {owner[0] if owner else None for owner in owners}
    (chain,) = chains if len(chains) == 1 else (None,)
    if chain is None and example is not None:
        return tuple(_stages_at_cuts(model, groups, find_cuts(model, example, operators)))
    if chain is None:
        return (Stage("", model, tuple(groups)),)
    blocks = model.get_submodule(chain)
    assert isinstance(blocks, nn.ModuleList)
    return tuple(
        Stage(
            f"{chain}.{index}",
            block,
            tuple(g for g, owner in zip(groups, owners, strict=True) if owner == (chain, index)),
        )
        for index, block in enumerate(blocks)
    )


def _stages_at_cuts(
    model: nn.Module, groups: Sequence[CouplingGroup], timeline: Timeline
) -> Iterator[Stage]:
    cuts = [timeline.last_cut_before(tuple(s.module for s in g.consumers)) for g in groups]
    for cut, run in itertools.groupby(zip(cuts, groups, strict=True), key=lambda pair: pair[0]):
        yield Stage(cut or "", Rest(model, cut, timeline), tuple(group for _, group in run))


def _block_of(model: nn.Module, group: CouplingGroup) -> tuple[str, int] | None:
    """Return the outermost module list, and the block in it, that holds all slots of a group."""
    paths = [slot.module.split(".") for slot in group.slots]
    for depth in range(1, min(len(path) for path in paths)):
        heads = {tuple(path[: depth + 1]) for path in paths}
        if len(heads) == 1:
            *parent, index = heads.pop()
            owner = ".".join(parent)
            if index.isdigit() and isinstance(model.get_submodule(owner), nn.ModuleList):
                return owner, int(index)
    return None


def start_stream(
    model: nn.Module, stages: Sequence[Stage], batches: Sequence[dict[str, Any]]
) -> Stream:
    """Run the dense model once and note what each stage is called with.

    Parameters
    ----------
    model
        The model, not changed.
    stages
        From `find_stages`.
    batches
        Keyword arguments of the model, one dictionary a batch.

    Raises
    ------
    ModelError
        If the blocks are not a chain.
    """
    if isinstance(stages[0].module, Rest):
        rests = [stage.module for stage in stages if isinstance(stage.module, Rest)]
        return CutStream(rests, batches, [_passed_to(rests[0], batch) for batch in batches])
    if stages[0].module is model:
        return BlockStream([None] * len(batches), [[_WholeCall((), batch) for batch in batches]])
    stream = BlockStream([], [[] for _ in stages])
    for batch in track(batches, "reading the calibration data"):
        _record(model, stages, batch, stream)
    return stream


def _passed_to(rest: Rest, batch: Batch) -> Passed:
    """Run from the start of the model to the first cut."""
    if rest.cut is None:
        return Passed()
    return advance(rest.model, batch, None, Passed(), rest.timeline, rest.cut)


class _WholeCall(Call):
    def with_hidden(self, hidden: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, self.kwargs


def _record(
    model: nn.Module, stages: Sequence[Stage], batch: dict[str, Any], stream: BlockStream
) -> None:
    previous: list[Any] = []

    def before(index: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or len(previous) != index:
                raise ModelError(f"{stages[index].name!r} is not called once with hidden states")
            if index == 0:
                stream.hidden.append(hidden)
            elif hidden is not previous[-1]:
                raise ModelError(
                    f"{stages[index].name!r} does not read what {stages[index - 1].name!r} returns"
                )
            rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
            stream.calls[index].append(Call((None, *args[1:]) if args else (), rest))

        return note

    def after(_: nn.Module, __: Any, output: Any) -> None:
        previous.append(_first(output))

    handles = []
    for index, stage in enumerate(stages):
        assert isinstance(stage.module, nn.Module)
        handles.append(stage.module.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(stage.module.register_forward_hook(after))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
