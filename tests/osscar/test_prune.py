"""The pipeline on every family: what it computes, what it removes, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import graph
import osscar
import solvers
from graph.groups import CouplingGroup, Role, Slot, UnitKind
from osscar.allocation.allocate import allocate
from osscar.base.errors import (
    AdapterError,
    DataError,
    EquivalenceError,
    NonFiniteError,
    OsscarError,
    RequestError,
)
from osscar.network.attention import _MultiheadAttention
from osscar.preparation.prepare import prepare
from osscar.proof.lineage import lineage_of
from osscar.request import PruningRequest
from osscar.run.groups import certified
from osscar.run.points import BudgetKind, jobs, prune_points
from osscar.walk.regularization import DEFAULT_DAMP
from tests.osscar.families import FAMILIES, logits, tiny, tokens
from tests.osscar.masked import masked
from tests.osscar.programs import without_units

CHEAP = {"backend": "magnitude", "device": "cpu"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    result = osscar.prune(model, tokens(), heads="2/3", neurons="0.5", device="cpu")
    small, ids = result.model, tokens(1, 5)
    # Units are gone.
    assert [layer.kind for layer in result.layers] == ["heads", "neurons"] * 2
    assert all(layer.kept < layer.units for layer in result.layers)
    assert result.parameters_after == sum(p.numel() for p in small.parameters())
    assert result.parameters_after < result.parameters_before
    # The model that came in is unchanged.
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not lineage_of(model).plans
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied
    # Outputs are those of the dense model with zeroed consumers, made by nothing that shrinks.
    zeroed = masked(model, result)
    for own in (tokens(2, 24, seed=5), tokens(3, 11, seed=6)):
        expected = logits(zeroed, own)
        error = (logits(small, own) - expected).abs().max() / expected.abs().max()
        assert error < 1e-4
    # It generates with a cache, learns, and can be pruned again.
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [small.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)
    again = osscar.prune(small, tokens(), neurons=10, **CHEAP)
    assert {layer.units for layer in again.layers} == {20}
    assert again.parameters_after < result.parameters_after
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_dead_neurons_go_first_and_are_counted():
    model = tiny("opt")
    dead = [[1, 5, 17, 30], list(range(40))]
    with torch.no_grad():
        for block, units in zip(model.model.decoder.layers, dead, strict=True):
            block.fc1.weight[units] = 0
            block.fc1.bias[units] = -1  # ReLU never fires
    result = osscar.prune(model, tokens(), neurons=30, device="cpu")
    assert [layer.dead for layer in result.layers] == [4, 40]
    assert set(result.plan.groups[0].kept).isdisjoint(dead[0])
    assert result.layers[1].loss == 0


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
    with prepare(Recurring().eval(), torch.randn(64, 6)) as prepared:
        with pytest.raises(RequestError, match=r"'hidden' \(24 units\): name .*residual=0.5"):
            widths(prepared, sparsity=0.99)
        assert widths(prepared, residual=0.5) == {"hidden": 12}
        with pytest.raises(RequestError, match="skip less"):
            widths(prepared, sparsity=0.5, skip=["hidden"])


def widths(prepared, **asked):
    """Return what groups keep, without a run."""
    budget = asked.keys() & {"sparsity", "params", "size"}
    shared = {"allocation": "uniform"} if budget else {}
    return allocate(prepared, PruningRequest(**asked, **shared)).keep


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
    with prepare(two_layers(), torch.randn(64, 6)) as prepared:
        if "groups" in asked:
            asked = {
                **asked,
                "groups": {group.name: 12 for group in prepared.groups if group.prunable},
            }
        with pytest.raises(OsscarError, match=message):
            widths(prepared, **asked)


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
def test_a_budget_that_skipping_leaves_nothing_for_is_refused(deep, asked, message):
    names = {group.name.split(".")[0]: group.name for group in deep.groups if group.prunable}
    if "groups" in asked:
        asked = {**asked, "groups": {names[name]: k for name, k in asked["groups"].items()}}
    for kind, value in {"sparsity": 0.3, "params": 0.9, "size": 0.9}.items():
        with pytest.raises(RequestError, match=message.format(f"{kind}=0.[39]")):
            widths(deep, **asked, **{kind: value})


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    with prepare(Deep().eval(), torch.randn(64, 6)) as prepared:
        yield prepared


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "give that itself, as model.module"),
        (torch.optim.swa_utils.AveragedModel, "give that itself, as model.module"),
        (partial(torch.compile, backend="eager"), "give that itself, as model._orig_mod"),
        (torch.jit.script, "TorchScript model; give the model that it was made of"),
    ],
)
def test_wrapped_models_are_refused_with_a_way_out(wrap, message):
    x = torch.randn(64, 6)
    for data in ({"input": x}, x):
        refused = pytest.raises((OsscarError, graph.GraphError), match=message)
        with refused, prepare(wrap(two_layers()), data):
            pass


def alone(*samples):
    return osscar.SampleList("alone", samples)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (set(), "cannot calibrate on a set; give token windows"),
        ((torch.zeros(2, 6),), "cannot calibrate on a tuple; give token windows"),
        ({}, "the data are an empty dict; give a mapping of tensors"),
        (alone({"input": torch.zeros(2, 6)}, {}), "sample 1: .* there is no 'input' among"),
        (alone({"other": torch.zeros(2, 6)}), "sample 0: .* takes no 'other'"),
        (alone({"input": torch.full((2, 6), torch.nan)}), "sample 0: .* 'input' have NaN"),
        (
            alone({"input": torch.zeros(2, 6)}, {"input": torch.zeros(2, 6).double()}),
            "sample 1 is .*float64.* and sample 0 is .*float32",
        ),
        ({"input": torch.zeros(2, 6), "edges": torch.zeros(2, 3)}, "takes no 'edges'"),
    ],
)
def test_data_of_other_forms_are_refused_with_those_that_are_not(data, message):
    with pytest.raises(OsscarError, match=message), prepare(two_layers(), data):
        pass


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
    ("form", "asked"), [("eager", {"neurons": 0.5}), ("exported", {"flops": 0.6})]
)
def test_graphs_are_samples_of_sizes_of_their_own(form, asked, tmp_path):
    torch.manual_seed(0)
    model, data = Messages().eval(), alone(*map(nodes_and_edges, range(4, 20)))
    with pytest.raises(DataError, match=r"not the sample, as of .*osscar\.SampleList\("):
        osscar.prune(model, data.samples[0], **asked, device="cpu")
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
    assert_close(again(**larger), result.model(**larger))
    if form == "eager":
        assert len(osscar.prune(model, alone(data.samples[0]), **asked, device="cpu").layers) == 1


def test_samples_apart_come_to_what_samples_together_do():
    model, x = two_layers(), torch.randn(64, 6)
    apart = alone(*({"input": row[None]} for row in x))
    one, other = (osscar.prune(model, data, neurons=0.5, device="cpu") for data in (x, apart))
    assert one.plan == other.plan
    assert one.held_out == other.held_out
    torch.testing.assert_close(one.model(x), other.model(x))
    estimated = osscar.estimate(model, apart, sparsity=0.3, device="cpu")
    assert estimated.seconds > 0


def test_widths_are_chosen_alike_where_gradients_are_off():
    model, x = two_layers(), torch.randn(64, 6)
    inside = []
    with torch.inference_mode():
        inside.append(osscar.prune(model, x.clone(), sparsity=0.3, device="cpu"))
    outside = osscar.prune(model, x, sparsity=0.3, device="cpu")
    assert inside[0].plan == outside.plan


def test_data_that_say_nothing_are_named():
    with pytest.warns(UserWarning, match="none of its 24 units varies on the calibration data"):
        osscar.prune(two_layers(), torch.zeros(64, 6), neurons=0.5, device="cpu")


def test_fewer_tokens_than_inputs_warns_and_goes_on():
    with pytest.warns(UserWarning, match=r"16 calibration positions for 40 inputs"):
        result = osscar.prune(tiny("opt"), tokens(1, 16), neurons="0.5", device="cpu")
    assert all(0 <= layer.relative_loss < 1 for layer in result.layers)


def test_certified_layers_have_a_bound_and_a_gap():
    plain, result = (
        osscar.prune(tiny("llama-gqa"), tokens(), neurons=0.6, certify=certify, device="cpu")
        for certify in (False, True)
    )
    for layer in result.layers:
        assert layer.bound_from
        assert 0 <= layer.lower_bound <= layer.loss * (1 + 1e-9)
        assert 0 <= layer.gap <= 1
    assert plain.plan == result.plan
    assert {layer.gap for layer in plain.layers} == {None}


@pytest.mark.parametrize(
    ("backend", "units", "closely"),
    [("local_search", 12, True), ("magnitude", 12, True), ("enumerate", 12, False),
     ("local_search", 40, False)],
)  # fmt: skip
def test_few_units_get_their_bound_from_branch_and_bound_and_the_choice_stays(
    backend, units, closely
):
    torch.manual_seed(0)
    X, W0 = torch.randn(200, units).double(), torch.randn(units, 5).double()
    owned = [[unit] for unit in range(units)]
    consumer = solvers.Consumer.from_gram(X.T @ X / 200, W0, units=owned, damp=0.01)
    problem = solvers.SubsetProblem((consumer,), units // 2, "layer")
    made = solvers.make_backend(backend)
    solution, verification = certified(problem, made, bound_rounds=2)
    assert ("branch and bound" in solution.bound_from) == closely
    plain = solvers.solve(problem, made)
    assert torch.equal(solution.support, plain.support)
    record, before = solution.record(verification), plain.record(None)
    assert record.gap >= 0
    assert record.proved_optimal == (record.gap <= 1e-4 * (1 + 1e-9))
    assert not before.proved_optimal or backend == "enumerate"
    if backend == "enumerate":
        assert record.proved_optimal
    if closely and backend == "local_search":
        assert record.status != "OPTIMAL"


def test_a_backend_object_is_taken_as_it_is():
    asked = {"neurons": "0.5", "device": "cpu"}
    plans = [
        osscar.prune(two_layers(), torch.randn(64, 6), **asked, **how).plan
        for how in (
            {"backend": solvers.make_backend("random", seed=3)},
            {"backend": "random", "backend_options": {"seed": 3}},
        )
    ]
    assert plans[0] == plans[1]


def test_nonfinite_weights_and_activations_are_named():
    model = tiny("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj"):
        osscar.prune(model, tokens(), neurons="0.5", **CHEAP)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    words = r"layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(NonFiniteError, match=words), prepare(model, tokens()):
        pass


def test_windows_of_a_wrong_form_are_refused():
    model = tiny("opt")
    for windows in (torch.zeros(0, 8).long(), torch.zeros(3, 8), torch.zeros(8).long()):
        with pytest.raises(DataError, match="int64"), prepare(model, windows):
            pass


def test_the_proof_leaves_every_number_format_as_it_was():
    dtype = torch.bfloat16
    model = tiny("llama-gqa").to(dtype)
    formats = {name: tensor.dtype for name, tensor in model.named_buffers()}
    result = osscar.prune(model, tokens(), heads="2/3", neurons=0.5, device="cpu")
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert {name: tensor.dtype for name, tensor in result.model.named_buffers()} == formats
    assert result.certificate.error < 1e-5
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


@pytest.mark.parametrize(("norm", "asked"), [(True, {"heads": "3/4"}), (False, {"neurons": 0.5})])
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

    refused = pytest.raises(RequestError, match=r"down\.weight.*complex64")
    with prepare(Complex().eval(), torch.randn(40, 6)) as prepared, refused:
        widths(prepared, neurons=0.5)


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
    dense = masked(model, result)
    with torch.no_grad():
        if kind is ByKeyword:  # its batch norm was corrected
            (group,) = result.plan.groups
            for name in ("running_mean", "running_var"):
                getattr(dense.norm, name)[list(group.kept)] = getattr(result.model.norm, name)
        expected, found = dense(data.clone()), result.model(data.clone())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_layer_with_code_of_its_own_is_not_refitted():
    class Scaled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(torch.relu(x), self.weight * 0.5, self.bias)

    model = Plain()
    model.c = Scaled(12, 4)
    with prepare(model.eval(), torch.randn(96, 6)) as prepared:
        (group,) = (group for group in prepared.groups if group.name == "b.neurons")
    assert "'c.weight'" in group.frozen[0].reason
    assert "forward pass of its own needs a row in osscar.consumers.layers.LAYERS" in (
        group.frozen[0].reason
    )


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
            case "scaled":
                y = y + hidden.square() @ (2 * self.down.weight).T
        return self.last(torch.relu(self.head(y)))


@pytest.mark.parametrize("form", ["function", "product", "forward", "once", "scaled"])
def test_a_weight_that_other_code_reads_is_refitted_to_all_that_it_reads_or_not_at_all(form):
    torch.manual_seed(0)
    model, x = ReadTwice(form).eval(), torch.randn(64, 6)
    with prepare(model, x) as prepared:
        frozen = {g.units: g.frozen for g in prepared.groups if g.units in {12, 8}}
        products = set(prepared.products)
    assert not frozen[8]
    assert products == ({"down.weight"} if form in {"function", "product", "forward"} else set())
    assert bool(frozen[12]) == (form == "scaled")
    if frozen[12]:
        assert "reads, too" in frozen[12][0].reason


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


def test_a_result_does_not_tell_that_it_was_run():
    model, data = Noting().eval(), torch.randn(64, 6)
    model(data)
    before = [int(model.calls), list(model.seen), model.last]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = osscar.prune(model, data, flops=0.7)
    assert torch.equal(torch.rand(3), expected)  # nor do random numbers
    for one in (model, result.model):
        assert [int(one.calls), one.seen, one.last] == before
    assert result.parameters_after < result.parameters_before


def test_a_model_of_which_nothing_can_be_pruned_says_why_and_asks_for_nothing_else():
    config = transformers.OlmoeConfig(  # whose experts have no width that kernels take but this
        vocab_size=97, hidden_size=48, intermediate_size=4, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with (
        prepare(model, torch.randint(3, 97, (4, 16))) as prepared,
        pytest.raises(RequestError) as caught,
    ):
        widths(prepared, sparsity=0.3)
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
    for _, result in prune_points(model, data, base, jobs(BudgetKind.SPARSITY, (0.3, 0.5))):
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
        osscar.prune(Twins().eval(), torch.randn(64, 8), sparsity=0.5, form="eager")
    # The exported program knows which of the two each number stands for.
    assert osscar.prune(Twins().eval(), torch.randn(64, 8), sparsity=0.5).form == "exported"


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


def test_attention_that_cannot_be_followed_is_named_with_a_way_out(monkeypatch):
    def double(self, query, *_args, **_kwargs):
        return 2 * query, None

    monkeypatch.setattr(_MultiheadAttention, "forward", double)
    model = nn.TransformerEncoderLayer(16, 4, 12, batch_first=True).eval()
    words = r"forward passes of OSSCAR's output differs.*'self_attn' cannot .* leave heads out"
    with pytest.raises(EquivalenceError, match=words):
        osscar.prune(model, torch.randn(24, 5, 16), heads=0.5, **CHEAP)
    assert osscar.prune(model, torch.randn(24, 5, 16), neurons=0.5, **CHEAP).layers
