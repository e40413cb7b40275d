"""A dense model that is given beside a pruned one is the model that this was pruned from."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import osscar
from osscar.base.errors import ModelError
from osscar.network.tensor_files import read_header
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Place, WeightCache
from osscar.proof.lineage import check_dense, weights_digest

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
DATA = osscar.TensorSet("numbers", {"x": X})
FEW = {"neurons": 0.5, "backend": "magnitude", "device": "cpu"}


class Net(nn.Module):
    """Has statistics and a counter, normalized weights, and a matrix under two names."""

    def __init__(self, seed=0, width=96):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 200), weight_norm(nn.Linear(200, width))
        self.last = nn.Linear(width, 6, bias=False)
        self.last.weight = nn.Parameter(self.first.weight.detach().T.clone())
        self.same = self.last
        self.eval()

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.last(h + self.down(torch.relu(self.up(h))))


@cache
def pruned():
    """What no test changes."""
    return osscar.prune(Net(), X, **FEW)


def compared(dense, **more):
    return osscar.compare(pruned().model, dense, DATA, repetitions=1, **more)


def recovered(dense, **more):
    return osscar.recover(pruned(), dense, X, steps=1, device="cpu", **more)


@pytest.mark.parametrize("given", [compared, recovered])
def test_other_weights_are_refused_and_named_unless_another_model_is_meant(given):
    given(Net())
    with pytest.raises(ModelError, match=r"9 of 13 tensors of its weights differ .* 'first\.w"):
        given(Net(seed=1))
    trained = Net()
    with torch.no_grad():
        trained.up.bias[7] += 1e-3
    with pytest.raises(ModelError, match=r"1 of 13 tensors .* 'up\.bias'.*`--other-dense`"):
        given(trained)
    with pytest.raises(ModelError, match=r"it has 15 tensors of weights, and 13 were recorded"):
        given(nn.Sequential(Net(), nn.Linear(6, 6)))
    given(Net(seed=1), other_dense=True)


def counted_up(net):
    net.norm.num_batches_tracked += 5
    return net


@pytest.mark.parametrize(
    "change",
    [
        counted_up,
        copy.deepcopy,
        lambda net: net.double().float(),
        lambda net: net.bfloat16(),  # of which outputs tell
        lambda net: torch.compile(net, backend="eager"),
    ],
)
def test_the_model_itself_is_known_in_every_state(change):
    check_dense(pruned().model, change(Net()))
    with pytest.raises(ModelError, match="was not pruned from this"):
        check_dense(pruned().model, change(Net(seed=1)))


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_itself_is_known_in_every_number_format(own, then):
    small = osscar.prune(Net().to(own), X.to(own), **FEW).model
    check_dense(small, Net().to(then))
    for other in (Net(seed=1), Net(width=64)):
        with pytest.raises(ModelError, match="was not pruned from this"):
            check_dense(small, other.to(then))


def test_a_checkpoint_knows_every_model_that_it_was_pruned_from(tmp_path):
    twice = osscar.prune(pruned().model, X, **FEW)
    again = osscar.load(twice.save(tmp_path / "small").path, dense=Net(seed=3))  # any weights
    for dense in (Net(), pruned().model):
        check_dense(again, dense)
    with pytest.raises(ModelError, match="9 of 13 tensors"):
        check_dense(again, Net(seed=3))


@pytest.mark.parametrize("shape", [(64, 64), (300, 70), (5000,), (3, 40, 50), (70, 3, 9, 9)])
def test_few_numbers_of_a_large_tensor_are_read_and_are_the_same_on_disk(shape, tmp_path):
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    due = weights_digest(model)
    save_file({"w": model.w.detach()}, tmp_path / "w.safetensors")
    stored = read_header(tmp_path / "w.safetensors")["w"]
    other = nn.Module()
    other.w = OnDisk(Place(stored, stored.shape), WeightCache(1 << 40))
    assert weights_digest(other) == due
    if len(shape) == 2 and model.w.numel() > 4096:
        assert other.w.cache.read_bytes < stored.nbytes / 4
    with torch.no_grad():  # a hundredth of the numbers, or a stretch
        model.w.add_(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.01)
    assert weights_digest(model) != due


def test_the_command_does_not_compare_with_weights_drawn_at_random(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom tests.osscar.test_other_dense import Net, X\n"
        "def build():\n    return Net(torch.seed() % 1000), X[:2]\n"
    )
    torch.save(Net().state_dict(), "net.pt")
    np.savez("test.npz", x=-X)
    pruned().save("small")
    command = "eval", "small", "--dense", "net.py:build", "--inputs", "test.npz"
    status, _, err = run(*command)
    assert status == 2
    assert "9 of 13 tensors of its weights differ" in " ".join(err.split())
    for more in (("--weights", "net.pt"), ("--other-dense",)):
        status, out, err = run(*command, *more)
        assert (status, "ratio" in out) == (0, True), err
    recover = "recover", "small", "--dense", "net.py:build", "--inputs", "test.npz", "--steps", 1
    assert run(*recover)[0] == 2
    assert run(*recover, "--other-dense")[0] == 0
    assert run("eval", "small", "--inputs", "test.npz", "--other-dense")[0] == 2
