"""Targets of the dense stream: the residual, what is held out, and biases that take up means."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.consumers.linear_maps import linear_maps
from osscar.preparation import prepare as prepare_module
from osscar.preparation.prepare import prepare
from osscar.walk import layer_step
from osscar.walk.gram import pose
from osscar.walk.layer_step import DAMPS, best_regularization
from osscar.walk.targets import Keeper, Target, streams
from osscar.walk.walk import Walk
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Concat
from tests.osscar.test_gram import accumulator

# ---- where the stream passes -------------------------------------------------------------


FORMS = {
    "plain": (lambda block, x, y: x + y, 1),
    "in place": (lambda block, x, y: x.add_(y), 1),
    "parallel": (lambda block, x, y: y + block.gate(block.norm(x)) + x, 1),
    "post-norm": (lambda block, x, y: block.norm(torch.add(y, x)), 1),
    "scaled": (lambda block, x, y: x + 0.5 * y, 0),
    "none": (lambda block, x, y: y, 0),
}
"""How a block adds what it makes to what it reads, and how many streams are found."""


class Block(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.norm, self.drop = form, nn.LayerNorm(8), nn.Dropout(0.1)
        self.up, self.down, self.gate = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.drop(self.down(torch.relu(self.up(self.norm(x)))))
        return FORMS[self.form][0](self, x, y)


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


def test_what_is_added_to_a_consumer_is_found_in_the_models_own_code():
    torch.manual_seed(0)
    names = [f"blocks.{i}.down" for i in range(3)]
    for form, (_, count) in FORMS.items():
        found = streams(Stack(form).eval(), {"x": torch.randn(4, 8)}, names)
        told = {name: len(places) for name, places in found.items()}
        assert told == (dict.fromkeys(names, count) if count else {})
    with prepare(tiny("llama-gqa", layers=1), tokens(4, 12)) as prepared:
        prunable = [group for group in prepared.groups if group.prunable]
        names = {one.name for group in prunable for one in linear_maps(prepared.model, group)}
        assert set(streams(prepared.model, prepared.example, [*names])) == names


def call(network, name, x):
    """Return what a module of a network reads, and what it returns."""
    seen = []
    hook = network.get_submodule(name).register_forward_hook(
        lambda _, args, y: seen.append((args[0].clone(), y.clone()))
    )
    with hook:
        network(x)
    return seen[0]


def producing(prepared, name):
    """Return the groups that modules of this name make."""
    return [g for g in prepared.groups if g.prunable and name in g.slots[0].module]


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "in place"])
@pytest.mark.parametrize("rough", [False, True])
def test_the_residual_target_is_what_the_dense_stream_holds_behind_the_block(
    rough, form, monkeypatch
):
    """In bfloat16 it is so up to its rounding; what weights are fitted to is float32 anyway."""
    monkeypatch.setattr(prepare_module, "multiplies_bfloat16", lambda device: rough)
    monkeypatch.setattr(prepare_module, "_LARGE_OUTPUT", 0)
    close = {"atol": 0.03, "rtol": 0.03} if rough else {"atol": 1e-5, "rtol": 1e-4}
    torch.manual_seed(0)
    model, x = Stack(form).eval(), torch.randn(64, 8)
    with prepare(model, x, batch_size=16) as prepared:
        networks = prepared.model, copy.deepcopy(prepared.model)
        groups = producing(prepared, "up")
        assert len(groups) == 3
        for index, step in enumerate(Walk(prepared, groups, target=Target.RESIDUAL)):
            (gram,), W0, block = step.grams, step.consumers[0].read_weight(), f"blocks.{index}"
            sums = [
                call(n, f"{block}.norm", x)[0] + call(n, f"{block}.down", x)[1] for n in networks
            ]
            X = call(prepared.model, f"{block}.down", x)[0].double()
            D = (sums[1] - sums[0]).double()
            H, (G, e) = copy.deepcopy(gram.fitted).given_up(W0, 0.7)
            X, Y = X - X.mean(0), X @ W0 + 0.7 * D
            Y = Y - Y.mean(0)
            torch.testing.assert_close(H.dense(), X.T @ X / 64, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(G, X.T @ Y / 64, **close)
            assert e == pytest.approx(float(Y.square().sum()) / 64, rel=1e-2 if rough else 1e-3)
            rounded = (G - X.T @ Y / 64).abs().max() > 1e-4
            assert bool(rounded) == rough
            W = W0.clone()
            W[::2] = 0
            step.commit([W])


def accumulated(positions, noise, outputs=4):
    """Sums of one layer whose corrections are explained in part by its inputs."""
    gram = accumulator(12, outputs, bias=True, held_out=True, corrections=True)
    M, mixed = torch.randn(12, outputs), torch.randn(12, 12)
    for held, count in ((False, positions), (True, 4000)):
        X = torch.randn(count, 12) @ mixed
        gram.add(X, X @ M + noise * torch.randn(count, outputs), held_out=held)
    return gram


def held_out_error(gram, damp, share):
    """The error on held-out samples of the exact refit, from its problem."""
    plain, corrected = (pose([copy.deepcopy(gram)], 8, "one", damp, part) for part in (0, share))
    support = solvers.make_backend("wanda").select(plain).support
    W = solvers.refit(corrected, support)[0][0]
    W0 = gram.linear_map.read_weight()
    return gram.held_out_rise(W0, W0, W)  # above that of the dense weights


def test_the_share_is_the_one_that_a_search_over_shares_finds():
    gram = accumulated(40, 20.0)
    _, chosen = best_regularization([gram], 8, (0.01,))
    assert 0 < chosen < 1
    grid = np.linspace(0, 1, 41)
    errors = [held_out_error(gram, 0.01, share) for share in grid]
    assert chosen == pytest.approx(grid[np.argmin(errors)], abs=0.026)


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
    (rows,) = layer_step._kept_rows([(gram, fitted)], {"2": 1.0}, 8)
    part = layer_step._Part(gram, fitted, rows, 1.0)
    off = set()
    for each in DAMPS:
        a, b, c = part.errors(each)
        off.add(a - 2 * 0.7 * b + 0.7**2 * c - held_out_error(gram, each, 0.7))
    assert max(off) - min(off) < 1e-6 * max(map(abs, off))


# ---- biases ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bias_takes_up_what_changes_in_the_means():
    """The refit with its bias is the least-squares fit with a column of ones.

    Inputs that never change are dead to a layer with a bias, which makes up for them.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Sigmoid(), nn.Linear(10, 4)).double().eval()
    model[0].weight[:2] = 0
    x = torch.randn(300, 6, dtype=torch.float64)
    result = osscar.prune(model, x, neurons=5, damp=0.0, target="weights", batch_size=300)
    (layer,), kept = result.layers, list(result.plan.groups[0].kept)
    assert layer.dead == 2
    assert min(kept) >= 2
    X = torch.cat([torch.sigmoid(model[0](x))[:, kept], torch.ones(300, 1).double()], 1)
    expected = torch.linalg.lstsq(X, model(x)).solution
    torch.testing.assert_close(result.model[2].weight, expected[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.model[2].bias, expected[-1], rtol=1e-6, atol=1e-8)
    residual = (X @ expected - model(x)).square().sum() / 300
    assert layer.loss == pytest.approx(float(residual), rel=1e-6)


@torch.no_grad()
def test_groups_of_one_consumer_correct_what_is_left_of_its_error():
    torch.manual_seed(0)
    model, x = Concat().eval(), torch.randn(256, 6)
    with prepare(model, x, batch_size=64) as prepared:
        dense = copy.deepcopy(prepared.model)
        groups = producing(prepared, "branches")
        assert len(groups) == 4
        for step in Walk(prepared, groups, target=Target.RESIDUAL):
            (gram,) = step.grams
            D = (call(dense, "join", x)[1] - call(prepared.model, "join", x)[1]).double()
            expected = float((D - D.mean(0)).square().sum()) / len(x)
            W = step.consumers[0].read_weight()
            _, (_, energy) = copy.deepcopy(gram.fitted).given_up(torch.zeros_like(W), 1.0)
            assert energy == pytest.approx(expected, rel=1e-3, abs=1e-9)
            W[::2] = 0
            step.commit([W])


# ---- half precision ----------------------------------------------------------------------


@torch.no_grad()
def test_both_streams_put_out_float32_where_a_model_runs_in_half_precision():
    torch.manual_seed(0)
    model, x = Stack("none").bfloat16().eval(), torch.randn(64, 8).bfloat16()
    with prepare(model, x, batch_size=16) as prepared:
        dense, energies = copy.deepcopy(prepared.model), []
        steps = Walk(prepared, producing(prepared, "up"), target=Target.RESIDUAL)
        for index, step in enumerate(steps):
            down = f"blocks.{index}.down"
            read = [call(network, down, x)[0].float() for network in (prepared.model, dense)]
            layer = copy.deepcopy(dense.get_submodule(down)).float()
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
    (passages,) = streams(Twice().eval(), {"x": torch.randn(4, 6)}, ["down"]).values()
    assert len(passages) == 2
    assert len({*passages}) == 1
    keeper, stream = Keeper({"down": (("x", 0, "in", 0), ("x", 0, "in", 0))}), torch.ones(2, 3)
    keeper.see(("x", 0, "in", 0), stream)
    assert torch.equal(keeper.take("down"), 2 * stream)
    assert keeper.take("down") is None


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
    with prepare(SharedBias().eval(), torch.randn(64, 6)) as prepared:
        maps = [one for g in prepared.groups for one in linear_maps(prepared.model, g)]
        assert [one.bias for one in maps if one.name == "down"] == [None]
