"""Recoveries that are killed go on to the same bytes; nothing that a log says is believed."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from osscar.base.errors import JournalError, OutputError
from osscar.recovery.log import RecoveryLog
from osscar.recovery.recover import recover_as_asked
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import Training
from tests.osscar.recovery.cases import FORMS
from tests.osscar.recovery.perturbed import bytes_of, perturbed

REQUEST = RecoveryRequest(steps=12, held_out=2, batch_size=4, device="cpu")
"""Looks after 2, 4, ... 12 steps; the rate is found."""


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture
def killing(monkeypatch):
    """Let the recovery end when it has kept so many standings."""

    def after(count):
        kept, original = [], RecoveryLog.keep

        def keep(self, standing):
            original(self, standing)
            kept.append(standing)
            if len(kept) == count:
                raise Killed

        monkeypatch.setattr(RecoveryLog, "keep", keep)

    return after


def told(recovery):
    """All of a recovery but how long it took."""
    points = [dataclasses.replace(point, seconds=0.0) for point in recovery.points]
    return points, recovery.learning_rate, recovery.kept, bytes_of(recovery.model)


LONG = ("float16", "experts one by one")


@pytest.mark.parametrize(
    "name",
    [
        "graphs",
        "a program in bfloat16",
        *(pytest.param(one, marks=pytest.mark.slow) for one in LONG),
    ],
)
def test_a_recovery_that_was_killed_after_any_look_ends_with_the_same_bytes(
    name, killing, monkeypatch, tmp_path
):
    smaller, dense, data = FORMS[name].made()
    whole = told(recover_as_asked(smaller, dense, data, REQUEST))
    looks = len(whole[0]) - 1
    for count in (1, looks - 1, looks):
        log = RecoveryLog(tmp_path / f"{count}")
        killing(count)
        with pytest.raises(Killed):
            recover_as_asked(smaller, dense, data, REQUEST, log)
        monkeypatch.undo()
        assert log.kept.startswith(f"the first {2 * count} steps are kept in")
        assert [path.name for path in log.done] == [f"{2 * count:08}.safetensors"]
        assert told(recover_as_asked(smaller, dense, data, REQUEST, log)) == whole
        log.remove()
        assert not log.directory.exists()


# ---- a log of a whole recovery -----------------------------------------------------------


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def numbers(seed=0):
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def log(tmp_path):
    log = RecoveryLog(tmp_path / "log")
    recover_as_asked(perturbed(net()), net(), numbers(), REQUEST, log)
    return log


def test_a_recovery_goes_on_in_the_way_that_it_began_whatever_memory_is_free(
    killing, monkeypatch, tmp_path
):
    smaller, dense, data = FORMS["tied embeddings"].made()
    request = dataclasses.replace(REQUEST, steps=6, learning_rate=1e-3)
    whole = told(recover_as_asked(smaller, dense, data, request))
    killing(2)
    log = RecoveryLog(tmp_path / "log")
    with pytest.raises(Killed):
        recover_as_asked(smaller, dense, data, request, log)
    other = dataclasses.replace(request, micro_batch_size=1)
    with pytest.raises(JournalError, match="micro-batch-size was None and is 1"):
        recover_as_asked(smaller, dense, data, other, log)
    monkeypatch.undo()
    monkeypatch.setattr(Training, "try_steps", None)  # as none is tried anew
    assert told(recover_as_asked(smaller, dense, data, request, log)) == whole


@pytest.mark.parametrize(("steps", "words"), [(1, "step is"), (12, "12 steps are")])
def test_what_is_kept_is_said_in_words(steps, words, tmp_path):
    (tmp_path / f"{steps:08}.safetensors").touch()
    assert RecoveryLog(tmp_path).kept == f"the first {words} kept in {tmp_path}"


def test_another_recovery_is_refused_with_the_difference(log):
    asked = perturbed(net()), net(), numbers(), REQUEST
    for place, value, message in (
        (0, perturbed(net(), seed=1), "the model's weights are others"),
        (1, net(seed=1), "dense was .* and is "),
        (2, numbers(1), "the calibration data are others"),
        (3, dataclasses.replace(REQUEST, steps=13), "steps was 12 and is 13"),
        (3, dataclasses.replace(REQUEST, seed=1), "seed was 0 and is 1"),
    ):
        other = [*asked]
        other[place] = value
        with pytest.raises(JournalError, match=f"holds another recovery: {message}.*--restart"):
            recover_as_asked(*other, log)
    recover_as_asked(*asked, log)


def test_a_standing_that_was_damaged_or_changed_is_refused(log):
    """What a record holds is checked in test_run_log, as it is one store for both."""
    (file,) = log.done
    good = file.read_bytes()
    for damaged in (good[:-40], b"", good[:-1] + bytes([good[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"\.safetensors cannot be read: .*--restart"):
            recover_as_asked(perturbed(net()), net(), numbers(), REQUEST, log)
    file.write_bytes(good)
    recover_as_asked(perturbed(net()), net(), numbers(), REQUEST, log)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_full_disk_leaves_what_was_kept_before(kept, tmp_path, monkeypatch):
    smaller, dense, saved = perturbed(net()), net(), []
    before = bytes_of(smaller), bytes_of(dense)
    original = safetensors.torch.save_file

    def save(tensors, place, words):
        if len(saved) == kept:
            place.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(place)
        original(tensors, place, words)

    log = RecoveryLog(tmp_path / "log")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save)
        with pytest.raises(OutputError, match=r"cannot write .*No space left on device"):
            recover_as_asked(smaller, dense, numbers(), REQUEST, log)
    assert (bytes_of(smaller), bytes_of(dense)) == before
    assert log.directory.exists() == bool(kept)
    assert [path.name for path in log.done] == (["00000004.safetensors"] if kept else [])
    whole = told(recover_as_asked(smaller, dense, numbers(), REQUEST))
    assert told(recover_as_asked(smaller, dense, numbers(), REQUEST, log)) == whole
