"""What goes well and wrong between ranks, without a model."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from osscar.base.ranks import together
from osscar.cli.common import guard


def apart(_: Path) -> None:
    """Do different things on different ranks."""
    with guard(), together() as ranks:
        ranks.all_reduce("apples" if ranks.first else "pears", [torch.ones(2)])


def formats(_: Path) -> None:
    """Add up numbers that do not have the same format."""
    with guard(), together() as ranks:
        ranks.all_reduce(
            "ones", [torch.ones(2, dtype=torch.float32 if ranks.first else torch.float64)]
        )


def defect(_: Path) -> None:
    """Fail on rank 1 by a defect, while the others add up."""
    with guard(), together() as ranks:
        ranks.all_reduce("ones", [torch.ones(2)])
        if ranks.rank == 1:
            raise ZeroDivisionError("of rank 1")
        ranks.all_reduce("more ones", [torch.ones(2)])


def refused_first(_: Path) -> None:
    """Fail on rank 0, while the others wait for what it decides."""
    with guard(), together() as ranks:
        ranks.broadcast("what to do", lambda: [][0])


def refused_before_all_are_there(directory: Path) -> None:
    """Fail on rank 0 at once, while rank 1 still asks its store who is there."""
    failed, made = directory / "failed", dist.new_group

    def slowly(**options: Any) -> Any:
        group = made(**options)
        store = dist.distributed_c10d._get_default_store()
        for _ in range(100):
            time.sleep(0.01)
            while failed.exists():
                store.set("rank 1", "is there")  # until there is no store any more
        return group

    with guard():
        if os.environ["RANK"] == "1":
            dist.new_group = slowly
        with together() as ranks:
            failed.touch()
            ranks.broadcast("what to do", lambda: [][0])


def told(directory: Path) -> None:
    """Tell each other words and tensors, which arrive as they were."""
    with together() as ranks:
        mine = f"of {ranks.rank}", torch.full((2, 3), ranks.rank + 0.5).bfloat16()
        everyone = ranks.all_gather("greetings", mine)
        text, x = ranks.broadcast("the first", lambda: mine)
        sums = [torch.tensor(ranks.rank), torch.full((3,), 2.0**ranks.rank, dtype=torch.float64)]
        ranks.all_reduce("sums", sums)
        said = {
            "texts": [words for words, _ in everyone],
            "tensors": [tensor.tolist() for _, tensor in everyone],
            "first": [text, str(x.dtype)],
            "sums": [x.tolist() for x in sums],
            "any": [ranks.any("one", ranks.rank == 2), ranks.any("none", False)],
        }
        (directory / f"{ranks.rank}.json").write_text(json.dumps(said))
