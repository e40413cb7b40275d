"""Pruning in the form of modules or of the exported program, from request to checkpoint."""

import copy
import functools
import inspect
import json
import math
import pkgutil
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import TimesformerConfig, TimesformerForVideoClassification

import graph
import osscar
from osscar.base.errors import (
    CheckpointError,
    DataError,
    EquivalenceError,
    ModelError,
    OptionError,
    OutputError,
    RequestError,
)
from osscar.checkpoint.builders import LibraryOrigin
from osscar.checkpoint.manifest import MANIFEST_FILE
from osscar.cli import main
from osscar.proof import program
from osscar.proof.lineage import structure_of
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from osscar.request import PruningRequest
from osscar.run import feasibility
from osscar.shrinking import follow
from tests.osscar.families import tiny, tokens
from tests.osscar.masked import masked
from tests.osscar.programs import CASES, far_apart, without_units

OFTEN = {"device": "cpu", "damp": 1e-3, "correction_weight": 1.0}


def dense_of(case, seed=0):
    kind, shape = CASES[case]
    torch.manual_seed(seed)
    net = kind().eval()
    data = torch.randn(24, *shape, generator=torch.Generator().manual_seed(seed))
    return net, data


def prune(case, **asked):
    net, data = dense_of(case)
    return net, data, osscar.prune(net, data, **{"sparsity": 0.4, **OFTEN, **asked})


pruned = functools.cache(prune)
"""The same, once for all tests that change nothing."""


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """The directory of a smaller program."""
    return pruned("generator")[2].save(tmp_path_factory.mktemp("generator") / "small").path


def smaller_program(net, data, *names, units=None):
    """Return a program without half of the units of some groups, or with those that are given."""
    example = {next(iter(inspect.signature(net.forward).parameters)): data[:2]}
    found = graph.trace(net, example)
    groups = [found.group(name) for name in names] or found.prunable
    plan = PruningPlan(tuple(GroupPlan.of(g, units or tuple(range(0, g.units, 2))) for g in groups))
    return osscar.shrink_program(net, plan, [(data[:3],)], example)


def test_a_form_that_fails_is_not_looked_into_where_another_does(monkeypatch):
    """To find by halving what modules cannot do takes many trials, of which nobody hears."""
    tried = []
    rehearsed = feasibility.rehearse
    monkeypatch.setattr(
        feasibility,
        "rehearse",
        lambda *given, **others: (tried.append(given[1]), rehearsed(*given, **others))[1],
    )
    net, data, result = prune("option A")
    assert result.form is Form.EXPORTED
    assert not result.skipped
    assert isinstance(result.model, osscar.ProgramModule)
    assert result.parameters_after < result.parameters_before
    assert far_apart(result.model(data), without_units(net, result.plan)(data)) < 2.0
    assert len(tried) == 1
    assert len(tried[0].groups) > 1


def test_both_forms_compute_the_same_where_both_follow():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)).eval()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
    data, asked = torch.randn(64, 8), {"sparsity": 0.5, "target": "weights", **OFTEN}
    one = osscar.prune(net, data, **asked)
    other = osscar.prune(net, data, form="exported", **asked)
    assert (one.form, other.form) == (Form.EAGER, Form.EXPORTED)
    assert [g.kept for g in one.plan.groups] == [g.kept for g in other.plan.groups]
    assert one.parameters_after == other.parameters_after
    assert far_apart(one.model(data), other.model(data)) < 1e-5
    # In float32 a wrong slice of little effect would pass for rounding.
    assert one.certificate.error < 1e-12
    assert {p.dtype for m in (one.model, other.model) for p in m.parameters()} == {torch.float32}


def test_modules_alone_leave_them_alone():
    with pytest.warns(UserWarning, match="skipped"):
        _, _, result = prune("heads", form="eager")
    assert result.form is Form.EAGER
    assert [group.kind for group in result.skipped] == ["heads", "heads"]


_IN_WINDOWS = {
    "swin": ("swin_transformer.ShiftedWindowAttention", (12, [2, 3], [1, 1], 4)),
    "swin v2": ("swin_transformer.ShiftedWindowAttentionV2", (12, [2, 3], [1, 1], 4)),
    "maxvit": ("maxvit.RelativePositionalMultiHeadAttention", (12, 3, 4)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", _IN_WINDOWS)
def test_attention_in_windows_loses_heads_in_a_program(name):
    """Its code takes the width of a head, or of all, from that of the stream."""
    pytest.importorskip("torchvision")
    path, arguments = _IN_WINDOWS[name]
    torch.manual_seed(0)
    attention = pkgutil.resolve_name(f"torchvision.models.{path}")(*arguments).eval()
    net, data = nn.Sequential(nn.Linear(5, 12), attention), torch.randn(16, 4, 4, 5)
    result = osscar.prune(net, data, heads="1/2", **OFTEN)
    assert (result.form, result.skipped) == (Form.EXPORTED, ())
    x = torch.randn(3, 4, 4, 5)
    assert far_apart(masked(net, result)(x), result.model(x)) < 1e-5
    assert far_apart(net(x), result.model(x)) > 1e-3


def test_batch_norm_is_renewed_in_a_program():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(16, 6)
            self.last, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)

        def forward(self, x):
            a, b = torch.tanh(self.enter(x)).mean((2, 3)).split(16, 1)
            return self.last(torch.relu(self.norm(self.leave(a * torch.sigmoid(b)))))

    torch.manual_seed(0)
    net, data = Net().eval(), torch.randn(32, 3, 6, 6)
    groups = {"enter.channels": 6}
    kept = osscar.prune(net, data, groups=groups, batch_norm="keep", **OFTEN)
    new = osscar.prune(net, data, groups=groups, **OFTEN)
    assert (kept.form, kept.batch_norms) == (Form.EXPORTED, 0)
    assert (new.form, new.batch_norms) == (Form.EXPORTED, 1)
    assert torch.equal(kept.model.norm.running_mean, net.norm.running_mean)
    seen = []
    whole = without_units(net, new.plan)
    for name in ("leave.weight", "leave.bias"):
        tensor, small = whole.get_parameter(name).data, new.model.get_parameter(name).data
        if tensor.dim() > 1:
            tensor[:, list(new.plan.groups[0].kept)] = small
        else:
            tensor.copy_(small)
    for one in (net, whole):
        one.norm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].var(0, correction=0))
        )
        one(data)
    ratio = new.model.norm.running_var / net.norm.running_var
    eps = net.norm.eps
    torch.testing.assert_close(ratio, (seen[1] + eps) / (seen[0] + eps), rtol=1e-4, atol=1e-5)
    assert float((ratio - 1).abs().max()) > 1e-3


def test_a_program_is_not_timed():
    with pytest.raises(RequestError, match="speedup is timed on modules"):
        PruningRequest(speedup=1.5, form="exported")
    with pytest.raises(OptionError, match="form is"):
        PruningRequest(sparsity=0.5, form="Graph")
    assert PruningRequest(speedup=1.5).form == "auto"


# ---- checkpoints -------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["points", "heads", "option A"])
def test_a_program_is_written_and_read_again(case, tmp_path):
    _, data, result = pruned(case)
    saved = result.save(tmp_path / "small")
    other, _ = dense_of(case, seed=9)
    again = osscar.load(saved.path, dense=other)
    assert isinstance(again, osscar.ProgramModule)
    assert torch.equal(again(data), result.model(data))
    assert list(again.state_dict()) == list(result.model.state_dict())
    twice = osscar.save(again, tmp_path / "twice")
    assert torch.equal(osscar.load(twice.path, dense=other)(data), result.model(data))


class Translates(nn.Module):
    """Layers of torch that attend, with a padded stream in front, as an encoder and decoder."""

    def __init__(self):
        super().__init__()
        options = {"dim_feedforward": 12, "batch_first": True}
        self.encode = nn.TransformerEncoderLayer(8, 4, norm_first=True, **options)
        self.decode = nn.TransformerDecoderLayer(8, 4, **options)
        self.pool = nn.MultiheadAttention(8, 2, bias=False)

    def forward(self, x, y):
        y = self.decode(y, self.encode(x)).transpose(0, 1)
        return self.pool(y[:1], y, y)[0]


@pytest.mark.parametrize("form", [pytest.param("exported", marks=pytest.mark.slow), "eager"])
def test_attention_of_torch_that_lost_heads_is_read_back(form, tmp_path):
    torch.manual_seed(0)
    net, other = Translates().eval(), Translates().eval()
    data = {"x": torch.randn(24, 5, 8), "y": torch.randn(24, 3, 8)}
    result = osscar.prune(net, data, heads=0.5, form=form, **OFTEN)
    assert result.form == form
    assert len(result.layers) == 4
    again = osscar.load(result.save(tmp_path / "small").path, dense=other)
    assert_close(again(**data), result.model(**data))


@pytest.mark.slow
def test_a_program_of_an_encoder_that_lost_heads_is_read_back(tmp_path):
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, norm_first=True).eval()
    data = torch.randn(24, 5, 8)
    result = osscar.prune(net, data, groups={"self_attn.heads": 2}, form="exported", **OFTEN)
    path = result.save(tmp_path / "small").path
    assert torch.equal(osscar.load(path, dense=net)(data), result.model(data))
    # As it was traced, queries, keys and values lie in one slot.
    assert {s.outer for s in graph.trace(net, (data,)).group("self_attn.heads").producers} == {3}
    made = smaller_program(net, data, "self_attn.heads")
    again = osscar.load(osscar.save(made.model, tmp_path / "traced").path, dense=net)
    assert torch.equal(again(data), made.model(data))
    other = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    with pytest.raises(CheckpointError, match=r"cannot be made again of .*give the dense model"):
        osscar.load(path, dense=other)


class Stubborn(nn.Module):
    """A number that only an adapter lets follow."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.sizes = nn.Linear(6, 10), nn.Linear(10, 3), {"width": 10}

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).view(-1, self.sizes["width"]))


def test_a_checkpoint_that_nobody_could_read_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "_ADAPTERS", {})

    @osscar.adapter(Stubborn)
    def adapt(module, group):
        module.sizes = {"width": group.scaled(10)}

    net, data = Stubborn().eval(), torch.randn(24, 6)
    result = osscar.prune(net, data, neurons=0.5, form="eager", **OFTEN)
    monkeypatch.setattr(follow, "_ADAPTERS", {})  # as where the checkpoint is read
    with pytest.raises(EquivalenceError, match="not kept: what was read back fails on inputs"):
        result.save(tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_program_that_cannot_be_made_again_is_not_kept(tmp_path, monkeypatch):
    net, data = dense_of("generator")
    made = smaller_program(net, data, "up.channels").model

    def fail(*given, **options):
        raise graph.TraceError("no program", "", "")

    monkeypatch.setattr(program, "export_standalone", fail)
    with pytest.raises(CheckpointError, match=r"cannot be read, and was not kept: .*no program"):
        osscar.save(made, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    monkeypatch.delattr(made, "osscar_structure")
    with pytest.raises(CheckpointError, match="is not known any more"):
        osscar.save(made, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_what_is_known_of_the_dense_model_takes_no_memory_and_goes_along(generator):
    net, data, result = pruned("generator")
    known = structure_of(result.model)
    assert all(parameter.is_meta for parameter in known.model.parameters())
    assert known.inputs["z"].is_meta
    assert known.inputs["z"].shape == (2, *data.shape[1:])
    assert structure_of(copy.deepcopy(result.model)) is known
    read = osscar.load(generator, dense=dense_of("generator", seed=3)[0])
    assert {p.device.type for p in structure_of(read).model.parameters()} == {"meta"}
    assert not any(parameter.is_meta for parameter in net.parameters())


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
    words = (
        "takes 5 alone along dimension 1 of x and dimension 1 of adjacency and dimension 2 of "
        "adjacency, where the dense model takes other sizes"
    )
    with pytest.warns(UserWarning, match=words):
        net, result = neighbours(by_number=True)
    assert {given.name: given.fixed for given in result.proof.plan.traced} == {
        "x": (1,),
        "adjacency": (1, 2),
    }
    assert result.model(**graphs(5, 4)).shape == (4, 5, 3)
    path = osscar.save(result.model, tmp_path / "small").path
    [plan] = json.loads((path / MANIFEST_FILE).read_text())["lineage"]["plans"]
    assert [given["fixed"] for given in plan["traced"]] == [[1], [1, 2]]
    refused = r"x is of \(2, 7, 4\), and the exported program takes \(any, 5, 4\).*form=eager"
    for one in (result.model, copy.deepcopy(result.model), osscar.load(path, dense=net)):
        with pytest.raises(ModelError, match=refused):
            one(**graphs(7))
    with pytest.raises(ModelError, match=r"x is of \(5, 4\)"):
        result.model(graphs(5)["x"][0], graphs(5)["adjacency"][0])


@pytest.mark.filterwarnings("error:the exported program takes")
def test_a_program_takes_the_sizes_that_torch_leaves_open():
    net, result = neighbours(by_number=False)
    assert not any(given.fixed for given in result.proof.plan.traced)
    plan = result.proof.plan
    for nodes in (3, 9):
        given = graphs(nodes)
        assert far_apart(without_units(net, plan)(**given), result.model(**given)) < 1e-5
    with pytest.raises(ModelError, match=r"x is of \(2, 9, 5\).*takes \(any, any, 4\)"):
        result.model(torch.randn(2, 9, 5), graphs(9)["adjacency"])


def test_a_program_says_what_torch_found_that_it_relies_on():
    class Longer(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.shape[1] > 5 else x * 2)

    torch.manual_seed(0)
    net, x = Longer(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(3, 7, 4)
    model = smaller_program(net, x).model
    assert model(torch.randn(3, 6, 4)).shape == (3, 6, 3)
    with pytest.raises(ModelError, match=r"does not hold for x of \(3, 4, 4\), but where x"):
        model(torch.randn(3, 4, 4))


@pytest.mark.slow
def test_a_program_of_torchvision_needs_no_dense_model(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    net = LibraryOrigin("torchvision", "squeezenet1_1", {"num_classes": 5}).build().eval()
    data = torch.randn(8, 3, 64, 64)
    group = graph.trace(net, (data[:2],)).prunable[1]
    result = osscar.prune(net, data, groups={group.name: 5}, form="exported", **OFTEN)
    assert result.form is Form.EXPORTED
    path = result.save(tmp_path / "small").path
    assert torch.equal(osscar.load(path)(data), result.model(data))
    monkeypatch.setattr("sys.argv", ["osscar", "export", str(path), "--format", "pt2"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert (tmp_path / "small.pt2").is_file()


def test_a_program_is_an_archive_of_torch_export(tmp_path):
    _, data, result = pruned("points")
    written = osscar.export_pt2(result.model, tmp_path / "net.pt2")
    assert written.bytes == (tmp_path / "net.pt2").stat().st_size
    assert written.inputs == {"x": "float32 (batch, 3, x_2)"}
    again = torch.export.load(tmp_path / "net.pt2").module()
    for count in (2, 7):
        assert far_apart(result.model(data[:count]), again(x=data[:count])) < 1e-5
    with pytest.raises(OutputError, match="is there already"):
        osscar.export_pt2(result.model, tmp_path / "net.pt2")
    with pytest.raises(DataError, match="not known what this Linear takes"):
        osscar.export_pt2(nn.Linear(3, 3), tmp_path / "other.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


DAMAGES = (
    *({"dtype": "object"}, {"name": "not a name"}, {"name": "other"}),
    *({"shape": [2**20, 2**20]}, {"shape": []}, {"shape": [0, 8]}, {"shape": [2, 9]}),
    *({"varies": [7]}, {"shape": [2] + [1] * 20_000, "varies": []}),  # traced without an end
)


def test_a_damaged_description_of_inputs_is_refused(generator, tmp_path):
    path = shutil.copytree(generator, tmp_path / "small")
    dense, written = dense_of("generator")[0], (generator / MANIFEST_FILE).read_text()
    for change in DAMAGES:
        manifest = json.loads(written)
        manifest["lineage"]["plans"][0]["traced"][0].update(change)
        (path / MANIFEST_FILE).write_text(json.dumps(manifest))
        with pytest.raises(osscar.OsscarError):
            osscar.load(path, dense=dense)


def test_a_program_is_shrunk_again(tmp_path):
    _, data, first = pruned("generator")
    second = smaller_program(first.model, data, "up.channels", units=(0, 2, 3))
    path = osscar.save(second.model, tmp_path / "small").path
    again = osscar.load(path, dense=dense_of("generator")[0])
    assert torch.equal(again(data), second.model(data))
    plan = second.proof.plan
    assert far_apart(without_units(first.model, plan)(data), again(data)) < 1e-5


def test_a_program_is_not_refitted():
    """Its weights are read by operators, not by modules that could be asked for their inputs."""
    _, data, first = pruned("generator")
    with pytest.raises(RequestError, match="no group of this model can be pruned"):
        osscar.prune(first.model, data, sparsity=0.3, **OFTEN)


@pytest.mark.slow
def test_a_language_model_as_a_program(tmp_path):
    model, windows = tiny("llama-gqa", layers=1), tokens(6, 24)
    asked = {"heads": "1/2", "neurons": "1/2", **OFTEN}
    result = osscar.prune(model, windows, form="exported", **asked)
    assert result.form is Form.EXPORTED
    assert osscar.prune(model, windows, **asked).form is Form.EAGER
    assert list(inspect.signature(result.model.forward).parameters) == ["input_ids"]
    path = result.save(tmp_path / "small").path
    expected = result.model(input_ids=windows).logits
    again = osscar.load(path)
    assert_close(again(input_ids=windows).logits, expected)
    with_dense = osscar.load(path, dense=tiny("llama-gqa", seed=3, layers=1))
    assert_close(with_dense(input_ids=windows).logits, expected)
    twice = osscar.save(copy.deepcopy(again), tmp_path / "twice").path
    assert_close(osscar.load(twice)(input_ids=windows).logits, expected)


@pytest.mark.slow
def test_a_model_of_images_whose_code_cannot_follow_becomes_a_program(tmp_path):
    config = TimesformerConfig(
        image_size=8, patch_size=4, num_frames=2, hidden_size=12, num_hidden_layers=1,
        num_attention_heads=3, intermediate_size=20, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = TimesformerForVideoClassification(config).eval()
    data = torch.randn(24, 2, 3, 8, 8)  # frames come before channels
    result = osscar.prune(dense, data, sparsity=0.4, strict=True, **OFTEN)
    assert result.form is Form.EXPORTED
    assert {layer.kind for layer in result.layers} == {"heads", "neurons"}
    assert result.certificate.error < 1e-12
    again = osscar.load(result.save(tmp_path / "program").path)
    assert_close(logits(again(data)), logits(result.model(data)))


def logits(output):
    return output["logits"] if isinstance(output, dict) else output.logits


@pytest.fixture(scope="module")
def of_transformers():
    return smaller_program(tiny("opt", layers=1), tokens(6, 24)).model


def test_a_program_of_code_that_transformers_lacks_needs_its_dense_model(of_transformers, tmp_path):
    own = copy.deepcopy(of_transformers)
    kind, config = own.built_by
    own.built_by = type("Own", (kind,), {}), config  # a name that no directory leads to
    path = osscar.save(own, tmp_path / "small").path
    with pytest.raises(CheckpointError, match=r"build the dense model and give it \(dense=\)"):
        osscar.load(path)
    assert "a OPTForCausalLM of your own code" in (path / "README.md").read_text()
    again = osscar.load(path, dense=tiny("opt", seed=3, layers=1))
    windows = tokens(2, 24)
    assert_close(again(input_ids=windows).logits, own(input_ids=windows).logits)


def test_no_command_scores_or_prunes_a_program_of_transformers(
    of_transformers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = osscar.save(of_transformers, tmp_path / "small").path
    for name, *rest in (["eval"], ["inspect"], ["prune", "--sparsity", "0.2", "--out", "other"]):
        monkeypatch.setattr("sys.argv", ["osscar", name, str(path), *rest])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code
        told = " ".join(capsys.readouterr().err.split())
        assert "the exported program of a model of transformers" in told
        assert "osscar.load runs it in Python" in told
    assert not (tmp_path / "other").exists()


def test_samples_that_no_plan_could_tell_of_are_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr("osscar.proof.plan._MOST_TRACED", 15)
    monkeypatch.setattr("osscar.run.chain.prune_groups", None)  # which would fail
    with pytest.raises(EquivalenceError, match=r"z float\d+ \(2, 8\).*up to 15 numbers"):
        prune("generator", form="exported")


@pytest.mark.slow
def test_the_command_line_prunes_a_language_model_as_a_program(tmp_path, monkeypatch, capsys):
    options = ["--neurons", "0.7", "--samples", "4", "--seqlen", "32", "--device", "cpu"]
    asked = ["prune", "demo", "--out", str(tmp_path / "small"), "--form", "exported", *options]
    monkeypatch.setattr("sys.argv", ["osscar", *asked, "--backend", "magnitude"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "form: the exported program\n" in printed  # which was asked for, not found better
    assert "osscar eval" not in printed
    report = json.loads((tmp_path / "small" / "osscar_report.json").read_text())
    assert report["forward"]["pruned"]["flops"] < report["forward"]["dense"]["flops"]


def test_units_in_several_places_are_pruned_and_refitted(tmp_path):
    net, data = dense_of("uneven heads")
    result = osscar.prune(net, data, heads="1/2", form="exported", target="weights", damp=1e-3)
    assert {len(group.kept) for group in result.plan.groups} == {1, 2}
    slots = [slot for group in result.plan.groups for slot in group.slots]
    places = [slot for slot in slots if slot.tensor == "qkv.weight"]
    assert len(places) == 6
    assert result.model.get_parameter("qkv.weight").shape == (3 * 3 * 4, 16)
    refitted = copy.deepcopy(net)
    small = dict(result.model.named_parameters())
    kept = [i for g in result.plan.groups for s in g.consumers for i in s.indices(g.kept)]
    with torch.no_grad():
        refitted.out.weight.zero_()
        refitted.out.weight[:, sorted(kept)] = small["out.weight"]
        refitted.out.bias.copy_(small["out.bias"])
        assert far_apart(refitted(data), result.model(data)) < 1e-5
        # Refitted in turn: the second group on what was made of the first.
        plain = without_units(net, result.plan)
        assert (refitted(data) - net(data)).norm() < (plain(data) - net(data)).norm()
    again = osscar.load(result.save(tmp_path / "smaller").path, dense=net)
    assert torch.equal(again(data), result.model(data))


class LazyMask(nn.Module):
    """Keeps a mask for the next call, as wide as its heads are many."""

    def __init__(self):
        super().__init__()
        self.enter, self.qkv = nn.Linear(5, 16), nn.Linear(16, 48)
        self.out, self.leave = nn.Linear(16, 16), nn.Linear(16, 3)
        self.mask = None

    def forward(self, x):
        x = self.enter(x)
        length = x.shape[1]
        if self.mask is None or self.mask.shape[-1] < length:
            self.mask = torch.full((4, length, length), -1e4).triu(1)
        q, k, v = (p.unflatten(-1, (4, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        mask = self.mask[:, :length, :length]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.leave(x + self.out(mixed.transpose(1, 2).flatten(-2)))


def test_what_a_model_keeps_for_its_next_call_is_no_part_of_its_program(tmp_path):
    torch.manual_seed(0)
    model, x = LazyMask().eval(), torch.randn(3, 6, 5)
    small = smaller_program(model, x, "heads").model
    assert model.mask is None
    again = osscar.load(osscar.save(small, tmp_path / "small").path, dense=LazyMask().eval())
    longer = torch.randn(2, 9, 5)
    assert_close(again(x), small(x))
    assert torch.equal(again(longer), small(longer))
