"""Recovered models: never worse, and in every other respect what they were."""

from __future__ import annotations

import copy
import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import osscar
from osscar.base.errors import DataError, ModelError, NonFiniteError, OptionError
from osscar.data.batches import ModelInputs, as_inputs
from osscar.data.parts import shuffled
from osscar.data.reader import Reader
from osscar.data.text import CalibrationSet
from osscar.distance.distance import Distance, Reference
from osscar.proof.lineage import lineage_of, note_dense
from osscar.proof.seen import Calibration
from osscar.recovery import samples as drawing
from osscar.recovery.training import Training, nearest
from tests.osscar.families import framing_tokenizer, logits, tiny, tokens
from tests.osscar.networks import plain, small_net
from tests.osscar.recovery.cases import ADAPTED, FORMS
from tests.osscar.recovery.perturbed import bytes_of, needs_peft, net, numbers, perturbed, raw

HELD = 2
OFTEN = {"steps": 3, "learning_rate": 1e-3, "held_out": HELD, "batch_size": 4, "device": "cpu"}


def recomputed(model, dense, data, at_once, seed=0):
    """The distance on the samples that decide, drawn anew."""
    dense, model = copy.deepcopy(dense).eval(), copy.deepcopy(model).eval()
    inputs = shuffled(as_inputs(dense, data), seed)
    samples = inputs.batches(1)
    deciding = drawing.in_batches(samples[-HELD:], at_once)
    distance = Distance.from_outputs(dense, inputs, deciding[0])
    return Reference.from_run(distance, dense, deciding).divergence(model)


def held(model):
    """All that is to stay: types, names, shapes, formats, flags, modes, and what is one tensor."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    same = defaultdict(list)
    for name, tensor in tensors:
        same[id(tensor)].append(name)
    return (  # torch makes a class for each program
        [(n, type(m).__name__, m.training) for n, m in model.named_modules()],
        [(name, tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in tensors],
        sorted(same.values()),
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=needs_peft) if one == ADAPTED else one for one in FORMS]
)
def test_only_weights_change_and_never_for_the_worse(name):
    form = FORMS[name]
    smaller, dense, data = form.made()
    was = [(held(one), bytes_of(one)) for one in (smaller, dense)]
    recovery = osscar.recover(smaller, dense, data, **{**OFTEN, **form.asked})
    assert [(held(one), bytes_of(one)) for one in (smaller, dense)] == was
    assert held(recovery.model) == was[0][0]
    assert all(p.grad is None for m in (smaller, dense, recovery.model) for p in m.parameters())
    (found, before) = (bytes_of(one) for one in (recovery.model, smaller))
    assert all(found[name] == before[name] for name, _ in smaller.named_buffers())
    assert lineage_of(recovery.model).plans == lineage_of(smaller).plans
    assert recovery.after <= recovery.before
    at_once = recovery.chosen["micro_batch_size"]
    for model, due in ((smaller, recovery.before), (recovery.model, recovery.after)):
        assert recomputed(model, dense, data, at_once) == pytest.approx(due, rel=1e-6)
    assert (found == before) == (recovery.kept == 0)
    copy.deepcopy(recovery.model)  # nothing hangs on a graph


# ---- never worse -------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1e-5, 1e-3, 0.03, 0.3, 1.0]),
    st.sampled_from([0.0, 1e-3, 0.5, 30.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 12),
)
def test_no_rate_makes_a_model_worse(seed, rate, noise, kind, steps):
    dense, data = net(seed).to(kind), numbers(seed=seed)
    smaller = perturbed(dense, noise, seed)
    asked = {**OFTEN, "learning_rate": rate, "steps": steps, "seed": seed}
    recovery = osscar.recover(smaller, dense, data, **asked)
    found = recomputed(recovery.model, dense, data, 4, seed)
    assert found == pytest.approx(recovery.after, rel=1e-3)  # of outputs that are all but the same
    assert recovery.after <= recovery.before
    assert recovery.points[-1].step <= steps
    assert (recovery.kept == 0) == (bytes_of(recovery.model) == bytes_of(smaller))
    if noise == 0.0:
        assert (recovery.kept, recovery.after) == (0, 0.0)


def test_all_that_is_held_out_decides_and_not_only_what_is_checked(monkeypatch):
    monkeypatch.setattr("osscar.recovery.training.CHECKED", {True: 1, False: 1})
    dense, data = net(), numbers(40)
    recovery = osscar.recover(perturbed(dense), dense, data, **OFTEN)
    at_once = recovery.chosen["micro_batch_size"]
    assert recovery.held_out > 1
    found = recomputed(recovery.model, dense, data, at_once)
    assert found == pytest.approx(recovery.after, rel=1e-6)
    outvoted = 0  # where steps are too long, the one sample that is checked may be nearer by chance
    for seed in range(12):
        asked = {**OFTEN, "held_out": 8, "learning_rate": 0.03, "seed": seed}
        recovery = osscar.recover(perturbed(dense, 0.05, seed), dense, data, **asked)
        assert recovery.after <= recovery.before
        outvoted += recovery.kept == 0 and nearest(recovery.points).step > 0
    assert outvoted


def test_most_of_what_was_lost_comes_back():
    """Also where a step is smaller than what the number format can tell."""
    dense, data = net().bfloat16(), numbers(200)
    asked = {"steps": 100, "learning_rate": 3e-3, "device": "cpu"}
    recovery = osscar.recover(perturbed(dense), dense, data, **asked)
    assert recovery.after < 0.3 * recovery.before
    assert recovery.kept > 10


@pytest.mark.parametrize(("kind", "rate"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-6)])
def test_a_model_that_does_what_the_dense_one_does_is_not_made_better(kind, rate):
    """Also where sums of its numbers are rounded in another order."""
    dense = tiny("llama-gqa", layers=1).to(kind)
    other = copy.deepcopy(dense)
    (layer,) = other.model.layers
    with torch.no_grad():
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
            matrix.weight.copy_(matrix.weight.flip(0))
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight.flip(1))
    for smaller in (copy.deepcopy(dense), other):
        recovery = osscar.recover(smaller, dense, tokens(8), **{**OFTEN, "learning_rate": rate})
        assert 0.0 <= recovery.before < (1e-11 if kind == torch.float32 else 1e-4)
        assert recovery.kept == 0 or kind == torch.bfloat16
        assert (smaller is other) or (recovery.kept, recovery.before) == (0, 0.0)


# ---- which weights -----------------------------------------------------------------------


def test_what_a_model_freezes_stays_unless_it_freezes_everything():
    dense, data = net(), numbers()
    smaller = perturbed(dense)
    smaller[0].requires_grad_(False)
    recovery = osscar.recover(smaller, dense, data, **OFTEN)
    assert recovery.trained == sum(weight.numel() for weight in smaller[2].parameters())
    assert torch.equal(recovery.model[0].weight, smaller[0].weight)
    smaller.requires_grad_(False)
    recovery = osscar.recover(smaller, dense, data, **OFTEN)
    assert recovery.trained == sum(weight.numel() for weight in smaller.parameters())
    assert not any(weight.requires_grad for weight in recovery.model.parameters())


# ---- the samples -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    """The demo's tokenizer, and one that puts a token before each window and one after it."""
    return osscar.load_model("demo").tokenizer, framing_tokenizer()


def split(inputs, **asked):
    request = osscar.RecoveryRequest(**asked)
    training, deciding = drawing.split(inputs, request)
    return ([one["input_ids"][0].tolist() for one in some] for some in (training, deciding))


@settings(max_examples=30, deadline=None)
@given(
    words=st.integers(40, 900),
    samples=st.integers(2, 24),
    seqlen=st.sampled_from([12, 24, 40]),
    seed=st.integers(0, 9),
    frame=st.booleans(),
)
@example(words=514, samples=22, seqlen=40, seed=8, frame=True)
def test_no_text_of_a_window_that_decides_trains(words, samples, seqlen, seed, frame, tokenizers):
    """Each word is another one, so that places in the text are known."""
    tokenizer = tokenizers[frame]
    text = torch.arange(words) + 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osscar.data.text.encode", lambda *_: text)
        windows = osscar.load_calibration(
            ["x"], tokenizer, samples=samples, seqlen=seqlen, seed=seed
        )
    inputs = ModelInputs(Reader.of(net()), {"input_ids": windows.tokens}, tokens=True)
    try:
        training, deciding = split(inputs)
    except DataError:
        training, deciding = [], windows.tokens[-max(1, samples // 8) :].tolist()
    assert len(deciding) == min(8, max(1, samples // 8))
    assert all(window in windows.tokens.tolist() for window in training + deciding)
    words_of = [{token for token in window if token >= 1000} for window in deciding]
    for window in training:  # beside two that decide it may have more in common with both
        assert all(len(held & set(window)) < min(32, seqlen // 2) for held in words_of)
    apart = [w for w in windows.tokens.tolist() if not any(held & set(w) for held in words_of)]
    assert all(window in training for window in apart)


def test_images_are_changed_by_the_seed_and_only_where_they_are_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    dense = small_net()
    loaded = osscar.load_images(tmp_path / "images.npz", plain(12))
    tensors = as_inputs(dense, loaded).tensors

    def seen(data, **asked):
        request = osscar.RecoveryRequest(**OFTEN, **asked)
        steps = Training(drawing.Setup(dense, dense, data, request), request)._steps()
        return torch.cat([next(iter(one.values())) for step in steps for one in step])

    first, none = seen(loaded), seen(loaded, augment="none")
    assert torch.equal(first, seen(loaded))
    assert torch.equal(none, seen(dict(tensors)))
    assert not torch.equal(first, seen(loaded, seed=1))
    with pytest.raises(OptionError, match="augment is 'flip-shift', and the data are no images"):
        seen(dict(tensors), augment="flip-shift")
    images = set(map(raw, next(iter(tensors.values()))))
    assert set(map(raw, none)) <= images
    assert not set(map(raw, first)) <= images


def test_an_image_is_mirrored_and_shifted():
    image = torch.arange(1.0, 2 * 16 * 16 + 1).view(1, 2, 16, 16)
    padded = [nn.functional.pad(one, (2,) * 4, mode="replicate") for one in (image, image.flip(-1))]
    places = [(m, down, right) for m in range(2) for down in range(5) for right in range(5)]
    due = {
        raw(padded[m][..., down : down + 16, right : right + 16]): (m, down, right)
        for m, down, right in places
    }
    found = [due[raw(drawing.shifted({"x": image}, turn, 0)["x"])] for turn in range(400)]
    assert set(found) == set(places)


# ---- what is refused, and how it is called -----------------------------------------------


def changed(of_outputs):
    """Return the net, of which the outputs are changed."""

    class Changed(nn.Sequential):
        def forward(self, input):
            return of_outputs(super().forward(input))

    return Changed(*net())


def edited(place, value):
    model = net()
    with torch.no_grad():
        model[2].weight[place] += value
    return model


def noted():
    model = perturbed(net())
    note_dense(model, net())
    return model


def refused():
    """Yield smaller models, dense ones, and what is said of them."""
    infinite = changed(lambda y: y / 0.0)
    other = r"have the shapes \[\[2, {}\]\], and the dense one's "
    finite = "distance of the two models is not finite on the held-out"
    yield noted(), edited((1, 5), 1e-6), ModelError, "was not pruned from this Sequential"
    yield nn.Sequential(nn.Linear(6, 4)), net(), ModelError, other.format(4)
    yield net(), edited((0, 0), torch.nan), NonFiniteError, "'2.weight' are NaN"
    yield net(), infinite, NonFiniteError, finite
    yield changed(torch.detach), net(), ModelError, "no gradients flow through Changed: .*no_grad"


def test_what_cannot_be_trained_is_refused_and_stays_as_it_was():
    for smaller, dense, error, message in refused():
        models = [one for one in (smaller, dense) if isinstance(one, nn.Module)]
        before = [(held(one), bytes_of(one)) for one in models]
        with pytest.raises(error, match=message):
            osscar.recover(smaller, dense, numbers(), **OFTEN)
        assert [(held(one), bytes_of(one)) for one in models] == before


@pytest.mark.parametrize(
    ("name", "around"), [("tied embeddings", torch.inference_mode), ("graphs", torch.no_grad)]
)
def test_two_runs_end_with_the_same_bytes_wherever_they_are_called(name, around):
    expected = osscar.recover(*FORMS[name].made(), **OFTEN, mixed_precision="no").model
    with around():
        found = osscar.recover(*FORMS[name].made(), **OFTEN, mixed_precision="no").model
        assert not any(tensor.is_inference() for tensor in found.state_dict().values())
    assert bytes_of(found) == bytes_of(expected)


def test_a_recovered_model_is_written_and_read_like_any(tmp_path):
    dense = tiny("opt", layers=1)
    text, other = (CalibrationSet(tokens(9, seed=n), "a text", n) for n in (1, 2))
    small = osscar.prune(dense, text, neurons=0.5, backend="magnitude", device="cpu").model
    recovery = osscar.recover(perturbed(small), dense, other, **OFTEN)
    assert recovery.kept > 0
    json.dumps(recovery.document())
    osscar.save(recovery.model, tmp_path / "out")
    again = osscar.load(tmp_path / "out")
    assert bytes_of(again) == bytes_of(recovery.model)
    assert lineage_of(again).plans == lineage_of(small).plans
    assert [*lineage_of(again).calibration] == [Calibration.of(x.describe()) for x in (text, other)]
    assert_close(logits(again, text.tokens), logits(recovery.model, text.tokens))
