"""Experts leave, and heads and neurons of what stays: one run, one plan, one proof."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count
from osscar.allocation.measured import Curve, compared_samples, measured_curves
from osscar.allocation.widths import asked_groups
from osscar.base.errors import JournalError, RequestError
from osscar.experts.routers import routed_among
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.request import BudgetKind, PruningRequest
from osscar.run.points import jobs, prune_points
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import prune_page
from osscar.run.run_log import RunLog
from osscar.shrinking.shrink import shrink
from osscar.walk.targets import correction
from solvers import BackendError
from solvers.heuristics.greedy import Greedy
from tests.osscar.expert_lists import COUNT, WIDTH, Called, Expert, Masked, SoftmaxThenTopK, net
from tests.osscar.families import tokens
from tests.osscar.mixtures import mixture
from tests.osscar.test_costs import best_at_each_cost, check_bound, every_choice

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*since a refit did worse on held-out samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the Gram matrix is rank-deficient:UserWarning"),
]

MIXTURE = "model.layers.{}.mlp.experts"
ALL = {"damp": 0.3, "correction_weight": 1.0}
"""With these, no sample is held out."""


def logits_of(model):
    """Return what a model puts out on the calibration data."""
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_experts_neurons_and_heads_leave_in_one_run(family, tmp_path):
    model = mixture(family)
    asked = {"heads": 0.5} if family != "deepseek-v3" else {}
    result = osscar.prune(model, tokens(), experts=3, neurons=0.5, **asked)
    assert result.certificate.error < 1e-5
    kinds = [layer.kind for layer in result.layers]
    assert kinds[:2] == ["experts"] * 2
    assert set(kinds[2:]) == {"neurons", *asked}
    assert all(layer.unread == 0 for layer in result.layers)
    saved = result.save(tmp_path / "smaller")
    assert saved.stock
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path)
    assert torch.equal(logits_of(plain), logits_of(result.model))
    page = prune_page(result.document(model, tokens()))
    assert "relative to the loss of removing all of them; of experts" in page


def test_one_run_comes_to_what_two_come_to():
    """Towards what weights make of their inputs, nothing tells one run from the other."""
    model, asked = mixture("mixtral"), {"target": "weights", **ALL}
    once = osscar.prune(model, tokens(), experts=3, neurons=0.5, heads=0.5, **asked)
    first = osscar.prune(model, tokens(), experts=3, **asked)
    second = osscar.prune(first.model, tokens(), neurons=0.5, heads=0.5, **asked)
    apart = [*first.layers, *second.layers]
    assert [one.name for one in once.layers] == [one.name for one in apart]
    assert [one.support for one in once.layers] == [one.support for one in apart]
    assert [one.relative_loss for one in once.layers] == pytest.approx(
        [one.relative_loss for one in apart], rel=1e-3
    )
    torch.testing.assert_close(logits_of(once.model), logits_of(second.model))


def test_all_is_fitted_towards_the_dense_model(monkeypatch):
    """Its own experts and routes, also once the working copy has lost some."""
    seen = []

    def noted(dense, pruned, *streams):
        seen.append(dense.clone())
        return correction(dense, pruned, *streams)

    monkeypatch.setattr("osscar.walk.walk.correction", noted)
    monkeypatch.setattr("osscar.experts.walk.correction", noted)
    model, dense = mixture("mixtral"), []
    modules = [MIXTURE.format(layer) for layer in (0, 1)]
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda *call: dense.append(call[2]))
    logits_of(model)
    known = list(dense)
    for name in modules:
        model.get_submodule(name)._forward_hooks.clear()
    asked = {"batch_size": len(tokens()), **ALL}
    osscar.prune(model, tokens(), experts=2, neurons=0.5, **asked)
    assert len(seen) > 4
    for found in seen:
        assert min(float((found - y).abs().max()) for y in known) < 1e-6


@pytest.mark.parametrize(
    "budget",
    [{"params": 0.6}, pytest.param({"sparsity": 0.4}, marks=pytest.mark.slow), {"flops": 0.7}],
)
def test_what_a_budget_leaves_beside_a_share_of_experts_is_counted(budget):
    asked = {"allocation": "uniform", "damp": 0.3}
    result = osscar.prune(mixture("mixtral"), tokens(), experts=3, **budget, **asked)
    assert [layer.kept for layer in result.layers[:2]] == [3, 3]
    assert result.budget.tightest.reached <= result.budget.tightest.limit
    assert "experts" not in {width.kind for width in result.budget.widths.values()}
    if "flops" in budget:
        sample = {"input_ids": tokens()[:1]}
        assert count_flops(result.model, sample) == pytest.approx(result.budget.tightest.reached)
    else:
        assert result.parameters_after == result.budget.tightest.reached


@pytest.mark.parametrize("kind", [Cost.PARAMETERS, Cost.FLOPS])
def test_costs_of_experts_and_neurons_multiply(kind):
    model = mixture("mixtral")
    with prepare(model, tokens()) as prepared:
        cost = count(kind, prepared.model, prepared.every_group, prepared.sample)
        kept = {g.name: (3 if g.kind == "experts" else g.units // 2) for g in prepared.every_group}
        chosen = [g for g in prepared.every_group if g.kind in ("experts", "neurons")]
        plans = [GroupPlan.of(g, tuple(range(kept[g.name]))) for g in chosen]
        counted = cost.of({g.name: kept[g.name] for g in chosen})
        shrink(prepared.model, PruningPlan(tuple(plans)), [prepared.sample])
        apart = len(cost.classes(g.name for g in chosen)) == len(chosen)
        assert apart == (kind is Cost.FLOPS)
        if kind is Cost.FLOPS:
            found = count_flops(prepared.model, prepared.sample)
        else:
            found = sum(p.numel() for p in prepared.model.parameters())
    assert counted == pytest.approx(found)


def test_a_run_that_was_killed_goes_on_to_the_same_model(tmp_path):
    model = mixture("mixtral")
    request = PruningRequest(experts=3, sparsity=0.4, device="cpu", **ALL)
    whole = prune_as_asked(model, tokens(), request, RunLog(tmp_path / "whole"))
    records = sorted((tmp_path / "whole").glob("0*.safetensors"))
    state = whole.model.state_dict()
    for done in (1, 3):  # of the experts, and of what comes after them
        shutil.copytree(tmp_path / "whole", tmp_path / "half")
        for record in records[done:]:
            (tmp_path / "half" / record.name).unlink()
        again = prune_as_asked(model, tokens(), request, RunLog(tmp_path / "half"))
        assert [one.support for one in again.layers] == [one.support for one in whole.layers]
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, state[name])
        shutil.copy(records[1], tmp_path / "half" / records[0].name)
        with pytest.raises(JournalError):
            prune_as_asked(model, tokens(), request, RunLog(tmp_path / "half"))
        shutil.rmtree(tmp_path / "half")


def some_budget(**asked):
    """Return a request whose budget takes experts, too."""
    return PruningRequest(experts="auto", device="cpu", **asked)


def test_a_curve_goes_through_what_predictions_diverge_by():
    """Without a refit: by hand, of the first mixture without each of its experts."""
    model = mixture("mixtral")
    with prepare(model, tokens()) as prepared:
        state = {name: value.clone() for name, value in prepared.model.state_dict().items()}
        groups = [one.group for one in prepared.routed]
        request = some_budget(params=0.7, damp=1e9)
        keep = {group.name: 3 for group in groups}
        curves, measure = measured_curves(prepared, request, groups, lambda curves: keep, {})
        curve = curves[groups[0].name]
        assert all(torch.equal(state[n], v) for n, v in prepared.model.state_dict().items())
        last = tokens()[-compared_samples(prepared) :]
    router = prepared.routed[0].router
    with torch.no_grad():
        dense = model(input_ids=last).logits.log_softmax(-1)
    by_hand = []
    for gone in range(4):
        kept = [expert for expert in range(4) if expert != gone]
        with routed_among(model, {router: (kept, 4)}), torch.no_grad():
            found = model(input_ids=last).logits.log_softmax(-1)
        by_hand.append(float((dense.exp() * (dense - found)).sum(-1).mean()))
    assert (list(curve.measured), measure) == ([3], "nats")
    assert min(abs(curve.measured[3] / nats - 1) for nats in by_hand) < 1e-3
    assert curve.losses[3] == pytest.approx(curve.measured[3])
    assert list(curve.losses) == sorted(curve.losses, reverse=True)


def test_one_search_finds_nearly_the_best_of_all_choices():
    """Costs multiply: by all choices of experts, neurons and heads."""
    model = mixture("mixtral")
    request = some_budget(params=0.5)
    with prepare(model, tokens()) as prepared:
        random = np.random.default_rng(0)
        curves = {}
        for group in asked_groups(prepared, request)[2]:
            losses = np.sort(random.exponential(size=group.units))[::-1]
            curves[group.name] = Curve(group.name, np.append(losses, 0.0))
        cost = count(Cost.PARAMETERS, prepared.model, prepared.every_group, prepared.sample)
        found = best_at_each_cost(cost, curves, every_choice(prepared, request))
        for params in (0.3, 0.45, 0.6, 0.75, 0.9):
            asked = some_budget(params=params)
            budget = allocate(prepared, asked, curves=curves).budget
            check_bound(budget, found, params * cost.dense)
            assert budget.gap <= 1e-3
    assert min(cost.of(kept) for kept in every_choice(prepared, request)) == min(found)


def test_a_budget_takes_experts_and_a_run_goes_on(tmp_path):
    model, request = mixture("mixtral"), some_budget(params=0.7, heads=1.0, neurons=36)
    result = prune_as_asked(model, tokens(24), request, RunLog(tmp_path / "log"))
    assert result.parameters_after == result.budget.tightest.reached <= result.budget.tightest.limit
    assert result.certificate.error < 1e-5
    assert {width.kind for width in result.budget.widths.values()} == {"experts"}
    assert all(result.budget.measured.values())
    assert 0.2 < result.budget.predicted / result.divergence < 5
    again = prune_as_asked(model, tokens(24), request, RunLog(tmp_path / "log"))
    assert [one.support for one in again.layers] == [one.support for one in result.layers]
    assert again.budget == result.budget
    page = prune_page(result.document(model, tokens(24)))
    assert all(f">{kind}</td>" in page for kind in ("experts", "heads", "neurons"))


@pytest.mark.parametrize("experts", ["auto", pytest.param(0.75, marks=pytest.mark.slow)])
def test_sweeps_take_experts(experts):
    base = PruningRequest(experts=experts, params=0.8, damp=0.3)
    points = list(
        prune_points(mixture("mixtral"), tokens(), base, jobs(BudgetKind.PARAMS, [0.8, 0.6]))
    )
    assert [result.parameters_after <= job.value * 43_488 for job, result in points] == [True] * 2
    assert points[1][1].parameters_after < points[0][1].parameters_after
    baseline = jobs(BudgetKind.PARAMS, [0.8], baselines=True)
    with pytest.raises(RequestError, match="omit baselines="):
        list(prune_points(mixture("mixtral"), tokens(), base, baseline))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "needs a budget; give one, such as params="),
        ({"heads": 0.5}, "needs a budget; give one, such as params="),
        ({"flops": 0.7}, "experts save no flops"),
        ({"max_divergence": 0.1, "smallest": "flops"}, "experts save no flops"),
        ({"speedup": 2.0}, "give params or size"),
        ({"params": 0.5, "form": "exported"}, "removed from modules only"),
    ],
)
def test_budgets_that_cannot_take_experts_are_refused(asked, message):
    with pytest.raises(RequestError, match=message):
        some_budget(**asked)


def test_a_budget_out_of_reach_names_experts_that_it_leaves_alone():
    with pytest.raises(RequestError, match=r"or let experts leave, too \(experts=auto\)"):
        osscar.prune(mixture("mixtral"), tokens(), params=0.2, allocation="uniform")


def test_what_experts_are_worth_needs_samples_to_compare():
    with pytest.raises(RequestError, match="there are 3 in all; give at least 4"):
        osscar.prune(mixture("mixtral"), tokens(3), experts="auto", params=0.8)


def test_patterns_leave_out_mixtures_and_layers():
    result = osscar.prune(
        mixture("mixtral"), tokens(), experts=3, neurons=0.5, skip=["*.0.*experts", "*.1.*neurons"]
    )
    assert [layer.name for layer in result.layers] == [
        MIXTURE.format(1),
        f"{MIXTURE.format(0)}.neurons",
    ]


def test_backends_choose_both():
    with pytest.raises(BackendError, match="reap"):
        PruningRequest(experts=2, neurons=0.5, backend="reap")
    with pytest.raises(BackendError, match="wanda"):
        PruningRequest(experts=2, neurons=0.5, backend="wanda")
    with pytest.raises(RequestError, match="give a name that stands for a backend of each"):
        PruningRequest(experts=2, neurons=0.5, backend=Greedy())
    assert PruningRequest(experts=2, neurons=0.5, backend="greedy").chosen_backend()


# ---- experts that are a list of modules ---------------------------------------------------


class Scorer(nn.Module):
    """A mixture of one's own between neurons, whose outputs are scores of classes."""

    def __init__(self, mixture):
        super().__init__()
        self.up, self.down, self.mixture = nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH), mixture
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return SequenceClassifierOutput(logits=self.head(self.mixture(x)).mean(1))


@pytest.mark.parametrize(
    "kind", [SoftmaxThenTopK, Masked, pytest.param(Called, marks=pytest.mark.slow)]
)
def test_lists_of_experts_share_a_budget_that_counts_them(kind):
    """Also where neurons of experts could leave: of those that go it is not known before."""
    torch.manual_seed(0)
    model, x = Scorer(kind()).eval(), torch.randn(60, 2, WIDTH)
    result = osscar.prune(model, x, experts="auto", params=0.6, device="cpu")
    kept = {layer.name: layer.kept for layer in result.layers}
    (experts,) = (name for name in kept if name.endswith("experts"))
    assert set(kept) == {experts, "neurons"}
    assert (
        result.parameters_after == result.budget.tightest.reached <= 0.6 * result.parameters_before
    )
    assert result.budget.gap < 2e-5  # the tolerance of the integer program
    assert result.certificate.error < 1e-10
    inner = [group for group in result.skipped if "experts." in group.name]
    assert len(inner) == (COUNT if kind is Masked else 0)  # the others cannot be traced


def test_a_budget_counts_each_expert_of_a_list_that_is_left_out():
    """Neurons of its experts leave, of each as many as it can spare."""
    model, x = net(Masked, Masked), torch.randn(60, 3, WIDTH)
    asked = {"experts": 4, "params": 0.6, "skip": ["blocks.0.experts"], "device": "cpu"}
    result = osscar.prune(model, x, **asked)
    inner = {layer.kept for layer in result.layers if layer.name.startswith("blocks.0.experts.")}
    assert len(inner) > 1
    assert (
        result.parameters_after == result.budget.tightest.reached <= 0.6 * result.parameters_before
    )


class Scaled(Expert):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))


def test_bytes_of_experts_have_their_buffers():
    torch.manual_seed(0)
    block = SoftmaxThenTopK()
    block.experts = nn.ModuleList(Scaled() for _ in range(COUNT))
    with prepare(Scorer(block).eval(), torch.randn(4, 2, WIDTH)) as prepared:
        (group,) = (one.group for one in prepared.routed)
        cost = count(Cost.BYTES, prepared.model, prepared.every_group, prepared.sample)
    own = sum(tensor.numel() for tensor in Scaled().state_dict().values()) + WIDTH  # of the router
    assert cost.of({}) - cost.of({group.name: COUNT - 1}) == 4 * own
