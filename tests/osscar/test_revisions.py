"""Models of the Hugging Face hub at a branch, a tag or a commit, as its cache has them."""

import functools
import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from osscar.base.errors import ModelError, OptionError
from osscar.models import names
from osscar.models.load import load_model
from osscar.models.names import ModelKind, kind_of
from tests.osscar.interrupted_cases import pruning

OLD, NEW = (digit * 40 for digit in "ab")
NAME, BIAS = "someone/a-model", "model.decoder.layers.0.fc1.bias"


def bias_of(loaded):
    return float(loaded.model.state_dict()[BIAS][0])


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """A cache with two commits of a model, in which a bias is 1 and 2, and no network."""
    place = tmp_path / "models--someone--a-model"
    for value, commit, references in ((1, OLD, ("v1.0", "refs/pr/3")), (2, NEW, ("main",))):
        shutil.copytree(tiny, place / "snapshots" / commit)
        file = place / "snapshots" / commit / "model.safetensors"
        weights = load_file(file)
        weights[BIAS] = torch.full_like(weights[BIAS], value)
        save_file(weights, file, {"format": "pt"})
        for reference in references:
            (place / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
            (place / "refs" / reference).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(names, "_fetched", functools.cache(names._fetched.__wrapped__))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, NEW), ("main", NEW), ("v1.0", OLD), ("refs/pr/3", OLD), (OLD, OLD), (NEW, NEW)],
)
def test_a_revision_is_loaded_and_its_commit_is_in_the_source(revision, commit, hub):
    ways = [load_model(NAME, revision=revision)]
    if revision is not None:
        ways.append(load_model(f"{NAME}@{revision}"))
    for loaded in ways:
        assert loaded.source == f"Hugging Face {NAME}@{commit}"
        assert bias_of(loaded) == {OLD: 1, NEW: 2}[commit]
    assert bias_of(load_model(loaded.source.removeprefix("Hugging Face "))) == bias_of(loaded)


def test_revisions_that_are_not_there_or_mean_nothing_are_refused(hub, tiny):
    with pytest.raises(ModelError, match=r"does not give a model of that name"):
        load_model(f"{NAME}@v2")
    for name in (tiny, "demo", "torchvision:resnet18", "net.py:build", f"{NAME}@v1.0"):
        with pytest.raises(OptionError, match=r"revision is 'v1.0', and .* is no Hugging Face id"):
            load_model(name, revision="v1.0")


def test_a_directory_with_that_sign_in_its_name_is_a_directory(hub, tiny):
    shutil.copytree(tiny, hub / "someone" / "a-model@v1.0")
    loaded = load_model(f"{NAME}@v1.0")
    assert loaded.source.startswith("directory ")
    assert bias_of(loaded) not in (1, 2)
    (hub / "a@b").mkdir()
    (hub / "a@b" / "net.py").write_text("from torch import nn\nbuild = lambda: nn.Linear(2, 2)\n")
    assert kind_of("a@b/net.py:build") is ModelKind.CODE
    assert load_model("a@b/net.py:build").source == "a@b/net.py:build"


def test_the_report_and_the_card_name_the_commit(hub, run):
    status, _, err = run(*pruning(f"{NAME}@v1.0", "--neurons", "0.5", "--out", "small"))
    assert status == 0, err
    report = json.loads((hub / "small" / "osscar_report.json").read_text())
    assert report["model"] == f"Hugging Face {NAME}@{OLD}"
    assert f"{NAME}@{OLD}" in (hub / "small" / "README.md").read_text()
    status, out, err = run("eval", "small", "--dense", f"{NAME}@{OLD}", "--text", __file__)
    assert status == 0, err
    assert "is not the dense model" not in err
    status, out, err = run("inspect", f"{NAME}@v1.0")
    assert (status, "neurons" in out) == (0, True), err
