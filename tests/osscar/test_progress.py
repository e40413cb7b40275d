"""Progress: bars at a terminal, gone afterwards, and a rare line elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from osscar.base import progress


@pytest.fixture
def terminal(monkeypatch):
    """Let bars be drawn into a string."""
    screen = io.StringIO()
    monkeypatch.setattr(
        progress,
        "Console",
        lambda stderr: Console(file=screen, force_terminal=True, width=100, stderr=stderr),
    )
    return screen


@pytest.fixture
def clock(monkeypatch):
    """Let time pass only by hand: add to its ``now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(progress, "_untold", 0.0)
    return clock


def test_short_work_writes_nothing_where_there_is_no_terminal(capsys, clock):
    with progress.stage("outer", 2) as bar:
        assert list(progress.track([1, 2, 3], "inner")) == [1, 2, 3]
        clock.now += progress.SECONDS_A_LINE - 1
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_writes_a_line_now_and_then(capsys, clock):
    with progress.stage("outer [red]", 2) as bar:
        for number in progress.track(range(100), "inner"):
            clock.now += 1
            assert number < 100
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "progress: outer [red] (0 of 2, 0:00:30); inner (30 of 100, 0:00:30)",
        "progress: outer [red] (0 of 2, 0:01:00); inner (60 of 100, 0:01:00)",
        "progress: outer [red] (0 of 2, 0:01:30); inner (90 of 100, 0:01:30)",
    ]


def test_only_work_counts_until_the_next_line(capsys, clock):
    for _ in range(5):
        clock.now += 3600
        with progress.stage("short") as bar:
            clock.now += 10
            bar.advance()
    assert capsys.readouterr().err.splitlines() == ["progress: short (0:00:10)"]


def test_one_rank_writes_for_all(capsys, clock, monkeypatch):
    monkeypatch.setattr(progress, "launched", lambda: (1, 2))
    with progress.stage("outer") as bar:
        clock.now += 100
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_bars_show_description_and_count(terminal):
    for _ in progress.track(range(3), "Scoring"):
        pass
    assert "Scoring" in terminal.getvalue()
    assert "/3" in terminal.getvalue()


def test_nested_stages_share_one_display(terminal):
    with progress.stage("outer", 1) as outer:
        shared = progress._display
        with progress.stage("inner"):
            assert progress._display is shared
            assert [task.description for task in shared.tasks] == ["outer", "inner"]
        outer.describe("later")
        outer.advance()
        assert [(task.description, task.completed) for task in shared.tasks] == [("later", 1)]
    assert progress._display is None


def test_an_error_clears_the_display(terminal):
    def fail():
        with progress.stage("outer"):
            list(progress.track((1 // n for n in [1, 0]), "inner"))

    with pytest.raises(ZeroDivisionError):
        fail()
    assert progress._display is None


def test_generators_are_consumed_one_by_one():
    taken = []

    def source():
        for number in range(3):
            taken.append(number)
            yield number

    for number in progress.track(source(), "lazy"):
        assert taken[-1] == number
    assert taken == [0, 1, 2]
