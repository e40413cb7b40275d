"""Several processes that recover one model: they come to what one comes to, and end together."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch

from osscar.base.errors import OutputError
from osscar.base.ranks import ALONE, Ranks, together
from osscar.recovery.recover import Recovery, recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import RecoveryLog
from tests.osscar.recovery.cases import FORMS, Form
from tests.osscar.test_ranks import ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses gloo")

CASES: Mapping[str, Form] = {name: FORMS[name] for name in ("graphs", "experts one by one")}
"""Of some experts no rank, or only one, has gradients in a step."""


def recovered(case: str, log: RecoveryLog | None = None, ranks: Ranks = ALONE) -> Recovery:
    smaller, dense, data = CASES[case].made()
    asked = {"learning_rate": 1e-3, "device": "cpu", "mixed_precision": "no"}
    request = RecoveryRequest(steps=5, batch_size=3, held_out=2, **asked)
    return recover_as_asked(smaller, dense, data, request, log, ranks)


def write(place: Path, recovery: Recovery) -> None:
    tensors = {name: x.detach().clone() for name, x in recovery.model.named_parameters()}
    safetensors.torch.save_file(tensors, f"{place}.safetensors")
    told = [[one.step, one.loss, one.held_out] for one in recovery.points]
    Path(f"{place}.json").write_text(json.dumps([told, recovery.points[-1].rate]))


def all_cases(directory: Path) -> None:
    with together() as ranks:
        for name in CASES:
            write(directory / f"{name}.{ranks.rank}", recovered(name, None, ranks))


@pytest.mark.slow
def test_ranks_come_to_what_one_process_does(tmp_path):
    size = 2
    whole = {name: recovered(name) for name in CASES}
    for process in ended([lambda: all_cases(tmp_path)] * size, tmp_path):
        assert process.status == 0, process.stderr
    for name, alone in whole.items():
        files = [tmp_path / f"{name}.{rank}" for rank in range(size)]
        contents = [Path(f"{file}.safetensors").read_bytes() for file in files]
        assert len(set(contents)) == 1  # all ranks have the same model
        told, rate = json.loads(Path(f"{files[0]}.json").read_text())
        assert rate == alone.points[-1].rate
        for found, point in zip(told, alone.points, strict=True):
            due = [point.step, point.loss, point.held_out]
            assert found == [x if x is None else pytest.approx(x, rel=1e-4) for x in due]
        tensors = safetensors.torch.load_file(f"{files[0]}.safetensors")
        for key, weight in alone.model.named_parameters():
            # A gradient that is zero but for rounding makes a step of either sign.
            off = (tensors[key] - weight.detach()).abs()
            assert float((off > 1e-5).float().mean()) < 0.01, key


def with_log(directory: Path, *, full: bool) -> None:
    """Recover with a log, which can keep one standing alone if the disk is to be `full`."""
    kept: list[int] = []

    class Full(RecoveryLog):
        def keep(self, *state):
            if kept:
                raise OutputError("no space left")
            kept.append(1)
            super().keep(*state)

    with together() as ranks:
        log = (Full if full else RecoveryLog)(directory / "log") if ranks.first else None
        write(directory / f"log.{ranks.rank}", recovered("graphs", log, ranks))


@pytest.mark.slow
def test_ranks_go_on_where_they_stopped(tmp_path):
    (tmp_path / "whole").mkdir()
    for process in ended([lambda: with_log(tmp_path / "whole", full=False)] * 2, tmp_path):
        assert process.status == 0, process.stderr
    first, second = ended([lambda: with_log(tmp_path, full=True)] * 2, tmp_path)
    assert "no space left" in first.stderr
    assert "rank 0 stopped without an error message" in second.stderr
    assert [path.name for path in (tmp_path / "log").glob("*.safetensors")] == [
        "00000001.safetensors"
    ]
    for process in ended([lambda: with_log(tmp_path, full=False)] * 2, tmp_path):
        assert process.status == 0, process.stderr
    for rank in range(2):
        expected, found = (place / f"log.{rank}" for place in (tmp_path / "whole", tmp_path))
        for kind in ("safetensors", "json"):
            assert Path(f"{found}.{kind}").read_bytes() == Path(f"{expected}.{kind}").read_bytes()
