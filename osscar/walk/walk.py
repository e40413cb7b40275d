"""One walk of the calibration data through the model, which stops where a group can be solved.

Each batch runs the model's own forward pass in a coroutine, which is suspended at every consumer.
Once all batches have arrived, the inputs of the consumers are measured, the caller solves the group
and commits the refitted weights, and the batches go on *through the new weights*.  Nothing is
computed twice, and no structure of the model has to be known.

A coroutine cannot go back.  Where a group is read in several calls (several consumers, or a module
that is called more than once) the batches have passed the first of them, through weights that are
no longer, when the last is reached.  They then start again: one more pass for each such group.  If
all its consumers read one and the same tensor, as a block and its shortcut do, the group is solved
at the first of them, and none is needed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graph import CouplingGroup
from graph.tracing.preserve import preserved
from osscar.base.errors import CalibrationError
from osscar.base.memory import FOR_MATRICES, memory_for
from osscar.base.timing import Stage, timed
from osscar.data.batches import Batch, ModelInputs
from osscar.network.fake import on_shapes
from osscar.network.model_state import ModelState, PassState
from osscar.network.modules import fresh
from osscar.offload.activation_offload import ActivationOffload
from osscar.offload.on_disk import room_beside
from osscar.preparation.failures import batch_named
from osscar.preparation.linear_maps import linear_maps
from osscar.preparation.prepare import Prepared
from osscar.preparation.recurrent import RECURRENT, input_gates
from osscar.preparation.routing import Routed, afresh, output_of, reads
from osscar.walk.coroutines import (
    Arrival,
    Coroutine,
    Surroundings,
    running,
    suspend,
)
from osscar.walk.gram import GramAccumulator, all_reduce, gram_numbers
from osscar.walk.layer_step import DenseTensors, LayerStep, dense_tensors
from osscar.walk.residual import Keeper, kept_streams, streams
from osscar.walk.schedule import Call, Schedule
from osscar.walk.targets import Target


class Walk:
    """An iterator over the steps of a model; see `walk`.

    Attributes
    ----------
    passes
        How many times the batches have set out from the start of the model.
    """

    def __init__(
        self,
        prepared: Prepared,
        groups: Sequence[CouplingGroup],
        in_turn: bool,
        target: Target,
        held: int,
        committed: Mapping[str, DenseTensors],
    ) -> None:
        self.passes = 0
        self._prepared, self._in_turn, self._target = prepared, in_turn, target
        self._batches, self._held_from = _parted(prepared.inputs, prepared.batches(), held)
        self._mine = prepared.ranks.share([len(next(iter(b.values()))) for b in self._batches])
        self._consumers = {group.name: linear_maps(prepared.model, group) for group in groups}
        self._places = (
            streams(prepared.model, prepared.example, sorted(self._names - self._recurrent))
            if target is Target.RESIDUAL
            else {}
        )
        calls, self._scratch = self._learned()
        self._schedule = Schedule.of(
            groups,
            {name: [one.name for one in maps] for name, maps in self._consumers.items()},
            calls,
            in_turn=in_turn,
            outputs=target.needs_dense,
        )
        self._runs: list[Coroutine] = []
        self._dense: list[Coroutine] = []
        # Where several groups share a consumer, the first that was committed found it dense.
        self._originals: dict[str, dict[str, Tensor]] = {
            name: dict(dense) for name, dense in committed.items()
        }
        self._exchanged: set[str] = set()
        self._at = -1
        """The call before which all batches stand."""

    def __iter__(self) -> Iterator[LayerStep]:
        with torch.no_grad(), self._watched():
            around = Surroundings()
            try:
                for groups in self._schedule.rounds:
                    yield from self._steps_of(groups)
            finally:
                self._end()
                around.restore()

    # ---- when consumers are called -------------------------------------------------------

    def _learned(self) -> tuple[list[Call], PassState]:
        """Return the calls of consumers in a pass, and what passes write.

        How often a module is called may depend on the data's shape, so that the order of the calls
        is that of the first batch; the small example tells what passes write on modules.
        """
        model = self._prepared.model
        first = ModelState(model)
        with first.watching():
            self._called(self._prepared.example)
        state = ModelState(model, first.written)
        # Tensors without values may be written, also where the example writes nothing.
        with state.watching(), preserved(model):
            seen = self._called_on_shapes(self._batches[0])
        state.put_back()
        return [(name, (id(x), version)) for name, x, version in seen], state.passing()

    def _called_on_shapes(self, batch: Batch) -> list[tuple[str, Tensor, int]]:
        """Return the calls on a batch of this shape, computing nothing where that is possible."""
        try:
            with on_shapes() as fake:
                return self._called({name: fake.from_tensor(x) for name, x in batch.items()})
        except Exception:  # code that looks at values, or that has no shape function
            with batch_named(self._prepared.model, 0):
                return self._called(batch)

    def _called(self, batch: Batch) -> list[tuple[str, Tensor, int]]:
        """Return each call with the tensor that it reads, and how often that was written to."""
        calls: list[tuple[str, Tensor, int]] = []

        def see(name: str, argument: Any) -> None:
            x = argument.hidden if isinstance(argument, Routed) else argument
            # Nobody counts the writes to tensors of inference mode: no two of them are the same.
            calls.append((name, x, -len(calls) - 1 if x.is_inference() else x._version))

        with torch.no_grad(), reads(self._prepared.model, self._names, see):
            self._prepared.model(**fresh(batch))
        return calls

    @property
    def _recurrent(self) -> set[str]:
        """Consumers whose gates' inputs nothing is added to that anybody could see."""
        consumers = (consumer for maps in self._consumers.values() for consumer in maps)
        return {one.name for one in consumers if isinstance(one.module, RECURRENT)}

    @property
    def _names(self) -> set[str]:
        return {consumer.name for maps in self._consumers.values() for consumer in maps}

    @property
    def calls(self) -> tuple[str, ...]:
        """The modules that are watched, in the order of their calls."""
        return self._schedule.calls

    @property
    def itinerary(self) -> tuple[int, ...]:
        """The last call that each pass of the batches reaches, should all groups be committed."""
        return tuple(last for _, last in self._schedule.passes)

    # ---- the walk ------------------------------------------------------------------------

    def _steps_of(self, groups: tuple[CouplingGroup, ...]) -> Iterator[LayerStep]:
        """Walk from the first call that reads one of these groups to the last one."""
        calls = {group.name: self._schedule.measured[group.name] for group in groups}
        grams: dict[str, tuple[GramAccumulator, ...]] = {}
        if self._at < 0 or min(map(min, calls.values())) < self._at:
            self._start()
        for call in sorted(set(itertools.chain(*calls.values()))):
            here = [group for group in groups if call in calls[group.name]]
            for group in here:
                if group.name not in grams:
                    grams[group.name] = self._empty_sums(group)
            self._measure(
                call,
                [
                    gram
                    for group in here
                    for gram in grams[group.name]
                    if len(calls[group.name]) == 1 or gram.linear_map.name == self.calls[call]
                ],
            )
            for group in here:
                if call != calls[group.name][-1]:
                    continue
                self._all_reduce(grams[group.name], group)
                step = LayerStep(
                    group,
                    grams.pop(group.name),
                    final=not self._in_turn,
                    _committing=self._committing,
                )
                yield step
                if step.committed and len(calls[group.name]) > 1:
                    self._end()  # the batches have passed calls through weights that are no longer

    def _all_reduce(self, grams: tuple[GramAccumulator, ...], group: CouplingGroup) -> None:
        """Add up over the ranks; this one may have had no batch of some sort."""
        ranks, corrections = self._prepared.ranks, self._target.needs_dense
        lacking = (
            gram.lacking_bytes(held=held, corrections=corrections)
            for gram in grams
            for held in (False, True)
        )
        with room_beside(self._prepared.model, 0 if ranks.alone else sum(lacking)):
            all_reduce(grams, ranks, group.name)

    def _empty_sums(self, group: CouplingGroup) -> tuple[GramAccumulator, ...]:
        maps = self._consumers[group.name]
        inputs = " and ".join(str(consumer.rows) for consumer in maps)
        needed = sum(8 * gram_numbers(consumer.rows) for consumer in maps)
        with (
            memory_for(f"Gram matrices of {group.name!r} with {inputs} inputs", FOR_MATRICES),
            room_beside(self._prepared.model, needed),
        ):
            return tuple(GramAccumulator(consumer) for consumer in maps)

    def _start(self) -> None:
        self._end()
        self.passes += 1
        self._at = 0
        self._runs = [self._coroutine(index, dense=False) for index in self._mine]
        if self._target.needs_dense:
            self._dense = [self._coroutine(index, dense=True) for index in self._mine]

    def _coroutine(self, index: int, *, dense: bool) -> Coroutine:
        batch, model = self._batches[index], self._prepared.model

        offload = ActivationOffload(batch) if self._prepared.waiting_on_disk else None

        def run() -> object:
            with offload or nullcontext():
                return model(**fresh(batch))

        return Coroutine(index, dense, run, self._scratch, Keeper(self._places), offload)

    def _measure(self, call: int, grams: Sequence[GramAccumulator]) -> None:
        """Let each batch arrive at a call, and add up what it brings."""
        for place, run in enumerate(self._runs):
            dense = self._dense[place] if self._target.needs_dense else None
            held, corrections = run.index >= self._held_from, dense is not None
            needed = sum(g.lacking_bytes(held=held, corrections=corrections) for g in grams)
            with ExitStack() as present:
                present.enter_context(room_beside(self._prepared.model, needed))
                present.enter_context(timed(Stage.WALK))
                for one in (run,) if dense is None else (run, dense):
                    present.enter_context(one.present())
                self._measure_batch(run, dense, call, grams)
        self._at = call

    def _measure_batch(
        self, run: Coroutine, beside: Coroutine | None, call: int, grams: Sequence[GramAccumulator]
    ) -> None:
        """Let one batch arrive at a call, in the dense stream, too, and add up what it brings."""
        stood_there = run.reached == call
        arrival = self._bring(run, call)
        D = None
        if beside is not None:
            dense = self._bring(beside, call)
            # Another group that the same consumer reads may have been committed meanwhile.
            output = self._output(arrival.module, arrival.x) if stood_there else arrival.output
            assert dense.output is not None
            assert output is not None
            D = self._target.correction(dense.output, output, dense.stream, arrival.stream)
        x = afresh(arrival.x)
        with timed(Stage.GRAM):
            for gram in grams:
                add_call(gram, x, D, held=run.index >= self._held_from)

    def _bring(self, run: Coroutine, call: int) -> Arrival:
        """Let a batch run on to a call: it stands before it then, in the dense stream after."""
        while run.reached < call:
            expected = self.calls[run.reached + 1]
            with batch_named(self._prepared.model, run.index):
                arrival = run.advance()
            if arrival is None or arrival.module != expected:
                raise CalibrationError(self._diverged(run, expected))
            self._check_same_tensor(run, arrival)
        assert run.arrived is not None
        return run.arrived

    def _check_same_tensor(self, run: Coroutine, arrival: Arrival) -> None:
        """Hold each batch to what the order of the calls was learned from."""
        first = self._schedule.same_tensor.get(run.reached)
        if first is None:
            return
        if first == run.reached:
            run.read[first] = weakref.ref(arrival.x)
        elif run.read[first]() is not arrival.x:
            raise CalibrationError(
                f"calibration batch {run.index} calls {arrival.module!r} with another tensor than "
                f"{self.calls[first]!r}, which read the same one on other data; give batches that "
                "run alike"
            )

    def _diverged(self, run: Coroutine, expected: str) -> str:
        """Say how a batch takes another way than the first one."""
        way = (
            f"never reaches {expected!r}"
            if run.arrived is None
            else f"calls {run.arrived.module!r} where others call {expected!r}"
        )
        return (
            f"calibration batch {run.index} {way}: what it runs depends on the data or on an "
            "earlier pass, and cannot be measured; give batches that run alike"
        )

    def _end(self) -> None:
        """End all passes; the next group starts new ones."""
        runs, self._runs, self._dense, self._at = [*self._runs, *self._dense], [], [], -1
        # The last to enter a context manager leaves it first, should it change the whole process.
        for run in reversed(runs):
            run.end()
        for name in list(self._exchanged):  # of a pass that failed inside a consumer
            self._exchange(name)

    def _committing(self, step: LayerStep) -> None:
        """Keep dense weights that batches of the dense stream will run through once more."""
        if self._target.needs_dense and self._schedule.sets_out_after(step.group):
            for name, dense in dense_tensors(step.consumers).items():
                self._originals.setdefault(name, dict(dense))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Suspend passes of the pruned stream before each consumer, dense ones after it."""

        def before(name: str, x: Any) -> None:
            run = running()
            if run is not None and not run.dense:
                suspend(Arrival(name, x, self._output(name, x), run.keeper.take(name)))
            elif run is not None:
                self._exchange(name)

        def after(name: str, x: Any, y: Tensor) -> None:
            run = running()
            if run is not None and run.dense:
                output = self._recurrent_output(name, x)
                self._exchange(name)
                suspend(Arrival(name, x, y if output is None else output, run.keeper.take(name)))

        def exchange(name: str, *_: Any) -> None:
            run = running()
            if run is not None and run.dense:
                self._exchange(name)

        def keeper() -> Keeper | None:
            run = running()
            return None if run is None else run.keeper

        model = self._prepared.model
        watched = {place.module for places in self._places.values() for place in places}
        before_walk = set(self._originals) - self._names if self._target.needs_dense else set()
        with (
            kept_streams(model, watched, keeper),
            reads(model, self._names, before, after),
            reads(model, before_walk, exchange, exchange),
        ):
            yield

    def _output(self, name: str, x: Any) -> Tensor | None:
        """Return what a consumer makes of its inputs as long as nothing new is committed.

        Called by the pass itself, so that autocast holds as it does for the module.
        """
        if not self._target.needs_dense:
            return None
        found = self._recurrent_output(name, x)
        if found is None:
            found = output_of(self._prepared.model.get_submodule(name), x)
        assert isinstance(found, Tensor)
        return found

    def _recurrent_output(self, name: str, x: Tensor) -> Tensor | None:
        """Return what the gates of a recurrent layer take from its inputs; None of other layers."""
        module = self._prepared.model.get_submodule(name)
        return input_gates(module, x) if isinstance(module, RECURRENT) else None

    def _exchange(self, name: str) -> None:
        """Put the dense tensors of a committed consumer in the place of the new ones, or back."""
        originals = self._originals.get(name, {})
        if originals:
            self._exchanged ^= {name}
        for key, tensor in self._prepared.model.get_submodule(name).named_parameters(recurse=False):
            if key in originals:
                tensor.data, originals[key] = originals[key], tensor.data


def _parted(inputs: ModelInputs, batches: Sequence[Batch], held: int) -> tuple[list[Batch], int]:
    """Return batches none of which is held out in part, and how many of them are not at all."""
    fitted: list[Batch] = []
    rest: list[Batch] = []
    left = sum(map(inputs.count, batches)) - held
    for batch in batches:
        count = inputs.count(batch)
        if left > 0:
            fitted.append(inputs.rows(batch, 0, left))
        if left < count:
            rest.append(inputs.rows(batch, max(left, 0), None))
        left -= count
    return [*fitted, *rest], len(fitted)


def add_call(gram: GramAccumulator, x: Any, D: Tensor | None, *, held: bool) -> None:
    """Add what a consumer reads in a call, with corrections in the form of its output."""
    corrections = None if D is None else gram.linear_map.read_corrections(D, x)
    gram.pass_over(gram.linear_map.passed_over(x), held=held)
    done = 0
    for X in gram.linear_map.read_inputs(x):
        D_part = None if corrections is None else corrections[done : done + len(X)]
        gram.add(X, D_part, held=held)
        done += len(X)


def walk(
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    *,
    in_turn: bool = True,
    target: Target = Target.WEIGHTS,
    held: int = 0,
    committed: Mapping[str, DenseTensors] | None = None,
) -> Walk:
    """Walk the calibration data through a model, and stop wherever a group can be solved.

    Parameters
    ----------
    prepared
        The model with its data.
    groups
        What to stop for; prunable, in any order.
    in_turn
        Whether each group is measured on what was committed before it, as pruning does.  If not,
        all groups are measured on the model as it is, in a single pass, and none can be committed.
    target
        What consumers are to reproduce.  Where that depends on what the dense model computes, each
        batch also runs through the dense weights: it passes a consumer before new weights are
        committed, so that no second model is held.
    held
        How many samples, the last ones, no weight is fitted to: they choose how much of the
        corrections targets have (`LayerStep.regularization`).
    committed
        The dense tensors of modules to which an earlier walk has committed, by name.

    Returns
    -------
    Walk
        To be iterated over once; it yields a `LayerStep` for each group, in the order in which the
        model reads them.

    Raises
    ------
    ModelError
        If a consumer cannot be refitted, or is never called.
    CalibrationError
        If a batch fails, or takes another way through the model than the others; it names the
        batch and the module.
    NonFiniteError
        If what a consumer reads is not finite.
    """
    return Walk(prepared, groups, in_turn, target, held, committed or {})
