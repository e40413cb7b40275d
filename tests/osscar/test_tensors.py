"""Models that read neither text nor pictures, from the file of tensors to the command line."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import ModelError
from osscar.data.batches import as_inputs
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.network.predictions import place_of_classes
from osscar.preparation.journal import Fingerprint

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

def sound():
    torch.manual_seed(0)
    return Sound(), torch.zeros(2, 1, 80)
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


@pytest.mark.slow
def test_a_model_that_reads_sound_is_pruned_and_scored(run, code, tmp_path):
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
    status, out, err = run("eval", *scored, "--inputs", "test.npz", "--prove")
    assert status == 0, err
    assert "proved again: " in " ".join(out.split())
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

    status, _, err = run("eval", *scored, "--inputs", "cal.npz")
    assert status == 2
    assert "about 83.3% of cal.npz was used to calibrate or recover" in " ".join(err.split())


# ---- files -------------------------------------------------------------------------------


class Mixed(nn.Linear):
    def forward(self, tokens, features, scale=None):
        return features + tokens.sum(1, keepdim=True)


GOOD = pairs(8, 0)


def test_samples_of_a_file_are_drawn_and_known_again(tmp_path):
    np.savez(tmp_path / "x.npz", tokens=GOOD["tokens"], features=GOOD["features"].astype(">f8"))
    np.savez(tmp_path / "y.npz", **GOOD)
    np.savez(tmp_path / "z.npz", **{**GOOD, "tokens": GOOD["tokens"].astype("uint16")})
    model = Mixed(1, 1)
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
