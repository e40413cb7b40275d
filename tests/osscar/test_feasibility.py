"""What cannot follow is found before anything is solved, skipped, and named."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import osscar
from osscar.allocation.allocate import provisional
from osscar.allocation.widths import asked_groups
from osscar.base.errors import AdapterError, EquivalenceError, RequestError
from osscar.cli import main
from osscar.preparation.prepare import prepare
from osscar.proof.plan import Form
from osscar.request import PruningRequest
from osscar.run import feasibility as feasibility_room
from osscar.run.chain import prepare_for
from osscar.run.feasibility import feasible_groups
from osscar.run.points import BudgetKind, SweepJob, jobs, prune_points
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog
from tests.osscar.families import tiny, tokens
from tests.osscar.masked import masked
from tests.osscar.networks import images, small_net

WIDTH = 16


@pytest.fixture(autouse=True)
def modules_alone(monkeypatch):
    """Most of these networks follow as programs, which is another matter: see `test_forms`."""
    monkeypatch.setitem(feasibility_room.FORMS, "auto", (Form.EAGER,))


class Attention(nn.Module):
    """Takes the width of a head from the width of the stream."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)
        )

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Blocks whose heads cannot follow, and whose neurons can."""

    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


class Generator(nn.Module):
    """Reads channels from features by a size that is written down, as generators do."""

    def __init__(self):
        super().__init__()
        self.enter, self.up = nn.Linear(8, 64 * 4 * 4), nn.ConvTranspose2d(64, 12, 2, stride=2)
        self.leave = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, z):
        x = torch.relu(self.enter(z)).view(-1, 64, 4, 4)
        return self.leave(torch.relu(self.up(x)))


class Gated(nn.Module):
    """A gate of a written size, its halves largest against each other, and a plain layer."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 64), nn.Linear(32, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        a, b = self.enter(x).split(32, -1)
        return self.head(torch.tanh(self.leave(self.gated(a, b))))

    def gated(self, a, b):
        return a * F.gelu(b)


class MaxOut(Gated):
    def gated(self, a, b):
        return torch.maximum(a, b)


class OptionA(nn.Module):
    """A residual network whose shortcut adds zeros for the channels that it lacks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(torch.relu(self.wide(x) + shortcut).mean((2, 3)))


class Pair(nn.Module):
    """Two layers of which either may be narrower, but not both."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 16), nn.Linear(8, 16)
        self.join, self.head = nn.Linear(32, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = torch.cat((self.one(x), self.other(x)), -1)
        if y.shape[-1] < 20:
            raise ValueError(f"{y.shape[-1]} features are too few")
        return self.head(torch.tanh(self.join(torch.relu(y))))


class Quartet(nn.Module):
    """Four layers side by side: the first cannot be narrower, nor the second and last together."""

    def __init__(self):
        super().__init__()
        self.bad, self.one = nn.Linear(8, 16), nn.Linear(8, 16)
        self.plain, self.two = nn.Linear(8, 16), nn.Linear(8, 16)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        one, two = self.one(x), self.two(x)
        if one.shape[-1] + two.shape[-1] < 20:
            raise ValueError("features are too few")
        parts = (self.bad(x).view(-1, 16), one, self.plain(x), two)
        return self.head(torch.relu(torch.cat(parts, -1)))


class Stubborn(nn.Module):
    """Nothing can follow."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.one(x)).view(-1, 16)
        return self.three(torch.relu(self.two(x)).view(-1, 12))


def built(network, seed=0):
    torch.manual_seed(seed)
    return network()


def rows(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words():
    return rows(48, 6, WIDTH)


def assert_equals_the_masked_model(dense, result, x):
    with torch.no_grad():
        expected = masked(copy.deepcopy(dense).double(), result)(x.double())
        found = copy.deepcopy(result.model).double()(x.double())
        assert (expected - copy.deepcopy(dense).double()(x.double())).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def left(result):
    return [group.name for group in result.skipped]


def left_of(followed):
    return [group.name for group in followed[1]]


def tried(network, data, **asked):
    """Return what can follow of a network, which is solved by nobody."""
    request = PruningRequest(**asked, device="cpu")
    with prepare_for(network, data, request) as prepared:
        return feasible_groups(prepared, request)


@pytest.fixture
def tries(monkeypatch):
    """The plans that are tried, in this order."""
    tried = []

    def rehearse(model, plan, inputs, programs):
        tried.append([group.name for group in plan.groups])
        return original(model, plan, inputs, programs)

    original = feasibility_room.rehearse
    monkeypatch.setattr(feasibility_room, "rehearse", rehearse)
    return tried


# ---- what is left, and what is not -------------------------------------------------------

HEADS = ["blocks.0.attn.heads", "blocks.1.attn.heads"]
NEURONS = ["blocks.0.mlp.neurons", "blocks.1.mlp.neurons"]
CASES = {
    "attention": (Transformer, words, HEADS, "(B, N, 3, self.num_heads, C // self.num_heads)"),
    "generator": (Generator, lambda: rows(48, 8), ["enter.channels"], "view(-1, 64, 4, 4)"),
    "gated": (Gated, lambda: rows(48, 8), ["enter.neurons"], "self.enter(x).split(32, -1)"),
    "max-out": (MaxOut, lambda: rows(48, 8), ["enter.neurons"], "self.enter(x).split(32, -1)"),
    "shortcut": (OptionA, images, ["wide.channels", "wide.channels.2"], "self.wide(x) + shortcut"),
}


def asked_of(network):
    """Return what to keep of each kind of groups that a network has."""
    kinds = {Transformer: ("heads", "neurons"), OptionA: ("channels", "residual")}
    kinds |= {Generator: ("channels",), Pair: ("neurons",)}
    return dict.fromkeys(kinds.get(network, ("neurons",)), "1/2")


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("name", CASES)
def test_what_cannot_follow_is_skipped_and_all_else_is_pruned(name):
    network, data, expected, line = CASES[name]
    dense = built(network)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    result = osscar.prune(dense, data(), **asked_of(network), device="cpu")
    assert left(result) == expected
    for group in result.skipped:
        place = group.name.removesuffix(".heads") if network is Transformer else "the model"
        assert group.reason.startswith(f"module {place!r} (")
        assert line in group.reason
    assert result.layers
    assert all(layer.kept == layer.units // 2 for layer in result.layers)
    shapes = {key: value.shape for key, value in result.model.state_dict().items()}
    for slot in (s for g in result.plan.groups for s in g.slots if g.name in expected):
        assert shapes[slot.tensor] == before[slot.tensor].shape
    assert_equals_the_masked_model(dense, result, data()[:5])
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_budget_does_not_count_what_is_skipped(name, allocation):
    network, data, expected, _ = CASES[name]
    dense = built(network)
    asked = {"sparsity": 0.5, "allocation": allocation, "device": "cpu"}
    result = osscar.prune(dense, data(), **asked)
    assert left(result) == expected
    budget, skipped = result.budget, osscar.prune(dense, data(), **asked, skip=expected)
    assert not set(budget.widths) & set(expected)
    assert budget.widths == skipped.budget.widths
    assert budget.tightest.limit == skipped.budget.tightest.limit
    assert budget.tightest.reached == result.parameters_after == skipped.parameters_after
    assert result.plan == skipped.plan
    for key, value in skipped.model.state_dict().items():  # a trial leaves no trace
        assert torch.equal(value, result.model.state_dict()[key]), key
    if allocation == "uniform":
        assert all(width.kept == width.units // 2 for width in budget.widths.values())
    else:
        assert budget.tightest.reached <= budget.tightest.limit


def test_users_are_warned_by_name():
    with pytest.warns(UserWarning, match=r"skipped.*'blocks\.0\.attn\.heads'; 'blocks\.1"):
        tried(built(Transformer), words(), sparsity=0.5)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_group_that_was_named_is_skipped_too():
    named = {HEADS[0]: 2, NEURONS[1]: 9}
    result = osscar.prune(built(Transformer), words(), groups=named, device="cpu")
    assert left(result) == HEADS[:1]
    assert [(layer.name, layer.kept) for layer in result.layers] == [(NEURONS[1], 9)]


@pytest.mark.filterwarnings("ignore:skipped")
def test_groups_that_go_alone_but_not_together(tries):
    dense, data = built(Pair), rows(48, 8)
    for one in ("one", "other"):  # each can go by itself
        named = {f"{one}.neurons": 8, "join.neurons": 6}
        assert not tried(dense, data, groups=named)[1]
    tries.clear()
    result = osscar.prune(dense, data, neurons="1/2", device="cpu")
    join, one, other = "join.neurons", "one.neurons", "other.neurons"
    assert tries == [[join, one, other], [join], [join, one]]  # what has failed is not tried again
    assert left(result) == [other]
    assert "16 features are too few" in result.skipped[0].reason
    assert [layer.name for layer in result.layers] == [one, join]
    assert_equals_the_masked_model(dense, result, data[:5])


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_group_is_tried_together_with_all_that_go():
    found = tried(built(Quartet), rows(48, 8), neurons="1/2")
    assert left_of(found) == ["two.neurons", "bad.neurons"]


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_budget_that_cannot_be_met_says_what_is_skipped():
    with pytest.raises(RequestError, match=r"cannot be met.*skipped.*blocks\.1\.attn\.heads"):
        osscar.prune(built(Transformer), words(), params=0.4, device="cpu")


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_budget_that_only_what_is_skipped_would_share_is_refused():
    with pytest.raises(RequestError, match=r"nothing is left for it.*skipped.*attn\.heads"):
        osscar.prune(built(Transformer), words(), neurons=0.5, sparsity=0.3, device="cpu")


# ---- errors ------------------------------------------------------------------------------


def test_a_model_in_which_nothing_can_follow_is_refused_with_all_reasons():
    refused = pytest.raises(AdapterError, match=r"none of 2 groups can follow.*@osscar\.adapter")
    with refused as caught:
        tried(built(Stubborn), rows(48, 8), sparsity=0.5)
    for said in ("'one.neurons': module", "view(-1, 16)", "'two.neurons': module", "view(-1, 12)"):
        assert said in str(caught.value)


def test_a_strict_request_is_refused_before_anything_is_solved():
    with pytest.raises(AdapterError, match=r"2 of 4 groups cannot follow.*skip=") as caught:
        tried(built(Transformer), words(), sparsity=0.5, strict=True)
    for said in (*HEADS, "C // self.num_heads"):
        assert said in str(caught.value)


def test_a_strict_request_that_can_be_met_is():
    assert not tried(built(Transformer), words(), neurons="1/2", strict=True)[1]


def test_outputs_that_differ_are_a_reason():
    """Code that runs with fewer units, and computes something else."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            y = torch.relu(self.enter(x))
            return self.leave(y * y.shape[-1] ** -0.5)

    with pytest.raises(EquivalenceError, match="'neurons': the shrunk model's output differs"):
        tried(built(Scaled), rows(48, 8), sparsity=0.5)


# ---- the search --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-gqa", "images"])
def test_one_trial_is_enough_where_all_can_follow(kind, tries):
    model, data = (small_net(), images()) if kind == "images" else (tiny(kind), tokens())
    assert not tried(model, data, sparsity=0.5)[1]
    assert len(tries) == 1
    with prepare(model, data) as prepared:
        shared = asked_groups(prepared, PruningRequest(sparsity=0.5))[2]
    assert set(tries[0]) == {group.name for group in shared}


@pytest.mark.filterwarnings("ignore:skipped")
def test_few_trials_find_what_cannot_follow(tries):
    depth = 4
    found = tried(built(lambda: Transformer(depth)), words(), sparsity=0.5)
    assert left_of(found) == [f"blocks.{i}.attn.heads" for i in range(depth)]
    assert len(tries) <= 2 * depth + 1
    neurons = {f"blocks.{i}.mlp.neurons" for i in range(depth)}
    assert {name for name in tries[-1] if name.endswith("neurons")} == neurons


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_trial_leaves_the_model_as_it_was():
    class Counting(Gated):
        """Keeps a table for each number of samples, and counts its calls."""

        def __init__(self):
            super().__init__()
            self.tables, self.calls = {}, 0

        def forward(self, x):
            self.calls += 1
            if len(x) not in self.tables:
                self.tables[len(x)] = self.head.bias.new_ones(len(x), 1)
            return super().forward(x) * self.tables[len(x)]

    request = PruningRequest(sparsity=0.5, device="cpu")
    with prepare_for(built(Counting), rows(9, 8), request) as prepared:
        held = [(module, type(module), dict(vars(module))) for module in prepared.model.modules()]
        values = {key: value.clone() for key, value in prepared.model.state_dict().items()}
        seen = (list(prepared.model.tables), prepared.model.calls)
        kept = {id(parameter) for parameter in prepared.model.parameters()}
        assert feasible_groups(prepared, request)[1]
        for module, kind, attributes in held:
            assert type(module) is kind
            assert vars(module).keys() == attributes.keys()
        assert {id(parameter) for parameter in prepared.model.parameters()} == kept
        assert all(torch.equal(v, values[k]) for k, v in prepared.model.state_dict().items())
        assert (list(prepared.model.tables), prepared.model.calls) == seen


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"sparsity": 0.5}, {"heads": (3, 1), "neurons": (13, 11)}),
        ({"sparsity": 0.5, "round_to": 8}, {"heads": (2, 2), "neurons": (16, 8)}),
        ({"params": 0.9, "allocation": "uniform"}, {"heads": (3, 1), "neurons": (13, 11)}),
        ({"sparsity": 0.5, "neurons": "2/3"}, {"heads": (3, 1), "neurons": (16, 16)}),
        ({"neurons": 7}, {"neurons": (7, 7)}),
    ],
)
def test_the_widths_that_are_tried(asked, kept):
    request = PruningRequest(device="cpu", **asked)
    with prepare_for(built(Transformer), words(), request) as prepared:
        found = provisional(prepared, request)
    assert found == {
        f"blocks.{i}.{'attn' if kind == 'heads' else 'mlp'}.{kind}": count[i]
        for i in (0, 1)
        for kind, count in kept.items()
    }


# ---- runs that go on, and sweeps ---------------------------------------------------------


HALF = {"heads": "1/2", "neurons": "1/2", "device": "cpu"}


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def killed(log, request, monkeypatch):
    """Run until one group is committed."""

    def append(self, index, record):
        original(self, index, record)
        raise Killed

    original = RunLog.append
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "append", append)
        with pytest.raises(Killed):
            prune_as_asked(built(Transformer), words(), request, log)
    assert log.committed == 1


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_run_that_goes_on_skips_the_same(tmp_path, monkeypatch):
    request, log = PruningRequest(**HALF), RunLog(tmp_path / "log")
    whole = prune_as_asked(built(Transformer), words(), request)
    killed(log, request, monkeypatch)
    again = prune_as_asked(built(Transformer), words(), request, log)
    assert left(again) == HEADS
    assert again.skipped == whole.skipped
    assert again.plan == whole.plan
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_sweep_tries_once(tries):
    base = PruningRequest(sparsity=0.3, device="cpu")
    points = (
        *jobs(BudgetKind.SPARSITY, (0.3, 0.6), allocation="uniform"),
        SweepJob("wanda", BudgetKind.SPARSITY, 0.5),
    )
    found = dict(prune_points(built(Transformer), words(), base, points))
    swept = list(tries)
    tries.clear()
    alone = prune_as_asked(built(Transformer), words(), points[1].request(base))
    assert tries == swept
    assert tuple(found) == points
    for result in found.values():
        assert left(result) == HEADS
        assert [layer.name for layer in result.layers] == NEURONS
    assert found[points[1]].plan == alone.plan


# ---- the command -------------------------------------------------------------------------

CODE = """
import torch
from torch import nn
from tests.osscar.test_feasibility import Transformer, WIDTH

class Patches(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.patch, self.rest = nn.Conv2d(3, WIDTH, 4, stride=4), Transformer(depth)

    def forward(self, x):
        return self.rest(self.patch(x).flatten(2).transpose(1, 2))

def build(depth=2):
    torch.manual_seed(0)
    return Patches(depth), torch.zeros(2, 3, 8, 8)

def one_block():
    return build(1)
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `osscar prune` on a file of code; return status, standard output and standard error."""
    (tmp_path / "osscar_test_patches.py").write_text(CODE)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), dtype="uint8")
    np.savez(tmp_path / "images.npz", images=pixels)
    monkeypatch.chdir(tmp_path)

    def call(*more, command="prune", model="build"):
        arguments = (
            command,
            f"osscar_test_patches.py:{model}",
            "--calibration",
            "images.npz",
            "--no-normalize",
        )
        shared = ("--sparsity", 0.5, "--allocation", "uniform")
        arguments = (*arguments, *shared, "--out", "small", "--device", "cpu", *more)
        monkeypatch.setattr(sys, "argv", ["osscar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    yield call
    sys.modules.pop("osscar_test_patches", None)


def test_the_command_says_what_is_skipped_and_why(run, tmp_path):
    status, out, err = run("--json", "run.json")
    assert status == 0, err
    table = out.partition("Skipped groups")[2]
    document = json.loads((tmp_path / "run.json").read_text())
    page = (tmp_path / "small" / "report.html").read_text().partition("<h2>Skipped groups")[2]
    assert document["schema"] == "osscar.prune/5"
    assert [group["name"] for group in document["skipped"]] == [f"rest.{n}" for n in HEADS]
    for group in document["skipped"]:
        assert (group["kind"], group["units"]) == ("heads", 4)
        assert "C // self.num_heads" in group["reason"]
        assert group["name"] in table
        assert group["name"] in page
    assert table.count("4 heads") == 2
    assert page.count("self.num_heads, C // self.num_heads)") == 2
    assert {layer["name"] for layer in document["layers"]} == {f"rest.{name}" for name in NEURONS}


def test_a_sweep_says_what_is_skipped_too(run, tmp_path):
    asked = ("--backend", "magnitude", "--json", "sweep.json")
    for _ in range(2):  # the second time from what is kept
        status, out, err = run(*asked, command="sweep")
        assert status == 0, err
        table = out.partition("Skipped groups")[2]
        assert table.count("4 heads") == 2
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [group["name"] for group in document["skipped"]] == [f"rest.{n}" for n in HEADS]
    assert "skipped" not in document["points"][-1]
    status, _, err = run("--strict", "--out", "strict", command="sweep")
    assert status == 2
    assert "2 of 4 groups cannot follow" in err


def test_the_command_says_which_sizes_a_program_takes_no_others_of(run, tmp_path):
    status, out, err = run("--form", "exported", "--json", "run.json", model="one_block")
    assert status == 0, err
    words = "takes 8 alone along dimension 2 of x and dimension 3 of x, where the dense model takes"
    assert f"inputs: the exported program {words}" in " ".join(out.split())
    assert words in " ".join(err.split())
    document = json.loads((tmp_path / "run.json").read_text())
    manifest = json.loads((tmp_path / "small" / "osscar.json").read_text())
    assert [given["fixed"] for given in document["inputs"]] == [[2, 3]]
    assert document["inputs"] == manifest["lineage"]["plans"][0]["traced"]
    assert words in (tmp_path / "small" / "report.html").read_text()
