"""Whole experts leave, alone or beside heads and neurons: one run, one budget, one proof."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_outputs import SequenceClassifierOutput

import graph
import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count, weights
from osscar.allocation.measured import compared_samples, measured_curves
from osscar.allocation.task import PruningTask
from osscar.network.modules import count_parameters
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.request import PruningRequest
from osscar.routing.find import mixtures_in
from osscar.routing.routers import without_experts
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog
from osscar.shrinking.shrink import shrink
from osscar.walk import expert_walk
from osscar.walk.expert_walk import ExpertStep
from osscar.walk.layer_step import LayerStep
from osscar.walk.targets import correction
from tests.osscar.expert_lists import COUNT, WIDTH, Expert, Masked, SoftmaxThenTopK
from tests.osscar.families import tokens
from tests.osscar.mixtures import mixture

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*since a refit is worse on held-out samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the Gram matrix is rank-deficient:UserWarning"),
    pytest.mark.filterwarnings("ignore:the proof holds for:UserWarning"),
]
"""Tiny models have few samples, and are told so."""

ALL = {"damp": 0.3, "correction_weight": 1.0, "device": "cpu"}
"""With these, no sample is held out, and every weight is fitted to all of them."""

NAME = "model.layers.0.mlp.experts"
AUTO = {"experts": "auto"}


def small(family="mixtral"):
    """Return a mixture of one layer."""
    return mixture(family, num_hidden_layers=1)


def output_of(model, name=NAME):
    """Return what a module returns on the calibration data."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, x, y: seen.append(y))
    with hook, torch.no_grad():
        model(input_ids=tokens())
    return seen[0].double()


def output_among(model, kept):
    (one,) = mixtures_in(model, {"input_ids": tokens()[:1]})
    with without_experts(model, [(one.group.slots, kept)]):
        return output_of(model)


def relative(found, y):
    return float((found - y).square().sum() / y.square().sum())


@pytest.fixture(scope="module")
def prepared():
    with prepare(small(), tokens()) as prepared:
        yield prepared


# ---- experts alone -----------------------------------------------------------------------


def test_losses_are_those_of_the_model_itself():
    model, y = small(), output_of(small())
    result = osscar.prune(model, tokens(), experts=2, target="weights", backend="enumerate", **ALL)
    (report,) = result.layers
    sets = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    losses = {kept: relative(output_among(model, kept), y) for kept in sets}
    assert report.status == "OPTIMAL"
    assert report.relative_loss == pytest.approx(losses[report.support], rel=1e-4)
    assert report.relative_loss == pytest.approx(min(losses.values()), rel=1e-4)
    lost = relative(output_of(result.model), y)
    assert report.refitted_loss == pytest.approx(lost, rel=1e-4)
    assert lost < 0.95 * report.relative_loss


def test_few_tokens_choose_and_all_of_them_tell_what_is_lost(monkeypatch):
    """Tokens are drawn, at any position, and losses before and after are of the same ones."""
    monkeypatch.setattr(expert_walk, "MOST_TOKENS", 40)
    drawn, draw = [], ExpertStep._drawn
    monkeypatch.setattr(ExpertStep, "_drawn", lambda step: drawn.append(draw(step)) or drawn[-1])
    model = small()
    result = osscar.prune(model, tokens(), experts=2, target="weights", batch_size=2, **ALL)
    (report,), rows = result.layers, torch.cat([*drawn[0].values()]).tolist()
    assert report.choosing == len(rows) == 40
    assert len({row % tokens().shape[1] for row in rows}) > 15
    lost = relative(output_among(model, report.support), output_of(model))
    assert report.relative_loss == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("samples", [3, 16])
def test_refits_that_are_worse_together_are_left_away(samples, monkeypatch):
    """With and without samples held out; each expert alone has passed its own check."""
    refits = LayerStep.refits

    def overshooting(step, *given):
        found = refits(step, *given)
        return dataclasses.replace(found, weights=tuple(3 * W for W in found.weights))

    monkeypatch.setattr(LayerStep, "refits", overshooting)
    model = small()
    with pytest.warns(UserWarning, match="keep their dense weights"):
        result = osscar.prune(model, tokens(samples), experts=3)
    (one,) = result.layers
    assert one.refitted_loss == one.relative_loss
    assert len(one.unrefitted) == 3
    kept = model.get_submodule(NAME).down_proj[list(one.support)]
    assert torch.equal(result.model.get_submodule(NAME).down_proj, kept)


def test_later_mixtures_see_what_earlier_ones_have_left():
    """The second is to return what the stream behind it lacks, as the first has shaped it."""
    model = mixture("mixtral")
    result = osscar.prune(model, tokens(), experts=3, target="residual", **ALL)
    dense, behind = (output_of(one, "model.layers.1") for one in (model, result.model))
    found = output_of(result.model, "model.layers.1.mlp.experts")
    error = relative(found, found + (dense - behind).flatten(0, 1))
    assert result.layers[1].refitted_loss == pytest.approx(error, rel=1e-3)


def test_experts_that_no_token_reaches_are_named_and_leave():
    model = small("gpt-oss")
    model.model.layers[0].mlp.router.bias.data[1] = -125.0
    with pytest.warns(UserWarning, match="no calibration token is sent to 1 expert of"):
        (layer,) = osscar.prune(model, tokens(), experts=3).layers
    assert (layer.support, layer.dead) == ((0, 2, 3), 1)
    assert layer.relative_loss < 1e-9


# ---- beside heads and neurons ------------------------------------------------------------


@pytest.mark.slow
def test_one_run_comes_to_what_two_come_to():
    """Towards what weights make of their inputs, nothing tells one run from the other."""
    model, asked = small(), {"target": "weights", **ALL}
    once = osscar.prune(model, tokens(), experts=3, neurons=0.5, heads=0.5, **asked)
    first = osscar.prune(model, tokens(), experts=3, **asked)
    second = osscar.prune(first.model, tokens(), neurons=0.5, heads=0.5, **asked)
    assert once.certificate.error < 1e-5
    for one, apart in zip(once.layers, [*first.layers, *second.layers], strict=True):
        assert (one.name, one.support) == (apart.name, apart.support)
        assert one.relative_loss == pytest.approx(apart.relative_loss, rel=1e-3)
    found, expected = (run.model(input_ids=tokens()).logits for run in (once, second))
    assert_close(found, expected)


def test_all_is_fitted_towards_the_dense_model(monkeypatch):
    """Its own experts and routes, also once the working copy has lost some."""
    seen = []

    def noted(dense, pruned, *streams):
        seen.append(dense.clone().double())
        return correction(dense, pruned, *streams)

    monkeypatch.setattr("osscar.walk.walk.correction", noted)
    model = mixture("mixtral")
    known = [output_of(model, f"model.layers.{layer}.mlp.experts") for layer in (0, 1)]
    osscar.prune(model, tokens(), experts=2, neurons=0.5, batch_size=len(tokens()), **ALL)
    assert len(seen) > 4
    for found in seen:
        rows = found[found[:, 0].argsort()]  # samples are shuffled
        assert min(float((rows - y[y[:, 0].argsort()]).abs().max()) for y in known) < 1e-6


# ---- budgets -----------------------------------------------------------------------------


def test_costs_of_experts_and_neurons_multiply():
    with prepare(small(), tokens()) as prepared:
        chosen = [g for g in prepared.every_group if g.kind in ("experts", "neurons")]
        kept = {g.name: 3 if g.kind == "experts" else g.units // 2 for g in chosen}
        parameters, flops = (
            count(kind, prepared, prepared.every_group) for kind in (Cost.PARAMETERS, Cost.FLOPS)
        )
        assert parameters.coupled
        assert not flops.coupled
        plans = [GroupPlan.of(g, tuple(range(kept[g.name]))) for g in chosen]
        shrink(prepared.model, PruningPlan(tuple(plans)), [prepared.sample])
        assert flops.of(kept) == pytest.approx(count_flops(prepared.model, prepared.sample))
        assert parameters.of(kept) == pytest.approx(count_parameters(prepared.model))


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_a_budget_counts_experts_that_leave_by_a_share(budget, prepared):
    request = PruningRequest(experts=3, allocation="uniform", **{budget: 0.7})
    found = allocate(PruningTask(prepared, request))
    assert found.keep[NAME] == 3
    assert NAME not in found.budget.widths
    (limit,) = found.budget.limits
    cost = count(limit.cost, prepared, prepared.every_group)
    assert limit.reached == pytest.approx(cost.of(found.keep))
    assert limit.reached <= limit.limit


def test_a_curve_goes_through_what_predictions_diverge_by(prepared):
    """Without a refit: by hand, of the mixture without each of its experts."""
    state = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    (one,) = prepared.experts
    request = PruningRequest(params=0.7, damp=1e9, skip=["*.neurons", "*.heads"], **AUTO)
    task = PruningTask(prepared, request)
    curves = measured_curves(task, lambda _: {NAME: 3})
    assert all(torch.equal(state[n], v) for n, v in prepared.model.state_dict().items())
    model, curve = small(), curves[NAME]
    last, by_hand = tokens()[-compared_samples(prepared) :], []
    with torch.no_grad():
        dense = model(input_ids=last).logits.log_softmax(-1)
        for gone in range(4):
            kept = tuple(expert for expert in range(4) if expert != gone)
            with without_experts(model, [(one.group.slots, kept)]):
                found = model(input_ids=last).logits.log_softmax(-1)
            nats = (dense.exp() * (dense - found)).sum(-1)
            by_hand.append(float(nats[:, 3::4].mean()))  # one prediction in four
    assert list(curve.measured) == [3]
    assert min(abs(curve.measured[3] / nats - 1) for nats in by_hand) < 1e-3
    assert curve.losses[3] == pytest.approx(curve.measured[3])
    assert list(curve.losses) == sorted(curve.losses, reverse=True)


@pytest.mark.slow
def test_a_budget_takes_experts_and_a_run_that_was_killed_goes_on_to_the_same_model(tmp_path):
    model, log = mixture("mixtral"), tmp_path
    request = PruningRequest(params=0.7, heads="all", neurons=36, **AUTO, **ALL)
    whole = prune_as_asked(model, tokens(24), request, RunLog(log))
    budget = whole.budget
    assert whole.certificate.error < 1e-5
    assert whole.parameters_after == budget.limits[0].reached <= budget.limits[0].limit
    assert {width.kind for width in budget.widths.values()} == {"experts"}
    assert all(budget.measured.values())
    assert 0.2 < budget.predicted / whole.divergence < 5
    records, state = sorted(log.glob("0*.safetensors")), whole.model.state_dict()
    for record in records[1:]:  # all but that of the first experts
        record.unlink()
    again = prune_as_asked(model, tokens(24), request, RunLog(log))
    assert again.budget == budget
    assert all(torch.equal(value, state[n]) for n, value in again.model.state_dict().items())


class Scorer(nn.Module):
    """A mixture of one's own between neurons, whose outputs are scores of classes."""

    def __init__(self, mixture):
        super().__init__()
        self.up, self.down, self.mixture = nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH), mixture
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return SequenceClassifierOutput(logits=self.head(self.mixture(x)).mean(1))


def test_lists_of_experts_share_a_budget_that_counts_them():
    """Also where neurons of experts could leave: of those that go it is not known before."""
    torch.manual_seed(0)
    model, x = Scorer(Masked()).eval(), torch.randn(60, 2, WIDTH)
    result = osscar.prune(model, x, params=0.6, device="cpu", **AUTO)
    assert {layer.name for layer in result.layers} == {"mixture.experts", "neurons"}
    limit = result.budget.limits[0]
    assert result.parameters_after == limit.reached <= 0.6 * result.parameters_before
    assert result.budget.gap < 2e-5  # the tolerance of the integer program
    assert result.certificate.error < 1e-10
    assert len([group for group in result.skipped if "experts." in group.name]) == COUNT


def test_bytes_of_experts_have_their_buffers():
    torch.manual_seed(0)
    block = SoftmaxThenTopK()
    for expert in block.experts:
        expert.register_buffer("scale", torch.ones(WIDTH))
    model, example = Scorer(block).eval(), {"x": torch.randn(4, 2, WIDTH)}
    (group,) = (one.group for one in mixtures_in(model, example))
    cost = weights(Cost.BYTES, model, graph.DependencyGraph((), ()), [group])
    own = count_parameters(Expert()) + WIDTH + WIDTH  # a buffer, and a row of the router
    assert cost.of({}) - cost.of({group.name: COUNT - 1}) == 4 * own
