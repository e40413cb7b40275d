"""Models that read neither text nor pictures, from the file of tensors to the command line."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import (
    ModelError,
)
from osscar.data.batches import as_inputs
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.network.predictions import place_of_classes
from osscar.preparation.fingerprint import Fingerprint
from osscar.proof.lineage import lineage_of
from osscar.proof.seen import Seen

CODE = """
import torch
from torch import nn

class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.body = nn.Sequential(nn.Conv1d(9, 12, 3), nn.ReLU(), nn.Conv1d(12, 10, 3), nn.ReLU())
        self.head = nn.Linear(10, 6)

    def forward(self, wave):
        z = torch.stft(wave.squeeze(1), 16, 8, window=self.window, return_complex=True)
        return self.head(self.body(z.abs()).mean(-1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.tokens = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.join = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, tokens, features, scale=None):
        return self.join(torch.cat([self.tokens(self.embed(tokens)).mean(1), features], 1))

def sound():
    torch.manual_seed(0)
    return Sound(), torch.zeros(2, 1, 80)

def two():
    torch.manual_seed(0)
    example = {"tokens": torch.zeros(2, 6, dtype=torch.int64), "features": torch.zeros(2, 4)}
    return Two(), example

def alone():
    return Two()
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return lambda function: f"mine.py:{function}"


def waves(count, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, count)
    times = np.arange(80) * (labels[:, None] + 1) * 0.3
    wave = np.sin(times) + 0.3 * generator.normal(size=(count, 80))
    return {"wave": wave[:, None].astype(np.float32), "labels": labels}


def pairs(count, seed):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 4)).astype(np.float32)
    return {"tokens": generator.integers(0, 9, (count, 6)), "features": features}


# ---- from end to end ---------------------------------------------------------------------


def test_a_model_that_reads_sound_is_pruned_scored_and_swept(run, code, tmp_path):
    """Its labels say that it is a classifier, and its Fourier window is a view of more."""
    parts = {"cal": waves(60, 0), "test": waves(60, 1)}
    for part, arrays in parts.items():
        np.savez(f"{part}.npz", **arrays)
    asked = (code("sound"), "--calibration", "cal.npz", "--samples", 50, "--sparsity", 0.4)
    status, out, err = run("prune", *asked, "--out", "small", "--json", "prune.json")
    assert status == 0, err
    report = json.loads((tmp_path / "prune.json").read_text())
    assert report["divergence"] is not None
    assert report["calibration"]["seen"]["count"] == report["calibration"]["samples"] == 50

    scored = ("small", "--dense", code("sound"), "--json", "eval.json")
    status, out, err = run("eval", *scored, "--inputs", "test.npz")
    assert status == 0, err
    assert "60 labelled samples scored, 'output' as scores of classes" in out
    found = json.loads((tmp_path / "eval.json").read_text())
    dense = load_model(code("sound")).model
    pruned = load_model("small", dense=code("sound")).model
    wave, labels = torch.from_numpy(parts["test"]["wave"]), parts["test"]["labels"]
    with torch.no_grad():
        mine, theirs = (model(wave).double() for model in (pruned, dense))
    quality = found["model"]["quality"]
    assert quality["top1"] == pytest.approx((mine.argmax(1).numpy() == labels).mean())
    alike = (mine.argmax(1) == theirs.argmax(1)).double().mean()
    assert quality["agreement"] == pytest.approx(float(alike))
    error = float((mine - theirs).square().sum() / theirs.square().sum())
    assert 0 < quality["errors"]["output"] == pytest.approx(error, rel=1e-4)
    assert found["model"]["footprint"]["flops"] < found["dense"]["footprint"]["flops"]

    for more, said in (
        (
            ("--inputs", "cal.npz"),
            "about 83.3% of cal.npz was used to calibrate or recover",
        ),
        (("--images", "test.npz"), "torch.float32 (2, 1, 80), and images are one tensor"),
        (("--inputs", "test.npz", "--no-normalize"), "images are one tensor"),
    ):
        status, _, err = run("eval", *scored, *more)
        assert (status, said in " ".join(err.split())) == (2, True), err
    status, out, err = run("sweep", *asked, "--inputs", "test.npz", "--out", "sweep")
    assert status == 0, err
    assert "squared error of output" in (tmp_path / "sweep" / "report.html").read_text()
    swept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    errors = swept["points"][1]["quality"]["errors"]
    assert errors["output"] == pytest.approx(error, rel=1e-3)


# ---- files -------------------------------------------------------------------------------


class Mixed(nn.Module):
    def forward(self, tokens, features, scale=None):
        return features + tokens.sum(1, keepdim=True)


GOOD = pairs(8, 0)


def test_samples_of_a_file_are_drawn_and_known_again(tmp_path):
    np.savez(tmp_path / "x.npz", tokens=GOOD["tokens"], features=GOOD["features"].astype(">f8"))
    np.savez(tmp_path / "y.npz", **GOOD)
    np.savez(tmp_path / "z.npz", **{**GOOD, "tokens": GOOD["tokens"].astype("uint16")})
    model = Mixed()
    found, same, short = (osscar.load_tensors(tmp_path / f"{n}.npz", model) for n in "xyz")
    assert found.fingerprints() == same.fingerprints()
    assert short.tensors["tokens"].dtype == torch.int64  # by which torch may index
    drawn = found.sample(5, seed=1)
    assert set(drawn.fingerprints()) < set(found.fingerprints())
    assert len(drawn) == len(set(drawn.fingerprints())) == 5
    assert drawn.fingerprints() != found.sample(5, seed=2).fingerprints()


# ---- from Python -------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def samples(seed=0, labels=None):
    generator = torch.Generator().manual_seed(seed)
    return osscar.TensorSet("drawn", {"input": torch.randn(48, 5, generator=generator)}, labels)


def test_labels_say_that_a_matrix_is_of_scores_of_classes_and_are_part_of_the_data():
    labels, model = torch.arange(48) % 4, network()
    plain, labelled = (as_inputs(model, samples(labels=given)) for given in (None, labels))
    assert labelled.predictions == ()
    told = [Fingerprint.of(model, given) for given in (plain, labelled)]
    assert told[0].difference(told[1]) == "the calibration data differ"
    assert osscar.prune(model, samples(labels=labels), flops=0.6).divergence > 0


def test_what_calibrated_a_model_is_known_and_its_evaluation_is_of_python_too():
    dense, data = network(), samples()
    pruned = osscar.prune(dense, data, neurons=0.5).model
    (known,) = lineage_of(pruned).calibration
    assert known.seen == Seen.of(data.fingerprints())
    labelled = samples(1, torch.arange(48) % 4)
    found = osscar.compare(pruned, dense, labelled, repetitions=1)
    assert found.model.quality.top1 is not None
    assert found.dense.quality.errors == {}
    alone = osscar.evaluate(pruned, labelled, batch_size=7, repetitions=1)
    assert alone.quality.top1 == found.model.quality.top1
    assert alone.sample == "sample"


def test_labels_are_whole_numbers_of_any_width_and_those_of_minus_100_are_not_scored():
    model = network()
    right = model(samples().tensors["input"]).argmax(1)
    some = torch.where(torch.arange(48) < 12, right, -100)
    scores = {}
    for name, labels in {
        "all": right.to(torch.uint16),
        "some": some,
        "none": some - some - 100,
    }.items():
        data = samples(labels=labels).sample(48, seed=0)
        scores[name] = score([model], data)[0].top1
    assert [*scores.values()] == [1.0, 1.0, None]


def test_the_classes_of_predictions_at_several_places_are_found_as_torch_has_them():
    for shape, labels, sequences, place in (
        ((48, 3), (48,), False, 1),
        ((48, 3, 5), (48, 5), False, 1),
        ((48, 5, 3), (48, 5), False, 2),
        ((48, 5, 5), (48, 5), False, 1),
        ((48, 5, 5), (48, 5), True, 2),
        ((48, 1, 3), (48, 5), True, 2),  # the last of each sequence
        ((48, 3, 4), (48, 5), False, None),
        ((48, 1), (48,), False, None),
    ):
        assert place_of_classes(shape, labels, sequences=sequences) == place
    with pytest.raises(ModelError, match=r"scores of classes would be \(32, 'classes', 5\)"):
        score([network()], samples(labels=torch.zeros(48, 5, dtype=int)))


class AnyNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, z):
        return self.net(torch.view_as_real(z).flatten(1) if z.is_complex() else z.float())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e5m2])
def test_a_model_of_any_number_format_is_opened_again(dtype, tmp_path):
    (tmp_path / "mine.py").write_text("from tests.osscar.test_tensors import AnyNumber")
    data = (torch.rand(24, 3 if dtype.is_complex else 6) * 8).to(dtype)
    pruned = osscar.prune(AnyNumber().eval(), {"z": data}, neurons=0.5, backend="magnitude")
    pruned.save(tmp_path / "small")
    dense = f"{tmp_path / 'mine.py'}:AnyNumber"
    assert load_model(tmp_path / "small", dense=dense).example["z"].shape[1:] == data.shape[1:]
