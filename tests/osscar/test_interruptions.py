"""Nothing is lost: what was killed, or found the disk full, goes on to the same bytes."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import osscar
from tests.osscar.families import CALIBRATION
from tests.osscar.interrupted_cases import CASES
from tests.osscar.interruptions import Ended, Plan, hidden

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

ALL = [name if name == "plan" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


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


@pytest.fixture(scope="module")
def cases(tiny, tmp_path_factory):
    """Return a case by its name; each is run as a whole once."""
    made = {}

    def made_once(name):
        if name not in made:
            made[name] = CASES[name](tiny, tmp_path_factory.mktemp(name))
        return made[name]

    return made_once


# ---- kills -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(name, cases, tmp_path):
    """Once or twice, somewhere."""
    case, draw, root = cases(name), random.Random(0), tmp_path / "root"
    case.begin(root)
    for _ in range(draw.choice((1, 2))):
        number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        ended = case.run(root, Plan(draw.randrange(1, case.events + 1), number))
        if ended.status == 0:
            break
        assert ended.status in (-signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert case.is_whole(root)
        if ended.status > 0 and not case.is_done(root):
            line = last_word(ended)
            kept = "out.run/*.safetensors", "out.recover/*.safetensors"
            goes_on = any(any(root.glob(one)) for one in (kept if case.keeps_old else ("out",)))
            assert ("same command again to continue" in line) == goes_on, line
            assert ("no finished work was kept" in line) == (not goes_on), line
            assert hidden(root, case.shown) == []
    if ended.status:
        again = case.run(root)
        assert again.status == 0, again.err
    assert case.wrong(root) == []


def last_word(ended: Ended) -> str:
    """Return the one line that is said of an end; a warning before it is of random weights."""
    *before, line = ended.err.strip().splitlines()
    expected = ("warning: the dense model does no better than chance", "progress: ")
    assert [one for one in before if not one.startswith(expected)] == []
    return line


# ---- a full disk -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_said_and_nothing_is_lost(name, cases, tmp_path):
    case, root = cases(name), tmp_path / "root"
    case.begin(root)
    ended = case.run(root, Plan(case.writes // 2, "full"))
    if ended.status:  # else what failed was not needed: the number of the process in a lock
        assert ended.status == 2, ended.err
        line = last_word(ended)
        assert line.startswith("error: cannot write")
        assert str(root) in line
        assert "make room" in line or "ulimit" in line
        assert case.is_whole(root)
        assert hidden(root, case.shown) == []
        again = case.run(root)
        assert again.status == 0, again.err
    assert case.wrong(root) == []
