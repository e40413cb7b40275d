"""Targets of the dense stream: the residual, what is held out, and biases that take up means."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.consumers.linear_maps import linear_maps
from osscar.consumers.observe import exact_output
from osscar.data.batches import ModelInputs
from osscar.preparation.prepare import prepare
from osscar.walk import regularization
from osscar.walk.gram import GramAccumulator, pose
from osscar.walk.regularization import DAMPS, DEFAULT_DAMP, best_regularization
from osscar.walk.targets import Keeper, Target, streams
from osscar.walk.walk import _parted, walk
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Concat

# ---- where the stream passes -------------------------------------------------------------


class Block(nn.Module):
    """A residual block; `form` says how it adds."""

    def __init__(self, form):
        super().__init__()
        self.form, self.norm = form, nn.LayerNorm(8)
        self.up, self.down, self.gate = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.drop(self.down(torch.relu(self.up(self.norm(x)))))
        match self.form:
            case "plain":
                return x + y
            case "in place":
                x += y
                return x
            case "parallel":
                return y + self.gate(self.norm(x)) + x
            case "scaled":
                return x + 0.5 * y
            case "post-norm":
                return self.norm(torch.add(y, x))
            case "none":
                return y


class Stack(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = x * 1.0
        for block in self.blocks:
            x = block(x)
        return self.head(x)


FORMS = {"plain": 1, "in place": 1, "parallel": 1, "post-norm": 1, "scaled": 0, "none": 0}


def test_what_is_added_to_a_consumer_is_found_in_the_models_own_code():
    torch.manual_seed(0)
    names = [f"blocks.{i}.down" for i in range(3)]
    for form, count in FORMS.items():
        model = Stack(form).eval()
        found = streams(model, {"x": torch.randn(4, 8)}, names)
        told = {name: len(places) for name, places in found.items()}
        assert told == (dict.fromkeys(names, count) if count else {})
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with prepare(tiny("llama-gqa"), tokens(4, 12)) as prepared:
        names = [
            c.name for g in prepared.groups if g.prunable for c in linear_maps(prepared.model, g)
        ]
        assert set(streams(prepared.model, prepared.example, names)) == set(names)


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "in place"])
def test_the_residual_target_is_what_the_dense_stream_holds_behind_the_block(form):
    torch.manual_seed(0)
    model, x = Stack(form).eval(), torch.randn(64, 8)
    with prepare(model, x, batch_size=16) as prepared:
        dense = copy.deepcopy(prepared.model)
        groups = [g for g in prepared.groups if g.prunable and "up" in g.slots[0].module]
        assert len(groups) == 3
        for index, step in enumerate(walk(prepared, groups, target=Target.RESIDUAL)):
            (gram,), W0 = step.grams, step.consumers[0].read_weight()
            sums, X = [], torch.empty(0)
            for network in (prepared.model, dense):
                seen = {}
                hooks = [
                    network.blocks[index].norm.register_forward_pre_hook(
                        lambda _, args, seen=seen: seen.setdefault("stream", args[0].clone())
                    ),
                    network.blocks[index].down.register_forward_hook(
                        lambda _, args, y, seen=seen: seen.update(x=args[0], y=y)
                    ),
                ]
                network(x)
                sums.append(seen["stream"] + seen["y"])
                X = seen["x"] if network is prepared.model else X
                for hook in hooks:
                    hook.remove()
            D, X = (sums[1] - sums[0]).double(), X.double()
            _, (G, e), _ = copy.deepcopy(gram.fitted).given_up(W0, 0.7)
            X, Y = X - X.mean(0), X @ W0 + 0.7 * D
            Y = Y - Y.mean(0)
            torch.testing.assert_close(G, X.T @ Y / 64, atol=1e-5, rtol=1e-4)
            assert e == pytest.approx(float(Y.square().sum()) / 64, rel=1e-3)
            W = W0.clone()
            W[::2] = 0
            step.commit([W])


# ---- what is held out --------------------------------------------------------------------


def test_the_last_samples_are_held_out():
    for sizes, held, parts, fitted in (
        ([8, 8], 0, [8, 8], 2),
        ([8, 8], 2, [8, 6, 2], 2),
        ([8, 8], 8, [8, 8], 1),
        ([8, 5], 9, [4, 4, 5], 1),
    ):
        whole = torch.arange(sum(sizes))
        batches = [{"x": part} for part in torch.split(whole, sizes)]
        found, first = _parted(ModelInputs(batches[0]), batches, held)
        assert [len(batch["x"]) for batch in found] == parts
        assert first == fitted
        assert torch.equal(torch.cat([batch["x"] for batch in found]), whole)


def accumulated(positions, noise, *, outputs=4, seed=0):
    """Sums of one layer whose corrections are explained in part by its inputs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, outputs))
    with prepare(model, torch.randn(8, 5)) as prepared:
        (group,) = [g for g in prepared.groups if g.prunable and g.units == 12]
        (consumer,) = linear_maps(prepared.model, group)
    gram = GramAccumulator(consumer, held=True, corrections=True)
    M, mixed = torch.randn(12, outputs), torch.randn(12, 12)
    for held, count in ((False, positions), (True, 4000)):
        X = torch.randn(count, 12) @ mixed
        gram.add(X, X @ M + noise * torch.randn(count, outputs), held=held)
    return gram


def held_out_error(gram, damp, share):
    """The error on held-out samples of the exact refit, from its problem."""
    plain, corrected = (pose([copy.deepcopy(gram)], 8, "one", damp, part) for part in (0, share))
    support = solvers.make_backend("wanda").select(plain).support
    W = solvers.refit(corrected, support)[0][0]
    W0 = gram.linear_map.read_weight()
    return gram.held_rise(W0, W0, W)  # above that of the dense weights


def test_the_share_is_the_one_that_a_search_over_shares_finds():
    gram = accumulated(40, 20.0)
    _, chosen = best_regularization([gram], 8, (0.01,))
    assert 0 < chosen < 1
    grid = np.linspace(0, 1, 101)
    errors = [held_out_error(gram, 0.01, share) for share in grid]
    assert chosen == pytest.approx(grid[np.argmin(errors)], abs=0.011)


@pytest.mark.parametrize(("positions", "noise", "share"), [(16, 3.0, 0.7), (40, 1.0, None)])
def test_damping_is_what_exact_refits_find_on_held_out_samples(positions, noise, share):
    gram = accumulated(positions, noise)
    damp, chosen = best_regularization([gram], 8, correction_weight=share)
    shares = np.linspace(0, 1, 21) if share is None else [share]
    errors = {damp: min(held_out_error(gram, damp, share) for share in shares) for damp in DAMPS}
    assert damp == min(errors, key=errors.get)
    assert share in (None, chosen)
    # What is compared are these errors, but for one constant.
    fitted = gram.fitted.centred()
    (rows,) = regularization._kept_rows([(gram, fitted)], {"2": 1.0}, 8)
    part = regularization._Part.of(gram, fitted, rows, 1.0)
    off = set()
    for each in DAMPS:
        a, b, c = part.errors(each)
        off.add(a - 2 * 0.7 * b + 0.7**2 * c - held_out_error(gram, each, 0.7))
    assert max(off) - min(off) < 1e-6 * max(map(abs, off))


def test_random_directions_choose_nearly_as_all_outputs_do(monkeypatch):
    gram = accumulated(30, 2.0, outputs=300)
    damp, share = best_regularization([gram], 8)
    monkeypatch.setattr(regularization, "_DIRECTIONS", 300)
    all_damp, all_share = best_regularization([gram], 8)
    assert share == pytest.approx(all_share, abs=0.1)
    best = held_out_error(gram, all_damp, all_share)
    assert held_out_error(gram, damp, all_share) <= best + 0.02 * abs(best)


def test_more_data_and_less_noise_hold_a_refit_back_less():
    chosen = [
        best_regularization([accumulated(n, noise)], 8)
        for n, noise in ((14, 30.0), (60, 10.0), (4000, 0.1))
    ]
    damps, shares = map(list, zip(*chosen, strict=True))
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < 0.95 < shares[-1]
    assert damps == sorted(damps, reverse=True)
    assert damps[-1] == DAMPS[0]


def test_the_report_says_how_refits_were_held_back():
    result = osscar.prune(tiny("opt"), tokens(16, 24), neurons=0.5, backend="wanda")
    assert result.held_out == 2
    assert all(0 <= layer.correction_weight <= 1 and layer.damp in DAMPS for layer in result.layers)
    assert len({layer.correction_weight for layer in result.layers}) > 1
    plain = osscar.prune(tiny("opt"), tokens(16, 24), neurons=0.5, target="weights")
    assert plain.held_out == 2
    assert {layer.correction_weight for layer in plain.layers} == {0.0}
    single = osscar.prune(tiny("opt"), tokens(1, 24), neurons=0.5)
    assert {(layer.damp, layer.correction_weight) for layer in single.layers} == {
        (DEFAULT_DAMP, 0.0)
    }


# ---- biases ------------------------------------------------------------------------------


def half_of_ten(model, x):
    """Ask for five units of the group that has ten."""
    with prepare(model, x) as prepared:
        return {group.name: 5 for group in prepared.groups if group.units == 10}


@torch.no_grad()
def test_a_bias_takes_up_what_changes_in_the_means():
    """The refit with its bias is the least-squares fit with a column of ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 4)).double().eval()
    x = torch.randn(300, 6, dtype=torch.float64)
    asked = {"damp": 0.0, "target": "weights", "batch_size": 300}
    result = osscar.prune(model, x, groups=half_of_ten(model, x), **asked)
    kept = torch.tensor(result.plan.groups[0].kept)
    ones = torch.ones(300, 1, dtype=torch.float64)
    X = torch.cat([torch.sigmoid(model[0](x))[:, kept], ones], 1)
    expected = torch.linalg.lstsq(X, model(x)).solution
    torch.testing.assert_close(result.model[2].weight, expected[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.model[2].bias, expected[-1], rtol=1e-6, atol=1e-8)
    (layer,) = result.layers
    residual = (X @ expected - model(x)).square().sum() / 300
    assert layer.loss == pytest.approx(float(residual), rel=1e-6)


class SharedBias(nn.Module):
    """Two layers add one and the same bias."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 6)
        self.head.bias = self.down.bias

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.relu(self.up(x)))))


def test_a_bias_that_others_share_is_left_alone():
    torch.manual_seed(0)
    model = SharedBias()
    x = torch.randn(64, 6)
    result = osscar.prune(model, x, groups=half_of_ten(model, x), target="weights")
    assert torch.equal(result.model.down.bias, model.down.bias)
    assert result.model.head.bias is result.model.down.bias


@torch.no_grad()
def test_an_input_that_never_changes_is_dead_to_a_layer_with_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 4)).eval()
    model[0].weight[:2] = 0
    model[0].bias[:2] = torch.tensor([0.3, -2.0])
    x = torch.randn(300, 6)
    result = osscar.prune(model, x, neurons=8, damp=0.0, target="weights")
    assert result.layers[0].dead == 2
    assert set(result.plan.groups[0].kept) == set(range(2, 10))
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_groups_of_one_consumer_correct_what_is_left_of_its_error():
    torch.manual_seed(0)
    model, x = Concat().eval(), torch.randn(256, 6)
    with prepare(model, x, batch_size=64) as prepared:
        dense = copy.deepcopy(prepared.model)
        groups = [g for g in prepared.groups if g.prunable and g.consumers[0].module == "join"]
        assert len(groups) == 4
        for step in walk(prepared, groups, target=Target.RESIDUAL):
            (gram,) = step.grams
            outputs = []
            for network in (dense, prepared.model):
                hook = network.join.register_forward_hook(
                    lambda _, args, y, outputs=outputs: outputs.append(y)
                )
                network(x)
                hook.remove()
            D = (outputs[0] - outputs[1]).double()
            expected = float((D - D.mean(0)).square().sum()) / len(x)
            W = step.consumers[0].read_weight()
            _, (_, energy), _ = copy.deepcopy(gram.fitted).given_up(torch.zeros_like(W), 1.0)
            assert energy == pytest.approx(expected, rel=1e-3, abs=1e-9)
            W[::2] = 0
            step.commit([W])


# ---- half precision ----------------------------------------------------------------------


def test_outputs_that_are_compared_are_not_rounded_to_half_precision():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).bfloat16(), torch.randn(10, 64).bfloat16()
    before = [parameter.clone() for parameter in layer.parameters()]
    with torch.no_grad():
        found = exact_output(layer, x, layer(x))
        assert torch.equal(found, copy.deepcopy(layer).float()(x.float()))
        whole = layer.double()
        assert torch.equal(exact_output(whole, x.double()), whole(x.double()))
    assert found.dtype == torch.float32
    layer.bfloat16()
    assert all(map(torch.equal, before, layer.parameters()))


class OwnForward(nn.Linear):
    """A layer whose code multiplies by the weight itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [nn.Linear, OwnForward])
@torch.no_grad()
def test_both_streams_put_out_float32_where_a_model_runs_in_half_precision(kind):
    torch.manual_seed(0)
    model, x = Stack("none"), torch.randn(64, 8).bfloat16()
    for block in model.blocks:
        block.down = kind(block.down.in_features, block.down.out_features)
    model = model.bfloat16().eval()
    with prepare(model, x, batch_size=16) as prepared:
        dense = copy.deepcopy(prepared.model)
        groups = [g for g in prepared.groups if g.prunable and "up" in g.slots[0].module]
        energies = []
        for index, step in enumerate(walk(prepared, groups, target=Target.RESIDUAL)):
            read = []
            for network in (prepared.model, dense):
                hook = network.blocks[index].down.register_forward_pre_hook(
                    lambda _, args, read=read: read.append(args[0].float())
                )
                network(x)
                hook.remove()
            layer = copy.deepcopy(dense.blocks[index].down).float()
            expected = (layer(read[1]) - layer(read[0])).square().sum()
            energies.append(step.grams[0].fitted.energy)
            assert energies[-1] == pytest.approx(float(expected), rel=1e-3)
            W = step.consumers[0].read_weight()
            W[::2] *= 0.98
            step.commit([W])
    assert 0 == energies[0] < energies[1]


def test_a_stream_that_is_added_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x):
            x = self.first(x).tanh()
            return x + self.down(self.up(x).relu()) + x

    torch.manual_seed(0)
    model = Twice().eval()
    result = osscar.prune(model, torch.randn(96, 6), neurons=0.5)
    assert result.model.down.in_features == 8
    keeper, stream = Keeper({"down": (("x", 0, "in", 0), ("x", 0, "in", 0))}), torch.ones(2, 3)
    keeper.see(("x", 0, "in", 0), stream)
    assert torch.equal(keeper.take("down"), 2 * stream)
    assert keeper.take("down") is None
