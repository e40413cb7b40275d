"""`docs/json.md` names every field that commands write, and none that they do not.

The commands that pages show are held to it in `test_commands.py`; here are the others.
"""

import json

import pytest
import torch

import solvers
from osscar.cli.commands import app
from tests.docs.json_schema import missing, sections, undescribed


@pytest.mark.parametrize(
    "words",
    [
        ("backends",),
        ("solve", "FILE", "--backend", "branch_and_bound"),
        ("gap", "FILE", "--out", "study", "--backends", "greedy,enumerate", "--jobs", "1"),
    ],
    ids=" ".join,
)
def test_the_page_names_what_is_written(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, W0 = torch.randn(60, 8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 60, W0, keep=4, name="small")
    problem.save(tmp_path / "problem.safetensors")
    given = ["problem.safetensors" if word == "FILE" else word for word in words]
    app([*given, "--json", "out.json"])
    document = json.loads((tmp_path / "out.json").read_text())
    assert (undescribed(document), missing(document)) == (set(), set())


def test_every_command_has_its_schema():
    commands = {schema.split("/")[0].removeprefix("osscar.") for schema in sections()}
    assert commands >= {"prune", "eval", "inspect", "export", "gap", "solve", "backends"}
