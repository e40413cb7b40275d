"""A quality in place of a size: the bounds, the search, and whole runs on tiny models."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

import osscar
from benchmarks.target_bounds import CASES, FRONTIER, searches
from osscar.allocation.costs import Cost
from osscar.base.errors import DataError, EquivalenceError, NonFiniteError, RequestError
from osscar.data.parts import in_parts
from osscar.data.samples import IGNORED
from osscar.evaluation.confidence import (
    Bounded,
    Judge,
    bounded_drop,
    bounded_mean,
    fewest_samples,
    rarest_seen,
    usual_samples,
)
from osscar.network.modules import count_parameters, digest_of_weights
from osscar.network.operations import count_flops
from osscar.request import PruningRequest, QualityTarget, TargetKind
from osscar.run import chain, target
from osscar.run.prune import prune_as_asked
from osscar.run.prune_page import run_facts
from osscar.run.run_log import RunLog
from osscar.run.target import prune_to_target
from osscar.run.target_search import (
    MOST_ATTEMPTS,
    SURE,
    Attempt,
    TargetReport,
    next_limit,
)
from tests.osscar.families import tiny
from tests.osscar.networks import images
from tests.osscar.test_run_log import Killed

DIVERGENCE, TOP1 = TargetKind.DIVERGENCE, TargetKind.TOP1

# ---- bounds ------------------------------------------------------------------------------


def test_the_bound_of_a_mean_is_where_a_one_sided_t_test_is_at_five_percent():
    half = np.random.default_rng(0).gamma(2.0, size=8)
    values = np.concatenate([half, 9 - half])  # not skewed
    found = bounded_mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.samples == 16
    test = scipy.stats.ttest_1samp(values, found.bound, alternative="less")
    assert test.pvalue == pytest.approx(0.05)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_the_truth_is_within_the_reported_bound_of_a_search(case):
    found = [one for one in searches(case, 500, seed=1) if one.truth is not None]
    assert len(found) > 470
    assert np.mean([one.holds for one in found]) > 0.94 - 2 * math.sqrt(0.94 * 0.06 / 500)
    for one in found:
        assert one.report.reported.bound <= one.report.most
        assert len(one.report.attempts) <= MOST_ATTEMPTS


def test_a_kind_that_is_named_as_seen_is_in_nineteen_of_twenty_sets_and_no_rarer_one():
    for samples in (16, 32, 128, 149, 1196):
        most = rarest_seen(samples)
        absent = [(1 - 1 / one) ** samples for one in (most, most + 1)]
        assert absent[0] <= 0.05 < absent[1]
    assert [rarest_seen(n) for n in (32, 128, 149)] == [11, 43, 50]


def test_no_bound_sees_a_kind_that_the_samples_lack_and_more_samples_do():
    def missed(samples):
        found = searches(f"1 in 50 with 30 times the loss, {samples}", 200, seed=1)
        return np.mean([not one.holds for one in found if one.truth is not None])

    assert missed(32) > 0.35
    assert missed(512) < 0.06


def test_the_bound_of_a_drop_covers_it_in_nineteen_of_twenty_sets():
    n = 24
    counts = [(b, c) for b, c in itertools.product(range(n + 1), repeat=2) if b + c <= n]
    bounds = {(b, c): bounded_drop(b, c, n).bound for b, c in counts}
    for lost, gained in ((0.0, 0.0), (0.13, 0.0), (0.05, 0.03), (0.1, 0.2), (0.3, 0.1)):
        chances = scipy.stats.multinomial(n, [lost, gained, 1 - lost - gained])
        within = [(b, c, n - b - c) for b, c in counts if bounds[b, c] >= lost - gained]
        assert chances.pmf(within).sum() >= 0.95 - 1e-6


def test_where_no_prediction_is_gained_the_bound_of_a_drop_is_that_of_clopper_and_pearson():
    for lost, n in ((0, 299), (3, 299), (10, 600), (1, 16)):
        due = scipy.stats.beta.ppf(0.95, lost + 1, n - lost)
        assert bounded_drop(lost, 0, n).bound == pytest.approx(due, rel=1e-4)
    assert bounded_drop(40, 0, 40).bound == 1
    assert bounded_drop(0, 40, 40).bound < 0
    for most in (0.01, 0.12, 0.25):
        fewest = fewest_samples(TOP1, most)
        assert bounded_drop(0, 0, fewest).bound <= most
        usual = usual_samples(TOP1, most)
        assert bounded_drop(round(usual * most / 2), 0, usual).bound <= most


def test_copies_and_samples_of_one_group_count_as_one():
    dense, data = labelled(24)
    worse = copy.deepcopy(dense)
    with torch.no_grad():
        next(iter(worse.parameters())).mul_(1.3)
    rows = torch.arange(24).repeat(3)
    moved = {"input": data.rows(rows).tensors["input"] + 1e-3 * torch.randn(72, 3, 12, 12)}
    near = osscar.TensorSet("near copies", moved, data.labels[rows], rows)
    for quality in (DIVERGENCE, TOP1):
        once, thrice, grouped = (
            Judge.of(quality, dense, some).measure(worse) for some in (data, data.rows(rows), near)
        )
        assert once.samples == thrice.samples == grouped.samples
        assert (thrice.value, thrice.bound) == pytest.approx((once.value, once.bound))
        assert grouped.value == pytest.approx(by_hand(quality, dense, worse, near), rel=1e-4)


# ---- the search --------------------------------------------------------------------------


def searched(truth, most, margin=1.0):
    """Return the attempts at a target, where models of a cost have a bound."""
    attempts = []
    target = QualityTarget(DIVERGENCE, most)
    while (limit := next_limit(lambda: FRONTIER, attempts, target)) is not None:
        predicted = (1 / limit) ** 2 - 1
        lost = truth(predicted)
        measured = None if lost is None else Bounded(lost, margin * lost, 16)
        attempts.append(Attempt(limit, limit, measured, measured))
    return attempts


def test_few_attempts_find_nearly_the_smallest_model():
    for most, factor, power in itertools.product((0.05, 0.3, 2), (0.1, 0.7, 1, 3), (0.7, 1, 1.6)):
        attempts = searched(lambda predicted, f=factor, p=power: f * predicted**p, most)
        least = 1 / math.sqrt((most / factor) ** (1 / power) + 1)
        found = min(one.reached for one in attempts if one.good(most))
        assert len(attempts) <= MOST_ATTEMPTS
        assert max(least, 0.2) <= found + 1e-9
        assert found - max(least, 0.2) < 0.06


def test_of_few_widths_the_largest_is_tried_and_none_twice_in_a_row():
    """The costs are those of a group with few widths, whose model of least loss alone passes."""
    target, attempts = QualityTarget(DIVERGENCE, 0.05), []
    while (limit := next_limit(lambda: FRONTIER, attempts, target)) is not None:
        reached = 0.97 if limit >= 0.97 else 0.3
        lost = Bounded(0.001 if reached > 0.5 else 1.0, 0.002 if reached > 0.5 else 1.2, 16)
        attempts.append(Attempt(limit, reached, lost, lost))
    assert any(one.good(0.05) for one in attempts)
    assert len(attempts) <= 3


@pytest.mark.parametrize("margin", [1.1, 1.4, 1.8])
def test_where_the_curves_predict_far_too_little_some_size_is_sure_to_pass(margin):
    for most, factor, power in itertools.product((0.07, 0.4, 1.5), (1.5, 4), (0.5, 0.8)):
        attempts = searched(lambda p, f=factor, r=power: f * p**r, most, margin)
        least = factor * FRONTIER[-2][1] ** power  # with the largest size below the dense model
        some = least * (1 + SURE * (margin - 1)) <= most
        assert any(one.likely(SURE) <= most for one in attempts) == some


def test_an_attempt_that_another_could_improve_little_ends_the_search():
    assert len(searched(lambda predicted: 1.86 * predicted, 0.3)) == 1
    assert len(searched(lambda predicted: 0.5 * predicted, 0.3)) > 1


def test_a_size_that_overflows_is_beyond_the_target_and_others_are_tried():
    attempts = searched(lambda predicted: predicted if predicted < 0.1 else None, 0.3)
    assert attempts[0].measured is None
    assert any(one.good(0.3) for one in attempts)
    assert len(attempts) > 1


def test_a_target_that_no_model_meets_ends_at_the_largest():
    attempts = searched(lambda predicted: 1.0, 0.1)
    assert 2 <= len(attempts) <= MOST_ATTEMPTS
    assert report_of(attempts, 0.1).chosen is None
    assert all(a.limit < b.limit for a, b in itertools.pairwise(attempts))


def test_where_the_smallest_model_is_within_the_target_it_is_the_one():
    assert searched(lambda predicted: 0.01, 50.0)[-1].limit == pytest.approx(0.2)


def report_of(attempts, most):
    return TargetReport(DIVERGENCE, most, "nats", Cost.PARAMETERS, 1.0, tuple(attempts))


def test_sizes_are_tested_from_the_largest_on_until_one_fails():
    def attempt(reached, measured, tested):
        found = None if tested is None else Bounded(tested - 0.01, tested, 32)
        return Attempt(reached, reached, Bounded(measured, measured, 32), found)

    sizes = [attempt(0.6, 0.08, 0.09), attempt(0.9, 0.02, 0.03), attempt(0.5, 0.2, None)]
    every = report_of(sizes, 0.1)
    assert [at for at, _ in every.tests] == [1, 0]
    assert (every.chosen, every.reported) == (0, sizes[0].tested)
    between = report_of([*sizes, attempt(0.7, 0.07, 0.11)], 0.1)  # 0.6 is not tested any more
    assert between.tests == ((1, True), (3, False))
    assert between.chosen == 1
    assert between.reported == Bounded(sizes[1].tested.value, 0.1, 32)
    none = report_of([attempt(0.7, 0.07, 0.11), attempt(0.6, 0.08, 0.09)], 0.1)
    assert none.chosen is None
    assert none.reported is None


# ---- the parts ---------------------------------------------------------------------------


def test_the_parts_share_no_sample_and_have_all_of_them():
    data, numbers = torch.arange(35)[:, None], torch.arange(35)
    parts = in_parts(data, numbers, seed=3)
    assert [len(part) for part in parts] == [19, 8, 8]
    assert torch.equal(torch.cat([*parts]).sort(0).values, data)
    assert not torch.equal(in_parts(data, numbers, seed=4).searched, parts.searched)
    assert torch.equal(in_parts({"x": data}, numbers, seed=3).tested["x"], parts.tested)


def test_copies_are_in_one_part():
    parts = in_parts(torch.arange(64), torch.arange(64) % 8, seed=0)
    kinds = [set((part % 8).tolist()) for part in parts]
    assert [len(kind) for kind in kinds] == [4, 2, 2]
    assert len(set.union(*kinds)) == 8


# ---- whole runs --------------------------------------------------------------------------


@pytest.fixture
def two_attempts(monkeypatch):
    """Let a search end after two attempts."""
    monkeypatch.setattr("osscar.run.target_search.MOST_ATTEMPTS", 2)


def labelled(count=192):
    """Return images, with what the dense model says of them; a few labels are not scored."""
    dense, data = two_groups(), images(count)
    labels = dense(data).argmax(1)
    labels[::40] = IGNORED
    return dense, osscar.TensorSet("images", {"input": data}, labels)


def two_groups():
    """Return a network with channels and neurons."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*stem, nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


def text():
    """Return a language model and windows for it."""
    windows = torch.randint(0, 64, (64, 16), generator=torch.manual_seed(5))
    return tiny("llama-gqa", layers=1), windows


def by_hand(quality, dense, model, data):
    """Return what is lost of a quality, in the plainest way."""
    with torch.no_grad():
        if quality is TargetKind.PERPLEXITY:
            found = [
                F.cross_entropy(one(data).logits[:, :-1].flatten(0, 1), data[:, 1:].flatten())
                for one in (model, dense)
            ]
            return float((found[0] - found[1]).expm1())
        (x,) = data.tensors.values()
        p, q = (one(x).double().log_softmax(-1) for one in (dense, model))
        if quality is DIVERGENCE:
            return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))
        known = data.labels != IGNORED
        right = [(one.argmax(-1) == data.labels)[known].double().mean() for one in (p, q)]
        return float(right[0] - right[1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("quality", "most", "case"),
    [
        pytest.param(TargetKind.PERPLEXITY, "12%", text, marks=pytest.mark.slow),
        (TOP1, "25%", labelled),
        (DIVERGENCE, 0.02, labelled),
    ],
)
def test_the_smallest_model_is_measured_on_samples_that_nothing_was_fitted_to(
    quality, most, case, two_attempts, monkeypatch
):
    dense, data = case()
    fitted, lines = [], []
    monkeypatch.setattr(
        chain,
        "prune_groups",
        lambda now, *rest: fitted.append(now.prepared.inputs.tensors) or prune_groups(now, *rest),
    )
    request = PruningRequest(**{quality: most, "smallest": "flops"})
    result = prune_as_asked(dense, data, request, tell=lines.append)
    report, most = result.target, request.quality.most
    chosen = report.attempts[report.chosen]
    assert 1 <= len(fitted) == len(report.attempts) <= 2
    assert chosen.tested.bound <= most
    assert chosen.reached < report.dense
    parts = in_parts(data, torch.arange(len(data)), request.seed)
    pruned_on = getattr(parts.pruned_on, "tensors", {"input_ids": parts.pruned_on})
    assert all(torch.equal(used[name], x) for used in fitted for name, x in pruned_on.items())
    for measured, part in ((chosen.measured, parts.searched), (chosen.tested, parts.tested)):
        expected = by_hand(quality, dense, result.model, part)
        assert measured.value == pytest.approx(expected, abs=1e-5)
        assert measured.bound > measured.value
    assert sum("with 95 % confidence" in line for line in lines) == len(report.tests)
    n = report.reported.samples
    holds = f"for data like these {n} samples; a kind of sample that is rarer than 1 in "
    assert dict(run_facts(result.record()))["holds"].startswith(f"{holds}{rarest_seen(n)} may")
    assert result.held_out == report.reported.samples


prune_groups = chain.prune_groups


@pytest.mark.slow
def test_a_search_that_was_killed_repeats_no_attempt_and_ends_with_the_same_bits(
    two_attempts, tmp_path, monkeypatch
):
    request, sizes = PruningRequest(max_divergence=0.0005), []

    def measure(self, model):  # as if the first attempt were well within the target, and no other
        sizes.append(count_parameters(model))
        lost = 0.0001 if sizes[-1] == sizes[0] else 0.001
        return Bounded(lost, lost, 16)

    monkeypatch.setattr(Judge, "measure", measure)
    whole = prune_as_asked(two_groups(), images(64), request)
    log, appended, original = RunLog(tmp_path / "log"), [], RunLog.append

    def append(self, index, record):
        original(self, index, record)
        appended.append((self.directory.name, index))
        if [name for name, _ in appended].count("attempt-2") == 1:
            raise Killed

    monkeypatch.setattr(RunLog, "append", append)
    with pytest.raises(Killed):
        prune_as_asked(two_groups(), images(64), request, log)
    again = prune_as_asked(two_groups(), images(64), request, log)
    assert len(appended) == len(set(appended))
    assert (again.target, again.plan) == (whole.target, whole.plan)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def shaken(model):
    """Change weights by what graphics cards do, which add up in any order."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-6)
    return model


@pytest.fixture
def between_fails(monkeypatch, tmp_path):
    """Let the first size pass its test, then a smaller one, and fail the third, between them.

    Return the digests of what was tested, and the folder of temporary files.
    """
    monkeypatch.setattr("osscar.run.target_search.MOST_ATTEMPTS", 3)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    due = [(0.3, 0.35), (0.3, 0.35), (0.8, 0.95), (0.8, 0.9), (0.6, 0.7), (0.8, 1.2)]
    digests = []

    def measure(self, model):
        value, bound = due[len(digests)]
        digests.append(digest_of_weights(model))
        return Bounded(0.01 * value, 0.01 * bound, 16)

    monkeypatch.setattr(Judge, "measure", measure)
    return digests, tmp_path


BETWEEN = PruningRequest(max_divergence=0.01, round_to=1, backend="magnitude", device="cpu", seed=2)


def reached(report):
    return [round(one.reached) for one in report.attempts]


@pytest.mark.parametrize("recovers", [False, True])
def test_the_model_that_passed_its_test_is_returned_and_no_other_is_saved(recovers, between_fails):
    digests, place = between_fails

    def recover(pruned, data, attempt):
        asked = {"steps": 1, "batch_size": 4, "seed": len(digests), "device": "cpu"}  # not repeated
        return osscar.recover(pruned, dense, data, **asked)

    dense = two_groups()
    result, _ = prune_to_target(dense, images(64), BETWEEN, recover=recover if recovers else None)
    first, second, third = reached(result.target)
    assert second < third < first
    assert result.target.chosen == 0
    assert len(set(digests[::2])) == 3
    assert result.target.attempts[0].weights == digests[1] == digest_of_weights(result.model)
    assert [one.weights for one in result.target.attempts[1:]] == [digests[3], None]
    assert not [*place.iterdir()]
    shaken(result.model)
    with pytest.raises(EquivalenceError, match="other weights than that which passed the test"):
        result.save(place / "small")
    assert not [*place.iterdir()]


def test_weights_that_were_tested_are_returned_where_a_machine_repeats_no_bits(
    between_fails, monkeypatch
):
    digests, place = between_fails
    original, log = target.prune_prepared, RunLog(place / "log")

    def once_more(*given):
        if len(digests) == 4:
            raise Killed
        return original(*given)

    monkeypatch.setattr(target, "prune_prepared", once_more)
    with pytest.raises(Killed):
        prune_as_asked(two_groups(), images(64), BETWEEN, log)

    def otherwise(*given):
        result = original(*given)
        shaken(result.model)
        return result

    monkeypatch.setattr(target, "prune_prepared", otherwise)
    result = prune_as_asked(two_groups(), images(64), BETWEEN, log)
    assert result.target.chosen == 0
    assert digest_of_weights(result.model) == digests[1]


def test_nothing_is_left_of_a_search_without_a_log_that_fails(between_fails, monkeypatch):
    digests, place = between_fails
    monkeypatch.setattr(target, "digest_of_weights", lambda model: digests[9])
    with pytest.raises(IndexError):
        prune_as_asked(two_groups(), images(64), BETWEEN)
    assert not [*place.iterdir()]


@pytest.mark.slow
def test_a_target_that_nothing_meets_says_what_is_nearest_and_leaves_nothing(tmp_path, monkeypatch):
    log, request = RunLog(tmp_path / "log"), PruningRequest(max_divergence=0.02)
    monkeypatch.setattr(Judge, "measure", lambda self, model: Bounded(0.01, 0.03, 16))
    monkeypatch.setattr("osscar.run.target_search.MOST_ATTEMPTS", 1)
    with pytest.raises(RequestError, match=r"within max_divergence 0.02: the nearest, .* of"):
        prune_as_asked(two_groups(), images(64), request, log)
    assert not log.directory.exists()


@pytest.mark.slow
def test_budgets_beside_a_target_hold_too(two_attempts, monkeypatch):
    dense = two_groups()
    data, sample = osscar.TensorSet("images", {"input": images(64)}), {"input": images(1)}
    most = count_flops(dense, sample)

    def measure(self, model):  # as if all that counts were whether a third of the operations stays
        enough = count_flops(model, sample) > 0.33 * most
        return Bounded(0.0003, 0.00035 if enough else 0.0006, 16)

    monkeypatch.setattr(Judge, "measure", measure)
    asked = {"max_divergence": 0.0005, "smallest": "flops", "round_to": 1}
    alone, beside = (osscar.prune(dense, data, **asked, params=share) for share in (0.9, 0.34))
    assert alone.parameters_after > 0.34 * alone.parameters_before  # or nothing is seen
    assert beside.parameters_after <= 0.34 * beside.parameters_before
    for result in (alone, beside):
        assert count_flops(result.model, sample) > 0.33 * most
        assert result.target.cost == "flops"
    with pytest.raises(RequestError, match=r"max_divergence 0\.0003 and params 0\.5: the nearest"):
        osscar.prune(dense, data, max_divergence=0.0003, params=0.5)


class Shortcut(nn.Sequential):
    """Layers with a shortcut around them."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("lost", "inner"), [(0.05, True), (0.1, False)])
def test_a_search_goes_on_to_models_that_keep_all_residual_channels(lost, inner, monkeypatch):
    """Also where trials take channels of these from smaller models, or nothing else can go."""
    torch.manual_seed(0)
    block = Shortcut(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), block, nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()
    most = count_parameters(dense)

    def measure(self, model):  # as if all that counts were how many parameters leave
        value = lost * (1 - count_parameters(model) / most)
        return Bounded(value, 1.1 * value, 16)

    monkeypatch.setattr(Judge, "measure", measure)

    def distance(task, keep):  # as if what loses most were all that counts
        return 1 - min(keep.get(g.name, g.units) / g.units for g in (*task.shared, *task.streams))

    monkeypatch.setattr("osscar.allocation.allocate.whole_distance", distance)
    data = torch.randn(64, 3, 6, 6)
    skip = [] if inner else ["1.0.channels"]
    found = osscar.prune(dense, data, max_divergence=0.02, round_to=1, skip=skip).target
    assert 0.02 / 2 < found.reported.value < 0.02


def test_samples_that_a_drop_lacks_are_counted_before_the_first_attempt(monkeypatch):
    dense, data = labelled(532)
    monkeypatch.setattr("osscar.run.target._Search.smallest", None)  # which is not reached
    with pytest.raises(
        DataError, match=r"needs the class of each calibration sample, .* no labels"
    ):
        osscar.prune(dense, data.tensors, max_top1_drop="1%")
    with pytest.raises(DataError, match=r"needs at least 1196 different .* are 532, 664 too few"):
        osscar.prune(dense, data, max_top1_drop="1%")


@pytest.mark.slow
def test_the_command_recovers_each_attempt_and_measures_what_it_saves(
    two_attempts, tmp_path, monkeypatch, run
):
    dense, data = two_groups(), images(96)
    np.savez(tmp_path / "data.npz", input=data, labels=dense(data).argmax(1))
    code = "from tests.osscar.networks import images\n"
    code += "from tests.osscar.test_quality_target import two_groups\n"
    code += "def build():\n    return two_groups(), images(2)\n"
    (tmp_path / "net.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    words = "prune net.py:build --calibration data.npz --samples 96 --max-divergence 0.05"
    words += " --recover --set recovery.steps=4 --out smaller --json run.json"
    status, printed, err = run(*words.split())
    assert (status, "attempt 1: keeps" in printed) == (0, True), err
    assert not list(tmp_path.glob("smaller.*"))
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["recovery"]["samples"] + found["recovery"]["held_out"] == 48  # none that chooses
    page = (tmp_path / "smaller" / "report.html").read_text()
    assert "on samples that chose nothing" in page
    assert "for data like these 24 samples; a kind of sample that is rarer than 1 in 8" in page
    assert "for data like these 24 samples" in printed
    assert page.count('data-of="result">chosen<') == 1
    drawn = osscar.load_tensors(tmp_path / "data.npz", dense).sample(96, 0)
    saved = osscar.load(tmp_path / "smaller", dense=dense)
    due = by_hand(DIVERGENCE, dense, saved, in_parts(drawn, torch.arange(96), 0).tested)
    assert found["target"]["reported"]["value"] == pytest.approx(due, rel=1e-3)


def test_outputs_that_are_nan_are_no_measurement():
    for quality in TargetKind:
        dense, data = text() if quality is TargetKind.PERPLEXITY else labelled(16)
        judge, broken = Judge.of(quality, dense, data), copy.deepcopy(dense)
        with torch.no_grad():
            list(broken.parameters())[-1].fill_(math.nan)
        with pytest.raises(NonFiniteError):
            judge.measure(broken)
