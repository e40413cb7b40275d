"""What cannot follow is found before anything is solved, skipped, and named."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import osscar
from osscar.base.errors import AdapterError, EquivalenceError, RequestError
from osscar.proof.plan import Form
from osscar.request import PruningRequest
from osscar.run import chain
from osscar.run import feasibility as feasibility_room
from tests.graph.topologies import network
from tests.osscar.masked import masked
from tests.osscar.networks import images
from tests.osscar.programs import WIDTH, Gated, Generator, MaxOut, OptionA, Transformer


@pytest.fixture(autouse=True)
def modules_alone(monkeypatch):
    """Most of these networks follow as programs, which is another matter: see `test_forms`."""
    monkeypatch.setitem(feasibility_room.FORMS, "auto", (Form.EAGER,))


@network(one=(8, 16), other=(8, 16), join=(32, 12), head=(12, 3))
def Pair(net, x):
    """Two layers of which either may be narrower, but not both."""
    y = torch.cat((net.one(x), net.other(x)), -1)
    if y.shape[-1] < 20:
        raise ValueError(f"{y.shape[-1]} features are too few")
    return net.head(torch.tanh(net.join(torch.relu(y))))


@network(one=(8, 16), two=(16, 12), three=(12, 3))
def Stubborn(net, x):
    """Code in which nothing can follow."""
    x = torch.relu(net.one(x)).view(-1, 16)
    return net.three(torch.relu(net.two(x)).view(-1, 12))


@network(enter=(8, 16), leave=(16, 3))
def Scaled(net, x):
    """Code that runs with fewer units, and computes something else."""
    y = torch.relu(net.enter(x))
    return net.leave(y * y.shape[-1] ** -0.5)


def built(kind):
    torch.manual_seed(0)
    return kind()


def rows(*shape):
    return torch.randn(shape or (48, 8), generator=torch.Generator().manual_seed(1))


def words():
    return rows(48, 6, WIDTH)


def names_of(groups):
    return [group.name for group in groups]


def tried(kind, data, **asked):
    """Return the task of a network, with its form and skipped groups; it is solved by nobody."""
    request = PruningRequest(**asked, device="cpu")
    with chain.prepare(built(kind), data, request) as prepared:
        return prepared.task


@pytest.fixture
def tries(monkeypatch):
    """The groups that are tried together, in this order."""
    tried, original = [], feasibility_room.rehearse

    def rehearse(model, plan, inputs, programs):
        tried.append(names_of(plan.groups))
        return original(model, plan, inputs, programs)

    monkeypatch.setattr(feasibility_room, "rehearse", rehearse)
    return tried


# ---- what is left, and what is not -------------------------------------------------------

HEADS = ["blocks.0.attn.heads", "blocks.1.attn.heads"]
CASES = {
    "attention": (Transformer, words, HEADS, "(B, N, 3, self.num_heads, C // self.num_heads)"),
    "generator": (Generator, rows, ["enter.channels"], "view(-1, 64, 4, 4)"),
    "gated": (Gated, rows, ["enter.neurons"], "net.enter(x).split(32, -1)"),
    "max-out": (MaxOut, rows, ["enter.neurons"], "net.enter(x).split(32, -1)"),
    "shortcut": (OptionA, images, ["wide.channels", "wide.channels.2"], "net.wide(x) + shortcut"),
}
KINDS = {
    Transformer: ("heads", "neurons"),
    Generator: ("channels",),
    OptionA: ("channels", "residual"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_what_cannot_follow_is_named_with_its_line(name):
    kind, data, expected, line = CASES[name]
    with pytest.warns(UserWarning, match=f"skipped.*'{expected[0]}'"):
        found = tried(kind, data(), **dict.fromkeys(KINDS.get(kind, ("neurons",)), "1/2"))
    assert names_of(found.skipped) == expected
    for group in found.skipped:
        assert re.match(r"\w+ fails with fewer units, in `", group.reason)
        assert line in group.reason
    assert len({group.reason for group in found.skipped}) == len({g.units for g in found.skipped})


@pytest.mark.filterwarnings("ignore:skipped")
def test_all_else_is_pruned_as_if_that_had_been_left_out():
    dense, data = built(Gated), rows()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    result, skipped = (
        osscar.prune(dense, data, sparsity=0.5, device="cpu", skip=skip)
        for skip in ([], ["enter.neurons"])
    )
    assert names_of(result.skipped) == ["enter.neurons"]
    assert result.plan == skipped.plan
    assert result.budget.limits[0] == skipped.budget.limits[0]
    assert result.budget.widths == skipped.budget.widths
    assert result.budget.widths.keys() == {"leave.neurons"}  # the budget counts nothing else
    assert result.budget.limits[0].reached == result.parameters_after
    for key, value in skipped.model.state_dict().items():  # a trial leaves no trace
        assert torch.equal(value, result.model.state_dict()[key]), key
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    with torch.no_grad():
        x = data[:5].double()
        dense, small = dense.double(), copy.deepcopy(result.model).double()
        expected = masked(dense, result)(x)
        assert (expected - dense(x)).abs().max() > 1e-4
        torch.testing.assert_close(small(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:skipped")
def test_groups_that_go_alone_but_not_together(tries):
    for one in ("one", "other"):  # each can go by itself
        named = {f"{one}.neurons": 8, "join.neurons": 6}
        assert not tried(Pair, rows(), groups=named).skipped
    tries.clear()
    (left,) = tried(Pair, rows(), neurons="1/2").skipped
    join, one, other = "join.neurons", "one.neurons", "other.neurons"
    assert tries == [
        [join, one, other],
        [join],
        [join, one],
        [other],
    ]  # and that one alone, for a reason
    assert left.name == other
    assert "features are too few" in left.reason


REFUSED = (
    (Stubborn, AdapterError, "none of 2 groups can be pruned", "view(-1, 12)"),
    (Scaled, EquivalenceError, r"'neurons': Scaled does something else with fewer units, in "),
)


def test_a_request_that_cannot_be_met_is_refused_with_all_reasons_before_anything_is_solved():
    for kind, error, message, *reasons in REFUSED:
        with pytest.raises(error, match=message) as caught:
            tried(kind, rows(), sparsity=0.5)
        assert all(reason in str(caught.value) for reason in reasons)


@pytest.mark.filterwarnings("ignore:skipped")
def test_equal_layers_have_one_reason_without_numbers_of_the_trial():
    class Several(nn.Sequential):
        def forward(self, x):
            return self[-1](torch.cat([layer(x) for layer in self[:-1]], -1))

    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    net = Several(*[built(kind) for kind in (Scaled, Gated) * 2], plain)
    data, request = rows(), PruningRequest(neurons="1/2", device="cpu")
    with chain.prepare(net, data, request) as prepared:
        reasons = [group.reason for group in prepared.task.skipped]
    assert len(reasons) == 4
    assert {re.sub("`.*", "", reason) for reason in reasons} == {
        "Scaled does something else with fewer units, in ",
        "Gated fails with fewer units, in ",
    }
    assert len({*reasons}) == 2


def test_layers_whose_names_differ_by_a_digit_each_have_their_reason():
    @network(fc1=(8, 16), fc2=(16, 16), fc3=(16, 16), head=(16, 3))
    def Three(net, x):
        x = torch.relu(net.fc1(x)).view(-1, 16)
        y = torch.relu(net.fc2(x))
        if y.shape[-1] != 16:
            raise ValueError("float8 kernels take all rows")
        return net.head(torch.relu(net.fc3(y)))

    with pytest.warns(UserWarning, match="skipped"):
        skipped = tried(Three, rows(), neurons="1/2").skipped
    first, second = (group.reason for group in skipped)
    assert "view(-1, 16)" in first
    assert "float8 kernels take all rows" in second


# ---- widths that code takes --------------------------------------------------------------


class Picky(nn.Module):
    """Computes something else with widths that it does not take."""

    def __init__(self, takes):
        super().__init__()
        self.up, self.down, self.takes = nn.Linear(8, 16), nn.Linear(16, 8), takes

    def forward(self, x):
        h = torch.relu(self.up(x))
        return x + self.down(h) * (1 if self.takes(h.shape[-1]) else 2)


def pruned(*takes, **asked):
    torch.manual_seed(0)
    net = nn.Sequential(*map(Picky, takes), nn.Linear(8, 3)).eval()
    return osscar.prune(net, rows(), device="cpu", **asked)


def test_a_search_takes_only_widths_that_code_takes():
    with pytest.warns(UserWarning, match=r"leaves at least: '0\.neurons' 4; '1\.neurons' 4"):
        result = pruned(lambda width: width > 3, lambda width: True, sparsity=0.7)
    assert {name: one.least for name, one in result.budget.widths.items()} == {
        "0.neurons": 4,
        "1.neurons": 4,
    }
    assert all(layer.kept >= 4 for layer in result.layers)
    assert not result.skipped
    assert result.certificate.structure is not None
    with pytest.raises(RequestError, match="cannot be met"):
        pruned(lambda width: width > 3, lambda width: True, sparsity=0.8)


def test_the_fewest_are_tried_at_once_where_code_takes_them(tries):
    result = pruned(*[lambda width: True] * 2, sparsity=0.9)
    assert len(tries) == 2  # the second time with what was chosen
    assert all(one.least is None for one in result.budget.widths.values())


def test_a_group_stays_whole_whose_code_does_not_take_what_is_chosen(monkeypatch):
    """Of which the trial knows nothing, as it takes the fewest units and about half."""
    measured, original = [], chain.measured_curves

    def counted(*given):
        measured.append(given)
        return original(*given)

    monkeypatch.setattr(chain, "measured_curves", counted)
    with pytest.warns(UserWarning, match=r"skipped, .*'0\.neurons', since their code does not"):
        result = pruned(lambda width: width in (1, 16), lambda width: True, sparsity=0.3)
    assert [group.name for group in result.skipped] == ["0.neurons"]
    assert "Picky does something else with fewer units" in result.skipped[0].reason
    assert {layer.name for layer in result.layers} == {"1.neurons"}
    assert result.budget.limits[0].reached <= result.budget.limits[0].limit
    assert len(measured) == 1
    assert result.certificate.structure is not None


# ---- the search --------------------------------------------------------------------------


class PaddedShortcut(nn.Module):
    """Adds zeros for the channels that the shortcut lacks, as many before them as behind."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(inputs, 10, 1), nn.Conv2d(10, outputs, 1)
        self.lacking = (outputs - inputs) // 2

    def forward(self, x):
        wide = F.pad(x, (0, 0, 0, 0, self.lacking, self.lacking)) if self.lacking else x
        return torch.relu(wide + self.outer(torch.relu(self.inner(x))))


@pytest.mark.slow
def test_modules_follow_streams_that_all_keep_one_share():
    """As one number pads both ends, neither of these can lose channels alone."""
    blocks = nn.Conv2d(3, 8, 1), PaddedShortcut(8, 16), PaddedShortcut(16, 16)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    net = nn.Sequential(*blocks, *head).eval()
    result = osscar.prune(net, torch.randn(32, 3, 4, 4), flops=0.1, device="cpu")
    assert not result.skipped
    block = result.model[1]
    assert block.outer.out_channels == block.inner.in_channels + 2 * block.lacking < 16
