"""Number formats: what is read in another one is, bit for bit, what transformers reads in it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

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
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 18}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "gemma": lambda: GemmaConfig(**_GROUPED),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED),
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


@torch.no_grad()
def _logits(model):
    return model(input_ids=tokens(2, 60)).logits


def _formats(model):
    """Return the number format of all that has one, by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}


def _assert_alike(model, other):
    assert _formats(model) == _formats(other)
    assert_close(_logits(model), _logits(other))


def _as_transformers(path, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_read_as_transformers_reads_it(family, tmp_path):
    for stored, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        path = _dense(CONFIGS[family](), tmp_path / str(stored), stored)
        theirs = _as_transformers(path, dtype)
        for max_memory in (None, "2GB"):
            loaded = osscar.load_model(path, dtype=dtype, device="cpu", max_memory=max_memory)
            assert loaded.stored_dtype == stored
            _assert_alike(loaded.model, theirs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "max_memory"),
    [(family, memory) for memory in (None, "2GB") for family in CONFIGS],
)
def test_a_pruned_model_is_what_transformers_reads(family, max_memory, tmp_path):
    dtype = torch.bfloat16
    path = _dense(CONFIGS[family](), tmp_path / "dense", torch.float32)
    loaded = osscar.load_model(path, dtype=dtype, device="cpu", max_memory=max_memory)
    result = osscar.prune(loaded.model, tokens(4), neurons=0.5, heads=0.5, skip=["*layers.1.*"])
    saved = tmp_path / "pruned"
    checkpoint.save(result.model, saved, tokenizer=loaded.tokenizer, dtype=dtype)
    theirs = _as_transformers(saved, dtype, trust_remote_code=True)
    _assert_alike(result.model, theirs)
    _assert_alike(osscar.load(saved, dtype=dtype), theirs)
    again = osscar.load_model(saved, dtype=dtype, device="cpu", max_memory=max_memory)
    _assert_alike(again.model, theirs)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_was_converted_by_hand_can_be_saved(dtype, tmp_path):
    path = _dense(CONFIGS["gemma3"](), tmp_path / "dense", torch.float32)
    model = _as_transformers(path, torch.float32).bfloat16()  # which rounds what is computed
    assert set(_formats(model).values()) == {torch.bfloat16}
    result = osscar.prune(model, tokens(4), neurons=0.5)
    checkpoint.save(result.model, tmp_path / "pruned", dtype=dtype)
    theirs = _as_transformers(tmp_path / "pruned", dtype)
    _assert_alike(osscar.load(tmp_path / "pruned", dtype=dtype), theirs)


def test_what_a_family_keeps_in_float32_is_kept_and_counted(tmp_path):
    path = _dense(gated(), tmp_path / "dense", torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    loaded = osscar.load_model(path, dtype="bfloat16", device="cpu")
    _assert_alike(loaded.model, _as_transformers(path, torch.bfloat16))
    assert _formats(loaded.model)[name] == torch.float32
    loaded = osscar.load_model(path, dtype="float32", device="cpu")
    note(loaded.model, stored_dtype="bfloat16")
    result = osscar.prune(loaded.model, tokens(4) % 97, size=0.9, backend="wanda")
    saved = result.save(tmp_path / "pruned")
    (file,) = saved.path.glob("*.safetensors")
    tensors = load_file(file)
    assert tensors[name].dtype == torch.float32
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert checkpoint.weight_bytes(result.model) == stored
    assert result.budget.tightest.reached == stored
    theirs = _as_transformers(saved.path, torch.bfloat16, trust_remote_code=True)
    _assert_alike(osscar.load(saved.path, dtype=torch.bfloat16), theirs)


def test_a_model_of_ones_own_is_converted_as_torch_converts_it(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("scale", torch.rand(8), persistent=False)

        def forward(self, x):
            return self.outer(self.inner(x).relu() * self.scale)

    torch.manual_seed(0)
    model = Own()
    result = osscar.prune(model, torch.randn(64, 6), neurons=0.5)
    result.save(tmp_path / "pruned")
    again = osscar.load(tmp_path / "pruned", dense=model, dtype=torch.bfloat16)
    assert set(_formats(again).values()) == {torch.bfloat16}


def test_proofs_go_no_finer_than_needed(tmp_path):
    """A model in half precision is proved in float32, frequencies and all."""
    path = _dense(CONFIGS["llama"](), tmp_path / "dense", torch.float32)
    model = osscar.load_model(path, dtype="bfloat16", device="cpu").model
    with finer_precision(model, {"input_ids": tokens(2)}):
        assert set(_formats(model).values()) == {torch.float32}
