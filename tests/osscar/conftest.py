"""What the tests of the product share."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest
from matplotlib.figure import Figure

from osscar.base import timing
from osscar.cli import main
from osscar.cli.commands import app
from osscar.proof import structural
from osscar.proof.program import traced_as_open
from osscar.proof.sizes import other_sizes
from tests.osscar.interrupted_cases import tiny_model
from tests.osscar.runs import Runs
from tests.traced import once

_OF_STRUCTURE = frozenset(
    f"test_{what}"
    for what in (
        *("changed_code", "equivalence", "experts", "forms", "feasibility", "fuzz", "integers"),
        *("programs", "shrinking", "structural", "user_code"),
    )
)
"""Files about how structure is found, and what can follow: nothing is remembered there."""


@pytest.fixture(scope="module", autouse=True)
def structure_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Find the structure of each architecture once in a session, but in tests of structure."""
    if request.path.stem in _OF_STRUCTURE:
        yield
        return
    with once():
        yield


@pytest.fixture(scope="session")
def runs() -> Runs:
    """Return models that are pruned already, by name."""
    return Runs()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a language model of two small layers, which nobody writes to."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def open_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave sizes open, and export for others, as for users."""
    monkeypatch.setattr(structural, "other_sizes", other_sizes)
    monkeypatch.setattr(structural, "traced_as_open", traced_as_open)


@pytest.fixture
def drawn() -> None:
    """Have figures drawn: what uses this looks at them."""


@pytest.fixture(autouse=True)
def nothing_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures, and draw none where nobody looks: it takes as long as to prune."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda _, file, **__: _filled(file))
        monkeypatch.setattr(Figure, "draw_without_rendering", lambda _: None)


def _filled(file: Path | IO[bytes]) -> None:
    (file.write_bytes if isinstance(file, Path) else file.write)(b"a picture")


@pytest.fixture(autouse=True)
def no_lines_for_earlier_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the seconds without a line of progress from here on: this process has done others."""
    monkeypatch.setattr(timing, "_untold", 0.0)


def lacking(arguments: Sequence[str], said: str) -> set[str]:
    """Return the options that a command names as its own, and does not have."""
    name = arguments[0] if arguments else ""
    command = app[name] if name.isalpha() and name in set(app) else app
    commands = [command, *(command[name] for name in command if name.isalpha())]
    known = {
        name
        for one in commands
        if one.default_command
        for argument in one.assemble_argument_collection()
        for name in argument.names
    }
    rest = re.sub(r"osscar [\w-]+ (?:'[^']*'|[^`;\n'])*", "", said)  # what other commands have
    return (
        {*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", rest)}
        - known
        - {"--help", "--version", *arguments}
    )


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; return status, standard output and standard error."""
    monkeypatch.setattr(timing, "SECONDS_A_LINE", math.inf)  # of however slow a machine

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["osscar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert not lacking(sys.argv[1:], captured.out + captured.err)
        assert stop.value.code is not None
        return int(stop.value.code), captured.out, captured.err

    return call
