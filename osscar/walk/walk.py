"""One walk of the calibration data through the model, which stops where a group can be solved.

Each batch runs the model's own forward pass in a coroutine, which is suspended at every consumer.
Once all batches have arrived, the inputs of the consumers are measured, the caller solves the group
and commits the refitted weights, and the batches go on *through the new weights*.

A coroutine cannot go back.  Where a group is read in several calls, the batches have passed the
first of them, through the old weights, when the last is reached.  They then start again: one more
pass for each such group.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graph import CouplingGroup
from osscar.base.errors import DataError
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.timing import Stage, timed
from osscar.consumers.layers import RECURRENT, afresh, exact_output, output_of, reads
from osscar.consumers.products import holder, is_station
from osscar.network.hooks import hooks
from osscar.network.modules import bfloat16_products, forward, forward_in_bfloat16
from osscar.offload.on_disk import room_for
from osscar.preparation.failures import failures_named
from osscar.preparation.prepare import Prepared
from osscar.walk.batch_norm import shared_out
from osscar.walk.coroutines import Arrival, Coroutine, Surroundings, running
from osscar.walk.gram import GramAccumulator, all_reduce, sum_bytes
from osscar.walk.layer_step import DenseTensors, LayerStep, dense_tensors
from osscar.walk.schedule import Schedule, learned_calls
from osscar.walk.targets import Keeper, Target, correction, streams

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Waiting:
    """A batch that stands before a call, until the walk goes on."""

    held_out: bool
    """Whether no weight is fitted to it."""
    _run: Coroutine
    _dense: Coroutine | None

    @property
    def index(self) -> int:
        """Which of the batches it is."""
        return self._run.index

    @property
    def x(self) -> Any:
        """What the call reads."""
        assert self._run.arrived is not None
        return afresh(self._run.arrived.x)

    def go_on_with(self, x: Any) -> None:
        """Let the call read something else, which is `Routed`, when the batch goes on."""
        assert self._run.arrived is not None
        self._run.arrived = dataclasses.replace(self._run.arrived, x=x)

    def target(self) -> Tensor:
        """Return what the call is to return, in float64."""
        arrival = self._run.arrived
        assert arrival is not None
        assert arrival.output is not None
        y = arrival.output.double()
        if self._dense is not None:
            dense = self._dense.arrived
            assert dense is not None
            assert dense.output is not None
            y = y + correction(dense.output, arrival.output, dense.stream, arrival.stream)
        return y


class Walk:
    """Walks the calibration data through a model, and stops where one of its groups can be solved.

    It is iterated over once, and yields a `LayerStep` for each group, in the order in which the
    model reads them.  `passes` counts how often batches set out from the start of the model.

    Parameters
    ----------
    in_turn
        Whether each group is measured on what was committed before it, as pruning does; if not, all
        are measured on the model as it is, in a single pass, and none can be committed.
    target
        What consumers are to reproduce.  Where that depends on the dense model, each batch also
        passes each consumer before new weights are committed: no second model is held.
    held_out
        How many samples, the last ones, no weight is fitted to (`LayerStep.regularization`).
    committed
        The dense tensors of modules to which an earlier walk has committed, by name.
    rough
        Whether all passes run in bfloat16 where that is faster, and not only dense ones.

    Raises
    ------
    ModelError
        If a consumer cannot be refitted, or is never called.
    DataError
        If a batch fails, or takes another way through the model than the others.
    NonFiniteError
        If what a consumer reads is not finite.
    """

    def __init__(
        self,
        prepared: Prepared,
        groups: Sequence[CouplingGroup],
        *,
        in_turn: bool = True,
        target: Target = Target.WEIGHTS,
        held_out: int = 0,
        committed: Mapping[str, DenseTensors] | None = None,
        rough: bool = False,
    ) -> None:
        self.passes = 0
        self._prepared, self._target, self._model = prepared, target, prepared.model
        fitted = prepared.batches(stop=prepared.inputs.samples - held_out)
        self._batches = [*fitted, *prepared.batches(prepared.inputs.samples - held_out)]
        self._held_out_from = len(fitted)
        self._mine = shared_out(self._batches, prepared.ranks)
        self._consumers = {group.name: prepared.linear_maps(group) for group in groups}
        every = [one for maps in self._consumers.values() for one in maps]
        self._names = {one.name for one in every}
        # To what the gates of recurrent layers take nothing is added that anybody could see.
        plain = sorted({one.name for one in every if not isinstance(one.module, RECURRENT)})
        self._passages = streams(self._model, prepared.example, plain) if target.needs_dense else {}
        batch = self._batches[0]
        calls, self._scratch = learned_calls(self._model, prepared.example, batch, self._names)
        names = {name: [one.name for one in maps] for name, maps in self._consumers.items()}
        dense = target.needs_dense
        faster = (dense or rough) and prepared.bfloat16
        self._pass = forward_in_bfloat16 if rough and faster else forward
        self._dense_pass = forward_in_bfloat16 if faster else forward
        self.schedule = Schedule.of(groups, names, calls, in_turn=in_turn)
        self._runs: list[Coroutine] = []
        self._dense: list[Coroutine] = []
        # Where several groups share a consumer, the first that was committed found it dense.
        self._originals = {name: dict(dense) for name, dense in (committed or {}).items()}
        self._exchanged: set[str] = set()
        self._at = -1
        """The call before which all batches stand."""

    def __iter__(self) -> Iterator[LayerStep]:
        return self._walked(self._steps_of)

    def arrivals(self) -> Iterator[tuple[CouplingGroup, tuple[Waiting, ...]]]:
        """Yield each group with the batches before the call that reads it; nothing is summed up."""
        return self._walked(self._waiting_for)

    def _walked(
        self, steps_of: Callable[[tuple[CouplingGroup, ...]], Iterator[_T]]
    ) -> Iterator[_T]:
        with torch.no_grad(), self._watched():
            around = Surroundings()
            try:
                for groups in self.schedule.rounds:
                    yield from steps_of(groups)
            finally:
                self._end()
                around.restore()

    # ---- the batches on their way --------------------------------------------------------

    def _waiting_for(
        self, groups: tuple[CouplingGroup, ...]
    ) -> Iterator[tuple[CouplingGroup, tuple[Waiting, ...]]]:
        (group,) = groups
        (call,) = self.schedule.measured[group.name]
        if self._at < 0:
            self._start()
        self._measure(call, ())
        for run in self._runs:
            if run.arrived is not None and run.arrived.output is None:  # nobody has asked so far
                module = self._model.get_submodule(run.arrived.module)
                output = output_of(module, run.arrived.x)
                run.arrived = dataclasses.replace(run.arrived, output=output)
        both = itertools.zip_longest(self._runs, self._dense)
        yield (
            group,
            tuple(Waiting(run.index >= self._held_out_from, run, other) for run, other in both),
        )

    def _steps_of(self, groups: tuple[CouplingGroup, ...]) -> Iterator[LayerStep]:
        """Walk from the first call that reads one of these groups to the last."""
        calls = {group.name: self.schedule.measured[group.name] for group in groups}
        grams: dict[str, tuple[GramAccumulator, ...]] = {}
        if self._at < 0 or min(map(min, calls.values())) < self._at:
            self._start()
        for call in sorted(set(itertools.chain(*calls.values()))):
            here = [group for group in groups if call in calls[group.name]]
            read: list[GramAccumulator] = []
            for group in here:
                if group.name not in grams:
                    grams[group.name] = self._empty_sums(group)
                name = self.schedule.calls[call]
                read += [gram for gram in grams[group.name] if gram.linear_map.name == name]
            self._measure(call, read)
            for group in here:
                if call != calls[group.name][-1]:
                    continue
                all_reduce(grams[group.name], self._prepared.ranks, group.name)
                step = LayerStep(group, grams.pop(group.name), _committing=self._committing)
                yield step
                if step.committed and len(calls[group.name]) > 1:
                    self._end()  # the batches have passed calls through weights that are no longer

    def _empty_sums(self, group: CouplingGroup) -> tuple[GramAccumulator, ...]:
        """Begin all sums of a group at once, on all ranks alike, whichever batches they have."""
        maps = self._consumers[group.name]
        held_out, corrections = self._held_out_from < len(self._batches), self._target.needs_dense
        inputs = " and ".join(str(consumer.rows) for consumer in maps)
        needed = sum((1 + held_out) * sum_bytes(one, corrections=corrections) for one in maps)
        with (
            memory_for(f"Gram matrices of {group.name!r} with {inputs} inputs", FOR_MATRICES),
            room_for(self._model, needed, beside=True),
        ):
            return tuple(
                GramAccumulator(one, held_out=held_out, corrections=corrections) for one in maps
            )

    def _start(self) -> None:
        self._end()
        self.passes += 1
        self._at = 0

        def set_out(index: int, dense: bool) -> Coroutine:
            run = self._dense_pass if dense else self._pass
            way = partial(run, self._model, self._batches[index])
            return Coroutine(index, dense, way, self._scratch, Keeper(self._passages))

        self._runs = [set_out(index, False) for index in self._mine]
        self._dense = [set_out(index, True) for index in self._mine if self._target.needs_dense]

    def _measure(self, call: int, grams: Sequence[GramAccumulator]) -> None:
        """Let each batch arrive at a call, in the dense stream, too, and add up what it brings."""
        for run, other in itertools.zip_longest(self._runs, self._dense):
            with timed(Stage.WALK):
                stood_there = run.reached == call
                arrival, D = self._bring(run, call), None
                if other is not None:
                    dense, output = self._bring(other, call), arrival.output
                    if stood_there:  # another group that it reads may have been committed since
                        output = self._output(arrival.module, arrival.x)
                    assert dense.output is not None
                    assert output is not None
                    D = correction(dense.output, output, dense.stream, arrival.stream)
                x = afresh(arrival.x)
                with timed(Stage.GRAM):
                    for gram in grams:
                        gram.add_call(x, D, held_out=run.index >= self._held_out_from)
        self._at = call

    def _bring(self, run: Coroutine, call: int) -> Arrival:
        """Let a batch run on, to stand before a call, in the dense stream after it."""
        while run.reached < call:
            expected = self.schedule.calls[run.reached + 1]
            # Other code of a dense pass may read weights of products.
            tied = [name for name in self._originals if is_station(name)] if run.dense else []
            for name in tied:
                self._exchange(name)
            try:
                with failures_named(self._model, run.index):
                    arrival = run.advance()
            finally:
                for name in tied:
                    self._exchange(name)
            if arrival is None or arrival.module != expected:
                way = f"never reaches {expected!r}"
                if arrival is not None:
                    way = f"calls {arrival.module!r} where others call {expected!r}"
                raise DataError(
                    f"calibration batch {run.index} {way}: which layers run depends on the data or "
                    "on an earlier pass; give batches that run the same layers"
                )
        assert run.arrived is not None
        return run.arrived

    def _end(self) -> None:
        """End all passes; the next group starts new ones."""
        runs, self._runs, self._dense, self._at = [*self._runs, *self._dense], [], [], -1
        # The last to enter a context manager leaves it first, should it change the whole process.
        for run in reversed(runs):
            run.end()
        for name in list(self._exchanged):  # of a pass that failed inside a consumer
            self._exchange(name)

    # ---- consumers -----------------------------------------------------------------------

    def _output(self, name: str, x: Any) -> Any:
        """Return what a consumer returns, with products in the format of the dense stream."""
        rough = self._dense_pass is not self._pass
        with bfloat16_products(self._model) if rough else nullcontext():
            return exact_output(holder(self._model, name), x)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Suspend passes of the pruned stream before each consumer, dense ones after it."""

        def before(name: str, x: Any) -> Any:
            run = running()
            if run is not None and run.dense:
                if not is_station(name):
                    self._exchange(name)
            elif run is not None and name in self._names:
                # Asked of the pass itself, so that autocast holds as it does for the module.
                output = self._output(name, x) if self._target.needs_dense else None
                run.suspend(Arrival(name, x, output, run.keeper.take(name)))
                if run.arrived is not None and run.arrived.x is not x:
                    return run.arrived.x
            return None

        def after(name: str, x: Any, y: Tensor) -> None:
            run = running()
            if run is None or not run.dense:
                return
            module = holder(self._model, name)
            output = exact_output(module, x, y)
            if not is_station(name):
                self._exchange(name)
            if name in self._names:
                run.suspend(Arrival(name, x, output, run.keeper.take(name)))

        def keep_read(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            if (run := running()) is not None:
                run.keeper.read(name, args, kwargs)

        def keep_put_out(name: str, _: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if (run := running()) is not None:
                run.keeper.put_out(name, result)

        dense = {name for name in self._originals if not is_station(name)}
        read = self._names | (dense if self._target.needs_dense else set())
        passed = {module for some in self._passages.values() for module, *_ in some}
        with (
            hooks(self._model, passed, keep_read, keep_put_out),
            reads(self._model, read, before, after),
        ):
            yield

    def _committing(self, step: LayerStep) -> None:
        """Keep dense weights that batches of the dense stream will run through once more."""
        if self._target.needs_dense and self.schedule.sets_out_after(step.group):
            for name, dense in dense_tensors(step.consumers).items():
                self._originals.setdefault(name, dict(dense))

    def _exchange(self, name: str) -> None:
        """Put the dense tensors of a committed consumer in the place of the new ones, or back."""
        originals = self._originals.get(name, {})
        if originals:
            self._exchanged ^= {name}
        for key, tensor in holder(self._model, name).named_parameters(recurse=False):
            if key in originals:
                tensor.data, originals[key] = originals[key], tensor.data
