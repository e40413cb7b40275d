"""Models of a user's own code: importing it, and telling what is wrong with it."""

import json
import os
import pickle
import sys

import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.base.errors import ModelError
from osscar.cli.commands import app
from osscar.cli.options import request_of
from osscar.models.load import load_model
from osscar.preparation.journal import own_code
from osscar.request import PruningRequest
from solvers.own_code import importable, imported
from tests.graph.topologies import network

NET = """
import torch
from torch import nn

def net(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )
"""
MINE = """
import json
import sys
import torch
from torch import nn
from blocks import net

def build():
    return net(), torch.zeros(2, 3, 12, 12)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the user's code, which is the current one."""
    (tmp_path / "sub").mkdir()
    for directory in (tmp_path, tmp_path / "sub"):
        (directory / "blocks.py").write_text(NET)
        (directory / "osscar_test_mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("blocks", "osscar_test_mine"):
        sys.modules.pop(name, None)


def test_code_finds_what_lies_around_it(place):
    before = list(sys.path)
    for file in ("osscar_test_mine", "osscar_test_mine.py"):  # in the current directory
        assert load_model(f"{file}:build").example["input"].shape == (2, 3, 12, 12)
    (place / "blocks.py").unlink()  # and beside its file
    assert load_model("sub/osscar_test_mine.py:build").source.startswith("sub/")
    assert sys.path == before


def test_a_file_is_one_module_whoever_names_it_and_two_of_one_name_are_two(place, monkeypatch):
    text = "from torch import nn\n\nclass Net(nn.Linear):\n    gain = {}\n"
    for gain, folder in enumerate((".", "sub")):
        (place / folder / "one.py").write_text(text.format(gain))
    (place / "linked.py").symlink_to("one.py")
    names = ("one.py", "sub/one.py", "./one.py", str(place / "one.py"), "linked.py")
    kinds = [imported(f"{name}:Net", ModelError) for name in names]
    assert [kind.gain for kind in kinds] == [0, 1, 0, 0, 0]
    assert len(set(kinds)) == 2
    assert all(pickle.loads(pickle.dumps(kind)) is kind for kind in kinds)
    monkeypatch.chdir(place / "sub")
    assert imported("one.py:Net", ModelError) is kinds[1]


def test_a_file_that_has_changed_is_run_again_and_one_that_failed_too(place):
    file = place / "changing.py"
    file.write_text("gain = 1")
    stat = file.stat()
    assert imported("changing.py:gain", ModelError) == 1
    file.write_text("gain = 2")  # as long, and as old
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert imported("changing.py:gain", ModelError) == 2
    for text, failure in (("gain = 3; 1 / 0", "ZeroDivisionError"), ("gain = = 3", "SyntaxError")):
        file.write_text(text)
        for _ in range(2):
            with pytest.raises(ModelError, match=failure):
                imported("changing.py:gain", ModelError)
    file.write_text("gain = 4")
    assert imported("changing.py:gain", ModelError) == 4


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        ("torch.jit.trace(net(), torch.zeros(2, 3, 12, 12))", "TorchScript"),
        ("nn.Sequential(nn.LazyLinear(3))", "'0.weight' .* has no values"),
        ("nn.Linear(3, 3, device='meta')", "'weight' .* has no values"),
    ],
)
def test_models_without_code_or_values_are_refused(made, wrong, place):
    (place / "empty.py").write_text(f"{NET}\ndef build():\n    return {made}\n")
    with pytest.raises(ModelError, match=wrong):
        load_model("empty.py:build")


# ---- what networks do --------------------------------------------------------------------

PLAIN = {"backend": "magnitude", "device": "cpu"}


@network(enter=(4, 8), leave=(5, 3), fixed=lambda: torch.randn(5, 8))
def Buffered(net, x):
    return net.leave(nn.functional.linear(net.enter(x).relu(), net.fixed).relu())


def test_what_a_buffer_reads_is_frozen():
    result = osscar.prune(Buffered(), torch.randn(32, 4), sparsity=0.5, **PLAIN)
    assert [layer.name for layer in result.layers] == ["neurons"]
    with pytest.raises(osscar.OsscarError, match="read by a buffer, which is not refitted: 'fixed"):
        osscar.prune(Buffered(), torch.randn(32, 4), groups={"enter.neurons": 4}, **PLAIN)


# ---- a backend of one's own --------------------------------------------------------------

BACKEND = """
from dataclasses import dataclass
from typing import ClassVar
import solvers
from scores import first

@dataclass(frozen=True)
class First:
    kind: ClassVar = solvers.BackendKind.HEURISTIC
    summary: ClassVar = "the first units"
    capabilities: ClassVar = solvers.Capabilities()
    skip: int = 0

    @classmethod
    def available(cls):
        return None

    def select(self, problem):
        return solvers.Selection(first(problem.keep, self.skip), solvers.Status.FEASIBLE)

value = 1
"""
SCORES = "import torch\n\ndef first(keep, skip):\n    return torch.arange(skip, skip + keep)\n"


def test_a_backend_of_ones_own_is_named_as_models_are(tmp_path, monkeypatch, run):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(BACKEND)
    (tmp_path / "own" / "scores.py").write_text(SCORES)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    X, W0 = torch.randn(32, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    problem = solvers.SubsetProblem.from_gram(X.T @ X / 32, W0, keep=3)
    for name in ("own/mine.py:First", str(tmp_path / "own" / "mine.py:First")):
        solution = solvers.solve(problem, name, skip=1)
        assert solution.support.tolist() == [1, 2, 3]
        assert solution.backend == name
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    asked = {"neurons": 4, "backend_options": {"skip": 2}, "device": "cpu"}
    result = osscar.prune(model, torch.randn(64, 4), backend="own/mine.py:First", **asked)
    assert result.plan.groups[0].kept == (2, 3, 4, 5)

    problem.save("p.safetensors")
    own = ("p.safetensors", "--backend", "own/mine.py:First", "--option", "skip=1")
    assert "own/mine.py:First keeps 3 of 6" in run("solve", *own)[1]
    both = ("p.safetensors", "--backends", "own/mine.py:First,greedy", "--jobs", 2)
    assert run("gap", *both, "--out", "study")[0] == 0  # in processes that import it anew
    assert "own/mine.py:First" in (tmp_path / "study" / "report.html").read_text()
    with pytest.raises(solvers.BackendError, match=r"ZeroDivisionError.*line 1 of .*broken\.py"):
        solvers.make_backend("broken.py:First")


# ---- a run with code of one's own is repeated ---------------------------------------------

OWN = "def far(found, dense, batch):\n    return (found - dense).square().flatten(1).mean(1)\n"


def repeated(report, monkeypatch):
    """The request that `osscar prune` makes of a report."""
    asked = []
    monkeypatch.setattr("osscar.cli.commands._run", lambda *words: asked.append(words[-1]))
    app(["prune", "demo", "--config", str(report), "--out", "x"])
    return request_of(asked[0], PruningRequest)


@pytest.mark.parametrize("given", ["name", "absolute", "function"])
def test_a_report_names_code_so_that_it_opens_from_any_directory(given, tmp_path, monkeypatch):
    for folder in ("own", "elsewhere", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own" / "mine.py").write_text(BACKEND)
    (tmp_path / "own" / "scores.py").write_text(SCORES)
    (tmp_path / "own" / "far.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    place = {"name": "own", "absolute": str(tmp_path / "own"), "function": "own"}[given]
    distance = f"{place}/far.py:far"
    if given == "function":
        with importable(distance):
            distance = imported(distance, ModelError)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    asked = {"neurons": 4, "backend": f"{place}/mine.py:First", "device": "cpu"}
    result = osscar.prune(model, torch.randn(64, 4), distance=distance, **asked)
    result.save("runs/small", report=result.record())
    report = tmp_path / "runs" / "small" / "osscar_report.json"
    for file in ("osscar_report.json", "report.html", "README.md"):
        assert str(tmp_path) not in (report.parent / file).read_text()
    assert json.loads(report.read_text())["settings"]["distance"] == "../../own/far.py:far"
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = repeated(report, monkeypatch)
    here = torch.ones(2, 3)
    assert found.distance.function(here, here - 1, {}).tolist() == [1, 1]
    assert found.backend == str(tmp_path / "runs" / "small" / "../../own/mine.py:First")
    assert solvers.make_backend(found.backend).select
    assert own_code(found.distance) == own_code(result.request.distance) != {}
