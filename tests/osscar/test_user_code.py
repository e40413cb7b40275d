"""Models of a user's own code: importing it, and telling what is wrong with it."""

import sys

import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.base.errors import ModelError
from osscar.cli import main
from osscar.models.load import load_model

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
import sys
import torch
from torch import nn
from blocks import net

def build():
    return net(), torch.zeros(2, 3, 12, 12)

def rectangle():
    return net(), torch.zeros(2, 3, 8, 12)

def half():
    return net().half(), torch.zeros(2, 3, 12, 12).half()

def side():
    return net(), 224

def empty():
    return net(), ()

def nested():
    return net(), {"x": {"y": torch.zeros(2)}}

def leaves():
    sys.exit(3)

def raises():
    return torch.zeros(2).no_such_thing

def meta():
    with torch.device("meta"):
        return net(), torch.zeros(2, 3, 12, 12)

def bare():
    return nn.Sequential(nn.ReLU()), torch.zeros(2, 3, 12, 12)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the user's code, which is the current one."""
    (tmp_path / "sub").mkdir()
    for directory in (tmp_path, tmp_path / "sub"):
        (directory / "blocks.py").write_text(NET)
        (directory / "osscar_test_mine.py").write_text(MINE)
    (tmp_path / "broken_syntax.py").write_text("def build(:")
    (tmp_path / "broken_name.py").write_text("\nx = undefined_name\ndef build(): pass")
    (tmp_path / "broken_import.py").write_text("import no_such_package\ndef build(): pass")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("blocks", "osscar_test_mine", "broken_name", "broken_import"):
        sys.modules.pop(name, None)


def test_code_finds_what_lies_around_it(place):
    before = list(sys.path)
    for file in ("osscar_test_mine", "osscar_test_mine.py"):  # in the current directory
        assert load_model(f"{file}:build").example["input"].shape == (2, 3, 12, 12)
    (place / "blocks.py").unlink()  # and beside its file
    assert load_model("sub/osscar_test_mine.py:build").source.startswith("sub/")
    assert sys.path == before
    for name, file in (
        ("./mine:build", "./mine.py:build"),
        (".mine:build", "mine.py:build"),
        ("a/mine:build", "a/mine.py:build"),
    ):
        with pytest.raises(ModelError, match=f"for a file give {file}$"):
            load_model(name)


def test_a_failing_import_shows_the_users_error_and_line(place):
    for module, message in (
        ("broken_syntax", r"SyntaxError: .*broken_syntax\.py, line 1"),
        ("broken_name", r"NameError: .*\(line 2 of .*broken_name\.py: x = undefined_name\)"),
        ("broken_import", r"ModuleNotFoundError: No module named 'no_such_package' \(line 1"),
    ):
        for suffix in ("", ".py"):
            with pytest.raises(ModelError, match=message):
                load_model(f"{module}{suffix}:build")


def test_what_cannot_be_used_is_refused(place):
    for function, message in (
        ("side", r"what does not fit: 224 \(int\) are no example inputs; give a tensor"),
        ("empty", r"\(\) \(tuple\) are no example inputs"),
        ("nested", "are no example inputs; give a tensor"),
        ("leaves", r"SystemExit: 3 \(line \d+ of .*sys\.exit\(3\)"),
        ("raises", r"AttributeError: .*no_such_thing"),
        ("meta", r"'0\.weight' of Sequential is on the device 'meta'"),
        ("bare", "Sequential has no parameters"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(f"osscar_test_mine.py:{function}")


def test_the_example_is_cast_as_the_model_is(place):
    for dtype in ("float32", "float16"):
        loaded = load_model("osscar_test_mine.py:half", dtype=dtype, device="cpu")
        assert loaded.example["input"].dtype is next(loaded.model.parameters()).dtype


def test_images_get_the_size_of_a_rectangular_example(place):
    pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")
    from osscar.base.json_files import validated
    from osscar.data.images import ImageSet
    from osscar.data.preprocessing import Preprocessing

    stated = Preprocessing(mean=0, std=1)
    name = "osscar_test_mine.py:rectangle"
    preprocessing = load_model(name, preprocessing=stated).preprocessing
    record = {**preprocessing.record(), "crop": [8, 12], "resize": [8, 12]}
    assert validated(record, Preprocessing, "it") == preprocessing
    pixels = torch.randint(256, (2, 20, 20, 3), dtype=torch.uint8).numpy()
    assert ImageSet("noise", pixels, preprocessing).tensor().shape == (2, 3, 8, 12)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(5, 3)
        self.register_buffer("fixed", torch.randn(5, 8))

    def forward(self, x):
        return self.leave(nn.functional.linear(self.enter(x).relu(), self.fixed).relu())


class Keeping(nn.Module):
    """Keeps activations, alone and in a list."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 3)
        self.last, self.all = None, []

    def forward(self, x):
        self.last = self.enter(x).relu()
        self.all = [self.last]
        return self.leave(self.last)


def test_what_a_buffer_reads_is_frozen():
    result = osscar.prune(Buffered(), torch.randn(32, 4), sparsity=0.5, device="cpu")
    assert [layer.name for layer in result.layers] == ["neurons"]
    with pytest.raises(osscar.OsscarError, match="read by a buffer, which is not refitted: 'fixed"):
        osscar.prune(Buffered(), torch.randn(32, 4), groups={"enter.neurons": 4}, device="cpu")


def test_activations_that_a_model_keeps_do_not_stop_the_copy():
    model = Keeping()
    model(torch.randn(2, 4))
    kept = model.last
    result = osscar.prune(model, torch.randn(32, 4), sparsity=0.5, device="cpu")
    assert result.layers[0].kept == 4
    assert model.last is kept


class Branching(nn.Module):
    """A network in which torch.cond, not the data, is what cannot be measured."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        return torch.cond(hidden.sum() > 0, self.last, lambda h: self.last(-h), (hidden,))


def test_modules_in_a_branch_are_not_blamed_on_the_data():
    with pytest.raises(ModelError, match=r"cannot be measured: .*torch\.cond") as caught:
        osscar.prune(Branching(), torch.randn(32, 4), neurons=0.5, device="cpu")
    assert "calibration data" not in str(caught.value)


class Neighbours(nn.Module):
    """A network on the nodes of a graph, whose edges are a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.eye(4).roll(1, 0).to_sparse())
        self.first, self.middle, self.last = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.middle(torch.relu(self.first(x)))
        return self.last((self.edges @ x.reshape(4, -1)).reshape(x.shape))


def test_sparse_matrices_are_no_obstacle():
    torch.manual_seed(0)
    data = torch.randn(32, 4, 5)
    result = osscar.prune(Neighbours().eval(), data, flops=0.8, backend="magnitude", device="cpu")
    assert result.parameters_after < result.parameters_before


def test_models_and_data_that_do_not_go_together_are_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(osscar.OsscarError, match=r"fails on the data .*int64"):
        osscar.prune(net, torch.randint(5, (32, 4)), sparsity=0.5, device="cpu")
    net.stream = sys.stdout
    with pytest.raises(ModelError, match="Sequential cannot be copied"):
        osscar.prune(net, torch.randn(32, 4), sparsity=0.5, device="cpu")
    del net.stream
    with pytest.raises(ModelError, match="ReLU has no parameters"):
        osscar.prune(nn.ReLU(), torch.randn(32, 4), sparsity=0.5, device="cpu")
    with pytest.raises(ModelError, match="device 'meta'"):
        osscar.prune(net.to("meta"), torch.randn(32, 4), sparsity=0.5, device="cpu")
    with pytest.raises(ModelError, match="the model is a function"):
        osscar.prune(lambda x: x, torch.randn(32, 4), sparsity=0.5, device="cpu")
    with pytest.raises(ModelError, match=r"'0\.weight' of Sequential has no shape yet"):
        osscar.prune(nn.Sequential(nn.LazyLinear(3)), torch.randn(32, 4), sparsity=0.5)


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

@dataclass
class Half:
    def select(self, problem):
        pass

value = 1
"""


def test_a_backend_of_ones_own_is_named_as_models_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(BACKEND)
    (tmp_path / "own" / "scores.py").write_text(
        "import torch\n\ndef first(keep, skip):\n    return torch.arange(skip, skip + keep)\n"
    )
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
    for command in (
        ("solve", "p.safetensors", "--backend", "own/mine.py:First", "--option", "skip=1"),
        ("gap", "p.safetensors", "--backends", "own/mine.py:First,greedy", "--out", "study"),
        ("gap", "p.safetensors", "--backends", "own/mine.py:First", "--out", "two", "--jobs", "2"),
    ):
        monkeypatch.setattr(sys, "argv", ["osscar", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        assert command[0] == "gap" or "own/mine.py:First keeps 3 of 6" in shown.out
    for study in ("study", "two"):
        assert "own/mine.py:First" in (tmp_path / study / "results.csv").read_text()

    for name, refused in (
        ("own/none.py:First", "there is no file"),
        ("own/mine.py:Second", "is None; give a frozen dataclass"),
        ("own/mine.py:Half", "give a frozen dataclass with kind"),
        ("own/mine.py:value", "is 1; give"),
        ("own/mine:First", r"is not the name of a module; for a file give own/mine\.py:First"),
        ("nowhere.at_all:First", "cannot import"),
    ):
        with pytest.raises(solvers.BackendError, match=refused):
            osscar.prune(model, torch.randn(64, 4), neurons=4, backend=name)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(solvers.BackendError, match=r"ZeroDivisionError.*line 1 of .*broken\.py"):
        solvers.make_backend("broken.py:First")
