"""What a run will take: counted as it counts, told without a trace, and compared in the end."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import graph
import osscar
from osscar.base.errors import FrozenGroupError, OptionError, RequestError
from osscar.base.timing import Profile, Stage, profiled, timed
from osscar.estimation.estimate import estimate_as_asked
from osscar.estimation.forward_probe import first_samples, timed_pass
from osscar.estimation.layer_probe import Sort, _gram_seconds
from osscar.estimation.probed import expected_keep
from osscar.estimation.scaled import Scaled
from osscar.preparation.linear_maps import linear_maps
from osscar.preparation.opened import opened
from osscar.preparation.routing import Mixture
from osscar.pruning.prune import prune_as_asked
from osscar.request import PruningRequest
from osscar.walk.targets import Target
from osscar.walk.walk import Walk, walk
from tests.osscar.families import tokens
from tests.osscar.networks import images, small_net
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


def windows(demo, samples, seqlen=32):
    return osscar.load_calibration(None, demo.tokenizer, samples=samples, seqlen=seqlen)


def ticking():
    """Return a clock for which every look at it takes a second."""
    return itertools.count().__next__


@pytest.fixture
def osscar_command(monkeypatch, capsys, tmp_path):
    """Run a command in an empty directory; return status, standard output and standard error."""
    import sys

    from osscar.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["osscar", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


# ---- counted as the run counts -----------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize(
    ("model", "data"),
    [(Twice, torch.randn(9, 6)), (small_net, images(6)), (lambda: None, None)],
    ids=["a layer called twice", "a network with residual channels", "the demo"],
)
def test_the_walk_goes_where_its_itinerary_says(model, data, target, demo, monkeypatch):
    network = demo.model if data is None else model()
    given = windows(demo, 4) if data is None else data
    seen = []
    measure = Walk._measure

    def watched(self, call, grams):
        measure(self, call, grams)
        seen.append((self.passes, call))

    monkeypatch.setattr(Walk, "_measure", watched)
    with opened(network, given, batch_size=2) as ready:
        groups = [group for group in ready.groups if group.prunable and group.units > 2]
        planned = walk(ready, groups, target=target)
        itinerary = planned.itinerary
        for site in planned:
            problem = site.problem(keep=site.group.units - 1, damp=0.1)
            site.commit([consumer.W0 for consumer in problem.consumers])
    assert len(itinerary) == planned.passes
    lasts = {number: max(c for n, c in seen if n == number) for number, _ in seen}
    assert itinerary == tuple(lasts[number] for number in sorted(lasts))


def test_a_walk_in_one_go_has_one_pass():
    with opened(small_net(), images(6), batch_size=2) as ready:
        groups = [group for group in ready.groups if group.prunable]
        planned = walk(ready, groups, in_turn=False)
        assert planned.itinerary == (len(planned.calls) - 1,)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "asked",
    [
        {"neurons": 0.5},
        {"heads": "3/4", "neurons": "1/2"},
        {"groups": {"model.decoder.layers.1.neurons": 100}},
        {"neurons": 0.5, "skip": ["*.0.*"]},
    ],
    ids=str,
)
def test_what_is_kept_is_known_where_the_request_says_it(asked, demo):
    request = PruningRequest(**asked, device="cpu")
    with opened(demo.model, windows(demo, 4)) as ready:
        keep = expected_keep(ready, request)
    result = prune_as_asked(demo.model, windows(demo, 4), request)
    assert keep == {layer.name: layer.kept for layer in result.layers}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("asked", "allocation"),
    [
        ({"sparsity": 0.3}, "curvature"),
        ({"params": 0.8}, "uniform"),
        ({"flops": 0.8}, "fluctuation"),
    ],
    ids=str,
)
def test_about_as_many_units_are_expected_to_leave_as_do(asked, allocation, demo):
    request = PruningRequest(**asked, allocation=allocation)
    with opened(demo.model, windows(demo, 4)) as ready:
        keep = expected_keep(ready, request)
        units = {group.name: group.units for group in ready.groups}
    result = prune_as_asked(demo.model, windows(demo, 4), request)
    found = {name: kept / units[name] for name, kept in keep.items()}
    real = {layer.name: layer.kept / layer.units for layer in result.layers}
    assert sum(1 - share for share in found.values()) == pytest.approx(
        sum(1 - share for share in real.values()), rel=0.5
    )


def test_a_speedup_is_expected_before_anything_is_timed(demo, monkeypatch):
    monkeypatch.setattr("osscar.allocation.latency.parts_in_turn", None)
    found = estimate_as_asked(demo.model, windows(demo, 4), PruningRequest(speedup=1.3), ticking())
    [allocation] = [one for one in found.stages if one.stage == Stage.ALLOCATION]
    assert allocation.low < allocation.seconds < allocation.high


# ---- more takes more ---------------------------------------------------------------------


def by_stage(estimate):
    return {one.stage: one.seconds for one in estimate.stages}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("asked", [{"neurons": 0.5}, {"sparsity": 0.3}], ids=str)
def test_more_samples_take_longer_and_more_memory(asked, demo):
    request = PruningRequest(**asked, batch_size=1)
    found = [
        estimate_as_asked(demo.model, windows(demo, samples, 64), request, ticking())
        for samples in (8, 32, 128)
    ]
    for few, many in itertools.pairwise(found):
        for stage in (Stage.WALK, Stage.GRAM):
            assert by_stage(many)[stage] > by_stage(few)[stage]
        assert by_stage(many)[Stage.SOLVER] == by_stage(few)[Stage.SOLVER]
    assert found[2].peak_bytes > found[0].peak_bytes


def test_every_restart_of_the_batches_is_paid_for():
    data = images(12)
    found = [
        estimate_as_asked(small_net(), data, PruningRequest(**asked), ticking())
        for asked in ({"channels": 0.5, "skip": ["blocks.*"]}, {"channels": 0.5, "residual": 0.5})
    ]
    assert found[0].passes < found[1].passes
    assert by_stage(found[0])[Stage.WALK] < by_stage(found[1])[Stage.WALK]


def test_what_is_not_asked_for_takes_nothing(demo):
    plain = by_stage(estimate_as_asked(demo.model, windows(demo, 4), PruningRequest(neurons=0.5)))
    shared = by_stage(estimate_as_asked(demo.model, windows(demo, 4), PruningRequest(sparsity=0.3)))
    assert set(shared) - set(plain) == {Stage.ALLOCATION, Stage.CURVATURE, Stage.CURVES}
    fixed = PruningRequest(neurons=0.5, damp=0.1, target="weights")
    found = [
        by_stage(estimate_as_asked(demo.model, windows(demo, 4), request, clock=ticking()))
        for request in (PruningRequest(neurons=0.5), fixed)
    ]
    assert found[1][Stage.DAMPING] <= found[0][Stage.DAMPING]


# ---- the fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (3.0, 0.01), (0.2, 0.4)])
def test_squares_and_cubes_are_told_apart(a, b):
    def seconds(p):
        return a * p**2 + b * p**3

    found = Scaled.along(800, [(100, seconds(100)), (200, seconds(200))], spread=0.1)
    assert found.seconds == pytest.approx(seconds(800))
    assert found.low <= found.seconds <= found.high


def test_overhead_of_small_sizes_is_not_blown_up():
    """Where the smaller part takes as long as the larger one, nothing was learned of cubes."""
    found = Scaled.along(800, [(100, 1.0), (200, 1.0)], spread=0.0)
    assert found.seconds == found.low == 16.0
    assert Scaled.along(200, [(200, 3.0)], spread=0.5).seconds == 3.0


def test_phases_within_others_are_counted_once():
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


def test_a_run_says_what_it_spends_on_each_stage(demo):
    with profiled() as spent:
        prune_as_asked(demo.model, windows(demo, 8), PruningRequest(sparsity=0.3))
    told = estimate_as_asked(demo.model, windows(demo, 8), PruningRequest(sparsity=0.3))
    assert set(spent.seconds) == {Stage(one.stage) for one in told.stages}


# ---- without a trace ---------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"neurons": 0.5}, {"sparsity": 0.3}], ids=str)
def test_model_and_random_numbers_are_as_before(asked, demo):
    model = copy.deepcopy(demo.model)
    state = torch.get_rng_state()
    osscar.estimate(model, windows(demo, 8), **asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == demo.model.training
    for (name, before), after in zip(
        demo.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(before, after), name


def test_batch_norm_counters_are_as_before():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    osscar.estimate(model, images(6), channels=0.5)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


SMALL = ("demo", "--samples", "8", "--seqlen", "32", "--neurons", "0.5")


def test_a_dry_run_writes_nothing_but_its_json(osscar_command, tmp_path):
    status, out, _ = osscar_command("prune", *SMALL, "--dry-run", "--out", "smaller")
    assert status == 0
    assert "solver and refit" in out
    assert list(tmp_path.iterdir()) == []
    status, _, _ = osscar_command("prune", *SMALL, "--dry-run", "--json", "told.json")
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]
    document = json.loads((tmp_path / "told.json").read_text())
    assert document["schema"] == "osscar.estimate/1"
    stages = [one["stage"] for one in document["stages"]]
    assert stages == [str(one) for one in Stage if str(one) in stages]
    assert document["seconds"] == pytest.approx(sum(one["seconds"] for one in document["stages"]))
    assert document["peak_bytes"] == max(one["peak_bytes"] for one in document["stages"])
    assert document["written_bytes"] > 0


# ---- compared ----------------------------------------------------------------------------


def test_a_run_says_how_far_off_its_estimate_was(osscar_command, tmp_path):
    osscar_command("prune", *SMALL, "--dry-run", "--json", "told.json")
    assert osscar_command("prune", *SMALL, "--out", "plain")[0] == 0
    status, out, _ = osscar_command(
        "prune", *SMALL, "--out", "compared", "--estimate", "told.json", "--json", "run.json"
    )
    assert status == 0
    assert "estimated" in out
    for name in ("model.safetensors", "config.json"):
        files = [tmp_path / place / name for place in ("plain", "compared")]
        assert files[0].read_bytes() == files[1].read_bytes()
    found = json.loads((tmp_path / "run.json").read_text())["estimate"]
    told = json.loads((tmp_path / "told.json").read_text())
    assert [one["stage"] for one in found["stages"]] == [one["stage"] for one in told["stages"]]
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 0
    unended = [one["stage"] for one in found["stages"] if one["seconds"] is None]
    assert unended == [str(Stage.SAVE)]
    assert "estimated" in (tmp_path / "compared" / "report.html").read_text()
    assert "estimate" not in json.loads((tmp_path / "plain" / "osscar_report.json").read_text())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--neurons", "0.6"), "neurons was '0.5' and is '0.6'"),
        (("--samples", "4"), "samples was 8 and is 4"),
        (("--backend", "greedy"), "backend was 'local_search' and is 'greedy'"),
        (("--dtype", "bfloat16"), "dtype was 'float32' and is 'bfloat16'"),
    ],
)
def test_an_estimate_of_another_run_is_refused(other, named, osscar_command, tmp_path):
    osscar_command("prune", *SMALL, "--dry-run", "--json", "told.json")
    status, _, err = osscar_command(
        "prune", *SMALL, *other, "--out", "smaller", "--estimate", "told.json"
    )
    assert status == 2
    assert named in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["told.json"]


def test_an_estimate_for_other_threads_is_refused(osscar_command):
    threads = torch.get_num_threads()
    osscar_command("prune", *SMALL, "--dry-run", "--json", "told.json")
    torch.set_num_threads(threads + 1)
    try:
        status, _, err = osscar_command(
            "prune", *SMALL, "--out", "smaller", "--estimate", "told.json"
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 2
    assert f"threads was {threads} and is {threads + 1}" in " ".join(err.split())


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"schema": "osscar.prune/3"}', '{"schema": "osscar.estimate/1", "seconds": NaN}'],
)
def test_what_is_no_estimate_is_refused(content, osscar_command, tmp_path):
    (tmp_path / "told.json").write_text(content)
    status, _, err = osscar_command("prune", *SMALL, "--out", "smaller", "--estimate", "told.json")
    assert status == 2
    assert "told.json" in err
    assert not (tmp_path / "smaller").exists()


def test_a_changed_estimate_is_read_strictly(osscar_command, tmp_path):
    osscar_command("prune", *SMALL, "--dry-run", "--json", "told.json")
    document = json.loads((tmp_path / "told.json").read_text())
    for field, value in (("seconds", "3"), ("stages", [{}]), ("more", 1), ("peak_bytes", 1.5)):
        (tmp_path / "told.json").write_text(json.dumps({**document, field: value}))
        status, _, err = osscar_command(
            "prune", *SMALL, "--out", "smaller", "--estimate", "told.json"
        )
        assert status == 2
        assert field in err


# ---- refused -----------------------------------------------------------------------------


def test_a_run_needs_a_place_and_a_dry_one_no_estimate(osscar_command, tmp_path):
    status, _, err = osscar_command("prune", *SMALL)
    assert status == 2
    assert "--out" in err
    status, _, err = osscar_command("prune", *SMALL, "--dry-run", "--estimate", "told.json")
    assert status == 2
    assert "--estimate" in err
    assert list(tmp_path.iterdir()) == []


def test_what_the_run_refuses_is_refused(demo):
    data = windows(demo, 4)
    with pytest.raises(RequestError, match="nothing to prune"):
        osscar.estimate(demo.model, data)
    with pytest.raises(RequestError, match="cannot keep 10,000 units"):
        osscar.estimate(demo.model, data, neurons=10_000)
    with pytest.raises(RequestError, match="no group of channels"):
        osscar.estimate(demo.model, data, channels=0.5)
    with pytest.raises(RequestError, match="cannot be met"):
        osscar.estimate(demo.model, data, params=0.001)
    with pytest.raises(OptionError, match="damp is -1"):
        osscar.estimate(demo.model, data, neurons=0.5, damp=-1)
    with pytest.raises(TypeError, match="unexpected"):
        osscar.estimate(demo.model, data, neuron=0.5)
    frozen = [g for g in osscar_groups(demo) if g.frozen]
    with pytest.raises(FrozenGroupError):
        osscar.estimate(demo.model, data, groups={frozen[0].name: 1})


def osscar_groups(demo):
    with opened(demo.model, windows(demo, 4)) as ready:
        return ready.groups


def test_a_limit_of_memory_is_held_to_the_least_that_would_do(tmp_path):
    path = tmp_path / "model"
    written(path, "opt")

    def told(limit):
        model = osscar.load_model(path, max_memory=limit).model
        return osscar.estimate(model, streamed_windows(), neurons=0.5)

    found = told("20GB")
    assert found.limit_bytes == 20 * 10**9
    assert 0 < found.least_bytes < found.limit_bytes
    assert found.peak_bytes <= found.limit_bytes
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


def test_what_experts_read_is_found_anew_for_each_call(monkeypatch):
    """As in a run: what is shared is shared by the experts of one call, and by nothing else."""
    counted, visits = [], Mixture._visits

    def count(self, x):
        counted.append(self.name)
        return visits(self, x)

    with opened(mixture("mixtral"), tokens(8, 24)) as ready:
        group = next(g for g in ready.groups if g.name.endswith("experts.neurons"))
        maps = linear_maps(ready.model, group)
        name = maps[0].name
        _, seen = timed_pass(ready, first_samples(ready, 2), [name], [name], ticking())
        monkeypatch.setattr(Mixture, "_visits", count)
        _gram_seconds(Sort((group,), maps, 8), seen, 1.0, False, False, ticking())
    assert len(maps) == 4
    assert counted == 2 * len(seen[name]) * [name]
