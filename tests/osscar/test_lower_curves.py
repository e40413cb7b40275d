"""What no widths and no units within a budget are predicted to be below."""

import dataclasses
import itertools
import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from osscar.allocation import lower_curves, rules
from osscar.allocation.allocate import allocate
from osscar.allocation.costs import Cost, count
from osscar.allocation.curves import Curve, Prediction, measure_curvatures
from osscar.base.errors import JournalError
from osscar.base.files import digest
from osscar.base.timing import Stage
from osscar.estimation.estimate import estimate_as_asked
from osscar.preparation.prepare import prepare
from osscar.pruning.prune import prune_as_asked
from osscar.pruning.run_log import RunLog
from osscar.report.prune_page import prune_page, run_lines
from osscar.request import PruningRequest
from solvers import VerificationError
from solvers.certificates.certificate import EnumerationCertificate


class Blocks(nn.Module):
    """Two residual blocks, whose neurons cost each by itself, and a head."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(6, 11), nn.Linear(6, 12)])
        self.down = nn.ModuleList([nn.Linear(11, 6), nn.Linear(12, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return SequenceClassifierOutput(logits=self.head(x))


class Chain(nn.Module):
    """Layers whose weights shrink along both dimensions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.head(self.net(x)))


ASKED = PruningRequest(sparsity=0.5, certify=True, bound_rounds=2, device="cpu")


@cache
def pruned(samples=40, build=Blocks):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(samples, 6)
    return model, x, prune_as_asked(model, x, ASKED)


def curves_of(model, x, measured):
    """Return each group's curve, what is truly least at every width, and what widths cost."""
    with prepare(model, x, heads=False) as prepared:
        groups = [group for group in prepared.groups if group.name in measured]
        found = list(measure_curvatures(prepared, groups, seed=0))
        cost = count(Cost.PARAMETERS, prepared.model, prepared.groups, prepared.sample)
        curves, least = {}, {}
        for one in found:
            name, prediction = one.group.name, Prediction.of(one, None)
            truth = prediction.factor * EnumerationCertificate().curve(prediction.problem).numpy()
            known = {point.kept: point.nats for point in measured[name]}
            curves[name] = Curve(name, prediction.losses, one.reached, known)
            least[name] = curves[name].corrected(truth)
        return curves, least, cost


@pytest.mark.parametrize(
    ("samples", "build"),
    [(40, Blocks), (80, Blocks), (40, Chain)],  # of 80, some are held out of the curves
)
def test_the_bound_is_below_every_choice_of_widths_and_units(samples, build):
    model, x, result = pruned(samples, build)
    budget = result.budget
    curves, least, cost = curves_of(model, x, budget.measured)
    names = [*curves]
    assert len(names) == 2
    for name in names:
        below = np.array(budget.bounded.curves[name])
        assert np.allclose(curves[name].losses, budget.curves[name], rtol=1e-9)
        assert (below <= least[name] * (1 + 1e-9)).all()
        assert (least[name] <= curves[name].losses * (1 + 1e-9)).all()
        kept = budget.widths[name].kept
        assert below[kept] > 0.8 * least[name][kept]
    best = min(
        sum(float(least[n][k]) for n, k in zip(names, kept, strict=True))
        for kept in itertools.product(*(range(1, len(least[n])) for n in names))
        if cost.of(dict(zip(names, kept, strict=True))) <= budget.limit
    )
    assert 0 < budget.bounded.nats <= best * (1 + 1e-9) <= budget.predicted * (1 + 2e-9)
    assert budget.bounded.nats > 0.8 * best
    assert budget.whole_gap == pytest.approx(1 - budget.bounded.nats / budget.predicted, abs=1e-9)


def test_a_bound_is_told_and_changes_nothing_else():
    model, x, result = pruned()
    plain = prune_as_asked(model, x, dataclasses.replace(ASKED, certify=False))
    assert plain.budget.bounded is None
    assert plain.budget.unbounded == ""
    assert plain.plan == result.plan
    assert dataclasses.replace(result.budget, bounded=None) == plain.budget
    told = result.budget.to_json()["bounded"]
    assert told["nats"] == result.budget.bounded.nats
    assert told["gap"] == result.budget.whole_gap
    assert set(told["curves"]) == set(result.budget.curves)
    document = result.document(model, x)
    lines = "\n".join(run_lines(json.loads(json.dumps(document))))
    assert f"is predicted below {told['nats']:.4g} nats" in lines
    assert "Bound of all models: within this budget" in prune_page(document)
    assert "bound of all models" not in "\n".join(run_lines(plain.document(model, x)))


def test_what_is_not_confirmed_is_not_claimed(monkeypatch):
    """A search that claims too much is found out by the check, before anything is told."""
    model, x, _ = pruned()
    found = lower_curves.lower_curve

    def boasting(*arguments, **options):
        curve = found(*arguments, **options)
        return dataclasses.replace(curve, bounds=curve.bounds * 1.01)

    monkeypatch.setattr(lower_curves, "lower_curve", boasting)
    with pytest.raises(VerificationError, match="is claimed, its certificates prove"):
        prune_as_asked(model, x, ASKED)


def test_an_estimate_tells_what_the_bound_takes():
    model, x, result = pruned(build=Chain)
    assert str(Stage.BOUND) in result.stages
    plain = dataclasses.replace(ASKED, certify=False)
    with_bound, without = (estimate_as_asked(model, x, one).stages for one in (ASKED, plain))
    assert set(with_bound) - set(without) == {Stage.BOUND}


@pytest.mark.parametrize(
    ("build", "asked", "why"),
    [
        (Blocks, {"allocation": "uniform"}, "uniform predicts no divergence"),
        (Blocks, {"allocation": "fluctuation"}, "fluctuation predicts no divergence"),
        (Blocks, {"allocation": "measured"}, "curves of measured height"),
        (Chain, {}, "parameters of some weights are products of the widths of too many groups"),
        (Chain, {"sparsity": None, "flops": 0.5}, "flops of some weights are products"),
    ],
)
def test_budgets_without_a_bound_say_why(build, asked, why, monkeypatch):
    monkeypatch.setattr(lower_curves, "lower_curve", None)  # nothing is searched for
    monkeypatch.setattr(rules, "_MOST_TOGETHER", 50)  # no two layers of Chain
    torch.manual_seed(0)
    request = dataclasses.replace(ASKED, **asked)
    with prepare(build().eval(), torch.randn(40, 6), heads=False) as prepared:
        budget = allocate(prepared, request).budget
    assert budget.bounded is None
    assert why in budget.unbounded
    assert budget.to_json()["bounded"] is None


class Cut(Blocks):
    """No gradient reaches the first block."""

    def forward(self, x):
        x = (x + self.down[0](torch.relu(self.up[0](x)))).detach()
        return SequenceClassifierOutput(
            logits=self.head(x + self.down[1](torch.relu(self.up[1](x))))
        )


def test_sums_of_what_does_not_compare_have_no_bound_in_nats():
    torch.manual_seed(0)
    with prepare(Cut().eval(), torch.randn(3, 6), heads=False) as prepared:
        budget = allocate(prepared, ASKED).budget
    assert not budget.comparable
    assert budget.bounded is None
    assert "what is predicted is no divergence" in budget.unbounded


def test_a_run_that_goes_on_tells_the_same_bound_and_believes_no_other(tmp_path):
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(40, 6)
    log = RunLog(tmp_path / "log")
    first = prune_as_asked(model, x, ASKED, log)
    file = log.directory / "allocation.json"
    content = json.loads(file.read_text())
    name = next(iter(first.budget.bounded.curves))
    forged = json.loads(file.read_text())
    forged["allocated"]["budget"]["bounded"]["nats"] *= 1.001
    for changed in (
        {"nats": 2 * first.budget.predicted},
        {"nats": 1.001 * first.budget.bounded.nats},
        {"nats": 0.999 * first.budget.bounded.nats},
        {"nats": float("nan")},
        {"curves": {name: [1.0]}},
        {"curves": {name: [9.0] * 12}},
        {"curves": {"nowhere": [0.0]}},
    ):
        bad = json.loads(json.dumps(content))
        bad["allocated"]["budget"]["bounded"] |= changed
        bad["digest"] = digest(json.dumps(bad["allocated"], sort_keys=True))
        file.write_text(json.dumps(bad))
        with pytest.raises(JournalError, match="--restart"):
            prune_as_asked(model, x, ASKED, log)
    file.write_text(json.dumps(forged))
    with pytest.raises(JournalError, match="was changed"):
        prune_as_asked(model, x, ASKED, log)
    file.write_text(json.dumps(content))
    assert prune_as_asked(model, x, ASKED, log).budget == first.budget
