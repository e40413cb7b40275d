"""Progress: bars at a terminal, gone afterwards, and a rare line elsewhere."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from osscar.base import timing
from osscar.base.timing import Profile, Stage, profiled, progress_bar, timed


@pytest.fixture
def clock(monkeypatch):
    """Let time pass only by hand: add to its ``now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(timing, "_untold", 0.0)
    return clock


def test_work_writes_a_line_now_and_then(capsys, clock):
    with progress_bar("outer [red]", 2) as bar:
        with progress_bar("inner", 100) as inner:
            for _ in range(100):
                clock.now += 1
                inner.advance()
        bar.advance()
    assert capsys.readouterr() == (
        "",
        "progress: outer [red] (0 of 2, 0:00:30); inner (30 of 100, 0:00:30)\n"
        "progress: outer [red] (0 of 2, 0:01:00); inner (60 of 100, 0:01:00)\n"
        "progress: outer [red] (0 of 2, 0:01:30); inner (90 of 100, 0:01:30)\n",
    )
    for _ in range(4):  # after the 10 seconds that are left over
        clock.now += 3600  # of no work
        with progress_bar("short") as bar:
            clock.now += 10
            bar.advance()
    assert capsys.readouterr().err == "progress: short (0:00:10)\n"


def test_stages_within_others_are_counted_once(monkeypatch):
    monkeypatch.setattr(timing, "clock", itertools.count().__next__)
    with profiled() as spent:
        with timed(Stage.WALK):
            with timed(Stage.GRAM):
                pass
            with timed(Stage.GRAM):
                pass
        with timed(Stage.WALK):
            pass
    assert spent.seconds == {Stage.WALK: 4, Stage.GRAM: 2}
    with timed(Stage.WALK):
        pass
    assert spent.seconds[Stage.WALK] == 4
    assert Profile().seconds == {}


def test_one_rank_writes_for_all(capsys, clock, monkeypatch):
    monkeypatch.setattr(timing, "launched", lambda: (1, 2))
    with progress_bar("outer") as bar:
        clock.now += 100
        bar.advance()
    assert capsys.readouterr() == ("", "")
