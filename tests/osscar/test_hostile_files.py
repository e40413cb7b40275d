"""Files that strangers give: whatever they hold, a reader returns, or raises an error of ours.

Checkpoints whose weights are of other shapes than their config asks for are refused before these
are allocated.  A config that asks for more layers than memory holds is transformers' matter.
"""

import contextlib
import copy
import io
import json
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import osscar
from osscar.base.errors import CheckpointError, FileError, ModelError, OsscarError
from osscar.data.images import load_images
from osscar.data.text import read_text
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY
from osscar.models.weights import read_state
from osscar.network.tensor_files import read_header, read_headers
from tests.osscar.families import tiny
from tests.osscar.networks import plain

READERS = (load_model, osscar.load)
FEW = settings(max_examples=12, deadline=None, derandomize=True)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, -7, 1, 2, 10**5, 1.5, float("nan"), float("inf")]),
    st.text(max_size=3),
    st.sampled_from([[], {}, [{}], [1, -1], {"type": "x"}, {"type": 3}]),
)


@st.composite
def damaged(draw, whole):
    """Give bytes that were a good file: cut off, with some changed, or with something inserted."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, min(len(data) - 1, 400)))
        data[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data)))
        data[place:place] = draw(st.binary(max_size=8))
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return bytes(data)


@st.composite
def changed(draw, whole):
    """Give an object that was a good file, with a value that makes no sense, at any depth."""
    data = json.loads(json.dumps(whole))
    place = data
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(list(keys)))
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside or draw(st.booleans()):
            break
        place = inside
    if isinstance(place, dict) and draw(st.booleans()):
        del place[key]
    else:
        place[key] = copy.deepcopy(draw(VALUES))
    return data


def survives(reader, *arguments):
    """Call a reader; errors of any other tree come through and fail the test."""
    with contextlib.suppress(OsscarError):
        reader(*arguments)


def picture(kind, file):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
WRITERS = {
    "a.png": lambda file: picture("png", file),
    "a.npz": lambda file: np.savez(file, images=np.zeros((2, 4, 4, 3), np.uint8)),
    "a.pt": lambda file: torch.save(STATE, file),
    "a.safetensors": lambda file: file.write(safetensors.torch.save(STATE)),
    "a.txt": lambda file: file.write("naïve\r\n".encode()),
}
OPENED = {".pt": read_state, ".safetensors": read_state, ".txt": read_text}


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(name, tmp_path):
    whole, file = io.BytesIO(), tmp_path / name
    WRITERS[name](whole)

    @FEW
    @given(damaged(whole.getvalue()))
    def check(data):
        file.write_bytes(data)
        if file.suffix in OPENED:
            survives(OPENED[file.suffix], file)
        else:
            place = file if file.suffix == ".npz" else tmp_path
            survives(lambda: load_images(place, plain(4)).tensor())

    check()


# ---- checkpoints -------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Write a tiny model with the tokenizer of the demo; nobody may be asked anything."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    path = tmp_path / "model"
    tiny("opt").save_pretrained(path)
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture
def weights(checkpoint):
    return checkpoint / "model.safetensors"


def edit(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(path, error, match=None):
    for reader in READERS:
        with pytest.raises(error, match=match):
            pytest.fail(f"{path} was read: {reader(path)}")


# ---- the config --------------------------------------------------------------------------


REFUSED = [
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
    ({"transformers_weights": "../other.bin"}, "another file of weights"),
    ({"text_config": {"_attn_implementation": "somebody/kernel"}}, "code that would be fetched"),
]
"""Configs of a model that cannot be pruned, or that would have code fetched."""


def test_a_config_is_refused_by_the_name_of_what_is_wrong(checkpoint):
    file = checkpoint / "config.json"
    whole = file.read_text()
    for changes, reason in REFUSED:
        edit(checkpoint, **changes)
        refused(checkpoint, (CheckpointError, ModelError), reason)
        file.write_text(whole)
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, CheckpointError, "is an adapter")


# ---- kinds of numbers --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.decoder.layers.0.fc1.weight", "lm_head.weight"])
def test_weights_that_are_no_real_numbers(checkpoint, weights, name):
    tensors = load_file(weights)
    tensor = tensors.get(name, torch.ones(2, 2))
    for kind in (torch.complex64, torch.int8, torch.bool):
        save_file({**tensors, name: tensor.to(kind)}, weights, {"format": "pt"})
        refused(checkpoint, CheckpointError, rf"'{name}' is torch\.(complex|int|bool)")


# ---- headers and indices -----------------------------------------------------------------


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,)):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


EIGHT = b"\0" * 8


def test_headers_that_make_no_sense(tmp_path):
    for data in (
        safetensors_file({}, length=2**63),
        safetensors_file({"a": entry(0, 16, shape=[4])}, EIGHT),
        safetensors_file({"a": entry(0, 8)}, EIGHT + b"more"),
        safetensors_file({"a": entry(4, 12)}, EIGHT + b"more"),
    ):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(FileError):
            read_header(tmp_path / "model.safetensors")
    tensors = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = {name: (one.dtype, one.shape) for name, one in read_headers(tmp_path).items()}
    assert found == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_an_index_of_several_files(checkpoint, weights):
    tensors, whole = load_file(weights), osscar.load(checkpoint)
    weights.unlink()
    index = checkpoint / "model.safetensors.index.json"
    for place, reason in (
        ("../other/model.safetensors", "should match pattern"),
        ("model.bin", "should match pattern"),
        ("missing.safetensors", "cannot be read"),
        (3, "string"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, place)}))
        refused(checkpoint, FileError, reason)
    places = {name: f"{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        mine = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        save_file(mine, checkpoint / place)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    again = osscar.load(checkpoint).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())
