"""What a run will take: counted as it counts, and told without a trace."""

import copy
import itertools
import json
import sys

import pytest
import torch
from torch import nn

import graph
import osscar
from osscar.base.errors import OptionError, RequestError
from osscar.base.timing import Profile, Stage, profiled, timed
from osscar.cli import main
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest
from osscar.run.dry_run import estimate_as_asked
from osscar.run.prune import prune_as_asked
from osscar.walk.targets import Target
from osscar.walk.walk import Walk, walk
from tests.osscar.families import CALIBRATION, tokens
from tests.osscar.interrupted_cases import tiny_model
from tests.osscar.networks import images, small_net
from tests.osscar.programs import Transformer
from tests.osscar.test_experts import mixture
from tests.osscar.test_streamed import windows as streamed_windows
from tests.osscar.test_streamed import written


class Twice(nn.Module):
    """One feed-forward layer that is called twice, so that the batches start again after it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.wide, self.head = nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return self.head(torch.relu(self.wide(x)))


@pytest.fixture(scope="module")
def demo():
    return osscar.load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A model like the demo, of fewer and smaller layers."""
    return osscar.load_model(tiny_model(tmp_path_factory.mktemp("tiny")), device="cpu")


def windows(demo, samples, seqlen=32):
    return osscar.load_calibration(CALIBRATION, demo.tokenizer, samples=samples, seqlen=seqlen)


@pytest.fixture(scope="module")
def prepared(demo):
    with prepare(demo.model, windows(demo, 4)) as found:
        yield found


def ticking():
    """Return a clock for which every look at it takes a second."""
    return itertools.count().__next__


# ---- counted as the run counts -----------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(
    ("model", "data"),
    [(Twice, torch.randn(9, 6)), (small_net, images(6)), (lambda: None, None)],
    ids=["a layer called twice", "a network with residual channels", "the demo"],
)
def test_the_walk_ends_its_passes_where_it_says(model, data, target, smaller, monkeypatch):
    network = smaller.model if data is None else model()
    given = windows(smaller, 4) if data is None else data
    seen = []
    measure = Walk._measure

    def watched(self, call, grams):
        measure(self, call, grams)
        seen.append((self.passes, call))

    monkeypatch.setattr(Walk, "_measure", watched)
    with prepare(network, given, batch_size=2) as prepared:
        groups = [group for group in prepared.groups if group.prunable and group.units > 2]
        planned = walk(prepared, groups, target=target)
        pass_ends = planned.pass_ends
        for step in planned:
            problem = step.problem(keep=step.group.units - 1, damp=0.1)
            step.commit([consumer.W0 for consumer in problem.consumers])
    assert len(pass_ends) == planned.passes
    lasts = {number: max(c for n, c in seen if n == number) for number, _ in seen}
    assert pass_ends == tuple(lasts[number] for number in sorted(lasts))


def test_a_walk_in_one_go_has_one_pass():
    with prepare(small_net(), images(6), batch_size=2) as prepared:
        groups = [group for group in prepared.groups if group.prunable]
        planned = walk(prepared, groups, in_turn=False)
        assert planned.pass_ends == (len(planned.calls) - 1,)


def test_more_samples_take_longer_and_more_memory(smaller):
    request = PruningRequest(sparsity=0.3, batch_size=1)
    few, many = (
        estimate_as_asked(smaller.model, windows(smaller, samples, 64), request, ticking())
        for samples in (8, 128)
    )
    for stage in (Stage.WALK, Stage.GRAM):
        assert many.stages[stage] > few.stages[stage]
    assert many.stages[Stage.SOLVER] == few.stages[Stage.SOLVER]
    assert many.peak_bytes > few.peak_bytes


def test_every_restart_of_the_batches_is_paid_for():
    data = images(12)
    found = [
        estimate_as_asked(small_net(), data, PruningRequest(**asked), ticking())
        for asked in ({"channels": 0.5, "skip": ["blocks.*"]}, {"channels": 0.5, "residual": 0.5})
    ]
    assert found[0].passes < found[1].passes
    assert found[0].stages[Stage.WALK] < found[1].stages[Stage.WALK]


def test_the_stages_are_those_of_the_run_and_nothing_is_counted_that_is_not_asked_for():
    budget = PruningRequest(sparsity=0.3, allocation="measured")
    with profiled() as profile:
        prune_as_asked(small_net(), images(8), budget)
    shared = estimate_as_asked(small_net(), images(8), budget).stages
    assert set(profile.seconds) == set(shared)
    plain = estimate_as_asked(small_net(), images(8), PruningRequest(channels=0.5)).stages
    assert set(shared) - set(plain) == {Stage.MEASURED}


def test_groups_take_as_long_as_the_one_that_is_solved_by_the_cube_of_what_they_read():
    layers = [nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (20, 40, 40)]
    with prepare(nn.Sequential(*layers), torch.randn(8, 6)) as prepared:
        groups = {group.name: group.units // 2 for group in prepared.groups if group.units > 6}
    one, three = (
        estimate_as_asked(nn.Sequential(*layers), torch.randn(8, 6), asked, ticking())
        for asked in (
            PruningRequest(groups=dict([max(groups.items(), key=lambda item: item[1])])),
            PruningRequest(groups=groups),
        )
    )
    assert three.solved in groups
    ratio = three.stages[Stage.SOLVER] / one.stages[Stage.SOLVER]
    assert ratio == pytest.approx(2 + (20 / 40) ** 3)


def test_stages_within_others_are_counted_once():
    with profiled(ticking()) as spent:
        with timed(Stage.WALK):
            with timed(Stage.GRAM):
                pass
            with timed(Stage.GRAM):
                pass
        with timed(Stage.WALK):
            pass
    assert spent.seconds == {Stage.WALK: 4, Stage.GRAM: 2}
    with timed(Stage.WALK):
        pass
    assert spent.seconds[Stage.WALK] == 4
    assert Profile(ticking()).seconds == {}


# ---- without a trace ---------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"neurons": 0.5}, {"sparsity": 0.3}, {"channels": 0.5}], ids=str)
def test_model_and_random_numbers_are_as_before(asked, smaller):
    text = "channels" not in asked
    before = smaller.model if text else small_net()
    model = copy.deepcopy(before)
    state = torch.get_rng_state()
    osscar.estimate(model, windows(smaller, 8) if text else images(6), **asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == before.training
    for (name, tensor), after in zip(
        before.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, after), name


SMALL = ("demo", "--samples", "8", "--seqlen", "32", "--neurons", "0.5")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a dry run printed and wrote, in a directory where nothing else is."""
    path = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        words = ["osscar", "prune", *SMALL, "--dry-run", "--out", "smaller", "--json", "told.json"]
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    assert [file.name for file in path.iterdir()] == ["told.json"]
    return json.loads((path / "told.json").read_text())


def test_a_dry_run_writes_nothing_but_its_json(told):
    assert told["schema"] == "osscar.estimate/5"
    stages = [one["stage"] for one in told["stages"]]
    assert stages == [str(one) for one in Stage if str(one) in stages]
    assert {"start", "load"} < set(stages)
    assert told["seconds"] == pytest.approx(sum(one["seconds"] for one in told["stages"]))
    assert told["peak_bytes"] > 0
    assert told["solved"]


# ---- refused -----------------------------------------------------------------------------


def test_a_run_needs_a_place(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("prune", *SMALL)
    assert status == 2
    assert "--out" in err
    assert list(tmp_path.iterdir()) == []


def test_what_the_run_refuses_is_refused(smaller):
    data = windows(smaller, 4)
    with pytest.raises(RequestError, match="nothing to prune"):
        osscar.estimate(smaller.model, data)
    with pytest.raises(RequestError, match="cannot keep 10,000 units"):
        osscar.estimate(smaller.model, data, neurons=10_000)
    with pytest.raises(RequestError, match="no group of channels"):
        osscar.estimate(smaller.model, data, channels=0.5)
    with pytest.raises(RequestError, match="cannot be met"):
        osscar.estimate(smaller.model, data, params=0.001, flops=0.9)
    with pytest.raises(OptionError, match="damp is -1"):
        osscar.estimate(smaller.model, data, neurons=0.5, damp=-1)
    with pytest.raises(TypeError, match="unexpected"):
        osscar.estimate(smaller.model, data, neuron=0.5)
    with prepare(smaller.model, data) as prepared:
        frozen = next(group.name for group in prepared.groups if group.frozen)
    with pytest.raises(RequestError):
        osscar.estimate(smaller.model, data, groups={frozen: 1})


def test_what_cannot_follow_is_told_and_not_counted():
    data = torch.randn(16, 5, 16)
    with pytest.raises(osscar.OsscarError, match="2 of 4 groups cannot follow"):
        osscar.estimate(Transformer(), data, sparsity=0.5, form="eager", strict=True)
    with pytest.warns(UserWarning, match="skipped, with all their units: .*heads"):
        found = osscar.estimate(Transformer(), data, sparsity=0.5, form="eager")
    assert "heads" not in found.solved
    assert found.kept_share > 0.5


def test_a_limit_of_memory_is_held_to_the_least_that_would_do(tmp_path):
    path = tmp_path / "model"
    written(path, "opt")

    def told(limit):
        model = osscar.load_model(path, max_memory=limit).model
        return osscar.estimate(model, streamed_windows(), neurons=0.5)

    found = told("20GB")
    assert 0 < found.least_bytes < found.peak_bytes <= 20 * 10**9
    with pytest.raises(RequestError, match="cannot hold"):
        told("300MB")


def test_mixtures_and_recurrent_layers_are_estimated_like_others():
    torch.manual_seed(0)
    found = osscar.estimate(mixture("mixtral"), tokens(8, 24), neurons=0.5)
    assert found.seconds > 0
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.LSTM(12, 7))
    name = next(g.name for g in graph.trace(net, (torch.randn(2, 6, 5),)).prunable if g.units == 12)
    found = osscar.estimate(net, torch.randn(16, 6, 5), groups={name: 6})
    assert found.seconds > 0
