"""What is done to images: stated, brought by code, recorded, shown by an example, or refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import osscar
from osscar.base.errors import DataError, OptionError
from osscar.data.images import load_images
from osscar.data.preprocessing import Preprocessing
from osscar.models.load import load_model

pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")

CODE = """
import numpy as np
import torch
from torch import nn
import osscar

def net(channels=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )

class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x.float() / 255)


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def function(image):
    return pixels_of(image) / 127.5 - 1

IMAGES = torch.zeros(2, 3, 12, 12)

alone = net
build = lambda: (net(), IMAGES)
gray = lambda: (net(1), torch.zeros(2, 1, 12, 12))
bytes_ = lambda: (Bytes(), IMAGES.to(torch.uint8), pixels_of)
own = lambda: (net(), IMAGES, function)
"""
SPARSITY = {"sparsity": 0.5, "backend": "magnitude", "device": "cpu"}
PLAIN = Preprocessing(mean=0, std=1)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory with the user's code and images, which is the current one."""
    (tmp_path / "net.py").write_text(CODE)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
    labels = np.arange(12) % 5
    np.savez(tmp_path / "train.npz", images=pixels[:12])
    np.savez(tmp_path / "test.npz", images=pixels[12:], labels=labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune(function, *options):
    return (
        *("prune", f"net.py:{function}", "--calibration", "train.npz", "--out", "small"),
        *("--channels", "0.5", "--backend", "magnitude", "--set", "form=eager", "--device", "cpu"),
        *options,
    )


def evaluate(function, *options):
    return (
        *("eval", "small", "--images", "test.npz", "--dense", f"net.py:{function}"),
        *("--device", "cpu", "--json", "eval.json", *options),
    )


def lineage(place):
    return json.loads((place / "small" / "osscar.json").read_text())["lineage"]


def pixels():
    """The images of the archive, pixels / 255, (n, 3, 12, 12)."""
    return torch.from_numpy(np.load("test.npz")["images"]).permute(0, 3, 1, 2) / 255


# ---- stated ------------------------------------------------------------------------------


def test_nothing_is_assumed_of_the_images_of_ones_own_model(run, place):
    for arguments in (prune("build"), ("eval", "net.py:build", "--images", "test.npz")):
        status, _, err = run(*arguments)
        assert status == 2
        assert "net.py:build does not state the transform of its images. " in err
    assert not (place / "small").exists()
    status, _, err = run("inspect", "net.py:alone")
    assert (status, "give --image-size CxHxW" in err) == (2, True)
    status, out, err = run("inspect", "net.py:alone", "--image-size", "3x12x12")
    assert (status, "channels" in out) == (0, True), err
    with pytest.raises(OptionError, match="does not state the mean and std"):
        load_images("train.npz", Preprocessing(crop=10, channels=3))


def test_what_is_stated_is_printed_recorded_and_used_again(run, place):
    status, out, err = run(*prune("build", "--mean", "0.5,0.4,0.3", "--std", "0.25"))
    assert status == 0, err
    said = "pixels / 255, mean 0.5, 0.4, 0.3, std 0.25"
    size = "resized to a shorter side of 12 (bilinear); 12 x 12 cut from the centre"
    assert f"images: RGB, {size}; {said}" in out
    report = json.loads((place / "small" / "osscar_report.json").read_text())["calibration"]
    known = {"mean": [0.5, 0.4, 0.3], "std": [0.25], "crop": 12, "channels": 3}.items()
    assert lineage(place)["preprocessing"].items() >= known
    assert report["preprocessing"].items() >= known
    assert lineage(place)["sample"]["inputs"]["input"]["shape"][1:] == [3, 12, 12]
    status, out, err = run(*evaluate("build"))
    assert (status, said in out, "warning" in err) == (0, True, False), err
    assert json.loads((place / "eval.json").read_text())["preprocessing"].items() >= known
    stated = Preprocessing(crop=(8, 10), mean=0, std=1)
    loaded = load_model("small", dense="net.py:build", preprocessing=stated)
    assert loaded.example["input"].shape == (2, 3, 8, 10)
    assert loaded.preprocessing.sentence() == (
        "RGB, resized to 8 x 10 (bilinear); 8 x 10 cut from the centre; pixels / 255, mean 0, std 1"
    )


# ---- brought by code ---------------------------------------------------------------------


def test_a_function_is_taken_from_the_code_again_and_refused_without_it(run, place):
    loaded = load_model("net.py:own")
    osscar.prune(loaded.model, loaded.calibration("train.npz"), **SPARSITY).save("small")
    loaded = load_model("small", dense="net.py:own")
    assert torch.equal(loaded.images("test.npz").tensor(), pixels() * 255 / 127.5 - 1)
    status, _, err = run(*evaluate("build"))
    assert (status, "does not state the transform" in err) == (2, True), err
    with pytest.warns(UserWarning, match="pruned with other preprocessing"):
        stated = load_model("small", dense="net.py:own", preprocessing=PLAIN)
    torch.testing.assert_close(stated.images("test.npz").tensor(), pixels())


# ---- followed from the example -----------------------------------------------------------


def test_a_model_of_uint8_gets_pixels_as_they_are():
    loaded = load_model("net.py:bytes_", device="cpu")
    assert torch.equal(loaded.images("test.npz").tensor(), (pixels() * 255).round().byte())
    with pytest.raises(DataError, match=r"and the example inputs are torch\.uint8 of"):
        load_model("net.py:bytes_", preprocessing=Preprocessing(mean=0.5, std=0.5))


def test_a_model_of_one_channel_gets_grayscale_images():
    loaded = load_model("net.py:gray", preprocessing=PLAIN)
    found = loaded.images("test.npz").tensor()
    images = [Image.fromarray(image) for image in np.load("test.npz")["images"]]
    gray = np.stack([np.array(image.convert("L")) for image in images])
    assert torch.equal(found, torch.from_numpy(gray)[:, None] / 255)
    for array in (gray, gray[..., None]):
        np.savez("gray.npz", images=array)
        assert torch.equal(loaded.images("gray.npz").tensor(), found)
