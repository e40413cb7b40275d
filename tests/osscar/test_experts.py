"""Mixtures of experts: what their experts read, refits of them, and what becomes of the model."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

import osscar
import solvers
from osscar.allocation.allocate import allocate, provisional
from osscar.base.errors import NonFiniteError
from osscar.consumers.linear_maps import linear_maps
from osscar.consumers.mixtures import Routed
from osscar.preparation.prepare import prepare
from osscar.proof.equivalence import masked
from osscar.proof.lineage import note
from osscar.request import PruningRequest
from osscar.walk.targets import streams
from osscar.walk.walk import walk
from tests.osscar.families import tokens
from tests.osscar.mixtures import MIXTURES, mixture

PLAIN = {"target": "weights", "damp": 1e-6, "device": "cpu"}
KERNELS = ("grouped_mm", "batched_mm", "eager")


def of_experts(prepared):
    """Return the groups that experts read."""
    return [
        group
        for group in prepared.groups
        if group.prunable and hasattr(linear_maps(prepared.model, group)[0], "mixture")
    ]


def calls(model, name, data):
    """Return what a mixture is called with, and what it puts out."""
    found = []

    def hook(module, args, kwargs, output):
        found.append((Routed.of(module, args, kwargs), output))

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=data)
    handle.remove()
    return found


def by_hand(experts, x, expert):
    """Compute in double precision what one expert reads, times the routing weight."""
    place, slot = (x.experts == expert).nonzero(as_tuple=True)
    hidden, weight = x.hidden[place].double(), x.weights[place, slot].double()
    gates = experts.gate_up_proj[expert].double()
    gated = hidden @ (gates if experts.is_transposed else gates.T)
    if experts.has_bias:
        gated = gated + experts.gate_up_proj_bias[expert].double()
    return experts._apply_gate(gated) * weight[:, None], place


# ---- families ----------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_lose_neurons_and_the_model_is_proved_saved_and_loaded(family, tmp_path):
    model, data = mixture(family), tokens(16, 24)
    before = copy.deepcopy(model.state_dict())
    result = osscar.prune(model, data, neurons=0.5, device="cpu")
    experts = [layer for layer in result.layers if layer.name.endswith(".experts.neurons")]
    assert len(experts) in (1, 2)
    for layer in experts:
        assert layer.kept == layer.units // 2
        assert 0 < layer.positions < data.numel()
        assert layer.unread == 0
        module = result.model.get_submodule(layer.name.removesuffix(".neurons"))
        dim = 1 if module.is_transposed else 2
        assert module.down_proj.shape[dim] == layer.kept
    assert result.certificate.error < 1e-5
    assert not result.skipped
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    result.save(tmp_path / "smaller")
    again = osscar.load(tmp_path / "smaller")
    with torch.no_grad():
        assert_close(again(input_ids=data).logits, result.model(input_ids=data).logits)
    prompt = {"input_ids": data[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    ours, theirs = (
        m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (result.model, again)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe", "deepseek-v3", "nemotron-h"])
def test_the_config_says_how_many_neurons_experts_have(family, tmp_path):
    """Those of each expert, and of shared ones, under names of their own."""
    model, data = mixture(family), tokens(16, 24)
    result = osscar.prune(model, data, neurons=0.5, device="cpu")
    saved = result.save(tmp_path / "smaller")
    assert saved.stock
    config = hf.AutoConfig.from_pretrained(saved.path)
    assert config.moe_intermediate_size == model.config.moe_intermediate_size // 2
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=data).logits, result.model(input_ids=data).logits)


# ---- what experts read -------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "qwen3-moe"])
def test_what_experts_read_is_found_whatever_multiplies_them(family, kernel):
    model, data = mixture(family, kernel=kernel), tokens(3, 16)
    with prepare(model, data) as prepared:
        for group in of_experts(prepared):
            maps = linear_maps(prepared.model, group)
            experts = prepared.model.get_submodule(maps[0].name)
            before = {name: p.detach().clone() for name, p in experts.named_parameters()}
            [(x, y)] = calls(prepared.model, maps[0].name, data)
            D, corrected, total = torch.randn_like(y), *torch.zeros(2, *y.shape).double()
            for one in maps:
                X, token = by_hand(experts, x, one.expert)
                [found] = one.read_inputs(x)
                assert (found - X).abs().max() < 1e-5 * X.abs().max()
                assert one.passed_over(x) == data.numel() - len(X)
                total.index_add_(0, token, X @ one.read_weight())
                corrected.index_add_(0, token, one.read_corrections(D, x))
                # Its rows of the output are those of its tokens.
                assert torch.equal(one.read_outputs(y, x), y[token])
            if experts.has_bias:
                for slot in range(2):
                    bias = experts.down_proj_bias[x.experts[:, slot]]
                    total += x.weights[:, slot, None] * bias
            assert (total - y).abs().max() < 1e-5 * y.abs().max()
            assert (corrected - D).abs().max() < 1e-6  # the shares of a correction add up to it
            assert all(torch.equal(p, before[name]) for name, p in experts.named_parameters())


def test_experts_know_the_residual_stream_that_their_output_is_added_to():
    model = mixture("mixtral")
    with prepare(model, tokens(3, 16)) as prepared:
        names = [linear_maps(prepared.model, group)[0].name for group in of_experts(prepared)]
        found = streams(prepared.model, prepared.example, names)
    assert sorted(found) == sorted(names)


class Deep(nn.Module):
    """Experts of three matrices, of which only the last adds up to what comes out."""

    def __init__(self, inner=False, zero=False):
        super().__init__()
        self.up, self.mid, self.down = (
            nn.Parameter(torch.randn(3, 16, 16) * s) for s in (0.4, 0.3, 0.0 if zero else 0.3)
        )
        self.inner = (
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) if inner else None
        )

    def forward(self, hidden, experts, weights):
        if self.inner is not None:
            hidden = hidden + self.inner(hidden)
        gates = (nn.functional.one_hot(experts, 3).to(hidden.dtype) * weights[..., None]).sum(1)
        h = torch.einsum("nd,edf->nef", hidden, self.up).relu()
        h = torch.einsum("nef,efg->neg", h, self.mid).relu()
        return (torch.einsum("nef,efd->ned", h, self.down) * gates[..., None]).sum(1)


class Around(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        self.first, self.router, self.last = nn.Linear(8, 16), nn.Linear(8, 3), nn.Linear(16, 4)
        self.experts = Deep(**kind)

    def forward(self, x):
        weights, experts = self.router(x).softmax(-1).topk(2)
        x = self.first(x)
        return self.last(x + self.experts(x, experts, weights))


@pytest.mark.parametrize("kind", [{}, {"inner": True}, {"zero": True}])
def test_only_the_last_matrices_of_experts_are_refitted(kind):
    torch.manual_seed(0)
    model, data = Around(**kind).eval(), torch.randn(200, 8)
    with prepare(model, data) as prepared:
        read = {
            slot.tensor: group
            for group in prepared.groups
            for slot in group.consumers
            if slot.tensor
        }
    assert not read["experts.down"].frozen
    assert "does not put out" in read["experts.mid"].frozen[0].reason
    if kind.get("inner"):
        assert "inside of 'experts'" in read["experts.inner.2.weight"].frozen[0].reason
    result = osscar.prune(model, data, neurons=0.5)
    small = result.model.experts
    assert small.up.shape == (3, 16, 16)
    assert small.down.shape == (3, 8, 16)


# ---- refits ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt-oss"])
def test_weights_are_those_of_least_squares_for_each_expert(family):
    """In double precision, from what is computed by hand; the first layer, on the dense stream."""
    model, data = mixture(family), tokens(16, 24)
    result = osscar.prune(model, data, neurons=0.5, **PLAIN)
    layer, group = result.layers[0], result.plan.groups[0]
    name = layer.name.removesuffix(".neurons")
    [(x, _)] = calls(model, name, data)
    dense, small = model.get_submodule(name), result.model.get_submodule(name)
    kept, losses, energy = list(group.kept), [], 0.0
    for expert in range(4):
        X, _ = by_hand(dense, x, expert)
        W0, W = dense.down_proj[expert].double(), small.down_proj[expert].double()
        W0, W = (w if dense.is_transposed else w.T for w in (W0, W))
        best = torch.linalg.lstsq(X[:, kept], X @ W0, driver="gelsd").solution
        assert (W - best).abs().max() < 2e-3 * best.abs().max()
        losses.append(float((X[:, kept] @ W - X @ W0).detach().square().sum()))
        energy += float((X @ W0).detach().square().sum())
    assert layer.relative_loss == pytest.approx(sum(losses) / energy, rel=1e-3)
    assert layer.positions == min(int((x.experts == e).sum()) for e in range(4))


def never_sent_to(model, expert):
    """Keep all tokens from one expert, by the bias of the router."""
    for layer in model.model.layers:
        layer.mlp.router.bias.data[expert] = -1e9
    return model


def test_an_expert_that_no_token_reaches_keeps_its_rows_and_says_so():
    """And is masked like all others in the model that the walk leaves."""
    model, data = never_sent_to(mixture("gpt-oss"), 2), tokens(16, 24)
    with pytest.warns(UserWarning, match=r"no calibration token is sent to .*experts\[2\], whose"):
        result = osscar.prune(model, data, neurons=0.5, device="cpu")
    for layer, group in zip(result.layers, result.plan.groups, strict=True):
        assert layer.unread == 1
        assert layer.positions > 0
        name = layer.name.removesuffix(".neurons")
        dense, small = (m.get_submodule(name).down_proj for m in (model, result.model))
        assert torch.equal(small[2], dense[2, list(group.kept)])
        assert not torch.equal(small[1], dense[1, list(group.kept)])
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for group in result.plan.groups:
            name = group.name.removesuffix(".neurons")
            whole, small = (m.get_submodule(name) for m in (dense, result.model))
            whole.down_proj[:, list(group.kept)] = small.down_proj
        for layer in (*dense.model.layers, *result.model.model.layers):
            layer.mlp.router.bias[2] = 1e9  # all tokens
        with masked(dense, result.plan):
            expected = dense(input_ids=data).logits
        found = result.model(input_ids=data).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_too_few_tokens_for_an_expert_are_told_once_a_layer():
    with prepare(mixture("mixtral"), tokens(2, 24)) as prepared:
        (step, _) = walk(prepared, of_experts(prepared), in_turn=False)
        with pytest.warns(UserWarning, match="rank-deficient") as caught:
            step.problem(20, 0.1)
    (told,) = [str(one.message) for one in caught if "rank-deficient" in str(one.message)]
    assert "calibration positions for 40 inputs, and too few at 3 more of the 4" in told


def test_numbers_that_overflow_in_one_expert_name_it():
    with prepare(mixture("mixtral"), tokens()) as prepared:
        with torch.no_grad():
            prepared.model.model.layers[1].mlp.experts.gate_up_proj[3] *= 1e36
        words = r"layers\.1\.mlp\.experts\[3\]' have NaN or infinite"
        with pytest.raises(NonFiniteError, match=words):
            list(walk(prepared, of_experts(prepared), in_turn=False))


def test_widths_are_those_that_kernels_take():
    full, half = torch.float32, torch.bfloat16
    for dtype, saved, step in ((full, None, 4), (half, None, 8), (full, "bfloat16", 8)):
        model = mixture("mixtral").to(dtype)
        note(model, stored_dtype=saved)
        with prepare(model, tokens()) as prepared:
            assert {group.step for group in of_experts(prepared)} == {step}
            keep = provisional(prepared, PruningRequest(neurons=21))
        assert set(keep.values()) == {{4: 20, 8: 24}[step]}
    kind, values = MIXTURES["mixtral"]
    narrow = type(mixture("mixtral"))(kind(**{**values, "intermediate_size": 4})).eval()
    with prepare(narrow, tokens()) as prepared:
        reasons = [group.frozen[0].reason for group in prepared.groups if group.units == 4]
    assert any("widths that are multiples of 4" in reason for reason in reasons)


# ---- budgets -----------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_experts_share_budgets(allocation):
    with prepare(never_sent_to(mixture("gpt-oss"), 2), tokens(16, 24)) as prepared:
        found = allocate(prepared, PruningRequest(flops=0.85, allocation=allocation))
    experts = {name: kept for name, kept in found.keep.items() if name.endswith("experts.neurons")}
    assert experts
    assert all(kept % 4 == 0 for kept in experts.values())
    assert found.budget.tightest.reached <= found.budget.tightest.limit * (1 + 1e-9)


# ---- masked and smaller ------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_of_experts_is_shrunk_whichever_kernel_they_run():
    result = osscar.prune(
        mixture("mixtral", kernel="eager"), tokens(8, 24), neurons=0.5, form="exported"
    )
    assert result.form == "exported"
    assert result.parameters_after < result.parameters_before


def test_an_expert_that_only_held_out_tokens_reach_loses_the_rows_of_what_leaves():
    model, data = mixture("mixtral"), tokens(8, 24)
    with prepare(model, data) as prepared:
        for step in walk(
            prepared, [g for g in prepared.groups if g.name.endswith("experts.neurons")]
        ):
            gram = step.grams[1]
            gram.fitted.rows = 0
            assert gram not in step.known
            before = gram.linear_map.read_weight()
            problem = step.problem(8, 0.1)
            solution = solvers.solve(problem, "greedy")
            step.commit(solution.weights, solution.support.tolist())
            gone = sorted(set(range(step.group.units)) - set(solution.support.tolist()))
            after = gram.linear_map.read_weight()
            assert not after[gone].any()
            assert torch.equal(after[solution.support], before[solution.support])
            break
