"""Checkpoints of any shape, built as vLLM's Transformers backend builds them: from a config alone.

It builds the model without its head on 'meta', puts linear layers of its own in the place of
others, by what these say of their sizes, and fills every tensor by its name.  vLLM itself is not
run.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel

import osscar
from osscar.checkpoint.hf_config import MODELLING_FILE
from tests.osscar.families import tiny, tokens

IDS = tokens(2, 16, seed=9)


class Linear(nn.Module):
    """A linear layer of an engine, which knows of another one its sizes alone."""

    def __init__(self, other):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(other.out_features, other.in_features))
        bias = None if other.bias is None else nn.Parameter(torch.empty(other.out_features))
        self.register_parameter("bias", bias)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def on_meta(monkeypatch, build):
    """Build with parameters that go to 'meta' once they are registered, and buffers that do not."""
    register = nn.Module.register_parameter

    def registered(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"))

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", registered)
        return build()


def served(directory, files, monkeypatch):
    """Build the model in a directory without its head, and fill it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(files))
    monkeypatch.syspath_prepend(str(files))
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    options = {"dtype": torch.float32, "trust_remote_code": True}
    model = on_meta(monkeypatch, lambda: AutoModel.from_config(config, **options))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear(child))
            for of, parameter in child.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(child, of, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    stored = load_file(directory / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    model.load_state_dict({name: t for name, t in weights.items() if name != "lm_head.weight"})
    return model.eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen2", "qwen3"])
def test_an_engine_that_knows_the_config_alone_computes_the_same(family, tmp_path, monkeypatch):
    groups = {"model.layers.0.mlp.neurons": 12, "model.layers.1.mlp.neurons": 30}
    result = osscar.prune(tiny(family), tokens(), backend="magnitude", device="cpu", groups=groups)
    small, saved = result.model, result.save(tmp_path / "small")
    assert saved.with_code
    model = served(saved.path, tmp_path / "modules", monkeypatch)
    assert type(model).__module__.endswith(MODELLING_FILE.stem)
    assert [layer.mlp.up_proj.weight.shape[0] for layer in model.layers] == [12, 30]
    assert model.tp_plan == small.base_model.tp_plan != {}
    assert type(model).is_backend_compatible()
    with torch.no_grad():
        expected = small.base_model(IDS).last_hidden_state
        found = model(IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
