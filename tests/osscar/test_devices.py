"""Everything that a run makes lies where the model does, on a card as on the CPU."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import osscar
import solvers
from benchmarks.scale import layer
from osscar.base.memory import memory_of
from osscar.network.modules import device_of
from osscar.offload.on_disk import OnDisk
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog
from solvers.closed_forms.elimination import eliminate
from tests.graph.topologies import PRUNABLE
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import MIXTURES, mixture
from tests.osscar.pretended_card import CARD, WrongDevice, pretended
from tests.osscar.test_streamed import written

# ---- that a mistake would be seen --------------------------------------------------------


MISTAKES = (
    lambda x: x + torch.zeros(3),
    lambda x: x * torch.from_numpy(numpy.ones(3)),
    lambda x: x[torch.tensor([0])] + torch.tensor([1.0]),
    lambda x: x.numpy(),
    lambda x: x - x.cpu(),
    lambda x: x * torch.ones(3, device="cpu"),
    lambda x: torch.linalg.cholesky(x.bfloat16()),
)


def test_a_mistake_is_seen_and_what_a_card_allows_is_none():
    for mistake in MISTAKES:
        with pretended(), pytest.raises(WrongDevice):
            mistake(torch.randn(3, 3, device="cuda"))
    with pretended():
        x = torch.randn(3, 3, device="cuda")
        made = [x + 1, x @ x.T, x.new_zeros(3), torch.zeros(3).to(x), torch.zeros(3).cuda(), x[0]]
        assert {y.device for y in (*made, torch.zeros(3, device=x.device))} == {CARD}
        assert {y.device.type for y in (torch.zeros(3), torch.tensor([1.0]), x.cpu())} == {"cpu"}
        x[torch.tensor([0, 2])] *= torch.tensor(2.0)
        x.copy_(torch.zeros(3, 3))


# ---- runs --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("opt", {"heads": 0.5, "neurons": 0.5}),
        pytest.param("mixtral", {"experts": 0.75}, marks=pytest.mark.slow),
    ],
)
def test_a_language_model_is_pruned_on_a_card_as_on_the_cpu(family, asked, tmp_path):
    routed = family in MIXTURES  # whose kernel on a card takes numbers that a CPU's refuses
    model = (
        mixture(family, kernel="eager", num_hidden_layers=1) if routed else tiny(family, layers=1)
    )
    data, asked = tokens(4, 12), {**asked, "batch_size": 3}
    plain = osscar.prune(copy.deepcopy(model), data, device="cpu", **asked)
    with pretended():
        result = osscar.prune(model, data, device="cuda", **asked)
        assert {p.device for p in result.model.parameters()} == {CARD}
        if not routed:
            result.save(tmp_path / "small")
            assert device_of(osscar.load(tmp_path / "small").to("cuda")) == CARD
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]


def test_a_network_is_pruned_on_a_card(monkeypatch):
    monkeypatch.setattr("osscar.walk.layer_step._DIRECTIONS", 3)  # as of layers that are wide
    with pretended():
        net, data = PRUNABLE["residual"][0]().eval(), torch.randn(12, 3, 4, 4)
        result = osscar.prune(net, data, device="cuda", channels=0.5, residual=0.5)
        assert {p.device for p in result.model.parameters()} == {CARD}


def test_a_model_is_recovered_on_a_card():
    dense, data = tiny("opt", layers=1), tokens(8, 12)
    with pretended():
        smaller = copy.deepcopy(dense).to("cuda")
        recovery = osscar.recover(smaller, dense, data, steps=2, device="cuda")
        assert {p.device for p in recovery.model.parameters()} == {CARD}


class Counting(nn.Module):
    """A network that makes tensors of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.second(self.first(x).relu()) + places[:, None]


def test_what_a_program_makes_itself_moves_with_it(monkeypatch):
    """Where the newer switches of precision are set, too, which torch does not let be mixed."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    dense, data = Counting(), torch.rand(16, 5, 8)
    program = osscar.prune(dense, data, neurons=0.5, form="exported", device="cpu").model
    osscar.recover(program, dense, data, steps=1, device="cpu")
    x = torch.rand(3, 5, 8)
    before = program(x)
    with pretended():
        found = program.to("cuda")(x.cuda())
        assert found.device == CARD
        assert torch.equal(found.cpu(), before)
    assert program.to("meta")(x.to("meta")).is_meta


# ---- a run that is read from disk --------------------------------------------------------


@pytest.mark.slow
def test_a_streamed_model_is_pruned_on_a_card(tmp_path):
    dense = written(tmp_path / "dense", "opt", layers=1)
    on_card = PruningRequest(heads=0.5, target="weights", device="cuda", batch_size=3)
    with pretended():
        plain = prune_as_asked(osscar.load_model(dense, device="cuda").model, tokens(), on_card)
        model = osscar.load_model(dense, device="cuda", max_memory="64GB").model
        result = prune_as_asked(model, tokens(), on_card, RunLog(tmp_path / "log"))
        assert result.save(tmp_path / "streamed").stock is plain.save(tmp_path / "plain").stock
        assert result.model(torch.zeros(1, 4, dtype=int, device="cuda")).logits.device == CARD
        assert {buffer.device for buffer in result.model.buffers()} <= {CARD}
    assert all(isinstance(p, OnDisk) for p in result.model.parameters())
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]
    same = "model.safetensors"
    assert (tmp_path / "streamed" / same).read_bytes() == (tmp_path / "plain" / same).read_bytes()


# ---- memory of a card --------------------------------------------------------------------


class Counted:
    """What torch says of a card's memory: what this process has reserved, and uses of that."""

    def __init__(self, monkeypatch, *, total, used=0, cached=0):
        self.total, self.used, self.cached, self.emptied = total, used, cached, 0
        for name, value in {
            "memory_reserved": lambda device: self.used + self.cached,
            "max_memory_reserved": lambda device: self.used + self.cached,
            "mem_get_info": lambda device: (self.total - self.used - self.cached, self.total),
            "empty_cache": self.empty,
            "device_count": lambda: 1,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def empty(self):
        self.cached, self.emptied = 0, self.emptied + 1


def test_a_limit_is_about_the_memory_of_the_card(monkeypatch):
    counted = Counted(monkeypatch, total=100, used=20, cached=30)
    memory = memory_of(CARD)
    assert (memory.excess(10, 60), counted.emptied) == (0, 0)
    assert (memory.excess(30, 60), counted.emptied) == (-10, 1)  # once what was freed is gone
    counted.used = 90
    assert memory.excess(30, 1000) == 20  # others have the rest
    counted.cached = 5
    assert memory.peak() == 95
    assert memory.available() == 100
    assert memory.resident() == 90


# ---- the solvers -------------------------------------------------------------------------


ON_CARDS = [
    pytest.param(info.name, width, id=f"{info.name}, {width} rows a unit")
    for info in solvers.backends()
    if info.unavailable is None and "cuda" in info.capabilities.devices
    for width in (1, 2)
]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("backend", "width"), ON_CARDS)
def test_a_backend_computes_where_its_problem_is(backend, width):
    torch.manual_seed(0)
    X, W0 = torch.randn(32, 4 * width).double(), torch.randn(4 * width, 3).double()
    with pretended():
        X, W0 = X.cuda(), W0.cuda()
        problem = solvers.SubsetProblem.from_gram(X.T @ X / 32, W0, keep=2, units=4)
        solution = solvers.solve(problem, backend, bound=backend == "greedy")
        solution.verify()
        assert {x.device for x in (solution.support, *solution.weights)} == {CARD}


def test_a_card_is_seldom_waited_for(monkeypatch):
    """Units leave 64 at a time; then rows are read, and updates checked."""
    H, W0 = layer(400, 64, 0)
    work, tolist = Work(), torch.Tensor.tolist

    def waiting(tensor):
        work.waits += torch._C._len_torch_function_stack() == 0  # that of the card calls this again
        return tolist(tensor)

    with pretended():
        problem = solvers.SubsetProblem.from_gram(H.dense().cuda(), W0.cuda(), keep=100, damp=0.01)
        monkeypatch.setattr(torch.Tensor, "tolist", waiting)
        with work:
            eliminate(problem, 300)
        monkeypatch.undo()
    assert work.waits <= 300 / 8
    assert work.kernels <= 300 * 16


class Work(TorchDispatchMode):
    """Counts kernels of a card, and how often the host waits for what they say."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")
    VIEWS = (
        *("view", "slice", "select", "t", "transpose", "expand", "as_strided", "unsqueeze"),
        *("squeeze", "permute", "detach", "alias", "split", "split_with_sizes", "diagonal"),
        *("unbind", "lift_fresh", "empty", "new_empty", "empty_strided", "empty_like"),
        *("_unsafe_view", "_reshape_alias"),
    )

    def __init__(self):
        super().__init__()
        self.waits = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.waits += masks or name in self.WAITS
        self.kernels += name not in self.VIEWS
        return func(*args, **(kwargs or {}))
