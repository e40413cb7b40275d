"""What a pruning run leaves behind: the smaller model, and a report for each layer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from osscar import __version__
from osscar.allocation.limits import Budget
from osscar.allocation.task import SkippedGroup
from osscar.base.errors import EquivalenceError, first_line
from osscar.base.inputs import named_from, opened_from
from osscar.base.memory import attempt
from osscar.base.printable import pluralize, published
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import builder_of
from osscar.checkpoint.directory import SavedCheckpoint
from osscar.data.batches import as_inputs
from osscar.distance.distance import Compared
from osscar.evaluation.speed import measure_forward
from osscar.network.modules import device_of, digest_of_weights
from osscar.offload.on_disk import is_on_disk
from osscar.proof.lineage import Computed, data_record, lineage_of
from osscar.proof.plan import Certificate, Form, PruningPlan
from osscar.report.sections import Section
from osscar.report.shown import Shown
from osscar.request import PruningRequest
from osscar.run.prune_page import prune_page, sections
from osscar.run.target_search import TargetReport
from osscar.walk.layer_report import LayerReport

if TYPE_CHECKING:
    from osscar.recovery.recover import Recovery

_SCHEMA = "osscar.prune/7"
"""Of the document of a run, as ``docs/json.md`` describes it."""


@dataclass(frozen=True, eq=False, repr=False)
class PruningResult(Shown):
    """A smaller model, and how it was pruned.

    Parameters
    ----------
    model
        The shrunk model, in evaluation mode, on the device it was pruned on: the user's own, or an
        `osscar.ProgramModule`, as `form` says.
    plan
        What stays of each group.
    layers
        One report for each group that lost units, in execution order, experts before all else.
    parameters_before, parameters_after
        Tied parameters counted once.
    certificate
        What was proved of the smaller model's program, and how far its outputs are from those of
        the masked model.
    batch_norms
        How many batch-norm layers got new statistics after the proof.
    budget
        What the groups that share a budget came to; None where there is none.
    distance
        How far it is from the dense model on the `held_out` samples, or on the last if there are
        none: by which measure, over which outputs, and why.
    divergence
        The same if it is the Kullback-Leibler divergence of predictions, in nats each; else None.
    agreement
        The share of the same predictions whose likeliest class, or token, is the dense one's.
    held_out
        How many calibration samples no weight was fitted to.
    seconds
        Wall time of the whole run.
    stages
        The same by stage, in the order of the run; ``other`` is what no stage counts.  Empty in a
        sweep, whose points have them.
    request
        The request of the run.
    calibration
        The number and shape of the calibration samples.
    skipped
        The groups that were to be pruned and keep all their units, and why.
    folded
        Names of the plain weights that the dense model computes at every call, such as by weight
        normalization.
    target
        How the size was found for a quality target.
    bfloat16
        What was computed in bfloat16: the loss curves, the dense model's part of the targets.
    """

    model: nn.Module
    plan: PruningPlan
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    certificate: Certificate
    batch_norms: int
    budget: Budget | None
    distance: Compared
    divergence: float | None
    agreement: float | None
    held_out: int
    seconds: float
    request: PruningRequest
    calibration: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    skipped: tuple[SkippedGroup, ...] = ()
    folded: tuple[str, ...] = ()
    target: TargetReport | None = None
    bfloat16: tuple[str, ...] = ()

    def __repr__(self) -> str:
        told = "" if self.divergence is None else f"; {self.divergence:.4g} nats from dense"
        return (
            f"PruningResult({self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"{pluralize(len(self.layers), 'group')} smaller, form {str(self.form)!r}{told}; "
            f"{self.seconds:.1f} s)"
        )

    @property
    def form(self) -> Form:
        """What of the model was shrunk: its modules, or its exported program."""
        return self.plan.form

    def sections(self) -> Iterator[Section]:
        """Return what a page shows that is known without the dense model."""
        return sections(self.record())

    def record(self) -> dict[str, Any]:
        """Return the part of its `document` that is known without the dense model and its data."""
        return {
            "schema": _SCHEMA,
            "osscar_version": __version__,
            "model": lineage_of(self.model).source or type(self.model).__name__,
            "settings": opened_from(self.request.to_json(), Path.cwd()),
            "form": str(self.form),
            "own_code": builder_of(self.model) is None,
            "inputs": _as_json(self.plan.traced),
            **{
                one.name: _as_json(getattr(self, one.name))
                for one in dataclasses.fields(self)
                if one.name not in ("model", "plan", "request")
            },
        }

    def document(
        self,
        dense: nn.Module,
        calibration: Any,
        *,
        source: str | None = None,
        recovery: Recovery | None = None,
        measure: bool = True,
    ) -> dict[str, Any]:
        """Return what is known of the run, as ``docs/json.md`` describes it.

        Parameters
        ----------
        dense, calibration
            The dense model, and the data on which it was pruned.
        source
            The name of the dense model; by default the one by which it was loaded.
        recovery
            What `osscar.recover` made of the smaller model.
        measure
            Whether to time both models, which may also follow the save.
        """
        lineage = lineage_of(dense)
        known = lineage.source or type(dense).__name__
        return {
            **self.record(),
            "model": known if source is None else published(source),
            "classes": list(lineage.classes),
            "calibration": {**self.calibration, **data_record(calibration)},
            "computed": dataclasses.asdict(Computed.of(dense)),
            "recovery": None if recovery is None else recovery.document(),
            **(measured(dense, self.model, calibration) if measure else {}),
        }

    def check_tested(self) -> None:
        """Refuse weights other than those that passed the test of a target (EquivalenceError)."""
        target = self.target
        if target is None or target.chosen is None:
            return
        due, found = target.attempts[target.chosen].weights, digest_of_weights(self.model)
        if found != due:
            raise EquivalenceError(
                f"the model has other weights than that which passed the test of {target.quality} "
                f"{target.most:g}: their digest is {found:.16}, and {due:.16} was tested; "
                "osscar.save(result.model, directory) writes what was changed since, untested"
            )

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        report: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> SavedCheckpoint:
        """Write the smaller model; see `osscar.save`.

        A report, by default the `record`, is written beside it as JSON; of one that `document`
        returned, also as a page, and in the model card.  Of a quality target, only the weights that
        passed the test are written: others are an EquivalenceError.
        """
        self.check_tested()
        document = self.record() if report is None else report
        is_run = document.get("schema") == _SCHEMA
        if is_run:
            document = named_from(document, Path(directory))
        return checkpoint.save(
            self.model,
            directory,
            tokenizer=tokenizer,
            report=document,
            page=prune_page(document, Path(directory).name) if is_run else None,
            dtype=dtype,
            overwrite=overwrite,
        )


def _as_json(value: Any) -> Any:
    """Return a field as JSON has it."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, tuple):
        return [_as_json(one) for one in value]
    return dataclasses.asdict(value) if hasattr(value, "__dataclass_fields__") else value


def measured(dense: nn.Module, smaller: nn.Module, calibration: Any) -> dict[str, Any]:
    """Return what a document tells of a forward pass of both models, or why that is not known."""
    if is_on_disk(dense):  # its time is that of reading weights
        return {"forward": None, "unmeasured": ""}
    with attempt() as tried:  # no figure of a report is worth a run
        # A program knows nothing of tokens, so the inputs are those of the dense model.
        first = as_inputs(dense, calibration).first()
        sample = {name: tensor.to(device_of(smaller)) for name, tensor in first.items()}
        before, after = measure_forward([dense, smaller], sample)
    if tried.failed:
        why = f"{type(tried.error).__name__}: {first_line(tried.error)}"
        return {"forward": None, "unmeasured": f"a forward pass of both models ({why})"}
    shapes = {name: list(tensor.shape) for name, tensor in sample.items()}
    device = device_of(smaller).type
    forward = {"shapes": shapes, "device": device, "dense": before, "pruned": after}
    return {"forward": forward, "unmeasured": ""}
