"""Everything that a run makes lies where the model does, on a card as on the CPU."""

import copy
import dataclasses

import pytest
import torch

import graph
import osscar
import solvers
from benchmarks import gpu
from osscar.capture import opened as opening
from osscar.pruning.prune import prune_as_asked
from osscar.pruning.request import PruningRequest
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import images, small_net
from tests.osscar.other_device import Card, WrongDevice


@pytest.fixture
def card(monkeypatch):
    """A card that everything is watched on but tracing, which computes nothing."""
    card = Card()
    trace = graph.trace

    def apart(*args, **options):
        with card.unwatched():
            return trace(*args, **options)

    monkeypatch.setattr(opening.graph, "trace", apart)
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


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("opt", {"heads": 0.5, "neurons": 0.5}),
        ("qwen2", {"heads": 0.5, "neurons": 0.5, "target": "weights", "damp": 0.1}),
        ("qwen2", {"sparsity": 0.4}),
        ("opt", {"flops": 0.7, "allocation": "fluctuation"}),
        ("opt", {"neurons": 0.5, "certify": True}),
    ],
    ids=str,
)
def test_a_language_model_is_pruned_where_it_is(family, asked, card):
    model, data = tiny(family), tokens()
    request = PruningRequest(**asked, batch_size=3)
    plain = prune_as_asked(copy.deepcopy(model), data, request)
    with card.watched():
        result = prune_as_asked(on(card, model), data, request)
    assert {card.place(p) for p in result.model.parameters()} == {"card"}
    assert [layer.support for layer in result.layers] == [layer.support for layer in plain.layers]


@pytest.mark.parametrize(
    "asked",
    [
        {"channels": 0.5},
        {"channels": 0.5, "residual": 0.5},
        {"sparsity": 0.4},
        {"channels": 0.5, "batch_norm": "estimate", "target": "outputs"},
        {"channels": 0.5, "form": "graph"},
        {"speedup": 1.05},
    ],
    ids=str,
)
def test_a_network_is_pruned_where_it_is(asked, card, monkeypatch):
    model, data = small_net(), images(12)
    monkeypatch.setattr("osscar.pruning.allocation.aimed", aimed_at_once)
    with card.watched():
        result = prune_as_asked(on(card, model), data, PruningRequest(**asked))
    assert {card.place(p) for p in result.model.parameters()} == {"card"}


def aimed_at_once(latency, wanted, choose):
    """Choose by the table alone: how fast this network is, is another matter."""
    return choose(1 / wanted), wanted


def test_an_estimate_is_made_where_the_model_is(card):
    with card.watched():
        osscar.estimate(on(card, tiny("qwen2")), tokens(), sparsity=0.4)
        osscar.estimate(on(card, small_net()), images(12), channels=0.5)


# ---- the solvers -------------------------------------------------------------------------


ON_CARDS = [
    pytest.param(info.name, width, id=f"{info.name}, {width} rows a unit")
    for info in solvers.backends()
    if info.unavailable is None and "cuda" in info.capabilities.devices
    for width in (1, 3)[: 1 + info.capabilities.wide_units]
]


@pytest.mark.parametrize(("backend", "width"), ON_CARDS)
def test_a_backend_computes_where_its_problem_is(backend, width, card):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 8 * width, generator=generator, dtype=torch.float64)
    W0 = torch.randn(8 * width, 4, generator=generator, dtype=torch.float64)
    card.put([X, W0])
    with card.watched():
        problem = solvers.SubsetProblem.from_gram(X.T @ X / 64, W0, keep=4, units=8)
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


def test_what_memory_does_not_hold_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu, "memory_of", lambda device: 8 * 4 * 64**2)
    lines = gpu.solver_table([48, 96], torch.device("cpu"), "magnitude")
    assert "no memory" not in lines[2]
    assert lines[3].count("no memory") == 2


def test_what_takes_too_long_is_told(monkeypatch):
    took = gpu.Solved(1.0, frozenset(), 0.5, 0)
    monkeypatch.setattr(gpu, "solved", lambda p, *_: dataclasses.replace(took, seconds=p**2 / 1e4))
    lines = gpu.solver_table([100, 200, 4000], torch.device("cpu"), "magnitude", patience=60)
    assert lines[4].count("about 1600") == 2


@pytest.mark.parametrize("power", [2, 3])
def test_an_hour_is_enough_for_what_takes_one(power):
    found = [(p, 3600 * (p / 20_000) ** power) for p in (1000, 2000)]
    assert gpu.in_an_hour(found) == pytest.approx(20_000, abs=2)
    assert gpu.largest(int(8 * gpu.SQUARES * 1000**2)) in (999, 1000)
