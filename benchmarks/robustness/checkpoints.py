"""Attacks on checkpoints: configs, tokenizers, weights, indices, manifests and plans."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import osscar
from benchmarks.robustness.command_line import command
from benchmarks.robustness.damage import VALUES, change, damage, replace, wreck
from benchmarks.robustness.good import EVIL_CODE, Evil, good, taken
from osscar.models.load import load_model
from tests.osscar.networks import small_net


def opened(path: Path, choice: random.Random) -> str | None:
    """Open a checkpoint in one of the ways that there are; say if it is another than its file."""
    way = choice.randrange(4)
    if way == 0:
        model = osscar.load(path)
    elif way == 1:
        model = load_model(path, dtype="auto", device="cpu").model
    elif way == 2:
        loaded = load_model(path, device="cpu")
        model = loaded.model
        model(**loaded.example)
    else:
        return command(["inspect", str(path)])
    return unlike_file(model, path)


def unlike_file(model: nn.Module, path: Path) -> str | None:
    """Say which tensor of a model is not what its file holds."""
    held = safetensors.torch.load_file(path / "model.safetensors")
    own = model.state_dict()
    for name in held.keys() & own.keys():
        mine, given = own[name], held[name]
        if mine.shape != given.shape or mine.is_floating_point() != given.is_floating_point():
            return f"{name} is {mine.dtype} {tuple(mine.shape)}, stored as {given.dtype}"
        if not torch.allclose(mine, given.to(mine.dtype), rtol=0, atol=0, equal_nan=True):
            return f"{name} has other values than in the file"
    return None


def family(choice: random.Random, work: Path) -> Path:
    return taken(choice.choice(["opt", "gpt2", "llama-gqa"]), work)


CONFIG_VALUES = [*VALUES, {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}]
CONFIG_ADDED: list[dict[str, Any]] = [
    {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}},
    {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
    {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    {"num_labels": 10**9}, {"num_labels": 10**6 + 1}, {"num_labels": -1}, {"id2label": {"x": "y"}},
    {"attn_implementation": "kernels-community/flash-attn"}, {"attn_implementation": "x"},
    {"_attn_implementation": "a/b"}, {"experts_implementation": "a/b"},
    {"transformers_weights": "../foreign/model.safetensors"}, {"quantization_config": {"a": 1}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"torch_dtype": "complex64"}, {"dtype": "int8"}, {"dtype": "float8_e4m3fn"}, {"dtype": 3},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 1e300}}, {"rope_theta": 0},
    {"rope_parameters": {"rope_type": "yarn", "factor": float("inf")}}, {"head_dim": 2**40},
    {"hidden_act": "os.system"}, {"activation_function": "eval"}, {"layer_types": ["x"] * 10**5},
    {"architectures": ["PreTrainedModel"]}, {"architectures": ["Trainer"]}, {"architectures": [3]},
    {"is_encoder_decoder": True}, {"tie_word_embeddings": "x"}, {"use_cache": {}},
    {"num_hidden_layers": 9999}, {"n_layer": 9999}, {"num_hidden_layers": 2.0}, {"dropout": 1e9},
    {"pruned_heads": {"0": [0]}}, {"chunk_size_feed_forward": 3}, {"return_dict": False},
    {"max_position_embeddings": 10**12}, {"n_positions": 2**40}, {"pad_token_id": 10**9},
]  # fmt: skip


def config(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work)
    file = path / "config.json"
    if choice.random() < 0.35:
        added = choice.choice(CONFIG_ADDED)
        file.write_text(json.dumps({**json.loads(file.read_text()), **added}))
        (path / "evil.py").write_text(EVIL_CODE)
    else:
        wreck(file, choice, CONFIG_VALUES)
    return opened(path, choice)


def companions(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work)
    name = choice.choice(
        ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "adapter_config.json", "chat_template.json", "vocab.json",
         "model.safetensors.index.json", "pytorch_model.bin"]
    )  # fmt: skip
    (path / "evil.py").write_text(EVIL_CODE)
    if name == "pytorch_model.bin":
        torch.save(Evil(), path / name)
        if choice.random() < 0.5:
            (path / "model.safetensors").unlink()
    elif (path / name).exists():
        wreck(path / name, choice, CONFIG_VALUES)
    else:
        (path / name).write_text(json.dumps(change({"a": 1, "b": ["x"], "auto_map": {}}, choice)))
    return opened(path, choice)


TOKENIZER_VALUES = [
    *VALUES,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"strategy": {"Fixed": 2**62}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
     "pad_type_id": 0, "pad_token": "x"},
    {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5},
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
    {"type": "FixedLength", "length": 0},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}],
     "pair": [], "special_tokens": {}},
]  # fmt: skip
TOKENIZER_MODELS: list[dict[str, Any]] = [
    {"type": "WordPiece", "unk_token": "q", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 0, "vocab": {"a": 0}},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"},
    {"type": "Unigram", "unk_id": 9, "vocab": [["<unk>", 0.0], ["a", -1.0]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", -1.0]]},
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
     "continuing_subword_prefix": "é"},
    {"type": "BPE", "vocab": {"a": 2**32 - 1, "b": 1, "ab": 2}, "merges": ["a b"]},
    {"type": "BPE", "vocab": {}, "merges": []},
]  # fmt: skip


def tokenizer(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work)
    file = path / "tokenizer.json"
    whole = json.loads(file.read_text())
    what = choice.random()
    if what < 0.15:
        whole["model"] = choice.choice(TOKENIZER_MODELS)
    elif what < 0.3:
        whole["model"]["continuing_subword_prefix"] = choice.choice(["x", "#", "Ġ", "é" * 9])
    elif what < 0.45:
        whole[
            choice.choice(["normalizer", "pre_tokenizer", "decoder", "padding", "truncation"])
        ] = choice.choice(TOKENIZER_VALUES)
    file.write_text(json.dumps(whole))
    if what >= 0.3:
        wreck(file, choice, TOKENIZER_VALUES)
    loaded = load_model(path, device="cpu")
    data = osscar.load_calibration(good() / "text.txt", loaded.tokenizer, samples=2, seqlen=8)
    ids = data.tokens
    return None if ids.dtype == torch.int64 and int(ids.min()) >= 0 else f"tokens are {ids}"


def header(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work) if choice.random() < 0.7 else taken("planned-opt", work)
    file = path / "model.safetensors"
    data = file.read_bytes()
    if choice.random() < 0.3:
        file.write_bytes(damage(data, choice))
    elif choice.random() < 0.1:
        replace(file, choice)
    else:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        wrong = [*VALUES, "I64", "C64", "F16", "F8_E4M3", "BOOL", "U8", [0, 0], [0, 8], [2**62, 4]]
        found = change(json.loads(data[8:end]), choice, wrong)
        text = json.dumps(found).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    return opened(path, choice)


def weights(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work) if choice.random() < 0.6 else taken("planned-opt", work)
    file = path / "model.safetensors"
    held = safetensors.torch.load_file(file)
    name = choice.choice(list(held))
    kinds = [torch.complex64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]
    match choice.randrange(8):
        case 0 | 1:
            held[name] = held[name].to(choice.choice(kinds))
        case 2:
            held[name].flatten()[0] = choice.choice([float("nan"), float("inf")])
        case 3:
            del held[name]
        case 4:
            held[name] = held[name][..., :-1].contiguous()
        case 5:
            held[name] = torch.zeros(0)
        case 6:
            held = {
                choice.choice(["x.", ""]) + k + choice.choice(["", "2"]): v for k, v in held.items()
            }
        case 7:
            held[name] = held[name].double()
    safetensors.torch.save_file(held, file, {"format": "pt"})
    return opened(path, choice)


def index(work: Path, choice: random.Random) -> str | None:
    path = family(choice, work)
    file = path / "model.safetensors"
    names = list(safetensors.torch.load_file(file))
    file.rename(path / "1.safetensors")
    target = choice.choice(
        ["1.safetensors", "../../foreign/model.safetensors", str(good() / "opt/model.safetensors"),
         "..", "", "2.safetensors", "/dev/zero", "1.safetensors/..", "pytorch_model.bin", "a\0b"]
    )  # fmt: skip
    torch.save(Evil(), path / "pytorch_model.bin")
    if choice.random() < 0.3:
        (path / "2.safetensors").symlink_to(
            choice.choice(["/dev/zero", "2.safetensors", "nowhere"])
        )
    whole = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "1.safetensors")}
    whole["weight_map"][choice.choice(names)] = target
    listed = path / "model.safetensors.index.json"
    listed.write_text(json.dumps(whole))
    if choice.random() < 0.5:
        wreck(listed, choice)
    model = osscar.load(path) if choice.random() < 0.5 else load_model(path, device="cpu").model
    shutil.copy(path / "1.safetensors", file)
    return unlike_file(model, path)


def manifest(work: Path, choice: random.Random) -> str | None:
    name = choice.choice(["planned", "planned-opt"])
    path = taken(name, work)
    dense = small_net() if name == "planned" else None
    file = path / "osscar.json"
    what = choice.random()
    if what < 0.4:
        added = choice.choice(
            [{"library": "torchvision", "name": "resnet18", "options": {"num_classes": 10**12}},
             {"library": "torchvision", "name": "regnet_y_400mf", "options": {"stem_width": 0}},
             {"library": "torchvision", "name": "fcn_resnet50", "options": {"num_classes": 10**9}},
             {"library": "torchvision", "name": "vit_b_16", "options": {"image_size": 10**6}},
             {"library": "torchvision", "name": "os", "options": {}},
             {"library": "os", "name": "system", "options": {}},
             {"library": "transformers", "name": "", "options": {}}]
        )  # fmt: skip
        whole = json.loads(file.read_text())
        whole["lineage"]["origin"] = added
        file.write_text(json.dumps(whole))
    if what > 0.4 or choice.random() < 0.3:
        wreck(file, choice)
    if dense is not None and choice.random() < 0.6:
        model = osscar.load(path, dense=dense)
    else:
        return opened(path, choice)
    return unlike_file(model, path)
