"""Neurons of experts: what their last matrices read, refits of them, and what becomes of models."""

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

import osscar
import solvers
from osscar.allocation.task import PruningTask
from osscar.consumers.linear_maps import linear_maps
from osscar.preparation.prepare import prepare
from osscar.proof.lineage import note
from osscar.request import PruningRequest
from osscar.routing.routed import Routed
from osscar.walk.targets import streams
from osscar.walk.walk import Walk
from tests.osscar.families import tokens
from tests.osscar.mixtures import mixture


def of_experts(prepared):
    """Return the groups that experts read."""
    return [group for group in prepared.groups if group.name.endswith("experts.neurons")]


def called(model, name, data):
    """Return what a mixture is called with, and what it returns."""
    found = []

    def hook(module, args, kwargs, output):
        found.append((Routed.of(module, args, kwargs), output))

    with (
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True),
        torch.no_grad(),
    ):
        model(input_ids=data)
    return found[0]


def by_hand(experts, x, expert):
    """Compute in double precision what one expert reads, times the routing weight."""
    place, slot = (x.experts == expert).nonzero(as_tuple=True)
    hidden, weight = x.hidden[place].double(), x.weights[place, slot].double()
    gates = experts.gate_up_proj[expert].detach().double()
    gated = hidden @ (gates if experts.is_transposed else gates.T)
    if experts.has_bias:
        gated = gated + experts.gate_up_proj_bias[expert].detach().double()
    return experts._apply_gate(gated) * weight[:, None], place


SLOW = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("gpt-oss", "nemotron-h", "jamba", "deepseek-v3", "granitemoe")
]
"""Of other layouts: turned round, without gates, beside other layers or shared experts."""


@pytest.mark.parametrize("family", ["mixtral", *SLOW])
def test_experts_lose_neurons_and_what_is_saved_is_read_by_transformers(family, runs, tmp_path):
    if family == "mixtral":
        data, result = runs["mixture"].data, runs["mixture"].result
    else:
        data = tokens(16, 24)
        result = osscar.prune(mixture(family), data, neurons=0.5, device="cpu")
    experts = [layer for layer in result.layers if layer.name.endswith(".experts.neurons")]
    assert experts
    for layer in experts:
        half = layer.units // 2
        assert layer.kept == (half if layer.units <= 16 else (half + 4) // 8 * 8)
        assert 0 < layer.positions < data.numel()
        module = result.model.get_submodule(layer.name.removesuffix(".neurons"))
        assert module.down_proj.shape[1 if module.is_transposed else 2] == layer.kept
    assert result.certificate.error < 1e-5
    assert not result.skipped
    saved = result.save(tmp_path / "smaller")
    readers = [osscar.load, *([hf.AutoModelForCausalLM.from_pretrained] if saved.stock else [])]
    with torch.no_grad():
        expected = result.model(input_ids=data).logits
        for read in readers:
            assert_close(read(saved.path)(input_ids=data).logits, expected)


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("mixtral", "grouped_mm"), ("gpt-oss", "eager"), ("qwen3-moe", "batched_mm")],
)
def test_what_experts_read_is_found_whatever_multiplies_them(family, kernel):
    model, data = mixture(family, kernel=kernel, num_hidden_layers=1), tokens(3, 16)
    with prepare(model, data) as prepared:
        (group,) = of_experts(prepared)
        maps = linear_maps(prepared.model, group)
        name, experts = maps[0].name, prepared.model.get_submodule(maps[0].name)
        assert list(streams(prepared.model, prepared.example, [name])) == [name]
        x, y = called(prepared.model, name, data)
        D, corrected, total = torch.randn_like(y), *torch.zeros(2, *y.shape).double()
        for one in maps:
            X, token = by_hand(experts, x, one.expert)
            [found] = one.read_inputs(x)
            assert (found - X).abs().max() < 1e-5 * X.abs().max()
            assert one.passed_over(x) == data.numel() - len(X)
            total.index_add_(0, token, X @ one.read_weight())
            corrected.index_add_(0, token, one.read_corrections(D, x))
        if experts.has_bias:
            for slot in range(2):
                bias = experts.down_proj_bias[x.experts[:, slot]]
                total += x.weights[:, slot, None] * bias
        assert (total - y).abs().max() < 1e-5 * y.abs().max()
        assert (corrected - D).abs().max() < 1e-6  # the shares of a correction add up to it


def test_each_expert_is_refitted_on_its_own_tokens_and_one_without_any_keeps_its_rows():
    """By least squares in double precision, from what is computed by hand."""
    model, data = mixture("gpt-oss", num_hidden_layers=1), tokens(16, 24)
    model.model.layers[0].mlp.router.bias.data[2] = -1e9
    name, kept = "model.layers.0.mlp.experts", list(range(0, 40, 2))
    with prepare(model, data) as prepared:
        x, _ = called(prepared.model, name, data)
        experts = prepared.model.get_submodule(name)
        dense = experts.down_proj.detach().double()
        inputs = [by_hand(experts, x, expert)[0] for expert in range(4)]
        (step,) = Walk(prepared, of_experts(prepared))
        assert step.positions == min(len(X) for X in inputs if len(X))
        with pytest.warns(UserWarning, match=r"no calibration token is sent to .*experts\[2\]"):
            problem = step.problem(20, 1e-6)
        weights, loss = solvers.refit(problem, torch.tensor(kept))
        step.commit(step.refits(weights, kept).weights, kept)
        found = experts.down_proj.detach().double()
    lost = whole = 0.0
    for X, W0, W in zip(inputs, dense, found, strict=True):
        assert not W[1::2].any()
        if not len(X):
            assert torch.equal(W[kept], W0[kept])
            continue
        best = torch.linalg.lstsq(X[:, kept], X @ W0, driver="gelsd").solution
        assert (W[kept] - best).abs().max() < 2e-3 * best.abs().max()
        lost += float((X @ (W - W0)).square().sum())
        whole += float((X @ W0).square().sum())
    assert loss / problem.scale == pytest.approx(lost / whole, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "saved", "step", "kept"),
    [(torch.float32, None, 4, 20), (torch.bfloat16, None, 8, 24), (None, "bfloat16", 8, 24)],
)
def test_widths_are_those_that_kernels_take(dtype, saved, step, kept):
    model = mixture("mixtral", num_hidden_layers=1).to(dtype or torch.float32)
    note(model, stored_dtype=saved)
    with prepare(model, tokens()) as prepared:
        assert {group.step for group in of_experts(prepared)} == {step}
        assert set(PruningTask(prepared, PruningRequest(neurons=21)).provisional.values()) == {kept}
