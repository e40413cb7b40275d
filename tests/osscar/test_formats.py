"""Number formats: what is read in another one is, bit for bit, what transformers reads in it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import osscar
from osscar.checkpoint import directory as checkpoint
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.equivalence import finer_precision
from osscar.proof.lineage import note
from tests.osscar.families import gated, tokens

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 72,  # whose root is rounded, where Gemma 3 multiplies by it
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_key_value_heads": 2,
    "head_dim": 18,
}


def _dense(config, path, dtype):
    """Write a model that looks closely, so that what is rounded turns its attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.to(dtype).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, path / file)
    return path


def _formats(model):
    """Return the number format of all that has one, by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}


@torch.no_grad()
def _assert_alike(model, other):
    assert _formats(model) == _formats(other)
    ids = tokens(2, 60)
    assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


def _as_transformers(path, dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True)


@pytest.mark.parametrize("config", [LlamaConfig, Gemma3TextConfig])
def test_a_model_is_read_as_transformers_reads_it(config, tmp_path):
    for stored, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        path = _dense(config(**_SIZES), tmp_path / str(stored), stored)
        for max_memory in (None, "2GB"):
            loaded = osscar.load_model(path, dtype=dtype, device="cpu", max_memory=max_memory)
            assert loaded.stored_dtype == stored
            _assert_alike(loaded.model, _as_transformers(path, dtype))
    model = osscar.load_model(path, dtype="bfloat16", device="cpu").model
    with finer_precision(model, {"input_ids": tokens(2)}):  # no finer than needed
        assert set(_formats(model).values()) == {torch.float32}


@pytest.mark.parametrize("max_memory", [None, "2GB"])
def test_a_pruned_model_is_what_transformers_reads(max_memory, tmp_path):
    path = _dense(Gemma3TextConfig(**_SIZES), tmp_path / "dense", torch.bfloat16)
    read = {"dtype": torch.bfloat16, "device": "cpu", "max_memory": max_memory}
    loaded, saved = osscar.load_model(path, **read), tmp_path / "pruned"
    kept = {"neurons": 0.5, "heads": 0.5, "skip": ["*layers.1.*"]}
    result = osscar.prune(loaded.model, tokens(4), **kept, backend="magnitude")
    checkpoint.save(result.model, saved, tokenizer=loaded.tokenizer)
    theirs = _as_transformers(saved, torch.bfloat16)
    for mine in (result.model, osscar.load(saved), osscar.load_model(saved, **read).model):
        _assert_alike(mine, theirs)


def test_a_model_that_was_converted_by_hand_can_be_saved(tmp_path):
    path = _dense(Gemma3TextConfig(**_SIZES), tmp_path / "dense", torch.float32)
    model = _as_transformers(path, torch.float32).bfloat16()  # which rounds what is computed
    assert set(_formats(model).values()) == {torch.bfloat16}
    full = checkpoint.save(model, tmp_path / "full", dtype=torch.float32)
    half = checkpoint.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert half.bytes < 0.6 * full.bytes
    assert model.dtype == torch.bfloat16
    _assert_alike(osscar.load(half.path), _as_transformers(half.path, torch.bfloat16))


def test_what_a_family_keeps_in_float32_is_kept_and_counted(tmp_path):
    path = _dense(gated(), tmp_path / "dense", torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    loaded = osscar.load_model(path, dtype="bfloat16", device="cpu")
    _assert_alike(loaded.model, _as_transformers(path, torch.bfloat16))
    assert _formats(loaded.model)[name] == torch.float32
    model = osscar.load_model(path, dtype="float32", device="cpu").model
    note(model, stored_dtype="bfloat16")
    saved = osscar.save(model, tmp_path / "again")
    tensors = load_file(saved.path / "model.safetensors")
    assert tensors[name].dtype == torch.float32
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert (
        checkpoint.weight_bytes(model)
        == stored
        < 0.6 * checkpoint.weight_bytes(loaded.model, torch.float32)
    )
    _assert_alike(osscar.load(saved.path), _as_transformers(saved.path, torch.bfloat16))
