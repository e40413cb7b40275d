"""Progress: visible at a terminal, silent elsewhere, and gone afterwards."""

from __future__ import annotations

import io

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


def test_nothing_is_written_where_there_is_no_terminal(capsys):
    with progress.stage("outer", 2) as bar:
        assert list(progress.track([1, 2, 3], "inner")) == [1, 2, 3]
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
