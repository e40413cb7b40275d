"""Pruning in the form of modules or of the exported program, from request to checkpoint."""

import copy
import inspect
import math

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

import graph
import osscar
from osscar.base.errors import (
    CheckpointError,
    ModelError,
    RequestError,
)
from osscar.proof import program
from osscar.proof.lineage import lineage_of, structure_of
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from tests.osscar.families import tiny, tokens
from tests.osscar.masked import masked
from tests.osscar.programs import CASES, far_apart, without_units

OFTEN = {"device": "cpu", "damp": 1e-3, "correction_weight": 1.0}


def dense_of(case, seed=0):
    kind, shape = CASES[case]
    torch.manual_seed(seed)
    return kind().eval(), torch.randn(24, *shape)


def smaller_program(net, data, *names, units=None):
    """Return a program without half of the units of some groups, or with those that are given."""
    example = {next(iter(inspect.signature(net.forward).parameters)): data[:2]}
    found = graph.trace(net, example)
    groups = [found.group(name) for name in names] or found.prunable
    plan = PruningPlan(tuple(GroupPlan.of(g, units or tuple(range(0, g.units, 2))) for g in groups))
    return osscar.shrink_program(net, plan, [(data[:3],)], example)


def test_both_forms_are_refitted_alike_where_both_follow():
    torch.manual_seed(0)
    layers = (nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 6))
    net = nn.Sequential(*layers, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    data, asked = torch.randn(64, 8), {"groups": {"0.neurons": 9}, "target": "weights", **OFTEN}
    one = osscar.prune(net, data, **asked)
    other = osscar.prune(net, data, form="exported", **asked)
    assert (one.form, other.form) == (Form.EAGER, Form.EXPORTED)
    assert [g.kept for g in one.plan.groups] == [g.kept for g in other.plan.groups]
    assert one.batch_norms == other.batch_norms == 2
    assert far_apart(one.model[4].running_var, net[4].running_var) > 1e-3
    for name, tensor in one.model.state_dict().items():
        assert_close(other.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
    # In float32 a wrong slice of little effect would pass for rounding.
    assert one.certificate.error < 1e-12
    assert {p.dtype for m in (one.model, other.model) for p in m.parameters()} == {torch.float32}


def test_units_in_several_places_are_pruned_and_refitted():
    net, data = dense_of("uneven heads")
    result = osscar.prune(net, data, heads="1/2", form="exported", target="weights", damp=1e-3)
    assert {len(group.kept) for group in result.plan.groups} == {1, 2}
    slots = [slot for group in result.plan.groups for slot in group.slots]
    assert len([slot for slot in slots if slot.tensor == "qkv.weight"]) == 6
    assert result.model.get_parameter("qkv.weight").shape == (3 * 3 * 4, 16)
    with torch.no_grad():
        refitted = masked(net, result)
        assert far_apart(refitted(data), result.model(data)) < 1e-5
        # Refitted in turn: the second group on what was made of the first.
        plain = without_units(net, result.plan)
        assert (refitted(data) - net(data)).norm() < (plain(data) - net(data)).norm()


# ---- checkpoints -------------------------------------------------------------------------


def test_a_program_is_written_and_read_again_and_knows_its_dense_model(runs, tmp_path):
    net, data, result = (getattr(runs["program"], name) for name in ("dense", "data", "result"))
    assert isinstance(result.model, osscar.ProgramModule)
    known = structure_of(result.model)
    assert all(parameter.is_meta for parameter in known.parameters())
    assert lineage_of(result.model).sample.inputs["z"].shape == (2, *data.shape[1:])
    assert structure_of(copy.deepcopy(result.model)) is known
    assert not any(parameter.is_meta for parameter in net.parameters())

    other, _ = dense_of("generator", seed=9)
    again = osscar.load(result.save(tmp_path / "small").path, dense=other)
    assert isinstance(again, osscar.ProgramModule)
    assert torch.equal(again(data), result.model(data))
    assert list(again.state_dict()) == list(result.model.state_dict())
    assert {p.device.type for p in structure_of(again).parameters()} == {"meta"}
    second = smaller_program(again, data, "up.channels", units=(0, 2, 3))
    twice = osscar.load(osscar.save(second.model, tmp_path / "twice").path, dense=other)
    assert torch.equal(twice(data), second.model(data))
    assert far_apart(without_units(again, second.proof.plan)(data), twice(data)) < 1e-5
    # Its weights are read by operators, not by modules that could be asked for their inputs.
    with pytest.raises(RequestError, match="no group of this model can be pruned"):
        osscar.prune(again, data, sparsity=0.3, **OFTEN)


def test_a_program_that_cannot_be_made_again_is_not_kept(tmp_path, monkeypatch):
    made = smaller_program(*dense_of("generator"), "up.channels").model

    def fail(*given, **options):
        raise graph.TraceError("no program", "", "")

    monkeypatch.setattr(program, "export_standalone", fail)
    with pytest.raises(
        CheckpointError, match=r"cannot be read and run, and was not kept: .*no program"
    ):
        osscar.save(made, tmp_path / "small")
    assert not list(tmp_path.iterdir())


# ---- which inputs a program takes --------------------------------------------------------


class Neighbours(nn.Module):
    """A graph network; what scales its sums is computed in torch, or by Python of a number."""

    def __init__(self, by_number):
        super().__init__()
        self.by_number = by_number
        self.up, self.mix, self.down = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x, adjacency):
        nodes = x.shape[1]
        scale = math.sqrt(nodes) if self.by_number else adjacency.sum(-1, keepdim=True)
        x = torch.relu(adjacency @ self.up(x) / scale)
        return self.down(torch.relu(self.mix(adjacency @ x)))


def graphs(nodes, count=2):
    return {"x": torch.randn(count, nodes, 4), "adjacency": torch.rand(count, nodes, nodes)}


def neighbours(by_number):
    torch.manual_seed(0)
    net = Neighbours(by_number).eval()
    group = graph.trace(net, tuple(graphs(5).values())).group("up.neurons")
    plan = PruningPlan((GroupPlan.of(group, tuple(range(0, 12, 2))),))
    return net, osscar.shrink_program(net, plan, [graphs(5), graphs(5, 1)], graphs(5))


def test_a_program_says_which_sizes_it_takes_no_others_of(tmp_path):
    net, result = neighbours(by_number=True)
    (said,) = result.proof.certificate.structure.sizes
    assert "x (any, 5, 4), adjacency (any, 5, 5)" in said
    assert result.model(**graphs(5, 4)).shape == (4, 5, 3)
    path = osscar.save(result.model, tmp_path / "small").path
    refused = (
        r"takes x of shape \(any, 5, 4\), with which it was traced, and not \(2, 7, 4\)"
        r".*\(form eager, `--set form=eager`\)$"
    )
    for one in (result.model, copy.deepcopy(result.model), osscar.load(path, dense=net)):
        with pytest.raises(ModelError, match=refused):
            one(**graphs(7))


def test_a_program_takes_the_sizes_that_torch_leaves_open():
    net, result = neighbours(by_number=False)
    plan = result.proof.plan
    for nodes in (3, 9):
        given = graphs(nodes)
        assert far_apart(without_units(net, plan)(**given), result.model(**given)) < 1e-5


# ---- programs of transformers ------------------------------------------------------------


@pytest.fixture(scope="module")
def of_transformers():
    return smaller_program(tiny("opt", layers=1), tokens(6, 24)).model


@pytest.mark.slow
def test_a_program_of_transformers_is_read_without_its_dense_model_unless_of_own_code(
    of_transformers, tmp_path
):
    windows = tokens(2, 24)
    expected = of_transformers(input_ids=windows).logits
    path = osscar.save(of_transformers, tmp_path / "stock").path
    assert_close(osscar.load(path)(input_ids=windows).logits, expected)
    own = copy.deepcopy(of_transformers)
    kind, config = own.built_by
    own.built_by = type("Own", (kind,), {}), config  # a name that no directory leads to
    path = osscar.save(own, tmp_path / "small").path
    with pytest.raises(CheckpointError, match=r"give what builds the dense one \(dense, "):
        osscar.load(path)
    assert "a OPTForCausalLM of your own code" in (path / "README.md").read_text()
    again = osscar.load(path, dense=tiny("opt", seed=3, layers=1))
    assert_close(again(input_ids=windows).logits, expected)


@pytest.mark.slow
def test_heads_leave_with_their_slopes_in_a_program_of_transformers():
    torch.manual_seed(0)
    # 6 heads are no power of two, for which slopes are made in two ways.
    sizes = {"d_model": 48, "n_heads": 6, "n_layers": 1, "vocab_size": 64, "max_seq_len": 64}
    model = hf.AutoModelForCausalLM.from_config(hf.MptConfig(**sizes, use_cache=False)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 64, (8, 12))
    with pytest.raises(RequestError, match="numbers that the code makes"):
        osscar.prune(model, ids, heads="1/2")  # in modules, as it can generate text
    result = osscar.prune(
        model, ids, heads="1/2", form="exported", backend="magnitude", device="cpu"
    )
    expected = masked(model, result)(ids[:3, :9]).logits
    assert far_apart(expected, result.model(ids[:3, :9]).logits) < 1e-5
    assert far_apart(expected, model(ids[:3, :9]).logits) > 1e-2
