"""What a run will take: counted as it counts, and told without a trace."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import OptionError, RequestError
from osscar.base.timing import Profile, Stage, profiled, timed
from osscar.preparation.prepare import prepare
from osscar.request import PruningRequest
from osscar.run.dry_run import estimate_as_asked
from osscar.run.prune import prune_as_asked
from osscar.walk.targets import Target
from osscar.walk.walk import Walk
from tests.osscar.families import CALIBRATION, tokens
from tests.osscar.networks import Twice, images, small_net
from tests.osscar.programs import Transformer


def ticking():
    """Return a clock for which every look at it takes a second."""
    return itertools.count().__next__


def told(model, data, **asked):
    """Estimate by a clock that ticks."""
    return estimate_as_asked(model, data, PruningRequest(**asked), ticking())


# ---- counted as the run counts -----------------------------------------------------------


@pytest.mark.parametrize(("model", "data"), [(Twice, torch.randn(9, 6)), (small_net, images(6))])
def test_the_walk_ends_its_passes_where_it_says(model, data, monkeypatch):
    seen, measure = [], Walk._measure

    def watched(self, call, grams):
        measure(self, call, grams)
        seen.append((self.passes, call))

    monkeypatch.setattr(Walk, "_measure", watched)
    with prepare(model(), data, batch_size=2) as prepared:
        groups = [group for group in prepared.groups if group.prunable and group.units > 2]
        planned = Walk(prepared, groups, target=Target.RESIDUAL)
        pass_ends = tuple(last for _, last in planned.schedule.passes)
        for step in planned:
            problem = step.problem(keep=step.group.units - 1, damp=0.1)
            step.commit([consumer.W0 for consumer in problem.consumers])
        one_go = Walk(prepared, groups, in_turn=False)
        assert one_go.schedule.passes == ((0, len(one_go.schedule.calls) - 1),)
    lasts = {number: max(c for n, c in seen if n == number) for number, _ in seen}
    assert pass_ends == tuple(lasts[number] for number in sorted(lasts))
    assert len(pass_ends) == planned.passes


def test_more_samples_and_restarts_of_the_batches_are_paid_for():
    few, many, again = (
        told(small_net(), images(samples), channels=0.5, **more)
        for samples, more in (
            (8, {"skip": ["blocks.*"]}),
            (128, {"skip": ["blocks.*"]}),
            (8, {"residual": 0.5}),
        )
    )
    for stage in (Stage.WALK, Stage.GRAM):
        assert many.stages[stage] > few.stages[stage]
    assert many.stages[Stage.SOLVER] == few.stages[Stage.SOLVER]
    assert many.peak_bytes > few.peak_bytes
    assert few.passes < again.passes
    assert few.stages[Stage.WALK] < again.stages[Stage.WALK]


def test_the_stages_are_those_of_the_run_and_nothing_is_counted_that_is_not_asked_for():
    model, data = small_net(), images(8)
    budget = PruningRequest(sparsity=0.3, allocation="measured")
    with profiled() as profile:
        prune_as_asked(model, data, budget)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    shared = estimate_as_asked(model, data, budget).stages
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert set(profile.seconds) == set(shared)
    plain = estimate_as_asked(model, data, PruningRequest(channels=0.5)).stages
    assert set(shared) - set(plain) == {Stage.MEASURED}


def test_groups_take_as_long_as_the_one_that_is_solved_by_the_cube_of_what_they_read():
    layers = [nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (20, 40, 40)]
    model, data = nn.Sequential(*layers), torch.randn(8, 6)
    with prepare(model, data) as prepared:
        groups = {group.name: group.units // 2 for group in prepared.groups if group.units > 6}
    largest = max(groups, key=groups.get)
    one, three = (told(model, data, groups=some) for some in ({largest: 20}, groups))
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


# ---- what is told and refused ------------------------------------------------------------


def test_a_dry_run_writes_nothing_but_its_json(tiny, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ("prune", tiny, "--samples", "8", "--seqlen", "32", "--neurons", "0.5")
    asked += ("--calibration", CALIBRATION)
    status, _, err = run(*asked)
    assert status == 2
    assert "--out" in err
    options = ("--dry-run", "--out", "smaller", "--json", "told.json")
    status, _, err = run(*asked, *options)
    assert status == 0, err
    assert [file.name for file in tmp_path.iterdir()] == ["told.json"]
    found = json.loads((tmp_path / "told.json").read_text())
    assert found["schema"] == "osscar.estimate/5"
    stages = [one["stage"] for one in found["stages"]]
    assert stages == [str(one) for one in Stage if str(one) in stages]
    assert {"start", "load"} < set(stages)
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["stages"]))
    assert found["peak_bytes"] > 0
    assert found["solved"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, RequestError, "nothing to prune"),
        ({"channels": 10_000}, RequestError, "cannot keep 10,000 units"),
        ({"params": 0.001, "flops": 0.9}, RequestError, "cannot be met"),
        ({"channels": 0.5, "damp": -1}, OptionError, "damp is -1"),
        ({"channel": 0.5}, TypeError, "unexpected"),
    ],
)
def test_what_the_run_refuses_is_refused(asked, error, message):
    with pytest.raises(error, match=message):
        osscar.estimate(small_net(), images(4), **asked)


def test_what_cannot_follow_is_told_and_not_counted():
    data = torch.randn(16, 5, 16)
    with pytest.raises(osscar.OsscarError, match="2 of 4 groups cannot be pruned"):
        osscar.estimate(Transformer(), data, sparsity=0.5, form="eager", strict=True)
    with pytest.warns(UserWarning, match="skipped, with all their units: .*heads"):
        found = osscar.estimate(Transformer(), data, sparsity=0.5, form="eager")
    assert "heads" not in found.solved
    assert found.kept_share > 0.5


def test_a_limit_of_memory_is_held_to_the_least_that_would_do(tiny):
    def estimated(limit):
        model = osscar.load_model(tiny, max_memory=limit).model
        return osscar.estimate(model, tokens(8, 24), neurons=0.5)

    found = estimated("20GB")
    assert 0 < found.least_bytes < found.peak_bytes <= 20 * 10**9
    with pytest.raises(RequestError, match="cannot hold"):
        estimated("300MB")
