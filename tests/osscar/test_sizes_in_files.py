"""Sizes that files name: beyond the limits that hold when they are written, they are refused.

Each file is read in a child that may take little more memory than it has.
"""

import json
import re
import resource
import shutil
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn

import osscar
from osscar.base.errors import AdapterError, OsscarError
from osscar.base.json_files import MOST_NUMBERS
from osscar.checkpoint import validation
from osscar.checkpoint.builders import LibraryOrigin
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.lineage import Sample
from osscar.shrinking.shrink_program import ProgramTrial
from tests.osscar.families import tiny
from tests.osscar.forked import forked

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
ROOM = 2 * 2**30


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of one's own code, of its program, of timm, and of transformers."""
    place, few = tmp_path_factory.mktemp("written"), {"neurons": 0.5, "backend": "magnitude"}
    for form in ("eager", "exported"):
        osscar.prune(net(), X, **few, form=form, device="cpu").save(place / form)
    osscar.save(tiny("opt"), place / "opt")
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, place / "opt")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = hf.ViTConfig(**sizes, intermediate_size=24, image_size=32, patch_size=16)
    hf.ViTForImageClassification(config).save_pretrained(place / "vit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place / "vit")
    if hf.utils.is_timm_available():
        osscar.save(LibraryOrigin("timm", "test_vit", {"num_classes": 5}).build(), place / "timm")
    return place


def bounded(path):
    """Read a checkpoint within some memory; say what came of it."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, mapped + ROOM))
    validation.available_memory = lambda: ROOM
    own = path.name in ("eager", "exported")
    try:
        if own:
            osscar.load(path, dense=net())
        else:
            load_model(path)
        print("it was read")
    except OsscarError as error:
        print(f"{type(error).__name__}: {error}")


def put(content, where, value):
    for key in where[:-1]:
        content = content[key]
    content[where[-1]] = value


SAMPLE = ("lineage", "sample", "inputs")
DENSE = ("lineage", "dense", 0, "sample", "inputs")
GROUP = ("lineage", "plans", 0, "groups", 0)
TRACED = ("lineage", "plans", 0, "traced", 0, "shape")
TENSOR = {"shape": [2**26], "dtype": "float32", "low": 0.0, "high": 1.0}
SLOT = {"dim": 0, "role": "producer", "module": "0", "tensor": "0.weight", "units": 2**31 - 1}
SLOT |= {"outer": 0, "inner": 1, "offset": 0, "order": 0}
CASES = [
    ("eager", (*SAMPLE, "input", "shape"), [2**31], "shape.0: input should be less than"),
    ("eager", (*SAMPLE, "input", "shape"), [2**13, 2**14], "inputs: an input has at most"),
    ("eager", (*SAMPLE, "other"), TENSOR, "inputs: an input has at most"),
    ("eager", (*SAMPLE, "count"), 2**40, "inputs: an input has at most"),
    ("eager", (*SAMPLE, "input", "shape"), [-4, 6], "shape.0: input should be greater than"),
    ("eager", (*SAMPLE, "input", "dtype"), "quint8", "dtype"),
    ("eager", (*DENSE, "input", "shape"), [2**20, 2**11], "inputs: an input has at most"),
    ("eager", GROUP, {"name": "g", "kind": "neurons", "units": 2**31 - 1, "kept": [0],
                      "slots": [SLOT]}, "has no such units"),
    ("exported", TRACED, [2**15, 2**15], "traced: a model is traced with at most"),
    ("opt", ("lineage", "sample", "inputs", "input_ids", "shape"), [1, 2**22], "more than 16 tok"),
    ("timm", ("lineage", "origin", "options", "num_classes"), 2**31, "num_classes"),
    ("timm", ("lineage", "origin", "options", "num_classes"), 2**26, "takes 17.*GB"),
]  # fmt: skip
CONFIGS = [
    ("opt", {"num_hidden_layers": 2**31}, "num_hidden_layers 2147483648, more than"),
    ("opt", {"num_hidden_layers": 2**18}, "modules and parameters, and few tensors"),
    ("opt", {"num_labels": 2**31}, "num_labels"),
    ("opt", {"vocab_size": 2**24}, "do not fit"),
    ("opt", {"max_position_embeddings": 2**40}, "do not fit"),
    ("vit", {"image_size": 2**31}, "image_size"),
]


@pytest.mark.parametrize(
    ("name", "file", "where", "value", "reason"),
    [
        *((name, "osscar.json", *rest) for name, *rest in CASES),
        *((n, "config.json", (key,), v, why) for n, one, why in CONFIGS for key, v in one.items()),
        ("vit", "preprocessor_config.json", ("size", "height"), 2**20, "size.height"),
    ],
    ids=lambda one: str(one)[-40:],
)
def test_a_size_beyond_its_limit_is_refused_before_there_is_any_memory_for_it(
    name, file, where, value, reason, written, tmp_path
):
    if name == "timm":
        pytest.importorskip("timm")
    copy = tmp_path / name
    shutil.copytree(written / name, copy)
    content = json.loads((copy / file).read_text())
    put(content, where, value)
    (copy / file).write_text(json.dumps(content))
    child = forked(partial(bounded, copy), tmp_path)
    assert child.wait() == 0, child.stderr
    assert re.search(reason, child.stdout), child.stdout


def test_what_would_be_refused_is_not_written():
    small = torch.zeros(4, 6)
    assert Sample.like({"x": small, "count": MOST_NUMBERS - small.numel()}) is not None
    assert Sample.like({"x": small, "count": MOST_NUMBERS}) is None
    large = torch.zeros(1).expand(MOST_NUMBERS // 6 + 1, 6)
    assert Sample.like({"x": large}) is None
    with pytest.raises(AdapterError, match="traced with at most"):
        ProgramTrial(net(), {"input": large}, [])
