"""`docs/json.md` names every field that commands write, and none that they do not.

The commands that pages show are held to it in `test_commands.py`; here are the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import osscar.cli
import solvers
from tests.docs.json_schema import missing, sections, undescribed


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    W0 = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    path = tmp_path / "problem.safetensors"
    solvers.SubsetProblem.from_gram(X.T @ X / 60, W0, keep=4, name="small").save(path)
    return path


def written(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["osscar", *words, "--json", str(path)])
    with pytest.raises(SystemExit) as stop:
        osscar.cli.main()
    assert not stop.value.code
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize(
    "words",
    [
        ("backends",),
        ("solve", "FILE", "--backend", "branch_and_bound"),
        ("solve", "FILE", "--list-problem"),
        ("gap", "FILE", "--out", "study", "--backends", "greedy,enumerate", "--jobs", "1"),
    ],
    ids=" ".join,
)
def test_the_page_names_what_is_written(
    words: tuple[str, ...], problem: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(problem) if word == "FILE" else word for word in words]
    document = written(monkeypatch, tmp_path / "out.json", *given)
    assert undescribed(document) == set()
    if "--list-problem" not in words:  # its fields are rows of another document
        assert missing(document) == set()


def test_every_command_has_its_schema() -> None:
    commands = {schema.split("/")[0].removeprefix("osscar.") for schema in sections()}
    assert commands >= {"prune", "eval", "inspect", "export", "gap", "solve", "problem", "backends"}
