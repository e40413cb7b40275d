"""Checkpoints that ask for other than they hold: refused before anything is allocated."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPTJConfig, GPTJForCausalLM, MixtralConfig, MixtralForCausalLM

import osscar
from osscar.base.errors import CheckpointError, FileError, ModelError, NonFiniteError
from osscar.checkpoint.builders import LibraryOrigin
from osscar.checkpoint.validation import structure
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.tensor_files import StoredTensor, read_header, read_headers
from tests.osscar.families import tiny
from tests.osscar.networks import small_net

READERS = pytest.mark.parametrize("reader", [load_model, osscar.load], ids=["load_model", "load"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model"
    tiny("opt").save_pretrained(path)
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture
def checkpoint(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- sizes ---------------------------------------------------------------------------------------


SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "ffn_dim")


@READERS
def test_a_size_that_is_not_that_of_the_weights(checkpoint, reader):
    file = checkpoint / "config.json"
    whole = file.read_text()
    for name, value in itertools.product(SIZES, (0, -1, 10**9)):
        edit(checkpoint, **{name: value})
        with pytest.raises((CheckpointError, ModelError)):
            pytest.fail(f"{name} {value} was read: {reader(checkpoint)}")
        file.write_text(whole)


@pytest.mark.parametrize(("layers", "reason"), [(0, "more"), (1, "more"), (3, "fewer")])
def test_a_config_of_fewer_or_more_layers(checkpoint, layers, reason):
    edit(checkpoint, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=f"has {reason} weights than the model of its config"):
        osscar.load(checkpoint)


REFUSED = [
    *(
        (changes, "more than any model")
        for changes in (
            {"num_labels": 2_000_000},
            {"text_config": {"num_labels": 10**10}},
            {"encoder_layers": 10**8},
        )
    ),
    ({"num_hidden_layers": 9_999}, "asks for more than .* modules"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
    ({"transformers_weights": "../other.bin"}, "another file of weights"),
    ({"attn_implementation": "somebody/kernel"}, "code that would be fetched"),
    ({"text_config": {"_attn_implementation": "somebody/kernel"}}, "code that would be fetched"),
]
"""Configs of no model, of one that cannot be pruned, or of one that would have code fetched."""


@READERS
def test_a_config_is_refused_by_the_name_of_what_is_wrong(checkpoint, reader):
    file = checkpoint / "config.json"
    whole = file.read_text()
    for changes, reason in REFUSED:
        edit(checkpoint, **changes)
        with pytest.raises(CheckpointError, match=reason):
            pytest.fail(f"{changes} was read: {reader(checkpoint)}")
        file.write_text(whole)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        reader(checkpoint)


@READERS
def test_a_number_that_only_a_pass_finds(reader, tmp_path):
    config = MixtralConfig(
        **{"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    reader(tmp_path)
    edit(tmp_path, num_experts_per_tok=9)
    with pytest.raises(CheckpointError, match="first forward pass fails"):
        reader(tmp_path)
    edit(
        tmp_path, num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": -3}
    )
    with pytest.raises(NonFiniteError, match="inv_freq"):
        reader(tmp_path)


@READERS
def test_outputs_that_are_no_numbers(checkpoint, reader):
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    weights["model.decoder.embed_positions.weight"] += 3e38
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="first forward pass gives NaN in torch"):
        reader(checkpoint)


@READERS
def test_tables_that_are_computed_count_too(checkpoint, reader):
    config = GPTJConfig(vocab_size=97, n_embd=16, n_layer=1, n_head=2, rotary_dim=8, n_positions=64)
    GPTJForCausalLM(config).save_pretrained(checkpoint)
    assert reader(checkpoint)
    edit(checkpoint, n_positions=2**33)
    with pytest.raises(CheckpointError, match=r"asks for .* numbers, and the weights are"):
        reader(checkpoint)


@pytest.mark.parametrize("name", ["squeezenet1_1", "regnet_y_400mf"])
def test_a_model_that_nobody_could_hold(tmp_path, name):
    pytest.importorskip("torchvision", reason="needs the extra osscar[vision]")
    weights = {"a": StoredTensor(torch.float32, (1000, 1000))}
    built = LibraryOrigin("torchvision", name)
    assert structure(built.build, weights, tmp_path, pruned=True).training
    built = LibraryOrigin("torchvision", name, {"num_classes": 10**11})
    with pytest.raises(CheckpointError, match=r"asks for .* numbers, and the weights"):
        structure(built.build, weights, tmp_path, pruned=True)


# ---- sorts of numbers ----------------------------------------------------------------------------


@READERS
@pytest.mark.parametrize("name", ["model.decoder.layers.0.fc1.weight", "lm_head.weight"])
def test_weights_that_are_no_real_numbers(checkpoint, reader, name):
    file = checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    tensor = weights.get(name, torch.ones(2, 2))
    for kind in (torch.complex64, torch.int64, torch.int8, torch.bool):
        safetensors.torch.save_file({**weights, name: tensor.to(kind)}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"'{name}' is torch\.(complex|int|bool)"):
            reader(checkpoint)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [torch.complex64, torch.int64])
def test_a_planned_checkpoint_of_other_numbers(tmp_path, kind):
    osscar.prune(small_net(), torch.rand(60, 3, 12, 12), sparsity=0.5).save(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = weights[name].to(kind)
    safetensors.torch.save_file(weights, file)
    with pytest.raises(CheckpointError, match=rf"'{name}' is torch\.(complex|int)64"):
        osscar.load(tmp_path / "a", dense=small_net())


def test_masks_of_old_checkpoints_are_no_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.decoder.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    osscar.load(checkpoint)


# ---- headers and indices -------------------------------------------------------------------------


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        safetensors_file({}, length=2**63),
        safetensors_file({}, length=0),
        safetensors_file(b"[" * 10_000),
        safetensors_file(b"\xff"),
        safetensors_file([]),
        safetensors_file({"a": 3}),
        safetensors_file({"a": entry(0, 8, shape=[-1, -2])}, EIGHT),
        safetensors_file({"a": entry(0, 8, shape=[2**62, 8])}, EIGHT),
        safetensors_file({"a": entry(0, 8, shape=[2.0])}, EIGHT),
        safetensors_file({"a": entry(0, 8, dtype="F33")}, EIGHT),
        safetensors_file({"a": entry(0, 16, shape=[4])}, EIGHT),
        safetensors_file({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
        safetensors_file({"a": entry(0, 8)}, EIGHT + b"more"),
        safetensors_file({"a": entry(4, 12)}, EIGHT + b"more"),
        safetensors_file({"a": {"x": "y"}}),
        safetensors_file({"__metadata__": {"a": 3}}),
    ],
)
def test_headers_that_make_no_sense(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(FileError):
        read_header(tmp_path / "model.safetensors")


def test_a_header_that_does(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(0)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert read_headers(tmp_path) == {
        "a": StoredTensor(torch.float32, (2, 3)),
        "b": StoredTensor(torch.bfloat16, ()),
        "c": StoredTensor(torch.float32, (0,)),
    }


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("../other/model.safetensors", "should match pattern"),
        ("/etc/passwd", "should match pattern"),
        ("..", "should match pattern"),
        ("model.bin", "should match pattern"),
        ("a\0.safetensors", "should match pattern"),
        ("missing.safetensors", "cannot be read"),
        (3, "string"),
    ],
)
def test_an_index_that_leads_elsewhere(checkpoint, place, reason):
    shutil.copytree(checkpoint, checkpoint.with_name("other"))
    weights = checkpoint / "model.safetensors"
    names = list(safetensors.torch.load_file(weights))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for reader in (load_model, osscar.load):
        with pytest.raises(FileError, match=reason):
            reader(checkpoint)


def test_an_index_of_two_files(checkpoint):
    file = checkpoint / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    half = len(weights) // 2
    parts = {"1.safetensors": list(weights)[:half], "2.safetensors": list(weights)[half:]}
    for name, keys in parts.items():
        safetensors.torch.save_file({k: weights[k] for k in keys}, checkpoint / name)
    places = {key: name for name, keys in parts.items() for key in keys}
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    whole = osscar.load(checkpoint)
    file.unlink()
    again = osscar.load(checkpoint)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])


@READERS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(checkpoint, reader, value):
    file = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"1 of .* are NaN or infinite"):
        reader(checkpoint)
