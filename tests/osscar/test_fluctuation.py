"""FLAP: what inputs fluctuate, the threshold that all groups share, and nothing but biases."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.allocation import fluctuation
from osscar.allocation.allocate import allocate
from osscar.allocation.fluctuation import measure_fluctuations
from osscar.allocation.rules import Sharing
from osscar.base.errors import DataError, ModelError, NonFiniteError
from osscar.preparation.linear_maps import linear_maps
from osscar.preparation.prepare import Prepared, prepare
from osscar.request import PruningRequest as Asked
from osscar.request import Widths
from osscar.walk.gram import GramAccumulator, pose
from tests.osscar.families import tiny, tokens

# ---- scores ------------------------------------------------------------------------------


def read(model, names, batches):
    """Return all that modules read, (positions, features), by name."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].double().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def standardized(scores):
    return (scores - scores.mean()) / scores.std()


@pytest.mark.parametrize(("family", "size"), [("opt", 8), ("llama-gqa", 3)])
def test_scores_are_those_of_the_paper(family, size):
    with prepare(tiny(family), tokens(8, 24), batch_size=size) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        found = measure_fluctuations(prepared, groups)
        maps = {group.name: linear_maps(prepared.model, group) for group in groups}
        inputs = read(prepared.model, [m.name for [m] in maps.values()], prepared.batches())
        assert len(found) == 4
        for name, [consumer] in maps.items():
            W = consumer.module.weight.detach().double().numpy()
            rows = standardized(inputs[consumer.name].var(0) * np.square(W).sum(0))
            expected = [rows[own].mean() for own in consumer.unit_rows]
            np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9)


class Branches(nn.Module):
    """Two layers read the same units, one of them through a convolution's taps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.wide, self.point = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        return self.wide(x) + self.point(x)


@torch.no_grad()
def test_several_consumers_count_alike_and_all_taps_of_a_kernel():
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(6, 3, 9, 9)
    with prepare(model, (x,), batch_size=4) as prepared:
        groups = [group for group in prepared.groups if group.units == 8]
        (found,) = measure_fluctuations(prepared, groups).values()
    hidden = torch.sigmoid(model.first(x)).double()
    padded = nn.functional.unfold(hidden, 3, padding=1).movedim(1, 2).flatten(0, 1)
    wide = padded.var(0, correction=0) * model.wide.weight.double().square().sum(0).flatten()
    point = hidden.movedim(1, 3).flatten(0, 2).var(0, correction=0)
    point = point * model.point.weight.double().square().sum(0).flatten()
    wide, point = standardized(wide.numpy()), standardized(point.numpy())
    expected = (wide.reshape(8, 9).mean(1) + point) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_variances_survive_means_that_are_large():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Identity(), nn.Linear(10, 4)).double().eval()
    with torch.no_grad():
        model[0].bias += 1e8
    x = torch.randn(300, 6, dtype=torch.float64)
    with prepare(model, (x,), batch_size=64) as prepared:
        [group] = [group for group in prepared.groups if group.units == 10]
        found = measure_fluctuations(prepared, [group])[group.name]
    with torch.no_grad():
        hidden = (x @ model[0].weight.T).numpy()
        rows = hidden.var(0) * model[2].weight.square().sum(0).numpy()
    np.testing.assert_allclose(found, standardized(rows), atol=1e-5)


def test_inputs_that_say_nothing_are_refused(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 10), nn.Softplus(), nn.Linear(10, 4))
    with prepare(model, (torch.randn(20, 6),)) as prepared:
        groups = [group for group in prepared.groups if group.units == 10]
        batch = prepared.batches()[0]
        for batches, error, message in [
            ([], ModelError, "'2' was never called on the calibration data"),
            ([{k: x * torch.nan for k, x in batch.items()}], NonFiniteError, "inputs of '2' have"),
            ([batch, {k: x[:, :5] for k, x in batch.items()}], DataError, "batch 1 fails"),
        ]:
            monkeypatch.setattr(Prepared, "batches", lambda self, batches=batches: batches)
            with pytest.raises(error, match=message):
                measure_fluctuations(prepared, groups)
            assert not any(module._forward_pre_hooks for module in prepared.model.modules())


def test_equal_scores_say_nothing():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    with torch.no_grad():
        model[2].weight.zero_()
    with prepare(model, (torch.randn(20, 6),)) as prepared:
        groups = [group for group in prepared.groups if group.units == 10]
        assert not measure_fluctuations(prepared, groups)[groups[0].name].any()


# ---- one threshold -----------------------------------------------------------------------


@pytest.mark.parametrize("round_to", [1, 4])
def test_the_units_that_stay_are_the_highest_that_fit(round_to):
    model = tiny("opt")
    with torch.no_grad():  # few units of one layer stand out
        model.model.decoder.layers[0].fc2.weight[:, :6] *= 9
    with prepare(model, tokens(8, 24)) as prepared:
        groups = {group.name: group for group in prepared.groups if group.prunable}
        scores = measure_fluctuations(prepared, list(groups.values()))
        found = {
            sparsity: allocate(
                prepared, Asked(sparsity=sparsity, allocation="fluctuation", round_to=round_to)
            )
            for sparsity in (0.2, 0.5, 0.8)
        }
    cost = {n: 8 * (4 * 48 + 3) if g.kind == "heads" else 2 * 48 + 1 for n, g in groups.items()}
    steps = {n: 1 if g.kind == "heads" else round_to for n, g in groups.items()}
    every = sorted((float(s) for some in scores.values() for s in some), reverse=True)

    def at(threshold):
        counts = {
            n: int((some >= threshold).sum()) // steps[n] * steps[n] for n, some in scores.items()
        }
        return {n: max(c, steps[n]) for n, c in counts.items()}

    for sparsity, allocated in found.items():
        kept = {name: allocated.keep.get(name, group.units) for name, group in groups.items()}
        limit = (1 - sparsity) * sum(cost[name] * g.units for name, g in groups.items())
        fits = [at(t) for t in every if sum(cost[n] * c for n, c in at(t).items()) <= limit]
        assert kept == fits[-1]
        first, second = (kept[name] for name, group in groups.items() if group.kind == "neurons")
        assert first != second
        assert allocated.budget.predicted is None
        assert allocated.budget.reached <= allocated.budget.limit


def test_the_scale_of_a_layer_is_no_matter():
    model, found = tiny("opt"), []
    for scale in (1, 64):
        with torch.no_grad():
            layer = model.model.decoder.layers[0]
            layer.fc2.weight /= scale
            layer.fc1.weight *= scale
            layer.fc1.bias *= scale
            layer.self_attn.v_proj.weight /= scale
            layer.self_attn.v_proj.bias /= scale
            layer.self_attn.out_proj.weight *= scale
        with prepare(model, tokens(8, 24)) as prepared:
            groups = [group for group in prepared.groups if group.prunable]
            found.append(measure_fluctuations(prepared, groups))
    for name, scores in found[0].items():
        np.testing.assert_allclose(found[1][name], scores, rtol=1e-3, atol=1e-3)


def test_at_least_the_least_width_stays():
    with prepare(tiny("opt"), tokens(4, 12)) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        low = {g.name: np.full(g.units, -9.0) for g in groups}
        low[groups[0].name] = np.full(groups[0].units, 9.0)
        rule = Sharing(groups, Widths(), {}, scores=low)

        class One:
            def of(self, keep):
                return float(sum(keep.values()))

        found = rule.choose(One(), groups[0].units + len(groups) - 1)
    assert found == {g.name: g.units if g is groups[0] else 1 for g in groups}


# ---- what the walk measures --------------------------------------------------------------


def test_variances_follow_the_weight_of_each_layer():
    torch.manual_seed(0)
    with prepare(Branches().eval(), (torch.randn(6, 3, 9, 9),)) as prepared:
        [group] = [group for group in prepared.groups if group.units == 8]
        grams = [GramAccumulator(one) for one in linear_maps(prepared.model, group)]
        for gram in grams:
            gram.add(torch.rand(400, gram.linear_map.rows) + 3)
        alone = [copy.deepcopy(gram).consumer(0.1) for gram in grams]
        together = pose(grams, 4, "some", damp=0.1)
    for one, part in zip(alone, together.consumers, strict=True):
        torch.testing.assert_close(part.variance / part.H[0, 0], one.variance / one.H[0, 0])


# ---- the method as published -------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_refit_biases_alone_make_up_for_what_leaves(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 4, bias=bias)).eval()
    x = torch.randn(300, 6)
    asked = {"neurons": 6, "backend": "flap", "target": "weights", "damp": 1e9}
    result = osscar.prune(model, (x,), **asked)
    hidden = model[1](model[0](x)).double()
    scores = hidden.var(0) * model[2].weight.double().square().sum(0)
    kept = sorted(scores.topk(6).indices.tolist())
    assert list(result.plan.groups[0].kept) == kept
    removed = [unit for unit in range(10) if unit not in kept]
    torch.testing.assert_close(result.model[2].weight, model[2].weight[:, kept], rtol=1e-7, atol=0)
    if bias:
        made_up = model[2].weight[:, removed].double() @ hidden[:, removed].mean(0)
        expected = (model[2].bias.double() + made_up).float()
        torch.testing.assert_close(result.model[2].bias, expected, rtol=1e-5, atol=1e-6)


def test_equal_scores_are_all_at_the_mean():
    """Also where their mean is rounded, and differs from each of them."""
    for score in (0.0, 0.1, 7.3, 1e-300):
        for count in (1, 3, 7, 100):
            equal = torch.full((count,), score, dtype=torch.float64)
            assert not fluctuation.standardized(equal).any()
