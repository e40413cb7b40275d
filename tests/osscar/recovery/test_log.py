"""Recoveries that are killed go on to the same bytes."""

from __future__ import annotations

import dataclasses

import pytest

from osscar.recovery.recover import recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import RecoveryLog, Training
from tests.osscar.recovery.cases import ADAPTED, FORMS
from tests.osscar.recovery.perturbed import bytes_of, needs_peft
from tests.osscar.test_run_log import Killed

REQUEST = RecoveryRequest(steps=12, held_out=2, batch_size=4, device="cpu")
"""Checks after 1, 2, 4, ... 12 steps, and after each at which the rate is lowered."""


def told(recovery):
    """All of a recovery but how long it took."""
    points = [dataclasses.replace(point, seconds=0.0) for point in recovery.points]
    return points, recovery.kept, recovery.before, recovery.after, bytes_of(recovery.model)


@pytest.mark.parametrize(
    ("name", "count"), [("graphs", 6), pytest.param(ADAPTED, 2, marks=needs_peft)]
)
def test_a_recovery_that_was_killed_after_any_check_ends_with_the_same_bytes(
    name, count, monkeypatch, tmp_path
):
    """Also after one that led away, and whatever memory is free by then."""
    smaller, dense, data = FORMS[name].made()
    rate = 1.0 if name == "graphs" else None  # which goes back at first
    request = dataclasses.replace(REQUEST, **FORMS[name].asked, learning_rate=rate)
    whole = told(recover_as_asked(smaller, dense, data, request))
    assert name != "graphs" or whole[0][-1].rate < 1.0
    log, keep, kept = RecoveryLog(tmp_path), RecoveryLog.keep, []

    def killed(self, *state):
        keep(self, *state)
        kept.append(state)
        if len(kept) == count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryLog, "keep", killed)
        with pytest.raises(Killed):
            recover_as_asked(smaller, dense, data, request, log)
    step = kept[-1][0].points[-1].step
    assert len(kept[-1][0].points) == 1 + count
    assert log.kept.startswith("1 step is kept in" if step == 1 else f"{step} steps are kept in")
    assert [path.name for path in log.done] == [f"{step:08}.safetensors"]
    monkeypatch.setattr(Training, "try_step", None)  # as none is tried anew
    assert told(recover_as_asked(smaller, dense, data, request, log)) == whole
