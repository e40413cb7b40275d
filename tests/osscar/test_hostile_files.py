"""Files that strangers give: whatever they hold, a reader returns, or raises an error of ours.

Checkpoints whose weights are of other shapes than their config asks for are refused before these
are allocated; see `tests/osscar/test_sizes_in_files.py`, and for names `test_named_elsewhere.py`.
"""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import osscar
from osscar.base.errors import CheckpointError, FileError, ModelError, OsscarError
from osscar.data.images import load_images
from osscar.data.text import read_text
from osscar.models.libraries import read_state
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY
from tests.osscar.families import tiny
from tests.osscar.networks import plain

READERS = (load_model, osscar.load)


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
def test_truncated_files(name, tmp_path):
    whole, file = io.BytesIO(), tmp_path / name
    WRITERS[name](whole)
    size = len(whole.getvalue())
    for end in (0, 4, size // 2, size - 1):
        file.write_bytes(whole.getvalue()[:end])
        if file.suffix in OPENED:
            survives(OPENED[file.suffix], file)
        else:
            place = file if file.suffix == ".npz" else tmp_path
            survives(lambda place=place: load_images(place, plain(4)).tensor())


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


# ---- kinds of numbers --------------------------------------------------------------------


def test_weights_that_are_no_real_numbers(checkpoint, weights):
    tensors, name = load_file(weights), "model.decoder.layers.0.fc1.weight"
    for kind in (torch.complex64, torch.bool):
        save_file({**tensors, name: tensors[name].to(kind)}, weights, {"format": "pt"})
        refused(checkpoint, CheckpointError, rf"'{name}' is torch\.(complex|bool)")


# ---- several files -----------------------------------------------------------------------


def test_an_index_of_several_files(checkpoint, weights):
    tensors, whole = load_file(weights), osscar.load(checkpoint)
    weights.unlink()
    index = checkpoint / "model.safetensors.index.json"
    for place, reason in (
        ("../other/model.safetensors", "should match pattern"),
        ("missing.safetensors", "cannot be read"),
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
