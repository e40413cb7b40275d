"""How much the model's outputs change with what a layer puts out: one currency for all layers.

To second order, the Kullback-Leibler divergence between the dense model's predictions and those of
a model one of whose consumers has changed by D, (p, m), is half of ``vec(D)' F vec(D)`` a
prediction, with F the Fisher matrix of its weights.  Its nearest Kronecker product is one power
step away (van Loan and Pitsianis, "Approximation with Kronecker products", 1993), and needs one
backward pass of the dense model.  With M the gradient at the weights of the log-likelihood of a
label *sampled* from the model's own prediction,

    A = sum M M'        B = sum M' M        T = tr(A) = tr(B)

    divergence of D, in nats a prediction:   tr(D' A D B) / (2 N T)

over N predictions.  A classifier makes one prediction of all positions (pixels, patches) of an
image, whose gradients ``x_t g_t'`` add up to M: errors that all positions have in common count much
more than others.  A language model makes one at every position; its gradients at different
positions are taken as uncorrelated, ``A = sum |g_t|^2 x_t x_t'`` and ``B = sum |x_t|^2 g_t g_t'``.

How well a refit fits the samples that A was summed over says little where it has as many free
weights as these have rows.  That differs between the layers of one network where each reads a
sample at another number of positions, as convolutions do: thousands in the first of them, one in a
classifier.  Some samples are therefore held out there, with factors of their own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graph import CouplingGroup
from osscar.base.errors import NonFiniteError, OsscarError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.base.messages import warn
from osscar.base.progress import stage
from osscar.data.batches import Batch, ModelInputs
from osscar.network.model_state import frozen_weights
from osscar.network.modules import device_of, forward
from osscar.network.predictions import (
    known_prediction,
    named_logits,
    place_of_classes,
    reads_sequences,
)
from osscar.preparation.consumer import LinearMap, without_idle
from osscar.preparation.prepare import Prepared
from osscar.preparation.products import Several, holder
from osscar.preparation.recurrent import RECURRENT, gates_shown
from osscar.preparation.routing import afresh, reads
from osscar.walk.gram import posed
from solvers import Consumer, SubsetProblem
from solvers.closed_forms.fixed_rows import FixedRows
from solvers.closed_forms.refit import refit
from solvers.linalg.gram import symmetric_part

_POSITIONS_AT_ONCE = 1024
"""Tokens in a batch: a backward pass keeps the logits of all of them, in several copies."""

_SAMPLES_AT_ONCE = 16
"""Images in a batch, or samples of anything else."""

_HELD_OUT = 4
"""One in so many batches is held out; with fewer batches, none is."""

_MOST_BYTES = 2 << 30
"""Memory of the factors that are held at a time; a model that needs more is passed several times.
"""

_LEAST_SHARE = 1e-7
"""Eigenvalues of B below this share of the largest are rounding of float32, and left out."""


@dataclass(eq=False)
class Factors:
    """The two factors of the Fisher matrix of one consumer's weights, as sums in float32.

    `inputs` are A, (p, p), `outputs` B, (m, m), and `energy` T, the trace of either, for a consumer
    of p inputs and m outputs; `held` are those of samples that were held out.  `axis` is the
    dimension of what the module reads that counts samples, None where nobody knows; and `rows` at
    how many positions it read anything.
    """

    linear_map: LinearMap
    inputs: Tensor = field(repr=False)
    outputs: Tensor = field(repr=False)
    energy: float = 0.0
    axis: int | None = None
    rows: int = 0
    held: Factors | None = field(default=None, repr=False)

    @classmethod
    def of(cls, linear_map: LinearMap) -> Factors:
        """Start with nothing."""
        p, m = linear_map.read_weight().shape
        device = device_of(linear_map.module)
        return cls(linear_map, torch.zeros(p, p, device=device), torch.zeros(m, m, device=device))

    def add(self, x: Any, g: Tensor, samples: int | None) -> None:
        """Add one call: what the module read, and the gradient at what it put out.

        These are of so many samples, each with one prediction, which are told apart by the
        dimension in which they lie; None where every position has its own.
        """
        if not bool(torch.isfinite(g).all()):
            raise NonFiniteError(
                f"the gradients at the outputs of {self.linear_map.label!r} have NaN or infinite "
                "entries; use --dtype float32, or --allocation uniform, which needs none"
            )
        if samples == 1 and not isinstance(x, Several):
            self._add_sample(x, g)
            return
        if samples is None or self.axis is None or isinstance(x, Several):
            self._add_positions(x, g)
            return
        x, g = x.movedim(self.axis, 0), g.movedim(self.axis, 0)
        for one, gradient in zip(x.chunk(samples), g.chunk(samples), strict=True):
            self._add_sample(one, gradient)

    def _pieces(self, x: Any, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        gradients = self.linear_map.read_outputs(g, x).float()
        done = 0
        for X in self.linear_map.read_inputs(x):
            self.rows += len(X)
            yield X.float(), gradients[done : done + len(X)]
            done += len(X)

    def _add_sample(self, x: Tensor, g: Tensor) -> None:
        M = sum((X.T @ G for X, G in self._pieces(x, g)), start=torch.zeros((), device=g.device))
        self.inputs.addmm_(M, M.T)
        self.outputs.addmm_(M.T, M)
        self.energy += float(M.double().square().sum())

    def _add_positions(self, x: Any, g: Tensor) -> None:
        for X, G in self._pieces(x, g):
            gains, sizes = G.square().sum(1, keepdim=True), X.square().sum(1, keepdim=True)
            scaled = X * gains.sqrt()
            self.inputs.addmm_(scaled.T, scaled)
            scaled = G * sizes.sqrt()
            self.outputs.addmm_(scaled.T, scaled)
            self.energy += float((gains.double() * sizes.double()).sum())

    def weights(self, predictions: int) -> Tensor:
        """Return ``W0 L`` with ``B = L L'``, whose squared error is the divergence in nats.

        It is averaged over N `predictions`.  Fixed rows are zero: they are by how much they change.
        """
        held = () if self.held is None else (self.held.inputs,)
        sums = (self.inputs, self.outputs, torch.tensor(self.energy), *held)
        if not all(bool(torch.isfinite(each).all()) for each in sums):
            raise NonFiniteError(
                f"the inputs of {self.linear_map.label!r} are so large that their products with "
                "gradients overflow float32; scale the calibration data, or use --allocation "
                "uniform, which needs none"
            )
        values, vectors = torch.linalg.eigh(self.outputs.double())
        used = values > _LEAST_SHARE * values[-1]
        root: Tensor = vectors[:, used] * (values[used] / (2 * predictions * self.energy)).sqrt()
        return self.linear_map.read_unit_weight() @ root

    def consumer(self, weights: Tensor, damp: float) -> tuple[Consumer, FixedRows | None]:
        """Return quadratic terms whose loss is the predicted divergence in nats a prediction.

        ``tr(D' A D B)`` is the plain squared error of the weights ``W0 L`` under the Gram matrix A,
        and the least-squares refit is the same.  `weights` are these, `damp` is as of
        `damped_by_input`, and the rest of what is returned as of `posed`.
        """
        A, _ = symmetric_part(self.inputs, cut=self.linear_map.fixed)
        return posed(self.linear_map, A, weights.clone(), damp=damp, positions=self.rows)


@dataclass(frozen=True, eq=False)
class GroupCurvature:
    """What removing units of one group costs in the outputs of the model.

    `factors` are of each of its consumers that read anything: to some experts no token may be
    sent.  Where gradients have not `reached` every consumer, all outputs of a layer count alike,
    and relative to its own size: the layer's own currency, in which layers hardly compare.
    """

    group: CouplingGroup
    factors: tuple[Factors, ...] = field(repr=False)
    predictions: int
    reached: bool = True
    held_predictions: int = 0

    @cached_property
    def _weights(self) -> tuple[Tensor, ...]:
        return tuple(one.weights(self.predictions) for one in self.factors)

    def problem(self, damp: float) -> SubsetProblem:
        """Pose the choice of units with the least predicted divergence, in nats a prediction."""
        return self._posed(damp)[0]

    def _posed(self, damp: float) -> tuple[SubsetProblem, tuple[FixedRows | None, ...]]:
        """Return the problem, and what gives the fixed rows of each consumer back."""
        with warnings.catch_warnings():
            # Fewer positions than inputs make A singular, which damping is there for.
            warnings.simplefilter("ignore", UserWarning)
            both = zip(self.factors, self._weights, strict=True)
            found = [one.consumer(weights, damp) for one, weights in both]
        consumers = tuple(consumer for consumer, _ in found)
        problem = SubsetProblem(consumers, self.group.units, self.group.name)
        return problem, tuple(rows for _, rows in found)

    @property
    def holds_out(self) -> bool:
        """Whether samples were held out, and reach every consumer."""
        held = [one.held for one in self.factors]
        return self.held_predictions > 0 and all(h is not None and h.energy > 0 for h in held)

    def held_loss(self, damp: float, kept: Tensor) -> float:
        """Return what refitted weights of some units lose on held-out samples.

        That is the predicted divergence, in nats a prediction, undamped.
        """
        problem, fixed = self._posed(damp)
        weights, _ = refit(problem, kept)
        total = 0.0
        for one, dense, W, rows in zip(self.factors, self._weights, weights, fixed, strict=True):
            assert one.held is not None
            D = (W if rows is None else torch.cat([rows.refit(W), W])) - dense
            total += float((D * (one.held.inputs.double() @ D)).sum())
        return total * self.predictions / self.held_predictions


def curvature(
    prepared: Prepared, groups: Sequence[CouplingGroup], *, samples: int, seed: int
) -> Iterator[GroupCurvature]:
    """Run the dense model forward and backward, and yield what each group's consumers matter.

    At most so many of the calibration samples are used; where the factors take more than two
    gigabytes, they pass several times.  Labels are drawn by the seed.

    Raises
    ------
    NonFiniteError
        If gradients are not finite; names the module.
    """
    batches = small_batches(prepared, samples)
    held = held_batches(prepared, batches)
    rounds = list(parts(prepared, groups, copies=2 if held else 1))
    with stage("curvature", total=len(rounds) * len(batches)) as bar:
        for part in rounds:
            factors = {g.name: [Factors.of(map) for map in maps] for g, maps in part}
            every = [f for found in factors.values() for f in found]
            generator = torch.Generator(device_of(prepared.model)).manual_seed(seed)
            _find_axes(prepared, every)
            if held:
                for one in every:
                    one.held = dataclasses.replace(Factors.of(one.linear_map), axis=one.axis)
            apart = [one.held for one in every if one.held is not None]
            fitted = rest = 0
            for index, batch in enumerate(batches):
                fits = index < len(batches) - held
                made = _one_pass(prepared, batch, every if fits else apart, generator)
                bar.advance()
                if made is None:
                    fitted = 0
                    break
                fitted, rest = (fitted + made, rest) if fits else (fitted, rest + made)
            for group, _ in part:
                found = without_idle(factors.pop(group.name))
                reached = bool(fitted) and all(f.energy > 0 for f in found)
                if not reached:
                    found = tuple(_own_currency(prepared, batches, found))
                yield GroupCurvature(
                    group,
                    found,
                    fitted if reached else 1,
                    reached,
                    held_predictions=rest if reached else 0,
                )


def held_batches(prepared: Prepared, batches: Sequence[Batch]) -> int:
    """Return how many of the batches that curvature is measured on, the last, are held out.

    None are of tokens, of which all layers of a language model read as many, so that none is
    fitted much better than another.
    """
    return 0 if prepared.inputs.tokens else len(batches) // _HELD_OUT


def small_batches(prepared: Prepared, samples: int) -> list[Batch]:
    """Return the first samples, few at a time."""
    inputs = prepared.inputs
    if inputs.apart:
        return inputs.batches(prepared.model, 1)[:samples]
    first = inputs.batches(prepared.model, samples)[0]
    length = inputs.settings.get("seqlen")
    rows = _SAMPLES_AT_ONCE if length is None else max(1, _POSITIONS_AT_ONCE // length)
    starts = range(0, inputs.count(first), rows)
    return [inputs.rows(first, start, start + rows) for start in starts]


def _find_axes(prepared: Prepared, factors: Sequence[Factors]) -> None:
    """Find the dimension in which samples lie, in front or not, by running two numbers of them."""
    inputs = prepared.inputs
    if inputs.tokens or inputs.apart:  # whose positions, or whole calls, count
        return
    shapes: list[dict[str, list[torch.Size]]] = []
    for count in (2, 3):
        seen: dict[str, list[torch.Size]] = {one.linear_map.name: [] for one in factors}

        def see(name: str, x: Any, seen: dict[str, list[torch.Size]] = seen) -> None:
            seen[name].append(torch.Size() if isinstance(x, Several) else x.shape)

        with torch.no_grad(), reads(prepared.model, seen, see):
            forward(prepared.model, inputs.some(prepared.model, count))
        shapes.append(seen)
    for one in factors:
        one.axis = _sample_axis(*(seen[one.linear_map.name] for seen in shapes))


def _sample_axis(two: Sequence[torch.Size], three: Sequence[torch.Size]) -> int | None:
    """Return the one dimension that grows from two to three by half, in every call; else None."""
    found = set()
    for few, more in zip(two, three, strict=False):
        grown = [d for d, (a, b) in enumerate(zip(few, more, strict=False)) if a != b]
        fits = len(few) == len(more) and len(grown) == 1 and 3 * few[grown[0]] == 2 * more[grown[0]]
        found.add(grown[0] if fits else None)
    return found.pop() if len(found) == 1 and len(two) == len(three) else None


def parts(
    prepared: Prepared, groups: Sequence[CouplingGroup], copies: int = 1
) -> Iterator[list[tuple[CouplingGroup, tuple[LinearMap, ...]]]]:
    """Yield groups, with their consumers, whose factors, in some copies, fit into memory."""
    part: list[tuple[CouplingGroup, tuple[LinearMap, ...]]] = []
    filled = 0
    for group in groups:
        maps = prepared.linear_maps(group)
        shapes = (map.read_weight().shape for map in maps)
        size = sum(4 * copies * (p * p + m * m) for p, m in shapes)
        if part and filled + size > _MOST_BYTES:
            yield part
            part, filled = [], 0
        part.append((group, maps))
        filled += size
    yield part


# ---- one forward and backward pass -------------------------------------------------------


def _one_pass(
    prepared: Prepared, batch: Batch, factors: Sequence[Factors], generator: torch.Generator
) -> int | None:
    """Add what one batch shows, and return how many predictions it made; None if that fails.

    Code without a derivative, or that only runs without gradients, may be anywhere in anyone's
    model; what fails without them, too, is found on the walk.
    """
    model, samples = prepared.model, prepared.inputs.count(batch)
    with (
        frozen_weights(model),  # a third of a backward pass that nobody needs
        torch.enable_grad(),
        torch.backends.cudnn.flags(enabled=False),  # recurrent layers go back in training alone
        _observed(model, factors) as seen,
    ):
        try:
            result = forward(model, batch)
            outputs, gradients, predictions = _sampled(result, batch, prepared.inputs, generator)
            if outputs:
                seen["samples"] = samples if predictions == samples else None
                torch.autograd.backward(outputs, gradients)
        except OsscarError:
            raise
        except Exception as error:
            let_shortage_pass(error)
            warn(
                f"no gradients flow through {type(model).__name__}, so that layers count by their "
                f"own losses: {first_line(error)}"
            )
            return None
    return predictions


def _by_module(factors: Sequence[Factors]) -> dict[str, list[Factors]]:
    found: dict[str, list[Factors]] = {}
    for one in factors:
        found.setdefault(one.linear_map.name, []).append(one)
    return found


@contextmanager
def _observed(model: nn.Module, factors: Sequence[Factors]) -> Iterator[dict[str, int | None]]:
    """Add to the factors of a module whenever a gradient comes back to what it put out.

    Yielded is where to say how many samples a batch has, with one prediction each.
    """
    by_module = _by_module(factors)
    seen: dict[str, int | None] = {"samples": None}

    def watch(name: str, x: Any, y: Any) -> Any:
        read = x.multiplied if isinstance(x, Several) else x
        version = None if read.is_inference() else read._version
        leaf = not y.requires_grad
        if leaf:
            y = y.detach().requires_grad_()

        def receive(g: Tensor) -> None:
            if version is not None and read._version != version:
                return  # overwritten since: the layer is left without gradients
            with torch.no_grad():
                once = afresh(x)
                for one in by_module[name]:
                    one.add(once, g, seen["samples"])

        y.register_hook(receive)
        # What comes next may write to it, which no leaf of a graph allows.
        return y.clone() if leaf else y

    modules = {name: holder(model, name) for name in by_module}
    plain = [name for name, module in modules.items() if not isinstance(module, RECURRENT)]
    with ExitStack() as watching:
        watching.enter_context(reads(model, plain, after=watch))
        for name, module in modules.items():
            if isinstance(module, RECURRENT):
                watching.enter_context(gates_shown(module, partial(watch, name)))
        yield seen


def _sampled(
    result: Any, batch: Batch, inputs: ModelInputs, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], int]:
    """Return what to differentiate, from which gradients, and how many predictions these are.

    Logits have the gradient of the log-likelihood of labels drawn from them.  Any other output is
    taken as the mean of a Gaussian, as wide as the outputs spread: a random projection of it has
    the same Fisher matrix (Gauss-Newton).
    """
    logits = logits_of(result, batch, inputs)
    if logits is not None:
        rows = logits.flatten(0, -2)
        if not rows.requires_grad:
            return [], [], 0
        gradient = rows.detach().float().softmax(-1)
        labels = _drawn(gradient, generator)
        gradient[torch.arange(len(rows), device=rows.device), labels] -= 1
        return [rows], [gradient.to(rows.dtype)], len(rows)
    outputs = [
        leaf
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    if not outputs:
        return [], [], 0
    # One sample is one prediction of everything that the model puts out about it.
    count = len(outputs[0]) if outputs[0].ndim else 1
    return outputs, [_projection(output.detach(), generator) for output in outputs], count


def _drawn(chances: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label from each row of probabilities: where their sum passes a uniform number.

    One number a row; `torch.multinomial` takes one for each class, which is a fifth of a pass.
    """
    sums = chances.cumsum(-1)
    draws = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, draws, right=True).clamp_(max=sums.shape[-1] - 1).flatten()


def logits_of(result: Any, batch: Batch, inputs: ModelInputs) -> Tensor | None:
    """Return a table of logits, a row a prediction, (..., classes); None if there is none."""
    table = table_of(result, batch, inputs)
    return None if table is None else as_logits(table)


def table_of(result: Any, batch: Batch, inputs: ModelInputs) -> Tensor | None:
    """Return a table of logits or of probabilities, a row a prediction; None if there is none.

    Where there are labels, their sizes say which dimension holds classes.  A matrix that a model
    makes of images is a classifier's; tokens are of a language model, and what is called `logits`
    of other sequences has a row for each position.
    """
    tokens = inputs.tokens
    named = named_logits(result)
    alone = result if tokens else known_prediction(result)
    found = alone if named is None else named
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        return None
    sequences = reads_sequences(batch.values())
    if inputs.predictions is not None:
        labels = inputs.count(batch), *inputs.predictions
        place = place_of_classes(found.shape, labels, sequences=sequences)
        if place is not None:
            return found.movedim(place, -1)
    pixels = [x for x in batch.values() if x.is_floating_point() or x.dtype is torch.uint8]
    images = any(x.ndim == 4 for x in pixels)
    rows = tokens or (sequences and named is not None)
    if found.shape[-1] < 2 or not (rows or found.ndim == 2):
        return None  # such as those of a segmentation, a map for each class
    if not tokens and inputs.predictions != () and named is None and not images:
        return None  # it may be anything, such as a regression
    return found


def as_logits(table: Tensor, probabilities: bool | None = None) -> Tensor:
    """Return scores of classes, (..., classes), of which the softmax is what a model predicts.

    They are the table itself, or its logarithms where it holds probabilities.
    """
    chances = holds_probabilities(table) if probabilities is None else probabilities
    return table.clamp(min=1e-30).log() if chances else table


def holds_probabilities(table: Tensor) -> bool:
    """Tell whether a table holds probabilities, whose sums are 1."""
    rows = table.detach().flatten(0, -2)
    # Of nearly all models the first row tells that it holds none.
    return _sum_to_one(rows[:1]) and _sum_to_one(rows)


def _sum_to_one(rows: Tensor) -> bool:
    sums = rows.float().sum(-1)
    return bool((rows >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all())


def _projection(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random direction of outputs, relative to their spread."""
    spread = output.float().std(correction=0)
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return (noise / (spread if spread > 0 else 1.0)).to(output.dtype)


# ---- without gradients -------------------------------------------------------------------


def _own_currency(
    prepared: Prepared, batches: Sequence[Batch], factors: Sequence[Factors]
) -> Iterator[Factors]:
    """Return factors that count the relative loss of each layer, as no gradient reaches it."""
    found = [Factors.of(one.linear_map) for one in factors]
    by_module = _by_module(found)

    def see(name: str, x: Any) -> None:
        for one in by_module[name]:
            for X in one.linear_map.read_inputs(x):
                one.rows += len(X)
                one.inputs.addmm_(X.float().T, X.float())

    with torch.no_grad(), reads(prepared.model, by_module, see):
        for batch in batches:
            forward(prepared.model, batch)
    for own in by_module.values():
        size = 0.0
        for one in own:
            W0 = one.linear_map.read_unit_weight()
            size += float((W0 * (one.inputs.double() @ W0)).sum())
        for one in own:
            # With B = I and this T, the loss of removing everything is 1.
            one.outputs = torch.eye(len(one.outputs)).to(one.outputs)
            one.energy = max(size / 2, 1e-30)
            yield one
