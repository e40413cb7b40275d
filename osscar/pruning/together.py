"""What the ranks of a run tell each other: what each is asked, what the first has committed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pydantic import ConfigDict

from osscar.base.errors import RanksError
from osscar.base.json_files import STRICT, parse_json
from osscar.base.ranks import Message, Ranks
from osscar.pruning.result import LayerReport
from osscar.pruning.run_log import RunManifest, SiteRecord
from osscar.shrinking.plan import GroupPlan


@dataclass(frozen=True)
class _Words:
    """The part of a record that is no tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    plan: GroupPlan
    report: LayerReport


def check_alike(ranks: Ranks, manifest: RunManifest) -> None:
    """Refuse ranks that make something else, or of something else.

    Raises
    ------
    RanksError
        If options, versions, model or calibration data differ; it names the rank and the option.
    """
    words = Message(json.dumps(dataclasses.asdict(manifest)))
    first, *others = (
        parse_json(told.text, RunManifest, "what a rank is asked")
        for told in ranks.from_all("what each is asked", words)
    )
    for rank, other in enumerate(others, 1):
        difference = other.difference(first)
        if difference is not None:
            raise RanksError(
                f"rank {rank} is not asked for the same as rank 0, where {difference} there; give "
                "all the same options, files and versions"
            )


def told_record(ranks: Ranks, make: Callable[[], SiteRecord]) -> SiteRecord:
    """Return, on every rank, the record that rank 0 makes of a group."""
    made: list[SiteRecord] = []

    def packed() -> Message:
        record = make()
        made.append(record)
        words = {
            "plan": dataclasses.asdict(record.plan),
            "report": dataclasses.asdict(record.report),
        }
        return Message(json.dumps(words), {str(i): W for i, W in enumerate(record.weights)})

    told = ranks.from_first("what became of a group", packed)
    if made:
        return made[0]
    found: _Words = parse_json(told.text, _Words, "the record of rank 0")
    weights = tuple(told.tensors[str(i)] for i in range(len(told.tensors)))
    return SiteRecord(found.plan, found.report, weights)


def told_records(ranks: Ranks, records: Sequence[SiteRecord]) -> tuple[SiteRecord, ...]:
    """Return, on every rank, the records with which rank 0 goes on."""
    count = ranks.decided("how many groups are done", lambda: len(records), int)
    return tuple(told_record(ranks, partial(records.__getitem__, i)) for i in range(count))
