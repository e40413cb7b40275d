"""Everything that a run makes lies where the model does, on a card as on the CPU."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graph
import osscar
import solvers
from benchmarks import gpu
from osscar.base.errors import OptionError, RequestError
from osscar.checkpoint.streamed import read_streamed
from osscar.models import load as loading
from osscar.network.modules import device_of
from osscar.offload import on_disk, places
from osscar.offload.device_memory import DeviceMemory, memory_of
from osscar.offload.on_disk import OnDisk, is_on_disk, weight_cache
from osscar.offload.places import Place
from osscar.offload.weight_cache import WeightCache
from osscar.preparation import prepare as opening
from osscar.pruning.prune import prune_as_asked
from osscar.pruning.run_log import RunLog
from osscar.request import PruningRequest
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net
from tests.osscar.other_device import Card, WrongDevice
from tests.osscar.test_streamed import written


@pytest.fixture
def card(monkeypatch):
    """A card that everything is watched on but tracing, which computes nothing."""
    card = Card()
    trace = graph.trace

    def apart(*args, **options):
        with card.unwatched():
            return trace(*args, **options)

    monkeypatch.setattr(opening.graph, "trace", apart)
    monkeypatch.setattr(places, "is_host", lambda device: False)
    return card


def on(card, model):
    card.put([*model.parameters(), *model.buffers()])
    return model


# ---- that it would be seen ---------------------------------------------------------------


def test_a_tensor_that_is_made_on_the_host_is_seen(card):
    x = torch.randn(3, 3)
    card.put([x])
    with card.watched():
        assert card.place((x + 1) @ x.T) == "card"
        assert card.place(x.new_zeros(3)) == card.place(torch.zeros(3, device=x.device)) == "card"
        assert card.place(torch.zeros(3)) == card.place(torch.tensor([1.0])) == "host"
        assert card.place(torch.zeros(3).to(x.device)) == card.place(torch.zeros(3).to(x)) == "card"
        assert card.place(x.cpu()) == "host"
        x[torch.tensor([0, 2])] *= torch.tensor(2.0)  # as CUDA allows
        for wrong in (
            lambda: x + torch.zeros(3),
            lambda: x @ torch.eye(3),
            lambda: x.index_select(0, torch.tensor([1])),
            lambda: x[torch.tensor([0])] + torch.tensor([1.0]),
            lambda: x.index_fill_(0, torch.tensor([1]), 0.0),
            lambda: torch.rand(3, device=x.device, generator=torch.Generator()),
            lambda: x.numpy(),
            lambda: torch.cat([x, torch.zeros(1, 3)]),
        ):
            with pytest.raises(WrongDevice):
                wrong()


# ---- a run -------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("opt", {"heads": 0.5, "neurons": 0.5}),
        ("qwen2", {"heads": 0.5, "neurons": 0.5, "target": "weights", "damp": 0.1}),
        ("qwen2", {"sparsity": 0.4, "certify": True}),
    ],
    ids=str,
)
def test_a_language_model_is_pruned_where_it_is(family, asked, card):
    model, data = tiny(family, layers=1), tokens(5)
    request = PruningRequest(**asked, batch_size=3)
    plain = prune_as_asked(copy.deepcopy(model), data, request)
    with card.watched():
        result = prune_as_asked(on(card, model), data, request)
    assert {card.place(p) for p in result.model.parameters()} == {"card"}
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "asked",
    [
        {"channels": 0.5, "residual": 0.5},
        {"channels": 0.5, "form": "exported"},
        {"speedup": 1.05},
    ],
    ids=str,
)
def test_a_network_is_pruned_where_it_is(asked, card, monkeypatch):
    model, data = small_net(), images(12)
    monkeypatch.setattr("osscar.allocation.speedup.time_against", as_fast_as_it_is_small)
    with card.watched():
        result = prune_as_asked(on(card, model), data, PruningRequest(**asked))
    assert {card.place(p) for p in result.model.parameters()} == {"card"}


def as_fast_as_it_is_small(dense, other, batch):
    """Compare two models by their parameters: no other process has a share in these."""
    return sum(p.numel() for p in dense.parameters()) / sum(p.numel() for p in other.parameters())


def test_an_estimate_is_made_where_the_model_is(card):
    with card.watched():
        osscar.estimate(on(card, small_net()), images(12), channels=0.5)


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
def test_a_streamed_model_is_pruned_where_it_is(family, asked, holding, card, tmp_path):
    dense = written(tmp_path / "dense", family, layers=1)
    request = PruningRequest(**asked, device="cpu", batch_size=3)
    plain = prune_as_asked(osscar.load_model(dense, device="cpu").model, tokens(), request)
    with card.watched():
        loaded = osscar.load_model(dense, device="cpu", max_memory="64GB")
        if not holding:
            weight_cache(loaded.model).memory = Full()
        result = prune_as_asked(loaded.model, tokens(), request, RunLog(tmp_path / "log"))
        read_back = result.save(tmp_path / "streamed")
        assert card.place(result.model(torch.zeros(1, 4, dtype=int, device="cpu")).logits) == "card"
    assert is_on_disk(result.model)
    assert all(isinstance(p, OnDisk) for p in result.model.parameters())
    assert {card.place(buffer) for buffer in result.model.buffers()} <= {"card"}
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]
    assert read_back.stock is plain.save(tmp_path / "plain").stock
    same = "model.safetensors"
    assert (tmp_path / "streamed" / same).read_bytes() == (tmp_path / "plain" / same).read_bytes()


@pytest.mark.parametrize("reader", ["read", "read_rows"])
def test_values_that_are_left_on_the_host_are_seen(reader, card, tmp_path, monkeypatch):
    dense, read = written(tmp_path / "dense", "opt"), getattr(Place, reader)
    with card.watched():
        model = osscar.load_model(dense, device="cpu", max_memory="64GB").model
        batch = tokens(2)
        card.put([batch])
        assert card.place(model(batch).logits) == "card"
        cache = weight_cache(model)
        cache.memory = Full()
        cache.leave_free(0)
        monkeypatch.setattr(Place, reader, lambda *asked: read(*asked).cpu())
        with pytest.raises(WrongDevice):
            model(batch)


def test_what_is_done_to_values_on_disk_is_done_on_the_card(card, tmp_path):
    dense, index = written(tmp_path / "dense", "opt"), torch.tensor([0, 2])
    with card.watched(), torch.no_grad():
        model = osscar.load_model(dense, device="cpu", max_memory="64GB").model
        weight = model.model.decoder.layers[0].fc1.weight
        assert card.place(weight.index_select(0, index).double().values()) == "card"
        filled = weight.like(weight.place.zeroed(1, index))
        assert card.place(filled.values()) == "card"
        weight.data = weight.values() * 2  # by way of a file
        assert card.place(weight.values()) == card.place(weight + 1) == "card"
        with on_disk.written(model.model.decoder.layers[0].fc1, "weight") as values:
            assert card.place(values) == "card"


# ---- a streamed model and the names of devices -------------------------------------------

CARD = torch.device("cuda:0")


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
    for total, expected in ((size, None), (size - 10, (size - 10) * 9 // 10)):
        Counted(monkeypatch, total=total)
        assert loading.fitting_memory(dense, device="cuda") == expected


# ---- the solvers -------------------------------------------------------------------------


ON_CARDS = [
    pytest.param(info.name, width, id=f"{info.name}, {width} rows a unit")
    for info in solvers.backends()
    if info.unavailable is None and "cuda" in info.capabilities.devices
    for width in (1, 3)[: 1 + info.capabilities.wide_units]
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("backend", "width"), ON_CARDS)
def test_a_backend_computes_where_its_problem_is(backend, width, card):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 6 * width, generator=generator, dtype=torch.float64)
    W0 = torch.randn(6 * width, 4, generator=generator, dtype=torch.float64)
    card.put([X, W0])
    with card.watched():
        problem = solvers.SubsetProblem.from_gram(X.T @ X / 64, W0, keep=3, units=6)
        solution = solvers.solve(problem, backend, bound=True)
        solution.verify()
    assert {card.place(x) for x in (solution.support, *solution.weights)} == {"card"}


# ---- the benchmark -----------------------------------------------------------------------


def test_the_benchmark_compares_a_device_with_the_cpu(monkeypatch):
    monkeypatch.setitem(
        gpu.TASKS, "opt-6.7b", gpu.Task(lambda: gpu.opt_block(32, 64, 4), {"neurons": 0.5})
    )
    cpu = torch.device("cpu")
    lines = gpu.solver_table([48, 96], cpu, "greedy")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert [row[0] for row in rows] == ["48", "96"]
    assert {row[5] for row in rows} == {"yes"}
    assert all(float(row[3]) > 0 for row in rows)
    assert sum("GB hold p" in line for line in lines) == 2
    lines = gpu.pipeline_table(["opt-6.7b"], cpu)
    assert "all (the same units)" in lines[-1]
