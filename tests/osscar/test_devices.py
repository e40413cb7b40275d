"""Everything that a run makes lies where the model does, on a card as on the CPU."""

import copy
import re
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import osscar
import solvers
from benchmarks import card, gpu
from benchmarks.scale import layer
from osscar.base.errors import OptionError, RequestError
from osscar.base.memory import DeviceMemory, memory_of
from osscar.checkpoint.streamed import read_streamed
from osscar.models import load as loading
from osscar.network.modules import device_of
from osscar.offload import on_disk
from osscar.offload.on_disk import OnDisk, is_on_disk, weight_cache
from osscar.offload.places import Place
from osscar.offload.weight_cache import WeightCache
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog
from solvers.closed_forms.elimination import eliminate
from tests.osscar.families import tiny, tokens
from tests.osscar.mixtures import MIXTURES, mixture
from tests.osscar.networks import images, small_net
from tests.osscar.pretended_card import CARD, WrongDevice, pretended
from tests.osscar.test_streamed import written

# ---- that a mistake would be seen --------------------------------------------------------


def on_card():
    return torch.randn(3, 3, device="cuda")


MISTAKES = {
    "made on the host": lambda x: x + torch.zeros(3),
    "an identity": lambda x: x @ torch.eye(3),
    "left by numpy": lambda x: x * torch.from_numpy(numpy.ones(3)),
    "indices": lambda x: x.index_select(0, torch.tensor([1])),
    "written at an index": lambda x: x.index_fill_(0, torch.tensor([1]), 0.0),
    "places on the card": lambda x: torch.zeros(3)[x.argsort()[0]],
    "a part": lambda x: x[torch.tensor([0])] + torch.tensor([1.0]),
    "a generator": lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
    "numpy": lambda x: x.numpy(),
    "put together": lambda x: torch.cat([x, torch.zeros(1, 3)]),
    "moved": lambda x: x - x.cpu(),
    "asked for": lambda x: x * torch.ones(3, device="cpu"),
    "as another": lambda x: x + torch.ones(3, dtype=torch.float64).to(torch.zeros(3)),
    "in place": lambda x: torch.zeros(3, 3).add_(x),
    "half precision": lambda x: torch.linalg.cholesky(x.bfloat16()),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake):
    with pretended():
        x = on_card()
        with pytest.raises(WrongDevice):
            MISTAKES[mistake](x)


def test_what_a_card_allows_is_no_mistake():
    with pretended():
        x = on_card()
        made = [x + 1, x @ x.T, x.new_zeros(3), torch.zeros(3).to(x), torch.zeros(3).cuda(), x[0]]
        assert {y.device for y in (*made, torch.zeros(3, device=x.device))} == {CARD}
        assert {y.device.type for y in (torch.zeros(3), torch.tensor([1.0]), x.cpu())} == {"cpu"}
        x[torch.tensor([0, 2])] *= torch.tensor(2.0)
        x.copy_(torch.zeros(3, 3))


# ---- runs --------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("opt", {"heads": 0.5, "neurons": 0.5}),
        ("qwen2", {"sparsity": 0.4, "certify": True}),
        ("qwen2", {"heads": 0.5, "neurons": 0.5, "target": "weights", "damp": 0.1}),
        ("mixtral", {"experts": 0.75, "heads": 0.5}),
    ],
    ids=str,
)
def test_a_language_model_is_pruned_on_a_card_as_on_the_cpu(family, asked, tmp_path):
    model = mixture(family, kernel="eager") if family in MIXTURES else tiny(family, layers=1)
    data, asked = tokens(5), {**asked, "batch_size": 3}
    plain = osscar.prune(copy.deepcopy(model), data, device="cpu", **asked)
    with pretended():
        result = osscar.prune(model, data, device="cuda", **asked)
        assert {p.device for p in result.model.parameters()} == {CARD}
        if family not in MIXTURES:  # whose kernel on a card takes numbers that a CPU's refuses
            result.save(tmp_path / "small")
            assert device_of(osscar.load(tmp_path / "small").to("cuda")) == CARD
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "asked",
    [
        {"channels": 0.5, "residual": 0.5},
        {"channels": 0.5, "form": "exported"},
        {"flops": 0.6},
        {"speedup": 1.05},
    ],
    ids=str,
)
def test_a_network_is_pruned_on_a_card(asked, monkeypatch):
    monkeypatch.setattr("osscar.allocation.speedup.time_against", as_fast_as_it_is_small)
    monkeypatch.setattr("osscar.walk.regularization._DIRECTIONS", 3)  # as of layers that are wide
    with pretended():
        result = osscar.prune(small_net(), images(12), device="cuda", **asked)
        assert {p.device for p in result.model.parameters()} == {CARD}


def as_fast_as_it_is_small(dense, other, batch):
    """Compare two models by their parameters: no other process has a share in these."""
    return sum(p.numel() for p in dense.parameters()) / sum(p.numel() for p in other.parameters())


def test_a_pruned_model_is_recovered_and_scored_on_a_card():
    dense, data = tiny("opt", layers=1), tokens(8)
    with pretended():
        result = osscar.prune(dense, data, device="cuda", neurons=0.5)
        recovery = osscar.recover(result, dense, data, steps=2, device="cuda")
        assert {p.device for p in recovery.model.parameters()} == {CARD}


def test_the_newer_switches_of_precision_may_be_set(monkeypatch):
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    dense = small_net()
    result = osscar.prune(dense, images(12), channels=0.5, device="cpu")
    osscar.recover(result, dense, images(12), steps=1, device="cpu")


def test_an_estimate_is_made_on_a_card():
    with pretended():
        osscar.estimate(small_net(), images(12), channels=0.5, device="cuda")


class Counting(nn.Module):
    """A network that makes tensors of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.second(self.first(x).relu()) + places[:, None]


def test_what_a_program_makes_itself_moves_with_it():
    program = osscar.prune(
        Counting(), torch.rand(16, 5, 8), neurons=0.5, form="exported", device="cpu"
    ).model
    x = torch.rand(3, 5, 8)
    before = program(x)
    with pretended():
        found = program.to("cuda")(x.cuda())
        assert found.device == CARD
        assert torch.equal(found.cpu(), before)
    assert program.to("meta")(x.to("meta")).is_meta


# ---- a run that is read from disk --------------------------------------------------------

STREAMED = [
    ("opt", {"heads": 0.5, "neurons": 0.7, "target": "weights"}),  # which its config cannot say
    ("qwen2", {"neurons": 0.5, "heads": 0.5}),  # tied, with rotary frequencies that are computed
]


class Full(DeviceMemory):
    """Memory in which nothing can be kept."""

    def excess(self, needed, ceiling):
        return 1 << 60


@pytest.mark.sampled(1)
@pytest.mark.parametrize("holding", [True, False], ids=["kept", "read anew"])
@pytest.mark.parametrize(("family", "asked"), STREAMED, ids=str)
def test_a_streamed_model_is_pruned_on_a_card(family, asked, holding, tmp_path):
    dense = written(tmp_path / "dense", family, layers=1)
    on_card = PruningRequest(**asked, device="cuda", batch_size=3)
    with pretended():
        plain = prune_as_asked(osscar.load_model(dense, device="cuda").model, tokens(), on_card)
        stock = plain.save(tmp_path / "plain").stock
        loaded = osscar.load_model(dense, device="cuda", max_memory="64GB")
        if not holding:
            weight_cache(loaded.model).memory = Full()
        result = prune_as_asked(loaded.model, tokens(), on_card, RunLog(tmp_path / "log"))
        read_back = result.save(tmp_path / "streamed")
        assert result.model(torch.zeros(1, 4, dtype=int, device="cuda")).logits.device == CARD
        assert {buffer.device for buffer in result.model.buffers()} <= {CARD}
    assert is_on_disk(result.model)
    assert all(isinstance(p, OnDisk) for p in result.model.parameters())
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]
    assert read_back.stock is stock
    same = "model.safetensors"
    assert (tmp_path / "streamed" / same).read_bytes() == (tmp_path / "plain" / same).read_bytes()


@pytest.mark.parametrize("reader", ["read", "read_rows"])
def test_values_that_are_left_on_the_host_are_seen(reader, tmp_path, monkeypatch):
    dense, read = written(tmp_path / "dense", "opt"), getattr(Place, reader)
    with pretended():
        model = osscar.load_model(dense, device="cuda", max_memory="64GB").model
        batch = tokens(2).cuda()
        assert model(batch).logits.device == CARD
        cache = weight_cache(model)
        cache.memory = Full()
        cache.leave_free(0)
        monkeypatch.setattr(Place, reader, lambda *asked: read(*asked).cpu())
        with pytest.raises(WrongDevice):
            model(batch)


def test_what_is_done_to_values_on_disk_is_done_on_the_card(tmp_path):
    dense, index = written(tmp_path / "dense", "opt"), torch.tensor([0, 2])
    with pretended(), torch.no_grad():
        model = osscar.load_model(dense, device="cuda", max_memory="64GB").model
        weight = model.model.decoder.layers[0].fc1.weight
        assert weight.index_select(0, index).double().values().device == CARD
        filled = weight.like(weight.place.zeroed(1, index))
        assert filled.values().device == CARD
        weight.data = weight.values() * 2  # by way of a file
        assert weight.values().device == (weight + 1).device == CARD
        with on_disk.written(model.model.decoder.layers[0].fc1, "weight") as values:
            assert values.device == CARD


# ---- a streamed model and the names of devices -------------------------------------------


@pytest.fixture
def streamed(tmp_path):
    """A model that runs on a card that is not there: shapes can be computed, and no values."""
    dense = written(tmp_path / "dense", "opt")
    return read_streamed(dense, WeightCache(1 << 40, CARD), torch.float32)


def test_parameters_on_disk_are_on_the_device_of_their_cache(streamed):
    weight = streamed.lm_head.weight
    assert (weight.device, weight.get_device()) == (CARD, 0)
    assert weight.is_cuda
    assert not weight.is_cpu
    assert device_of(copy.deepcopy(streamed)) == streamed.device == CARD
    moved = weight.double().cpu()
    assert (moved.device, moved.is_cpu, moved.get_device()) == (torch.device("cpu"), True, -1)
    assert moved.cuda(0).cache is weight.cache
    assert moved.cache is weight.cache.on(torch.device("cpu"))
    with pytest.raises(OptionError, match="device=cpu or cuda"):
        weight.to("meta")


def test_a_card_that_is_not_there_is_refused_as_for_a_plain_parameter(tmp_path):
    streamed = read_streamed(
        written(tmp_path / "dense", "opt"), WeightCache(1 << 40), torch.float32
    )
    device = f"cuda:{max(7, torch.cuda.device_count())}"
    with pytest.raises((RuntimeError, AssertionError)) as refused:
        nn.Linear(1, 1).to(device)
    with pytest.raises(refused.type, match=re.escape(str(refused.value).splitlines()[0])):
        streamed.to(device)
    assert device_of(streamed) == torch.device("cpu")


def test_shapes_are_computed_on_the_device_of_the_cache(streamed):
    decoder = streamed.model.decoder
    with FakeTensorMode(), torch.no_grad():
        batch = torch.zeros(2, 8, dtype=torch.int64, device=CARD)
        found = decoder.embed_tokens(batch)
        assert decoder.layers[0].fc1(found).device == CARD
        with pytest.raises(RuntimeError, match="device"):
            decoder.layers[0].fc1(found.cpu())


def test_a_streamed_model_moves_whole(streamed, tmp_path):
    model, batch = streamed.to("cpu"), tokens(2)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    dense = osscar.load_model(tmp_path / "dense", device="cpu").model
    with torch.no_grad():
        assert torch.equal(model(batch).logits, dense(batch).logits)
    assert device_of(model.to(CARD)) == CARD


def test_tracing_takes_no_memory_on_a_card(streamed):
    with FakeTensorMode():
        example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64, device=CARD)}
    with on_disk.shapes_only(streamed, example) as small:
        assert {p.device.type for p in streamed.parameters()} == {"cpu"}
        assert small["input_ids"].device.type == "cpu"
    assert device_of(streamed) == CARD


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
    assert memory.held() == 90


def test_the_oldest_values_leave_a_card_that_is_full(tmp_path, monkeypatch):
    model = osscar.load_model(
        written(tmp_path / "dense", "opt"), device="cpu", max_memory=10**9
    ).model
    cache, layers = weight_cache(model), model.model.decoder.layers
    cache.memory = memory_of(CARD)
    first, second = layers[0].fc1.weight, layers[1].fc1.weight
    counted = Counted(monkeypatch, total=10**12)
    for weight in (first, second):
        weight.values()
    counted.used = 10**9 - (64 << 20) + 1  # what is always left free
    cache.leave_free(0)
    before = cache.read_bytes
    second.values()
    assert cache.read_bytes == before
    first.values()
    assert cache.read_bytes > before


def test_a_limit_that_a_card_cannot_keep_is_refused(tmp_path, monkeypatch):
    model = osscar.load_model(
        written(tmp_path / "dense", "opt"), device="cpu", max_memory="1GB"
    ).model
    Counted(monkeypatch, total=10**12, used=950_000_000)
    weight_cache(model).memory = memory_of(CARD)
    said = r"max_memory=1.00GB cannot hold .* for what is on the card already; give at least 1\."
    with pytest.raises(RequestError, match=said):
        prune_as_asked(model, tokens(), PruningRequest(neurons=0.5, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_on_the_card_stays_on_disk_by_default(tmp_path, monkeypatch, dtype):
    dense = written(tmp_path / "dense", "opt", dtype=dtype)
    size = 4 * sum(t.nbytes for t in load_file(dense / "model.safetensors").values())
    monkeypatch.setattr(loading, "resolve_device", lambda _: CARD)
    # With batches, which are there beside two copies of the weights: 48 is the width, 48 what the
    # widest layer reads, and of six tensors as wide as the model one is in float32.
    batches = 1000 * ((5 * 48 + 48) * dtype.itemsize + 4 * 48)
    for needed, positions in ((size, 0), (size, 1), (size // 2 + batches, 1000)):
        for total, expected in ((needed, None), (needed - 10, (needed - 10) * 9 // 10)):
            Counted(monkeypatch, total=total)
            found = loading.fitting_memory(dense, device="cuda", positions=positions)
            assert found == expected


# ---- the solvers -------------------------------------------------------------------------


ON_CARDS = [
    pytest.param(info.name, width, id=f"{info.name}, {width} rows a unit")
    for info in solvers.backends()
    if info.unavailable is None and "cuda" in info.capabilities.devices
    for width in (1, 3)[: 1 + info.capabilities.wide_units]
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("backend", "width"), ON_CARDS)
def test_a_backend_computes_where_its_problem_is(backend, width):
    generator = numpy.random.default_rng(0)
    X = torch.tensor(generator.standard_normal((64, 6 * width)))
    W0 = torch.tensor(generator.standard_normal((6 * width, 4)))
    with pretended():
        X, W0 = X.cuda(), W0.cuda()
        problem = solvers.SubsetProblem.from_gram(X.T @ X / 64, W0, keep=3, units=6)
        solution = solvers.solve(problem, backend, bound=True)
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


# ---- the benchmark -----------------------------------------------------------------------


def test_the_benchmark_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    def page(*more):
        with pretended():
            gpu.main([str(tmp_path), "--sizes", "48", "96", "--tasks", "tiny", *more])
        assert (tmp_path / "page.md").read_text() == capsys.readouterr().out
        lines = (tmp_path / "page.md").read_text().splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
        return rows[2:4], rows[6:], lines

    solved, pruned, lines = page("--minutes", "0")
    assert {row[2] for row in solved} == {"not yet"}
    assert lines[-1].startswith("6 rows are not measured yet")
    first = page()
    solved, pruned, lines = first
    assert [row[0] for row in solved] == ["48", "96"]
    assert {row[5] for row in solved} == {"the same"}
    assert all(float(row[3]) > 0 for row in solved)
    assert pruned[-1][1] == "all"
    assert pruned[-1][6] == "the same"
    assert sum("GB hold p" in line for line in lines) == 2
    monkeypatch.delattr(gpu, "measured")  # nothing is measured anew
    assert page()[:2] == first[:2]
    (tmp_path / "prune tiny device.json").unlink()
    with pytest.raises(NameError):
        page()


def test_the_page_has_what_is_counted_now():
    page = (Path(card.__file__).parents[1] / "docs/results.md").read_text()
    assert "\n".join(card.tables("llama-2-7b", 128, 2048)) in page
    h100, rtx = card.CARDS
    for rate in ("bf16", "fp32", "fp64", "bandwidth"):
        assert f"| {getattr(h100, rate)} | {getattr(rtx, rate)} |" in page
