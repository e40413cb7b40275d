"""Models that read images, from the name to the command line."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from osscar.base.errors import DataError, ModelError, import_torchvision
from osscar.base.json_files import validated
from osscar.data.images import ImageSet, load_images
from osscar.data.preprocessing import Preprocessing
from osscar.evaluation.quality import score
from osscar.models.libraries import fill, read_state
from osscar.proof.lineage import note
from tests.osscar.networks import IMAGENET, plain, small_net

pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")

SIDE = 12
CODE = """
import osscar
import torch
from torch import nn
from tests.osscar.networks import small_net

def drawn():
    net = small_net()
    torch.seed()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.reset_parameters()
    return net, torch.zeros(2, 3, 12, 12), osscar.Preprocessing(mean=0, std=1)
"""


def pixels(count, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(3, 1).repeat(3, 2)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A model of the user's own code, with weights in a file, and images that it tells apart."""
    monkeypatch.chdir(tmp_path)
    Path("my nets").mkdir()
    Path("my nets/mine.py").write_text(CODE)
    net = small_net(seed=5)
    torch.save(net.state_dict(), "my weights.pt")
    for part, images in (("train", pixels(60)), ("test", pixels(40, 1))):
        labels = net(ImageSet("pixels", images, plain(SIDE)).tensor()).argmax(1).numpy()
        np.savez(f"my {part}.npz", images=images, labels=labels)
    return "my nets/mine.py:drawn"


@pytest.fixture
def folders(tmp_path):
    from PIL import Image

    root = tmp_path / "folders"
    for index, image in enumerate(pixels(10, 2)):
        place = root / "abcde"[index % 5]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return root


# ---- from end to end ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_the_users_own_is_pruned_compared_and_shown(run, own):
    prune = ("prune", own, "--calibration", "my train.npz", "--weights", "my weights.pt")
    status, out, err = run(
        *(*prune, "--sparsity", "0.5", "--residual", "0.75", "--backend", "magnitude"),
        *("--out", "my small model", "--device", "cpu", "--json", "report.json"),
    )
    assert status == 0, err
    assert "batch norm: new running statistics of 8 layers" in out
    written = json.loads(Path("report.json").read_text())
    assert written["batch_norms"] == 8
    calibration = written["calibration"]
    assert calibration["seen"]["count"] == calibration["samples"] == 60
    assert {layer["name"]: layer["kept"] for layer in written["layers"]}["stem.0.channels"] == 6

    words = ["eval", "my small model", "--images", "my test.npz", "--dense", own]
    words += ["--weights", "my weights.pt"]
    status, out, err = run(*words, "--json", "e.json")
    assert status == 0, err
    assert "warning" not in err
    for expected in ("top-1", "images/s", "FLOPs per image", "agreement with dense", "KL"):
        assert expected in out
    compared = json.loads(Path("e.json").read_text())
    dense = compared["dense"]["quality"]
    assert (dense["top1"], dense["agreement"]) == (1, None)
    assert 0 <= compared["model"]["quality"]["agreement"] <= 1
    assert compared["ratios"]["flops"] < 0.6

    status, out, err = run("inspect", "my small model", "--dense", own)
    assert status == 0, err
    assert "channels, residual" in out
    assert re.search(r", and another [\d.]+% with residual channels", out)


# ---- models and their weights ------------------------------------------------------------


class Wrapping(nn.Module):
    """A network whose own names are those that wrappers and old weights have."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm": nn.Sequential()})})
        self.module["denselayer1"]["norm"].extend([nn.Identity(), nn.Linear(2, 2)])
        self.outer = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_are_changed_only_where_they_do_not_match_otherwise(prefix):
    state, net = Wrapping().state_dict(), Wrapping()
    fill(net, {f"{prefix}{key}": tensor for key, tensor in state.items()}, "a file")
    assert all(tensor.equal(net.state_dict()[key]) for key, tensor in state.items())
    both = {"module.weight": torch.zeros(2, 2), "weight": torch.ones(2, 2)}
    with pytest.raises(ModelError, match=r"Unexpected key.*module\.weight"):  # none is lost
        fill(nn.Linear(2, 2, bias=False), both, "a file")


def test_weights_are_read_from_files_of_any_sort_unpickled(tmp_path, recwarn):
    state = small_net(seed=5).state_dict()
    file = tmp_path / "w.pt"
    save_file(state, tmp_path / "w.safetensors")
    assert all(
        tensor.equal(state[key])
        for key, tensor in read_state(file.with_suffix(".safetensors")).items()
    )
    optimizer = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}
    several = {"net": state, "optimizer": optimizer, "best": torch.zeros(1), "epoch": 3}
    for entries, said in (
        (state, ""),
        ({"model": state}, "only 'model' of the 1 entries of '{}' is loaded"),
        (several, "only 'net' of the 4 entries of '{}' is loaded"),
    ):
        torch.save(entries, file)
        found = read_state(file)
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
        assert [str(one.message) for one in recwarn] == [said.format(file)] * bool(said)
        recwarn.clear()
    torch.save(small_net(), file)  # a whole model, which only pickle can read
    with pytest.raises(ModelError, match="weights_only=True"):
        read_state(file)
    without = {key: value for key, value in state.items() if key != "head.bias"}
    with pytest.raises(ModelError, match=r"Missing key.*head\.bias"):
        fill(small_net(), without, "a file")


# ---- images ------------------------------------------------------------------------------


def test_images_are_transformed_as_torchvision_does(folders):
    from PIL import Image

    weights = import_torchvision("models").ResNet18_Weights.DEFAULT
    preset = weights.transforms(crop_size=8, resize_size=10)
    preprocessing = Preprocessing(10, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = load_images(folders, preprocessing)
    expected = torch.stack([preset(Image.open(file)) for file in images.items])
    assert torch.equal(images.tensor(), expected)
    assert torch.equal(load_images(folders, preset).tensor(), expected)
    assert images.classes == ("a", "b", "c", "d", "e")
    assert load_images(folders / "a", IMAGENET).labels is None
    record = json.loads(json.dumps(preprocessing.record()))
    assert validated(record, Preprocessing, "it") == preprocessing


def test_folders_are_matched_with_classes(folders):
    images = load_images(folders, IMAGENET)
    order = images.labels.tolist()
    assert images.class_labels((), 5).tolist() == order
    named = images.class_labels(("x", "e", "d", "c", "b", "a"), 6)
    assert named.tolist() == [5 - label for label in order]
    with pytest.raises(DataError, match="5 class folders and the model 7 classes"):
        images.class_labels((), 7)
    numbered = ImageSet("x", images.items, IMAGENET, images.labels, ("0", "2", "4", "6", "8"))
    assert numbered.class_labels((), 10).tolist() == [2 * label for label in order]
    with pytest.raises(DataError, match="labels from 0 to 8 and the model 8 classes"):
        numbered.class_labels((), 8)


# ---- evaluation --------------------------------------------------------------------------

LABELLED = ImageSet("pixels", pixels(40, 1), plain(SIDE), torch.arange(40) % 5)


def test_quality_is_what_the_logits_say():
    model, dense = small_net(classes=6), small_net(classes=6, seed=3)
    mine, theirs = score([model, dense], LABELLED, dense=dense, batch_size=7)
    with torch.no_grad():
        p, q = (m(LABELLED.tensor()).double() for m in (model, dense))
    labels = LABELLED.labels
    assert mine.samples == 40
    assert mine.top1 == pytest.approx((p.argmax(1) == labels).double().mean().item())
    ranks = (p > p.gather(1, labels[:, None])).sum(1)
    assert mine.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert mine.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    kl = (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
    assert mine.kl == pytest.approx(kl.item(), rel=1e-5)
    assert theirs.agreement is None
    (alone,) = score([model], dataclasses.replace(LABELLED, labels=None), dense=dense)
    assert (alone.top1, alone.agreement) == (None, mine.agreement)
    note(dense, classes=(*"edcba", "x"))  # by which folders in another order are recognized
    folders = dataclasses.replace(LABELLED, labels=4 - labels, classes=(*"abcde",))
    (named,) = score([model], folders, dense=dense)
    assert named.top1 == mine.top1
