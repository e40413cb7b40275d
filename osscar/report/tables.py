"""Rich tables of results; every number comes from a result object."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from graph.groups import CouplingGroup, Slot

if TYPE_CHECKING:
    from osscar.evaluation.images import ImageComparison, ImageEvaluation
    from osscar.evaluation.language import Comparison, Evaluation
    from osscar.pruning.result import LayerReport
    from solvers import BackendInfo, Capabilities


def layers_table(layers: Sequence[LayerReport]) -> Table:
    """Return one row for each pruned group."""
    table = new_table("loss by layer", "group", "kept >", "loss >", "status", "seconds >")
    dead = any(layer.dead for layer in layers)
    bounds = any(layer.lower_bound is not None for layer in layers)
    if dead:
        table.add_column("dead", justify="right")
    if bounds:
        table.add_column("gap", justify="right")
    for layer in layers:
        cells = [
            layer.name,
            f"{layer.kept} of {layer.units}",
            f"{layer.relative_loss:.4f}",
            layer.status.lower().replace("_", " "),
            f"{layer.solve_seconds:.2f}",
        ]
        if dead:
            cells.append(str(layer.dead) if layer.dead else "")
        if bounds:
            cells.append("" if layer.gap is None else f"{layer.gap:.1%}")
        table.add_row(*cells)
    return table


def comparison_table(comparison: Comparison, name: str = "pruned") -> Table:
    """Return a model beside its dense original, with ratios."""
    table = new_table("", "", "dense >", f"{name} >", "ratio >")
    dense, model, ratios = comparison.dense, comparison.model, comparison.ratios
    for (label, before), (_, after), ratio in zip(
        _numbers(dense),
        _numbers(model),
        (
            ratios.parameters,
            ratios.perplexity,
            ratios.prefill_speed,
            ratios.decode_speed,
            ratios.flops_per_token,
            ratios.parameter_bytes,
            ratios.disk_bytes,
            None,
        ),
        strict=True,
    ):
        table.add_row(label, before, after, "" if ratio is None else f"{ratio:.2f}x")
    return table


def evaluation_table(evaluation: Evaluation, name: str) -> Table:
    """Return the numbers of one model."""
    table = new_table("", "", f"{name} >")
    for label, value in _numbers(evaluation):
        table.add_row(label, value)
    return table


def _numbers(evaluation: Evaluation) -> list[tuple[str, str]]:
    quality, speed, size = evaluation.quality, evaluation.speed, evaluation.footprint
    return [
        ("parameters", f"{size.parameters:,}"),
        ("perplexity", f"{quality.perplexity:.3f}"),
        ("prefill, tokens/s", f"{speed.prefill_tokens_per_second:,.0f}"),
        ("decode, tokens/s", f"{speed.decode_tokens_per_second:,.1f}"),
        ("FLOPs a token", _engineering(size.flops_per_token)),
        ("weights in memory", _bytes(size.parameter_bytes)),
        ("weights on disk", _bytes(size.disk_bytes)),
        ("peak memory", _bytes(size.peak_memory_bytes)),
    ]


def image_comparison_table(comparison: ImageComparison, name: str = "pruned") -> Table:
    """Return a model that reads images beside its dense original, with ratios."""
    rows = new_table("", "", "dense >", f"{name} >", "ratio >")
    ratios = comparison.ratios
    shown = (
        ratios.parameters,
        ratios.top1,
        ratios.top5,
        *(None, None),
        ratios.images_per_second,
        ratios.flops_per_image,
        ratios.parameter_bytes,
        ratios.disk_bytes,
        None,
    )
    before, after = _image_numbers(comparison.dense), _image_numbers(comparison.model)
    for (label, dense), (_, mine), ratio in zip(before, after, shown, strict=True):
        if mine:
            rows.add_row(label, dense, mine, "" if ratio is None else f"{ratio:.2f}x")
    return rows


def image_evaluation_table(evaluation: ImageEvaluation, name: str) -> Table:
    """Return the numbers of one model that reads images."""
    rows = new_table("", "", f"{name} >")
    for label, value in _image_numbers(evaluation):
        if value:
            rows.add_row(label, value)
    return rows


def _image_numbers(evaluation: ImageEvaluation) -> list[tuple[str, str]]:
    quality, size = evaluation.quality, evaluation.footprint
    return [
        ("parameters", f"{size.parameters:,}"),
        ("top-1", _percent(quality.top1)),
        ("top-5", _percent(quality.top5)),
        ("agreement with dense", _percent(quality.agreement)),
        ("KL from dense, nats", "" if quality.kl is None else f"{quality.kl:.4f}"),
        (f"images/s ({evaluation.batch_size} at once)", f"{evaluation.images_per_second:,.1f}"),
        ("FLOPs an image", _engineering(size.flops_per_image)),
        ("weights in memory", _bytes(size.parameter_bytes)),
        ("weights on disk", _bytes(size.disk_bytes)),
        ("peak memory", _bytes(size.peak_memory_bytes)),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def groups_table(groups: Sequence[CouplingGroup], residual: Collection[str] = ()) -> Table:
    """Return one row for each coupling group, with the parameters that all its units hold.

    Parameters
    ----------
    groups
        The groups.
    residual
        The names of those that are residual streams.
    """
    table = new_table(
        "", "group", "kind", "units >", "rows/unit >", "producers", "consumers", "parameters >"
    )
    for group in groups:
        table.add_row(
            Text(group.name, style="" if group.prunable else "dim"),
            f"{group.kind}, residual" if group.name in residual else str(group.kind),
            str(group.units),
            str(max((slot.width for slot in group.consumers), default=0)),
            _modules(group.producers),
            _modules(group.consumers),
            f"{group.removable * group.units:,}" if group.prunable else "frozen",
        )
    return table


def _modules(slots: Sequence[Slot]) -> str:
    names = list(dict.fromkeys(_short(slot) for slot in slots))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(slot: Slot) -> str:
    """Return the last part of a module's name, and what a number is counted in."""
    parts = slot.module.split(".")
    last = next((i for i, part in enumerate(reversed(parts)) if not part.isdecimal()), 0)
    return ".".join(parts[-last - 1 :]) or slot.tensor


def backends_table(infos: Sequence[BackendInfo]) -> Table:
    """Return one row for each registered backend."""
    table = new_table("", "backend", "kind", "takes", "options", "what it does", "available")
    for info in infos:
        options = ", ".join(f"{key}={value}" for key, value in info.options.items())
        available = Text("yes", style="green") if info.unavailable is None else info.unavailable
        table.add_row(
            info.name, info.kind, _takes(info.capabilities), options, info.summary, available
        )
    return table


def _takes(capabilities: Capabilities) -> str:
    limits = [
        "" if capabilities.wide_units else "units of one row",
        "" if capabilities.several_consumers else "one consumer",
        f"up to {capabilities.max_units} units" if capabilities.max_units is not None else "",
        "" if "cuda" in capabilities.devices else "CPU only",
    ]
    return ", ".join(limit for limit in limits if limit) or "everything"


class _PlainTable(Table):
    """A table whose cells are taken as they are: names of things are no markup."""

    def add_row(self, *cells: RenderableType | None, **more: Any) -> None:
        super().add_row(*(Text(c) if isinstance(c, str) else c for c in cells), **more)


def new_table(title: str, *columns: str) -> Table:
    """Return an empty table; a column whose name ends in ``>`` is aligned to the right."""
    table = _PlainTable(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    for index, column in enumerate(columns):
        right = column.endswith(">")
        table.add_column(
            Text(column.removesuffix(">").rstrip()),
            justify="right" if right else "left",
            no_wrap=right or index == 0,  # names are to be copied whole
        )
    return table


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _engineering(value: float) -> str:
    if value <= 0:
        return "0"
    power = min(int(math.log10(value)) // 3, 4)
    return f"{value / 1000**power:.2f} {('', 'k', 'M', 'G', 'T')[power]}"
