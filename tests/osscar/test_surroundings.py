"""What surrounds a run: compiled modules, and the states of torch that a caller has set."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import osscar


def doubled(x):
    return 2 * torch.relu(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(6, 24), nn.Linear(24, 6), doubled

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Decorated(Block):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


def blocks():
    torch.manual_seed(0)
    body = nn.Sequential(Block(), nn.ReLU(), Block())
    return nn.Sequential(Block(), body, Block(), Block(), Decorated(), nn.Linear(6, 3)).eval()


def compiled():
    """Return the same with modules that are compiled in every way."""
    net = blocks()
    net[0] = torch.compile(net[0], backend="eager")
    net[1][2] = torch.compile(net[1][2], backend="eager")
    net[1] = torch.compile(net[1], backend="eager")
    net[2].compile(backend="eager")
    net[3].act = torch.compile(doubled, backend="eager")
    return net


@pytest.mark.slow
def test_compiled_modules_are_pruned_as_they_were_before(tmp_path):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    plain, model = blocks(), compiled()
    expected, found = (osscar.prune(net, x, neurons=0.5, device="cpu") for net in (plain, model))
    assert type(model[0]) is type(torch.compile(nn.ReLU()))  # the caller's model is as it was
    assert found.plan.groups == expected.plan.groups
    assert len(found.layers) == 6
    state = expected.model.state_dict()
    assert found.model.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in found.model.state_dict().items())
    found.save(tmp_path / "small")
    assert osscar.load(tmp_path / "small", dense=compiled())(x).equal(found.model(x))
    whole = torch.compile(model, backend="eager")
    again = osscar.prune(whole, x, neurons=0.5, device="cpu")
    assert again.plan == found.plan
    assert again.model.state_dict().keys() == state.keys()
    again.model.compile(backend="eager")
    osscar.recover(torch.compile(again.model, backend="eager"), whole, x, steps=1, device="cpu")


# ---- states of torch ---------------------------------------------------------------------

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
ASKED = {"flops": 0.6, "device": "cpu"}


@contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).eval()


@pytest.fixture(scope="module")
def expected():
    return osscar.prune(two_blocks(), X, **ASKED).model.state_dict()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "state",
    [
        lambda: default_device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.bfloat16),
        torch.inference_mode,
    ],
    ids=["meta", "autocast", "bfloat16", "inference"],
)
def test_a_run_is_the_same_whatever_state_of_torch_it_is_called_in(state, expected, tmp_path):
    model, data = two_blocks(), X
    with state():
        if torch.is_inference_mode_enabled():
            model, data = two_blocks(), X.clone()
        result = osscar.prune(model, data, **ASKED)
        result.save(tmp_path / "small")
        read = osscar.load(tmp_path / "small", dense=model)
        osscar.recover(result, model, X, steps=2, device="cpu")
    for found in (result.model.state_dict(), read.state_dict()):
        assert all(value.equal(found[name]) for name, value in expected.items())
        assert not any(value.is_inference() for value in found.values())


# ---- language models of one's own --------------------------------------------------------


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, idx):
        x = self.table(idx)
        return self.head(x + self.down(torch.relu(self.up(x))))


class Raises(Own):
    def get_input_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Own, Raises])
def test_windows_calibrate_a_language_model_of_ones_own(kind):
    torch.manual_seed(0)
    model, tokens = kind().eval(), torch.randint(50, (32, 12))
    windows = osscar.CalibrationSet(tokens, "windows", 0)
    found = [
        osscar.prune(model, data, neurons=0.5, device="cpu").plan
        for data in (windows, tokens, {"idx": tokens})
    ]
    assert found[0] == found[1] == found[2]
