"""The pipeline on every family: what it computes, what it removes, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import graph
import osscar
import solvers
from graph.groups import CouplingGroup, Role, Slot, UnitKind
from osscar.allocation.curvature import curvature, held_batches, small_batches
from osscar.base.errors import (
    AdapterError,
    CalibrationError,
    EquivalenceError,
    FrozenGroupError,
    NonFiniteError,
    OsscarError,
    RequestError,
)
from osscar.preparation.opened import opened
from osscar.pruning.sweep import BudgetKind, jobs, sweep
from osscar.request import PruningRequest
from osscar.shrinking.attention import MultiheadAttention
from osscar.shrinking.lineage import lineage_of
from osscar.walk.regularization import DEFAULT_DAMP
from tests.osscar.families import FAMILIES, logits, tiny, tokens
from tests.osscar.programs import without_units

CHEAP = {"backend": "magnitude", "device": "cpu"}


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request):
    model = tiny(request.param)
    before = copy.deepcopy(model.state_dict())
    result = osscar.prune(model, tokens(), heads="2/3", neurons="0.5", device="cpu")
    return model, before, result


@pytest.mark.sampled(3)
def test_units_are_gone_and_the_model_is_smaller(pruned):
    model, _, result = pruned
    assert [layer.kind for layer in result.layers] == ["heads", "neurons"] * 2
    assert all(layer.kept < layer.units for layer in result.layers)
    assert result.parameters_after == sum(p.numel() for p in result.model.parameters())
    assert result.parameters_after < result.parameters_before
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert any(p.shape != shapes[name] for name, p in result.model.named_parameters())


def test_the_model_that_came_in_is_unchanged(pruned):
    model, before, _ = pruned
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not lineage_of(model).plans


def test_outputs_equal_those_of_the_model_with_zeroed_consumers(pruned):
    """Independent of the pipeline's own proof: rebuild the masked dense model from the result."""
    model, _, result = pruned
    masked = copy.deepcopy(model)
    small = dict(result.model.named_parameters())
    with torch.no_grad():
        for group in result.plan.groups:
            for slot in group.slots:
                if slot.role is Role.CONSUMER:
                    weight = masked.get_parameter(slot.tensor)
                    keep = torch.tensor(slot.indices(group.kept))
                    weight.zero_()
                    weight.index_copy_(slot.dim, keep, small[slot.tensor])
                    bias = f"{slot.module}.bias"  # takes up what changes in the means
                    if bias in small:
                        masked.get_parameter(bias).copy_(small[bias])
    for ids in (tokens(2, 24, seed=5), tokens(3, 11, seed=6)):
        expected = logits(masked, ids)
        error = (logits(result.model, ids) - expected).abs().max() / expected.abs().max()
        assert error < 1e-4


def test_it_generates_text_with_a_cache(pruned):
    _, _, result = pruned
    ids = tokens(1, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = result.model.generate(ids, use_cache=True, **options)
    without = result.model.generate(ids, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_gradients_flow_through_a_shrunk_model(pruned):
    model = copy.deepcopy(pruned[2].model)
    model(input_ids=tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_tied_weights_stay_tied(pruned):
    model, _, result = pruned
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    small = result.model
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied


@pytest.mark.sampled(4)
def test_a_shrunk_model_can_be_pruned_again(pruned):
    again = osscar.prune(pruned[2].model, tokens(), neurons=10, **CHEAP)
    assert {layer.units for layer in again.layers} == {20}
    assert again.parameters_after < pruned[2].parameters_after


@pytest.mark.sampled(4)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-gqa", "llama-mqa"])
def test_both_attention_implementations(family, attention):
    asked = {"heads": "2/3", "neurons": 0.6, **CHEAP}
    result = osscar.prune(tiny(family, attention=attention), tokens(), **asked)
    assert result.equivalence_error < 1e-4
    assert {layer.kind for layer in result.layers} == {"heads", "neurons"}


@pytest.mark.parametrize("backend", ["local_search", "multistage", "greedy", "wanda"])
def test_refit_beats_plain_removal(backend):
    model = tiny("llama-gqa")
    ids = tokens(16, 48)
    result = osscar.prune(model, ids, neurons="0.6", backend=backend, device="cpu")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for group in result.plan.groups:
            for slot in group.slots:
                if slot.role is Role.CONSUMER:
                    gone = set(range(group.units)) - set(group.kept)
                    plain.get_parameter(slot.tensor)[:, sorted(gone)] = 0
    dense = logits(model, ids)
    refitted = (logits(result.model, ids) - dense).square().mean()
    assert refitted < (logits(plain, ids) - dense).square().mean()


def test_ffn_is_measured_after_the_heads_of_its_block_are_pruned():
    """The FFN loss must be that of the stream which the pruned attention leaves behind."""
    model, ids = tiny("opt"), tokens(16, 32)
    asked = {"device": "cpu", "target": "weights"}  # so that the dense stream plays no part
    both = osscar.prune(model, ids, heads="0.5", neurons="0.5", **asked)
    heads_first = osscar.prune(model, ids, heads="0.5", **asked).model
    then_neurons = osscar.prune(heads_first, ids, neurons="0.5", **asked)
    alone = osscar.prune(model, ids, neurons="0.5", **asked)
    first = {layer.name: layer.loss for layer in both.layers}
    name = "model.decoder.layers.0.neurons"
    again = {layer.name: layer.loss for layer in then_neurons.layers}
    without = {layer.name: layer.loss for layer in alone.layers}
    assert first[name] == pytest.approx(again[name], rel=1e-4)
    assert first[name] != pytest.approx(without[name], rel=1e-3)


def test_the_batch_size_changes_nothing_but_rounding():
    model = tiny("llama-gqa")
    losses = [
        [x.loss for x in osscar.prune(model, tokens(), sparsity=0.4, batch_size=b).layers]
        for b in (1, 8)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_it_is_deterministic():
    model = tiny("qwen3")
    first, second = (osscar.prune(model, tokens(), sparsity=0.4, device="cpu") for _ in range(2))
    assert first.plan == second.plan
    assert [x.loss for x in first.layers] == [x.loss for x in second.layers]


def test_dead_neurons_go_first_and_are_counted():
    model = tiny("opt")
    dead = [1, 5, 17, 30]
    with torch.no_grad():
        for block in model.model.decoder.layers:
            block.fc1.weight[dead] = 0
            block.fc1.bias[dead] = -1  # ReLU never fires
    result = osscar.prune(model, tokens(), neurons=30, device="cpu")
    assert result.layers[0].dead == 4
    assert result.layers[1].dead >= 4
    for group in result.plan.groups:
        assert set(group.kept).isdisjoint(dead)


@pytest.mark.parametrize("damp", [None, 0.01, 1e9])
@pytest.mark.parametrize("bias", [True, False])
def test_what_reads_neurons_that_stay_and_were_silent_is_as_before(damp, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3, bias=bias)).eval()
    with torch.no_grad():  # eight of them fire below -0.1 alone
        model[0].weight[:8, 0] = -5
        model[0].weight[:8, 1:] *= 0.1
        model[0].bias[:8] = -0.5
    x = torch.randn(256, 6)
    x[:, 0] = x[:, 0].abs()
    result = osscar.prune(model, x, neurons=19, damp=damp, target="weights", device="cpu")
    (group,), (layer,) = result.plan.groups, result.layers
    assert layer.dead == 8
    silent = [unit for unit in group.kept if unit < 8]
    assert len(silent) == 7
    assert torch.equal(result.model[2].weight[:, :7], model[2].weight[:, silent])
    new = torch.randn(256, 6)
    (gone,) = set(range(20)) - set(group.kept)
    loss = relu_of(model, new)[:, gone, None] * model[2].weight[:, gone]
    assert (result.model(new) - model(new)).norm() < 1.1 * loss.norm()


def relu_of(model, x):
    return model[1](model[0](x))


class Recurring(nn.Module):
    """Goes through one width again and again, which is a residual stream."""

    def __init__(self):
        super().__init__()
        self.enter, self.on, self.leave = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        enter = self.enter(x)
        found = torch.zeros_like(enter)
        for _ in range(3):
            found = torch.tanh(self.on(found) / 2 + enter)
        return self.leave(found)


def test_a_budget_that_reaches_nothing_says_what_would():
    model, x = Recurring().eval(), torch.randn(64, 6)
    with pytest.raises(RequestError, match=r"'hidden' \(24 units\): name .*residual=0.5"):
        osscar.prune(model, x, sparsity=0.99, device="cpu")
    assert osscar.prune(model, x, residual=0.5, device="cpu").layers[0].kept == 12
    with pytest.raises(RequestError, match="skip less"):
        osscar.prune(model, x, sparsity=0.5, skip=["hidden"], device="cpu")


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sparsity": 0.3, "neurons": 0.5}, "nothing is left for it"),
        ({"params": 0.9, "groups": {"0.neurons": 12}}, "nothing is left for it"),
        ({"params": 10**6}, "has 243; ask for less"),
        ({"size": "20MB"}, "asks for no less than there is"),
        ({"params": 1.0}, "asks for no less than there is"),
    ],
)
def test_what_would_have_no_effect_is_refused(asked, message):
    model = two_layers()
    asked = {key: {named(model): 12} if key == "groups" else v for key, v in asked.items()}
    with pytest.raises(OsscarError, match=message):
        osscar.prune(model, torch.randn(64, 6), device="cpu", **asked)


class Deep(nn.Module):
    """Two groups of neurons around a residual stream."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.high, self.low = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.leave(x + self.low(torch.relu(self.high(x))))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"neurons": 0.5, "skip": ["up*"]}, "{} is shared by what nothing else names"),
        ({"groups": {"high": 10}, "skip": ["up*"]}, "{} is shared by what nothing else names"),
        ({"groups": {"high": 20}, "skip": ["up*"]}, "{} is shared by what nothing else names"),
        ({"residual": 0.5, "skip": ["up*", "high*"]}, "{} is shared by what nothing else names"),
        ({"skip": ["up*", "high*"]}, "every group but the 2 that are skipped .*, or skip less"),
        ({"skip": ["*"]}, "nothing would be removed.*, or skip less"),
        ({"neurons": 0.5, "skip": ["*"]}, "nothing would be removed.*, or skip less"),
    ],
)
@pytest.mark.parametrize("budget", [{"sparsity": 0.3}, {"params": 0.9}, {"size": 0.9}])
def test_a_budget_that_skipping_leaves_nothing_for_is_refused(asked, message, budget):
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.randn(64, 6)
    names = {g.name.split(".")[0]: g.name for g in graph.trace(model, (x[:2],)).prunable}
    if "groups" in asked:
        asked = {**asked, "groups": {names[name]: k for name, k in asked["groups"].items()}}
    (kind,) = budget
    with pytest.raises(RequestError, match=message.format(f"--{kind} 0.[39]")):
        osscar.prune(model, x, device="cpu", **asked, **budget)


def named(model):
    (group,) = graph.trace(model, (torch.randn(2, 6),)).prunable
    return group.name


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "give that itself, as model.module"),
        (torch.optim.swa_utils.AveragedModel, "give that itself, as model.module"),
        (partial(torch.compile, backend="eager"), "give that itself, as model._orig_mod"),
        (torch.jit.script, "TorchScript model; give the model that it was made of"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_wrapped_models_are_refused_with_a_way_out(wrap, message, named):
    x = torch.randn(64, 6)
    with pytest.raises((OsscarError, graph.GraphError), match=message):
        osscar.prune(wrap(two_layers()), {"input": x} if named else x, neurons=0.5, device="cpu")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (set(), "a tuple in the order"),
        ({}, "empty mapping"),
        ([], "empty list"),
        ([torch.zeros(2, 6)], "on a list with a Tensor in it; give .* a list with such a tuple"),
        ([{"input": torch.zeros(2, 6)}, {}], "sample 1 .* is nothing, and sample 0 is input torch"),
        ([{"other": torch.zeros(2, 6)}], "sample 0: .* takes no 'other'"),
        ([{"input": torch.full((2, 6), torch.nan)}], "sample 0: .* 'input' have NaN"),
        ({"input": torch.zeros(2, 6), "edges": torch.zeros(2, 3)}, "takes no 'edges'"),
    ],
)
def test_data_of_other_forms_are_refused_with_those_that_are_not(data, message):
    with pytest.raises(OsscarError, match=message):
        osscar.prune(two_layers(), data, neurons=0.5, device="cpu")


class Messages(nn.Module):
    """A graph network: nodes read the nodes to which edges lead; with one output for the graph."""

    def __init__(self):
        super().__init__()
        self.send, self.keep, self.read = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, edges):
        source, target = edges
        sent = self.send(x)
        received = torch.zeros_like(sent).index_add(0, target, sent[source])
        return self.read(torch.relu(self.keep(x) + received)).mean(0, keepdim=True)


def nodes_and_edges(nodes):
    return {"x": torch.randn(nodes, 6), "edges": torch.randint(nodes, (2, 2 * nodes))}


@pytest.mark.parametrize(
    ("form", "asked"), [("module", {"neurons": 0.5}), ("graph", {"flops": 0.6})]
)
def test_graphs_are_samples_of_sizes_of_their_own(form, asked, tmp_path):
    torch.manual_seed(0)
    model, data = Messages().eval(), [nodes_and_edges(nodes) for nodes in range(4, 20)]
    with pytest.raises(
        CalibrationError, match=r"one dict of arguments for each .*\{'x': \.\.\., 'ed"
    ):
        osscar.prune(model, data[0], **asked, device="cpu")
    result = osscar.prune(model, data, **asked, form=form, device="cpu")
    assert result.form == form
    assert result.held_out == 2
    assert result.calibration["sizes"] == {"x": [None, 6], "edges": [2, None]}
    [layer] = result.layers
    assert layer.kept < 16
    larger = nodes_and_edges(50)
    dropped = without_units(model, result.plan)
    dense = model(**larger)
    assert (result.model(**larger) - dense).norm() < (dropped(**larger) - dense).norm()
    again = osscar.load(result.save(tmp_path / "small").path, dense=Messages().eval())
    assert torch.equal(again(**larger), result.model(**larger))
    as_tuples = [tuple(sample.values()) for sample in data]
    again = osscar.prune(model, as_tuples, **asked, form=form, device="cpu")
    assert torch.equal(again.model(**larger), result.model(**larger))
    assert len(osscar.prune(model, data[:1], **asked, device="cpu").layers) == 1


def test_samples_apart_come_to_what_samples_together_do():
    model, x = two_layers(), torch.randn(64, 6)
    apart = [{"input": row[None]} for row in x]
    for asked in ({"neurons": 0.5}, {"neurons": 0.5, "target": "residual"}):
        one, other = (osscar.prune(model, data, **asked, device="cpu") for data in (x, apart))
        assert one.plan == other.plan
        assert one.held_out == other.held_out
        torch.testing.assert_close(one.model(x), other.model(x))
    with opened(model, x) as together, opened(model, apart) as alone:
        for ready in (together, alone):
            [found] = curvature(ready, [g for g in ready.groups if g.prunable], samples=64, seed=0)
            assert found.reached
        assert held_batches(alone, small_batches(alone, 64)) == 16
    estimated = osscar.estimate(model, apart, sparsity=0.3, device="cpu")
    assert estimated.seconds > 0


def test_widths_are_chosen_alike_where_gradients_are_off():
    model, x = two_layers(), torch.randn(64, 6)
    inside = []
    with torch.inference_mode():
        inside.append(osscar.prune(model, x.clone(), sparsity=0.3, device="cpu"))
    outside = osscar.prune(model, x, sparsity=0.3, device="cpu")
    assert inside[0].budget.comparable
    assert inside[0].plan == outside.plan


def test_data_that_say_nothing_are_named():
    with pytest.warns(UserWarning, match="none of its 24 units varies on the calibration data"):
        osscar.prune(two_layers(), torch.zeros(64, 6), neurons=0.5, device="cpu")


def test_all_dead_neurons_leave_a_model_that_works():
    model = tiny("opt")
    with torch.no_grad():
        block = model.model.decoder.layers[0]
        block.fc1.weight.zero_()
        block.fc1.bias.fill_(-1)
    result = osscar.prune(model, tokens(), neurons="0.5", device="cpu")
    assert result.layers[0].dead == 40
    assert result.layers[0].loss == 0


def test_fewer_tokens_than_inputs_warns_and_goes_on():
    with pytest.warns(UserWarning, match=r"16 calibration positions for 40 inputs"):
        result = osscar.prune(tiny("opt"), tokens(1, 16), neurons="0.5", device="cpu")
    assert all(0 <= layer.relative_loss < 1 for layer in result.layers)


def test_certified_layers_have_a_bound_and_a_gap():
    result = osscar.prune(tiny("llama-gqa"), tokens(), sparsity=0.4, certify=True, device="cpu")
    for layer in result.layers:
        assert layer.bound_from
        assert 0 <= layer.lower_bound <= layer.loss * (1 + 1e-9)
        assert 0 <= layer.gap <= 1
    plain = osscar.prune(tiny("llama-gqa"), tokens(), sparsity=0.4, device="cpu")
    assert plain.plan == result.plan
    assert {layer.gap for layer in plain.layers} == {None}


def test_few_units_get_their_bound_from_branch_and_bound_and_the_choice_stays(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    options = {"sparsity": 0.5, "device": "cpu", "certify": True}
    for backend in ("local_search", "magnitude"):
        result = osscar.prune(net, torch.randn(200, 6), backend=backend, **options)
        plain = osscar.prune(net, torch.randn(200, 6), backend=backend, sparsity=0.5, device="cpu")
        assert len(result.layers) == len(plain.layers) == 2
        for layer in result.layers:
            assert "branch and bound" in layer.bound_from
            assert layer.proved_optimal == (layer.gap <= 1e-4 * (1 + 1e-9))
            assert layer.status != "OPTIMAL"
        if backend == "local_search":
            assert any(layer.proved_optimal for layer in result.layers)
        assert not any(layer.proved_optimal for layer in plain.layers)
    exact = osscar.prune(net, torch.randn(200, 6), backend="enumerate", **options)
    assert all(layer.proved_optimal for layer in exact.layers)
    assert all("branch and bound" not in layer.bound_from for layer in exact.layers)
    monkeypatch.setattr("osscar.pruning.certify.EXACT_UNITS", 11)
    larger = osscar.prune(net, torch.randn(200, 6), **options).layers
    assert ["branch and bound" in layer.bound_from for layer in larger] == [False, True]


def test_a_backend_object_is_taken_as_it_is():
    backend = solvers.make_backend("random", seed=3)
    result = osscar.prune(tiny("opt"), tokens(), neurons="0.5", backend=backend, device="cpu")
    named = osscar.prune(
        tiny("opt"), tokens(), neurons="0.5", backend="random", backend_options={"seed": 3}
    )
    assert result.plan == named.plan


def test_nonfinite_weights_are_named():
    model = tiny("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.fc1\.weight"):
        osscar.prune(model, tokens(), neurons="0.5", **CHEAP)


def test_nonfinite_activations_are_named():
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        osscar.prune(model, tokens(), neurons="0.5", **CHEAP)


@pytest.mark.parametrize(
    "windows", [torch.zeros(0, 8, dtype=torch.int64), torch.zeros(3, 8), torch.zeros(8).long()]
)
def test_windows_of_a_wrong_form_are_refused(windows):
    with pytest.raises(CalibrationError, match="int64"):
        osscar.prune(tiny("opt"), windows, neurons="0.5", **CHEAP)


@pytest.mark.parametrize("targets", [{"sparsity": 1.5}, {"neurons": 41}, {"heads": 0}, {}])
def test_bad_targets_leave_the_model_alone(targets):
    model = tiny("opt")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RequestError):
        osscar.prune(model, tokens(), **targets, **CHEAP)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_leaves_every_number_format_as_it_was(dtype):
    model = tiny("llama-gqa").to(dtype)
    formats = {name: tensor.dtype for name, tensor in model.named_buffers()}
    result = osscar.prune(model, tokens(), sparsity=0.4, device="cpu")
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert {name: tensor.dtype for name, tensor in result.model.named_buffers()} == formats
    assert result.equivalence_error < 1e-5
    kept = result.model.model.embed_tokens.weight
    assert torch.equal(kept, model.model.embed_tokens.weight)


def test_a_wrong_group_is_caught_by_the_proof(monkeypatch):
    """A slot that names other rows than the unit's makes a model that computes something else."""
    block = "model.decoder.layers.0"
    slots = (
        Slot(f"{block}.fc1.weight", 0, Role.PRODUCER, f"{block}.fc1", 40),
        Slot(f"{block}.fc1.bias", 0, Role.PASS_THROUGH, f"{block}.fc1", 40),
        Slot(f"{block}.fc2.weight", 1, Role.CONSUMER, f"{block}.fc2", 40),
    )
    group = CouplingGroup("broken", UnitKind.NEURONS, 40, slots, 1)
    operator = graph.Operator("linear", "aten.linear.default", block, 0, (), ())
    traced = graph.DependencyGraph((group,), (operator,))
    monkeypatch.setattr("graph.trace", lambda *_: traced)
    assert osscar.prune(tiny("opt"), tokens(), neurons="0.5", device="cpu").layers

    def mirrored(slot, units):
        return sorted(39 - u if slot.tensor.endswith("fc1.weight") else u for u in units)

    monkeypatch.setattr(Slot, "indices", mirrored)
    with pytest.raises(EquivalenceError, match="nothing was written"):
        osscar.prune(tiny("opt"), tokens(), neurons="0.5", device="cpu")


# ---- what the model computes is what the user's model computes ---------------------------


class Padded(nn.Module):
    """Torch's encoder over padded sequences, averaged over all positions, padding included."""

    def __init__(self, norm):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16) if norm else None)
        self.head = nn.Linear(16, 3)

    def forward(self, x, padding):
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("asked", [{"heads": "3/4"}, {"neurons": 0.5}])
def test_padding_is_what_the_users_model_makes_of_it(norm, asked):
    """The dense encoder leaves zeros at padded positions, and so must the shrunk one."""
    torch.manual_seed(0)
    model = Padded(norm).eval()
    x, padding = torch.randn(40, 6, 16), torch.zeros(40, 6, dtype=torch.bool)
    for row in range(40):
        padding[row, 3 + row % 4 :] = True
    result = osscar.prune(model, {"x": x, "padding": padding}, **asked)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for group in result.plan.groups:
            slot = group.consumers[0]
            name = slot.tensor.rpartition(".")[0]
            mine, small = dense.get_submodule(name), result.model.get_submodule(name)
            weight = torch.zeros_like(mine.weight)
            weight[:, slot.indices(group.kept)] = small.weight
            mine.weight.copy_(weight)
            mine.bias.copy_(small.bias)
        expected, found = dense(x, padding), result.model(x, padding)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - model(x, padding)).abs().max() > 1e-3


def test_complex_layers_are_refused_by_name():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 10, dtype=torch.complex64)
            self.down = nn.Linear(10, 4, dtype=torch.complex64)

        def forward(self, x):
            hidden = self.up(torch.complex(x, x))
            return self.down(torch.complex(hidden.real.relu(), hidden.imag.relu())).abs()

    with pytest.raises(FrozenGroupError, match=r"down\.weight.*complex64"):
        osscar.prune(Complex().eval(), torch.randn(40, 6), neurons=0.5)


# ---- models that nobody here had tried ---------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class OwnFormat(Plain):
    """A head that computes in float32, whatever the proof computes in."""

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))).float())


class InPlace(Plain):
    """A model that writes to what it is given."""

    def forward(self, x):
        return super().forward(x.mul_(0.5).sub_(0.1))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.norm, self.d = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.d(torch.relu(self.norm(input=self.c(x))))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (OwnFormat, torch.randn(96, 6)),
        (InPlace, torch.randn(96, 6)),
        (ByKeyword, torch.randn(16, 3, 8, 8)),
    ],
)
def test_odd_habits_do_no_harm(kind, data):
    torch.manual_seed(0)
    model, before = kind().eval(), data.clone()
    result = osscar.prune(model, data, sparsity=0.5, batch_size=7)
    assert torch.equal(data, before)
    plan = {group.name: group for group in result.plan.groups}
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for group in plan.values():
            (slot,) = group.consumers
            module = slot.tensor.rpartition(".")[0]
            small = result.model.get_submodule(module).weight
            weight = torch.zeros_like(dense.get_submodule(module).weight)
            rows = range(len(weight))
            for other in plan.values():
                for made in other.slots:
                    if made.tensor == slot.tensor and made.dim == 0:
                        rows = made.indices(other.kept)
            weight[torch.tensor(list(rows))[:, None], slot.indices(group.kept)] = small
            dense.get_submodule(module).weight.copy_(weight)
            bias = result.model.get_submodule(module).bias
            if bias is not None:
                dense.get_submodule(module).bias[list(rows)] = bias
        if kind is ByKeyword:  # its batch norm was corrected
            (group,) = plan.values()
            for name in ("running_mean", "running_var"):
                getattr(dense.norm, name)[list(group.kept)] = getattr(result.model.norm, name)
        expected, found = dense(data.clone()), result.model(data.clone())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_experts_whose_kernels_know_one_format_are_proved_in_it():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, num_local_experts=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    result = osscar.prune(model, tokens(), heads="2/3", device="cpu")
    assert result.equivalence_error < 1e-3
    assert result.parameters_after < result.parameters_before


def test_a_layer_with_code_of_its_own_is_not_refitted():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(torch.relu(x), self.weight * 0.5, self.bias)

    model = Plain()
    model.c = Scaled(12, 4)
    with pytest.raises(FrozenGroupError, match=r"c\.weight.*not that of a plain layer"):
        osscar.prune(model.eval(), torch.randn(96, 6), groups={"b.neurons": 6})


@pytest.mark.parametrize(
    "data", [torch.randn(20, 6).to_sparse(), torch.empty(20, 6, device="meta")]
)
def test_data_without_plain_values_are_refused(data):
    with pytest.raises(CalibrationError, match="give plain tensors"):
        osscar.prune(Plain().eval(), data, sparsity=0.5)


class ReadTwice(nn.Module):
    """Uses a layer's weight on its own, besides calling the layer."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        y = self.down(hidden).to(self.down.weight.dtype)
        match self.form:
            case "function":
                y = y + nn.functional.linear(hidden.square(), self.down.weight)
            case "product":
                y = y + hidden.square() @ self.down.weight.T
            case "forward":
                y = y + self.down.forward(hidden.square())
        return self.last(torch.relu(self.head(y)))


@pytest.mark.parametrize("form", ["function", "product", "forward", "once"])
def test_a_weight_that_other_code_reads_is_not_refitted(form):
    torch.manual_seed(0)
    model, x = ReadTwice(form).eval(), torch.randn(64, 6)
    with opened(model, x) as ready:
        frozen = {g.units: g.frozen for g in ready.groups if g.units in {12, 8}}
    assert not frozen[8]
    assert bool(frozen[12]) == (form != "once")
    if frozen[12]:
        assert "reads, too" in frozen[12][0].reason
    result = osscar.prune(model, x, sparsity=0.5, backend="wanda")
    assert len([layer for layer in result.layers if layer.units == 12]) == (form == "once")


class Noting(nn.Module):
    """Writes on itself whenever it runs: a counter, a list, an attribute; and draws at random."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen, self.last = [], None

    def forward(self, x):
        self.calls.add_(1)
        self.seen.append(tuple(x.shape))
        self.last = x.mean()
        return self.body(x) + 0 * torch.rand(())


@pytest.mark.parametrize("asked", [{"neurons": 0.5}, {"sparsity": 0.3}, {"flops": 0.7}], ids=str)
def test_a_result_does_not_tell_that_it_was_run(asked):
    model, data = Noting().eval(), torch.randn(64, 6)
    model(data)
    before = [int(model.calls), list(model.seen), model.last]
    result = osscar.prune(model, data, **asked)
    for one in (model, result.model):
        assert [int(one.calls), one.seen, one.last] == before
    assert result.parameters_after < result.parameters_before


def test_random_numbers_of_a_model_are_not_those_of_its_user():
    model, data = Noting().eval(), torch.randn(64, 6)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    osscar.prune(model, data, neurons=0.5)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_of_which_nothing_can_be_pruned_says_why_and_asks_for_nothing_else():
    config = transformers.OlmoeConfig(  # whose experts have no width that kernels take but this
        vocab_size=97, hidden_size=48, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(RequestError) as caught:
        osscar.prune(model, torch.randint(3, 97, (4, 16)), sparsity=0.3)
    said = str(caught.value)
    assert said.startswith("no group of this model can be pruned")
    assert "heads' cannot be pruned: " in said
    assert "higher sparsity" not in said


def test_a_model_that_takes_any_number_of_tokens_is_pruned():
    config = transformers.XLNetConfig(vocab_size=97, d_model=48, n_layer=2, n_head=6, d_inner=40)
    model = transformers.XLNetLMHeadModel(config).eval()
    result = osscar.prune(model, torch.randint(3, 97, (8, 24)), neurons=0.5)
    assert result.model.transformer.layer[0].ff.layer_1.out_features == 20


class Caching(nn.Module):
    """Writes once, grows a table with the batch, and assigns a width that pruning changes."""

    def __init__(self):
        super().__init__()
        self.width, self.mask, self.cache = 16, None, {}
        self.register_buffer("table", torch.ones(1))
        self.inner, self.outer = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        if self.mask is None:
            self.mask = x.new_ones(1)
        if len(x) > len(self.table):
            self.table = torch.ones(len(x))
        self.cache[len(x)] = x.mean()
        self.width = int(self.width)
        return self.outer(torch.relu(self.inner(x)).reshape(len(x), self.width)) * self.mask


def test_what_is_written_once_or_follows_the_units_is_as_it_should_be():
    torch.manual_seed(0)
    model, data = Caching().eval(), torch.randn(64, 6)
    pruned = osscar.prune(model, data, neurons=0.5).model
    assert (model.width, model.mask, model.cache) == (16, None, {})
    assert (pruned.width, pruned.mask, pruned.cache) == (8, None, {})
    assert type(pruned.table) is torch.Tensor
    assert pruned.table.shape == (1,)
    assert pruned(data).shape == (64, 3)


def test_points_of_a_sweep_do_not_tell_that_they_were_run():
    model, data = Noting().eval(), torch.randn(64, 6)
    base = PruningRequest(sparsity=0.5)
    for _, result in sweep(model, data, base, jobs(BudgetKind.SPARSITY, (0.3, 0.5))):
        assert [int(result.model.calls), result.model.seen, result.model.last] == [0, [], None]


def test_one_number_for_two_groups_is_found_on_trial():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = 12
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
            self.c, self.d = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            y = x + self.b(torch.relu(self.a(x)).reshape(len(x), self.hidden))
            return self.d(torch.relu(self.c(y)).reshape(len(x), self.hidden))

    torch.manual_seed(0)
    with pytest.raises(AdapterError, match=r"none of 2 groups can follow.*keeps hidden = 12"):
        osscar.prune(Twins().eval(), torch.randn(64, 8), sparsity=0.5, form="module")
    # The exported program knows which of the two each number stands for.
    assert osscar.prune(Twins().eval(), torch.randn(64, 8), sparsity=0.5).form == "graph"


def test_two_samples_are_both_fitted_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    result = osscar.prune(model, torch.randn(2, 6), neurons=0.5)
    assert result.held_out == 0
    assert result.layers[0].dead < 12
    assert result.layers[0].damp == DEFAULT_DAMP


def test_a_list_that_two_modules_share_stays_one_list():
    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            self.seen = self.body[1].seen = []

        def forward(self, x):
            self.seen.append(len(x))
            return self.body(x)

    model = Sharing().eval()
    model.seen.append("first")
    pruned = osscar.prune(model, torch.randn(64, 6), neurons=0.5).model
    assert pruned.seen == model.seen == ["first"]
    assert pruned.seen is pruned.body[1].seen
    assert pruned.seen is not model.seen


def test_linear_layers_of_timm_are_plain():
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), layers.Linear(12, 3)).eval()
    result = osscar.prune(net, torch.randn(64, 8), neurons=0.5)
    assert result.model[2].in_features == 6
    assert isinstance(result.model[2], layers.Linear)


def test_attention_of_torch_in_bfloat16_is_no_other_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 12, batch_first=True, norm_first=True)
    model, data = layer.eval().bfloat16(), torch.randn(24, 5, 16)
    result = osscar.prune(model, data, heads=0.5, **CHEAP)
    assert [layer.kept for layer in result.layers] == [2]
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_attention_that_cannot_be_followed_is_named_with_a_way_out(monkeypatch):
    def double(self, query, *_args, **_kwargs):
        return 2 * query, None

    monkeypatch.setattr(MultiheadAttention, "forward", double)
    model = nn.TransformerEncoderLayer(16, 4, 12, batch_first=True).eval()
    words = r"forward passes of OSSCAR's output differs.*'self_attn' cannot .* leave heads out"
    with pytest.raises(EquivalenceError, match=words):
        osscar.prune(model, torch.randn(24, 5, 16), heads=0.5, **CHEAP)
    assert osscar.prune(model, torch.randn(24, 5, 16), neurons=0.5, **CHEAP).layers
