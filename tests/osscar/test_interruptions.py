"""Nothing is lost: what was killed, or found the disk full, goes on to the same bytes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import osscar
from tests.osscar.families import CALIBRATION
from tests.osscar.interrupted_cases import CASES, case
from tests.osscar.interruptions import Plan, hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

ALL = [name if name == "prune" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """Import and trace what commands do, which children then have; figures are not drawn there."""
    loaded = osscar.load_model(tiny)
    data = osscar.load_calibration(CALIBRATION, loaded.tokenizer, samples=8, seqlen=32)
    asked = {"sparsity": 0.5, "allocation": "uniform", "backend": "wanda", "device": "cpu"}
    osscar.recover(osscar.prune(loaded.model, data, **asked), loaded.model, data, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", drawn_by_nobody)
        patch.setattr(Figure, "draw_without_rendering", lambda _: None)
        yield


def drawn_by_nobody(_, file, **__):
    (file.write_bytes if isinstance(file, Path) else file.write)(b"a picture")


@pytest.fixture(scope="module", params=ALL)
def interrupted(request, tiny, tmp_path_factory):
    return case(request.param, tiny, tmp_path_factory.mktemp(request.param))


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(interrupted, tmp_path):
    """Somewhere in the middle."""
    root = tmp_path / "root"
    root.mkdir()
    ended = interrupted.run(root, Plan(interrupted.events // 2))
    assert ended.status == -signal.SIGKILL
    assert interrupted.is_whole(root)
    again = interrupted.run(root)
    assert again.status == 0, again.err
    assert interrupted.wrong(root) == []


def test_a_full_disk_is_said_and_nothing_is_lost(interrupted, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    ended = interrupted.run(root, Plan(interrupted.writes // 2, full=True))
    if ended.status:  # else what failed was not needed: the number of the process in a lock
        line = ended.err.strip().splitlines()[-1]
        assert (ended.status, line.startswith("error: cannot write")) == (2, True), ended.err
        assert interrupted.is_whole(root)
        assert hidden(root, ("out", "out.run", "out.recover", "said.json")) == []
        again = interrupted.run(root)
        assert again.status == 0, again.err
    assert interrupted.wrong(root) == []
