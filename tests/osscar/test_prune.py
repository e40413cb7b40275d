"""The pipeline on every family: what it computes, what it removes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import osscar
import solvers
from graph.groups import Slot
from osscar.base.errors import (
    DataError,
    EquivalenceError,
    NonFiniteError,
    OsscarError,
)
from osscar.preparation.prepare import prepare
from osscar.proof.lineage import lineage_of
from osscar.request import BudgetKind, PruningRequest
from osscar.run.groups import certified
from osscar.run.jobs import jobs
from osscar.run.sweep import prune_points
from tests.osscar.families import FAMILIES, logits, tiny, tokens
from tests.osscar.masked import masked
from tests.osscar.programs import without_units

CHEAP = {"backend": "magnitude", "device": "cpu"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned(family):
    model, ids = tiny(family, layers=1), tokens(3, 11, seed=6)
    before = copy.deepcopy(model.state_dict())
    result = osscar.prune(model, tokens(), heads="2/3", neurons="0.5", device="cpu")
    small = result.model
    # Units are gone.
    assert [layer.kind for layer in result.layers] == ["heads", "neurons"]
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
    expected = logits(masked(model, result), ids)
    assert (logits(small, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    # It generates with a cache, learns, and can be pruned again.
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [small.generate(ids[:1], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)
    again = osscar.prune(small, tokens(), neurons=10, **CHEAP)
    assert {layer.units for layer in again.layers} == {24}  # of 40, rounded
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


@pytest.mark.parametrize(("damp", "bias"), [(None, True), (1e9, False)])
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
    loss = model[:2](new)[:, gone, None] * model[2].weight[:, gone]
    assert (result.model(new) - model(new)).norm() < 1.1 * loss.norm()


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def alone(*samples):
    return osscar.SampleList("alone", samples)


def test_data_of_other_forms_are_refused_with_those_that_are_not():
    x = torch.zeros(2, 6)
    for data, message in (
        (set(), "cannot calibrate on a set; give token windows"),
        (alone({"input": x}, {}), "sample 1: .* takes input, and the data are called nothing"),
        (alone({"input": x * torch.nan}), "sample 0: .* 'input' have NaN"),
        (
            alone({"input": x}, {"input": x.double()}),
            "sample 1 is .*float64.* and sample 0 is .*float32",
        ),
        (
            {"input": x, "edges": torch.zeros(2, 3)},
            "takes input, and the data are called input, edges",
        ),
    ):
        with pytest.raises(OsscarError, match=message), prepare(two_layers(), data):
            pass
    for windows in (torch.zeros(0, 8).long(), torch.zeros(3, 8), torch.zeros(8).long()):
        with pytest.raises(DataError, match="int64"), prepare(tiny("opt", layers=1), windows):
            pass
    beyond = torch.full((3, 8), 97)
    with pytest.raises(DataError, match="knows 0 to 96"), prepare(tiny("opt", layers=1), beyond):
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


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("form", "asked"), [("eager", {"neurons": 0.5}), ("exported", {"flops": 0.6})]
)
def test_graphs_are_samples_of_sizes_of_their_own(form, asked, tmp_path):
    torch.manual_seed(0)
    model, (larger, *some) = (
        Messages().eval(),
        (
            {"x": torch.randn(n, 6), "edges": torch.randint(n, (2, 2 * n))}
            for n in (50, *range(4, 20))
        ),
    )
    with pytest.raises(DataError, match=r"not the sample, as of .*osscar\.SampleList\("):
        osscar.prune(model, some[0], **asked, device="cpu")
    result = osscar.prune(model, alone(*some), **asked, form=form, device="cpu")
    assert result.form == form
    assert result.held_out == 2
    assert result.calibration["sizes"] == {"x": [None, 6], "edges": [2, None]}
    [layer] = result.layers
    assert layer.kept < 16
    dropped, dense = without_units(model, result.plan), model(**larger)
    assert (result.model(**larger) - dense).norm() < (dropped(**larger) - dense).norm()
    again = osscar.load(result.save(tmp_path / "small").path, dense=Messages().eval())
    assert_close(again(**larger), result.model(**larger))
    if form == "eager":
        assert len(osscar.prune(model, alone(some[0]), **asked, device="cpu").layers) == 1


@pytest.mark.parametrize(
    ("backend", "units", "closely"),
    [("local_search", 12, True), ("enumerate", 12, False), ("local_search", 40, False)],
)
def test_few_units_get_their_bound_from_branch_and_bound_and_the_choice_stays(
    backend, units, closely
):
    torch.manual_seed(0)
    X, W0 = torch.randn(200, units).double(), torch.randn(units, 5).double()
    problem = solvers.SubsetProblem.from_gram(
        X.T @ X / 200, W0, units=units, keep=units // 2, damp=0.01
    )
    made = solvers.make_backend(backend)
    solution, verification = certified(problem, made)
    assert ("branch and bound" in solution.bound_from) == closely
    plain = solvers.solve(problem, made)
    assert torch.equal(solution.support, plain.support)
    record = solution.record(verification)
    assert record.gap >= 0
    assert record.proved_optimal == (record.gap <= 1e-4 * (1 + 1e-9))
    if backend == "enumerate":
        assert record.proved_optimal
    else:
        assert not plain.record(None).proved_optimal
        assert record.status != "OPTIMAL"


def test_nonfinite_weights_and_activations_are_named():
    model, x = two_layers(), torch.randn(64, 6)
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="inputs of '2'"):
        osscar.prune(model, x, neurons="0.5", **CHEAP)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"), prepare(model, x):
        pass


def test_a_wrong_group_is_caught_by_the_proof(monkeypatch):
    """A slot that names other rows than the unit's makes a model that computes something else."""
    indices = Slot.indices

    def mirrored(slot, units):
        return indices(slot, {23 - u for u in units} if slot.tensor == "0.weight" else units)

    monkeypatch.setattr(Slot, "indices", mirrored)
    with pytest.raises(EquivalenceError, match="nothing was written"):
        osscar.prune(two_layers(), torch.randn(64, 6), neurons="0.5", form="eager", device="cpu")


# ---- what the model computes is what the user's model computes ---------------------------


class Noting(nn.Module):
    """Writes on itself whenever it runs, and to what it is given; and draws at random."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)
        self.body = nn.Sequential(*layers)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen, self.last = [], None

    def forward(self, x):
        self.calls.add_(1)
        self.seen.append(tuple(x.shape))
        self.last = x.mul_(0.5).mean()
        return self.body(x) + 0 * torch.rand(())


def test_results_do_not_tell_that_they_were_run():
    model, data = Noting().eval(), torch.randn(64, 6)
    model(data)
    given = data.clone()
    before = [int(model.calls), list(model.seen), model.last]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    result = osscar.prune(model, data, flops=0.7)
    assert torch.equal(torch.rand(3), expected)  # nor do random numbers
    assert result.parameters_after < result.parameters_before
    base = PruningRequest(sparsity=0.5)
    points = [*prune_points(model, data, base, jobs(BudgetKind.SPARSITY, (0.3, 0.5)))]
    assert torch.equal(data, given)
    for one in (model, result.model, *(point.model for _, point in points)):
        assert [int(one.calls), one.seen, one.last] == before


def test_certified_layers_have_a_bound_and_a_gap():
    plain, result = (
        osscar.prune(two_layers(), torch.ones(64, 6).cumsum(0).sin(), neurons=0.6, certify=certify)
        for certify in (False, True)
    )
    (layer,) = result.layers
    assert layer.bound_from
    assert 0 <= layer.lower_bound <= layer.loss * (1 + 1e-9)
    assert 0 <= layer.gap <= 1
    assert plain.plan == result.plan
    assert plain.layers[0].gap is None


def test_the_proof_leaves_every_number_format_as_it_was():
    model = tiny("llama-gqa", layers=1).bfloat16()
    formats = {name: tensor.dtype for name, tensor in model.named_buffers()}
    result = osscar.prune(model, tokens(), heads="2/3", neurons=0.5, device="cpu")
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert {name: tensor.dtype for name, tensor in result.model.named_buffers()} == formats
    assert result.certificate.error < 1e-5
    kept = result.model.model.embed_tokens.weight
    assert torch.equal(kept, model.model.embed_tokens.weight)
