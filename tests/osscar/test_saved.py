"""What is saved is what another process builds; and what code keeps outside of its instances."""

import functools
import json
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import osscar
from osscar.base.errors import CheckpointError, EquivalenceError, ModelError
from osscar.checkpoint import read_back
from osscar.checkpoint.files import read_manifest
from osscar.checkpoint.read_back import new_python
from osscar.proof.lineage import lineage_of, why_not_dense

WIDTH = 32
FEW = {"neurons": 0.5, "backend": "magnitude", "device": "cpu"}
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
_NORMS: dict[str, float] = {}


class Net(nn.Module):
    """Divides by a norm of its width, which each kind computes and keeps in another way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.count = None

    def norm(self, h):
        return 1.0

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h) / self.norm(h)


class InFile(Net):
    def norm(self, h):
        return _NORMS.setdefault("norm", h.shape[-1] ** 0.5)


class InDefault(Net):
    def norm(self, h, known={}):  # noqa: B006
        return known.setdefault("norm", h.shape[-1] ** 0.5)


class Lazy(Net):
    def norm(self, h):
        if self.count is None:
            self.count = h.shape[-1]
        return self.count**0.5


class Property(Net):
    @functools.cached_property
    def root(self):
        return self.up.out_features**0.5

    def norm(self, h):
        return self.root


class Sigmoid(Net):
    def forward(self, x):
        return self.down(torch.sigmoid(self.up(x)))


@functools.cache
def once():
    """What no test changes."""
    return osscar.prune(Net(), X, **FEW)


@functools.cache
def twice():
    return osscar.prune(once().model, X, **FEW)


@pytest.mark.parametrize("kind", [InFile, InDefault])
def test_a_number_that_no_other_process_has_is_not_saved(kind, tmp_path):
    result = osscar.prune(kind(), X, **FEW)
    with pytest.raises(EquivalenceError, match="was not kept: the model that was read back"):
        result.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Lazy, Property])
def test_what_passes_of_a_run_keep_in_modules_is_in_no_smaller_model(kind, tmp_path):
    result = osscar.prune(kind(), X, **FEW)
    again = osscar.load(result.save(tmp_path / "small").path, dense=kind())
    torch.testing.assert_close(again(X), result.model(X))


class InDict(Net):
    def __init__(self):
        super().__init__()
        self.known = {}

    def norm(self, h):
        return self.known.setdefault("norm", h.shape[-1]) ** 0.5


class ByName(Net):
    def norm(self, h):
        if not hasattr(self, "width") or self.width is None:
            setattr(self, "width", torch.tensor(float(h.shape[-1])))  # noqa: B010
        return self.width**0.5


class Counts(Net):
    """Keeps what changes no output, or is no pass's."""

    def __init__(self, count=5):
        super().__init__()
        self.count, self.seen = count, None

    def norm(self, h):
        if self.count is None:
            self.count = h.shape[-1]
        self.seen = len(h)
        return self.count**0.5


@pytest.mark.parametrize(
    ("kind", "named"), [(Lazy, "count = 32"), (InDict, "known = {'norm': 32}"), (ByName, "width =")]
)
def test_what_an_earlier_pass_has_left_is_not_saved(kind, named, tmp_path):
    net = nn.Sequential(nn.Identity(), kind())
    net(X)
    result = osscar.prune(net, X, **FEW)
    with pytest.raises(EquivalenceError, match=rf"was not kept: .* left {named}.* in module '1'"):
        result.save(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_what_passes_leave_is_saved_where_a_new_model_computes_the_same(tmp_path):
    net = Counts()
    net(X)
    result = osscar.prune(net, X, **FEW)
    again = osscar.load(result.save(tmp_path / "small").path, dense=Counts())
    torch.testing.assert_close(again(X), result.model(X))


def test_other_code_is_refused_in_every_number_format(tmp_path):
    saved = once().save(tmp_path / "small")
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        assert osscar.load(saved.path, dense=Net(), dtype=dtype)(X.to(dtype)).isfinite().all()
        with pytest.raises(
            CheckpointError, match=r"outputs of .* differ from .* of their size off"
        ):
            osscar.load(saved.path, dense=Sigmoid(), dtype=dtype)


def test_what_is_recorded_is_small_and_is_made_anew_of_what_is_read(tmp_path):
    saved = once().save(tmp_path / "small")
    sample = read_manifest(saved.path).lineage.sample
    again = osscar.load(saved.path, dense=Net())
    assert sample.distance([again(**sample.drawn())]) < 1e-6
    assert len(json.dumps(json.loads((saved.path / "osscar.json").read_text()))) < 8000
    with torch.no_grad():
        again.down.bias += 1
    second = osscar.save(again, tmp_path / "second")
    assert sample.distance([again(**sample.drawn())]) > 0.1
    assert lineage_of(osscar.load(second.path, dense=Net())).sample.outputs != sample.outputs


def test_code_that_no_other_process_can_import_is_read_here_alone_and_says_so(tmp_path):
    class Local(Net):
        pass

    result = osscar.prune(Local(), X, **FEW)
    with pytest.warns(UserWarning, match=r"only in this process.*Local is defined in a function"):
        saved = result.save(tmp_path / "small")
    assert not saved.fresh
    assert not read_manifest(saved.path).fresh
    assert once().save(tmp_path / "other").fresh


@pytest.mark.slow
def test_a_new_python_searches_where_this_one_does(tmp_path, monkeypatch):
    # Files of the working folder, which a command does not search, have names of packages, too.
    (tmp_path / "graph.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setattr(read_back, "new_python", new_python)
    monkeypatch.setattr(sys, "path", [*(p for p in sys.path if p), tmp_path])  # no string: ignored
    monkeypatch.chdir(tmp_path)
    assert once().save(tmp_path / "small").fresh


class Typed(Net):
    def forward(self, x, scale=1.0):
        return super().forward(x * torch.as_tensor(scale, dtype=x.dtype))


def test_a_dense_model_of_the_same_weights_and_other_code_is_refused(tmp_path):
    """In memory and from a checkpoint, of a model that was pruned once or twice."""
    loaded = osscar.load(twice().save(tmp_path / "small").path, dense=Net())
    for smaller in (once(), twice().model, loaded):
        osscar.recover(smaller, Typed(), X, steps=1)
        with pytest.raises(ModelError, match=r"was not pruned from this .* recorded input"):
            osscar.recover(smaller, Sigmoid(), X, steps=1)
    osscar.recover(loaded, once().model, X, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_the_dense_model_are_compared_as_it_ran(dtype):
    smaller = osscar.prune(Net().to(dtype), X, **FEW)
    for own in (dtype, torch.float32):
        dense = Net().to(dtype).to(own)
        assert why_not_dense(smaller.model, dense) is None
        with torch.no_grad():
            dense.down.bias += 0.01
        assert "weights differ" in why_not_dense(smaller.model, dense)


# ---- what a trace leaves -----------------------------------------------------------------


@functools.cache
def nested(n):
    return {"grid": [torch.arange(1.0, n + 1)]}


def remembered(function):
    known = {}

    def call(n):
        if n not in known:
            known[n] = function(n)
        return known[n]

    return call


closed = remembered(lambda n: torch.arange(1.0, n + 1))
GRIDS = {"nested": lambda n: nested(n)["grid"][0], "closed": closed}


class Grid(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.up, self.down, self.name = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), name

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) * GRIDS[self.name](x.shape[-1])


@pytest.mark.parametrize("name", GRIDS)
def test_a_trace_leaves_nothing_in_the_caches_of_the_users_code(name, monkeypatch):
    from osscar.proof.sizes import other_sizes

    monkeypatch.setattr("osscar.proof.structural.other_sizes", other_sizes)
    net = Grid(name)
    GRIDS[name](5)  # which stays
    result = osscar.prune(net, torch.randn(8, 3, 6, 6), channels=0.5, backend="magnitude")
    assert result.certificate.structure is not None
    for size in range(1, 25):
        found = net(torch.ones(1, 3, size, size))
        assert not isinstance(found, FakeTensor)
        assert torch.equal(GRIDS[name](size), torch.arange(1.0, size + 1))


def test_models_that_are_swapped_are_not_recovered():
    smallest, small, dense = twice().model, once().model, Net()
    for smaller, larger in ((small, dense), (smallest, dense), (smallest, small)):
        with pytest.raises(
            ModelError, match="the second model is the smaller one, or was pruned more often"
        ):
            osscar.recover(larger, smaller, X, steps=4)


@pytest.mark.parametrize("name", ["llama", "own code"])
def test_what_python_saves_tells_how_much_left_unless_another_report_is_given(name, runs, tmp_path):
    result = runs[name].result
    result.save(tmp_path / "small")
    report = json.loads((tmp_path / "small" / "osscar_report.json").read_text())
    assert report["layers"] == json.loads(json.dumps(result.record()["layers"]))
    assert (tmp_path / "small" / "report.html").is_file()
    removed = 1 - result.parameters_after / result.parameters_before
    card = (tmp_path / "small" / "README.md").read_text()
    assert f" without {removed:.1%} of its parameters" in card
    assert "neurons 1/2" in card or "neurons 4" in card  # what was asked for
    result.save(tmp_path / "other", report={"mine": 1})
    assert json.loads((tmp_path / "other" / "osscar_report.json").read_text()) == {"mine": 1}
    assert not (tmp_path / "other" / "report.html").exists()
