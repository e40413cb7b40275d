"""What a run of pruning prints, and what it tells programs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from osscar.base.printable import are, counted
from osscar.cli.common import document, out, say, say_aside

if TYPE_CHECKING:
    from torch import nn

    from osscar.allocation.budget import Budget
    from osscar.checkpoint.directory import SavedCheckpoint
    from osscar.data.batches import CalibrationData
    from osscar.evaluation.dense import DenseScore
    from osscar.models.loaded import LoadedModel
    from osscar.pruning.result import PruningResult


_WORTH_TELLING = 0.01
"""Of a budget: what is left of it that a line tells of."""


def report_document(
    result: PruningResult,
    dense: nn.Module,
    source: str,
    data: CalibrationData,
    classes: tuple[str, ...] = (),
    score: DenseScore | None = None,
) -> dict[str, Any]:
    """Return what is known of a run, as ``docs/json.md`` describes it; runs both models for it."""
    from osscar.allocation.budget import described
    from osscar.shrinking.lineage import Computed

    return document(
        "prune",
        3,
        {
            "model": source,
            "classes": list(classes),
            "calibration": {**result.calibration, **data.describe()},
            "dense": None if score is None else dataclasses.asdict(score),
            "computed": dataclasses.asdict(Computed.of(dense)),
            "settings": result.settings,
            "parameters_before": result.parameters_before,
            "parameters_after": result.parameters_after,
            "budget": None if result.budget is None else described(result.budget),
            "divergence": result.divergence,
            "held_out": result.held_out,
            "forward": _forward(dense, result.model, data),
            "equivalence_error": result.equivalence_error,
            "batch_norms": result.batch_norms,
            "summed_relative_loss": result.loss,
            "seconds": result.seconds,
            "solve_seconds": result.solve_seconds,
            "layers": [dataclasses.asdict(layer) for layer in result.layers],
            "form": str(result.form),
            "inputs": [dataclasses.asdict(given) for given in result.plan.traced],
            "left_alone": [dataclasses.asdict(group) for group in result.left_alone],
        },
    )


def tell_dense(loaded: LoadedModel, data: CalibrationData) -> DenseScore | None:
    """Print what the dense model is worth on its calibration data, and what is wrong with that."""
    from osscar.base.timing import Stage, timed
    from osscar.evaluation.dense import score_dense
    from osscar.report.evaluation_tables import dense_sentence, dense_warning

    with timed(Stage.DENSE):
        score = score_dense(loaded.model, data, classes=loaded.classes)
    if score is not None:
        told = dataclasses.asdict(score)
        say(dense_sentence(told))
        if score.near_chance:
            say_aside("warning", dense_warning(told), "bold yellow")
    return score


def _forward(dense: nn.Module, pruned: nn.Module, data: CalibrationData) -> dict[str, Any] | None:
    """Measure a forward pass of both models; None where time is that of reading weights."""
    from osscar.data.batches import as_inputs
    from osscar.evaluation.forward import measure_forward
    from osscar.network.modules import device_of
    from osscar.offload.on_disk import is_on_disk

    if is_on_disk(dense):
        return None
    # Of the dense model, since a program knows nothing of tokens; on the device of the pruned one.
    first = as_inputs(dense, data).batches(dense, 1)[0]
    sample = {name: tensor.to(device_of(pruned)) for name, tensor in first.items()}
    before, after = measure_forward([dense, pruned], sample)
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in sample.items()},
        "device": device_of(pruned).type,
        "dense": dataclasses.asdict(before),
        "pruned": dataclasses.asdict(after),
    }


def print_result(result: PruningResult, saved: SavedCheckpoint) -> None:
    """Print the table of layers and what became of the model."""
    from osscar.report.proofs import proofs_in_words
    from osscar.report.run_tables import layers_table, left_alone_table
    from osscar.shrinking.program.input_sizes import fixed_in_words
    from osscar.study.records import Proof

    out.print(layers_table(result.layers))
    if result.left_alone:
        out.print(left_alone_table(result.left_alone))
    dead = sum(layer.dead for layer in result.layers)
    if dead:
        were = "was" if dead == 1 else "were"
        units = f"{counted(dead, 'unit')} {were} dead"
        out.print(f"{units} (zero on all calibration data) and went first")
    if result.layers and not result.held_out:
        out.print("nothing was held out, so that no refit was compared with none on fresh samples")
    bounded = [layer for layer in result.layers if layer.lower_bound is not None]
    if bounded:
        proofs = [
            Proof.WORD if layer.recomputed_bound is None else Proof.RECOMPUTED
            for layer in bounded
            if layer.proved_optimal
        ]
        rests = f"; {proofs_in_words(proofs)}" if proofs else ""
        choices = counted(len(result.layers), "choice")
        out.print(f"{len(proofs)} of {choices} {are(len(proofs))} proved optimal{rests}")
    share = 1 - result.parameters_after / result.parameters_before
    out.print(
        f"{result.parameters_before:,} parameters became {result.parameters_after:,} "
        f"({share:.1%} fewer) in {result.seconds:.1f} s, {result.solve_seconds:.1f} s of them in "
        f"the solver; summed relative loss {result.loss:.4f}"
    )
    for line in _quality_lines(result):
        out.print(line)
    out.print(
        f"proof: the smaller model's outputs equal the masked model's to "
        f"{result.equivalence_error:.1e} of the largest"
    )
    if result.form == "graph":
        chosen = result.request.form == "auto"
        why = ", since more of it could follow than of the modules" if chosen else ""
        out.print(f"form: the exported program{why}")
        fixed = fixed_in_words(dataclasses.asdict(given) for given in result.plan.traced)
        if fixed:
            out.print(f"inputs: {fixed}")
    if result.batch_norms:
        out.print(
            f"batch norm: the statistics of {counted(result.batch_norms, 'layer')} are new "
            f"({result.settings['batch_norm']})"
        )
    reader = "osscar.load reads it"
    if saved.stock:
        reader = "from_pretrained of transformers reads it"
    elif saved.with_code:
        reader += ", and so does from_pretrained(..., trust_remote_code=True)"
    out.print(f"saved: {saved.path} ({saved.bytes / 1e6:.1f} MB of weights; {reader})")


def _quality_lines(result: PruningResult) -> list[str]:
    """Say what the budget came to, and what was predicted and measured of the outputs."""
    budget = result.budget
    lines = [] if budget is None else [budget_line(budget)]
    if budget is not None and not budget.comparable:
        lines.append(
            "no gradient reaches some groups, whose widths were chosen by their own relative loss"
        )
    if result.divergence is not None:
        data = "held-out" if result.held_out else "the last"
        predicted = (
            ""
            if budget is None or budget.predicted is None
            else (
                f"predicted {budget.predicted:.4f} nats"
                + ("" if budget.gap is None else f" (within {budget.gap:.1e} of the least)")
                + ", "
            )
        )
        lines.append(
            f"divergence from the dense predictions: {predicted}measured "
            f"{result.divergence:.4f} nats on {data} calibration samples"
        )
    else:
        lines.append(
            "divergence from the dense predictions: not measured, as no output is known to be "
            "scores of classes (the name `logits` says so, or labels, where it is the only output)"
        )
    return lines


def budget_line(budget: Budget) -> str:
    """Say what was asked for, and what it came to."""
    if budget.cost == "time":
        return (
            f"timed: {1 / budget.reached:.2f} times as fast as the dense model on a calibration "
            f"batch; {1 / budget.limit:g} was asked for"
        )
    short = f"; it is {budget.short:.1%} below, as widths move in steps"
    return (
        f"budget: {budget.reached:,.0f} of {budget.dense:,.0f} {budget.cost} "
        f"({budget.reached / budget.dense:.1%}), at most {budget.limit:,.0f} were asked for"
        f"{short if budget.short > _WORTH_TELLING else ''}"
    )
