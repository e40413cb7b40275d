"""``README.md``: the model card of a checkpoint, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from torch import nn
from transformers import PreTrainedModel

from osscar import __version__
from osscar.base.printable import pluralize, printable
from osscar.network.modules import count_parameters, number_format
from osscar.proof.lineage import Lineage, structure_of
from osscar.proof.plan import combined_groups

CARD_FILE = "README.md"

_TEMPLATE = jinja2.Template(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))

_ASKED = (
    *("sparsity", "params", "size", "flops", "speedup"),
    *("heads", "neurons", "channels", "residual", "experts", "backend", "target"),
)
"""Settings of a pruning that the card repeats, where they are set."""


def model_card(
    model: nn.Module,
    lineage: Lineage,
    report: Mapping[str, Any],
    *,
    stock: bool,
    auto: str | None,
    own_code: bool,
) -> str:
    """Return the model card of a checkpoint.

    Of a `report` that is no pruning or recovery nothing is told; `stock` says whether transformers
    reads it, `auto` by which class it does with code, `own_code` whether a dense model is needed.
    """
    schema = str(report.get("schema"))
    pruning = report if schema.startswith("osscar.prune/") else {}
    recovers = pruning or schema.startswith("osscar.recover/")
    after, removed = count_parameters(model), list(_removed(lineage))
    before, held = pruning.get("parameters_before", after), pruning.get("held_out")
    structure = structure_of(model)
    card: str = _TEMPLATE.render(
        library="transformers" if isinstance(model, PreTrainedModel) else "pytorch",
        source=_short(lineage.source),
        gone=f"{1 - after / before:.1%}" if after < before else "",
        name=type(model if structure is None or not own_code else structure.model).__name__,
        stock=stock,
        own_code=own_code,
        auto=auto,
        removed=removed,
        kinds=" and ".join(kind for kind, *_ in removed) or "units",
        before=before,
        after=after,
        made=list(_made(model, lineage, pruning)),
        divergence=pruning.get("divergence"),
        judged=pluralize(held, "held-out sample") if held else "calibration data",
        recovery=report["recovery"] if recovers else None,
    )
    return card


def _short(source: str) -> str:
    """Return a source without the folders that it lies in, and with no signs of Markdown."""
    name = source.removeprefix("directory ")
    if name != source or Path(name).is_absolute():
        name = Path(name).name
    return printable(name).translate({ord(c): f"\\{c}" for c in "\\|[]<>`*_"})


def _removed(lineage: Lineage) -> Iterator[tuple[str, int, int, int]]:
    """Yield each kind, its groups, and how many units these had and have, over all runs."""
    groups = combined_groups(lineage.plans)
    for kind in dict.fromkeys(group.kind for group in groups):
        mine = [group for group in groups if group.kind == kind]
        dense, kept = sum(group.units for group in mine), sum(len(group.kept) for group in mine)
        yield kind, len(mine), dense, kept


def _made(
    model: nn.Module, lineage: Lineage, pruning: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what the model was made of, and how."""
    if lineage.source:
        yield "dense model", _short(lineage.source)
    settings = pruning.get("settings", {})
    said = [f"{name} {settings[name]}" for name in _ASKED if settings.get(name) is not None]
    if said:
        yield "asked for", _short(", ".join(said))
    for seen in lineage.calibration:
        count = "" if seen.samples is None else f"{pluralize(seen.samples, 'sample')} of "
        yield "has seen", f"{count}{_short(seen.source)}"
    for certificate in lineage.certificates:
        yield from certificate.rows()
    yield "number format", str(number_format(model)).removeprefix("torch.")
    yield "made with", f"osscar {__version__}"
